"""Command R and Command R7B (Cohere 2024 and 2025): parallel attention and MLP after one layer norm without a bias.

In Command R7B (`cohere2`) three layers with a window and a rotation precede each layer without either.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.llama import read_sizes
from graftlm.models.rope import RopeConfig, read_rope
from graftlm.models.settings import Settings, every_nth_full


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that the config.json of a Command R or Command R7B describes."""
    second = config["model_type"] == "cohere2"
    config = {"sliding_window": 4096, "sliding_window_pattern": 4, **config} if second else config
    settings = Settings(config, where)
    settings.require(use_qk_norm=(False, None))  # other weights for each head
    sizes = read_sizes(settings, tied=True, eps=("layer_norm_eps", 1e-5))
    layer = replace(
        FAMILY.layer,
        rope=read_rope(settings, sizes["head_dim"], theta=10000.0 if second else 500000.0, interleaved=True),
        activation=settings.activation("hidden_act", "silu"),
    )
    bias = settings.flag("attention_bias", False)
    return ModelConfig(
        family="cohere",
        **sizes,
        layers=_with_windows(layer, settings) if second else (layer,),
        qkv_bias=bias,
        out_bias=bias,
        logits_multiplier=settings.number("logit_scale", 0.0625),
    )


def _with_windows(layer: LayerConfig, settings: Settings) -> tuple[LayerConfig, ...]:
    """The layers of a Command R7B: a window as wide as the context changes nothing, but the layer rotates."""
    settings.require(head_dim=(settings.size("hidden_size") // settings.size("num_attention_heads"),))
    settings.size("sliding_window")
    every, count = settings.size("sliding_window_pattern"), settings.size("num_hidden_layers")
    full, sliding = replace(layer, rope=None), replace(layer, window=settings.window())
    return tuple(
        full if kind == "full_attention" else sliding for kind in settings.layer_types(every_nth_full(every, count))
    )


FAMILY = replace(
    LLAMA,
    name="cohere",
    model_types=("cohere", "cohere2"),
    read=read,
    layer=LayerConfig(
        rope=RopeConfig(interleaved=True), norm="layer", norm_bias=False, parallel=True, single_norm=True
    ),
    norms={"norm1": "input_layernorm"},
    with_biases=None,
)
