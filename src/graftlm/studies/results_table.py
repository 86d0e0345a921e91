"""The results of a comparison's trials as a table: a row per setting, with intervals and a paired test.

Everything is read from the files that `graft train` and `graft evaluate` wrote. So the table of an interrupted and
resumed comparison equals that of an uninterrupted one.
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
    *("row", "accuracy", "95% interval", "vs. the first row", "validation loss", "trainable", "steps"),
    *("minutes (predicted)", "examples/s", "peak MB"),
)
DROP = ("peak MB", "examples/s", "steps", "trainable", "minutes (predicted)", "vs. the first row")
"""Columns that a narrow window leaves out, the first one first."""
COSTS = ("steps", "seconds", "examples_per_s", "peak_rss_mb", "trainable", "trainable_fraction")


@dataclass(frozen=True)
class TrialResult:
    """The result of one trial at one checkpoint."""

    trial: Trial
    checkpoint: str
    folder: Path
    """The trial's folder."""
    error: str = ""
    """Why there is no result; empty if there is one."""

    @property
    def metrics(self) -> dict[str, Any]:
        """The JSON object of `graft evaluate --json`."""
        return self._test["reading"]

    @property
    def predictions(self) -> list[dict[str, Any]]:
        """The rows of the predictions file, one for each example."""
        # Older comparisons have the predictions of all trials in the trial's folder.
        file = self.folder / self._test.get("predictions", f"test-{self.checkpoint}.jsonl")
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    @property
    def correct(self) -> list[tuple[str, bool]]:
        """The text of each example, and whether its predicted label is correct."""
        return [(row["text"], row["predicted"] == row["label"]) for row in self.predictions]

    @property
    def _test(self) -> dict[str, Any]:
        return read_test(self.folder / f"test-{self.checkpoint}.json")

    @property
    def run(self) -> dict[str, Any]:
        """The trial's run.json; empty for zero-shot."""
        return upgrade_run(read_json(self.folder / "run" / "run.json")) if self.trial.trains else {}


def read_test(path: Path) -> dict[str, Any]:
    """The test-*.json of a trial: {"eval_config", "predictions", "reading"}."""
    return upgrade_test(read_json(path))


