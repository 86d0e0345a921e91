"""The rows of a JSON file, in the forms that people write.

    {"text": …}  lines, indented objects one after the other, or an array        the rows
    {"version": 1, "data": [{…}, {…}]}                                            one object around the array
    {"train": [{…}], "test": [{…}]}                                               an array for each split
    {"text": […], "label": […]}                                                   columns (`Dataset.to_dict`)
    {"text": {"0": …}, …}, {"0": {"text": …}, …}, {"id7": {"text": …}, …}          pandas' orients columns and index
    {"columns": […], "data": [[…]]}, {"schema": …, "data": [{…}]}                 pandas' orients split and table
    [[{"role": …}, …], …]                                                         bare conversations

The content decides, not the suffix: many .json files hold lines, and many .jsonl files an array.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from graftlm.errors import InputError
from graftlm.files.packed import DataFile

ROWS_KEYS = ("data", "rows", "records", "examples", "items")
"""What an object around the rows of a file calls them."""
SPLIT_KEYS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
}
"""What an object around several splits calls them."""
HEAD = 1_000_000
"""Bytes that decide whether a file has one object a line."""
ROWS_TO_COLUMNS = 2
"""How many more rows than columns a file must have whose rows have names that are no numbers."""
_SPACE = re.compile(r"\s*")
_BY_SPLIT = re.compile(rf'\s*\{{\s*"(?:{"|".join(SPLIT_KEYS)})"\s*:\s*\[')


def json_rows(file: DataFile, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The source and fields of each row of a file with this text.

    Of an object that holds several splits (`split_names`) the rows of the file's are read.
    """
    where = str(file.path)
    first, _, rest = text.strip().partition("\n")
    line = _values(first)
    if line is None and first[0] not in "[{":
        raise InputError(f"{where}:1: is not JSON but {short_repr(first)}: write one object a line; a table is a .csv")
    items = _parse(where, text) if first[0] == "[" else None
    if first[0] != "[" and (line is None or not rest):
        values = _values(text) or []
        items = _rows_inside(where, values[0], file.split) if len(values) == 1 else None
        several = line is None or len(line) > 1
        items = items if items is not None else (values if several else None) or None
    yield from _rows(file, _lines(file, text.split("\n")) if items is None else _items(where, items))


def json_lines(file: DataFile) -> Iterator[tuple[str, dict[str, Any]]] | None:
    """The source and fields of each row of a file that has one object a line, read line by line.

    None for other files, of which the whole text decides (`json_rows`): whose first line is no object, or the only one.
    """
    if file.is_packed:
        return None
    head = file.head(HEAD).decode(errors="replace").removeprefix("\ufeff")
    first, _, rest = head.lstrip().partition("\n")
    if not first.startswith("{") or not rest.strip() or "\0" in head[:64] or _values(first) is None:
        return None
    return _rows(file, _lines(file, file.lines()))


