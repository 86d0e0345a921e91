"""Parameters, FLOPs and memory in closed form, from the model's configuration alone; no weights are loaded.

Each number is a `CostItem`, computed from the formula that is displayed with it, so the two cannot disagree.

Letters: L layers, d hidden size, V vocabulary size, C context length, H heads, D width of a head, T tokens of a text,
n positions of a learned prefix, K / 2 keys that a query sees where layers have windows.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from graftlm.models.config import ModelConfig


@dataclass(frozen=True)
class CostItem:
    """A number, what it counts, and its formula."""

    description: str
    count: int
    formula: str


@dataclass(frozen=True)
class ParameterGroup(CostItem):
    """Some of a model's parameters."""

    module: str
    """Where they are: a role (q, up), or embedding, positions, norms, head, prefix."""
    added: bool = False
    """Whether a method adds them to the base."""
    weights: int = 0
    """How many of them are elements of a method's own matrices, which every token is multiplied with."""


_PRODUCT = re.compile(r"(?<=[\w)]) (?=[\w(])")


def format_formula(formula: str, **letters: int) -> str:
    """A formula in letters and in numbers: `L r (in + out)` becomes `L r (in + out) = 24 × 4 × (1,024 + 1,024)`."""
    numbers = re.sub(r"[^\W\d]\w*", lambda letter: f"{letters[letter[0]]:,}", formula)
    return f"{formula} = {_PRODUCT.sub(' × ', numbers)}"


def counted(description: str, formula: str, **letters: int) -> tuple[str, int, str]:
    """The fields of a `CostItem` whose count is the value of the formula; a quotient is rounded down."""
    text = format_formula(formula, **letters)
    expression = text.partition(" = ")[2].replace(",", "").replace("×", "*").replace("/", "//")
    return description, int(eval(expression)), text  # numbers, operators and parentheses only


def total(items: Sequence[CostItem]) -> int:
    """The sum of the counts."""
    return sum(item.count for item in items)


# Parameters -----------------------------------------------------------------------------------------------------------


