"""LoRA Without Regret (Schulman et al. 2025) at the size of a small machine: recipes -> dated results -> its page.

    python benchmarks/lora_without_regret.py --json-out FILE [--out_dir DIR] [--jobs 2] [--collect]

The recipes are those of recipes/lora_without_regret; how trials are trained and collected is that of handout.py. FILE
also gets, of each trial, the loss of each test review and the training loss of each tenth of the run. `page.py` makes
docs/lora_without_regret.md. A setting's learning rate is selected by validation loss; everything else is the loss on
the test split, in nats per review: -log of the probability of the correct label word.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import handout
import harness
import numpy as np
from handout import Recipe, Saved, Trials, merge, origins
from numpy.typing import NDArray
from render import DOCS, all_results, chart, fill, markdown, number

from graftlm.studies.results_table import TrialResult
from graftlm.studies.sweep import Trial

STUDY = "lora_without_regret"
PAGE = DOCS / f"{STUDY}.md"
UNIT = 100
"""Losses of reviews are stored in hundredths of a nat."""
PARTS = 10
"""Parts of a run whose training losses are averaged."""
CHANCE = math.log(2)
"""The loss of equal probabilities of both labels."""
BATCH = 16
"""Reviews in a batch, where the batch size is not what varies."""
Z = 1.96
"""Standard errors to each end of a 95% interval; of a mean over a thousand reviews."""
TARGETS = {
    "q,k,v,o,gate,up,down": "all-linear",
    "gate,up,down": "MLP",
    "q,k,v,o": "attention",
    "q,k,v": "q, k, v",
}
"""--targets -> the name in tables and figures."""


# ------------------------------------------------------------------------------------------------------- the trials


def losses(trial: Trial, folder: Path) -> dict[str, Any]:
    """The loss of each test review in units of 1 / UNIT nat, and the mean training loss of each part of the run.

    The reviews' losses are one string of numbers: a list would have a line for each in the result's file.
    """
    tests = TrialResult(trial, "last", folder).predictions
    steps = [row["train_loss"] for row in harness.read_rows(folder / "run" / "metrics.jsonl")]
    return {
        "test_loss": " ".join(f"{-UNIT * list(row['scores'].values())[row['label']]:.0f}" for row in tests),
        "train_loss": [round(float(part.mean()), 4) for part in np.array_split(steps, min(PARTS, len(steps)))],
    }


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """As handout.py does it, with the losses."""
    result = handout.run(argparse.Namespace(**vars(args), study=STUDY), work)
    trials = {trial.id: trial for recipe in recipes().values() for trial in recipe.trials}
    out_dir = args.out_dir or harness.ROOT / "runs" / STUDY
    for saved in result["trials"]:
        if "test_loss" not in saved:
            trial = trials[saved["id"]]
            saved |= losses(trial, out_dir / trial.folder)
    return result


def recipes() -> dict[str, Recipe]:
    """The study's recipes by name."""
    return handout.recipes(STUDY)


# ---------------------------------------------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class Setting:
    """Runs that differ only in their learning rate and seed."""

    name: str
    runs: Mapping[float, Sequence[Saved]]
    """Learning rate -> the runs of all seeds; lowest rate first."""

    def validation(self, rate: float) -> float:
        """The validation loss at a learning rate, the mean over seeds."""
        return mean(each["run"]["results"]["last"]["val_loss"] for each in self.runs[rate])

    def test(self, rate: float) -> NDArray[np.float64]:
        """The loss of each test review in nats, the mean over seeds."""
        losses = [np.array(each["test_loss"].split(), dtype=float) for each in self.runs[rate]]
        return np.mean(losses, axis=0) / UNIT

    @cached_property
    def rate(self) -> float:
        """The learning rate with the lowest validation loss. One with more seeds comes first."""
        seeds = max(len(runs) for runs in self.runs.values())
        return min((rate for rate, runs in self.runs.items() if len(runs) == seeds), key=self.validation)

    @property
    def at_edge(self) -> bool:
        """Whether it is the lowest or highest rate tried, so that one beyond it may be better."""
        return self.rate in (min(self.runs), max(self.runs))

    @property
    def best(self) -> NDArray[np.float64]:
        """The test losses at that learning rate."""
        return self.test(self.rate)

    @property
    def rates(self) -> list[float]:
        """The learning rates whose test loss is not significantly above the lowest one's."""
        lowest = min(self.runs, key=lambda rate: self.test(rate).mean())
        return [rate for rate in self.runs if difference(self.test(rate), self.test(lowest))[1] <= 0]