def make_rows(results: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """A row per setting and checkpoint; the first row with a result is the baseline of the others."""
    groups: dict[tuple[str, str], list[TrialResult]] = {}
    for result in results:
        groups.setdefault((result.trial.row, result.checkpoint), []).append(result)
    rows: list[dict[str, Any]] = []
    baseline: list[list[tuple[str, bool]]] = []
    for (name, checkpoint), group in groups.items():
        done = [result for result in group if not result.error]
        row: dict[str, Any] = {"name": name, "checkpoint": checkpoint, "seeds": [r.trial.seed for r in done]}
        if errors := [f"seed {r.trial.seed}: {r.error}" for r in group if r.error]:
            row["failed"] = errors
        if done:
            correct = [result.correct for result in done]
            row |= _accuracy(done) | _cost(done) | (_vs_baseline(baseline, correct) if baseline else {})
            baseline = baseline or correct
        rows.append(row)
    return rows


def _accuracy(done: Sequence[TrialResult]) -> dict[str, Any]:
    metrics = [result.metrics for result in done]
    accuracies = [each["accuracy"] for each in metrics]
    multiple_seeds = len(done) > 1
    low, high = t_interval(accuracies) if multiple_seeds else (metrics[0]["ci_low"], metrics[0]["ci_high"])
    return {
        "n": metrics[0]["n"],
        "accuracy": mean(accuracies),
        "ci_low": low,
        "ci_high": high,
        "interval": "t over seeds" if multiple_seeds else "Wilson over examples",
        "accuracy_per_seed": accuracies,
        "macro_f1": mean(each["macro_f1"] for each in metrics),
        "garbage_rate": mean(each["garbage_rate"] for each in metrics),
    }


def _cost(done: Sequence[TrialResult]) -> dict[str, Any]:
    """The cost of training, the (lower) median over seeds, of memory the largest; None for zero-shot.

    A run that was resumed reports the memory of its last process, which may be less than it took.
    """
    if not done[0].trial.trains:
        return dict.fromkeys(("val_loss", "val_accuracy", *COSTS, "predicted"))
    runs = [result.run for result in done]
    points = [run["results"][result.checkpoint] for run, result in zip(runs, done, strict=True)]
    accuracies = [point["val_accuracy"] for point in points]
    plans = [run["plan"] for run in runs]
    return {
        "val_loss": mean(point["val_loss"] for point in points),
        "val_accuracy": None if None in accuracies else mean(accuracies),
        **{name: median_low(run["results"][name] for run in runs) for name in COSTS},
        "peak_rss_mb": max(run["results"]["peak_rss_mb"] for run in runs),
        "predicted": {
            "seconds": median_low(plan["train_seconds"] + plan["validation_seconds"] for plan in plans),
            "peak_rss_mb": median_low(plan["peak_rss_mb"] for plan in plans),
        },
    }


def _vs_baseline(
    baseline: Sequence[Sequence[tuple[str, bool]]], own: Sequence[Sequence[tuple[str, bool]]]
) -> dict[str, Any]:
    """The difference of accuracies and its p-value, paired by example (over seeds: by an example's mean).

    None if the two rows have different examples.
    """
    if [text for text, _ in baseline[0]] != [text for text, _ in own[0]]:
        return {"delta_vs_baseline": None, "p": None}
    a, b = ([sum(correct for _, correct in seeds) for seeds in zip(*rows, strict=True)] for rows in (baseline, own))
    differences = [len(baseline) * y - len(own) * x for x, y in zip(a, b, strict=True)]
    return {
        "delta_vs_baseline": sum(differences) / (len(baseline) * len(own) * len(a)),
        "p": paired_permutation_test(differences),
    }


def format_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The rows as text, for COLUMNS; names contain the checkpoint and the number of seeds if these differ from 1."""
    checkpoints = len({row["checkpoint"] for row in rows if row["checkpoint"]}) > 1
    seeds = any(len(row["seeds"]) > 1 for row in rows)
    return [_format_row(row, checkpoints, seeds) for row in rows]


def _format_row(row: Mapping[str, Any], checkpoints: bool, seeds: bool) -> list[str]:
    name, count = row["name"], len(row["seeds"])
    if row["checkpoint"]:  # a row that is trained
        name += f" ({row['checkpoint']})" * checkpoints + f", {count} seed{'s' * (count > 1)}" * (seeds and count > 0)
    cells = [name]
    if "accuracy" not in row:
        cells.append("failed")
    else:
        delta = "" if row.get("p") is None else f"{100 * row['delta_vs_baseline']:+.1f}, p = {row['p']:.2g}"
        cells += [f"{row['accuracy']:.1%}", f"{100 * row['ci_low']:.1f} to {100 * row['ci_high']:.1f}", delta]
    if row.get("steps") is not None:
        timed = row["seconds"] is not None
        cells += [
            f"{row['val_loss']:.3f}",
            f"{row['trainable']:,} ({row['trainable_fraction']:.2%})",
            f"{row['steps']:g}",
            f"{row['seconds'] / 60:.1f} ({row['predicted']['seconds'] / 60:.1f})" if timed else "",
            f"{row['examples_per_s']:.1f}" if timed else "",
            f"{row['peak_rss_mb']:,.0f}",
        ]
    return cells + [""] * (len(COLUMNS) - len(cells))


def failures(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every failure in one line, without duplicates (a trial fails at all of its checkpoints)."""
    return list(dict.fromkeys(f"{row['name']}, {error}" for row in rows for error in row.get("failed", [])))


def markdown(rows: Sequence[Mapping[str, Any]], more: Mapping[str, Sequence[str]] | None = None) -> str:
    """The table in Markdown, with a list of failures below it. more: further columns, a cell for each row."""
    more = more or {}
    cells = [[*row, *(column[i] for column in more.values())] for i, row in enumerate(format_rows(rows))]
    head = [*COLUMNS, *more]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *cells]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    table = "".join(f"| {' | '.join(line)} |\n" for line in escaped)
    failed = "".join(f"- {line}\n" for line in failures(rows))
    return table + (f"\nFailed:\n\n{failed}" if failed else "")
