"""Which columns a user may have meant, for the error about a file whose columns fit no layout."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graftlm.text.labels import label_text
from graftlm.text.layout import small

SAMPLE = 200  # rows that are looked at
NAMED = 4  # columns that one line names
Values = dict[str, list[Any]]


def suggestion(rows: Sequence[Mapping[str, Any]], may_map: bool) -> str:
    """What to do with the columns of these rows, "" if nothing is likely.

    Several columns of 0 and 1 are several labels of a text. may_map: say that the longest texts are the text,
    and few values that repeat are the label; several long texts are the fields of a template. Not where some columns
    are those of a layout.
    """
    values = {name: [row.get(name) for row in rows] for name in rows[0]}
    texts = {name: sum(map(len, filter(None, some))) for name, some in values.items() if _is_text(some)}
    if not texts:
        return ""
    text = max(texts, key=lambda name: texts[name])
    others = {name: {label_text(value) for value in some} for name, some in values.items() if name != text}
    flags = [name for name, some in others.items() if some <= {"0", "1", "True", "False"}]
    labels = [name for name, some in others.items() if 2 <= len(some - {None}) <= max(2, len(rows) // 3)]
    if len(flags) > 1 and {*labels} <= {*flags}:
        more = f" and {len(flags) - NAMED} more" if len(flags) > NAMED else ""
        return (
            f"{', '.join(flags[:NAMED])}{more} are 0 or 1 for each text, and a text has one label here: choose one, as "
            f"in --columns text={text},label={flags[0]}, or write them all as a completion"
        )
    if not labels or not may_map:
        return ""
    several = [name for name, length in texts.items() if 2 * length > texts[text]]
    if 1 < len(several) <= NAMED:
        fields = " ".join(f"{name}: {{{name}}}" for name in several)
        return f"map them, as in --template '{fields} {labels[0]}:' --columns label={labels[0]}"
    choices = " or ".join(f"label={name}" for name in labels[:NAMED])
    return f"map them, as in --columns text={text},{choices}"


def _is_text(values: Sequence[Any]) -> bool:
    """Whether most of the values are several words, and most differ."""
    several = [value for value in values if isinstance(value, str) and " " in value.strip()]
    plain = all(value is None or isinstance(value, str) for value in values)
    return plain and 2 * len(several) > len(values) and 2 * len({*several}) > len(several)


def proposal(columns: Mapping[str, Any]) -> str:
    """The flags that may say what columns are, by their values."""
    fields = {name: value for name, value in _fields(columns) if small(name) != "id"}
    texts, numbers, lists = ([name for name in fields if isinstance(fields[name], kind)] for kind in (str, int, list))
    if lists and not texts:
        return f"{' and '.join(lists)} are lists, and no list is a text: write prompts and completions"
    if texts and numbers:
        return f"map them, as in --columns text={texts[0]},label={numbers[0]}"
    if len(texts) > 1:
        first, second = texts[:2]
        either = f"prompt={first},completion={second}, or text={first},label={second}"
        return f"map them, as in --columns {either}, or text={first} alone for documents"
    if texts and lists:
        return f"name fields, as in --prompt '{{{texts[0]}}}' --completion '{{{lists[0]}.0}}'"
    return "map them with --columns"


def _fields(columns: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The columns and, of objects, what is in them."""
    for name, value in columns.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", item) for inner, item in value.items())
        else:
            yield str(name), value
