"""Helium (Kyutai 2025): Llama whose pairs of rotated dimensions are neighbours in the files."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.errors import InputError
from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.llama import read_sizes
from graftlm.models.rope import RopeConfig, read_rope
from graftlm.models.settings import Settings


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a Helium's config.json describes."""
    settings = Settings(config, where)
    sizes = read_sizes(settings, kv_heads=20, head_dim=128, eps=("rms_norm_eps", 1e-8))
    heads, head_dim, d = sizes["num_heads"], sizes["head_dim"], sizes["hidden_size"]
    if heads * head_dim != d:
        raise InputError(f"{where}: {heads} heads of {head_dim} dimensions do not make hidden_size {d}")
    layer = LayerConfig(
        rope=read_rope(settings, head_dim, theta=100000.0, interleaved=True),
        activation=settings.activation("hidden_act", "silu"),
    )
    return ModelConfig(
        family="helium",
        **sizes,
        layers=(layer,),
        qkv_bias=settings.flag("attention_bias", False),
        mlp_bias=settings.flag("mlp_bias", False),
    )


FAMILY = replace(
    LLAMA,
    name="helium",
    model_types=("helium",),
    read=read,
    layer=LayerConfig(rope=RopeConfig(interleaved=True)),
    with_biases=None,
)
