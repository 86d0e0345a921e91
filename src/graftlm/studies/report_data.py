"""Folders -> the runs that `graft report` shows: what training took, its curves, the answers on the test split.

    RUN/                         a run folder: run.json, metrics.jsonl, and what `graft evaluate --predictions` wrote:
      test-best.jsonl              test-last.jsonl likewise; both may be missing
    COMPARED/                    a folder of `graft compare`: sweep.json names its cells
      {cell}/run/                  a run folder
      {cell}/test-best.jsonl       its predictions lie beside it; test-.jsonl for a base model as it is

What is unusual here: a run need not be over. One that is at work, was killed or failed is shown as far as it came. What
a file holds is checked as it is read, and accuracies are counted from the predictions, never copied.

Left out: predictions under other names. No torch.
"""

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from graftlm.config.renamed import upgrade_run
from graftlm.errors import InputError
from graftlm.files.formats import read_json
from graftlm.inference.metrics import GARBAGE, confusion, wilson
from graftlm.studies.results_table import FAILED
from graftlm.studies.sweep import ZERO_SHOT

MetricsRow = dict[str, Any]
CHECKPOINTS = ("best", "last", "")
RECORD = {"base", "config", "data", "results", "template", "total", "trainable"}  # what a run.json must have


# What there is --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predictions:
    """What one checkpoint said to the N examples of the test split; L labels."""

    checkpoint: str
    """"best", "last", or "" for a base model as it is."""
    labels: list[str]
    texts: list[str]
    true: list[int]
    predicted: list[int]
    """Label numbers, -1 for garbage."""
    garbage: list[bool] | None
    """Whether the generated text names no label; None where no text was generated."""
    scores: list[list[float]] | None
    """[N, L], each label's log-probability; None where they were not read."""

    @property
    def right(self) -> int:
        """How many labels were told."""
        return sum(t == p for t, p in zip(self.true, self.predicted, strict=True))

    @property
    def accuracy(self) -> float:
        """Right over N."""
        return self.right / len(self.true)

    @property
    def interval(self) -> tuple[float, float]:
        """The accuracy's 95% Wilson interval."""
        return wilson(self.right, len(self.true))

    @property
    def garbage_rate(self) -> float | None:
        """The share of generated texts that name no label."""
        return None if self.garbage is None else sum(self.garbage) / len(self.garbage)

    @property
    def confusion(self) -> list[list[int]]:
        """A row for each true label; a column for each predicted one, and garbage last."""
        return confusion(self.true, self.predicted, len(self.labels))

    def word(self, number: int) -> str:
        """A label's word."""
        return "garbage" if number == GARBAGE else self.labels[number]


@dataclass(frozen=True)
class Run:
    """One run, or a base model as it is."""

    name: str
    folder: Path
    """The run folder; for a base model as it is, the comparison's cell."""
    record: Mapping[str, Any]
    """run.json; empty where nothing was trained."""
    metrics: Sequence[MetricsRow]
    answers: Sequence[Predictions]
    note: str = ""
    """Why there is no more than this."""
    command: str = ""
    """What would make the predictions that are missing."""

    @cached_property
    def figures(self) -> MetricsRow:
        """What training took: steps, seconds, planned (seconds), examples_per_s, peak_mb, trainable, share; or None."""
        file, untrained = self.folder / "run.json", not self.record and bool(self.answers)
        results = self.record.get("results") or {}
        last = self.metrics[-1] if self.metrics else {}
        plan = self.record.get("plan") or {}
        planned = [_number(file, plan, f"{part}_seconds") for part in ("train", "validation")]
        trained, total = (_number(file, self.record, name) for name in ("trainable", "total"))
        memory = "peak_cuda_mb" if results.get("peak_cuda_mb") or last.get("peak_cuda_mb") else "peak_rss_mb"
        got = {name: _number(file, results or last, name) for name in ("steps", "seconds", memory)}
        return {
            "steps": got["steps"] if results else last.get("step"),
            "seconds": 0.0 if untrained else got["seconds"],
            "planned": sum(p for p in planned if p is not None) if None not in planned else None,
            "examples_per_s": _number(file, results, "examples_per_s"),
            "peak_mb": got[memory],
            "trainable": 0 if untrained else trained,
            "share": 0.0 if untrained else trained / total if trained is not None and total else None,
        }

    def val_loss(self, checkpoint: str) -> float | None:
        """The validation loss at a checkpoint; of a run that is not over, the newest or the lowest so far."""
        point = (self.record.get("results") or {}).get(checkpoint or "best")
        if isinstance(point, dict):
            return _number(self.folder / "run.json", point, "val_loss")
        losses = [row["val_loss"] for row in self.metrics if row.get("val_loss") is not None]
        return None if not losses else losses[-1] if checkpoint == "last" else min(losses)

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, value) wherever `name` was measured."""
        return [(row["step"], row[name]) for row in self.metrics if row.get(name) is not None]


def all_predictions(runs: Sequence[Run]) -> list[tuple[int, str, Predictions]]:
    """Each run's number, a name that tells its checkpoints apart, and its answers."""
    return [(number, run_name(run, a), a) for number, run in enumerate(runs) for a in run.answers]


