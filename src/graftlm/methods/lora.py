"""LoRA (Hu et al. 2021, arXiv:2106.09685): a frozen linear plus a trained product of two low-rank matrices.

    h = W0 x + (alpha / r) B A dropout(x)        A [r, in] kaiming-uniform, B [out, r] zero: it starts as the base

In evaluation the update is part of the weight (`MergeableLinear`). In training, all linears of the same x (q, k and v)
are one autograd function with a hand-written backward pass.

Letters: r rank, N tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.methods import base, peft_format
from graftlm.methods.base import MergeableLinear, Method, PeftFolder
from graftlm.methods.cost_model import ParameterGroup, linear_group
from graftlm.models import CausalLM, Linear, ModelConfig
from graftlm.models.fused_ops import TORCH, DropoutMask, ReferenceKernels
from graftlm.models.layers import Dropout, HasFusedOps, LowRankUpdate, draw_mask
from graftlm.models.packed import Weight, dense, linear


class LoRALinear(HasFusedOps, MergeableLinear):
    """A linear layer with a low-rank update; rank 0 is a plain linear.

    Args:
        in_features, out_features, bias: as in nn.Linear.
        rank: r, the number of rows of A and columns of B.
        alpha: the update is scaled by alpha / rank.
        lora_dropout: probability of dropout on the input of A.
        rslora: scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732).
    """

    def __init__(  # 7 parameters: nn.Linear's three, then those of the course's public class
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rank: int = 0,
        alpha: float = 1.0,
        lora_dropout: float = 0.0,
        rslora: bool = False,
    ) -> None:
        if rank < 0 or rank > in_features:
            raise InputError(f"rank {rank}: must be between 0 and the layer's width, {in_features}")
        self.rank = 0  # nn.Linear's constructor calls reset_parameters before A and B exist
        super().__init__(in_features, out_features, bias)
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.lora_drop = Dropout(lora_dropout)
        if rank:
            options = base.master_options(self.weight)
            self.lora_A = nn.Parameter(torch.empty(rank, in_features, **options))
            self.lora_B = nn.Parameter(torch.empty(out_features, rank, **options))
            self.reset_lora()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, method: "LoRA | None" = None, rng: torch.Generator | None = None, **settings: Any
    ) -> "LoRALinear":
        """A LoRALinear with a linear's weight and bias (no copy), which computes the same until it is trained.

        Args:
            linear: any nn.Linear.
            method, settings: rank, alpha, dropout and rslora, as a LoRA or by name, as in rank=8.
            rng: A is drawn from it on the CPU; None: from torch's own.
        """
        method = method or LoRA(**settings)
        sizes = (linear.in_features, linear.out_features, linear.bias is not None)
        with torch.device("meta"):  # no memory, no random numbers: every tensor is set below
            new = cls(*sizes, method.rank, method.alpha, method.dropout, method.rslora)
        if not isinstance(linear, Linear):  # of a module in use
            new.training = new.lora_drop.training = linear.training
        weight = linear.stored_weight if isinstance(linear, Linear) else linear.weight
        new.set_weight(weight)
        new.bias = linear.bias
        new.lora_A = base.kaiming_parameter(method.rank, linear.in_features, weight, rng)
        new.lora_B = nn.Parameter(torch.zeros(linear.out_features, method.rank, **base.master_options(weight)))
        return new

    def reset_parameters(self) -> None:
        """Draw the weight and A anew, set B to zero."""
        super().reset_parameters()
        if self.rank:
            self.reset_lora()

    def reset_lora(self) -> None:
        """A kaiming-uniform with a = sqrt(5), i.e. uniform within 1 / sqrt(in_features); B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r)."""
        return scale_of(self)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.forward_many([self], x)[0]

    @staticmethod
    def forward_many(linears: Sequence[Linear], x: Tensor) -> list[Tensor]:
        """Each linear of the same x: W_i x + (alpha_i / r_i) B_i A_i dropout(x); they share one dropout mask."""
        adapted = [m for m in linears if isinstance(m, LoRALinear) and m.rank and not m.merged]
        probabilities = {m.lora_drop.p if m.lora_drop.training else 0.0 for m in adapted}
        if len(probabilities) > 1:
            return [LoRALinear.forward_many([m], x)[0] for m in linears]
        mask = draw_mask(probabilities.pop()) if adapted else None
        frozen = not any(p.requires_grad for m in adapted for p in (m.weight, m.bias) if p is not None)
        # Under autocast, as in a loop of one's own, each operation has its own dtype.
        if adapted and frozen and all(m.fused for m in adapted) and not torch.is_autocast_enabled(x.device.type):
            ys = iter(fused_lora_forward(adapted, x, mask))
            return [m._post_process(next(ys)) if m in adapted else Linear.forward(m, x) for m in linears]
        dropped = x if mask is None else TORCH.apply_dropout_mask(x, mask) * mask.scale
        return [m._forward_reference(x, dropped) if m in adapted else Linear.forward(m, x) for m in linears]

    def _forward_reference(self, x: Tensor, dropped: Tensor) -> Tensor:
        """The same by autograd."""
        low_rank = F.linear(dropped, self.lora_A.to(x.dtype))
        # Scaling B costs out x r products, scaling the update would cost N x out.
        update = F.linear(low_rank, (self.lora_B * self.scale).to(x.dtype))
        return self._post_process(linear(x, self.stored_weight, self.bias_before_norm(x)) + update)

    def bias_before_norm(self, x: Tensor) -> Tensor | None:
        """The bias that is added to the products, in the dtype of x."""
        return None if self.bias is None else self.bias.to(x.dtype)

    def _post_process(self, y: Tensor) -> Tensor:
        """The output, from the sum of products and `bias_before_norm`; DoRA scales it."""
        return y

    def low_rank_updates(self) -> Sequence[LowRankUpdate] | None:
        """Its own, if it is not merged; DoRA's rows are scaled too."""
        if self.merged or not self.rank:
            return ()
        if type(self) is not LoRALinear:
            return None
        a, b = self.lora_A.detach()[None], (self.lora_B.detach() * self.scale)[None]
        return (LowRankUpdate(a, b, lambda rows: torch.zeros(rows, dtype=torch.long)),)

    def merged_tensors(self) -> dict[str, Tensor]:
        """The weight with its update."""
        return {"weight": self.merged_weight()} if self.rank else {}

    def merged_weight(self) -> Tensor:
        """W0 + s B A, in float32 or wider."""
        return (self.lora_B @ self.lora_A).mul_(self.scale).add_(self.base_weight)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}, merged={self.merged}"


