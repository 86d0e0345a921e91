"""LoRA and DoRA in PEFT's adapter folders, so that PEFT loads `best/` as it is.

A checkpoint format may fuse q, k and v into one linear (GPT-2's c_attn). PEFT adapts it with one pair (A, B), we adapt
each part with its own. Three pairs become one of three times the rank, without loss:

    A = [A_q; A_k; A_v]  [3r, d]      B = diag(B_q, B_k, B_v)  [3d, 3r]      alpha' = 3 alpha, so alpha'/r' = alpha/r

The rows of B are in the checkpoint's order; with rsLoRA, alpha' = sqrt(3) alpha. A part that is not targeted has no
rows in A and zero rows in B. If the three A are bit-identical, as after reading a foreign folder, A is written once, so
the rank does not grow when a folder is read and written again. A linear that is not fused is the case of one part.

Letters: r rank, d hidden size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.methods import peft_format as peft
from graftlm.methods.base import PeftFolder, master_dtype, trainable_state_dict
from graftlm.models.base import CausalLM
from graftlm.models.config import FAMILIES, ModelConfig, Rows, our_linear

if TYPE_CHECKING:
    from graftlm.methods.lora import LoRA

# Fields of a config that are read or change nothing,
_KNOWN = peft.WITHOUT_EFFECT | {
    *("megatron_core", "qalora_group_size", "fan_in_fan_out", "ensure_weight_tying", "eva_config"),
    *("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "init_lora_weights"),
}
# and fields that must be unset, because they change the computation.
_REFUSED = {
    *("modules_to_save", "megatron_config", "trainable_token_indices", "loftq_config", "corda_config"),
    *("lora_ga_config", "velora_config", "alora_invocation_tokens", "use_qalora", "monteclora_config", "lora_bias"),
    *("layer_replication", "runtime_config", "target_parameters", "use_bdlora", "arrow_config", "kasa_config"),
}
# Initialisations that keep the base's weights; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change them.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Layout:
    """How the pair (A, B) of a module is divided among its roles."""

    parts: tuple[str, ...] = ()
    """The parts of a fused module that have an update."""
    blocks: int = 1
    """1: all roles use the whole A. Else one block of rows of A and of columns of B for each part."""

    def of(self, module: peft.HFModule) -> "_Layout":
        """The same for a fused module; a plain one has one block."""
        return self if module.fused else _Layout(module.targets)

    def columns(self, role: str, rank: int) -> slice:
        """The role's rows of A and columns of B."""
        n = self.parts.index(role) if self.blocks > 1 and role in self.parts else 0
        return slice(n * rank, (n + 1) * rank)


# Ours -> PEFT's -------------------------------------------------------------------------------------------------------


def to_peft(method: "LoRA", model: CausalLM) -> PeftFolder:
    """The config and the tensors that PEFT reads as this model's adapter."""
    config, state = model.config, trainable_state_dict(model)
    modules, layers = peft.hf_modules(config, method.targets).values(), method.layer_range(config)
    parts = next((module.targets for module in modules if module.fused), ())
    shared = bool(parts) and all(
        torch.equal(state[f"{our_linear(i, parts[0])}.lora_A"], state[f"{our_linear(i, part)}.lora_A"])
        for i in layers
        for part in parts
    )
    layout, tensors = _Layout(parts, 1 if shared else max(1, len(parts))), dict[str, Tensor]()
    for i, module in product(layers, modules):
        key, of_module = f"{peft.layer_prefix(config, i)}{module.name}", layout.of(module)
        a = [state[f"{our_linear(i, role)}.lora_A"] for role in module.targets]
        b = a[0].new_zeros(module.out_features, method.rank * of_module.blocks)
        for role in module.targets:
            b[module.rows[role], of_module.columns(role, method.rank)] = state[f"{our_linear(i, role)}.lora_B"]
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = torch.cat(a[: of_module.blocks]), b
        if method.use_dora:
            magnitudes = tensors[f"{key}.lora_magnitude_vector"] = a[0].new_zeros(module.out_features)
            for role, rows in module.rows.items():
                magnitudes[rows] = _magnitude(model, state, our_linear(i, role))
    return _config(config, method, layout), tensors


