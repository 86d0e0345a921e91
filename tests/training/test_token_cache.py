"""A start with cached tokens is the start without, to the bit; and nothing out of date or damaged is read."""

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from graftlm.config import TrainConfig
from graftlm.files.formats import read_json, sha256_file
from graftlm.text.tokenizer import Tokenizer
from graftlm.training import token_cache
from graftlm.training.data import DataRequest
from graftlm.training.token_cache import DataKey, PreparedData, TokenCache
from graftlm.training.train import train
from tiny import fresh_home, model_folder

CHANGED = {"out_dir", "resume", "max_iters"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("tokens") / "model", "gpt2")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFT_HOME", fresh_home(tmp_path / "home"))
    monkeypatch.setattr(token_cache, "MIN_EXAMPLES", 1)
    return tmp_path / "home" / "tokens"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"text": f"film {n % 31} {'very ' * (n % 4)}good", "label": n % 2} for n in range(60)]
    return write(tmp_path / "reviews.jsonl", rows)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def request(base: Path, data: Path, **flags: Any) -> DataRequest:
    config = TrainConfig(init_from=str(base), data=str(data), template="{text}", **flags)
    return DataRequest(config, frozenset({"data", "template"}), None, Tokenizer.from_folder(base), 40)


def same(first: PreparedData, second: PreparedData) -> bool:
    pairs = [(first.examples[split], second.examples[split]) for split in ("train", "validation")]
    empty: Mapping[str, Any] = {}
    rest = [replace(data, examples=empty) for data in (first, second)]
    return rest[0] == rest[1] and all(list(one) == list(other) for one, other in pairs)


def run(base: Path, data: Path, out: Path, **flags: Any) -> tuple[dict[str, Any], str]:
    """run.json without what differs from run to run, and the hash of the last adapter."""
    settings = {"init_from": str(base), "data": str(data), "template": "{text}", "rank": 2, "device": "cpu"}
    train(TrainConfig(**{"max_iters": 2, "eval_every": 1, "batch_size": 4, **settings, **flags}, out_dir=str(out)))
    recorded = read_json(out / "run.json")
    kept = {key: recorded[key] for key in ("data", "template", "notes", "trainable")}
    return kept, sha256_file(out / "last" / "adapter_model.safetensors")


def test_a_warm_start_and_a_resumed_run_are_those_without_a_cache(
    base: Path, data: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cold = run(base, data, tmp_path / "cold")
    assert len(list(home.iterdir())) == 1
    shutil.copytree(tmp_path / "cold", tmp_path / "resumed", symlinks=True)
    plain = run(base, data, tmp_path / "cold", resume=True, max_iters=3)
    with monkeypatch.context() as patch:
        patch.setattr(DataRequest, "prepare", lambda self: pytest.fail("the texts were read again"))
        assert run(base, data, tmp_path / "warm") == cold
        config = TrainConfig(out_dir=str(tmp_path / "resumed"), resume=True, max_iters=3)
        train(config, given={"out_dir", "resume", "max_iters"})
    assert plain[1] == sha256_file(tmp_path / "resumed" / "last" / "adapter_model.safetensors")


def test_what_is_read_from_the_cache_is_what_was_prepared(base: Path, data: Path, home: Path) -> None:
    wanted, cache = request(base, data), TokenCache(home)
    cold, warm, plain = wanted.cached(cache), wanted.cached(cache), wanted.prepare()
    assert same(cold, warm)
    assert same(replace(plain, cached_as=cold.cached_as), warm)
    assert len(warm.examples["train"]) == 48


def test_other_bytes_flags_tokenizers_and_lengths_have_other_names(base: Path, data: Path, tmp_path: Path) -> None:
    wanted = request(base, data)

    def name(of: DataRequest) -> str:
        return DataKey.of(of.config, of.explicit, of.tokenizer, of.max_length).name

    first, copy = name(wanted), Path(shutil.copy(data, tmp_path / "copy.jsonl"))
    assert name(request(base, data, lr=1.0, seed=3, out_dir="other")) == first
    tokenizer = Tokenizer.from_folder(base)
    tokenizer.stop_tokens = frozenset({0, 1})
    others = [
        name(request(base, data, bad_rows="skip")),
        name(request(base, data, labels="bad,good")),
        name(request(base, data, val_limit=3)),
        name(replace(wanted, max_length=41)),
        name(replace(wanted, explicit=frozenset({"labels"}))),
        name(replace(wanted, tokenizer=tokenizer)),
        name(request(base, copy)),
        name(request(base, data, val_data=str(copy))),
    ]
    data.write_bytes(data.read_bytes().replace(b"film 3 ", b"film 4 "))
    others.append(name(wanted))
    assert len({first, *others}) == 1 + len(others)


def test_a_folder_is_hashed_by_names_and_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    write(folder / "train" / "a.jsonl", [{"text": "a", "label": 0}])
    hashes = [token_cache.content_sha256(folder)]
    for path, text in (("train/a.jsonl", "b"), ("train/b.jsonl", "b"), ("README.md", "c"), ("notes.bin", "d")):
        (folder / path).write_text(text)
        hashes.append(token_cache.content_sha256(folder))
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "header"])
def test_a_damaged_file_is_made_again_and_said(damage: str, base: Path, data: Path, home: Path) -> None:
    wanted, cache = request(base, data), TokenCache(home)
    cold = wanted.cached(cache)
    (file,) = home.iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(
        {
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "truncated": whole[:-1],
            "empty": b"",
            "header": whole[:8] + b"[" + whole[9:],
        }[damage]
    )
    again = wanted.cached(cache)
    assert again.notes[:-1] == cold.notes
    assert again.notes[-1].startswith(f"{file}: damaged (")
    assert file.read_bytes() == whole
    assert same(wanted.cached(cache), cold)


def test_two_runs_may_write_at_once(base: Path, data: Path, home: Path) -> None:
    wanted = request(base, data)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: wanted.cached(TokenCache(home)), range(4)))
    assert all(same(one, found[0]) for one in found)
    assert [file.name for file in home.iterdir()] == [f"{found[0].cached_as}.safetensors"]


def test_what_cannot_be_written_is_said_and_small_data_is_not(
    base: Path, data: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.parent.mkdir(exist_ok=True)
    home.write_text("a file where the folder should be")
    assert request(base, data).cached(TokenCache(home)).notes[-1].startswith("tokens are not cached for a later start:")
    home.unlink()
    monkeypatch.setattr(token_cache, "MIN_EXAMPLES", 1000)
    assert "cached" not in request(base, data).cached(TokenCache(home)).notes[-1]
    assert not home.exists()


def test_the_least_recently_used_files_are_deleted(
    base: Path, data: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TokenCache(home)
    first, second = (request(base, data, val_limit=n).cached(cache).cached_as for n in (1, 2))
    request(base, data, val_limit=1).cached(cache)
    monkeypatch.setattr(token_cache, "MAX_BYTES", 2.5 * cache.path(first).stat().st_size)
    third = request(base, data, val_limit=3).cached(cache).cached_as
    assert {file.stem for file in home.iterdir()} == {first, third}
    assert second not in (first, third)
