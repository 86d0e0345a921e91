"""The shape of a model, and what a family of models is: its class, and what its checkpoints call things.

A family is one file (`gpt2.py`, `llama.py`, `neox.py`): the modules, how config.json is read, and a `ModelFamily` that
says the rest in a table. Nothing else in graftlm asks which family a model is of.

What is unusual here: in the files q, k and v may be one linear; `fused_qkv_slices` says which rows are whose. The
rows may come in another order than the file's, which is how heads that rotate only some of their dimensions become
heads like all others: q and k are permuted alike, so their products stay.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graftlm.errors import InputError

ROLES = ("q", "k", "v", "o", "up", "gate", "down")
Rows = slice | Tensor
"""Rows of a fused linear: a slice, or their numbers [out]."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides a model's tensors and its arithmetic; read from config.json by `names.read_shape`."""

    family: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    """The most tokens it was made for."""
    norm_eps: float
    tie_embeddings: bool = True
    """Whether the head is the embedding."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    """Rope settings beside theta, sorted: empty, or of type linear or llama3."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The linears this family has, in the order of `ROLES`."""
        return tuple(role for role in ROLES if role in FAMILIES[self.family].linears)

    def has_bias(self, role: str) -> bool:
        """Whether the role's linear adds a bias."""
        return self.qkv_bias if role in "qkv" else self.out_bias if role == "o" else self.mlp_bias

    @property
    def qkv_rows(self) -> int:
        """Rows of q, k and v together."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """Architectures that differ in sizes and settings only."""

    name: str
    model_types: tuple[str, ...]
    """What config.json may say as model_type."""
    build: Callable[[Any], Any]
    """A shape of this family -> its `CausalLM`, the weights not yet meaningful."""
    read: Callable[[Mapping[str, Any], str], ModelConfig]
    """A config.json (and the file's name, for errors) -> the shape; KeyError for what is missing."""
    embed: str
    """The file's module that embeds tokens; so are the next ones, where there are such."""
    last_norm: str
    head: str
    layers: str
    """What stands before a layer's number: `model.layers.`."""
    linears: Mapping[str, str]
    """Role -> the file's module inside a layer; q, k and v have the same one where the file fuses them."""
    norms: Mapping[str, str]
    positions: str | None = None
    """Learned positions' table."""
    norm_biases: bool = False
    transposed: bool = False
    """Whether the file keeps linears as [in, out]."""
    fused_qkv_slices: Callable[[ModelConfig, str], Rows] | None = None
    """Where q, k and v are fused: which rows of the fused linear's [out, in] are a role's, in our order."""
    rotary_permutation: Callable[[ModelConfig], Tensor] | None = None
    """Which of the file's dimensions of a head of q and k stands at each of ours, [D]; None: the same."""
    ignored: str = r"(?!)"
    """Names of tensors that old files carry and nothing needs, as a regular expression's end."""
    with_biases: Callable[[Mapping[str, Any], ModelConfig, ModelConfig], dict[str, Any]] | None = None
    """(config.json, its shape, the same with other biases) -> a config.json that says them, where there is one."""

    @property
    def fused(self) -> str | None:
        """The module that holds q, k and v together, where one does."""
        return self.linears["q"] if self.fused_qkv_slices is not None else None


FAMILIES: dict[str, ModelFamily] = {}
"""Name -> family; `models/__init__.py` fills it."""


def require_values(config: Mapping[str, Any], where: str, **allowed: tuple[Any, ...]) -> None:
    """InputError for a setting of a config.json that has another value than the ones understood."""
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise InputError(
                f"{where}: {key} = {config[key]!r} is not understood; understood: {', '.join(map(repr, values))}"
            )
