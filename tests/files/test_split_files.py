"""Which files are the splits of a data set: kinds of splits, configurations, shards, and label names of the card."""

import gzip
import json
import re
from pathlib import Path

import pytest

from data_files import LAYOUTS, WORDS
from graftlm.errors import InputError
from graftlm.exchange.load import resolve_path
from graftlm.files.assets import is_local_data
from graftlm.studies.sweep import _file_hashes, content_id
from graftlm.text.dataset import default_labels, load_dataset

SFT = LAYOUTS / "shards_hub_sft"


def write(folder: Path, **files: int) -> None:
    """Files of as many rows as given, whose texts begin with the file's name; __ in a name is a slash."""
    for name, count in files.items():
        path = folder / f"{name.replace('__', '/')}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(json.dumps({"text": f"{name} {n}", "label": n % 2}) + "\n" for n in range(count)), encoding="utf-8"
        )


def card(folder: Path, front_matter: str) -> None:
    (folder / "README.md").write_text(f"---\n{front_matter}\n---\n# Reviews\n")


def read(name: str) -> dict[str, set[str]]:
    """The files of each split, without what is held out."""
    splits = load_dataset(name, labels=WORDS).splits
    return {split: {row.text.partition(" ")[0] for row in rows} for split, rows in splits.items()}


