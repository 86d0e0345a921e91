"""Records in a temporary file instead of memory; of each only the place in the file is kept.

The file has one record a line, as JSON; up to MEMORY bytes of it stay in memory. It lies where temporary files do
(TMPDIR), has no name, and disappears with the last object that reads it.
"""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from tempfile import SpooledTemporaryFile
from typing import Any, overload

from graftlm.files.atomic import disk_errors
from graftlm.text.records import Completion, Conversation, Document, Labelled, Preference, Record, Unpaired

MEMORY = 64_000_000
KINDS: tuple[type[Record], ...] = (Labelled, Completion, Preference, Unpaired, Conversation, Document)
_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
_FIELDS = {kind: [f.name for f in fields(kind)] for kind in KINDS}
_MESSAGES = {"prompt", "completion", "chosen", "rejected", "messages"}
"""The fields that may hold messages, which are tuples."""
_TUPLES = {"tools", "unlearned"}


class _Lines:
    """Lines in a temporary file."""

    def __init__(self) -> None:
        self._file = SpooledTemporaryFile(MEMORY)  # noqa: SIM115 - closed with this object
        self._starts = array("q", [0])

    def __del__(self) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def append(self, line: bytes) -> None:
        """Write a line after the others."""
        with disk_errors("a temporary file"):
            self._file.seek(self._starts[-1])
            self._file.write(line)
        self._starts.append(self._starts[-1] + len(line))

    def __getitem__(self, number: int) -> bytes:
        start, stop = self._starts[number], self._starts[number + 1]
        self._file.seek(start)
        return self._file.read(stop - start)


class RecordFile(Sequence[Record]):
    """Records by number, each read from the file; a slice is a list of them."""

    def __init__(self) -> None:
        self._lines = _Lines()
        self._numbers: Sequence[int] | None = None

    def append(self, record: Record) -> None:
        """Write a record after the others."""
        assert self._numbers is None, "a selection is only read"
        kind = type(record)
        values = [_NUMBERS[kind], *(getattr(record, name) for name in _FIELDS[kind])]
        self._lines.append(json.dumps(values).encode() + b"\n")

    def select(self, numbers: Sequence[int]) -> "RecordFile":
        """Those with these numbers, in the same file."""
        chosen = RecordFile.__new__(RecordFile)
        chosen._lines = self._lines
        chosen._numbers = [self._numbers[n] for n in numbers] if self._numbers is not None else numbers
        return chosen

    def __len__(self) -> int:
        return len(self._lines) if self._numbers is None else len(self._numbers)

    def __iter__(self) -> Iterator[Record]:
        return map(self._record, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        numbers = range(len(self))[index]
        return self._record(numbers) if isinstance(numbers, int) else list(map(self._record, numbers))

    def _record(self, number: int) -> Record:
        number = number if self._numbers is None else self._numbers[number]
        kind, *values = json.loads(self._lines[number].decode())
        return _READ[kind](*values)


def _reader(kind: type[Record]) -> Callable[..., Record]:
    """A function from a line's values to a record of this kind: JSON has lists where records have tuples."""
    changes = [
        (place, _messages if name in _MESSAGES else _tuple)
        for place, name in enumerate(_FIELDS[kind])
        if name in _MESSAGES | _TUPLES or (kind is Preference and name == "finished")
    ]

    def read(*values: Any) -> Record:
        if not changes:
            return kind(*values)
        changed = list(values)
        for place, change in changes:
            changed[place] = change(changed[place])
        return kind(*changed)

    return read


def _tuple(values: Any) -> Any:
    return tuple(values)


def _messages(said: Any) -> Any:
    return said if isinstance(said, str) else tuple(map(tuple, said))


_READ = [_reader(kind) for kind in KINDS]


def select(records: Sequence[Record], numbers: Iterable[int]) -> Sequence[Record]:
    """Those of the records with these numbers, kept where they are: in memory or in a file."""
    if isinstance(records, RecordFile):
        return records.select(array("q", numbers))
    return [records[number] for number in numbers]
