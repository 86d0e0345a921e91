"""Label words taken from the data, and rows that cannot be read: counted by reason, or left out."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.text.dataset import default_labels, load_dataset, load_prompts
from graftlm.text.records import Labelled
from graftlm.text.rows import LabelWords
from graftlm.text.template import Template, load_template
from graftlm.training.data import read_data, with_labels


def write(path: Path, labels: Iterable[object], **others: object) -> Path:
    rows = ({"text": f"text {n}", "label": label, **others} for n, label in enumerate(labels))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1] * 6, "negative,positive"),
        (["Positive", "negative"] * 6, "negative,positive"),
        ([1.0, 0.0] * 6, "negative,positive"),
        ([0, 1, None, ""] * 3, "negative,positive"),
        ([2, 1] * 6, "1,2"),
        ([10, 9, 2] * 4, "2,9,10"),
        ([1.0, "2.0", 3] * 4, "1,2,3"),
        ([True, False] * 6, "false,true"),
        (["True", "False"] * 6, "False,True"),
        ([-1, 1] * 6, "-1,1"),
        ([-2, -1, 0, 1, 2] * 3, "-2,-1,0,1,2"),
        ([0, 1, 2, -1] * 3, "0,1,2"),
        (["spam", "Spam", "ham"] * 4, "ham,spam"),
        ([4, 0, float("nan")] * 4, "0,4"),
        ([7, 8], "negative,positive"),  # too few rows to say
        (["a, b", "c"] * 6, "its labels are 'a, b', 'c': name them without commas"),
        ([[0, 2], [1]] * 6, "FILE:1: label [0, 2] is a list: a text has one label here"),
        (["[0, 2]", "1"] * 6, "FILE:1: label '[0, 2]' is a list: a text has one label here"),
        (["1", "0,2"] * 6, "FILE:2: label '0,2' is a list: a text has one label here"),
        (["good"] * 6, "FILE: every label is 'good': two are needed"),
        ([0.5, 1.5] * 6, "FILE:1: label 0.5 is a fraction, and there is no regression: round the numbers"),
        (["0.25", "1"] * 6, "FILE:1: label '0.25' is a fraction"),
        ([-1, 0, 1] * 6, "FILE:1: label -1 has two readings next to 0 and 1: a class, with --labels=-1,0,1, or no"),
        (
            ["good", "bad"] * 15 + ["godo"],
            "FILE:31: label 'godo' occurs once in 31 rows: if it is no slip, give --labels",
        ),
        ([f"name {n}" for n in range(30)], "FILE:1: 30 different labels in 30 rows: too many to be classes"),
        ([n // 2 for n in range(600)], "FILE:513: 257 different labels in 513 rows: too many to be classes"),
    ],
)
def test_label_words_of_the_data(tmp_path: Path, labels: list[object], words: str):
    path = write(tmp_path / "a.jsonl", labels)
    if " " not in words:
        assert default_labels(str(path)) == words
        return
    with pytest.raises(InputError, match=re.escape(words.replace("FILE", str(path)))):
        default_labels(str(path))


def test_label_words_are_those_of_train_in_every_file(tmp_path: Path):
    for n, labels in enumerate(([3, 1] * 4, [5, 1] * 4)):
        write(tmp_path / f"train-0000{n}-of-00002.jsonl", labels)
    write(tmp_path / "test.jsonl", [1, 9])
    assert default_labels(str(tmp_path)) == "1,3,5"
    message = (
        r"test.jsonl:2: unknown label 9: allowed are '1', '3', '5' \(1 of 2 rows is bad; --bad_rows skip leaves it"
    )
    with pytest.raises(InputError, match=message):
        load_dataset(str(tmp_path), labels=("1", "3", "5"))


def test_files_without_labels_have_the_default_words(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    assert default_labels(str(path)) == "negative,positive"


def test_words_that_are_other_numbers_are_not_read_by_number():
    words = LabelWords(("0", "4"))
    assert [words.number(value) for value in (0, 4, "4.0", 1)] == [0, 1, 1, None]
    assert "label 1 has two readings" in words.problem(1)
    assert [LabelWords(("no", "yes")).number(value) for value in (0, 1.0, "YES", True)] == [0, 1, 1, None]


def test_the_run_says_which_words_it_took(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [3, 4, 5] * 20)
    for explicit in (frozenset(), frozenset({"labels"})):
        config = TrainConfig(data=str(path), labels="auto" if explicit else "negative,positive")
        config = with_labels(config, explicit)
        assert config.labels == "3,4,5"
    data = read_data(config, frozenset(), load_template(config.template, config.labels))
    assert "label words, taken from the data in the order of their numbers: 3, 4, 5" in data.notes
    records = [record for split in data.splits.values() for record in split]
    assert {(r.text, r.label) for r in records if isinstance(r, Labelled)} == {(f"text {n}", n % 3) for n in range(60)}
    given = TrainConfig(data=str(path), labels="5,4,3")
    assert with_labels(given, frozenset({"labels"})) is given


def test_a_column_that_names_the_labels(tmp_path: Path):
    path = tmp_path / "a.csv"
    rows = [f"text {n},{n % 3},{('joy', 'fear', 'love')[n % 3]}\n" for n in range(12)]
    path.write_text("text,label,label_text\n" + "".join(rows))
    assert default_labels(str(path)) == "joy,fear,love"
    splits = load_dataset(str(path), labels=("joy", "fear", "love")).splits
    records = [record for split in splits.values() for record in split]
    assert all(isinstance(r, Labelled) and r.label == int(r.text[5:]) % 3 for r in records)
    for changed in (rows[0].replace("joy", "ire"), rows[0].replace("joy", "fear"), rows[0].replace("joy", "")):
        path.write_text("text,label,label_text\n" + "".join([*rows, changed]))
        assert default_labels(str(path)) == "0,1,2"


def test_a_label_that_is_the_number_of_a_choice(tmp_path: Path):
    """As COPA's: of the question alone nothing can be learned. A template that has all of it reads it."""
    path = tmp_path / "a.jsonl"
    row = {"premise": "It rains.", "choice1": "wet", "choice2": "dry", "question": "effect"}
    path.write_text("".join(json.dumps({**row, "label": n % 2, "idx": n}) + "\n" for n in range(9)))
    with pytest.raises(InputError, match=r"a\.jsonl:1: choice1 would be lost, and it changes what is learned: "):
        load_dataset(str(path), labels=("first", "second"))
    config = TrainConfig(data=str(path), template="{premise} {idx}: {choice1} or {choice2}?", labels="first,second")
    data = read_data(config, {"template", "labels"}, load_template(config.template, config.labels))
    texts = [record.text for split in data.splits.values() for record in split]
    assert sorted(texts) == [f"It rains. {n}: wet or dry" for n in range(9)]