def refused(name: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        load_dataset(name, labels=WORDS)


def test_kinds_of_splits(tmp_path: Path) -> None:
    refused(
        str(SFT),
        f"{SFT}: train_gen-00000-of-00001-a1b2c3d4e5f60718.parquet and "
        "train_sft-00000-of-00001-a1b2c3d4e5f60718.parquet both say they are the train split: "
        "name one, as in NAME:gen or NAME:sft",
    )
    for name in ("sft", "SFT", "gen"):
        data = load_dataset(f"{SFT}:{name}")
        assert all(f"_{name.lower()}-" in row.source for rows in data.splits.values() for row in rows)
        assert [len(data.splits["train"]) + len(data.splits["validation"]), len(data.splits["test"])] == [24, 24]
        assert data.notes[0].count("parquet") == 2 and "not read" in data.notes[0]
    alone = load_dataset(f"{SFT}:train_sft").splits
    assert {row.source.partition("-000")[0] for rows in alone.values() for row in rows} == {f"{SFT}/train_sft"}
    refused(f"{SFT}:dpo", f"{SFT}:dpo: this data set has no 'dpo': it has gen, sft")
    refused(f"{SFT}:a:b:c", f"{SFT}:a:b:c: name a configuration and a kind of splits at most, as in NAME:mnli:matched")
    write(tmp_path, train=20)
    refused(f"{tmp_path}/train.jsonl:sft", f"{tmp_path}/train.jsonl:sft: train.jsonl is one file: leave 'sft' out")


def test_a_plain_split_is_of_every_kind(tmp_path: Path) -> None:
    write(tmp_path, train=20, validation_matched=4, validation_mismatched=4, test_matched=4, test_mismatched=4)
    names = "validation_matched.jsonl and validation_mismatched.jsonl"
    hint = "name one, as in NAME:matched or NAME:mismatched"
    refused(str(tmp_path), f"{tmp_path}: {names} both say they are the validation split: {hint}")
    expected = {"train": {"train"}, "validation": {"validation_matched"}, "test": {"test_matched"}}
    assert read(f"{tmp_path}:matched") == expected
    configs = [f"{{split: {name}, path: {name}*}}" for name in ("train", *map("_".join, _pairs()))]
    card(tmp_path, f"configs:\n- {{config_name: mnli, data_files: [{', '.join(configs)}]}}")
    assert read(f"{tmp_path}:mnli:matched") == read(f"{tmp_path}:matched") == expected
    hint = "validation_matched and validation_mismatched both say they are the validation split: " + hint
    refused(f"{tmp_path}:mnli", f"{tmp_path}/README.md: {hint}")


def _pairs() -> list[tuple[str, str]]:
    return [(split, kind) for split in ("validation", "test") for kind in ("matched", "mismatched")]


def test_configurations(tmp_path: Path) -> None:
    write(tmp_path, a__x=20, a__dev=4, b=20, odd__train=20)
    files = "{config_name: a, data_files: [{split: train, path: a/x.jsonl}, {split: dev, path: a/dev.jsonl}]}"
    card(tmp_path, f"configs:\n- {files}\n- {{config_name: b, data_files: b.jsonl}}")
    refused(str(tmp_path), f"{tmp_path}: holds several data sets, a, b: name one, as in NAME:a")
    assert read(f"{tmp_path}:a") == {"train": {"a__x"}, "validation": {"a__dev"}}
    assert read(f"{tmp_path}:b")["test"] == {"b"}
    assert read(f"{tmp_path}:odd")["test"] == {"odd__train"}  # a folder that the card does not name
    card(tmp_path, "configs:\n- data_files: [{split: en, path: b*}, {split: de, path: a/x*}]")
    refused(str(tmp_path), f"{tmp_path}/README.md: holds several data sets, en, de: name one, as in NAME:en")
    assert read(f"{tmp_path}:de")["train"] == {"a__x"}
    card(tmp_path, "configs:\n- {config_name: c, data_dir: none}")
    refused(str(tmp_path), f"{tmp_path}/README.md: none, which it names, is no folder: correct it")


def test_places_of_splits(tmp_path: Path) -> None:
    """Shards in data/ precede other files, as in `datasets`; files may be some folders deeper."""
    shards = {"data__train-00000-of-00002": 9, "data__train-00001-of-00002": 9, "data__validation-00000-of-00001": 4}
    write(tmp_path / "stories", **{"Stories-train": 9, "StoriesV2-train": 9}, **shards)
    found = read(str(tmp_path / "stories"))
    assert found["train"] == {name for name in shards if "train" in name} and found["validation"] == {[*shards][2]}
    write(tmp_path / "deep", data__en__train_de__x=20, data__en__dev_de__x=4)
    assert read(str(tmp_path / "deep"))["validation"] == {"data__en__dev_de__x"}
    names = [f"en__c4-{split}.0000{n}-of-00002" for split in ("train", "validation") for n in (0, 1)]
    write(tmp_path / "c4", **dict.fromkeys(names, 9))
    assert read(str(tmp_path / "c4")) == {"train": {*names[:2]}, "validation": {*names[2:]}}
    write(tmp_path / "versions", **{"train-v1.1": 9, "train-v2.0": 9})
    refused(
        str(tmp_path / "versions"),
        f"{tmp_path}/versions: train-v1.1.jsonl and train-v2.0.jsonl both say they are the train split: "
        "name one, as in NAME:v1.1 or NAME:v2.0",
    )
    for name in ("v2.0", "train-v2.0"):
        assert read(f"{tmp_path}/versions:{name}")["train"] == {"train-v2.0"}
    write(tmp_path / "one", raw__a=9, raw__b=9)
    assert read(str(tmp_path / "one"))["train"] == {"raw__a", "raw__b"}
    write(tmp_path / "one", old__a=9)
    refused(str(tmp_path / "one"), f"{tmp_path}/one: holds several data sets, old, raw: name one, as in NAME:old")


@pytest.mark.parametrize("name", ["train", "reviews"])
def test_a_file_that_is_there_twice(tmp_path: Path, name: str) -> None:
    write(tmp_path, **{name: 20})
    (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress((tmp_path / f"{name}.jsonl").read_bytes()))
    names = ("train.jsonl and train.jsonl.gz both say they are the train split", "holds a file twice")
    message = names[0] if name == "train" else f"{names[1]}, reviews.jsonl, reviews.jsonl.gz"
    refused(str(tmp_path), f"{tmp_path}: {message}: keep one")


def test_label_names_of_the_card(tmp_path: Path) -> None:
    write(tmp_path, train=20)
    names = (
        "features: [{name: label, dtype: {class_label: {names: {'0': ham, '1': spam}}}}, {name: text, dtype: string}]"
    )
    for info in (f"{{{names}}}", f"[{{config_name: default, {names}}}, {{config_name: x, features: [4]}}]"):
        card(tmp_path, f"dataset_info: {info}")
        assert default_labels(str(tmp_path)) == "ham,spam"
        with pytest.raises(InputError, match=r"its labels are ham, spam in this order, and --labels are spam, ham: "):
            load_dataset(str(tmp_path), labels=("spam", "ham"))
    assert {row.label for row in load_dataset(str(tmp_path), labels=("ham", "spam")).splits["train"]} == {0, 1}
    for info in ("{features: [{name: label, dtype: {class_label: {names: {'1': ham, '0': spam}}}}]}", "5", "[5]"):
        card(tmp_path, f"dataset_info: {info}")
        assert default_labels(str(tmp_path)) == "negative,positive"


def test_a_local_folder_with_a_choice_is_a_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """run.json has it absolute, and graft compare knows when its files change."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "chats", train_sft=9, train_gen=9)
    assert resolve_path("chats:sft") == f"{tmp_path}/chats:sft" and is_local_data("chats:sft")
    assert resolve_path("org/chats:sft") == "org/chats:sft" and not is_local_data("org/chats:sft")
    ids = [content_id({"data": "chats:sft"}, {}), content_id({"data": "chats:gen"}, {})]
    _file_hashes.cache_clear()
    write(tmp_path / "chats", train_sft=8)
    assert len({*ids, content_id({"data": "chats:sft"}, {})}) == 3
    write(tmp_path, **{"a:b": 9})
    assert resolve_path("a:b.jsonl") == f"{tmp_path}/a:b.jsonl"
