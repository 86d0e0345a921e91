"""Fields of a row by name, in a text with braces and on their own.

    "{instruction}\\n{input}"     two columns
    "{answers.text.0}"           nested: the first item of the list "text" in the object "answers"
    "{{x}}"                      plain text: {x}

Braces around anything that is no name are plain characters. A name begins with a letter, and may have spaces and
hyphens within it. A column whose own name has dots is found before what is nested.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graftlm.errors import InputError, did_you_mean

_NAME = r"[^\W\d]\w*(?:[ -]+\w+)*"
_BRACED = re.compile(rf"(\{{+)({_NAME}(?:\.[\w-]+)*)(\}}+)")
FLAG_OF = {"text": "template", "prompt": "prompt", "completion": "completion"}
"""The flag that takes a text with fields, by the key of the layout that it fills."""


class UnknownFieldError(InputError):
    """A row has no field of this name."""


@dataclass(frozen=True)
class FieldText:
    """A text with fields by name."""

    parts: tuple[tuple[str, str], ...]
    """Each field, with the text before it."""
    end: str
    """The text after the last field."""

    @classmethod
    def parse(cls, text: str, plain: str = "") -> "FieldText":
        """The fields of a text. plain: a name that is no field."""
        parts, literal, at = [], "", 0
        for match in _BRACED.finditer(text):
            name, pairs = match[2], min(len(match[1]), len(match[3]))
            outer = len(match[1]) - pairs, len(match[3]) - pairs
            if name == plain:
                continue
            literal += text[at : match.start()] + "{" * (outer[0] + pairs // 2)
            at, after = match.end(), "}" * (pairs // 2 + outer[1])
            if pairs % 2:
                parts.append((literal, name))
                literal = after
            else:
                literal += name + after
        return cls(tuple(parts), literal + text[at:])

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields, in order; a name may occur twice."""
        return tuple(name for _, name in self.parts)

    def fill(self, value: Callable[[str], str]) -> str:
        """The text, with the value of each field."""
        return "".join(literal + value(name) for literal, name in self.parts) + self.end


Columns = Mapping[str, str | FieldText]
"""By key of the layout: a column of the file, what is nested in one, or a text with fields."""


def with_one_field(text: str, field: str) -> str:
    """A text of old runs, in which one name is a field in any number of braces, and other names are plain."""

    def doubled(match: re.Match[str]) -> str:
        pairs = min(len(match[1]), len(match[3]))
        more = pairs - 1 if match[2] == field else pairs
        return "{" * more + match[0] + "}" * more

    return _BRACED.sub(doubled, text)


def field_names(source: str | FieldText) -> tuple[str, ...]:
    """The names of the fields that a value of `Columns` reads."""
    return (source,) if isinstance(source, str) else source.fields


def split_name(name: str, columns: Iterable[str]) -> tuple[str, list[str]]:
    """The column that a field is in, and the names and numbers that lead to it from there."""
    known, parts = set(columns), name.split(".")
    for end in range(len(parts), 0, -1):
        if (column := ".".join(parts[:end])) in known:
            return column, parts[end:]
    return parts[0], parts[1:]


def field_value(columns: Mapping[str, Any], name: str) -> Any:
    """A field's value; None if it is null, or within a null.

    Raises UnknownFieldError if there is no such field, InputError if its list has too few items.
    """
    column, steps = split_name(name, map(str, columns))
    if column not in columns:
        raise UnknownFieldError(f"no field {name!r}: {did_you_mean(name, columns)}the fields are {_listed(columns)}")
    value, at = columns[column], column
    for step in steps:
        if value is None:
            return None
        if isinstance(value, list) and step.isdecimal():
            if int(step) >= len(value):
                raise InputError(f"no {name}: {at} has {len(value)} item{'s' * (len(value) != 1)}")
            value = value[int(step)]
        elif isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, Mapping):
            hint = did_you_mean(f"{at}.{step}", [f"{at}.{key}" for key in value])
            raise UnknownFieldError(f"no field {name!r}: {hint}{at} has {_listed(value)}")
        elif isinstance(value, list):
            raise UnknownFieldError(f"no field {name!r}: {at} is a list: number its items, as in {at}.0")
        else:
            raise UnknownFieldError(f"no field {name!r}: {at} has no fields in it")
        at = f"{at}.{step}"
    return value


def field_text(columns: Mapping[str, Any], name: str) -> str:
    """A field's value as text: numbers and booleans as JSON writes them; "" for an empty text.

    Raises InputError as `field_value` does, and for null, a list and an object.
    """
    value = field_value(columns, name)
    if isinstance(value, str):
        return value
    if value is None or value != value:  # NaN
        raise InputError(f"empty {name}: fill it in, or leave the row out")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list):
        raise InputError(f"{name} is a list: name an item, as in {{{name}.0}}")
    if isinstance(value, Mapping) and value:
        raise InputError(f"{name} is an object: name a field of it, as in {{{name}.{next(iter(value))}}}")
    raise InputError(f"{name} is no text")


def read_fields(values: Mapping[str, Any], columns: Columns) -> tuple[dict[str, Any], InputError | None]:
    """A row with the layout's keys instead of the columns that they are taken from, and what is wrong with it."""
    found: dict[str, Any] = {}
    problem: InputError | None = None
    for key, source in columns.items():
        try:
            if isinstance(source, str):
                found[key] = field_value(values, source)
            else:
                found[key] = source.fill(lambda name: field_text(values, name))
        except InputError as error:
            found[key] = None
            problem = problem or type(error)(_with_flag(str(error), key, source, values))
    used = {split_name(name, map(str, values))[0] for source in columns.values() for name in field_names(source)}
    return {**{column: value for column, value in values.items() if column not in used}, **found}, problem


def taken_from(columns: Columns) -> str:
    """The note on the keys that are taken from texts with fields, or from what is nested."""
    taken = {key: source for key, source in columns.items() if not isinstance(source, str) or "." in source}
    named = {key: list(dict.fromkeys(field_names(source))) for key, source in taken.items()}
    return "; ".join(f"{key} from {', '.join(names) or 'a text without fields'}" for key, names in named.items())


def missing_column(column: str, columns: Mapping[str, Any], key: str) -> str:
    """What is wrong when a file has no column of this name, and what to do."""
    hint = did_you_mean(column, map(str, columns))
    return f"no column {column!r}: {hint}the columns are {_listed(columns)}; name it with --columns {key}=COLUMN"


def _with_flag(message: str, key: str, source: str | FieldText, columns: Mapping[str, Any]) -> str:
    """What is wrong with a field, and the flag that names it."""
    if not isinstance(source, str):
        return f"{message}; --{FLAG_OF[key]} names it"
    return missing_column(source, columns, key) if "." not in source else f"{message}; --columns {key} names it"


def _listed(columns: Iterable[str]) -> str:
    return ", ".join(map(str, columns)) or "none"
