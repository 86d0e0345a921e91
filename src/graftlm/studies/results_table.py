"""What a comparison's cells came to -> one row for each setting, with intervals and a paired test.

What is unusual here: everything is read back from the disk, from what `graft train` and `graft evaluate` left there, so
a table made after ten interruptions is the table of one quiet run.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median_low
from typing import Any

from graftlm.config.renamed import upgrade_run, upgrade_test
from graftlm.files.formats import read_json
from graftlm.inference.metrics import paired_permutation_test, t_interval
from graftlm.studies.sweep import Trial

FAILED = "failed.json"
COLUMNS = (
    *("row", "accuracy", "95% interval", "against the first", "validation loss", "trained", "steps"),
    *("minutes (planned)", "examples/s", "peak MB"),
)


@dataclass(frozen=True)
class CellResult:
    """What one cell came to at one checkpoint."""

    cell: Trial
    checkpoint: str
    folder: Path
    """The cell's folder."""
    reason: str = ""
    """Why there is nothing more; empty where all is there."""

    @property
    def reading(self) -> dict[str, Any]:
        """What `graft evaluate --json` said."""
        return read_test(self.folder / f"test-{self.checkpoint}.json")["reading"]

    @property
    def right(self) -> list[tuple[str, bool]]:
        """Each example's text, and whether its label was told."""
        lines = (self.folder / f"test-{self.checkpoint}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return [(row["text"], row["predicted"] == row["label"]) for row in rows]

    @property
    def run(self) -> dict[str, Any]:
        """The run's run.json; empty for a base model as it is."""
        return upgrade_run(read_json(self.folder / "run" / "run.json")) if self.cell.trains else {}


def read_test(path: Path) -> dict[str, Any]:
    """What `graft compare` wrote of an evaluation: {"eval_config", "reading"}."""
    return upgrade_test(read_json(path))


def make_rows(outcomes: Sequence[CellResult]) -> list[dict[str, Any]]:
    """One row for each setting and checkpoint; the first that came to something is what others are held against."""
    groups: dict[tuple[str, str], list[CellResult]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.cell.row, outcome.checkpoint), []).append(outcome)
    rows: list[dict[str, Any]] = []
    first: list[list[tuple[str, bool]]] | None = None
    for (name, checkpoint), group in groups.items():
        good = [outcome for outcome in group if not outcome.reason]
        row: dict[str, Any] = {"name": name, "checkpoint": checkpoint, "seeds": [o.cell.seed for o in good]}
        if reasons := [f"seed {o.cell.seed}: {o.reason}" for o in group if o.reason]:
            row["failed"] = reasons
        if good:
            right = [outcome.right for outcome in good]
            row |= _accuracy(good) | _cost(good)
            if first is None:
                first = right
            else:
                row |= _against(first, right)
        rows.append(row)
    return rows


def _accuracy(good: Sequence[CellResult]) -> dict[str, Any]:
    readings = [outcome.reading for outcome in good]
    accuracies = [reading["accuracy"] for reading in readings]
    several = len(good) > 1
    low, high = t_interval(accuracies) if several else (readings[0]["ci_low"], readings[0]["ci_high"])
    return {
        "n": readings[0]["n"],
        "accuracy": mean(accuracies),
        "ci_low": low,
        "ci_high": high,
        "interval": "t over seeds" if several else "Wilson over examples",
        "accuracy_per_seed": accuracies,
        "macro_f1": mean(reading["macro_f1"] for reading in readings),
        "garbage_rate": mean(reading["garbage_rate"] for reading in readings),
    }


def _cost(good: Sequence[CellResult]) -> dict[str, Any]:
    """What training took, the (lower) median of the seeds; None for a base model as it is."""
    names = ("steps", "seconds", "examples_per_s", "peak_rss_mb", "trainable", "trainable_fraction")
    if not good[0].cell.trains:
        return dict.fromkeys(("val_loss", "val_accuracy", *names, "predicted"))
    runs = [outcome.run for outcome in good]
    points = [run["results"][o.checkpoint] for run, o in zip(runs, good, strict=True)]
    accuracies = [point["val_accuracy"] for point in points]
    plans = [run["plan"] for run in runs]
    return {
        "val_loss": mean(point["val_loss"] for point in points),
        "val_accuracy": None if None in accuracies else mean(accuracies),
        **{name: median_low(run["results"][name] for run in runs) for name in names},
        "predicted": {
            "seconds": median_low(plan["train_seconds"] + plan["validation_seconds"] for plan in plans),
            "peak_rss_mb": median_low(plan["peak_rss_mb"] for plan in plans),
        },
    }


def _against(first: Sequence[Sequence[tuple[str, bool]]], own: Sequence[Sequence[tuple[str, bool]]]) -> dict[str, Any]:
    """The difference to the first row and its p-value, paired by example; over seeds, each example's mean counts.

    Nothing where the two rows read other examples.
    """
    if [text for text, _ in first[0]] != [text for text, _ in own[0]]:
        return {"delta_vs_baseline": None, "p": None}
    a, b = ([sum(right for _, right in examples) for examples in zip(*rows, strict=True)] for rows in (first, own))
    differences = [len(first) * y - len(own) * x for x, y in zip(a, b, strict=True)]
    return {
        "delta_vs_baseline": sum(differences) / (len(first) * len(own) * len(a)),
        "p": paired_permutation_test(differences),
    }


def format_row(row: Mapping[str, Any], checkpoints: bool) -> list[str]:
    """A row for a reader, under COLUMNS."""
    name = f"{row['name']} ({row['checkpoint']})" if checkpoints and row["checkpoint"] else row["name"]
    if len(row["seeds"]) > 1:
        name += f", {len(row['seeds'])} seeds"
    if "accuracy" not in row:
        return [name, "failed", *[""] * (len(COLUMNS) - 2)]
    against = "" if row.get("p") is None else f"{100 * row['delta_vs_baseline']:+.1f}, p = {row['p']:.2g}"
    cells = [name, f"{100 * row['accuracy']:.1f}%", f"{100 * row['ci_low']:.1f} to {100 * row['ci_high']:.1f}", against]
    if row["steps"] is None:
        return [*cells, *[""] * (len(COLUMNS) - len(cells))]
    return [
        *cells,
        f"{row['val_loss']:.3f}",
        f"{row['trainable']:,} ({row['trainable_fraction']:.2%})",
        f"{row['steps']:g}",
        f"{row['seconds'] / 60:.1f} ({row['predicted']['seconds'] / 60:.1f})",
        f"{row['examples_per_s']:.1f}",
        f"{row['peak_rss_mb']:,.0f}",
    ]


def failures(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every failure, one line each."""
    return [f"{row['name']}, {reason}" for row in rows for reason in row.get("failed", [])]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown, and what failed below it."""
    several = len({row["checkpoint"] for row in rows if row["checkpoint"]}) > 1
    lines = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)], *(format_row(row, several) for row in rows)]
    table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    failed = "".join(f"- {line}\n" for line in dict.fromkeys(failures(rows)))
    return table + "\n" + (f"\nFailed:\n\n{failed}" if failed else "")
