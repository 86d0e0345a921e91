"""DoRA (Liu et al. 2024, arXiv:2402.09353): a weight's rows get learned lengths and a low-rank change of direction.

    h = m o (W0 x + s B A dropout(x)) / n + b        n = the lengths of the rows of W0 + s B A, m starts as those of W0

n is treated as a constant in the gradient (the paper's section 4.3). What is unusual here: the rows' lengths are found
without ever making the product B A, from thin matrices:

    n^2 = |W0|^2 + 2 s <W0 A^T, B> + s^2 <B (A A^T), B>        each by row

Letters: r rank, N tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from graftlm.files.sharded import full_tensor
from graftlm.methods.cost_model import ParameterGroup, format_formula, linear_size
from graftlm.methods.lora import LoRA, LoRALinear
from graftlm.models import CausalLM, Linear, ModelConfig


class DoRALinear(LoRALinear):
    """A LoRALinear whose rows have learned lengths, `magnitude` [out]."""

    magnitude: nn.Parameter

    @classmethod
    def from_linear(
        cls,
        linear: Linear,
        rank: int,
        alpha: float,
        lora_dropout: float,
        rng: torch.Generator,
        rslora: bool = False,
    ) -> "DoRALinear":
        """As LoRALinear's; the lengths start as those of the linear's rows."""
        new = super().from_linear(linear, rank, alpha, lora_dropout, rng, rslora)
        assert isinstance(new, DoRALinear)
        unread = torch.empty(linear.out_features, dtype=new.lora_A.dtype, device="meta")
        new.magnitude = nn.Parameter(unread if linear.weight.device.type == "meta" else new.weight_norm())
        return new

    @torch.no_grad()
    def weight_norm(self) -> Tensor:
        """n [out]: the lengths of the rows of W0 + s B A, in float32 or wider."""
        a, b, s = self.lora_A, self.lora_B, self.scale
        w = full_tensor(self.base_weight).to(a.dtype)
        squares = w.square().sum(dim=1)
        squares += 2 * s * ((w @ a.T) * b).sum(dim=1)
        squares += s**2 * ((b @ (a @ a.T)) * b).sum(dim=1)
        return squares.sqrt_()

    def bias_before_norm(self, x: Tensor) -> None:
        """The bias is added behind the lengths."""

    def _post_process(self, y: Tensor) -> Tensor:
        """Give the rows their lengths, and add the bias."""
        y = y * (self.magnitude / self.weight_norm()).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def merged_weight(self) -> Tensor:
        """The same with the rows' learned lengths."""
        return super().merged_weight().mul_((self.magnitude / self.weight_norm())[:, None])


@dataclass(frozen=True)
class DoRA(LoRA):
    """Low-rank changes of direction and free lengths for the rows of the targeted linears in every block."""

    rank: int = 16
    alpha: float = 64.0

    name: ClassVar[str] = "dora"
    linear: ClassVar[type[LoRALinear]] = DoRALinear
    use_dora: ClassVar[bool] = True

    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """As LoRA's, and the lengths are trained too."""
        super().install(model, rng)
        for module in model.modules():
            if isinstance(module, DoRALinear):
                module.magnitude.requires_grad_(True)

    def init_from_base_weights(self, model: CausalLM) -> None:
        """The lengths start as those of the base's rows, and of an update that is zero."""
        for module in model.modules():
            if isinstance(module, DoRALinear):
                module.magnitude = nn.Parameter(module.weight_norm())

    def param_breakdown(self, shape: ModelConfig) -> list[ParameterGroup]:
        """r (in + out) + out for each targeted linear, times the adapted layers."""
        parts, layers = super().param_breakdown(shape), len(self.layer_range(shape))
        for role in self.targets:
            out = linear_size(shape, role)[1]
            formula = format_formula("L out", L=layers, out=out)
            parts.append(ParameterGroup(f"{role}, lengths of rows", layers * out, formula, role, added=True))
        return parts
