"""Model configuration, and checkpoint names <-> ours: config.json to `ModelConfig`, tensors to parameters and back.

A family is one file (`gpt2.py`, `llama.py`, `neox.py`) with two things: a reader from config.json to `ModelConfig`, and
a `ModelFamily`, the table of its tensor names. One decoder block (`decoder.py`) computes all of them. Other code reads
the configuration and the table; it never asks for a family by name.

A linear may be stored transposed, fused with others, or with the dimensions of its heads in another order.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.files.formats import LazyTensors
from graftlm.models.nearest import refusal
from graftlm.models.packed import FORMATS, PackedWeight
from graftlm.models.rope import RopeConfig
from graftlm.models.settings import Activation, Settings, refuse_quantized

ROLES = ("q", "k", "v", "o", "conv_in", "conv_out", "up", "gate", "down")
Rows = slice | Tensor
"""Rows of a fused linear: a slice, or their indices [out]."""


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts: a router sends each token to some of several MLPs."""

    count: int
    per_token: int
    intermediate_size: int
    """Of each expert."""
    normalized: bool = True
    """Whether the probabilities of a token's experts are divided by their sum."""
    router_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What one decoder layer computes. The defaults are Llama's."""

    rope: RopeConfig | None = field(default_factory=RopeConfig)
    """None: no rotation."""
    window: int | None = None
    """Sliding window: a token attends to itself and the `window` - 1 tokens before it. None: to all before it."""
    attention_scale: float | None = None
    """Factor of q k^T; None: head_dim ** -0.5."""
    attention_softcap: float | None = None
    """c: scores become c tanh(score / c) before the mask."""
    attention_sinks: bool = False
    """A learned score of each head in the softmax, whose weight is dropped (gpt-oss)."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """Norm of q and k before the rotation: of each head (Qwen3, Gemma 3), or of all heads together (OLMo 2)."""
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = True
    """Whether layer norms have a bias; RMS norms never have."""
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """At the input of attention and MLP (`norm1`, `norm2`), at their output (`post_norm1`, `post_norm2`), or both."""
    norm_offset: float = 0.0
    """Added to the weight of RMS norms: 1 in Gemma, which stores w and multiplies by 1 + w."""
    activation: Activation = "silu"
    gated: bool = True
    """down(activation(gate(x)) * up(x)); without: down(activation(up(x)))."""
    experts: ExpertsConfig | None = None
    """A mixture of experts instead of one MLP. Methods that adapt linears leave it as it is."""
    parallel: bool = False
    """Attention and MLP read the same x and are added to it together (GPT-NeoX)."""
    single_norm: bool = False
    """Of parallel attention and MLP: both read norm1(x) (GPT-J, Cohere)."""
    residual_multiplier: float = 1.0
    """Factor of the outputs of attention and MLP before they are added (Granite)."""
    conv_length: int | None = None
    """L: a short convolution over the last L tokens takes the place of attention (LFM2). None: attention."""

    @property
    def roles(self) -> tuple[str, ...]:
        """Its linears, in the order of `ROLES`."""
        mixer = ("q", "k", "v", "o") if self.conv_length is None else ("conv_in", "conv_out")
        return (*mixer, *(() if self.experts else ("up", "gate", "down") if self.gated else ("up", "down")))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides a model's tensors and its arithmetic; `read_model_config` reads it."""

    family: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    """The context length."""
    norm_eps: float
    layers: tuple[LayerConfig, ...] = ()
    """One for all, one each, or a repeating pattern: layer i has settings i modulo their number. Empty: family's."""
    tie_embeddings: bool = True
    """Whether the head is the embedding."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    position_offset: int = 0
    """Row of the learned positions that the first token has (2 in OPT)."""
    embedding_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    logits_softcap: float | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            object.__setattr__(self, "layers", (FAMILIES[self.family].layer,))

    def layer(self, i: int) -> LayerConfig:
        """The settings of layer i."""
        return self.layers[i % len(self.layers)]

    @property
    def roles(self) -> tuple[str, ...]:
        """The linears that some layer has, in the order of `ROLES`."""
        found = {role for layer in self.layers for role in layer.roles}
        return tuple(role for role in ROLES if role in found)

    def layers_with(self, role: str, layers: range | None = None) -> list[int]:
        """Those of these layers (None: of all) that have the role's linear."""
        return [i for i in layers or range(self.num_layers) if role in self.layer(i).roles]

    def has_bias(self, role: str) -> bool:
        """Whether the role's linear adds a bias."""
        mixers = {**dict.fromkeys("qkv", self.qkv_bias), "o": self.out_bias, "conv_in": False, "conv_out": False}
        return mixers.get(role, self.mlp_bias)

    @property
    def norm_biases(self) -> bool:
        """Whether norms have a bias in addition to their weight."""
        return self.layers[0].norm == "layer" and self.layers[0].norm_bias

    def norm_sizes(self, layer: LayerConfig) -> dict[str, int]:
        """Norms of a layer: module inside the block -> width."""
        pre, post = ("norm1",) if layer.single_norm else ("norm1", "norm2"), ("post_norm1", "post_norm2")
        names = {"pre": pre, "post": post, "both": (*pre, *post)}[layer.norm_placement]
        sizes = dict.fromkeys(names, self.hidden_size)
        if layer.qk_norm != "none":
            q, k = (self.num_heads, self.num_kv_heads) if layer.qk_norm == "all" else (1, 1)
            sizes |= {"attn.q_norm": q * self.head_dim, "attn.k_norm": k * self.head_dim}
        return sizes

    @property
    def learned_positions(self) -> bool:
        """Whether position vectors are learned and added to the embeddings."""
        return FAMILIES[self.family].positions is not None

    @property
    def position_rows(self) -> int:
        """Rows of the table of learned positions."""
        return self.max_positions + self.position_offset


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """Architectures that differ in sizes and settings only, and the names of their tensors in checkpoints."""

    name: str
    model_types: tuple[str, ...]
    """Values of model_type in config.json."""
    read: Callable[[Mapping[str, Any], str], ModelConfig]
    """config.json (and the file's name, for errors) -> configuration; KeyError for a missing setting."""
    layer: LayerConfig
    """Default settings of a layer."""
    embed: str
    """Module of the token embedding in the checkpoint; likewise the following."""
    last_norm: str
    head: str
    layers: str
    """Prefix of a layer's number: `model.layers.`."""
    linears: Mapping[str, str]
    """Role -> module inside a layer; fused roles share one."""
    norms: Mapping[str, str]
    """Our norm inside a block (`norm1`, `post_norm2`, `attn.q_norm`, …) -> module inside a layer."""
    positions: str | None = None
    """Table of learned positions."""
    transposed: bool = False
    """Whether linears are stored [in, out]."""
    fused_slices: Callable[[ModelConfig, str], Rows | None] | None = None
    """(configuration, role) -> the role's rows of a fused linear [out, in]; None: not fused."""
    router: str = "mlp.gate"
    """Router of a mixture of experts."""
    expert: "Callable[[ModelConfig, int, str, str], TensorMapping] | None" = None
    """(configuration, expert, role, weight or bias) -> where it is inside a layer."""
    ignored: str = r"(?!)"
    """Regular expression for the end of names of tensors that carry no weights (old files store masks)."""
    with_biases: Callable[[Mapping[str, Any], ModelConfig, ModelConfig], dict[str, Any] | None] | None = None
    """(config.json, its configuration, the same with other biases) -> a config.json of the latter, if there is one."""


