"""Out of memory is said as such, with numbers, and before a model is read where it can be known."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from graftlm import TrainConfig
from graftlm.cli import main
from graftlm.errors import InputError
from graftlm.exchange import huggingface
from graftlm.files import memory
from graftlm.files.formats import LazyTensors, open_safetensors
from graftlm.methods import LoRA, method_from_flags
from tiny import data_folder, model_folder

FAILURES = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    safetensors.SafetensorError("Error while deserializing header: Cannot allocate memory (os error 12)"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


def test_the_system_says_how_much_is_free() -> None:
    assert 100 < memory.free_mb() < 1e8


@pytest.mark.parametrize("failure", FAILURES, ids=lambda error: type(error).__name__)
def test_a_file_that_cannot_be_mapped_for_want_of_memory_is_not_called_damaged(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise failure

    file = model_folder(tmp_path / "m") / "model.safetensors"
    stored = open_safetensors(file)
    monkeypatch.setattr(safetensors, "safe_open", fail)
    for read in (lambda: open_safetensors(file), lambda: stored[next(iter(stored))]):
        with pytest.raises(InputError, match=r"model\.safetensors: out of memory \(needs .* MB are free\): ") as caught:
            read()
        assert "fetch" not in str(caught.value)


def test_a_model_larger_than_free_memory_is_refused_before_its_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = model_folder(tmp_path / "m"), data_folder(tmp_path / "d")
    size = sum(stored.nbytes for stored in open_safetensors(folder / "model.safetensors").values())
    monkeypatch.setattr(LazyTensors, "__getitem__", lambda *_: pytest.fail("weights are read"))
    monkeypatch.setattr(huggingface, "free_mb", lambda _: (size - 1) / 1e6)
    with pytest.raises(InputError, match=r"m: the model in float32: out of memory \(needs 0\.\d MB, "):
        huggingface.load_model(folder, torch.device("cpu"), torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr(huggingface, "free_mb", lambda _: size / 2e6)
    words = [f"--init_from={folder}", f"--data={data}", "--template=R:{text}", f"--out_dir={tmp_path / 'run'}"]
    assert main.run(["train", *words, "--plan", "--device=cpu", "--dtype=float32"]) == 2
    assert "out of memory (needs" in capsys.readouterr().err and not (tmp_path / "run").exists()
    huggingface.load_model(folder, torch.device("cpu"), torch.bfloat16)  # half the size fits


@pytest.mark.parametrize("failure", FAILURES[:2], ids=lambda error: type(error).__name__)
def test_any_command_that_runs_out_of_memory_says_so(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: list[str]) -> None:
        raise failure

    monkeypatch.setattr(main, "_dispatch", fail)
    assert main.run(["train"]) == 1
    assert capsys.readouterr().err.startswith("graft: graft train: out of memory (")
    monkeypatch.setattr(memory, "is_out_of_memory", lambda _: False)
    with pytest.raises(type(failure)):
        main.run(["train"])


@pytest.mark.parametrize("targets", [("q", "k"), ["q", "k"], "q,k", " q, k "])
def test_targets_from_python_are_a_list_or_a_text(targets: Any) -> None:
    config = TrainConfig(targets=targets)
    method = method_from_flags(config, {"targets"})
    assert isinstance(method, LoRA) and method.targets == ("q", "k")
    assert json.loads(json.dumps(config.targets)) == config.targets
