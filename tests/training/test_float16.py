"""float16 with a scaled loss: overflowing steps are skipped, the scale finds its place, and a resumed run agrees."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.config import TrainConfig
from graftlm.errors import GraftError
from graftlm.training import checkpoint
from graftlm.training import train as train_module
from graftlm.training import trainer as trainer_module
from graftlm.training.checkpoint import FIRST_SCALE, TrainState
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
            "rank": 4,
            "max_iters": 12,
            "eval_every": 4,
            "batch_size": 8,
            "dtype": "float16",
            "device": "cpu",
            "kernels": "torch",
            **changes,
        }
    )


def losses(out_dir: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_scale_changes_no_gradient_that_float16_can_hold(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = train(config(assets, tmp_path / "float16"))
    assert (
        results["skipped_steps"] == 0 and json.loads((tmp_path / "float16/run.json").read_text())["dtype"] == "float16"
    )
    train(config(assets, tmp_path / "float32", dtype="float32"))
    ours, exact = losses(tmp_path / "float16"), losses(tmp_path / "float32")
    assert ours == pytest.approx(exact, rel=2e-2) and ours != exact
    # Without a scale, in float16 too.
    monkeypatch.setattr(train_module, "FIRST_SCALE", 1.0)
    train(config(assets, tmp_path / "unscaled"))
    assert losses(tmp_path / "unscaled") == pytest.approx(exact, rel=2e-2)


def test_an_overflow_is_skipped_and_halves_the_scale_and_a_resumed_run_agrees(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "FIRST_SCALE", 2.0**30)
    monkeypatch.setattr(checkpoint, "GROWTH_STEPS", 3)
    whole = train(config(assets, tmp_path / "whole", max_iters=30, eval_every=10))
    assert 0 < whole["skipped_steps"] < 25 and losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]
    first = losses(tmp_path / "whole")[: whole["skipped_steps"]]
    assert len(set(first)) > 1  # other batches, the same weights
    step = trainer_module.Trainer.train_step

    def interrupted(self: Any, number: int, batches: Any) -> Any:
        if number == 2:  # before the first update
            raise KeyboardInterrupt
        return step(self, number, batches)

    monkeypatch.setattr(trainer_module.Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config(assets, tmp_path / "parts", max_iters=30, eval_every=1))
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "GROWTH_STEPS", 3)
    parts = train(config(assets, tmp_path / "parts", resume=True), given={"resume"})
    assert parts["skipped_steps"] == whole["skipped_steps"]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_gradient_that_overflows_at_any_scale_ends_the_run(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "FIRST_SCALE", 4.0)
    infinite = torch.tensor(float("inf"))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda params, most: infinite)
    with pytest.raises(GraftError, match=r"^step 3: the gradient's norm is inf; "):
        train(config(assets, tmp_path / "run"))


def test_the_scale_doubles_after_a_while() -> None:
    progress = TrainState(loss_scale=FIRST_SCALE)
    for _ in range(checkpoint.GROWTH_STEPS - 1):
        progress.update_loss_scale(True)
    assert progress.loss_scale == FIRST_SCALE
    progress.update_loss_scale(True)
    assert (progress.loss_scale, progress.steps_since_overflow, progress.skipped) == (2 * FIRST_SCALE, 0, 0)
    progress.update_loss_scale(False)
    assert (progress.loss_scale, progress.steps_since_overflow, progress.skipped) == (FIRST_SCALE, 0, 1)


def test_the_scale_begins_and_grows_as_torchs_own() -> None:
    theirs = torch.amp.GradScaler("cpu")
    assert theirs.get_scale() == FIRST_SCALE and theirs.get_growth_interval() == checkpoint.GROWTH_STEPS