FAMILIES: dict[str, ModelFamily] = {}
"""Name -> family; filled by `models/__init__.py`."""


# config.json -> ModelConfig -------------------------------------------------------------------------------------------


def read_model_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes; `where` names the file in errors."""
    if not isinstance(config, dict):
        raise InputError(f"{where}: not a JSON object: fetch it again")
    model_type = config.get("model_type")
    family = next((family for family in FAMILIES.values() if model_type in family.model_types), None)
    if family is None:
        supported = [name for family in FAMILIES.values() for name in family.model_types]
        raise InputError(f"{where}: {refusal(config, supported)}")
    refuse_quantized(config, where)
    Settings(config, where).check_sizes()
    try:
        return family.read(config, where)
    except KeyError as e:
        raise InputError(f"{where}: the setting {e.args[0]!r} is missing") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as e:
        raise InputError(f"{where}: a setting has a value that it cannot have ({e}): fetch the file again") from None


def with_biases(config: Mapping[str, Any], model: ModelConfig, where: str) -> dict[str, Any]:
    """The base's config.json, changed to have the biases of `model`: the inverse of `read_model_config`.

    Raises InputError if none of the family's can be written.
    """
    base = read_model_config(config, where)
    if base.tie_embeddings and not model.tie_embeddings:  # `untie_if_different`
        tied = dict.fromkeys(("tie_word_embeddings", *({"tie_embedding"} & {*config})), False)  # LFM2 has both
        base, config = replace(base, tie_embeddings=False), {**config, **tied}
    if base == model:
        return dict(config)
    change = FAMILIES[model.family].with_biases
    if change is None or (changed := change(config, base, model)) is None:
        raise InputError(
            f"{where}: no config.json is written for a {base.family} model with added biases: export the adapter "
            "(--format peft)"
        )
    return changed


# Tensors --------------------------------------------------------------------------------------------------------------


def our_linear(i: int, role: str) -> str:
    """The name of the role's linear in block i: `blocks.0.attn.q`, `blocks.0.mlp.up`."""
    return f"blocks.{i}.{'mlp' if role in ('up', 'gate', 'down') else 'attn'}.{role}"


