"""Full fine-tuning: every weight is trained. The baseline of all other methods.

With a range of layers only their blocks are trained, and the final norm if the last block is one of them; never the
embedding, which is below all blocks (and, if tied, is the head too).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from graftlm.methods.base import Method, block_modules, freeze, master_dtype
from graftlm.methods.cost_model import ParameterGroup, block_parts, model_parts
from graftlm.models.base import CausalLM
from graftlm.models.config import ModelConfig


@dataclass(frozen=True)
class Full(Method):
    """Train all weights, or those of some layers, kept in float32 and cast to the base's dtype in each forward."""

    name: ClassVar[str] = "full"
    default_lr: ClassVar[float] = 2e-5
    is_full_finetune: ClassVar[bool] = True
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {"": {}, "upper": {"layers": (1, 2)}}

    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Train every parameter of the layers in float32; the dtype of the computation stays the loaded base's."""
        model.compute_dtype = model.dtype
        freeze(model)
        for module in block_modules(model, self.layer_range(model.config)) if self.layers else [model]:
            for p in module.parameters():
                p.data = p.data.to(master_dtype(p.dtype))
                p.requires_grad_(True)

    def param_breakdown(self, config: ModelConfig) -> list[ParameterGroup]:
        """All parameters of the model, or those of the layers' blocks."""
        return block_parts(config, self.layer_range(config)) if self.layers else model_parts(config)
