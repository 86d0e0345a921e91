"""Phi-3 and Phi-4 (Abdin et al. 2024, arXiv:2404.14219): Llama whose q, k, v and gate, up are fused.

Phi-4-mini rotates three quarters of a head's dimensions. Of models with LongRoPE the context is the original one: the
divisors of longer texts would make cached keys wrong (`rope.py`).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.gpt2 import fused_qkv
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.llama import read_sizes
from graftlm.models.rope import read_rope
from graftlm.models.settings import Settings


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a Phi-3's config.json describes."""
    config = {"original_max_position_embeddings": 4096, **config}
    settings = Settings(config, where)
    rope_types, original = ("default", "longrope", "su"), config["original_max_position_embeddings"]
    settings.group("rope_scaling", "rope_parameters").require(
        rope_type=rope_types, type=rope_types, original_max_position_embeddings=(original,)
    )
    sizes = read_sizes(settings, eps=("rms_norm_eps", 1e-5))
    rope = read_rope(settings, sizes["head_dim"], partial=1.0)
    if rope.scaling:
        sizes["max_positions"] = min(sizes["max_positions"], original)
    layer = LayerConfig(rope=rope, window=settings.window(), activation=settings.activation("hidden_act", "silu"))
    return ModelConfig(family="phi3", **sizes, layers=(layer,))


def fused_gate_up(config: ModelConfig, role: str) -> slice | None:
    """gate_up_proj holds the gate, then up."""
    if role not in ("gate", "up"):
        return None
    start = 0 if role == "gate" else config.intermediate_size
    return slice(start, start + config.intermediate_size)


def _fused_slices(config: ModelConfig, role: str) -> slice | None:
    return fused_gate_up(config, role) or fused_qkv(config, role)


FAMILY = replace(
    LLAMA,
    name="phi3",
    model_types=("phi3",),
    read=read,
    linears={
        **dict.fromkeys("qkv", "self_attn.qkv_proj"),
        "o": "self_attn.o_proj",
        **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
        "down": "mlp.down_proj",
    },
    fused_slices=_fused_slices,
    with_biases=None,
)
