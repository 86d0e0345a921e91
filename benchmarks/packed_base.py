"""LoRA on a packed base: memory, speed and losses next to the same base dequantised, and PEFT with bitsandbytes.

    python benchmarks/packed_base.py [--shape 1b] [--only dense,q4_0,q8_0,peft] [--steps 6] [--json-out FILE]

A model of TinyLlama's shape (1.1B; or 3b, 7b: Llama 3.2's and Llama 2's) with random weights; LoRA r=16 on q, k and v;
two texts of --tokens tokens a step with a target at each, float32 arithmetic, AdamW. `dense` has exactly the values of
`q4_0`, so their losses must be equal. The peer is transformers' Llama with bitsandbytes' NF4 linears and PEFT's LoRA:
its embedding and head stay float32, as bitsandbytes leaves them. Memory is the peak of the steps, without loading:
/proc/self/clear_refs resets it before. Speed is tokens per second of processor time in one thread, since other work on
the machine then hardly counts; the first step is left out.

bitsandbytes is no dependency: `pip install --no-deps --target DIR bitsandbytes`, and PYTHONPATH=DIR here.
"""

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import harness
from harness import Run

CONTENDERS = ("dense", "q4_0", "q8_0", "peft")
SHAPES = {  # layers, hidden size, intermediate size, heads, key/value heads, vocabulary, tied head
    "1b": (22, 2048, 5632, 32, 4, 32000, False),
    "3b": (28, 3072, 8192, 24, 8, 128256, True),
    "7b": (32, 4096, 11008, 32, 32, 32000, False),
}
ROWS, RANK, LR = 2, 16, 1e-4
FIGURES = ("tokens_per_cpu_s", "peak_rss_mb")
PAIRS = {f"{key} {name}/dense": (key, name, "dense") for name in ("q4_0", "q8_0") for key in FIGURES} | {
    f"{key} q4_0/peft": (key, "q4_0", "peft") for key in FIGURES
}
GOALS = {
    "at most 0.4 of the float32 base's memory": ("peak_rss_mb q4_0/dense", "<=", 0.4),
    "at least 0.85 times its speed": ("tokens_per_cpu_s q4_0/dense", ">=", 0.85),
    "faster than PEFT with bitsandbytes": ("tokens_per_cpu_s q4_0/peft", ">=", 1.0),
    "smaller than PEFT with bitsandbytes": ("peak_rss_mb q4_0/peft", "<=", 1.0),
}
SAME_LOSS = 1e-5


def timed_steps(step: Callable[[Any], float], count: int, tokens: int, vocabulary: int) -> Run:
    """Losses, speed and peak memory of `count` steps on random tokens."""
    import torch

    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    rng, losses, seconds = torch.Generator().manual_seed(0), [], []
    for _ in range(count):
        ids = torch.randint(0, vocabulary, (ROWS, tokens + 1), generator=rng)
        start = time.process_time()
        losses.append(step(ids))
        seconds.append(time.process_time() - start)
    speed = ROWS * tokens / median(seconds[1:])
    return {"losses": losses, "tokens_per_cpu_s": speed, "cpu_s": seconds, "peak_rss_mb": harness.peak_rss_mb()}


def random_blocks(rows: int, columns: int, kind: str, rng: Any) -> Any:
    """Random blocks of a format whose values are about as large as a trained weight's."""
    import torch

    from graftlm.models.packed import FORMATS, PackedWeight

    block = FORMATS[kind]
    shape = (rows, columns // block.block_size, block.block_bytes)
    data = torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8)
    scale = torch.tensor([{"q4_0": 0.004, "q8_0": 0.0003}[kind]], dtype=torch.float16).view(torch.uint8)
    data[..., :2] = scale
    return PackedWeight(data.flatten(1), kind)


