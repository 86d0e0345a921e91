"""What `graft train` reads of data as people have it: the outcome of every source in layouts/, as tables state it.

Each table is a list of entries:

    source       a file or folder of `TABLES`, maybe with :CONFIGURATION, or a file of `MADE`
    flags        flags of graft train, {"columns": "text=sentence"}; none if missing
    read         the layout, and the columns that are not read, as the run says it
    rows         how many records, in all or by split
    records      the first of them, in the file's order or by split, written by hand (a text that ends in … begins
                 like this); none of what is made
    notes        what else the run says, apart from the notes of USUAL
    error        instead of these: the line that refuses the source; SOURCE is its path, LAYOUTS and SUFFIXES are lists
    read_by      which of TRL, LLaMA-Factory, axolotl and mlx-lm read the source, with the flags or settings it takes
"""

import json
import re
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.files.readers import SUFFIXES
from graftlm.text.dataset import Dataset
from graftlm.text.recognise import _names
from graftlm.text.records import Record
from graftlm.text.template import load_template
from graftlm.text.tokenizer import Tokenizer
from graftlm.training.data import check_records, encode_splits, objectives_for, read_data, with_labels
from tiny import byte_tokenizer

TESTS = Path(__file__).parent.parent
TABLES = {"rows": TESTS / "layouts", "files": TESTS / "files" / "layouts"}
"""The folder with the sources of each table, outcomes_NAME.json."""
PEERS = ("TRL", "LLaMA-Factory", "axolotl", "mlx-lm")
USUAL = re.compile(
    r" names no .*: held out from train by hash of the text |^each text is put into the default template"
)
CHAT = (
    "{{ tools or '' }}{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}{{ m.content }}{{ m.tool_calls }}"
    "<|endoftext|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MAX_LENGTH = 16384
NAMED = _names()
MADE = {
    "long_rows.jsonl": "".join(
        json.dumps({"text": f"the fox was a bore to see , take {n} " * 500, "label": n % 2}) + "\n" for n in range(12)
    )
}
"""The contents of files that are too large to be kept."""


def table(name: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((TESTS / "layouts" / f"outcomes_{name}.json").read_text())
    return entries


ENTRIES = [(TABLES[name], entry) for name in TABLES for entry in table(name)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Bytes, and a chat template that writes all that messages may have."""
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT}))
    return Tokenizer.from_folder(folder)


def read(source: Path, flags: dict[str, Any], tokenizer: Tokenizer) -> tuple[Dataset, list[str]]:
    """The records of a source, and all notes: what `graft train` reads and checks before its first step."""
    config = with_labels(TrainConfig(data=str(source), **flags), {*flags})
    template = load_template(config.template, config.labels)
    data = read_data(config, {*flags}, template)
    check_records(data, next(iter(objectives_for(data.splits["train"][0])), config.objective))
    *notes, _ = encode_splits(data, 0, template, tokenizer, MAX_LENGTH).notes
    return data, [note.replace(str(source), "SOURCE") for note in notes]


def as_json(record: Record) -> dict[str, Any]:
    """A record as the tables have it: its kind, and its values but for source and defaults."""
    values = {f.name: (getattr(record, f.name), f.default) for f in fields(record) if f.compare and f.name != "source"}
    given = {name: value for name, (value, default) in values.items() if default is MISSING or value != default}
    return {type(record).__name__: json.loads(json.dumps(given))}


def _same(found: Any, expected: Any) -> bool:
    """Whether records are equal; of a text that ends in … only the beginning is expected."""
    if isinstance(expected, str) and expected.endswith("…"):
        return isinstance(found, str) and found.startswith(expected[:-1])
    if isinstance(expected, dict) and isinstance(found, dict):
        return found.keys() == expected.keys() and all(_same(found[key], value) for key, value in expected.items())
    if isinstance(expected, list) and isinstance(found, list):
        return len(found) == len(expected) and all(map(_same, found, expected))
    return type(found) is type(expected) and bool(found == expected)


def in_order(splits: Iterable[list[Record]]) -> list[dict[str, Any]]:
    """Records in the order of their files and rows."""

    def place(record: Record) -> tuple[str, int]:
        path, number = re.fullmatch(r"(.*?)(\d*)", record.source, re.DOTALL).groups()
        return path, int(number or 0)

    return [as_json(record) for record in sorted((r for records in splits for r in records), key=place)]


@pytest.mark.parametrize(
    ("folder", "entry"), ENTRIES, ids=[" ".join((e["source"], *e.get("flags", {}).values())) for _, e in ENTRIES]
)
def test_the_outcome_of_a_source(folder: Path, entry: dict[str, Any], tmp_path: Path, tokenizer: Tokenizer) -> None:
    source, flags = folder / entry["source"], entry.get("flags", {})
    if entry["source"] in MADE:
        source = tmp_path / entry["source"]
        source.write_text(MADE[entry["source"]])
    if "error" in entry:
        with pytest.raises(InputError) as error:
            read(source, flags, tokenizer)
        line = str(error.value).replace(str(source), "SOURCE")
        assert line.replace(NAMED, "LAYOUTS").replace(SUFFIXES, "SUFFIXES") == entry["error"]
        return
    data, notes = read(source, flags, tokenizer)
    assert f"SOURCE: read as {entry['read']}" in notes
    others = [note for note in notes if not USUAL.search(note) and not note.startswith("SOURCE: read as ")]
    assert others == entry.get("notes", [])
    if isinstance(entry["rows"], dict):
        assert {split: len(records) for split, records in data.splits.items()} == entry["rows"]
        first = {split: list(map(as_json, data.splits[split][: len(some)])) for split, some in entry["records"].items()}
        assert _same(first, entry["records"])
    else:
        records = in_order(data.splits.values())
        assert len(records) == entry["rows"]
        first = entry.get("records", [])
        assert _same(records[: len(first)], first)
        assert first or entry["source"] in MADE


@pytest.mark.parametrize("name", TABLES)
def test_every_source_has_its_outcome(name: str) -> None:
    sources = {path.name for path in TABLES[name].iterdir() if not path.name.startswith("outcomes_")}
    assert sources == {entry["source"].partition(":")[0] for entry in table(name)} - MADE.keys()


def test_nine_in_ten_of_what_others_read_are_read() -> None:
    assert all({*entry.get("read_by", [])} <= {*PEERS} for _, entry in ENTRIES)
    known, here, plain = (
        {entry["source"].partition(":")[0] for _, entry in ENTRIES if counts(entry)}
        for counts in (
            lambda entry: entry.get("read_by"),
            lambda entry: "read" in entry,
            lambda entry: "read" in entry and not entry.get("flags") and ":" not in entry["source"],
        )
    )
    every = {entry["source"].partition(":")[0] for _, entry in ENTRIES}
    assert len(known & here) >= 0.9 * len(known), sorted(known - here)
    sentence = (
        f"Of {len(every)} small files and folders in the layouts that people have, {len(plain)} are read as they are, "
        f"{len(here - plain)} with a flag, and {len(every - here)} are refused. TRL, LLaMA-Factory, axolotl or mlx-lm "
        f"read {len(known)} of them, of which {len(known & here)} are read here"
    )
    page = (TESTS.parent / "docs" / "coming-from.md").read_text()
    assert sentence in " ".join(page.split())