@dataclass(frozen=True)
class TensorMapping:
    """Where a checkpoint stores one of our parameters: ours = (transpose of the tensor)[rows]."""

    name: str
    transposed: bool = False
    rows: Rows | None = None
    """Slice of a fused tensor, or a permutation; None: all rows in their order."""
    index: int | None = None
    """Expert of a tensor [E, ...] that holds those of all experts."""

    def read(self, t: Tensor) -> Tensor:
        """Our parameter from the checkpoint's tensor."""
        t = self.transpose_if_needed(t if self.index is None else t[self.index])
        return t if self.rows is None else t[self.rows]

    def load(self, stored: LazyTensors, key: str) -> Tensor:
        """Our parameter from the checkpoint's tensor `key`; of one for all experts, only ours is read."""
        if self.index is None:
            return self.read(stored[key])
        return replace(self, index=0).read(stored.part(key, slice(self.index, self.index + 1)))

    def load_packed(self, stored: LazyTensors, key: str, dtype: torch.dtype) -> PackedWeight:
        """Our parameter from packed blocks, which are [out, bytes] in every family; dtype: of the arithmetic."""
        kind = stored_format(key)
        assert kind is not None
        return PackedWeight(replace(self, transposed=False).load(stored, key).clone(), kind, dtype)

    def transpose_if_needed(self, t: Tensor) -> Tensor:
        """The checkpoint's [in, out] -> [out, in], or the inverse; a bias is unchanged."""
        return t.t() if self.transposed and t.dim() == 2 else t

    def part(self, stored: LazyTensors, key: str, wanted: range) -> Tensor:
        """The wanted rows of ours (at least one) from the checkpoint's tensor `key`, of which little more is read."""
        if self.index is not None:
            return self.load(stored, key)[wanted.start : wanted.stop]
        within: Rows = slice(None)
        among = slice(wanted.start, wanted.stop)
        if isinstance(self.rows, slice):
            among = slice(self.rows.start + wanted.start, self.rows.start + wanted.stop)
        elif self.rows is not None:
            picked = self.rows[among]
            among = slice(int(picked.min()), int(picked.max()) + 1)
            within = picked - among.start
        transposed = self.transposed and len(stored.shape(key)) == 2
        t = stored.part(key, slice(None), among) if transposed else stored.part(key, among)
        return self.transpose_if_needed(t)[within]


def rotary_permutation(config: ModelConfig, i: int = 0) -> Tensor | None:
    """Which of a stored head's dimensions of q and k is at each of ours in layer i, [D]; None: the same order.

    Rotary pairs are (j, j + D/2) here, and (j, j + R/2) or (2j, 2j + 1) of the first R dimensions in checkpoints. q k^T
    is unchanged if both are permuted in the same way; the pairs that do not rotate get angles of zero.
    """
    rope = config.layer(i).rope
    if rope is None or (rope.dim in (None, config.head_dim) and not rope.interleaved):
        return None
    at, r = torch.arange(config.head_dim), rope.dim or config.head_dim
    a, b = (at[:r:2], at[1:r:2]) if rope.interleaved else at[:r].chunk(2)
    c, d = at[r:].chunk(2) if r < config.head_dim else (at[r:], at[r:])
    return torch.cat([a, c, b, d])


