"""Pairs: the fork against two plain rows, every loss against its paper and against TRL, the reference, whole runs."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.exchange.load import load
from graftlm.files.formats import load_safetensors
from graftlm.inference.scoring import score
from graftlm.methods.base import trainable
from graftlm.models import CausalLM
from graftlm.text.collate import Example
from graftlm.training import reference
from graftlm.training.batches import CollateOptions, TrainingData, forward_batch, make_microbatches
from graftlm.training.estimate import make_plan
from graftlm.training.objectives.dpo import DPO, SequenceLogProbs
from graftlm.training.reference import InitialWeights, sampled_kl, with_reference
from graftlm.training.setup import prepare
from graftlm.training.train import train
from tiny import model_folder, model_of

HEAD = (7, 3, 9, 11, 30)
PAIRS = [
    ((*HEAD, 5, 8), (4, 9, 1, 0), (6, 0)),
    ((*HEAD, 2), (6, 0), (6, 6, 12, 0)),
    ((*HEAD, 1, 12, 13), (5,), (9,)),  # one token each: nothing of the answers is fed
    ((*HEAD, 1), (5, 4), (9, 4, 4)),
]
REFERENCE = torch.tensor([[-9.0, -5.0], [-6.5, -14.0], [-4.0, -4.5], [-8.0, -12.0]], dtype=torch.float64)


def pairs(known: bool = True) -> list[Example]:
    made = [Example(p, w, None, "", "", "", rejected_ids=other) for p, w, other in PAIRS]
    return with_reference(made, REFERENCE) if known else made


def plain_sums(model: CausalLM) -> Tensor:
    """Every answer behind its prompt in a row of its own: [4, 2]."""
    found = []
    for prompt, *answers in PAIRS:
        for answer in answers:
            log_p = model(torch.tensor([[*prompt, *answer]])[:, :-1])[0].log_softmax(-1)
            at = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            found.append(sum(log_p[t, token] for t, token in zip(at, answer, strict=True)))
    return torch.stack([torch.as_tensor(each) for each in found]).view(-1, 2)


LENGTHS = torch.tensor([[len(w), len(other)] for _, w, other in PAIRS], dtype=torch.float64)


def close(got: list[Tensor | None], want: list[Tensor | None]) -> bool:
    """Gradients equal within 1e-9 of the global norm."""
    zero = torch.zeros((), dtype=torch.float64)
    both = [(zero if a is None else a, zero if b is None else b) for a, b in zip(got, want, strict=True)]
    norm = math.sqrt(sum(b.square().sum().item() for _, b in both))
    return math.sqrt(sum((a - b).square().sum().item() for a, b in both)) <= 1e-9 * norm


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("targets_only", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_fork_equals_two_rows(kind: str, share: bool, targets_only: bool, fused: bool) -> None:
    model = model_of(kind)
    model.use_fused_ops(False)
    loss = DPO(beta=0.3).losses(SequenceLogProbs(plain_sums(model), REFERENCE, LENGTHS)).sum()
    want = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    model.use_fused_ops(fused)
    batch = DPO().collate(pairs(), CollateOptions(share, targets_only))
    assert batch.shared.shape[1] == (5 if share else 0) and batch.weight == 4
    assert batch.tokens == sum(len(p) + len(w) + len(other) for p, w, other in PAIRS)
    sums = DPO().pair_logps(model, forward_batch(model, batch), batch)
    assert torch.allclose(sums.policy, plain_sums(model), rtol=1e-10) and torch.equal(sums.lengths, LENGTHS)
    got, told = DPO(beta=0.3).loss(model, batch)
    assert abs(got.item() - loss.item()) <= 1e-9 * loss.item()
    assert close(list(torch.autograd.grad(got, list(model.parameters()), allow_unused=True)), list(want))
    rewards = 0.3 * (plain_sums(model) - REFERENCE)
    assert told["reward_margin"].item() == pytest.approx((rewards[:, 0] - rewards[:, 1]).sum().item())
    assert told["dpo_gradient_weight"].item() == pytest.approx(
        torch.sigmoid(rewards[:, 1] - rewards[:, 0]).sum().item()
    )
    assert told["logp_chosen"].item() == pytest.approx(plain_sums(model)[:, 0].sum().item())


def test_a_long_row_forks_too() -> None:
    """From FUSED_FROM tokens on attention takes another way, which knows of no fork."""
    model = model_of("llama", context=700)
    long = Example(tuple(range(1, 61)) * 9, (4, 9), None, "", "", "", rejected_ids=(6, 7, 8))
    batch = DPO().collate([long], CollateOptions(targets_only=False))
    (got,) = DPO().pair_logps(model, forward_batch(model, batch), batch).policy
    for answer, value in zip((long.completion_ids, long.rejected_ids), got, strict=True):
        log_p = model(torch.tensor([[*long.prompt_ids, *answer]])).log_softmax(-1)[0]
        first = len(long.prompt_ids) - 1
        assert value.item() == pytest.approx(sum(log_p[first + i, t].item() for i, t in enumerate(answer)), rel=1e-10)


@pytest.mark.parametrize(("most", "parts"), [(0, 1), (20, 2), (1, 4)])
def test_a_large_batch_of_pairs_runs_in_parts_that_add_up(most: int, parts: int) -> None:
    model = model_of("llama")
    how = DPO()
    want = torch.autograd.grad(how.loss(model, how.collate(pairs(), CollateOptions()))[0], list(model.parameters()))
    made = make_microbatches(pairs(), how.collate, CollateOptions(max_tokens=most))
    assert len(made) == parts and sum(batch.weight for batch in made) == 4
    total = sum((how.loss(model, batch)[0] for batch in made), torch.zeros((), dtype=torch.float64))
    assert close(list(torch.autograd.grad(total, list(model.parameters()))), list(want))


# Losses by hand -------------------------------------------------------------------------------------------------------

L_W, L_L, R_W, R_L, N_W, N_L = -9.0, -10.5, -10.0, -10.0, 4.0, 6.0
DELTA = 0.3 * ((L_W - R_W) - (L_L - R_L))  # 0.3 (1 + 0.5)
AVERAGES = (L_W - R_W) / N_W - (L_L - R_L) / N_L  # 1/4 + 1/12


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(average: float) -> float:
    return math.log(math.exp(average) / (1 - math.exp(average)))


BY_HAND: dict[str, tuple[dict[str, Any], float]] = {
    "sigmoid": ({}, -math.log(s(DELTA))),
    "cdpo": ({"label_smoothing": 0.1}, -0.9 * math.log(s(DELTA)) - 0.1 * math.log(s(-DELTA))),
    "hinge": ({"loss_type": "hinge"}, 1 - DELTA),
    "ipo": ({"loss_type": "ipo"}, (AVERAGES - 1 / 0.6) ** 2),
    "sigmoid_norm": ({"loss_type": "sigmoid_norm"}, -math.log(s(0.3 * AVERAGES))),
    "simpo": ({"loss_type": "simpo", "gamma": 0.2}, -math.log(s(0.3 * (L_W / N_W - L_L / N_L) - 0.2))),
    "orpo": ({"loss_type": "orpo"}, -L_W / N_W - 0.3 * math.log(s(odds(L_W / N_W) - odds(L_L / N_L)))),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_each_loss_equals_its_paper(name: str) -> None:
    fields, value = BY_HAND[name]
    policy = torch.tensor([[L_W, L_L]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[R_W, R_L]], dtype=torch.float64)
    how = DPO(beta=0.3, **fields)
    sums = SequenceLogProbs(
        policy, reference if how.needs_reference else None, torch.tensor([[N_W, N_L]], dtype=torch.float64)
    )
    assert how.losses(sums).item() == pytest.approx(value, rel=1e-12)
    (slope,) = torch.autograd.grad(how.losses(sums).sum(), policy)
    assert slope[0, 0] < 0 < slope[0, 1]  # the chosen one is pushed up, the rejected one down
    rewards = [L_W - R_W, L_L - R_L] if how.needs_reference else [L_W / N_W, L_L / N_L]
    assert how.rewards(sums)[0].tolist() == pytest.approx([0.3 * reward for reward in rewards])
    if name == "sigmoid":
        assert slope[0].tolist() == pytest.approx([-0.3 * s(-DELTA), 0.3 * s(-DELTA)])


def test_a_hinge_is_flat_behind_its_margin() -> None:
    policy = torch.tensor([[0.0, -9.0]], dtype=torch.float64, requires_grad=True)
    sums = SequenceLogProbs(policy, torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))
    loss = DPO("hinge", beta=0.2).losses(sums).sum()
    assert loss.item() == 0 and torch.autograd.grad(loss, policy)[0].abs().sum() == 0


# Whole runs -----------------------------------------------------------------------------------------------------------


def pair_rows(count: int = 40) -> list[dict[str, Any]]:
    words = (("bad", "dull", "weak"), ("good", "fun", "fine"))
    return [
        {
            "prompt": f"Film {i} was",
            "chosen": f" {words[1][i % 3]}.",
            "rejected": f" {words[0][i // 2 % 3]}{'!' * (i % 4)}",
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    model_folder(folder / "base")
    (folder / "data").mkdir()
    rows = pair_rows()
    for split, some in (("train", rows[:32]), ("validation", rows[32:])):
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def config(assets: Path, out: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "init_from": str(assets / "base"),
        "data": str(assets / "data"),
        "out_dir": str(out),
        "objective": "dpo",
        "rank": 4,
        "alpha": 16.0,
        "lr": 5e-3,
        "lora_dropout": 0.0,
        "max_iters": 8,
        "eval_every": 4,
        "batch_size": 8,
        "device": "cpu",
        "dtype": "float32",
        "kernels": "torch",
        "kl_samples": 4,
    }
    return TrainConfig(**{**values, **changes})


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


TIMES = ("seconds", "examples_per_s", "tokens_per_s", "peak_rss_mb")


def rows_without_times(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics(out)]


def test_a_run_learns_the_preference_and_logs_what_it_does(assets: Path, tmp_path: Path) -> None:
    results = train(config(assets, tmp_path / "run", max_iters=24, eval_every=12))
    first, *_, last = metrics(tmp_path / "run")
    assert first["train_loss"] == pytest.approx(math.log(2), abs=1e-6)  # nothing has been learned: delta is 0
    assert first["dpo_gradient_weight"] == pytest.approx(0.5, abs=1e-6) and first["reward_margin"] == pytest.approx(
        0, abs=1e-5
    )
    assert last["val_loss"] < 0.6 and last["val_accuracy"] == 1.0 and last["reward_margin"] > 0.3
    assert last["dpo_gradient_weight"] < 0.45 and last["logp_chosen"] > last["logp_rejected"]
    assert first["kl"] is None and last["kl"] > 0
    assert results["last"]["val_accuracy"] == 1.0
    stored = load_safetensors(tmp_path / "run" / "reference.safetensors")
    assert stored["train"].shape == (32, 2) and stored["validation"].shape == (8, 2)
    loaded = load("resume", tmp_path / "run", device="cpu", dtype="float32")  # and its adapter is one like any other
    assert loaded.run is not None and loaded.run["parent_run"] is None


ITS_OWN = {"rank": None, "alpha": None}
"""The method's, or the start's."""


@pytest.mark.parametrize("loss_type", ["hinge", "ipo", "sigmoid_norm", "simpo", "orpo"])
@pytest.mark.parametrize(
    "method", [{}, {"method": "prefix", "prefix_length": 4, "lr": 5e-2, "rank": None, "alpha": None}]
)
def test_every_loss_trains_every_kind_of_method(
    assets: Path, tmp_path: Path, loss_type: Any, method: dict[str, Any]
) -> None:
    train(config(assets, tmp_path / "run", loss_type=loss_type, **method))
    rows = metrics(tmp_path / "run")
    assert rows[-1]["val_loss"] < rows[3]["val_loss"] < 10 * rows[0]["train_loss"]
    assert (tmp_path / "run" / "reference.json").exists() == (loss_type not in ("simpo", "orpo"))


def test_a_stop_and_a_resume_leave_no_trace(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sft = train(sft_config(assets, tmp_path / "sft"))
    changes = {"init_from": sft["out_dir"], "rank": None, "alpha": None, "lora_dropout": 0.1}
    train(config(assets, tmp_path / "whole", **changes))
    import graftlm.training.trainer as module

    real = module.Trainer.train_step

    def stops(self: Any, step: int, batches: Any) -> Any:
        if step == 6:
            raise KeyboardInterrupt
        return real(self, step, batches)

    monkeypatch.setattr(module.Trainer, "train_step", stops)
    with pytest.raises(KeyboardInterrupt):
        train(config(assets, tmp_path / "halves", **changes))
    monkeypatch.setattr(module.Trainer, "train_step", real)
    train(TrainConfig(out_dir=str(tmp_path / "halves"), resume=True))
    assert rows_without_times(tmp_path / "whole") == rows_without_times(tmp_path / "halves")
    whole, halves = (tmp_path / name / "last" / "adapter_model.safetensors" for name in ("whole", "halves"))
    assert whole.read_bytes() == halves.read_bytes()


def logps(model: CausalLM, examples: list[Example]) -> Tensor:
    return DPO().answer_logps(model, examples)


def sft_config(assets: Path, out: Path, **changes: Any) -> TrainConfig:
    data = assets / "chosen.jsonl"
    lines = [json.dumps({"prompt": r["prompt"], "completion": r["chosen"]}) + "\n" for r in pair_rows()]
    data.write_text("".join(lines))
    return config(assets, out, **{"objective": "sft", "data": str(data), "max_iters": 4, "kl_samples": 32, **changes})


def test_an_adapted_start_is_the_reference(assets: Path, tmp_path: Path) -> None:
    """Adapter included: not the base with the adapter off, from which it differs by nats."""
    train(sft_config(assets, tmp_path / "sft"))
    adapted = prepare(config(assets, tmp_path / "dpo", init_from=str(tmp_path / "sft"), rank=None, alpha=None))
    started = load("resume", tmp_path / "sft", device="cpu", dtype="float32")
    base = prepare(config(assets, tmp_path / "other"))
    of_start = logps(adapted.loaded.model, adapted.data.train)
    assert torch.allclose(of_start, logps(started.model, adapted.data.train), atol=2e-4)
    assert (of_start - logps(base.loaded.model, adapted.data.train)).abs().max() > 0.5
    method: Any = adapted.method
    assert (
        method == replace(method, rank=4, alpha=16.0)
        and adapted.manifest.values["base"] == base.manifest.values["base"]
    )
    train(adapted.config)
    assert metrics(tmp_path / "dpo")[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-5)
    again = load("resume", tmp_path / "dpo", device="cpu", dtype="float32")
    assert again.run is not None and again.run["parent_run"]["run"] == str((tmp_path / "sft" / "best").resolve())


def test_full_fine_tuning_is_a_start_like_a_base(assets: Path, tmp_path: Path) -> None:
    train(sft_config(assets, tmp_path / "full", method="full", rank=None, alpha=None, lr=1e-3))
    train(config(assets, tmp_path / "dpo", init_from=str(tmp_path / "full")))
    run = json.loads((tmp_path / "dpo" / "run.json").read_text())
    assert run["base"]["name"] == str((tmp_path / "full" / "best").resolve()) and run["parent_run"] is None
    load("resume", tmp_path / "dpo", device="cpu", dtype="float32")


def test_the_reference_of_another_run_is_taken_where_it_fits(assets: Path, tmp_path: Path) -> None:
    train(config(assets, tmp_path / "one"))
    train(config(assets, tmp_path / "two", reference=str(tmp_path / "one")))
    assert rows_without_times(tmp_path / "one") == rows_without_times(tmp_path / "two")


def test_a_reference_that_does_not_fit_is_refused(assets: Path, tmp_path: Path) -> None:
    train(config(assets, tmp_path / "one", max_iters=2))
    train(sft_config(assets, tmp_path / "sft"))
    model_folder(tmp_path / "base", seed=1)
    (tmp_path / "fewer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pair_rows(20)))
    for word, changes in {
        "other pairs": {"data": str(tmp_path / "fewer.jsonl")},
        "another base": {"init_from": str(tmp_path / "base")},
        "another start": {"init_from": str(tmp_path / "sft"), "rank": None, "alpha": None},
        "another --dtype": {"dtype": "bfloat16"},
        "holds no reference": {"reference": str(tmp_path / "sft")},
    }.items():
        with pytest.raises(InputError, match=word):
            train(config(assets, tmp_path / "two", **{"reference": str(tmp_path / "one"), **changes}))
        assert not (tmp_path / "two").exists()


def test_the_start_may_not_change_under_a_run(assets: Path, tmp_path: Path) -> None:
    train(sft_config(assets, tmp_path / "sft"))
    train(config(assets, tmp_path / "dpo", init_from=str(tmp_path / "sft"), rank=None, alpha=None, max_iters=2))
    file = (tmp_path / "sft" / "best").resolve() / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match="has changed since"):
        train(TrainConfig(out_dir=str(tmp_path / "dpo"), resume=True, max_iters=4))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 8}, "--rank 8.*with rank 4"),
        ({"method": "prefix", "rank": None}, "--method prefix.*is of lora"),
        ({"targets": "q"}, "--targets q.*q,k,v"),
        ({"train_layers": "1:", "rank": None}, "--train_layers 1:.*all"),
    ],
)
def test_a_start_is_not_another_method(assets: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    if not (assets / "sft").exists():
        train(sft_config(assets, assets / "sft"))
    base = {"init_from": str(assets / "sft"), "rank": None, "alpha": None}
    with pytest.raises(InputError, match=words):
        train(config(assets, tmp_path / "run", **{**base, **changes}))


def test_kl_is_that_of_the_distributions(assets: Path) -> None:
    """One token that is sure to be drawn from few: against the sum over the vocabulary, from 4,000 samples."""
    prepared = prepare(config(assets, assets / "none", alpha=64.0))
    model = prepared.loaded.model.train()
    start = InitialWeights.of(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(torch.randn_like(p) * 0.1)
    example = replace(prepared.data.train[0], completion_ids=(5,), rejected_ids=(6,))
    prompts = [replace(example, prompt_ids=(*example.prompt_ids, 40 + i % 2, i // 2 % 50 + 1)) for i in range(100)]
    got = [sampled_kl(model, start, TrainingData([], prompts, [], frozenset({0})), 100, seed) for seed in range(40)]
    exact = []
    for example in prompts:
        ids = torch.tensor([example.prompt_ids])
        with torch.no_grad():
            now = model(ids)[0, -1].double().log_softmax(-1)
            with start.restored():
                before = model(ids)[0, -1].double().log_softmax(-1)
        exact.append((now.exp() * (now - before)).sum().item())
    mean, truth = sum(got) / len(got), sum(exact) / len(exact)
    assert truth > 0.02 and abs(mean - truth) < 0.1 * truth
    with start.restored():
        assert sampled_kl(model, InitialWeights.of(model), TrainingData([], prompts, [], frozenset({0})), 10, 0) == 0


def test_samples_of_the_kl_end_with_any_token_that_ends_a_text(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(config(assets, assets / "none"))
    model, ends = prepared.loaded.model, frozenset(range(0, 250, 3))
    assert prepared.data.stop_tokens == prepared.loaded.tokenizer.stop_tokens == {0}
    example = replace(prepared.data.train[0], completion_ids=(5,) * 8)
    prompts = [replace(example, prompt_ids=(*example.prompt_ids, n)) for n in range(1, 60)]
    seen: list[Example] = []

    def spy(model: CausalLM, samples: Sequence[Example], **options: Any) -> Any:
        seen.extend(samples)
        return score(model, samples, **options)

    monkeypatch.setattr(reference, "score", spy)
    sampled_kl(model, InitialWeights.of(model), TrainingData([], prompts, [], ends), 59, 0)
    answers = [e.completion_ids for e in seen[:59]]
    assert not any(ends & {*answer[:-1]} for answer in answers)
    assert all(answer[-1] in ends or len(answer) == 8 for answer in answers)
    assert len({answer[-1] for answer in answers} & ends) > 5


def test_a_plan_knows_of_the_reference_and_the_samples(assets: Path, tmp_path: Path) -> None:
    with_all = make_plan(prepare(config(assets, tmp_path / "a")), 0.0, repeats=1)
    assert with_all.validation_seconds > 0 and with_all.model_tflop > 0
    assert 60 * with_all.minutes > with_all.train_seconds + with_all.validation_seconds
    free = make_plan(prepare(config(assets, tmp_path / "b", loss_type="simpo")), 0.0, repeats=1)
    assert 60 * free.minutes == pytest.approx(free.train_seconds + free.validation_seconds)


# TRL ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(assets: Path) -> Path:
    """A run whose adapter is far from zero."""
    out = assets / "adapted"
    train(sft_config(assets, out, lr=3e-2))
    return out


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "sigmoid_norm"])
@pytest.mark.parametrize("start", ["base", "adapted"])
def test_losses_gradients_and_rewards_equal_trl(
    loss_type: Any, start: str, assets: Path, adapted: Path, tmp_path: Path
) -> None:
    """The same adapter, moved from its start in the same way on both sides; the reference is the start."""
    changes: dict[str, Any] = {"loss_type": loss_type, "beta": 0.2, "batch_size": 8}
    if start == "adapted":
        changes |= {"init_from": str(adapted), "rank": None, "alpha": None}
    ours = prepare(config(assets, tmp_path / "ours", **changes))
    model, examples = ours.loaded.model, ours.data.train[:8]
    examples = with_reference(examples, logps(model, examples))
    theirs = trl_trainer(assets, adapted if start == "adapted" else None, loss_type, tmp_path)
    pairs = parameters_in_common(model, theirs.model)
    torch.manual_seed(1)
    with torch.no_grad():
        for mine, other in pairs:
            assert torch.allclose(mine, other, atol=1e-7) or start == "base"  # A starts at random
            mine.add_(torch.randn_like(mine) * 0.02)
            other.copy_(mine)
    model.train()
    loss, told = DPO(loss_type, beta=0.2).loss(model, DPO().collate(examples, CollateOptions()))
    (loss / 8).backward()
    theirs.model.train()
    inputs = theirs.data_collator([theirs.train_dataset[i] for i in range(8)])
    expected = theirs.compute_loss(theirs.model, inputs)
    expected.backward()
    assert (loss / 8).item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    norm = math.sqrt(sum(other.grad.square().sum().item() for _, other in pairs))
    for mine, other in pairs:
        assert mine.grad is not None and (mine.grad - other.grad).norm() <= 1e-6 * max(1.0, norm)
    assert norm > 1e-3 or loss_type == "hinge"
    logged = {name: values[0] for name, values in theirs._metrics["train"].items()}
    assert told["reward_margin"].item() / 8 == pytest.approx(logged["rewards/margins"], abs=2e-6)
    assert told["reward_accuracy"].item() / 8 == pytest.approx(logged["rewards/accuracies"])
    assert told["logp_chosen"].item() / 8 == pytest.approx(logged["logps/chosen"], abs=2e-5)
    assert told["logp_rejected"].item() / 8 == pytest.approx(logged["logps/rejected"], abs=2e-5)


def trl_trainer(assets: Path, adapted: Path | None, loss_type: str, folder: Path) -> Any:
    """TRL's DPOTrainer on the same base and pairs, with a new adapter or with that of a run."""
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    base = AutoModelForCausalLM.from_pretrained(assets / "base", dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    if adapted is not None:
        base = PeftModel.from_pretrained(base, adapted / "best", is_trainable=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(assets / "base" / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        loss_type=loss_type,
        beta=0.2,
        activation_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    return DPOTrainer(
        model=base,
        args=arguments,
        train_dataset=Dataset.from_list(pair_rows()[:32]),
        processing_class=tokenizer,
        peft_config=None if adapted is not None else lora,
    )


def parameters_in_common(model: CausalLM, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    """Our trained tensors beside PEFT's of the same place."""
    named = dict(theirs.named_parameters())
    found = []
    for name, p in trainable(model).items():
        _, layer, _, role, which = name.split(".")  # blocks.0.attn.q.lora_A
        found.append((p, named[f"base_model.model.model.layers.{layer}.self_attn.{role}_proj.{which}.default.weight"]))
    return found
