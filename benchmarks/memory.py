"""Peak memory: graft's training beside both peers', as one thing changes, and what reading labels takes.

    python benchmarks/memory.py [--only "batch 4,scoring"] [--steps 12] [--rounds 1] [--json-out FILE]

From one setting (batches of 16, LoRA r=16 on q, k and v of all layers, the loss on the completion) one thing is changed
at a time. The peers of train_vs_peers.py run beside graft, each in its fastest number format: the strongest one always,
TRL at the first setting and with the loss on every token. Labels are read as in evaluate_vs_peers.py.

What is unusual: no run is thrown away, for other work on the machine changes no peak. And a few steps do, because their
batches hold the longest reviews: two batches of the longest out of 64 batches (within so many graft sorts by length),
then the first reviews as they come. 12 steps, because graft goes over to compiled kernels at the 11th.

Memory is VmHWM of the process that trains, as it reads it itself, in MB (10^6 bytes): the peers' before a validation,
graft's behind one. Of reading labels it is what the parent process saw. Processes below the one that trains (graft's
compiler: every run compiles anew) are apart: the most that all of them held at once, looked at five times a second.
A table goes to stderr, one JSON object to the last line of stdout.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import evaluate_vs_peers as reading
from _machine import descendants_mb, describe
from _peers import Job
from _rounds import Run, ratios
from train_vs_peers import ROOT, BenchmarkError, choose, git_state, measure, parse, prepare

TRAININGS: dict[str, dict[str, Any]] = {  # setting -> the fields of Job that it changes
    "as it is": {},
    "batch 4": {"batch_size": 4},
    "batch 64": {"batch_size": 64},
    "rank 128": {"rank": 128, "alpha": 512},
    "every token": {"loss_on": "all"},
    "layers from 20 on": {"first_layer": 20},
}
WITH_TRL = ("as it is", "every token")
READINGS = {"scoring": ("hf-score", "graft-score"), "generating": ("hf-generate", "graft-generate")}
SETTINGS = (*TRAININGS, *READINGS)
LONGEST_OF = 64  # batches
LONG_BATCHES = 2
REVIEWS_READ = 512


class Below:
    """The most memory that all processes below one held at once, as far as was seen."""

    def __init__(self) -> None:
        self.peak_mb = 0.0

    def __call__(self, pid: int) -> bool:
        """Look once; the process goes on."""
        self.peak_mb = max(self.peak_mb, descendants_mb(pid))
        return False


def source(data: Path, batch_size: int, steps: int, folder: Path) -> Path:
    """A data folder whose training split begins with LONG_BATCHES of the longest reviews; other splits as they are."""
    folder.mkdir()
    for split in ("train", "validation", "test"):
        lines = [line for line in (data / f"{split}.jsonl").read_text(encoding="utf-8").split("\n") if line]
        if split == "train":
            lines = lines[: max(LONGEST_OF, steps) * batch_size]
            by_length = sorted(range(len(lines)), key=lambda i: -len(json.loads(lines[i])["text"]))
            long = by_length[: LONG_BATCHES * batch_size]
            lines = [lines[i] for i in (*long, *sorted(set(by_length) - set(long)))]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return folder


def job_of(changes: Mapping[str, Any], steps: int, work: Path) -> Job:
    """The job of one setting, its files in the new folder `work`."""
    from graftlm.files.assets import data_folder

    work.mkdir()
    batch_size = changes.get("batch_size", 16)
    data = source(data_folder("rotten-tomatoes-pypi"), batch_size, steps, work / "source")
    job, _ = prepare(parse(["--data", str(data), "--batch-size", str(batch_size), "--steps", str(steps)]), work)
    return replace(job, trial=True, **changes)


def train(setting: str, job: Job, rounds: int, work: Path) -> list[dict[str, Run]]:
    """All rounds of a setting of training; GRAFT_HOME is new each time, so compiled kernels and kept layers are too."""
    (work / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
    done: list[dict[str, Run]] = []
    for number in range(rounds):
        done.append({})
        for name in ("trl", "peft", "graft") if setting in WITH_TRL else ("peft", "graft"):
            below, home = Below(), str(work / f"home-{number}-{name}")
            run = measure(name, job, work, work / f"run-{number}-{name}", below, GRAFT_HOME=home)
            done[-1][name] = {**run, "below_mb": below.peak_mb}
            print(f"{setting}: {name} {run['peak_rss_mb']:.0f} MB ({run['process_seconds']:.0f} s)", file=sys.stderr)
    return done


def read(setting: str, task: reading.Task, rounds: int, work: Path) -> list[dict[str, Run]]:
    """All rounds of a way of reading labels, transformers' peer and graft."""
    done: list[dict[str, Run]] = []
    for number in range(rounds):
        done.append({})
        for name in READINGS[setting]:
            run = reading.measure(name, task, work / f"{setting}-{number}-{name}")
            done[-1][name.partition("-")[0]] = run
            print(f"{setting}: {name} {run['peak_rss_mb']:.0f} MB ({run['process_seconds']:.0f} s)", file=sys.stderr)
    return done


