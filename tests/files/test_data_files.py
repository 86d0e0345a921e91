"""Data files in the forms that people have: the files of layouts/, and what is refused."""

import bz2
import gzip
import io
import json
import lzma
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from data_files import LAYOUTS, TEXTS, WORDS
from graftlm.errors import InputError
from graftlm.files.arrow_rows import class_names
from graftlm.files.readers import SUFFIXES, read_records
from graftlm.text.dataset import load_dataset

NUMBERED = [{"text": text, "label": n % 2} for n, text in enumerate(TEXTS)]
NAMED = [{"text": text, "label": WORDS[n % 2]} for n, text in enumerate(TEXTS)]
SST2 = [{"idx": n, "sentence": text, "label": n % 2} for n, text in enumerate(TEXTS)]
ROWS = NUMBERED[:3]


def rows(path: Path, split: str = "") -> list[dict[str, Any]]:
    return [record for _, record in read_records(path, split)]


def refused(path: Path, message: str) -> None:
    """Reading fails with this message, in which FILE stands for the path."""
    with pytest.raises(InputError, match=f"^{re.escape(message.replace('FILE', str(path)))}$"):
        rows(path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("array.jsonl", NUMBERED),
        ("cls.arrow", NUMBERED),
        ("cls.csv.gz", NAMED),
        ("cls.jsonl.gz", NUMBERED),
        ("cls.jsonl.zst", NUMBERED),
        ("cls.zip", NUMBERED),
        ("data.ndjson", SST2),
        ("data_key.json", NUMBERED),
        ("jsonl_trailing.jsonl", NUMBERED),
        ("large_dict.parquet", NAMED),
        ("pandas_default.json", NAMED),
        ("pandas_lines.json", NAMED),
        ("pandas_records.json", NAMED),
        ("pretty.jsonl", NUMBERED),
        ("rt.parquet", NUMBERED),
        ("upper.JSONL", SST2),
    ],
)
def test_a_file_gives_its_rows(name: str, expected: list[dict[str, Any]]) -> None:
    assert rows(LAYOUTS / name) == expected


def test_the_content_of_a_file_without_a_suffix_decides(tmp_path: Path) -> None:
    for number, name in enumerate(("array.jsonl", "cls.jsonl.gz", "cls.arrow", "cls.zip", "rt.parquet", "plain.csv")):
        path = shutil.copy(LAYOUTS / name, tmp_path / f"a{number}")
        if name.endswith(".gz"):
            refused(path, f"FILE: unknown file format '': use {SUFFIXES}")
            continue
        notes: list[str] = []
        assert [row for _, row in read_records(path, notes=notes)] == (NAMED if number == 5 else NUMBERED)
        kind = {0: ".json", 3: ".jsonl"}.get(number, Path(name).suffix)
        assert notes == [f"{path}: no suffix: read as {kind}"]
    data = load_dataset(
        str(LAYOUTS / "SMSSpamCollection"), "", "", {"text": "column2", "label": "column1"}, ("ham", "spam")
    )
    assert sorted(row.text for rows in data.splits.values() for row in rows) == sorted(
        f"free prize {n}" for n in range(24)
    )
    assert rows(shutil.copy(LAYOUTS / "cls.arrow", tmp_path / "a.feather")) == NUMBERED
    (tmp_path / "LICENSE").write_text("MIT\n\nPermission is granted, free of charge.\n")
    with pytest.raises(InputError, match=r"LICENSE: is not a data file that we read"):
        load_dataset(str(tmp_path / "LICENSE"))


