"""The arithmetic of frontiers of reward against KL.

A point is a checkpoint with a reward and a KL for each of the same P prompts. A line is the points of one training run,
from the reference on, joined by straight lines in the order of the KL. Two intervals accompany a mean over S training
seeds. Student's covers the seeds, with the same pairs and held-out prompts. The bootstrap covers the prompts, with the
same runs; it resamples the same prompts for all points, so that an easy prompt is easy for all of them.

Letters: P prompts, N answers to each, n of best-of-n, S seeds, R resamples.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, stdev
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


Line = Sequence[Point]
"""The points of one training run, the reference first."""


def along(line: Line, at: Array, prompts: Any = slice(None)) -> Array:
    """The reward at the given KLs, interpolated between the points in order of KL; beyond the last, its reward."""
    found = sorted(point.at(prompts) for point in line)
    return np.interp(at, [kl for kl, _ in found], [reward for _, reward in found])


def reach(line: Line) -> float:
    """The largest mean KL of a line's points."""
    return max(point.at()[0] for point in line)


def kl_at_reward(line: Line, reward: float) -> float | None:
    """The smallest KL at which the line has this reward; None if it does not reach it."""
    found = sorted(point.at() for point in line)
    for (kl, low), (kl_next, high) in pairwise(found):
        if low < reward <= high:
            return kl + (kl_next - kl) * (reward - low) / (high - low)
    return None


def seed_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95% interval of the mean over S training seeds; None for a single one."""
    from graftlm.inference.metrics import t_quantile

    n = len(values)
    if n < 2:
        return None
    half = t_quantile(n) * stdev(values) / math.sqrt(n)
    return mean(values) - half, mean(values) + half


def rewards_at(lines: Sequence[Line], kls: Array, chosen: Any) -> tuple[Array, Array]:
    """The rewards of S lines at K values of the KL, [S, K], NaN beyond a line's end; and for each resample of prompts,
    [R, S, K]. The KLs are fixed while prompts are resampled."""
    ends = np.array([reach(line) for line in lines])
    rewards = np.array([along(line, kls) for line in lines])
    rewards[kls[None, :] > ends[:, None]] = np.nan
    resampled = np.array([[along(line, kls, prompts) for line in lines] for prompts in chosen])
    return rewards, resampled


def estimate(values: Array, resampled: Array) -> dict[str, Any]:
    """A mean over seeds, values [S], with its intervals: over seeds, and over prompts from resampled values [R, S]."""
    low, high = interval(resampled.mean(axis=1))
    seeds = seed_interval(values.tolist())
    return {"mean": float(values.mean()), "seeds": values.tolist(), "ci_seeds": seeds, "ci_prompts": [low, high]}


def verdict(difference: Mapping[str, Any]) -> str:
    """What both intervals of a difference hold: higher, lower, not distinguished, or one seed."""
    if difference["ci_seeds"] is None:
        return "one seed"
    ends = [*difference["ci_seeds"], *difference["ci_prompts"]]
    return "higher" if min(ends) > 0 else "lower" if max(ends) < 0 else "not distinguished"


# ----------------------------------------------------------------------------------------------------------- summary


def point_row(point: Point, chosen: Any) -> dict[str, float]:
    """A point's means and their intervals over prompts."""
    kl, reward = point.at()
    low, high = interval(point.reward[chosen].mean(axis=1))
    kl_low, kl_high = interval(point.kl[chosen].mean(axis=1))
    return {"kl": kl, "kl_low": kl_low, "kl_high": kl_high, "reward": reward, "ci_low": low, "ci_high": high}


def best_of(rewards: Array, chosen: Any) -> dict[str, dict[str, float]]:
    """Best-of-n of answers with rewards [P, N], for n = 1, 2, 4, … N, each at its KL."""
    found = {}
    for n in [2**i for i in range(rewards.shape[1].bit_length()) if 2**i <= rewards.shape[1]]:
        point = Point(best_of_n(rewards, n), np.full(len(rewards), kl_of_best(n)))
        found[str(n)] = point_row(point, chosen)
    return found


