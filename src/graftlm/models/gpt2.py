"""GPT-2 (Radford et al. 2019): learned positions, layer norm before each branch, tanh GELU, biases everywhere.

What is unusual here: q, k and v are three linears. The files fuse them into one `c_attn`, stored transposed;
`names.py` splits it on the way in and fuses it on the way out, so that LoRA can adapt each on its own.

Letters: B rows, T tokens, d model width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.models.attention import Attention, Context
from graftlm.models.base import CausalLM, Shape
from graftlm.models.layers import Dropout, Embedding, LayerNorm, Linear


class MLP(nn.Module):
    """down(gelu(up(x))), with the tanh approximation GPT-2 was trained with."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up = Linear(shape.d_model, shape.d_ff, bias=shape.mlp_bias)
        self.down = Linear(shape.d_ff, shape.d_model, bias=shape.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = LayerNorm(shape.d_model, eps=shape.norm_eps)
        self.attn = Attention(shape)
        self.norm2 = LayerNorm(shape.d_model, eps=shape.norm_eps)
        self.mlp = MLP(shape)
        self.drop = Dropout()

    def forward(self, x: Tensor, layer: int, context: Context) -> Tensor:
        """[B, T, d] -> [B, T, d], or whatever else `context` says x is."""
        x = context.wanted(x) + self.drop(self.attn(self.norm1(x), layer, context))
        return x + self.drop(self.mlp(self.norm2(x)))


class GPT2(CausalLM):
    """GPT-2 of any size."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(
            shape, [Block(shape) for _ in range(shape.layers)], LayerNorm(shape.d_model, eps=shape.norm_eps)
        )
        self.positions = Embedding(shape.context, shape.d_model)

    def place(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add the learned position vectors."""
        return x + self.positions.look_up(positions, x.dtype)