def file_rows(config: ModelConfig, role: str, i: int = 0) -> Rows | None:
    """The rows of the checkpoint's linear that are the role's in layer i, in our order; None: all in the same order."""
    slices = FAMILIES[config.family].fused_slices
    rows = slices(config, role) if slices else None
    order = rotary_permutation(config, i) if role in "qk" else None
    if order is None:
        return rows
    heads = torch.arange(config.num_heads if role == "q" else config.num_kv_heads)[:, None]
    permuted = (heads * config.head_dim + order).flatten()
    return permuted if rows is None else permuted + rows.start if isinstance(rows, slice) else rows[permuted]


def stored_linears(config: ModelConfig, i: int) -> dict[str, dict[str, Rows]]:
    """The checkpoint's linears in layer i: module inside the layer -> each role that it holds and its rows of [out]."""
    modules: dict[str, dict[str, Rows]] = {}
    for role in config.layer(i).roles:
        rows = file_rows(config, role, i)
        modules.setdefault(FAMILIES[config.family].linears[role], {})[role] = slice(None) if rows is None else rows
    return modules


def tensor_mapping(config: ModelConfig) -> dict[str, TensorMapping]:
    """Our parameter name -> where a checkpoint stores it, for every parameter."""
    family, kinds = FAMILIES[config.family], {True: ("weight", "bias"), False: ("weight",)}
    mapping = {"embed.weight": TensorMapping(f"{family.embed}.weight")}
    if family.positions:
        mapping["positions.weight"] = TensorMapping(f"{family.positions}.weight")
    for i in range(config.num_layers):
        theirs = f"{family.layers}{i}"
        for norm in config.norm_sizes(config.layer(i)):
            per_head = norm in ("attn.q_norm", "attn.k_norm") and config.layer(i).qk_norm == "head"
            order = rotary_permutation(config, i) if per_head else None
            for kind in kinds[config.norm_biases]:
                name = f"{theirs}.{family.norms[norm]}.{kind}"
                mapping[f"blocks.{i}.{norm}.{kind}"] = TensorMapping(name, rows=order)
        for role in config.layer(i).roles:
            rows = file_rows(config, role, i)
            for kind in kinds[config.has_bias(role)]:
                name = f"{theirs}.{family.linears[role]}.{kind}"
                mapping[f"{our_linear(i, role)}.{kind}"] = TensorMapping(name, family.transposed, rows)
        mapping |= {
            f"blocks.{i}.{name}": replace(place, name=f"{theirs}.{place.name}")
            for name, place in other_tensors(config, config.layer(i)).items()
        }
    for kind in kinds[config.norm_biases]:
        mapping[f"norm.{kind}"] = TensorMapping(f"{family.last_norm}.{kind}")
    if not config.tie_embeddings:
        mapping["head.weight"] = TensorMapping(f"{family.head}.weight")
    if config.head_bias:
        mapping["head.bias"] = TensorMapping(f"{family.head}.bias")
    return mapping


def other_tensors(config: ModelConfig, layer: LayerConfig) -> dict[str, TensorMapping]:
    """Short convolution, attention sinks, router and experts, by our names and the checkpoint's inside a layer."""
    family, found, kinds = FAMILIES[config.family], dict[str, TensorMapping](), ("weight", "bias")
    if layer.conv_length is not None:
        found["attn.conv.weight"] = TensorMapping("conv.conv.weight")
    if layer.attention_sinks:
        found["attn.sinks"] = TensorMapping("self_attn.sinks")
    if layer.experts is not None:
        assert family.expert is not None
        for kind in kinds[: 1 + layer.experts.router_bias]:
            found[f"mlp.router.{kind}"] = TensorMapping(f"{family.router}.{kind}")
        roles = ("gate", "up", "down") if layer.gated else ("up", "down")
        for e, role, kind in product(range(layer.experts.count), roles, kinds[: 1 + config.mlp_bias]):
            found[f"mlp.experts.{e}.{role}.{kind}"] = family.expert(config, e, role, kind)
    return found