def difference(one: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float, float]:
    """The mean of one - other over the same reviews with its 95% interval: (mean, low, high)."""
    each = one - other
    half = Z * float(each.std(ddof=1)) / math.sqrt(len(each))
    return float(each.mean()), float(each.mean()) - half, float(each.mean()) + half


def group(trials: Trials, name: Callable[[Mapping[str, Any]], str]) -> dict[str, Setting]:
    """The settings of all finished trials whose flags have a name, in the recipes' order."""
    found: dict[str, dict[float, dict[str, Saved]]] = {}
    for trial in (trial for recipe in recipes().values() for trial in recipe.trials if trial.id in trials):
        if setting := name(trial.flags):
            found.setdefault(setting, {}).setdefault(trial.flags["lr"], {})[trial.id] = trials[trial.id]
    return {
        setting: Setting(setting, {rate: list(each.values()) for rate, each in sorted(rates.items())})
        for setting, rates in found.items()
    }


def by_rank(flags: Mapping[str, Any]) -> str:
    """`r=16` on all linear layers, or `full`; batches of 16."""
    if flags["batch_size"] != BATCH or TARGETS.get(flags.get("targets", ""), "all-linear") != "all-linear":
        return ""
    return f"r={flags['rank']}" if "rank" in flags else "full"


def by_targets(flags: Mapping[str, Any]) -> str:
    """The adapted layers, of the runs with equally many trained parameters."""
    name = TARGETS.get(flags.get("targets", ""), "")
    return name if flags["batch_size"] == BATCH and (name != "all-linear" or flags["rank"] == 16) else ""


def by_batch(flags: Mapping[str, Any]) -> str:
    """`LoRA 16` (r = 16 on all linear layers), or `full 16`."""
    if "rank" in flags and (flags["rank"] != 16 or TARGETS[flags["targets"]] != "all-linear"):
        return ""
    return f"{'LoRA' if 'rank' in flags else 'full'} {flags['batch_size']}"


# -------------------------------------------------------------------------------------------------------- the claims


@dataclass(frozen=True)
class Claim:
    """A claim of the paper's, and what was found."""

    text: str
    found: str
    holds: bool | None
    """None if the interval leaves it open."""


def nats(values: tuple[float, float, float]) -> str:
    """A difference with its interval."""
    return f"{values[0]:+.3f} ({values[1]:+.3f} to {values[2]:+.3f})"


def below(values: tuple[float, float, float]) -> bool | None:
    """Whether a difference is below 0; None if its interval has 0 in it."""
    return None if values[1] <= 0 <= values[2] else values[2] < 0


def not_above(values: tuple[float, float, float], margin: float = 0.02) -> bool | None:
    """Whether a difference is at most `margin` nats; None if its interval leaves that open."""
    return True if values[2] <= margin else False if values[1] > 0 else None


def claims_of_ranks(ranks: Mapping[str, Setting]) -> list[Claim]:
    """What the grid of learning rates and ranks says."""
    lora, full = [setting for name, setting in ranks.items() if name != "full"], ranks["full"]
    common = set.intersection(*(set(each.rates) for each in lora))
    listed = ", ".join(f"{each.rate:g} at {each.name}" for each in lora)
    ratio = lora[-1].rate / full.rate
    most = [max(lora[-1].rates) / min(full.rates), min(lora[-1].rates) / max(full.rates)]
    to_full = difference(lora[-1].best, full.best)
    to_high = difference(lora[0].best, lora[-1].best)
    return [
        Claim(
            "The best learning rate of LoRA hardly depends on the rank",
            f"Best: {listed}. Not significantly worse than the best at every rank: "
            f"{', '.join(f'{rate:g}' for rate in sorted(common)) or 'none'}.",
            bool(common),
        ),
        Claim(
            "The best learning rate of LoRA is about ten times that of full fine-tuning",
            f"{lora[-1].rate:g} at {lora[-1].name} against {full.rate:g}: {number(ratio)} times. "
            f"The learning rates that are not significantly worse allow {number(most[1])} to {number(most[0])} times.",
            (None if most[1] < 4 else True) if most[1] <= 15 and most[0] >= 9 else False,
        ),
        Claim(
            "LoRA of a high rank is as good as full fine-tuning",
            f"{lora[-1].name} minus full: {nats(to_full)} nats.",
            not_above(to_full),
        ),
        Claim(
            "Where examples hold little information, rank 1 is enough (theirs: reinforcement learning; here: labels)",
            f"{lora[0].name} minus {lora[-1].name}: {nats(to_high)} nats.",
            not_above(to_high),
        ),
    ]


