"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): learned keys and values precede every text, in every layer.

    head = softmax(q [P_k; K]^T / sqrt(D)) [P_v; V]        P_k, P_v [n, D] learned for each layer and key/value head

Attention does not change: the prefix is a `KVCache` that all rows share, like a cached prompt prefix; the positions of
the text continue after it. It can be initialised from real tokens (the paper's advice for little data): their keys and
values in the base, so the model starts as if it had read them.

With `hidden` > 0 a network reparametrises the prefix in training, P = P_0 + W_2 tanh(W_1 e_i + b_1) + b_2 for position
i, where P_0 are the tokens' keys and values (zero without tokens), and W_2 and b_2 start at zero if there are tokens.
Evaluation, PEFT and merging use P alone.

Letters: n prefix length, L layers, K key/value heads, D width of a head, h width of the network, d hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.methods.base import Method, PeftFolder, freeze, master_dtype, target_device
from graftlm.methods.cost_model import ParameterGroup, counted
from graftlm.methods.peft_format import PEFT_VERSION, WITHOUT_EFFECT, check_fields
from graftlm.models import CausalLM, KVCache, ModelConfig
from graftlm.models.base import PrefixModule
from graftlm.models.config import rotary_permutation
from graftlm.text.collate import common_prefix_length


class Prefix(PrefixModule):
    """The learned keys and values of n positions: one matrix [n, 2 L K D] in PEFT's order, key and value by layer.

    Args:
        config: the model's.
        start: the initial keys and values.
        hidden: h, the width of the network; 0: none.
        std: of W_2's initial values.
        rng: a generator on the CPU.
    """

    def __init__(self, config: ModelConfig, start: Tensor, hidden: int, std: float, rng: torch.Generator) -> None:
        super().__init__()
        self.config, self.size, self.start = config, len(start), start
        self._cached: Tensor | None = None
        self.past: nn.Parameter | None = None
        if not hidden:
            self.past = nn.Parameter(start)
            return

        def draw(*size: int, std: float) -> nn.Parameter:
            values = torch.empty(size, dtype=start.dtype).normal_(std=std, generator=rng)
            return nn.Parameter(values.to(start.device))

        d, width = config.hidden_size, start.shape[1]
        self.embedding = draw(self.size, d, std=1.0)
        self.w1, self.b1 = draw(hidden, d, std=d**-0.5), draw(hidden, std=0.0)
        self.w2, self.b2 = draw(width, hidden, std=std), draw(width, std=0.0)

    def materialize(self) -> Tensor:
        """P [n, 2 L K D], in float32 or wider."""
        if self.past is not None:
            return self.past
        if self._cached is not None:
            return self._cached
        return self.start + torch.tanh(self.embedding @ self.w1.T + self.b1) @ self.w2.T + self.b2

    def set_initial(self, start: Tensor) -> None:
        """Replace the initial keys and values by these [n, 2 L K D]."""
        self.start = start
        if self.past is not None:
            self.past.data = start

    def segment(self, dtype: torch.dtype) -> KVCache:
        """The prefix as a cache of one row, which all rows of a batch share."""
        config = self.config
        heads = (2 * config.num_layers, config.num_kv_heads, config.head_dim)
        layers = self.materialize().to(dtype).view(self.size, *heads).permute(1, 2, 0, 3)[:, None].unbind()
        return KVCache(list(layers[0::2]), list(layers[1::2]))

    def train(self, mode: bool = True) -> "Prefix":
        """Evaluation computes P once; training computes it in each forward pass."""
        super().train(mode)
        self._cached = None
        self._cached = None if mode else self.materialize().detach()
        return self


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Learned keys and values of `length` positions before every text."""

    length: int = 20
    hidden: int = 0
    """Width of the reparametrising network; 0: none, the keys and values themselves are trained."""
    init: str = ""
    """The text to start from, "random", or "" for the common beginning of the run's prompts."""
    tokens: tuple[int, ...] = ()
    """The tokens to start from; set by `resolve_init`. Empty: random."""

    name: ClassVar[str] = "prefix"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    default_lr: ClassVar[float] = 1e-2
    flags: ClassVar[Mapping[str, str]] = {"prefix_length": "length", "prefix_hidden": "hidden", "prefix_init": "init"}
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"length": 3, "tokens": (5, 40, 2)},
        "network": {"length": 3, "tokens": (5, 40, 2), "hidden": 7},
    }
    mergeable: ClassVar[bool] = False

    @property
    def positions(self) -> int:
        """n."""
        return self.length

    def resolve_init(self, prompts: Sequence[Sequence[int]], encode: Callable[[str], Sequence[int]]) -> "PrefixTuning":
        """With n tokens: those of the text, or the prompts' common beginning, or the first prompt, repeated."""
        if self.init == "random":
            return self
        ids = list(encode(self.init)) if self.init else list(prompts[0][: common_prefix_length(prompts)] or prompts[0])
        return replace(self, tokens=tuple((ids * (self.length // len(ids) + 1))[: self.length]))

    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Prepend the prefix to all that the model reads; InputError if it is too long, or for some layers only."""
        config = model.config
        if self.layers is not None:
            raise InputError("--method prefix learns keys and values for every layer: leave out --train_layers")
        if "conv_in" in config.roles:
            raise InputError("--method prefix: short convolutions have no keys and values to learn: use --method lora")
        if self.length >= config.max_positions:
            raise InputError(
                f"--prefix_length {self.length}: the model reads at most {config.max_positions} tokens; shorten it"
            )
        if model.prefix is not None:
            raise InputError("the model has a prefix already; adapt a fresh base")
        freeze(model)
        if self.tokens and model.device.type != "meta":
            start = self._read_tokens(model)
        else:  # without tokens noise, or zeros under a network; zeros before the base's weights are loaded
            start = torch.zeros(self.length, width(config), dtype=master_dtype(model.dtype))
            if not self.tokens:
                start = start.normal_(std=0.02, generator=rng) * (self.hidden == 0)
            start = start.to(target_device(model.embed.stored_weight))
        model.set_prefix(Prefix(config, start, self.hidden, 0.0 if self.tokens else 0.02, rng))

    def init_from_base_weights(self, model: CausalLM) -> None:
        """Start from the tokens' keys and values, if there are tokens."""
        prefix = model.prefix
        assert isinstance(prefix, Prefix)
        model.set_prefix(None)
        prefix.set_initial(self._read_tokens(model) if self.tokens else prefix.start.to(model.device))
        model.set_prefix(prefix)

    def _read_tokens(self, model: CausalLM) -> Tensor:
        """[n, 2 L K D]: the keys and values of the tokens in the base."""
        cache, mode = KVCache(), model.training
        with torch.no_grad():
            model.eval().hidden_states(torch.tensor([self.tokens], device=model.device), cache=cache)
        model.train(mode)
        pairs = [t for pair in zip(cache.keys, cache.values, strict=True) for t in pair]
        return torch.cat([t[0].transpose(0, 1).flatten(1) for t in pairs], dim=1).to(master_dtype(model.dtype))

    def param_breakdown(self, config: ModelConfig) -> list[ParameterGroup]:
        """n 2 L K D; with a network n d + h (d + 1) + (h + 1) 2 L K D."""
        letters = {"L": config.num_layers, "K": config.num_kv_heads, "D": config.head_dim, "d": config.hidden_size}
        description, formula = "prefix, keys and values", "n 2 L K D"
        if self.hidden:
            description, formula = "prefix, its network", "n d + h (d + 1) + (h + 1) 2 L K D"
        item = counted(description, formula, n=self.length, h=self.hidden, **letters)
        return [ParameterGroup(*item, "prefix", added=True)]

    @property
    def resumable_from_adapter(self) -> bool:
        """False with a network: an adapter folder has its output only."""
        return self.hidden == 0

    @property
    def for_inference(self) -> "PrefixTuning":
        """Without the network and its initialisation."""
        return replace(self, hidden=0, init="random", tokens=())

    def to_peft(self, model: CausalLM) -> PeftFolder:
        """PEFT's PREFIX_TUNING, without a network."""
        assert isinstance(model.prefix, Prefix)
        peft_config = {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            **_sizes(model.config, self.length),
            "num_transformer_submodules": 1,
            "encoder_hidden_size": model.config.hidden_size,
            "prefix_projection": False,
            "inference_mode": True,
            "peft_version": PEFT_VERSION,
        }
        past = _permute_keys(model.config, model.prefix.materialize().detach(), torch.argsort)
        return peft_config, {"prompt_embeddings": past}

    def from_peft(self, config: ModelConfig, folder: PeftFolder, where: str) -> dict[str, Tensor]:
        """The inverse, for a method without a network."""
        result = self.from_foreign_peft(config, folder, where)
        if result is None or not isinstance(result[0], PrefixTuning) or result[0].length != self.length:
            raise InputError(f"{where}: holds no prefix of {self.length} positions, as the run says")
        return result[1]

    @classmethod
    def from_foreign_peft(
        cls, config: ModelConfig, folder: PeftFolder, where: str
    ) -> tuple[Method, dict[str, Tensor]] | None:
        """Any PREFIX_TUNING folder of PEFT; it has no projection: PEFT saves its output."""
        peft_config, tensors = folder
        if peft_config.get("peft_type") != cls.peft_type:
            return None
        check_fields(peft_config, _FIELDS, {"modules_to_save"}, where)
        length = peft_config.get("num_virtual_tokens")
        if not isinstance(length, int) or length < 1:
            raise InputError(f"{where}: num_virtual_tokens = {length!r} must be a whole number above 0")
        for key, value in (_sizes(config, length) | {"num_transformer_submodules": 1}).items():
            if peft_config.get(key, value) not in (value, None):
                raise InputError(f"{where}: {key} = {peft_config[key]!r}, this base wants {value}")
        shapes, expected = {name: list(t.shape) for name, t in tensors.items()}, [length, width(config)]
        if shapes != {"prompt_embeddings": expected}:
            raise InputError(f"{where}: holds {shapes}, expected prompt_embeddings of shape {expected}")
        past = _permute_keys(config, tensors["prompt_embeddings"], torch.clone)
        return cls(length=length, init="random"), {"before.past": past}


_FIELDS = WITHOUT_EFFECT | {
    *("peft_type", "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"),
    *("num_transformer_submodules", "encoder_hidden_size", "prefix_projection", "init_weights"),
}


def width(config: ModelConfig) -> int:
    """2 L K D: elements of one position's keys and values."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim


def _permute_keys(config: ModelConfig, past: Tensor, index: Callable[[Tensor], Tensor]) -> Tensor:
    """[n, 2 L K D] with the keys' dimensions permuted, in families whose heads we store in another order.

    `index` maps the permutation from transformers' order to ours to the one that is applied: itself or its inverse.
    """
    pairs = past.view(len(past), config.num_layers, 2, config.num_kv_heads, config.head_dim).clone()
    for i in range(config.num_layers):
        if (permutation := rotary_permutation(config, i)) is not None:
            pairs[:, i, 0] = pairs[:, i, 0][..., index(permutation)]
    return pairs.flatten(1)


def _sizes(config: ModelConfig, length: int) -> dict[str, Any]:
    return {
        "num_virtual_tokens": length,
        "token_dim": config.num_kv_heads * config.head_dim,
        "num_attention_heads": config.num_kv_heads,
        "num_layers": config.num_layers,
    }
