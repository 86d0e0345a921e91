"""Four adapters mixed in one batch against one adapter for all of it: what choosing by row costs.

    python benchmarks/mixed_adapters.py [--rows 16,32] [--targets q,k,v] [--rounds 7] [--json-out FILE]

    mixed   four LoRA adapters, r=16, stacked on one base; each in a quarter of the rows, in turn
    single  the same rows with the first adapter alone, stacked (a stack of one)
    merged  the same with that adapter merged into the weights: what serving one adapter only can do
    base    without any adapter

All are decoded greedily by the engine's own decoder (`inference.generate.Batch`) in this process, in turn, with the
same prompts (test reviews in the classification prompt) and the same number of new tokens: end-of-text ends no row,
so all do the same work. Each round counts only if others used at most 3% of the cores. The adapters' numbers are
random, which changes nothing in the speed. First the logits of a mixed batch are compared with those of each adapter
alone. A table goes to stderr, one JSON object to the last line of stdout.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from _machine import describe, machine_busy_seconds, others_share
from _rounds import Round, Run, ratios
from train_vs_peers import BenchmarkError, git_state

ADAPTERS = ("one", "two", "three", "four")
CONTENDERS = ("mixed", "single", "merged", "base")
DATA = "rotten-tomatoes-pypi"
RATIO, SAME = 0.7, 1e-4


@dataclass(frozen=True)
class Contender:
    """A model, and how its rows choose."""

    model: Any
    using: Callable[[int], AbstractContextManager[None]]


def contenders(base: Any, targets: tuple[str, ...], rank: int) -> tuple[dict[str, Contender], dict[str, Any]]:
    """What is measured, and each adapter alone, unmerged."""
    import torch

    from graftlm.methods import LoRA
    from graftlm.methods.base import delta_state
    from graftlm.methods.lora import LoRALinear
    from graftlm.methods.stack import stack
    from graftlm.models import sharing

    method, alone = LoRA(rank=rank, alpha=4.0 * rank, targets=targets), {}
    for seed, name in enumerate((*ADAPTERS, "merged")):
        model, rng = sharing(base), torch.Generator().manual_seed(seed % len(ADAPTERS))
        method.install(model, rng)
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_B.data.normal_(0, 0.002, generator=rng)
                module.folds = name == "merged"
        alone[name] = model.eval()
    merged = alone.pop("merged")
    states = {name: (method, delta_state(model)) for name, model in alone.items()}
    mixed, single = stack(base, states), stack(base, {"one": states["one"]})
    return {
        "mixed": Contender(mixed.model, lambda rows: mixed.using([ADAPTERS[row % 4] for row in range(rows)])),
        "single": Contender(single.model, lambda rows: single.using(["one"] * rows)),
        "merged": Contender(merged, lambda rows: nullcontext()),
        "base": Contender(base, lambda rows: nullcontext()),
    }, alone


def decode(contender: Contender, prompts: Sequence[Sequence[int]], new: int) -> Run:
    """Continue all prompts by `new` tokens; seconds of reading them and of the steps."""
    import torch

    from graftlm.inference.generate import Batch
    from graftlm.inference.sampling import likeliest

    batch = Batch(contender.model)
    with torch.no_grad(), contender.using(len(prompts)):
        began, busy, own = time.perf_counter(), machine_busy_seconds(), time.process_time()
        batch.reserve(len(prompts), max(map(len, prompts)) + new)
        tokens = likeliest(batch.join(prompts, [len(prompt) + new for prompt in prompts]))
        read = time.perf_counter()
        for _ in range(new - 1):
            tokens = likeliest(batch.step(tokens))
        ended = time.perf_counter()
    other = max(0.0, machine_busy_seconds() - busy - (time.process_time() - own))
    return {
        "tokens_per_s": len(prompts) * new / (ended - began),
        "decode_tokens_per_s": len(prompts) * (new - 1) / (ended - read),
        "other_cpu_share": others_share(other, ended - began, os.cpu_count() or 1),
    }


def largest_difference(mixed: Contender, alone: dict[str, Any], prompts: Sequence[Sequence[int]]) -> float:
    """Between the logits behind each prompt, mixed and with its adapter alone; of the size of these."""
    import torch

    from graftlm.inference.generate import Batch

    with torch.no_grad():
        with mixed.using(len(prompts)):
            found = Batch(mixed.model).join(prompts, [len(prompt) for prompt in prompts])
        differences = []
        for row, prompt in enumerate(prompts):
            expected = alone[ADAPTERS[row % 4]](torch.tensor([list(prompt)]))[0, -1]
            differences.append(float((found[row] - expected).norm() / expected.norm()))
    return max(differences)


def prompts_of(tokenizer: Any, count: int, room: int) -> list[tuple[int, ...]]:
    """Test reviews in the classification prompt."""
    from graftlm.text.data import encode_rows, load_dataset
    from graftlm.text.template import load_template

    rows = load_dataset(DATA).splits["test"][:count]
    examples, _ = encode_rows(rows, load_template("sentiment"), tokenizer, room)
    return [example.prompt_ids for example in examples]


def rounds_of(
    measured: dict[str, Contender], prompts: Sequence[Sequence[int]], args: argparse.Namespace
) -> tuple[list[Round], int]:
    """Rounds of all contenders that others left alone, and how many they did not."""
    found: list[Round] = []
    rejected = 0
    for contender in measured.values():
        decode(contender, prompts, 4)  # what is allocated and chosen once
    while len(found) < args.rounds:
        each = {name: decode(contender, prompts, args.new_tokens) for name, contender in measured.items()}
        if max(run["other_cpu_share"] for run in each.values()) <= args.max_other:
            found.append(each)
        else:
            rejected += 1
            if rejected > args.attempts * args.rounds:
                raise BenchmarkError(f"no quiet round in {rejected}; stop other work, or raise --max-other")
    return found, rejected


def summarise(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians, and the ratios within rounds."""
    keys = ("tokens_per_s", "decode_tokens_per_s", "other_cpu_share")
    pairs = (("mixed", "single"), ("mixed", "merged"), ("single", "merged"), ("mixed", "base"))
    compared = {f"{key} {top}/{bottom}": ratios(rounds, key, top, bottom) for key in keys[:2] for top, bottom in pairs}
    medians = {name: {key: median(each[name][key] for each in rounds) for key in keys} for name in CONTENDERS}
    return {
        "medians": medians,
        "ratios": {name: {"rounds": each, "median": median(each)} for name, each in compared.items()},
    }