def claims_of_targets(targets: Mapping[str, Setting]) -> list[Claim]:
    """What LoRA on different layers says, at equal trained parameters."""
    attention = difference(targets["MLP"].best, targets["attention"].best)
    every = difference(targets["MLP"].best, targets["all-linear"].best)
    return [
        Claim(
            "LoRA on the MLP is better than on attention, at equal parameters",
            f"MLP minus attention: {nats(attention)} nats.",
            below(attention),
        ),
        Claim(
            "LoRA on the MLP alone is as good as on all linear layers",
            f"MLP minus all-linear: {nats(every)} nats.",
            not_above(every),
        ),
    ]


def claims_of_batches(batches: Mapping[str, Setting]) -> list[Claim]:
    """What larger batches say; nothing is decided while a best rate is at an edge of those tried."""
    large = max(int(name.split()[1]) for name in batches)
    gaps = {size: batches[f"LoRA {size}"].best - batches[f"full {size}"].best for size in (BATCH, large)}
    more = difference(gaps[large], gaps[BATCH])
    edges = [
        f"{name} at {each.rate:g}" for name, each in batches.items() if each.at_edge and int(name.split()[1]) >= BATCH
    ]
    return [
        Claim(
            "Large batches cost LoRA more than full fine-tuning",
            f"LoRA minus full fine-tuning changes by {nats(more)} nats from batches of {BATCH} to {large}."
            + f" At an edge of the learning rates tried: {', '.join(edges)}." * bool(edges),
            None if edges or more[1] <= 0 <= more[2] else more[1] > 0,
        )
    ]


VERDICTS = {False: "does **not** reproduce", None: "not decided", True: "reproduces"}


def claims_table(claims: Iterable[Claim], seeds: int) -> str:
    """The claims, those that did not reproduce first. seeds: the smallest number of seeds of a setting."""
    order, single = list(VERDICTS), " with one seed" * (seeds == 1)
    rows = [
        [f"*{claim.text}*", VERDICTS[claim.holds] + single * (claim.holds is not None), claim.found]
        for claim in sorted(claims, key=lambda c: order.index(c.holds))
    ]
    return markdown(("claim", "here", "measured, with its 95% interval"), rows, left=3)


# ---------------------------------------------------------------------------------------------------------- the page


def table(settings: Iterable[Setting], against: Setting) -> str:
    """A row for each setting: at its best learning rate the losses, accuracy and the difference to `against`."""
    rows = []
    for each in settings:
        runs = each.runs[each.rate]
        trained = {run["run"]["results"]["trainable"] for run in runs}
        rows.append(
            [
                each.name,
                f"{min(trained):,}",
                ", ".join(f"{rate:g}" for rate in each.runs),
                f"{each.rate:g}" + " (edge)" * each.at_edge,
                str(len(runs)),
                f"{each.validation(each.rate):.3f}",
                f"{each.best.mean():.3f}",
                "" if each is against else nats(difference(each.best, against.best)),
                f"{mean(run['tests']['last']['reading']['accuracy'] for run in runs):.1%}",
            ]
        )
    head = (
        "setting",
        "trained",
        "learning rates",
        "best",
        "seeds",
        "validation loss",
        "test loss",
        "difference (95%)",
        "accuracy",
    )
    return markdown(head, rows)


def against_rate(settings: Iterable[Setting]) -> dict[str, list[tuple[float, float]]]:
    """Lines of the test loss against the learning rate, without runs that are no better than chance."""
    lines = {each.name: [(rate, float(each.test(rate).mean())) for rate in each.runs] for each in settings}
    return {name: [(rate, loss) for rate, loss in line if loss < CHANCE] for name, line in lines.items()}


def decades(lines: Mapping[str, Sequence[tuple[float, float]]]) -> list[float]:
    """Powers of ten in the range of x, and three times those."""
    xs = [x for line in lines.values() for x, _ in line]
    every = [factor * 10.0**power for power in range(-6, 4) for factor in (1, 3)]
    return [tick for tick in every if min(xs) * 0.99 <= tick <= max(xs) * 1.01]


