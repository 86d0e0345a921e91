"""GPT-J (Wang & Komatsuzaki 2021): parallel attention and MLP with one norm; `rotary_dim` of a head's D rotate."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.errors import InputError
from graftlm.models.config import LayerConfig, ModelConfig, ModelFamily
from graftlm.models.rope import RopeConfig
from graftlm.models.settings import Settings


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a GPT-J's config.json describes."""
    settings = Settings(config, where)
    settings.require(tie_word_embeddings=(False,))  # the head has a bias
    d, heads = settings.size("n_embd"), settings.size("n_head")
    if d % heads:
        raise InputError(f"{where}: n_embd {d} is not divided by {heads} heads")
    dim = config.get("rotary_dim", 64)
    if dim is None or dim > d // heads or dim % 2:
        raise InputError(f"{where}: rotary_dim = {dim!r} is not understood; a head has {d // heads} dimensions")
    layer = replace(
        FAMILY.layer,
        rope=RopeConfig(dim=dim, interleaved=True),
        activation=settings.activation("activation_function", "gelu_new"),
    )
    return ModelConfig(
        family="gptj",
        num_layers=settings.size("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        hidden_size=d,
        head_dim=d // heads,
        intermediate_size=config.get("n_inner") or 4 * d,
        vocab_size=settings.size("vocab_size"),
        max_positions=settings.size("n_positions"),
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        layers=(layer,),
        tie_embeddings=False,
        mlp_bias=True,
        head_bias=True,
    )


FAMILY = ModelFamily(
    name="gptj",
    model_types=("gptj",),
    read=read,
    layer=LayerConfig(norm="layer", activation="gelu_tanh", gated=False, parallel=True, single_norm=True),
    embed="transformer.wte",
    last_norm="transformer.ln_f",
    head="lm_head",
    layers="transformer.h.",
    linears={
        **{role: f"attn.{role}_proj" for role in "qkv"},
        **{"o": "attn.out_proj", "up": "mlp.fc_in", "down": "mlp.fc_out"},
    },
    norms={"norm1": "ln_1"},
    ignored=r"\.attn\.(bias|masked_bias)$",  # causal masks
)
