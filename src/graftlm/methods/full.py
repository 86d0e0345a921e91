"""Full fine-tuning: every weight is trained. The baseline all other methods are compared with.

With a span of layers only their blocks are, and the final norm if the span reaches the last one; never the embedding,
which stands below everything (and is the head, where it is tied).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from graftlm.methods.base import Method, freeze, master_dtype
from graftlm.methods.cost_model import ParameterGroup, block_parts, model_parts
from graftlm.models.base import CausalLM
from graftlm.models.config import ModelConfig


@dataclass(frozen=True)
class Full(Method):
    """Train all weights or a span's, kept in float32 and cast to the arithmetic's dtype in each forward."""

    name: ClassVar[str] = "full"
    default_lr: ClassVar[float] = 2e-5
    is_full_finetune: ClassVar[bool] = True

    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Mark every parameter of the span; the arithmetic's dtype stays what the base was loaded in."""
        model.compute_dtype = model.dtype
        trained: list[nn.Module] = [model]
        if self.layers:
            freeze(model)
            trained = [model.blocks[i] for i in self.layer_range(model.config)]
            trained += [model.norm] if self.layers[1] == model.config.num_layers else []
        for p in (p for module in trained for p in module.parameters()):
            p.data = p.data.to(master_dtype(p.dtype))
            p.requires_grad_(True)

    def param_breakdown(self, shape: ModelConfig) -> list[ParameterGroup]:
        """All parameters of the shape, or those of the span's blocks."""
        if not self.layers:
            return model_parts(shape)
        return block_parts(shape, len(self.layer_range(shape)), self.layers[1] == shape.num_layers)
