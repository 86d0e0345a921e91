"""Folders that people have: of `save_to_disk`, of class folders, and of files that name no split."""

import json
import re
import shutil
from pathlib import Path

import pytest

from data_files import LAYOUTS, TEXTS, WORDS
from graftlm.errors import InputError
from graftlm.text.dataset import default_labels, load_dataset


def texts(folder: Path) -> dict[str, list[tuple[str, int]]]:
    """Text and label of the rows of each split."""
    splits = load_dataset(str(folder), labels=default_labels(str(folder)).split(",")).splits
    return {split: [(row.text, row.label) for row in rows] for split, rows in splits.items()}


REVIEWS = [(text, n % 2) for n, text in enumerate(TEXTS)]


def refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message.replace('FOLDER', str(folder)))}$"):
        load_dataset(str(folder), labels=WORDS)


def copied(name: str, folder: Path) -> Path:
    shutil.copytree(LAYOUTS / name, folder / name)
    return folder / name


def test_a_saved_data_set_with_splits(tmp_path: Path) -> None:
    folder = copied("saved_dd", tmp_path)
    expected = {"train": REVIEWS, "validation": REVIEWS[:8], "test": REVIEWS[:8]}
    assert texts(folder) == expected
    assert default_labels(str(folder)) == "negative,positive"  # neg and pos in the files
    assert load_dataset(str(folder), labels=WORDS).notes == [f"{folder}: read as labelled (text, label)"]
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "validation", "unsupervised"]}')
    shutil.move(folder / "test", folder / "unsupervised")
    assert list(texts(folder)) == ["train", "validation"]
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "../x"]}')
    refused(folder, "FOLDER/dataset_dict.json: names no splits: save the data set again")
    (folder / "dataset_dict.json").write_text("{")
    refused(folder, "FOLDER/dataset_dict.json: is not JSON: save the data set again")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_data_files": [{"filename": "data-00001-of-00001.arrow"}]},
            "FOLDER: data-00001-of-00001.arrow, which state.json names, is missing: copy it, or save the data again",
        ),
        ({"_data_files": []}, "FOLDER/state.json: names no files: save the data set again"),
        (
            {"_indices_data_files": [{"filename": "indices.arrow"}]},
            "FOLDER: its rows are in another order: call flatten_indices() and save the data set again",
        ),
    ],
)
def test_a_saved_data_set_of_one_split(tmp_path: Path, change: dict[str, object], message: str) -> None:
    folder = copied("saved_ds", tmp_path)
    assert sorted(row for rows in texts(folder).values() for row in rows) == sorted(REVIEWS)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, **change}))
    refused(folder, message)


def class_folder(folder: Path, **names: int) -> Path:
    """Text files in folders named after classes, as many of each as given."""
    for name, count in names.items():
        for n in range(count):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{n}_9.txt").write_text(f"{folder.name} {name} {n}\n", encoding="utf-8")
    return folder


def test_class_folders(tmp_path: Path) -> None:
    class_folder(tmp_path / "train", pos=12, neg=12, unsup=2)
    class_folder(tmp_path / "test", pos=1, neg=1)
    for name in ("imdb.vocab", "README", "imdbEr.txt", "train/urls_pos.txt", "train/labeledBow.feat"):
        (tmp_path / name).write_text("x")  # as aclImdb has them
    found = texts(tmp_path)
    assert found["test"] == [("test neg 0\n", 0), ("test pos 0\n", 1)]
    assert sorted(found["train"] + found["validation"]) == sorted(
        (f"train {word} {n}\n", label) for label, word in enumerate(("neg", "pos")) for n in range(12)
    )
    unread = (
        "imdb.vocab, imdbEr.txt, train/labeledBow.feat, train/unsup/0_9.txt, train/unsup/1_9.txt, train/urls_pos.txt"
    )
    assert load_dataset(str(tmp_path), labels=WORDS).notes[0] == f"{tmp_path}: not read: {unread}"
    with pytest.raises(InputError, match=r"its labels are neg, pos in this order, and --labels are positive, negative"):
        load_dataset(str(tmp_path), labels=("positive", "negative"))
    class_folder(tmp_path / "test", neutral=1)
    refused(
        tmp_path,
        "FOLDER/test: its classes are neg, neutral, pos, those of train are neg, pos: give both the same folders",
    )


def test_class_folders_without_splits(tmp_path: Path) -> None:
    class_folder(tmp_path, ham=9, spam=9)
    assert default_labels(str(tmp_path)) == "ham,spam"
    assert sorted({label for rows in texts(tmp_path).values() for _, label in rows}) == [0, 1]
    (tmp_path / "ham" / "0_9.txt").write_bytes(b"caf\xe9")
    refused(tmp_path, "FOLDER/ham/0_9.txt:1: byte 4 is not UTF-8 (0xe9); save the file as UTF-8")


def test_files_that_name_no_split_are_train(tmp_path: Path) -> None:
    for name in ("shards_odd", "one_file_dir"):
        assert sorted(row for rows in texts(LAYOUTS / name).values() for row in rows) == sorted(REVIEWS)
    shutil.copytree(LAYOUTS / "shards_odd", tmp_path / "data")
    assert sorted(row for rows in texts(tmp_path).values() for row in rows) == sorted(REVIEWS)
    (tmp_path / "data" / "more.csv").write_text("text,label\na,1\n")
    names = "more.csv, part_0.jsonl, part_1.jsonl, part_2.jsonl"
    refused(
        tmp_path,
        f"FOLDER/data: its data files are of several formats, {names}: name one, or a split in each name",
    )
