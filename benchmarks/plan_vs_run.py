"""What `graft train --plan` predicts, and what the run then takes: seconds and peak memory of three runs.

    python benchmarks/plan_vs_run.py [--steps 25] [--json-out FILE]

    short answers    LoRA r=16, batches of 16, loss on the completion
    every token      LoRA r=128, batches of 8, loss on all tokens
    all weights      full fine-tuning, batches of 4

Seconds are those of steps and validations without loading; memory is VmHWM.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
from harness import Run

RUNS: dict[str, dict[str, Any]] = {
    "short answers": {"rank": 16, "alpha": 64, "batch_size": 16},
    "every token": {"rank": 128, "batch_size": 8, "loss_on": "all"},
    "all weights": {"rank": 0, "batch_size": 4},
}
WITHIN = 0.2


def measure(flags: Mapping[str, Any], folder: Path) -> Run:
    """The plan of a run, and the run: seconds and MB, planned and measured."""
    flags = {**flags, "eval_every": flags["max_iters"], "val_limit": 64, "out_dir": folder / "run"}
    plan = harness.run_graft("train", {**flags, "plan": True}, folder / "plan")
    run = harness.run_graft("train", flags, folder / "train")
    planned = {"seconds": plan["train_seconds"] + plan["validation_seconds"], "peak_rss_mb": plan["peak_rss_mb"]}
    pairs = {
        key: {"predicted": value, "measured": run[key], "ratio": run[key] / value} for key, value in planned.items()
    }
    return {**pairs, "other_cpu_share": run["other_cpu_share"]}


def summarise(found: Mapping[str, Run]) -> dict[str, Any]:
    """The claim: measured / planned within WITHIN of 1, seconds and memory, in every run."""
    keys = ("seconds", "peak_rss_mb")
    ratios = {f"{key}, {name}": run[key]["ratio"] for name, run in found.items() for key in keys}
    holds = all(abs(ratio - 1) <= WITHIN for ratio in ratios.values())
    return {
        "found": found,
        "ratios": {name: {"rounds": [ratio], "median": ratio} for name, ratio in ratios.items()},
        "claims": {"minutes and memory within 20% of the plan": holds},
    }


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One plan and one run of each kind."""
    base = {"init_from": args.model, "data": args.data, "max_iters": args.steps}
    found = {}
    for name, flags in RUNS.items():
        found[name] = measure({**base, **flags}, work / name)
        harness.note(f"{name} done")
    return {"config": {"steps": args.steps, "runs": RUNS}, **summarise(found)}


FLAGS: dict[str, dict[str, Any]] = {
    "steps": {"type": int, "default": 25, "help": "optimizer steps of each run (default 25)"},
    **harness.SOURCE,
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS))
