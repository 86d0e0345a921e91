"""On paper: what a 7B model on 8 GPUs and a 70B model on 64 need, and how the same formulas did where we could measure.

    python benchmarks/paper.py

Reads the newest benchmarks/results/*-processes*.json (`processes.py`), asks `graft account` and writes
docs/large_models.md. The same results always give the same page. Nothing on the page about GPUs was run: the figures of
the devices are their makers' and the share of them that is reached is assumed, as the page says.

The formulas' test is this: the speed of one process training an adapter is taken as the machine's; from it, from the
speed at which two processes send, and from `graft account` come the seconds of a step and the bytes that are held for
the other three runs, which are then compared with what was measured.

Letters: N processes.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from page import ROOT, machine, newest
from processes import BATCH

from graftlm.config import AccountConfig
from graftlm.studies.cost_report import account

PAGE = ROOT / "docs" / "large_models.md"

# One NVIDIA H100 SXM by its data sheet: dense bfloat16, memory, NVLink one way; and InfiniBand NDR, one port for each.
PEAK_TFLOPS, MEMORY_GB, NVLINK_GBS, INFINIBAND_GBS = 989.0, 80.0, 450.0, 50.0
REACHED = 0.4
LINK_REACHED = 0.7
TOKENS = 10_000_000


@dataclass(frozen=True)
class Case:
    """A run on paper."""

    model: str
    rank: int
    gpus: int
    shard: bool
    batch_size: int
    max_length: int = 2048

    @property
    def config(self) -> AccountConfig:
        """What is asked of `graft account`."""
        link = NVLINK_GBS if self.gpus <= 8 else INFINIBAND_GBS
        return AccountConfig(
            init_from=self.model,
            rank=self.rank,
            processes=self.gpus,
            shard=self.shard,
            batch_size=self.batch_size,
            max_length=self.max_length,
            gflops=PEAK_TFLOPS * 1000 * REACHED,
            link_gbs=link * LINK_REACHED,
        )

    @property
    def command(self) -> str:
        """How it would be started; on several machines the same line on each."""
        nodes = f"--nnodes {self.gpus // 8} " if self.gpus > 8 else ""
        words = ["--init_from", self.model, "--rank", str(self.rank), *["--shard"] * self.shard]
        words += ["--batch_size", str(self.batch_size), "--max_length", str(self.max_length), "--dtype", "bfloat16"]
        return f"torchrun {nodes}--nproc_per_node {min(self.gpus, 8)} -m graftlm train {' '.join(words)}"

    @property
    def name(self) -> str:
        """A row's name."""
        size = "7B" if "7b" in self.model else "70B"
        return f"{size}, {f'LoRA r={self.rank}' if self.rank else 'full'}{', --shard' * self.shard}, {self.gpus} GPUs"


SEVEN, SEVENTY = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-70b-hf"
CASES = (
    Case(SEVEN, 16, 8, False, 32),
    Case(SEVEN, 16, 8, True, 32),
    Case(SEVEN, 0, 8, False, 16),
    Case(SEVENTY, 16, 64, False, 64),
    Case(SEVENTY, 16, 64, True, 64),
    Case(SEVENTY, 0, 64, False, 64),
)


@cache
def ask(config: AccountConfig) -> dict[str, Any]:
    """`graft account` with these flags."""
    return account(config, {"rank"})


def on_paper(case: Case) -> dict[str, float]:
    """GB of each GPU, GB it sends in a step, seconds of a step, and minutes for `TOKENS` tokens, best and worst."""
    found = ask(case.config)
    each, step = found["processes"], found["step"]
    weights, kept = each["bytes"]["total"] / 1e9, step["activation_bytes"] / 1e9
    compute, link = step["compute_seconds"], step["link_seconds"]
    steps = TOKENS / step["tokens"]
    return {
        "held": weights,
        "activations": kept,
        "sum": weights + kept,
        "sent": each["sent_per_step"]["total"] / 1e9,
        "compute": compute,
        "link": link,
        "least": steps * max(compute, link) / 60,
        "most": steps * (compute + link) / 60,
    }


# What was measured ----------------------------------------------------------------------------------------------------