def run_name(run: Run, answers: Predictions | None) -> str:
    """A run's name, and the checkpoint where it needs telling."""
    several = len(run.answers) > 1 or (answers is not None and answers.checkpoint == "last")
    return f"{run.name} ({answers.checkpoint})" if answers is not None and several else run.name


# Reading --------------------------------------------------------------------------------------------------------------


def read_folders(folders: Sequence[str]) -> list[Run]:
    """The runs of all folders, in order, each once, under names that tell them apart.

    Raises InputError that names the folder or the file, and the line in it.
    """
    found: dict[Path, Run] = {}
    for run in (run for folder in folders for run in _read_folder(Path(folder))):
        found.setdefault(run.folder.resolve(), run)
    runs = list(found.values())
    if not any(run.record or run.answers for run in runs):
        raise InputError(f"{', '.join(folders)}: no run there has begun: there is nothing to show")
    return _told_apart(runs)


def _read_folder(folder: Path) -> list[Run]:
    if (folder / "run.json").is_file():
        return [_run(folder.resolve().name, folder, folder)]
    if (folder / "sweep.json").is_file():
        return _compared(folder)
    if not folder.exists():
        raise InputError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a run folder")
    raise InputError(
        f"{folder}: holds no run (no run.json) and no comparison (no sweep.json): name the out_dir of graft train "
        "or of graft compare"
    )


def _compared(folder: Path) -> list[Run]:
    """The cells of a comparison, in its order."""
    sweep = read_json(folder / "sweep.json")
    cells = sweep.get("cells") if isinstance(sweep, dict) else None
    if not isinstance(cells, list) or not all(map(_is_cell, cells)):
        raise InputError(f"{folder / 'sweep.json'}: lists no cells: give the graft compare command again")
    seeds = Counter(cell["row"] for cell in cells)
    runs = []
    for cell in cells:
        name = cell["row"] if seeds[cell["row"]] == 1 else f"{cell['row']}, seed {cell['flags'].get('seed', 0)}"
        at, trains = folder / cell["folder"], cell["flags"].get("method") != ZERO_SHOT
        if trains and (at / "run" / "run.json").is_file():
            run = _run(name, at / "run", at)
        else:
            run = Run(name, at / "run" if trains else at, {}, (), _all_answers(at, {}))
        failed = at / FAILED
        if failed.is_file():
            run = replace(run, note=f"failed: {_reason(failed)}")
        elif not run.answers:
            run = replace(run, note=run.note or "not measured yet")
        runs.append(replace(run, command=""))  # the comparison itself goes on where it stopped
    return runs


def _is_cell(cell: Any) -> bool:
    if not isinstance(cell, dict) or not isinstance(cell.get("flags"), dict):
        return False
    folder = cell.get("folder")
    return isinstance(cell.get("row"), str) and isinstance(folder, str) and Path(folder).name == folder


def _reason(path: Path) -> str:
    failed = read_json(path)
    return str(failed.get("reason")) if isinstance(failed, dict) else "for no reason that was written down"


def _run(name: str, folder: Path, beside: Path) -> Run:
    """A run folder with the predictions that lie in `beside`."""
    file = folder / "run.json"
    record = read_json(file)
    if not isinstance(record, dict) or not record.keys() >= RECORD or not _is_record(record):
        raise InputError(f"{file}: is no record of a run; restore it, or leave {folder} out")
    record = upgrade_run(record)
    metrics, answers = _metrics(folder / "metrics.jsonl"), _all_answers(beside, record)
    run = Run(name, folder, record, metrics, answers)
    if record["results"] is None:
        at, end = metrics[-1]["step"] if metrics else 0, record["config"].get("max_iters")
        run = replace(run, note=f"not finished: step {at:,}" + (f" of {end:,}" if isinstance(end, int) else ""))
    if not answers:
        place = shlex.quote(str(folder)), shlex.quote(str(folder / "test-best.jsonl"))
        run = replace(run, command=f"graft evaluate --out_dir {place[0]} --predictions {place[1]}")
    _ = run.figures  # checked here, where the file is named
    return run


def _is_record(record: Mapping[str, Any]) -> bool:
    kinds = (("base", dict), ("config", dict), ("data", dict), ("template", dict), ("results", dict | None))
    return all(isinstance(record[name], kind) for name, kind in kinds)


def _number(where: Path | str, row: Mapping[str, Any], key: str) -> Any:
    """A finite number of a row, or None where it was not measured; an InputError for anything else."""
    value = row.get(key)
    if value is not None and (
        isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    ):
        raise InputError(f"{where}: {key} is not a number: restore the file, or leave the run out")
    return value


