"""The values of flags: from a word of the command line, from TOML, and from Python, for the type of a field.

Every mistake is one line that names the flag or the file and offers the closest name.
"""

import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from graftlm.config.paths import read_text, user_path
from graftlm.config.renamed import new_flag
from graftlm.errors import InputError, did_you_mean

SECRETS = frozenset({"api_key"})
"""Fields whose values no error shows."""


def without_none(kind: Any) -> tuple[Any, bool]:
    """A field's type without None, and whether None is allowed."""
    if get_origin(kind) in (UnionType, Union):
        (inner,) = (part for part in get_args(kind) if part is not NoneType)
        return inner, True
    return kind, False


def is_variadic(kind: Any) -> bool:
    """Whether a field's type is tuple[str, ...]: any number of texts."""
    return get_origin(kind) is tuple


def read_toml(path: Path | str, flag: str = "") -> dict[str, Any]:
    """The content of a TOML file. Raises InputError; `flag` names the file, as in "--config "."""
    import tomllib

    try:
        return tomllib.loads(read_text(user_path(path, flag), flag))
    except (ValueError, RecursionError) as error:  # not TOML, brackets without end
        raise InputError(f"{path}: not a TOML file: {error}") from None


def read_toml_flags(where: str, table: Mapping[str, Any], kinds: Mapping[str, Any], command: str) -> dict[str, Any]:
    """The values of a TOML table by field; raises an InputError that begins with `where`.

    kinds: type by field. command: the subcommand whose flags the keys are.
    """
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in kinds:
            if new := new_flag(name, kinds):
                raise InputError(f"{where}: {key} is now {new.removeprefix('--')}")
            raise InputError(
                f"{where}: unknown key {key!r}: {did_you_mean(name, kinds, '')}keys are flags of graft {command}"
            )
        shown = "..." if name in SECRETS else repr(value)
        values[name] = validate_toml_value(f"{where}: {key} = {shown}", value, kinds[name])
    return values


def validate_toml_value(where: str, value: Any, kind: Any) -> Any:
    """The value for a field of type `kind`; raises an InputError that begins with `where`."""
    if is_variadic(kind):
        if type(value) is not list or not all(type(text) is str for text in value):
            raise InputError(f"{where}: not a list of texts in quotes")
        return tuple(value)
    inner, _ = without_none(kind)
    exact = str if get_origin(inner) is Literal else inner
    if exact is float and type(value) is int:
        value = float(value)
    if type(value) is not exact:
        raise InputError(f"{where}: not {type_name(inner)}")
    return _check_allowed(where, value, inner)


def parse_value(where: str, text: str, kind: Any) -> Any:
    """The value of a text for a field of type `kind`; raises an InputError that begins with `where`."""
    inner, optional = without_none(kind)
    if optional and inner is not str and text.lower() == "none":
        return None
    value: Any = text
    try:
        if inner is bool:
            value = {"true": True, "false": False}[text.lower()]
        elif inner in (int, float):
            value = inner(text)
    except (ValueError, KeyError):
        raise InputError(f"{where}: not {type_name(inner)}") from None
    return _check_allowed(where, value, inner)


def _check_allowed(where: str, value: Any, inner: Any) -> Any:
    if get_origin(inner) is Literal:
        value = value.lower()  # as in --quantization Q8_0, which is how llama.cpp writes it; all choices are lower-case
        if value not in get_args(inner):
            raise InputError(f"{where}: not one of {', '.join(get_args(inner))}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: not a finite number")
    return value


@cache
def hints_of(config: Any) -> dict[str, Any]:
    """Type by field."""
    return get_type_hints(config)


LISTS = frozenset({"targets", "labels", "mlp_widths"})
"""Flags of a text with commas, which may be a list in Python."""
MAPPINGS = frozenset({"labels", "columns", "method_args", "logit_bias"})
"""Flags of a text such as a=b,c=d, which may be a dict in Python."""

ROWS = frozenset({"data", "val_data", "test_data"})
"""Flags of a data file, for which the library's functions take rows, too."""


def python_value(name: str, value: Any, kind: Any) -> Any:
    """A value from Python for a field of type `kind`: a path as text, numpy's numbers as Python's, a text as a list.

    Raises InputError for a value of another type.
    """
    inner, optional = without_none(kind)
    if type(value) is inner or (value is None and optional) or get_origin(inner) is frozenset:
        return value
    where = f"--{name} {'...' if name in SECRETS else short(value)}"
    if is_variadic(kind):
        items = (value,) if isinstance(value, str | os.PathLike) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str | os.PathLike) for item in items):
            raise InputError(f"{where}: not a text, and not a list of texts")
        return tuple(map(os.fspath, items))
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif isinstance(value, list | tuple) and name in LISTS:
        value = ",".join(map(str, value))
    elif isinstance(value, Mapping) and name in MAPPINGS:
        value = ",".join(f"{key}={item}" for key, item in value.items())
    elif hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number of numpy's or torch's
        value = value.item()
    exact = str if get_origin(inner) is Literal else inner
    if exact is float and type(value) is int:
        value = float(value)
    if type(value) is not exact:
        hint = ": rows are passed to graftlm.train, a config names a file" if name in ROWS else ""
        raise InputError(f"{where}: not {type_name(inner).removesuffix(' in quotes')}{hint}")
    return _check_allowed(where, value, inner)


def short(value: Any) -> str:
    """How a value is shown in an error."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def type_name(inner: Any) -> str:
    """What a field of type `inner` takes, for an error."""
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(inner, "a text in quotes")
