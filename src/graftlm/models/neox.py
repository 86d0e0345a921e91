"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745; Pythia, Biderman et al. 2023): parallel attention and MLP.

Only the first R dimensions of a head rotate (rotary_pct, a quarter in Pythia), and q, k and v are fused head by head.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.models.config import LayerConfig, ModelConfig, ModelFamily, RopeConfig, common_sizes, require_values


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a GPT-NeoX's config.json describes, in the spelling of old files and of transformers 5."""
    require_values(config, where, hidden_act=("gelu",), attention_bias=(True,), rope_scaling=(None,))
    rope = dict(config.get("rope_parameters") or {})
    require_values(rope, where, rope_type=("default",))
    heads, d = config["num_attention_heads"], config["hidden_size"]
    if d % heads or d // heads % 2:
        raise InputError(f"{where}: hidden_size {d} gives {heads} heads no even width")
    share = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    theta = float(rope.get("rope_theta", config.get("rotary_emb_base", 10000)))
    dim = int(d // heads * share) if isinstance(share, int | float) else 0
    if not 0 < dim <= d // heads or dim % 2:
        raise InputError(f"{where}: rotary_pct = {share!r} rotates {dim} of {d // heads} dimensions: not understood")
    parallel = config.get("use_parallel_residual", True)
    return ModelConfig(
        family="neox",
        **common_sizes(config),
        num_kv_heads=heads,
        head_dim=d // heads,
        norm_eps=config.get("layer_norm_eps", 1e-5),
        layers=(replace(FAMILY.layer, rope=RopeConfig(theta=theta, dim=dim), parallel=parallel),),
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