def _metrics(path: Path) -> list[MetricsRow]:
    rows = []
    for where, row in _lines(path, cut=True) if path.is_file() else ():
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise InputError(f"{where}: names no step: restore the file, or leave the run out")
        names = ("train_loss", "val_loss", "val_accuracy", "seconds", "peak_rss_mb", "peak_cuda_mb")
        rows.append({"step": row["step"], **{name: _number(where, row, name) for name in names}})
    return rows


def _lines(path: Path, *, cut: bool) -> Iterable[tuple[str, Any]]:
    """(where, value) of each line of a jsonl file; with `cut`, a half-written last line is left out."""
    try:
        lines = path.read_bytes().split(b"\n")  # and never at what else may count as the end of a line, such as U+0085
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or (cut and number == len(lines)):
            continue
        try:
            yield f"{path}, line {number}", json.loads(line.decode("utf-8"))
        except ValueError as error:  # what is no JSON, and what is no UTF-8
            raise InputError(f"{path}, line {number}: broken JSON: restore the file, or leave the run out") from error


def _all_answers(folder: Path, record: Mapping[str, Any]) -> list[Predictions]:
    """The predictions in the folder, checkpoint by checkpoint."""
    paths = [(checkpoint, folder / f"test-{checkpoint}.jsonl") for checkpoint in CHECKPOINTS]
    return [_answers(checkpoint, path, record) for checkpoint, path in paths if path.is_file()]


def _answers(checkpoint: str, path: Path, record: Mapping[str, Any]) -> Predictions:
    rows = list(_lines(path, cut=False))
    if not rows:
        raise InputError(f"{path}: holds no predictions: write it again with graft evaluate --predictions {path}")
    labels = _labels(path, rows, record)
    for where, row in rows:
        if problem := _wrong(row, labels, rows[0][1]):
            raise InputError(f"{where}: {problem}: write the file again with graft evaluate --predictions {path}")
    plain = [row for _, row in rows]
    return Predictions(
        checkpoint,
        labels,
        [row["text"] for row in plain],
        [row["label"] for row in plain],
        [row["predicted"] for row in plain],
        [bool(row.get("garbage")) for row in plain] if "generated" in plain[0] else None,
        [[row["scores"][label] for label in labels] for row in plain] if "scores" in plain[0] else None,
    )


def _labels(path: Path, rows: Sequence[tuple[str, Any]], record: Mapping[str, Any]) -> list[str]:
    """The label words by number: as they were scored, else as evaluate said or the run has them, else numbers."""
    first = rows[0][1]
    found = first.get("scores") if isinstance(first, dict) else None
    if not found and path.with_suffix(".json").is_file():
        said = read_json(path.with_suffix(".json"))
        reading = said.get("reading") if isinstance(said, dict) else None
        found = reading.get("labels") if isinstance(reading, dict) else None
    found = list(found or record.get("template", {}).get("labels") or ())
    if found and all(isinstance(word, str) for word in found):
        return found
    numbers = [row.get(key) for _, row in rows if isinstance(row, dict) for key in ("label", "predicted")]
    return [str(n) for n in range(1 + max((n for n in numbers if type(n) is int), default=0))]


def _wrong(row: Any, labels: Sequence[str], first: Any) -> str:
    """What is wrong with a row of predictions; empty where nothing is."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        return "no text"
    if type(row.get("label")) is not int or not 0 <= row["label"] < len(labels):
        return f"label is none of 0 to {len(labels) - 1}"
    if type(row.get("predicted")) is not int or not GARBAGE <= row["predicted"] < len(labels):
        return f"predicted is none of -1 to {len(labels) - 1}"
    if ("generated" in row, "scores" in row) != ("generated" in first, "scores" in first):
        return "read otherwise than the first line"
    if "scores" not in row:
        return ""
    if not isinstance(row["scores"], dict) or set(row["scores"]) != set(labels):
        return f"scores are not those of {', '.join(labels)}"
    numbers = [v for v in row["scores"].values() if isinstance(v, int | float) and not math.isnan(v)]
    return "" if len(numbers) == len(labels) and math.isfinite(max(numbers)) else "scores are not numbers"


def _told_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs of one name get their folder's name before it, or the whole path."""
    names = [run.name for run in runs]
    for longer in (lambda run: f"{_home(run).name}/{run.name}", lambda run: str(run.folder)):
        count = Counter(names)
        names = [longer(run) if count[name] > 1 else name for run, name in zip(runs, names, strict=True)]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _home(run: Run) -> Path:
    """The folder that a run's name does not tell: the comparison, or where the run folder lies."""
    folder = run.folder.resolve()
    return folder.parent.parent if folder.name == "run" else folder.parent
