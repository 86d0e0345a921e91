"""Reading files: each format, each way to name a split, and the words of each error with its file and line."""

import csv
import hashlib
import json
import re
from dataclasses import replace
from datetime import date
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from graftlm.errors import InputError
from graftlm.files.readers import SUFFIXES
from graftlm.text.dataset import default_labels, load_dataset, load_prompts
from graftlm.text.layouts import LAYOUTS, MORE_LAYOUTS
from graftlm.text.recognise import recognise
from graftlm.text.records import Completion, Conversation, Labelled, Preference, Record, Unpaired, hashed_values
from graftlm.text.rows import Row

WORDS = ("negative", "positive")
COMMON_LAYOUTS = f"{', '.join(map(str, LAYOUTS[:7]))}, and {len(LAYOUTS) + len(MORE_LAYOUTS) - 7} more (docs/how-to.md)"
NEL = "a\x85b\u2028c\x0bd\x1ce\ff"  # characters at which str.splitlines breaks a line


def refused(message: str):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


COUNTED = r"( \((all|\d+ of) \d+ rows (is|are) bad.*\))?"
"""How many rows are bad, after the first of them."""


def jsonl(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def many(n: int, first: int = 0) -> list[dict]:
    return [{"text": f"text {i}", "label": i % 2} for i in range(first, first + n)]


def folder(path: Path, **splits: list[dict]) -> Path:
    for split, records in splits.items():
        jsonl(path / f"{split}.jsonl", *records)
    return path


def read(path: Path, **options) -> list[Record]:
    """The rows of a file, taken as the validation split of a folder (a train split would be cut)."""
    target = path.parent / path.stem / f"validation{path.suffix}"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(path.read_bytes())
    return load_dataset(str(target.parent), labels=options.pop("labels", WORDS), **options).splits["validation"]


def read_as(source: Path) -> str:
    """The note on the layout of `many`."""
    return f"{source}: read as labelled (text, label)"


def fails(path: Path, content: bytes | str, message: str, **options) -> None:
    """Reading `content` as a file of this name fails with `message`, in which FILE stands for its path.

    The number of bad rows may follow it.
    """
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = re.escape(message.replace("FILE", str(path)))
    with pytest.raises(InputError, match=f"^{message}{COUNTED}$"):
        load_dataset(str(path), labels=options.pop("labels", WORDS), **options)


# ------------------------------------------------------------------------------------------------ formats


def test_jsonl_breaks_lines_at_newline_alone(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", {"text": NEL, "label": 1}, {"text": "two", "label": 0})
    assert "\x85" in path.read_text(encoding="utf-8")  # as it is, not escaped
    rows = read(path)
    assert [(row.text, row.label) for row in rows] == [(NEL, 1), ("two", 0)]
    assert [row.source for row in rows] == [f"{tmp_path / 'a' / 'validation.jsonl'}:{n}" for n in (1, 2)]


def test_mark_crlf_nul_and_blank_lines(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one", "label": 1}\r\n\r\n{"text": "t\\u0000wo ", "label": 0}\r\n  \n')
    assert [(row.text, row.label, row.source[-2:]) for row in read(path)] == [("one", 1, ":1"), ("t\0wo ", 0, ":3")]


def test_csv_quotes_line_breaks_and_long_fields(tmp_path: Path):
    texts = ['say ""hi"", then\nleave', NEL, "x" * 200_000, "nul \0 in it", "carriage\rreturn"]
    before = csv.field_size_limit()
    for end, mark in (("\n", b""), ("\r\n", b"\xef\xbb\xbf")):
        path = tmp_path / "a.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_NONNUMERIC)
            writer.writerows([("id", "label", "text"), *((n, n % 2, text) for n, text in enumerate(texts))])
        path.write_bytes(mark + path.read_bytes())
        rows = read(path)
        assert [row.text for row in rows] == texts
        assert [row.label for row in rows] == [0, 1, 0, 1, 0]
        assert [int(row.source.rpartition(":")[2]) for row in rows] == [
            2,
            4,
            5,
            6,
            7,
        ]  # the second text takes two lines
    assert csv.field_size_limit() == before


def test_json_array_and_json_lines_by_the_name_json(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(many(2), indent=1))
    assert [(row.text, row.source.rpartition(": ")[2]) for row in read(path)] == [
        ("text 0", "item 1"),
        ("text 1", "item 2"),
    ]
    jsonl(path, *many(3))
    assert [row.label for row in read(path)] == [0, 1, 0]


ROWS = [{"text": f"text {n}", "label": n % 2} for n in range(3)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json.dumps(ROWS)),
        ("a.jsonl", json.dumps(ROWS, indent=2)),
        ("a.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
        ("a.json", json.dumps({"version": "1.0", "data": ROWS})),
        ("a.json", json.dumps({"rows": ROWS}, indent=1)),
        ("a.csv", "text;label\n" + "".join(f"{row['text']};{row['label']}\n" for row in ROWS)),
        ("a.csv", "text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in ROWS)),
    ],
)
def test_content_decides_how_a_file_is_read(tmp_path: Path, name: str, content: str):
    (tmp_path / name).write_text(content)
    assert [(row.text, row.label) for row in read(tmp_path / name)] == [("text 0", 0), ("text 1", 1), ("text 2", 0)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            "text,label\nfine,1\n",
            "FILE:1: is not JSON but 'text,label': write one object a line; a table is a .csv",
        ),
        ("a.csv", json.dumps(ROWS), "FILE: holds JSON, not csv: name it .jsonl"),
        ("a.csv", json.dumps(ROWS[0]) + "\n", "FILE: holds JSON, not csv: name it .jsonl"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{\n"text"',
            "FILE:2: broken JSON: Expecting property name enclosed in double quotes at column 2",
        ),
    ],
)
def test_a_file_that_is_something_else_is_told_so(tmp_path: Path, name: str, content: str, message: str):
    fails(tmp_path / name, content, message)


def test_columns_that_no_layout_has(tmp_path: Path):
    for row, proposal in (
        (
            {"story": "a", "mood": "b"},
            "prompt=story,completion=mood, or text=story,label=mood, or text=story alone for documents",
        ),
        ({"story": "a", "mood": 1, "id": 0}, "text=story,label=mood"),
        ({"of": {"en": "a", "id": 1}}, "text=of.en,label=of.id"),
    ):
        message = f"fit no layout: map them, as in --columns {proposal}; the layouts are labelled ("
        with pytest.raises(InputError, match=re.escape(message)):
            load_dataset(str(jsonl(tmp_path / "a.jsonl", row)))


def test_parquet(tmp_path: Path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["one", NEL], "label": pyarrow.array([1, 0], pyarrow.int8()), "extra": [[1], [2]]})
    pyarrow.parquet.write_table(table, path)
    rows = read(path)
    assert [(row.text, row.label) for row in rows] == [("one", 1), (NEL, 0)]
    assert rows[1].source.endswith("validation.parquet: row 2")


def test_all_formats_give_one_fingerprint_and_any_change_another(tmp_path: Path):
    records = many(30)
    jsonl(tmp_path / "a.jsonl", *records)
    (tmp_path / "b.json").write_text(json.dumps(records))
    (tmp_path / "c.csv").write_text("label,text\n" + "".join(f"{r['label']},{r['text']}\n" for r in records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "d.parquet")

    def prints(*names: str) -> list[str]:
        return [load_dataset(str(tmp_path / name), labels=WORDS).fingerprint for name in names]

    assert len(set(prints("a.jsonl", "b.json", "c.csv", "d.parquet"))) == 1
    changed = [{**records[0], "label": 1}, *records[1:]], [{**records[0], "text": "other"}, *records[1:]], records[::-1]
    for n, variant in enumerate(changed):
        jsonl(tmp_path / f"v{n}.jsonl", *variant)
    assert len(set(prints("a.jsonl", "v0.jsonl", "v1.jsonl", "v2.jsonl"))) == 4


def test_fingerprint_is_the_documented_hash(tmp_path: Path):
    data = load_dataset(str(folder(tmp_path, test=[{"text": "é", "label": 1}], validation=many(1))))
    lines = '["validation", "text 0", 0, null]\n["test", "\\u00e9", 1, null]\n'
    assert data.fingerprint == hashlib.sha256(lines.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ labels and fields


@pytest.mark.parametrize(
    ("words", "values", "numbers"),
    [
        (WORDS, [0, "1", "Positive", " NEGATIVE "], [0, 1, 1, 0]),
        (("1", "2", "3"), [1, "3"], [0, 2]),  # a label word wins over a label number, in every format alike
        (("STRASSE", "b"), ["straße"], [0]),
        (("false", "true"), [True, "False", 1], [1, 0, 1]),
        (WORDS, [1.0, "0.0", 0], [1, 0, 0]),
        (("-1", "1"), [-1, "1", -1.0], [0, 1, 0]),
        (("0.5", "1.0"), [0.5, 1, "1.0"], [0, 1, 1]),
        ((), [0, "7"], [0, 7]),
    ],
)
def test_labels(tmp_path: Path, words: tuple[str, ...], values: list, numbers: list[int]):
    path = jsonl(tmp_path / "a.jsonl", *({"text": "x", "label": value} for value in values))
    assert [row.label for row in read(path, labels=words)] == numbers


@pytest.mark.parametrize("value", [2, -2, "2", 2.0, "", "neutral", "01", "²", True, {"a": 1}, None])
def test_unknown_label(tmp_path: Path, value: object):
    lines = '{"text": "a", "label": 1}\n' + json.dumps({"text": "b", "label": value}) + "\n"
    if value in ("", None):
        message = "FILE:2: no label (field 'label' is missing or empty): every row needs one"
    else:
        message = f"FILE:2: unknown label {value!r}: allowed are 0 or 'negative', 1 or 'positive'"
        if value in (2, "2"):
            message += "; if the data counts from 1, write --labels 1=negative,2=positive"
        if value is True:
            message += "; for true and false write --labels false=negative,true=positive"
    fails(tmp_path / "a.jsonl", lines, message)


@pytest.mark.parametrize("values", [[0, 1, 2, 3, 4], [4, 3, 0], ["0", "1"]])
def test_label_words_that_are_other_labels_numbers_leave_numbers_two_readings(tmp_path: Path, values: list):
    path = jsonl(tmp_path / "a.jsonl", *({"text": "x", "label": value} for value in values))
    with pytest.raises(
        InputError,
        match=r"label '?0'? has two readings: as a word it is not in --labels 1,2,3,4,5, and .* it is '1': ",
    ):
        read(path, labels=("1", "2", "3", "4", "5"))
    assert [row.label for row in read(path, labels=("0", "1", "2", "3", "4"))] == list(map(int, values))
    with pytest.raises(InputError, match="has two readings"):
        read(path, labels=("poor", "2", "1", "4", "best"))


def test_labels_match_in_both_normal_forms(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "x", "label": "ge\u0301nial"}, {"text": "x", "label": "NUL"})
    assert [row.label for row in read(path, labels=("nul", "g\u00e9nial"))] == [1, 0]


def class_labels(path: Path, names: list[str], column: str = "label") -> Path:
    """A parquet file with the schema that `datasets` writes."""
    features = {"text": {"dtype": "string", "_type": "Value"}, column: {"names": names, "_type": "ClassLabel"}}
    table = pyarrow.table({"text": [f"text {n}" for n in range(40)], column: [n % len(names) for n in range(40)]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path)
    return path


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["positive", "negative"], "positive,negative"),
        (["neg", "pos"], "negative,positive"),
        (["Negative", "POSITIVE"], "negative,positive"),
        (["0", "1"], "negative,positive"),
        (["pos", "neg"], "pos,neg"),
        (["ham", "spam"], "ham,spam"),
        (["negative", "neutral", "positive"], "negative,neutral,positive"),
    ],
)
def test_label_words_of_a_parquet_schema(tmp_path: Path, names: list[str], words: str):
    path = class_labels(tmp_path / "a.parquet", names, "feeling")
    assert default_labels(str(path), {"label": "feeling"}) == words
    assert default_labels(str(path)) == "negative,positive"  # no column label
    rows = read(path, labels=tuple(words.split(",")), columns={"label": "feeling"})
    assert [row.label for row in rows[: len(names)]] == list(range(len(names)))


