"""Values of flags: text of the command line and values of a TOML file -> what a config's field holds.

A field's type is bool, int, float, str or a Literal, possibly with None, or tuple[str, ...]. The command line, recipes
and sweeps use these checks.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

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
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{flag}{path}: cannot read it: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, brackets without end
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
    if get_origin(inner) is Literal and value not in get_args(inner):
        raise InputError(f"{where}: not one of {', '.join(get_args(inner))}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: not a finite number")
    return value


def type_name(inner: Any) -> str:
    """What a field of type `inner` takes, for an error."""
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(inner, "a text in quotes")
