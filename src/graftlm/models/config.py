"""Model configuration: sizes, settings of each layer, and how a family's checkpoints are laid out.

A family is one file (`gpt2.py`, `llama.py`, `neox.py`) with two things: a reader from config.json to `ModelConfig`, and
a `ModelFamily`, the table of its tensor names. One decoder block (`decoder.py`) computes all of them. Other code reads
the configuration and the table; it never asks for a family by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from graftlm.errors import InputError

ROLES = ("q", "k", "v", "o", "up", "gate", "down")
Rows = slice | Tensor
"""Rows of a fused linear: a slice, or their indices [out]."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021)."""

    theta: float = 10000.0
    dim: int | None = None
    """R: the first R dimensions of a head rotate; None: all of them."""
    scaling: tuple[tuple[str, Any], ...] = ()
    """Settings other than theta, sorted: empty, or those of rope_type linear or llama3."""


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What one decoder layer computes. The defaults are Llama's."""

    rope: RopeConfig | None = RopeConfig()
    """None: no rotation."""
    window: int | None = None
    """Sliding window: a token attends to itself and the `window` - 1 tokens before it. None: to all before it."""
    attention_scale: float | None = None
    """Factor of q k^T; None: head_dim ** -0.5."""
    attention_softcap: float | None = None
    """c: scores become c tanh(score / c) before the mask."""
    qk_norm: Literal["none", "head", "all"] = "none"
    """Norm of q and k before the rotation: of each head (Qwen3, Gemma 3), or of all heads together (OLMo 2)."""
    norm: Literal["rms", "layer"] = "rms"
    norm_placement: Literal["pre", "post", "both"] = "pre"
    """At the input of attention and MLP (`norm1`, `norm2`), at their output (`post_norm1`, `post_norm2`), or both."""
    norm_offset: float = 0.0
    """Added to the weight of RMS norms: 1 in Gemma, which stores w and multiplies by 1 + w."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True
    """down(activation(gate(x)) * up(x)); without: down(activation(up(x)))."""
    parallel: bool = False
    """Attention and MLP read the same x and are added to it together (GPT-NeoX)."""
    residual_multiplier: float = 1.0
    """Factor of the outputs of attention and MLP before they are added (Granite)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides a model's tensors and its arithmetic; `checkpoint_mapping.read_model_config` reads it."""

    family: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    """The context length."""
    norm_eps: float
    layers: tuple[LayerConfig, ...] = ()
    """One for all, one each, or a repeating pattern: layer i has settings i modulo their number. Empty: family's."""
    tie_embeddings: bool = True
    """Whether the head is the embedding."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    embedding_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    logits_softcap: float | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            object.__setattr__(self, "layers", (FAMILIES[self.family].layer,))

    def layer(self, i: int) -> LayerConfig:
        """The settings of layer i."""
        return self.layers[i % len(self.layers)]

    @property
    def roles(self) -> tuple[str, ...]:
        """The linears of a layer, in the order of `ROLES`."""
        return tuple(role for role in ROLES if role != "gate" or self.layers[0].gated)

    def has_bias(self, role: str) -> bool:
        """Whether the role's linear adds a bias."""
        return self.qkv_bias if role in "qkv" else self.out_bias if role == "o" else self.mlp_bias

    @property
    def qkv_rows(self) -> int:
        """Rows of q, k and v together."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def norm_biases(self) -> bool:
        """Whether norms have a bias in addition to their weight."""
        return self.layers[0].norm == "layer"

    def norm_sizes(self, layer: LayerConfig) -> dict[str, int]:
        """Norms of a layer: module inside the block -> width."""
        pre, post = ("norm1", "norm2"), ("post_norm1", "post_norm2")
        names = {"pre": pre, "post": post, "both": (*pre, *post)}[layer.norm_placement]
        sizes = dict.fromkeys(names, self.hidden_size)
        if layer.qk_norm != "none":
            heads = (self.num_heads, self.num_kv_heads) if layer.qk_norm == "all" else (1, 1)
            sizes |= {"attn.q_norm": heads[0] * self.head_dim, "attn.k_norm": heads[1] * self.head_dim}
        return sizes

    @property
    def learned_positions(self) -> bool:
        """Whether position vectors are learned and added to the embeddings."""
        return FAMILIES[self.family].positions is not None


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """Architectures that differ in sizes and settings only, and the names of their tensors in checkpoints."""

    name: str
    model_types: tuple[str, ...]
    """Values of model_type in config.json."""
    read: Callable[[Mapping[str, Any], str], ModelConfig]
    """config.json (and the file's name, for errors) -> configuration; KeyError for a missing setting."""
    layer: LayerConfig
    """Default settings of a layer."""
    embed: str
    """Module of the token embedding in the checkpoint; likewise the following."""
    last_norm: str
    head: str
    layers: str
    """Prefix of a layer's number: `model.layers.`."""
    linears: Mapping[str, str]
    """Role -> module inside a layer; fused roles share one."""
    norms: Mapping[str, str]
    """Our norm inside a block (`norm1`, `post_norm2`, `attn.q_norm`, …) -> module inside a layer."""
    positions: str | None = None
    """Table of learned positions."""
    transposed: bool = False
    """Whether linears are stored [in, out]."""
    fused_slices: Callable[[ModelConfig, str], Rows | None] | None = None
    """(configuration, role) -> the role's rows of a fused linear [out, in]; None: not fused."""
    ignored: str = r"(?!)"
    """Regular expression for the end of names of tensors that carry no weights (old files store masks)."""
    with_biases: Callable[[Mapping[str, Any], ModelConfig, ModelConfig], dict[str, Any]] | None = None
    """(config.json, its configuration, the same with other biases) -> a config.json of the latter, if there is one."""

    @property
    def fused(self) -> str | None:
        """The module that holds q, k and v together, if one does."""
        return self.linears["q"] if self.linears["q"] == self.linears["k"] else None


FAMILIES: dict[str, ModelFamily] = {}
"""Name -> family; filled by `models/__init__.py`."""


def require_values(config: Mapping[str, Any], where: str, **allowed: tuple[Any, ...]) -> None:
    """InputError for a setting of a config.json that has another value than the supported ones."""
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise InputError(
                f"{where}: {key} = {config[key]!r} is not understood; understood: {', '.join(map(repr, values))}"
            )
