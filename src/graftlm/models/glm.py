"""GLM-4 (GLM team 2024, arXiv:2406.12793): gate and up are fused, half of each head rotates.

GLM-4-0414 (`glm4`) has norms on either side of attention and MLP, the models before it (`glm`) at their input only.
"""

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
    """The model that the config.json of a GLM-4 describes."""
    settings = Settings(config, where)
    sizes = read_sizes(settings, kv_heads=2, head_dim=128, eps=("rms_norm_eps", 1.5625e-7))
    layer = replace(
        FAMILY.layer,
        rope=read_rope(settings, sizes["head_dim"], partial=0.5, interleaved=True),
        activation=settings.activation("hidden_act", "silu"),
        norm_placement="both" if config["model_type"] == "glm4" else "pre",
    )
    return ModelConfig(family="glm", **sizes, layers=(layer,), qkv_bias=settings.flag("attention_bias", True))


FAMILY = replace(
    LLAMA,
    name="glm",
    model_types=("glm", "glm4"),
    read=read,
    layer=LayerConfig(rope=RopeConfig(interleaved=True)),
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