def graft_model(shape: str, kind: str, packed: bool) -> Any:
    """Our model with random blocks in every matrix; not `packed`: dequantised."""
    import torch
    from torch import nn

    from graftlm.models import CausalLM, ModelConfig
    from graftlm.models.packed import HasWeight

    layers, d, width, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    sizes: dict[str, Any] = {"num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads, "hidden_size": d}
    sizes |= {"head_dim": d // heads, "intermediate_size": width, "vocab_size": vocabulary, "tie_embeddings": tied}
    with torch.device("meta"):
        model = CausalLM(ModelConfig(family="llama", max_positions=2048, norm_eps=1e-5, **sizes))
    rng = torch.Generator().manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, HasWeight):
            rows, columns = module.weight.shape
            weight = random_blocks(rows, columns, "q8_0" if name in ("embed", "head") else kind, rng)
            module.set_weight(weight if packed else nn.Parameter(weight.dequantize(), requires_grad=False))
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            module.weight = nn.Parameter(torch.ones(module.weight.shape), requires_grad=False)
    return model


def run_graft(shape: str, kind: str, packed: bool, steps: int, tokens: int) -> Run:
    """Our steps."""
    import torch

    from graftlm.methods.base import trainable
    from graftlm.methods.lora import LoRA
    from graftlm.models.fused_ops import load_kernels

    model = graft_model(shape, kind, packed)
    LoRA(rank=RANK, alpha=2.0 * RANK, dropout=0.0).install(model, torch.Generator().manual_seed(0))
    model.set_kernels(load_kernels())
    model.train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR, fused=True)
    rows, weights = torch.arange(ROWS * tokens), torch.full((ROWS * tokens,), 1 / (ROWS * tokens))

    def step(ids: Any) -> float:
        hidden = model.hidden_states(ids[:, :-1]).flatten(0, 1)
        loss = model.loss(hidden, rows, ids[:, 1:].flatten(), weights)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return timed_steps(step, steps, tokens, model.config.vocab_size)


def normal(shape: Any) -> Any:
    """A matrix of random values, drawn once and repeated."""
    import torch

    values = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    return values.repeat(shape.numel() // len(values) + 1)[: shape.numel()].view(shape).clone()


def run_peft(shape: str, steps: int, tokens: int) -> Run:
    """The peer's steps."""
    harness.keep_memory_or_fail()
    import bitsandbytes
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, d, width, heads, kv_heads, vocabulary, tied = SHAPES[shape]
    sizes: dict[str, Any] = {"num_hidden_layers": layers, "hidden_size": d, "intermediate_size": width}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary}
    config = LlamaConfig(**sizes, tie_word_embeddings=tied, max_position_embeddings=2048)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            new = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            values = normal(module.weight.shape)
            new.weight = bitsandbytes.nn.Params4bit(values, requires_grad=False, quant_type="nf4")
            model.model.layers.set_submodule(name, new.to("cpu"))
    model.tie_weights()
    for name, p in list(model.named_parameters()):
        if p.device.type == "meta":
            owner, _, attribute = name.rpartition(".")
            values = torch.ones(p.shape) if p.dim() == 1 else normal(p.shape)
            setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    targets = ["q_proj", "k_proj", "v_proj"]
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.0)
    model = get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=True)

    def step(ids: Any) -> float:
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return timed_steps(step, steps, tokens, vocabulary)


def child(settings: dict[str, Any]) -> Run:
    """A contender's run, in its own process."""
    import torch

    torch.set_num_threads(1)
    name, shape, size = settings["contender"], settings["shape"], (settings["steps"], settings["tokens"])
    if name == "peft":
        return run_peft(shape, *size)
    from graftlm.cli.main import tune_malloc_retain

    tune_malloc_retain()
    return run_graft(shape, "q4_0" if name == "dense" else name, name != "dense", *size)


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Rounds and summary."""
    settings = {"shape": args.shape, "steps": args.steps, "tokens": args.tokens}

    def measure(name: str, folder: Path) -> Run:
        return harness.run_peer(__file__, {"contender": name, **settings}, folder)

    contenders = {name: partial(measure, name) for name in args.only}
    rounds, rejected = harness.run_rounds(contenders, args, work, "tokens_per_cpu_s")
    summary = harness.summarise(rounds, FIGURES, PAIRS, GOALS)
    compared = [
        abs(a - b) / b
        for each in rounds
        if "dense" in each and "q4_0" in each
        for a, b in zip(each["q4_0"]["losses"], each["dense"]["losses"], strict=True)
    ]
    summary["claims"]["losses equal to 1e-5 relative"] = max(compared) <= SAME_LOSS if compared else None
    config = {**settings, "rows": ROWS, "rank": RANK, "targets": "q,k,v", "threads": 1}
    return {"config": config, **summary, "runs": rounds, "rejected": rejected}


FLAGS: dict[str, dict[str, Any]] = {
    "shape": {"choices": tuple(SHAPES), "default": "1b", "help": "the model's shape (default 1b, TinyLlama's)"},
    "steps": {"type": harness.at_least(3), "default": 6, "help": "optimizer steps of a run, at least 3 (default 6)"},
    "tokens": {"type": harness.at_least(1), "default": 128, "help": "tokens of a text (default 128)"},
    "only": {"type": harness.choices(CONTENDERS), "default": list(CONTENDERS), "help": "contenders, by commas"},
    **harness.ROUNDS,
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS, child=child))
