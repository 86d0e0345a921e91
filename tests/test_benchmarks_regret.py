"""benchmarks/lora_without_regret.py: the losses of finished trials, and the claims and figures made from them.

The trials are written by hand; no model is trained.
"""

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from fake_runs import metrics, predictions, record, write

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
REVIEWS = 400
ORIGIN = {
    "date": "2026-01-02",
    "graftlm": "abc123",
    "jobs": 2,
    "other_work": True,
    "machine": {
        "cpu": "one",
        "family_model_stepping": "1/2/3",
        "flags": [],
        "cores": 2,
        "memory_gb": 8.0,
        "torch": "2",
    },
}


@pytest.fixture(scope="module")
def regret() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("lora_without_regret")
    sys.path.remove(str(BENCHMARKS))


def result(regret: Any, loss_of: Callable[[Mapping[str, Any]], float], noise: float = 0.3) -> dict[str, Any]:
    """A result whose trials have the given mean losses; reviews differ, and little between trials."""
    hard = np.random.default_rng(0).exponential(noise, REVIEWS)
    hard *= noise / hard.mean()
    trials = {}
    for number, trial in enumerate(trial for recipe in regret.recipes().values() for trial in recipe.trials):
        own = np.random.default_rng(number).normal(0, 0.02, REVIEWS)
        losses = np.maximum(0, hard + own - own.mean() + loss_of(trial.flags) - noise)
        trials[trial.id] = {
            **ORIGIN,
            **{"id": trial.id, "row": trial.row, "seed": trial.seed, "dtype": "float32"},
            "tests": {"last": {"eval_config": {"mode": "score", "limit": 0}, "reading": {"accuracy": 0.85}}},
            "run": {"results": {"last": {"val_loss": loss_of(trial.flags)}, "trainable": 1000}},
            "test_loss": " ".join(f"{regret.UNIT * each:.0f}" for each in losses),
            "train_loss": [0.5, 0.4, 0.3],
        }
    return {"trials": list(trials.values())}


def as_they_say(flags: Mapping[str, Any]) -> float:
    """The paper's claims as losses: the best rates are 1e-3 (3e-3 in large batches) and 1e-4."""
    best = (3e-3 if flags["batch_size"] == 64 else 1e-3) if "rank" in flags else 1e-4
    loss = 0.3 + 0.1 * abs(math.log10(flags["lr"] / best))
    loss += 0.3 * ("rank" in flags and "up" not in flags["targets"])
    return loss + ("rank" in flags) * 0.1 * (flags["batch_size"] == 64)


def verdicts(regret: Any, found: Mapping[str, str]) -> list[str]:
    return [line.split(" | ")[1] for line in found["claims"].splitlines()[2:]]


def test_claims_that_the_losses_have_reproduce(regret: Any) -> None:
    found, pictures = regret.blocks([result(regret, as_they_say)])
    assert verdicts(regret, found) == ["reproduces with one seed"] * 7
    assert "Missing" not in found["machine"] and "2026-01-02" in found["machine"] and "abc123" in found["machine"]
    assert sorted(pictures) == ["batch_sizes.svg", "learning_rates.svg", "ranks.svg", "targets.svg", "training.svg"]
    for picture in pictures.values():
        assert ElementTree.fromstring(picture).findtext("{http://www.w3.org/2000/svg}title")
    assert "| q, k, v | 1,000 | 0.0003, 0.001, 0.003, 0.01 | 0.001 | 1 |" in found["targets"]


def test_a_rate_at_the_edge_of_those_tried_leaves_the_batch_size_open(regret: Any) -> None:
    def low(flags: Mapping[str, Any]) -> float:
        """As they say, but the lowest rate is best in large batches."""
        return as_they_say(flags) + (flags["batch_size"] == 64) * 2 * (3 + math.log10(flags["lr"]))

    found, _ = regret.blocks([result(regret, low)])
    (line,) = [line for line in found["claims"].splitlines() if "Large batches" in line]
    assert (
        "not decided" in line and "At an edge of the learning rates tried: LoRA 64 at 0.001, full 64 at 3e-05." in line
    )
    assert "| 3e-05 (edge) |" in found["batch_size"]


