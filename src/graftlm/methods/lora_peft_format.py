"""LoRA and DoRA to and from PEFT's adapter folders, so that PEFT loads `best/` as it is.

What is unusual here: where a file fuses q, k and v into one linear (GPT-2's c_attn), PEFT adapts it with one pair
(A, B), we adapt each with its own. Three pairs become one of three times the rank, without loss:

    A = [A_q; A_k; A_v]  [3r, d]      B = diag(B_q, B_k, B_v)  [3d, 3r]      alpha' = 3 alpha, so alpha'/r' = alpha/r

The rows of B are in the file's order. With a part missing it has no columns in A and zero rows in B. Reading cuts the
blocks out again. Where the three A are the same bits, as after reading a foreign folder, A is written once, so that
round trips do not grow. With rsLoRA, alpha' = sqrt(3) alpha. A folder of PEFT's own is read by `adopt`; what it says
and we do not understand is an error.

Letters: r rank, d model width.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.methods.base import PeftFolder, trainable_state_dict
from graftlm.methods.cost_model import linear_size
from graftlm.methods.peft_format import (
    PEFT_VERSION,
    WITHOUT_EFFECT,
    StrictTensorReader,
    check_fields,
    fused,
    fused_slices,
    hf_module_name,
    layer_prefix,
    matches,
    named_targets,
    targeted,
    uniform_layer_range,
)
from graftlm.models.base import CausalLM
from graftlm.models.checkpoint_mapping import our_module_name
from graftlm.models.config import FAMILIES, ModelConfig, Rows
from graftlm.models.layers import Linear

if TYPE_CHECKING:
    from graftlm.methods.lora import LoRA

# What a config may say beside what is read below. These change nothing in what the adapter computes:
_WITHOUT_EFFECT = WITHOUT_EFFECT | {
    *("megatron_core", "qalora_group_size", "fan_in_fan_out", "ensure_weight_tying", "eva_config"),
}
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "init_lora_weights"),
}
# And these would, so they must be unset:
_REFUSED = {
    *("modules_to_save", "megatron_config", "trainable_token_indices", "loftq_config", "corda_config"),
    *("lora_ga_config", "velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "lora_bias"),
    *("layer_replication", "runtime_config", "target_parameters", "use_bdlora", "arrow_config", "kasa_config"),
}
# Starts that leave the base's weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change them.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")


# Ours -> PEFT's -------------------------------------------------------------------------------------------------------


def to_peft(method: "LoRA", model: CausalLM) -> PeftFolder:
    """The config and the tensors that PEFT reads as this model's adapter."""
    shape, state = model.config, trainable_state_dict(model)
    parts = fused(shape, method.targets)
    once = bool(parts) and all(
        torch.equal(state[f"blocks.{i}.attn.{parts[0]}.lora_A"], state[f"blocks.{i}.attn.{part}.lora_A"])
        for i in method.layer_range(shape)
        for part in parts
    )
    out: dict[str, Tensor] = {}
    for i in method.layer_range(shape):
        for role in (r for r in method.targets if r not in parts):
            key, ours = f"{layer_prefix(shape, i)}{hf_module_name(shape, role)}", f"blocks.{i}.{our_module_name(role)}"
            out[f"{key}.lora_A.weight"] = state[f"{ours}.lora_A"]
            out[f"{key}.lora_B.weight"] = state[f"{ours}.lora_B"]
            if method.use_dora:
                out[f"{key}.lora_magnitude_vector"] = state[f"{ours}.magnitude"]
        if parts:
            out |= _fuse(method, model, state, i, parts, once)
    return _config(shape, method, once), out


