"""Training speed and memory: `graft train` against TRL's SFTTrainer and the strongest PEFT loop.

    python benchmarks/train_vs_peers.py [--loss_on all] [--rounds 3] [--steps 40] [--only peft,graft] [--json-out FILE]

All train the same LoRA (r=16 on q, k, v) on the same strings, each example once, in a process of its own and in turn.
Each peer runs in the dtype that a short trial finds fastest on this machine; graft chooses for itself, as for its user.
The peers are timed from the end of one step to the end of another, graft by its own `examples_per_s`;
`examples_per_s_by_clock` times graft's run in the peers' way from metrics.jsonl. Start-up and the first 5% of the steps
do not count. The peers' memory is read before their validation, graft's at the end.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import BenchmarkError, Run
from peers import PEFT_DTYPES, TRL_DTYPES, Job, run_peft, run_trl

CONTENDERS = ("trl", "peft", "graft")
FIGURES = ("examples_per_s", "peak_rss_mb", "val_loss")
KEPT = ("examples", "examples_per_s", "peak_rss_mb", "trainable", "mfu", "process_seconds", "other_cpu_share")
VALIDATION_EXAMPLES = 128
TRIAL_STEPS = 6
SAME_LOSS = 0.05
"""Nats per target token by which the final losses may differ: another order, another dropout."""
PAIRS = {
    f"{key} {top}/{bottom}": (key, top, bottom)
    for top, bottom in (("graft", "trl"), ("graft", "peft"), ("peft", "trl"))
    for key in ("examples_per_s", "peak_rss_mb")
}
GOALS = {
    "completion": {
        "at least 2.3 times the strongest peer": ("examples_per_s graft/peft", ">=", 2.3),
        "at least 6.5 times trl": ("examples_per_s graft/trl", ">=", 6.5),
        "at most 0.7 of the strongest peer's memory": ("peak_rss_mb graft/peft", "<=", 0.7),
        "at most 0.5 of trl's memory": ("peak_rss_mb graft/trl", "<=", 0.5),
    },
    "all": {
        "at least 2.5 times the strongest peer": ("examples_per_s graft/peft", ">=", 2.5),
        "at least 2.5 times trl": ("examples_per_s graft/trl", ">=", 2.5),
    },
}


def prepare(args: argparse.Namespace, work: Path) -> Job:
    """Write the data as graft reads it (graft/) and as the peers do (peers/), made by graft's template; the job."""
    from graftlm.files.assets import data_folder, model_folder
    from graftlm.text.template import DEFAULT, load_template
    from graftlm.text.tokenizer import Tokenizer

    model, data, template = model_folder(args.model), data_folder(args.data), load_template(DEFAULT)
    wanted = {"train": args.steps * args.batch_size, "validation": VALIDATION_EXAMPLES, "test": VALIDATION_EXAMPLES}
    for split, count in wanted.items():
        rows = harness.read_rows(data / f"{split}.jsonl")[:count]  # sorted by hash, so blind to labels
        if split == "train" and len(rows) < count:
            raise BenchmarkError(f"{data}: {split} has fewer than {count} examples: lower --steps")
        harness.write_rows(work / "graft" / f"{split}.jsonl", rows)
        pairs = [{"prompt": template.prompt(r["text"]), "completion": template.completion(r["label"])} for r in rows]
        harness.write_rows(work / "peers" / f"{split}.jsonl", pairs)
    eot = Tokenizer.from_folder(model).eot
    return Job(str(model), str(work), eot, args.steps, args.batch_size, loss_on=getattr(args, "loss_on", "completion"))


