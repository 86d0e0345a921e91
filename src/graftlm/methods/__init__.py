"""Ways to adapt a model, one file each; `base.py` is the contract they keep.

What is unusual here: nobody lists the methods. Each file of this folder is imported, and every subclass of `Method`
with a name is one: `METHODS`. What its fields are is what it can be told: by the flags that it names in `flags`, or,
where a field has no flag, by --method_args.
"""

from collections.abc import Iterator, Set
from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from graftlm.config import MethodFlags
from graftlm.config.parsing import parse_value
from graftlm.errors import InputError, unknown_name_error
from graftlm.methods.adapter import Adapter
from graftlm.methods.base import Method
from graftlm.methods.bitfit import BitFit
from graftlm.methods.dora import DoRA
from graftlm.methods.full import Full
from graftlm.methods.lora import LoRA
from graftlm.methods.prefix import PrefixTuning


def _kinds(kind: type[Any]) -> Iterator[type[Method]]:
    for sub in kind.__subclasses__():
        yield sub
        yield from _kinds(sub)


for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
METHODS: dict[str, type[Method]] = {kind.name: kind for kind in sorted(_kinds(Method), key=lambda kind: kind.name)}
"""Name -> method, in the order of their names."""

__all__ = [
    "METHODS",
    "Adapter",
    "BitFit",
    "DoRA",
    "Full",
    "LoRA",
    "Method",
    "PrefixTuning",
    "describe",
    "method_from_flags",
    "method_from_json",
]


def method_from_flags(config: MethodFlags, given: Set[str]) -> Method:
    """The method that the flags describe; --rank 0 is full fine-tuning.

    `given` are the flags that were typed: one that means nothing to the method, and something to another, is an
    InputError. Of the flags at None the method's own default holds.
    """
    if config.method not in METHODS:
        raise unknown_name_error("--method", config.method, METHODS)
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
    return kind(**values, **_settings(config.method_args, kind))


def describe(name: str) -> str:
    """A method's summary, its flags and its settings with their defaults, one a line. Raises InputError."""
    if name not in METHODS:
        raise unknown_name_error("--method", name, METHODS)
    kind = METHODS[name]
    defaults = {f.name: f.default for f in fields(kind)}
    shown = {f"--{flag}": defaults[field] for flag, field in kind.flags.items()}
    shown |= {f"--method_args {field}=": defaults[field] for field in _settings_types(kind)}
    shown = {flag: ",".join(value) if isinstance(value, tuple) else value for flag, value in shown.items()}
    lines = [f"  {flag} {value}".replace("= ", "=").rstrip() for flag, value in shown.items()]
    summary = (kind.__doc__ or "").partition("\n")[0]
    return "\n".join([f"--method {name}: {summary}", f"  --lr {kind.default_lr:g}", *lines])


def _settings_types(kind: type[Method]) -> dict[str, Any]:
    """The fields that --method_args can set, with their types: those that have no flag and are one plain value."""
    hints, flagged = get_type_hints(kind), {"layers", *kind.flags.values()}
    types = {f.name: hints[f.name] for f in fields(kind) if f.name not in flagged}
    return {name: t for name, t in types.items() if get_origin(t) is not tuple}


def _settings(text: str, kind: type[Method]) -> dict[str, Any]:
    """The fields that --method_args gives: those that have no flag, and are one plain value."""
    types = _settings_types(kind)
    found: dict[str, Any] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or name not in types:
            known = f"its settings are {', '.join(types)}" if types else "has no settings but its flags"
            raise InputError(f"--method_args {part}: must be name=value, and --method {kind.name}: {known}")
        found[name] = parse_value(f"--method_args {part}", value, types[name])
    return found


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
