"""docs/dpo_frontier.md from the newest result of controlled_sentiment.py. Letters: as in frontier.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from frontier import seed_interval
from render import DOCS, Band, chart, fill, machine, markdown, newest

PAGE = DOCS / "dpo_frontier.md"
TICKS = (0, 0.1, 0.5, 1, 2, 3, 5, 8, 12, 20, 50)
BAND_POINTS = 40


def ends(pair: Sequence[float] | None, form: str) -> str:
    """An interval; empty where there is none."""
    return f"{pair[0]:{form}} to {pair[1]:{form}}" if pair else ""


def both(found: Mapping[str, Any], form: str) -> str:
    """A mean with its two intervals, in words."""
    seeds = f"{ends(found['ci_seeds'], form)} over seeds, " if found["ci_seeds"] else "one seed, "
    return f"{found['mean']:{form}} ({seeds}{ends(found['ci_prompts'], form)} over prompts)"


# --------------------------------------------------------------------------------------------------------- the figure


def seed_lines(result: Mapping[str, Any], name: str) -> list[list[tuple[float, float]]]:
    """The (KL, reward) points of each seed's line in order of KL, from the reference on."""
    about = result["variants"][name]
    start = (0.0, result["references"][about["reference"]]["1"]["reward"])
    found = []
    for seed, own in about["points"].items():
        before = result["variants"][about["after"]]["points"][seed] if about["after"] else {}
        rows = [row for step, row in before.items() if int(step) <= about["after_step"]] + list(own.values())
        found.append(sorted([start, *((row["kl"], row["reward"]) for row in rows)]))
    return found


def mean_line(result: Mapping[str, Any], name: str) -> tuple[list[tuple[float, float]], Band]:
    """The mean of the seeds' lines at the KLs of the first one's checkpoints, and their range; up to the shortest."""
    lines = [np.array(points) for points in seed_lines(result, name)]
    shortest = min(line[-1, 0] for line in lines)

    def at(kl: float) -> list[float]:
        return [float(np.interp(kl, line[:, 0], line[:, 1])) for line in lines]

    kls = sorted({float(min(kl, shortest)) for kl in lines[0][:, 0]})
    grid = [shortest * (i / BAND_POINTS) ** 2 for i in range(BAND_POINTS + 1)]
    band = [(kl, min(at(kl)), max(at(kl))) for kl in grid]
    return [(kl, mean(at(kl))) for kl in kls], band if len(lines) > 1 else []


def picture(result: Mapping[str, Any], names: Sequence[str], title: str) -> str:
    """The lines of some variants, and best-of-n of their reference."""
    lines, bands = {}, {}
    for name in names:
        lines[name], band = mean_line(result, name)
        if band:
            bands[name] = band
    best = result["references"]["reference"]
    lines["best-of-n of the reference"] = [(row["kl"], row["reward"]) for row in best.values()]
    return chart(lines, title, "KL to the reference, nats", TICKS, root=True, bands=bands)


# --------------------------------------------------------------------------------------------------------- the tables


def best_at(result: Mapping[str, Any], kl: float) -> float | None:
    """Best-of-n's reward at a KL, on a straight line between its points; None beyond the largest n."""
    rows = list(result["references"]["reference"].values())
    if kl > rows[-1]["kl"]:
        return None
    return float(np.interp(kl, [row["kl"] for row in rows], [row["reward"] for row in rows]))


def cells_at(found: Mapping[str, Any] | None) -> list[str]:
    """The cells of a reward at a KL; empty where a line ends before it."""
    if not found:
        return ["", "", ""]
    return [f"{found['mean']:.3f}", ends(found["ci_seeds"], ".3f"), ends(found["ci_prompts"], ".3f")]


def needed(about: Mapping[str, Any]) -> list[str]:
    """The cells of the mean KL at which a variant's seeds have the recipe's reward: with how many of them, interval."""
    seeds = about["kl_at_reward"]
    found = [kl for kl in seeds if kl is not None]
    if len(found) < len(seeds):
        return [f"{len(found)} of {len(seeds)} seeds", ""]
    return [f"{mean(found):.2f}", ends(seed_interval(found), ".2f")]


