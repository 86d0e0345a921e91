"""Has anything become slower? This checkout against an earlier one of ourselves, on this machine, in turn.

    git worktree add ../before COMMIT
    python benchmarks/before_and_now.py --before ../before [--rounds 3] [--only train,score] [--json-out FILE]

Both are run as their user runs them, `python -m graftlm …` of either folder with this interpreter, on the same model,
reviews and pairs: LoRA r=16 on completions and on every token, full fine-tuning, preferences, scoring, generating,
few-shot scoring, and the help page. Each run is a process of its own; ratios are formed within a round, and the median
counts. A run during which others used more than 3% of the cores is thrown away and repeated. In a round come before,
now, and before again, whose mean it is compared with: how far its two runs lie apart is what this machine calls
noise, and a task holds where now is slower than before by no more than that, or than 5%. A task that the earlier
checkout did not know yet is told as such. A table goes to stderr, one JSON object to the last line of stdout.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from _machine import describe, run_measured
from _rounds import Run, accepted_run
from dpo_vs_trl import write_pairs
from train_vs_peers import OFFLINE, ROOT, BenchmarkError, git_state

SIDES = ("before", "now", "again")
NOISE = 0.05
"""What two medians of few runs may differ by at the least."""
MODEL = ("evaluate", "--init_from=smollm2-135m", "--data=rotten-tomatoes-pypi")
LORA = ("--rank=16", "--alpha=64", "--batch_size=16", "--val_limit=8", "--json")
STEPS, PAIRS = 12, 8
"""Of preferences: steps, and pairs in each."""
TASKS: dict[str, tuple[str, ...]] = {
    "train": ("train", *LORA, "--max_iters=24", "--eval_every=24"),
    "train, all tokens": ("train", *LORA, "--loss_on=all", "--max_iters=12", "--eval_every=12"),
    "full": ("train", "--method=full", *LORA[2:], "--max_iters=10", "--eval_every=10"),
    "preferences": (
        *("train", "--objective=dpo", "--rank=16", "--alpha=64", f"--batch_size={PAIRS}", f"--max_iters={STEPS}"),
        *(f"--eval_every={STEPS}", "--kl_samples=0", "--json"),
    ),
    "score": (*MODEL, "--read=score", "--limit=600", "--batch_size=32", "--json"),
    "generate": (*MODEL, "--read=generate", "--limit=300", "--batch_size=32", "--json"),
    "few-shot": (*MODEL, "--read=score", "--shots=8", "--limit=200", "--json"),
    "help": ("--help",),
}


def measure(name: str, checkout: Path, work: Path, folder: Path) -> Run:
    """One run of a task in a checkout, in the new folder `folder`: its speed, and its peak of memory."""
    folder.mkdir()
    words = list(TASKS[name])
    if words[0] == "train":
        words.append(f"--out_dir={folder / 'run'}")
    if name == "preferences":
        words.append(f"--data={work / 'data'}")
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": str(checkout / "src")}
    seen = run_measured([sys.executable, "-m", "graftlm", *words], folder, environment)
    if seen.status:
        raise BenchmarkError(f"{name} in {checkout} failed with status {seen.status}:\n{seen.stderr[-2000:]}")
    said = json.loads(seen.stdout) if "--json" in words else {"examples_per_s": 1 / seen.seconds}
    return {
        "speed": said["examples_per_s"],
        "peak_rss_mb": seen.max_rss_mb,
        "process_seconds": seen.seconds,
        "other_cpu_share": seen.other_cpu_share,
    }


def knows(name: str, checkout: Path, work: Path, folder: Path) -> bool:
    """Whether a checkout can do the task at all; a run that also warms the caches of the disk."""
    try:
        measure(name, checkout, work, folder)
    except BenchmarkError as error:
        print(f"{name}: not known to {checkout}: {str(error).splitlines()[-1]}", file=sys.stderr)
        return False
    return True


def rounds_of(
    name: str, checkouts: Mapping[str, Path], args: argparse.Namespace, work: Path
) -> tuple[list[dict[str, Run]], int]:
    """The rounds of one task, and how many runs were thrown away. A round with a run missing is an error."""
    numbers, found, rejected = count(1), [], 0
    for _ in range(args.rounds):
        done: dict[str, Run] = {}
        for side in SIDES:

            def once(side: str = side) -> Run:
                return measure(name, checkouts[side], work, work / f"{name}-{next(numbers)}")

            run, thrown_away = accepted_run(once, args.max_other, args.attempts)
            rejected += len(thrown_away)
            if run is None:
                raise BenchmarkError(f"{name}: no quiet run in {args.attempts} attempts; stop other work")
            done[side] = run
        speeds = "  ".join(f"{side} {done[side]['speed']:.3f}" for side in SIDES)
        print(f"  {name:20}{speeds}", file=sys.stderr)
        found.append(done)
    return found, rejected


def summarise(found: Mapping[str, Sequence[Mapping[str, Run]]]) -> dict[str, Any]:
    """Medians of each task, now's figures over before's round by round, and whether it is no slower but for noise."""
    medians, compared, claims = dict[str, dict[str, float]](), dict[str, Any](), dict[str, bool]()
    for name, rounds in found.items():
        before = [(each["before"]["speed"] + each["again"]["speed"]) / 2 for each in rounds]
        apart = [abs(each["again"]["speed"] / each["before"]["speed"] - 1) for each in rounds]
        speeds = [each["now"]["speed"] / old for each, old in zip(rounds, before, strict=True)]
        memory = [each["now"]["peak_rss_mb"] / each["before"]["peak_rss_mb"] for each in rounds]
        noise = max(NOISE, median(apart))
        medians[name] = {
            "before": median(before),
            "now": median(each["now"]["speed"] for each in rounds),
            "noise": noise,
            "memory now/before": median(memory),
        }
        compared[f"{name} now/before"] = {"rounds": speeds, "median": median(speeds)}
        claims[f"{name}: no slower than before but for noise"] = median(speeds) >= 1 - noise
    return {"medians": medians, "ratios": compared, "claims": claims}


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'':20}{'before':>10}{'now':>10}{'ratio':>8}{'noise':>8}{'memory':>8}   ratios of every round"]
    for (name, task), ratio, holds in zip(
        summary["medians"].items(), summary["ratios"].values(), summary["claims"].values(), strict=True
    ):
        lines.append(
            f"{name:20}{task['before']:10.3f}{task['now']:10.3f}{ratio['median']:8.3f}{task['noise']:8.3f}"
            f"{task['memory now/before']:8.3f}   {'  '.join(f'{x:.3f}' for x in ratio['rounds'])}"
            f"{'' if holds else '   SLOWER'}"
        )
    return "\n".join(lines)


def names(text: str) -> list[str]:
    """Tasks, by commas; those whose name begins with the word."""
    words = text.split(",")
    if strange := [word for word in words if not any(name.startswith(word) for name in TASKS)]:
        raise argparse.ArgumentTypeError(f"unknown task {strange[0]!r}: known are {', '.join(TASKS)}")
    return [name for name in TASKS if any(name.startswith(word) for word in words)]


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="a checkout of an earlier commit")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each task (default 3)")
    parser.add_argument("--only", type=names, default=list(TASKS), help="tasks, by commas (default: all)")
    parser.add_argument("--max-other", type=float, default=0.03, help="share of the cores others may use (0.03)")
    parser.add_argument("--attempts", type=int, default=3, help="runs until one is quiet enough (default 3)")
    parser.add_argument("--json-out", type=Path, help="write the JSON object to this file too")
    args = parser.parse_args(words)
    if not (args.before / "src" / "graftlm").is_dir():
        parser.error(f"--before {args.before}: no checkout of graftlm")
    return args


def run_all(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All tasks in turn: what `summarise` says, which were not known before, and how many runs were thrown away."""
    earlier = args.before.resolve()
    checkouts = {"before": earlier, "now": ROOT, "again": earlier}
    write_pairs("rotten-tomatoes-pypi", STEPS, PAIRS, work)
    for name in args.only:
        measure(name, ROOT, work, work / f"{name}-now")  # a task that fails here is a fault of the benchmark
    known = [name for name in args.only if knows(name, earlier, work, work / f"{name}-before")]
    found, rejected = dict[str, list[dict[str, Run]]](), 0
    for name in known:
        found[name], thrown_away = rounds_of(name, checkouts, args, work)
        rejected += thrown_away
    config = {"rounds": args.rounds, "max_other": args.max_other, "before": git_state(earlier)}
    unknown = [name for name in args.only if name not in known]
    return {"config": config, "unknown_before": unknown, "rejected": rejected, **summarise(found), "runs": found}


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    args = parse(words)
    sys.path.insert(0, str(ROOT / "src"))  # this checkout, not an installed graftlm
    with tempfile.TemporaryDirectory(prefix="before-and-now-") as work:
        try:
            summary = run_all(args, Path(work))
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    report = {"machine": describe(), "graftlm": git_state(), **summary}
    print(table(summary), file=sys.stderr)
    if args.json_out:
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
