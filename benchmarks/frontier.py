"""The arithmetic of a frontier of reward against KL.

A point is a model with a reward and a KL for each of the same P prompts. The bootstrap resamples prompts, the same for
all points, so that an easy prompt is easy for all of them. Letters: P prompts, N answers to each, n of best-of-n.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One model's measurements: reward [P] and KL [P] in nats."""

    reward: Array
    kl: Array

    def at(self, prompts: Array | slice = slice(None)) -> tuple[float, float]:
        """(mean KL, mean reward) over the given prompts."""
        return float(self.kl[prompts].mean()), float(self.reward[prompts].mean())


def draws(prompts: int, resamples: int, seed: int) -> Any:
    """The bootstrap's samples of prompts, [resamples, P] numbers, drawn with replacement (Efron 1979)."""
    return np.random.Generator(np.random.PCG64(seed)).integers(0, prompts, (resamples, prompts))


def interval(values: Array) -> tuple[float, float]:
    """The middle 95% of resampled values."""
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def best_of_n(rewards: Array, n: int) -> Array:
    """The mean reward of the best of n answers for each prompt, [P], from N >= n sampled ones, rewards [P, N].

    Unbiased: the mean over all subsets of n. Of the sorted rewards the i-th (from 1) is the largest of C(i-1, n-1)
    of the C(N, n) subsets.
    """
    total = rewards.shape[1]
    assert 1 <= n <= total
    weights = [math.comb(i, n - 1) / math.comb(total, n) for i in range(total)]
    return np.sort(rewards, axis=1) @ np.array(weights)


def kl_of_best(n: int) -> float:
    """KL of best-of-n to its sampling distribution, in nats: log n - (n-1)/n (Stiennon et al. 2020).

    An upper bound, exact without ties (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def along(points: Sequence[Point], start: Point, at: Array, prompts: Any = slice(None)) -> Array:
    """The reward at the given KLs, interpolated through the start and all points in order of KL."""
    found = sorted(point.at(prompts) for point in (start, *points))
    return np.interp(at, [kl for kl, _ in found], [reward for _, reward in found])


def compare(
    one: Sequence[Point], other: Sequence[Point], start: Point, *, steps: int, resamples: int, seed: int
) -> dict[str, Any]:
    """The line of `one` minus that of `other`, from their common start to the smaller of their largest KLs.

    At `steps` equal steps of KL: kl, one, other, delta_vs_baseline (one - other) and its interval; then the mean
    difference with its interval. The KLs are fixed while prompts are resampled; a resampled line that ends earlier
    keeps its last reward.
    """
    reach = min(max(point.at()[0] for point in points) for points in (one, other))
    at = reach * np.arange(1, steps + 1) / steps
    chosen = draws(len(start.reward), resamples, seed)
    first, second = (along(points, start, at) for points in (one, other))
    resampled = np.array([along(one, start, at, p) - along(other, start, at, p) for p in chosen])
    rows = [
        {
            "kl": float(at[i]),
            "one": float(first[i]),
            "other": float(second[i]),
            "delta_vs_baseline": float(first[i] - second[i]),
            **dict(zip(("ci_low", "ci_high"), interval(resampled[:, i]), strict=True)),
        }
        for i in range(steps)
    ]
    low, high = interval(resampled.mean(axis=1))
    return {"rows": rows, "mean": float((first - second).mean()), "ci_low": low, "ci_high": high}
