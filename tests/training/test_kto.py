"""KTO against TRL's KTOTrainer and by hand, exact in parts and over ranks, whole runs."""

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
from graftlm.exchange.huggingface import load_model
from graftlm.files.formats import load_safetensors
from graftlm.methods import LoRA
from graftlm.methods.base import trainable
from graftlm.models import CausalLM
from graftlm.text.collate import Example
from graftlm.training import trainer as trainer_module
from graftlm.training.batches import CollateOptions, TrainingData, make_microbatches
from graftlm.training.distributed import DistContext
from graftlm.training.estimate import make_plan
from graftlm.training.objectives import validate
from graftlm.training.objectives.kto import KTO
from graftlm.training.reference import with_reference
from graftlm.training.setup import prepare
from graftlm.training.train import train
from tiny import model_folder, model_of

WORDS = (("bad", "dull", "weak"), ("good", "fun", "fine"))


def rows(count: int = 40) -> list[dict[str, Any]]:
    """Every third answer is undesirable; lengths differ."""
    return [
        {
            "prompt": f"Film {i} was",
            "completion": f" {WORDS[i % 3 > 0][i // 2 % 3]}{'!' * (i % 4)}",
            "label": i % 3 > 0,
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kto")
    model_folder(folder / "base")
    (folder / "data").mkdir()
    for split, some in (("train", rows()[:32]), ("validation", rows()[32:])):
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def config(assets: Path, out: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "init_from": str(assets / "base"),
        "data": str(assets / "data"),
        "out_dir": str(out),
        "objective": "kto",
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


# TRL ------------------------------------------------------------------------------------------------------------------


def trl_trainer(assets: Path, records: list[dict[str, Any]], folder: Path) -> Any:
    """TRL's KTOTrainer in float64 on these records, all in one batch."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    arguments = KTOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(records),
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=False,
        beta=0.2,
        desirable_weight=1.5,
        undesirable_weight=0.7,
        activation_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    return KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(assets / "base", dtype=torch.float64),
        args=arguments,
        train_dataset=Dataset.from_list(records),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_file=str(assets / "base" / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
        ),
        peft_config=LoraConfig(
            r=4, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
    )


def lora_model(assets: Path) -> CausalLM:
    model = load_model(assets / "base", torch.device("cpu"), torch.float64)
    LoRA(rank=4, alpha=16.0, targets=("q", "k", "v"), dropout=0.0).install(model, torch.Generator().manual_seed(0))
    return model.train()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["both", "desirable", "undesirable"])
def test_loss_gradients_and_metrics_equal_trl(kind: str, assets: Path, tmp_path: Path) -> None:
    """The same adapter, moved away from its start in the same way on both sides; the reference is the base.

    Models are float64 on both sides, but TRL's head computes log-probabilities in float32.
    """
    records = [row for row in rows() if kind == "both" or row["label"] == (kind == "desirable")][:8]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    data = {"data": str(tmp_path / "train.jsonl"), "val_data": str(assets / "data" / "validation.jsonl")}
    (tmp_path / "test.jsonl").write_text(json.dumps(rows()[0]))
    examples = prepare(config(assets, tmp_path / "ours", **data, test_data=str(tmp_path / "test.jsonl"))).data.train
    model, objective = lora_model(assets), KTO(beta=0.2, desirable_weight=1.5, undesirable_weight=0.7)
    objective.setup(model, TrainingData(examples, examples[:1], [], frozenset({0})), DistContext(), print)
    examples = with_reference(examples, objective.answer_logps(model, examples))
    theirs = trl_trainer(assets, records, tmp_path)
    pairs = parameters_in_common(model, theirs.model)
    torch.manual_seed(1)
    with torch.no_grad():
        for mine, other in pairs:
            mine.add_(torch.randn_like(mine) * 0.05)
            other.copy_(mine)
    statistics = objective.batch_statistics(model, examples, DistContext())
    loss, sums = objective.loss(model, objective.collate(examples, CollateOptions()).with_extra(statistics))
    (loss / 8).backward()
    theirs.model.train()
    expected = theirs.compute_loss(theirs.model, theirs.data_collator([theirs.train_dataset[i] for i in range(8)]))
    expected.backward()
    assert (loss / 8).item() == pytest.approx(expected.item(), rel=1e-6)
    norm = math.sqrt(sum(other.grad.square().sum().item() for _, other in pairs if other.grad is not None))
    assert norm > 1e-3
    for mine, other in pairs:
        assert mine.grad is not None and other.grad is not None
        assert (mine.grad - other.grad).norm() <= 1e-6 * norm
    logged = {name: values[0] for name, values in theirs._metrics["train"].items()}
    ours = objective.metrics({name: value.item() for name, value in sums.items()}, 8)
    assert ours["kl_estimate"] == pytest.approx(logged["kl"], abs=1e-6) and (kind != "both" or logged["kl"] > 0)
    for name, theirs_name in {
        "reward_desirable": "rewards/chosen",
        "reward_undesirable": "rewards/rejected",
        "logp_desirable": "logps/chosen",
        "logp_undesirable": "logps/rejected",
        "reward_margin": "rewards/margins",
    }.items():
        assert (ours[name] is None) == (theirs_name not in logged)
        if ours[name] is not None:
            assert ours[name] == pytest.approx(logged[theirs_name], rel=2e-6)


def parameters_in_common(model: CausalLM, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    """Our trained tensors and PEFT's of the same place."""
    named = dict(theirs.named_parameters())
    found = []
    for name, p in trainable(model).items():
        _, layer, _, role, which = name.split(".")  # blocks.0.attn.q.lora_A
        found.append((p, named[f"base_model.model.model.layers.{layer}.self_attn.{role}_proj.{which}.default.weight"]))
    return found


# By hand, in parts, over ranks ----------------------------------------------------------------------------------------

HEAD = (7, 3, 9, 11, 30)
EXAMPLES = [
    Example((*HEAD, 5, 8), (4, 9, 1, 0), None, "", "", "", desirable=True),
    Example((*HEAD, 2), (6, 0), None, "", "", "", desirable=False),
    Example((*HEAD, 1, 12, 13), (5, 0), None, "", "", "", desirable=True),
    Example((*HEAD, 1), (5, 4, 0), None, "", "", "", desirable=False),
]


def answer_logp(model: CausalLM, prompt: Sequence[int], answer: Sequence[int]) -> float:
    log_p = model(torch.tensor([[*prompt, *answer]])[:, :-1])[0].log_softmax(-1)
    return sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


def moved_model() -> tuple[CausalLM, KTO, list[Example]]:
    """A model that has moved away from its initial weights, and examples with their reference log-probabilities."""
    model, objective = model_of("llama").train(), KTO(beta=0.3, desirable_weight=2.0)
    objective.setup(model, TrainingData(EXAMPLES, EXAMPLES, [], frozenset({0})), DistContext(), print)
    examples = with_reference(EXAMPLES, objective.answer_logps(model, EXAMPLES))
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model, objective, examples


def test_loss_by_hand() -> None:
    model, objective, examples = moved_model()
    assert objective.initial is not None
    ratios, mismatched = [], []
    with torch.no_grad():
        for n, (example, other) in enumerate(zip(EXAMPLES, [EXAMPLES[-1], *EXAMPLES[:-1]], strict=True)):
            reference = examples[n].reference
            assert reference is not None
            ratios.append(answer_logp(model, example.prompt_ids, example.completion_ids) - reference[0])
            now = answer_logp(model, example.prompt_ids, other.completion_ids)
            with objective.initial.restored():
                mismatched.append(now - answer_logp(model, example.prompt_ids, other.completion_ids))
    z = max(0.0, sum(mismatched) / 4)
    signs = [1, -1, 1, -1]
    gains = [sign * 0.3 * (h - z) for sign, h in zip(signs, ratios, strict=True)]
    losses = [(2.0 if sign > 0 else 1.0) / (1 + math.exp(gain)) for sign, gain in zip(signs, gains, strict=True)]
    statistics = objective.batch_statistics(model, examples, DistContext())
    assert statistics["kl"].item() == pytest.approx(z, rel=1e-9, abs=1e-12)
    loss, sums = objective.loss(model, objective.collate(examples, CollateOptions()).with_extra(statistics))
    assert loss.item() == pytest.approx(sum(losses), rel=1e-9)
    assert sums["reward_accuracy"].item() == sum(gain > 0 for gain in gains)


@pytest.mark.parametrize(("limit", "parts"), [(12, 2), (1, 4)])
def test_micro_batches_share_the_batch_s_estimate(limit: int, parts: int) -> None:
    model, objective, examples = moved_model()
    statistics = objective.batch_statistics(model, examples, DistContext())
    whole = objective.collate(examples, CollateOptions()).with_extra(statistics)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(objective.loss(model, whole)[0], parameters, allow_unused=True)
    batches = make_microbatches(examples, objective.collate, CollateOptions(max_tokens=limit))
    assert len(batches) == parts and sum(batch.weight for batch in batches) == 4
    for batch in batches:
        objective.loss(model, batch.with_extra(statistics))[0].backward()
    norm = math.sqrt(sum(g.square().sum().item() for g in expected if g is not None))
    for p, g in zip(parameters, expected, strict=True):
        assert g is not None and p.grad is not None and (p.grad - g).norm() <= 1e-9 * norm


def test_ranks_share_the_batch_s_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each computes its groups of the mismatched pairs; their sum is a single process's."""
    model, objective, examples = moved_model()
    expected = objective.batch_statistics(model, examples, DistContext())["kl"]
    parts: list[list[Tensor]] = []
    for rank in (0, 1):
        calls: list[Tensor] = []
        monkeypatch.setattr(DistContext, "all_reduce_sum", lambda self, t, calls=calls: calls.append(t) or t)
        objective.batch_statistics(model, examples, DistContext(rank, 2))
        parts.append(calls)
    policy, reference = (one + two for one, two in zip(*parts, strict=True))
    assert all((part != 0).any() and (part == 0).any() for part in (*parts[0], *parts[1]))
    assert (policy - reference).mean().clamp(min=0).item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)


def test_a_completion_that_does_not_fit_another_prompt_is_truncated() -> None:
    model = model_of("llama", context=12)
    long, short = ((1, 2, 3, 4, 5, 6, 7, 8, 9), (5, 0)), ((1, 2), (4, 4, 4, 4, 4, 4, 4, 4, 0))
    examples = [Example(prompt, answer, None, "", "", "", desirable=True) for prompt, answer in (long, short)]
    objective = KTO()
    objective.setup(model, TrainingData(examples, examples, [], frozenset({0})), DistContext(), print)
    assert objective.batch_statistics(model, examples, DistContext())["kl"].item() == 0


# Whole runs -----------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_logs(assets: Path, tmp_path: Path) -> None:
    train(config(assets, tmp_path / "run", max_iters=24, eval_every=12))
    first, *_, last = metrics(tmp_path / "run")
    assert first["train_loss"] == pytest.approx(0.5, abs=1e-5) and first["kl_estimate"] == pytest.approx(0, abs=1e-5)
    assert first["reward_margin"] == pytest.approx(0, abs=1e-5) and first["kl"] is None
    assert last["train_loss"] < 0.45 and last["val_loss"] < 0.45 and last["val_accuracy"] > 0.7 and last["kl"] > 0
    assert last["reward_desirable"] > last["reward_undesirable"] and last["reward_margin"] > 0.3
    stored = load_safetensors(tmp_path / "run" / "reference.safetensors")
    assert stored["train"].shape == (32, 1) and stored["validation"].shape == (8, 1)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["config"]["beta"] == 0.1 and run["config"]["desirable_weight"] == 1.0


def test_a_stop_and_a_resume_give_the_same_bits(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"lora_dropout": 0.1, "microbatch_tokens": 40}
    train(config(assets, tmp_path / "whole", **changes))
    real = trainer_module.Trainer.train_step

    def stops(self: Any, step: int, batches: Any) -> Any:
        if step == 6:
            raise KeyboardInterrupt
        return real(self, step, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer_module.Trainer, "train_step", stops)
        train(config(assets, tmp_path / "halves", **changes))
    train(TrainConfig(out_dir=str(tmp_path / "halves"), resume=True))
    times = ("seconds", "examples_per_s", "tokens_per_s", "peak_rss_mb")
    whole, halves = (
        [{k: v for k, v in row.items() if k not in times} for row in metrics(tmp_path / name)]
        for name in ("whole", "halves")
    )
    assert whole == halves
    one, two = (tmp_path / name / "last" / "adapter_model.safetensors" for name in ("whole", "halves"))
    assert one.read_bytes() == two.read_bytes()


def test_validation_is_the_same_over_ranks(assets: Path, tmp_path: Path) -> None:
    """The estimate is over the whole split, the losses over a rank's part."""
    run = prepare(config(assets, tmp_path / "run"))
    run.objective.setup(run.loaded.model, run.data, run.dist, print)
    counts: list[int] = []
    loss, accuracy, _ = validate(run.loaded.model, run.objective, replace(run.data, progress=counts.append), run.dist)
    assert sum(counts) == len(run.data.validation)
    assert loss == pytest.approx(0.5, abs=1e-6) and accuracy is not None
    half = replace(run.data, validation=run.data.validation[:4])
    part = run.objective.evaluate(run.loaded.model, half, {"kl": torch.tensor(2.0)})
    assert part[1] == 4 and part[2] == sum(not e.desirable for e in half.validation)


def test_an_estimate_counts_the_reference_and_the_mismatched_pairs(assets: Path, tmp_path: Path) -> None:
    run = prepare(config(assets, tmp_path / "a", train_layers="1:"))
    estimate = make_plan(run, 0.0, repeats=1)
    assert 60 * estimate.minutes > estimate.train_seconds + estimate.validation_seconds > 0
    assert all(e.reference is None for e in run.data.train)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "sft", "kl_samples": 32}, "--objective sft: .* holds records for --objective kto; sft needs"),
        ({"objective": "dpo"}, "--objective dpo: .* holds records for --objective kto; dpo needs preference pairs"),
        ({"label_smoothing": 0.1}, "--label_smoothing 0.1: --objective kto takes no --label_smoothing.*use dpo"),
        ({"loss_on": "all"}, "--loss_on all: --objective kto takes no --loss_on: leave it out, or use sft"),
        ({"batch_size": 1}, "--batch_size 1: --objective kto compares the examples of a batch: give at least 2"),
        ({"desirable_weight": -1.0}, "--desirable_weight -1.0: must be 0 or more"),
    ],
)
def test_what_does_not_fit_is_refused(assets: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        train(config(assets, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("good", [True, False])
def test_a_split_of_one_kind_of_answers_is_noted(good: bool, assets: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({**row, "label": good}) + "\n" for row in rows(12)))
    for data, count in ((str(tmp_path / "data.jsonl"), 2), (None, 0)):  # of both splits
        changes = {"data": data, "val_data": ""} if data else {}
        notes = prepare(config(assets, tmp_path / "run", **changes)).notes
        kind = "desirable" if good else "undesirable"
        found = [note for note in notes if note.endswith(f" is {kind}: KTO learns from both")]
        assert len(found) == count


def test_every_label_is_checked(assets: Path, tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in rows(12)]
    lines[5] = json.dumps({"prompt": "so", "completion": " it is", "label": 3})
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"data.jsonl:6: label must be true or false, not 3"):
        train(config(assets, tmp_path / "run", data=str(tmp_path / "data.jsonl")))
