"""Records in a file are the records that were written, and data sets read through it are those read into memory."""

import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest

from graftlm.errors import InputError
from graftlm.files.packed import DataFile
from graftlm.files.readers import read_records
from graftlm.text import record_file
from graftlm.text.dataset import load_dataset
from graftlm.text.record_file import RecordFile, select
from graftlm.text.records import Completion, Conversation, Document, Labelled, Preference, Record, Unpaired

CALL = {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": [1, 0.1, None]}}}]}
SAID = (("user", "hé\u2028\n"), ("assistant", "", CALL), ("tool", "1"))
EVERY: list[Record] = [
    Labelled("a\x85b\nc 🙂", 3, "f:1"),
    Completion("p", " c", "f:2", finished=False),
    Preference("p", "c", "r", "f:3", (True, False)),
    Preference(SAID[:1], SAID[1:], SAID[2:], "f:4", tools=({"name": "f"},)),
    Unpaired(SAID[:1], SAID[1:], True, "f:5", tools=({"x": [{}]},)),
    Unpaired("p", "c", False, "f:6", finished=False),
    Conversation(SAID, "f:7", ({"a": None},), (1,)),
    Document("", "f:8"),
]


def filled(records: Iterable[Record]) -> RecordFile:
    file = RecordFile()
    for record in records:
        file.append(record)
    return file


@pytest.mark.parametrize("memory", [1, record_file.MEMORY])
def test_records_come_back_as_they_were(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_file, "MEMORY", memory)
    file = filled(EVERY)
    assert list(file) == file[:] == EVERY
    for record, read in zip(EVERY, file, strict=True):
        assert repr(read) == repr(record)  # tuples are tuples again
    assert file[-1] == EVERY[-1]
    chosen = select(select(file, [6, 0, 3]), [2, 0])
    assert list(chosen) == [EVERY[3], EVERY[6]] == select(select(EVERY, [6, 0, 3]), [2, 0])
    with pytest.raises(IndexError):
        chosen[2]


def test_a_data_set_on_disk_is_the_one_in_memory(tmp_path: Path) -> None:
    rows = [{"text": f"text {n * n % 37}", "label": n % 2} for n in range(60)]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain, stored = load_dataset(str(path)), load_dataset(str(path), on_disk=True)
    assert {split: list(some) for split, some in stored.splits.items()} == plain.splits
    assert isinstance(stored.splits["validation"], RecordFile)
    assert (stored.fingerprint, stored.notes) == (plain.fingerprint, plain.notes)


def test_reading_lines_keeps_no_more_than_a_few_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.jsonl"
    with open(path, "w") as file:
        file.writelines(json.dumps({"text": "x" * 1000, "n": n}) + "\n" for n in range(8000))
    tracemalloc.start()
    try:
        assert sum(row["n"] for _, row in read_records(path)) == sum(range(8000))
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 2
    finally:
        tracemalloc.stop()


def test_lines_are_read_as_the_whole_text_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.jsonl"
    contents = (
        b'\xef\xbb\xbf\n{"text": "a\xc2\x85b"}\r\n\r\n{"text": 1}',
        b'{"text": "a"}\n[1]\n{"text": \n{"text": "b"}\n',
        b'{"text": "a"}\n{"text": "\xff"}\n',
    )

    def outcome() -> list[object]:
        bad: list[object] = []
        try:
            rows = list(read_records(path, on_bad_row=lambda source, error: bad.append((source, str(error)))))
            return [*rows, *bad]
        except InputError as error:
            return [str(error)]

    for content in contents:
        path.write_bytes(content)
        streamed = outcome()
        with monkeypatch.context() as patch:
            patch.setattr(DataFile, "is_packed", property(lambda file: True))
            assert outcome() == streamed
