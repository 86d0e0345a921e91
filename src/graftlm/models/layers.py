"""Small layers: linear, embedding, two norms, dropout, rotary position embedding.

*Weights follow the activations*: trained weights are stored in float32 and frozen ones in the base's dtype, and each
forward pass casts the weight to the dtype of its input (no copy if they are the same).

Letters: N tokens, d hidden size, H heads, D head dimension, R dimensions of a head that rotate.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.models import fused_ops
from graftlm.models.config import LayerConfig, ModelConfig, RopeConfig
from graftlm.models.fused_ops import TORCH, DropoutMask, ReferenceKernels


class Linear(nn.Linear):
    """y = x W^T + b in the dtype of x; W may be stored in another."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @staticmethod
    def forward_many(linears: "Sequence[Linear]", x: Tensor) -> list[Tensor]:
        """The outputs of several linears for the same x. Methods override it where their linears can share work."""
        return [linear(x) for linear in linears]


def apply_linears(x: Tensor, *linears: Linear) -> list[Tensor]:
    """The outputs of `linears` for the same x, by `forward_many` of the first that is not a plain `Linear`."""
    kind = next((type(linear) for linear in linears if type(linear) is not Linear), Linear)
    return kind.forward_many(linears, x)


class Embedding(nn.Embedding):
    """Token or position embedding."""

    def embed_in_dtype(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """[...] int64 -> [..., d] in `dtype`."""
        return F.embedding(ids, self.weight).to(dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016) in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class HasFusedOps(nn.Module):
    """A module with fused operations (`fused_ops.py`); `CausalLM.use_fused_ops` and `set_kernels` set all of them."""

    fused = True
    """Whether the fused operations are used, or plain ones with autograd's gradients."""
    kernels: ReferenceKernels = TORCH
    """Their kernels in training."""

    @property
    def active_kernels(self) -> ReferenceKernels:
        """The kernels of this forward pass: torch's in evaluation, so scores do not depend on the training setup."""
        return self.kernels if self.training else TORCH


class RMSNorm(HasFusedOps):
    """Root-mean-square normalisation (Zhang & Sennrich 2019): (offset + w) x / sqrt(mean(x^2) + eps)."""

    def __init__(self, d: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d) - offset)
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]. The statistics are float32 (float64 for float64 inputs)."""
        weight = (self.weight + self.offset if self.offset else self.weight).to(x.dtype)
        if self.fused:
            return fused_ops.RMSNorm.apply(x, weight, self.eps, self.active_kernels)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        n = exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + self.eps)
        return n.to(x.dtype) * weight


def make_norm(config: ModelConfig, layer: LayerConfig, size: int) -> LayerNorm | RMSNorm:
    """A norm of this width and of the layer's kind."""
    if layer.norm == "layer":
        return LayerNorm(size, eps=config.norm_eps)
    return RMSNorm(size, config.norm_eps, layer.norm_offset)


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
    """A mask that drops with probability p, seeded from torch's generator; None: nothing is dropped."""
    threshold = round(p * 65536)
    return DropoutMask(int(torch.randint(-(2**62), 2**62, ())), threshold) if threshold else None


def inverse_frequencies(head_dim: int, rope: RopeConfig) -> Tensor:
    """[D/2] in float32: theta^(-2i/R) for i < R/2, scaled as linear or llama3 say; 0 for pairs that do not rotate."""
    r = rope.dim or head_dim
    frequencies = 1.0 / rope.theta ** (torch.arange(0, r, 2, dtype=torch.int64).float() / r)
    scaling = dict(rope.scaling)
    if scaling.get("rope_type") == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling.get("rope_type") == "llama3":
        old = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelengths = 2 * math.pi / frequencies
        # 1 for wavelengths shorter than old/high (unchanged), 0 for longer than old/low (scaled), a ramp between.
        unscaled = ((old / wavelengths - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - unscaled) * frequencies / scaling["factor"] + unscaled * frequencies
    return F.pad(frequencies, (0, (head_dim - r) // 2))


def rope_cos_sin(positions: Tensor, inverse_frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency: [...] and [D/2] -> two tensors [..., D/2]."""
    angles = positions.to(torch.float32)[..., None] * inverse_frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary_emb(
    x: Tensor, cos: Tensor, sin: Tensor, fused: bool = True, kernels: ReferenceKernels = TORCH
) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of each head by the angles of their position (Su et al. 2021).

    x [B, T, H, D]; cos, sin [T, D/2] or [B, T, D/2]. Or x [N, H, D] and cos, sin [N, D/2].
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if fused:
        return fused_ops.ApplyRoPE.apply(x, cos, sin, kernels)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