def rewards(result: Mapping[str, Any]) -> str:
    """Each variant's reward at the fixed KLs, and the KL that the recipe's reward takes."""
    kls = result["recipe"]["evaluation"]["kl"]
    rows = [
        [
            name,
            str(len(about["points"])),
            *(cell for kl in kls for cell in cells_at(about["at"][f"{kl:g}"])),
            *needed(about),
        ]
        for name, about in result["variants"].items()
    ]
    best = [best_at(result, kl) for kl in kls]
    cells = [cell for each in best for cell in (f"{each:.3f}" if each is not None else "", "", "")]
    rows.append(["best-of-n of the reference", "", *cells, "", ""])
    heads = [head for kl in kls for head in (f"at {kl:g} nats", "95%, seeds", "95%, prompts")]
    reward = f"nats at {result['recipe']['evaluation']['reward']:g}"
    return markdown(("variant", "seeds", *heads, reward, "95%, seeds"), rows)


def differences(result: Mapping[str, Any]) -> str:
    """Each variant minus the one that it is compared with, at the fixed KLs, and what both intervals hold."""
    rows = []
    for name, about in result["variants"].items():
        for kl, found in about["differences"].items():
            if found:
                intervals = [ends(found["ci_seeds"], "+.3f"), ends(found["ci_prompts"], "+.3f")]
                shared = str(len(found["seeds"]))
                rows.append([name, about["against"], kl, shared, f"{found['mean']:+.3f}", *intervals, found["verdict"]])
    head = ("variant", "compared with", "KL, nats", "seeds", "difference", "95%, seeds", "95%, prompts", "reading")
    return markdown(head, rows, left=2)


def spread(rows: Sequence[Mapping[str, float]], key: str, form: str) -> list[str]:
    """The cells of a mean over seeds and its range."""
    values = [row[key] for row in rows]
    return [f"{mean(values):{form}}", f"{min(values):{form}} to {max(values):{form}}" if len(values) > 1 else ""]


def checkpoints(result: Mapping[str, Any]) -> str:
    """Every checkpoint: means over the seeds that have it, and their ranges."""
    rows = []
    for name, about in result["variants"].items():
        seeds = about["points"].values()
        for step in sorted({step for points in seeds for step in points}, key=int):
            own = [points[step] for points in seeds if step in points]
            ended, tokens = (mean(row[key] for row in own) for key in ("ended", "tokens"))
            cells = [*spread(own, "kl", ".2f"), *spread(own, "reward", ".3f"), f"{ended:.0%}", f"{tokens:.0f}"]
            rows.append([name, step, str(len(own)), *cells])
    head = ("variant", "step", "seeds", "KL, nats", "range", "mean reward", "range", "ended", "tokens")
    return markdown(head, rows)


def changes(own: Mapping[str, Any]) -> str:
    """What a variant of the recipe overrides."""
    found = [
        f"`{key} = {value}`"
        for table in ("sft", "pairs", "train")
        for key, value in own.get(table, {}).items()
        if key != "eval_every"
    ]
    if own.get("after"):
        found.append(f"continues *{own['after']}* from step {own['after_step']} on pairs of its answers")
    return ", ".join(found)


def variants(result: Mapping[str, Any]) -> str:
    """What each variant changes."""
    shown = [own for own in result["recipe"]["variants"] if own["name"] in result["variants"]]
    return markdown(("variant", "what it is", "changes"), [[o["name"], o["why"], changes(o)] for o in shown], left=3)


# ---------------------------------------------------------------------------------------------------------- the page


