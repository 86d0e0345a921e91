"""Figures about a list of predicted labels: accuracy with its Wilson interval, the confusion table, macro F1.

What is unusual here: a prediction may be garbage (-1), text in which no label was found. It is wrong, has a column of
its own in the confusion table and no row, since no example is truly garbage. No torch: plain counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

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
class Reading:
    """What one way of reading answers gives on N labelled examples."""

    read: str
    """"score" or "generate"."""
    n: int
    accuracy: float
    """Right over n; garbage is wrong."""
    low: float
    high: float
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
    def make(cls, read: str, true: Sequence[int], predicted: list[int], labels: int, seconds: float) -> "Reading":
        """Count."""
        n = len(true)
        right = sum(t == p for t, p in zip(true, predicted, strict=True))
        low, high = wilson(right, n)
        table = confusion(true, predicted, labels)
        garbage = predicted.count(GARBAGE) / n
        return cls(read, n, right / n, low, high, garbage, macro_f1(table), table, n / seconds, predicted)

    def to_json(self) -> dict[str, Any]:
        """Everything but the single predictions, under cli.md's keys."""
        keys = ("n", "accuracy", "low", "high", "read", "garbage_rate", "macro_f1", "confusion", "examples_per_s")
        return {key: getattr(self, key) for key in keys}
