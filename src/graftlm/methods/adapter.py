"""Bottleneck adapters (Houlsby et al. 2019, arXiv:1902.00751): small networks between the layers of a frozen model.

    adapter(a) = a + V_up gelu(V_down a + v_down) + v_up        V_down [r, d], V_up [d, r]; V_up and v_up start at zero

One follows the attention's output projection and one the MLP, each before the residual is added; Pfeiffer's placement
(Pfeiffer et al. 2021, arXiv:2005.00247) has only the latter. It starts as exactly the identity, and, being nonlinear,
cannot be merged into a weight.

Letters: r rank, d hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.errors import InputError, unknown_name_error
from graftlm.methods.base import AdaptedLinear, Method, freeze, kaiming_parameter, master_options, replace_linears
from graftlm.methods.cost_model import ParameterGroup, linear_group
from graftlm.models import CausalLM, Linear, ModelConfig

PLACEMENTS = {"houlsby": ("o", "down"), "pfeiffer": ("down",)}


class BottleneckLinear(AdaptedLinear):
    """A frozen linear followed by an adapter."""

    def __init__(self, linear: Linear, rank: int, rng: torch.Generator) -> None:
        super().__init__(linear)
        d, options = linear.out_features, master_options(linear.stored_weight)
        self.adapter_down = kaiming_parameter(rank, d, linear.stored_weight, rng)
        self.adapter_down_bias = nn.Parameter(torch.zeros(rank, **options))
        self.adapter_up = nn.Parameter(torch.zeros(d, rank, **options))
        self.adapter_up_bias = nn.Parameter(torch.zeros(d, **options))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        a = super().forward(x)
        hidden = F.gelu(F.linear(a, self.adapter_down.to(a.dtype), self.adapter_down_bias.to(a.dtype)))
        return a + F.linear(hidden, self.adapter_up.to(a.dtype), self.adapter_up_bias.to(a.dtype))


@dataclass(frozen=True)
class Adapter(Method):
    """A bottleneck after the attention and after the MLP of every block, or after the MLP only."""

    rank: int = 64
    placement: str = "houlsby"

    name: ClassVar[str] = "adapter"
    default_lr: ClassVar[float] = 5e-4
    flags: ClassVar[Mapping[str, str]] = {"rank": "rank", "adapter_placement": "placement"}
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"rank": 3},
        "pfeiffer": {"rank": 2, "placement": "pfeiffer"},
        "upper": {"rank": 2, "layers": (1, 2)},
    }
    mergeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise unknown_name_error("--adapter_placement", self.placement, PLACEMENTS)
        if self.rank < 1:
            raise InputError(f"--rank {self.rank}: an adapter's bottleneck has 1 or more units")

    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Add an adapter to o and down, or to down only, in the layers' blocks."""
        freeze(model)
        targets, layers = PLACEMENTS[self.placement], self.layer_range(model.config)
        if lacking := [role for role in targets if model.config.layers_with(role, layers) != list(layers)]:
            raise InputError(
                f"--method adapter: not every layer of this {model.config.family} model has {lacking[0]}, which an "
                "adapter follows: use --method lora"
            )
        replace_linears(model, targets, lambda linear, _: BottleneckLinear(linear, self.rank, rng), layers)

    def param_breakdown(self, config: ModelConfig) -> list[ParameterGroup]:
        """2 d r + r + d for each adapter."""
        layers, d, r = self.layer_range(config), config.hidden_size, self.rank
        formula, roles = "L (2 d r + r + d)", PLACEMENTS[self.placement]
        parts = [linear_group(config, role, layers, "adapter", formula, d=d, r=r) for role in roles]
        return [replace(part, added=True, weights=len(layers) * 2 * d * r) for part in parts]
