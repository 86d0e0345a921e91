"""Characters of all kinds come through: out of each kind of file, through tokens, into predictions; halves do not."""

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from graftlm import cli
from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.files.formats import read_json
from graftlm.text.dataset import load_dataset
from graftlm.text.tokenizer import Tokenizer
from graftlm.training.train import train
from tiny import model_folder

TEXTS = [
    "naïve café, Straße, ½ price",
    "cafe\u0301 with a combining accent",
    "👩\u200d👩\u200d👧\u200d👦 a family, 🏳\ufe0f\u200d🌈, 👍🏽",
    "סרט טוב مرحبا \u202eright to left\u202c",
    "とても良い映画 非常好 아주 좋은",
    "line\u2028separator para\u2029graph next\u0085line",
    "zero\u200bwidth\ufeff inside \u00adsoft",
    "\U0001f600 \U0001d50a\U0001d52f\U0001d51e \U0010fffd",
    "no\u0301n\u0323character \ufffe\uffff",
    "tab\tand\x07bell \x1b[31mred\x1b[0m",
    "Zalgo Z̸̡͓a̷̛͚l̸̰̔g̴̝̈́o̸",
    "ﬁ ligature Ⅷ ①",
]
LABELS = ("👎", "très bon")
ROWS = [{"text": text, "label": number % 2} for number, text in enumerate(TEXTS)]


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([["text", "label"], *(row.values() for row in rows)])
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_characters_that_went_in(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    written(tmp_path / "data" / f"train{suffix}", [*ROWS, *ROWS[:2]])
    written(tmp_path / "data" / f"test{suffix}", ROWS)
    found = load_dataset(str(tmp_path / "data"), labels=LABELS)
    assert [row.text for row in found.splits["test"]] == TEXTS
    assert [row.label for row in found.splits["test"]] == [row["label"] for row in ROWS]


def test_a_label_may_be_any_word(tmp_path: Path) -> None:
    rows = [{"text": f"{text} {n}", "label": LABELS[n % 2]} for n, text in enumerate(TEXTS)]
    found = load_dataset(str(written(tmp_path / "data.jsonl", rows)), labels=LABELS)
    assert {row.label for split in found.splits.values() for row in split} == {0, 1}


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_hold_every_character(text: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(model_folder(tmp_path / "model"))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_run_and_its_predictions_keep_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run, file = tmp_path / "dätä 数据", tmp_path / "rün 👩\u200d👧", tmp_path / "prédictions.jsonl"
    data.mkdir()
    model = model_folder(tmp_path / "modèle 🦙", layers=1)
    written(data / "train.jsonl", [{**row, "text": f"{n} {row['text']}"} for n in (1, 2) for row in ROWS])
    written(data / "validation.jsonl", [{**row, "text": f"3 {row['text']}"} for row in ROWS])
    written(data / "test.jsonl", ROWS)
    config = TrainConfig(
        init_from=str(model), data=str(data), out_dir=str(run), template="« {text} »\nC'est :",
        labels=",".join(LABELS), rank=2, max_iters=2, batch_size=4, dtype="float32", device="cpu", kernels="torch",
    )  # fmt: skip
    train(config)
    assert read_json(run / "run.json")["template"]["labels"] == list(LABELS)
    words = ["evaluate", "--out_dir", str(run), "--predictions", str(file), "--device", "cpu", "--json"]
    assert cli.run(words) == 0 and json.loads(capsys.readouterr().out)["n"] == len(TEXTS)
    said = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    assert [each["text"] for each in said] == TEXTS
    assert {each["predicted"] for each in said} <= {0, 1} and set(said[0]["scores"]) == {*LABELS}


@pytest.mark.parametrize("field", ["text", "label"])
def test_half_a_character_is_one_line_that_says_where(field: str, tmp_path: Path) -> None:
    """JSON can hold half of a surrogate pair, which no tokenizer takes and no file can be written with."""
    rows = [{"text": f"fine {n}", "label": "very bad"} for n in range(20)]
    rows[7][field] = "half \ud83d of it"
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"data\.jsonl:8: "):
        load_dataset(str(tmp_path / "data.jsonl"), labels=("very bad", "good"))