# ------------------------------------------------------------------------------------------------ bad rows

BAD = [0, 1, None, 7, 1, 0, "meh", 1, -1, 0]


def test_bad_rows_are_counted_by_reason(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", BAD)
    counts = "2 unknown label, 1 no label, 1 label -1 says that the row has no label"
    message = (
        f"{path}:3: no label (field 'label' is missing or empty): every row needs one (4 of 10 rows are bad: {counts}"
    )
    with pytest.raises(InputError, match=f"^{re.escape(message)}; --bad_rows skip leaves them out\\)$"):
        load_dataset(str(path), labels=("negative", "positive"))
    data = load_dataset(str(path), labels=("negative", "positive"), bad_rows="skip")
    assert f"{path}: train: 4 of 10 rows left out (--bad_rows skip): {counts}" in data.notes
    assert {record.text for split in data.splits.values() for record in split} == {
        f"text {n}" for n in (0, 1, 4, 5, 7, 9)
    }


def test_a_split_of_bad_rows_alone_is_an_error_but_for_test(tmp_path: Path):
    write(tmp_path / "train.jsonl", [0, 1] * 4)
    write(tmp_path / "validation.jsonl", [0, 1])
    test = write(tmp_path / "test.jsonl", [-1, -1])
    write(tmp_path / "test.jsonl", [-1, 7])
    with pytest.raises(InputError, match=r"test.jsonl:1: label -1 .*leave it out \(all 2 rows are bad"):
        load_dataset(str(tmp_path), labels=("no", "yes"))
    data = load_dataset(str(tmp_path), labels=("no", "yes"), bad_rows="skip")
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 8, "validation": 2}
    assert "test: 2 of 2 rows left out" in data.notes[0]
    write(tmp_path / "test.jsonl", [-1, -1])
    test.rename(tmp_path / "validation.jsonl")
    with pytest.raises(InputError, match=r"validation.jsonl:1: label -1 .* \(all 2 rows are bad\)$"):
        load_dataset(str(tmp_path), labels=("no", "yes"), bad_rows="skip")