def measured(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Medians of each contender's rounds: seconds of a step, peak of a process, tokens, counts."""
    rounds: Sequence[Mapping[str, Any]] = result["runs"]
    keys = ("examples_per_s", "peak_rss_mb", "sent_mb_per_step", "tokens_per_step", "most_tokens", "trainable", "total")
    found = {name: {key: median(each[name][key] for each in rounds) for key in keys} for name in rounds[0]}
    return {name: {**each, "seconds": BATCH / each["examples_per_s"]} for name, each in found.items()}


def predicted(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The same by formula, from the speed of `lora one` alone."""
    runs = measured(result)
    one = runs["lora one"]
    gflops = _step("lora one", result, one)["step"]["flops"] / one["seconds"] / 1e9
    found = {}
    for name, run in runs.items():
        said = _step(name, result, run)
        mean, several = said["step"]["flops"] / BATCH, said.get("processes")
        sent = several["sent_per_step"]["total"] if several else 0
        # Both processes share the cores of the one.
        seconds = mean * BATCH / (gflops * 1e9) + sent / (result["link_gbs"] * 1e9)
        longest = _step(name, result, run, longest=True)
        held = (several or said)["bytes"]["total"] + longest["step"]["activation_bytes"]
        found[name] = {
            "seconds": seconds,
            "peak_rss_mb": result["runtime_mb"] + held / 1e6,
            "sent_mb_per_step": 2 * sent / 1e6,
        }
    return found


def _step(name: str, result: Mapping[str, Any], run: Mapping[str, float], longest: bool = False) -> dict[str, Any]:
    tokens = run["most_tokens" if longest else "tokens_per_step"] / BATCH
    return ask(
        AccountConfig(
            init_from=result["config"]["model"],
            rank=16 if name.startswith("lora") else 0,
            dtype="float32",
            max_length=round(tokens),
            batch_size=BATCH,
            processes=2 if name.endswith("two") else 1,
        )
    )


# The page -------------------------------------------------------------------------------------------------------------

TEXT = """# Large models, on paper

Made by `python benchmarks/paper.py` from `graft account`, whose formulas count parameters, operations and bytes
without loading a weight, and from the newest run of `benchmarks/processes.py`. **Nothing about GPUs on this page was
run.**

## 7B on 8 GPUs, 70B on 64

Llama 2's shapes; frozen weights and arithmetic in bfloat16, what is trained in float32 with AdamW; texts of
{length:,} tokens with a target at each, no activation recomputed. A GPU is an H100 SXM by its data sheet ({peak:.0f}
TFLOP/s in bfloat16, {memory:.0f} GB); in one machine eight of them send {nvlink:.0f} GB/s each, between machines
{infiniband:.0f} GB/s each. **Assumed**: {reached:.0%} of the arithmetic's peak and {link_reached:.0%} of the link's
are reached.

{table}

GB of each GPU: *held* is what `graft account` lists (weights, gradients, moments, and with cut weights two blocks
that are whole for a while), *kept* is what autograd keeps from the forward to the backward pass. The last two columns
are minutes for {tokens:,} tokens: if sending hides wholly behind computing, and if none of it does. What does not fit
into {memory:.0f} GB stands there to show why `--shard` exists; the runtime, the allocator's waste and what lives for
a moment come on top, so leave a tenth free.

Read it so: an adapter on a 7B model wants no cutting, as it sends almost nothing; all weights of a 7B model fit eight
GPUs when they are cut. Of a 70B model each GPU would have to hold {seventy:.0f} GB to adapt it whole, so its frozen
weights are cut too, and then between machines it is the link that sets the pace: more tokens a step (a larger
`--batch_size`, as far as *kept* allows) for the same bytes sent.

```
{commands}
```

## How the formulas did on what we could measure

{machine}

SmolLM2-135M, float32, batches of 16 reviews, all tokens; in one process with two threads and in two with one each.
The speed of the first row is given to the formula ({gflops:.0f} GFLOP/s), and so are what a process holds that has
only imported everything ({runtime:.0f} MB) and what two processes send a second ({link:.2f} GB each); the rest is
predicted.

{results}

{reading}
"""


def page(result: Mapping[str, Any]) -> str:
    """The page's text."""
    paper = {case.name: on_paper(case) for case in CASES}
    columns = ["held", "kept", "sum", "fits", "GB sent a step", "s computing", "s sending", "minutes, best", "worst"]
    rows = []
    for name, each in paper.items():
        fits = "yes" if each["sum"] <= MEMORY_GB else "**no**"
        figures = [each["held"], each["activations"], each["sum"]]
        times = [each["sent"], each["compute"], each["link"], each["least"], each["most"]]
        rows.append([name, *map(_cell, figures), fits, *map(_cell, times)])
    seen, said = measured(result), predicted(result)
    compared = []
    for name, run in seen.items():
        pairs = [(said[name][key], run[key]) for key in ("seconds", "peak_rss_mb", "sent_mb_per_step")]
        several = name.endswith("two")
        cells = [f"{_cell(a)} / {_cell(b)}" for a, b in (pairs if several else pairs[:2])] + ["-"] * (not several)
        compared.append([name, *cells, *(f"{a / b - 1:+.0%}" for a, b in pairs[:2])])
    one = seen["lora one"]
    gflops = _step("lora one", result, one)["step"]["flops"] / one["seconds"] / 1e9
    return TEXT.format(
        length=CASES[0].max_length,
        peak=PEAK_TFLOPS,
        memory=MEMORY_GB,
        nvlink=NVLINK_GBS,
        infiniband=INFINIBAND_GBS,
        reached=REACHED,
        link_reached=LINK_REACHED,
        tokens=TOKENS,
        table=_table(["", *columns], rows),
        seventy=paper[CASES[3].name]["held"],
        commands="\n".join(case.command for case in CASES if paper[case.name]["sum"] <= MEMORY_GB),
        machine=f"{result['day']}. {machine(result)}",
        gflops=gflops,
        runtime=result["runtime_mb"],
        link=result["link_gbs"],
        results=_table(
            ["", "s a step, said / seen", "MB of a process", "MB sent a step, of both", "s off", "MB off"], compared
        ),
        reading=READING,
    )


READING = """The first row's seconds are given, so three are predicted. The formulas leave out: of time whatever is no
matrix product (norms, softmax, and the optimiser's step, which full fine-tuning feels and an adapter hardly); of memory
the tensors of a moment (the head's logits among them), the tokenised data and the allocator's waste. Bytes were counted
on the loopback device over the whole run and divided by its few steps, so they hold the plan's probe, the validation
and the checkpoint too. Why full fine-tuning in two processes takes about twice as long as said has not been looked
into. On GPUs none of this has been tried."""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _cell(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def result_of(folder: Path) -> dict[str, Any]:
    """The newest result of `processes.py` that has what the predictions need, with its day."""
    name, result = next(iter(newest(folder, "processes").items()))
    return {**result, "day": name[:10]}


def main(words: Sequence[str] | None = None) -> int:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(words)
    PAGE.write_text(page(result_of(ROOT / "benchmarks" / "results")), encoding="utf-8")
    print(json.dumps({"page": str(PAGE.relative_to(ROOT))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
