"""EXAONE 4 (LG AI Research 2025, arXiv:2507.11407): norms after attention and MLP, and of each head of q and k.

The larger ones have three layers with a window for each without, and only the former rotate; in the smaller ones, which
have no windows, all do.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.errors import InputError
from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.llama import read_sizes
from graftlm.models.olmo2 import POST_NORMS
from graftlm.models.rope import read_rope
from graftlm.models.settings import Settings, every_nth_full


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that an EXAONE 4's config.json describes."""
    settings = Settings(config, where)
    sizes, count = read_sizes(settings, kv_heads=32, eps=("rms_norm_eps", 1e-5)), settings.size("num_hidden_layers")
    layer = replace(
        FAMILY.layer,
        rope=read_rope(settings, sizes["head_dim"]),
        activation=settings.activation("hidden_act", "silu"),
    )
    window, windowed = settings.window(4096), config.get("sliding_window", 4096) is not None
    kinds = ["full_attention"] * count
    if windowed and config.get("layer_types") is None:
        kinds = every_nth_full(settings.size("sliding_window_pattern", 4), count)
    kinds = settings.layer_types(kinds)
    if "sliding_attention" in kinds and not windowed:
        raise InputError(f"{where}: layer_types has a sliding window, and sliding_window is null")
    full, sliding = replace(layer, rope=None if windowed else layer.rope), replace(layer, window=window)
    layers = tuple(sliding if kind == "sliding_attention" else full for kind in kinds)
    return ModelConfig(family="exaone4", **sizes, layers=layers)


FAMILY = replace(
    LLAMA,
    name="exaone4",
    model_types=("exaone4",),
    read=read,
    layer=LayerConfig(norm_placement="post", qk_norm="head"),
    norms=POST_NORMS,
    with_biases=None,
)