def run_all(args: argparse.Namespace, work: Path) -> tuple[dict[str, list[dict[str, Run]]], dict[str, float]]:
    """Setting -> its rounds, and the trials of the peers' number formats."""
    found: dict[str, list[dict[str, Run]]] = {}
    trials: dict[str, float] = {}
    if wanted := [name for name in args.settings if name in TRAININGS]:
        first = job_of({}, args.steps, work / "trials")
        chosen, tried = choose(first, parse(["--only", "trl,peft"]), work / "trials")
        trials |= tried
        for setting in wanted:
            folder = work / setting.replace(" ", "-")
            job = job_of(TRAININGS[setting], args.steps, folder)
            job = replace(job, precision=chosen.precision, trl_precision=chosen.trl_precision)
            found[setting] = train(setting, job, args.rounds, folder)
    if wanted := [name for name in args.settings if name in READINGS]:
        from graftlm.files.assets import model_folder

        model = str(model_folder("smollm2-135m"))
        task, tried = reading.choose(reading.Task(model, REVIEWS_READ, 32, {}), work)
        trials |= tried
        for setting in wanted:
            found[setting] = read(setting, task, args.rounds, work)
    return found, trials


def summarise(found: Mapping[str, Sequence[Mapping[str, Run]]]) -> dict[str, Any]:
    """Medians of each setting with graft's ratio to the strongest peer, and whether the claims hold."""
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for setting, rounds in found.items():
        peer = "peft" if setting in TRAININGS else "hf"
        peaks = {who: median(each[who]["peak_rss_mb"] for each in rounds) for who in rounds[0]}
        ratio = median(ratios(rounds, "peak_rss_mb", "graft", peer))
        figures[setting] = {"peak_rss_mb": {**peaks, "graft/strongest peer": ratio}}
        if setting in TRAININGS:
            figures[setting]["below_mb"] = {"graft": median(each["graft"]["below_mb"] for each in rounds)}
    compared: dict[str, dict[str, Any]] = {
        f"peak_rss_mb graft/{peer}": {"rounds": each, "median": median(each)}
        for peer in ("peft", "trl")
        if (each := ratios(found.get("as it is", ()), "peak_rss_mb", "graft", peer))
    }

    def at_most(bound: float, peer: str) -> bool | None:
        ratio = compared.get(f"peak_rss_mb graft/{peer}")
        return ratio["median"] <= bound if ratio else None

    return {
        "found": figures,
        "ratios": compared,
        "claims": {
            "at most 0.7 of the strongest peer's memory": at_most(0.7, "peft"),
            "at most 0.5 of trl's memory": at_most(0.5, "trl"),
            "less memory than the strongest peer at every setting": all(
                each["peak_rss_mb"]["graft/strongest peer"] < 1 for each in figures.values()
            ),
        },
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a reader."""
    columns = ("trl", "peft", "hf", "graft")
    lines = [f"{'MB':20}{''.join(f'{name:>8}' for name in columns)}{'ratio':>8}{'below':>8}"]
    for setting, each in summary["found"].items():
        peaks, below = each["peak_rss_mb"], each.get("below_mb", {})
        cells = [f"{peaks[name]:8.0f}" if name in peaks else " " * 8 for name in columns]
        last = f"{below['graft']:8.0f}" if below else ""
        lines.append(f"{setting:20}{''.join(cells)}{peaks['graft/strongest peer']:8.2f}{last}")
    words = {True: "yes", False: "NO", None: "not measured"}
    lines += [f"{claim + '?':60}{words[holds]}" for claim, holds in summary["claims"].items()]
    return "\n".join(lines)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="settings, by commas (default all)")
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of each training (default 12)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each contender and setting (default 1)")
    parser.add_argument("--json-out", type=Path, help="write the JSON object to this file too")
    args = parser.parse_args(words)
    args.settings = args.only.split(",") if args.only else list(SETTINGS)
    if unknown := [name for name in args.settings if name not in SETTINGS]:
        parser.error(f"unknown setting {unknown[0]!r}: known are {', '.join(SETTINGS)}")
    if args.steps < 4 or args.rounds < 1:
        parser.error("--steps must be 4 or more, --rounds 1 or more")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    args = arguments(words)
    sys.path.insert(0, str(ROOT / "src"))  # this checkout, not an installed graftlm
    from graftlm.errors import GraftError

    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as name:
        try:
            found, trials = run_all(args, Path(name))
        except (BenchmarkError, GraftError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    summary = summarise(found)
    print(table(summary), file=sys.stderr)
    config = {"steps": args.steps, "rounds": args.rounds, "long_batches": LONG_BATCHES, "longest_of": LONGEST_OF}
    config |= {"reviews_read": REVIEWS_READ, "settings": TRAININGS, "trials": trials}
    report = {"machine": describe(), "graftlm": git_state(), "config": config, **summary, "runs": found}
    if args.json_out:
        args.json_out.parent.mkdir(parents=True, exist_ok=True)
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
