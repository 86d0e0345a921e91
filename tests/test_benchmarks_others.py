"""The arithmetic of the smaller benchmarks, and that what they call exists."""

import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from graftlm.config import EvaluateConfig, TrainConfig

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")


@pytest.fixture(scope="module")
def load() -> Iterator[object]:
    sys.path.insert(0, BENCHMARKS)
    yield importlib.import_module
    sys.path.remove(BENCHMARKS)


def run(speed: float, accuracy: float = 0.75) -> dict[str, float]:
    return {"examples_per_s": speed, "accuracy": accuracy, "peak_rss_mb": 1.0}


def test_scores_compare_with_the_faster_peer_of_their_round(load: type[ModuleType]) -> None:
    bench = load("evaluate_vs_peers")
    rounds = [
        {"graft-score": run(36), "graft-generate": run(32), "hf-score": run(18), "hf-generate": run(20)},
        {"graft-score": run(38), "graft-generate": run(30), "hf-score": run(20), "hf-generate": run(10)},
    ]
    summary = bench.summarise(rounds)
    assert summary["ratios"]["score graft/best peer"]["rounds"] == [1.8, 1.9]
    assert summary["ratios"]["generate graft/hf"]["median"] == pytest.approx(2.3)
    assert list(summary["claims"].values()) == [True, True, True]
    rounds = [{**each, "graft-score": run(30, 0.70)} for each in rounds]
    assert list(bench.summarise(rounds)["claims"].values()) == [False, True, False]
    assert "equal accuracy?" in bench.table(summary)


def test_start_up_claims_are_medians(load: type[ModuleType]) -> None:
    bench = load("startup")
    found = {
        "graft --help": [{"cpu_seconds": s, "seconds": s} for s in (0.1, 0.2, 9.0)],
        "graft train": [{"cpu_seconds": 9, "seconds": 9, "seconds_to_first_step": s} for s in (4.0, 6.0, 5.5)],
    }
    assert list(bench.summarise(found)["claims"].values()) == [True, False]
    assert "first step after 5.50 s" in bench.table(bench.summarise(found))


def test_the_commands_use_flags_that_exist(load: type[ModuleType]) -> None:
    flags = {word.removeprefix("--") for word in load("startup").FIRST_STEP if word.startswith("--")}
    assert flags - {"json"} <= {f.name for f in dataclasses.fields(TrainConfig)}
    text = (Path(BENCHMARKS) / "evaluate_vs_peers.py").read_text()
    for flag in ("init_from", "data", "limit", "batch_size", "read"):
        assert f'"--{flag}"' in text and flag in {f.name for f in dataclasses.fields(EvaluateConfig)}


def test_the_first_epoch_stands_apart(load: type[ModuleType]) -> None:
    bench = load("train_layers")
    rows = [{"examples": 16 * (i + 1), "tokens": 100 * (i + 1), "tokens_per_s": 50 if i < 2 else 200} for i in range(6)]
    assert bench.speeds(rows, 2) == {"first_epoch": 8.0, "later_epochs": 32.0}
    figures = {"peak_rss_mb": 1.0, "val_loss": 0.5, "first_epoch": 8.0}
    summary = bench.summarise([{"upper": {**figures, "later_epochs": 26}, "all": {**figures, "later_epochs": 10}}])
    assert summary["claims"] == {"at least 2.5 times the full depth behind the first epoch": True}
    assert "2.600" in bench.table(summary)


def test_one_figure_beyond_a_fifth_breaks_the_plans_claim(load: type[ModuleType]) -> None:
    bench = load("plan_vs_run")

    def run(seconds: float, memory: float) -> dict[str, dict[str, float]]:
        return {"seconds": bench._pair(100, seconds), "peak_rss_mb": bench._pair(1000, memory)}

    assert bench.summarise({"a": run(119, 900), "b": run(81, 1100)})["claims"].popitem()[1] is True
    summary = bench.summarise({"a": run(119, 900), "b": run(81, 1201)})
    assert summary["claims"].popitem()[1] is False
    assert "1.19" in bench.table(bench.summarise({"a": run(119, 900)}))
    assert all(set(flags) <= {f.name for f in dataclasses.fields(TrainConfig)} for flags in bench.RUNS.values())


def test_the_page_shows_the_newest_result_of_each_kind(load: type[ModuleType], tmp_path: Path) -> None:
    page = load("page")
    machine = {
        "cores": 2,
        "cpu": "A CPU",
        "family_model_stepping": "6/1/1",
        "flags": ["avx2", "fma"],
        "memory_gb": 24.0,
        "torch": "2.13.0",
    }
    result = {
        "machine": machine,
        "graftlm": "abc",
        "medians": {"graft": {"examples_per_s": 20.0, "peak_rss_mb": 1500.0}, "a<b": {"examples_per_s": 10.0}},
        "ratios": {"examples_per_s graft/peft": {"median": 2.0, "rounds": [1.9, 2.1]}},
        "claims": {"fast": True, "small": False, "other": None},
    }
    for date, name in (("2026-01-02", "new"), ("2026-01-01", "old")):
        (tmp_path / f"{date}-train.json").write_text(json.dumps({**result, "graftlm": name}))
    text, pictures = page.page(tmp_path)
    assert "graftlm at new." in text and "graftlm at old" not in text and list(pictures) == ["train.svg"]
    assert "| graft | 20 | 1,500 |" in text and "**2.00** (rounds: 1.90, 2.10)" in text
    assert "- *small*: does **not** hold" in text and "(benchmarks/train.svg)" in text
    root = ElementTree.fromstring(pictures["train.svg"])
    widths = [float(each.attrib["width"]) for each in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert widths == [420.0, 210.0]


def test_the_committed_page_is_what_the_committed_results_give(load: type[ModuleType]) -> None:
    page = load("page")
    text, pictures = page.page(page.ROOT / "benchmarks" / "results")
    docs = page.ROOT / "docs"
    assert (docs / "benchmarks.md").read_text(encoding="utf-8") == text
    assert {p.name: p.read_text(encoding="utf-8") for p in (docs / "benchmarks").iterdir()} == pictures