def stored_name(name: str, stored: Iterable[str]) -> str | None:
    """The checkpoint's tensor `name`, with or without transformers' outer prefix (GPT-2's on the hub lack it).

    A packed one's name ends with its format.
    """
    bare = name.partition(".")[2] if name.count(".") > 1 else name
    ends = ("", *(f".{kind}" for kind in FORMATS))
    return next((n + end for end in ends for n in (name, bare) if n + end in stored), None)


def stored_format(key: str) -> str | None:
    """The format of a packed tensor, which its name ends with; None if it is not packed."""
    kind = key.rpartition(".")[2]
    return kind if kind in FORMATS else None


def check_names(config: ModelConfig, stored: Iterable[str], where: str) -> None:
    """InputError unless every tensor is present and no other; the message names the first."""
    present, family = set(stored), FAMILIES[config.family]
    expected = {stored_name(m.name, present) or m.name for m in tensor_mapping(config).values()}
    if missing := sorted(expected - present):
        raise InputError(f"{where}: the tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are)")
    known = {f"{family.head}.weight"} if config.tie_embeddings else set()
    unexpected = {n for n in present - expected - known if not re.search(family.ignored, n)}
    if unexpected:
        raise InputError(f"{where}: the tensor {min(unexpected)} belongs to no part of this {config.family} model")


def check_dtypes(config: ModelConfig, stored: LazyTensors, where: str) -> None:
    """InputError for quantised weights: integers, or 8-bit floats, which only their scales make numbers."""
    ignored = FAMILIES[config.family].ignored
    for name in (name for name in stored if not re.search(ignored, name)):
        if (dtype := stored.dtype(name)) not in ("F16", "BF16", "F32", "F64") and not stored_format(name):
            raise InputError(f"{where}: {name} holds {dtype} values: quantised weights; use the unquantised model")


def untie_if_different(config: ModelConfig, stored: LazyTensors, rows: int | None = None) -> ModelConfig:
    """The configuration with a head of its own if the checkpoint has one that is not its embedding.

    As transformers does: what is stored counts more than `tie_word_embeddings`. rows: how many first rows are compared;
    None: all.
    """
    family = FAMILIES[config.family]
    embed, head = (stored_name(f"{name}.weight", stored) for name in (family.embed, family.head))
    if not config.tie_embeddings or embed is None or head is None:
        return config
    if torch.equal(stored.part(embed, slice(rows)), stored.part(head, slice(rows))):
        return config
    return replace(config, tie_embeddings=False)


def to_file(config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All our parameters -> the tensors of a Hugging Face folder."""
    return {name: one_to_file(parts, ours) for name, parts in file_parts(config).items()}


def file_parts(config: ModelConfig) -> dict[str, dict[str, TensorMapping]]:
    """A checkpoint's tensor -> those of our parameters that it holds: one, or several where the family fuses them."""
    parts: dict[str, dict[str, TensorMapping]] = {}
    for ours, mapping in tensor_mapping(config).items():
        parts.setdefault(mapping.name, {})[ours] = mapping
    return parts


def one_to_file(parts: Mapping[str, TensorMapping], ours: Mapping[str, Tensor]) -> Tensor:
    """The checkpoint's tensor that holds these parts: the inverse of `TensorMapping.read`."""
    (first, mapping), *_ = parts.items()
    if mapping.index is not None:
        experts = sorted({part.index for part in parts.values() if part.index is not None})
        of = [{name: replace(p, index=None) for name, p in parts.items() if p.index == e} for e in experts]
        return torch.stack([one_to_file(each, ours) for each in of])
    tensor = ours[first]
    if mapping.rows is not None:
        size = sum(len(ours[name]) for name in parts)
        tensor = torch.empty(size, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
        with torch.no_grad():
            for name, part in parts.items():
                assert part.rows is not None
                tensor[part.rows] = ours[name]
    return mapping.transpose_if_needed(tensor).contiguous()
