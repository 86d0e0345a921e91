"""What the labels of a data set are: one form of a value, and the label words that a column's values make.

1, "1", 1.0, "1.0"      1             a rating; ratings from 1 on are their own label words
True, "True"            true
None, "", NaN           no label
-1                      no label, as the test splits of GLUE have it, unless -1 is one of the classes
0.5, [1, 2], {…}        no class: an error says what would work
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from graftlm.errors import InputError
from graftlm.files.json_rows import short_repr
from graftlm.text.words import normalize

MAX_LABELS = 256
"""The most label words that are taken from the data; banking77 has 77, clinc150 151."""
FEW_LABELS = 20
"""If labels hardly repeat, up to this many have the default label words; more are refused."""
NO_LABEL = "-1"
_WHOLE = re.compile(r"(-?\d+)\.0+", re.ASCII)
_FRACTION = re.compile(r"-?\d*\.\d+(e-?\d+)?", re.ASCII)
_LIST = re.compile(r"\[[^\[\]]*\]|-?\d+(, ?-?\d+)+", re.ASCII)
_VALUE = re.compile(r"([\w+-][\w .+-]*)=\s*(\S.*)")
_INTEGER = re.compile(r"-?\d+", re.ASCII)
_SHOWN = 8


@dataclass
class _Value:
    """A label in the data."""

    word: str
    source: str
    """The first row that has it."""
    rows: int = 0


def label_text(value: object) -> str | None:
    """A value of a label's column as text: whole floats as integers; None for what has no label, or is no label."""
    if value is None or isinstance(value, str | int):
        text = "" if value is None else str(value).strip()
        whole = _WHOLE.fullmatch(text)
        return (whole[1] if whole else text) or None
    if isinstance(value, float) and not math.isnan(value):
        return str(int(value)) if value.is_integer() else str(value)
    return None


def is_missing(value: object) -> bool:
    """Whether a label's column is empty in this row; tables that programs write have NaN or NULL there."""
    return str(value if value is not None else "").strip().casefold() in ("", "nan", "null")


def is_integer(text: str) -> bool:
    """Whether a label is an integer."""
    return _INTEGER.fullmatch(text) is not None


def not_a_class(value: object) -> str:
    """What is wrong with a label that is no class, and what would work; "" for any other value."""
    if isinstance(value, list) or (isinstance(value, str) and _LIST.fullmatch(value.strip())):
        return (
            f"label {short_repr(value)} is a list: a text has one label here: leave one in each row, take the first "
            "(--columns label=COLUMN.0), or learn them as text (--prompt '{…}' --completion '{…}')"
        )
    if _FRACTION.fullmatch(label_text(value) or ""):
        return (
            f"label {short_repr(value)} is a fraction, and there is no regression: round the numbers to a few "
            "classes, name the classes with --labels, or learn each number as a text (--prompt '{…}' --completion "
            "'{…}')"
        )
    return ""


def labels_of(values: Iterable[tuple[str, object]]) -> list[str]:
    """The label words of these values, each with its source (file and line): numbers by value, words by alphabet.

    [] if there are too few rows to say. Raises InputError for what is no class, for -1 that may be a class or none, and
    for a label that occurs once where the others repeat, which may be a slip.
    """
    found: dict[str, _Value] = {}
    rows = 0
    for source, value in values:
        if problem := not_a_class(value):
            raise InputError(f"{source}: {problem}")
        if (word := label_text(value)) is None or is_missing(value):
            continue
        word = normalize(word) if isinstance(value, bool) else word
        rows += 1
        found.setdefault(normalize(word), _Value(word, source)).rows += 1
        if len(found) > MAX_LABELS:
            raise InputError(f"{source}: {_too_many(len(found), rows)}")
    _drop_unlabelled(found)
    if 2 * len(found) > rows:
        if len(found) > FEW_LABELS:
            raise InputError(f"{next(iter(found.values())).source}: {_too_many(len(found), rows)}")
        return []
    every = sorted(found.values(), key=lambda v: (int(v.word), "") if _all_integers(found) else (0, v.word))
    for value in every:
        if value.rows == 1 and rows >= 10 * len(every):
            words = ",".join(v.word for v in every)
            raise InputError(
                f"{value.source}: label {short_repr(value.word)} occurs once in {rows} rows: if it is no slip, give "
                f"--labels {words}"
            )
    return [value.word for value in every]


def parse_labels(labels: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """The label words of --labels in their order, and the word of each value of the data: "1=bad,2=bad,5=good".

    Without "=" the words alone. Raises InputError for a value without a word, and one with two.
    """
    parts = [part.strip() for part in labels.split(",")]
    named = [_VALUE.fullmatch(part) for part in parts]  # not "<=50K"
    pairs = [(match[1].strip(), match[2].strip()) for match in named if match]
    if not pairs:
        return tuple(parts), ()
    if None in named:
        plain = parts[named.index(None)]
        raise InputError(f"--labels {labels!r}: {plain!r} names no value of the data: write all as VALUE=WORD, or none")
    values = [normalize(label_text(value) or "") for value, _ in pairs]
    if twice := next((value for value, _ in pairs if values.count(normalize(label_text(value) or "")) > 1), ""):
        raise InputError(f"--labels {labels!r}: {twice!r} has two words: give each value of the data one")
    return tuple(dict.fromkeys(word for _, word in pairs)), tuple(pairs)


def names_by_number(labels: Sequence[str], names: Mapping[str, set[str]]) -> tuple[str, ...]:
    """The names of labels that are the numbers from 0 on, by number; () unless each has one name of its own."""
    if list(labels) != list(map(str, range(len(labels)))) or {*names} != {*labels}:
        return ()
    every = [name.strip() for number in labels for name in names[number]]
    return tuple(every) if len({*every}) == len(every) == len(labels) and all(every) else ()


def taken_from_data(words: Sequence[str]) -> str:
    """The note on label words that the data names."""
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return f"label words, taken from the data in the order of their numbers: {', '.join(words[:_SHOWN])}{more}"


def _too_many(labels: int, rows: int) -> str:
    return (
        f"{labels} different labels in {rows} rows: too many to be classes: name them with --labels, or learn them as "
        "texts (--prompt '{…}' --completion '{…}')"
    )


def _all_integers(found: Iterable[str]) -> bool:
    return all(map(is_integer, found))


def _drop_unlabelled(found: dict[str, _Value]) -> None:
    """Remove -1 from the labels where it marks a row without one: neither with 1 alone nor with other negative ones."""
    others = found.keys() - {NO_LABEL}
    if NO_LABEL not in found or others == {"1"} or any(word.startswith("-") and is_integer(word) for word in others):
        return
    if others == {"0", "1"}:
        raise InputError(
            f"{found[NO_LABEL].source}: label -1 has two readings next to 0 and 1: a class, with --labels=-1,0,1, or "
            "no label, with --labels 0,1 --bad_rows skip"
        )
    del found[NO_LABEL]
