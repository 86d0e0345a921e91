"""What rounds of runs say: ratios formed within a round, medians, and whether the public claims hold.

A run is one contender's figures, a round one accepted run of each; drift of the machine meets all of a round alike.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

CONTENDERS = ("trl", "peft", "graft")
PAIRS = (("graft", "trl"), ("graft", "peft"), ("peft", "trl"))
SAME_LOSS = 0.05  # nats a target token by which the contenders' final losses may differ: another order, another dropout
Run = dict[str, Any]  # one run's figures
Round = Mapping[str, Run]  # contender -> its accepted run of this round


def accepted_run(measure: Callable[[], Run], limit: float, attempts: int) -> tuple[Run | None, list[Run]]:
    """The first of `attempts` runs with others at `limit` of the cores or less (or None), and the rejected ones."""
    rejected: list[Run] = []
    for _ in range(attempts):
        run = measure()
        if run["other_cpu_share"] <= limit:
            return run, rejected
        rejected.append(run)
    return None, rejected


def ratios(rounds: Sequence[Round], key: str, top: str, bottom: str) -> list[float]:
    """`top`'s figure over `bottom`'s, round by round, where the round has both."""
    return [each[top][key] / each[bottom][key] for each in rounds if top in each and bottom in each]


def summarise(rounds: Sequence[Round], loss_on: str = "completion") -> dict[str, Any]:
    """Medians of each contender, the ratios with their medians, and whether the claims hold (null: not measured)."""
    contenders = {
        name: {
            key: [each[name][key] for each in rounds if name in each]
            for key in ("examples_per_s", "peak_rss_mb", "val_loss", "other_cpu_share")
        }
        for name in CONTENDERS
        if any(name in each for each in rounds)
    }
    medians = {name: {key: median(values) for key, values in runs.items()} for name, runs in contenders.items()}
    compared: dict[str, dict[str, Any]] = {}
    for top, bottom in PAIRS:
        for key in ("examples_per_s", "peak_rss_mb"):
            if found := ratios(rounds, key, top, bottom):
                compared[f"{key} {top}/{bottom}"] = {"rounds": found, "median": median(found)}
    losses = [figures["val_loss"] for figures in medians.values()]
    return {
        "rounds": contenders,
        "medians": medians,
        "ratios": compared,
        "claims": {
            **{claim: _holds(compared, ratio, bound) for claim, (ratio, bound) in CLAIMS[loss_on].items()},
            "the same loss at the end": max(losses) - min(losses) <= SAME_LOSS if len(losses) > 1 else None,
        },
    }


CLAIMS: dict[str, dict[str, tuple[str, Callable[[float], bool]]]] = {
    "completion": {
        "at least 2.3 times the strongest peer": ("examples_per_s graft/peft", lambda x: x >= 2.3),
        "at least 6.5 times trl": ("examples_per_s graft/trl", lambda x: x >= 6.5),
        "at most 0.7 of the strongest peer's memory": ("peak_rss_mb graft/peft", lambda x: x <= 0.7),
        "at most 0.5 of trl's memory": ("peak_rss_mb graft/trl", lambda x: x <= 0.5),
    },
    "all": {
        "at least 2.5 times the strongest peer": ("examples_per_s graft/peft", lambda x: x >= 2.5),
        "at least 2.5 times trl": ("examples_per_s graft/trl", lambda x: x >= 2.5),
    },
}


def _holds(compared: Mapping[str, Mapping[str, Any]], ratio: str, claim: Callable[[float], bool]) -> bool | None:
    return claim(compared[ratio]["median"]) if ratio in compared else None


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'':8}{'examples/s':>12}{'peak MB':>10}{'val loss':>10}{'others':>8}   examples/s of every round"]
    for name, medians in summary["medians"].items():
        each = "  ".join(f"{speed:.2f}" for speed in summary["rounds"][name]["examples_per_s"])
        lines.append(
            f"{name:8}{medians['examples_per_s']:12.2f}{medians['peak_rss_mb']:10.0f}{medians['val_loss']:10.4f}"
            f"{medians['other_cpu_share']:8.1%}   {each}"
        )
    for name, ratio in summary["ratios"].items():
        lines.append(f"{name:28}{ratio['median']:7.3f}   ({'  '.join(f'{x:.3f}' for x in ratio['rounds'])})")
    words = {True: "yes", False: "NO", None: "not measured"}
    lines += [f"{claim + '?':40}{words[holds]}" for claim, holds in summary["claims"].items()]
    return "\n".join(lines)


def shares(rounds: Sequence[Round], peaks: Mapping[str, float]) -> dict[str, Any]:
    """The part of the machine's matrix peak that graft's needed work reached: of bfloat16's and of its own format's."""
    runs = [each["graft"] for each in rounds if "graft" in each]
    if not runs:
        return {}
    done, own = median(run["needed_gflops"] for run in runs), runs[0]["precision"]
    return {
        "needed_gflops": done,
        "format": own,
        "of_bfloat16_peak": done / peaks["bfloat16"],
        "of_its_formats_peak": done / peaks[own],
    }
