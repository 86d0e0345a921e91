"""Preferences of messages: the tokens of TRL's trainers, and runs that train on them and chat afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.files.formats import read_json
from graftlm.text.collate import encode_rows
from graftlm.text.dataset import load_dataset
from graftlm.text.records import Preference, Record, Unpaired
from graftlm.text.template import load_template
from graftlm.text.tokenizer import Tokenizer
from graftlm.training.train import train
from tiny import chat_model_folder

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}"
    "<|endoftext|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
THINKS = CHAT.replace("{% if add_generation_prompt %}<assistant>", "{% if add_generation_prompt %}<assistant><think>\n")
TEMPLATE = load_template("sentiment")


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pairs() -> list[dict[str, Any]]:
    """Explicit prompts, also with an answer in them, and answers of several messages."""
    rows: list[dict[str, Any]] = []
    for n in range(6):
        prompt = [says("system", "be kind"), says("user", f"ask {n}"), says("assistant", " ho"), says("user", "more")]
        good, bad = says("assistant", f"yes {n}"), says("assistant", f"yes, no {n}")
        rows.append({"prompt": prompt[n % 2 * 3 :], "chosen": [good], "rejected": [bad, *([good] * (n // 4))]})
    return rows


def implicit() -> list[dict[str, Any]]:
    return [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in pairs()]


def judged() -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in pairs()
        for name in ("chosen", "rejected")
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model_folder(tmp_path_factory.mktemp("chat") / "model", CHAT)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def trl_rows(base: Path, template: str, rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The tokens that TRL's trainer of these rows makes."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_config import KTOConfig
    from trl.trainer.kto_trainer import KTOTrainer

    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(base / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    theirs.chat_template = template
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")  # so the base is the reference
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "activation_checkpointing": False,
    }
    trainer, config = (KTOTrainer, KTOConfig) if "label" in rows[0] else (DPOTrainer, DPOConfig)
    data = Dataset.from_list(rows)
    made = trainer(model=model, args=config(**options), train_dataset=data, processing_class=theirs, peft_config=lora)
    return list(made.train_dataset)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("template", [CHAT, THINKS])
@pytest.mark.parametrize("rows", [pairs(), implicit(), judged()], ids=["pairs", "implicit", "judged"])
def test_the_tokens_are_those_of_trls_trainers(
    rows: list[dict[str, Any]], template: str, base: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_folder(base)
    tokenizer.__dict__["chat_template"] = template
    write(tmp_path / "d" / "validation.jsonl", rows)
    examples, _ = encode_rows(load_dataset(str(tmp_path / "d")).splits["validation"], TEMPLATE, tokenizer, 200)
    theirs = trl_rows(base, template, rows, tmp_path)
    answers = ("completion_ids",) if "label" in rows[0] else ("chosen_ids", "rejected_ids")
    for example, row in zip(examples, theirs, strict=True):
        assert list(example.prompt_ids) == row["prompt_ids"]
        assert [list(ids) for ids in example.answers] == [row[name] for name in answers]
        assert example.desirable == row.get("label") and not example.skip and not example.rest


@pytest.mark.parametrize(("objective", "rows"), [("dpo", implicit()), ("kto", judged())])
def test_a_run_on_messages_chats_afterwards(
    objective: Any, rows: list[dict[str, Any]], base: Path, tmp_path: Path
) -> None:
    files = {"data": "train", "val_data": "validation", "test_data": "test"}
    paths = {flag: str(write(tmp_path / f"{name}.jsonl", rows)) for flag, name in files.items()}
    out = tmp_path / "run"
    train(
        TrainConfig(
            **paths, objective=objective, init_from=str(base), out_dir=str(out), rank=2, max_iters=2, batch_size=4
        )
    )
    assert read_json(out / "run.json")["data"]["chat"] is True


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [
                Preference((("user", "a"),), (("assistant", "b"),), (("assistant", "c"),)),
                Preference("a", " b", " c", "f:2"),
            ],
            "f:2: its prompt is text, and other rows have messages: write all rows in one form",
        ),
        (
            [Unpaired((("user", "a" * 90),), (("assistant", "b"),), True, "f:1")],
            "f:1: prompt and completion longer than the context: the prompt takes ",
        ),
        (
            [Unpaired((("user", "a"),), (("assistant", "b"),), True, "f:1", tools=({"name": "f"},))],
            "f:1: the model's chat template does not write tools: leave the row out",
        ),
    ],
)
def test_preferences_that_cannot_be_written(rows: list[Record], message: str, base: Path) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        encode_rows(rows, TEMPLATE, Tokenizer.from_folder(base), 60)
