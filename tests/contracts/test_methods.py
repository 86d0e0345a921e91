"""What every method must keep, on four families and on other structures of a layer: methods x properties.

In float64 on tiny models, where equality is the claim, and for the families in float32 and bfloat16, to their rounding.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from graftlm.errors import InputError
from graftlm.exchange.huggingface import read_adapter, save_adapter
from graftlm.exchange.load import adapter_on_shared_base
from graftlm.methods import METHODS, Adapter, BitFit, LoRA, Method, PrefixTuning, method_from_json
from graftlm.methods.base import count_parameters, load_trainable_state_dict, trainable, trainable_state_dict
from graftlm.methods.cost_model import parameters
from graftlm.methods.ia3 import IA3
from graftlm.models import CausalLM
from graftlm.models.config import FAMILIES as FAMILY_TABLE
from graftlm.models.config import LayerConfig, RopeConfig
from graftlm.text.collate import Example
from graftlm.training.batches import CollateOptions
from graftlm.training.objectives.sft import SFT
from tiny import FAMILIES

EXAMPLES: dict[str, Method] = {
    f"{name} {label}".strip(): cls(**fields) for name, cls in METHODS.items() for label, fields in cls.examples.items()
}
"""Label -> instance, of every method: what its class gives as `examples`."""
STRUCTURES: dict[str, tuple[str, tuple[LayerConfig, ...]]] = {
    "norms on both sides, a window": (
        "gemma2",
        (replace(FAMILY_TABLE["gemma2"].layer, window=4, attention_softcap=5.0), FAMILY_TABLE["gemma2"].layer),
    ),
    "fused and rotated in part": ("phi3", (replace(FAMILY_TABLE["phi3"].layer, rope=RopeConfig(dim=4)),)),
    "parallel after one norm": ("cohere", (replace(FAMILY_TABLE["cohere"].layer, qk_norm="head"),)),
}
"""Kind -> family, whose names adapters have, and the settings of layers."""
KINDS = [*FAMILIES, *STRUCTURES]
table = pytest.mark.parametrize("kind", KINDS)
rows = pytest.mark.parametrize("name", EXAMPLES)
adapters = pytest.mark.parametrize("name", [n for n, method in EXAMPLES.items() if not method.is_full_finetune])
# How far two ways of computing the same may lie apart, in units of the largest number compared.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05}
FORMATS = [(kind, dtype) for kind in KINDS for dtype in (ROUNDING if kind in FAMILIES else [torch.float64])]
formats = pytest.mark.parametrize(("kind", "dtype"), FORMATS, ids=lambda value: str(value).removeprefix("torch."))


def model_of(kind: str, dtype: torch.dtype = torch.float64, **sizes: int) -> CausalLM:
    if kind in FAMILIES:
        return tiny.model_of(kind, dtype=dtype, **sizes)
    family, layers = STRUCTURES[kind]
    return tiny.random_model(replace(tiny.shape_of("llama", **sizes), family=family, layers=layers), 0, 0.2, dtype)


def example(prompt: list[int], completion_ids: list[int]) -> Example:
    return Example(tuple(prompt), tuple(completion_ids), None, "", "", "")


def examples(shared: int = 5) -> list[Example]:
    rng = torch.Generator().manual_seed(7)
    head = torch.randint(1, 61, (shared,), generator=rng).tolist()
    return [example(head + torch.randint(1, 61, (n,), generator=rng).tolist(), [n + 1, 0]) for n in (4, 9, 6, 3)]


def installed(name: str, kind: str, dtype: torch.dtype = torch.float64) -> tuple[CausalLM, Method]:
    model, method = model_of(kind, dtype=dtype), EXAMPLES[name]
    method.install(model, torch.Generator().manual_seed(3))
    return model, method


def steps(model: CausalLM, count: int = 1) -> None:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.0)
    for _ in range(count):
        model.train()
        SFT().loss(model, SFT().collate(examples(), CollateOptions()))[0].backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: CausalLM, before: tuple[int, ...] = ()) -> torch.Tensor:
    """Of two rows of tokens, behind those that stand before them."""
    ids = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(torch.cat([torch.tensor([before, before], dtype=torch.long), ids], dim=1))[:, len(before) :]


def test_every_method_has_examples() -> None:
    assert {method.name for method in EXAMPLES.values()} == METHODS.keys()


def near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert (got - expected).abs().max() <= ROUNDING[dtype] * max(1.0, expected.abs().max().item())


@rows
@formats
def test_1_a_fresh_method_changes_nothing(name: str, kind: str, dtype: torch.dtype) -> None:
    """A prefix that is made from tokens: nothing but having read them."""
    model, method = installed(name, kind, dtype)
    expected = logits(model_of(kind, dtype=dtype), getattr(method, "tokens", ()))
    if name.startswith(("prefix", "dora")):  # the same numbers, added up in another order
        near(logits(model.train()), expected, dtype)
    else:
        assert torch.equal(logits(model.train()), expected)
    near(logits(model.eval()), expected, dtype)


@rows
@pytest.mark.parametrize(
    ("kind", "dtype", "evaluate_first"),
    [(*each, False) for each in FORMATS] + [(kind, torch.float64, True) for kind in KINDS],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_2_frozen_tensors_stay_and_all_trained_ones_move(
    name: str, kind: str, dtype: torch.dtype, evaluate_first: bool
) -> None:
    model, _ = installed(name, kind, dtype)
    model.set_dropout(0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    if evaluate_first:
        logits(model.eval())
    steps(model, 2)  # the first one's gradient of A is zero, as B is
    for n, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, before[n]), f"{n} is frozen and moved"
        elif kind == "gpt2" and n.endswith("attn.k.bias"):
            # Softmax ignores what all scores of a query have in common, so the gradient is zero but for rounding.
            assert name.startswith(("full", "bitfit"))
        else:
            assert not torch.equal(p, before[n]), f"{n} is trained and did not move"


@pytest.mark.parametrize("name", ["full", "bitfit"])
def test_2_the_gradient_of_a_key_bias_is_zero(name: str) -> None:
    model, _ = installed(name, "gpt2")
    model.train()
    SFT().loss(model, SFT().collate(examples(), CollateOptions()))[0].backward()
    grads = {n: p.grad for n, p in trainable(model).items() if p.grad is not None}
    norm = sum(g.norm().item() ** 2 for g in grads.values()) ** 0.5
    for n, g in grads.items():
        assert (g.norm().item() < 1e-9 * norm) == n.endswith("attn.k.bias")


@adapters
@formats
def test_3_save_and_load_is_exact(name: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, method = installed(name, kind, dtype)
    steps(model)
    save_adapter(tmp_path, model, method, "base")
    fresh = model_of(kind, dtype=dtype)
    method.for_inference.install(fresh, torch.Generator().manual_seed(4))
    load_trainable_state_dict(fresh, read_adapter(tmp_path, fresh.config, method.for_inference), "here")
    if method.resumable_from_adapter:
        for n, p in trainable(model).items():
            assert torch.equal(p, trainable(fresh)[n])
    assert torch.equal(logits(fresh.train()), logits(model.train()))
    assert torch.equal(logits(fresh.eval()), logits(model.eval()))


@table
@adapters
def test_3_loading_with_other_settings_is_an_error(name: str, kind: str, tmp_path: Path) -> None:
    model, method = installed(name, kind)
    save_adapter(tmp_path, model, method, "base")
    method = method.for_inference
    if isinstance(method, LoRA):
        changes: list[dict[str, Any]] = [{"rank": method.rank + 1}, {"targets": ("o",)}, {"alpha": 1.5}]
        changes += [{"layers": (0, 2)}, {"rslora": not method.rslora}]
    elif isinstance(method, PrefixTuning):
        changes = [{"length": 4}]
    elif isinstance(method, IA3):
        changes = [{"layers": (0, 2)}, {"targets": ("o",)}]
    else:
        changes = [{"layers": (0, 2)}, {"rank": 5} if isinstance(method, Adapter) else {"add_biases": False}]
    for change in changes:
        with pytest.raises(InputError, match=r"(adapter_config|graft_adapter)\.json: "):
            read_adapter(tmp_path, model.config, replace(method, **change))


@table
@adapters
def test_3_an_adapter_of_another_base_is_an_error(name: str, kind: str, tmp_path: Path) -> None:
    model, method = installed(name, kind)
    save_adapter(tmp_path, model, method, "base")
    if method.layers is not None:
        return  # an adapter of block 1 fits any model that has a block 1; the base's hash guards that
    larger = model_of(kind, layers=3)
    method.for_inference.install(larger, torch.Generator())
    with pytest.raises(InputError, match=r"is missing|has shape|belongs to no|this base wants"):
        load_trainable_state_dict(larger, read_adapter(tmp_path, larger.config, method.for_inference), "here")


@table
@rows
def test_3_loading_is_strict(name: str, kind: str) -> None:
    model, _ = installed(name, kind)
    state = {n: t.clone() for n, t in trainable_state_dict(model).items()}
    first = min(state)
    with pytest.raises(InputError, match=f"here: {first} is missing \\(1 of {len(state)} are\\)"):
        load_trainable_state_dict(model, {n: t for n, t in state.items() if n != first}, "here")
    with pytest.raises(InputError, match="here: extra belongs to no trained part"):
        load_trainable_state_dict(model, {**state, "extra": state[first]}, "here")
    with pytest.raises(InputError, match="has shape"):
        load_trainable_state_dict(
            model, {**state, first: state[first][:1].repeat(99, *[1] * (state[first].dim() - 1))}, "here"
        )


@adapters
@formats
def test_4_merged_equals_unmerged_and_unmerging_is_exact(name: str, kind: str, dtype: torch.dtype) -> None:
    model, _ = installed(name, kind, dtype)
    steps(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    unmerged = logits(model.train())
    near(logits(model.eval()), unmerged, dtype)
    model.train()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@table
@rows
def test_5_the_count_is_the_closed_form(name: str, kind: str) -> None:
    model, method = installed(name, kind)
    trained, total = count_parameters(model)
    assert trained == method.count(model.config) == method.count(model_of(kind).config)
    new = 0 if name.startswith("full") else trained
    if isinstance(method, BitFit):
        new = parameters(model.config) - parameters(model_of(kind).config)
    assert total == sum(p.numel() for p in model_of(kind).parameters()) + new


@rows
@formats
def test_7_batching_padding_and_sharing_change_rounding_only(name: str, kind: str, dtype: torch.dtype) -> None:
    """The gradient of one batch, padded or packed, against that of single rows; 6 (resume) is tests/training's."""
    model, _ = installed(name, kind, dtype)
    steps(model, 1)
    model.train()
    model.zero_grad()
    losses = []
    for e in examples():
        loss, _ = SFT().loss(model, SFT().collate([e], CollateOptions(False, False)))
        loss.backward()
        losses.append(loss.item())
    expected = {n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None}
    norm = sum(g.norm().item() ** 2 for g in expected.values()) ** 0.5
    for options in (CollateOptions(False), CollateOptions(True), CollateOptions(row_tokens=20)):
        model.zero_grad()
        batch = SFT().collate(examples(), options)
        assert (batch.shared.shape[1] > 0) == options.share_prefix
        assert (len(batch.ids) < len(examples())) == bool(options.row_tokens)
        loss, _ = SFT().loss(model, batch)
        loss.backward()
        assert abs(loss.item() - sum(losses)) < ROUNDING[dtype] * sum(losses)
        got = {n: p.grad for n, p in trainable(model).items() if p.grad is not None}
        assert got.keys() == expected.keys()
        difference = sum((got[n] - expected[n]).norm().item() ** 2 for n in got) ** 0.5
        assert difference < ROUNDING[dtype] * norm


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Method, torch.Tensor]]:
    """The folder of a trained adapter, its method, and the logits of the model on which it was trained."""

    @cache
    def make(name: str, kind: str) -> tuple[Path, Method, torch.Tensor]:
        model, method = installed(name, kind)
        steps(model)
        folder = tmp_path_factory.mktemp("adapter")
        save_adapter(folder, model, method, "base")
        return folder, method, logits(model.train())

    return make


@table
@adapters
def test_several_adapters_share_one_base(name: str, kind: str, saved: Callable[..., Any]) -> None:
    """Each behaves as if alone, none copies the base, and the base does not notice."""
    base = model_of(kind)
    plain = logits(base)
    made = []
    for other in (name, "lora all"):
        folder, method, alone = saved(other, kind)
        together = adapter_on_shared_base(base, folder, method)
        made.append((together, alone))
        shared = {p.data_ptr() for p in base.parameters()}
        own = {n for n, p in together.named_parameters() if p.data_ptr() not in shared}
        new = {n for n, _ in together.named_parameters()} - {n for n, _ in base.named_parameters()}
        assert own == trainable(together).keys() | new
    for together, alone in made:
        near(logits(together), alone, torch.float64)
    assert torch.equal(logits(base), plain)


@rows
def test_trained_weights_are_float32_beside_a_bfloat16_base(name: str) -> None:
    model, method = installed(name, "llama", torch.bfloat16)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} <= {torch.bfloat16}
    assert model.dtype == torch.bfloat16 and model.hidden_states(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    steps(model)
    assert method_from_json(method.to_json()) == method
