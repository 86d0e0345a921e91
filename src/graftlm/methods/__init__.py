"""Methods of adapting a model, one file each; `base.py` is their interface.

Every file of this folder is imported, and every subclass of `Method` with a name is in `METHODS`; there is no list.
A method's fields are set by the flags that it names in `flags`, or, if a field has no flag, by --method_args.
"""

from collections.abc import Iterator, Set
from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from graftlm.config.flags import MethodFlags
from graftlm.config.values import parse_value
from graftlm.errors import InputError, unknown_name_error
from graftlm.methods.adapter import Adapter
from graftlm.methods.base import Method
from graftlm.methods.bitfit import BitFit
from graftlm.methods.dora import DoRA
from graftlm.methods.full import Full
from graftlm.methods.lora import LoRA
from graftlm.methods.prefix import PrefixTuning


def _subclasses(cls: type[Any]) -> Iterator[type[Method]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")
METHODS: dict[str, type[Method]] = {cls.name: cls for cls in sorted(_subclasses(Method), key=lambda cls: cls.name)}
"""Name -> method, sorted by name."""

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
    """The method of these flags; --rank 0 is full fine-tuning. A flag at None leaves the method's own default.

    `given` are the flags that were typed: one that this method does not accept, and another does, is an InputError.
    """
    if config.method not in METHODS:
        raise unknown_name_error("--method", config.method, METHODS)
    if config.rank == 0 and "method" in given and config.method != "full":
        raise InputError(f"--rank 0 means full fine-tuning and contradicts --method {config.method}: leave one out")
    cls = Full if config.rank == 0 else METHODS[config.method]
    for flag in sorted({flag for m in METHODS.values() for flag in m.flags} - set(cls.flags)):
        value = getattr(config, flag)
        if flag in given and value and not (cls is Full and config.method != "full"):
            users = " or ".join(m.name for m in METHODS.values() if flag in m.flags)
            raise InputError(f"--method {config.method} takes no --{flag} {value}: leave it out, or use {users}")
    values = {field: getattr(config, flag) for flag, field in cls.flags.items() if getattr(config, flag) is not None}
    if "targets" in values:
        values["targets"] = tuple(dict.fromkeys(t.strip() for t in values["targets"].split(",") if t.strip()))
    return cls(**values, **_settings(config.method_args, cls))


def describe(name: str) -> str:
    """A method's summary, learning rate, flags and settings with their defaults, one a line. Raises InputError."""
    if name not in METHODS:
        raise unknown_name_error("--method", name, METHODS)
    cls = METHODS[name]
    labels = {field: f"--{flag} " for flag, field in cls.flags.items()}
    labels |= {field: f"--method_args {field}=" for field in _settings_types(cls)}
    defaults = {f.name: ",".join(f.default) if isinstance(f.default, tuple) else f.default for f in fields(cls)}
    lines = [f"  {label}{defaults[field]}".rstrip() for field, label in labels.items()]
    summary = (cls.__doc__ or "").partition("\n")[0]
    return "\n".join([f"--method {name}: {summary}", f"  --lr {cls.default_lr:g}", *lines])


def _settings_types(cls: type[Method]) -> dict[str, Any]:
    """The types of the fields that --method_args can set: those without a flag that are a single value."""
    hints, flagged = get_type_hints(cls), {"layers", *cls.flags.values()}
    types = {f.name: hints[f.name] for f in fields(cls) if f.name not in flagged}
    return {name: t for name, t in types.items() if get_origin(t) is not tuple}


def _settings(text: str, cls: type[Method]) -> dict[str, Any]:
    """The fields that --method_args sets."""
    types = _settings_types(cls)
    settings: dict[str, Any] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or name not in types:
            known = f"its settings are {', '.join(types)}" if types else "has no settings but its flags"
            raise InputError(f"--method_args {part}: must be name=value, and --method {cls.name}: {known}")
        settings[name] = parse_value(f"--method_args {part}", value, types[name])
    return settings


def method_from_json(data: Any, where: str = "run.json") -> Method:
    """The method described by `to_json`; an InputError, which begins with `where`, for anything else."""
    name = data.get("method") if isinstance(data, dict) else None
    if not isinstance(name, str) or name not in METHODS:
        raise InputError(f"{where}: names no method of ours; known are {', '.join(METHODS)}")
    cls, hints = METHODS[name], get_type_hints(METHODS[name])
    types = {f.name: hints[f.name] for f in fields(cls)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "method"}
    for key, value in values.items():
        if key not in types or not _fits(value, types[key]):
            raise InputError(f"{where}: its method is not understood: {key} = {value!r:.60}")
    return cls(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from a JSON file has a field's type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return type(value) is str and value in args
    if origin is tuple:
        types = [args[0]] * len(value) if isinstance(value, tuple) and args[-1] is Ellipsis else args
        return isinstance(value, tuple) and len(value) == len(types) and all(map(_fits, value, types))
    if hint is float:
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value) is hint and (hint is not int or abs(value) < 2**31)
