"""Has anything become slower? This checkout against an earlier one, task by task.

    git worktree add ../before COMMIT
    python benchmarks/before_and_now.py --before ../before [--rounds 3] [--only train,score] [--json-out FILE]

Both run as their user runs them, `python -m graftlm …` with this interpreter, on the same model, reviews and pairs. A
round runs before, now and before again: now is compared with the mean of the two, and how far those differ is this
machine's noise. A task holds where now is slower by no more than that, or than 5%. A flag that the earlier checkout
does not know is passed under its old name (RENAMED); a task that it cannot run is reported as unknown.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import harness
from dpo_vs_trl import write_pairs
from harness import ROOT, BenchmarkError, Round, Run

from graftlm.config import renamed

SIDES = ("before", "now", "again")
NOISE = 0.05
"""The least that two medians of few runs may differ by."""
RENAMED = {new: old for old, new in renamed.FLAGS.items()}
"""Flag -> its name in 0.1.0."""
LORA = {"rank": 16, "alpha": 64}
TRAIN = {"batch_size": 16, "val_limit": 8}
STEPS, PAIRS = 12, 8
"""Of preferences: steps, and pairs in each."""
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "train": ("train", {**LORA, **TRAIN, "max_iters": 24}),
    "train, all tokens": ("train", {**LORA, **TRAIN, "loss_on": "all", "max_iters": 12}),
    "full": ("train", {"method": "full", **TRAIN, "max_iters": 10}),
    "preferences": ("train", {**LORA, "objective": "dpo", "batch_size": PAIRS, "max_iters": STEPS, "kl_samples": 0}),
    "score": ("evaluate", {"mode": "score", "limit": 600, "batch_size": 32}),
    "generate": ("evaluate", {"mode": "generate", "limit": 300, "batch_size": 32}),
    "few-shot": ("evaluate", {"mode": "score", "shots": 8, "limit": 200}),
    "help": ("", {}),
}


@cache
def help_text(checkout: Path, verb: str) -> str:
    """What `graft VERB --help` prints in a checkout."""
    command = [sys.executable, "-m", "graftlm", verb, "--help"]
    done = subprocess.run(command, env=harness.child_environment(checkout), capture_output=True, text=True, check=False)
    return done.stdout.replace("-", "_")


def spelled(flags: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The flags under the names that a help page knows: a renamed one that it lacks gets its old name."""
    known = {name: bool(re.search(rf"__{name}\b", text)) for name in flags}
    return {RENAMED.get(name, name) if not known[name] else name: value for name, value in flags.items()}


def measure(name: str, checkout: Path, settings: Mapping[str, Any], folder: Path) -> Run:
    """One run of a task in a checkout: its speed and its peak memory."""
    verb, flags = TASKS[name]
    environment = harness.child_environment(checkout)
    if not verb:
        folder.mkdir(parents=True, exist_ok=True)
        done = harness.run_process([sys.executable, "-m", "graftlm", "--help"], folder, environment)
        return {
            "speed": 1 / done.seconds,
            "peak_rss_mb": done.peak_rss_mb,
            "process_seconds": done.seconds,
            "other_cpu_share": done.other_cpu_share,
        }
    flags = {"init_from": settings["model"], "data": settings["data"], **flags}
    if verb == "train":
        flags |= {"out_dir": folder / "run", "eval_every": flags["max_iters"]}
    if name == "preferences":
        # Pairs are plain text to the versions before --chat.
        flags |= {"data": settings["pairs"], **({"chat": "off"} if "__chat" in help_text(checkout, verb) else {})}
    words = harness.graft_words(verb, spelled(flags, help_text(checkout, verb)))
    run = harness.run_json([sys.executable, "-m", "graftlm", *words], folder, environment)
    kept = {key: run[key] for key in ("process_seconds", "other_cpu_share")}
    return {"speed": run["examples_per_s"], "peak_rss_mb": run["process_peak_mb"], **kept}


def knows(name: str, checkout: Path, settings: Mapping[str, Any], folder: Path) -> bool:
    """Whether a checkout can run the task; the run also warms the page cache."""
    try:
        measure(name, checkout, settings, folder)
    except BenchmarkError as error:
        harness.note(f"{name}: unknown to {checkout}: {str(error).splitlines()[-1]}")
        return False
    return True


def summarise(found: Mapping[str, Sequence[Round]]) -> dict[str, Any]:
    """Medians of each task, now over before within each round, and whether now is no slower than the noise allows."""
    medians, ratios, claims = dict[str, dict[str, float]](), dict[str, Any](), dict[str, bool]()
    for name, rounds in found.items():
        before = [(each["before"]["speed"] + each["again"]["speed"]) / 2 for each in rounds]
        speeds = [each["now"]["speed"] / old for each, old in zip(rounds, before, strict=True)]
        noise = max(NOISE, median(abs(each["again"]["speed"] / each["before"]["speed"] - 1) for each in rounds))
        medians[name] = {
            "before": median(before),
            "now": median(each["now"]["speed"] for each in rounds),
            "noise": noise,
            "memory now/before": median(harness.ratios(rounds, "peak_rss_mb", "now", "before")),
        }
        ratios[f"{name} now/before"] = {"rounds": speeds, "median": median(speeds)}
        claims[f"{name}: no slower than before but for noise"] = median(speeds) >= 1 - noise
    return {"medians": medians, "ratios": ratios, "claims": claims}


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All tasks, round by round."""
    earlier = args.before.resolve()
    if not (earlier / "src" / "graftlm").is_dir():
        raise BenchmarkError(f"--before {args.before}: no checkout of graftlm")
    write_pairs(args.data, STEPS, PAIRS, work / "pairs")
    settings = {"model": args.model, "data": args.data, "pairs": work / "pairs"}
    found, unknown, rejected = dict[str, list[Round]](), list[str](), list[Run]()
    for name in args.only:
        measure(name, ROOT, settings, work / f"{name} now")  # a task that fails here is a fault of the benchmark
        if not knows(name, earlier, settings, work / f"{name} before"):
            unknown.append(name)
            continue
        sides = {side: partial(measure, name, ROOT if side == "now" else earlier, settings) for side in SIDES}
        harness.note(name)
        rounds, disturbed = harness.run_rounds(sides, args, work / name, "speed")
        found[name] = [each for each in rounds if len(each) == len(SIDES)]
        rejected += [{"task": name, **each} for each in disturbed]
        if not found[name]:
            raise BenchmarkError(f"{name}: no undisturbed round: stop other work, or raise --max-other")
    config = {"rounds": args.rounds, "max_other": args.max_other, "before": harness.git_commit(earlier)}
    about = {"config": config, "unknown_before": unknown, "rejected": len(rejected)}
    return {**about, **summarise(found), "runs": found}


FLAGS: dict[str, dict[str, Any]] = {
    "before": {"type": Path, "required": True, "help": "a checkout of an earlier commit"},
    "only": {"type": harness.choices(tuple(TASKS)), "default": list(TASKS), "help": "tasks, by commas"},
    **harness.SOURCE,
    **harness.ROUNDS,
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS))
