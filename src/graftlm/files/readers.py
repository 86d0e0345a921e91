"""The table of file suffixes, and the readers of records.

A new data format is one reader and one row of `DATA_READERS`: data sets, tasks and the hub's patterns follow, and so do
compressed files (`packed.py`). Only "\\n" ends a line (reviews contain U+0085, at which `str.splitlines` would break
them). A byte that is not UTF-8 is an error with its file and line.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from graftlm.config.csv_format import AUTOMATIC, CsvFormat
from graftlm.config.paths import decode_named
from graftlm.errors import InputError
from graftlm.files.arrow_rows import read_arrow, read_parquet
from graftlm.files.data_folders import TEXT, read_class_folders
from graftlm.files.json_rows import HEAD, json_lines, json_rows, names_splits, split_names
from graftlm.files.packed import COMPRESSED, ZIP, DataFile, data_suffix, open_data, raise_error
from graftlm.files.tables import looks_like_table, read_table

Record = tuple[str, dict[str, Any]]  # its source (file and line), and its fields

GGUF, SAFETENSORS = ".gguf", ".safetensors"
WEIGHT_SUFFIXES = (GGUF, SAFETENSORS)
AS_TABLE = "if it is one, name it .csv or give --columns delimiter=tab (or semicolon, pipe)"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Weights that are never read: a pickle can run code."""


def read_records(
    path: Path,
    split: str = "",
    csv: CsvFormat = AUTOMATIC,
    notes: list[str] | None = None,
    on_bad_row: Callable[[str, InputError], None] = raise_error,
) -> Iterator[Record]:
    """The records of one file, each with its source.

    Args:
        path: the file, or a folder of class folders (`data_folders.py`).
        split: which rows to read of a JSON file with several splits.
        csv: how a table is written; what it leaves out is found in the file.
        notes: one line is added for what was found and is not the plain case.
        on_bad_row: called with the source and the error of each row that cannot be read, such as broken JSON. By
            default it raises the error; if it returns, reading continues.

    Raises InputError for a file without records.
    """
    if path.is_dir():
        yield from read_class_folders(path)
        return
    file = open_data(path, DATA_SUFFIXES)
    read = DATA_READERS.get(file.suffix)
    if read is None:
        raise InputError(f"{path}: unknown file format {path.suffix!r}: {what_is_read(path)}")
    is_empty, notes = True, notes if notes is not None else []
    if not data_suffix(path):
        notes.append(f"{path}: no suffix: read as {file.suffix}")

    def on_bad(source: str, error: InputError) -> None:
        nonlocal is_empty
        is_empty = False
        on_bad_row(source, error)

    for record in read(replace(file, split=split, csv=csv, notes=notes, on_bad_row=on_bad)):
        is_empty = False
        yield record
    if is_empty:
        raise InputError(f"{path}: no records in this file: write some, or name another")


def is_data_file(path: Path | str) -> bool:
    """Whether the name has a suffix that is read."""
    return data_suffix(path) in DATA_SUFFIXES


def splits_inside(path: Path) -> set[str]:
    """The splits that one JSON file holds as arrays; none for any other file."""
    if data_suffix(path) != ".json":
        return set()
    file = open_data(path, DATA_SUFFIXES)
    head = b"\0" if file.is_packed else file.head(HEAD)
    if b"\0" not in head and not names_splits(head.decode(errors="replace")):  # UTF-16 has zeros
        return set()
    return split_names(_text(file))


def what_is_read(path: Path) -> str:
    """What to do with a file that is not read, for errors: what to write, or how to unpack it."""
    for suffixes, advice in OTHER_SUFFIXES.items():
        if path.name.lower().endswith(suffixes):
            return advice
    return f"use {SUFFIXES}"


def is_readable(path: Path) -> bool:
    """Whether a file has a suffix that is read, or none and a content that is (`open_data`)."""
    return is_data_file(path) or (not data_suffix(path) and open_data(path, DATA_SUFFIXES).suffix in DATA_SUFFIXES)


def _text(file: DataFile) -> str:
    """The file's text; a file without any is an error."""
    text = decode_named(file.content(), str(file.path))
    if not text.strip():
        raise InputError(f"{file.path}: the file is empty: write one record a line")
    return text


def _read_json(file: DataFile) -> Iterator[Record]:
    lines = json_lines(file)
    return json_rows(file, _text(file)) if lines is None else lines


def _read_text(file: DataFile) -> Iterator[Record]:
    """The whole file as one document. A table in it is only looked for if `--columns` names its delimiter."""
    if file.csv.delimiter:
        yield from read_table(file)
        return
    text = _text(file)
    if looks_like_table(text):
        file.notes.append(f"{file.path}: read as one text, and its lines look like the rows of a table: {AS_TABLE}")
    yield str(file.path), {"text": text}


DATA_READERS: dict[str, Callable[[DataFile], Iterator[Record]]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": read_table,
    ".tsv": read_table,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    TEXT: _read_text,
}
"""Suffix -> reader."""
DATA_SUFFIXES = (*DATA_READERS, ZIP)
SUFFIXES = f"{', '.join(DATA_SUFFIXES)}; {', '.join(COMPRESSED[:-1])} or {COMPRESSED[-1]} may follow"
"""The suffixes, for error messages."""
OTHER_SUFFIXES = {
    (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar"): "unpack it, and name the folder or a file in it",
    (".xls", ".xlsx", ".ods", ".numbers"): "save the table as .csv",
    (".yaml", ".yml", ".xml", ".toml"): "write one JSON object a line, as .jsonl",
    (".doc", ".docx", ".pdf", ".md", ".epub"): "save its text as .txt",
    (*PICKLE_SUFFIXES, ".pickle"): "it may hold code, and is never read: write .jsonl or .parquet",
}
"""What to do with files that others read, by suffix."""
DATA_CARD = "README.md"
"""Its front matter may say which files are the splits of a data set."""
