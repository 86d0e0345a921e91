"""How long graft takes to answer: CPU seconds of its help, wall seconds from the command to the first optimiser step.

    python benchmarks/startup.py [--runs 10] [--json-out FILE]

Beside them what importing the peers' libraries alone takes. Each run is a process of its own and the kinds take turns;
medians count. The first optimiser step is that of SmolLM2-135M on Rotten Tomatoes with the defaults of `graft train`,
counted from the command's first line of Python; files in the page cache, compiled kernels made by an earlier run.
A table goes to stderr, one JSON object to the last line of stdout.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from _machine import describe, run_measured
from train_vs_peers import OFFLINE, ROOT, BenchmarkError, git_state

GRAFT = [sys.executable, "-m", "graftlm"]
COMMANDS: dict[str, list[str]] = {
    "graft --help": [*GRAFT, "--help"],
    "graft train --help": [*GRAFT, "train", "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
    "import transformers, peft, trl": [
        sys.executable,
        "-c",
        "import transformers, peft, trl; transformers.AutoModelForCausalLM, peft.LoraConfig, trl.SFTTrainer",
    ],
}
TRAININGS = {"graft train": "auto", "graft train --compile on": "on"}
FIRST_STEP = [*GRAFT, "train", "--max_iters", "1", "--val_limit", "8", "--json"]
TRAINED = 3  # rounds with a training: it takes longer, and varies less


def timed(command: Sequence[str], folder: Path, **environment: str) -> tuple[dict[str, float], str]:
    """CPU and wall seconds of one process in the new folder `folder`, and what it printed."""
    folder.mkdir()
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    seen = run_measured(command, folder, {**os.environ, **OFFLINE, **environment, "PYTHONPATH": path})
    if seen.status != 0:
        raise BenchmarkError(f"{' '.join(command)} failed:\n{seen.stderr[-2000:]}")
    figures = {"cpu_seconds": seen.cpu_seconds, "seconds": seen.seconds, "other_cpu_share": seen.other_cpu_share}
    return figures, seen.stdout


def measure(runs: int, work: Path) -> dict[str, list[dict[str, float]]]:
    """All kinds in turn, `runs` times; one run of each comes before, to fill the page cache."""
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(runs + 1):
        for at, (name, command) in enumerate(COMMANDS.items()):
            found.setdefault(name, []).append(timed(command, work / f"command-{number}-{at}")[0])
        for name, compile_ in TRAININGS.items() if number <= TRAINED else ():
            words = ["--compile", compile_, "--out_dir", str(work / f"out-{number}-{compile_}")]
            figures, out = timed([*FIRST_STEP, *words], work / f"train-{number}-{compile_}")
            figures["seconds_to_first_step"] = json.loads(out)["seconds_to_first_step"]
            found.setdefault(name, []).append(figures)
        print(f"round {number} of {runs} done", file=sys.stderr)
    return {name: each[1:] for name, each in found.items()}


def summarise(found: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Medians of each kind, and whether the claims hold."""
    medians = {name: {key: median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    holds: dict[str, Callable[[], bool]] = {
        "graft --help within 0.3 s of CPU time": lambda: medians["graft --help"]["cpu_seconds"] <= 0.3,
        "first optimiser step within 5 s": lambda: medians["graft train"]["seconds_to_first_step"] <= 5,
        "within 12 s with --compile on, kernels made before": lambda: (
            medians["graft train --compile on"]["seconds_to_first_step"] <= 12
        ),
    }
    return {"medians": medians, "claims": {claim: check() for claim, check in holds.items()}}


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'':32}{'CPU s':>8}{'wall s':>8}"]
    for name, m in summary["medians"].items():
        first = f"   first step after {m['seconds_to_first_step']:.2f} s" if "seconds_to_first_step" in m else ""
        lines.append(f"{name:32}{m['cpu_seconds']:8.2f}{m['seconds']:8.2f}{first}")
    lines += [f"{claim + '?':44}{'yes' if holds else 'NO'}" for claim, holds in summary["claims"].items()]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="runs of each kind (default 10; of the training 3)")
    parser.add_argument("--json-out", type=Path, help="write the JSON object to this file too")
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as name:
        try:
            found = measure(args.runs, Path(name))
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    summary = summarise(found)
    print(table(summary), file=sys.stderr)
    report = {"machine": describe(), "graftlm": git_state(), "config": {"runs": args.runs}, **summary, "runs": found}
    if args.json_out:
        args.json_out.parent.mkdir(parents=True, exist_ok=True)
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
