"""Training speed and memory: graft against TRL's SFTTrainer and against the strongest peer, on this machine, in turn.

    python benchmarks/train_vs_peers.py [--loss_on all] [--rounds 3] [--steps 40] [--only peft,graft] [--json-out FILE]

    trl     TRL's SFTTrainer as a user runs it (grouped by length, defaults otherwise)
    peft    the strongest peer: a hand-written PEFT loop with every trick that needs no new mathematics
    graft   `python -m graftlm train … --json` of this checkout

Which number format is fastest differs from processor to processor: a few steps of each peer in each format come first,
and the fastest is the one that is measured; graft chooses for itself, as its user would have it.

All three see the same steps x batch examples once, as the same strings and tokens, and train the same LoRA. Each run is
a process of its own, in the order A B C A B C …, so that slow drift of the machine meets all alike; ratios are formed
within a round, and the median of the rounds is what counts. A run during which others used more than 3% of the cores is
thrown away and repeated.

How each is timed: the peers by the clock at the end of every step (TRL through a callback), so what lies between two
steps counts; graft by its own `examples_per_s` (examples over the wall seconds of the steps themselves) and, as a
check, by the clock column of its metrics.jsonl in the peers' way. Start-up and the first 5% of the steps count for
none: this spares TRL its longest batch, which it always takes first. The peers' memory is read before their validation,
graft's at the very end. A table goes to stderr, one JSON object to the last line of stdout.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from _machine import Watch, describe, matrix_peaks, run_measured, worth_trying
from _peers import PRECISIONS, TRL_PRECISIONS, Job, run_peft, run_trl
from _rounds import CLAIMS, CONTENDERS, Run, accepted_run, shares, summarise, table

ROOT = Path(__file__).resolve().parents[1]
VALIDATION_EXAMPLES = 128
TRIAL_STEPS = 6
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "disabled",
}


class BenchmarkError(Exception):
    """A contender failed or trained something else than the others."""


# ------------------------------------------------------------------------------------------------ what is trained on


def prepare(args: argparse.Namespace, work: Path) -> tuple[Job, dict[str, str]]:
    """Write graft's data folder (text, label) and the peers' strings, made by graft's template from the same rows.

    Returns the job and the hashes of what all contenders read. Hashing the weights also warms the page cache.
    """
    from graftlm.files.assets import data_folder, model_folder
    from graftlm.text.template import DEFAULT, load_template
    from graftlm.text.tokenizer import Tokenizer

    model, data, template = model_folder(args.model), data_folder(args.data), load_template(DEFAULT)
    wanted = {"train": args.steps * args.batch_size, "validation": VALIDATION_EXAMPLES, "test": VALIDATION_EXAMPLES}
    strings: dict[str, list[dict[str, str]]] = {}
    (work / "data").mkdir()
    for split, rows in wanted.items():
        lines = (data / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")[:rows]  # sorted by hash: label-blind
        if len(lines) < rows:
            raise BenchmarkError(f"{data}: {split} has fewer than {rows} examples: lower --steps")
        (work / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        strings[split] = [
            {"prompt": template.prompt(row["text"]), "completion": template.completion(row["label"])}
            for row in map(json.loads, lines)
        ]
    examples = work / "examples.json"
    examples.write_text(json.dumps(strings), encoding="utf-8")
    job = Job(
        model=str(model),
        eot=Tokenizer.from_folder(model).eot,
        examples=str(examples),
        steps=args.steps,
        batch_size=args.batch_size,
        rank=16,
        alpha=64,
        lora_dropout=0.05,
        targets=("q", "k", "v"),
        lr=2.5e-4,
        warmup=max(1, round(0.06 * args.steps)),
        untimed_steps=max(1, int(0.05 * args.steps)),
        precision=args.precision,
        trl_precision=args.trl_precision,
        loss_on=args.loss_on,
        seed=0,
    )
    with (model / "model.safetensors").open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    return job, {"weights_sha256": digest, "examples_sha256": hashlib.sha256(examples.read_bytes()).hexdigest()}


# ---------------------------------------------------------------------------------------------------------- one run


def graft_command(job: Job, work: Path, out_dir: Path) -> list[str]:
    """The command a user types; validation comes once, at the end, where it does not count."""
    flags = {
        "init_from": job.model,
        "data": str(work / "data"),
        "out_dir": str(out_dir),
        **_method(job),
        "lr": job.lr,
        "warmup": job.warmup,
        "batch_size": job.batch_size,
        "max_iters": job.steps,
        "eval_every": job.steps,
        "val_limit": 0,
        "seed": job.seed,
        "loss_on": job.loss_on,
    }
    if job.first_layer:
        flags["train_layers"] = f"{job.first_layer}:"
    words = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", "graftlm", "train", *words, "--json"]


def _method(job: Job) -> dict[str, Any]:
    if job.method not in ("lora", "dora"):
        return {"method": job.method, **dict(job.flags)}
    targets = ",".join(job.targets)
    lora = {"rank": job.rank, "alpha": job.alpha, "targets": targets, "lora_dropout": job.lora_dropout}
    return {"method": job.method, **lora}


def graft_figures(stdout: str, out_dir: Path, job: Job) -> Run:
    """What `train --json` says, and its speed by the clock of metrics.jsonl, gaps between steps included."""
    result = json.loads(stdout)  # exactly one object, or this raises
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    first, last = rows[job.untimed_steps - 1], rows[-2]  # the last row's clock includes the validation
    return {
        "examples": result["examples"],
        "examples_per_s": result["examples_per_s"],
        "examples_per_s_by_clock": (last["examples"] - first["examples"]) / (last["seconds"] - first["seconds"]),
        "peak_rss_mb": result["peak_rss_mb"],
        "val_loss": result["last"]["val_loss"],
        "trainable": result["trainable"],
        "precision": json.loads((out_dir / "run.json").read_text(encoding="utf-8"))["dtype"],
        "needed_gflops": result["needed_gflops"],
    }


def measure(contender: str, job: Job, work: Path, folder: Path, watch: Watch | None = None, **environment: str) -> Run:
    """Run one contender in its own process in the new folder `folder`; its figures, inside and outside ones."""
    folder.mkdir()
    out_dir = folder / "graft-run"
    if contender == "graft":
        command = graft_command(job, work, out_dir)
    else:
        command = [sys.executable, str(Path(__file__).resolve()), "--run", contender, "--job", str(work / "job.json")]
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    about = {"HF_HOME": str(work / "hf"), "PYTHONPATH": os.pathsep.join(paths), **environment}
    seen = run_measured(command, folder, {**os.environ, **OFFLINE, **about}, watch)
    if seen.status != 0:
        tail = "\n".join(seen.stderr.splitlines()[-15:])
        raise BenchmarkError(f"{contender} failed with status {seen.status}; the end of its messages:\n{tail}")
    figures = graft_figures(seen.stdout, out_dir, job) if contender == "graft" else _last_json(seen.stdout)
    if figures["examples"] != job.steps * job.batch_size:
        raise BenchmarkError(f"{contender} saw {figures['examples']} examples, not {job.steps * job.batch_size}")
    return {
        **figures,
        "process_seconds": seen.seconds,
        "process_cpu_seconds": seen.cpu_seconds,
        "process_peak_mb": seen.max_rss_mb,
        "other_cpu_seconds": seen.other_cpu_seconds,
        "other_cpu_share": seen.other_cpu_share,
    }


def _last_json(stdout: str) -> Run:
    return json.loads(stdout.rstrip("\n").rpartition("\n")[2])


def run_child(contender: str, job_file: Path) -> None:
    """The process of one peer: the job's file in, one JSON object out on the last line."""
    fields = json.loads(job_file.read_text(encoding="utf-8"))
    job = Job(**{**fields, "targets": tuple(fields["targets"]), "flags": ()})
    print(json.dumps({"trl": run_trl, "peft": run_peft}[contender](job)))


