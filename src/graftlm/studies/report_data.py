"""Reads the runs that `graft report` shows: training cost, curves, and predictions on the test split.

    RUN/                         a run folder: run.json, metrics.jsonl, and the files of `graft evaluate --predictions`:
      test-best.jsonl              test-last.jsonl likewise; both may be missing
    COMPARISON/                  a folder of `graft compare`: sweep.json lists its trials
      {trial}/run/                 a run folder
      {trial}/test-best.jsonl      its predictions; test-.jsonl for the base model (zero-shot)

A run need not be finished: one that is running, was killed or failed is shown up to its last step. Every file is
validated as it is read. Accuracies are computed from the predictions. Does not import torch.
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

CHECKPOINTS = ("best", "last", "")
MANIFEST_TYPES = {
    **dict.fromkeys(("base", "config", "data", "template"), dict),
    **{"results": dict | None, "total": object, "trainable": object},
}
METRICS = ("train_loss", "val_loss", "val_accuracy", "seconds", "peak_rss_mb", "peak_cuda_mb")
RESTORE = "restore the file, or leave the run out"


@dataclass(frozen=True)
class Predictions:
    """A checkpoint's predictions for the N examples of the test split, with L labels."""

    checkpoint: str
    """"best", "last", or "" for the base model (zero-shot)."""
    labels: list[str]
    texts: list[str]
    true: list[int]
    predicted: list[int]
    """Label numbers; -1 for garbage."""
    garbage: list[bool] | None
    """Whether the generated text contains no label; None if no text was generated."""
    scores: list[list[float]] | None
    """[N, L], log-probabilities of the labels; None if they were not computed."""

    @property
    def num_correct(self) -> int:
        """The number of correct predictions."""
        return sum(t == p for t, p in zip(self.true, self.predicted, strict=True))

    @property
    def accuracy(self) -> float:
        """num_correct / N."""
        return self.num_correct / len(self.true)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% Wilson interval of the accuracy."""
        return wilson(self.num_correct, len(self.true))

    @property
    def garbage_rate(self) -> float | None:
        """The fraction of generated texts that contain no label."""
        return None if self.garbage is None else sum(self.garbage) / len(self.garbage)

    @property
    def confusion(self) -> list[list[int]]:
        """[L, L + 1]: a row per true label, a column per predicted label, garbage last."""
        return confusion(self.true, self.predicted, len(self.labels))

    def label(self, number: int) -> str:
        """The label word of a label number."""
        return "garbage" if number == GARBAGE else self.labels[number]


@dataclass(frozen=True)
class Run:
    """A training run, or the base model (zero-shot)."""

    name: str
    folder: Path
    """The run folder; for zero-shot the trial's folder in the comparison."""
    manifest: Mapping[str, Any]
    """run.json; empty for zero-shot."""
    metrics: Sequence[dict[str, Any]]
    predictions: Sequence[Predictions]
    note: str = ""
    """Why the run is incomplete."""
    command: str = ""
    """The command that writes the missing predictions."""

    @cached_property
    def cost(self) -> dict[str, Any]:
        """steps, minutes, predicted_minutes, examples_per_s, peak_mb, trainable, trainable_fraction; None if unknown.

        Raises InputError for a value that is not a number.
        """
        file, zero_shot = self.folder / "run.json", not self.manifest and bool(self.predictions)
        results, last = self.manifest.get("results") or {}, self.metrics[-1] if self.metrics else {}
        plan = self.manifest.get("plan") or {}
        predicted = [_number(file, plan, f"{part}_seconds") for part in ("train", "validation")]
        trainable, total = (_number(file, self.manifest, name) for name in ("trainable", "total"))
        memory = "peak_cuda_mb" if results.get("peak_cuda_mb") or last.get("peak_cuda_mb") else "peak_rss_mb"
        measured = {name: _number(file, results or last, name) for name in ("steps", "seconds", memory)}
        seconds = 0.0 if zero_shot else measured["seconds"]
        return {
            "steps": measured["steps"] if results else last.get("step"),
            "minutes": None if seconds is None else seconds / 60,
            "predicted_minutes": None if None in predicted else sum(predicted) / 60,
            "examples_per_s": _number(file, results, "examples_per_s"),
            "peak_mb": measured[memory],
            "trainable": 0 if zero_shot else trainable,
            "trainable_fraction": 0.0 if zero_shot else trainable / total if trainable is not None and total else None,
        }

    def val_loss(self, checkpoint: str) -> float | None:
        """The validation loss of a checkpoint; of an unfinished run the last or the lowest so far."""
        point = (self.manifest.get("results") or {}).get(checkpoint or "best")
        if isinstance(point, dict):
            return _number(self.folder / "run.json", point, "val_loss")
        losses = [loss for _, loss in self.curve("val_loss")]
        return None if not losses else losses[-1] if checkpoint == "last" else min(losses)

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every step at which the metric was measured."""
        return [(row["step"], row[name]) for row in self.metrics if row.get(name) is not None]

    def name_of(self, predictions: Predictions | None) -> str:
        """The run's name, with the checkpoint if it is ambiguous."""
        ambiguous = len(self.predictions) > 1 or (predictions is not None and predictions.checkpoint == "last")
        return f"{self.name} ({predictions.checkpoint})" if predictions is not None and ambiguous else self.name


