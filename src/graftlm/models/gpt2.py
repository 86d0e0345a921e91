"""GPT-2 (Radford et al. 2019): learned positions, layer norm, tanh GELU, biases everywhere.

Checkpoints fuse q, k and v into one `c_attn` and store linears transposed. Here they are three linears, so that LoRA
can adapt each on its own.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.errors import InputError
from graftlm.models.config import LayerConfig, ModelConfig, ModelFamily
from graftlm.models.settings import Settings


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that GPT-2's config.json describes."""
    settings = Settings(config, where)
    settings.require(scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,), add_cross_attention=(False,))
    d, heads = config["n_embd"], config["n_head"]
    if d % heads:
        raise InputError(f"{where}: n_embd {d} is not a multiple of n_head {heads}")
    return ModelConfig(
        family="gpt2",
        num_layers=config["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        hidden_size=d,
        head_dim=d // heads,
        intermediate_size=config.get("n_inner") or 4 * d,
        vocab_size=config["vocab_size"],
        max_positions=config.get("n_positions", 1024),
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        layers=(replace(FAMILY.layer, activation=settings.activation("activation_function", "gelu_new")),),
        tie_embeddings=settings.flag("tie_word_embeddings", True),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def fused_qkv(config: ModelConfig, role: str) -> slice | None:
    """A linear that holds q, k and v one after the other: c_attn."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {"q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}.get(role)


FAMILY = ModelFamily(
    name="gpt2",
    model_types=("gpt2",),
    read=read,
    layer=LayerConfig(rope=None, norm="layer", activation="gelu_tanh", gated=False),
    embed="transformer.wte",
    positions="transformer.wpe",
    last_norm="transformer.ln_f",
    head="lm_head",
    layers="transformer.h.",
    linears={**dict.fromkeys("qkv", "attn.c_attn"), "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    norms={"norm1": "ln_1", "norm2": "ln_2"},
    transposed=True,
    fused_slices=fused_qkv,
    ignored=r"\.attn\.(bias|masked_bias)$",  # causal masks
)
