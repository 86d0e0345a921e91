"""Why two processes' losses differ from one's in the seventh digit: sums of float32 in another order, and nothing else.

    python benchmarks/processes_rounding.py [--steps 20] [--batch 16] [--kinds lora,full] [--dtypes float32,float64]

    one      one process, each batch in one pass
    parts    one process, each batch in parts of at most --micro_tokens tokens, whose gradients add up
    two      two processes with half of each batch (torchrun, gloo); of full fine-tuning with the weights cut over them

All three are the same sums, added up in another order. If two processes did something else than that, `two` would be
further from `one` than `parts` is, and in float64 it would stay away. (graft itself computes in no float64: it is put
into its table of number formats here.) Dropout is off, and nothing is compiled.

Prints the largest relative difference of a step's training loss to that of `one`: a table on stderr, one JSON object on
the last line of stdout.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _machine import describe
from train_vs_peers import BenchmarkError, git_state

CONTENDERS = ("one", "parts", "two")
MEET = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "2", *MEET)


def work(settings: Mapping[str, Any]) -> None:
    """What each process does: train, in float64 too."""
    import torch

    from graftlm.config import TrainConfig
    from graftlm.exchange import device
    from graftlm.training.train import train

    device.DTYPES["float64"] = torch.float64
    train(TrainConfig(**settings))


def losses(contender: str, kind: str, dtype: str, args: argparse.Namespace, folder: Path) -> list[float]:
    """The training losses of a run, step by step."""
    settings = {
        "init_from": args.model,
        "data": args.data,
        "out_dir": str(folder),
        "rank": 16 if kind == "lora" else 0,
        "lora_dropout": 0.0,
        "dtype": dtype,
        "device": "cpu",
        "compile": "off",
        "batch_size": args.batch,
        "max_iters": args.steps,
        "eval_every": args.steps,
        "val_limit": 4,
        "micro_tokens": args.micro_tokens if contender == "parts" else 0,
    }
    start = TORCHRUN if contender == "two" else ()
    command = [sys.executable, *start, str(Path(__file__).resolve()), "--work", json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{contender}, {kind}, {dtype}: {done.stderr[-2000:]}")
    rows = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row)["train_loss"] for row in rows]


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest relative difference of two runs' losses."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def main(words: Sequence[str] | None = None) -> int:
    """Run the comparison; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a model's name or folder (smollm2-135m)")
    parser.add_argument("--data", default="rotten-tomatoes-pypi", help="a data set's name or folder")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of a run (20)")
    parser.add_argument("--batch", type=int, default=16, help="examples in a step (16)")
    parser.add_argument("--micro-tokens", type=int, default=200, help="most tokens of a part (200)")
    parser.add_argument("--kinds", default="lora,full", help="lora, full or both")
    parser.add_argument("--dtypes", default="float32,float64", help="float32, float64 or both")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.work:
        work(json.loads(args.work))
        return 0
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as name:
        try:
            for kind in args.kinds.split(","):
                for dtype in args.dtypes.split(","):
                    where = Path(name) / f"{kind}-{dtype}"
                    made = {each: losses(each, kind, dtype, args, where / each) for each in CONTENDERS}
                    case = {each: apart(made["one"], made[each]) for each in CONTENDERS[1:]}
                    found[f"{kind} {dtype}"] = case
                    print(f"{kind:6}{dtype:10}" + "".join(f"{k}: {v:.1e}  " for k, v in case.items()), file=sys.stderr)
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    config = {key: value for key, value in vars(args).items() if key != "work"}
    print(json.dumps({"machine": describe(), "graftlm": git_state(), "config": config, "apart": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
