"""Full fine-tuning: every weight is trained. The baseline all other methods are compared with."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from graftlm.methods.accounting import parameters
from graftlm.methods.base import Method, master_dtype
from graftlm.models.base import CausalLM, Shape


@dataclass(frozen=True)
class Full(Method):
    """Train all weights, kept in float32 and cast to the arithmetic's dtype in each forward."""

    name: ClassVar[str] = "full"
    default_lr: ClassVar[float] = 2e-5

    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Mark every parameter; the arithmetic's dtype stays what the base was loaded in."""
        model.compute_dtype = model.dtype
        for p in model.parameters():
            p.data = p.data.to(master_dtype(p.dtype))
            p.requires_grad_(True)

    def count(self, shape: Shape) -> int:
        """All parameters of the shape."""
        return parameters(shape)
