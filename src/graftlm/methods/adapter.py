"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751): small networks between the layers of a frozen model.

    adapter(a) = a + V_up gelu(V_down a + v_down) + v_up        V_down [r, d], V_up [d, r]; V_up and v_up start at zero

It stands behind the attention's output projection and behind the MLP, each before the residual is added; Pfeiffer's
placement (Pfeiffer et al. 2021, arXiv:2005.00247) has the one behind the MLP only. It starts as exactly the identity,
and, being nonlinear, cannot be merged into a weight.

Letters: r rank, d model width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.errors import InputError, unknown_name_error
from graftlm.methods.base import Method, freeze, master_dtype, replace_linears, target_device
from graftlm.methods.cost_model import ParameterGroup, format_formula
from graftlm.models import CausalLM, Linear, ModelConfig

PLACEMENTS = {"houlsby": ("o", "down"), "pfeiffer": ("down",)}


class BottleneckLinear(Linear):
    """A frozen linear with an adapter behind it."""

    def __init__(self, linear: Linear, rank: int, rng: torch.Generator) -> None:
        with torch.device("meta"):  # no memory, no random numbers: every tensor is given below
            super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        d, master, device = linear.out_features, master_dtype(linear.weight.dtype), target_device(linear.weight)
        down = torch.empty(rank, d, dtype=master)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=rng)
        self.adapter_down = nn.Parameter(down.to(device))
        self.adapter_down_bias = nn.Parameter(torch.zeros(rank, dtype=master, device=device))
        self.adapter_up = nn.Parameter(torch.zeros(d, rank, dtype=master, device=device))
        self.adapter_up_bias = nn.Parameter(torch.zeros(d, dtype=master, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        a = super().forward(x)
        down, v_down, up, v_up = (
            t.to(a.dtype) for t in (self.adapter_down, self.adapter_down_bias, self.adapter_up, self.adapter_up_bias)
        )
        return a + F.linear(F.gelu(F.linear(a, down, v_down)), up, v_up)

    @staticmethod
    def adapter_parameters(module: "BottleneckLinear") -> list[nn.Parameter]:
        """What is trained."""
        return [module.adapter_down, module.adapter_down_bias, module.adapter_up, module.adapter_up_bias]


@dataclass(frozen=True)
class Adapter(Method):
    """A bottleneck behind the attention and behind the MLP of every block, or behind the MLP only."""

    rank: int = 64
    placement: str = "houlsby"

    name: ClassVar[str] = "adapter"
    default_lr: ClassVar[float] = 5e-4
    flags: ClassVar[Mapping[str, str]] = {"rank": "rank", "adapter_placement": "placement"}
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise unknown_name_error("--adapter_placement", self.placement, PLACEMENTS)
        if self.rank < 1:
            raise InputError(f"--rank {self.rank}: an adapter's bottleneck has 1 or more units")

    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Put an adapter behind o and down, or behind down only, in the span's blocks."""
        made: list[BottleneckLinear] = []

        def wrap(linear: Linear, name: str) -> BottleneckLinear:
            made.append(BottleneckLinear(linear, self.rank, rng))
            return made[-1]

        replace_linears(model, PLACEMENTS[self.placement], wrap, self.layer_range(model.config))
        freeze(model)
        for p in (p for module in made for p in BottleneckLinear.adapter_parameters(module)):
            p.requires_grad_(True)

    def param_breakdown(self, shape: ModelConfig) -> list[ParameterGroup]:
        """2 d r + r + d for each adapter."""
        layers, d, r = len(self.layer_range(shape)), shape.hidden_size, self.rank
        count, formula = layers * (2 * d * r + r + d), format_formula("L (2 d r + r + d)", L=layers, d=d, r=r)
        return [
            ParameterGroup(f"{role}, adapter", count, formula, role, added=True, weights=layers * 2 * d * r)
            for role in PLACEMENTS[self.placement]
        ]
