"""What every method must keep, on GPT-2 and Llama shapes (grouped queries, biases), in one table: methods x properties.

In float64 on tiny models, where equality is the claim.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from graftlm.errors import InputError
from graftlm.exchange.peft import read_adapter, save_adapter
from graftlm.methods import Full, LoRA, Method, method_from_json
from graftlm.methods.base import delta_state, load_delta, totals, trainable
from graftlm.models import CausalLM
from graftlm.text.data import Example
from graftlm.training.objectives import completion, make_batch
from tiny import FAMILIES, model_of

METHODS: dict[str, Callable[[], Method]] = {
    "lora": lambda: LoRA(rank=3, alpha=6.0, dropout=0.0),
    "lora q,v": lambda: LoRA(rank=2, alpha=5.0, targets=("q", "v"), dropout=0.0),
    "lora all": lambda: LoRA(rank=3, alpha=6.0, targets=("q", "k", "v", "o", "up", "down"), dropout=0.0),
    "lora upper": lambda: LoRA(rank=3, alpha=6.0, dropout=0.0, layers=(1, 2)),
    "lora lower": lambda: LoRA(rank=3, alpha=6.0, dropout=0.0, layers=(0, 1)),
    "full": lambda: Full(),
    "full upper": lambda: Full(layers=(1, 2)),
}
table = pytest.mark.parametrize("kind", FAMILIES)
rows = pytest.mark.parametrize("name", METHODS)


def example(prompt: list[int], completion_ids: list[int]) -> Example:
    return Example(tuple(prompt), tuple(completion_ids), None, "", "", "")


def examples(shared: int = 5) -> list[Example]:
    rng = torch.Generator().manual_seed(7)
    head = torch.randint(1, 61, (shared,), generator=rng).tolist()
    return [example(head + torch.randint(1, 61, (n,), generator=rng).tolist(), [n + 1, 0]) for n in (4, 9, 6, 3)]


def installed(name: str, kind: str, dtype: torch.dtype = torch.float64) -> tuple[CausalLM, Method]:
    model, method = model_of(kind, dtype=dtype), METHODS[name]()
    method.install(model, torch.Generator().manual_seed(3))
    return model, method


def steps(model: CausalLM, count: int = 2) -> None:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2, weight_decay=0.0)
    for _ in range(count):
        model.train()
        completion(model, make_batch(examples(), "completion")).backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model: CausalLM) -> torch.Tensor:
    ids = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(ids)


@table
@rows
def test_1_a_fresh_method_changes_nothing(name: str, kind: str) -> None:
    expected = logits(model_of(kind))
    model, _ = installed(name, kind)
    assert torch.equal(logits(model.train()), expected)
    torch.testing.assert_close(logits(model.eval()), expected, rtol=0, atol=1e-12)


@table
@rows
@pytest.mark.parametrize("evaluate_first", [False, True])
def test_2_frozen_tensors_stay_and_all_trained_ones_move(name: str, kind: str, evaluate_first: bool) -> None:
    model, _ = installed(name, kind)
    model.set_dropout(0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    if evaluate_first:
        logits(model.eval())
    steps(model)
    for n, p in model.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, before[n]), f"{n} is frozen and moved"
        elif n.endswith("attn.k.bias"):
            # Softmax ignores what all scores of a query have in common, so the gradient is zero but for rounding.
            assert kind != "llama" and name.startswith("full")
        else:
            assert not torch.equal(p, before[n]), f"{n} is trained and did not move"


def test_2_the_gradient_of_a_key_bias_is_zero() -> None:
    model, _ = installed("full", "gpt2")
    model.train()
    completion(model, make_batch(examples(), "completion")).backward()
    grads = {n: p.grad for n, p in trainable(model).items() if p.grad is not None}
    norm = sum(g.norm().item() ** 2 for g in grads.values()) ** 0.5
    for n, g in grads.items():
        assert (g.norm().item() < 1e-9 * norm) == n.endswith("attn.k.bias")


@table
@pytest.mark.parametrize("name", [n for n in METHODS if not n.startswith("full")])
def test_3_save_and_load_is_exact_and_strict(name: str, kind: str, tmp_path: Path) -> None:
    model, method = installed(name, kind)
    assert isinstance(method, LoRA)
    steps(model)
    save_adapter(tmp_path, model.shape, method, delta_state(model), "base")
    fresh, _ = installed(name, kind)
    load_delta(fresh, read_adapter(tmp_path, fresh.shape, method), "here")
    for n, p in trainable(model).items():
        assert torch.equal(p, trainable(fresh)[n])
    assert torch.equal(logits(fresh.train()), logits(model.train()))
    assert torch.equal(logits(fresh.eval()), logits(model.eval()))
    other = LoRA(rank=method.rank + 1, alpha=method.alpha, targets=method.targets)
    with pytest.raises(InputError, match=r"adapter_config\.json: r is"):
        read_adapter(tmp_path, model.shape, other)
    fewer = LoRA(rank=method.rank, alpha=method.alpha, targets=("o",))
    with pytest.raises(InputError, match=r"adapter_config\.json: "):
        read_adapter(tmp_path, model.shape, fewer)
    if method.layers is None:  # an adapter of block 1 fits any model that has a block 1; the base's hash guards that
        with pytest.raises(InputError, match=r"is missing|has shape|belongs to no"):
            read_adapter(tmp_path, model_of(kind, layers=3).shape, method)
    elsewhere = LoRA(rank=method.rank, alpha=method.alpha, targets=method.targets, layers=(0, 2))
    with pytest.raises(InputError, match="layers_to_transform is"):
        read_adapter(tmp_path, model.shape, elsewhere)


@table
@rows
def test_3_loading_is_strict(name: str, kind: str) -> None:
    model, _ = installed(name, kind)
    state = {n: t.clone() for n, t in delta_state(model).items()}
    first = min(state)
    with pytest.raises(InputError, match=f"here: {first} is missing \\(1 of {len(state)} are\\)"):
        load_delta(model, {n: t for n, t in state.items() if n != first}, "here")
    with pytest.raises(InputError, match="here: extra belongs to no trained part"):
        load_delta(model, {**state, "extra": state[first]}, "here")
    with pytest.raises(InputError, match="has shape"):
        load_delta(model, {**state, first: state[first][:1].repeat(99, *[1] * (state[first].dim() - 1))}, "here")


@table
@pytest.mark.parametrize("name", [n for n in METHODS if not n.startswith("full")])
def test_4_merged_equals_unmerged_and_unmerging_is_exact(name: str, kind: str) -> None:
    model, _ = installed(name, kind)
    steps(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    unmerged = logits(model.train())
    torch.testing.assert_close(logits(model.eval()), unmerged, rtol=0, atol=1e-9)
    model.train()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@table
@rows
def test_5_the_count_is_the_closed_form(name: str, kind: str) -> None:
    model, method = installed(name, kind)
    trained, total = totals(model)
    assert trained == method.count(model.shape)
    assert total == sum(p.numel() for p in model_of(kind).parameters()) + (0 if name.startswith("full") else trained)


@table
@rows
def test_7_batching_padding_and_sharing_change_rounding_only(name: str, kind: str) -> None:
    """The gradient of one shared, padded batch against that of single plain rows; 6 (resume) is tests/training's."""
    model, _ = installed(name, kind)
    steps(model, 1)
    model.train()
    model.zero_grad()
    losses = []
    for e in examples():
        loss = completion(model, make_batch([e], "completion", share=False))
        loss.backward()
        losses.append(loss.item())
    expected = {n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None}
    norm = sum(g.norm().item() ** 2 for g in expected.values()) ** 0.5
    for share in (False, True):
        model.zero_grad()
        batch = make_batch(examples(), "completion", share=share)
        assert (batch.shared.shape[1] > 0) == share
        loss = completion(model, batch)
        loss.backward()
        assert abs(loss.item() - sum(losses)) < 1e-9 * sum(losses)
        got = {n: p.grad for n, p in trainable(model).items() if p.grad is not None}
        assert got.keys() == expected.keys()
        difference = sum((got[n] - expected[n]).norm().item() ** 2 for n in got) ** 0.5
        assert difference < 1e-9 * norm


@rows
def test_trained_weights_are_float32_beside_a_bfloat16_base(name: str) -> None:
    model, method = installed(name, "llama", torch.bfloat16)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} <= {torch.bfloat16}
    assert model.dtype == torch.bfloat16 and model.hidden(torch.tensor([[1, 2]])).dtype == torch.bfloat16
    steps(model)
    assert method_from_json(method.to_json()) == method
