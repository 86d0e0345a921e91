"""Seconds of training until an accuracy on the validation split: graft against the strongest peer.

    python benchmarks/time_to_accuracy.py [--accuracy 0.85] [--seeds 1] [--only graft] [--json-out FILE]

    peft    the strong peer's step (_peers.py), in the number format in which it is fastest here
    graft   `python -m graftlm train …` of this checkout, ended by SIGTERM once it is there

Both train the same LoRA (r=16, alpha=64 on q, k and v, dropout 0.05) from the same initial weights, at the same rates,
on the same batches in the same order: the peer takes all of it from graftlm. What dropout drops differs, and rounding.
Both are validated every --eval-every steps on the same fixed sample of the validation split, and stop at the first
validation that reaches the accuracy, or at --max-steps, where the cosine of the rate ends.

What is unusual: graftlm judges both. At each validation the peer's A and B are copied into a model of graftlm, which
validates them as it does its own, so nothing but the training differs.

Seconds are the clock's from the first step on, what lies between two steps included, validations and checkpoints apart;
start-up counts for none. A run during which others used more than 3% of the cores is thrown away and repeated. A table
goes to stderr, one JSON object, with each run's curve, to the last line of stdout.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from _machine import describe, run_measured
from _peers import PRECISIONS, Encoded, Job, StrongPeer, collate, keep_memory_or_fail
from _rounds import Round, Run, accepted_run, ratios
from startup import GRAFT
from train_vs_peers import OFFLINE, ROOT, TRIAL_STEPS, BenchmarkError, choose, git_state, parse, prepare

CONTENDERS = ("peft", "graft")
ENDED = (0, 130)  # graft's exit status at the last step, and when it was asked to end
Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Task:
    """What a run is told."""

    job: Job
    flags: dict[str, Any]
    """Of `graft train`, by name."""
    accuracy: float


# -------------------------------------------------------------------------------------------------------- the peer


def peer_name(ours: str) -> str:
    """blocks.3.attn.q.lora_A -> PEFT's name of the same weights in a Llama."""
    _, layer, _, role, side = ours.split(".")
    return f"base_model.model.model.layers.{layer}.self_attn.{role}_proj.{side}.default.weight"


def run_peer(task: Task) -> Run:
    """The peer in this process: its curve."""
    keep_memory_or_fail()
    import torch

    from graftlm.config import TrainConfig
    from graftlm.methods.base import trainable
    from graftlm.training.prepare import prepare as prepare_graft
    from graftlm.training.schedule import batch_stream, learning_rate
    from graftlm.training.validate import validate

    prepared = prepare_graft(TrainConfig(**task.flags))
    config, judge, peer = prepared.config, prepared.loaded.model, StrongPeer(task.job)
    pairs = [(own, peer.trained[peer_name(name)]) for name, own in trainable(judge).items()]
    if len(pairs) != len(peer.trained):
        raise RuntimeError("the peer trains other weights than graft")
    with torch.no_grad():
        for own, theirs in pairs:
            theirs.copy_(own)
    rows = [Encoded(list(e.prompt_ids), list(e.completion_ids)) for e in prepared.train]
    stream = batch_stream([row.length for row in rows], config, 0)
    curve: Curve = []
    seconds, began = 0.0, time.perf_counter()
    for step in range(1, task.job.steps + 1):
        for group in peer.optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        peer.step(collate([rows[i] for i in next(stream)]))
        if step % task.flags["eval_every"] == 0 or step == task.job.steps:
            seconds += time.perf_counter() - began
            judge.train()  # in which nothing is merged
            with torch.no_grad():
                for own, theirs in pairs:
                    own.copy_(theirs)
            loss, accuracy = validate(judge, prepared.validation, prepared.label_ids, config)
            curve.append({"step": step, "seconds": seconds, "val_accuracy": accuracy or 0.0, "val_loss": loss})
            if curve[-1]["val_accuracy"] >= task.accuracy:
                break
            began = time.perf_counter()
    return {"curve": curve, "precision": task.job.precision}


# --------------------------------------------------------------------------------------------------------- one run


