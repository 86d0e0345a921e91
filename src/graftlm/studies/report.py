"""`graft report`: one self-contained HTML page of runs, which needs no server and no network.

- All figures are in the page as plain HTML (`report.html`, a Jinja template), readable without scripts, by a screen
  reader and on paper. `report.js` adds interaction: charts, sorting, the filter.
- Names and reviews may contain markup. The template escapes all text, the charts' data too; the script only sets text;
  and the page's Content-Security-Policy allows that script alone, by its hash.

The same folders give the same bytes on the same day. Does not import torch.
"""

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from graftlm.config import ReportConfig
from graftlm.errors import InputError
from graftlm.files.atomic import write_text
from graftlm.inference.metrics import MAX_MATRIX
from graftlm.studies.report_data import Predictions, Run, read_folders, source_of
from graftlm.studies.report_tables import ExampleSet, all_predictions, example_sets, results_tables

CURVES = {
    "train_loss": ("Training loss", ".4f"),
    "val_loss": ("Validation loss", ".4f"),
    "val_accuracy": ("Validation accuracy", ".1%"),
    "lr": ("Learning rate", ".3g"),
    "grad_norm": ("Gradient norm", ".3g"),
}
"""Title, and how the values are written."""
BINS = 10
MAX_CURVE_POINTS = 1000  # a longer curve is drawn at every second step, every third, …
MAX_EXAMPLES = 50  # disagreements that are listed
MAX_TABLE_ROWS = 40  # of a curve's table
POLICY = "img-src data:; base-uri 'none'; form-action 'none'"


def report(config: ReportConfig) -> dict[str, Any]:
    """Write the page; returns its path, the number of runs and its size in bytes.

    Raises InputError, before anything is written, for a folder without a run and for a broken file.
    """
    out = Path(config.out)
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; name a file")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}: create it first, or name another")
    runs = read_folders(config.folders)
    page = make_page(runs, config.title, date.today())
    write_text(out, page)
    return {"path": str(out), "runs": len(runs), "bytes": len(page.encode("utf-8"))}


