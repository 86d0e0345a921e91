"""Language models from scratch; `base.py` is where to start reading, `decoder.py` the block of all families."""

from graftlm.models.base import CausalLM, clone_with_shared_weights
from graftlm.models.config import FAMILIES, ModelConfig
from graftlm.models.gpt2 import FAMILY as GPT2
from graftlm.models.layers import KVCache, Linear
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.neox import FAMILY as NEOX

__all__ = ["CausalLM", "KVCache", "Linear", "ModelConfig", "clone_with_shared_weights"]

for _family in (GPT2, LLAMA, NEOX):
    FAMILIES[_family.name] = _family