def _magnitude(model: CausalLM, state: Mapping[str, Tensor], name: str) -> Tensor:
    """[out] of our linear of this name; of one that is not adapted, the norms of the base's rows."""
    if f"{name}.magnitude" in state:
        return state[f"{name}.magnitude"]
    weight = model.get_parameter(f"{name}.weight").detach()
    return weight.to(master_dtype(weight.dtype)).square().sum(dim=1).sqrt()


def _config(config: ModelConfig, method: "LoRA", layout: _Layout) -> dict[str, Any]:
    """adapter_config.json without the base's name."""
    n, modules = layout.blocks, peft.hf_modules(config, method.targets)
    rank, alpha = method.rank * n, method.alpha * (math.sqrt(n) if method.rslora else n)
    patterns: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    if n > 1 and len(modules) > 1:
        # A plain config has one rank and alpha for all modules; those of the fused one differ, so patterns name it.
        fused = peft.hf_module_name(config, "q")
        patterns = {"rank_pattern": {fused: rank}, "alpha_pattern": {fused: alpha}}
        rank, alpha = method.rank, method.alpha
    return {
        "peft_type": method.peft_type,
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": peft.named_targets(config, modules),
        "layers_to_transform": list(method.layer_range(config)) if method.layers else None,
        "fan_in_fan_out": FAMILIES[config.family].transposed,
        "bias": "none",
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
        "use_dora": method.use_dora,
        "init_lora_weights": True,
        "inference_mode": True,
        "peft_version": peft.PEFT_VERSION,
        **patterns,
    }


# PEFT's -> ours -------------------------------------------------------------------------------------------------------


def from_peft(method: "LoRA", config: ModelConfig, folder: PeftFolder, where: str) -> dict[str, Tensor]:
    """The inverse of `to_peft` for a folder written with this method; an InputError for anything else."""
    peft_config, tensors = folder
    fused = next((module for module in peft.hf_modules(config, method.targets).values() if module.fused), None)
    layout = _Layout()
    if fused:
        first = tensors.get(f"{peft.layer_prefix(config, method.layer_range(config).start)}{fused.name}.lora_A.weight")
        shared = first is not None and len(first) == method.rank
        layout = _Layout(fused.targets, 1 if shared else len(fused.targets))
    keys = ("peft_type", "r", "lora_alpha", "target_modules", "layers_to_transform", "use_rslora", "use_dora")
    peft.check_same(peft_config, _config(config, method, layout), keys, where)
    return _read(method, config, layout, peft.StrictTensorReader(tensors, where))


def _read(method: "LoRA", config: ModelConfig, layout: _Layout, file: peft.StrictTensorReader) -> dict[str, Tensor]:
    """The trained tensors by our names; a targeted role that is no part of a fused module's update has B = 0."""
    state: dict[str, Tensor] = {}
    for i, module in product(method.layer_range(config), peft.hf_modules(config, method.targets).values()):
        key, of_module = f"{peft.layer_prefix(config, i)}{module.name}", layout.of(module)
        rank, out = method.rank * of_module.blocks, module.out_features
        a = file.take(f"{key}.lora_A.weight", rank, module.in_features)
        b = file.take(f"{key}.lora_B.weight", out, rank)
        magnitudes = file.take(f"{key}.lora_magnitude_vector", out) if method.use_dora else None
        for role in module.targets:
            name, rows, columns = our_linear(i, role), module.rows[role], of_module.columns(role, method.rank)
            own = b[rows][:, columns]
            state[f"{name}.lora_A"] = a[columns]
            state[f"{name}.lora_B"] = own if role in of_module.parts else torch.zeros_like(own)
            if magnitudes is not None:
                state[f"{name}.magnitude"] = magnitudes[rows]
    file.all_taken()
    return state


