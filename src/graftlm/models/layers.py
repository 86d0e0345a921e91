"""The small layers: a linear that computes in its input's dtype, two norms, dropout, rotary positions.

What is unusual here: *weights follow the activations*. Trained weights are stored in float32 and frozen ones in the
base's dtype; each forward casts the weight to the dtype of its input (no copy where they are the same already).

Letters: N tokens, d width, H heads, D width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """y = x W^T + b in the dtype of x, whatever the dtype W is stored in."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


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

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]. The statistics are float32 (float64 for float64 inputs)."""
        return _RMSNorm.apply(x, self.weight.to(x.dtype), self.eps)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with its gradient written out: a third of the passes over memory that autograd's own would make.

    With s = 1 / sqrt(mean(x^2) + eps) and n = s x:   dw = sum(g n),   dx = s (g w - n mean(g w n)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        s = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        n = (x * s).to(x.dtype)
        ctx.save_for_backward(n, weight, s)
        return n * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (g,) = grads
        n, weight, s = ctx.saved_tensors
        gn = g * weight
        dx = dw = None
        if ctx.needs_input_grad[0]:
            mean = (gn * n).mean(dim=-1, keepdim=True, dtype=s.dtype)
            dx = torch.addcmul(gn, n, mean.to(n.dtype), value=-1).mul_(s.to(n.dtype))
        if ctx.needs_input_grad[1]:
            dw = (g * n).flatten(0, -2).sum(0)
        return dx, dw, None


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
    """Dropout of x with probability p, rounded to a multiple of 2^-16 on a CPU.

    PyTorch's CPU kernel draws a 64-bit number for each element, one after the other, which takes long; here
    each draw of 64 bits serves four elements.
    """
    if x.device.type != "cpu":
        return F.dropout(x, p)
    drop_below = round(p * 65536)
    if drop_below == 0:
        return x
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= drop_below - 32768
    return x * kept.to(x.dtype).mul_(65536 / (65536 - drop_below))


def rope_table(positions: Tensor, inverse_frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency: [...] and [D/2] -> two tensors [..., D/2] (Su et al. 2021)."""
    angles = positions.to(torch.float32)[..., None] * inverse_frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of each head by their position's angles.

    x [B, T, H, D]; cos, sin [T, D/2] or [B, T, D/2]. Or x [N, H, D] and cos, sin [N, D/2].
    """
    return _Rotate.apply(x, cos.unsqueeze(-2), sin.unsqueeze(-2))


class _Rotate(torch.autograd.Function):
    """A rotation; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (g,) = grads
        cos, sin = ctx.saved_tensors
        return _rotated(g, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.sub(x1 * cos, x2 * sin, out=y[..., :half])
    torch.add(x2 * cos, x1 * sin, out=y[..., half:])
    return y