# Reading --------------------------------------------------------------------------------------------------------------


def read_folders(folders: Sequence[str]) -> list[Run]:
    """The runs of all folders in order, without duplicates and with distinct names.

    Raises InputError that names the folder, or the file and line.
    """
    runs: dict[Path, Run] = {}
    for run in (run for folder in folders for run in _read_folder(Path(folder))):
        runs.setdefault(run.folder.resolve(), run)
    if not any(run.manifest or run.predictions for run in runs.values()):
        raise InputError(f"{', '.join(folders)}: no run has started yet: there is nothing to show")
    return _with_distinct_names(list(runs.values()))


def _read_folder(folder: Path) -> list[Run]:
    if (folder / "run.json").is_file():
        return [_read_run(folder.resolve().name, folder, folder)]
    if (folder / "sweep.json").is_file():
        return _read_comparison(folder)
    if not folder.exists():
        raise InputError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a run folder")
    raise InputError(f"{folder}: has no run.json or sweep.json: name the out_dir of graft train or of graft compare")


def _read_comparison(folder: Path) -> list[Run]:
    """The trials of a comparison, in the order of its sweep file."""
    sweep = read_json(folder / "sweep.json")
    trials = sweep.get("cells") if isinstance(sweep, dict) else None
    if not isinstance(trials, list) or not all(map(_is_trial, trials)):
        raise InputError(f"{folder / 'sweep.json'}: lists no trials: run the graft compare command again")
    seeds = Counter(trial["row"] for trial in trials)
    runs = []
    for trial in trials:
        name = trial["row"] if seeds[trial["row"]] == 1 else f"{trial['row']}, seed {trial['flags'].get('seed', 0)}"
        path, trains = folder / trial["folder"], trial["flags"].get("method") != ZERO_SHOT
        if trains and (path / "run" / "run.json").is_file():
            run = _read_run(name, path / "run", path)
        else:
            run = Run(name, path / "run" if trains else path, {}, (), _read_predictions(path, {}))
        if (path / FAILED).is_file():
            failure = read_json(path / FAILED)
            reason = failure.get("reason") if isinstance(failure, dict) else "unknown reason"
            run = replace(run, note=f"failed: {reason}")
        elif not run.predictions:
            run = replace(run, note=run.note or "not evaluated yet")
        runs.append(replace(run, command=""))  # graft compare itself resumes it
    return runs


def _is_trial(trial: Any) -> bool:
    if not isinstance(trial, dict) or not isinstance(trial.get("flags"), dict):
        return False
    folder = trial.get("folder")
    return isinstance(trial.get("row"), str) and isinstance(folder, str) and Path(folder).name == folder


def _read_run(name: str, folder: Path, predictions_dir: Path) -> Run:
    file = folder / "run.json"
    manifest = read_json(file)
    if not isinstance(manifest, dict) or not all(
        key in manifest and isinstance(manifest[key], kind) for key, kind in MANIFEST_TYPES.items()
    ):
        raise InputError(f"{file}: is not the run.json of a run; restore it, or leave {folder} out")
    manifest = upgrade_run(manifest)
    run = Run(name, folder, manifest, _read_metrics(folder), _read_predictions(predictions_dir, manifest))
    if manifest["results"] is None:
        step, end = run.metrics[-1]["step"] if run.metrics else 0, manifest["config"].get("max_iters")
        run = replace(run, note=f"not finished: step {step:,}" + (f" of {end:,}" if isinstance(end, int) else ""))
    if not run.predictions:
        out_dir, output = shlex.quote(str(folder)), shlex.quote(str(folder / "test-best.jsonl"))
        run = replace(run, command=f"graft evaluate --out_dir {out_dir} --predictions {output}")
    _ = run.cost  # validates the numbers while the file is known
    return run


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    rows = []
    content = _read_bytes(path).rpartition(b"\n")[0] if path.is_file() else b""  # without an incomplete last line
    for where, row in _parse_lines(path, content):
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise InputError(f"{where}: has no step: {RESTORE}")
        rows.append({"step": row["step"], **{name: _number(where, row, name) for name in METRICS}})
    return rows