def from_foreign_peft(
    cls: "type[LoRA]", config: ModelConfig, folder: PeftFolder, where: str
) -> "tuple[LoRA, dict[str, Tensor]]":
    """The LoRA (or DoRA) of a folder that PEFT wrote, and its tensors; an InputError names what is not supported."""
    peft_config, tensors = folder
    peft.check_fields(peft_config, _KNOWN, _REFUSED, where)
    if peft_config.get("bias", "none") != "none":
        raise InputError(f"{where}: bias = {peft_config['bias']!r} is not supported; supported: 'none'")
    if peft_config.get("init_lora_weights", True) not in _INITS:
        raise InputError(
            f"{where}: init_lora_weights = {peft_config['init_lora_weights']!r} is not supported: it may change the "
            "base's weights; save the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    dropout = peft_config.get("lora_dropout", 0.0)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError(f"{where}: lora_dropout = {dropout!r} must be at least 0 and below 1")
    names = peft.targeted(config, peft_config, where)
    layers = peft.uniform_layer_range(config, names, "target_modules and layers_to_transform", where)
    modules = peft.hf_modules(config, config.roles)
    fused = {name for name, (_, module) in names.items() if modules[module].fused}
    b = [tensors.get(f"base_model.model.{name}.lora_B.weight") for name in names if name in fused]
    layout = _fused_layout(config, [t for t in b if t is not None and t.dim() == 2 and len(t) == config.qkv_rows])
    rank, alpha = _rank_and_alpha(peft_config, {n: layout.blocks if n in fused else 1 for n in names}, where)
    roles = {role for _, module in names.values() for role in modules[module].rows}
    if fused and not cls.use_dora:  # DoRA has magnitudes of all parts
        roles -= set("qkv") - set(layout.parts)
    method = cls(
        rank=rank,
        alpha=alpha,
        targets=tuple(role for role in config.roles if role in roles),
        dropout=float(dropout),
        rslora=bool(peft_config.get("use_rslora", False)),
        layers=layers,
    )
    return method, _read(method, config, layout, peft.StrictTensorReader(tensors, where))


def _rank_and_alpha(peft_config: Mapping[str, Any], blocks: Mapping[str, int], where: str) -> tuple[int, float]:
    """The rank and alpha of all modules, each of which has this many blocks."""
    sizes: list[tuple[int, int, float]] = []
    for name, n in blocks.items():
        rank, alpha = (_of_module(field, peft_config, name, where) for field in ("r", "lora_alpha"))
        sizes.append((n, int(rank) // n, alpha / (math.sqrt(n) if peft_config.get("use_rslora") else n)))
    _, rank, alpha = min(sizes)  # of modules with one block if there are any: their alpha is not rounded
    if any(rank != r or not math.isclose(alpha, a, rel_tol=1e-12) for _, r, a in sizes):
        raise InputError(
            f"{where}: rank_pattern or alpha_pattern gives modules different ranks or alphas: not supported"
        )
    return rank, float(alpha)


def _of_module(field: str, peft_config: Mapping[str, Any], name: str, where: str) -> float:
    """A module's r or lora_alpha: of the pattern that matches it, else the config's; PEFT's default is 8."""
    key = "rank_pattern" if field == "r" else "alpha_pattern"
    patterns = peft_config.get(key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{where}: {key} = {patterns!r} must be an object of module names")
    value = next(
        (v for p, v in patterns.items() if peft.matches(rf"(.*\.)?({p})$", name, where)), peft_config.get(field, 8)
    )
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf or (field == "r" and value % 1):
        raise InputError(f"{where}: {field} = {value!r} must be a {'whole ' if field == 'r' else ''}number above 0")
    return value


def _fused_layout(config: ModelConfig, b: Sequence[Tensor]) -> _Layout:
    """The layout of a fused module, found from every layer's B [3d, r]: blocks only if B is block-diagonal in all."""
    slices = peft.fused_slices(config)
    updated = tuple(part for part, rows in slices.items() if any(bool(t[rows].any()) for t in b))
    for parts in (p for n in (3, 2) for p in combinations(slices, n)):
        if updated and all(_is_block_diagonal(t, parts, slices) for t in b):
            return _Layout(parts, len(parts))
    return _Layout(updated or tuple(slices))


def _is_block_diagonal(b: Tensor, parts: tuple[str, ...], slices: Mapping[str, Rows]) -> bool:
    """Whether the columns of B [3d, r] are one block for each part, with nonzero rows of that part only."""
    r, remainder = divmod(b.shape[1], len(parts))
    outside = b.clone()
    for n, part in enumerate(parts):
        outside[slices[part], n * r : (n + 1) * r] = 0
    return not remainder and not bool(outside.any())
