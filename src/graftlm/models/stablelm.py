"""StableLM (Bellagente et al. 2024, arXiv:2402.17834): Llama with layer norms, of which a part of each head rotates.

The 12B model, which normalises q and k with other weights for each head, is not read.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.errors import InputError
from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.llama import read_sizes
from graftlm.models.rope import read_rope
from graftlm.models.settings import Settings


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a StableLM's config.json describes."""
    settings = Settings(config, where)
    settings.require(qk_layernorm=(False,))
    sizes = read_sizes(settings, kv_heads=32, eps=("layer_norm_eps", 1e-5))
    heads, head_dim, d = sizes["num_heads"], sizes["head_dim"], sizes["hidden_size"]
    if heads * head_dim != d:
        raise InputError(f"{where}: {heads} heads of {head_dim} dimensions do not make hidden_size {d}")
    parallel = settings.flag("use_parallel_residual", False)
    layer = replace(
        FAMILY.layer,
        rope=read_rope(settings, head_dim, partial=0.25),
        activation=settings.activation("hidden_act", "silu"),
        parallel=parallel,
        single_norm=parallel,
    )
    return ModelConfig(family="stablelm", **sizes, layers=(layer,), qkv_bias=settings.flag("use_qkv_bias", False))


FAMILY = replace(
    LLAMA,
    name="stablelm",
    model_types=("stablelm",),
    read=read,
    layer=LayerConfig(norm="layer"),
    with_biases=None,
)
