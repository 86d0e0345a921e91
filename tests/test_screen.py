"""What a command prints at 80 and 120 columns, compared with the files in `screens/`.

To rewrite the files after a change, and then read the diff: REWRITE_SCREENS=1 python -m pytest tests/test_screen.py
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from graftlm import cli
from graftlm.cli import display

SCREENS = Path(__file__).parent / "screens"
Result = dict[str, Any]

POINT = {"step": 60, "val_loss": 0.1867, "val_accuracy": 0.828}
TRAINED = {
    **{"best": POINT, "last": POINT, "trainable": 1_290_240, "total": 135_805_248, "steps": 60, "examples": 480},
    **{
        "seconds": 504.2,
        "examples_per_s": 1.14,
        "peak_rss_mb": 1513.0,
        "objective": "sft",
        "chat": False,
        "documents": False,
        "eval_split": "test",
        "out_dir": "runs/first",
    },
}
PLAN = {
    **{"trainable": 1_290_240, "total": 135_805_248, "steps": 60, "examples": 480, "model_tflop": 12.3},
    **{"examples_per_s": 1.3, "minutes": 7.4, "train_seconds": 380.0, "validation_seconds": 60.0},
    **{"startup_seconds": 4.0, "peak_rss_mb": 1459.0},
}
SCORED = {
    **{"n": 200, "mode": "score", "accuracy": 0.815, "ci_low": 0.755, "ci_high": 0.863, "macro_f1": 0.814},
    **{"garbage_rate": 0.0, "examples_per_s": 5.8, "labels": ["negative", "positive"]},
    **{"confusion": [[88, 13, 0], [24, 75, 0]], "saved": "runs/first/evaluations/best-test-522421b7.json"},
}
INTENTS = [f"intent of the customer {n}" for n in range(77)]
CONFUSED = {
    **{**SCORED, "labels": INTENTS},
    "confusion": [[40 * (p == t) + t * (p == (t + 5) % 78) for p in range(78)] for t in range(77)],
}
FEW_CONFUSED = {
    **{**SCORED, "labels": [f"feeling {n}" for n in range(6)]},
    "confusion": [[30 * (p == t) + t * (p == (t + 5) % 7) for p in range(7)] for t in range(6)],
}
DOCUMENTS = {"n": 12, "windows": 340, "tokens": 173_740, "loss": 2.7183, "perplexity": 15.15, "tokens_per_s": 1840.0}
ROW = {
    **{"name": "zero-shot", "checkpoint": "", "seeds": [0], "accuracy": 0.725, "ci_low": 0.659, "ci_high": 0.782},
}
LORA = {
    **{"name": "LoRA r=16 alpha=64", "checkpoint": "best", "seeds": [0, 1, 2], "accuracy": 0.861, "ci_low": 0.84},
    **{"ci_high": 0.88, "p": 0.0004, "delta_vs_baseline": 0.136, "val_loss": 0.167, "trainable": 1_290_240},
    **{"trainable_fraction": 0.0095, "steps": 1066, "seconds": 3011.0, "predicted": {"seconds": 2890.0}},
    **{"examples_per_s": 5.6, "peak_rss_mb": 1513.0},
}
COMPARED = {"rows": [ROW, LORA, {**ROW, "name": "full", "failed": ["seed 0: out of memory"]}], "out_dir": "runs/ranks"}
STYLE = {
    **{"accuracy": 0.42, "ci_low": 0.36, "ci_high": 0.48, "unparsed_rate": 0.01, "prompt_tokens": 412.0},
    **{"shared_prompt_tokens": 380, "new_tokens": 96.0, "seconds_per_answer": 1.25, "n": 200, "min": 0.4, "max": 0.44},
    **{"mean": 0.42, "runs": [1, 2, 3]},
}
PROMPTED = {
    **{"task": "gsm8k", "model": "smollm2-135m-instruct", "chat": True},
    "styles": {"zero-shot": STYLE, "chain-of-thought": STYLE},
}
SPLIT = {
    **{"rows": 8530, "examples": 8530, "targets": 17_060, "truncated": {"rows": 3, "tokens": 41}},
    "tokens": {"p50": 41, "p90": 62, "p99": 79, "max": 96},
}
DATA = {
    **{"data": "rotten-tomatoes-pypi", "layouts": ["labelled (text, label)"], "unused_columns": [], "objective": "sft"},
    **{"tokenizer": "smollm2-135m", "max_length": 2048, "duplicates": {"train_test": 2}},
    **{"splits": {"train": SPLIT, "validation": SPLIT}},
    **{"examples": [{"source": "train, row 1", "text": "Review: a joy .\\nSentiment:⟦ positive⟧⟦<|im_end|>⟧"}]},
}

PRINTED: dict[str, tuple[Callable[[Console, Result], None], Result]] = {
    "train": (display.train, TRAINED),
    "train-plan": (display.train, PLAN),
    "evaluate": (display.evaluate, {**SCORED, "score": SCORED, "generate": {**SCORED, "mode": "generate"}}),
    "evaluate-77-labels": (display.evaluate, CONFUSED),
    "evaluate-6-labels": (display.evaluate, FEW_CONFUSED),
    "evaluate-documents": (display.evaluate, DOCUMENTS),
    "compare": (display.compare, COMPARED),
    "prompt": (display.prompt, PROMPTED),
    "data": (display.data, DATA),
}


def check(name: str, text: str) -> None:
    """Compare with the stored screen, or store it."""
    file = SCREENS / f"{name}.txt"
    text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    if os.environ.get("REWRITE_SCREENS"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8"), f"{file.name} differs: REWRITE_SCREENS=1 rewrites it"


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", PRINTED)
def test_a_result(name: str, width: int) -> None:
    show, result = PRINTED[name]
    file = io.StringIO()
    show(Console(file=file, width=width, force_terminal=True, color_system=None, highlight=False), result)
    table = [line.rstrip() for line in file.getvalue().splitlines() if line.startswith(" ")]
    assert all(len(line) <= width for line in table)
    check(f"{name}-{width}", file.getvalue())


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
@pytest.mark.parametrize("width", [80, 120])
def test_a_help_page(
    words: list[str], width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.run(words) == 0
    page = capsys.readouterr().out
    assert all(len(line) <= width for line in page.splitlines())
    check(f"{'-'.join(word.strip('-') for word in words)}-{width}", page)


def test_a_log_has_all_columns() -> None:
    file = io.StringIO()
    display.compare(Console(file=file, width=80), COMPARED)
    assert "peak MB" in file.getvalue() and "not shown" not in file.getvalue()