def _fuse(
    method: "LoRA", model: CausalLM, state: Mapping[str, Tensor], i: int, parts: tuple[str, ...], once: bool
) -> dict[str, Tensor]:
    """The fused linear's pair in layer i, and its magnitudes; a part that is not adapted keeps the base's."""
    shape, r = model.config, method.rank
    key, rows = f"{layer_prefix(shape, i)}{FAMILIES[shape.family].fused}", fused_slices(shape)
    a = [state[f"blocks.{i}.attn.{part}.lora_A"] for part in parts]
    b = [state[f"blocks.{i}.attn.{part}.lora_B"] for part in parts]
    wide = b[0].new_zeros(shape.qkv_rows, r if once else r * len(parts))
    for n, part in enumerate(parts):
        column = 0 if once else n * r
        wide[rows[part], column : column + r] = b[n]
    out = {f"{key}.lora_A.weight": a[0] if once else torch.cat(a), f"{key}.lora_B.weight": wide}
    if method.use_dora:
        attn = model.get_submodule(f"blocks.{i}.attn")
        lengths = b[0].new_zeros(shape.qkv_rows)
        for part in "qkv":
            own = state[f"blocks.{i}.attn.{part}.magnitude"] if part in parts else row_norms(getattr(attn, part))
            lengths[rows[part]] = own
        out[f"{key}.lora_magnitude_vector"] = lengths
    return out


def row_norms(linear: Linear) -> Tensor:
    """The length of each row of a plain linear's weight, in float32 or wider: [out]."""
    exact = linear.weight.detach().to(torch.promote_types(linear.weight.dtype, torch.float32))
    return exact.square().sum(dim=1).sqrt()


def _config(shape: ModelConfig, method: "LoRA", once: bool) -> dict[str, Any]:
    """adapter_config.json but for the base's name."""
    parts = fused(shape, method.targets)
    groups = 1 if once else max(1, len(parts))
    rank, alpha = method.rank * groups, method.alpha * (math.sqrt(groups) if method.rslora else groups)
    patterns: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    if groups > 1 and len(method.targets) > len(parts):
        # One rank and alpha hold for all modules of a plain config; the fused one differs, so patterns say so.
        whole = hf_module_name(shape, parts[0])
        patterns = {"rank_pattern": {whole: rank}, "alpha_pattern": {whole: alpha}}
        rank, alpha = method.rank, method.alpha
    named = named_targets(shape, {hf_module_name(shape, role) for role in method.targets})
    return {
        "peft_type": method.peft_type,
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": named,
        "layers_to_transform": list(method.layer_range(shape)) if method.layers else None,
        "fan_in_fan_out": FAMILIES[shape.family].transposed,
        "bias": "none",
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
        "use_dora": method.use_dora,
        "init_lora_weights": True,
        "inference_mode": True,
        "peft_version": PEFT_VERSION,
        **patterns,
    }


# A folder that was written above -> ours ------------------------------------------------------------------------------