def graft_flags(job: Job, out_dir: Path, method: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of `graft train`; `method` holds those of another method than LoRA and DoRA."""
    lora = {"rank": job.rank, "alpha": job.alpha, "targets": job.targets, "lora_dropout": job.lora_dropout}
    return {
        "init_from": job.model,
        "data": f"{job.data}/graft",
        "out_dir": out_dir,
        "method": job.method,
        **(lora if job.method in ("lora", "dora") else method),
        "lr": job.lr,
        "warmup_steps": job.warmup,
        "batch_size": job.batch_size,
        "max_iters": job.steps,
        "eval_every": job.steps,
        "val_limit": 0,
        "seed": job.seed,
        "loss_on": job.loss_on,
    }


def measure(contender: str, job: Job, folder: Path, method: Mapping[str, Any] | None = None) -> Run:
    """One run of a contender."""
    if contender == "graft":
        run = harness.run_graft("train", graft_flags(job, folder / "run", method or {}), folder)
        run = {key: run[key] for key in KEPT if key in run} | graft_figures(folder / "run", run, job)
    else:
        settings = asdict(replace(job, data=f"{job.data}/peers"))
        run = harness.run_peer(__file__, {"contender": contender, **settings}, folder)
    if run["examples"] != job.steps * job.batch_size:
        raise BenchmarkError(f"{contender} saw {run['examples']} examples, not {job.steps * job.batch_size}")
    return run


def graft_figures(out_dir: Path, result: Run, job: Job) -> Run:
    """What a run's files say: dtype, final loss, and the speed by the clock of metrics.jsonl."""
    rows = harness.read_rows(out_dir / "metrics.jsonl")
    first, last = rows[job.untimed_steps - 1], rows[-2]  # the last row's clock includes the validation
    return {
        "examples_per_s_by_clock": (last["examples"] - first["examples"]) / (last["seconds"] - first["seconds"]),
        "val_loss": result["last"]["val_loss"],
        "dtype": json.loads((out_dir / "run.json").read_text(encoding="utf-8"))["dtype"],
    }


def child(settings: dict[str, Any]) -> Run:
    """A peer's run, in its own process."""
    return {"trl": run_trl, "peft": run_peft}[settings.pop("contender")](Job(**settings))


def trials(job: Job, names: list[str], work: Path) -> tuple[dict[str, Job], dict[str, float]]:
    """The job of each contender, a peer's in its fastest dtype here, and the examples/s of every short trial."""
    jobs, tried = dict.fromkeys(names, job), dict[str, float]()
    short = replace(job, steps=min(TRIAL_STEPS, job.steps), validate=False)
    for name, dtypes in (("trl", TRL_DTYPES), ("peft", PEFT_DTYPES)):
        if name in names:

            def speed(dtype: str, name: str = name) -> float:
                run = measure(name, replace(short, dtype=dtype), work / f"trial-{name}-{dtype}")
                return float(run["examples_per_s"])

            dtype, speeds = harness.fastest(harness.native_dtypes(dtypes), speed)
            jobs[name] = replace(job, dtype=dtype)
            tried |= {f"{name} {key}": value for key, value in speeds.items()}
    return jobs, tried


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Trials, rounds, summary."""
    job = prepare(args, work)
    jobs, tried = trials(job, args.only, work)
    contenders = {name: partial(measure, name, each) for name, each in jobs.items()}
    rounds, rejected = harness.run_rounds(contenders, args, work, "examples_per_s")
    summary = harness.summarise(rounds, FIGURES, PAIRS, GOALS[job.loss_on])
    losses = [figures["val_loss"] for figures in summary["medians"].values()]
    same = max(losses) - min(losses) <= SAME_LOSS if len(losses) > 1 else None
    summary["claims"]["the same loss at the end"] = same
    config = {**asdict(job), "model": args.model, "data": f"the first {job.steps * job.batch_size} of {args.data}"}
    return {"config": config, "trials": tried, **summary, "runs": rounds, "rejected": rejected}


FLAGS: dict[str, dict[str, Any]] = {
    "steps": {"type": harness.at_least(4), "default": 40, "help": "optimizer steps of a run, at least 4 (default 40)"},
    "batch_size": {"type": int, "default": 16, "help": "examples in a step (default 16)"},
    **harness.SOURCE,
    **harness.ROUNDS,
}
OWN: dict[str, dict[str, Any]] = {
    "loss_on": {"choices": tuple(GOALS), "default": "completion", "help": "tokens that are trained on"},
    "only": {"type": harness.choices(CONTENDERS), "default": list(CONTENDERS), "help": "contenders, by commas"},
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS | OWN, child=child))
