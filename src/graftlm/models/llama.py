"""The Llama family (Touvron et al. 2023; SmolLM2, Mistral, Qwen2): rotary positions, RMS norm, gated SiLU.

What is unusual here: nothing is cached between two calls. The rotation angles are computed from the positions at
every forward pass (a few microseconds) instead of being kept in buffers that have to be rebuilt on load.

Letters: B rows, T tokens, d model width, D width of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.models.attention import Attention, Context
from graftlm.models.base import CausalLM, Shape
from graftlm.models.gradients import Gated
from graftlm.models.layers import ByHand, Dropout, Linear, RMSNorm, project, rope_table


class MLP(ByHand):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = Linear(shape.d_model, shape.d_ff, bias=shape.mlp_bias)
        self.up = Linear(shape.d_model, shape.d_ff, bias=shape.mlp_bias)
        self.down = Linear(shape.d_ff, shape.d_model, bias=shape.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        gate, up = project(x, self.gate, self.up)
        return self.down(Gated.apply(gate, up, self.kernels_now) if self.fused else F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = RMSNorm(shape.d_model, eps=shape.norm_eps)
        self.attn = Attention(shape)
        self.norm2 = RMSNorm(shape.d_model, eps=shape.norm_eps)
        self.mlp = MLP(shape)
        self.drop = Dropout()

    def forward(self, x: Tensor, layer: int, context: Context) -> Tensor:
        """[B, T, d] -> [B, T, d], or whatever else `context` says x is."""
        x = context.wanted(x) + self.drop(self.attn(self.norm1(x), layer, context))
        return x + self.drop(self.mlp(self.norm2(x)))


class Llama(CausalLM):
    """A Llama-family model of any size."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, [Block(shape) for _ in range(shape.layers)], RMSNorm(shape.d_model, eps=shape.norm_eps))

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each position's angles."""
        return rope_table(positions, inverse_frequencies(self.shape).to(positions.device), self.dtype)


def inverse_frequencies(shape: Shape) -> Tensor:
    """theta^(-2i/D) for i < D/2 in float32, slowed as the file's rope settings say: linear, or llama3's by bands."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
    frequencies = 1.0 / shape.rope_theta**exponents
    scaling = dict(shape.rope_scaling)
    if scaling.get("rope_type") == "linear":
        return frequencies / scaling["factor"]
    if scaling.get("rope_type") == "llama3":
        old, low, high = (scaling[k] for k in _LLAMA3_KEYS)
        wavelengths = 2 * math.pi / frequencies
        # 1 for wavelengths shorter than old/high (kept), 0 for longer than old/low (slowed), a ramp between.
        keep = ((old / wavelengths - low) / (high - low)).clamp(0, 1)
        return (1 - keep) * frequencies / scaling["factor"] + keep * frequencies
    return frequencies


_LLAMA3_KEYS = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
