"""The arithmetic of a frontier of reward against KL, and its picture.

A point is a model, measured on the same P prompts as all others: a reward and a KL for each prompt. Letters: P prompts,
N answers to each, n of best-of-n. Everything resampled is resampled over prompts, all points with the same prompts, so
that an easy prompt is easy for all of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from handout import COLOURS, DASHES
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One model's measurements: reward [P] and KL [P] in nats."""

    reward: Array
    kl: Array

    def at(self, prompts: Array | slice = slice(None)) -> tuple[float, float]:
        """(mean KL, mean reward) over some of the prompts."""
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
    """The KL of best-of-n to what it samples from, in nats: log n - (n-1)/n (Stiennon et al. 2020).

    An upper bound, and exact where no two answers are equally good (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def along(points: Sequence[Point], start: Point, at: Array, prompts: Any = slice(None)) -> Array:
    """The reward at some KLs on the line through the start and all points in the order of their KL."""
    found = sorted(point.at(prompts) for point in (start, *points))
    return np.interp(at, [kl for kl, _ in found], [reward for _, reward in found])


def compare(
    one: Sequence[Point], other: Sequence[Point], start: Point, *, steps: int, resamples: int, seed: int
) -> dict[str, Any]:
    """How far the line of `one` lies above that of `other` where both have KLs, from the start they share.

    At `steps` equal steps of KL up to the smaller of the two largest: kl, one, other, difference and its interval; and
    the mean of the differences with its own. The KLs are held while prompts are resampled; where a resampled line ends
    before one of them, its last reward stands for it.
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
            "difference": float(first[i] - second[i]),
            **dict(zip(("low", "high"), interval(resampled[:, i]), strict=True)),
        }
        for i in range(steps)
    ]
    low, high = interval(resampled.mean(axis=1))
    return {"rows": rows, "mean": float((first - second).mean()), "low": low, "high": high}


# ------------------------------------------------------------------------------------------------------- the picture


def picture(lines: Mapping[str, Sequence[tuple[float, float]]], marks: Mapping[str, tuple[float, float]]) -> str:
    """Lines through (KL, reward) points, and single points beside them, on a square-root scale of the KL.

    Gao et al. (2022) use this scale: rewards rise about linearly on it at first, and best-of-n's small KLs have room.
    """
    left, top, width, height = 56, 12, 600, 320
    far = max(kl for points in (*lines.values(), list(marks.values())) for kl, _ in points)
    ticks = [k for k in (0, 0.1, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if k <= far] or [0]
    rewards = [reward for points in (*lines.values(), list(marks.values())) for _, reward in points]
    low, high = math.floor(10 * min(rewards)) / 10, min(1.0, math.ceil(10 * max(rewards)) / 10)
    high = high if high > low else low + 0.1

    def x(kl: float) -> float:
        return left + width * math.sqrt(max(kl, 0.0) / far) if far > 0 else left

    def y(reward: float) -> float:
        return top + height * (high - reward) / (high - low)

    body = []
    for i in range(round(10 * (high - low)) + 1):
        value = low + i / 10
        body.append(
            f'<line x1="{left}" x2="{left + width}" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#999" '
            f'stroke-opacity=".35"/><text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.1f}</text>'
        )
    for kl in ticks:
        body.append(f'<text x="{x(kl):.1f}" y="{top + height + 18}" text-anchor="middle">{kl:g}</text>')
    middle = left + width / 2
    body.append(f'<text x="{middle}" y="{top + height + 36}" text-anchor="middle">KL to the reference, nats</text>')
    for i, (name, points) in enumerate(lines.items()):
        look = f'stroke="{COLOURS[i % 6]}" stroke-dasharray="{DASHES[i % 6]}" stroke-width="2"'
        path = " ".join(f"{x(kl):.1f},{y(reward):.1f}" for kl, reward in points)
        dots = "".join(
            f'<circle cx="{x(kl):.1f}" cy="{y(reward):.1f}" r="3" fill="{COLOURS[i % 6]}"/>' for kl, reward in points
        )
        below = top + height + 62 + 18 * i
        body.append(
            f'<polyline points="{path}" fill="none" {look}/>{dots}'
            f'<line x1="{left}" x2="{left + 40}" y1="{below - 4}" y2="{below - 4}" {look}/>'
            f'<text x="{left + 48}" y="{below}">{escape(name)}</text>'
        )
    for name, (kl, reward) in marks.items():
        end = kl > far / 2
        body.append(
            f'<rect x="{x(kl) - 4:.1f}" y="{y(reward) - 4:.1f}" width="8" height="8" fill="#777"/>'
            f'<text x="{x(kl) + (-9 if end else 9):.1f}" y="{y(reward) + 14:.1f}" '
            f'text-anchor="{"end" if end else "start"}">{escape(name)}</text>'
        )
    whole = top + height + 62 + 18 * len(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 24} {whole}" role="img" '
        f'font-family="sans-serif" font-size="13" fill="#777"><title>mean reward against the KL</title>'
        f"{''.join(body)}</svg>\n"
    )