def choose(job: Job, args: argparse.Namespace, work: Path) -> tuple[Job, dict[str, float]]:
    """The job with each peer's fastest number format on this machine, and the examples/s of every short trial."""
    tried: dict[str, float] = {}
    for contender, said, formats in (
        ("peft", job.precision, PRECISIONS),
        ("trl", job.trl_precision, TRL_PRECISIONS),
    ):
        if contender not in args.only or said != "best":
            continue
        speeds: dict[str, float] = {}
        for name in worth_trying(formats):
            trial = _in_format(
                replace(job, steps=min(TRIAL_STEPS, job.steps), untimed_steps=1, trial=True), contender, name
            )
            (work / "job.json").write_text(json.dumps(asdict(trial)), encoding="utf-8")
            run = measure(contender, trial, work, work / f"trial-{contender}-{name}")
            speeds[name] = run["examples_per_s"]
            print(f"trial {contender} {name}: {speeds[name]:.2f} examples/s", file=sys.stderr)
        tried |= {f"{contender} {name}": speed for name, speed in speeds.items()}
        job = _in_format(job, contender, max(speeds, key=speeds.__getitem__))
    return job, tried


def _in_format(job: Job, contender: str, name: str) -> Job:
    return replace(job, precision=name) if contender == "peft" else replace(job, trl_precision=name)


# ------------------------------------------------------------------------------------------------------- all of them


