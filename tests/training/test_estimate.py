"""A plan predicts, and changes nothing: the bytes it says are kept are those that are, and a run's bits stay."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Graft
from graftlm.config import TrainConfig
from graftlm.training import train as train_module
from graftlm.training.estimate import Estimate, Probe, make_plan
from graftlm.training.setup import prepare
from graftlm.training.train import train
from tiny import TEMPLATE, data_folder, model_folder


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    model_folder(folder / "model", layers=6)
    data_folder(folder / "data")
    return folder


def config(assets: Path, out_dir: Path, **changes: Any) -> TrainConfig:
    plain = TrainConfig(
        init_from=str(assets / "model"),
        data=str(assets / "data"),
        out_dir=str(out_dir),
        template=TEMPLATE,
        rank=4,
        alpha=16.0,
        max_iters=6,
        eval_every=3,
        batch_size=8,
        dtype="float32",
        device="cpu",
    )
    return replace(plain, **changes)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"rank": 0, "alpha": None},
    {"loss_on": "all", "shared_prefix": False},
    {"train_layers": "4:", "activation_cache_gb": 0.0},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_what_is_kept_for_the_backward_pass_is_foreseen(changes: dict[str, Any], assets: Path, tmp_path: Path) -> None:
    prepared = prepare(config(assets, tmp_path / "run", **changes))
    model = prepared.loaded.model.train()
    (batch, *_) = prepared.loader.microbatches(next(prepared.loader.stream(0)))
    first = prepared.method.layer_range(model.config).start
    foreseen = Probe(model, prepared.objective, first, 1).saved_mb(batch)
    known, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss, _ = prepared.objective.loss(model, batch)
    assert loss.requires_grad
    assert foreseen == pytest.approx(sum(kept.values()) / 1e6, rel=0.02)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_it_leaves_no_trace(changes: dict[str, Any], assets: Path, tmp_path: Path) -> None:
    prepared = prepare(config(assets, tmp_path / "run", **changes))
    model = prepared.loaded.model.eval()
    torch.manual_seed(4)
    before, weights = torch.get_rng_state(), {n: p.clone() for n, p in model.named_parameters()}
    plan = make_plan(prepared, 1.0, repeats=1)
    assert torch.equal(torch.get_rng_state(), before) and not model.training and len(model.blocks) == 6
    assert all(p.grad is None and torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert plan.steps == 6 and plan.examples == 48 and plan.model_tflop > 0
    assert plan.train_seconds > 0 and plan.minutes * 60 >= plan.train_seconds + 1 - 0.1
    assert plan.peak_rss_mb > 50


@pytest.mark.parametrize("changes", [{"batch_size": 5}, {"batch_size": 20, "max_iters": 4, "grad_accum": 2}])
def test_it_counts_the_examples_of_smaller_batches(changes: dict[str, Any], assets: Path, tmp_path: Path) -> None:
    results = train(config(assets, tmp_path / "run", **{"max_iters": 12, **changes}))
    plan = json.loads((tmp_path / "run" / "run.json").read_text())["plan"]
    steps = results["steps"] * changes.get("grad_accum", 1)
    assert plan["examples"] == results["examples"] < steps * changes["batch_size"]


def test_a_run_has_the_same_bits_without(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = train(config(assets, tmp_path / "with"))
    run = json.loads((tmp_path / "with" / "run.json").read_text())
    for key, name in (("examples_per_s", "examples_per_s"), ("peak_rss_mb", "peak_rss_mb")):
        assert results["plan"][key]["predicted"] == pytest.approx(run["plan"][name], abs=0.001)
        assert results["plan"][key]["ratio"] == pytest.approx(
            results["plan"][key]["measured"] / run["plan"][name], rel=0.01, abs=0.001
        )
    nothing = Estimate(6, 48, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    monkeypatch.setattr(train_module, "make_plan", lambda *a, **k: nothing)
    train(config(assets, tmp_path / "without"))
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "with/last" / name).read_bytes() == (tmp_path / "without/last" / name).read_bytes()


def test_the_flag_says_what_a_run_would_take_and_writes_nothing(assets: Path, tmp_path: Path, graft: Graft) -> None:
    words = ["train", "--plan", "--init_from", str(assets / "model"), "--data", str(assets / "data")]
    words += ["--template", TEMPLATE, "--out_dir", str(tmp_path / "run"), "--device", "cpu"]
    words += ["--rank", "4", "--max_iters", "5"]
    done = graft(*words, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["steps"] == 5 and plan["examples_per_s"] > 0 and not (tmp_path / "run").exists()
    assert plan["trainable_fraction"] == plan["trainable"] / plan["total"] > 0
    shown = graft(*words)
    assert shown.returncode == 0 and "model FLOPs" in shown.stdout and "peak memory" in shown.stdout