def from_peft(method: "LoRA", shape: ModelConfig, folder: PeftFolder, where: str) -> dict[str, Tensor]:
    """The inverse of `to_peft` for a folder written with this method; an InputError for anything else."""
    config, tensors = folder
    parts, rank, d = fused(shape, method.targets), method.rank, shape.hidden_size
    whole, where_rows = FAMILIES[shape.family].fused, fused_slices(shape) if parts else {}
    first = f"{layer_prefix(shape, method.layer_range(shape).start)}{whole}.lora_A.weight"
    once = bool(parts) and first in tensors and len(tensors[first]) == rank
    expected = _config(shape, method, once)
    for key in ("peft_type", "r", "lora_alpha", "target_modules", "layers_to_transform", "use_rslora", "use_dora"):
        if config.get(key) != expected[key]:
            raise InputError(f"{where}: {key} is {config.get(key)!r}, the run says {expected[key]!r}")
    out: dict[str, Tensor] = {}
    file = StrictTensorReader(tensors, where)
    for i in method.layer_range(shape):
        for role in (r for r in method.targets if r not in parts):
            n_in, n_out = linear_size(shape, role)
            key, ours = f"{layer_prefix(shape, i)}{hf_module_name(shape, role)}", f"blocks.{i}.{our_module_name(role)}"
            out[f"{ours}.lora_A"] = file.take(f"{key}.lora_A.weight", rank, n_in)
            out[f"{ours}.lora_B"] = file.take(f"{key}.lora_B.weight", n_out, rank)
            if method.use_dora:
                out[f"{ours}.magnitude"] = file.take(f"{key}.lora_magnitude_vector", n_out)
        if parts:
            wide = rank if once else rank * len(parts)
            key, tall = f"{layer_prefix(shape, i)}{whole}", shape.qkv_rows
            a, b = file.take(f"{key}.lora_A.weight", wide, d), file.take(f"{key}.lora_B.weight", tall, wide)
            lengths = file.take(f"{key}.lora_magnitude_vector", tall) if method.use_dora else None
            for n, part in enumerate(parts):
                rows = where_rows[part]
                columns = slice(0, rank) if once else slice(n * rank, (n + 1) * rank)
                out[f"blocks.{i}.attn.{part}.lora_A"], out[f"blocks.{i}.attn.{part}.lora_B"] = (
                    a[columns],
                    b[rows][:, columns],
                )
                if lengths is not None:
                    out[f"blocks.{i}.attn.{part}.magnitude"] = lengths[rows]
    file.all_taken()
    return out


# A folder that PEFT wrote -> ours -------------------------------------------------------------------------------------


