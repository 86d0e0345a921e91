"""Conversations: what is learned is what the assistant says, in every turn, as the plain masked loss has it."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from graftlm.config import TrainConfig
from graftlm.errors import InputError, Interrupted
from graftlm.exchange.load import load
from graftlm.files.formats import read_json
from graftlm.inference.scoring import score
from graftlm.methods import LoRA
from graftlm.methods.base import trainable
from graftlm.models import CausalLM
from graftlm.text.chat import Chat
from graftlm.text.collate import Example, encode_rows
from graftlm.text.dataset import load_dataset
from graftlm.text.preflight import preflight, show_targets
from graftlm.text.template import load_template
from graftlm.text.tokenizer import Tokenizer
from graftlm.training import trainer as trainer_module
from graftlm.training.batches import CollateOptions, make_microbatches
from graftlm.training.objectives.sft import SFT
from graftlm.training.train import train
from tiny import chat_model_folder, model_folder, model_of

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPT = load_template("sentiment")
TALKS = [
    [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")],
    [("system", "be kind"), ("user", "hi"), ("assistant", "ho"), ("assistant", "and ho"), ("user", "thanks")],
    [("user", "a longer thing that is said"), ("assistant", "no")],
    [("user", "one"), ("assistant", "t"), ("user", "x"), ("assistant", "y"), ("user", "z"), ("assistant", "w")],
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model_folder(tmp_path_factory.mktemp("chat") / "model", CHAT)


def write(path: Path, talks: list[Any]) -> Path:
    records = [{"messages": [{"role": r, "content": c} for r, c in talk]} for talk in talks]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def examples(base: Path, folder: Path, max_length: int = 96) -> list[Example]:
    data = load_dataset(str(write(folder / "train.jsonl", TALKS)), str(write(folder / "validation.jsonl", TALKS[:1])))
    return encode_rows(data.splits["train"], PROMPT, Tokenizer.from_folder(base), max_length)[0]


def plain_loss(model: CausalLM, base: Path) -> torch.Tensor:
    """Full logits of every whole conversation, and cross entropy where a mask says so."""
    read, total = Tokenizer.from_folder(base), torch.zeros((), dtype=torch.float64)
    for talk in TALKS:
        ids: list[int] = []
        labels: list[int] = []
        for role, content in talk:
            before, own = read.encode(f"<{role}>"), [*read.encode(content), read.eot]
            ids += [*before, *own]
            labels += [-100] * len(before) + (own if role == "assistant" else [-100] * len(own))
        logits = model(torch.tensor([ids]))[0]
        total = total + F.cross_entropy(logits[:-1], torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")
    return total


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("targets_only", [False, True])
@pytest.mark.parametrize("most", [0, 60])
def test_loss_and_gradient_equal_the_plain_masked_ones(
    share: bool, targets_only: bool, most: int, base: Path, tmp_path: Path
) -> None:
    model = model_of("llama", vocab=257)
    LoRA(rank=3, dropout=0.0, targets=("q", "v", "down")).install(model, torch.Generator().manual_seed(1))
    torch.nn.init.normal_(trainable(model)["blocks.0.attn.q.lora_B"])
    model.train()
    expected = plain_loss(model, base)
    want = torch.autograd.grad(expected, list(trainable(model).values()))
    some = examples(base, tmp_path)
    made = make_microbatches(some, SFT().collate, CollateOptions(share, targets_only, most))
    assert len(made) > (most > 0)
    losses = [SFT().loss(model, batch)[0] for batch in made]
    got = torch.autograd.grad(torch.stack(losses).sum(), list(trainable(model).values()))
    assert abs(sum(loss.item() for loss in losses) - expected.item()) <= 1e-9 * expected.item()
    norm = sum(g.norm().item() ** 2 for g in want) ** 0.5
    assert sum((a - b).norm().item() ** 2 for a, b in zip(got, want, strict=True)) ** 0.5 <= 1e-9 * norm
    assert (
        sum(batch.weight for batch in made)
        == sum(len(e.loss_positions) for e in some)
        == 3 + 4 + 2 + 6 + 2 + 2 + 2 + 2 + 5
    )
    scores = score(model, some)
    assert abs(scores.completion.sum().item() + expected.item()) <= 1e-9 * expected.item()
    assert scores.completion_tokens.tolist() == [len(e.loss_positions) for e in some]


def test_conversations_that_begin_alike_share_what_stands_before_their_first_answer(base: Path, tmp_path: Path) -> None:
    alike = [e for e in examples(base, tmp_path) if e.text.startswith("user: one")]
    batch = SFT().collate(alike, CollateOptions())
    assert batch.shared.shape[1] == len("<user>one") + 1 + len("<assistant>") - 1


def test_what_is_shown_of_a_conversation_brackets_the_answers(base: Path, tmp_path: Path) -> None:
    first, second, *_ = examples(base, tmp_path)
    read = Tokenizer.from_folder(base)
    brackets = "".join(f"⟦{c}⟧" for c in "two") + "⟦<|endoftext|>⟧"
    assert show_targets(first, read).startswith(
        f"<user>one<|endoftext|><assistant>{brackets}<user>three<|endoftext|><assistant>⟦f⟧"
    )
    assert second.instr_tuned_text.endswith("<assistant>and ho<|endoftext|>")  # what follows is never learned
    assert preflight({"train": [first]}, PROMPT, read, 96, {})[-1] == f"example: {show_targets(first, read)}"


def test_a_long_conversation_loses_its_end_behind_a_whole_answer(base: Path, tmp_path: Path) -> None:
    rows = load_dataset(str(write(tmp_path / "c.jsonl", TALKS)), str(tmp_path / "c.jsonl")).splits["train"]
    read = Tokenizer.from_folder(base)
    whole, none_cut = encode_rows(rows[:1], PROMPT, read, 96)
    length = whole[0].length
    cut, number = encode_rows(rows[:1], PROMPT, read, length - 1)
    assert (none_cut, number) == (0, 1) and cut[0].masked_spans == () and cut[0].prompt_ids == whole[0].prompt_ids
    assert read.decode(cut[0].completion_ids) == "two" and cut[0].completion_ids[-1] == read.eot
    with pytest.raises(
        InputError, match=r"c\.jsonl:1: the assistant's first answer ends with token 25, and 24 fit: sh"
    ):
        encode_rows(rows[:1], PROMPT, read, 24)


def config(base: Path, data: Path, out: Path, **more: Any) -> TrainConfig:
    values: dict[str, Any] = {"rank": 4, "lr": 0.02, "max_iters": 6, "batch_size": 4, "dtype": "float32", **more}
    return TrainConfig(init_from=str(base), data=str(data), out_dir=str(out), device="cpu", kernels="torch", **values)


def test_a_run_learns_to_answer_and_answers_in_its_template(base: Path, tmp_path: Path, capsys: Any) -> None:
    from graftlm import cli

    talks = [[("user", f"{n} ?"), ("assistant", "yes"), ("user", "sure?"), ("assistant", "yes")] for n in range(40)]
    data = write(tmp_path / "chat.jsonl", talks)
    results = train(config(base, data, tmp_path / "run", method="full", rank=None, lr=5e-3, max_iters=60, batch_size=8))
    assert results["last"]["val_loss"] < 0.05 and results["last"]["val_accuracy"] is None
    assert read_json(tmp_path / "run" / "run.json")["data"]["chat"] is True
    words = ["generate", "--out_dir", str(tmp_path / "run"), "--prompt", "77 ?", "--device", "cpu", "--json"]
    capsys.readouterr()
    assert cli.run(words) == 0
    assert json.loads(capsys.readouterr().out)["texts"] == ["yes"]
    tuned = load("resume", tmp_path / "run", device="cpu")
    assert Chat(tuned.tokenizer).turn_end == tuned.tokenizer.eot


@pytest.mark.parametrize("more", [{"train_layers": "1:"}, {"method": "prefix", "rank": None, "prefix_length": 4}])
def test_a_run_of_conversations_that_is_stopped_goes_on_to_the_same_end(
    more: dict[str, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the frozen layers' store, and with a prefix, too."""
    data = write(tmp_path / "chat.jsonl", TALKS * 3 + [[("user", str(n)), ("assistant", "yes")] for n in range(20)])
    train(config(base, data, tmp_path / "whole", eval_every=2, **more))
    real = trainer_module.Trainer.train_step

    def interrupted(self: Any, step: int, batches: Any) -> Any:
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return real(self, step, batches)

    monkeypatch.setattr(trainer_module.Trainer, "train_step", interrupted)
    with pytest.raises(Interrupted):
        train(config(base, data, tmp_path / "parts", eval_every=2, **more))
    monkeypatch.undo()
    train(config(base, data, tmp_path / "parts", eval_every=2, **more, resume=True))
    (weights,) = (tmp_path / "whole" / "last").glob("adapter_model.safetensors")
    assert (tmp_path / "parts" / "last" / weights.name).read_bytes() == weights.read_bytes()