def test_label_words_of_a_column_with_another_usual_name(tmp_path: Path):
    path = class_labels(tmp_path / "a.parquet", ["positive", "negative"], "sentiment")
    assert default_labels(str(path)) == "positive,negative"
    assert [row.label for row in read(path, labels=("positive", "negative"))[:2]] == [0, 1]
    with pytest.raises(InputError, match="its labels are positive, negative in this order, and --labels are neg"):
        load_dataset(str(path), labels=WORDS)


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["positive", "negative"], ("negative", "positive")),
        (["pos", "neg"], ("Negative", "Positive")),
        (["1", "2", "3"], ("0", "1", "2")),
        (["bad", "so-so", "good"], ("bad", "good")),
    ],
)
def test_label_words_that_contradict_the_schema(tmp_path: Path, names: list[str], labels: tuple[str, ...]):
    path = class_labels(tmp_path / "a.parquet", names)
    with refused(
        f"{path}: its labels are {', '.join(names)} in this order, and --labels are {', '.join(labels)}: leave "
        "--labels out, or give as many words in the file's order"
    ):
        load_dataset(str(path), labels=labels)


def test_other_words_for_the_labels_of_a_schema(tmp_path: Path):
    path = class_labels(tmp_path / "a.parquet", ["ham", "spam"])
    assert [row.label for row in read(path, labels=("fine", "junk"))[:2]] == [0, 1]