def linear_size(config: ModelConfig, role: str) -> tuple[int, int]:
    """(in_features, out_features) of the role's linear."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = {"q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d), "gate": (d, f), "up": (d, f), "down": (f, d)}
    return {**sizes, "conv_in": (d, 3 * d), "conv_out": (d, d)}[role]


def linear_group(
    config: ModelConfig, role: str, layers: range, description: str, formula: str, **letters: int
) -> ParameterGroup:
    """Parameters of the role's linear in these layers; the formula's letters are L, in and out, and those given."""
    n_in, n_out = linear_size(config, role)
    sizes = {"L": len(config.layers_with(role, layers)), "in": n_in, "out": n_out, **letters}
    return ParameterGroup(*counted(f"{role}, {description}", formula, **sizes), role)


def norms_formula(config: ModelConfig, layers: range) -> str:
    """Elements of the norms' weights in these layers, with the final norm's if they include the last layer."""
    last = layers.stop == config.num_layers
    widths = [sum(config.norm_sizes(config.layer(i)).values()) for i in layers]
    if set(widths) == {2 * config.hidden_size}:
        return "d (2 L + 1)" if last else "d 2 L"
    norms = f"{widths[0]} L" if len(set(widths)) == 1 else str(sum(widths))
    return f"({norms} + d)" if last else norms


def block_parts(config: ModelConfig, layers: range) -> list[ParameterGroup]:
    """All parameters of these layers, and of the final norm if they include the last one."""
    kinds = {True: ("weights and biases", "L (in out + out)"), False: ("weights", "L in out")}
    parts = [linear_group(config, role, layers, *kinds[config.has_bias(role)]) for role in config.roles]
    formula = ("2 " if config.norm_biases else "") + norms_formula(config, layers)
    norms = counted("norms", formula, L=len(layers), d=config.hidden_size)
    if lengths := [length for i in layers if (length := config.layer(i).conv_length) is not None]:
        kernels = counted("convolutions", "L d k", L=len(lengths), d=config.hidden_size, k=lengths[0])
        parts.append(ParameterGroup(*kernels, "conv"))
    return [*parts, *expert_parts(config, layers), ParameterGroup(*norms, "norms")]


def expert_parts(config: ModelConfig, layers: range, biases_only: bool = False) -> list[ParameterGroup]:
    """Parameters of routers, experts and attention sinks in these layers."""
    parts, with_sinks = [], [i for i in layers if config.layer(i).attention_sinks]
    mixed = [(i, experts) for i in layers if (experts := config.layer(i).experts)]
    if mixed:
        experts = mixed[0][1]
        letters = {"L": len(mixed), "E": experts.count, "d": config.hidden_size, "f": experts.intermediate_size}
        router, mlp = ([] if biases_only else ["L E d"]), ([] if biases_only else ["L E 3 d f"])
        router += ["L E"] if experts.router_bias else []
        mlp += ["L E (2 f + d)"] if config.mlp_bias else []
        named = (("router", router), ("experts", mlp))
        parts += [ParameterGroup(*counted(name, " + ".join(f), **letters), name) for name, f in named if f]
    if with_sinks and not biases_only:
        sinks = counted("attention sinks", "L H", L=len(with_sinks), H=config.num_heads)
        parts.append(ParameterGroup(*sinks, "sinks"))
    return parts


def model_parts(config: ModelConfig) -> list[ParameterGroup]:
    """All parameters of the model; tied embeddings count once."""
    letters = {"V": config.vocab_size, "d": config.hidden_size, "C": config.position_rows}
    parts = [ParameterGroup(*counted("embedding", "V d", **letters), "embedding")]
    if config.learned_positions:
        parts.append(ParameterGroup(*counted("positions", "C d", **letters), "positions"))
    parts += block_parts(config, range(config.num_layers))
    if not config.tie_embeddings:
        formula = "V d + V" if config.head_bias else "V d"
        parts.append(ParameterGroup(*counted("head", formula, **letters), "head"))
    return parts


def parameters(config: ModelConfig) -> int:
    """Number of parameters of the model; tied embeddings count once."""
    return total(model_parts(config))


def block_parameters(config: ModelConfig) -> int:
    """Number of parameters of one block; the mean where blocks differ."""
    return (total(block_parts(config, range(config.num_layers))) - _final_norm(config)) // config.num_layers


def _final_norm(config: ModelConfig) -> int:
    return config.hidden_size * (2 if config.norm_biases else 1)


# FLOPs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passes:
    """How many of the model's blocks a step computes in each pass; `Method.passes` gives it."""

    forward: int
    backward: int = 0
    """Blocks through which gradients of activations flow."""
    weight_grads: int = 0
    """Blocks whose own weights have gradients."""
    head: int = 2
    """Products with the head's matrix: forward, for the gradient of its input, and if it is trained, of its weight."""


def layer_weights(config: ModelConfig) -> int:
    """Elements of one block's matrices that a token meets; the mean where blocks differ."""
    sizes = {role: math.prod(linear_size(config, role)) for role in config.roles}
    plain = sum(len(config.layers_with(role)) * size for role, size in sizes.items())
    mixed = [experts for i in range(config.num_layers) if (experts := config.layer(i).experts)]
    routed = sum(config.hidden_size * (e.count + 3 * e.per_token * e.intermediate_size) for e in mixed)
    return (plain + routed) // config.num_layers


def model_flops(config: ModelConfig, tokens: int, passes: Passes) -> int:
    """Model FLOPs of a training step on `tokens`, in the blocks' matrices: a multiply and an add per weight and pass.

    Head, attention scores, norms and an adapter's low-rank matrices are left out, so an MFU computed from this number
    is a lower bound.
    """
    return 2 * (passes.forward + passes.backward + passes.weight_grads) * layer_weights(config) * tokens


