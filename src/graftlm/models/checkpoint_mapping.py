"""The files' names <-> ours: config.json to a Shape, a file's tensors to our parameters, and back.

What checkpoints call things stands in each family's file; this is what is done with it, for all alike. A linear may be
stored transposed, and q, k and v as one. A setting that changes the arithmetic and is not understood is an error,
never ignored.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.files.formats import LazyTensors
from graftlm.models.config import FAMILIES, ModelConfig, Rows

_SIZES = (
    *("n_embd", "n_head", "n_layer", "n_inner", "n_positions", "vocab_size", "hidden_size", "num_attention_heads"),
    *("num_key_value_heads", "num_hidden_layers", "intermediate_size", "max_position_embeddings", "head_dim"),
)
MAX_LAYERS, MAX_DIM = 10_000, 2**24
"""Sizes beyond these are no model's: a few bytes of config.json would ask for all memory there is."""
_MAYBE_NULL = ("n_inner", "num_key_value_heads", "head_dim")


def our_module_name(role: str) -> str:
    """Our module that holds the role's linear, inside a block: `attn.q`, `mlp.up`."""
    return f"{'attn' if role in 'qkvo' else 'mlp'}.{role}"


# ---- config.json -> Shape ------------------------------------------------------------------------------------------


def read_model_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The shape a config.json describes; `where` names the file in errors."""
    if not isinstance(config, dict):
        raise InputError(f"{where}: is no JSON object: fetch it again")
    kind = config.get("model_type")
    _check_sizes(config, where)
    try:
        for family in FAMILIES.values():
            if kind in family.model_types:
                return family.read(config, where)
    except KeyError as e:
        raise InputError(f"{where}: the setting {e.args[0]!r} is missing") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as e:
        raise InputError(f"{where}: a setting has a value that it cannot have ({e}): fetch the file again") from None
    kinds = ", ".join(kind for family in FAMILIES.values() for kind in family.model_types)
    raise InputError(f"{where}: model_type {kind!r} is not supported; supported are {kinds}")


def _check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Every size that is given is a whole number above 0 (null where a default takes its place)."""
    for key in _SIZES:
        value = config.get(key)
        if not (value is None and (key not in config or key in _MAYBE_NULL)) and (type(value) is not int or value < 1):
            raise InputError(f"{where}: {key} = {value!r} is no size; it must be a whole number above 0")
        if value is not None and value > (MAX_LAYERS if key in ("n_layer", "num_hidden_layers") else MAX_DIM):
            raise InputError(f"{where}: {key} = {value} is more than any model has: fetch the file again")


def with_biases(config: Mapping[str, Any], shape: ModelConfig, where: str) -> dict[str, Any]:
    """The base's config.json, changed to say the biases that `shape` has: the inverse of `read_shape`."""
    base = read_model_config(config, where)
    if base == shape:
        return dict(config)
    change = FAMILIES[shape.family].with_biases
    assert change is not None, f"no config.json of a {shape.family} model says {shape}"
    return change(config, base, shape)


# ---- tensors: file <-> ours ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorMapping:
    """Where a file keeps one of our parameters."""

    name: str
    transposed: bool = False
    rows: Rows | None = None

    def read(self, t: Tensor) -> Tensor:
        """Ours out of the file's tensor of that name."""
        t = self.transpose_if_needed(t)
        return t if self.rows is None else t[self.rows]

    def transpose_if_needed(self, t: Tensor) -> Tensor:
        """The file's [in, out] -> [out, in], and back; a bias stays."""
        return t.t() if self.transposed and t.dim() == 2 else t

    def part(self, stored: LazyTensors, key: str, wanted: range) -> Tensor:
        """The wanted rows of ours (at least one) out of the file's tensor `key`, of which little more is read."""
        within: Rows = slice(None)
        among = slice(wanted.start, wanted.stop)
        if isinstance(self.rows, slice):
            among = slice(self.rows.start + wanted.start, self.rows.start + wanted.stop)
        elif self.rows is not None:
            picked = self.rows[among]
            among = slice(int(picked.min()), int(picked.max()) + 1)
            within = picked - among.start
        turned = self.transposed and len(stored.shape(key)) == 2
        return self.transpose_if_needed(stored.part(key, slice(None), among) if turned else stored.part(key, among))[
            within
        ]


