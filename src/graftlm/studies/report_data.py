"""Reads the runs that `graft report` shows: training cost, curves, and predictions on the test split.

    RUN/                         a run folder: run.json, metrics.jsonl, and
      evaluations/                 what `graft evaluate` saved (inference/saved_evaluations.py)
      test-best.jsonl              predictions that were written by hand, as by version 0.1; test-last.jsonl likewise
    COMPARISON/                  a folder of `graft compare`: sweep.json lists its trials
      {trial}/run/                 a run folder
      {trial}/test-.jsonl          predictions of the base model (zero-shot); test-best.jsonl of an older run

A run need not be finished: one that is running, was killed or failed is shown up to its last step. A file that is not
as graft writes it is an error that names the file. Accuracies are computed from the predictions. Does not import torch.
"""

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from graftlm.config import TrainConfig
from graftlm.config.renamed import upgrade_run
from graftlm.errors import InputError
from graftlm.exchange.runs import checkpoint_step
from graftlm.files.formats import read_json
from graftlm.inference.metrics import GARBAGE, RESERVED, confusion, macro_f1, most_confused, wilson
from graftlm.inference.saved_evaluations import FOLDER, SavedEvaluation, read_evaluations
from graftlm.studies.results_table import FAILED
from graftlm.studies.sweep import ZERO_SHOT

CHECKPOINTS = ("best", "last", "")  # of predictions that are written by hand, or by a comparison
METRICS = ("train_loss", "val_loss", "val_accuracy", "lr", "grad_norm", "seconds", "peak_rss_mb", "peak_cuda_mb")


@dataclass(frozen=True)
class Predictions:
    """A checkpoint's predictions for N examples, with L labels."""

    checkpoint: str
    """"best", "last", or "base"; "" for the base model of a comparison (zero-shot)."""
    labels: list[str]
    texts: list[str]
    true: list[int]
    predicted: list[int]
    """Label numbers; -1 for garbage."""
    garbage: list[bool] | None
    """Whether the generated text contains no label; None if no text was generated."""
    scores: list[list[float]] | None
    """[N, L], log-probabilities of the labels; None if they were not computed."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """See `SavedEvaluation.settings`; empty if they are not known."""
    generated_accuracy: float | None = None
    """The accuracy by generated text, where `predicted` is by scores."""
    own_metrics: Mapping[str, float] = field(default_factory=dict)
    """The values of the user's metrics."""
    note: str = ""
    """Why it is out of date."""

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

    @property
    def most_confused(self) -> list[tuple[str, str, int, float]]:
        """The most frequent mistakes: true and predicted label, count, and fraction of the true label's examples."""
        names = [*self.labels, "garbage"]
        return [(names[t], names[p], n, n / self.true.count(t)) for t, p, n in most_confused(self.confusion)]

    @property
    def source(self) -> str:
        """See `source_of`; empty if it is not known."""
        return source_of(self.settings) if self.settings else ""

    @property
    def macro_f1(self) -> float:
        """See `metrics.macro_f1`."""
        return macro_f1(self.confusion)

    @cached_property
    def examples(self) -> tuple[tuple[str, str], ...]:
        """Text and true label of each example: what must be equal for two evaluations to be compared."""
        return tuple(zip(self.texts, map(self.label, self.true), strict=True))

    def label(self, number: int) -> str:
        """The label word of a label number."""
        return "garbage" if number == GARBAGE else self.labels[number]


def source_of(settings: Mapping[str, Any]) -> str:
    """The data and the split of an evaluation, in words."""
    split = settings["split"]
    name = settings.get({"validation": "val_data", "test": "test_data"}.get(split, ""), settings["data"])
    return str(name) if split == "all" else f"{name}, {split} split"


