"""One process with two threads against two processes with one thread each, on the same batches.

    python benchmarks/processes.py [--steps 20] [--rounds 3] [--json-out FILE]

    lora one, lora two    LoRA r=16: the gradients of what is trained are added up (data parallel)
    full one, full two    all weights: cut over the two processes (FSDP2)

Each run is a command of its own, in turn: the same reviews in batches of 16, each process's rows in one pass, dropout
off, with a target at every token and nothing shared, which is what `graft account` counts; `paper.py` holds its
predictions against these runs. How fast two processes send is measured first, by adding up 100 MB of numbers. Speed is
examples over wall seconds of the steps, as `graft train --json` counts it; memory is each process's peak. Bytes are
those that went over the loopback device (where nothing else should talk meanwhile), divided by the steps, beside what
`graft account` says is needed. The measured ones hold the validation, the checkpoint and the way the processes meet,
too.

That losses are equal is a test: tests/training/test_distributed.py; here their largest relative difference is shown.
A table goes to stderr, one JSON object to the last line of stdout.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import count, pairwise
from pathlib import Path
from statistics import median
from typing import Any

from _machine import describe
from _rounds import Round, Run, accepted_run, ratios
from startup import GRAFT, timed
from train_vs_peers import BenchmarkError, git_state

from graftlm.config import AccountConfig
from graftlm.studies.cost_report import account

BATCH, RANK = 16, 16
PROBE_BYTES = 100_000_000
SAME = 1e-5
CONTENDERS = ("lora one", "lora two", "full one", "full two")
MEET = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *MEET, "-m", "graftlm")


def loopback_bytes(text: str) -> int:
    """What the loopback device has sent, from the text of /proc/net/dev."""
    line = next(line for line in text.split("\n") if line.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[8])


def _sent() -> int:
    return loopback_bytes(Path("/proc/net/dev").read_text(encoding="utf-8"))


def needed_bytes(contender: str, model: str) -> int:
    """What both processes together must send in a step of one pass, in float32: by `graft account`."""
    if contender.endswith("one"):
        return 0
    rank = RANK if contender.startswith("lora") else 0
    said = account(AccountConfig(init_from=model, rank=rank, dtype="float32", processes=2), {"rank"})
    return 2 * int(said["processes"]["sent_per_step"]["total"])


def measure(contender: str, args: argparse.Namespace, folder: Path) -> Run:
    """One run in the new folder `folder`."""
    several = contender.endswith("two")
    words = ["train", "--init_from", args.model, "--data", args.data, "--out_dir", str(folder / "run"), "--json"]
    words += ["--rank", str(RANK) if contender.startswith("lora") else "0", "--lora_dropout", "0", "--dtype", "float32"]
    words += ["--max_iters", str(args.steps), "--eval_every", str(args.steps), "--val_limit", "16"]
    words += ["--micro_tokens", "0", "--device", "cpu", "--batch_size", str(BATCH), "--compile", "off"]
    words += ["--loss_on", "all", "--no_shared_prefix"]
    threads = "1" if several else "2"
    before = _sent()
    figures, out = timed(
        [*(TORCHRUN if several else GRAFT), *words], folder, OMP_NUM_THREADS=threads, GLOO_SOCKET_IFNAME="lo"
    )
    result = json.loads(out)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    peaks = result["processes"]["peak_rss_mb"] if several else [result["peak_rss_mb"]]
    tokens = [b - a for a, b in pairwise([0, *(row["tokens"] for row in rows)])]
    return {
        "contender": contender,
        "examples_per_s": result["examples_per_s"],
        "peak_rss_mb": max(peaks),
        "peak_rss_mb_each": peaks,
        "sent_mb_per_step": (_sent() - before) / args.steps / 1e6,
        "needed_mb_per_step": needed_bytes(contender, args.model) / 1e6,
        "trainable": result["trainable"],
        "total": result["total"],
        "tokens_per_step": sum(tokens) / len(tokens),
        "most_tokens": max(tokens),
        "losses": [row["train_loss"] for row in rows],
        "other_cpu_share": figures["other_cpu_share"],
    }


def probe() -> None:
    """Of two processes under torchrun: seconds of an all-reduce; the first one prints what each has sent a second."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    numbers, seconds = torch.ones(PROBE_BYTES // 4), []
    for _ in range(7):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(numbers)
        seconds.append(time.perf_counter() - began)
    if dist.get_rank() == 0:  # a sum of N processes takes 2 (N - 1) / N of its bytes from each
        print(json.dumps({"link_gbs": PROBE_BYTES / median(seconds[2:]) / 1e9}))
    dist.destroy_process_group()


