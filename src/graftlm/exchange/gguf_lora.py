"""A LoRA adapter as a .gguf file, as llama.cpp's convert_lora_to_gguf.py writes it, and back.

For each adapted matrix `NAME` of the base's file, `NAME.lora_a` [r, in] and `NAME.lora_b` [out, r], whose rows are in
the order of that file. llama.cpp adds alpha / r B A x, with one alpha for all and each matrix's own r; scales that
differ (rsLoRA with several ranks) are multiplied into B.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.exchange.gguf_plan import GGUFPlan
from graftlm.files.gguf_file import GGUFFile
from graftlm.files.gguf_writer import Planned, write_gguf
from graftlm.methods.base import PeftFolder

PREFIX = "base_model.model."


def check_is_lora(peft: PeftFolder | None, method: str) -> PeftFolder:
    """The adapter in PEFT's format; an InputError unless it is a LoRA that llama.cpp can add."""
    if peft is None or peft[0].get("peft_type") != "LORA" or peft[0].get("use_dora") or len(peft[1]) == 0:
        raise InputError(
            f"--format gguf-lora: llama.cpp adds LoRA only, not {method}: use --format gguf, which merges, if it can "
            "be merged"
        )
    return peft


def write_lora(path: Path, plan: GGUFPlan, peft: PeftFolder) -> None:
    """Write an adapter in PEFT's format as the .gguf file of a model that is written as `plan` says."""
    config, tensors = peft
    modules = sorted({name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors})
    scales = {module: _scale(config, tensors[f"{PREFIX}{module}.lora_A.weight"]) for module in modules}
    alpha = scales[modules[0]] * len(tensors[f"{PREFIX}{modules[0]}.lora_A.weight"])
    planned = []
    for module in modules:
        entry = plan.entries[f"{module}.weight"]
        a, b = (tensors[f"{PREFIX}{module}.lora_{letter}.weight"].float() for letter in "AB")
        b = plan.file_rows(entry, b * (scales[module] * len(a) / alpha))
        for letter, values in (("a", a), ("b", b)):
            shape = tuple(values.shape)
            planned.append(Planned(f"{entry.source}.lora_{letter}", shape, values.contiguous().numpy))
    settings = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    write_gguf(path, plan.architecture, settings, planned, "f32")


def _scale(config: Mapping[str, Any], a: Tensor) -> float:
    """The factor of B A. Patterns of alpha are never written (`methods/peft_format.py`)."""
    assert not config.get("alpha_pattern")
    return float(config["lora_alpha"]) / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))


def merge_lora_file(path: Path, plan: GGUFPlan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base's tensors, by the checkpoint's names, that the adapter of a .gguf file changes, with its update."""
    file, changed = GGUFFile(path), dict[str, Tensor]()
    alpha = float(file.require("adapter.lora.alpha"))
    for entry in plan.entries.values():
        if f"{entry.source}.lora_a" in file.tensors:
            a, b = (torch.from_numpy(file.values(f"{entry.source}.lora_{letter}").copy()) for letter in "ab")
            update = b @ a * (alpha / len(a))
            ordered = update if entry.order is None else torch.from_numpy(entry.order(update.numpy()))
            changed[entry.name] = state[entry.name] + (ordered.t() if entry.transposed else ordered)
    assert len(changed) * 2 == len(file.tensors)
    return changed
