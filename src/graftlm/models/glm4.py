"""GLM-4-0414 (GLM team, arXiv:2406.12793): norms on either side of attention and MLP, half of each head rotates."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.llama import read_sizes
from graftlm.models.phi3 import fused_gate_up
from graftlm.models.rope import RopeConfig, read_rope
from graftlm.models.settings import Settings


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a GLM-4's config.json describes."""
    settings = Settings(config, where)
    sizes = read_sizes(settings, kv_heads=2, head_dim=128, eps=("rms_norm_eps", 1.5625e-7))
    layer = replace(
        FAMILY.layer,
        rope=read_rope(settings, sizes["head_dim"], partial=0.5, interleaved=True),
        activation=settings.activation("hidden_act", "silu"),
    )
    return ModelConfig(family="glm4", **sizes, layers=(layer,), qkv_bias=settings.flag("attention_bias", True))


FAMILY = replace(
    LLAMA,
    name="glm4",
    model_types=("glm4",),
    read=read,
    layer=LayerConfig(rope=RopeConfig(interleaved=True), norm_placement="both"),
    linears={**LLAMA.linears, **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj")},
    norms={
        "norm1": "input_layernorm",
        "post_norm1": "post_self_attn_layernorm",
        "norm2": "post_attention_layernorm",
        "post_norm2": "post_mlp_layernorm",
    },
    fused_slices=fused_gate_up,
    with_biases=None,
)