def _keys(config: ModelConfig, tokens: int) -> tuple[str, dict[str, int]]:
    """The formula of attention's scores and values of a token in a layer, and its letters.

    A query sees (T + 1) / 2 keys of its text on average, and n; with windows K / 2 and n, in the mean of the layers.
    """
    widths = [min(config.layer(i).window or tokens, tokens) for i in config.layers_with("q")]
    if set(widths) == {tokens}:
        return "H D (T + 1 + 2 n)", {}
    return "H D (K + 2 n)", {"K": sum(w * (2 * tokens - w + 1) for w in widths) // (tokens * len(widths))}


def forward_flops(config: ModelConfig, method_weights: int, tokens: int, prefix: int) -> dict[str, CostItem]:
    """FLOPs per token of the forward pass over a text of `tokens`, after a learned prefix of `prefix` positions."""
    keys, letters = _keys(config, tokens)
    letters |= _letters(config, method_weights, tokens, prefix)
    return _flops(("2 L W", "2 M", f"2 L {keys}", "2 V d"), letters)


def training_flops(
    config: ModelConfig, method_weights: int, tokens: int, prefix: int, passes: Passes
) -> dict[str, CostItem]:
    """FLOPs per token of forward and backward pass, with a target at each token."""
    keys, letters = _keys(config, tokens)
    letters |= _letters(config, method_weights, tokens, prefix) | {"B": passes.backward, "G": passes.weight_grads}
    head = f"{2 * passes.head} V d"
    return _flops(("2 (L + B + G) W", "6 M", f"2 (L + 2 B) {keys}", head), letters)


def _letters(config: ModelConfig, method_weights: int, tokens: int, prefix: int) -> dict[str, int]:
    sizes = {"L": config.num_layers, "W": layer_weights(config), "M": method_weights, "V": config.vocab_size}
    mean_heads = config.num_heads * len(config.layers_with("q")) // config.num_layers  # convolutions have none
    heads = {"d": config.hidden_size, "H": mean_heads, "D": config.head_dim}
    return {**sizes, **heads, "T": tokens, "n": prefix}


def _flops(formulas: Sequence[str], letters: Mapping[str, int]) -> dict[str, CostItem]:
    """The items of these formulas: layers and method, and if there are two more, attention and head."""
    names = ("layers", "method", "attention", "head")
    descriptions = ("layers' matrices", "the method's matrices", "attention's own products", "head")
    items = zip(names, descriptions, formulas, strict=False)
    return {name: CostItem(*counted(description, formula, **letters)) for name, description, formula in items}


# Memory ---------------------------------------------------------------------------------------------------------------


def memory(
    trained: int, everything: int, item: int, packed: Mapping[tuple[int, int], int] | None = None
) -> dict[str, CostItem]:
    """Bytes of training that do not depend on the batch: frozen weights of `item` bytes each, the rest in float32.

    packed: (bytes, values) of a block -> how many of the frozen weights are stored in such blocks.
    """
    packed = packed or {}
    letters, blocks = {"N": everything, "t": trained}, dict(zip("PQ"[: len(packed)], packed.items(), strict=True))
    numbers = letters | {letter: count for letter, (_, count) in blocks.items()}
    dense = f"{item} (N - t{''.join(f' - {letter}' for letter in blocks)})"
    terms = [f"{size} {letter} / {values}" for letter, ((size, values), _) in blocks.items()]
    return {
        "frozen": CostItem(*counted("frozen weights", " + ".join([*terms, dense]), **numbers)),
        "trained": CostItem(*counted("trained weights", "4 t", **letters)),
        "gradients": CostItem(*counted("their gradients", "4 t", **letters)),
        "optimizer_state": CostItem(*counted("AdamW's optimizer state", "8 t", **letters)),
    }


# Several ranks --------------------------------------------------------------------------------------------------------


def memory_of_each(
    config: ModelConfig, trained: int, everything: int, item: int, world_size: int, sharding: str
) -> dict[str, CostItem]:
    """Bytes on each rank (`training/distributed.py`).

    Args:
        config: the model.
        trained, everything: parameters that are trained, and all of them.
        item: bytes of a frozen weight.
        world_size: number of ranks.
        sharding: "none" (each rank has the whole model), "frozen" (frozen weights are sharded) or "full".

    Of a sharded model a block is gathered while it computes, and the next one is being gathered, both in the dtype of
    the computation; weights outside of blocks stay gathered until the backward pass is done, in the dtype they are
    stored in.
    """
    items = memory(trained, everything, item)
    if sharding == "none":
        return items
    for name in ("frozen",) if sharding == "frozen" else tuple(items):
        formula, count = f"({items[name].formula.partition(' = ')[0]}) / {world_size}", items[name].count
        items[name] = CostItem(items[name].description, -(-count // world_size), formula)
    block, outside = block_parameters(config), _outside(config)
    formula = f"{item} 2 b + {item if sharding == 'frozen' else 4} e"
    return {**items, "gathered": CostItem(*counted("weights gathered for a while", formula, b=block, e=outside))}


def _outside(config: ModelConfig) -> int:
    """Parameters outside of blocks: embedding, positions, final norm, head."""
    return parameters(config) - config.num_layers * block_parameters(config)


def sent_by_each(config: ModelConfig, trained: int, item: int, world_size: int, sharding: str) -> dict[str, CostItem]:
    """Bytes that each rank sends in a step without gradient accumulation.

    Gradients once; sharded weights of blocks twice, for the forward and the backward pass, the others once. In a ring a
    gather or a scatter of x bytes takes (n - 1) / n x from each rank, an all-reduce twice that (Thakur et al. 2005).
    """
    blocks = config.num_layers * block_parameters(config)
    letters = {"b": blocks, "e": _outside(config), "t": trained, "n": world_size}

    def ring(description: str, formula: str) -> CostItem:
        return CostItem(*counted(description, f"{formula} (n - 1) / n", **letters))

    reduced = ring("gradients, all-reduced", "8 t")
    if sharding == "none":
        return {"gradients": reduced}
    weights = ring("weights, gathered", f"({2 * item} b + {item if sharding == 'frozen' else 4} e)")
    return {"weights": weights, "gradients": reduced if sharding == "frozen" else ring("gradients, scattered", "4 t")}


# A plain feed-forward net ---------------------------------------------------------------------------------------------


def ffn_parts(widths: Sequence[int]) -> list[ParameterGroup]:
    """Weights and biases of every layer of a net with these widths, the input's first."""
    return _ffn_layers(widths, "weights and biases", "in out + out")


def ffn_biases(widths: Sequence[int]) -> list[ParameterGroup]:
    """The biases of every layer."""
    return _ffn_layers(widths, "biases", "out")


def ffn_adapters(widths: Sequence[int], rank: int) -> list[ParameterGroup]:
    """A bottleneck adapter after every layer."""
    parts = _ffn_layers(widths, "adapter", "2 d r + r + d", r=rank)
    return [replace(p, added=True, weights=2 * d * rank) for p, d in zip(parts, widths[1:], strict=True)]


def _ffn_layers(widths: Sequence[int], description: str, formula: str, **letters: int) -> list[ParameterGroup]:
    sizes = ((f"layer {i}", letters | {"in": a, "out": b, "d": b}) for i, (a, b) in enumerate(pairwise(widths), 1))
    return [ParameterGroup(*counted(f"{name}, {description}", formula, **size), name) for name, size in sizes]


def ffn_flops(widths: Sequence[int], method_weights: int, passes: int) -> dict[str, dict[str, CostItem]]:
    """FLOPs of one example, forward and in training; the gradient of the net's input is not computed.

    `passes` is 2 where only activations have gradients (forward, backward), 3 where the weights have them too. I are
    the weights of the first layer.
    """
    letters = {"W": sum(a * b for a, b in pairwise(widths)), "I": widths[0] * widths[1], "M": method_weights}
    training = _flops((f"2 ({passes} W - I)", "6 M"), letters)
    return {"forward": _flops(("2 W", "2 M"), letters), "training": training}
