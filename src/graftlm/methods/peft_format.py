"""PEFT's adapter folders: parts of the format that are the same for all methods.

Configs and tensors are read strictly: a field that is neither read nor known to change nothing is an error, and so is a
tensor that is missing, misshapen or left over.
"""

import re
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graftlm.errors import InputError
from graftlm.methods.cost_model import linear_size
from graftlm.models.config import FAMILIES, ModelConfig, Rows, file_rows

MAX_REPEATS = 5
"""The most *, + and { in a pattern that names modules."""
PEFT_VERSION = "0.19.0"  # the version of the format that is written; newer readers accept it

WITHOUT_EFFECT = frozenset(
    ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")
)
"""Fields of a config that do not change what an adapter computes."""


# Modules --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HFModule:
    """A linear of the checkpoint format, which holds one role or, fused, several of q, k and v."""

    name: str
    """Inside a layer."""
    rows: Mapping[str, Rows]
    """Role -> its rows of the output, for all roles it holds."""
    targets: tuple[str, ...]
    """The targeted roles, in the order of `rows`."""
    in_features: int
    out_features: int

    @property
    def fused(self) -> bool:
        """Whether it holds several roles."""
        return len(self.rows) > 1


def hf_modules(config: ModelConfig, targets: Collection[str]) -> dict[str, HFModule]:
    """Name -> the checkpoint's linears that hold a targeted role."""
    slices, modules = fused_slices(config), dict[str, HFModule]()
    for role in targets:
        n_in, n_out = linear_size(config, role)
        rows, n_out = (slices, config.qkv_rows) if role in slices else ({role: slice(None)}, n_out)
        name = hf_module_name(config, role)
        modules[name] = HFModule(name, rows, tuple(r for r in rows if r in targets), n_in, n_out)
    return modules


def fused_slices(config: ModelConfig) -> dict[str, Rows]:
    """Rows of q, k and v in the linear that holds all three; empty if the checkpoint format does not fuse them."""
    if not FAMILIES[config.family].fused:
        return {}
    rows = {part: file_rows(config, part) for part in "qkv"}
    return {part: r for part, r in rows.items() if r is not None}


def hf_module_name(config: ModelConfig, role: str) -> str:
    """The checkpoint's module that holds the role's linear, inside a layer."""
    return FAMILIES[config.family].linears[role]


def layer_prefix(config: ModelConfig, i: int) -> str:
    """The prefix of tensor names of layer i."""
    return f"base_model.model.{FAMILIES[config.family].layers}{i}."


def named_targets(config: ModelConfig, modules: Collection[str]) -> list[str]:
    """A config's names of these modules in every layer: without their parents if that is unique in the family."""
    last = [module.rpartition(".")[2] for module in set(FAMILIES[config.family].linears.values())]
    return sorted(set(modules) if len(set(last)) < len(last) else {module.rpartition(".")[2] for module in modules})


# Strict reading -------------------------------------------------------------------------------------------------------


class StrictTensorReader:
    """The tensors of a file, taken one by one; a tensor that is missing, misshapen or left over is an InputError."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self._tensors, self._unread, self._where = tensors, set(tensors), where

    def take(self, key: str, *size: int) -> Tensor:
        """The tensor of this name, which must have this size."""
        if key not in self._tensors:
            raise InputError(f"{self._where}: the tensor {key} is missing")
        if tuple(self._tensors[key].shape) != size:
            shape = list(self._tensors[key].shape)
            raise InputError(f"{self._where}: {key} has shape {shape}, expected {list(size)}")
        self._unread.discard(key)
        return self._tensors[key]

    def all_taken(self) -> None:
        """An InputError if any is left."""
        if self._unread:
            raise InputError(f"{self._where}: the tensor {min(self._unread)} belongs to no target of this adapter")


def check_fields(peft_config: Mapping[str, Any], read: Set[str], refused: Set[str], where: str) -> None:
    """An InputError unless every field is one of `read`, or one of `refused` and unset."""
    for key, value in peft_config.items():
        if key in refused:
            if value not in (None, False, [], {}):
                raise InputError(f"{where}: {key} = {value!r} is not supported; it must be unset")
        elif key not in read:
            raise InputError(
                f"{where}: {key!r} is no field that is understood; remove it, or read the folder with PEFT"
            )


def check_same(peft_config: Mapping[str, Any], expected: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    """An InputError unless the config has the run's values of these fields."""
    for key in keys:
        if peft_config.get(key) != expected[key]:
            raise InputError(f"{where}: {key} is {peft_config.get(key)!r}, the run says {expected[key]!r}")