def test_a_test_split_without_labels_is_left_out(tmp_path: Path):
    """As GLUE's (-1), and as Kaggle's, which lack the column."""
    train = write(tmp_path / "train.jsonl", [0, 1] * 4)
    write(tmp_path / "validation.jsonl", [0, 1])
    test = write(tmp_path / "test.jsonl", [-1, None, -1])
    for _ in range(2):
        data = load_dataset(str(tmp_path), labels=("no", "yes"))
        assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 8, "validation": 2}
        assert data.notes[0] == f"{tmp_path}: test: left out: none of its 3 rows has a label"
        test.write_text("".join(f'{{"text": "text {n}", "id": {n}}}\n' for n in range(3)))
    with pytest.raises(InputError, match=r"test.jsonl:1: no label .* \(all 3 rows are bad\)$"):
        load_dataset(str(train), test=str(test), labels=("no", "yes"))  # it was named


def test_bad_rows_of_other_layouts(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    say = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = [[{**turn, "content": f"{turn['content']} {n}"} for turn in say] for n in range(9)]
    chats += [[*say, {"role": "owl", "content": "hoo"}], [*say, {"role": "elf", "content": "hi"}], say[:1]]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    with pytest.raises(InputError, match=r"3 of 12 rows are bad: 2 unknown role, 1 the assistant says nothing, so"):
        load_dataset(str(path))
    assert sum(map(len, load_dataset(str(path), bad_rows="skip").splits.values())) == 9


@pytest.mark.parametrize(
    ("name", "content", "first", "counts"),
    [
        (
            "a.jsonl",
            '{"text": "a", "label": 0}\n{"text": "b", "label"\n{"text": "c", "label": 1}\n{"text": "d"}\nx\n7\n'
            '{"text": "e", "label": 1}\n',
            "2: broken JSON: Expecting ':' delimiter at column 22",
            "2 broken JSON, 1 no label, 1 a record must be a JSON object",
        ),
        (
            "a.csv",
            'text,label\na,0\nb,c,1\nc,1\nd\n"e"e,1\nf,\n"e, or\n""f""",1\n',
            "3: wrong number of values: 3, but the header names 2 fields",
            "2 wrong number of values, 1 broken csv, 1 no label",
        ),
    ],
)
def test_rows_that_no_reader_understands(tmp_path: Path, name: str, content: str, first: str, counts: str):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=f"^{re.escape(f'{path}:{first} (4 of 7 rows are bad: {counts}; --bad')}"):
        load_dataset(str(path), labels=("negative", "positive"))
    assert default_labels(str(path)) == "negative,positive"
    data = load_dataset(str(path), labels=("negative", "positive"), bad_rows="skip")
    assert f"{path}: train: 4 of 7 rows left out (--bad_rows skip): {counts}" in data.notes
    third = "e" if name == "a.jsonl" else 'e, or\n"f"'
    assert {record.text for split in data.splits.values() for record in split} == {"a", "c", third}


def test_a_file_whose_rows_are_not_known_is_not_skipped(tmp_path: Path):
    """After a quote that nothing ends, the rest of the file would be one bad row."""
    path = tmp_path / "a.csv"
    for rows, line in (('b,1\n"c,1\nd,0\n', 4), ('b,1\n"c\nd"d,0\n', 4)):
        path.write_text(f"text,label\na,0\n{rows}")
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}:{line}: broken csv: "):
            load_dataset(str(path), labels=("negative", "positive"), bad_rows="skip")
    path.write_text('{"text": "a"\n')
    with pytest.raises(InputError, match=r"a\.csv: holds JSON"):
        load_dataset(str(path), bad_rows="skip")
    path = path.rename(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=r"a\.jsonl:1: broken JSON: .* at column 13$"):
        load_dataset(str(path), bad_rows="skip")


