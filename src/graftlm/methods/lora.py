"""LoRA (Hu et al. 2021, arXiv:2106.09685): the update of a frozen weight is learned as a product of two thin matrices.

    h = W0 x + (alpha / r) B A dropout(x)        A [r, in] kaiming-uniform, B [out, r] zero: the start is the base

What is unusual here: merging happens by itself. `train(False)`, and so `eval()`, folds the update into the weight;
`train(True)` puts the pristine weight back, bit for bit, because it was kept aside and not computed back.

Letters: r rank, N tokens.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.methods.accounting import linear_size
from graftlm.methods.base import Method, freeze, master_dtype, replace_linears
from graftlm.models import CausalLM, Linear, Shape
from graftlm.models.layers import Dropout


class LoRALinear(Linear):
    """A linear layer with a low-rank update; rank 0 is a plain linear.

    Args:
        in_features, out_features, bias: as in nn.Linear.
        rank: r, the width of the update.
        alpha: the update is scaled by alpha / rank.
        lora_dropout: dropout on the input of A, a probability.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rank: int = 0,
        alpha: float = 1.0,
        lora_dropout: float = 0.0,
    ) -> None:
        if rank < 0 or rank > in_features:
            raise InputError(f"rank {rank}: must be between 0 and the layer's width, {in_features}")
        self.rank = 0  # nn.Linear's constructor calls reset_parameters before A and B exist
        super().__init__(in_features, out_features, bias)
        self.rank, self.alpha = rank, alpha
        self.lora_drop = Dropout(lora_dropout)
        self._pristine: Tensor | None = None
        if rank:
            master = master_dtype(self.weight.dtype)
            self.lora_A = nn.Parameter(torch.empty(rank, in_features, dtype=master, device=self.weight.device))
            self.lora_B = nn.Parameter(torch.empty(out_features, rank, dtype=master, device=self.weight.device))
            self.reset_lora()

    @classmethod
    def around(cls, linear: Linear, rank: int, alpha: float, lora_dropout: float, rng: torch.Generator) -> "LoRALinear":
        """A LoRALinear that takes over this linear's weight and bias (no copy); A is drawn from `rng` on the CPU."""
        with torch.device("meta"):  # no memory, no random numbers: every tensor is given below
            new = cls(linear.in_features, linear.out_features, linear.bias is not None, rank, alpha, lora_dropout)
        new.weight, new.bias = linear.weight, linear.bias
        master, device = master_dtype(linear.weight.dtype), linear.weight.device
        a = torch.empty(rank, linear.in_features, dtype=master)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=rng)
        new.lora_A = nn.Parameter(a.to(device))
        new.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=master, device=device))
        return new

    def reset_parameters(self) -> None:
        """Draw the weight and A anew, set B to zero."""
        super().reset_parameters()
        if self.rank:
            self.reset_lora()

    def reset_lora(self) -> None:
        """A kaiming-uniform with a = sqrt(5), that is uniform within 1 / sqrt(in_features); B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank if self.rank else 0.0

    @property
    def merged(self) -> bool:
        """Whether the weight holds the update at the moment."""
        return self._pristine is not None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        y = super().forward(x)
        if not self.rank or self.merged:
            return y
        thin = F.linear(self.lora_drop(x), self.lora_A.to(x.dtype))
        # Scaling B costs out x r products, scaling the update would cost N x out.
        return y + F.linear(thin, (self.lora_B * self.scale).to(x.dtype))

    def train(self, mode: bool = True) -> "LoRALinear":
        """Unmerge for training, merge for evaluation; either may be repeated without effect."""
        super().train(mode)
        if mode:
            self.unmerge()
        else:
            self.merge()
        return self

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into the weight, computed in float32 (or wider); nothing happens if it is folded already."""
        if not self.rank or self.merged:
            return
        self._pristine = self.weight.data
        update = (self.lora_B @ self.lora_A).mul_(self.scale)
        self.weight.data = update.add_(self._pristine).to(self._pristine.dtype)

    def unmerge(self) -> None:
        """Put the pristine weight back."""
        if self._pristine is not None:
            self.weight.data = self._pristine
            self._pristine = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # A merged weight saved beside A and B would be adapted twice when it is loaded.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._pristine is not None:
            destination[prefix + "weight"] = self._pristine

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)
        if merged:
            self.merge()

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}, merged={self.merged}"


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Freeze everything but the A and B of every LoRALinear."""
    freeze(model)
    for module in model.modules():
        if isinstance(module, LoRALinear) and module.rank:
            module.lora_A.requires_grad_(True)
            module.lora_B.requires_grad_(True)


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank updates of the targeted linears in every block."""

    rank: int = 128
    alpha: float = 512.0
    targets: tuple[str, ...] = ("q", "k", "v")
    dropout: float = 0.05

    name: ClassVar[str] = "lora"
    default_lr: ClassVar[float] = 2.5e-4

    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Wrap the targeted linears; an InputError names a rank above a layer's width or an unknown target."""

        def wrap(linear: Linear, name: str) -> LoRALinear:
            if self.rank > linear.in_features:
                raise InputError(f"--rank {self.rank}: above the width of {name}: choose at most {linear.in_features}")
            return LoRALinear.around(linear, self.rank, self.alpha, self.dropout, rng)

        replace_linears(model, self.targets, wrap)
        mark_only_lora_as_trainable(model)

    def count(self, shape: Shape) -> int:
        """r (in + out) for each targeted linear, times the layers."""
        return shape.layers * sum(self.rank * sum(linear_size(shape, role)) for role in self.targets)

    def explain(self, model: CausalLM, lr: float) -> str:
        """What alpha, rank and lr together make of one step.

        Adam moves each element of B by about lr, so a first step moves W by (alpha / r) dB A: a sum of r terms of
        size lr and random sign, each times an element of A, whose root mean square is 1 / sqrt(3 d).
        """
        linears = [m for m in model.modules() if isinstance(m, LoRALinear)]
        d = linears[0].in_features
        step = self.alpha * lr / math.sqrt(3 * d * self.rank)
        size = math.sqrt(sum(m.weight.float().square().mean().item() for m in linears) / len(linears))
        return (
            f"effective scale: alpha/r = {self.alpha / self.rank:g}; one step at the full lr moves an adapted weight "
            f"by about alpha*lr/sqrt(3*d*r) = {step:.1e}, {step / size:.2%} of its size; "
            "alpha and lr count as their product"
        )