def targeted(config: ModelConfig, peft_config: Mapping[str, Any], where: str) -> dict[str, tuple[int, str]]:
    """The modules that PEFT adapts by this config: transformers' module name -> (layer, its name in the layer)."""
    targets, excluded = peft_config.get("target_modules"), peft_config.get("exclude_modules") or []
    if not targets or not isinstance(targets, str | list):
        raise InputError(f"{where}: target_modules is {targets!r}; expected a list of module names")
    layers, modules = _layers(config, peft_config, where), sorted(hf_modules(config, config.roles))
    prefix = FAMILIES[config.family].layers
    names = {f"{prefix}{i}.{module}": (i, module) for i in range(config.num_layers) for module in modules}
    for target in targets if isinstance(targets, list) else []:
        if not any(_is_named(name, [target], where) for name in names):
            raise InputError(f"{where}: target_modules names {target!r}, which is none of {', '.join(modules)}")
    chosen = {
        name: (i, module)
        for name, (i, module) in names.items()
        if _is_named(name, targets, where) and not _is_named(name, excluded, where) and i in layers
    }
    if not chosen:
        raise InputError(f"{where}: target_modules {targets!r} names no linear of this {config.family} model")
    return chosen


def uniform_layer_range(
    config: ModelConfig, modules: Mapping[str, tuple[int, str]], fields: str, where: str
) -> tuple[int, int] | None:
    """The layers whose modules are adapted, None for all; an InputError unless they are contiguous and alike."""
    layers, names = sorted({i for i, _ in modules.values()}), {module for _, module in modules.values()}
    if len(modules) != len(layers) * len(names) or layers != list(range(layers[0], layers[-1] + 1)):
        raise InputError(
            f"{where}: {fields} adapt layers {layers} unevenly; supported: the same modules in each of a span of layers"
        )
    return None if len(layers) == config.num_layers else (layers[0], layers[-1] + 1)


def _layers(config: ModelConfig, peft_config: Mapping[str, Any], where: str) -> Sequence[int]:
    """The layers of layers_to_transform, all if it is unset; layers_pattern must name the list that holds them."""
    layers, pattern = peft_config.get("layers_to_transform"), peft_config.get("layers_pattern")
    layers = [layers] if type(layers) is int else layers
    if layers is None or layers == []:
        return range(config.num_layers)
    if not isinstance(layers, list) or not all(type(i) is int for i in layers):
        raise InputError(f"{where}: layers_to_transform = {layers!r} must be a list of layers' numbers")
    if not set(layers) <= set(range(config.num_layers)):
        raise InputError(
            f"{where}: layers_to_transform = {layers!r}, but this model's layers are 0 to {config.num_layers - 1}"
        )
    name = FAMILIES[config.family].layers.split(".")[1]
    if pattern and name not in ([pattern] if isinstance(pattern, str) else pattern):
        raise InputError(f"{where}: layers_pattern = {pattern!r} is not supported; this model's layers are in {name!r}")
    return layers


def _is_named(name: str, patterns: str | list[str], where: str) -> bool:
    """PEFT's rule: a string is a regular expression, a list holds names or their ends."""
    if isinstance(patterns, str):
        return patterns.lower() == "all-linear" or matches(patterns, name, where)
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def matches(pattern: str, name: str, where: str) -> bool:
    """Whether a config's regular expression matches the whole name; InputError if it is invalid or may be slow."""
    # The pattern is untrusted: with repeated groups, or many repeats, thirty letters can take exponential time.
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > MAX_REPEATS:
        raise InputError(
            f"{where}: {pattern[:80]!r} repeats a group, or more than {MAX_REPEATS} times: not supported; list the "
            "modules' names"
        )
    try:
        return re.fullmatch(pattern, name) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{where}: {pattern[:80]!r} is no regular expression ({error})") from None