def readings(result: Mapping[str, Any]) -> str:
    """What did not reproduce and what does not hold, first; then what does; then what one seed cannot show."""
    values = result["recipe"]["evaluation"]
    kl, reward = values["claim_kl"], values["reward"]
    at = {name: about["at"][f"{kl:g}"] for name, about in result["variants"].items() if about["at"][f"{kl:g}"]}
    top = max(at, key=lambda name: float(at[name]["mean"]))
    verb = "reaches" if at[top]["mean"] >= reward else "does **not** reach"
    first = (
        f"- DPO {verb} the paper's {reward:g} at {kl:g} nats. The highest of {len(at)} variants there, *{top}*, has "
        f"{both(at[top], '.3f')}; best-of-n of the reference has {best_of_largest(result)}."
    )
    lines: dict[str, list[str]] = {"not distinguished": [], "lower": [], "higher": [], "one seed": []}
    for name, about in result["variants"].items():
        if found := about["differences"].get(f"{kl:g}"):
            text = READINGS[found["verdict"]].format(
                name=name, against=about["against"], kl=kl, found=both(found, "+.3f")
            )
            lines[found["verdict"]].append(f"- {text}")
    return "\n".join([first, *(line for each in lines.values() for line in each)])


READINGS = {
    "higher": "*{name}* lies above *{against}* at {kl:g} nats: {found}.",
    "lower": "*{name}* lies **below** *{against}* at {kl:g} nats: {found}.",
    "not distinguished": "*{name}* is **not** shown to differ from *{against}* at {kl:g} nats: {found}.",
    "one seed": "*{name}* against *{against}* at {kl:g} nats: {found}. One seed shows no more.",
}
"""A difference in words, by its verdict."""


def best_of_largest(result: Mapping[str, Any]) -> str:
    """Best-of-n at the largest n, in words."""
    n, row = list(result["references"]["reference"].items())[-1]
    return f"{row['reward']:.3f} at {row['kl']:.2f} nats with n = {n}"


def blocks(result: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """What belongs between the page's marks, and the pictures by file name."""
    shown = result["variants"]
    several = [name for name, about in shown.items() if len(about["points"]) > 1]
    other = [name for name in shown if name not in several]
    titles = {"seeds.svg": "reward against KL: variants with several training seeds"}
    pictures = {"seeds.svg": picture(result, several, titles["seeds.svg"])}
    if other:
        titles["one-seed.svg"] = "reward against KL: variants with one training seed, next to the first one"
        pictures["one-seed.svg"] = picture(result, [next(iter(shown)), *other], titles["one-seed.svg"])
    judge = result["found"]["classifier"]["last"]["val_accuracy"]
    last = max(len(about["points"]) for about in shown.values()) - 1
    found = {
        "readings": readings(result),
        "machine": f"{result['date']}, one thread of two, next to other work; training seeds 0 to {last}, seed "
        f"{result['recipe']['evaluation']['seed']} of the evaluated answers. {machine(result)}",
        "variants": variants(result),
        "pairs": f"{pairs(result)}\n\nThe classifier is right on {judge:.1%} of its validation reviews.",
        "figures": "\n\n".join(f"![{title}](dpo_frontier/{name})" for name, title in titles.items()),
        "rewards": rewards(result),
        "differences": differences(result),
        "checkpoints": checkpoints(result),
        "samples": samples(result),
    }
    return found, pictures


def pairs(result: Mapping[str, Any]) -> str:
    """How many pairs each variant trains on, and their mean rewards."""
    head = ("pairs of", "prompts", "pairs", "reward of the chosen", "of the rejected")
    rows = []
    for name, found in result["found"].items():
        if name.startswith("pairs "):
            means = [f"{found[key]:.3f}" for key in ("reward_chosen", "reward_rejected")]
            rows.append([name.removeprefix("pairs "), f"{found['prompts']:,}", f"{found['pairs']:,}", *means])
    return markdown(head, rows)


def samples(result: Mapping[str, Any]) -> str:
    """Two held-out prompts, continued by the references and by each variant with several seeds."""
    shown = {name: about for name, about in result["variants"].items() if len(about["points"]) > 1}
    return "\n".join(
        f"- {name}: " + " / ".join(f"“{' '.join(text.split())}”" for text in texts[:2])
        for name, texts in result["texts"].items()
        if name in result["references"] or name in shown
    )


def pages() -> dict[Path, str]:
    """The page and its pictures."""
    found, pictures = blocks(newest("controlled"))
    text = fill(PAGE.read_text(encoding="utf-8"), found)
    return {PAGE: text, **{PAGE.with_suffix("") / name: svg for name, svg in pictures.items()}}
