"""GPT-2 and the Llama family from scratch; `attention.py` is where to start reading."""

import torch

from graftlm.models.attention import Segment
from graftlm.models.base import CausalLM, Shape
from graftlm.models.gpt2 import GPT2
from graftlm.models.layers import Linear
from graftlm.models.llama import Llama

__all__ = ["CausalLM", "Linear", "Segment", "Shape", "build", "random_model", "sharing"]


def build(shape: Shape) -> CausalLM:
    """A model of this shape on the current default device, its weights not yet meaningful."""
    return GPT2(shape) if shape.family == "gpt2" else Llama(shape)


def sharing(base: CausalLM) -> CausalLM:
    """A model of its own modules that has the very tensors of `base`, with nothing trained, in evaluation mode."""
    with torch.device("meta"):
        model = build(base.shape)
    for name, p in base.named_parameters():
        module, attribute = name.rsplit(".", 1)
        setattr(model.get_submodule(module), attribute, torch.nn.Parameter(p.data, requires_grad=False))
    return model.eval()


def random_model(shape: Shape, seed: int = 0, std: float = 0.02, dtype: torch.dtype = torch.float32) -> CausalLM:
    """A model with random weights: matrices normal(0, std), norms near one, biases small; for tests and examples."""
    rng = torch.Generator().manual_seed(seed)
    model = build(shape).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            is_gain = "norm" in name and name.endswith("weight")
            p.copy_(1 + 0.1 * draw if is_gain else std * draw)
    return model.eval()
