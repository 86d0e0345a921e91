"""How many parameters and how much needed work, in closed form from the shape alone; nothing is loaded.

What is unusual here: a count is a `Line` that carries its formula, in letters and again in this model's numbers, so
that what `graft estimate` shows is what was computed.

Letters: L layers, d model width, V vocabulary, C context, H heads, D width of a head, T tokens of a text, n positions
that stand before it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from graftlm.models.config import FAMILIES, ModelConfig


@dataclass(frozen=True)
class CostItem:
    """A number, what it counts, and the formula that gave it."""

    description: str
    count: int
    formula: str


@dataclass(frozen=True)
class ParameterGroup(CostItem):
    """Some of a model's parameters."""

    module: str
    """Where they are: a role (q, up), or embedding, positions, norms, head, prefix."""
    added: bool = False
    """Whether a method brought them."""
    weights: int = 0
    """How many of them a method multiplies every token with."""


def format_formula(formula: str, **letters: int) -> str:
    """A formula in letters and in numbers: `L r (in + out)` becomes `L r (in + out) = 24 × 4 × (1,024 + 1,024)`."""
    numbers = re.sub(r"[^\W\d]\w*", lambda letter: f"{letters[letter[0]]:,}", formula)
    return f"{formula} = {_PRODUCT.sub(' × ', numbers)}"


_PRODUCT = re.compile(r"(?<=[\w)]) (?=[\w(])")


# Parameters -----------------------------------------------------------------------------------------------------------


def linear_size(shape: ModelConfig, role: str) -> tuple[int, int]:
    """(in_features, out_features) of the role's linear."""
    d, f, q, kv = (
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_heads * shape.head_dim,
        shape.num_kv_heads * shape.head_dim,
    )
    sizes = {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d), "gate": (d, f), "up": (d, f), "down": (f, d)}
    return sizes[role]


def block_parts(shape: ModelConfig, layers: int, last: bool) -> list[ParameterGroup]:
    """All parameters of so many blocks, and with `last` of the norm behind them."""
    parts = []
    for role in shape.roles:
        n_in, n_out = linear_size(shape, role)
        letters = {"L": layers, "in": n_in, "out": n_out}
        if shape.has_bias(role):
            count, formula = layers * (n_in * n_out + n_out), format_formula("L (in out + out)", **letters)
        else:
            count, formula = layers * n_in * n_out, format_formula("L in out", **letters)
        parts.append(
            ParameterGroup(f"{role}, weights{' and biases' if shape.has_bias(role) else ''}", count, formula, role)
        )
    biased = FAMILIES[shape.family].norm_biases  # a weight, and in some families a bias
    each = "2 d" if biased else "d"
    norms = f"{each} (2 L + 1)" if last else f"{each} 2 L"
    count = shape.hidden_size * (2 if biased else 1) * (2 * layers + last)
    return [*parts, ParameterGroup("norms", count, format_formula(norms, L=layers, d=shape.hidden_size), "norms")]


def model_parts(shape: ModelConfig) -> list[ParameterGroup]:
    """All parameters of a model of this shape; a tied head counts once, as the embedding."""
    d, v, c = shape.hidden_size, shape.vocab_size, shape.max_positions
    table = v * d, format_formula("V d", V=v, d=d)
    places = (
        [ParameterGroup("positions", c * d, format_formula("C d", C=c, d=d), "positions")]
        if FAMILIES[shape.family].positions
        else []
    )
    head = [] if shape.tie_embeddings else [ParameterGroup("head", *table, "head")]
    return [
        ParameterGroup("embedding", *table, "embedding"),
        *places,
        *block_parts(shape, shape.num_layers, True),
        *head,
    ]


def total(parts: Sequence[CostItem]) -> int:
    """The sum of the counts."""
    return sum(part.count for part in parts)


def block_parameters(shape: ModelConfig) -> int:
    """All parameters of one block."""
    return total(block_parts(shape, 1, False))


def parameters(shape: ModelConfig) -> int:
    """All parameters of a model of this shape; a tied head counts once."""
    return total(model_parts(shape))


# Work -----------------------------------------------------------------------------------------------------------------


def layer_weights(shape: ModelConfig) -> int:
    """Elements of one block's matrices: what every token is multiplied with."""
    return sum(n_in * n_out for n_in, n_out in (linear_size(shape, role) for role in shape.roles))


