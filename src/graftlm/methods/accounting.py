"""How many parameters and how much needed work, in closed form from the shape alone; nothing is loaded."""

from graftlm.models.base import Shape


def linear_size(shape: Shape, role: str) -> tuple[int, int]:
    """(in_features, out_features) of the role's linear."""
    d, f, q, kv = shape.d_model, shape.d_ff, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d), "gate": (d, f), "up": (d, f), "down": (f, d)}
    return sizes[role]


def block_parameters(shape: Shape) -> int:
    """All parameters of one block."""
    biased = {"q": shape.qkv_bias, "k": shape.qkv_bias, "v": shape.qkv_bias, "o": shape.out_bias}
    linears = 0
    for role in shape.roles:
        n_in, n_out = linear_size(shape, role)
        linears += n_in * n_out + n_out * biased.get(role, shape.mlp_bias)
    return linears + 2 * norm_parameters(shape)


def norm_parameters(shape: Shape) -> int:
    """Parameters of one norm."""
    return shape.d_model * (2 if shape.family == "gpt2" else 1)


def parameters(shape: Shape) -> int:
    """All parameters of a model of this shape; a tied head counts once."""
    embeddings = shape.vocab * shape.d_model * (1 if shape.tied else 2)
    positions = shape.context * shape.d_model if shape.family == "gpt2" else 0
    return embeddings + positions + shape.layers * block_parameters(shape) + norm_parameters(shape)


def layer_weights(shape: Shape) -> int:
    """Elements of one block's matrices: what every token is multiplied with."""
    return sum(n_in * n_out for n_in, n_out in (linear_size(shape, role) for role in shape.roles))


def needed_flops(
    shape: Shape, tokens: int, *, first_trained: int = 0, below_kept: bool = False, weights_trained: bool = False
) -> int:
    """The floating-point operations that training on `tokens` cannot do without, in the layers' matrices.

    A multiplication and an addition for each weight and token, once forward and once for the input's gradient; once
    more for the weights' gradient where the weights themselves are trained. Blocks below `first_trained` need only the
    forward pass, and nothing where their output is kept from before. Head, attention's own products, norms and an
    adapter's thin matrices are left out, so the share of a machine's peak that is made of this is a lower bound.
    """
    above = (6 if weights_trained else 4) * (shape.layers - first_trained)
    below = 0 if below_kept else 2 * first_trained
    return (above + below) * layer_weights(shape) * tokens
