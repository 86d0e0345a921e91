"""Names on the model hub, against a mirror on loopback: what is fetched, what is not, and each way it can fail."""

import gzip
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.errors import InputError
from graftlm.files.assets import data_folder, download, model_folder
from graftlm.files.atomic import write_json
from graftlm.files.fetch import NotOnHub
from graftlm.files.formats import save_safetensors
from graftlm.text.dataset import load_dataset
from hub_mirror import serve


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    (folder / "onnx").mkdir(parents=True)
    write_json(folder / "config.json", {"model_type": "gpt2"})
    write_json(folder / "onnx" / "config.json", {})
    save_safetensors(folder / "model.safetensors", {"a": torch.arange(3.0)})
    for name in ("pytorch_model.bin", "tf_model.h5", "run.py", "vocab.json", "merges.txt", "README.md"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    folder = tmp_path / "reviews"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text('{"text": "fine", "label": 1}\n')
    (folder / "loader.py").write_text("raise SystemExit")
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_only_safe_files_of_a_model_are_fetched(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(models={"gpt2-medium": repo, "org/name": repo}) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        for name in ("gpt2-medium", "org/name", "org/name@main"):
            assert files(model_folder(name)) == {"config.json", "model.safetensors", "vocab.json", "merges.txt"}
        assert not any("pytorch_model" in request for request in mirror.requests)


def test_a_data_set_of_the_hub_is_never_the_built_in_one(reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(datasets={"rotten_tomatoes": reviews}) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        assert files(data_folder("rotten_tomatoes")) == {"data/train.jsonl"}
        assert data_folder("rotten_tomatoes") == download("rotten_tomatoes")
        with pytest.raises(
            NotOnHub, match=r"unknown data set 'imdb': .* use the built-in rotten-tomatoes-pypi or imdb"
        ):
            data_folder("imdb")


def test_the_card_of_a_hub_data_set_says_which_files_its_splits_are(
    reviews: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (reviews / "second.csv").write_text("text,label\ndull,0\n")
    (reviews / "data" / "README.md").write_text("of the folder")
    paths = "{split: train, path: second.csv}, {split: test, path: data/*.jsonl}, {split: validation, path: second.csv}"
    (reviews / "README.md").write_text(f"---\nconfigs:\n- data_files: [{paths}]\n---\n")
    with serve(datasets={"org/card": reviews}) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        assert files(data_folder("org/card")) == {"README.md", "data/train.jsonl", "second.csv"}
        splits = load_dataset("org/card").splits
    assert {name: [row.text for row in rows] for name, rows in splits.items()} == {
        "train": ["dull"],
        "validation": ["dull"],
        "test": ["fine"],
    }


def test_a_snapshot_is_used_offline(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(models={"gpt2": repo}) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        online = model_folder("gpt2")
    assert model_folder("gpt2") == online  # the hub is gone, the snapshot is not
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert model_folder("gpt2") == online
    with pytest.raises(
        InputError, match=r"model 'gpt2-xl' is not \(all\) in the local cache, and HF_HUB_OFFLINE is set"
    ):
        model_folder("gpt2-xl")


def test_what_the_hub_does_not_have(repo: Path, reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(models={"gpt2": repo}, datasets={"org/rows": reviews}) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        with pytest.raises(NotOnHub, match=r"unknown model 'org/none': the hub http://127\.0\.0\.1:\d+ has none"):
            model_folder("org/none")
        with pytest.raises(InputError, match="model 'gpt2' has no revision 'nope'"):
            model_folder("gpt2@nope")
        with pytest.raises(NotOnHub, match="unknown data set 'org/none'"):
            download("org/none")
        assert files(download("org/rows")) == {"data/train.jsonl"}


def test_pickled_weights_alone_are_no_model(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repo / "model.safetensors").unlink()
    with serve(models={"org/old": repo}) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        with pytest.raises(InputError, match=r"only safetensors and gguf"):
            model_folder("org/old")


def test_a_data_set_that_is_only_a_script_is_refused(reviews: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (reviews / "data" / "train.jsonl").unlink()
    with serve(datasets={"org/script": reviews}) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        with pytest.raises(InputError, match=r"no data file"):
            data_folder("org/script")


def assert_one_line_soon(name: str, message: str, seconds: float) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match=message) as caught:
        model_folder(name)
    assert time.monotonic() - start < seconds and "\n" not in str(caught.value)
    assert "use the built-in smollm2-135m" in str(caught.value)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound


def test_a_closed_port(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert_one_line_soon("gpt2", r"the hub http.* did not answer for model 'gpt2' \(ConnectError: .*refused", 5)


def test_a_hub_that_accepts_and_never_replies(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    listener.listen()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
    assert_one_line_soon("org/name@v1", r"did not answer for model 'org/name' \(ReadTimeout", 5)


def test_a_hub_that_falls_silent_after_its_first_answers(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hub_mirror

    def silent(self: Any, *_: Any) -> None:
        time.sleep(3)

    with serve(models={"gpt2": repo}) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        monkeypatch.setattr(hub_mirror._Handler, "_send_file", silent)
        assert_one_line_soon("gpt2", "did not answer for model 'gpt2'", 10)


@pytest.mark.parametrize("status", [500, 401, 403])
def test_a_hub_that_answers_with_an_error(repo: Path, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    import hub_mirror

    def refuse(self: Any) -> None:
        self._send(status, b"", False)

    with serve(models={"gpt2": repo}) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        monkeypatch.setattr(hub_mirror._Handler, "do_GET", refuse)
        assert_one_line_soon("gpt2", rf"answered {status} for model 'gpt2'|unknown model 'gpt2': the hub", 5)


def test_the_package_s_own_settings_are_as_before(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import get_session

    before = {when: list(hooks) for when, hooks in get_session().event_hooks.items()}
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
    with pytest.raises(InputError):
        model_folder("gpt2")
    assert {when: list(hooks) for when, hooks in get_session().event_hooks.items()} == before


def test_telemetry_is_off_before_the_package_is_imported(
    child: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "from graftlm.files.assets import model_folder\n"
        "try: model_folder('gpt2')\n"
        "except Exception as error: print(type(error).__name__)\n"
        "from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    )
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    assert child(code, HF_ENDPOINT="http://127.0.0.1:9").communicate() == ("InputError\nTrue\n", "")


def test_a_configuration_of_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(f'{{"prompt": "p {n}", "chosen": "a", "rejected": "b"}}\n' for n in range(9))
    for name in ("harmless-base", "helpful-base"):
        (tmp_path / "hh" / name).mkdir(parents=True)
        (tmp_path / "hh" / name / "train.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        (tmp_path / "hh" / name / "test.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with serve(datasets={"org/hh": tmp_path / "hh"}) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        data = load_dataset("org/hh:harmless-base")
        assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 8, "validation": 1, "test": 9}
        assert not any("helpful-base" in request for request in mirror.requests)
        with pytest.raises(
            InputError, match=r"^org/hh:cola: this data set has no 'cola': leave it out, or name another$"
        ):
            data_folder("org/hh:cola")
        with pytest.raises(
            InputError, match=r"several data sets, harmless-base, helpful-base: name one, as in NAME:harm"
        ):
            load_dataset("org/hh")
        with pytest.raises(InputError, match=r"hh: holds several data sets"):  # the folder above is not read
            load_dataset(f"{tmp_path / 'hh'}:..")


def test_the_files_of_a_configuration_are_what_its_card_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only they are fetched, wherever they are; without a default configuration nothing is."""
    line = '{"prompt": "p", "completion": "c"}\n'
    for name in ("en/train_sft.jsonl", "en/test_sft.jsonl", "en/train_gen.jsonl", "de.jsonl", "en/run.py", "big.jsonl"):
        (tmp_path / "chats" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "chats" / name).write_text(line * 3)
    paths = {"train_sft": "en/train_sft*", "test_sft": "en/t*_sft.jsonl", "train_gen": "en"}
    splits = ", ".join(f"{{split: {split}, path: {path}}}" for split, path in paths.items())
    configs = f"- {{config_name: english, data_files: [{splits}]}}\n- {{config_name: german, data_files: de.jsonl}}"
    (tmp_path / "chats" / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    with serve(datasets={"org/chats": tmp_path / "chats"}) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        with pytest.raises(
            InputError, match=r"^org/chats: holds several data sets, english, german: name one, as in NAME:english"
        ):
            data_folder("org/chats")
        assert files(data_folder("org/chats:german")) == {"README.md", "de.jsonl"}
        sft = {"en/train_sft.jsonl", "en/test_sft.jsonl"}
        assert files(data_folder("org/chats:english:sft")) == {"README.md", "de.jsonl", *sft}
        with pytest.raises(InputError, match=r":french: this data set has no 'french': it has english, german$"):
            data_folder("org/chats:french")
        assert files(data_folder("org/chats:english")) == {"README.md", "de.jsonl", *sft, "en/train_gen.jsonl"}
        assert not any(name in request for request in mirror.requests for name in ("run.py", "big"))
        with pytest.raises(
            InputError, match=r"^org/chats:english:x: this data set has no 'x': it has english, german,"
        ):
            data_folder("org/chats:english:x")
        assert download("org/chats:german") == data_folder("org/chats:german")
        with pytest.raises(InputError, match=r"^unknown data set 'org/none'"):
            download("org/none:german")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert data_folder("org/chats:english:sft") == data_folder("org/chats:german")  # one snapshot
