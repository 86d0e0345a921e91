"""Qwen3 MoE (Yang et al. 2025, arXiv:2505.09388): Qwen3 with a mixture of experts in most layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.errors import InputError
from graftlm.models.config import ExpertsConfig, LayerConfig, ModelConfig, TensorMapping
from graftlm.models.llama import read_sizes
from graftlm.models.qwen3 import FAMILY as QWEN3
from graftlm.models.rope import read_rope
from graftlm.models.settings import Settings


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a Qwen3 MoE's config.json describes."""
    settings = Settings(config, where)
    sizes, bias = read_sizes(settings, kv_heads=4), settings.flag("attention_bias", False)
    window = settings.window(4096) if settings.flag("use_sliding_window", False) else None
    plain = LayerConfig(
        rope=read_rope(settings, sizes["head_dim"]),
        qk_norm="head",
        window=window,
        activation=settings.activation("hidden_act", "silu"),
    )
    experts = read_experts(settings, per_token=8, size=config.get("moe_intermediate_size", 768))
    mixed = replace(plain, experts=replace(experts, normalized=settings.flag("norm_topk_prob", False)))
    every, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if type(every) is not int or every < 1 or not isinstance(dense, list):
        raise InputError(
            f"{where}: decoder_sparse_step = {every!r}, mlp_only_layers = {dense!r:.80} are not understood"
        )
    layers = [mixed if i not in dense and (i + 1) % every == 0 else plain for i in range(sizes["num_layers"])]
    return ModelConfig(family="qwen3_moe", **sizes, layers=tuple(layers), qkv_bias=bias, out_bias=bias)


def read_experts(settings: Settings, per_token: int, size: int) -> ExpertsConfig:
    """Experts of this intermediate size; `per_token` is the default."""
    values = settings.values
    count = values.get("num_experts", values.get("num_local_experts", 128))
    per_token = values.get("num_experts_per_tok", per_token)
    if per_token > count:
        raise InputError(f"{settings.where}: num_experts_per_tok = {per_token} is more than the {count} experts")
    return ExpertsConfig(count=count, per_token=per_token, intermediate_size=size)


def _expert(config: ModelConfig, expert: int, role: str, kind: str) -> TensorMapping:
    return TensorMapping(f"mlp.experts.{expert}.{role}_proj.{kind}")


FAMILY = replace(QWEN3, name="qwen3_moe", model_types=("qwen3_moe",), read=read, expert=_expert)
