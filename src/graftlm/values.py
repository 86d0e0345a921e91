"""Values as a field of a config takes them: what a type allows, in words that a mistake's line can use.

A field's type is bool, int, float, str or a Literal, maybe with None, or tuple[str, ...]. Words of the command line
(`flags.py`), keys of a recipe and cells of a sweep all meet these checks.
"""

import math
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from graftlm.errors import InputError


def split_optional(kind: Any) -> tuple[Any, bool]:
    """A field's type without None, and whether None is allowed."""
    if get_origin(kind) in (UnionType, Union):
        (inner,) = (part for part in get_args(kind) if part is not NoneType)
        return inner, True
    return kind, False


def takes_several(kind: Any) -> bool:
    """Whether a field's type is tuple[str, ...]: any number of texts."""
    return get_origin(kind) is tuple


def checked_value(where: str, value: Any, kind: Any) -> Any:
    """A recipe's value as a field of type `kind` takes it; an InputError that begins with `where`."""
    if takes_several(kind):
        if type(value) is not list or not all(type(text) is str for text in value):
            raise InputError(f"{where}: not a list of texts in quotes")
        return tuple(value)
    inner, _ = split_optional(kind)
    exact = str if get_origin(inner) is Literal else inner
    if exact is float and type(value) is int:
        value = float(value)
    if type(value) is not exact:
        raise InputError(f"{where}: not {wanted(inner)}")
    return allowed_value(where, value, inner)


def value_of_word(where: str, text: str, kind: Any) -> Any:
    """A word as a field of type `kind` takes it; an InputError that begins with `where`."""
    inner, optional = split_optional(kind)
    if optional and inner is not str and text.lower() == "none":
        return None
    value: Any = text
    try:
        if inner is bool:
            value = {"true": True, "false": False}[text.lower()]
        elif inner in (int, float):
            value = inner(text)
    except (ValueError, KeyError):
        raise InputError(f"{where}: not {wanted(inner)}") from None
    return allowed_value(where, value, inner)


def allowed_value(where: str, value: Any, inner: Any) -> Any:
    """The value, if a field of type `inner` may have it; an InputError that begins with `where`."""
    if get_origin(inner) is Literal and value not in get_args(inner):
        choices = get_args(inner)
        raise InputError(f"{where}: not one of {', '.join(choices)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: not a finite number")
    return value


def wanted(inner: Any) -> str:
    """What a field of type `inner` takes, in words."""
    return {bool: "true or false", int: "a whole number", float: "a number"}.get(inner, "a text in quotes")