def table(rows: int, summary: dict[str, Any], rejected: int) -> str:
    """The summary for a reader."""
    lines = [f"{rows} rows ({rejected} rounds rejected)      tokens/s   of decoding   others"]
    for name, figures in summary["medians"].items():
        lines.append(
            f"{name:28}{figures['tokens_per_s']:10.1f}{figures['decode_tokens_per_s']:14.1f}"
            f"{figures['other_cpu_share']:9.1%}"
        )
    lines += [f"{name:44}{ratio['median']:7.3f}" for name, ratio in summary["ratios"].items()]
    return "\n".join(lines)


def main() -> int:
    """Measure, say it, and print the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", default="16,32", help="rows of a batch, several with commas")
    parser.add_argument("--targets", default="q,k,v,o,up,gate,down", help="the linears that all adapters change")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-other", type=float, default=0.03, help="share of the cores that others may use")
    parser.add_argument("--attempts", type=int, default=5, help="so many rounds may be rejected for each that counts")
    parser.add_argument("--json-out", type=Path)
    args = parser.parse_args()
    from graftlm.process import keep_memory

    keep_memory()
    from graftlm.exchange.load import load

    loaded = load(args.model, device="cpu", dtype=args.dtype)
    measured, alone = contenders(loaded.model, tuple(args.targets.split(",")), args.rank)
    sizes = [int(word) for word in args.rows.split(",")]
    prompts = prompts_of(loaded.tokenizer, max(sizes), loaded.model.room)
    difference = largest_difference(measured["mixed"], alone, prompts[:8])
    print(f"largest relative difference of logits, mixed against alone: {difference:.1e}", file=sys.stderr)
    results = {}
    try:
        for rows in sizes:
            rounds, rejected = rounds_of(measured, prompts[:rows], args)
            summary = summarise(rounds)
            print(table(rows, summary, rejected), file=sys.stderr, flush=True)
            results[str(rows)] = {**summary, "rounds": rounds, "rejected": rejected}
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    claims = {
        f"mixed at least {RATIO} of single, {rows} rows": one["ratios"]["tokens_per_s mixed/single"]["median"] >= RATIO
        for rows, one in results.items()
    }
    if args.dtype == "float32":
        claims[f"each row what its adapter alone gives, {SAME:g}"] = difference <= SAME
    config = {key: value for key, value in vars(args).items() if key != "json_out"}
    report = {"machine": describe(), "graftlm": git_state(), "config": config, "difference": difference}
    for what in ("medians", "ratios"):
        report[what] = {f"{name}, {n} rows": each for n, one in results.items() for name, each in one[what].items()}
    report |= {"rounds": {n: [one["rounds"], one["rejected"]] for n, one in results.items()}, "claims": claims}
    if args.json_out:
        args.json_out.parent.mkdir(parents=True, exist_ok=True)
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
