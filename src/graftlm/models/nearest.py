"""What to say about a model that is not read: which supported model type is nearest to it."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

RECURRENT = (
    *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "mamba", "mamba2", "minimax"),
    *("nemotron_h", "olmo_hybrid", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"),
)
"""Model types with recurrent or state-space layers; none of those that are read is near."""

NEAREST = {
    "gemma": ("vaultgemma",),
    "gemma2": ("shieldgemma2",),
    "gemma3_text": ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
    "glm": ("chatglm",),
    "gpt2": ("biogpt", "bloom", "codegen", "ctrl", "imagegpt", "mpt", "openai-gpt", "xglm"),
    "gpt_neox": ("falcon", "gpt_neox_japanese", "persimmon"),
    "granite": ("minicpm",),
    "llama": (
        *("apertus", "arcee", "aquila", "baichuan", "dbrx", "deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
        *("exaone", "hunyuan_v1_dense", "hunyuan_v1_moe", "llama4", "llama4_text", "minicpm3", "nanochat"),
        *("nemotron", "yi"),
    ),
    "ministral": ("ministral3",),
    "mistral": ("mistral3", "mistral4", "mixtral"),
    "olmo2": ("flex_olmo", "olmo", "olmoe"),
    "phi3": ("phi4_multimodal", "phimoe"),
    "qwen2": ("qwen", "qwen2_moe", "qwen2_vl", "qwen2_5_vl"),
    "qwen3": ("qwen3_5", "qwen3_next", "qwen3_vl", "qwen3_vl_moe"),
    "starcoder2": ("starcoder",),
}
"""Supported model type -> others that are near to it, where the name alone does not tell or tells another."""


def refusal(config: Mapping[str, Any], supported: Sequence[str]) -> str:
    """What to say about a config.json whose model_type is not among the supported ones."""
    name = config.get("model_type")
    said = f"model_type {name!r} is not supported"
    if isinstance(config.get("text_config"), dict):
        return f"{said}: it reads images or sound; docs/models.md says how to save its language model alone"
    if name in RECURRENT:
        return f"{said}, and none that is comes near: it has recurrent layers (docs/models.md lists all)"
    near = nearest(name, supported) if isinstance(name, str) else None
    if near is None:
        return f"{said}; docs/models.md lists all that are"
    return f"{said}; the nearest that is: {near} (docs/models.md lists all)"


def nearest(name: str, supported: Sequence[str]) -> str | None:
    """The supported model type that is nearest to this one; None if no name is near."""
    listed = (near for near, others in NEAREST.items() if name in others and near in supported)
    return next(listed, None) or next(iter(difflib.get_close_matches(name, supported, n=1, cutoff=0.7)), None)
