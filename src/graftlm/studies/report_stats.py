"""What `graft report` works out of what it has read: calibration, disagreements, curves made smooth and short.

Plain counts over what `report_data.py` has read. No torch.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from graftlm.studies.report_data import Predictions, Run, all_predictions

CURVES = {"train_loss": "Training loss", "val_loss": "Validation loss", "val_accuracy": "Validation accuracy"}
BINS = 10
MAX_CURVE_POINTS = 1000  # of a curve; a longer one is drawn at every second step, every third, …


@dataclass(frozen=True)
class CalibrationBin:
    """The examples whose likeliest label has a probability within a tenth."""

    low: float
    high: float
    n: int
    confidence: float
    """The mean probability of the likeliest label; 0 where there is no example."""
    accuracy: float
    """How often it was the true one."""


def calibration(answers: Predictions) -> tuple[list[CalibrationBin], float] | None:
    """Ten bins of confidence, and the expected calibration error; None without scores.

    The confidence is the largest value of the softmax over the labels' scores. The error is the mean over the examples
    of |accuracy - confidence| of their bin. Guo et al. (2017), "On calibration of modern neural networks".
    """
    if answers.scores is None:
        return None
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for scores, true in zip(answers.scores, answers.true, strict=True):
        top = max(scores)
        confidence = 1 / sum(math.exp(score - top) for score in scores)
        bins[min(BINS - 1, int(confidence * BINS))].append((confidence, scores.index(top) == true))
    made = [_bin(number, members) for number, members in enumerate(bins)]
    return made, sum(b.n * abs(b.accuracy - b.confidence) for b in made) / len(answers.true)


def _bin(number: int, members: Sequence[tuple[float, bool]]) -> CalibrationBin:
    n = len(members)
    confidence, right = sum(c for c, _ in members), sum(r for _, r in members)
    return CalibrationBin(number / BINS, (number + 1) / BINS, n, confidence / max(n, 1), right / max(n, 1))


@dataclass(frozen=True)
class Disagreement:
    """A review that not all answers agree on."""

    text: str
    true: str
    predictions: list[tuple[str, bool] | None]
    """Each one's word and whether it is right; None where it did not read this review."""


def disagreements(everyone: Sequence[Predictions]) -> list[Disagreement]:
    """The reviews that at least two read and judged differently, the most evenly divided first.

    The same text may stand in the data twice: its first, second, … places are held together.
    """
    said: dict[tuple[str, str, int], list[tuple[str, bool] | None]] = {}
    for number, answers in enumerate(everyone):
        places: Counter[str] = Counter()
        for text, true, predicted in zip(answers.texts, answers.true, answers.predicted, strict=True):
            key = (text, answers.word(true), places[text])
            places[text] += 1
            said.setdefault(key, [None] * len(everyone))[number] = (answers.word(predicted), predicted == true)
    found = [Disagreement(text, true, words) for (text, true, _), words in said.items() if len({*words} - {None}) > 1]
    return sorted(found, key=_division)


def _division(review: Disagreement) -> float:
    right = [word[1] for word in review.predictions if word is not None]
    return abs(sum(right) / len(right) - 0.5)


def moving_average(values: Sequence[float]) -> list[float]:
    """The mean over each of n values and its n/50 neighbours on either side, fewer at the ends; a short curve stays."""
    sums = [0.0, *accumulate(values)]
    reach, n = len(values) // 50, len(values)
    means = []
    for at in range(n):
        some = min(reach, at, n - 1 - at)  # as many on the left as on the right, or it would run late
        means.append((sums[at + some + 1] - sums[at - some]) / (2 * some + 1))
    return means


def downsample(count: int, most: int = MAX_CURVE_POINTS) -> list[int]:
    """At most about `most` of the indices 0 … count - 1, evenly spaced; the last is always there."""
    every = max(1, math.ceil(count / most))
    return sorted({*range(0, count, every), *([count - 1] if count else [])})


# Charts ---------------------------------------------------------------------------------------------------------------


def charts(runs: Sequence[Run]) -> dict[str, Any]:
    """What report.js draws: for each chart its series, each of one run; a point is [x, y, low, high] or [x, y]."""
    curves = {name: [_curve(number, run, name) for number, run in enumerate(runs)] for name in CURVES}
    costs: dict[str, list[dict[str, Any]]] = {"parameters": [], "minutes": []}
    reliability = []
    for number, name, answers in all_predictions(runs):
        took, about = runs[number].figures, {"run": number, "name": name, "last": answers.checkpoint == "last"}
        minutes = None if took["seconds"] is None else took["seconds"] / 60
        for chart, x in (("parameters", took["trainable"]), ("minutes", minutes)):
            if x is not None:
                point = [_round_sig(x), *map(_round_sig, (answers.accuracy, *answers.interval))]
                costs[chart].append({**about, "points": [point]})
        if found := calibration(answers):
            points = [[_round_sig(b.confidence), _round_sig(b.accuracy)] for b in found[0] if b.n]
            reliability.append({**about, "points": points})
    return {"runs": [run.name for run in runs], "charts": {**curves, **costs, "calibration": reliability}}


def _curve(number: int, run: Run, name: str) -> dict[str, Any]:
    """A run's curve; of the training loss a smoothed one, and what it was made of behind it."""
    points = run.curve(name)
    kept = downsample(len(points))
    series: dict[str, Any] = {"run": number, "name": run.name}
    if name == "train_loss":
        means = moving_average([value for _, value in points])
        series["raw"] = [[points[i][0], _round_sig(points[i][1])] for i in kept]
        points = [(step, mean) for (step, _), mean in zip(points, means, strict=True)]
    return {**series, "points": [[points[i][0], _round_sig(points[i][1])] for i in kept]}


def _round_sig(value: float) -> float:
    """Five digits are more than a screen shows."""
    return value if isinstance(value, int) else float(f"{value:.5g}")