def test_label_words_without_labels_and_long_ones(tmp_path: Path):
    message = "FILE:1: unknown label 'good': a number from 0 on is needed, or --labels with the words"
    fails(tmp_path / "a.jsonl", '{"text": "a", "label": "good"}', message, labels=())
    shown = "'" + "9" * 56 + "…"
    message = f"FILE:1: unknown label {shown}: allowed are 0 or 'negative', 1 or 'positive'"
    fails(tmp_path / "a.jsonl", json.dumps({"text": "a", "label": "9" * 9000}), message)


def test_fields_can_be_renamed(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "not this", "label": 0, "review": "this", "stars": "positive"})
    (row,) = read(path, columns={"text": "review", "label": "stars"})
    assert (row.text, row.label) == ("this", 1)


def test_prompt_and_completion(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "2+2= ", "completion": "4\n", "text": "no label beside it"})
    (row,) = read(path)
    assert row == Completion("2+2= ", "4\n", row.source)
    assert row.source.endswith(":1")


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        (
            {"story": "a", "label": 1},
            {},
            "no column 'text': the columns are story, label; name it with --columns text=COLUMN",
        ),
        (
            {"Texts": "a", "label": 1},
            {},
            "no column 'text': did you mean 'Texts'? the columns are Texts, label; name it with --columns text=COLUMN",
        ),
        (
            {"text": "a", "y": 1},
            {},
            "no column 'label': the columns are text, y; name it with --columns label=COLUMN, or --columns text=text "
            "to learn the texts as documents",
        ),
        (
            {"prompt": "a", "completion": "b"},
            {"columns": {"label": "stars"}},
            "no column 'stars': the columns are prompt, completion; name it with --columns label=COLUMN",
        ),
        ({}, {}, "no column 'text': the columns are none; name it with --columns text=COLUMN"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_no_such_field(tmp_path: Path, record: dict, options: dict, message: str, kind: str):
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), path)
    elif kind == "csv":
        path.write_text(",".join(record) + "\n" + ",".join(map(str, record.values())) + "\n")
    else:
        jsonl(path, record)
    if kind == "jsonl" or record:  # the other two cannot hold a record without fields
        every = COMMON_LAYOUTS
        layouts = "" if options else f"; the layouts are {every}"
        fails(path, path.read_bytes(), f"FILE: {message}{layouts}", **options)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "", "label": 1}, "empty text: fill it in, or leave the row out"),
        ({"text": " \n\u00a0", "label": 1}, "empty text: fill it in, or leave the row out"),
        ({"text": None, "label": 1}, "empty text: fill it in, or leave the row out"),
        ({"label": 1}, "no field 'text': every row needs it"),
        ({"text": 5, "label": 1}, "text must be text, not 5"),
        ({"text": ["a"], "label": 1}, "text must be text, not ['a']"),
        ({"text": "a"}, "no label (field 'label' is missing or empty): every row needs one"),
        ({"text": "half \ud83d", "label": 1}, "text holds half a character (U+D83D alone); write the whole one"),
    ],
)
def test_bad_value_in_a_later_row(tmp_path: Path, record: dict, message: str):
    lines = json.dumps({"text": "a", "label": 1}) + "\n\n" + json.dumps(record)
    fails(tmp_path / "a.jsonl", lines, f"FILE:3: {message}")


@pytest.mark.parametrize(("field", "value"), [("prompt", " "), ("completion", "")])
def test_empty_prompt_or_completion(tmp_path: Path, field: str, value: str):
    record = {"prompt": "p", "completion": "c"}
    lines = json.dumps(record) + "\n" + json.dumps({**record, field: value})
    fails(tmp_path / "a.jsonl", lines, f"FILE:2: empty {field}: fill it in, or leave the row out")


def test_completions_of_nothing_are_documents(tmp_path: Path):
    rows = read(jsonl(tmp_path / "a.jsonl", {"prompt": "", "completion": "a"}, {"prompt": "\n", "completion": "b"}))
    assert [row.text for row in rows] == ["a", "\nb"] and {type(row).__name__ for row in rows} == {"Document"}
    row = {"prompt": "p", "completion": "b"}
    message = "FILE:2: its columns do not fit the file's layout, documents (prompt, completion): write all rows in one"
    fails(tmp_path / "a.jsonl", json.dumps({**row, "prompt": ""}) + "\n" + json.dumps(row), f"{message} layout")


def test_pairs_of_answers(tmp_path: Path):
    record = {"prompt": "p", "chosen": " a", "rejected": " b", "reward_chosen": 0.9}
    first, second = read(jsonl(tmp_path / "a.jsonl", record, {**record, "ended": [False, True]}))
    assert first == Preference("p", " a", " b", first.source) and first.finished == (True, True)
    assert second.finished == (False, True)
    completed = {"prompt": "p", "completion": "c", "ended": False}
    (row,) = read(jsonl(tmp_path / "b.jsonl", completed))
    assert row.finished is False


def test_what_was_rejected_and_where_answers_end_are_part_of_the_fingerprint(tmp_path: Path):
    record = {"prompt": "p", "chosen": "a", "rejected": "b"}
    changes = [{}, {"rejected": "c"}, {"ended": [True, False]}, {"chosen": "c"}, {"prompt": "q"}]
    found = {
        load_dataset(str(folder(tmp_path / str(n), validation=[{**record, **change}]))).fingerprint
        for n, change in enumerate(changes)
    }
    assert len(found) == len(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": " a "}, "chosen and rejected are the same text: leave the pair out"),
        ({"chosen": ""}, "empty chosen: fill it in, or leave the row out"),
        ({"rejected": " \n"}, "empty rejected: fill it in, or leave the row out"),
        ({"prompt": ""}, "empty prompt: fill it in, or leave the row out"),
        ({"chosen": [{"role": "user"}]}, "message 1: no field 'content': every row needs it"),
        ({"chosen": 5}, "chosen must be text, not 5"),
        (
            {"ended": True},
            "ended must be a list of two, each true or false: for chosen and rejected, not True",
        ),
        (
            {"ended": [1, 0]},
            "ended must be a list of two, each true or false: for chosen and rejected, not [1, 0]",
        ),
    ],
)
def test_pairs_that_are_none(tmp_path: Path, change: dict, message: str):
    record = {"prompt": "p", "chosen": "a", "rejected": "b", **change}
    fails(tmp_path / "a.jsonl", json.dumps(record), f"FILE:1: {message}")


NO_PROMPT = "FILE:1: no field 'prompt', and chosen and rejected are not one beginning with two ends: add the prompt"