def read_rows(metrics: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl that may be in the making."""
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.exists() else []
    return [json.loads(line) for line in lines]


def curve_of(rows: Sequence[Mapping[str, Any]]) -> Curve:
    """graft's validations, with the seconds of training before each.

    A step's are the clock's since the row before; where a validation or a checkpoint lies between, its own.
    """
    curve: Curve = []
    seconds, clock, tokens, apart = 0.0, 0.0, 0, False
    for row in rows:
        judged = row["val_accuracy"] is not None
        own = (row["tokens"] - tokens) / row["tokens_per_s"]
        seconds += own if judged or apart else row["seconds"] - clock
        clock, tokens, apart = row["seconds"], row["tokens"], judged
        if judged:
            found = {key: row[key] for key in ("step", "val_accuracy", "val_loss")}
            curve.append({**found, "seconds": seconds})
    return curve


def figures(curve: Curve, accuracy: float, batch_size: int) -> Run:
    """What a curve comes to at its first validation that reaches the accuracy, or at its last."""
    at = next((point for point in curve if point["val_accuracy"] >= accuracy), curve[-1])
    return {
        "reached": at["val_accuracy"] >= accuracy,
        "seconds": at["seconds"],
        "steps": at["step"],
        "val_accuracy": at["val_accuracy"],
        "examples_per_s": at["step"] * batch_size / at["seconds"],
        "curve": curve,
    }


def measure(contender: str, task: Task, folder: Path) -> Run:
    """Run one contender in its own process in the new folder `folder`."""
    folder.mkdir()
    task = replace(task, flags={**task.flags, "out_dir": str(folder / "graft-run")})
    metrics = folder / "graft-run" / "metrics.jsonl"
    (folder / "task.json").write_text(json.dumps(asdict(task)), encoding="utf-8")

    def there(pid: int) -> bool:
        return any((row["val_accuracy"] or 0.0) >= task.accuracy for row in read_rows(metrics))

    if contender == "graft":
        command = [*GRAFT, "train", *(word for name, value in task.flags.items() for word in (f"--{name}", str(value)))]
    else:
        command = [sys.executable, str(Path(__file__).resolve()), "--task", str(folder / "task.json")]
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    seen = run_measured(command, folder, {**os.environ, **OFFLINE, "PYTHONPATH": path}, there)
    if seen.status not in (ENDED if contender == "graft" else (0,)):
        tail = "\n".join(seen.stderr.splitlines()[-15:])
        raise BenchmarkError(f"{contender} failed with status {seen.status}; the end of its messages:\n{tail}")
    if contender == "graft":
        run = json.loads((folder / "graft-run" / "run.json").read_text(encoding="utf-8"))
        found = {"curve": curve_of(read_rows(metrics)), "precision": run["dtype"]}
    else:
        found = json.loads(seen.stdout.rstrip("\n").rpartition("\n")[2])
    return {
        **figures(found["curve"], task.accuracy, task.job.batch_size),
        "precision": found["precision"],
        "process_seconds": seen.seconds,
        "other_cpu_share": seen.other_cpu_share,
    }


def run_rounds(args: argparse.Namespace, task: Task, work: Path) -> tuple[list[dict[str, Run]], list[Run]]:
    """A round a seed: (accepted runs by contender, rejected ones)."""
    numbers = count(1)
    rounds: list[dict[str, Run]] = []
    thrown_away: list[Run] = []

    def one(name: str, seeded: Task) -> Run:
        run = measure(name, seeded, work / f"run-{next(numbers)}")
        print(
            f"  {name:6}{run['val_accuracy']:7.3f} after {run['steps']:.0f} steps, {run['seconds']:.0f} s",
            f" others used {run['other_cpu_share']:.1%} of the cores ({run['process_seconds']:.0f} s)",
            file=sys.stderr,
        )
        return run

    for seed in range(args.seeds):
        print(f"seed {seed}", file=sys.stderr)
        seeded = replace(task, job=replace(task.job, seed=seed), flags={**task.flags, "seed": seed})
        rounds.append({})
        for name in [args.only] if args.only else CONTENDERS:
            run, rejected = accepted_run(partial(one, name, seeded), args.max_other, args.attempts)
            thrown_away += [{"seed": seed, "contender": name, **each} for each in rejected]
            if run is None:
                raise BenchmarkError(f"{name}: no quiet run in {args.attempts} attempts; stop other work")
            rounds[-1][name] = run
    return rounds, thrown_away


# ---------------------------------------------------------------------------------------------------- what it says


def summarise(rounds: Sequence[Round], accuracy: float) -> dict[str, Any]:
    """Medians (seconds and steps only of who always got there), the ratio within rounds, whether the claim holds."""
    medians: dict[str, dict[str, float]] = {}
    for name in rounds[0]:
        runs = [each[name] for each in rounds]
        got_there = ("seconds", "steps") if all(run["reached"] for run in runs) else ()
        medians[name] = {
            key: median(run[key] for run in runs) for key in (*got_there, "val_accuracy", "examples_per_s")
        }
    found = ratios(
        [each for each in rounds if all(run["reached"] for run in each.values())], "seconds", "peft", "graft"
    )
    claim = f"sooner at {accuracy:g} than the strongest peer"
    sooner = [
        each["graft"]["reached"] and (not each["peft"]["reached"] or each["graft"]["seconds"] < each["peft"]["seconds"])
        for each in rounds
        if len(each) == len(CONTENDERS)
    ]
    return {
        "medians": medians,
        "ratios": {"seconds peft/graft": {"rounds": found, "median": median(found)}} if found else {},
        "claims": {claim: all(sooner) if sooner else None},
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'':8}{'seconds':>9}{'steps':>7}{'accuracy':>10}{'examples/s':>12}"]
    for name, m in summary["medians"].items():
        got = f"{m['seconds']:9.0f}{m['steps']:7.0f}" if "seconds" in m else f"{'not there':>16}"
        lines.append(f"{name:8}{got}{m['val_accuracy']:10.3f}{m['examples_per_s']:12.2f}")
    for name, ratio in summary["ratios"].items():
        lines.append(f"{name:28}{ratio['median']:7.3f}   ({'  '.join(f'{x:.3f}' for x in ratio['rounds'])})")
    words = {True: "yes", False: "NO", None: "not measured"}
    lines += [f"{claim + '?':44}{words[holds]}" for claim, holds in summary["claims"].items()]
    return "\n".join(lines)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accuracy", type=float, default=0.85, help="on the validation sample (default 0.85)")
    parser.add_argument("--val-limit", type=int, default=512, help="validation examples (a fixed sample; default 512)")
    parser.add_argument("--eval-every", type=int, default=25, help="steps between validations (default 25)")
    parser.add_argument("--max-steps", type=int, default=200, help="steps of the schedule, at least 4 (default 200)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak rate of both (default 1e-3)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each, with the seeds 0, 1, … (default 1)")
    parser.add_argument("--only", choices=CONTENDERS, help="one of the two alone (default both, in turn)")
    parser.add_argument(
        "--precision", choices=(*PRECISIONS, "best"), default="best", help="the peer's number format (the fastest)"
    )
    parser.add_argument("--max-other", type=float, default=0.03, help="share of the cores others may use (0.03)")
    parser.add_argument("--attempts", type=int, default=3, help="runs until one is quiet enough (default 3)")
    parser.add_argument("--json-out", type=Path, help="write the JSON object to this file too")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)  # the child's mode
    args = parser.parse_args(words)
    if args.max_steps < 4 or min(args.seeds, args.attempts, args.eval_every, args.val_limit) < 1:
        parser.error("--max-steps must be 4 or more; --seeds, --attempts, --eval-every and --val-limit 1 or more")
    return args


def task_of(args: argparse.Namespace, work: Path) -> tuple[Task, dict[str, float]]:
    """What both are told, in the peer's fastest number format, and the trials of these."""
    trial = parse(["--only", args.only or "peft", "--precision", args.precision, "--steps", str(TRIAL_STEPS)])
    job, trials = choose(prepare(trial, work)[0], trial, work)
    job = replace(job, steps=args.max_steps, lr=args.lr)
    flags = {
        "init_from": job.model,
        "data": "rotten-tomatoes-pypi",
        "rank": job.rank,
        "alpha": job.alpha,
        "targets": ",".join(job.targets),
        "lora_dropout": job.lora_dropout,
        "lr": args.lr,
        "batch_size": job.batch_size,
        "max_iters": args.max_steps,
        "eval_every": args.eval_every,
        "val_limit": args.val_limit,
    }
    return Task(job, flags, args.accuracy), trials


def run_child(file: Path) -> None:
    """The peer's process: the task's file in, one JSON object out on the last line."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    print(json.dumps(run_peer(Task(Job(**fields["job"]), fields["flags"], fields["accuracy"]))))


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark (or, with --task, the peer of it); the exit status."""
    args = arguments(words)
    if args.task:
        run_child(args.task)
        return 0
    sys.path.insert(0, str(ROOT / "src"))  # this checkout, not an installed graftlm
    from graftlm.errors import GraftError

    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as name:
        try:
            task, trials = task_of(args, Path(name))
            rounds, rejected = run_rounds(args, task, Path(name))
        except (BenchmarkError, GraftError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    summary = summarise(rounds, args.accuracy)
    print(table(summary), file=sys.stderr)
    if not any("seconds" in each for each in summary["medians"].values()):
        print(f"error: nobody came to {args.accuracy:g}: raise --max-steps", file=sys.stderr)
        return 1
    config = {**task.flags, "init_from": "smollm2-135m", "accuracy": args.accuracy, "seeds": args.seeds}
    config |= {"peft_precision": task.job.precision, "max_other": args.max_other, "attempts": args.attempts}
    about = {"machine": describe(), "graftlm": git_state(), "config": config, "trials": trials}
    report = {**about, **summary, "runs": rounds, "rejected": rejected}
    if args.json_out:
        args.json_out.parent.mkdir(parents=True, exist_ok=True)
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
