"""Prefix tuning (Li & Liang 2021, arXiv:2101.00190): learned keys and values stand before every text, in every layer.

    head = softmax(q [P_k; K]^T / sqrt(D)) [P_v; V]        P_k, P_v [n, D] learned for each layer and key/value head

What is unusual here: nothing about attention is new. The prefix is a shared `KVCache` of the past, like the
instruction that all prompts begin with; the text's positions continue behind it. It can start as what the model makes
of real tokens (the paper's advice for little data), and then the model starts as if it had read them.

With `hidden` > 0 a network reparametrises the prefix while it is trained, P = P_0 + W_2 tanh(W_1 e_i + b_1) + b_2 for
position i, where P_0 is what the tokens gave (zero without tokens), and W_2 and b_2 start at zero if there are tokens.
Evaluation, PEFT and merging know the multiplied-out P only.

Letters: n prefix length, L layers, K key/value heads, D width of a head, h hidden width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.methods.base import Method, PeftFolder, freeze, master_dtype, target_device
from graftlm.methods.cost_model import ParameterGroup, format_formula
from graftlm.methods.peft_format import PEFT_VERSION, WITHOUT_EFFECT, check_fields
from graftlm.models import CausalLM, KVCache, ModelConfig
from graftlm.models.base import PrefixModule
from graftlm.models.config import FAMILIES
from graftlm.text.collate import common_prefix_length


class Prefix(PrefixModule):
    """The learned keys and values of n positions: one matrix [n, 2 L K D] in PEFT's order, key and value by layer."""

    def __init__(self, shape: ModelConfig, start: Tensor, hidden: int, random: bool, rng: torch.Generator) -> None:
        super().__init__()
        self.shape, self.size = shape, len(start)
        self.start = start
        self._folded: Tensor | None = None
        self.past: nn.Parameter | None = None
        if not hidden:
            self.past = nn.Parameter(start)
            return

        def draw(*size: int, std: float) -> nn.Parameter:
            values = torch.empty(size, dtype=start.dtype).normal_(std=std, generator=rng)
            return nn.Parameter(values.to(start.device))

        d, width = shape.hidden_size, start.shape[1]
        self.embedding = draw(self.size, d, std=1.0)
        self.w1, self.b1 = draw(hidden, d, std=d**-0.5), draw(hidden, std=0.0)
        self.w2, self.b2 = draw(width, hidden, std=0.02 if random else 0.0), draw(width, std=0.0)

    def materialize(self) -> Tensor:
        """[n, 2 L K D], the network multiplied out; float32 or wider."""
        if self.past is not None:
            return self.past
        if self._folded is not None:
            return self._folded
        return self.start + torch.tanh(self.embedding @ self.w1.T + self.b1) @ self.w2.T + self.b2

    def set_initial(self, start: Tensor) -> None:
        """Start as these keys and values [n, 2 L K D] instead."""
        self.start = start
        if self.past is not None:
            self.past.data = start

    def segment(self, dtype: torch.dtype) -> KVCache:
        """The past that it is, shared by all rows."""
        shape = self.shape
        tables = self.materialize().to(dtype).view(self.size, 2 * shape.num_layers, shape.num_kv_heads, shape.head_dim)
        parts = tables.permute(1, 2, 0, 3)[:, None].unbind()
        return KVCache(list(parts[0::2]), list(parts[1::2]))

    def train(self, mode: bool = True) -> "Prefix":
        """Evaluation multiplies the network out once; training computes it anew in each forward pass."""
        super().train(mode)
        self._folded = None
        if not mode:
            self._folded = self.materialize().detach()
        return self


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Learned keys and values of `length` positions before every text."""

    length: int = 20
    hidden: int = 0
    """Width of the reparametrising network; 0: none, the keys and values themselves are trained."""
    init: str = ""
    """A text whose tokens it starts as, "random", or "" for what the run's prompts begin with."""
    tokens: tuple[int, ...] = ()
    """The tokens it starts as; `resolve_init` decides them. None: random."""

    name: ClassVar[str] = "prefix"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    default_lr: ClassVar[float] = 1e-2
    flags: ClassVar[Mapping[str, str]] = {"prefix_length": "length", "prefix_hidden": "hidden", "prefix_init": "init"}
    mergeable: ClassVar[bool] = False

    @property
    def positions(self) -> int:
        """n."""
        return self.length

    def resolve_init(self, prompts: Sequence[Sequence[int]], encode: Callable[[str], Sequence[int]]) -> "PrefixTuning":
        """Tokens of the text, or of what all prompts begin with (or the first, if nothing), repeated to n of them."""
        if self.init == "random":
            return self
        ids = list(encode(self.init)) if self.init else list(prompts[0][: common_prefix_length(prompts)] or prompts[0])
        return replace(self, tokens=tuple((ids * (self.length // len(ids) + 1))[: self.length]))

    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Put the prefix before all that the model reads; InputError where it does not fit, or for some layers only."""
        shape = model.config
        if self.layers is not None:
            raise InputError("--method prefix learns keys and values for every layer: leave out --train_layers")
        if self.length >= shape.max_positions:
            raise InputError(
                f"--prefix_length {self.length}: the model reads at most {shape.max_positions} tokens; shorten it"
            )
        if model.before is not None:
            raise InputError("the model has a prefix already; adapt a fresh base")
        freeze(model)
        start = self._noise(model, rng) if not self.tokens or model.device.type == "meta" else self._read(model)
        model.before = Prefix(shape, start, self.hidden, not self.tokens, rng)

    def init_from_base_weights(self, model: CausalLM) -> None:
        """Start as what the model makes of the tokens, where there are such."""
        prefix = model.before
        assert isinstance(prefix, Prefix)
        model.before = None
        prefix.set_initial(self._read(model) if self.tokens else prefix.start.to(model.device))
        model.before = prefix

    def _noise(self, model: CausalLM, rng: torch.Generator) -> Tensor:
        """[n, 2 L K D] to start as without tokens (zeros under a network), or before they can be read (zeros)."""
        noise = torch.zeros(self.length, width(model.config), dtype=master_dtype(model.dtype))
        if not self.tokens:
            noise = noise.normal_(std=0.02, generator=rng) * (self.hidden == 0)
        return noise.to(target_device(model.embed.weight))

    def _read(self, model: CausalLM) -> Tensor:
        """[n, 2 L K D]: the keys and values of the tokens."""
        master = master_dtype(model.dtype)
        read, mode = KVCache(), model.training
        with torch.no_grad():
            model.eval().hidden_states(torch.tensor([self.tokens], device=model.device), keep=read)
        model.train(mode)
        pairs = [t for pair in zip(read.keys, read.values, strict=True) for t in pair]
        return torch.cat([t[0].transpose(0, 1).flatten(1) for t in pairs], dim=1).to(master)

    def param_breakdown(self, shape: ModelConfig) -> list[ParameterGroup]:
        """n 2 L K D; with a network n d + h (d + 1) + (h + 1) 2 L K D."""
        n, h, d = self.length, self.hidden, shape.hidden_size
        letters = {"n": n, "h": h, "d": d, "L": shape.num_layers, "K": shape.num_kv_heads, "D": shape.head_dim}
        if not h:
            formula = format_formula("n 2 L K D", **letters)
            return [ParameterGroup("prefix, keys and values", n * width(shape), formula, "prefix", added=True)]
        count, formula = n * d + h * (d + 1) + (h + 1) * width(shape), "n d + h (d + 1) + (h + 1) 2 L K D"
        return [ParameterGroup("prefix, its network", count, format_formula(formula, **letters), "prefix", added=True)]

    @property
    def resumable_from_adapter(self) -> bool:
        """A network cannot be got back from what it comes to."""
        return self.hidden == 0

    @property
    def for_inference(self) -> "PrefixTuning":
        """Without the network, which is multiplied out, and with nothing to start from."""
        return replace(self, hidden=0, init="random", tokens=())

    def to_peft(self, model: CausalLM) -> PeftFolder:
        """PEFT's PREFIX_TUNING; a network is multiplied out."""
        assert isinstance(model.before, Prefix)
        config = {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            **_sizes(model.config, self.length),
            "num_transformer_submodules": 1,
            "encoder_hidden_size": model.config.hidden_size,
            "prefix_projection": False,
            "inference_mode": True,
            "peft_version": PEFT_VERSION,
        }
        return config, {"prompt_embeddings": _reordered(model.config, model.before.materialize().detach(), ours=False)}

    def from_peft(self, shape: ModelConfig, folder: PeftFolder, where: str) -> dict[str, Tensor]:
        """The inverse, for a method without a network."""
        found = self.from_foreign_peft(shape, folder, where)
        if found is None or not isinstance(found[0], PrefixTuning) or found[0].length != self.length:
            raise InputError(f"{where}: holds no prefix of {self.length} positions, as the run says")
        return found[1]

    @classmethod
    def from_foreign_peft(
        cls, shape: ModelConfig, folder: PeftFolder, where: str
    ) -> tuple[Method, dict[str, Tensor]] | None:
        """Any PREFIX_TUNING folder of PEFT's; its projection is multiplied out in the file already."""
        config, tensors = folder
        if config.get("peft_type") != cls.peft_type:
            return None
        check_fields(config, _FIELDS, {"modules_to_save"}, where)
        length = config.get("num_virtual_tokens")
        if not isinstance(length, int) or length < 1:
            raise InputError(f"{where}: num_virtual_tokens = {length!r} must be a whole number above 0")
        for key, value in _sizes(shape, length).items():
            if config.get(key, value) not in (value, None):
                raise InputError(f"{where}: {key} = {config[key]!r}, this base wants {value}")
        if config.get("num_transformer_submodules") not in (1, None):
            raise InputError(f"{where}: num_transformer_submodules = {config['num_transformer_submodules']!r}, not 1")
        if set(tensors) != {"prompt_embeddings"} or tensors["prompt_embeddings"].shape != (length, width(shape)):
            found = {name: list(t.shape) for name, t in tensors.items()}
            raise InputError(f"{where}: holds {found}, expected prompt_embeddings of shape {[length, width(shape)]}")
        past = _reordered(shape, tensors["prompt_embeddings"], ours=True)
        return cls(length=length, init="random"), {"before.past": past}


_FIELDS = WITHOUT_EFFECT | {
    *("peft_type", "num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"),
    *("num_transformer_submodules", "encoder_hidden_size", "prefix_projection", "init_weights"),
}


def width(shape: ModelConfig) -> int:
    """2 L K D: the numbers that one position's keys and values are."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim


def _reordered(shape: ModelConfig, past: Tensor, ours: bool) -> Tensor:
    """[n, 2 L K D] with the keys' dimensions in our order, of one in transformers', or the other way round."""
    head_order = FAMILIES[shape.family].rotary_permutation
    if head_order is None:
        return past
    order = head_order(shape)
    pairs = past.view(len(past), shape.num_layers, 2, shape.num_kv_heads, shape.head_dim).clone()
    pairs[:, :, 0] = pairs[:, :, 0][..., order if ours else order.argsort()]
    return pairs.flatten(1)


def _sizes(shape: ModelConfig, length: int) -> dict[str, Any]:
    heads = shape.num_kv_heads
    return {
        "num_virtual_tokens": length,
        "token_dim": heads * shape.head_dim,
        "num_attention_heads": heads,
        "num_layers": shape.num_layers,
    }