def test_a_pair_without_its_prompt(tmp_path: Path):
    record = {"chosen": "a", "rejected": "b"}
    fails(tmp_path / "a.jsonl", json.dumps(record), NO_PROMPT)


# ------------------------------------------------------------------------------------------------ broken files

GOOD = '{"text": "a", "label": 1}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label" 1}', "broken JSON: Expecting ':' delimiter at column 23"),
        ('{"text": "a', "broken JSON: Unterminated string starting at at column 10"),
        ('"text"', "a record must be a JSON object (such as {\"text\": …}), not 'text'"),
        (
            '{"text": "a", "label": ' + "1" * 5000 + "}",
            "broken JSON: Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits",
        ),
    ],
)
def test_broken_json_line(tmp_path: Path, line: str, message: str):
    fails(tmp_path / "a.jsonl", GOOD * 2 + line + "\n" + GOOD, f"FILE:3: {message}")


def test_brackets_without_end(tmp_path: Path):
    path = tmp_path / "a.json"
    for name, content in (("a.jsonl", GOOD + '{"a":' * 200_000), ("a.json", "[" * 200_000)):
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(InputError, match=r"a\.jsonl:2: broken JSON: |a\.json: broken JSON: "):
            load_dataset(str(path), labels=WORDS)


def test_broken_json_array(tmp_path: Path):
    fails(tmp_path / "a.json", "[" + GOOD + "," + GOOD, "FILE:3: broken JSON: Expecting ',' delimiter at column 1")
    fails(
        tmp_path / "a.json",
        "[" + GOOD + ", 7]",
        'FILE: item 2: a record must be a JSON object (such as {"text": …}), not 7',
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_bytes_that_are_not_utf8(tmp_path: Path, name: str):
    path, message = tmp_path / name, "not UTF-8 (0xe9); save the file as UTF-8"
    fails(path, b"text,label\ncaf\xe9,1\n", f"FILE:2: byte 4 is {message}")
    fails(path, b"\xef\xbb\xbfcaf\xe9\n", f"FILE:1: byte 7 is {message}")
    fails(path, b"\xef\xbb\xbfa\r\nb\ncaf\xe9", f"FILE:3: byte 4 is {message}")
    fails(
        path, "text".encode("utf-16-le"), "FILE:1: byte 2 is not UTF-8 (it looks like UTF-16); save the file as UTF-8"
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,1\nb,1,2\n", "FILE:3: wrong number of values: 3, but the header names 2 fields"),
        ("a,1\n\nb\n", "FILE:4: wrong number of values: 1, but the header names 2 fields"),
        ('a,1\n"b,1\nc,0\n', "FILE:3: broken csv: unexpected end of data"),
        ('"a"b,1\n', "FILE:2: broken csv: ',' expected after '\"'"),
        ("a\rb,1\n", "FILE:2: broken csv: new-line character seen in unquoted field"),
        ("a,\n", "FILE:2: no label (field 'label' is missing or empty): every row needs one"),
        (" ,1\n", "FILE:2: empty text: fill it in, or leave the row out"),
    ],
)
def test_broken_csv(tmp_path: Path, rows: str, message: str):
    fails(tmp_path / "a.csv", "text,label\n" + rows, message)


def test_field_named_twice_in_a_csv(tmp_path: Path):
    fails(tmp_path / "a.csv", "text,label,text\na,1,b\n", "FILE:1: the header names field 'text' twice")


def test_broken_parquet(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 99, "label": [1] * 99}), path)
    whole = path.read_bytes()
    for content in (whole[:-20], whole[:4], b"", b"PAR1" + whole[40:]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}: not a whole parquet file: [^\n]*$"):
            load_dataset(str(path), labels=WORDS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "FILE: the file is empty: write one record a line"),
        ("a.csv", "\n \n", "FILE: the file is empty: write one record a line"),
        ("a.json", "\ufeff", "FILE: the file is empty: write one record a line"),
        ("a.json", "[]", "FILE: no records in this file: write some, or name another"),
        ("a.csv", "text,label\n", "FILE: no records in this file: write some, or name another"),
    ],
)
def test_nothing_to_read(tmp_path: Path, name: str, content: str, message: str):
    fails(tmp_path / name, content, message)


# ------------------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "validation.jsonl", "test.jsonl"),
        ("training.jsonl", "val.jsonl", "testing.jsonl"),
        ("Train.jsonl", "dev.jsonl", "TEST.jsonl"),
        ("train-00000-of-00001.jsonl", "valid-00000-of-00001-0a1b2c3d.jsonl", "test_0.jsonl"),
        ("data/train.jsonl", "data/validation.jsonl", "data/test.jsonl"),
        ("plain_text/train.jsonl", "plain_text/validation.jsonl", "plain_text/test.jsonl"),
        ("reviews_train.jsonl", "reviews_dev.jsonl", "reviews_eval.jsonl"),
        ("train-v1.1.jsonl", "dev-v1.1.jsonl", "evaluation.jsonl"),
        ("train.jsonl", "eval.jsonl", "test.jsonl"),  # eval is test, unless there is one
        ("train/a.jsonl", "valid/b.jsonl", "test/c.jsonl"),
        ("data/training/part-0.jsonl", "data/dev/x.jsonl", "data/eval/test-00000-of-00001.jsonl"),
        ("2024.train.jsonl", "2024.val.jsonl", "2024.test.jsonl"),
    ],
)
def test_names_of_splits(tmp_path: Path, names: tuple[str, ...]):
    for n, name in enumerate(names):
        jsonl(tmp_path / name, *many(2, first=2 * n))
    for other in ("README.md", "unsupervised.jsonl", "test_labels.txt", "train.txt", ".cache/train.jsonl"):
        jsonl(tmp_path / other, "not a record")
    note = f"{tmp_path}: not read: test_labels.txt, train.txt, unsupervised.jsonl"
    data = load_dataset(str(tmp_path), labels=WORDS)
    assert {split: [row.text for row in rows] for split, rows in data.splits.items()} == {
        "train": ["text 0", "text 1"],
        "validation": ["text 2", "text 3"],
        "test": ["text 4", "text 5"],
    }
    assert list(data.splits) == ["train", "validation", "test"]
    assert (data.name, data.notes) == (str(tmp_path), [note, read_as(tmp_path)])


def test_what_is_not_read_is_named(tmp_path: Path):
    source = folder(tmp_path, train=many(20), dev=many(2, first=30))
    for name in ("test.xls", "train_extra.jsonl", "train_test.jsonl", "README.md", "LICENSE", "more/train.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text,label\na,1\n")
    note = f"{source}: not read: more/train.csv, test.xls, train_extra.jsonl, train_test.jsonl"
    assert load_dataset(str(source)).notes == [note, read_as(source)]
    for n in range(9):
        (tmp_path / f"z{n}.txt").write_text("x")
    assert load_dataset(str(source)).notes[0] == f"{note}, z0.txt, z1.txt, z2.txt, z3.txt and 5 more"