@dataclass(frozen=True)
class Run:
    """A training run, or a base model."""

    name: str
    folder: Path
    """The run folder; of a base model the folder of its evaluations."""
    manifest: Mapping[str, Any]
    """run.json; empty for a base model."""
    metrics: Sequence[dict[str, Any]]
    predictions: Sequence[Predictions]
    documents: Sequence[SavedEvaluation] = ()
    """Evaluations on documents."""
    note: str = ""
    """Why the run is incomplete."""
    command: str = ""
    """The command that adds the predictions that are missing, of the run or of its base."""

    @cached_property
    def cost(self) -> dict[str, Any]:
        """The columns of the table of results; None for what is unknown."""
        if not self.manifest:
            zero = 0 if self.predictions else None
            unknown = dict.fromkeys(("steps", "predicted_minutes", "examples_per_s", "peak_mb"))
            return {**unknown, "minutes": zero, "trainable": zero, "trainable_fraction": zero}
        plan, last = self.manifest.get("plan"), self.metrics[-1] if self.metrics else {}
        results = self.manifest["results"] or {**last, "steps": last.get("step")}
        seconds, trainable = results.get("seconds"), self.manifest["trainable"]
        return {
            "steps": results["steps"],
            "minutes": None if seconds is None else seconds / 60,
            "predicted_minutes": (plan["train_seconds"] + plan["validation_seconds"]) / 60 if plan else None,
            "examples_per_s": results.get("examples_per_s"),
            "peak_mb": results.get("peak_cuda_mb") or results.get("peak_rss_mb"),
            "trainable": trainable,
            "trainable_fraction": trainable / self.manifest["total"],
        }

    @cached_property
    def val_losses(self) -> dict[str, float | None]:
        """The validation loss of each checkpoint; of an unfinished run the last or the lowest so far."""
        if results := self.manifest.get("results"):
            return {name: results[name]["val_loss"] if results[name] else None for name in ("best", "last")}
        losses = [loss for _, loss in self.curve("val_loss")]
        return {"best": min(losses, default=None), "last": losses[-1] if losses else None}

    @cached_property
    def facts(self) -> list[tuple[str, Any]]:
        """(leading words, value) for the page's introduction; None for what an imported run does not record."""
        manifest, known = self.manifest, self.manifest.get("versions", {})
        return [
            ("", manifest["base"]["name"]),
            ("on ", manifest["data"]["name"]),
            ("computed in ", f"{manifest['dtype']} on {manifest['device']}" if "dtype" in manifest else None),
            *((f"{name} ", known.get(key)) for name, key in (("graft", "graftlm"), ("torch", "torch"))),
            ("Python ", known.get("python")),
            ("", known.get("platform")),
        ]

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every step at which the metric was measured."""
        return [(row["step"], row[name]) for row in self.metrics if row[name] is not None]

    def name_of(self, predictions: Predictions | None) -> str:
        """The run's name, and what distinguishes these of its predictions: the checkpoint, and settings."""
        if predictions is None:
            return self.name
        own, parts = predictions.settings, []
        if predictions.checkpoint == "base":
            parts.append(f"{own['shots']} shots" if "shots" in own else "zero-shot")
        elif predictions.checkpoint == "last" or len({p.checkpoint for p in self.predictions}) > 1:
            parts.append(predictions.checkpoint)
        others = [p.settings for p in self.predictions if p.checkpoint == predictions.checkpoint]
        differing = [key for key in own if any(other.get(key) != own[key] for other in others)]
        parts += [f"{key} {own[key]}" for key in differing if key != "shots" or predictions.checkpoint != "base"]
        return f"{self.name} ({', '.join(parts)})" if parts else self.name


# Reading --------------------------------------------------------------------------------------------------------------


