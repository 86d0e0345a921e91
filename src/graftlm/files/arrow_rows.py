"""The rows of parquet and Arrow files, batch by batch: one batch is in memory at a time."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from graftlm.errors import InputError
from graftlm.files.packed import DataFile, data_suffix

BATCH = 4096  # rows of a parquet file that are Python objects at a time
ARROW_MAGIC = b"ARROW1"
"""The first bytes of Arrow's file format; its stream format, which `datasets` writes, has none."""


def read_parquet(file: DataFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a parquet file, one row group after the other."""
    import pyarrow.parquet

    with _arrow_errors(file.path, "parquet"), pyarrow.parquet.ParquetFile(_arrow_source(file)) as table:
        yield from _arrow_rows(file.path, table.iter_batches(BATCH))


def read_arrow(file: DataFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of an Arrow file, one batch after the other: IPC's stream, which `datasets` writes, or its file."""
    import pyarrow

    with _arrow_errors(file.path, "arrow"), _arrow_reader(file) as reader:
        if isinstance(reader, pyarrow.ipc.RecordBatchFileReader):
            yield from _arrow_rows(file.path, map(reader.get_batch, range(reader.num_record_batches)))
        else:
            yield from _arrow_rows(file.path, reader)


def _arrow_reader(file: DataFile) -> Any:
    """pyarrow's reader of an IPC file or stream."""
    import pyarrow

    source = _arrow_source(file)
    source = pyarrow.memory_map(source) if isinstance(source, str) else source
    is_file = source.read(len(ARROW_MAGIC)) == ARROW_MAGIC
    source.seek(0)
    return pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)


def _arrow_source(file: DataFile) -> Any:
    """What pyarrow opens: a path, which it maps into memory, or the unpacked bytes."""
    import pyarrow

    return pyarrow.BufferReader(file.content()) if file.is_packed else str(file.path)


@contextlib.contextmanager
def _arrow_errors(path: Path, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # also for text that is not UTF-8
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(f"{path}: not a whole {kind} file: {reason}") from None


def _arrow_rows(path: Path, batches: Iterable[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    records = (record for batch in batches for record in batch.to_pylist())
    for number, record in enumerate(records, start=1):
        yield f"{path}: row {number}", {name: _without_nulls(value) for name, value in record.items()}


def _without_nulls(value: Any) -> Any:
    """A column's value without the keys that Arrow adds to objects, as nulls, because other rows' objects have them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def class_names(path: Path, *columns: str) -> tuple[str, ...]:
    """The label words by label number in the schema of a parquet or Arrow file (`datasets.ClassLabel`).

    They are those of the first of the columns that the file has.
    """
    if data_suffix(path) not in (".parquet", ".arrow"):
        return ()
    import pyarrow.parquet

    try:
        file = DataFile(path, data_suffix(path))
        parquet = file.suffix == ".parquet"
        schema = pyarrow.parquet.read_schema(_arrow_source(file)) if parquet else _arrow_reader(file).schema
        column = next(name for name in columns if name in schema.names)
        names = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"][column]["names"]
        return tuple(map(str, names))
    except (InputError, NotImplementedError, OSError, ValueError, KeyError, TypeError, StopIteration):
        return ()  # no such metadata; reading says what is broken