def model_flops(
    shape: ModelConfig, tokens: int, *, first_trained: int = 0, below_kept: bool = False, weights_trained: bool = False
) -> int:
    """The floating-point operations that training on `tokens` cannot do without, in the layers' matrices.

    A multiplication and an addition for each weight and token, once forward and once for the input's gradient; once
    more for the weights' gradient where the weights themselves are trained. Blocks below `first_trained` need only the
    forward pass, and nothing where their output is kept from before. Head, attention's own products, norms and an
    adapter's thin matrices are left out, so the share of a machine's peak that is made of this is a lower bound.
    """
    above = (6 if weights_trained else 4) * (shape.num_layers - first_trained)
    below = 0 if below_kept else 2 * first_trained
    return (above + below) * layer_weights(shape) * tokens


def forward_flops(shape: ModelConfig, method_weights: int, tokens: int, before: int) -> dict[str, CostItem]:
    """What reading a text of so many tokens costs for each of them, behind `before` positions.

    A multiplication and an addition for every weight. Attention: a query meets (T + 1) / 2 keys of its own text on
    average and those before it, once for the scores and once for the values.
    """
    letters = _letters(shape, method_weights, tokens, before)
    layers, w, (hd, keys) = shape.num_layers, layer_weights(shape), _attention(shape, tokens, before)
    return {
        "layers": CostItem("layers' matrices", 2 * layers * w, format_formula("2 L W", **letters)),
        "method": CostItem("the method's matrices", 2 * method_weights, format_formula("2 M", **letters)),
        "attention": CostItem(
            "attention's own products", 2 * layers * hd * keys, format_formula(f"2 L {_KEYS}", **letters)
        ),
        "head": CostItem("head", 2 * shape.vocab_size * shape.hidden_size, format_formula("2 V d", **letters)),
    }


def training_flops(
    shape: ModelConfig, method_weights: int, tokens: int, before: int, first: int, weights_in: int, head_trained: bool
) -> dict[str, CostItem]:
    """What training on a text of so many tokens costs for each of them: forward, and the gradients that are needed.

    Args:
        first: the first block that has something trained; those below need no backward pass.
        weights_in: blocks whose own weights are trained, which takes their gradients too.
        head_trained: whether the head's are. The head counts where a target is predicted only.
    """
    back = shape.num_layers - first
    letters = {**_letters(shape, method_weights, tokens, before), "B": back, "G": weights_in}
    w, (hd, keys) = layer_weights(shape), _attention(shape, tokens, before)
    matrices = model_flops(shape, 1, first_trained=first) + 2 * weights_in * w
    head = (6 if head_trained else 4) * shape.vocab_size * shape.hidden_size
    return {
        "layers": CostItem("layers' matrices", matrices, format_formula("2 (L + B + G) W", **letters)),
        "method": CostItem("the method's matrices", 6 * method_weights, format_formula("6 M", **letters)),
        "attention": CostItem(
            "attention's own products",
            2 * (shape.num_layers + 2 * back) * hd * keys,
            format_formula(f"2 (L + 2 B) {_KEYS}", **letters),
        ),
        "head": CostItem("head", head, format_formula("6 V d" if head_trained else "4 V d", **letters)),
    }


_KEYS = "H D (T + 1 + 2 n)"


def _attention(shape: ModelConfig, tokens: int, before: int) -> tuple[int, int]:
    return shape.num_heads * shape.head_dim, tokens + 1 + 2 * before


def _letters(shape: ModelConfig, method_weights: int, tokens: int, before: int) -> dict[str, int]:
    sizes = {
        "L": shape.num_layers,
        "W": layer_weights(shape),
        "M": method_weights,
        "V": shape.vocab_size,
        "d": shape.hidden_size,
    }
    return {**sizes, "H": shape.num_heads, "D": shape.head_dim, "T": tokens, "n": before}


# Memory ---------------------------------------------------------------------------------------------------------------


def memory(trained: int, everything: int, item: int) -> dict[str, CostItem]:
    """Bytes that training holds whatever the batch: frozen weights of `item` bytes, all else in float32."""
    letters = {"N": everything, "t": trained}
    frozen = format_formula(f"{item} (N - t)", **letters)
    return {
        "frozen": CostItem("frozen weights", item * (everything - trained), frozen),
        "trained": CostItem("trained weights", 4 * trained, format_formula("4 t", **letters)),
        "gradients": CostItem("their gradients", 4 * trained, format_formula("4 t", **letters)),
        "moments": CostItem("Adam's two moments", 8 * trained, format_formula("8 t", **letters)),
    }


# Several processes ----------------------------------------------------------------------------------------------------