@contextmanager
def _reading(where: Path | str) -> Iterator[None]:
    """Anything unexpected in a file that graft has written becomes one InputError that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{where}: cannot read it: {error.strerror}") from error
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{where}: is not as graft wrote it: restore the file, or leave the run out") from error


def read_folders(folders: Sequence[str]) -> list[Run]:
    """The runs of all folders in order, without duplicates and with distinct names.

    Raises InputError that names the folder or the file.
    """
    runs: dict[Path, Run] = {}
    for run in (run for folder in folders for run in _read_folder(Path(folder))):
        runs.setdefault(run.folder.resolve(), run)
    if not any(run.manifest or run.predictions for run in runs.values()):
        raise InputError(f"{', '.join(folders)}: no run has started yet: there is nothing to show")
    distinct: list[Run] = []
    for run in runs.values():  # runs of one base may have evaluated it each
        if run.manifest or all((run.name, run.predictions) != (other.name, other.predictions) for other in distinct):
            distinct.append(run)
    return _with_distinct_names(distinct)


def _read_folder(folder: Path) -> list[Run]:
    if (folder / "run.json").is_file():
        return _read_run_folder(folder)
    if (folder / "sweep.json").is_file():
        with _reading(folder / "sweep.json"):
            return _read_comparison(folder)
    if not folder.exists():
        raise InputError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise InputError(f"{folder}: is a file; name a run folder")
    raise InputError(f"{folder}: has no run.json or sweep.json: name the out_dir of graft train or of graft compare")


def _read_run_folder(folder: Path) -> list[Run]:
    """The run, preceded by its base if that was evaluated."""
    trial = folder.resolve().parent  # in a comparison
    is_trial = folder.resolve().name == "run" and any(trial.glob("test-*.json*"))
    run = _read_run(trial.name if is_trial else folder.resolve().name, folder, trial if is_trial else folder)
    run, base = _with_saved(run)
    if not run.documents and not base and not is_trial:
        run = replace(run, command=_missing(run))
    name = Path(run.manifest["base"]["name"])
    base_run = Run(name.name if name.is_absolute() else str(name), folder / FOLDER, {}, (), base)
    return [base_run, run] if base else [run]


def _with_saved(run: Run) -> tuple[Run, list[Predictions]]:
    """The run with the evaluations in its folder, and those of its base."""
    with _reading(run.folder / FOLDER):
        saved = read_evaluations(run.folder)
        documents = [each for each in saved if "perplexity" in each.result]
        predictions = [_of_saved(each, run.folder, run.manifest) for each in saved if "perplexity" not in each.result]
    base = [p for p in predictions if p.checkpoint == "base"]
    own = [p for p in predictions if p.checkpoint != "base"]
    return replace(run, predictions=(*run.predictions, *own), documents=documents), base


def _missing(run: Run) -> str:
    """The command that evaluates a run, or its base as the run was evaluated."""
    words = ["graft", "evaluate", str(run.folder)]
    if run.predictions:
        settings = dict(run.predictions[0].settings)
        data, split = settings.get("data"), settings.pop("split", "test")
        if is_own := data in (None, run.manifest["config"].get("data", TrainConfig.data)):
            settings.pop("data", None)
        if split != ("test" if is_own or {"val_data", "test_data"} & settings.keys() else "all"):
            settings["split"] = split
        settings["checkpoint"] = "base"
        words += [f"--{flag}={str(value).lower() if value is True else value}" for flag, value in settings.items()]
    return shlex.join(words)


def _of_saved(saved: SavedEvaluation, folder: Path, manifest: Mapping[str, Any]) -> Predictions:
    checkpoint = saved.settings["checkpoint"]
    predictions = _predictions(checkpoint, saved.path.with_suffix(".jsonl"), manifest, saved.result.get("labels"))
    now = checkpoint_step(folder, checkpoint)
    stale = None not in (saved.step, now) and saved.step != now
    return replace(
        predictions,
        settings=saved.settings,
        generated_accuracy=saved.result["generate"]["accuracy"] if "generate" in saved.result else None,
        own_metrics={k: v for k, v in saved.result.items() if k not in RESERVED and isinstance(v, float)},
        note=f"of step {saved.step:,}; {checkpoint} is step {now:,} now: evaluate it again" if stale else "",
    )


def _read_comparison(folder: Path) -> list[Run]:
    """The trials of a comparison, in the order of its sweep file."""
    trials = read_json(folder / "sweep.json")["cells"]
    seeds = Counter(trial["row"] for trial in trials)
    runs = []
    for trial in trials:
        name = trial["row"] if seeds[trial["row"]] == 1 else f"{trial['row']}, seed {trial['flags'].get('seed', 0)}"
        path, trains = folder / trial["folder"], trial["flags"].get("method") != ZERO_SHOT
        if trains and (path / "run" / "run.json").is_file():
            run, _ = _with_saved(_read_run(name, path / "run", path))
        else:
            run = Run(name, path / "run" if trains else path, {}, (), _read_predictions(path, {}))
        if (path / FAILED).is_file():
            run = replace(run, note=f"failed: {read_json(path / FAILED)['reason']}")
        elif not run.predictions:
            run = replace(run, note=run.note or "not evaluated yet")
        runs.append(run)
    return runs


def _read_run(name: str, folder: Path, predictions_dir: Path) -> Run:
    with _reading(folder / "run.json"):
        manifest = upgrade_run(read_json(folder / "run.json"))
        metrics = _read_metrics(folder / "metrics.jsonl")
        run = Run(name, folder, manifest, metrics, _read_predictions(predictions_dir, manifest))
        _check_numbers((*run.cost.values(), *run.val_losses.values()))
        _ = run.facts  # computed while the file is known
        if manifest["results"] is None:
            step, end = metrics[-1]["step"] if metrics else 0, manifest["config"].get("max_iters")
            run = replace(run, note=f"not finished: step {step:,}" + (f" of {end:,}" if end else ""))
    return run


def _read_lines(path: Path) -> list[Any]:
    """The values of a jsonl file's lines, without a last one that is incomplete: a process may be writing it."""
    lines = path.read_bytes().splitlines(keepends=True)  # of bytes, so not at U+0085 or U+2028
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def _check_numbers(values: Iterable[Any]) -> None:
    if not all(value is None or math.isfinite(value) for value in values):
        raise ValueError("a number is NaN or infinite")


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with _reading(path):
        rows = [{"step": row["step"], **{name: row.get(name) for name in METRICS}} for row in _read_lines(path)]
        _check_numbers(value for row in rows for value in row.values())
        return rows


