"""What all of PEFT's adapter folders have in common: which modules they name, and a reading that leaves nothing out.

What is unusual here: a config is read strictly. A field that is neither read nor known to change nothing is an error,
and so is a tensor that is missing, misshapen or left over.
"""

import re
from collections.abc import Iterator, Mapping, Set
from typing import Any

from torch import Tensor

from graftlm.errors import InputError
from graftlm.models.config import FAMILIES, ModelConfig, Rows

MAX_REPEATS = 5
"""Of a pattern that names modules, which may hold so many of *, + and {."""
PEFT_VERSION = "0.19.0"  # the format's version that is written; newer readers accept it

# What a config may say that changes nothing in what an adapter computes:
WITHOUT_EFFECT = frozenset(
    ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")
)


def fused(shape: ModelConfig, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The targeted ones of q, k and v, where the family's files fuse them; none where they do not."""
    return tuple(r for r in "qkv" if r in targets) if FAMILIES[shape.family].fused else ()


def fused_slices(shape: ModelConfig) -> dict[str, Rows]:
    """Which rows of the fused linear are each part's."""
    rows = FAMILIES[shape.family].fused_qkv_slices
    assert rows is not None
    return {part: rows(shape, part) for part in "qkv"}


def hf_module_name(shape: ModelConfig, role: str) -> str:
    """The file's module that holds the role's linear, inside a layer."""
    return FAMILIES[shape.family].linears[role]


def layer_prefix(shape: ModelConfig, i: int) -> str:
    """What stands before a module of layer i in the tensors' names."""
    return f"base_model.model.{FAMILIES[shape.family].layers}{i}."


def named_targets(shape: ModelConfig, modules: set[str]) -> list[str]:
    """How a config names these modules of every layer: by their last names where no two of the family's are alike."""
    last = [module.rpartition(".")[2] for module in set(FAMILIES[shape.family].linears.values())]
    return sorted(modules if len(set(last)) < len(last) else {module.rpartition(".")[2] for module in modules})


class StrictTensorReader:
    """A file's tensors, taken one by one; what is missing, misshapen or left over is an error."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self._tensors, self._unread, self._where = tensors, set(tensors), where

    def take(self, key: str, *size: int) -> Tensor:
        """The tensor of this name, which must have this size."""
        if key not in self._tensors:
            raise InputError(f"{self._where}: the tensor {key} is missing")
        if tuple(self._tensors[key].shape) != size:
            found = list(self._tensors[key].shape)
            raise InputError(f"{self._where}: {key} has shape {found}, expected {list(size)}")
        self._unread.discard(key)
        return self._tensors[key]

    def all_taken(self) -> None:
        """An InputError if any is left."""
        if self._unread:
            raise InputError(f"{self._where}: the tensor {min(self._unread)} belongs to no target of this adapter")


def check_fields(config: Mapping[str, Any], read: Set[str], refused: Set[str], where: str) -> None:
    """Every field of a config is one that is read, or one that is known and unset."""
    for key, value in config.items():
        if key in refused:
            if value not in (None, False, [], {}):
                raise InputError(f"{where}: {key} = {value!r} is not supported; it must be unset")
        elif key not in read:
            raise InputError(
                f"{where}: {key!r} is no field that is understood; remove it, or read the folder with PEFT"
            )


def targeted(shape: ModelConfig, config: Mapping[str, Any], where: str) -> Iterator[tuple[str, tuple[int, str]]]:
    """What PEFT would adapt by this config: transformers' module name -> (layer, its name in the layer)."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if not targets or not isinstance(targets, str | list):
        raise InputError(f"{where}: target_modules is {targets!r}; expected a list of module names")
    only = _layers(shape, config, where)
    inside = sorted({hf_module_name(shape, role) for role in shape.roles})
    names = {
        f"{FAMILIES[shape.family].layers}{i}.{theirs}": (i, theirs)
        for i in range(shape.num_layers)
        for theirs in inside
    }
    if isinstance(targets, list):
        for target in targets:
            if not any(_is_named(name, [target], where) for name in names):
                raise InputError(f"{where}: target_modules names {target!r}, which is none of {', '.join(inside)}")
    found = {
        name: place
        for name, place in names.items()
        if _is_named(name, targets, where) and not _is_named(name, excluded, where) and place[0] in only
    }
    if not found:
        raise InputError(f"{where}: target_modules {targets!r} names no linear of this {shape.family} model")
    yield from found.items()


def uniform_layer_range(
    shape: ModelConfig, modules: Mapping[str, tuple[int, str]], fields: str, where: str
) -> tuple[int, int] | None:
    """The span of layers in each of which the same modules are adapted, None for all; an error for any other choice."""
    layers, kinds = sorted({i for i, _ in modules.values()}), {theirs for _, theirs in modules.values()}
    if len(modules) != len(layers) * len(kinds) or layers != list(range(layers[0], layers[-1] + 1)):
        raise InputError(
            f"{where}: {fields} adapt layers {layers} unevenly; supported: the same modules in each of a span of layers"
        )
    return None if len(layers) == shape.num_layers else (layers[0], layers[-1] + 1)


def _layers(shape: ModelConfig, config: Mapping[str, Any], where: str) -> range | list[int]:
    """The layers of layers_to_transform, all where it is unset; layers_pattern must name the list they stand in."""
    only, pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    only = [only] if type(only) is int else only
    if only is None or only == []:
        return range(shape.num_layers)
    if not isinstance(only, list) or not all(type(i) is int for i in only):
        raise InputError(f"{where}: layers_to_transform = {only!r} must be a list of layers' numbers")
    if not set(only) <= set(range(shape.num_layers)):
        raise InputError(
            f"{where}: layers_to_transform = {only!r}, but this model's layers are 0 to {shape.num_layers - 1}"
        )
    own = FAMILIES[shape.family].layers.split(".")[1]
    if pattern and own not in ([pattern] if isinstance(pattern, str) else pattern):
        raise InputError(f"{where}: layers_pattern = {pattern!r} is not supported; this model's layers are in {own!r}")
    return only


def _is_named(name: str, patterns: str | list[str], where: str) -> bool:
    """Whether PEFT's rule matches: a text is a regular expression, a list holds names or their ends."""
    if isinstance(patterns, str):
        return patterns.lower() == "all-linear" or matches(patterns, name, where)
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def matches(pattern: str, name: str, where: str) -> bool:
    """Whether a regular expression out of a config fits the whole name; InputError for one that is none, or slow."""
    # The pattern is a stranger's: one that repeats a group, or much, may take for ever on a name of thirty letters.
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > MAX_REPEATS:
        raise InputError(
            f"{where}: {pattern[:80]!r} repeats a group, or more than {MAX_REPEATS} times: not supported; list the "
            "modules' names"
        )
    try:
        return re.fullmatch(pattern, name) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{where}: {pattern[:80]!r} is no regular expression ({error})") from None