def pictures(
    ranks: Mapping[str, Setting], targets: Mapping[str, Setting], batches: Mapping[str, Setting]
) -> dict[str, tuple[str, str]]:
    """File name -> (title, SVG): the five figures."""
    found = {}

    def draw(
        file: str, title: str, lines: Mapping[str, list[tuple[float, float]]], label: str, ticks: Sequence[float] = ()
    ) -> None:
        found[f"{file}.svg"] = (
            title,
            chart(lines, title, label, ticks or decades(lines), log=bool(not ticks or ticks[0])),
        )

    draw(
        "learning_rates", "test loss against the learning rate, by rank", against_rate(ranks.values()), "learning rate"
    )
    lora = {int(name[2:]): each for name, each in ranks.items() if name != "full"}
    at = {"LoRA": [(float(rank), float(each.best.mean())) for rank, each in lora.items()]}
    at["full fine-tuning"] = [(float(rank), float(ranks["full"].best.mean())) for rank in lora]
    draw("ranks", "test loss at the best learning rate against the rank", at, "rank", list(map(float, lora)))
    draw(
        "targets",
        "test loss against the learning rate, by adapted layers",
        against_rate(targets.values()),
        "learning rate",
    )
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, each in batches.items():
        kind, size = name.split()
        lines.setdefault(kind, []).append((float(size), float(each.best.mean())))
    lines = {kind: sorted(line) for kind, line in lines.items()}
    draw(
        "batch_sizes",
        "test loss at the best learning rate against the batch size",
        lines,
        "examples in a batch",
        sorted({x for line in lines.values() for x, _ in line}),
    )
    curves = {}
    for name, each in ranks.items():
        parts = np.mean([run["train_loss"] for run in each.runs[each.rate]], axis=0)
        curves[f"{name}, lr {each.rate:g}"] = [
            (100 * (i + 1) / len(parts), float(loss)) for i, loss in enumerate(parts)
        ]
    draw(
        "training",
        "training loss of each tenth of the run, at the best learning rate",
        curves,
        "percent of the run",
        (0, 20, 40, 60, 80, 100),
    )
    return found


def where(trials: Trials) -> list[str]:
    """Where and when the trials ran; of one origin only their number is said."""
    lines = origins(trials.values())
    if len(lines) > 1:
        return lines
    seeds = ", ".join(str(seed) for seed in sorted({trial["seed"] for trial in trials.values()}))
    return [f"{lines[0].rpartition(': ')[0]}: all {len(trials)} runs, seed {seeds}."]


def blocks(results: Sequence[Mapping[str, Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """What belongs between the page's marks, and the pictures: file name -> SVG. results: the study's, oldest first."""
    trials = merge(*(result["trials"] for result in reversed(results)))
    ranks, targets, batches = (group(trials, name) for name in (by_rank, by_targets, by_batch))
    claims = [*claims_of_ranks(ranks), *claims_of_targets(targets), *claims_of_batches(batches)]
    drawn = pictures(ranks, targets, batches)
    images = {file: f"![{title}]({STUDY}/{file})" for file, (title, _) in drawn.items()}
    largest = max(int(name.split()[1]) for name in batches)
    missing = {name: recipe.missing(trials) for name, recipe in recipes().items()}
    left = [
        f"Missing in `{name}.toml`: {handout.listed((t.row, t.seed) for t in some)}."
        for name, some in missing.items()
        if some
    ]
    found = {
        "claims": claims_table(claims, min(len(each.runs[each.rate]) for each in (*ranks.values(), *targets.values()))),
        "ranks": table(ranks.values(), ranks["full"])
        + "".join(f"\n\n{images[f'{file}.svg']}" for file in ("learning_rates", "ranks", "training")),
        "targets": table(targets.values(), targets["all-linear"]) + f"\n\n{images['targets.svg']}",
        "batch_size": table(batches.values(), batches[f"full {largest}"]) + f"\n\n{images['batch_sizes.svg']}",
        "machine": "\n".join(f"- {line}" for line in [*where(trials), *left]),
    }
    return found, {file: svg for file, (_, svg) in drawn.items()}


def pages() -> dict[Path, str]:
    """The page and its pictures that all results give."""
    found, images = blocks(all_results(STUDY))
    folder = PAGE.with_suffix("")
    return {PAGE: fill(PAGE.read_text(encoding="utf-8"), found)} | {folder / file: svg for file, svg in images.items()}


FLAGS = {name: about for name, about in handout.FLAGS.items() if name != "study"}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS))
