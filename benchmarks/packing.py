"""Does packing help on a CPU? Batches of short examples, packed and not, in random order and by length.

    python benchmarks/packing.py [--rounds 3] [--batches 10] [--layers 2] [--json-out FILE]

Forward and backward pass of LoRA (r=16 on q, k, v) in float32, with the model's own layers (a few of them, with random
weights), its head, and the micro-batches of `graft train`. Two mixes of lengths: short (as reviews) and mixed (8 to 500
tokens). One thread, and CPU seconds, so that other work on the machine matters little. Speed is in the tokens of the
data, without padding, per CPU second; `computed` is how many tokens a pass computes for each that it has to.
"""

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import harness

MIXES = {"short": (25, 0.45, 78), "mixed": (75, 0.8, 500)}
"""Median, standard deviation of the logarithm, and maximum of an example's tokens."""
CONTENDERS = {
    "random": {"group_by_length": False},
    "grouped": {},
    "random packed": {"group_by_length": False, "packing": True},
    "grouped packed": {"packing": True},
}
EXAMPLES, BATCH = 1024, 16


def examples_of(mix: str, vocabulary: int) -> list[Any]:
    """Random tokens; two fifths of each example are its completion."""
    from graftlm.text.collate import Example

    rng, (middle, spread, longest) = random.Random(mix), MIXES[mix]
    found = []
    for _ in range(EXAMPLES):
        size = min(longest, max(8, round(middle * rng.lognormvariate(0, spread))))
        ids = [rng.randrange(1, vocabulary) for _ in range(size)]
        found.append(Example((*ids[: size * 3 // 5],), (*ids[size * 3 // 5 :],), None, "", "", ""))
    return found


def model_of(name: str, layers: int) -> Any:
    """The first layers of a model, with random weights and LoRA."""
    import torch

    from graftlm.files.assets import model_folder
    from graftlm.files.formats import read_json
    from graftlm.methods import LoRA
    from graftlm.models import CausalLM
    from graftlm.models.config import read_model_config

    file = model_folder(name) / "config.json"
    config = read_model_config(read_json(file), str(file))
    model = CausalLM(replace(config, num_layers=layers, layers=config.layers[:layers]))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(0))
    LoRA(rank=16, alpha=64.0, dropout=0.0).install(model, torch.Generator().manual_seed(0))
    return model.train()


def batches_of(examples: Sequence[Any], flags: dict[str, Any], count: int) -> list[Any]:
    """The micro-batches of the first batches of a run."""
    from graftlm.config import TrainConfig
    from graftlm.training.batches import BatchLoader
    from graftlm.training.distributed import DistContext
    from graftlm.training.objectives.sft import SFT

    config = TrainConfig(batch_size=BATCH, microbatch_tokens=512, max_length=512, **flags)
    loader = BatchLoader(examples, SFT().collate, config, DistContext())
    return [part for rows in islice(loader.stream(0), count) for part in loader.microbatches(rows)]


def cpu_seconds(model: Any, parts: Sequence[Any]) -> float:
    """CPU seconds of the forward and backward passes."""
    from graftlm.training.objectives.sft import SFT

    start = time.process_time()
    for part in parts:
        SFT().loss(model, part)[0].backward()
    model.zero_grad()
    return time.process_time() - start


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Rounds of all contenders in turn; medians, and ratios within a round."""
    import torch

    torch.set_num_threads(1)
    model = model_of(args.model, args.layers)
    figures: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    for mix in args.only:
        examples = examples_of(mix, model.config.vocab_size)
        parts = {name: batches_of(examples, flags, args.batches) for name, flags in CONTENDERS.items()}
        tokens = {name: sum(part.tokens for part in some) for name, some in parts.items()}
        cpu_seconds(model, parts["grouped"][:1])  # allocates
        rounds = []
        for number in range(args.rounds):
            rounds.append({name: tokens[name] / cpu_seconds(model, some) for name, some in parts.items()})
            harness.note(f"{mix}, round {number + 1}: {rounds[-1]}")
        for name, some in parts.items():
            computed = sum(part.padded_tokens for part in some) / sum(part.tokens - len(part.starts) for part in some)
            speed = median(each[name] for each in rounds)
            figures[f"{mix} {name}"] = {"tokens_per_cpu_s": speed, "computed": computed, "passes": len(some)}
        for name, other in (("random packed", "random"), ("random packed", "grouped"), ("grouped packed", "grouped")):
            values = [each[name] / each[other] for each in rounds]
            ratios[f"{mix}: {name} / {other}"] = {"median": median(values), "rounds": values}
    config = {key: getattr(args, key) for key in ("model", "layers", "batches", "rounds")}
    return {"config": config, "medians": figures, "ratios": ratios, "claims": {}}


FLAGS: dict[str, dict[str, Any]] = {
    "only": {"type": harness.choices(tuple(MIXES)), "default": list(MIXES), "help": "mixes of lengths, by commas"},
    "layers": {"type": int, "default": 2, "help": "layers of the model (default 2)"},
    "batches": {"type": int, "default": 10, "help": f"batches of {BATCH} examples of each contender (default 10)"},
    "rounds": {"type": int, "default": 3, "help": "runs of each contender (default 3)"},
    "model": {"default": harness.MODEL, "help": f"the model whose layers are used (default {harness.MODEL})"},
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS))
