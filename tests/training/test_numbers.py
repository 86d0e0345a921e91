"""Numbers that are none end a run; the seed decides every byte, and the number of threads none but the last digits."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftlm.config import TrainConfig
from graftlm.errors import GraftError
from graftlm.files.formats import load_safetensors
from graftlm.training import trainer as trainer_module
from graftlm.training.objectives.sft import SFT
from graftlm.training.train import train
from tiny import TEMPLATE, data_folder, model_folder


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    model_folder(folder / "model")
    data_folder(folder / "data")
    return folder


def config(assets: Path, out_dir: Path, **changes: Any) -> TrainConfig:
    plain: dict[str, Any] = {
        "init_from": str(assets / "model"),
        "data": str(assets / "data"),
        "out_dir": str(out_dir),
        "template": TEMPLATE,
        "rank": 4,
        "alpha": 16.0,
        "lr": 1e-2,
        "max_iters": 12,
        "eval_every": 4,
        "batch_size": 8,
        "dtype": "float32",
        "device": "cpu",
        "kernels": "torch",
    }
    return TrainConfig(**{**plain, **changes})


class Spoiled(torch.autograd.Function):
    """x -> x, whose gradient is `value`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: float) -> torch.Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.value, None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient's norm"])
def test_whatever_is_no_number_ends_the_run_with_its_step_and_the_last_good_checkpoint(
    where: str, value: float, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1, 100))

    real = SFT.loss

    def broken(self: Any, model: Any, batch: Any) -> Any:
        found, sums = real(self, model, batch)
        if next(calls) == 6:
            found = found + value if where == "loss" else Spoiled.apply(found, value)
        return found, sums

    accumulate = trainer_module.Trainer.accumulate

    def watched(self: Any, *words: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(SFT, "loss", broken)
            return accumulate(self, *words)

    monkeypatch.setattr(trainer_module.Trainer, "accumulate", watched)
    with pytest.raises(GraftError) as caught:
        train(config(assets, tmp_path / "run", eval_every=2))
    good = (tmp_path / "run" / "last").resolve()
    assert caught.value.exit_status == 1 and good.name == "step-4"
    assert str(caught.value).startswith(f"step 6: the {where} is ")
    assert f"the last good checkpoint is {good}; " in str(caught.value)
    for tensor in load_safetensors(good / "adapter_model.safetensors").values():
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_base_with_a_broken_weight_ends_at_its_first_step(value: float, assets: Path, tmp_path: Path) -> None:
    model_folder(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(GraftError, match=r"^step 1: the loss is nan; no checkpoint was saved before"):
        train(config(assets, tmp_path / "run", init_from=str(tmp_path / "model")))
    assert not (tmp_path / "run").exists()


def digests(run: Path) -> dict[str, str]:
    """Of the newest checkpoint's files: weights, moments, progress but for its clocks."""
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (run / "last").glob("*.safetensors")}
    assert len(found) >= 2
    return found


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_same_seed_gives_the_same_bytes(method: str, assets: Path, tmp_path: Path) -> None:
    sizes = {"rank": 4, "alpha": 16.0} if method == "lora" else {"rank": None, "alpha": None}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(config(assets, tmp_path / name, method=method, seed=seed, dropout=0.1, max_iters=4, **sizes))
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b and all(a[name] != c[name] for name in a)


def test_the_number_of_threads_changes_rounding_only(assets: Path, tmp_path: Path) -> None:
    before, losses = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            run = tmp_path / str(threads)
            train(config(assets, run, dropout=0.1, batch_size=16))
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            losses.append([row["train_loss"] for row in rows])
    finally:
        torch.set_num_threads(before)
    for other in losses[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(losses[0]), rtol=1e-4, atol=1e-5)