def runtime(folder: Path) -> dict[str, float]:
    """What two processes send a second, in 10^9 bytes each, and what one holds that has only imported everything."""
    run = (*TORCHRUN[:-2], __file__, "--probe")
    _, out = timed(run, folder / "probe", OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    code = "import graftlm.training.train; from graftlm.training.memory import peak_rss_mb as p; print(p())"
    _, held = timed([sys.executable, "-c", code], folder / "runtime")
    return {**json.loads(out.splitlines()[-1]), "runtime_mb": float(held)}


def apart(one: Sequence[float], two: Sequence[float]) -> float:
    """The largest relative difference of two runs' losses."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))


def summarise(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians, ratios of two processes to one within rounds, and how far their losses are apart."""
    keys = ("examples_per_s", "peak_rss_mb", "sent_mb_per_step", "needed_mb_per_step")
    pairs = [(key, kind) for kind in ("lora", "full") for key in keys[:2]]
    compared = {f"{key} {kind} two/one": ratios(rounds, key, f"{kind} two", f"{kind} one") for key, kind in pairs}
    far = {
        kind: max(apart(each[f"{kind} one"]["losses"], each[f"{kind} two"]["losses"]) for each in rounds)
        for kind in ("lora", "full")
    }
    return {
        "medians": {name: {key: median(each[name][key] for each in rounds) for key in keys} for name in CONTENDERS},
        "ratios": {name: {"rounds": found, "median": median(found)} for name, found in compared.items()},
        "losses_apart": far,
        "claims": {f"losses of two are those of one to {SAME:g}, {kind}": x <= SAME for kind, x in far.items()},
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'':12}{'examples/s':>12}{'peak MB':>10}{'sent MB/step':>14}{'needed':>10}"]
    for name, m in summary["medians"].items():
        lines.append(
            f"{name:12}{m['examples_per_s']:12.2f}{m['peak_rss_mb']:10.0f}{m['sent_mb_per_step']:14.1f}"
            f"{m['needed_mb_per_step']:10.1f}"
        )
    for name, ratio in summary["ratios"].items():
        lines.append(f"{name:32}{ratio['median']:7.3f}   ({'  '.join(f'{x:.3f}' for x in ratio['rounds'])})")
    lines += [f"losses of {kind} apart by at most {far:.1e}" for kind, far in summary["losses_apart"].items()]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a model's name or folder (smollm2-135m)")
    parser.add_argument("--data", default="rotten-tomatoes-pypi", help="a data set's name or folder")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of a run (default 20)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--max-other", type=float, default=0.03, help="share of the cores others may use (0.03)")
    parser.add_argument("--json-out", type=Path, help="write the JSON object to this file too")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.probe:
        probe()
        return 0
    numbers, rounds = count(1), []
    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as name:
        work = Path(name)
        about = runtime(work)
        try:
            for number in range(1, args.rounds + 1):
                done: dict[str, Run] = {}
                for contender in CONTENDERS:

                    def once(contender: str = contender) -> Run:
                        return measure(contender, args, work / f"run-{next(numbers)}")

                    run, _ = accepted_run(once, args.max_other, 3)
                    if run is None:
                        raise BenchmarkError("no quiet run in 3 attempts; stop other work, or raise --max-other")
                    done[contender] = run
                rounds.append(done)
                print(f"round {number} of {args.rounds} done", file=sys.stderr)
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    summary = summarise(rounds)
    print(table(summary), file=sys.stderr)
    config = {"model": args.model, "data": args.data, "steps": args.steps, "max_other": args.max_other}
    report = {"machine": describe(), "graftlm": git_state(), "config": config, **about, **summary, "runs": rounds}
    if args.json_out:
        args.json_out.parent.mkdir(parents=True, exist_ok=True)
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
