"""LoRA to and from PEFT's adapter folders, so that PEFT loads `best/` as it is.

What is unusual here: PEFT adapts GPT-2's fused c_attn with one pair (A, B), we adapt q, k and v each with their own.
Three pairs become one of three times the rank, without loss:

    A = [A_q; A_k; A_v]  [3r, d]      B = diag(B_q, B_k, B_v)  [3d, 3r]      alpha' = 3 alpha, so alpha'/r' = alpha/r

With a part missing it has no columns in A and zero rows in B. Reading cuts the blocks out again.

Letters: r rank, d model width.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.files.formats import load_safetensors, read_json, save_safetensors, write_json
from graftlm.methods.accounting import linear_size
from graftlm.methods.lora import LoRA
from graftlm.models.base import Shape
from graftlm.models.names import file_module, layer_prefix, module_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_VERSION = "0.19.0"  # the format's version that is written; newer readers accept it


def fused(shape: Shape, method: LoRA) -> tuple[str, ...]:
    """The targeted parts of GPT-2's c_attn, in its order; none for other families."""
    return tuple(r for r in "qkv" if r in method.targets) if shape.family == "gpt2" else ()


def to_peft(shape: Shape, method: LoRA, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our trained tensors, by our names -> PEFT's tensors, by its names."""
    out: dict[str, Tensor] = {}
    parts = fused(shape, method)
    for i in method.span(shape):
        layer = f"base_model.model.{layer_prefix(shape.family)}{i}."
        for role in method.targets:
            if role not in parts:
                for side in "AB":
                    key = f"{layer}{file_module(shape.family, role)}.lora_{side}.weight"
                    out[key] = state[f"blocks.{i}.{module_of(role)}.lora_{side}"]
        if parts:
            a = [state[f"blocks.{i}.attn.{r}.lora_A"] for r in parts]
            b = [state[f"blocks.{i}.attn.{r}.lora_B"] for r in parts]
            wide = b[0].new_zeros(3 * shape.d_model, method.rank * len(parts))
            for n, r in enumerate(parts):
                row = "qkv".index(r) * shape.d_model
                wide[row : row + shape.d_model, n * method.rank : (n + 1) * method.rank] = b[n]
            out[f"{layer}attn.c_attn.lora_A.weight"] = torch.cat(a)
            out[f"{layer}attn.c_attn.lora_B.weight"] = wide
    return out


def from_peft(shape: Shape, method: LoRA, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The inverse of `to_peft` for a folder written with this method; an InputError for anything else."""
    parts = fused(shape, method)
    rank, d = method.rank, shape.d_model
    out: dict[str, Tensor] = {}
    unread = set(tensors)

    def take(key: str, size: tuple[int, int]) -> Tensor:
        if key not in tensors:
            raise InputError(f"{where}: the tensor {key} is missing")
        if tuple(tensors[key].shape) != size:
            raise InputError(f"{where}: {key} has shape {list(tensors[key].shape)}, expected {list(size)}")
        unread.discard(key)
        return tensors[key]

    sizes = {role: linear_size(shape, role) for role in method.targets}
    for i in method.span(shape):
        layer = f"base_model.model.{layer_prefix(shape.family)}{i}."
        for role in (r for r in method.targets if r not in parts):
            n_in, n_out = sizes[role]
            key = f"{layer}{file_module(shape.family, role)}"
            ours = f"blocks.{i}.{module_of(role)}"
            out[f"{ours}.lora_A"] = take(f"{key}.lora_A.weight", (rank, n_in))
            out[f"{ours}.lora_B"] = take(f"{key}.lora_B.weight", (n_out, rank))
        if parts:
            a = take(f"{layer}attn.c_attn.lora_A.weight", (rank * len(parts), d))
            b = take(f"{layer}attn.c_attn.lora_B.weight", (3 * d, rank * len(parts)))
            for n, r in enumerate(parts):
                row, columns = "qkv".index(r) * d, slice(n * rank, (n + 1) * rank)
                out[f"blocks.{i}.attn.{r}.lora_A"] = a[columns]
                out[f"blocks.{i}.attn.{r}.lora_B"] = b[row : row + d, columns]
    if unread:
        raise InputError(f"{where}: the tensor {min(unread)} belongs to no target of this adapter")
    return out


def config_json(shape: Shape, method: LoRA, base: str, revision: str | None) -> dict[str, Any]:
    """The adapter_config.json of an adapter on `base`, a hub id or a folder."""
    parts = fused(shape, method)
    if parts and len(method.targets) > len(parts):
        # One rank and alpha hold for all modules of a plain config; the fused one differs, so patterns say so.
        patterns = {
            "rank_pattern": {"attn.c_attn": method.rank * len(parts)},
            "alpha_pattern": {"attn.c_attn": method.alpha * len(parts)},
        }
        times = 1
    else:
        patterns, times = {"rank_pattern": {}, "alpha_pattern": {}}, max(1, len(parts))
    modules = [file_module(shape.family, role) for role in method.targets]
    names = sorted({m if shape.family == "gpt2" else m.split(".")[-1] for m in modules})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": method.rank * times,
        "lora_alpha": method.alpha * times,
        "target_modules": names,
        "layers_to_transform": list(method.span(shape)) if method.layers else None,
        "fan_in_fan_out": shape.family == "gpt2",
        "bias": "none",
        "lora_dropout": method.dropout,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "peft_version": PEFT_VERSION,
        **patterns,
    }


def save_adapter(
    folder: Path, shape: Shape, method: LoRA, state: Mapping[str, Tensor], base: str, revision: str | None = None
) -> None:
    """Write PEFT's two files into an existing folder."""
    save_safetensors(folder / WEIGHTS, to_peft(shape, method, state))
    write_json(folder / CONFIG, config_json(shape, method, base, revision))


def read_adapter(folder: Path, shape: Shape, method: LoRA) -> dict[str, Tensor]:
    """Our trained tensors out of a folder that `save_adapter` wrote."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"{folder / CONFIG}: is no JSON object; use the folder as it was written")
    expected = config_json(shape, method, "", None)
    for key in ("peft_type", "r", "lora_alpha", "target_modules", "layers_to_transform", "use_rslora", "use_dora"):
        if config.get(key) != expected[key]:
            raise InputError(f"{folder / CONFIG}: {key} is {config.get(key)!r}, the run says {expected[key]!r}")
    return from_peft(shape, method, load_safetensors(folder / WEIGHTS), str(folder / WEIGHTS))
