"""Language models from scratch; `decoder.py` is the block of all families, `attention.py` where to start reading."""

import torch

from graftlm.models.attention import KVCache
from graftlm.models.base import CausalLM
from graftlm.models.config import FAMILIES, ModelConfig
from graftlm.models.gpt2 import FAMILY as GPT2
from graftlm.models.layers import Linear
from graftlm.models.llama import FAMILY as LLAMA
from graftlm.models.neox import FAMILY as NEOX

__all__ = ["CausalLM", "KVCache", "Linear", "ModelConfig", "build", "clone_with_shared_weights", "random_model"]


FAMILIES.update({family.name: family for family in (GPT2, LLAMA, NEOX)})


def build(config: ModelConfig) -> CausalLM:
    """A model on the current default device, its weights not yet meaningful."""
    return CausalLM(config)


def clone_with_shared_weights(base: CausalLM) -> CausalLM:
    """New modules around the same tensors as `base`, frozen, in evaluation mode."""
    with torch.device("meta"):
        model = build(base.config)
    for name, p in base.named_parameters():
        module, attribute = name.rsplit(".", 1)
        setattr(model.get_submodule(module), attribute, torch.nn.Parameter(p.data, requires_grad=False))
    return model.eval()


def random_model(config: ModelConfig, seed: int = 0, std: float = 0.02, dtype: torch.dtype = torch.float32) -> CausalLM:
    """A model with random weights: matrices normal(0, std), norms near one, biases small; for tests and examples."""
    rng = torch.Generator().manual_seed(seed)
    model = build(config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            is_gain = "norm" in name and name.endswith("weight")
            p.copy_(1 + 0.1 * draw if is_gain else std * draw)
    return model.eval()