def adopt(
    shape: ModelConfig, folder: PeftFolder, where: str, magnitudes: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of a LoRA (or DoRA) and its tensors; an InputError names what is not understood."""
    config, tensors = folder
    check_fields(config, _READ | _WITHOUT_EFFECT, _REFUSED, where)
    if config.get("bias", "none") != "none":
        raise InputError(f"{where}: bias = {config['bias']!r} is not supported; supported: 'none'")
    if config.get("init_lora_weights", True) not in _STARTS:
        raise InputError(
            f"{where}: init_lora_weights = {config['init_lora_weights']!r} is not supported: it may change the base's "
            "weights; save the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    modules = dict(targeted(shape, config, where))
    span = uniform_layer_range(shape, modules, "target_modules and layers_to_transform", where)
    roles = {theirs for _, theirs in modules.values()}
    whole = FAMILIES[shape.family].fused
    rows = fused_slices(shape) if whole else {}
    wide = [tensors.get(f"base_model.model.{n}.lora_B.weight") for n, (_, theirs) in modules.items() if theirs == whole]
    parts, blocks = _thirds([b for b in wide if b is not None and b.dim() == 2 and len(b) == shape.qkv_rows], rows)
    rank, alpha = _one_size(config, {n: blocks if theirs == whole else 1 for n, (_, theirs) in modules.items()}, where)
    file, state = StrictTensorReader(tensors, where), dict[str, Tensor]()
    for name, (i, theirs) in modules.items():
        key = f"base_model.model.{name}"
        role = next(r for r in shape.roles if hf_module_name(shape, r) == theirs)
        (n_in, n_out), r = linear_size(shape, role), rank
        if theirs == whole:
            n_out, r = shape.qkv_rows, rank * blocks
        a = file.take(f"{key}.lora_A.weight", r, n_in)
        b = file.take(f"{key}.lora_B.weight", n_out, r)
        lengths = file.take(f"{key}.lora_magnitude_vector", n_out) if magnitudes else None
        if theirs == whole:
            state |= _split(i, a, b, lengths, parts, blocks, rows)
        else:
            ours = f"blocks.{i}.{our_module_name(role)}"
            state |= {f"{ours}.lora_A": a, f"{ours}.lora_B": b}
            state |= {} if lengths is None else {f"{ours}.magnitude": lengths}
    file.all_taken()
    targets: list[str] = []
    for role in shape.roles:
        theirs = hf_module_name(shape, role)
        if theirs in roles and (theirs != whole or role in parts or magnitudes):
            targets.append(role)
    dropout = config.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError(f"{where}: lora_dropout = {dropout!r} must be at least 0 and below 1")
    return {
        "rank": rank,
        "alpha": alpha,
        "targets": tuple(targets),
        "dropout": float(dropout),
        "rslora": bool(config.get("use_rslora", False)),
        "layers": span,
    }, state


def _one_size(config: Mapping[str, Any], blocks: Mapping[str, int], where: str) -> tuple[int, float]:
    """The rank and alpha that all modules have, of each of the `blocks` that c_attn's pair consists of."""
    sizes: list[tuple[int, int, float]] = []
    for name, n in blocks.items():
        rank, alpha = int(_of_module("r", config, name, where)), _of_module("lora_alpha", config, name, where)
        sizes.append((n, rank // n, alpha / (math.sqrt(n) if config.get("use_rslora") else n)))
    _, rank, alpha = min(sizes)  # what is not multiplied and divided again comes first
    if any(rank != r or not math.isclose(alpha, a, rel_tol=1e-12) for _, r, a in sizes):
        raise InputError(
            f"{where}: rank_pattern or alpha_pattern gives modules different ranks or alphas: not supported"
        )
    return rank, float(alpha)


def _of_module(field: str, config: Mapping[str, Any], name: str, where: str) -> float:
    """A module's r or lora_alpha: by the pattern that matches it, else the config's; PEFT's own default is 8."""
    key = "rank_pattern" if field == "r" else "alpha_pattern"
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{where}: {key} = {patterns!r} must be an object of module names")
    value = next((v for p, v in patterns.items() if matches(rf"(.*\.)?({p})$", name, where)), config.get(field, 8))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf or (field == "r" and value % 1):
        raise InputError(f"{where}: {field} = {value!r} must be a {'whole ' if field == 'r' else ''}number above 0")
    return value


def _thirds(wide: Sequence[Tensor], rows: Mapping[str, Rows]) -> tuple[tuple[str, ...], int]:
    """Of every layer's B of the fused linear: the parts that are adapted, and into how many blocks its columns fall.

    Blocks mean that each part has rows of A of its own, as `to_peft` writes them; 1 means that all use the whole A.
    """
    reached = {part for part in rows if any(bool(b[rows[part]].any()) for b in wide)}
    for parts in (p for n in (3, 2) for p in combinations("qkv", n)):
        if reached and all(_in_blocks(b, parts, rows) for b in wide):
            return parts, len(parts)
    return tuple(part for part in "qkv" if part in reached or not reached), 1


def _in_blocks(b: Tensor, parts: tuple[str, ...], rows: Mapping[str, Rows]) -> bool:
    """Whether the columns of B [3d, r] fall into as many blocks as there are parts, each with rows of its part only."""
    r, rest = divmod(b.shape[1], len(parts))
    outside = b.clone()
    for n, part in enumerate(parts):
        outside[rows[part], n * r : (n + 1) * r] = 0
    return not rest and not bool(outside.any())


def _split(
    i: int,
    a: Tensor,
    b: Tensor,
    lengths: Tensor | None,
    parts: tuple[str, ...],
    groups: int,
    rows: Mapping[str, Rows],
) -> dict[str, Tensor]:
    """The fused linear's pair as one for each part: blocks cut out, or A whole; with magnitudes for all of q, k, v."""
    r = len(a) // groups
    state: dict[str, Tensor] = {}
    for part in parts if lengths is None else "qkv":
        n = parts.index(part) if part in parts and groups > 1 else 0
        columns, own = slice(n * r, (n + 1) * r), b[rows[part]]
        mine = own[:, columns] if part in parts else own.new_zeros(len(own), r)
        state |= {f"blocks.{i}.attn.{part}.lora_A": a[columns], f"blocks.{i}.attn.{part}.lora_B": mine}
        if lengths is not None:
            state[f"blocks.{i}.attn.{part}.magnitude"] = lengths[rows[part]]
    return state