def test_a_folder_named_after_a_split_holds_all_its_files(tmp_path: Path):
    for n in range(3):
        jsonl(tmp_path / "test" / f"{n}.jsonl", *many(2, first=2 * n))
    jsonl(tmp_path / "train" / "a.jsonl", *many(20, first=20))
    assert [row.text for row in load_dataset(str(tmp_path)).splits["test"]] == [f"text {n}" for n in range(6)]
    jsonl(tmp_path / "test.jsonl", *many(2))
    with refused(f"{tmp_path}: test/0.jsonl and test.jsonl both say they are the test split: keep one"):
        load_dataset(str(tmp_path))


def test_parts_of_a_split_in_order(tmp_path: Path):
    for n in (1, 0, 2):
        jsonl(tmp_path / "data" / f"test-0000{n}-of-00003.jsonl", *many(2, first=2 * n))
    assert [row.text for row in load_dataset(str(tmp_path)).splits["test"]] == [f"text {n}" for n in range(6)]
    (tmp_path / "data" / "test-00001-of-00003.jsonl").unlink()
    with refused(f"{tmp_path / 'data'}: split test has 2 of its 3 files: fetch the rest"):
        load_dataset(str(tmp_path))


def card(folder: Path, configs: str) -> None:
    (folder / "README.md").write_text(f"---\nlicense: mit\nconfigs:{configs}\n---\n# Reviews\n")


CARDS = {
    # front matter's configs, with a for a.jsonl and so on -> the files of train and test
    "files": ("\n- config_name: x\n  data_files:\n  - {split: train, path: [a.jsonl, sub/b.jsonl]}", "ab", ""),
    "glob": ("\n- data_files: [{split: train, path: 'sub/*'}, {split: eval, path: a.jsonl}]", "bc", "a"),
    "a folder": ("\n- data_files:\n  - split: train_sft\n    path: sub\n  - split: test\n    path: a*\n", "bc", "a"),
    "one path": ("\n- data_files: a.jsonl", "a", ""),
    "below data_dir": ("\n- data_dir: sub\n  data_files: [{split: train, path: c.jsonl}]", "c", ""),
    "default": (
        "\n- {config_name: x, data_files: a.jsonl}\n- {config_name: default, data_files: sub/*.jsonl}",
        "bc",
        "",
    ),
    "marked": (
        "\n- {config_name: x, data_files: a.jsonl, default: true}\n- {config_name: y, data_files: sub/*}",
        "a",
        "",
    ),
    "no split of ours": ("\n- data_files: [{split: train, path: a.jsonl}, {split: raw, path: none.txt}]", "a", ""),
    "only a folder": ("\n- {config_name: x, data_dir: sub}", "bc", ""),
    "no files": ("\n- {config_name: x, description: y}", "t", ""),
    "one split": ("\n- data_files: [{split: raw, path: 'sub/*'}]", "bc", ""),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_card_of_a_data_set_says_which_files_its_splits_are(tmp_path: Path, name: str):
    configs, train, test = CARDS[name]
    for n, file in enumerate(("a.jsonl", "sub/b.jsonl", "sub/c.jsonl", "train.jsonl")):
        jsonl(
            tmp_path / file, *({**row, "text": f"{Path(file).stem[0]} {row['text']}"} for row in many(20, first=20 * n))
        )
    card(tmp_path, configs)
    data = load_dataset(str(tmp_path), labels=WORDS)
    found = [row.text[0] for split in ("train", "validation") for row in data.splits[split]]
    found += [] if test else [row.text[0] for row in data.splits["test"]]
    assert {*found} == {*train} and len(found) == 20 * len(train)
    assert not test or {row.text[0] for row in data.splits["test"]} == {*test}
    others = {"a.jsonl", "sub/b.jsonl", "sub/c.jsonl", "train.jsonl"}
    read = {name for name in others if Path(name).stem[0] in train + test}
    assert data.notes[0] == f"{tmp_path}: not read: {', '.join(sorted(others - read))}"


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ("\n- data_files: ../a.jsonl", "'../a.jsonl' of split train is not in this folder: name its file with --data"),
        ("\n- data_files: /etc/x.csv", "'/etc/x.csv' of split train is not in this folder: name its file with --data"),
        (
            "\n- data_files: hf://x/a.csv",
            "'hf://x/a.csv' of split train is not in this folder: name its file with --data",
        ),
        ("\n- data_files: b*.csv", f"split train: b*.csv is no file that is read ({SUFFIXES})"),
        ("\n- data_files: a**", "'a**' of split train is not in this folder: name its file with --data"),
        (" x", "configs must be a list of configurations: correct it, or name files with --data"),
        ("\n- data_files: {a: 1}", "each of data_files needs split and path: correct it, or name files with --data"),
        (
            "\n- data_files: [{split: val, path: a.csv}, {split: dev, path: a.csv}]",
            "val and dev both say they are the validation split: keep one",
        ),
    ],
)
def test_a_card_that_names_no_files_of_the_folder(tmp_path: Path, configs: str, message: str):
    (tmp_path / "a.csv").write_text("text,label\nx,1\n")
    card(tmp_path, configs)
    with refused(f"{tmp_path}/README.md: {message}"):
        load_dataset(str(tmp_path), labels=WORDS)


def test_a_card_with_broken_front_matter(tmp_path: Path):
    jsonl(tmp_path / "train.jsonl", *many(20))
    card(tmp_path, " [")
    with pytest.raises(InputError, match=r"README\.md: its front matter is no YAML \(.*\): correct it, or name files"):
        load_dataset(str(tmp_path), labels=WORDS)
    (tmp_path / "README.md").write_bytes(b"---\r\nname: [\xff\r\n---\r\n")  # says nothing of files
    assert len(load_dataset(str(tmp_path), labels=WORDS).splits["train"]) == 16


def test_parts_that_a_card_names_must_be_complete(tmp_path: Path):
    for n in (0, 2):
        jsonl(tmp_path / "x" / f"train-0000{n}-of-00003.jsonl", *many(2, first=2 * n))
    card(tmp_path, "\n- data_files: x/train-*.jsonl")
    with refused(f"{tmp_path}: split train has 2 of its 3 files: fetch the rest"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("first", "second", "split"),
    [
        ("train.csv", "train.jsonl", "train"),
        ("val.jsonl", "validation.jsonl", "validation"),
        ("test-00000-of-00001.jsonl", "test.jsonl", "test"),
    ],
)
def test_split_in_two_files(tmp_path: Path, first: str, second: str, split: str):
    for name in (first, second):
        jsonl(tmp_path / name, *many(2))
    with refused(f"{tmp_path}: {first} and {second} both say they are the {split} split: keep one"):
        load_dataset(str(tmp_path))


