"""StarCoder 2 (Lozhkov et al. 2024, arXiv:2402.19173): layer norm, biases, tanh GELU without a gate, windows."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.llama import read_sizes
from graftlm.models.rope import read_rope
from graftlm.models.settings import Settings


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a StarCoder 2's config.json describes."""
    settings = Settings(config, where)
    sizes = read_sizes(settings, kv_heads=2, tied=True, eps=("norm_epsilon", 1e-5))
    bias = settings.flag("use_bias", True)
    layer = replace(
        FAMILY.layer,
        rope=read_rope(settings, sizes["head_dim"]),
        window=settings.window(),
        activation=settings.activation("hidden_act", "gelu_pytorch_tanh"),
    )
    return ModelConfig(family="starcoder2", **sizes, layers=(layer,), qkv_bias=bias, out_bias=bias, mlp_bias=bias)


FAMILY = replace(
    LLAMA,
    name="starcoder2",
    model_types=("starcoder2",),
    read=read,
    layer=LayerConfig(norm="layer", activation="gelu_tanh", gated=False),
    linears={**{role: f"self_attn.{role}_proj" for role in "qkvo"}, "up": "mlp.c_fc", "down": "mlp.c_proj"},
    with_biases=None,
)
