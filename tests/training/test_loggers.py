"""Copies of metrics.jsonl: what Weights & Biases and TensorBoard hold is read back, and no logger stops a run."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.training import reporting
from graftlm.training import train as train_module
from graftlm.training.train import train
from tiny import TEMPLATE, data_folder, model_folder


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    model_folder(folder / "model")
    data_folder(folder / "data")
    return folder


def config(assets: Path, out_dir: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "init_from": str(assets / "model"),
            "data": str(assets / "data"),
            "out_dir": str(out_dir),
            "template": TEMPLATE,
            "rank": 2,
            "max_iters": 6,
            "eval_every": 3,
            "batch_size": 4,
            "dtype": "float32",
            "device": "cpu",
            "kernels": "torch",
            **changes,
        }
    )


def rows(out_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def numbers(row: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """The rows in a .wandb file: protobuf records in LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    found = []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little for a header: zeros up to the next block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or its last part
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                found.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return found


def test_weights_and_biases_offline_holds_the_numbers_of_metrics(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(config(assets, tmp_path / "run", wandb_project="tests"))
    (file,) = (tmp_path / "run").rglob("*.wandb")
    history = wandb_history(file)
    assert [row["_step"] for row in history] == [1, 2, 3, 4, 5, 6]
    for seen, row in zip(history, rows(tmp_path / "run"), strict=True):
        assert {k: v for k, v in seen.items() if not k.startswith("_") and k != "step"} == numbers(row)


def test_tensorboard_holds_the_numbers_of_metrics_also_behind_a_resume(assets: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config(assets, tmp_path / "run", tensorboard=True))
    last = tmp_path / "run" / "last"
    last.unlink()
    last.symlink_to("checkpoints/step-3")  # as if it had been killed behind step 6, before its checkpoint
    train(config(assets, tmp_path / "run", resume=True), given={"resume"})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    metrics = rows(tmp_path / "run")
    assert len(metrics) == 6
    for name in {name for row in metrics for name in numbers(row)}:
        expected = [(row["step"], row[name]) for row in metrics if row[name] is not None]
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=1e-6)  # it keeps float32


class Broken:
    """A logger that raises at every call."""

    calls = 0

    def log(self, row: dict[str, Any]) -> None:
        Broken.calls += 1
        raise ConnectionError("the network\nis gone")

    def close(self) -> None:
        raise RuntimeError("still gone")


class BrokenAtTheEnd:
    """One that raises when it is closed."""

    def log(self, row: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        raise OSError("no space")


def everything(out_dir: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    timed = ("seconds", "examples_per_s", "tokens_per_s", "peak_rss_mb")
    tensors = {str(p.relative_to(out_dir)): p.read_bytes() for p in sorted(out_dir.rglob("*.safetensors"))}
    return [{k: v for k, v in row.items() if k not in timed} for row in rows(out_dir)], tensors


def test_a_logger_that_raises_at_every_call_leaves_the_run_as_it_was(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: Any
) -> None:
    train(config(assets, tmp_path / "alone"))
    loggers = [("Broken", Broken()), ("Closing", BrokenAtTheEnd())]
    monkeypatch.setattr(train_module, "start_loggers", lambda *args: loggers)
    train(config(assets, tmp_path / "logged"), console=notes)
    assert everything(tmp_path / "logged") == everything(tmp_path / "alone")
    assert Broken.calls == 1
    said = notes.file.getvalue()
    assert said.count("Broken failed and is disabled") == 1
    assert "ConnectionError: the network is gone" in said and "Closing failed" in said


def test_a_logger_that_cannot_start_is_left_out(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notes: Any
) -> None:
    def gone(*args: Any) -> None:
        raise ConnectionError("no server")

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(reporting, "Wandb", gone)
    train(config(assets, tmp_path / "run", wandb_project="tests", tensorboard=True), console=notes)
    assert "Weights & Biases failed and is disabled" in notes.file.getvalue()
    assert len(rows(tmp_path / "run")) == 6 and list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("flags", "module", "line"),
    [
        ({"wandb_project": "x"}, "wandb", "--wandb_project needs the wandb package: pip install 'graftlm[wandb]'"),
        ({"tensorboard": True}, "torch.utils.tensorboard", "--tensorboard needs the tensorboard package: pip install"),
    ],
)
def test_a_missing_package_is_told_before_anything_is_written(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], module: str, line: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError) as error:
        train(config(assets, tmp_path / "run", **flags))
    assert str(error.value).startswith(line) and not (tmp_path / "run").exists()


@pytest.fixture
def notes() -> Iterator[Any]:
    import io

    from rich.console import Console

    yield Console(file=io.StringIO(), width=400)
