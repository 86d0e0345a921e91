"""How many parameters and how much needed work, in closed form from the shape alone; nothing is loaded."""

from graftlm.models.base import Shape


def linear_size(shape: Shape, role: str) -> tuple[int, int]:
    """(in_features, out_features) of the role's linear."""
    d, f, q, kv = shape.d_model, shape.d_ff, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d), "gate": (d, f), "up": (d, f), "down": (f, d)}
    return sizes[role]


def parameters(shape: Shape) -> int:
    """All parameters of a model of this shape; a tied head counts once."""
    biased = {"q": shape.qkv_bias, "k": shape.qkv_bias, "v": shape.qkv_bias, "o": shape.out_bias}
    block = 0
    for role in shape.roles:
        n_in, n_out = linear_size(shape, role)
        block += n_in * n_out + n_out * biased.get(role, shape.mlp_bias)
    norm = shape.d_model * (2 if shape.family == "gpt2" else 1)
    embeddings = shape.vocab * shape.d_model * (1 if shape.tied else 2)
    positions = shape.context * shape.d_model if shape.family == "gpt2" else 0
    return embeddings + positions + shape.layers * (block + 2 * norm) + norm


def layer_weights(shape: Shape) -> int:
    """Elements of the matrices of all layers: what every token is multiplied with; no embedding, head or bias."""
    sizes = (linear_size(shape, role) for role in shape.roles)
    return shape.layers * sum(n_in * n_out for n_in, n_out in sizes)


def needed_flops(shape: Shape, tokens: int, *, weights_trained: bool = False) -> int:
    """The floating-point operations that training on `tokens` cannot do without, in the layers' matrices.

    A multiplication and an addition for each weight and token, once forward and once for the input's gradient; once
    more for the weights' gradient where the weights themselves are trained. Head, attention's own products, norms and
    an adapter's thin matrices are left out, so the share of a machine's peak that is made of this is a lower bound.
    """
    return (6 if weights_trained else 4) * layer_weights(shape) * tokens