def scale_of(lora: "LoRALinear | LoRA") -> float:
    """The factor of B A x."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank) if lora.rank else 0.0


def fused_lora_forward(adapted: list["LoRALinear"], x: Tensor, mask: DropoutMask | None) -> list[Tensor]:
    """W x + bias_before_norm + s B A D x for each of the linears, with the hand-written backward pass."""
    tensors = [t for m in adapted for t in (m.bias_before_norm(x), m.lora_A, m.lora_B)]
    fixed = _Fixed([m.stored_weight for m in adapted], [m.scale for m in adapted], mask, adapted[0].active_kernels)
    ys = _FusedLoRAFunction.apply(x.reshape(-1, x.shape[-1]), fixed, *tensors)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]


@dataclass(frozen=True)
class _Fixed:
    """What has no gradient. A weight is not a tensor if it is packed."""

    weights: list[Weight]
    scales: list[float]
    mask: DropoutMask | None
    kernels: ReferenceKernels


class _FusedLoRAFunction(torch.autograd.Function):
    """y_i = W_i x + b_i + s_i B_i A_i D x for several linears of the same x, W_i and b_i frozen; D is the dropout.

    With A the concatenation of all A_i, t = A D x split into t_i, and the gradient g_i of y_i:

        dB_i = s_i g_i^T t_i     dt_i = s_i g_i B_i     dA = dt^T (D x)     dx = sum_i g_i W_i + D (dt A)

    Autograd would save a mask and a D x for each linear, and add up six terms of dx one by one. D multiplies by 0 or by
    1 / (1 - p); the latter factor is applied to A, which is small.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, fixed: _Fixed, *tensors: Tensor) -> tuple[Tensor, ...]:
        mask, scales = fixed.mask, fixed.scales
        mask_scale = mask.scale if mask is not None else 1.0
        biases, a_s, b_s = (tensors[i::3] for i in range(3))
        a = torch.cat([t * mask_scale for t in a_s]).to(x.dtype)
        b_t = [(b * s).to(x.dtype) for b, s in zip(b_s, scales, strict=True)]
        dropped = x if mask is None else fixed.kernels.apply_dropout_mask(x, mask)
        low_rank = dropped @ a.T
        parts, ys = low_rank.split([len(t) for t in a_s], dim=-1), []
        for weight, bias, b, t in zip(fixed.weights, biases, b_t, parts, strict=True):
            ys.append(linear(x, weight, bias).addmm_(t, b.T))
        ctx.save_for_backward(dropped, low_rank, *a_s, *b_s)
        ctx.fixed, ctx.mask_scale = fixed, mask_scale
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *g_s: Tensor) -> tuple[Tensor | None, ...]:
        (dropped, low_rank, *tensors), fixed = ctx.saved_tensors, ctx.fixed
        n, mask, scales, dtype = len(fixed.scales), fixed.mask, fixed.scales, dropped.dtype
        a_s, b_s = tensors[:n], tensors[n:]
        parts = low_rank.split([len(a) for a in a_s], dim=-1)
        d_b = [(g.T @ t).to(b.dtype).mul_(s) for g, t, b, s in zip(g_s, parts, b_s, scales, strict=True)]
        d_low_rank = torch.cat([g @ (b * s).to(dtype) for g, b, s in zip(g_s, b_s, scales, strict=True)], dim=-1)
        d_a = (d_low_rank.T @ dropped).to(a_s[0].dtype).mul_(ctx.mask_scale).split([len(a) for a in a_s])
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = d_low_rank @ torch.cat([a * ctx.mask_scale for a in a_s]).to(dtype)
            d_x = d_x if mask is None else fixed.kernels.apply_dropout_mask(d_x, mask)
            for g, weight in zip(g_s, fixed.weights, strict=True):
                d_x.addmm_(g, dense(weight, dtype))
        return d_x, None, *(t for a, b in zip(d_a, d_b, strict=True) for t in (None, a, b))


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Freeze everything but the A and B of every LoRALinear."""
    base.freeze(model)
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
    rslora: bool = False
    plus_ratio: float = 1.0
    """Ratio of B's learning rate to A's (LoRA+, Hayou et al. 2024, arXiv:2402.12354, recommend 16)."""

    name: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    default_lr: ClassVar[float] = 2.5e-4
    flags: ClassVar[Mapping[str, str]] = {
        "rank": "rank",
        "alpha": "alpha",
        "targets": "targets",
        "lora_dropout": "dropout",
        "rslora": "rslora",
        "lora_plus_ratio": "plus_ratio",
    }
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"rank": 3, "alpha": 6.0, "dropout": 0.0},
        "q,v": {"rank": 2, "alpha": 5.0, "targets": ("q", "v"), "dropout": 0.0},
        "all": {"rank": 3, "alpha": 6.0, "targets": ("q", "k", "v", "o", "up", "down"), "dropout": 0.0},
        "upper": {"rank": 3, "alpha": 6.0, "dropout": 0.0, "layers": (1, 2)},
        "lower": {"rank": 3, "alpha": 6.0, "dropout": 0.0, "layers": (0, 1)},
        "rslora": {"rank": 3, "alpha": 3.0, "rslora": True, "dropout": 0.0},
        "lora+": {"rank": 3, "alpha": 6.0, "plus_ratio": 4.0, "dropout": 0.0},
    }
    linear: ClassVar[type[LoRALinear]] = LoRALinear
    use_dora: ClassVar[bool] = False
    """Whether each row of a weight has a learned magnitude (DoRA)."""

    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Adapt the targeted linears; an InputError names a rank above a layer's width or an unknown target."""

        def make(linear: Linear, name: str) -> LoRALinear:
            if self.rank > linear.in_features:
                raise InputError(f"--rank {self.rank}: above the width of {name}: choose at most {linear.in_features}")
            return self.linear.from_linear(linear, self, rng)

        base.freeze(model)
        base.replace_linears(model, self.targets, make, self.layer_range(model.config))

    def param_breakdown(self, config: ModelConfig) -> list[ParameterGroup]:
        """r (in + out) for each targeted linear, times the adapted layers."""
        layers, formula = self.layer_range(config), "L r (in + out)"
        parts = [linear_group(config, role, layers, "A and B", formula, r=self.rank) for role in self.targets]
        return [replace(part, added=True, weights=part.count) for part in parts]

    def lr_multiplier(self, name: str) -> float:
        """LoRA+: B learns faster than A."""
        return self.plus_ratio if name.endswith("lora_B") else 1.0

    def describe_scale(self, model: CausalLM, lr: float) -> str:
        """The combined effect of alpha, rank and lr on one step.

        Adam moves each element of B by about lr, so a first step moves W by (alpha / r) dB A: a sum of r terms of
        size lr and random sign, each times an element of A, whose root mean square is 1 / sqrt(3 d).
        """
        linears = [m for m in model.modules() if isinstance(m, LoRALinear)]
        d, scale = linears[0].in_features, linears[0].scale
        step = scale * lr * self.plus_ratio * math.sqrt(self.rank / (3 * d))
        size = math.sqrt(sum(m.base_weight.float().square().mean().item() for m in linears) / len(linears))
        name = "alpha/sqrt(r)" if self.rslora else "alpha/r"
        return (
            f"{name} = {scale:g}: a first step at the full lr moves an adapted weight "
            f"by about {step / size:.2%} of its size; if the loss rises, lower lr or alpha (their product counts)"
        )

    def to_peft(self, model: CausalLM) -> PeftFolder:
        """PEFT's LORA; where the checkpoint format fuses q, k and v, one module (`peft_format.py`)."""
        return peft_format.to_peft(self, model)

    def from_peft(self, config: ModelConfig, folder: PeftFolder, where: str) -> dict[str, Tensor]:
        """The inverse."""
        return peft_format.from_peft(self, config, folder, where)

    @classmethod
    def from_foreign_peft(
        cls, config: ModelConfig, folder: PeftFolder, where: str
    ) -> tuple[Method, dict[str, Tensor]] | None:
        """Any LORA folder of PEFT; with use_dora it is DoRA's."""
        if folder[0].get("peft_type") != cls.peft_type or bool(folder[0].get("use_dora")) != cls.use_dora:
            return None
        return peft_format.from_foreign_peft(cls, config, folder, where)