def file_names(shape: ModelConfig) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Our parameter name -> (the file's tensor name, how to read ours out of it), for every parameter of the shape."""
    return {ours: (place.name, place.read) for ours, place in tensor_mapping(shape).items()}


def tensor_mapping(shape: ModelConfig) -> dict[str, TensorMapping]:
    """Our parameter name -> where a file keeps it, for every parameter of the shape."""
    return dict(_places(shape))


def _places(shape: ModelConfig) -> Iterator[tuple[str, TensorMapping]]:
    family = FAMILIES[shape.family]
    rows = {role: family.fused_qkv_slices(shape, role) for role in "qkv"} if family.fused_qkv_slices else {}
    norm_kinds = ("weight", "bias") if family.norm_biases else ("weight",)
    yield "embed.weight", TensorMapping(f"{family.embed}.weight")
    if family.positions:
        yield "positions.weight", TensorMapping(f"{family.positions}.weight")
    for i in range(shape.num_layers):
        ours, theirs = f"blocks.{i}", f"{family.layers}{i}"
        for norm, name in family.norms.items():
            for kind in norm_kinds:
                yield f"{ours}.{norm}.{kind}", TensorMapping(f"{theirs}.{name}.{kind}")
        for role in shape.roles:
            for kind in ("weight", "bias") if shape.has_bias(role) else ("weight",):
                place = TensorMapping(f"{theirs}.{family.linears[role]}.{kind}", family.transposed, rows.get(role))
                yield f"{ours}.{our_module_name(role)}.{kind}", place
    for kind in norm_kinds:
        yield f"norm.{kind}", TensorMapping(f"{family.last_norm}.{kind}")
    if not shape.tie_embeddings:
        yield "head.weight", TensorMapping(f"{family.head}.weight")


def stored_name(name: str, stored: Iterable[str]) -> str | None:
    """The file's tensor called `name`, with or without transformers' outer prefix (GPT-2's on the hub lack it)."""
    bare = name.partition(".")[2] if name.count(".") > 1 else name
    return next((n for n in (name, bare) if n in stored), None)


def check_names(shape: ModelConfig, stored: Iterable[str], where: str) -> None:
    """Every tensor is there, and no other; else an error that names the first."""
    present, family = set(stored), FAMILIES[shape.family]
    expected = {stored_name(theirs, present) or theirs for theirs, _ in file_names(shape).values()}
    if missing := sorted(expected - present):
        raise InputError(f"{where}: the tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are)")
    known = {f"{family.head}.weight"} if shape.tie_embeddings else set()
    spare = {n for n in present - expected - known if not re.search(family.ignored, n)}
    if spare:
        raise InputError(f"{where}: the tensor {min(spare)} belongs to no part of this {shape.family} model")


def to_file(shape: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All our parameters -> the tensors of a Hugging Face folder, fused again what the family fuses."""
    return {name: one_to_file(shape, parts, ours) for name, parts in file_parts(shape).items()}


def file_parts(shape: ModelConfig) -> dict[str, dict[str, TensorMapping]]:
    """A file's tensor -> those of our parameters that it holds: one, or q, k and v where the family fuses them."""
    parts: dict[str, dict[str, TensorMapping]] = {}
    for ours, place in _places(shape):
        parts.setdefault(place.name, {})[ours] = place
    return parts


def one_to_file(shape: ModelConfig, parts: Mapping[str, TensorMapping], ours: Mapping[str, Tensor]) -> Tensor:
    """The file's tensor that holds these parts."""
    (first, place), *_ = parts.items()
    tensor = ours[first]
    if place.rows is not None:
        tensor = torch.empty(shape.qkv_rows, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
        with torch.no_grad():
            for name, part in parts.items():
                assert part.rows is not None
                tensor[part.rows] = ours[name]
    return place.transpose_if_needed(tensor).contiguous()
