"""What one option of `graft train` gains: the same run with it and without it.

    python benchmarks/options.py [--only kernels,train-layers,processes] [--rounds 3] [--json-out FILE]

    kernels        C++ kernels, compiled by an earlier run, against the same formulas in torch
    train-layers   `--train_layers 20:` against all 30 layers, with an empty activation cache
    processes      two processes with one thread each against one with two, under torchrun (gloo): LoRA, whose gradients
                   are summed, and full fine-tuning, which is sharded (FSDP2)

Three epochs of 256 reviews. Speed is examples/s of the steps; with train-layers of the epochs after the first, which
fills the cache. Memory is the largest peak of a process. That the gradients are equal is a test: tests/models/
test_kernels.py, tests/training/test_activation_cache.py, tests/training/test_distributed.py.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import Round, Run

REVIEWS, EPOCHS = 256, 3
COMMON = {"rank": 16, "alpha": 64, "batch_size": 16, "epochs": EPOCHS, "val_limit": 8, "eval_every": 1_000_000}
EQUAL = {"lora_dropout": 0, "dtype": "float32", "device": "cpu", "kernels": "torch"}
FULL = {"rank": 0, **EQUAL}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "kernels": {"kernels on": {"kernels": "cpp"}, "kernels off": {"kernels": "torch"}},
    "train-layers": {"upper": {"train_layers": "20:"}, "all": {}},
    "processes": {"lora one": EQUAL, "lora two": EQUAL, "full one": FULL, "full two": FULL},
}
TORCHRUN = (
    *("-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"),
    *("--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
)
KEPT = ("examples_per_s", "peak_rss_mb", "seconds_to_first_step", "process_seconds", "other_cpu_share")
FIGURES = ("examples_per_s", "first_epoch", "later_epochs", "peak_rss_mb", "val_loss", "seconds_to_first_step")
PAIRS = {
    "examples_per_s kernels on/off": ("examples_per_s", "kernels on", "kernels off"),
    "seconds_to_first_step kernels on/off": ("seconds_to_first_step", "kernels on", "kernels off"),
    "later epochs upper/all": ("later_epochs", "upper", "all"),
}
PAIRS |= {f"{key} {kind} two/one": (key, f"{kind} two", f"{kind} one") for kind in ("lora", "full") for key in KEPT[:2]}
GOALS = {
    "C++ kernels are faster": ("examples_per_s kernels on/off", ">=", 1.0),
    "at least 2.5 times the full depth behind the first epoch": ("later epochs upper/all", ">=", 2.5),
}
SAME_LOSSES, COMPARED = 1e-5, 10
"""Relative difference that float32 rounding may cause, within so many steps."""


def measure(name: str, flags: Mapping[str, Any], folder: Path) -> Run:
    """One run. Its activation cache starts empty; compiled kernels are kept between runs."""
    two = name.endswith("two")
    environment = (
        {"OMP_NUM_THREADS": "1" if two else "2", "GLOO_SOCKET_IFNAME": "lo"} if "lora_dropout" in flags else {}
    )
    environment |= {"GRAFT_HOME": str(folder / "home")} if "train_layers" in flags else {}
    words = ["-m", "graftlm", *harness.graft_words("train", {**flags, "out_dir": folder / "run"})]
    command = [sys.executable, *(TORCHRUN if two else ()), *words]
    run = harness.run_json(command, folder, harness.child_environment(**environment))
    rows = harness.read_rows(folder / "run" / "metrics.jsonl")
    found = {key: run[key] for key in KEPT} | epoch_speeds(rows, len(rows) // flags["epochs"])
    if two:
        found["peak_rss_mb"] = max(run["distributed"]["peak_rss_mb"])
    return {**found, "val_loss": run["last"]["val_loss"], "losses": [row["train_loss"] for row in rows]}


def epoch_speeds(rows: Sequence[Mapping[str, Any]], steps_per_epoch: int) -> dict[str, float]:
    """Examples/s of the first epoch and of the later ones, from the rows of metrics.jsonl."""
    tokens = [row["tokens"] - (rows[i - 1]["tokens"] if i else 0) for i, row in enumerate(rows)]
    seconds = [count / row["tokens_per_s"] for count, row in zip(tokens, rows, strict=True)]
    first, last = rows[steps_per_epoch - 1]["examples"], rows[-1]["examples"]
    return {
        "first_epoch": first / sum(seconds[:steps_per_epoch]),
        "later_epochs": (last - first) / sum(seconds[steps_per_epoch:]),
    }


def loss_difference(rounds: Sequence[Round], one: str, other: str) -> float | None:
    """The largest relative difference of two contenders' first losses; None if not measured."""
    whole = [(each[one]["losses"], each[other]["losses"]) for each in rounds if {one, other} <= set(each)]
    pairs = [pair for losses in whole for pair in zip(*(each[:COMPARED] for each in losses), strict=True)]
    return max((abs(a - b) / abs(a) for a, b in pairs), default=None)


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Rounds and summary."""
    from graftlm.files.assets import data_folder

    source = data_folder(args.data)
    for split, count in (("train", args.reviews), ("validation", 8), ("test", 8)):
        harness.write_rows(work / "data" / f"{split}.jsonl", harness.read_rows(source / f"{split}.jsonl")[:count])
    common = {**COMMON, "init_from": args.model, "data": work / "data"}
    wanted = {name: {**common, **flags} for option in args.only for name, flags in OPTIONS[option].items()}
    if "kernels" in args.only:
        measure("compile", {**wanted["kernels on"], "epochs": 2}, work / "compile")
    contenders = {name: partial(measure, name, flags) for name, flags in wanted.items()}
    rounds, rejected = harness.run_rounds(contenders, args, work, "examples_per_s")
    summary = harness.summarise(rounds, FIGURES, PAIRS, GOALS)
    for kind in ("lora", "full"):
        far = loss_difference(rounds, f"{kind} one", f"{kind} two")
        holds = None if far is None else far <= SAME_LOSSES
        summary["claims"][f"losses of two are those of one to {SAME_LOSSES:g}, {kind}"] = holds
    config = {**COMMON, "model": args.model, "data": args.data, "reviews": args.reviews, "options": OPTIONS}
    return {"config": config, **summary, "runs": rounds, "rejected": rejected}


FLAGS: dict[str, dict[str, Any]] = {
    "only": {"type": harness.choices(tuple(OPTIONS)), "default": list(OPTIONS), "help": "options, by commas"},
    "reviews": {"type": int, "default": REVIEWS, "help": f"training reviews (default {REVIEWS})"},
    **harness.SOURCE,
    **harness.ROUNDS,
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS))