def _rows(file: DataFile, items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for source, item in items:
        if isinstance(item, list) and item and all(isinstance(m, dict) and {"role", "from"} & {*m} for m in item):
            item = {"messages": item}
        if isinstance(item, dict):
            yield source, item
        else:
            file.bad_row(source, f'a record must be a JSON object (such as {{"text": …}}), not {short_repr(item)}')


def _items(where: str, items: list[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{where}: item {number}", item) for number, item in enumerate(items, start=1))


def _lines(file: DataFile, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The source and value of each line."""
    for number, line in enumerate(lines, start=1):
        source = f"{file.path}:{number}"
        if line.strip():
            try:
                value = _parse(str(file.path), line, number)
            except InputError as error:
                file.on_bad_row(source, error)
            else:
                yield source, value


def names_splits(head: str) -> bool:
    """Whether a text that begins like this may be one object around the rows of several splits."""
    return _BY_SPLIT.match(head.removeprefix("\ufeff")) is not None


def split_names(text: str) -> set[str]:
    """The splits, if the text is one object around the rows of each; none otherwise."""
    if not names_splits(text):
        return set()
    values = _values(text) or []
    found = values[0] if len(values) == 1 and isinstance(values[0], dict) else {}
    return {SPLIT_KEYS[key] for key, rows in found.items() if key in SPLIT_KEYS and isinstance(rows, list)}


def short_repr(value: object) -> str:
    """A value for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _parse(where: str, text: str, line: int | None = None) -> Any:
    """The value of a whole file, or of its line of this number."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{where}:{line or error.lineno}"
        raise InputError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or endless brackets
        where = f"{where}:{line}" if line else where
        raise InputError(f"{where}: broken JSON: {str(error).partition(';')[0]}") from None


def _values(text: str) -> list[Any] | None:
    """JSON values, one after the other; None if the text is not that."""
    values, at = [], 0
    try:
        while at < len(text):
            value, at = json.JSONDecoder().raw_decode(text, at)
            values.append(value)
            space = _SPACE.match(text, at)
            at = space.end() if space else at
    except (ValueError, RecursionError):
        return None
    return values


def _rows_inside(where: str, value: Any, split: str) -> list[Any] | None:
    """The rows of an object around them; None if the object is a row itself."""
    if not isinstance(value, dict) or not value:
        return None
    if isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        return _from_table(where, value["columns"], value["data"])
    keys = [key for key in (*ROWS_KEYS, *SPLIT_KEYS) if _are_rows(value.get(key))]
    if len(keys) > 1:
        names, keys = keys, [key for key in keys if SPLIT_KEYS.get(key) == split]
        if len(keys) != 1:
            raise InputError(f"{where}: holds rows as {' and '.join(names)}: write each into a file of its own")
    if keys:
        return _without_index(value, value[keys[0]])
    return _from_columns(value) if _are_columns(value) else _from_pandas(where, value)


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _without_index(value: dict[str, Any], rows: list[Any]) -> list[Any]:
    """The rows without the index that pandas' orient table adds to each, and that its schema names."""
    schema = value.get("schema")
    index = schema.get("primaryKey") if isinstance(schema, dict) and "pandas_version" in schema else None
    if not isinstance(index, list):
        return rows
    return [{k: v for k, v in row.items() if k not in index} if isinstance(row, dict) else row for row in rows]


def _from_table(where: str, columns: list[Any], rows: list[Any]) -> list[Any]:
    """pandas' orient split: the names of columns, and the values of each row."""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, list) or len(row) != len(columns):
            raise InputError(f"{where}: item {number}: its values do not fit the {len(columns)} columns: write records")
    return [dict(zip(map(str, columns), row, strict=True)) for row in rows]


def _are_columns(value: dict[str, Any]) -> bool:
    """Whether all values are lists of one length, without objects: a list of messages is a value of one row."""
    lists = [column for column in value.values() if isinstance(column, list)]
    if len(lists) < len(value) or len(set(map(len, lists))) != 1:
        return False
    return not any(isinstance(item, dict) for column in lists for item in column)


def _from_columns(value: dict[str, list[Any]]) -> list[Any]:
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def _from_pandas(where: str, value: dict[str, Any]) -> list[Any] | None:
    """pandas' orients columns (its default) and index, in which numbers name the rows; None for anything else.

    In orient index other names may be those of rows, too, if they are many.
    """
    inner = list(value.values())
    if not all(isinstance(item, dict) and item for item in inner) or len({frozenset(item) for item in inner}) != 1:
        return None
    by_index, by_column = all(map(str.isdecimal, value)), all(map(str.isdecimal, inner[0]))
    if by_index and by_column:
        raise InputError(f"{where}: both rows and columns have numbers for names: write it with orient='records'")
    by_index = by_index or (not by_column and len(value) > ROWS_TO_COLUMNS * len(inner[0]))
    if by_column:
        return [{name: column[row] for name, column in value.items()} for row in inner[0]]
    return inner if by_index else None
