"""The small layers: a linear that computes in its input's dtype, two norms, dropout, rotary positions.

What is unusual here: *weights follow the activations*. Trained weights are stored in float32 and frozen ones in the
base's dtype; each forward casts the weight to the dtype of its input (no copy where they are the same already).

Letters: N tokens, d width, H heads, D width of a head.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.models import gradients


class Linear(nn.Linear):
    """y = x W^T + b in the dtype of x, whatever the dtype W is stored in."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @staticmethod
    def together(linears: "Sequence[Linear]", x: Tensor) -> list[Tensor]:
        """Each linear of the same x. A method whose linears can share work does so in its own subclass."""
        return [linear(x) for linear in linears]


def project(x: Tensor, *linears: Linear) -> list[Tensor]:
    """What `linears` make of the same x, by the rule of the first that is not plain."""
    kind = next((type(linear) for linear in linears if type(linear) is not Linear), Linear)
    return kind.together(linears, x)


class Embedding(nn.Embedding):
    """Rows of a table, in a stated dtype."""

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """[...] int64 -> [..., d]."""
        return F.embedding(ids, self.weight).to(dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016) in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang & Sennrich 2019): w * x / sqrt(mean(x^2) + eps)."""

    fused = True

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]. The statistics are float32 (float64 for float64 inputs)."""
        if self.fused:
            return gradients.RMSNorm.apply(x, self.weight.to(x.dtype), self.eps)
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
    kept, scale = keep_mask(x, p)
    return x if kept is None else x * kept.to(x.dtype).mul_(scale)


def keep_mask(x: Tensor, p: float) -> tuple[Tensor | None, float]:
    """Which elements of x dropout keeps (bool; None: all), and what it multiplies them by.

    PyTorch's CPU kernel draws a 64-bit number for each element, one after the other, which takes long; on a CPU
    each draw of 64 bits serves four elements here, and p is rounded to a multiple of 2^-16.
    """
    if x.device.type != "cpu":
        return (torch.rand(x.shape, device=x.device) >= p, 1 / (1 - p)) if p else (None, 1.0)
    drop_below = round(p * 65536)
    if drop_below == 0:
        return None, 1.0
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= drop_below - 32768
    return kept, 65536 / (65536 - drop_below)


def rope_table(positions: Tensor, inverse_frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency: [...] and [D/2] -> two tensors [..., D/2] (Su et al. 2021)."""
    angles = positions.to(torch.float32)[..., None] * inverse_frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, fused: bool = True) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of each head by their position's angles.

    x [B, T, H, D]; cos, sin [T, D/2] or [B, T, D/2]. Or x [N, H, D] and cos, sin [N, D/2].
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if fused:
        return gradients.Rotate.apply(x, cos, sin)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
