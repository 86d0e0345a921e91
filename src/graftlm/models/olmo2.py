"""OLMo 2 and 3 (OLMo et al. 2025, arXiv:2501.00656): norms after attention and MLP, and of q and k over all heads.

OLMo 3 has three layers with a window for each without, and scales the rotation of the latter only.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.llama import QK_NORMS, read_sizes
from graftlm.models.rope import read_rope, read_ropes
from graftlm.models.settings import Settings, every_nth_full


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that the config.json of an OLMo 2 or OLMo 3 describes."""
    settings = Settings(config, where)
    sizes, bias = read_sizes(settings, eps=("rms_norm_eps", 1e-5)), settings.flag("attention_bias", False)
    layer = replace(FAMILY.layer, activation=settings.activation("hidden_act", "silu"))
    if config["model_type"] == "olmo3":
        layers = _with_windows(layer, settings, sizes["head_dim"])
    else:
        layers = (replace(layer, rope=read_rope(settings, sizes["head_dim"])),)
    return ModelConfig(family="olmo2", **sizes, layers=layers, qkv_bias=bias, out_bias=bias)


def _with_windows(layer: LayerConfig, settings: Settings, head_dim: int) -> tuple[LayerConfig, ...]:
    """The layers of an OLMo 3."""
    settings.require(rope_theta=(500000.0, 500000))  # transformers reads another for full attention only
    ropes = read_ropes(settings, head_dim, dict.fromkeys(WINDOWED, ("rope_theta", 500000.0)))
    windows = {"full_attention": None, "sliding_attention": settings.window(4096)}
    kinds = settings.layer_types(every_nth_full(4, settings.size("num_hidden_layers")))
    return tuple(replace(layer, rope=ropes[kind], window=windows[kind]) for kind in kinds)


WINDOWED = ("full_attention", "sliding_attention")
POST_NORMS = {"post_norm1": "post_attention_layernorm", "post_norm2": "post_feedforward_layernorm", **QK_NORMS}
FAMILY = replace(
    LLAMA,
    name="olmo2",
    model_types=("olmo2", "olmo3"),
    read=read,
    layer=LayerConfig(norm_placement="post", qk_norm="all"),
    norms=POST_NORMS,
    with_biases=None,
)
