"""gpt-oss (OpenAI 2025, arXiv:2508.10925): experts and attention sinks in every layer, windows in every second.

The published files hold MXFP4 weights, which are not read: use a copy in bfloat16. A tensor holds all experts, stored
[in, out], with the rows of gate and up in turn.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from graftlm.models.config import LayerConfig, ModelConfig, TensorMapping
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.llama import read_sizes
from graftlm.models.mlp import SWIGLU_ALPHA, SWIGLU_LIMIT
from graftlm.models.qwen3_moe import read_experts
from graftlm.models.rope import read_rope
from graftlm.models.settings import Settings

YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a gpt-oss's config.json describes."""
    if not (config.get("rope_scaling") or config.get("rope_parameters")):
        config = {**config, "rope_parameters": YARN}
    settings = Settings(config, where)
    settings.require(hidden_act=("silu",), swiglu_alpha=(SWIGLU_ALPHA,), swiglu_limit=(SWIGLU_LIMIT, int(SWIGLU_LIMIT)))
    sizes = read_sizes(settings, head_dim=64, eps=("rms_norm_eps", 1e-5))
    bias = settings.flag("attention_bias", True)
    experts = read_experts(settings, per_token=4, size=sizes["intermediate_size"])
    layer = replace(
        FAMILY.layer,
        rope=read_rope(settings, sizes["head_dim"], theta=150000.0),
        experts=replace(experts, router_bias=True),
    )
    window = settings.window(128)
    kinds = settings.layer_types([f"{('sliding', 'full')[i % 2]}_attention" for i in range(sizes["num_layers"])])
    layers = [replace(layer, window=window if kind == "sliding_attention" else None) for kind in kinds]
    return ModelConfig(family="gpt_oss", **sizes, layers=tuple(layers), qkv_bias=bias, out_bias=bias, mlp_bias=True)


def _expert(config: ModelConfig, expert: int, role: str, kind: str) -> TensorMapping:
    """gate_up_proj [E, d, 2F] with gate and up in turn, down_proj [E, F, d], and their biases."""
    name = f"mlp.experts.{'down_proj' if role == 'down' else 'gate_up_proj'}{'_bias' if kind == 'bias' else ''}"
    size = 2 * config.intermediate_size
    rows = None if role == "down" else torch.arange(0 if role == "gate" else 1, size, 2)
    return TensorMapping(name, transposed=True, rows=rows, index=expert)


FAMILY = replace(
    LLAMA,
    name="gpt_oss",
    model_types=("gpt_oss",),
    read=read,
    layer=LayerConfig(attention_sinks=True, activation="clamped_swiglu"),
    router="mlp.router",
    expert=_expert,
    with_biases=None,
)
