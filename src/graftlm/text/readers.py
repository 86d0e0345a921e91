"""Files -> records: jsonl, json, csv and parquet, each record with where it stands.

Unusual: lines end at "\\n" alone (reviews contain U+0085, at which `str.splitlines` would break them), and a wrong byte
is an error that names its file and line.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from graftlm.errors import InputError

Record = tuple[str, dict[str, Any]]  # where it stands, and its fields


def read_records(path: Path) -> Iterator[Record]:
    """The records of one file, each with where it stands; the file's ending says how they are written.

    An InputError where there is none.
    """
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise InputError(f"{path}: unknown kind of file {path.suffix!r}: {', '.join(READERS)} are read")
    record = None
    for record in read(path):
        yield record
    if record is None:
        raise InputError(f"{path}: no records in this file: write some, or name another")


def short(value: object) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _text(path: Path) -> str:
    """The file's text; a byte order mark is dropped, and a byte that is not UTF-8 is an error with its line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)  # counted behind the mark
        line, byte = content.count(b"\n", 0, start) + 1, start - content.rfind(b"\n", 0, start)
        kind = "it looks like UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else f"0x{content[start]:02x}"
        raise InputError(f"{path}:{line}: byte {byte} is not UTF-8 ({kind}); save the file as UTF-8") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty: write one record a line")
    return text


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise InputError(f"{where}: broken JSON: {str(error).partition(';')[0]}") from None


def _object(where: str, value: object) -> Record:
    if not isinstance(value, dict):
        raise InputError(f'{where}: a record must be a JSON object like {{"text": …}}, not {short(value)}')
    return where, value


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield _object(where, _json(where, line))


def _read_json(path: Path) -> Iterator[Record]:
    """One array of objects, or, as many a hub file named .json is, one object a line."""
    text = _text(path)
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: broken JSON: {str(error).partition(';')[0]}") from None
    for number, item in enumerate(items, start=1):
        yield _object(f"{path}: item {number}", item)


def _read_csv(path: Path) -> Iterator[Record]:
    limit = csv.field_size_limit(sys.maxsize)  # of the process: put back below
    lines = csv.reader(io.StringIO(_text(path), newline="\n"), strict=True)
    header: list[str] | None = None
    start = 1
    try:
        for values in lines:
            where, start = f"{path}:{start}", lines.line_num + 1
            if not values:
                continue
            if header is None:
                header = values
                if twice := [name for name in header if header.count(name) > 1]:
                    raise InputError(f"{where}: the header names field {twice[0]!r} twice")
            elif len(values) != len(header):
                raise InputError(f"{where}: {len(values)} values, but the header names {len(header)} fields")
            else:
                yield where, dict(zip(header, values, strict=True))
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
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # text that is no UTF-8, too
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(f"{path}: not a whole parquet file: {reason}") from None
    for number, record in enumerate(records, start=1):
        yield f"{path}: row {number}", record


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".json": _read_json,
}
"""A file's ending -> what reads it."""