def test_claims_that_the_losses_contradict_stand_first(regret: Any) -> None:
    def other_way(flags: Mapping[str, Any]) -> float:
        """Attention is best; the higher the rank, the lower the best rate; full fine-tuning has LoRA's rate."""
        best = {1: 3e-3, 16: 1e-3, 128: 1e-4}.get(flags.get("rank", 26), 3e-4)
        worse = 0.2 * ("rank" in flags and "up" in flags["targets"] and flags["rank"] != 1)
        return (
            0.3
            + 0.2 * abs(math.log10(flags["lr"] / best))
            + worse
            + 0.3 * ("rank" not in flags) * (flags["batch_size"] == 64)
        )

    found, _ = regret.blocks([result(regret, other_way)])
    words = verdicts(regret, found)
    assert words == sorted(words, key=lambda word: word == "reproduces with one seed")
    assert words.count("does **not** reproduce with one seed") >= 4
    assert "hardly depends on the rank" in found["claims"].splitlines()[2]


def test_what_the_interval_leaves_open_is_not_decided(regret: Any) -> None:
    assert [regret.below(each) for each in ((-1, -2, -0.1), (1, 0.1, 2), (0.1, -1, 2))] == [True, False, None]
    assert [regret.not_above(each) for each in ((0, -1, 0.02), (1, 0.1, 2), (0, -1, 1))] == [True, False, None]


def test_a_difference_is_paired_by_review(regret: Any) -> None:
    one, other = np.array([1.0, 2.0, 3.0]), np.array([0.5, 1.5, 2.0])
    value, low, high = regret.difference(one, other)
    half = regret.Z * np.std([0.5, 0.5, 1.0], ddof=1) / math.sqrt(3)
    assert (value, low, high) == pytest.approx((2 / 3, 2 / 3 - half, 2 / 3 + half))


def test_the_rate_is_selected_by_validation_loss_and_judged_by_test_loss(regret: Any) -> None:
    def run(validation: float, test: list[int]) -> dict[str, Any]:
        return {"run": {"results": {"last": {"val_loss": validation}}}, "test_loss": " ".join(map(str, test))}

    rates = {1e-4: [run(0.3, [10, 20, 30])], 1e-3: [run(0.2, [40, 52, 61])], 1e-2: [run(0.4, [11, 19, 30])]}
    setting = regret.Setting("a", rates)
    assert setting.rate == 1e-3 and setting.best.tolist() == [0.40, 0.52, 0.61]
    assert setting.rates == [1e-4, 1e-2]
    more = regret.Setting("a", {**rates, 1e-4: [run(0.3, [10, 20, 30]), run(0.5, [30, 20, 10])]})
    assert more.rate == 1e-4 and more.best.tolist() == [0.2, 0.2, 0.2] and more.validation(1e-4) == pytest.approx(0.4)


def test_the_losses_come_from_a_trials_folder(regret: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = regret.recipes()["targets"].trials[0]
    folder = tmp_path / trial.folder
    write(folder / "test-last.jsonl", predictions([True, False, True], confidence=0.8))
    reading = {"n": 3, "accuracy": 2 / 3, "ci_low": 0.1, "ci_high": 0.9, "macro_f1": 0.6, "garbage_rate": 0.0}
    test = {"eval_config": {"mode": "score", "limit": 0}, "reading": reading}
    write(folder / "test-last.json", test)
    about = record(20, date="2026-01-02", git="abc123")
    about["results"] |= {"trainable": 1290, "trainable_fraction": 0.01}
    about["plan"] |= {"peak_rss_mb": 900.0}
    write(folder / "run" / "run.json", about)
    write(folder / "run" / "metrics.jsonl", metrics([float(step) for step in range(20)]))
    monkeypatch.setattr(sys.modules["handout"], "all_results", lambda study: [])
    words = [f"--out_dir={tmp_path}", f"--json-out={tmp_path}/result.json", "--collect"]
    assert sys.modules["harness"].main(regret.__doc__, regret.run, regret.FLAGS, words) == 0
    (saved,) = json.loads((tmp_path / "result.json").read_text())["trials"]
    assert saved["test_loss"] == " ".join(f"{-100 * math.log(p):.0f}" for p in (0.8, 0.2, 0.8))
    assert saved["train_loss"] == [2 * part + 0.5 for part in range(10)]
    # A file that has the losses keeps them when the run folders are gone.
    (folder / "test-last.jsonl").unlink()
    assert sys.modules["harness"].main(regret.__doc__, regret.run, regret.FLAGS, words) == 0
    assert json.loads((tmp_path / "result.json").read_text())["trials"] == [saved]
