"""The table of file suffixes, and the readers of records.

A new data format is one reader and one row of `DATA_READERS`: data sets, tasks and the hub's patterns follow, and so do
compressed files (`packed.py`). Only "\\n" ends a line (reviews contain U+0085, at which `str.splitlines` would break
them). A byte that is not UTF-8 is an error with its file and line.
"""

import csv
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftlm.config.paths import decode_named
from graftlm.errors import InputError
from graftlm.files.arrow_rows import read_arrow, read_parquet
from graftlm.files.json_rows import json_rows, split_names
from graftlm.files.packed import COMPRESSED, ZIP, DataFile, data_suffix, open_data

Record = tuple[str, dict[str, Any]]  # its source (file and line), and its fields

GGUF, SAFETENSORS = ".gguf", ".safetensors"
WEIGHT_SUFFIXES = (GGUF, SAFETENSORS)
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Weights that are never read: a pickle can run code."""


def read_records(path: Path, split: str = "") -> Iterator[Record]:
    """The records of one file, each with its source; of a JSON file with several splits, those of `split`.

    Raises InputError for a file without records.
    """
    file = open_data(path, DATA_SUFFIXES)
    read = DATA_READERS.get(file.suffix)
    if read is None:
        raise InputError(f"{path}: unknown file format {path.suffix!r}: use {SUFFIXES}")
    record = None
    for record in read(replace(file, split=split)):
        yield record
    if record is None:
        raise InputError(f"{path}: no records in this file: write some, or name another")


def is_data_file(path: Path | str) -> bool:
    """Whether the name has a suffix that is read."""
    return data_suffix(path) in DATA_SUFFIXES


def splits_inside(path: Path) -> set[str]:
    """The splits that one JSON file holds as arrays; none for any other file."""
    return split_names(_text(open_data(path, DATA_SUFFIXES))) if data_suffix(path) == ".json" else set()


def _text(file: DataFile) -> str:
    """The file's text; a file without any is an error."""
    text = decode_named(file.content(), str(file.path))
    if not text.strip():
        raise InputError(f"{file.path}: the file is empty: write one record a line")
    return text


def _read_json(file: DataFile) -> Iterator[Record]:
    return json_rows(str(file.path), _text(file), file.split)


def _read_csv(file: DataFile) -> Iterator[Record]:
    limit = csv.field_size_limit(sys.maxsize)  # a global setting: restored below
    path, text = file.path, _text(file)
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


DATA_READERS: dict[str, Callable[[DataFile], Iterator[Record]]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
"""Suffix -> reader."""
DATA_SUFFIXES = (*DATA_READERS, ZIP)
SUFFIXES = f"{', '.join(DATA_SUFFIXES)}; {' or '.join(COMPRESSED)} may follow"
"""The suffixes, for error messages."""
DATA_CARD = "README.md"
"""Its front matter may say which files are the splits of a data set."""
