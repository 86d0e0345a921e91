"""What `graft train --plan` says beside what then happens: minutes and peak memory of three different runs.

    python benchmarks/plan_vs_run.py [--steps 25] [--json-out FILE]

    short answers    LoRA r=16, batches of 16, the loss on the completion
    every token      LoRA r=128, batches of 8, the loss on all tokens
    all weights      full fine-tuning, batches of 4

Each is asked for its plan first, in a process of its own, and then run. Minutes are those of steps and validations
together, without loading; memory is VmHWM. A table goes to stderr, one JSON object to the last line of stdout.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _machine import describe
from startup import GRAFT, timed
from train_vs_peers import BenchmarkError, git_state

RUNS: dict[str, dict[str, str]] = {
    "short answers": {"rank": "16", "alpha": "64", "batch_size": "16"},
    "every token": {"rank": "128", "batch_size": "8", "loss_on": "all"},
    "all weights": {"rank": "0", "batch_size": "4"},
}
WITHIN = 0.2


def measure(flags: Mapping[str, str], steps: int, folder: Path) -> dict[str, Any]:
    """The plan of a run and the run itself: seconds and MB, planned and measured."""
    given = {**flags, "max_iters": str(steps), "eval_every": str(steps), "val_limit": "64"}
    given["out_dir"] = str(folder / "run")
    words = [*GRAFT, "train", *(word for name, value in given.items() for word in (f"--{name}", value)), "--json"]
    folder.mkdir()
    plan = json.loads(timed([*words, "--plan"], folder / "plan")[1])
    figures, out = timed(words, folder / "train")
    result = json.loads(out)
    return {
        "seconds": _pair(plan["train_seconds"] + plan["validation_seconds"], result["seconds"]),
        "peak_rss_mb": _pair(plan["peak_rss_mb"], result["peak_rss_mb"]),
        "other_cpu_share": figures["other_cpu_share"],
    }


def _pair(planned: float, measured: float) -> dict[str, float]:
    return {"planned": planned, "measured": measured, "ratio": measured / planned}


def summarise(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The claim: measured / planned within WITHIN of 1, minutes and memory, in every run."""
    off = [abs(run[key]["ratio"] - 1) for run in found.values() for key in ("seconds", "peak_rss_mb")]
    return {"found": found, "claims": {"minutes and memory within 20% of the plan": max(off) <= WITHIN}}


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'':16}{'planned s':>10}{'s':>8}{'ratio':>7}{'planned MB':>12}{'MB':>8}{'ratio':>7}"]
    for name, run in summary["found"].items():
        s, m = run["seconds"], run["peak_rss_mb"]
        lines.append(
            f"{name:16}{s['planned']:10.1f}{s['measured']:8.1f}{s['ratio']:7.2f}"
            f"{m['planned']:12.0f}{m['measured']:8.0f}{m['ratio']:7.2f}"
        )
    lines += [f"{claim + '?':44}{'yes' if holds else 'NO'}" for claim, holds in summary["claims"].items()]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25, help="optimiser steps of each run (default 25)")
    parser.add_argument("--json-out", type=Path, help="write the JSON object to this file too")
    args = parser.parse_args(words)
    found = {}
    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as name:
        try:
            for number, (run, flags) in enumerate(RUNS.items()):
                found[run] = measure(flags, args.steps, Path(name) / str(number))
                print(f"{run} done", file=sys.stderr)
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    summary = summarise(found)
    print(table(summary), file=sys.stderr)
    config = {"steps": args.steps, "runs": RUNS}
    report = {"machine": describe(), "graftlm": git_state(), "config": config, **summary}
    if args.json_out:
        args.json_out.parent.mkdir(parents=True, exist_ok=True)
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
