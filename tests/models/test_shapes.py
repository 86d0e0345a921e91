"""The shapes that docstrings tell, said once more for jaxtyping, which has beartype look at them at every call.

What is unusual here: the package itself does not know of it. A signature below has the name and the arguments of a
function of ours, and no body; while a test runs, every module that holds the function holds one in its place that looks
first at what goes in, and then at what comes out. A letter stands for one number within a call.
"""

import functools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import Float, Int, TypeCheckError, jaxtyped
from torch import Tensor

from graftlm.methods import DoRA, LoRA, Method
from graftlm.methods.adapter import Adapter, BottleneckLinear
from graftlm.methods.ia3 import IA3, IA3Linear
from graftlm.methods.lora import LoRALinear
from graftlm.methods.prefix import PrefixTuning
from graftlm.models import CausalLM, base, layers
from graftlm.models.layers import KVCache
from graftlm.text.collate import Example
from graftlm.training import batches
from graftlm.training.objectives import Objective, dpo
from graftlm.training.objectives.sft import SFT
from tiny import FAMILIES, model_of


def linear(self: Any, x: Float[Tensor, "*n {self.in_features}"]) -> Float[Tensor, "*n {self.out_features}"]: ...


def norm(self: Any, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]: ...


def embed_in_dtype(
    self: Any, ids: Int[Tensor, "*n"], dtype: torch.dtype
) -> Float[Tensor, "*n {self.embedding_dim}"]: ...


def rope_cos_sin(
    positions: Int[Tensor, "*n"], head_dim: int, rope: Any, dtype: torch.dtype
) -> tuple[Float[Tensor, "*n {head_dim//2}"], Float[Tensor, "*n {head_dim//2}"]]: ...


def apply_rotary_emb(
    x: Float[Tensor, "*n h width"],
    cos: Float[Tensor, "*m half"],
    sin: Float[Tensor, "*m half"],
    fused: bool = True,
    kernels: Any = layers.TORCH,
) -> Float[Tensor, "*n h width"]: ...


def scaled_dot_product(
    q: Float[Tensor, "b t h d"],
    parts: Any,
    mask: Float[Tensor, "#b 1 1 t s"] | None,
    layer: Any,
    drop: Any,
    sinks: Any = None,
) -> Float[Tensor, "b t h d"]: ...


def _scores(q: Float[Tensor, "b t k g d"], k: Float[Tensor, "#b k s d"]) -> Float[Tensor, "b k g t s"]: ...


def _weighted(w: Float[Tensor, "b k g t s"], v: Float[Tensor, "#b k s d"]) -> Float[Tensor, "b k g t d"]: ...


def attention_forward(self: Any, x: Float[Tensor, "*n d"], index: int, inputs: Any) -> Float[Tensor, "*m d"]: ...


def flat_to_padded(flat: Int[Tensor, " n"], b: int, t: int) -> tuple[Int[Tensor, "{b} m"], Int[Tensor, " n"]]: ...


def hidden_states(
    self: Any,
    ids: Int[Tensor, "b t"],
    past: Sequence[KVCache] = (),
    cache: KVCache | None = None,
    positions: Int[Tensor, "b m"] | None = None,
) -> Float[Tensor, "b _ {self.config.hidden_size}"]: ...


def forward_shared_prefix(
    self: Any,
    prefix: Int[Tensor, "1 p"],
    ids: Int[Tensor, "b t"],
    positions: Int[Tensor, "b m"] | None = None,
    cached_hidden: Any = None,
    layout: Any = None,
) -> tuple[Float[Tensor, "p {self.config.hidden_size}"] | None, Float[Tensor, "b _ {self.config.hidden_size}"]]: ...


def forward_lower_layers(
    self: Any, prefix: Int[Tensor, "1 p"], ids: Int[Tensor, "b t"], end: int, layout: Any = None
) -> Float[Tensor, "{prefix.numel()+ids.numel()} {self.config.hidden_size}"]: ...


def logits(self: Any, h: Float[Tensor, "*n d"]) -> Float[Tensor, "*n {self.config.vocab_size}"]: ...


def loss(
    self: Any,
    h: Float[Tensor, "n d"],
    rows: Int[Tensor, " k"],
    targets: Int[Tensor, " k"],
    weights: Float[Tensor, " k"],
) -> Float[Tensor, ""]: ...


def log_probs(
    self: Any, h: Float[Tensor, "n d"], rows: Int[Tensor, " k"], targets: Int[Tensor, " k"]
) -> Float[Tensor, " k"]: ...


def merged_weight(self: Any) -> Float[Tensor, "{self.out_features} {self.in_features}"]: ...


def forward_batch(
    model: CausalLM, batch: batches.TrainingBatch
) -> tuple[Float[Tensor, "p d"] | None, Float[Tensor, "r d"], Int[Tensor, " n"]]: ...


def objective(
    self: Any, model: CausalLM, batch: batches.TrainingBatch
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]: ...


def sequence_logps(
    model: CausalLM, hidden: batches.HiddenStates, batch: batches.TrainingBatch
) -> tuple[Float[Tensor, " s"], Float[Tensor, " s"]]: ...


def of_pairs(self: Any, sums: dpo.SequenceLogProbs) -> Float[Tensor, " b"]: ...


def rewards(self: Any, sums: dpo.SequenceLogProbs) -> Float[Tensor, "b 2"]: ...


