"""benchmarks/paper.py: its page is what its results give, and its predictions answer to what they are fed."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from graftlm.cli.parser import parse
from graftlm.config import TrainConfig

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture(scope="module")
def paper() -> Iterator[ModuleType]:
    sys.path.insert(0, BENCHMARKS)
    yield importlib.import_module("paper")
    sys.path.remove(BENCHMARKS)


def result(link_gbs: float = 1.0) -> dict[str, Any]:
    run = {"peak_rss_mb": 900.0, "sent_mb_per_step": 1.0, "tokens_per_step": 800.0, "most_tokens": 960}
    runs = {
        name: {**run, "examples_per_s": 8.0, "trainable": 1, "total": 2}
        for name in ("lora one", "lora two", "full one", "full two")
    }
    return {"config": {"model": "smollm2-135m"}, "link_gbs": link_gbs, "runtime_mb": 300.0, "runs": [runs]}


def test_predictions_start_from_one_run_and_add_what_is_sent(paper: ModuleType) -> None:
    said = paper.predicted(result())
    assert said["lora one"]["seconds"] == pytest.approx(2.0)  # 16 reviews at 8 a second: it is what they start from
    assert said["full one"]["seconds"] > 1.3 * said["lora one"]["seconds"]  # the weights' gradients besides
    full, outside = 134_515_008, 49_152 * 576 + 576
    sent = 4 * (3 * full - outside)  # weights forth and back, those outside of blocks once; gradients
    assert said["full two"]["sent_mb_per_step"] == pytest.approx(sent / 1e6)
    assert said["full two"]["seconds"] - said["full one"]["seconds"] == pytest.approx(sent / 2 / 1e9)
    assert said["full one"]["seconds"] == paper.predicted(result(2.0))["full one"]["seconds"]
    twice = paper.predicted(result(2.0))["full two"]["seconds"]
    assert twice - said["full one"]["seconds"] == pytest.approx(sent / 2 / 2e9)
    # Half of the weights, gradients and moments, and fewer rows, but two blocks and the embedding whole.
    assert said["full two"]["peak_rss_mb"] < said["full one"]["peak_rss_mb"] - 8 * full / 1e6
    assert said["lora one"]["peak_rss_mb"] > 300 + 4 * full / 1e6


def test_a_row_says_no_less_than_its_parts(paper: ModuleType) -> None:
    for case in paper.CASES:
        found = paper.on_paper(case)
        assert found["sum"] == pytest.approx(found["held"] + found["activations"])
        assert (
            max(found["compute"], found["link"]) * paper.TOKENS / 60 <= found["least"] * case.batch_size * 2048 * 1.001
        )
        assert found["least"] <= found["most"] <= 2 * found["least"]


def test_every_command_on_the_page_has_flags_that_exist(paper: ModuleType) -> None:
    for case in paper.CASES:
        words = case.command.partition(" train ")[2].split()
        assert parse("train", TrainConfig, words).config.batch_size == case.batch_size


def test_the_committed_page_is_what_the_newest_result_gives(paper: ModuleType) -> None:
    text = paper.page(paper.result_of(paper.ROOT / "benchmarks" / "results"))
    assert paper.PAGE.read_text(encoding="utf-8") == text
