"""DoRA (Liu et al. 2024, arXiv:2402.09353): a weight's rows get learned magnitudes and a low-rank change of direction.

    h = m o (W0 x + s B A dropout(x)) / n + b        n = the norms of the rows of W0 + s B A, m starts as those of W0

n is a constant in the gradient (the paper's section 4.3). It is computed without the product B A, from low-rank
matrices:

    n^2 = |W0|^2 + 2 s <W0 A^T, B> + s^2 <B (A A^T), B>        each by row

Letters: r rank, N tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftlm.files.formats import full_tensor
from graftlm.methods.cost_model import ParameterGroup, linear_group
from graftlm.methods.lora import LoRA, LoRALinear
from graftlm.models import CausalLM, ModelConfig


class DoRALinear(LoRALinear):
    """A LoRALinear with a learned magnitude of each row of the weight, `magnitude` [out]."""

    magnitude: nn.Parameter

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, method: LoRA | None = None, rng: torch.Generator | None = None, **settings: Any
    ) -> "DoRALinear":
        """As LoRALinear's; the magnitudes start as the norms of the weight's rows."""
        new = super().from_linear(linear, method, rng, **settings)
        assert isinstance(new, DoRALinear)
        empty = torch.empty(linear.out_features, dtype=new.lora_A.dtype, device="meta")
        new.magnitude = nn.Parameter(empty if new.stored_weight.device.type == "meta" else new.weight_norm())
        return new

    @torch.no_grad()
    def weight_norm(self) -> Tensor:
        """n [out]: the norms of the rows of W0 + s B A, in float32 or wider."""
        a, b, s = self.lora_A, self.lora_B, self.scale
        w = full_tensor(self.base_weight).to(a.dtype)
        squares = w.square().sum(dim=1)
        squares += 2 * s * ((w @ a.T) * b).sum(dim=1)
        squares += s**2 * ((b @ (a @ a.T)) * b).sum(dim=1)
        return squares.sqrt_()

    def bias_before_norm(self, x: Tensor) -> None:
        """None: the bias is added after the rows are scaled."""

    def _post_process(self, y: Tensor) -> Tensor:
        """Scale the rows and add the bias."""
        y = y * (self.magnitude / self.weight_norm()).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def merged_weight(self) -> Tensor:
        """m o (W0 + s B A) / n."""
        return super().merged_weight().mul_((self.magnitude / self.weight_norm())[:, None])


@dataclass(frozen=True)
class DoRA(LoRA):
    """Low-rank changes of direction and learned magnitudes of the targeted linears' rows in every block."""

    rank: int = 16
    alpha: float = 64.0

    name: ClassVar[str] = "dora"
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"rank": 3, "alpha": 6.0, "dropout": 0.0},
        "q,v": {"rank": 2, "alpha": 5.0, "targets": ("q", "v"), "dropout": 0.0},
        "upper": {"rank": 3, "alpha": 6.0, "targets": ("k", "o", "up"), "dropout": 0.0, "layers": (1, 2)},
    }
    linear: ClassVar[type[LoRALinear]] = DoRALinear
    use_dora: ClassVar[bool] = True

    def init_from_base_weights(self, model: CausalLM) -> None:
        """Set the magnitudes to the norms of the base's rows; the update is zero."""
        for module in model.modules():
            if isinstance(module, DoRALinear):
                module.magnitude = nn.Parameter(module.weight_norm())

    def param_breakdown(self, config: ModelConfig) -> list[ParameterGroup]:
        """r (in + out) + out for each targeted linear, times the adapted layers."""
        layers = self.layer_range(config)
        magnitudes = [linear_group(config, role, layers, "magnitudes of rows", "L out") for role in self.targets]
        return [*super().param_breakdown(config), *(replace(part, added=True) for part in magnitudes)]
