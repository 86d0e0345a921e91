"""Phi-1, Phi-1.5 and Phi-2 (Gunasekar et al. 2023, arXiv:2306.11644): GPT-J's block with biases everywhere."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.llama import read_sizes
from graftlm.models.rope import read_rope
from graftlm.models.settings import Settings


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that the config.json of a Phi-2 or an earlier one describes."""
    settings = Settings(config, where)
    settings.require(qk_layernorm=(False,), tie_word_embeddings=(False,))  # the head has a bias
    sizes = read_sizes(settings, eps=("layer_norm_eps", 1e-5))
    layer = replace(
        FAMILY.layer,
        rope=read_rope(settings, sizes["head_dim"], partial=0.5),
        activation=settings.activation("hidden_act", "gelu_new"),
    )
    biases = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "head_bias"), True)
    return ModelConfig(family="phi", **sizes, layers=(layer,), **biases)


FAMILY = replace(
    LLAMA,
    name="phi",
    model_types=("phi",),
    read=read,
    layer=LayerConfig(norm="layer", activation="gelu_tanh", gated=False, parallel=True, single_norm=True),
    last_norm="model.final_layernorm",
    linears={
        **{role: f"self_attn.{role}_proj" for role in "qkv"},
        **{"o": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2"},
    },
    norms={"norm1": "input_layernorm"},
    with_biases=None,
)
