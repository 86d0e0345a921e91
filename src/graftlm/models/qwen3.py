"""Qwen3 (Yang et al. 2025, arXiv:2505.09388): Llama with an RMS norm of each head of q and k before the rotation."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.llama import QK_NORMS, qwen2_windows, read_sizes, with_windows
from graftlm.models.rope import read_rope
from graftlm.models.settings import Settings


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a Qwen3's config.json describes."""
    settings = Settings(config, where)
    sizes = read_sizes(settings, kv_heads=32, head_dim=128)
    bias = settings.flag("attention_bias", False)
    layer = LayerConfig(
        rope=read_rope(settings, sizes["head_dim"]),
        qk_norm="head",
        activation=settings.activation("hidden_act", "silu"),
    )
    layers = with_windows(layer, qwen2_windows(settings))
    return ModelConfig(family="qwen3", **sizes, layers=layers, qkv_bias=bias, out_bias=bias)


FAMILY = replace(
    LLAMA,
    name="qwen3",
    model_types=("qwen3",),
    read=read,
    layer=LayerConfig(qk_norm="head"),
    norms={**LLAMA.norms, **QK_NORMS},
    with_biases=None,
)
