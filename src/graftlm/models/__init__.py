"""Language models from scratch; `base.py` is where to start reading, `decoder.py` the block of all families."""

from importlib import import_module

from graftlm.models.base import CausalLM, clone_with_shared_weights
from graftlm.models.config import FAMILIES, ModelConfig
from graftlm.models.layers import KVCache, Linear

__all__ = ["CausalLM", "KVCache", "Linear", "ModelConfig", "clone_with_shared_weights"]

FAMILY_FILES = (
    "cohere",
    "ernie",
    "exaone4",
    "gemma",
    "gemma2",
    "glm",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_oss",
    "gptj",
    "granite",
    "lfm2",
    "helium",
    "llama",
    "neox",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
)
"""The files that have a `FAMILY`."""

for _name in FAMILY_FILES:
    _family = import_module(f"{__name__}.{_name}").FAMILY
    FAMILIES[_family.name] = _family
