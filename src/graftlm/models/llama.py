"""The Llama family (Touvron et al. 2023; SmolLM2, Mistral, Qwen2): rotary positions, RMS norm, gated SiLU.

What is unusual here: nothing is cached between two calls. The rotation angles are computed from the positions at
every forward pass (a few microseconds) instead of being kept in buffers that have to be rebuilt on load.

Letters: B rows, T tokens, d model width, D width of a head.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.models.attention import Attention, AttentionInputs
from graftlm.models.base import CausalLM
from graftlm.models.config import ModelConfig, ModelFamily, require_values
from graftlm.models.fused_ops import SwiGLU
from graftlm.models.layers import Dropout, HasFusedOps, Linear, RMSNorm, apply_linears, rope_cos_sin


class MLP(HasFusedOps):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.up = Linear(shape.hidden_size, shape.intermediate_size, bias=shape.mlp_bias)
        self.down = Linear(shape.intermediate_size, shape.hidden_size, bias=shape.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        gate, up = apply_linears(x, self.gate, self.up)
        return self.down(SwiGLU.apply(gate, up, self.active_kernels) if self.fused else F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.attn = Attention(shape)
        self.norm2 = RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        self.mlp = MLP(shape)
        self.drop = Dropout()

    def forward(self, x: Tensor, layer: int, context: AttentionInputs) -> Tensor:
        """[B, T, d] -> [B, T, d], or whatever else `context` says x is."""
        x = context.select(x) + self.drop(self.attn(self.norm1(x), layer, context))
        return x + self.drop(self.mlp(self.norm2(x)))


class Llama(CausalLM):
    """A Llama-family model of any size."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__(
            shape, [Block(shape) for _ in range(shape.num_layers)], RMSNorm(shape.hidden_size, eps=shape.norm_eps)
        )

    def rotary_cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each position's angles."""
        return rope_cos_sin(positions, inverse_frequencies(self.config).to(positions.device), self.dtype)


def inverse_frequencies(shape: ModelConfig) -> Tensor:
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


# What its files are like ----------------------------------------------------------------------------------------------


def read_shape(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The shape that the config.json of a Llama, Mistral or Qwen2 describes."""
    require_values(config, where, hidden_act=("silu",), pretraining_tp=(1,), use_sliding_window=(False, None))
    context = config["max_position_embeddings"]
    window = config.get("sliding_window")
    if window is not None and window < context and config.get("use_sliding_window") is not False:
        raise InputError(f"{where}: sliding_window = {window} below the context of {context} is not supported")
    rope = config.get("rope_parameters") or {}
    scaling = dict(config.get("rope_scaling") or rope)
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or rope.get("rope_theta") or 10000.0
    understood = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    }
    if kind not in understood:
        raise InputError(f"{where}: rope_type = {kind!r} is not understood; understood: {', '.join(understood)}")
    if strange := sorted(set(scaling) - set(understood[kind])):
        raise InputError(f"{where}: the rope setting {strange[0]!r} is not understood for rope_type {kind!r}")
    heads, d = config["num_attention_heads"], config["hidden_size"]
    biased = config["model_type"] == "qwen2" or bool(config.get("attention_bias", False))
    return ModelConfig(
        family="llama",
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        hidden_size=d,
        head_dim=config.get("head_dim") or d // heads,
        intermediate_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_positions=context,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        tie_embeddings=config.get("tie_word_embeddings", False),
        qkv_bias=biased,
        out_bias=biased and config["model_type"] != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)),
        rope_theta=float(theta),
        rope_scaling=() if kind == "default" else tuple(sorted([("rope_type", kind), *scaling.items()])),
    )


# Settings of Mistral and Qwen2 that Llama lacks; `read_shape` has seen to it that they change nothing.
_NOT_LLAMAS = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}


def _with_biases(config: Mapping[str, Any], base: ModelConfig, shape: ModelConfig) -> dict[str, Any]:
    """A config.json that says the biases of `shape`: the inverse of how `read_shape` reads them.

    Mistral's and Qwen2's configs cannot say that every linear has one; Llama's can, and is the same model otherwise.
    """
    same = replace(base, qkv_bias=shape.qkv_bias, out_bias=shape.out_bias, mlp_bias=shape.mlp_bias)
    assert shape == same and shape.qkv_bias == shape.out_bias
    return {
        **{key: value for key, value in config.items() if key not in _NOT_LLAMAS},
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": shape.qkv_bias,
        "mlp_bias": shape.mlp_bias,
        # The defaults of the three differ.
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tie_embeddings,
    }


FAMILY = ModelFamily(
    name="llama",
    model_types=("llama", "mistral", "qwen2"),
    build=Llama,
    read=read_shape,
    embed="model.embed_tokens",
    last_norm="model.norm",
    head="lm_head",
    layers="model.layers.",
    linears={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    norms={"norm1": "input_layernorm", "norm2": "post_attention_layernorm"},
    ignored=r"rotary_emb\.inv_freq$",
    with_biases=_with_biases,
)
