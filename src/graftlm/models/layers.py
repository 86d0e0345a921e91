"""The small layers: a linear that computes in its input's dtype, two norms, dropout, rotary positions.

What is unusual here: *weights follow the activations*. Trained weights are stored in float32 and frozen ones in the
base's dtype; each forward casts the weight to the dtype of its input (no copy where they are the same already).

Letters: N tokens, d width, H heads, D width of a head.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.models import fused_ops
from graftlm.models.fused_ops import TORCH, DropoutMask, ReferenceKernels


class Linear(nn.Linear):
    """y = x W^T + b in the dtype of x, whatever the dtype W is stored in."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @staticmethod
    def forward_many(linears: "Sequence[Linear]", x: Tensor) -> list[Tensor]:
        """Each linear of the same x. A method whose linears can share work does so in its own subclass."""
        return [linear(x) for linear in linears]


def apply_linears(x: Tensor, *linears: Linear) -> list[Tensor]:
    """What `linears` make of the same x, by the rule of the first that is not plain."""
    kind = next((type(linear) for linear in linears if type(linear) is not Linear), Linear)
    return kind.forward_many(linears, x)


class Embedding(nn.Embedding):
    """Rows of a table, in a stated dtype."""

    def embed_in_dtype(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """[...] int64 -> [..., d]."""
        return F.embedding(ids, self.weight).to(dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016) in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class HasFusedOps(nn.Module):
    """A module that has gradients written out by hand; `CausalLM.use_fused_ops` and `set_kernels` reach all of them."""

    fused = True
    """Whether they are used, or autograd's own."""
    kernels: ReferenceKernels = TORCH
    """What they are computed with in training."""

    @property
    def active_kernels(self) -> ReferenceKernels:
        """In evaluation torch's: scores do not depend on how a model was trained."""
        return self.kernels if self.training else TORCH


class RMSNorm(HasFusedOps):
    """Root-mean-square normalisation (Zhang & Sennrich 2019): w * x / sqrt(mean(x^2) + eps)."""

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]. The statistics are float32 (float64 for float64 inputs)."""
        if self.fused:
            return fused_ops.RMSNorm.apply(x, self.weight.to(x.dtype), self.eps, self.active_kernels)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        n = exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + self.eps)
        return n.to(x.dtype) * self.weight.to(x.dtype)


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014): each element is zero with probability p, the others are scaled by 1/(1-p)."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; the identity in evaluation and at p = 0."""
        if not self.training or self.p == 0:
            return x
        return dropout(x, self.p)


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout of x with probability p, rounded to a multiple of 2^-16 on a CPU."""
    if x.device.type != "cpu":
        return F.dropout(x, p)
    mask = draw_mask(p)
    return x if mask is None else x * mask.keep_mask(x).to(x.dtype).mul_(mask.scale)


def draw_mask(p: float) -> DropoutMask | None:
    """A mask that drops with probability p, seeded from torch's generator; None: keeps all."""
    below = round(p * 65536)
    return DropoutMask(int(torch.randint(-(2**62), 2**62, ())), below) if below else None


def rope_cos_sin(positions: Tensor, inverse_frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency: [...] and [D/2] -> two tensors [..., D/2] (Su et al. 2021)."""
    angles = positions.to(torch.float32)[..., None] * inverse_frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary_emb(
    x: Tensor, cos: Tensor, sin: Tensor, fused: bool = True, kernels: ReferenceKernels = TORCH
) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of each head by their position's angles.

    x [B, T, H, D]; cos, sin [T, D/2] or [B, T, D/2]. Or x [N, H, D] and cos, sin [N, D/2].
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if fused:
        return fused_ops.ApplyRoPE.apply(x, cos, sin, kernels)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
