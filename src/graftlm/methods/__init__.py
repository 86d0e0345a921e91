"""Ways to adapt a model, one file each; `base.py` is the contract they keep."""

from collections.abc import Set
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from graftlm.config import MethodFlags
from graftlm.errors import InputError, unknown
from graftlm.methods.adapter import Adapter
from graftlm.methods.base import Method
from graftlm.methods.bitfit import BitFit
from graftlm.methods.dora import DoRA
from graftlm.methods.full import Full
from graftlm.methods.lora import LoRA
from graftlm.methods.prefix import PrefixTuning

METHODS: dict[str, type[Method]] = {m.name: m for m in (LoRA, DoRA, BitFit, Adapter, PrefixTuning, Full)}

__all__ = [
    "METHODS",
    "Adapter",
    "BitFit",
    "DoRA",
    "Full",
    "LoRA",
    "Method",
    "PrefixTuning",
    "method_from_flags",
    "method_from_json",
]


def method_from_flags(config: MethodFlags, given: Set[str]) -> Method:
    """The method that the flags describe; --rank 0 is full fine-tuning.

    `given` are the flags that were typed: one that means nothing to the method, and something to another, is an
    InputError. Of the flags at None the method's own default holds.
    """
    if config.method not in METHODS:
        raise unknown("--method", config.method, METHODS)
    if config.rank == 0 and "method" in given and config.method != "full":
        raise InputError(f"--rank 0 means full fine-tuning and contradicts --method {config.method}: leave one out")
    kind = Full if config.rank == 0 else METHODS[config.method]
    for flag in sorted({flag for m in METHODS.values() for flag in m.flags} - set(kind.flags)):
        value = getattr(config, flag)
        if flag in given and value and not (kind is Full and config.method != "full"):
            users = " or ".join(m.name for m in METHODS.values() if flag in m.flags)
            raise InputError(f"--method {config.method} takes no --{flag} {value}: leave it out, or use {users}")
    values = {field: getattr(config, flag) for flag, field in kind.flags.items()}
    values = {field: value for field, value in values.items() if value is not None}
    if "targets" in values:
        values["targets"] = tuple(dict.fromkeys(t.strip() for t in values["targets"].split(",") if t.strip()))
    return kind(**values)


def method_from_json(data: Any, where: str = "run.json") -> Method:
    """The method that `to_json` described; an InputError, which begins with `where`, for anything else."""
    name = data.get("method") if isinstance(data, dict) else None
    if not isinstance(name, str) or name not in METHODS:
        raise InputError(f"{where}: names no method of ours; known are {', '.join(METHODS)}")
    kinds = {f.name: get_type_hints(METHODS[name])[f.name] for f in fields(METHODS[name])}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "method"}
    for key, value in values.items():
        if key not in kinds or not _fits(value, kinds[key]):
            raise InputError(f"{where}: its method is not understood: {key} = {value!r:.60}")
    return METHODS[name](**values)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value out of a JSON file is of a field's type."""
    inner, parts = get_origin(kind), get_args(kind)
    if inner in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if inner is Literal:
        return type(value) is str and value in parts
    if inner is tuple:
        each = [parts[0]] * len(value) if isinstance(value, tuple) and parts[-1] is Ellipsis else parts
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_fits, value, each))
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value) is kind and (kind is not int or abs(value) < 2**31)
