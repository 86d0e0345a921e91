"""Run folders and comparisons written by hand, as `graft train`, `evaluate` and `compare` leave them: no model."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LABELS = ("negative", "positive")
Rows = list[dict[str, Any]]


def write(path: Path, content: Any) -> Path:
    """JSON; a list becomes a jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in content) if isinstance(content, list) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def metrics(losses: Sequence[float], every: int = 2, worse: float = 0.1) -> Rows:
    """A row a step; every so many steps a validation whose loss lies a little higher."""
    rows = []
    for step, loss in enumerate(losses, 1):
        judged = step % every == 0 or step == len(losses)
        row = {"step": step, "examples": 8 * step, "train_loss": loss}
        row |= {"val_loss": loss + worse if judged else None, "val_accuracy": 1 - loss / 2 if judged else None}
        rows.append({**row, "seconds": 2.0 * step, "peak_rss_mb": 1500.5})
    return rows


def predictions(right: Sequence[bool], texts: Sequence[str] | None = None, confidence: float = 0.8) -> Rows:
    """A row an example: labels in turn, told rightly where `right` says so, with the same probability each time."""
    rows = []
    for number, ok in enumerate(right):
        label = number % 2
        predicted = label if ok else 1 - label
        scores = {word: math.log(confidence if n == predicted else 1 - confidence) for n, word in enumerate(LABELS)}
        row: dict[str, Any] = {"text": texts[number] if texts else f"review {number}", "label": label}
        rows.append({**row, "predicted": predicted, "scores": scores, "read": "score", "garbage": False})
    return rows


def record(steps: int = 6, trainable: int = 1_290_240, done: bool = True, **changes: Any) -> dict[str, Any]:
    """A run.json."""
    point = {"step": steps, "val_loss": 0.31, "val_accuracy": 0.85}
    results = {"steps": steps, "seconds": 12.0 * steps, "examples_per_s": 9.5, "peak_rss_mb": 1500.5}
    found: dict[str, Any] = {
        "config": {"max_iters": steps},
        "method": {"method": "lora"},
        "base": {"name": "smollm2-135m"},
        "data": {"name": "rotten-tomatoes-pypi"},
        "template": {"labels": list(LABELS)},
        "device": "cpu",
        "dtype": "float32",
        "trainable": trainable,
        "total": 135_805_248,
        "versions": {"graftlm": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "platform": "Linux"},
        "plan": {"train_seconds": 60.0, "validation_seconds": 30.0},
        "results": {**results, "best": point, "last": point} if done else None,
    }
    return {**found, **changes}


def run_folder(folder: Path, losses: Sequence[float] = (0.9, 0.7, 0.5, 0.4, 0.35, 0.3), **changes: Any) -> Path:
    """A run folder without predictions."""
    write(folder / "metrics.jsonl", metrics(losses))
    write(folder / "run.json", record(len(losses), **changes))
    return folder


def compared(folder: Path, cells: Sequence[dict[str, Any]]) -> Path:
    """A folder of `graft compare`; a cell says row, flags, and maybe predictions, losses, failed, trainable."""
    listed = []
    for number, cell in enumerate(cells):
        flags, name = cell.get("flags", {}), f"cell-{number}"
        listed.append({"row": cell["row"], "flags": flags, "id": str(number), "folder": name})
        trains = flags.get("method") != "zero-shot"
        if trains and "losses" in cell:
            run_folder(folder / name / "run", cell["losses"], trainable=cell.get("trainable", 1_290_240))
        if "predictions" in cell:
            write(folder / name / f"test-{'best' if trains else ''}.jsonl", cell["predictions"])
        if "failed" in cell:
            write(folder / name / "failed.json", {"reason": cell["failed"]})
    write(folder / "sweep.json", {"cells": listed})
    return folder


REVIEWS = (
    "a tired , unimaginative and derivative variation of that already-shallow genre .",
    "miller tells this very compelling tale with little fuss or noise , expertly plucking tension from quiet .",
    "it's a film that hinges on its casting , and the leads never find the spark their scenes are written around .",
    "warm , funny and a little sad ; you leave it wanting to phone home .",
    "the kind of sequel that explains every joke the first one trusted you with",
    "two hours of handsome people looking out of windows , and somehow i was riveted",
)


def realistic(folder: Path, rows: int = 6, examples: int = 400, steps: int = 240) -> Path:
    """A comparison that looks like one: curves with noise, accuracies between 0.72 and 0.88, a base as it is."""
    rng = random.Random(0)
    texts = [f"{REVIEWS[n % len(REVIEWS)]} ({n})" for n in range(examples)]
    hard = [rng.random() for _ in texts]

    def said(skill: float) -> Rows:
        found = []
        for number, difficulty in enumerate(hard):
            sure = 1 / (1 + math.exp(-6 * (skill - difficulty) - rng.gauss(0, 0.7)))
            found += predictions([sure > 0.5], [texts[number]], max(sure, 1 - sure) * 0.98)
            found[-1] |= {"label": number % 2, "predicted": number % 2 if sure > 0.5 else 1 - number % 2}
            found[-1]["scores"] = {w: found[-1]["scores"][LABELS[(n + number) % 2]] for n, w in enumerate(LABELS)}
        return found

    cells: list[dict[str, Any]] = [{"row": "as it is", "flags": {"method": "zero-shot"}, "predictions": said(0.72)}]
    for n in range(rows - 1):
        rank = 2 ** (n + 1)
        losses = [
            0.22 + 0.05 * (3 - n) ** 2 / 9 + 1.2 * math.exp(-step / (12 + 4 * n)) + abs(rng.gauss(0, 0.05))
            for step in range(steps)
        ]
        cell = {"row": f"LoRA r={rank}", "losses": losses, "trainable": 80_640 * rank}
        cells.append({**cell, "predictions": said(0.79 + 0.02 * n)})
    compared(folder, cells)
    for number in range(1, rows):
        path = folder / f"cell-{number}" / "run" / "metrics.jsonl"
        losses = [json.loads(line)["train_loss"] for line in path.read_text().splitlines()]
        write(path, metrics(losses, every=steps // 10, worse=0.04))
        changed = json.loads((path.parent / "run.json").read_text())
        changed["results"]["seconds"] = 100.0 + 40 * number
        write(path.parent / "run.json", changed)
    return folder