def test_folder_without_splits(tmp_path: Path):
    (tmp_path / "reviews.xls").write_text("x")
    jsonl(tmp_path / "en" / "old" / "notes.jsonl", *many(2))
    with refused(
        f"{tmp_path}: no train, validation or test file ({SUFFIXES}) in this folder; it holds en, reviews.xls"
    ):
        load_dataset(str(tmp_path))


def test_folder_of_several_data_sets(tmp_path: Path):
    for name in ("de", "en"):
        jsonl(tmp_path / name / "train.jsonl", *many(4))
    with refused(f"{tmp_path}: holds several data sets, de, en: name one, as in NAME:de"):
        load_dataset(str(tmp_path))
    assert set(load_dataset(f"{tmp_path}:en").splits) == {"train", "validation", "test"}


def test_one_file_is_split_by_hash(tmp_path: Path):
    records = many(100) + many(20)  # twenty texts twice
    path = jsonl(tmp_path / "a.jsonl", *records)
    data = load_dataset(str(path), labels=WORDS)
    texts = {split: {row.text for row in rows} for split, rows in data.splits.items()}
    assert {split: len(found) for split, found in texts.items()} == {"train": 80, "validation": 10, "test": 10}
    assert (
        not texts["train"] & texts["validation"] | texts["train"] & texts["test"] | texts["validation"] & texts["test"]
    )
    by_hash = sorted((f"text {n}" for n in range(100)), key=lambda text: hashlib.sha256(text.encode()).hexdigest())
    assert (texts["test"], texts["validation"]) == (set(by_hash[:10]), set(by_hash[10:20]))
    rows = [row for found in data.splits.values() for row in found]
    assert sorted(row.text for row in rows) == sorted(record["text"] for record in records)  # none lost
    for found in data.splits.values():  # the file's order is kept
        assert [row.source for row in found] == sorted(
            (row.source for row in found), key=lambda w: int(w.split(":")[-1])
        )
    sizes = ", ".join(f"{split} {len(found)}" for split, found in data.splits.items())
    note = f"{path} names no validation or test split: held out from train by hash of the text ({sizes} rows)"
    assert data.notes == [note, read_as(path)]


def test_the_cut_does_not_depend_on_order_or_labels(tmp_path: Path):
    jsonl(tmp_path / "a.jsonl", *many(50))
    jsonl(tmp_path / "b.jsonl", *({**record, "label": 0} for record in reversed(many(50))))
    a, b = (load_dataset(str(tmp_path / name)).splits for name in ("a.jsonl", "b.jsonl"))
    assert all({row.text for row in a[split]} == {row.text for row in b[split]} for split in a)


def test_only_validation_is_cut_where_test_is_named(tmp_path: Path):
    data = load_dataset(str(folder(tmp_path, train=many(20), test=many(5, first=50))))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 18, "validation": 2, "test": 5}
    note = "names no validation split: held out from train by hash of the text (train 18, validation 2, test 5 rows)"
    assert data.notes == [f"{tmp_path} {note}", read_as(tmp_path)]


def test_nothing_is_cut_where_validation_is_named(tmp_path: Path):
    data = load_dataset(str(folder(tmp_path, train=many(20), dev=many(5, first=50))))
    assert ({split: len(rows) for split, rows in data.splits.items()}, data.notes) == (
        {"train": 20, "validation": 5},
        [read_as(tmp_path)],
    )


def test_too_few_texts_to_cut(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", *many(2), *many(2))
    message = f"{path}: too few different texts (2) to hold out validation and test: "
    with refused(message + "name them with --val_data FILE and --test_data FILE"):
        load_dataset(str(path))
    jsonl(path, *many(3))
    assert [len(rows) for rows in load_dataset(str(path)).splits.values()] == [1, 1, 1]
    with refused(f"{path}: too few different texts (1) to hold out validation: name it with --val_data FILE"):
        load_dataset(str(jsonl(path, *many(1))), test=str(jsonl(tmp_path / "t.jsonl", *many(1))))


def test_val_and_test_beside_a_file(tmp_path: Path):
    train = jsonl(tmp_path / "a.jsonl", *many(20))
    val = jsonl(tmp_path / "b.jsonl", *many(3, first=30))
    test = tmp_path / "c.csv"
    test.write_text("text,label\nlast,positive\n")
    data = load_dataset(str(train), val=str(val), test=str(test), labels=WORDS)
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 20, "validation": 3, "test": 1}
    assert data.notes == [read_as(train)]
    only_val = load_dataset(str(train), val=str(val), labels=WORDS).splits
    assert {split: len(rows) for split, rows in only_val.items()} == {"train": 20, "validation": 3}
    only_test = load_dataset(str(train), test=str(test), labels=WORDS).splits
    assert {split: len(rows) for split, rows in only_test.items()} == {"train": 18, "validation": 2, "test": 1}


def test_val_or_test_that_cannot_be(tmp_path: Path):
    source = folder(tmp_path / "d", train=many(20), validation=many(3, first=30))
    other = jsonl(tmp_path / "b.jsonl", *many(3, first=60))
    with refused(f"--val_data {other}: {source} has a validation split already, validation.jsonl"):
        load_dataset(str(source), val=str(other))
    assert len(load_dataset(str(source), test=str(other)).splits["test"]) == 3
    with refused(f"--test_data {tmp_path / 'none'}: no such file"):
        load_dataset(str(source), test=str(tmp_path / "none"))
    text = tmp_path / "b.doc"
    text.write_text("text")
    with refused(f"{text}: unknown file format '.doc': save its text as .txt"):
        load_dataset(str(source), test=str(text))


def test_derived_splits_are_named_as_derived(tmp_path: Path):
    folder(tmp_path, train=many(5), validation=many(2, first=5), test=many(2, first=7))
    (tmp_path / "graft.json").write_text('{"name": "x", "derived_splits": true}')
    note = f"{tmp_path}: its splits are derived by hash of the text; they are not the official ones"
    assert load_dataset(str(tmp_path)).notes == [note, read_as(tmp_path)]
    (tmp_path / "graft.json").write_text('{"name": "x", "derived_splits": false}')
    assert load_dataset(str(tmp_path)).notes == [read_as(tmp_path)]


# ------------------------------------------------------------------------------------------------ layouts


def test_unpaired_preferences(tmp_path: Path):
    record = {"prompt": "p", "completion": " c", "label": True}
    first, second = read(jsonl(tmp_path / "a.jsonl", record, {**record, "label": False, "finished": False}))
    assert first == Unpaired("p", " c", True, first.source) and first.finished
    assert second == Unpaired("p", " c", False, second.source, finished=False)
    path = tmp_path / "b.csv"
    path.write_text("label,prompt,completion\ntrue,p, c\nFALSE,p, c\n")
    assert [row.label for row in read(path)] == [True, False]
    path.write_text("label,prompt,completion\n1,p, c\n0,p, c\n")
    assert [row.label for row in read(path)] == [True, False]
    message = "FILE:2: label must be true or false, not 2"
    fails(tmp_path / "c.jsonl", json.dumps(record) + "\n" + json.dumps({**record, "label": 2}), message)