def make_page(runs: Sequence[Run], title: str, today: date) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = lambda value, spec: "–" if value is None else format(value, spec)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    style = _read("report_base.css") + _read("report.css")
    script = "".join(_read(f"report{part}.js") for part in ("_parts", "_chart", "_export", ""))
    csp = f"default-src 'none'; script-src {_csp_hash(script)}; style-src {_csp_hash(style)}; {POLICY}"
    predictions, sets = all_predictions(runs), example_sets(runs)
    data = charts(runs, sets)
    page = environment.from_string(_read("report.html")).render(
        policy=Markup(csp),
        style=Markup(style),
        script=Markup(script),
        title=title,
        intro=_intro(runs, today),
        runs=runs,
        predictions=predictions,
        results=results_tables(runs, sets),
        documents=[(run, each, source_of(each.settings)) for run in runs for each in run.documents],
        curves={name: _curve_table(name, runs) for name in CURVES if name in data["charts"]},
        calibrations=[(name, *result) for _, name, p in predictions if (result := calibration(p)) is not None],
        disagreements=[
            (each, disagreements([p for _, _, p in each.members])) for each in sets if len(each.members) > 1
        ],
        max_examples=MAX_EXAMPLES,
        max_matrix=MAX_MATRIX,
        data=data,
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is not valid text


def _read(name: str) -> str:
    return (files("graftlm.studies") / name).read_text(encoding="utf-8")


def _csp_hash(source: str) -> str:
    digest = hashlib.sha256(source.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _intro(runs: Sequence[Run], today: date) -> str:
    """Models, data, device and versions, each stated once where all runs agree."""
    known = []
    trained = [run for run in runs if run.manifest]
    for each in zip(*(run.facts for run in trained), strict=True):
        values = " and ".join(dict.fromkeys(value for _, value in each if value))
        known += [each[0][0] + values] if values else []
    count = "1 run" if len(trained or runs) == 1 else f"{len(trained or runs)} runs"
    return f"{count}{': ' if known else ''}{', '.join(known)}. Written on {today} by graft {version('graftlm')}."


def _curve_table(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    """Title, caption, runs and at most MAX_TABLE_ROWS rows (step, a value or None per run) of a curve's table."""
    values = {run.name: dict(curve) for run in runs if (curve := run.curve(name))}
    steps = sorted({step for curve in values.values() for step in curve})
    shown = [steps[i] for i in downsample(len(steps), MAX_TABLE_ROWS)]
    title, spec = CURVES[name]
    caption = title + (f", {len(shown)} of {len(steps):,} steps" if len(shown) < len(steps) else "")
    rows = [(step, [curve.get(step) for curve in values.values()]) for step in shown]
    return {"title": title, "caption": caption, "format": spec, "runs": list(values), "rows": rows}


# Calibration and disagreements ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CalibrationBin:
    """The n examples whose confidence, the probability of the most likely label, is from `low` to `high`."""

    low: float
    high: float
    n: int
    confidence: float
    """The mean confidence; 0 if n is 0."""
    accuracy: float


def calibration(predictions: Predictions) -> tuple[list[CalibrationBin], float] | None:
    """Ten bins of confidence and the expected calibration error; None without scores.

    The confidence is the largest value of the softmax over the labels' scores. The error is the mean over the examples
    of |accuracy - confidence| of their bin. Guo et al. (2017), "On calibration of modern neural networks".
    """
    if predictions.scores is None:
        return None
    binned: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for scores, true in zip(predictions.scores, predictions.true, strict=True):
        top = max(scores)
        confidence = 1 / sum(math.exp(score - top) for score in scores)
        binned[min(BINS - 1, int(confidence * BINS))].append((confidence, scores.index(top) == true))
    bins = []
    for number, members in enumerate(binned):
        n, confidences, corrects = len(members), sum(c for c, _ in members), sum(correct for _, correct in members)
        bounds = number / BINS, (number + 1) / BINS
        bins.append(CalibrationBin(*bounds, n, confidences / max(n, 1), corrects / max(n, 1)))
    return bins, sum(b.n * abs(b.accuracy - b.confidence) for b in bins) / len(predictions.true)


@dataclass(frozen=True)
class Disagreement:
    """An example for which predictions differ."""

    text: str
    true: str
    predictions: list[tuple[str, bool] | None]
    """Each run's predicted label and whether it is correct; None if the run has no prediction for it."""

    @property
    def imbalance(self) -> float:
        """0 if half of the predictions are correct, 0.5 if all or none are."""
        correct = [prediction[1] for prediction in self.predictions if prediction is not None]
        return abs(sum(correct) / len(correct) - 0.5)


def disagreements(runs: Sequence[Predictions]) -> list[Disagreement]:
    """The examples with at least two different predictions, the most evenly divided first.

    A text that occurs twice in the data is matched by its occurrence: first with first, second with second.
    """
    labels: dict[tuple[str, str, int], list[tuple[str, bool] | None]] = {}
    for number, run in enumerate(runs):
        occurrences: Counter[str] = Counter()
        for text, true, predicted in zip(run.texts, run.true, run.predicted, strict=True):
            key = (text, run.label(true), occurrences[text])
            occurrences[text] += 1
            labels.setdefault(key, [None] * len(runs))[number] = (run.label(predicted), predicted == true)
    differing = [Disagreement(text, true, row) for (text, true, _), row in labels.items() if len({*row} - {None}) > 1]
    return sorted(differing, key=lambda example: example.imbalance)


# Charts ---------------------------------------------------------------------------------------------------------------


def charts(runs: Sequence[Run], sets: Sequence[ExampleSet]) -> dict[str, Any]:
    """The data of report.js: each chart's series, one per run; charts without data are left out.

    A curve's series has steps, values and minutes, any other the points [x, y] or [x, y, low, high]. Accuracy and cost
    are of the first set of examples.
    """
    found: dict[str, list[dict[str, Any]]] = {
        name: [_curve(number, run, name) for number, run in enumerate(runs) if run.curve(name)] for name in CURVES
    }
    found |= {"parameters": [], "minutes": [], "calibration": []}
    for number, name, predictions in sets[0].members if sets else ():
        for chart, key in (("parameters", "trainable"), ("minutes", "minutes")):
            if (x := runs[number].cost[key]) is not None:
                point = (x, predictions.accuracy, *predictions.interval)
                found[chart].append(_series(number, name, predictions, [point]))
    for number, name, predictions in all_predictions(runs):
        if (result := calibration(predictions)) is not None:
            points = [(b.confidence, b.accuracy) for b in result[0] if b.n]
            found["calibration"].append(_series(number, name, predictions, points))
    return {"runs": [run.name for run in runs], "charts": {name: series for name, series in found.items() if series}}


def _series(number: int, name: str, predictions: Predictions, points: Sequence[Sequence[float]]) -> dict[str, Any]:
    last = predictions.checkpoint == "last"
    return {"run": number, "name": name, "last": last, "points": [_rounded(point) for point in points]}


def _curve(number: int, run: Run, name: str) -> dict[str, Any]:
    rows = [row for row in run.metrics if row[name] is not None]
    shown = [rows[i] for i in downsample(len(rows))]
    series = {"run": number, "name": run.name, "steps": [row["step"] for row in shown]}
    series |= {"values": _rounded(row[name] for row in shown)}
    if all(row["seconds"] is not None for row in shown):
        series["minutes"] = _rounded(row["seconds"] / 60 for row in shown)
    return series


def downsample(count: int, limit: int = MAX_CURVE_POINTS) -> list[int]:
    """About `limit` evenly spaced indices from 0 to count - 1, always with the last."""
    stride = max(1, math.ceil(count / limit))
    return sorted({*range(0, count, stride), *([count - 1] if count else [])})


def _rounded(values: Iterable[float]) -> list[float]:
    """Five significant digits."""
    return [value if isinstance(value, int) else float(f"{value:.5g}") for value in values]
