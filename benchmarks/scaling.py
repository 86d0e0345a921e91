"""What a step costs in time and memory as one thing grows: batch, rank, length of the texts, layers of the model.

    python benchmarks/scaling.py [--rounds 3] [--steps 12] [--only "batch 4,rank 128"] [--json-out FILE]

From one setting (batches of 16, rank 16, the first reviews, all 30 layers) one thing at a time is changed, and graft
and the strongest peer of train_vs_peers.py run in turn, each a process of its own, the peer in the number format in
which it is fastest at the first setting. Speed is examples/s, memory VmHWM; ratios are formed within a round, medians
count. A table goes to stderr, one JSON object to the last line of stdout.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from _machine import describe
from _peers import Job
from _rounds import Run, accepted_run
from train_vs_peers import ROOT, BenchmarkError, choose, git_state, measure, parse, prepare

CONTENDERS = ("peft", "graft")
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "batch 4": {"batch_size": 4},
    "batch 64": {"batch_size": 64},
    "rank 4": {"rank": 4},
    "rank 128": {"rank": 128},
    "short texts": {"texts": "shortest"},
    "long texts": {"texts": "longest"},
    "15 layers": {"layers": 15},
}
DRAWN_FROM = 4000  # reviews that the shortest and the longest are taken from


def source(texts: str, data: Path, folder: Path) -> Path:
    """A data folder whose training split begins with the shortest or the longest reviews; "" leaves it as it is."""
    if not texts:
        return data
    folder.mkdir()
    for split in ("train", "validation", "test"):
        lines = [line for line in (data / f"{split}.jsonl").read_text(encoding="utf-8").split("\n") if line]
        if split == "train":
            lines = sorted(lines[:DRAWN_FROM], key=lambda line: len(json.loads(line)["text"]))
            lines = lines if texts == "shortest" else lines[::-1]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return folder


def lower(layers: int, model: Path, folder: Path) -> Path:
    """The model's folder with its first `layers` layers only; 0 leaves it as it is."""
    if not layers:
        return model
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for file in model.iterdir():
        if file.suffix == ".json" and file.name != "graft.json":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}), encoding="utf-8")
    kept = {
        name: tensor
        for name, tensor in load_file(model / "model.safetensors").items()
        if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < layers
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def job_of(setting: Mapping[str, Any], args: argparse.Namespace, precision: str, work: Path) -> Job:
    """The job of one setting, its files in `work`."""
    from graftlm.files.assets import data_folder, model_folder

    data = source(setting.get("texts", ""), data_folder(args.data), work / "source")
    model = lower(setting.get("layers", 0), model_folder(args.model), work / "model")
    words = ["--data", str(data), "--model", str(model), "--batch-size", str(setting.get("batch_size", 16))]
    job, _ = prepare(parse([*words, "--steps", str(args.steps), "--only", "peft", "--precision", precision]), work)
    return replace(job, rank=setting.get("rank", 16), alpha=4 * setting.get("rank", 16))


def run_setting(job: Job, args: argparse.Namespace, work: Path) -> list[dict[str, Run]]:
    """All rounds of one setting."""
    (work / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
    rounds, numbers = [], count(1)
    for _ in range(args.rounds):
        done: dict[str, Run] = {}
        for name in CONTENDERS:

            def once(name: str = name) -> Run:
                return measure(name, job, work, work / f"run-{next(numbers)}")

            run, _ = accepted_run(once, args.max_other, 3)
            if run is None:
                raise BenchmarkError("no quiet run in 3 attempts; stop other work, or raise --max-other")
            done[name] = run
        rounds.append(done)
    return rounds


def summarise(found: Mapping[str, Sequence[Mapping[str, Run]]]) -> dict[str, Any]:
    """Medians of both and of their ratio, for each setting; whether graft is ahead in all of them."""
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for name, rounds in found.items():
        figures[name] = {
            key: {who: median(each[who][key] for each in rounds) for who in CONTENDERS}
            | {"ratio": median(each["graft"][key] / each["peft"][key] for each in rounds)}
            for key in ("examples_per_s", "peak_rss_mb")
        }
    return {
        "found": figures,
        "claims": {
            "faster than the strongest peer at every setting": all(
                each["examples_per_s"]["ratio"] > 1 for each in figures.values()
            ),
            "less memory than the strongest peer at every setting": all(
                each["peak_rss_mb"]["ratio"] < 1 for each in figures.values()
            ),
        },
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'':14}{'peft':>9}{'graft':>9}{'ratio':>7}  examples/s {'peft':>8}{'graft':>8}{'ratio':>7}  MB"]
    for name, each in summary["found"].items():
        speed, memory = each["examples_per_s"], each["peak_rss_mb"]
        lines.append(
            f"{name:14}{speed['peft']:9.2f}{speed['graft']:9.2f}{speed['ratio']:7.2f}"
            f"{memory['peft']:20.0f}{memory['graft']:8.0f}{memory['ratio']:7.2f}"
        )
    lines += [f"{claim + '?':60}{'yes' if holds else 'NO'}" for claim, holds in summary["claims"].items()]
    return "\n".join(lines)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps of each run (default 12)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender and setting (default 3)")
    parser.add_argument("--only", default="", help="settings, by commas (default all)")
    parser.add_argument("--max-other", type=float, default=0.03, help="share of the cores others may use (0.03)")
    parser.add_argument("--model", default="smollm2-135m", help="base model (default smollm2-135m)")
    parser.add_argument("--data", default="rotten-tomatoes-pypi", help="data with train, validation and test jsonl")
    parser.add_argument("--json-out", type=Path, help="write the JSON object to this file too")
    args = parser.parse_args(words)
    args.settings = args.only.split(",") if args.only else list(SETTINGS)
    if unknown := [name for name in args.settings if name not in SETTINGS]:
        parser.error(f"unknown setting {unknown[0]!r}: known are {', '.join(SETTINGS)}")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    args = arguments(words)
    sys.path.insert(0, str(ROOT / "src"))  # this checkout, not an installed graftlm
    found: dict[str, list[dict[str, Run]]] = {}
    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as name:
        try:
            (Path(name) / "trials").mkdir()
            first = job_of({}, args, "best", Path(name) / "trials")
            trial_args = parse(["--only", "peft", "--precision", "best"])
            chosen, trials = choose(first, trial_args, Path(name) / "trials")
            for number, setting in enumerate(args.settings):
                work = Path(name) / str(number)
                work.mkdir()
                found[setting] = run_setting(job_of(SETTINGS[setting], args, chosen.precision, work), args, work)
                print(f"{setting} done", file=sys.stderr)
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    summary = summarise(found)
    print(table(summary), file=sys.stderr)
    config = {"steps": args.steps, "rounds": args.rounds, "model": args.model, "data": args.data, "trials": trials}
    report = {"machine": describe(), "graftlm": git_state(), "config": config, **summary, "runs": found}
    if args.json_out:
        args.json_out.parent.mkdir(parents=True, exist_ok=True)
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
