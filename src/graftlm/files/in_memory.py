"""Rows from Python as a data file: a list of dicts, columns, a DataFrame, or a dict of splits.

    GRAFT_HOME/rows/3f2a1b4c5d6e7f80.jsonl      the rows, one a line, in a file named by a hash of its bytes
    GRAFT_HOME/rows/5d6e7f803f2a1b4c/           train.jsonl, validation.jsonl and test.jsonl of a dict of splits

So rows go through the readers of any other file, the record of a run names them, a run is resumed and evaluated without
passing them again, and its subprocesses read them. Equal rows are the same file, of any object. pandas
and others are recognised by their methods and not imported.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftlm.config.values import short
from graftlm.errors import GraftError, InputError
from graftlm.files.assets import rows_home
from graftlm.files.atomic import write_text
from graftlm.files.split_files import SPLITS

TO_ROWS = {"to_dicts": (), "to_pylist": (), "to_list": (), "to_dict": ("records",)}
"""Methods that return a list of dicts, with their arguments: of polars, pyarrow, datasets and pandas."""


def is_rows(value: Any) -> bool:
    """Whether a value is rows, rather than a name or a path."""
    return value is not None and not isinstance(value, str | Path)


def rows_file(name: str, value: Any) -> Path:
    """The file of some rows, or of a dict of splits the folder; written unless it is there.

    name: of the argument, for errors. A list of texts is one document each, a list of lists is conversations. Raises
    InputError for what is no rows, and for a value that JSON does not have.
    """
    splits = {"": value}
    if isinstance(value, Mapping) and value and set(value) <= {*SPLITS} and all(map(is_rows, value.values())):
        splits = {split: value[split] for split in SPLITS if split in value}
    texts = {split: _lines(f"{name}[{split!r}]" if split else name, rows) for split, rows in splits.items()}
    digest = hashlib.sha256("".join(f"{split}\n{text}" for split, text in texts.items()).encode()).hexdigest()[:16]
    path = rows_home() / digest
    if "" in texts:
        path = path.with_suffix(".jsonl")
    for split, text in texts.items():
        file = path / f"{split}.jsonl" if split else path
        if not file.is_file() or file.read_bytes() != text.encode():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, text)
    return path


def rows_record(data: str) -> dict[str, Any] | None:
    """What run.json records of rows from Python: how many, and their hash; None for other data."""
    path = Path(data)
    if not data or path.parent != rows_home():
        return None
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    contents = [file.read_bytes() for file in files]
    return {
        "rows": sum(content.count(b"\n") for content in contents),
        "sha256": hashlib.sha256(b"".join(contents)).hexdigest(),
    }


@contextmanager
def rows_by_name(paths: Mapping[str, Path]) -> Iterator[None]:
    """Within it an error of a file in `paths` is one of the argument: data[2] for its third line."""
    try:
        yield
    except GraftError as error:
        line = str(error)
        for name, path in paths.items():
            files = {f"{name}[{file.stem!r}]": file for file in path.glob("*.jsonl")} if path.is_dir() else {}
            for argument, file in {**files, name: path}.items():
                for number, _, rest in (part.partition(":") for part in line.split(f"{file}:")[1:]):
                    if number.isdecimal() and rest:
                        line = line.replace(f"{file}:{number}:", f"{argument}[{int(number) - 1}]:", 1)
                line = line.replace(str(file), argument)
        if line == str(error):
            raise
        raise type(error)(line) from error


def _lines(name: str, value: Any) -> str:
    """Rows as the text of a jsonl file."""
    lines = []
    for number, row in enumerate(_rows(name, value)):
        if isinstance(row, str):
            row = {"text": row}
        elif isinstance(row, list | tuple):
            row = {"messages": row}
        elif not isinstance(row, Mapping):
            raise InputError(f"{name}[{number}]: {short(row)} is no row: write a dict, as in {{'text': …, 'label': …}}")
        values = {str(key): _plain(f"{name}[{number}]: {key}", item) for key, item in row.items()}
        lines.append(json.dumps(values) + "\n")
    if not lines:
        raise InputError(f"{name}: no rows: pass some, or name a file")
    return "".join(lines)


def _rows(name: str, value: Any) -> Iterable[Any]:
    """The rows of any object that has some."""
    for method, arguments in TO_ROWS.items():
        if hasattr(value, method):
            return _with_label_names(getattr(value, method)(*arguments), getattr(value, "features", None))
    if isinstance(value, Mapping):
        columns = {key: list(column) for key, column in value.items() if isinstance(column, Iterable)}
        lengths = {len(column) for column in columns.values()}
        if len(columns) < len(value) or len(lengths) != 1 or any(isinstance(c, str) for c in value.values()):
            raise InputError(
                f"{name}: a dict of {', '.join(map(repr, list(value)[:6]))}: pass a list of dicts, a dict of columns "
                "of one length, or one of train, validation and test"
            )
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if not isinstance(value, Iterable) or isinstance(value, bytes):
        raise InputError(f"{name}: {short(value)}: pass a path, a list of dicts, or a DataFrame")
    rows = list(value)
    if rows and all(isinstance(row, str) and len(row) < 256 and Path(row).is_file() for row in rows):
        raise InputError(f"{name}: a list of files: name one, or a folder that holds them")
    return rows


def _with_label_names(rows: Iterable[Any], features: Any) -> Iterable[Any]:
    """Rows of `datasets`, with the names of classes instead of their numbers."""
    names = {key: feature.names for key, feature in dict(features or {}).items() if hasattr(feature, "names")}
    if not names:
        return rows
    return [
        {key: names[key][item] if key in names and type(item) is int and item >= 0 else item for key, item in r.items()}
        for r in rows
    ]


def _plain(where: str, value: Any) -> Any:
    """A value as JSON has it: numbers of numpy as Python's, a missing one (NaN, NaT, NA) as null, dates as text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(where, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(where, item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _missing(where, value)
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    for method in ("tolist", "isoformat"):  # of numpy's arrays and numbers; of dates
        if hasattr(value, method):
            return _plain(where, getattr(value, method)())
    raise InputError(f"{where} is {short(value)}, of type {type(value).__name__}: write it as text or a number")


def _missing(where: str, value: float) -> None:
    if math.isinf(value):
        raise InputError(f"{where} is {value}: write a finite number")