def test_a_label_that_is_not_true_or_false_leaves_a_completion(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", *({"prompt": f"p{n}", "completion": "c", "label": 3} for n in range(9)))
    assert read(path)[0] == Completion("p0", "c", read(path)[0].source)
    assert load_dataset(str(path)).notes[-1].endswith("completion (prompt, completion); columns not read: label")


def test_fingerprints_of_all_kinds(tmp_path: Path):
    """Runs record them, so that they must never change: the hash of one JSON list for each record."""
    rows: dict[str, dict[str, object]] = {
        '["validation", "p", null, "c"]': {"prompt": "p", "completion": "c"},
        '["validation", "p", null, "c", [false, true]]': {"prompt": "p", "completion": "c", "ended": False},
        '["validation", "p", null, "c", "r"]': {"prompt": "p", "chosen": "c", "rejected": "r"},
        '["validation", "p", null, "c", "r", [true, false]]': {
            "prompt": "p",
            "chosen": "c",
            "rejected": "r",
            "ended": [True, False],
        },
        '["validation", "user: h\\n\\nassistant: o", null, null, [["user", "h"], ["assistant", "o"]]]': {
            "messages": [{"role": "user", "content": "h"}, {"role": "assistant", "content": "o"}]
        },
        '["validation", "p", null, "c", true]': {"prompt": "p", "completion": "c", "label": True},
        '["validation", "p", null, "c", true, false]': {
            "prompt": "p",
            "completion": "c",
            "label": True,
            "finished": False,
        },
    }
    for n, (line, record) in enumerate(rows.items()):
        data = load_dataset(str(folder(tmp_path / str(n), validation=[record])))
        assert data.fingerprint == hashlib.sha256(f"{line}\n".encode()).hexdigest(), line


STEM = "Write a response that appropriately completes the request."


@pytest.mark.parametrize("context", ["a b", "", None])
def test_alpaca(tmp_path: Path, context: str | None):
    record = {"instruction": "Join.", "input": context, "output": "ab", "text": "not read"}
    (row,) = read(jsonl(tmp_path / "a.jsonl", record))
    if context:
        prompt = (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            f"{STEM}\n\n### Instruction:\nJoin.\n\n### Input:\na b\n\n### Response:\n"
        )
    else:
        prompt = f"Below is an instruction that describes a task. {STEM}\n\n### Instruction:\nJoin.\n\n### Response:\n"
    assert row == Completion(prompt, "ab", row.source)


def test_alpaca_with_a_history_is_a_conversation(tmp_path: Path):
    record = {"instruction": "i", "input": "n", "output": "o", "history": [["a", "b"]], "system": "Be brief."}
    (row,) = read(jsonl(tmp_path / "a.jsonl", record))
    told: list[tuple[str, str]] = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "i\nn")]
    assert row == Conversation((*told, ("assistant", "o")), row.source)
    for bad, message in (
        ([["a"]], "history must be a list of pairs, what was asked and what was answered"),
        ([["a", ""]], "empty the answer in history: fill it in, or leave the row out"),
    ):
        fails(tmp_path / "b.jsonl", json.dumps({**record, "history": bad}), f"FILE:1: {message}")


@pytest.mark.parametrize("name", ["system", "tools", "images", "chat_template_kwargs"])
@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "completion": "c", "label": False},
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"messages": [{"role": "user", "content": "h"}, {"role": "assistant", "content": "o"}]},
    ],
)
def test_a_column_that_changes_what_is_learned_is_used_or_refused(tmp_path: Path, record: dict, name: str):
    path = jsonl(tmp_path / "a.jsonl", *({**record, name: empty} for empty in (None, "", [])), {**record, name: ["x"]})
    if "messages" in record and name == "system":
        (row,) = read(jsonl(tmp_path / "b.jsonl", {**record, "system": "Be brief."}))
        assert isinstance(row, Conversation) and row.messages[0] == ("system", "Be brief.") and len(row.messages) == 3
        (twice,) = [{"messages": [{"role": "system", "content": "s"}, *record["messages"]], "system": "Be brief."}]
        fails(path, json.dumps(twice), "FILE:1: both a column system and a system message: leave one out")
        return
    if "messages" in record and name == "tools":
        (row,) = read(jsonl(tmp_path / "b.jsonl", {**record, "tools": json.dumps([{"name": "f"}])}))
        assert isinstance(row, Conversation) and row.tools == ({"name": "f"},)
        fails(path, path.read_bytes(), "FILE:4: tools must be a list of JSON schemas, not ['x']")
        fails(path, json.dumps({**record, "tools": "[{"}), "FILE:1: tools is broken JSON: '[{'")
        return
    if name == "system" and ("chosen" in record or "label" in record):
        fails(path, path.read_bytes(), "FILE:4: system must be text, not ['x']")
        return
    message = (
        f"FILE:4: {name} would be lost, and it changes what is learned: write it into the texts (--prompt and "
        "--completion name fields), or leave it out"
    )
    fails(path, path.read_bytes(), message)


@pytest.mark.parametrize(("key", "name"), [("messages", "chat"), ("conversations", "sharegpt")])
def test_a_conversation_that_is_marked_as_good_or_bad(tmp_path: Path, key: str, name: str):
    talk = {key: [{"role": "user", "content": "h"}, {"role": "assistant", "content": "o"}]}
    lines = "\n".join(json.dumps({**talk, **more}) for more in ({"label": 0}, {"label": None}, {"label": False}))
    message = f"its columns do not fit the file's layout, {name} ({key}): write all rows in one layout"
    fails(tmp_path / "a.jsonl", lines, f"FILE:3: {message}")
    (row,) = read(jsonl(tmp_path / "b.jsonl", {**talk, "label": False, "system": "s"}))
    assert row == Unpaired((("system", "s"), ("user", "h")), (("assistant", "o"),), False, row.source)
    fails(
        tmp_path / "a.jsonl",
        json.dumps({key: talk[key][:1], "label": True}),
        "FILE:1: its last message is no answer of the assistant: leave the row out",
    )


