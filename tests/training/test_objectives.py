"""Losses against plain ones written out here, with and without the shared prefix."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from graftlm.models import CausalLM
from graftlm.text.collate import Example
from graftlm.training.batches import CollateOptions, TrainingBatch, make_microbatches
from graftlm.training.objectives.dpo import DPO
from graftlm.training.objectives.sft import SFT
from tiny import model_of

HEAD = (7, 3, 9, 11, 30)
ROWS = [((*HEAD, 5, 8), (4, 0)), ((*HEAD, 2), (6, 6, 0)), ((*HEAD, 1, 12, 13, 14), (5, 0))]
EXAMPLES = [Example(p, c, None, "", "", "") for p, c in ROWS]


def plain(model: CausalLM, loss_on: str) -> torch.Tensor:
    """Row by row: -sum of log p(next token) over the targets, each from a softmax written out."""
    total = torch.zeros((), dtype=torch.float64)
    for prompt, completion in ROWS:
        ids = torch.tensor([*prompt, *completion])
        log_p = model(ids[None, :-1])[0].log_softmax(-1)
        first = len(prompt) if loss_on == "completion" else 1
        for t in range(first, len(ids)):
            total = total - log_p[t - 1, ids[t]]
    return total


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("targets_only", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_loss_and_gradient_equal_the_plain_way(
    kind: str, loss_on: str, share: bool, targets_only: bool, fused: bool
) -> None:
    model = model_of(kind)
    model.use_fused_ops(False)
    expected = plain(model, loss_on)
    want = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    model.use_fused_ops(fused)
    sft = SFT("completion" if loss_on == "completion" else "all")
    batch = sft.collate(EXAMPLES, CollateOptions(share, targets_only))
    assert batch.shared.shape == (1, 5 if share else 0)
    loss, _ = sft.loss(model, batch)
    assert abs(loss.item() - expected.item()) <= 1e-9 * expected.item()
    got = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    zero = torch.zeros(())
    norm = sum((g if g is not None else zero).norm().item() ** 2 for g in want) ** 0.5
    pairs = zip(got, want, strict=True)
    difference = sum((a if b is None else a - b).norm().item() ** 2 for a, b in pairs if a is not None) ** 0.5
    assert difference <= 1e-9 * norm


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize(("most", "parts"), [(0, 1), (15, 1), (14, 2), (10, 2), (9, 3), (1, 3)])
def test_a_large_batch_runs_in_parts_that_add_up(loss_on: Any, most: int, parts: int) -> None:
    model = model_of("llama")
    expected = torch.autograd.grad(plain(model, loss_on), list(model.parameters()), allow_unused=True)
    sft = SFT(loss_on)
    made = make_microbatches(EXAMPLES, sft.collate, CollateOptions(max_tokens=most))
    assert len(made) == parts and sum(b.ids.shape[0] for b in made) == 3
    assert sum(b.weight for b in made) == sft.collate(EXAMPLES, CollateOptions()).weight
    for batch in made:
        sft.loss(model, batch)[0].backward()
    norm = sum(g.norm().item() ** 2 for g in expected if g is not None) ** 0.5
    for p, g in zip(model.parameters(), expected, strict=True):
        assert g is not None and p.grad is not None and (p.grad - g).norm() <= 1e-9 * norm


def test_a_batch_without_a_bound_is_one() -> None:
    assert len(make_microbatches(EXAMPLES, SFT().collate)) == 1


@pytest.mark.parametrize("share", [False, True])
def test_the_weight_counts_the_targets_of_all_rows(share: bool) -> None:
    completion = SFT().collate(EXAMPLES, CollateOptions(share))
    assert completion.weight == 2 + 3 + 2
    every = SFT("all").collate(EXAMPLES, CollateOptions(share))
    assert every.weight == sum(len(p) + len(c) - 1 for p, c in ROWS)
    assert completion.tokens == every.tokens == sum(len(p) + len(c) for p, c in ROWS)
    assert completion.non_shared_tokens == sum(len(p) + len(c) - (len(HEAD) if share else 0) for p, c in ROWS)


def test_the_end_of_text_is_a_target() -> None:
    for share in (False, True):
        batch = SFT().collate(EXAMPLES, CollateOptions(share))
        assert batch.targets.tolist() == [4, 0, 6, 6, 0, 5, 0]


def test_a_prompt_keeps_the_token_that_predicts_its_first_target() -> None:
    same = [Example((*HEAD, 1), (c, 0), None, "", "", "") for c in (2, 3)]
    batch = SFT().collate(same, CollateOptions())
    assert batch.shared.tolist() == [list(HEAD)] and batch.ids[:, 0].tolist() == [1, 1]


def test_a_single_row_shares_nothing() -> None:
    assert SFT().collate(EXAMPLES[:1], CollateOptions()).shared.shape == (1, 0)


@pytest.mark.parametrize("loss_on", ["completion", "all", "pairs"])
def test_a_batch_moves_as_a_whole(loss_on: Any) -> None:
    """All its tensors go, and none comes or is lost; what the reference thinks of pairs stays where it is."""
    pair: Any = {"rejected_ids": (3, 0), "reference": (-1.0, -2.0)} if loss_on == "pairs" else {}
    examples = [replace(each, **pair) for each in EXAMPLES]
    objective = DPO() if loss_on == "pairs" else SFT(loss_on)
    here = replace(objective.collate(examples, CollateOptions()), cached_hidden=(1, torch.zeros(3, 4)))
    there = here.to(torch.device("meta"))

    def tensors(batch: TrainingBatch) -> dict[str, torch.Tensor]:
        found = {field.name: getattr(batch, field.name) for field in fields(batch)}
        found["cached_hidden"] = batch.cached_hidden and batch.cached_hidden[1]
        found |= batch.extra
        found |= {} if batch.layout is None else {f"layout {n}": t for n, t in enumerate(vars(batch.layout).values())}
        return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}

    names = {"shared", "ids", "starts", "target_index", "targets", "cached_hidden"}
    assert tensors(there).keys() == tensors(here).keys() >= names
    assert ("reference" in tensors(here), "positions" in tensors(here)) == (loss_on == "pairs", loss_on != "all")
    kept = {name for name, value in tensors(there).items() if value.device.type != "meta"}
    assert kept == ({"reference"} if loss_on == "pairs" else set())
    assert all(value.shape == tensors(here)[name].shape for name, value in tensors(there).items())


def test_a_batch_on_another_device_is_the_same_batch() -> None:
    batch = replace(SFT().collate(EXAMPLES, CollateOptions()), cached_hidden=(1, torch.ones(2, 3)))
    moved = batch.to(torch.device("cpu"))
    assert (
        moved.cached_hidden is not None
        and moved.cached_hidden[0] == 1
        and torch.equal(moved.cached_hidden[1], torch.ones(2, 3))
    )
    assert moved.layout is None and torch.equal(moved.ids, batch.ids)
    far = batch.to(torch.device("meta")).cached_hidden
    assert far is not None and far[1].device.type == "meta"