def _read_predictions(folder: Path, manifest: Mapping[str, Any]) -> list[Predictions]:
    """The predictions of each checkpoint in the folder."""
    paths = {checkpoint: folder / f"test-{checkpoint}.jsonl" for checkpoint in CHECKPOINTS}
    return [_predictions(checkpoint, path, manifest) for checkpoint, path in paths.items() if path.is_file()]


def _predictions(
    checkpoint: str, path: Path, manifest: Mapping[str, Any], labels: Sequence[str] | None = None
) -> Predictions:
    with _reading(path):
        rows = _read_lines(path)
        labels = list(labels or _labels(path, rows, manifest))
        scores = [[row["scores"][label] for label in labels] for row in rows] if "scores" in rows[0] else None
        _check_numbers(score for row in scores or () for score in row)
        text, true, predicted = ([row[key] for row in rows] for key in ("text", "label", "predicted"))
        garbage = [row["garbage"] for row in rows] if "generated" in rows[0] else None
        confusion(true, predicted, len(labels))  # every number is a label's
        return Predictions(checkpoint, labels, text, true, predicted, garbage, scores)


def _labels(path: Path, rows: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> list[str]:
    """The label words by label number: from the scores, the evaluation's JSON or the run; else the numbers."""
    labels = rows[0].get("scores")
    if not labels and path.with_suffix(".json").is_file():
        labels = read_json(path.with_suffix(".json"))["reading"].get("labels")
    labels = list(labels or manifest.get("template", {}).get("labels") or ())
    return labels or [str(n) for n in range(1 + max(max(row["label"], row["predicted"]) for row in rows))]


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
