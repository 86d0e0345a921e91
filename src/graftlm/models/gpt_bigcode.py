"""GPT-BigCode (StarCoder, Li et al. 2023, arXiv:2305.06161): GPT-2 with one head of keys and values for all queries."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graftlm.models.config import ModelConfig
from graftlm.models.gpt2 import FAMILY as GPT_2
from graftlm.models.gpt2 import read as read_gpt2
from graftlm.models.settings import Settings


def read(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The model that a GPT-BigCode's config.json describes."""
    Settings(config, where).require(multi_query=(True,))  # without, q, k and v are fused head by head
    return replace(read_gpt2(config, where), family="gpt_bigcode", num_kv_heads=1)


FAMILY = replace(GPT_2, name="gpt_bigcode", model_types=("gpt_bigcode",), read=read, transposed=False)