def test_bad_prompts(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ""}\n{"prompt": 5}\n{"prompt": "b", "system": "s"}\n{"prompt": "c"}\n')
    counts = "1 empty prompt, 1 prompt must be text, 1 system would be lost, and it changes what is learned"
    with pytest.raises(InputError, match=rf"a.jsonl:2: empty prompt: .*\(3 of 5 rows are bad: {counts}; --bad_rows"):
        load_prompts(str(path))
    prompts, notes = load_prompts(str(path), bad_rows="skip")
    assert ([prompt.text for prompt in prompts], notes) == (
        ["a", "c"],
        [f"{path}: 3 of 5 rows left out (--bad_rows skip): {counts}"],
    )


@pytest.mark.parametrize(
    ("labels", "spec", "numbers"),
    [
        ([1, 2], "1=bad,2=good", [0, 1]),
        ([1, "2", 4.0, "5.0"], "1=bad, 2 = bad,4=good,5=good", [0, 0, 1, 1]),
        ([True, "False"], "false=no,true=yes", [1, 0]),
        (["ham", "SPAM", "Junk mail"], "ham=good,spam=bad,junk mail=bad", [0, 1, 1]),
        ([0, 1, -1], "-1=bad,0=so so,1=good", [1, 2, 0]),
    ],
)
def test_values_of_the_data_are_given_words(tmp_path: Path, labels: list[object], spec: str, numbers: list[int]):
    template = load_template("{text}:", spec)
    path = write(tmp_path / "a.jsonl", labels)
    rows = load_dataset("", str(path), labels=template.label_values).splits["validation"]
    assert [row.label for row in rows if isinstance(row, Labelled)] == numbers
    assert Template.of_run({"template": template.to_json()}) == template
    assert {*template.labels} == {part.partition("=")[2].strip() for part in spec.split(",")}


def test_values_without_a_word_are_bad_rows(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [1, 2, 3, "bad", None, -1, 2])
    data = load_dataset("", str(path), labels=("1=bad", "2=good"), bad_rows="skip")
    assert len(data.splits["validation"]) == 3
    reasons = "2 unknown label, 1 no label, 1 label -1 says that the row has no label"
    assert data.notes[0].endswith(f"4 of 7 rows left out (--bad_rows skip): {reasons}")
    with pytest.raises(InputError, match=r"jsonl:3: unknown label 3: --labels names 1, 2 \("):
        load_dataset("", str(path), labels=("1=bad", "2=good"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("1=bad,good", "--labels '1=bad,good': 'good' names no value of the data: write all as VALUE=WORD, or none"),
        ("1=bad,1.0=good", "--labels '1=bad,1.0=good': '1' has two words: give each value of the data one"),
        ("1=bad,2=bad", "--labels 'bad': name two label words or more, as in negative,positive"),
        ("1=bad,2=Bad", "--labels 'bad,Bad': 'bad' and 'Bad' are the same word; label words must differ"),
    ],
)
def test_values_that_are_not_given_words(spec: str, message: str):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_template("{text}:", spec)


def test_words_with_signs_and_booleans(tmp_path: Path):
    assert load_template("{text}:", "<=50K,>50K").labels == ("<=50K", ">50K")
    assert default_labels(str(write(tmp_path / "a.jsonl", ["<=50K", ">50K"] * 6))) == "<=50K,>50K"
    with pytest.raises(InputError, match="its labels are 'a=b', 'c=d': name them without = in --labels"):
        default_labels(str(write(tmp_path / "a.jsonl", ["a=b", "c=d"] * 6)))
    with pytest.raises(
        InputError, match=r"unknown label True: .*; for true and false write --labels false=no,true=yes"
    ):
        load_dataset("", str(write(tmp_path / "a.jsonl", [True])), labels=("no", "yes"))