def test_the_store_of_frozen_layers_changes_no_bit_of_the_losses(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "chat.jsonl", TALKS * 3 + [[("user", str(n)), ("assistant", "yes")] for n in range(20)])
    losses = []
    for gb in (0.0, 1.0):
        out = tmp_path / f"run{gb}"
        train(config(base, data, out, train_layers="1:", activation_cache_gb=gb, lora_dropout=0.0))
        losses.append([json.loads(line)["train_loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        ([], r":1: messages must be a list of role and content, not \[\]"),
        ("hi", r":1: messages must be a list of role and content, not 'hi'"),
        ([{"role": "user", "content": "hi"}], r":1: the assistant says nothing, so there is nothing to learn: leave"),
        (
            [{"role": "narrator", "content": "hi"}],
            r":1: message 1: unknown role 'narrator': known are system, user, assistant, tool",
        ),
        ([{"role": "user", "content": " "}], r":1: message 1: empty content: fill it in, or leave the row out"),
        ([{"role": "user"}], r":1: message 1: no field 'content': every row needs it"),
        ([{"role": "user", "content": [1]}], r":1: message 1: content must be text, not \[1\]"),
        (["hi"], r":1: message 1 must be an object with role and content, not 'hi'"),
        (
            [{"role": "user", "content": "a", "tool_calls": [1]}],
            r":1: message 1: 'tool_calls' is not understood: a mess",
        ),
        (
            [{"role": "assistant", "content": "a", "thinking": "b", "reasoning": "c"}],
            r":1: message 1: 'reasoning' is not understood: a mess",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": "f"}]}],
            r":1: message 1: tool_calls must be a list of functions with name and arguments, not \{'function': 'f'\}",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}],
            r":1: message 1: the arguments of f are broken JSON: '\{'",
        ),
        ([{"role": "assistant", "tool_calls": 1}], r":1: message 1: tool_calls must be a list of functions"),
    ],
)
def test_messages_that_are_none(messages: Any, line: str, tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in (messages, [])))
    with pytest.raises(InputError, match=line):
        load_dataset(str(file), str(file))