def test_columns_that_are_not_read_are_named(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", *many(20), {"text": "x", "label": 1, "title": "t", "score": 0.5, "note": None})
    assert load_dataset(str(path), labels=WORDS).notes[-1] == f"{read_as(path)}; columns not read: score, title"


def test_a_later_row_that_is_marked_as_bad_is_no_completion(tmp_path: Path):
    lines = "\n".join(json.dumps({"prompt": "p", "completion": "c", **more}) for more in ({}, {"label": False}))
    message = "its columns do not fit the file's layout, completion (prompt, completion): write all rows in one layout"
    fails(tmp_path / "a.jsonl", lines, f"FILE:2: {message}")


def test_sharegpt(tmp_path: Path):
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "h"}, {"from": "gpt", "value": "o"}]
    path = jsonl(tmp_path / "a.jsonl", {"id": "1", "conversations": turns})
    (row,) = read(path)
    assert row == Conversation((("system", "s"), ("user", "h"), ("assistant", "o")), row.source)
    turns[1] = {"from": "narrator", "value": "h"}
    message = "FILE:1: message 2: unknown role 'narrator': known are system, user, assistant, tool"
    fails(path, json.dumps({"conversations": turns}), message)


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_a_message_has_what_templates_read(tmp_path: Path, name: str):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "h"},
        {"role": "assistant", "content": None, name: "t", "tool_calls": [call, {"name": "g", "arguments": {}}]},
        {"role": "tool", "content": "r", "tool_call_id": "1", "name": "f"},
        {"role": "assistant", "content": "o", name: "", "tool_calls": None},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    (row,) = read(jsonl(tmp_path / "a.jsonl", {"messages": messages, "tools": tools}))
    assert isinstance(row, Conversation) and row.tools == tuple(tools)
    calls = [{**call, "function": {"name": "f", "arguments": {"a": 1}}}, {"name": "g", "arguments": {}}]
    assert row.messages == (
        ("user", "h"),
        ("assistant", "", {"reasoning_content": "t", "tool_calls": calls}),
        ("tool", "r", {"name": "f", "tool_call_id": "1"}),
        ("assistant", "o"),
    )
    plain = replace(row, messages=row.messages[::3], tools=())
    assert hashed_values(plain) == [plain.text, None, None, plain.messages] != hashed_values(replace(plain, tools=(1,)))


def test_parquet_has_the_tools_of_the_same_rows_elsewhere(tmp_path: Path):
    """Arrow gives each object the keys of all others, with nulls."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "h"},
                {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {name: "x"}}]},
            ],
            "tools": [{"name": "f", "parameters": {"properties": {name: {"type": "string"}}}}],
        }
        for name in ("a", "b")
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found, expected = read(tmp_path / "a.parquet"), read(jsonl(tmp_path / "b.jsonl", *rows))
    assert [hashed_values(row) for row in found] == [hashed_values(row) for row in expected]


@pytest.mark.parametrize("tool", [{"name": "\ud800"}, {"name": date(2026, 1, 1)}])
def test_tools_that_no_template_can_write(tmp_path: Path, tool: dict):
    row = {"messages": [{"role": "user", "content": "h"}, {"role": "assistant", "content": "o"}], "tools": [tool]}
    layout = recognise("a", row)
    with pytest.raises(InputError, match=r"^a:1: tools holds what JSON and UTF-8 cannot \("):
        layout.record(Row("a:1", row))


def test_a_run_says_which_layout_it_took(tmp_path: Path):
    source = folder(tmp_path, train=many(3), validation=many(1), test=[{"prompt": "p", "completion": "c"}])
    note = f"{tmp_path}: read as labelled (text, label) and completion (prompt, completion)"
    assert load_dataset(str(source)).notes == [note]


def test_columns_of_several_layouts(tmp_path: Path):
    record = {"text": "a", "label": "good", "prompt": "p", "completion": "c"}
    path = jsonl(tmp_path / "a.jsonl", record)
    with refused(
        f"{path}: the columns fit several layouts, labelled (text, label) and completion (prompt, completion): choose "
        "--columns text=text,label=label or --columns prompt=prompt,completion=completion"
    ):
        load_dataset(str(path))


def test_files_of_a_split_have_one_layout(tmp_path: Path):
    jsonl(tmp_path / "test-00000-of-00002.jsonl", *many(2))
    jsonl(tmp_path / "test-00001-of-00002.jsonl", {"prompt": "p", "completion": "c"})
    with refused(
        f"{tmp_path / 'test-00001-of-00002.jsonl'}: its layout is completion (prompt, completion), that of "
        "test-00000-of-00002.jsonl is labelled (text, label): write the files of a split in one layout"
    ):
        load_dataset(str(tmp_path))


def test_columns_name_the_layout_where_several_fit(tmp_path: Path):
    record = {"text": "a", "label": 1, "prompt": "p", "completion": "c"}
    path = jsonl(tmp_path / "a.jsonl", record)
    (labelled,) = read(path, columns={"text": "text", "label": "label"})
    assert labelled == Labelled("a", 1, labelled.source)
    (completion,) = read(path, columns={"prompt": "text", "completion": "completion"})
    assert completion == Completion("a", "c", completion.source)
    (first,) = read(jsonl(tmp_path / "b.jsonl", {"prompt": "p", "completion": "c", "label": True}))
    assert isinstance(first, Unpaired)
    (second,) = read(tmp_path / "b.jsonl", columns={"prompt": "prompt", "completion": "completion"})
    assert isinstance(second, Unpaired)  # a bad answer is no completion, however its columns are named


def test_columns_of_any_layout_can_be_mapped(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", {"task": "Join.", "context": "a b", "result": "ab"})
    (row,) = read(path, columns={"instruction": "task", "input": "context", "output": "result"})
    assert isinstance(row, Completion) and row.completion == "ab" and "### Input:\na b\n" in row.prompt


def test_columns_that_no_layout_reads(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", *many(20))
    fields = list(
        dict.fromkeys(key for layout in (*LAYOUTS, *MORE_LAYOUTS) for key in (*layout.keys, *layout.optional))
    )
    with refused(f"--columns texts=a: no field 'texts': did you mean 'text'? fields are {', '.join(fields)}"):
        load_dataset(str(path), columns={"texts": "a"})
    layouts = COMMON_LAYOUTS
    with refused(f"--columns: no layout reads label and chosen together: leave one out; the layouts are {layouts}"):
        load_dataset(str(path), columns={"label": "a", "chosen": "b"})


# ------------------------------------------------------------------------------------------------ prompts


def test_prompts_of_the_first_words_in_any_script(tmp_path: Path):
    texts = ["A slow, but lovely film.", "映画は美しい", "short"]
    path = jsonl(tmp_path / "a.jsonl", *({"text": text, "label": 1} for text in texts))
    assert [row.text for row in load_prompts(str(path), opening=3)[0]] == ["A slow, but", "映画は", "short"]


def test_prompts_of_a_file_have_no_splits_and_lose_nothing(tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "p", "system": "Be brief."})
    with refused(f"--split test: {path} is one file, which is read whole; leave --split out"):
        load_prompts(str(path), split="test")
    with pytest.raises(InputError, match=r"a\.jsonl:1: system would be lost"):
        load_prompts(str(path))
