"""Configurations of the models that have a short name, so that their costs can be computed without their files.

Each is what its config.json says, less the settings that have their default. The tests compare them with the models'
own config.json.
"""

from typing import Any

from graftlm.models.config import read_model_config


def _gpt2(layers: int, heads: int, d: int) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_layer": layers, "n_head": heads, "n_embd": d, "vocab_size": 50257}


def _llama(layers: int, heads: int, kv_heads: int, d: int, intermediate: int, **others: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    widths = {"hidden_size": d, "intermediate_size": intermediate}
    return {"model_type": "llama", "rms_norm_eps": 1e-5, **sizes, **widths, **others}


LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
SMOLLM_2 = {"vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000, "tie_word_embeddings": True}
CONFIGS = {
    "smollm2-135m": _llama(30, 9, 3, 576, 1536, **SMOLLM_2),
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    "distilgpt2": _gpt2(6, 12, 768),
    "meta-llama/Llama-2-7b-hf": _llama(32, 32, 32, 4096, 11008, **LLAMA_2),
    "meta-llama/Llama-2-70b-hf": _llama(80, 64, 8, 8192, 28672, **LLAMA_2),
}
SHAPES = {name: read_model_config(config, name) for name, config in CONFIGS.items()}