def compare(own: tuple[Array, Array], other: tuple[Array, Array], number: int) -> dict[str, Any] | None:
    """The difference at one KL (its number), seed by seed for the seeds that both have; None where a line ends before.

    own, other: as `rewards_at` gives them.
    """
    shared = min(len(own[0]), len(other[0]))
    values = own[0][:shared, number] - other[0][:shared, number]
    if np.isnan(values).any():
        return None
    found = estimate(values, own[1][:, :shared, number] - other[1][:, :shared, number])
    return {**found, "verdict": verdict(found)}


def summarise(variants: Mapping[str, Any], values: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """The frontiers: all points, each variant's reward at the given KLs, and its difference from the one it names.

    variants: by name, with `reference`, `against`, `after`, `after_step` and `why`. values: the recipe's [evaluation].
    results: `found`, `references` by folder, and `lines`: variant -> seed -> step -> measurement.
    """
    samples = {name: np.array(found["reward"]) for name, found in results["references"].items()}
    prompts = len(next(iter(samples.values())))
    chosen, kls = draws(prompts, values["resamples"], values["seed"]), np.array(values["kl"])
    points = {
        name: {
            seed: {int(step): Point(np.array(m["reward"]), np.array(m["kl"])) for step, m in steps.items()}
            for seed, steps in seeds.items()
        }
        for name, seeds in results["lines"].items()
    }
    starts = {name: Point(rewards.mean(axis=1), np.zeros(prompts)) for name, rewards in samples.items()}
    lines = {name: _lines(points, variants[name], name, starts[variants[name].reference]) for name in points}
    at = {name: rewards_at(own, kls, chosen) for name, own in lines.items()}
    found = {}
    for name, own in lines.items():
        about, (rewards, resampled) = variants[name], at[name]
        found[name] = {
            **{key: getattr(about, key) for key in ("why", "against", "reference", "after", "after_step")},
            "points": {
                seed: {step: _row(point, chosen, results["lines"][name][seed][step]) for step, point in steps.items()}
                for seed, steps in points[name].items()
            },
            "at": {
                f"{kl:g}": None if np.isnan(rewards[:, i]).any() else estimate(rewards[:, i], resampled[:, :, i])
                for i, kl in enumerate(kls)
            },
            "differences": {
                f"{kl:g}": compare(at[name], at[about.against], i) for i, kl in enumerate(kls) if about.against in at
            },
            "kl_at_reward": [kl_at_reward(line, values["reward"]) for line in own],
        }
    return {
        "found": results["found"],
        "references": {name: best_of(rewards, chosen) for name, rewards in samples.items()},
        "variants": found,
        "claims": claims(found, values["reward"], values["claim_kl"]),
        "texts": {
            **{name: reference["texts"][:3] for name, reference in results["references"].items()},
            **{name: _last_texts(seeds) for name, seeds in results["lines"].items()},
        },
    }


def _lines(points: Mapping[str, Any], about: Any, name: str, start: Point) -> list[Line]:
    """A variant's line of each seed; one that continues another begins with that one's points up to there."""
    found: list[Line] = []
    for seed, own in points[name].items():
        before = points[about.after][seed] if about.after else {}
        found.append([start, *(p for step, p in before.items() if step <= about.after_step), *own.values()])
    return found


def _row(point: Point, chosen: Any, measured: Mapping[str, Any]) -> dict[str, float]:
    """A checkpoint's row: means, intervals over prompts, share of finished answers and their mean length."""
    return {**point_row(point, chosen), "ended": measured["ended"], "tokens": measured["tokens"]}


def claims(found: Mapping[str, Any], reward: float, kl: float) -> dict[str, bool | None]:
    """What the frontiers hold at `kl` nats, with intervals over seeds and prompts; None where a variant has one seed.

    reward: the paper's at that KL.
    """
    key = f"{kl:g}"
    several = {name: about["at"][key] for name, about in found.items() if about["at"][key] and len(about["points"]) > 1}
    return {
        f"a mean reward of {reward:g} at {kl:g} nats": any(each["mean"] >= reward for each in several.values()),
        **{
            f"{name} lies above {about['against']} at {kl:g} nats": {"one seed": None}.get(verdict, verdict == "higher")
            for name, about in found.items()
            if (difference := about["differences"].get(key)) and (verdict := difference["verdict"])
        },
    }


def _last_texts(seeds: Mapping[str, Any]) -> list[str]:
    """The texts of the first seed's last checkpoint."""
    first = next(iter(seeds.values()))
    texts: list[str] = first[max(first)]["texts"][:3]
    return texts