def run_rounds(args: argparse.Namespace, job: Job, work: Path) -> tuple[list[dict[str, Run]], list[Run]]:
    """All rounds in turn: (accepted runs by contender of each round, rejected runs)."""
    numbers = count(1)

    def one(name: str) -> Run:
        run = {"contender": name, **measure(name, job, work, work / f"run-{next(numbers)}")}
        print(
            f"  {name:6}{run['examples_per_s']:8.2f} examples/s{run['peak_rss_mb']:8.0f} MB",
            f" val loss {run['val_loss']:.4f}  others used {run['other_cpu_share']:.1%} of the cores",
            f" ({run['process_seconds']:.0f} s)",
            file=sys.stderr,
        )
        return run

    rounds: list[dict[str, Run]] = []
    thrown_away: list[Run] = []
    for number in range(1, args.rounds + 1):
        print(f"round {number} of {args.rounds}", file=sys.stderr)
        rounds.append({})
        for name in args.only:
            run, rejected = accepted_run(partial(one, name), args.max_other, args.attempts)
            thrown_away += [{"round": number, **each} for each in rejected]
            if run is None:
                print(f"  {name}: no quiet run in {args.attempts} attempts; left out of this round", file=sys.stderr)
            else:
                rounds[-1][name] = run
    return rounds, thrown_away


def git_state(checkout: Path = ROOT) -> str:
    """A checkout's commit, with -dirty when files differ from it; "no commit" in a fresh repository."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "no commit"


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise argparse.ArgumentTypeError(f"unknown contender {unknown[0]!r}: known are {', '.join(CONTENDERS)}")
    return names


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps of a run, at least 4 (default 40)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender (default 3: about 15 minutes)")
    parser.add_argument("--only", type=_names, default=list(CONTENDERS), help="contenders and their order, by commas")
    parser.add_argument("--json-out", type=Path, help="write the JSON object to this file too")
    parser.add_argument("--max-other", type=float, default=0.03, help="share of the cores others may use (0.03)")
    parser.add_argument("--attempts", type=int, default=3, help="runs until one is quiet enough (default 3)")
    parser.add_argument("--batch-size", type=int, default=16, help="examples in a step (default 16)")
    parser.add_argument(
        "--precision", choices=(*PRECISIONS, "best"), default="best", help="the peft loop's format (the fastest)"
    )
    trl_formats = (*TRL_PRECISIONS, "best")
    parser.add_argument("--trl-precision", choices=trl_formats, default="best", help="TRL's format (the fastest)")
    parser.add_argument("--loss_on", choices=tuple(CLAIMS), default="completion", help="tokens that are trained on")
    parser.add_argument("--model", default="smollm2-135m", help="base model (default smollm2-135m)")
    parser.add_argument("--data", default="rotten-tomatoes-pypi", help="data with train, validation and test jsonl")
    parser.add_argument("--run", choices=("trl", "peft"), help=argparse.SUPPRESS)  # the child's mode
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.steps < 4 or min(args.rounds, args.attempts, args.batch_size) < 1:
        parser.error("--steps must be 4 or more; --rounds, --attempts and --batch-size 1 or more")
    if (args.run is None) != (args.job is None):
        parser.error("--run and --job go together")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark (or, with --run, one peer of it); the exit status."""
    args = parse(words)
    if args.run:
        run_child(args.run, args.job)
        return 0
    sys.path.insert(0, str(ROOT / "src"))  # this checkout, not an installed graftlm
    from graftlm.errors import GraftError

    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as name:
        work = Path(name)
        try:
            job, hashes = prepare(args, work)
            peaks = matrix_peaks(work)
            print("matrix peak", {name: f"{peak:.0f} GFLOP/s" for name, peak in peaks.items()}, file=sys.stderr)
            job, trials = choose(job, args, work)
            (work / "job.json").write_text(json.dumps(asdict(job)), encoding="utf-8")
            rounds, rejected = run_rounds(args, job, work)
        except (BenchmarkError, GraftError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    if not any(rounds):
        print("error: no run was quiet enough; stop other work on this machine or raise --max-other", file=sys.stderr)
        return 1
    summary = summarise(rounds, job.loss_on)
    summary["share_of_peak"] = shares(rounds, peaks)
    print(table(summary), summary["share_of_peak"], sep="\n", file=sys.stderr)
    local = {"model": args.model, "examples": f"first {job.steps * job.batch_size} of {args.data}"}
    config = {**asdict(job), **local, **hashes, "max_other": args.max_other, "attempts": args.attempts}
    about = {"machine": {**describe(), "matrix_peak_gflops": peaks}, "graftlm": git_state(), "config": config}
    about |= {"trials": trials}
    report = {**about, **summary, "runs": rounds, "rejected": rejected}
    if args.json_out:
        args.json_out.parent.mkdir(parents=True, exist_ok=True)
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


def _exit_on_sigterm() -> None:
    """A terminated benchmark cleans up like an interrupted one: no child trains on, no temporary folder stays."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


if __name__ == "__main__":
    _exit_on_sigterm()
    sys.exit(main())