def memory_of_each(
    shape: ModelConfig, trained: int, everything: int, item: int, processes: int, sharding: str
) -> dict[str, CostItem]:
    """Bytes that each of n processes holds (`training/distributed.py`); of what is cut, its n-th part.

    Args:
        sharding: "none" (each rank holds the model), "frozen" (only frozen weights are sharded) or "full".

    Of what is cut a block's weights are whole while it computes, and the next one's are on their way, in the format of
    the arithmetic; what is outside of blocks is whole until the backward pass is done, as it is kept.
    """
    whole = memory(trained, everything, item)
    if sharding == "none":
        return whole
    shared = {"frozen"} if sharding == "frozen" else set(whole)
    held = {
        name: CostItem(
            line.description, -(-line.count // processes), f"({line.formula.partition(' = ')[0]}) / {processes}"
        )
        if name in shared
        else line
        for name, line in whole.items()
    }
    block, outside, kept = block_parameters(shape), _outside(shape), item if sharding == "frozen" else 4
    formula = format_formula(f"{item} 2 b + {kept} e", b=block, e=outside)
    return {**held, "gathered": CostItem("weights whole for a while", item * 2 * block + kept * outside, formula)}


def _outside(shape: ModelConfig) -> int:
    """Parameters outside of blocks: embedding, positions, last norm, head."""
    return parameters(shape) - shape.num_layers * block_parameters(shape)


def sent_by_each(shape: ModelConfig, trained: int, item: int, processes: int, sharding: str) -> dict[str, CostItem]:
    """Bytes that each of n processes sends in a step of one pass.

    Gradients once; of cut weights those of blocks twice, for the way forth and the way back, the others once. Rings: a
    gather or a scatter of x bytes takes (n - 1) / n x from each, a sum both of them (Thakur et al. 2005).
    """
    blocks, outside = shape.num_layers * block_parameters(shape), _outside(shape)
    letters = {"b": blocks, "e": outside, "t": trained, "n": processes}

    def line(what: str, size: int, formula: str) -> CostItem:
        return CostItem(what, size * (processes - 1) // processes, format_formula(f"{formula} (n - 1) / n", **letters))

    sums = line("gradients, added up", 8 * trained, "8 t")
    if sharding == "none":
        return {"gradients": sums}
    kept = item if sharding == "frozen" else 4
    weights = line("weights, gathered", 2 * item * blocks + kept * outside, f"({2 * item} b + {kept} e)")
    return {
        "weights": weights,
        "gradients": sums if sharding == "frozen" else line("gradients, scattered", 4 * trained, "4 t"),
    }


# A plain feed-forward net ---------------------------------------------------------------------------------------------


def ffn_parts(widths: Sequence[int], weights: bool = True) -> list[ParameterGroup]:
    """Weights and biases of every layer of a net with these widths, the input's first; or the biases alone."""
    parts = []
    for layer, (n_in, n_out) in enumerate(pairwise(widths), 1):
        count = n_in * n_out + n_out if weights else n_out
        formula = format_formula("in out + out" if weights else "out", **{"in": n_in, "out": n_out})
        parts.append(
            ParameterGroup(f"layer {layer}, {'weights and ' * weights}biases", count, formula, f"layer {layer}")
        )
    return parts


def ffn_adapters(widths: Sequence[int], rank: int) -> list[ParameterGroup]:
    """A bottleneck adapter behind every layer."""
    return [
        ParameterGroup(
            f"layer {layer}, adapter",
            2 * d * rank + rank + d,
            format_formula("2 d r + r + d", d=d, r=rank),
            f"layer {layer}",
            added=True,
            weights=2 * d * rank,
        )
        for layer, d in enumerate(widths[1:], 1)
    ]


def ffn_flops(widths: Sequence[int], method_weights: int, weights_trained: bool) -> dict[str, dict[str, CostItem]]:
    """Forward and training of one example; the first layer (I weights) needs no gradient of its input."""
    w, first = sum(a * b for a, b in pairwise(widths)), widths[0] * widths[1]
    letters = {"W": w, "I": first, "M": method_weights}
    training = 2 * (2 * w - first) + 2 * w * weights_trained
    return {
        "forward": {
            "layers": CostItem("layers' matrices", 2 * w, format_formula("2 W", **letters)),
            "method": CostItem("the method's matrices", 2 * method_weights, format_formula("2 M", **letters)),
        },
        "training": {
            "layers": CostItem(
                "layers' matrices",
                training,
                format_formula("2 (3 W - I)" if weights_trained else "2 (2 W - I)", **letters),
            ),
            "method": CostItem("the method's matrices", 6 * method_weights, format_formula("6 M", **letters)),
        },
    }
