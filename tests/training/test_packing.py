"""Packing: losses, gradients and steps of several records in a row are those of each record alone."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from family_cases import CASES, VOCAB, config_of
from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.models import CausalLM
from graftlm.models.config import read_model_config
from graftlm.models.row_layout import PackedRows
from graftlm.text.collate import Example
from graftlm.training import batches
from graftlm.training.batches import CollateOptions, make_microbatches
from graftlm.training.objectives.sft import SFT
from graftlm.training.packing import pack_rows, row_width
from graftlm.training.train import train
from tiny import fresh_home, model_folder


def model_of_case(case: str) -> CausalLM:
    """The case's structure with random weights, in float64."""
    torch.manual_seed(0)
    model = CausalLM(read_model_config(config_of(case).to_dict(), case)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.train()


def records(shared: int) -> list[Example]:
    """Records of 2 to 13 tokens after a common beginning; some are shorter than a convolution, some than a window."""
    rng = random.Random(5)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(1, VOCAB) for _ in range(n))

    head, sizes = ids(shared), ((1, 1), (7, 6), (2, 1), (1, 4), (3, 8), (1, 2), (9, 2))
    return [Example((*head, *ids(p)), ids(c), None, "", "", "") for p, c in sizes]


def gradients(model: CausalLM, parts: list[batches.TrainingBatch], sft: SFT) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients, summed over these micro-batches; the gradients are left in the model."""
    model.zero_grad()
    total = 0.0
    for batch in parts:
        loss, _ = sft.loss(model, batch)
        loss.backward()
        total += loss.item()
    return total, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("case", CASES)
def test_loss_gradient_and_step_are_those_of_each_record_alone(case: str) -> None:
    """Of every model family, with windows, rotations by layer, learned positions, sinks, experts and convolutions."""
    number = list(CASES).index(case)
    model, some, sft = model_of_case(case), records(5), SFT("all" if number % 2 else "completion")
    weights = [p.detach().clone() for p in model.parameters()]
    alone = [sft.collate([record], CollateOptions(False, False)) for record in some]
    packed = [sft.collate(some, CollateOptions(share_prefix=number % 4 < 2, row_tokens=20))]
    assert len(packed[0].ids) < len(some) and isinstance(packed[0].layout, PackedRows)
    steps = []
    for parts in (alone, packed):
        loss, grads = gradients(model, parts, sft)
        # eps: the gradient of a key's bias is 0 but for rounding, which must not decide its step
        torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4).step()
        steps.append((torch.tensor([loss / 100]).double(), *grads, *(p.detach().clone() for p in model.parameters())))
        with torch.no_grad():
            for p, weight in zip(model.parameters(), weights, strict=True):
                p.copy_(weight)
    norm = max(1.0, *(float(g.norm()) for g in steps[0]))
    for want, got in zip(*steps, strict=True):
        torch.testing.assert_close(got / norm, want / norm, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", ["llama", "mistral", "gpt2"])
def test_long_rows_never_hold_all_scores(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From FUSED_FROM tokens on, PyTorch's fused kernel takes the mask of packed rows: also a window's."""
    model, sft, calls = model_of_case(case), SFT("all"), list[Any]()
    ids = torch.randint(1, VOCAB, (11, 50), generator=torch.Generator().manual_seed(1)).tolist()
    some = [Example((*row[: 20 + n],), (*row[20 + n :],), None, "", "", "") for n, row in enumerate(ids)]
    want = gradients(model, [sft.collate([record], CollateOptions()) for record in some], sft)
    real = F.scaled_dot_product_attention

    def attention(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(options["attn_mask"])
        return real(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    packed = sft.collate(some, CollateOptions(row_tokens=560))
    assert packed.ids.shape == (1, 11 * 49)
    got = gradients(model, [packed], sft)
    assert len(calls) == model.config.num_layers and calls[0].shape == (1, 1, 539, 539)
    assert abs(got[0] - want[0]) <= 1e-9 * want[0]
    norm = max(float(g.norm()) for g in want[1])
    assert all(float((a - b).norm()) <= 1e-9 * norm for a, b in zip(got[1], want[1], strict=True))


@pytest.mark.parametrize("most", [0, 30])
def test_microbatches_of_packed_rows_add_up(most: int) -> None:
    model, some, sft = model_of_case("gpt2"), records(5), SFT()
    want = gradients(model, [sft.collate(some, CollateOptions(False, False))], sft)
    parts = make_microbatches(some, sft.collate, CollateOptions(max_tokens=most, row_tokens=25))
    assert (len(parts) > 1) == bool(most) and sum(len(part.starts) for part in parts) == len(some)
    assert all(part.ids.shape[1] <= 25 and part.ids.numel() <= (most or 1000) for part in parts)
    assert all(part.shared.shape[1] == 5 for part in parts)
    assert sum(part.weight for part in parts) == sum(len(e.completion_ids) for e in some)
    assert sum(part.non_shared_tokens for part in parts) == sum(e.length - 5 for e in some)
    got = gradients(model, parts, sft)
    assert abs(got[0] - want[0]) <= 1e-9 * want[0]
    norm = max(float(g.norm()) for g in want[1])
    assert all(float((a - b).norm()) <= 1e-9 * norm for a, b in zip(got[1], want[1], strict=True))


def test_rows_hold_every_record_once_and_no_more_than_their_width() -> None:
    rng = random.Random(1)
    for _ in range(50):
        sizes = [rng.randint(1, 60) for _ in range(rng.randint(1, 40))]
        width = row_width(sizes, rng.randint(20, 200))
        rows = pack_rows(sizes, width)
        assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
        assert max(sizes) <= width and all(sum(sizes[i] for i in row) <= width for row in rows)
        some = [i for row in rows[1::2] for i in row]
        again = pack_rows([sizes[i] for i in some], width)  # as `make_microbatches` relies on
        assert [[sizes[some[i]] for i in row] for row in again] == [[sizes[i] for i in row] for row in rows[1::2]]
    assert pack_rows([5, 30, 4], 10) == [[1], [0, 2]]
    assert row_width([30, 30, 30, 30], 1000) == 30  # nothing to gain from wider rows
    assert row_width([100, 60, 60, 60, 60], 1000) > 100


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("packing") / "model", "llama")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts and completions of 5 to 40 tokens."""
    folder = tmp_path_factory.mktemp("packing") / "data"
    folder.mkdir()
    for split, count in (("train", 24), ("validation", 6)):
        rows = [{"prompt": f"{split} {n}" + "x" * (n * 7 % 25), "completion": "y" * (1 + n % 5)} for n in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(base: Path, data: Path, out: Path, **more: Any) -> TrainConfig:
    settings: dict[str, Any] = {"max_iters": 3, "batch_size": 8, "group_by_length": False, "rank": 4, "dropout": 0.0}
    settings |= {"lora_dropout": 0.0, "lr": 1e-2, "device": "cpu", "dtype": "float32"}
    return TrainConfig(init_from=str(base), data=str(data), out_dir=str(out), **{**settings, **more})


@pytest.mark.parametrize("more", [{}, {"rank": 0, "train_layers": "1:2"}], ids=["lora", "full, cached lower layers"])
def test_a_packed_run_takes_the_same_steps(
    base: Path, data: Path, tmp_path: Path, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_HOME", fresh_home(tmp_path / "home"))
    made, real = list[int](), batches.pack_rows
    monkeypatch.setattr(batches, "pack_rows", lambda *a: made.append(len(real(*a))) or real(*a))
    rows: dict[bool, list[dict[str, Any]]] = {}
    for packing in (False, True):
        train(config(base, data, tmp_path / str(packing), packing=packing, **more))
        rows[packing] = [
            json.loads(line) for line in (tmp_path / str(packing) / "metrics.jsonl").read_text().splitlines()
        ]
    assert made and min(made) < 8 and (tmp_path / "home" / "frozen").is_dir() == bool(more)
    for plain, packed in zip(rows[False], rows[True], strict=True):
        assert all(plain[name] == packed[name] for name in ("step", "examples", "tokens", "lr"))
        assert packed["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-5)
        assert packed["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-4)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_answers_that_are_compared_are_not_packed(base: Path, data: Path, tmp_path: Path, objective: str) -> None:
    with pytest.raises(InputError, match=f"--packing: --objective {objective} compares answers"):
        train(config(base, data, tmp_path / "run", packing=True, objective=objective))
