"""The past as an argument: shared, per row, with and without gradient, always what one plain pass gives."""

import pytest
import torch

from graftlm.models import CausalLM, KVCache
from tiny import FAMILIES, model_of


def ids_of(rows: int, tokens: int, shared: int = 0, seed: int = 1) -> torch.Tensor:
    ids = torch.randint(0, 61, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    ids[:, :shared] = ids[:1, :shared]
    return ids


def global_norm(grads: dict[str, torch.Tensor]) -> float:
    return sum(g.norm().item() ** 2 for g in grads.values()) ** 0.5


def gradients(model: CausalLM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_shared_segment_gives_the_logits_and_the_gradient_of_the_whole(kind: str) -> None:
    model, ids = model_of(kind), ids_of(3, 20, shared=7)
    weights = torch.randn(3, 13, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    whole = model(ids)[:, 7:]
    expected = gradients(model, (whole * weights).sum())
    shared = KVCache()
    model.hidden_states(ids[:1, :7], cache=shared)
    parts = model(ids[:, 7:], past=(shared,))
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-9)
    got = gradients(model, (parts * weights).sum())
    assert got.keys() == expected.keys()
    difference = global_norm({name: got[name] - expected[name] for name in got})
    assert difference <= 1e-9 * global_norm(expected)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_lead_beside_its_rows_equals_a_segment_before_them(kind: str) -> None:
    model, ids = model_of(kind), ids_of(3, 20, shared=7)
    shared = KVCache()
    before = model.hidden_states(ids[:1, :7], cache=shared)
    behind = model.hidden_states(ids[:, 7:], past=(shared,))
    lead, rows = model.forward_shared_prefix(ids[:1, :7], ids[:, 7:])
    torch.testing.assert_close(lead, before[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(rows, behind, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("p", [0, 7])
def test_only_the_positions_that_are_wanted_behind_a_lead(kind: str, p: int) -> None:
    model, ids = model_of(kind), ids_of(3, 20, shared=7)
    at = torch.tensor([[12, 0], [3, 3], [0, 11]])  # in any order, also twice
    whole = model.hidden_states(ids)[torch.arange(3)[:, None], p + at]
    lead, rows = model.forward_shared_prefix(ids[:1, :p], ids[:, p:], at)
    assert lead is None
    torch.testing.assert_close(rows, whole, rtol=0, atol=1e-9)
    weights = torch.randn(rows.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = gradients(model, (whole * weights).sum())
    got = gradients(model, (rows * weights).sum())
    assert got.keys() == expected.keys()
    assert global_norm({name: got[name] - expected[name] for name in got}) <= 1e-9 * global_norm(expected)


@pytest.mark.parametrize("kind", FAMILIES)
def test_only_the_positions_that_are_wanted_behind_a_past(kind: str) -> None:
    model, ids = model_of(kind), ids_of(3, 20, shared=7)
    at = torch.tensor([[12, 0], [3, 3], [0, 11]])
    shared, cache = KVCache(), model.empty_cache(3, 9)
    assert cache.lengths is not None
    with torch.no_grad():
        model.hidden_states(ids[:1, :7], cache=shared)
        model.hidden_states(ids_of(3, 9, seed=4), past=(shared,), cache=cache)
        cache.lengths += torch.tensor([9, 1, 4])
        whole = model.hidden_states(ids[:, 7:], past=(shared, cache))
        some = model.hidden_states(ids[:, 7:], past=(shared, cache), positions=at)
    torch.testing.assert_close(some, whole[torch.arange(3)[:, None], at], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("p", [0, 7])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_the_lower_layers_first_and_the_others_behind_them(kind: str, p: int, layers: int) -> None:
    model, ids = model_of(kind), ids_of(3, 20, shared=7)
    lead, rows = ids[:1, :p], ids[:, p:]
    x = model.forward_lower_layers(lead, rows, layers)
    assert x.shape == (p + 3 * (20 - p), 32)
    for a, b in zip(
        model.forward_shared_prefix(lead, rows, cached_hidden=(layers, x)),
        model.forward_shared_prefix(lead, rows),
        strict=True,
    ):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("gradient", [False, True])
def test_segments_of_every_kind_together(kind: str, gradient: bool) -> None:
    """Shared instruction, then a cache that holds another number of tokens for each row, then new tokens."""
    model, ids, lengths = model_of(kind), ids_of(3, 20, shared=5), [6, 9, 2]
    with torch.set_grad_enabled(gradient):
        shared = KVCache()
        model.hidden_states(ids[:1, :5], cache=shared)
        cache = model.empty_cache(3, 12)
        assert cache.lengths is not None
        model.hidden_states(ids[:, 5:14], past=(shared,), cache=cache)  # padded on the right: not all nine are real
        cache.lengths += torch.tensor(lengths)
        new = ids_of(3, 2, seed=9)
        logits = model(new, past=(shared, cache), cache=cache)
    for row, length in enumerate(lengths):
        plain = model(torch.cat([ids[row, : 5 + length], new[row]])[None])[0, -2:]
        torch.testing.assert_close(logits[row], plain, rtol=0, atol=1e-9)


def test_several_shared_segments_stand_one_behind_the_other() -> None:
    model, ids = model_of("llama"), ids_of(2, 18, shared=10)
    first, second = KVCache(), KVCache()
    with torch.no_grad():
        model.hidden_states(ids[:1, :4], cache=first)
        model.hidden_states(ids[:1, 4:10], past=(first,), cache=second)
        logits = model(ids[:, 10:], past=(first, second))
        torch.testing.assert_close(logits, model(ids)[:, 10:], rtol=0, atol=1e-9)


def test_right_padding_is_invisible() -> None:
    model, ids = model_of("llama"), ids_of(2, 12)
    padded = torch.cat([ids, torch.full((2, 5), 3)], dim=1)
    torch.testing.assert_close(model(padded)[:, :12], model(ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_only_where_asked_for(kind: str) -> None:
    model, ids = model_of(kind), ids_of(2, 6)
    at = torch.tensor([11, 0, 7])
    torch.testing.assert_close(model(ids, positions=at), model(ids).flatten(0, 1)[at], rtol=0, atol=1e-12)


def test_a_caches_rows_can_be_chosen() -> None:
    model, ids = model_of("llama"), ids_of(3, 6)
    cache = model.empty_cache(3, 8)
    assert cache.lengths is not None
    with torch.no_grad():
        model.hidden_states(ids, cache=cache)
        cache.lengths += 6
        new = torch.tensor([[4], [5]])
        logits = model(new, past=(cache.index_select(torch.tensor([2, 0])),))
        plain = model(torch.cat([ids[[2, 0]], new], dim=1))[:, -1:]
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-9)
