"""Checkpoint names <-> ours: config.json to `ModelConfig`, a checkpoint's tensors to our parameters, and back.

Each family's table says what its checkpoints call things; here it is applied, the same for all. A linear may be stored
transposed, fused with others, or with the dimensions of its heads in another order. A setting that changes the
arithmetic and is not supported is an error, never ignored.
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
"""Larger sizes are refused: a config.json of a few bytes must not allocate all memory."""
_MAYBE_NULL = ("n_inner", "num_key_value_heads", "head_dim")


def our_module_name(role: str) -> str:
    """Our module of the role's linear, inside a block: `attn.q`, `mlp.up`."""
    return f"{'attn' if role in 'qkvo' else 'mlp'}.{role}"


# config.json -> ModelConfig -------------------------------------------------------------------------------------------


def read_model_config(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes; `where` names the file in errors."""
    if not isinstance(config, dict):
        raise InputError(f"{where}: not a JSON object: fetch it again")
    model_type = config.get("model_type")
    _check_sizes(config, where)
    try:
        for family in FAMILIES.values():
            if model_type in family.model_types:
                return family.read(config, where)
    except KeyError as e:
        raise InputError(f"{where}: the setting {e.args[0]!r} is missing") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as e:
        raise InputError(f"{where}: a setting has a value that it cannot have ({e}): fetch the file again") from None
    supported = ", ".join(name for family in FAMILIES.values() for name in family.model_types)
    raise InputError(f"{where}: model_type {model_type!r} is not supported; supported are {supported}")


def _check_sizes(config: Mapping[str, Any], where: str) -> None:
    """Every size that is given is an integer above 0 (null where it has a default)."""
    for key in _SIZES:
        value = config.get(key)
        if not (value is None and (key not in config or key in _MAYBE_NULL)) and (type(value) is not int or value < 1):
            raise InputError(f"{where}: {key} = {value!r} is no size; it must be a whole number above 0")
        if value is not None and value > (MAX_LAYERS if key in ("n_layer", "num_hidden_layers") else MAX_DIM):
            raise InputError(f"{where}: {key} = {value} is more than any model has: fetch the file again")


def with_biases(config: Mapping[str, Any], model: ModelConfig, where: str) -> dict[str, Any]:
    """The base's config.json, changed to have the biases of `model`: the inverse of `read_model_config`."""
    base = read_model_config(config, where)
    if base == model:
        return dict(config)
    change = FAMILIES[model.family].with_biases
    assert change is not None, f"no config.json of a {model.family} model describes {model}"
    return change(config, base, model)


# Tensors --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorMapping:
    """Where a checkpoint stores one of our parameters: ours = (transpose of the tensor)[rows]."""

    name: str
    transposed: bool = False
    rows: Rows | None = None
    """Slice of a fused tensor, or a permutation; None: all rows in their order."""

    def read(self, t: Tensor) -> Tensor:
        """Our parameter from the checkpoint's tensor."""
        t = self.transpose_if_needed(t)
        return t if self.rows is None else t[self.rows]

    def transpose_if_needed(self, t: Tensor) -> Tensor:
        """The checkpoint's [in, out] -> [out, in], or the inverse; a bias is unchanged."""
        return t.t() if self.transposed and t.dim() == 2 else t

    def part(self, stored: LazyTensors, key: str, wanted: range) -> Tensor:
        """The wanted rows of ours (at least one) from the checkpoint's tensor `key`, of which little more is read."""
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

    Rotary pairs are (j, j + D/2) here, and (j, j + R/2) of the first R dimensions in checkpoints. q k^T is unchanged
    if both are permuted in the same way; the pairs that do not rotate get angles of zero.
    """
    rope = config.layer(i).rope
    if rope is None or rope.dim in (None, config.head_dim):
        return None
    at = torch.arange(config.head_dim)
    (a, b), (c, d) = at[: rope.dim].chunk(2), at[rope.dim :].chunk(2)
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


def file_names(config: ModelConfig) -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Our parameter name -> (the checkpoint's tensor name, how to read ours from it), for every parameter."""
    return {ours: (mapping.name, mapping.read) for ours, mapping in _mappings(config)}


def tensor_mapping(config: ModelConfig) -> dict[str, TensorMapping]:
    """Our parameter name -> where a checkpoint stores it, for every parameter."""
    return dict(_mappings(config))


def _mappings(config: ModelConfig) -> Iterator[tuple[str, TensorMapping]]:
    family = FAMILIES[config.family]
    norm_kinds = ("weight", "bias") if config.norm_biases else ("weight",)
    yield "embed.weight", TensorMapping(f"{family.embed}.weight")
    if family.positions:
        yield "positions.weight", TensorMapping(f"{family.positions}.weight")
    for i in range(config.num_layers):
        ours, theirs = f"blocks.{i}", f"{family.layers}{i}"
        for norm in config.norm_sizes(config.layer(i)):
            per_head = norm in ("attn.q_norm", "attn.k_norm") and config.layer(i).qk_norm == "head"
            order = rotary_permutation(config, i) if per_head else None
            for kind in norm_kinds:
                yield f"{ours}.{norm}.{kind}", TensorMapping(f"{theirs}.{family.norms[norm]}.{kind}", rows=order)
        for role in config.roles:
            rows = file_rows(config, role, i)
            for kind in ("weight", "bias") if config.has_bias(role) else ("weight",):
                mapping = TensorMapping(f"{theirs}.{family.linears[role]}.{kind}", family.transposed, rows)
                yield f"{ours}.{our_module_name(role)}.{kind}", mapping
    for kind in norm_kinds:
        yield f"norm.{kind}", TensorMapping(f"{family.last_norm}.{kind}")
    if not config.tie_embeddings:
        yield "head.weight", TensorMapping(f"{family.head}.weight")


def stored_name(name: str, stored: Iterable[str]) -> str | None:
    """The checkpoint's tensor `name`, with or without transformers' outer prefix (GPT-2's on the hub lack it)."""
    bare = name.partition(".")[2] if name.count(".") > 1 else name
    return next((n for n in (name, bare) if n in stored), None)


def check_names(config: ModelConfig, stored: Iterable[str], where: str) -> None:
    """InputError unless every tensor is present and no other; the message names the first."""
    present, family = set(stored), FAMILIES[config.family]
    expected = {stored_name(theirs, present) or theirs for theirs, _ in file_names(config).values()}
    if missing := sorted(expected - present):
        raise InputError(f"{where}: the tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are)")
    known = {f"{family.head}.weight"} if config.tie_embeddings else set()
    unexpected = {n for n in present - expected - known if not re.search(family.ignored, n)}
    if unexpected:
        raise InputError(f"{where}: the tensor {min(unexpected)} belongs to no part of this {config.family} model")


def to_file(config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All our parameters -> the tensors of a Hugging Face folder."""
    return {name: one_to_file(parts, ours) for name, parts in file_parts(config).items()}


def file_parts(config: ModelConfig) -> dict[str, dict[str, TensorMapping]]:
    """A checkpoint's tensor -> those of our parameters that it holds: one, or several where the family fuses them."""
    parts: dict[str, dict[str, TensorMapping]] = {}
    for ours, mapping in _mappings(config):
        parts.setdefault(mapping.name, {})[ours] = mapping
    return parts


def one_to_file(parts: Mapping[str, TensorMapping], ours: Mapping[str, Tensor]) -> Tensor:
    """The checkpoint's tensor that holds these parts: the inverse of `TensorMapping.read`."""
    (first, mapping), *_ = parts.items()
    tensor = ours[first]
    if mapping.rows is not None:
        size = sum(len(ours[name]) for name in parts)
        tensor = torch.empty(size, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
        with torch.no_grad():
            for name, part in parts.items():
                assert part.rows is not None
                tensor[part.rows] = ours[name]
    return mapping.transpose_if_needed(tensor).contiguous()
