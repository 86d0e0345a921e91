"""The table of file suffixes, and the readers of records: jsonl, csv, parquet and json.

A new data format is one reader and one row of `DATA_READERS`: data sets, tasks and the hub's patterns follow. Only
"\\n" ends a line (reviews contain U+0085, at which `str.splitlines` would break them). A byte that is not UTF-8 is an
error with its file and line.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from graftlm.errors import InputError

Record = tuple[str, dict[str, Any]]  # its source (file and line), and its fields

GGUF, SAFETENSORS = ".gguf", ".safetensors"
WEIGHT_SUFFIXES = (GGUF, SAFETENSORS)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Weights that are never read: a pickle can run code."""


def has_suffix(path: Path | str, *suffixes: str) -> bool:
    """Whether a file name ends with one of the suffixes, in any case."""
    return str(path).lower().endswith(suffixes)


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
    """The file's text without a byte order mark. A byte that is not UTF-8 is an error with its line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)  # it is counted after the mark
        line, byte = content.count(b"\n", 0, start) + 1, start - content.rfind(b"\n", 0, start)
        kind = "it looks like UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else f"0x{content[start]:02x}"
        raise InputError(f"{path}:{line}: byte {byte} is not UTF-8 ({kind}); save the file as UTF-8") from None
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
    if not isinstance(value, dict):
        raise InputError(f'{source}: a record must be a JSON object like {{"text": …}}, not {short_repr(value)}')
    return source, value


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield _object(f"{path}:{number}", _json(path, line, number))


def _read_json(path: Path) -> Iterator[Record]:
    """One array of objects or, as in many .json files of the hub, one object a line."""
    text = _text(path)
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    for number, item in enumerate(_json(path, text), start=1):
        yield _object(f"{path}: item {number}", item)


def _read_csv(path: Path) -> Iterator[Record]:
    limit = csv.field_size_limit(sys.maxsize)  # a global setting: restored below
    lines = csv.reader(io.StringIO(_text(path), newline="\n"), strict=True)
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
        yield f"{path}: row {number}", record


DATA_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".json": _read_json,
}
"""Suffix -> reader."""