def _number(where: Path | str, row: Mapping[str, Any], key: str) -> Any:
    """A finite number, or None if it was not measured. Raises InputError for anything else."""
    value = row.get(key)
    if value is not None and not _is_finite(value):
        raise InputError(f"{where}: {key} is not a number: {RESTORE}")
    return value


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from error


def _parse_lines(path: Path, content: bytes) -> Iterable[tuple[str, Any]]:
    """(place, value) for each line of a jsonl file. Only a line feed ends a line, not U+0085 or U+2028."""
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}, line {number}", json.loads(line.decode("utf-8"))
        except ValueError as error:  # not JSON, or not UTF-8
            raise InputError(f"{path}, line {number}: broken JSON: {RESTORE}") from error


def _read_predictions(folder: Path, manifest: Mapping[str, Any]) -> list[Predictions]:
    """The predictions of each checkpoint in the folder."""
    paths = {checkpoint: folder / f"test-{checkpoint}.jsonl" for checkpoint in CHECKPOINTS}
    return [_predictions(checkpoint, path, manifest) for checkpoint, path in paths.items() if path.is_file()]


def _predictions(checkpoint: str, path: Path, manifest: Mapping[str, Any]) -> Predictions:
    lines = list(_parse_lines(path, _read_bytes(path)))
    again = f"write the file again with graft evaluate --predictions {path}"
    if not lines:
        raise InputError(f"{path}: contains no predictions: {again}")
    rows = [row for _, row in lines]
    labels = _labels(path, rows, manifest)
    for where, row in lines:
        if problem := _row_problem(row, labels, rows[0]):
            raise InputError(f"{where}: {problem}: {again}")
    return Predictions(
        checkpoint,
        labels,
        [row["text"] for row in rows],
        [row["label"] for row in rows],
        [row["predicted"] for row in rows],
        garbage=[bool(row.get("garbage")) for row in rows] if "generated" in rows[0] else None,
        scores=[[row["scores"][label] for label in labels] for row in rows] if "scores" in rows[0] else None,
    )


def _labels(path: Path, rows: Sequence[Any], manifest: Mapping[str, Any]) -> list[str]:
    """The label words by label number: from the scores, the evaluation's JSON or the run; else the numbers."""
    labels = rows[0].get("scores") if isinstance(rows[0], dict) else None
    if not labels and path.with_suffix(".json").is_file():
        test = read_json(path.with_suffix(".json"))
        metrics = test.get("reading") if isinstance(test, dict) else None
        labels = metrics.get("labels") if isinstance(metrics, dict) else None
    labels = list(labels or manifest.get("template", {}).get("labels") or ())
    if labels and all(isinstance(word, str) for word in labels):
        return labels
    numbers = [row.get(key) for row in rows if isinstance(row, dict) for key in ("label", "predicted")]
    return [str(n) for n in range(1 + max((n for n in numbers if type(n) is int), default=0))]


def _row_problem(row: Any, labels: Sequence[str], first: Any) -> str:
    """What is wrong with a row of predictions; empty for a valid row."""
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        return "no text"
    for key, low in (("label", 0), ("predicted", GARBAGE)):
        if type(row.get(key)) is not int or not low <= row[key] < len(labels):
            return f"{key} is not from {low} to {len(labels) - 1}"
    if any((key in row) != (key in first) for key in ("generated", "scores")):
        return "has other fields than the first line"
    if "scores" not in row:
        return ""
    if not isinstance(row["scores"], dict) or set(row["scores"]) != set(labels):
        return f"scores are not those of {', '.join(labels)}"
    numbers = [v for v in row["scores"].values() if isinstance(v, int | float) and not math.isnan(v)]
    return "" if len(numbers) == len(labels) and math.isfinite(max(numbers)) else "scores are not numbers"


def _with_distinct_names(runs: Sequence[Run]) -> list[Run]:
    """Prefixes equal names with the parent folder's name, or replaces them by the path."""
    names = [run.name for run in runs]
    for longer in (lambda run: f"{_parent_dir(run).name}/{run.name}", lambda run: str(run.folder)):
        count = Counter(names)
        names = [longer(run) if count[name] > 1 else name for run, name in zip(runs, names, strict=True)]
    return [replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _parent_dir(run: Run) -> Path:
    """The comparison's folder, or the folder that contains the run folder."""
    folder = run.folder.resolve()
    return folder.parent.parent if folder.name == "run" else folder.parent
