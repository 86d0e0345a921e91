"""Gemma 2 and the texts of Gemma 3 (arXiv:2408.00118, arXiv:2503.19786): norms on either side, and sliding windows.

Gemma 2 has soft caps of scores and logits, and a window in every second layer. Gemma 3 has norms of q and k instead,
five layers with a window for each without, and another theta in layers with a window.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.gemma import read_gemma_sizes
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.llama import QK_NORMS
from graftlm.models.rope import read_rope, read_ropes
from graftlm.models.settings import Settings, every_nth_full


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that the config.json of a Gemma 2 or Gemma 3 describes."""
    settings, third = Settings(config, where), config["model_type"] == "gemma3_text"
    sizes, count = read_gemma_sizes(settings, kv_heads=4), settings.size("num_hidden_layers")
    every = settings.size("sliding_window_pattern", 6) if third else 2
    kinds = settings.layer_types(every_nth_full(every, count))
    if third:
        settings.require(attn_logit_softcapping=(None,))  # transformers has the setting, and does not use it
        thetas = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}
        ropes = read_ropes(settings, sizes["head_dim"], thetas)
    else:
        ropes = dict.fromkeys(kinds, read_rope(settings, sizes["head_dim"]))
    layer = replace(
        FAMILY.layer,
        activation=settings.activation("hidden_activation", "gelu_pytorch_tanh"),
        attention_scale=settings.size("query_pre_attn_scalar", 256) ** -0.5,
        attention_softcap=None if third else settings.number_or_none("attn_logit_softcapping", 50.0),
        qk_norm="head" if third else "none",
    )
    windows = {"full_attention": None, "sliding_attention": settings.window(4096)}
    return ModelConfig(
        family="gemma2",
        **sizes,
        layers=tuple(replace(layer, rope=ropes[kind], window=windows[kind]) for kind in kinds),
        logits_softcap=settings.number_or_none("final_logit_softcapping", None if third else 30.0),
    )


FAMILY = replace(
    LLAMA,
    name="gemma2",
    model_types=("gemma2", "gemma3_text"),
    read=read,
    layer=LayerConfig(norm_offset=1.0, norm_placement="both", activation="gelu_tanh"),
    norms={
        "norm1": "input_layernorm",
        "post_norm1": "post_attention_layernorm",
        "norm2": "pre_feedforward_layernorm",
        "post_norm2": "post_feedforward_layernorm",
        **QK_NORMS,
    },
    with_biases=None,
)