def test_a_base_without_a_chat_template_is_told_of(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "plain")
    data = write(tmp_path / "chat.jsonl", TALKS)
    with pytest.raises(InputError, match=r"chat\.jsonl:\d: the base model has no chat template to write messages in"):
        train(config(base, data, tmp_path / "run", val_data=str(data)))
    assert not (tmp_path / "run").exists()


def test_a_template_that_refuses_names_the_row(base: Path, tmp_path: Path) -> None:
    settings = json.loads((base / "tokenizer_config.json").read_text())
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('a user speaks first') }}{% endif %}" + CHAT
    other = tmp_path / "strict"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": strict}))
    data = write(tmp_path / "chat.jsonl", TALKS)
    with pytest.raises(InputError, match=r"chat\.jsonl:2: the model's chat template rejects .*a user speaks first"):
        train(config(other, data, tmp_path / "run", val_data=str(data)))


def test_conversations_are_no_pairs_and_have_no_accuracy(base: Path, tmp_path: Path, capsys: Any) -> None:
    from graftlm import cli

    data = write(tmp_path / "chat.jsonl", TALKS * 4)
    with pytest.raises(InputError, match=r"--objective dpo: .* dpo needs preference pairs"):
        train(config(base, data, tmp_path / "run", val_data=str(data), objective="dpo"))
    words = ["evaluate", "--init_from", str(base), "--data", str(tmp_path), "--split", "train"]
    (tmp_path / "train.jsonl").write_bytes(data.read_bytes())
    assert cli.run(words) == 2
    assert "label" in capsys.readouterr().err


def test_a_base_without_a_chat_template_answers_in_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from graftlm import cli

    words = ["generate", "--init_from", str(model_folder(tmp_path / "plain")), "--prompt", "hi", "--device", "cpu"]
    assert cli.run([*words, "--chat", "on"]) == 2
    assert "plain has no chat template; use --chat off" in capsys.readouterr().err
    assert cli.run([*words, "--max_new_tokens", "1"]) == 0
