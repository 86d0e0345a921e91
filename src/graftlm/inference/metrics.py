"""Metrics of predicted labels: accuracy with its interval, confusion table, macro F1, calibration, paired tests.

A prediction may be garbage (-1): generated text that names no label. It counts as wrong and has a column of its own in
the confusion table, but no row. No torch: plain counts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from statistics import NormalDist, mean, stdev
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from graftlm.config.values import short
from graftlm.errors import InputError

GARBAGE = -1
"""The prediction for a text that names no label (the course's word)."""
MAX_MATRIX = 10
"""The most labels whose confusion is shown as a matrix; of more the most frequent mistakes are listed."""
MetricFunctions = Mapping[str, Callable[[np.ndarray, np.ndarray], float]]
"""By name, functions of the predicted and the true label numbers [N], of which the predicted may be garbage (-1)."""

RESERVED = {
    *("n", "accuracy", "ci_low", "ci_high", "mode", "garbage_rate", "macro_f1", "confusion", "examples_per_s", "saved"),
    *("labels", "score", "generate", "prompt_tokens", "shared_prompt_tokens", "step", "val_loss", "val_accuracy"),
    *("train_loss", "lr", "grad_norm", "examples", "tokens", "seconds", "peak_rss_mb", "peak_cuda_mb", "tokens_per_s"),
    "kl",
}
"""Names of other values in the same place."""


def metric_functions(
    metrics: "Callable[..., float] | Sequence[Callable[..., float]] | MetricFunctions | None",
) -> MetricFunctions:
    """A user's metrics by name: a function, several, or by name. Raises InputError for anything else."""
    if callable(metrics):
        metrics = [metrics]
    if metrics is not None and not isinstance(metrics, Mapping | Sequence):
        raise InputError(f"metrics: {short(metrics)}: pass a function, several, or a dict of them by name")
    if not isinstance(metrics, Mapping):
        metrics = {getattr(metric, "__name__", str(number)): metric for number, metric in enumerate(metrics or ())}
    for name, metric in metrics.items():
        if not callable(metric):
            raise InputError(f"metrics: {short(metric)}: is no function: pass some by name, as in metrics={{'f1': f}}")
        if not str(name).isidentifier():
            raise InputError(f"metrics: {name!r} is no name: give the function one, as in metrics={{'f1': lambda …}}")
        if name in RESERVED:
            raise InputError(f"metrics: {name!r} is measured already: choose another name")
    return metrics


def apply_metrics(metrics: MetricFunctions, predicted: Sequence[int], true: Sequence[int]) -> dict[str, float]:
    """The values of a user's metrics. Raises InputError for one that is no number."""
    values = {}
    for name, metric in metrics.items():
        value = metric(np.array(predicted, dtype=int), np.array(true, dtype=int))
        try:
            values[name] = float(value)
        except (TypeError, ValueError):
            raise InputError(f"metrics: {name} returned {short(value)}: a metric is a number") from None
    return values


def wilson(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a proportion, `right` of `n`: (low, high), both within [0, 1].

    Unlike p ± z·sqrt(p(1-p)/n) it stays inside [0, 1] and keeps its coverage near 0 and 1 and for small n.
    Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    assert 0 <= right <= n and n > 0 and 0 < confidence < 1
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends the bound is exactly 0 or 1, without rounding.
    return (0.0 if right == 0 else centre - half), (1.0 if right == n else centre + half)


def confusion(true: Sequence[int], predicted: Sequence[int], labels: int) -> list[list[int]]:
    """Counts: one row per true label, one column per predicted label, and garbage as the last column."""
    assert len(true) == len(predicted)
    table = [[0] * (labels + 1) for _ in range(labels)]
    for t, p in zip(true, predicted, strict=True):
        assert 0 <= t < labels and GARBAGE <= p < labels
        table[t][p] += 1  # -1 is garbage, and indexes the last column
    return table


def most_confused(table: Sequence[Sequence[int]], most: int = 10) -> list[tuple[int, int, int]]:
    """(true, predicted, count) of the most frequent mistakes in `confusion`'s table, the most frequent first.

    predicted is a column of the table, so garbage is the number of labels.
    """
    wrong = [(t, p, count) for t, row in enumerate(table) for p, count in enumerate(row) if count and t != p]
    return sorted(wrong, key=lambda mistake: -mistake[2])[:most]


def macro_f1(table: Sequence[Sequence[int]]) -> float:
    """The unweighted mean of the labels' F1 = 2·TP / (2·TP + FP + FN), from `confusion`'s table.

    Garbage is a false negative of its true label and no label's false positive. A label that is neither true nor
    predicted anywhere has no F1 (0/0) and is left out of the mean.
    """
    scores = []
    for i, row in enumerate(table):
        true, predicted = sum(row), sum(other[i] for other in table)
        if true + predicted:
            scores.append(2 * row[i] / (true + predicted))
    return sum(scores) / len(scores) if scores else 0.0


@dataclass(frozen=True)
class Metrics:
    """The metrics of one mode on N labelled examples."""

    mode: str
    """"score" or "generate"."""
    n: int
    accuracy: float
    """Garbage counts as wrong."""
    ci_low: float
    ci_high: float
    """The 95% Wilson interval of the accuracy."""
    garbage_rate: float
    """The fraction of answers that name no label; 0 in mode "score"."""
    macro_f1: float
    confusion: list[list[int]]
    """See `confusion`."""
    examples_per_s: float
    """n divided by the wall seconds of this mode."""
    predicted: list[int]
    """The label numbers in the data's order, -1 for garbage."""
    own: dict[str, float] = field(default_factory=dict)
    """The values of the user's metrics."""

    @classmethod
    def make(cls, read: str, true: Sequence[int], predicted: list[int], labels: int, seconds: float) -> "Metrics":
        """From the labels true and predicted, and the number of labels."""
        n = len(true)
        right = sum(t == p for t, p in zip(true, predicted, strict=True))
        low, high = wilson(right, n)
        table = confusion(true, predicted, labels)
        garbage = predicted.count(GARBAGE) / n
        return cls(read, n, right / n, low, high, garbage, macro_f1(table), table, n / seconds, predicted)

    def to_json(self) -> dict[str, Any]:
        """Everything but the predictions, by the keys of `graft evaluate --json`."""
        keys = ("n", "accuracy", "ci_low", "ci_high", "mode", "garbage_rate", "macro_f1", "confusion", "examples_per_s")
        return {**{key: getattr(self, key) for key in keys}, **self.own}


def calibrated(scores: ArrayLike, content_free: ArrayLike) -> np.ndarray:
    """Contextual calibration of label scores [N, L]: the label bias of a prompt is divided out.

    content_free: the scores of M content-free inputs, [1, M, L] for all N examples or [N, M, L] for each its own.
    With p the examples' label probabilities and p_cf the mean of those of the M inputs, each normalised over the
    labels, the prediction is the argmax of W p + b with W = diag(p_cf)^-1 and b = 0. Returns log(W p), [N, L].
    Zhao et al. (2021), "Calibrate before use", section 4.
    """
    bias = np.exp(_log_softmax(np.asarray(content_free, dtype=float))).mean(axis=1)
    return _log_softmax(np.asarray(scores, dtype=float)) - np.log(bias)


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities, normalised over the last axis."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def paired_permutation_test(differences: Sequence[int]) -> float:
    """Exact two-sided p-value of the sum of paired differences, under random signs.

    The fraction of all 2^n choices of signs whose sum is at least as far from 0 as the observed sum. For differences
    that are all -1, 0 or 1 (one system right, the other wrong) this is McNemar's exact test. 1.0 if nothing differs.
    """
    sizes = [abs(d) for d in differences if d]
    observed = abs(sum(differences))
    pmf = np.ones(1)  # of the sums -reach, …, reach, where reach is the sum of the sizes so far
    for size in sizes:
        wider = np.zeros(len(pmf) + 2 * size)
        wider[: len(pmf)] += pmf / 2
        wider[2 * size :] += pmf / 2
        pmf = wider
    sums = np.abs(np.arange(len(pmf)) - (len(pmf) - 1) // 2)
    return min(1.0, float(pmf[sums >= observed].sum()))


# Student's t, two-sided 95%, for 1, 2, … 30 degrees of freedom; beyond, the normal's 1.96 is at most 4% too narrow.
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def t_quantile(n: int) -> float:
    """Student's t, two-sided 95%, for the mean of n values, at least two."""
    assert n >= 2
    return T95[n - 2] if n - 2 < len(T95) else 1.96


def t_interval(accuracies: Sequence[float]) -> tuple[float, float]:
    """The 95% t interval of the mean accuracy over two or more seeds, within [0, 1].

    It covers the choice of seeds on these examples, not the choice of examples.
    """
    n = len(accuracies)
    half = t_quantile(n) * stdev(accuracies) / sqrt(n)
    return max(0.0, mean(accuracies) - half), min(1.0, mean(accuracies) + half)
