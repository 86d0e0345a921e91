"""OPT (Zhang et al. 2022, arXiv:2205.01068; Galactica): learned positions from row 2, layer norm, ReLU.

OPT-350m alone is not read: it normalises after the residual sum and has embeddings of another width.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.errors import InputError
from graftlm.models.config import LayerConfig, ModelConfig, ModelFamily
from graftlm.models.settings import Settings, common_sizes


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that an OPT's config.json describes."""
    settings = Settings(config, where)
    d, heads = settings.size("hidden_size"), settings.size("num_attention_heads")
    settings.require(
        do_layer_norm_before=(True,),
        word_embed_proj_dim=(d, None),
        layer_norm_elementwise_affine=(True,),
        _remove_final_layer_norm=(False,),
    )
    if d % heads:
        raise InputError(f"{where}: hidden_size {d} is not divided by {heads} heads")
    biases = settings.flag("enable_bias", True)
    return ModelConfig(
        family="opt",
        **common_sizes(Settings({**config, "intermediate_size": config["ffn_dim"]}, where)),
        num_kv_heads=heads,
        head_dim=d // heads,
        norm_eps=1e-5,
        layers=(replace(FAMILY.layer, activation=settings.activation("activation_function", "relu")),),
        tie_embeddings=settings.flag("tie_word_embeddings", True),
        qkv_bias=biases,
        out_bias=biases,
        mlp_bias=biases,
        position_offset=2,
    )


FAMILY = ModelFamily(
    name="opt",
    model_types=("opt",),
    read=read,
    layer=LayerConfig(rope=None, norm="layer", activation="relu", gated=False),
    embed="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    last_norm="model.decoder.final_layer_norm",
    head="lm_head",
    layers="model.decoder.layers.",
    linears={
        **{role: f"self_attn.{role}_proj" for role in "qkv"},
        **{"o": "self_attn.out_proj", "up": "fc1", "down": "fc2"},
    },
    norms={"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"},
)