@pytest.mark.parametrize("end", ["", " ", "\r"])
def test_objects_of_one_line(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.jsonl").write_bytes("".join(json.dumps(row) + end for row in ROWS).encode())
    assert rows(tmp_path / "a.jsonl") == ROWS


def test_splits_inside_one_json_file(tmp_path: Path) -> None:
    splits = load_dataset(str(LAYOUTS / "train_key.json")).splits
    assert list(splits) == ["train", "validation"]
    assert [row.text for row in splits["train"]] == TEXTS
    assert [row.text for row in splits["validation"]] == TEXTS[:8]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": NUMBERED, "dev": ROWS, "notes": "none"}))
    assert rows(path, "validation") == ROWS
    refused(path, "FILE: holds rows as train and dev: write each into a file of its own")
    path.write_text(json.dumps({"test": ROWS}))
    assert rows(path) == ROWS
    assert list(load_dataset("", test=str(path)).splits) == ["test"]


@pytest.mark.parametrize(
    "content",
    [
        {"columns": ["text", "label"], "index": [4, 7, 9], "data": [[row["text"], row["label"]] for row in ROWS]},
        {"3": ROWS[0], "1": ROWS[1], "12": ROWS[2]},
        {"text": {"0": TEXTS[0], "1": TEXTS[1], "5": TEXTS[2]}, "label": {"0": 0, "1": 1, "5": 0}},
        {"text": TEXTS[:3], "label": [0, 1, 0]},
        {
            "schema": {"fields": [], "primaryKey": ["index"], "pandas_version": "1.4.0"},
            "data": [{"index": n, **row} for n, row in enumerate(ROWS)],
        },
        {"train": ROWS},
        {"version": 2, "examples": ROWS},
    ],
    ids=["split", "index", "columns", "lists", "table", "train", "examples"],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_forms_of_a_json_file(tmp_path: Path, content: dict[str, Any], indent: int | None) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content, indent=indent))
    assert rows(tmp_path / "a.json") == ROWS


def test_rows_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({f"id{n}": row for n, row in enumerate(NUMBERED[:5])}))
    assert rows(path) == NUMBERED[:5]
    turns = {name: {"role": "user", "content": name} for name in ("prompt", "chosen", "rejected")}
    path.write_text(json.dumps(turns))  # one row of three messages
    assert rows(path) == [turns]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"translation": {"en": "a", "fr": "b"}},
        {"conversations": [{"from": "human", "value": "a"}], "data": "none"},
        {"text": "a", "data": []},
        {"conversation": [{"input": "a", "output": "b"}]},
    ],
)
def test_one_record_alone_is_a_record(tmp_path: Path, record: dict[str, Any]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    assert rows(tmp_path / "a.jsonl") == [record]


def test_conversations_without_a_key(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.json").write_text(json.dumps([turns, turns]))
    assert rows(tmp_path / "a.json") == [{"messages": turns}] * 2
    (tmp_path / "a.json").write_text(json.dumps([[{"from": "human", "value": "a"}]]))
    assert rows(tmp_path / "a.json") == [{"messages": [{"from": "human", "value": "a"}]}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"0": {"0": 1, "1": 2}}, "FILE: both rows and columns have numbers for names: write it with orient='records'"),
        (
            {"columns": ["text", "label"], "data": [["a", 1], ["b"]]},
            "FILE: item 2: its values do not fit the 2 columns: write records",
        ),
        ([["a", 1]], "FILE: item 1: a record must be a JSON object (such as {\"text\": …}), not ['a', 1]"),
        ({"data": ROWS, "rows": ROWS}, "FILE: holds rows as data and rows: write each into a file of its own"),
    ],
)
def test_a_json_file_that_is_refused(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    refused(tmp_path / "a.json", message)


# ------------------------------------------------------------------------------------------------ packed files


@pytest.mark.parametrize("name", ["cls.csv.gz", "cls.jsonl.gz", "cls.jsonl.zst"])
def test_a_compressed_file_that_is_truncated(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes((LAYOUTS / name).read_bytes()[:-9])
    refused(tmp_path / name, "FILE: the file is truncated: fetch it again")


def test_a_compressed_file_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b'{"text": "a"}')
    refused(
        tmp_path / "a.jsonl.gz",
        "FILE: cannot be unpacked (Not a gzipped file (b'{\"')): fetch it again, or unpack it",
    )
    (tmp_path / "a.jsonl.zst").write_bytes(b'{"text": "a"}')
    with pytest.raises(InputError, match=r"a\.jsonl\.zst: cannot be unpacked \(ZSTD .*\): fetch it again"):
        rows(tmp_path / "a.jsonl.zst")
    whole = bytearray((LAYOUTS / "cls.zip").read_bytes())
    whole[60:64] = b"\0\0\0\0"
    (tmp_path / "a.zip").write_bytes(whole)
    with pytest.raises(InputError, match=r"a\.zip: cannot be unpacked \(.*\): fetch it again, or unpack it$"):
        rows(tmp_path / "a.zip")
    (tmp_path / "a.zip").write_bytes(whole[:80])
    refused(tmp_path / "a.zip", "FILE: not a whole .zip file: fetch it again")


@pytest.mark.parametrize(("suffix", "pack"), [("bz2", bz2.compress), ("xz", lzma.compress)])
def test_files_of_bzip2_and_xz(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / f"train.jsonl.{suffix}"
    path.write_bytes(pack("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    assert rows(path) == ROWS and len(load_dataset(str(tmp_path), labels=WORDS).splits) == 3
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        InputError, match=rf"\.{suffix}: cannot be unpacked \(.* before the end-of-stream marker .*fetch it"
    ):
        rows(path)


def test_a_compressed_parquet_file_and_several_streams(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), buffer)
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(buffer.getvalue()))
    assert rows(tmp_path / "a.parquet.gz") == ROWS
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, lines)))
    assert rows(tmp_path / "a.jsonl.gz") == ROWS


