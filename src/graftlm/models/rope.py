"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and its scaled forms: settings and frequencies.

    linear    all frequencies divided by the factor (Chen et al. 2023)
    llama3    low frequencies divided, high ones kept, a ramp between (Llama 3.1)
    yarn      a ramp over dimensions, and cosine and sine times an attention factor (Peng et al. 2023)
    longrope  a divisor for each frequency, and an attention factor (Ding et al. 2024)
    dynamic   scaled only for texts longer than the context, which are not read here: the default

LongRoPE has a second set of divisors for texts longer than the original context. Keys that were cached with one set are
wrong with the other, so only the first is used: the context is the original one (`phi3.py`).

Letters: D head dimension, of which the first R rotate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graftlm.errors import InputError
from graftlm.models.settings import Settings


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of a layer."""

    theta: float = 10000.0
    dim: int | None = None
    """R: the first R dimensions of a head rotate; None: all of them."""
    interleaved: bool = False
    """Whether checkpoints store the pair j at 2j and 2j + 1, instead of at j and j + R/2."""
    scaling: tuple[tuple[str, Any], ...] = ()
    """Settings other than theta, sorted: empty, or those of rope_type linear, llama3, yarn or longrope."""


# Settings -------------------------------------------------------------------------------------------------------------

REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings", "short_factor", "long_factor"),
}
OPTIONAL = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor"),
}


def read_rope(
    settings: Settings,
    head_dim: int,
    *,
    theta: float = 10000.0,
    partial: float | None = None,
    interleaved: bool = False,
    layer_type: str = "",
) -> RopeConfig:
    """The RoPE settings of a config.json: rope_scaling and rope_theta, or transformers 5's rope_parameters.

    Args:
        settings: the whole config.json.
        head_dim: D.
        theta: the family's default.
        partial: its default of partial_rotary_factor, R / D; None: all dimensions must rotate.
        interleaved: how its checkpoints store pairs.
        layer_type: the key of rope_parameters if they are given for each type of layer.
    """
    where, rope = settings.where, _rope_settings(settings, layer_type)
    scaling = dict(rope.values)
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    theta = rope.number("rope_theta", settings.number("rope_theta", theta))
    dim = _rotary_dim(settings, rope, head_dim, partial)
    for key in ("rope_theta", "partial_rotary_factor"):
        scaling.pop(key, None)
    kind = "longrope" if kind == "su" else kind
    if not isinstance(kind, str) or kind not in REQUIRED:
        raise InputError(f"{where}: rope_type = {kind!r} is not understood; understood: {', '.join(REQUIRED)}")
    if unsupported := sorted(set(scaling) - {*REQUIRED[kind], *OPTIONAL.get(kind, ())}):
        raise InputError(f"{where}: the rope setting {unsupported[0]!r} is not understood for rope_type {kind!r}")
    if "original_max_position_embeddings" in REQUIRED[kind]:
        context = settings.values.get("original_max_position_embeddings") or settings.values["max_position_embeddings"]
        scaling.setdefault("original_max_position_embeddings", context)
    values = _scaling(kind, Settings(scaling, where), settings.values["max_position_embeddings"], (dim or head_dim))
    found = tuple(sorted([("rope_type", kind), *values.items()])) if values else ()
    return RopeConfig(theta=theta, dim=dim, interleaved=interleaved, scaling=found)


def read_ropes(settings: Settings, head_dim: int, thetas: Mapping[str, tuple[str, float]]) -> dict[str, RopeConfig]:
    """The RoPE of each type of layer, of families whose rope_parameters are given by type.

    In old files, rope_scaling is that of full attention alone. `thetas`: type of layer -> the setting with its theta in
    old files, and its default.
    """
    given, old = settings.group("rope_parameters"), settings.group("rope_scaling")
    for found, known in ((given, thetas), (old, {*REQUIRED["llama3"], *OPTIONAL["yarn"], "rope_type", "rope_theta"})):
        if unknown := sorted(set(found.values) - set(known)):
            raise InputError(f"{settings.where}: the rope setting {unknown[0]!r} is not understood here")
    ropes = {}
    for layer_type, (key, default) in thetas.items():
        scaling = {**given.group(layer_type).values, **(old.values if layer_type == "full_attention" else {})}
        scaling.setdefault("rope_theta", settings.number(key, default))
        ropes[layer_type] = read_rope(
            Settings({**settings.values, "rope_scaling": None, "rope_parameters": scaling}, settings.where), head_dim
        )
    return ropes


def _rope_settings(settings: Settings, layer_type: str) -> Settings:
    """The object with the settings of this type of layer."""
    rope = settings.group("rope_scaling", "rope_parameters")
    if any(isinstance(value, dict) for value in rope.values.values()):
        if layer_type not in rope.values:
            raise InputError(f"{settings.where}: rope settings for each type of layer are not understood here")
        return rope.group(layer_type)
    return rope


def _rotary_dim(settings: Settings, rope: Settings, head_dim: int, partial: float | None) -> int | None:
    """R; None if all dimensions rotate."""
    if partial is None:
        settings.require(partial_rotary_factor=(None, 1.0, 1))
        rope.require(partial_rotary_factor=(1.0, 1))
        return None
    share = rope.number("partial_rotary_factor", settings.number("partial_rotary_factor", partial))
    dim = int(head_dim * share)
    if not 0 < dim <= head_dim or dim % 2:
        raise InputError(
            f"{settings.where}: partial_rotary_factor = {share!r} rotates {dim} of {head_dim} dimensions: not even"
        )
    return None if dim == head_dim else dim


def _scaling(kind: str, given: Settings, context: int, dim: int) -> dict[str, Any]:
    """The checked settings of a rope_type; empty where it changes nothing."""
    numbers = {key: given.number(key) for key in REQUIRED[kind] if not key.startswith(("short_", "long_"))}
    if kind in ("default", "dynamic"):  # dynamic scaling begins after the context
        return {}
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise InputError(f"{given.where}: low_freq_factor must be below high_freq_factor")
    if kind == "yarn":
        attention = given.number("attention_factor", _yarn_attention_factor(given, numbers["factor"]))
        betas = {key: given.number(key, default) for key, default in (("beta_fast", 32), ("beta_slow", 1))}
        return {**numbers, **betas, "attention_factor": attention, "truncate": given.flag("truncate", True)}
    if kind == "longrope":
        original = numbers["original_max_position_embeddings"]
        factor = given.number("factor", context / original)
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        _factors(given, "long_factor", dim)
        return {
            "short_factor": _factors(given, "short_factor", dim),
            "attention_factor": given.number("attention_factor", attention),
        }
    return numbers


def _yarn_attention_factor(given: Settings, factor: float) -> float:
    """1 + 0.1 ln(factor), or the quotient of two such terms if mscale and mscale_all_dim are given."""

    def term(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if given.values.get("mscale") and given.values.get("mscale_all_dim"):
        return term(given.number("mscale")) / term(given.number("mscale_all_dim"))
    return term(1.0)


def _factors(given: Settings, key: str, dim: int) -> tuple[float, ...]:
    """A divisor for each of the R/2 frequencies."""
    values = given.values[key]
    if not isinstance(values, list) or len(values) != dim // 2:
        raise InputError(f"{given.where}: {key} is not understood; it must be a list of {dim // 2} numbers")
    return tuple(Settings({key: value}, given.where).number(key) for value in values)


# Frequencies ----------------------------------------------------------------------------------------------------------


def inverse_frequencies(head_dim: int, rope: RopeConfig) -> Tensor:
    """[D/2] in float32: theta^(-2i/R) for i < R/2, scaled as the settings say; 0 for pairs that do not rotate."""
    r, scaling = rope.dim or head_dim, dict(rope.scaling)
    periods = rope.theta ** (torch.arange(0, r, 2, dtype=torch.int64).float() / r)
    frequencies = 1.0 / periods
    match scaling.get("rope_type"):
        case "linear":
            frequencies = frequencies / scaling["factor"]
        case "longrope":
            frequencies = 1.0 / (torch.tensor(scaling["short_factor"]) * periods)
        case "llama3":
            old, low, high = (scaling[key] for key in REQUIRED["llama3"][1:])
            wavelengths = 2 * math.pi / frequencies
            # 1 for wavelengths shorter than old/high (kept), 0 for longer than old/low (divided), a ramp between.
            frequencies = _mixed(frequencies, ((old / wavelengths - low) / (high - low)).clamp(0, 1), scaling["factor"])
        case "yarn":
            frequencies = _mixed(frequencies, 1 - _yarn_ramp(r, rope.theta, scaling), scaling["factor"])
    return F.pad(frequencies, (0, (head_dim - r) // 2))


def _mixed(frequencies: Tensor, kept: Tensor, factor: float) -> Tensor:
    """Frequencies of which a share is kept and the rest divided by the factor."""
    return (1 - kept) * frequencies / factor + kept * frequencies


def _yarn_ramp(r: int, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """[R/2]: 0 for dimensions that turn beta_fast times or more in the original context, 1 at beta_slow or less."""

    def dimension(turns: float) -> float:
        return r * math.log(scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling["beta_fast"]), dimension(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, r - 1)
    return ((torch.arange(r // 2).float() - low) / (high - low if high != low else 0.001)).clamp(0, 1)


def rope_cos_sin(positions: Tensor, head_dim: int, rope: RopeConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, times the attention factor: [...] -> two tensors [..., D/2]."""
    angles = positions.to(torch.float32)[..., None] * inverse_frequencies(head_dim, rope).to(positions.device)
    cos, sin = angles.cos(), angles.sin()
    if (factor := dict(rope.scaling).get("attention_factor", 1.0)) != 1:
        rotating = (rope.dim or head_dim) // 2  # the others stay as they are: cosine 1, sine 0
        cos[..., :rotating] *= factor
        sin *= factor
    return cos.to(dtype), sin.to(dtype)
