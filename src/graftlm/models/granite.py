"""Granite 3 (IBM 2024): Llama with multipliers of embeddings, scores, residual branches and logits."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.llama import read_sizes
from graftlm.models.rope import read_rope
from graftlm.models.settings import Settings


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a Granite's config.json describes."""
    settings = Settings(config, where)
    sizes, bias = read_sizes(settings), settings.flag("attention_bias", False)
    layer = LayerConfig(
        rope=read_rope(settings, sizes["head_dim"]),
        activation=settings.activation("hidden_act", "silu"),
        attention_scale=settings.number("attention_multiplier", 1.0),
        residual_multiplier=settings.number("residual_multiplier", 1.0),
    )
    return ModelConfig(
        family="granite",
        **sizes,
        layers=(layer,),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=settings.flag("mlp_bias", False),
        embedding_multiplier=settings.number("embedding_multiplier", 1.0),
        logits_multiplier=1 / settings.number("logits_scaling", 1.0),
    )


FAMILY = replace(LLAMA, name="granite", model_types=("granite",), read=read, with_biases=None)
