"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745; Pythia, Biderman et al. 2023): attention and MLP side by side.

    x + attention(norm1(x)) + mlp(norm2(x))        (Pythia; one after the other where use_parallel_residual is false)

What is unusual here: only some dimensions of a head rotate (rotary_pct, a quarter in Pythia), and `attention.py` does
not know. Rotary pairs are (i, i + D/2) everywhere in graftlm, and (i, i + R/2) of the first R dimensions in its files.
So the rows of q and k are put into an order in which pair i is (i, i + D/2), and the pairs that do not rotate have
angles of zero. A product q k does not change when both are permuted alike.

Letters: B rows, T tokens, d model width, H heads, D width of a head, R of its dimensions that rotate.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.models.attention import Attention, AttentionInputs
from graftlm.models.base import CausalLM
from graftlm.models.config import ModelConfig, ModelFamily, require_values
from graftlm.models.layers import Dropout, LayerNorm, Linear, rope_cos_sin


@dataclass(frozen=True, kw_only=True)
class NeoXShape(ModelConfig):
    """What a GPT-NeoX says beside the rest."""

    rotary: int
    """R: how many dimensions of a head rotate."""
    parallel: bool = True
    """Whether attention and MLP read the same x."""


class MLP(nn.Module):
    """down(gelu(up(x))), with the exact GELU."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.down = Linear(shape.intermediate_size, shape.hidden_size, bias=shape.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """x + attention(norm(x)) + mlp(norm(x)), or the MLP behind the attention."""

    def __init__(self, shape: NeoXShape) -> None:
        super().__init__()
        self.norm1 = LayerNorm(shape.hidden_size, eps=shape.norm_eps)
        self.attn = Attention(shape)
        self.norm2 = LayerNorm(shape.hidden_size, eps=shape.norm_eps)
        self.mlp = MLP(shape)
        self.drop = Dropout()
        self.parallel = shape.parallel

    def forward(self, x: Tensor, layer: int, context: AttentionInputs) -> Tensor:
        """[B, T, d] -> [B, T, d], or whatever else `context` says x is."""
        wanted = context.select(x)
        y = wanted + self.drop(self.attn(self.norm1(x), layer, context))
        return y + self.drop(self.mlp(self.norm2(wanted if self.parallel else y)))


class NeoX(CausalLM):
    """A GPT-NeoX of any size."""

    config: NeoXShape

    def __init__(self, shape: NeoXShape) -> None:
        norm = LayerNorm(shape.hidden_size, eps=shape.norm_eps)
        super().__init__(shape, [Block(shape) for _ in range(shape.num_layers)], norm)

    def rotary_cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each position's angles, zero for the pairs that do not rotate."""
        turning = torch.arange(0, self.config.rotary, 2, dtype=torch.int64).float() / self.config.rotary
        frequencies = torch.zeros(self.config.head_dim // 2, dtype=torch.float32)
        frequencies[: len(turning)] = 1.0 / self.config.rope_theta**turning
        return rope_cos_sin(positions, frequencies.to(positions.device), self.dtype)


# What its files are like ----------------------------------------------------------------------------------------------


def read_shape(config: Mapping[str, Any], where: str) -> NeoXShape:
    """The shape that a GPT-NeoX's config.json describes, in the words of old files and of transformers 5."""
    require_values(config, where, hidden_act=("gelu",), attention_bias=(True,), rope_scaling=(None,))
    rope = dict(config.get("rope_parameters") or {})
    require_values(rope, where, rope_type=("default",))
    heads, d = config["num_attention_heads"], config["hidden_size"]
    if d % heads or d // heads % 2:
        raise InputError(f"{where}: hidden_size {d} gives {heads} heads no even width")
    share = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    theta = rope.get("rope_theta", config.get("rotary_emb_base", 10000))
    rotary = int(d // heads * share) if isinstance(share, int | float) else 0
    if not 0 < rotary <= d // heads or rotary % 2:
        raise InputError(f"{where}: rotary_pct = {share!r} rotates {rotary} of {d // heads} dimensions: not understood")
    return NeoXShape(
        family="neox",
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=heads,
        hidden_size=d,
        head_dim=d // heads,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        norm_eps=config.get("layer_norm_eps", 1e-5),
        tie_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        rope_theta=float(theta),
        rotary=rotary,
        parallel=config.get("use_parallel_residual", True),
    )


def _head_order(shape: ModelConfig) -> Tensor:
    """The rotary pairs (i, i + R/2) come to (i, i + D/2)."""
    assert isinstance(shape, NeoXShape)
    at = torch.arange(shape.head_dim)
    first, second = at[: shape.rotary].chunk(2)
    third, fourth = at[shape.rotary :].tensor_split(2)
    return torch.cat([first, third, second, fourth])


def _rows(shape: ModelConfig, role: str) -> Tensor:
    """query_key_value holds q, k and v head by head, [H, 3, D]."""
    within = torch.arange(shape.head_dim) if role == "v" else _head_order(shape)
    heads = torch.arange(shape.num_heads)[:, None] * 3 + "qkv".index(role)
    return (heads * shape.head_dim + within).flatten()


FAMILY = ModelFamily(
    name="neox",
    model_types=("gpt_neox",),
    build=NeoX,
    read=read_shape,
    embed="gpt_neox.embed_in",
    last_norm="gpt_neox.final_layer_norm",
    head="embed_out",
    layers="gpt_neox.layers.",
    linears={
        **dict.fromkeys("qkv", "attention.query_key_value"),
        "o": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    },
    norms={"norm1": "input_layernorm", "norm2": "post_attention_layernorm"},
    norm_biases=True,
    fused_qkv_slices=_rows,
    rotary_permutation=_head_order,
    ignored=r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",  # causal masks and rotary frequencies
)
