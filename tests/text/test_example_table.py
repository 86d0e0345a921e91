"""Examples in arrays are the examples that were put in, and tokenizing in parts gives what tokenizing at once gives."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from graftlm.errors import InputError
from graftlm.text import records
from graftlm.text.collate import Example, encode_rows
from graftlm.text.example_table import ExampleTable, Prompts, lengths_of
from graftlm.text.parts import encode_parts
from graftlm.text.preflight import Preflight, preflight
from graftlm.text.records import Completion, Document, Labelled, Preference, Record, Unpaired
from graftlm.text.template import load_template
from graftlm.text.tokenizer import Tokenizer
from tiny import byte_tokenizer

TEMPLATE = load_template("Review: {text}\nIt is", "bad,good")
KINDS: dict[str, Sequence[Record]] = {
    "labelled": [Labelled(f"film {'x' * n}", n % 2, f"a b.csv:{n}") for n in range(9)],
    "completions": [Completion(f"{n}+1=", f" {n + 1}", f"f.jsonl:{n}", finished=n != 3) for n in range(9)],
    "preferences": [Preference(f"q{n % 2}", " yes", f" no{n}", f"f: row {n}") for n in range(9)],
    "unpaired": [Unpaired(f"q{n}", " a", n % 2 == 0, f"f: item {n}") for n in range(9)],
    "documents": [Document("abcdefghi" * 2 * n, f"d{n}.txt") for n in range(9)],
}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    byte_tokenizer(tmp_path)
    return Tokenizer.from_folder(tmp_path)


def without_texts(examples: Sequence[Example]) -> list[Example]:
    return [replace(example, text="", instr_tuned_text="") for example in examples]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_give_the_examples_of_the_whole(kind: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, truncated = encode_rows(KINDS[kind], TEMPLATE, tokenizer, 24)
    checks, plain = Preflight(TEMPLATE, tokenizer, 24), preflight({"train": whole}, TEMPLATE, tokenizer, 24, {})
    monkeypatch.setattr(records, "CHUNK_RECORDS", 2)
    read, parts = [], []
    for some, examples, cut in encode_parts(KINDS[kind], TEMPLATE, tokenizer, 24):
        assert len(some) <= 4  # a window may need the documents of two parts
        read += some
        parts += examples
        truncated -= cut
        checks.add("train", examples)
    assert read == KINDS[kind]
    assert parts == whole
    assert truncated == 0
    assert checks.notes({}) == plain
    table = ExampleTable.of(parts)
    assert list(table) == table[:] == without_texts(whole)
    assert table[-1] == without_texts(whole)[-1]
    assert lengths_of(table) == lengths_of(whole) == [example.length for example in whole]
    assert list(Prompts(table)) == list(Prompts(whole)) == [example.prompt_ids for example in whole]


def test_every_field_of_an_example_comes_back() -> None:
    full = Example(
        (1, 2**31 - 1),
        (3, 4, 5),
        label=7,
        text="",
        instr_tuned_text="",
        source="f:007",
        rejected_ids=(6,),
        desirable=False,
        finished=False,
        masked_spans=(range(0, 1), range(2, 3)),
        label_ids=((8,), (), (9, 10)),
        rest=(11,),
        skip=1,
        is_window=True,
    )
    some = [full, Example((1,), (2,), None, "", "", ""), replace(full, source="12", desirable=True, skip=0)]
    assert ExampleTable.of(some)[:] == some
    logps = torch.tensor([[0.5, 1 / 3]] * 3, dtype=torch.float64)
    assert ExampleTable.of(some).with_reference(logps)[2] == replace(some[2], reference=(0.5, 1 / 3))


def test_an_example_takes_little_more_than_its_tokens() -> None:
    table = ExampleTable.of(Example(tuple(range(40)), (1, 2), 0, "x" * 999, "y" * 999, "f:1") for _ in range(100))
    assert table.values.nbytes + table.starts.nbytes <= 100 * (4 * 42 + 64)


def test_text_and_messages_in_different_parts_are_refused(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "CHUNK_RECORDS", 1)
    said = (("user", "q"),)
    rows = [Unpaired("q", " a", True, "f:1"), Unpaired(said, (("assistant", "a"),), True, "f:2")]
    with pytest.raises(InputError, match="f:1: its prompt is text, and other rows have messages"):
        list(encode_parts(rows, TEMPLATE, tokenizer, 24))
