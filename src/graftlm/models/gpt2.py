"""GPT-2 (Radford et al. 2019): learned positions, layer norm before each branch, tanh GELU, biases everywhere.

What is unusual here: q, k and v are three linears. The files fuse them into one `c_attn`, stored transposed;
`FAMILY` says which of its rows are whose, `names.py` splits it on the way in and fuses it on the way out, so that LoRA
can adapt each on its own.

Letters: B rows, T tokens, d model width.
"""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.models.attention import Attention, AttentionInputs
from graftlm.models.base import CausalLM
from graftlm.models.config import ModelConfig, ModelFamily, require_values
from graftlm.models.layers import Dropout, Embedding, LayerNorm, Linear


class MLP(nn.Module):
    """down(gelu(up(x))), with the tanh approximation GPT-2 was trained with."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.down = Linear(shape.intermediate_size, shape.hidden_size, bias=shape.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(shape.hidden_size, eps=shape.norm_eps)
        self.attn = Attention(shape)
        self.norm2 = LayerNorm(shape.hidden_size, eps=shape.norm_eps)
        self.mlp = MLP(shape)
        self.drop = Dropout()

    def forward(self, x: Tensor, layer: int, context: AttentionInputs) -> Tensor:
        """[B, T, d] -> [B, T, d], or whatever else `context` says x is."""
        x = context.select(x) + self.drop(self.attn(self.norm1(x), layer, context))
        return x + self.drop(self.mlp(self.norm2(x)))


class GPT2(CausalLM):
    """GPT-2 of any size."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__(
            shape, [Block(shape) for _ in range(shape.num_layers)], LayerNorm(shape.hidden_size, eps=shape.norm_eps)
        )
        self.positions = Embedding(shape.max_positions, shape.hidden_size)

    def add_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add the learned position vectors."""
        return x + self.positions.embed_in_dtype(positions, x.dtype)


# What its files are like ----------------------------------------------------------------------------------------------


def read_shape(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The shape that GPT-2's config.json describes."""
    require_values(
        config,
        where,
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    )
    d, heads = config["n_embd"], config["n_head"]
    if d % heads:
        raise InputError(f"{where}: n_embd {d} is not a multiple of n_head {heads}")
    return ModelConfig(
        family="gpt2",
        num_layers=config["n_layer"],
        num_heads=heads,
        num_kv_heads=heads,
        hidden_size=d,
        head_dim=d // heads,
        intermediate_size=config.get("n_inner") or 4 * d,
        vocab_size=config["vocab_size"],
        max_positions=config.get("n_positions", config.get("n_ctx", 1024)),
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=config.get("tie_word_embeddings", True),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def _rows(shape: ModelConfig, role: str) -> slice:
    """c_attn holds q, k and v one after the other."""
    part = "qkv".index(role)
    return slice(part * shape.hidden_size, (part + 1) * shape.hidden_size)


FAMILY = ModelFamily(
    name="gpt2",
    model_types=("gpt2",),
    build=GPT2,
    read=read_shape,
    embed="transformer.wte",
    positions="transformer.wpe",
    last_norm="transformer.ln_f",
    head="lm_head",
    layers="transformer.h.",
    linears={
        **dict.fromkeys("qkv", "attn.c_attn"),
        "o": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
    norms={"norm1": "ln_1", "norm2": "ln_2"},
    norm_biases=True,
    transposed=True,
    fused_qkv_slices=_rows,
    ignored=r"\.attn\.(bias|masked_bias)$",  # causal masks
)
