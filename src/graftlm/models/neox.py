"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745; Pythia, Biderman et al. 2023): parallel attention and MLP.

Only the first R dimensions of a head rotate (rotary_pct, a quarter in Pythia), and q, k and v are fused head by head.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.models.config import LayerConfig, ModelConfig, ModelFamily
from graftlm.models.rope import RopeConfig
from graftlm.models.settings import Settings, common_sizes


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a GPT-NeoX's config.json describes, in the spelling of old files and of transformers 5."""
    settings = Settings(config, where)
    settings.require(attention_bias=(True,))
    rope = settings.group("rope_scaling", "rope_parameters")
    rope.require(rope_type=("default",), type=("default",))
    heads, d = config["num_attention_heads"], config["hidden_size"]
    if d % heads or d // heads % 2:
        raise InputError(f"{where}: hidden_size {d} gives {heads} heads no even width")
    share = rope.number("partial_rotary_factor", settings.number("rotary_pct", 0.25))
    theta = rope.number("rope_theta", settings.number("rotary_emb_base", 10000))
    dim = int(d // heads * share)
    if not 0 < dim <= d // heads or dim % 2:
        raise InputError(f"{where}: rotary_pct = {share!r} rotates {dim} of {d // heads} dimensions: not understood")
    layer = replace(FAMILY.layer, rope=RopeConfig(theta=theta, dim=dim))
    return ModelConfig(
        family="neox",
        **common_sizes(settings),
        num_kv_heads=heads,
        head_dim=d // heads,
        norm_eps=settings.number("layer_norm_eps", 1e-5),
        layers=(
            replace(
                layer,
                parallel=settings.flag("use_parallel_residual", True),
                activation=settings.activation("hidden_act", "gelu"),
            ),
        ),
        tie_embeddings=settings.flag("tie_word_embeddings", False),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def _fused_slices(config: ModelConfig, role: str) -> Tensor | None:
    """query_key_value holds q, k and v head by head, [H, 3, D]."""
    if role not in "qkv":
        return None
    rows = torch.arange(3 * config.num_heads * config.head_dim).view(config.num_heads, 3, config.head_dim)
    return rows[:, "qkv".index(role)].flatten()


FAMILY = ModelFamily(
    name="neox",
    model_types=("gpt_neox",),
    read=read,
    layer=LayerConfig(norm="layer", activation="gelu", gated=False, parallel=True),
    embed="gpt_neox.embed_in",
    last_norm="gpt_neox.final_layer_norm",
    head="embed_out",
    layers="gpt_neox.layers.",
    linears={
        **dict.fromkeys("qkv", "attention.query_key_value"),
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    norms={"norm1": "input_layernorm", "norm2": "post_attention_layernorm"},
    fused_slices=_fused_slices,
    ignored=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",  # causal masks and rotary frequencies
)