def archive(path: Path, **files: str) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in files.items():
            packed.writestr(name.replace("_", "."), content)
    return path


def test_a_zip_with_one_data_file(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    path = archive(tmp_path / "a.zip", reviews_jsonl=lines, readme_txt="Reviews.", __MACOSX="", licence_md="MIT")
    assert list(read_records(path)) == [(f"{path}:{n}", row) for n, row in enumerate(ROWS, start=1)]
    path = archive(tmp_path / "b.zip", a_csv="text\nx\n", b_csv="text\ny\n")
    refused(path, "FILE: holds a.csv, b.csv: only a .zip with one data file is read; unpack it and name the folder")
    path = archive(tmp_path / "c.zip", a_png="x")
    refused(path, "FILE: holds a.png: only a .zip with one data file is read; unpack it and name the folder")
    path = archive(tmp_path / "d.zip", a_csv_gz="x")
    refused(path, "FILE: a.csv.gz in it is compressed again: unpack it and name the file")


def test_compressed_files_of_splits(tmp_path: Path) -> None:
    for split, part in (("train-00000-of-00002", NUMBERED[:12]), ("train-00001-of-00002", NUMBERED[12:])):
        lines = "".join(json.dumps(row) + "\n" for row in part).encode()
        (tmp_path / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines))
    shutil.copy(LAYOUTS / "cls.zip", tmp_path / "test.zip")
    splits = load_dataset(str(tmp_path), labels=WORDS).splits
    assert sorted(row.text for split in ("train", "validation") for row in splits[split]) == sorted(TEXTS)
    assert [row.text for row in splits["test"]] == TEXTS


# ------------------------------------------------------------------------------------------------ Arrow


def test_both_of_arrows_formats(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.feather.write_feather(table, tmp_path / "file.arrow", compression="uncompressed", chunksize=2)
    with pyarrow.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    for name in ("file", "stream"):
        path = tmp_path / f"{name}.arrow"
        assert list(read_records(path)) == [(f"{path}: row {n}", row) for n, row in enumerate(ROWS, start=1)]
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}: not a whole arrow file: [^\n]*$"):
            rows(path)


def test_label_names_in_an_arrow_file() -> None:
    assert class_names(LAYOUTS / "cls.arrow", "label") == ("neg", "pos")
    assert class_names(LAYOUTS / "cls.arrow", "text") == ()
