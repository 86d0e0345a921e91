"""Figures about a list of predicted labels: accuracy with its interval, the confusion table, macro F1, paired tests.

What is unusual here: a prediction may be garbage (-1), text in which no label was found. It is wrong, has a column of
its own in the confusion table and no row, since no example is truly garbage. No torch: plain counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist, mean, stdev
from typing import Any

import numpy as np

GARBAGE = -1
"""The prediction for a text that names no label."""


def wilson(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a share, here `right` of `n`: (low, high), both within [0, 1].

    Unlike p ± z·sqrt(p(1-p)/n) it stays inside [0, 1] and keeps its coverage near 0 and 1 and for small n.
    Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    assert 0 <= right <= n and n > 0 and 0 < confidence < 1
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends the bound is exactly 0 or 1; rounding would leave it at 1e-17 beside.
    return (0.0 if right == 0 else centre - half), (1.0 if right == n else centre + half)


def confusion(true: Sequence[int], predicted: Sequence[int], labels: int) -> list[list[int]]:
    """Counts: a row for each true label, a column for each predicted one, and garbage as the last column."""
    assert len(true) == len(predicted)
    table = [[0] * (labels + 1) for _ in range(labels)]
    for t, p in zip(true, predicted, strict=True):
        assert 0 <= t < labels and GARBAGE <= p < labels
        table[t][p] += 1  # -1 is garbage and, conveniently, the last column
    return table


def macro_f1(table: Sequence[Sequence[int]]) -> float:
    """The plain mean of the labels' F1 = 2·TP / (2·TP + FP + FN), from `confusion`'s table.

    Garbage is a miss (FN) of its true label and nobody's false alarm. A label that is neither true nor predicted
    anywhere has no F1 (0/0) and is left out of the mean.
    """
    scores = []
    for i, row in enumerate(table):
        hit, truly, said = row[i], sum(row), sum(other[i] for other in table)
        if truly + said:
            scores.append(2 * hit / (truly + said))
    return sum(scores) / len(scores) if scores else 0.0


@dataclass(frozen=True)
class Metrics:
    """What one way of reading answers gives on N labelled examples."""

    mode: str
    """"score" or "generate"."""
    n: int
    accuracy: float
    """Right over n; garbage is wrong."""
    ci_low: float
    ci_high: float
    """The 95% Wilson interval of the accuracy."""
    garbage_rate: float
    """The share of answers that name no label; 0 when reading by score."""
    macro_f1: float
    confusion: list[list[int]]
    """A row for each true label; a column for each predicted label, and garbage last."""
    examples_per_s: float
    """n over the wall seconds of this reading."""
    predicted: list[int]
    """The label numbers in the data's order, -1 for garbage."""

    @classmethod
    def make(cls, read: str, true: Sequence[int], predicted: list[int], labels: int, seconds: float) -> "Metrics":
        """Count."""
        n = len(true)
        right = sum(t == p for t, p in zip(true, predicted, strict=True))
        low, high = wilson(right, n)
        table = confusion(true, predicted, labels)
        garbage = predicted.count(GARBAGE) / n
        return cls(read, n, right / n, low, high, garbage, macro_f1(table), table, n / seconds, predicted)

    def to_json(self) -> dict[str, Any]:
        """Everything but the single predictions, under cli.md's keys."""
        keys = ("n", "accuracy", "ci_low", "ci_high", "mode", "garbage_rate", "macro_f1", "confusion", "examples_per_s")
        return {key: getattr(self, key) for key in keys}


def calibrated(scores: Sequence[Sequence[float]], content_free: Sequence[Sequence[Sequence[float]]]) -> np.ndarray:
    """Contextual calibration of label scores [N, L]: what a prompt answers to nothing is taken out of its answers.

    content_free: the scores of M inputs without content, [1, M, L] for all N examples or [N, M, L] for each its own.
    With p the N examples' label probabilities and p_cf the mean over the M inputs of theirs, each made to sum to 1 over
    the labels, the answer is the largest of W p + b with W = diag(p_cf)^-1 and b = 0. Returned is log(W p), [N, L].
    Zhao et al. (2021), "Calibrate before use", section 4.
    """
    bias = np.exp(_log_share(np.asarray(content_free, dtype=float))).mean(axis=1)
    return _log_share(np.asarray(scores, dtype=float)) - np.log(bias)


def _log_share(scores: np.ndarray) -> np.ndarray:
    """Log-probabilities, made to sum to 1 over the last axis."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def paired_permutation_test(differences: Sequence[int]) -> float:
    """Exact two-sided p-value of paired differences whose signs, were both sides alike, would be a coin's.

    The share of all 2^n choices of signs whose sum is at least as far from 0 as the sum seen. Of differences that are
    all -1, 0 or 1 (one system right, the other wrong) this is McNemar's exact test. 1.0 where nothing differs.
    """
    sizes = [abs(d) for d in differences if d]
    seen = abs(sum(differences))
    chances = np.ones(1)  # of the sums -reach, …, reach; in between only every second one can be had
    for size in sizes:
        wider = np.zeros(len(chances) + 2 * size)
        wider[: len(chances)] += chances / 2
        wider[2 * size :] += chances / 2
        chances = wider
    sums = np.abs(np.arange(len(chances)) - (len(chances) - 1) // 2)
    return min(1.0, float(chances[sums >= seen].sum()))


# Student's t, two-sided 95%, for 1, 2, … 30 degrees of freedom; beyond, the normal's 1.96 is at most 4% too narrow.
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def t_interval(accuracies: Sequence[float]) -> tuple[float, float]:
    """The 95% t interval of the mean accuracy over two or more seeds, within [0, 1].

    It says how far another choice of seeds may lead on these very examples, not on others.
    """
    n = len(accuracies)
    assert n >= 2
    half = (T95[n - 2] if n - 2 < len(T95) else 1.96) * stdev(accuracies) / sqrt(n)
    return max(0.0, mean(accuracies) - half), min(1.0, mean(accuracies) + half)
