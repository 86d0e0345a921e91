"""Every method's training speed and memory beside LoRA r=16 and, where PEFT has the method, beside PEFT's.

    python benchmarks/methods.py [--rounds 1] [--steps 12] [--only "lora,prefix"] [--json-out FILE]

    graft NAME   `graft train --method NAME` of this checkout at the method's own settings (lora and dora: r=16)
    peft NAME    the strong peer of train_vs_peers.py with PEFT's LoRA, DoRA or prefix tuning in place of it

All on the same reviews in batches of 16, loss on the completion, each a process of its own, in turn; the peers in the
number format in which PEFT's LoRA is fastest here. Ratios are formed within a round, medians count. A run during which
others used more than 3% of the cores is thrown away and repeated. A table goes to stderr, one JSON object to the last
line of stdout. What each method reaches is another question: docs/methods.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from _machine import describe
from _peers import PREFIX_LENGTH, Job
from _rounds import Round, Run, accepted_run, ratios
from train_vs_peers import ROOT, BenchmarkError, choose, git_state, measure, parse, prepare

METHODS: dict[str, tuple[tuple[str, str], ...]] = {
    "lora": (),
    "dora": (),
    "adapter": (),
    "prefix": (("prefix_length", str(PREFIX_LENGTH)),),
    "bitfit": (("add_biases", "true"),),
    "ia3": (),
    "full": (),
}
IN_PEFT = ("lora", "dora", "prefix")
OF_LORA = {"dora": 0.8, "adapter": 0.8, "prefix": 0.8, "bitfit": 0.8, "ia3": 0.8, "full": 0.5}
OF_PEFT = 2.0


def run_rounds(args: argparse.Namespace, job: Job, work: Path) -> tuple[list[dict[str, Run]], list[Run]]:
    """All rounds: (accepted runs by "graft NAME" and "peft NAME", rejected ones)."""
    numbers = count(1)

    def one(side: str, name: str) -> Run:
        mine = replace(job, method=name, flags=METHODS[name], trial=True)
        (work / "job.json").write_text(json.dumps(asdict(mine)), encoding="utf-8")
        run = {"contender": f"{side} {name}", **measure(side, mine, work, work / f"run-{next(numbers)}")}
        print(
            f"  {run['contender']:14}{run['examples_per_s']:8.2f} examples/s{run['peak_rss_mb']:8.0f} MB",
            f" others used {run['other_cpu_share']:.1%} of the cores ({run['process_seconds']:.0f} s)",
            file=sys.stderr,
        )
        return run

    rounds: list[dict[str, Run]] = []
    rejected: list[Run] = []
    for _ in range(args.rounds):
        rounds.append({})
        for name in args.only:
            for side in ("graft", "peft") if name in IN_PEFT else ("graft",):
                run, thrown = accepted_run(partial(one, side, name), args.max_other, args.attempts)
                rejected += thrown
                if run is not None:
                    rounds[-1][f"{side} {name}"] = run
    return rounds, rejected


def summarise(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians, ratios within rounds, and whether the claims hold."""
    names = list(dict.fromkeys(name for each in rounds for name in each))
    keys = ("examples_per_s", "peak_rss_mb", "trainable")
    medians = {n: {key: median(each[n][key] for each in rounds if n in each) for key in keys} for n in names}
    pairs = {f"{name} / lora": (f"graft {name}", "graft lora", bound) for name, bound in OF_LORA.items()}
    pairs |= {f"{name} / PEFT's": (f"graft {name}", f"peft {name}", OF_PEFT) for name in IN_PEFT}
    compared: dict[str, Any] = {}
    claims: dict[str, bool | None] = {}
    for what, (top, bottom, bound) in pairs.items():
        found = ratios(rounds, "examples_per_s", top, bottom)
        if found:
            compared[f"examples/s {what}"] = {"rounds": found, "median": median(found)}
        claims[f"{what}: at least {bound:g}"] = median(found) >= bound if found else None
    return {"medians": medians, "ratios": compared, "claims": claims}


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'':16}{'examples/s':>12}{'peak MB':>10}{'trained':>14}"]
    for name, m in summary["medians"].items():
        lines.append(f"{name:16}{m['examples_per_s']:12.2f}{m['peak_rss_mb']:10.0f}{m['trainable']:14,.0f}")
    for name, ratio in summary["ratios"].items():
        lines.append(f"{name:32}{ratio['median']:7.3f}   ({'  '.join(f'{x:.3f}' for x in ratio['rounds'])})")
    words = {True: "yes", False: "NO", None: "not measured"}
    return "\n".join([*lines, *(f"{claim + '?':40}{words[holds]}" for claim, holds in summary["claims"].items())])


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="runs of each (default 1: about 10 minutes)")
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of a run (default 12)")
    parser.add_argument("--only", default=",".join(METHODS), help="methods, by commas")
    parser.add_argument("--max-other", type=float, default=0.03, help="share of the cores others may use (0.03)")
    parser.add_argument("--json-out", type=Path, help="write the JSON object to this file too")
    mine = parser.parse_args(words)
    only = mine.only.split(",")
    if unknown := [name for name in only if name not in METHODS]:
        parser.error(f"unknown method {unknown[0]!r}: known are {', '.join(METHODS)}")
    args = parse(["--steps", str(mine.steps), "--rounds", str(mine.rounds), "--max-other", str(mine.max_other)])
    args.only = ["peft"]
    sys.path.insert(0, str(ROOT / "src"))
    from graftlm.errors import GraftError

    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as name:
        work = Path(name)
        try:
            job, hashes = prepare(args, work)
            job, trials = choose(job, args, work)
            args.only = only
            rounds, rejected = run_rounds(args, job, work)
        except (BenchmarkError, GraftError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    summary = summarise(rounds)
    print(table(summary), file=sys.stderr)
    config = {**asdict(job), "model": args.model, "examples": f"first {job.steps * job.batch_size} of {args.data}"}
    about = {"machine": describe(), "graftlm": git_state(), "config": {**config, **hashes}, "trials": trials}
    report = {**about, **summary, "runs": rounds, "rejected": rejected}
    if mine.json_out:
        mine.json_out.parent.mkdir(parents=True, exist_ok=True)
        mine.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
