"""Training speed and memory of every method, relative to LoRA r=16 and, where PEFT has the method, to PEFT's.

    python benchmarks/methods.py [--rounds 1] [--steps 12] [--only lora,prefix] [--json-out FILE]

    graft NAME   `graft train --method NAME` with the method's own defaults (LoRA and DoRA: r=16)
    peft NAME    the PEFT loop of peers.py with PEFT's LoRA, DoRA or prefix tuning, in LoRA's fastest dtype here

The same reviews in batches of 16, loss on the completion. What each method reaches: docs/methods.md.
"""

import argparse
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
from peers import PREFIX_LENGTH
from train_vs_peers import FLAGS, measure, prepare, trials

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {},
    "adapter": {},
    "prefix": {"prefix_length": PREFIX_LENGTH},
    "bitfit": {"add_biases": True},
    "ia3": {},
    "full": {},
}
IN_PEFT = ("lora", "dora", "prefix")
OF_LORA = {"dora": 0.8, "adapter": 0.8, "prefix": 0.8, "bitfit": 0.8, "ia3": 0.8, "full": 0.5}
OF_PEFT = dict.fromkeys(IN_PEFT, 2.0)
PAIRS = {f"examples/s {name} / lora": ("examples_per_s", f"graft {name}", "graft lora") for name in OF_LORA}
PAIRS |= {f"examples/s {name} / PEFT's": ("examples_per_s", f"graft {name}", f"peft {name}") for name in OF_PEFT}
GOALS = {f"{name} / lora: at least {x:g}": (f"examples/s {name} / lora", ">=", x) for name, x in OF_LORA.items()}
GOALS |= {f"{name} / PEFT's: at least {x:g}": (f"examples/s {name} / PEFT's", ">=", x) for name, x in OF_PEFT.items()}


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Trials, rounds, summary."""
    job = prepare(args, work)
    jobs, tried = trials(job, ["peft"], work)
    contenders = {}
    for name in args.only:
        own = replace(job, method=name, validate=False)
        contenders[f"graft {name}"] = partial(measure, "graft", own, method=METHODS[name])
        if name in IN_PEFT:
            contenders[f"peft {name}"] = partial(measure, "peft", replace(own, dtype=jobs["peft"].dtype))
    rounds, rejected = harness.run_rounds(contenders, args, work, "examples_per_s")
    summary = harness.summarise(rounds, ("examples_per_s", "peak_rss_mb", "trainable"), PAIRS, GOALS)
    config = {**asdict(job), "model": args.model, "data": args.data}
    return {"config": config, "trials": tried, **summary, "runs": rounds, "rejected": rejected}


FLAGS = FLAGS | {
    "steps": {"type": harness.at_least(4), "default": 12, "help": "optimizer steps of a run, at least 4 (default 12)"},
    "only": {"type": harness.choices(tuple(METHODS)), "default": list(METHODS), "help": "methods, by commas"},
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS))
