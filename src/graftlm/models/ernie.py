"""ERNIE 4.5 without experts (Baidu 2025): Llama whose pairs of rotated dimensions are neighbours in the files."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.llama import read_sizes
from graftlm.models.rope import RopeConfig, read_rope
from graftlm.models.settings import Settings


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that an ERNIE 4.5's config.json describes."""
    settings = Settings(config, where)
    sizes = read_sizes(settings, kv_heads=2, head_dim=128, tied=True, eps=("rms_norm_eps", 1e-5))
    bias = settings.flag("use_bias", False)
    layer = LayerConfig(
        rope=read_rope(settings, sizes["head_dim"], theta=500000.0, interleaved=True),
        activation=settings.activation("hidden_act", "silu"),
    )
    return ModelConfig(family="ernie", **sizes, layers=(layer,), qkv_bias=bias, out_bias=bias, mlp_bias=bias)


FAMILY = replace(
    LLAMA,
    name="ernie",
    model_types=("ernie4_5",),
    read=read,
    layer=LayerConfig(rope=RopeConfig(interleaved=True)),
    with_biases=None,
)
