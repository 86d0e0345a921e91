"""Gemma (Mesnard et al. 2024, arXiv:2403.08295): embeddings times sqrt(d), norms that multiply by 1 + w, gated GELU."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.llama import read_sizes
from graftlm.models.rope import read_rope
from graftlm.models.settings import Settings


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a Gemma's config.json describes."""
    settings = Settings(config, where)
    # Old files say "gelu" and mean its tanh form.
    activation = settings.activation("hidden_act", "gelu_pytorch_tanh")
    activation = "gelu_tanh" if activation == "gelu" else activation
    sizes = read_gemma_sizes(settings, kv_heads=16)
    return ModelConfig(
        family="gemma",
        **sizes,
        layers=(replace(FAMILY.layer, rope=read_rope(settings, sizes["head_dim"]), activation=activation),),
    )


def read_gemma_sizes(settings: Settings, kv_heads: int) -> dict[str, Any]:
    """Sizes, biases and the factor of embeddings of a `ModelConfig`; InputError if attention is not causal."""
    settings.require(use_bidirectional_attention=(False, None))
    sizes = read_sizes(settings, kv_heads=kv_heads, head_dim=256, tied=True)
    bias = settings.flag("attention_bias", False)
    return sizes | {"qkv_bias": bias, "out_bias": bias, "embedding_multiplier": sizes["hidden_size"] ** 0.5}


FAMILY = replace(
    LLAMA,
    name="gemma",
    model_types=("gemma",),
    read=read,
    layer=LayerConfig(norm_offset=1.0, activation="gelu_tanh"),
    with_biases=None,
)