SIGNATURES: dict[tuple[Any, str], Callable[..., Any]] = {
    (layers.Linear, "forward"): linear,
    (LoRALinear, "forward"): linear,
    (BottleneckLinear, "forward"): linear,
    (IA3Linear, "forward"): linear,
    (LoRALinear, "merged_weight"): merged_weight,
    (layers.RMSNorm, "forward"): norm,
    (layers.LayerNorm, "forward"): norm,
    (layers.Embedding, "embed_in_dtype"): embed_in_dtype,
    (base, "rope_cos_sin"): rope_cos_sin,
    (layers, "apply_rotary_emb"): apply_rotary_emb,
    (layers, "scaled_dot_product"): scaled_dot_product,
    (layers, "_scores"): _scores,
    (layers, "_weighted"): _weighted,
    (layers.Attention, "forward"): attention_forward,
    (base, "flat_to_padded"): flat_to_padded,
    (CausalLM, "hidden_states"): hidden_states,
    (CausalLM, "forward_shared_prefix"): forward_shared_prefix,
    (CausalLM, "forward_lower_layers"): forward_lower_layers,
    (CausalLM, "logits"): logits,
    (CausalLM, "loss"): loss,
    (CausalLM, "log_probs"): log_probs,
    (batches, "forward_batch"): forward_batch,
    (batches, "sequence_logps"): sequence_logps,
    (Objective, "loss"): objective,
    (dpo.DPO, "losses"): of_pairs,
    (dpo.DPO, "logits"): of_pairs,
    (dpo.DPO, "rewards"): rewards,
}
met: Counter[str] = Counter()


def looking(signature: Callable[..., Any], really: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, told apart from itself by nothing but that it looks."""

    @functools.wraps(signature)
    def call(*args: Any, **named: Any) -> Any:
        met[name] += 1
        return really(*args, **named)

    return jaxtyped(typechecker=beartype)(call)


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function above looks, wherever it is held."""
    met.clear()
    ours = [module for name, module in sys.modules.items() if name.startswith("graftlm.")]
    for (owner, name), signature in SIGNATURES.items():
        really = vars(owner)[name]
        looks = looking(signature, really, f"{owner.__name__}.{name}")
        monkeypatch.setattr(owner, name, looks)
        for module in ours:
            if vars(module).get(name) is really:
                monkeypatch.setattr(module, name, looks)


METHODS: dict[str, Callable[[], Method]] = {
    "lora": lambda: LoRA(rank=3, alpha=6.0, targets=("q", "k", "v", "o", "up", "down")),
    "dora": lambda: DoRA(rank=3, alpha=6.0),
    "adapter": lambda: Adapter(rank=3),
    "prefix": lambda: PrefixTuning(length=3, tokens=(5, 40, 2)),
    "ia3": lambda: IA3(targets=("q", "k", "v", "o", "up", "down")),
}


def example(number: int, pair: bool) -> Example:
    prompt = (1, 2, 3, 4, 5, *range(6, 8 + number))
    answers = ((7, *range(2, 3 + number), 0), (9, 0) if pair else ())
    return Example(prompt, answers[0], None, "", "", "", answers[1], (-3.0, -4.0) if pair else None)


@pytest.mark.usefixtures("looked_at")
def test_training_scoring_and_decoding_keep_the_shapes_they_tell() -> None:
    for kind, method in (*((kind, "lora") for kind in FAMILIES), *(("llama", method) for method in METHODS)):
        model = model_of(kind, dtype=torch.float32)
        METHODS[method]().install(model, torch.Generator().manual_seed(3))
        for fused in (True, False):
            model.use_fused_ops(fused)
            train(model)
        decode(model.eval())
    assert LoRALinear(8, 6, rank=2).merged_weight().shape == (6, 8)
    assert set(met) == {f"{owner.__name__}.{name}" for owner, name in SIGNATURES}, "a function that nothing called"


def train(model: CausalLM) -> None:
    model.train()
    for sft, share, targets_only in ((SFT(), True, True), (SFT(), False, False), (SFT("all"), True, True)):
        options = batches.CollateOptions(share, targets_only)
        sft.loss(model, sft.collate([example(n, False) for n in range(4)], options))[0].backward()
    for how in (dpo.DPO(), dpo.DPO("simpo")):
        pairs = how.collate([example(n, True) for n in range(4)], batches.CollateOptions())
        how.loss(model, pairs)[0].backward()


@torch.inference_mode()
def decode(model: CausalLM) -> None:
    shared, cache, rows = KVCache(), model.empty_cache(2, 6), torch.tensor([[4, 5], [6, 7]])
    model(torch.tensor([[1, 2, 3]]), cache=shared)
    assert model(rows, past=(shared, cache), cache=cache).shape == (2, 2, model.config.vocab_size)
    assert model(rows, past=(shared,), positions=torch.tensor([1, 2, 3])).shape == (3, model.config.vocab_size)


def test_a_look_sees_what_does_not_fit() -> None:
    looks = looking(linear, layers.Linear.forward, "linear")
    narrow = layers.Linear(3, 2)
    assert looks(narrow, torch.zeros(4, 3)).shape == (4, 2)
    for x in (torch.zeros(4, 2), torch.zeros(4, 3, dtype=torch.long)):
        with pytest.raises(TypeCheckError, match="x"):
            looks(narrow, x)
    turned = looking(linear, lambda self, x: layers.Linear.forward(self, x).T, "turned")
    with pytest.raises(TypeCheckError, match="return"):
        turned(narrow, torch.zeros(4, 3))
