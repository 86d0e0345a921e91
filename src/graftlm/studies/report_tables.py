"""The tables of results of `graft report`: one for each set of examples, as only the same examples can be compared.

Columns are the settings in which the runs differ, then what was measured. Does not import torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.studies.report_data import Predictions, Run

COLUMNS = (
    *("accuracy", "95% interval", "by generated text", "macro F1", "garbage", "validation loss", "trainable", "steps"),
    *("minutes (predicted)", "examples/s", "peak MB"),
)
NOT_SHOWN = {"out_dir", "resume", "plan", "wandb_project", "tensorboard", "max_iters"}
"""Flags that are no column, although runs differ in them; the steps are one anyway."""
MAX_SETTING = 40  # characters
Member = tuple[int, str, Predictions]
"""The run's number, its name with what distinguishes the predictions, and the predictions."""
Cell = tuple[str, Any]
"""A text, and the value to sort by."""


def all_predictions(runs: Sequence[Run]) -> list[Member]:
    """The predictions of all runs."""
    return [(number, run.name_of(p), p) for number, run in enumerate(runs) for p in run.predictions]


@dataclass(frozen=True)
class ExampleSet:
    """Predictions for the same examples."""

    members: list[Member]

    @property
    def caption(self) -> str:
        """How many examples, and of which data."""
        count = f"{len(self.members[0][2].true):,}"
        source = next((p.source for _, _, p in self.members if p.source), "")
        return f"{count} examples of {source}" if source else f"{count} test examples"


def example_sets(runs: Sequence[Run]) -> list[ExampleSet]:
    """The predictions by their examples: those with most predictions first, then those with most examples."""
    found: dict[tuple[tuple[str, str], ...], ExampleSet] = {}
    for member in all_predictions(runs):
        found.setdefault(member[2].examples, ExampleSet([])).members.append(member)
    return sorted(found.values(), key=lambda each: (-len(each.members), -len(each.members[0][2].true)))


@dataclass(frozen=True)
class Table:
    """A table of results."""

    caption: str
    columns: list[str]
    rows: list[tuple[str, str, list[Cell | None]]]
    """Name, note, and a cell for each column."""


def results_tables(runs: Sequence[Run], sets: Sequence[ExampleSet]) -> list[Table]:
    """A table for each set; the first also has the runs without predictions. Empty columns are left out."""
    settings = differing_settings(runs)
    tables = []
    for number, each in enumerate(sets or [ExampleSet([])]):
        members: list[tuple[int, str, Predictions | None]] = [*each.members]
        if number == 0:
            members += [(i, run.name, None) for i, run in enumerate(runs) if not run.predictions]
        cells = [(i, name, p, settings[i] | _cells(runs[i], p)) for i, name, p in sorted(members, key=lambda m: m[0])]
        own = [key for _, _, p in each.members for key in p.own_metrics]
        order = dict.fromkeys((*(key for flags in settings for key in flags), *COLUMNS[:4], *own, *COLUMNS[4:]))
        columns = [name for name in order if any(name in row for *_, row in cells)]
        rows = []
        for i, name, p, row in cells:
            notes = [note for note in (runs[i].note, p.note if p else "") if note]
            rows.append((name, "; ".join(notes), [row.get(column) for column in columns]))
        tables.append(Table(f"Results on {each.caption}" if each.members else "Results", columns, rows))
    return tables


def differing_settings(runs: Sequence[Run]) -> list[dict[str, Cell]]:
    """Each run's flags in which the trained runs differ; none for a base model."""
    configs = [
        {**run.manifest["config"], "method": run.manifest["method"]["method"]} if run.manifest else {} for run in runs
    ]
    trained = [config for config in configs if config]
    common = [key for key in (trained[0] if trained else ()) if all(key in config for config in trained)]
    differing = [key for key in common if key not in NOT_SHOWN and len({repr(config[key]) for config in trained}) > 1]
    return [{key: _setting(config[key]) for key in differing if config} for config in configs]


def _setting(value: Any) -> Cell:
    text = "none" if value in (None, "") else f"{value:g}" if isinstance(value, float) else str(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return text if len(text) <= MAX_SETTING else f"{text[: MAX_SETTING - 1]}…", value if is_number else text


def _cells(run: Run, p: Predictions | None) -> dict[str, Cell]:
    """What is known of a row, by column."""
    cost, cells = run.cost, dict[str, Cell]()
    if p is not None:
        low, high = p.interval
        cells["accuracy"] = (f"{p.accuracy:.1%}", p.accuracy)
        cells["95% interval"] = (f"{100 * low:.1f} to {100 * high:.1f}", low)
        cells["macro F1"] = (f"{p.macro_f1:.3f}", p.macro_f1)
        cells |= {name: (f"{value:.3f}", value) for name, value in p.own_metrics.items()}
        if p.generated_accuracy is not None:
            cells["by generated text"] = (f"{p.generated_accuracy:.1%}", p.generated_accuracy)
        if p.garbage_rate is not None:
            cells["garbage"] = (f"{p.garbage_rate:.1%}", p.garbage_rate)
    if (loss := run.val_losses[(p and p.checkpoint) or "best"] if run.manifest else None) is not None:
        cells["validation loss"] = (f"{loss:.3f}", loss)
    if (trainable := cost["trainable"]) is not None:
        cells["trainable"] = (f"{trainable:,} ({cost['trainable_fraction']:.2%})", trainable)
    if (minutes := cost["minutes"]) is not None:
        predicted = "" if (plan := cost["predicted_minutes"]) is None else f" ({plan:.1f})"
        cells["minutes (predicted)"] = (f"{minutes:.1f}{predicted}", minutes)
    for key, column, spec in (
        ("steps", "steps", ","),
        ("examples_per_s", "examples/s", ".1f"),
        ("peak_mb", "peak MB", ",.0f"),
    ):
        if (value := cost[key]) is not None:
            cells[column] = (format(value, spec), value)
    return cells
