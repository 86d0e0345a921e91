"""The table of file suffixes, and the readers of records: jsonl, csv, parquet and json.

A new data format is one reader and one row of `DATA_READERS`: data sets, tasks and the hub's patterns follow. Only
"\\n" ends a line (reviews contain U+0085, at which `str.splitlines` would break them). A byte that is not UTF-8 is an
error with its file and line.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from graftlm.config.paths import has_suffix, read_text
from graftlm.errors import InputError

Record = tuple[str, dict[str, Any]]  # its source (file and line), and its fields

GGUF, SAFETENSORS = ".gguf", ".safetensors"
WEIGHT_SUFFIXES = (GGUF, SAFETENSORS)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Weights that are never read: a pickle can run code."""


SPACE = re.compile(r"\s*")
ROWS_KEYS = ("data", "rows", "records", "examples", "items")
"""What an object around the rows of a file calls them."""


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file, each with its source. Raises InputError for a file without records."""
    read = DATA_READERS.get(path.suffix.lower())
    if read is None:
        raise InputError(f"{path}: unknown file format {path.suffix!r}: use {', '.join(DATA_READERS)}")
    record = None
    for record in read(path):
        yield record
    if record is None:
        raise InputError(f"{path}: no records in this file: write some, or name another")


def short_repr(value: object) -> str:
    """A value for an error message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _text(path: Path) -> str:
    """The file's text; a file without any is an error."""
    text = read_text(path)
    if not text.strip():
        raise InputError(f"{path}: the file is empty: write one record a line")
    return text


def _json(path: Path, text: str, line: int | None = None) -> Any:
    """The value of a whole file, or of its line of this number."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line or error.lineno}"
        raise InputError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or endless brackets
        where = f"{path}:{line}" if line else str(path)
        raise InputError(f"{where}: broken JSON: {str(error).partition(';')[0]}") from None


def _object(source: str, value: object) -> Record:
    """A record: an object, or a list of messages, which is a conversation."""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(item, dict) and {"role", "from"} & {*item} for item in value)
    ):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise InputError(f'{source}: a record must be a JSON object like {{"text": …}}, not {short_repr(value)}')
    return source, value


def _read_json(path: Path) -> Iterator[Record]:
    """Objects: one a line, an array of them, indented ones, or one object around the array.

    The content decides, not the suffix: many .json files hold lines, and many .jsonl files an array.
    """
    text = _text(path)
    first, _, rest = text.strip().partition("\n")
    line = _json_values(first)
    if line is None and first[0] not in "[{":
        raise InputError(f"{path}:1: is not JSON but {short_repr(first)}: write one object a line; a table is a .csv")
    items = _json(path, text) if first[0] == "[" else None
    if first[0] != "[" and (line is None or not rest):
        values = _json_values(text) or []
        items = _rows_inside(values[0]) if len(values) == 1 else None
        items = items or (values if line is None else None)
    for number, item in enumerate(items or (), start=1):
        yield _object(f"{path}: item {number}", item)
    for number, row in enumerate(text.split("\n") if items is None else (), start=1):
        if row.strip():
            yield _object(f"{path}:{number}", _json(path, row, number))


def _json_values(text: str) -> list[Any] | None:
    """JSON values, one after the other; None if the text is not that."""
    values, at = [], 0
    try:
        while at < len(text):
            value, at = json.JSONDecoder().raw_decode(text, at)
            values.append(value)
            space = SPACE.match(text, at)
            at = space.end() if space else at
    except (ValueError, RecursionError):
        return None
    return values


def _rows_inside(value: Any) -> list[Any] | None:
    """The rows of an object around them, such as {"data": [...]}."""
    rows = [value[key] for key in ROWS_KEYS if key in value] if isinstance(value, dict) else []
    return rows[0] if len(rows) == 1 and isinstance(rows[0], list) else None


def _read_csv(path: Path) -> Iterator[Record]:
    limit = csv.field_size_limit(sys.maxsize)  # a global setting: restored below
    text = _text(path)
    if text.lstrip().startswith(('{"', "{\n", "[{", "[\n")):
        raise InputError(f"{path}: holds JSON, not csv: name it .jsonl")
    first = text.partition("\n")[0]
    delimiter = next((mark for mark in ";\t" if mark in first and "," not in first), ",")
    lines = csv.reader(io.StringIO(text, newline="\n"), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    start = 1
    try:
        for values in lines:
            source, start = f"{path}:{start}", lines.line_num + 1
            if not values:
                continue
            if header is None:
                header = values
                if twice := [name for name in header if header.count(name) > 1]:
                    raise InputError(f"{source}: the header names field {twice[0]!r} twice")
            elif len(values) != len(header):
                raise InputError(f"{source}: {len(values)} values, but the header names {len(header)} fields")
            else:
                yield source, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}:{start}: broken csv: {str(error).partition(' - ')[0]}") from None
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        records = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # also for text that is not UTF-8
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(f"{path}: not a whole parquet file: {reason}") from None
    for number, record in enumerate(records, start=1):
        yield f"{path}: row {number}", {name: _without_nulls(value) for name, value in record.items()}


def _without_nulls(value: Any) -> Any:
    """A column's value without the keys that Arrow adds to objects, as nulls, because other rows' objects have them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def class_names(path: Path, *columns: str) -> tuple[str, ...]:
    """The label words by label number in a parquet file's schema (`datasets.ClassLabel`).

    They are those of the first of the columns that the file has.
    """
    if not has_suffix(path, ".parquet"):
        return ()
    try:
        import pyarrow.parquet

        schema = pyarrow.parquet.read_schema(path)
        column = next(name for name in columns if name in schema.names)
        names = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"][column]["names"]
        return tuple(map(str, names))
    except (
        ImportError,
        NotImplementedError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        StopIteration,
    ):  # no such metadata; reading says what is broken
        return ()


DATA_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".json": _read_json,
}
"""Suffix -> reader."""
DATA_CARD = "README.md"
"""Its front matter may say which files are the splits of a data set."""
