"""One row of a data file: columns are read with every value checked. Errors name file and line."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graftlm.errors import InputError
from graftlm.files.json_rows import short_repr
from graftlm.text.labels import NO_LABEL, is_integer, is_missing, label_text, not_a_class, parse_labels
from graftlm.text.words import normalize


@dataclass(frozen=True)
class LabelWords:
    """The label words by label number; without words a label is any number.

    Words that are numbers themselves, such as 1,2,3,4,5 or 0,4, leave the label numbers without a reading of their own,
    unless both readings agree: then a label must be a word.
    """

    words: tuple[str, ...] = ()
    values: tuple[tuple[str, str], ...] = ()
    """The data's values, each with its word, where --labels names them: then a label must be one of the values."""

    @classmethod
    def of(cls, labels: Sequence[str]) -> "LabelWords":
        """Of the parts of --labels."""
        return cls(*parse_labels(",".join(labels))) if labels else cls()

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """By normalized word; by label number too, unless words that are numbers have other numbers."""
        if self.values:
            return {normalize(label_text(value) or ""): self.words.index(word) for value, word in self.values}
        words = {normalize(label_text(word) or ""): number for number, word in enumerate(self.words)}
        numbers = {str(number): number for number in range(len(self.words))}
        return {**words, **numbers} if numbers.items() >= {w for w in words.items() if is_integer(w[0])} else words

    def number(self, value: object) -> int | None:
        """A label's number, from 1, "1", 1.0 or "Positive". True only if it is a label word."""
        text = normalize(label_text(value) or "")
        if not self.words and text.isascii() and text.isdecimal() and len(text) < 10:
            return int(text)
        return self._numbers.get(text)

    def problem(self, value: object) -> str:
        """What is wrong with a value that is no label, and what is allowed."""
        shown, words = short_repr(value), ",".join(self.words)
        if label_text(value) == NO_LABEL:
            return "label -1 says that the row has no label: leave it out"
        if problem := not_a_class(value):
            return problem
        if not self.words:
            return f"unknown label {shown}: a number from 0 on is needed, or --labels with the words"
        if self.values:
            return f"unknown label {shown}: --labels names {', '.join(value for value, _ in self.values)}"
        if (text := label_text(value) or "") in map(str, range(len(self.words))):
            return (
                f"label {shown} has two readings: as a word it is not in --labels {words}, and as a label's number it "
                f"is {self.words[int(text)]!r}: write the words, or give the data's own numbers as --labels"
            )
        allowed = (
            f"{n} or {word!r}" if self._numbers.get(str(n)) == n else repr(word) for n, word in enumerate(self.words)
        )
        from_1 = text == str(len(self.words)) and not any(map(is_integer, self.words))
        named = ",".join(f"{number}={word}" for number, word in enumerate(self.words, start=1))
        hint = f"; if the data counts from 1, write --labels {named}" if from_1 else ""
        if text.casefold() in BOOLEANS and len(self.words) == 2:
            hint = f"; for true and false write --labels false={self.words[0]},true={self.words[1]}"
        return f"unknown label {shown}: allowed are {', '.join(allowed)}{hint}"


BLANK: tuple[object, ...] = (None, "", [], {}, "[]", "{}")
"""Values of a column that has none."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file. Its methods read a column and raise InputError, with file and line, for a wrong value."""

    source: str
    columns: Mapping[str, Any]
    labels: LabelWords = LabelWords()

    def error(self, message: str) -> InputError:
        """An error in this row, to raise."""
        return InputError(f"{self.source}: {message}")

    def text(self, name: str) -> str:
        """A column's text, which must not be blank."""
        value = self.columns.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            if name in self.columns:
                raise self.error(f"empty {name}: fill it in, or leave the row out")
            raise self.error(f"no field {name!r}: every row needs it")
        if not isinstance(value, str):
            raise self.error(f"{name} must be text, not {short_repr(value)}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            bad = f"U+{ord(value[error.start]):04X}"
            raise self.error(f"{name} holds half a character ({bad} alone); write the whole one") from None
        return value

    def optional_text(self, name: str) -> str:
        """A column's text, "" if the column is missing or blank."""
        value = self.columns.get(name)
        return "" if value is None or (isinstance(value, str) and not value.strip()) else self.text(name)

    def label(self) -> int:
        """Column "label" as a label number."""
        value = self.columns.get("label")
        number = self.labels.number(value)
        if number is None and is_missing(value):
            raise self.error("no label (field 'label' is missing or empty): every row needs one")
        if number is None:
            raise self.error(self.labels.problem(value))
        return number

    def refuse(self, names: Iterable[str]) -> None:
        """Raise InputError if one of these columns has a value: it would be lost."""
        for name in names:
            if self.columns.get(name) not in BLANK:
                raise self.error(
                    f"{name} would be lost, and it changes what is learned: write it into the texts (--prompt and "
                    "--completion name fields), or leave it out"
                )

    def desirable(self) -> bool:
        """Column "label" as true or false, or 1 or 0."""
        value = as_bool(self.columns.get("label"))
        if value is None:
            raise self.error(f"label must be true or false, not {short_repr(self.columns.get('label'))}")
        return value

    def tools(self) -> tuple[Any, ...]:
        """Column "tools": a list of JSON schemas, also as JSON text; or "functions", as they were called before."""
        name = "tools" if self.columns.get("tools") or not self.columns.get("functions") else "functions"
        value = self.columns.get(name) or []
        if isinstance(value, str):
            try:
                value = json.loads(value) or []
            except ValueError:
                raise self.error(f"{name} is broken JSON: {short_repr(value)}") from None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise self.error(f"{name} must be a list of JSON schemas, not {short_repr(value)}")
        wrapped = [{"type": "function", "function": tool} for tool in value] if name == "functions" else value
        return tuple(self.as_json(name, wrapped))

    def json(self, name: str) -> Any:
        """A column of JSON text."""
        try:
            return json.loads(self.text(name))
        except ValueError:
            raise self.error(f"{name} is broken JSON: {short_repr(self.columns[name])}") from None

    def as_json(self, name: str, value: list[Any]) -> list[Any]:
        """A list, which a chat template may write as JSON."""
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise self.error(f"{name} holds what JSON and UTF-8 cannot ({error}): write it as text") from None
        return value

    def finished(self, answers: int) -> tuple[bool, ...]:
        """Column "finished" ("ended" in old files): whether the text ends with each answer. Without it, it does."""
        name = "finished" if "finished" in self.columns else "ended"
        value = self.columns.get(name)
        if value is None:
            return (True,) * answers
        flags = value if isinstance(value, list) else [value]
        if len(flags) != answers or not all(isinstance(flag, bool) for flag in flags):
            allowed = "true or false" if answers == 1 else "a list of two, each true or false: for chosen and rejected"
            raise self.error(f"{name} must be {allowed}, not {short_repr(value)}")
        return tuple(flags)


BOOLEANS = {"true": True, "false": False}


def as_bool(value: object) -> bool | None:
    """True or false, also as 1 or 0, and as text: csv has no booleans."""
    return {**BOOLEANS, "1": True, "0": False}.get(str(value).strip().casefold())
