"""PEFT's adapter folders: what is the same for all methods, then LoRA and DoRA, so that PEFT loads `best/` as it is.

Configs and tensors are read strictly: a field that is neither read nor known to change nothing is an error, and so is a
tensor that is missing, misshapen or left over.

A checkpoint format may fuse several of our linears into one: q, k and v (GPT-2's c_attn), or gate and up as well
(Phi-3). PEFT adapts it with one pair (A, B), we adapt each part with its own. Three pairs become one of three times the
rank, without loss:

    A = [A_q; A_k; A_v]  [3r, d]      B = diag(B_q, B_k, B_v)  [3d, 3r]      alpha' = 3 alpha, so alpha'/r' = alpha/r

The rows of B are in the checkpoint's order, as those of every linear are; with rsLoRA, alpha' = sqrt(3) alpha. Next to
modules with another number of parts there is one alpha for all, because llama.cpp reads no alpha_pattern: B is then
multiplied by r'/r, with r' = 2r for two parts and 4r for three (the fourth block is zero), so that reading it gives the
same bits. A part that is not targeted has no rows in A and zero rows in B. If the A of all parts are bit-identical, as
after reading a foreign folder, A is written once, so the rank does not grow when a folder is read and written again. A
linear that is not fused is the case of one part.

Letters: r rank, d hidden size.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graftlm.errors import InputError
from graftlm.methods.base import PeftFolder, master_dtype, trainable_state_dict
from graftlm.methods.cost_model import linear_size
from graftlm.models.base import CausalLM
from graftlm.models.config import FAMILIES, ModelConfig, Rows, our_linear, stored_linears
from graftlm.models.layers import Linear
from graftlm.models.packed import dense

if TYPE_CHECKING:
    from graftlm.methods.lora import LoRA

MAX_REPEATS = 5
"""The most *, + and { in a pattern that names modules."""
PEFT_VERSION = "0.19.0"  # the version of the format that is written; newer readers accept it

WITHOUT_EFFECT = frozenset(
    ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type")
)
"""Fields of a config that do not change what an adapter computes."""


# Modules --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HFModule:
    """A linear of the checkpoint format, which holds one role or, fused, several."""

    name: str
    """Inside a layer."""
    rows: Mapping[str, Rows]
    """Role -> its rows of the output, for all roles it holds."""
    targets: tuple[str, ...]
    """The targeted roles, in the order of `rows`."""
    in_features: int
    out_features: int

    @property
    def fused(self) -> bool:
        """Whether it holds several roles."""
        return len(self.rows) > 1


def hf_modules(config: ModelConfig, targets: Collection[str], i: int | None = None) -> dict[str, HFModule]:
    """Name -> the checkpoint's linears in layer i (None: in any) that hold a targeted role.

    Layers differ in which they have, and in `rows`.
    """
    modules = dict[str, HFModule]()
    for layer in range(len(config.layers)) if i is None else [i]:
        for name, rows in stored_linears(config, layer).items():
            if targeted_roles := tuple(role for role in rows if role in targets):
                sizes = [linear_size(config, role) for role in rows]
                n_in, n_out = sizes[0][0], sum(n_out for _, n_out in sizes)
                modules.setdefault(name, HFModule(name, rows, targeted_roles, n_in, n_out))
    return modules


def hf_module_name(config: ModelConfig, role: str) -> str:
    """The checkpoint's module that holds the role's linear, inside a layer."""
    return FAMILIES[config.family].linears[role]


def layer_prefix(config: ModelConfig, i: int) -> str:
    """The prefix of tensor names of layer i."""
    return f"base_model.model.{FAMILIES[config.family].layers}{i}."


def named_targets(config: ModelConfig, modules: Collection[str]) -> list[str]:
    """A config's names of these modules in every layer: without their parents if that is unique in the family."""
    last = [module.rpartition(".")[2] for module in set(FAMILIES[config.family].linears.values())]
    return sorted(set(modules) if len(set(last)) < len(last) else {module.rpartition(".")[2] for module in modules})


# Strict reading -------------------------------------------------------------------------------------------------------


class StrictTensorReader:
    """The tensors of a file, taken one by one; a tensor that is missing, misshapen or left over is an InputError."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self._tensors, self._unread, self._where = tensors, set(tensors), where

    def take(self, key: str, *size: int) -> Tensor:
        """The tensor of this name, which must have this size."""
        if key not in self._tensors:
            raise InputError(f"{self._where}: the tensor {key} is missing")
        if tuple(self._tensors[key].shape) != size:
            shape = list(self._tensors[key].shape)
            raise InputError(f"{self._where}: {key} has shape {shape}, expected {list(size)}")
        self._unread.discard(key)
        return self._tensors[key]

    def all_taken(self) -> None:
        """An InputError if any is left."""
        if self._unread:
            raise InputError(f"{self._where}: the tensor {min(self._unread)} belongs to no target of this adapter")


def check_fields(peft_config: Mapping[str, Any], read: Set[str], refused: Set[str], where: str) -> None:
    """An InputError unless every field is one of `read`, or one of `refused` and unset."""
    for key, value in peft_config.items():
        if key in refused:
            if value not in (None, False, [], {}):
                raise InputError(f"{where}: {key} = {value!r} is not supported; it must be unset")
        elif key not in read:
            raise InputError(
                f"{where}: {key!r} is no field that is understood; remove it, or read the folder with PEFT"
            )


def check_same(peft_config: Mapping[str, Any], expected: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    """An InputError unless the config has the run's values of these fields."""
    for key in keys:
        if peft_config.get(key) != expected[key]:
            raise InputError(f"{where}: {key} is {peft_config.get(key)!r}, the run says {expected[key]!r}")


def targeted(config: ModelConfig, peft_config: Mapping[str, Any], where: str) -> dict[str, tuple[int, str]]:
    """The modules that PEFT adapts by this config: transformers' module name -> (layer, its name in the layer)."""
    targets, excluded = peft_config.get("target_modules"), peft_config.get("exclude_modules") or []
    if not targets or not isinstance(targets, str | list):
        raise InputError(f"{where}: target_modules is {targets!r}; expected a list of module names")
    layers, modules = _layers(config, peft_config, where), sorted(hf_modules(config, config.roles))
    prefix = FAMILIES[config.family].layers
    names = {f"{prefix}{i}.{module}": (i, module) for i, module in _all_modules(config)}
    for target in targets if isinstance(targets, list) else []:
        if not any(_is_named(name, [target], where) for name in names):
            raise InputError(f"{where}: target_modules names {target!r}, which is none of {', '.join(modules)}")
    chosen = {
        name: (i, module)
        for name, (i, module) in names.items()
        if _is_named(name, targets, where) and not _is_named(name, excluded, where) and i in layers
    }
    if not chosen:
        raise InputError(f"{where}: target_modules {targets!r} names no linear of this {config.family} model")
    return chosen


def uniform_layer_range(
    config: ModelConfig, modules: Mapping[str, tuple[int, str]], fields: str, where: str
) -> tuple[int, int] | None:
    """The layers whose modules are adapted, None for all; an InputError unless they are contiguous and alike."""
    layers, names = sorted({i for i, _ in modules.values()}), {module for _, module in modules.values()}
    of_these_names = {(i, module) for i, module in _all_modules(config) if module in names}
    if of_these_names == set(modules.values()):
        return None
    span = range(layers[0], layers[-1] + 1)
    if {(i, module) for i, module in of_these_names if i in span} != set(modules.values()):
        raise InputError(
            f"{where}: {fields} adapt layers {layers} unevenly; supported: the same modules in each of a span of layers"
        )
    return span.start, span.stop


def _all_modules(config: ModelConfig) -> list[tuple[int, str]]:
    """(layer, name in it) of each of the checkpoint's linears."""
    return [(i, name) for i in range(config.num_layers) for name in stored_linears(config, i)]


def _layers(config: ModelConfig, peft_config: Mapping[str, Any], where: str) -> Sequence[int]:
    """The layers of layers_to_transform, all if it is unset; layers_pattern must name the list that holds them."""
    layers, pattern = peft_config.get("layers_to_transform"), peft_config.get("layers_pattern")
    layers = [layers] if type(layers) is int else layers
    if layers is None or layers == []:
        return range(config.num_layers)
    if not isinstance(layers, list) or not all(type(i) is int for i in layers):
        raise InputError(f"{where}: layers_to_transform = {layers!r} must be a list of layers' numbers")
    if not set(layers) <= set(range(config.num_layers)):
        raise InputError(
            f"{where}: layers_to_transform = {layers!r}, but this model's layers are 0 to {config.num_layers - 1}"
        )
    name = FAMILIES[config.family].layers.split(".")[-2]
    if pattern and name not in ([pattern] if isinstance(pattern, str) else pattern):
        raise InputError(f"{where}: layers_pattern = {pattern!r} is not supported; this model's layers are in {name!r}")
    return layers


def _is_named(name: str, patterns: str | list[str], where: str) -> bool:
    """PEFT's rule: a string is a regular expression, a list holds names or their ends."""
    if isinstance(patterns, str):
        return patterns.lower() == "all-linear" or matches(patterns, name, where)
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def matches(pattern: str, name: str, where: str) -> bool:
    """Whether a config's regular expression matches the whole name; InputError if it is invalid or may be slow."""
    # The pattern is untrusted: with repeated groups, or many repeats, thirty letters can take exponential time.
    if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > MAX_REPEATS:
        raise InputError(
            f"{where}: {pattern[:80]!r} repeats a group, or more than {MAX_REPEATS} times: not supported; list the "
            "modules' names"
        )
    try:
        return re.fullmatch(pattern, name) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{where}: {pattern[:80]!r} is no regular expression ({error})") from None


# LoRA and DoRA --------------------------------------------------------------------------------------------------------

# Fields of a config that are read or change nothing,
_KNOWN = WITHOUT_EFFECT | {
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

    parts: tuple[str, ...]
    """The roles that have an update."""
    blocks: int = 1
    """1: all roles use the whole A. Else one block of rows of A and of columns of B for each part; the rest is zero."""
    factor: float = 1.0
    """The stored B is this times ours."""

    def columns(self, role: str, rank: int) -> slice:
        """The role's rows of A and columns of B."""
        n = self.parts.index(role) if self.blocks > 1 and role in self.parts else 0
        return slice(n * rank, (n + 1) * rank)


def _growth(blocks: int, rslora: bool) -> float:
    """By how much alpha or B grows with this many times the rank, so that the update stays the same."""
    return math.sqrt(blocks) if rslora else blocks


def _layouts(method: "LoRA", modules: Mapping[str, HFModule], shared: Collection[str]) -> dict[str, _Layout]:
    """The layout of each module; the parts of those in `shared` have the same A.

    Where numbers of blocks differ there is one alpha for all: then B has the factor. It is a power of two, so that
    reading gives the same bits: three blocks are padded to four, and with rsLoRA two as well.
    """
    blocks = {name: 1 if name in shared else len(module.targets) for name, module in modules.items()}
    if len(set(blocks.values())) > 1:
        blocks = {name: n if n == 1 or (n == 2 and not method.rslora) else 4 for name, n in blocks.items()}
    differ = len(set(blocks.values())) > 1
    factors = {name: _growth(n, method.rslora) if differ else 1.0 for name, n in blocks.items()}
    return {name: _Layout(module.targets, blocks[name], factors[name]) for name, module in modules.items()}


# Ours -> PEFT's -------------------------------------------------------------------------------------------------------


def to_peft(method: "LoRA", model: CausalLM) -> PeftFolder:
    """The config and the tensors that PEFT reads as this model's adapter."""
    config, state, tensors = model.config, trainable_state_dict(model), dict[str, Tensor]()
    modules = {i: hf_modules(config, method.targets, i) for i in method.layer_range(config)}

    def all_a(i: int, name: str) -> list[Tensor]:
        return [state[f"{our_linear(i, role)}.lora_A"] for role in modules[i][name].targets]

    separate = {
        name
        for i in modules
        for name in modules[i]
        for first, *a in [all_a(i, name)]
        if any(not torch.equal(first, t) for t in a)
    }
    every = hf_modules(config, method.targets)
    layouts = _layouts(method, every, every.keys() - separate)
    for i in modules:
        for name, module in modules[i].items():
            key, layout, a = f"{layer_prefix(config, i)}{name}", layouts[name], all_a(i, name)
            b = a[0].new_zeros(module.out_features, method.rank * layout.blocks)
            for role in module.targets:
                b[module.rows[role], layout.columns(role, method.rank)] = state[f"{our_linear(i, role)}.lora_B"]
            joined = torch.cat(a[: layout.blocks])
            tensors[f"{key}.lora_A.weight"] = F.pad(joined, (0, 0, 0, b.shape[1] - len(joined)))
            tensors[f"{key}.lora_B.weight"] = b * layout.factor
            if method.use_dora:
                magnitudes = tensors[f"{key}.lora_magnitude_vector"] = a[0].new_zeros(module.out_features)
                for role, rows in module.rows.items():
                    magnitudes[rows] = _magnitude(model, state, our_linear(i, role))
    return _config(config, method, layouts), tensors


def _magnitude(model: CausalLM, state: Mapping[str, Tensor], name: str) -> Tensor:
    """[out] of our linear of this name; of one that is not adapted, the norms of the base's rows."""
    if f"{name}.magnitude" in state:
        return state[f"{name}.magnitude"]
    linear = model.get_submodule(name)
    assert isinstance(linear, Linear)
    weight = linear.stored_weight
    return dense(weight, master_dtype(weight.dtype)).detach().square().sum(dim=1).sqrt()


def _config(config: ModelConfig, method: "LoRA", layouts: Mapping[str, _Layout]) -> dict[str, Any]:
    """adapter_config.json without the base's name."""
    blocks, rank, alpha = {name: layout.blocks for name, layout in layouts.items()}, method.rank, method.alpha
    ranks: dict[str, int] = {}
    if len(different := set(blocks.values())) > 1:
        # Readers other than PEFT take the rank from the tensors, and lora_alpha for all modules.
        ranks = {name: rank * n for name, n in blocks.items() if n > 1}
    else:
        (n,) = different
        rank, alpha = rank * n, alpha * _growth(n, method.rslora)
    return {
        "peft_type": method.peft_type,
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": named_targets(config, layouts),
        "layers_to_transform": list(method.layer_range(config)) if method.layers else None,
        "fan_in_fan_out": FAMILIES[config.family].transposed,
        "bias": "none",
        "lora_dropout": method.dropout,
        "use_rslora": method.rslora,
        "use_dora": method.use_dora,
        "init_lora_weights": True,
        "inference_mode": True,
        "peft_version": PEFT_VERSION,
        "rank_pattern": ranks,
        "alpha_pattern": {},
    }


# PEFT's -> ours -------------------------------------------------------------------------------------------------------


def from_peft(method: "LoRA", config: ModelConfig, folder: PeftFolder, where: str) -> dict[str, Tensor]:
    """The inverse of `to_peft` for a folder written with this method; an InputError for anything else."""
    peft_config, tensors = folder
    modules, layers = hf_modules(config, method.targets), method.layer_range(config)
    keys = [(f"{layer_prefix(config, i)}{name}.lora_A.weight", name) for i in layers for name in modules]
    shared = {name for key, name in keys if key in tensors and len(tensors[key]) == method.rank}
    layouts = _layouts(method, modules, shared)
    for name in peft_config.get("alpha_pattern") or {}:  # of 0.1.0, which gave fused modules an alpha of their own
        if name in modules and name not in shared:
            layouts[name] = _Layout(modules[name].targets, len(modules[name].targets))
    fields = ("peft_type", "r", "lora_alpha", "target_modules", "layers_to_transform", "use_rslora", "use_dora")
    check_same(peft_config, _config(config, method, layouts), fields, where)
    return _read(method, config, layouts, StrictTensorReader(tensors, where))


def _read(
    method: "LoRA", config: ModelConfig, layouts: Mapping[str, _Layout], file: StrictTensorReader
) -> dict[str, Tensor]:
    """The trained tensors by our names; a targeted role that is no part of a fused module's update has B = 0."""
    state: dict[str, Tensor] = {}
    for i in method.layer_range(config):
        for module in hf_modules(config, method.targets, i).values():
            key, layout = f"{layer_prefix(config, i)}{module.name}", layouts[module.name]
            rank, out = method.rank * layout.blocks, module.out_features
            a = file.take(f"{key}.lora_A.weight", rank, module.in_features)
            b = file.take(f"{key}.lora_B.weight", out, rank)
            magnitudes = file.take(f"{key}.lora_magnitude_vector", out) if method.use_dora else None
            for role in module.targets:
                name, rows, columns = our_linear(i, role), module.rows[role], layout.columns(role, method.rank)
                own = b[rows][:, columns] / layout.factor
                state[f"{name}.lora_A"] = a[columns]
                state[f"{name}.lora_B"] = own if role in layout.parts else torch.zeros_like(own)
                if magnitudes is not None:
                    state[f"{name}.magnitude"] = magnitudes[rows]
    file.all_taken()
    return state


def from_foreign_peft(
    cls: "type[LoRA]", config: ModelConfig, folder: PeftFolder, where: str
) -> "tuple[LoRA, dict[str, Tensor]]":
    """The LoRA (or DoRA) of a folder that PEFT wrote, and its tensors; an InputError names what is not supported."""
    peft_config, tensors = folder
    check_fields(peft_config, _KNOWN, _REFUSED, where)
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
    names = targeted(config, peft_config, where)
    layers = uniform_layer_range(config, names, "target_modules and layers_to_transform", where)
    layouts = {module: _found_layout(config, names, module, tensors) for _, module in names.values()}
    rank, alpha, layouts = _rank_and_alpha(peft_config, names, layouts, where)
    modules = hf_modules(config, config.roles)
    # DoRA has magnitudes of all parts
    roles = {
        role for name, layout in layouts.items() for role in (modules[name].rows if cls.use_dora else layout.parts)
    }
    method = cls(
        rank=rank,
        alpha=alpha,
        targets=tuple(role for role in config.roles if role in roles),
        dropout=float(dropout),
        rslora=bool(peft_config.get("use_rslora", False)),
        layers=layers,
    )
    return method, _read(method, config, layouts, StrictTensorReader(tensors, where))


def _rank_and_alpha(
    peft_config: Mapping[str, Any], names: Mapping[str, tuple[int, str]], layouts: Mapping[str, _Layout], where: str
) -> tuple[int, float, dict[str, _Layout]]:
    """The rank and alpha of all modules, and the layouts with the factors of their B."""
    rslora = bool(peft_config.get("use_rslora"))
    blocks = {name: layouts[module].blocks for name, (_, module) in names.items()}
    ranks, alphas = (
        {name: _of_module(field, peft_config, name, where) for name in names} for field in ("r", "lora_alpha")
    )
    least = min(names, key=lambda name: (blocks[name], alphas[name]))  # the file's alpha, if it is that of all
    alpha, equal = alphas[least], len(set(blocks.values())) == 1
    rank, alpha = int(ranks[least]) // blocks[least], alpha / _growth(blocks[least], rslora) if equal else alpha
    factors: dict[str, float] = {}
    for name, (_, module) in names.items():
        factor = alpha * _growth(blocks[name], rslora) / alphas[name]
        factor = 1.0 if math.isclose(factor, 1, rel_tol=1e-12) else factor
        same = math.isclose(factor, factors.setdefault(module, factor), rel_tol=1e-12)
        if int(ranks[name]) // blocks[name] != rank or not same or (factor != 1 and (equal or blocks[name] == 1)):
            raise InputError(
                f"{where}: rank_pattern or alpha_pattern gives modules different ranks or alphas: not supported"
            )
    return rank, float(alpha), {name: replace(layout, factor=factors[name]) for name, layout in layouts.items()}


def _of_module(field: str, peft_config: Mapping[str, Any], name: str, where: str) -> float:
    """A module's r or lora_alpha: of the pattern that matches it, else the config's; PEFT's default is 8."""
    key = "rank_pattern" if field == "r" else "alpha_pattern"
    patterns = peft_config.get(key) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{where}: {key} = {patterns!r} must be an object of module names")
    matching = (value for p, value in patterns.items() if matches(rf"(.*\.)?({p})$", name, where))
    value = next(matching, peft_config.get(field, 8))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf or (field == "r" and value % 1):
        raise InputError(f"{where}: {field} = {value!r} must be a {'whole ' if field == 'r' else ''}number above 0")
    return value


def _found_layout(
    config: ModelConfig, names: Mapping[str, tuple[int, str]], module: str, tensors: Mapping[str, Tensor]
) -> _Layout:
    """The layout of a module, found from every layer's B [out, r]: blocks only if B is block-diagonal in all."""
    found = hf_modules(config, config.roles)[module]
    if not found.fused:
        return _Layout(found.targets)
    layers = [
        (i, tensors.get(f"base_model.model.{name}.lora_B.weight")) for name, (i, own) in names.items() if own == module
    ]
    b = [
        (hf_modules(config, config.roles, i)[module].rows, t)
        for i, t in layers
        if t is not None and t.dim() == 2 and len(t) == found.out_features
    ]
    updated = tuple(part for part in found.targets if any(bool(t[rows[part]].any()) for rows, t in b))
    for n in range(len(found.targets), 1, -1):
        for parts, blocks in product(combinations(found.targets, n), (n, 4)):
            if updated and all(_is_block_diagonal(t, _Layout(parts, blocks), rows) for rows, t in b):
                return _Layout(parts, blocks)
    return _Layout(updated or found.targets)


def _is_block_diagonal(b: Tensor, layout: _Layout, rows: Mapping[str, Rows]) -> bool:
    """Whether the columns of B [out, r] are one block for each part, with nonzero rows of that part only, or zero."""
    r, remainder = divmod(b.shape[1], layout.blocks)
    outside = b.clone()
    for part in layout.parts:
        outside[rows[part], layout.columns(part, r)] = 0
    return not remainder and not bool(outside.any())
