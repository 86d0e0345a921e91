"""Files of `tests/layouts` in TRL's forms: what is learned of them here is what TRL's trainers and collators give.

TRL's own `_prepare_dataset` and collators run, with the demo model's tokenizer. Where we differ on purpose the test
says how (docs/reliability.md).
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from datasets import Dataset
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from graftlm.files.assets import model_folder as asset_folder
from graftlm.text.collate import Example, encode_rows
from graftlm.text.dataset import load_dataset
from graftlm.text.template import load_template
from graftlm.text.tokenizer import Tokenizer

LAYOUTS = Path(__file__).parents[1] / "layouts"
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPTIONS: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "max_length": None}
OPTIONS |= {"activation_checkpointing": False}
PAIRS = ("pref_std.jsonl", "pref_std_space.jsonl", "pref_implicit_text.jsonl", "pref_conv.jsonl")
Row = dict[str, Any]


def rows_of(name: str) -> list[Row]:
    return [json.loads(line) for line in (LAYOUTS / name).read_text().splitlines()[:4]]


def unpaired(rows: list[Row]) -> list[Row]:
    return [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
        for row in rows
        for name in ("chosen", "rejected")
    ]


def ours(rows: list[Row], template: str | None, folder: Path) -> list[Example]:
    """The examples of these rows. template: of chat; None: the model's own."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer.from_folder(asset_folder("smollm2-135m"))
    if template is not None:
        tokenizer.__dict__["chat_template"] = template
    records = load_dataset("", str(path)).splits["validation"]
    return encode_rows(records, load_template("sentiment"), tokenizer, 1000)[0]


def theirs(trainer: Any, rows: list[Row], config: Any, template: str | None, **more: Any) -> tuple[list[Row], int]:
    """The rows as TRL's trainer prepares them, and the padding of its collator."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(asset_folder("smollm2-135m"))
    tokenizer.chat_template = template or tokenizer.chat_template
    state = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=tokenizer.chat_template, calculate_KL=False, desirable_weight=1.0,
        undesirable_weight=1.0, completion_only_loss="prompt" in rows[0],
    )  # fmt: skip
    made = trainer._prepare_dataset(state, Dataset.from_list(rows), tokenizer, config, dataset_name="train", **more)
    return list(made), tokenizer.pad_token_id


def learned(ids: list[int], places: Any) -> list[int]:
    """Labels: the tokens at these places, -100 elsewhere."""
    return [token if place in set(places) else -100 for place, token in enumerate(ids)]


def sft(rows: list[Row], folder: Path, template: str | None = None, assistant_only: bool = False) -> Any:
    """TRL's batch of these rows."""
    config = SFTConfig(output_dir=str(folder), assistant_only_loss=assistant_only, **OPTIONS)
    made, pad = theirs(SFTTrainer, rows, config, template, packing=False, formatting_func=None)
    return DataCollatorForLanguageModeling(pad)([{k: r[k] for k in ("input_ids", "labels")} for r in made])


def unpadded(batch: Any, row: int) -> tuple[list[int], list[int]]:
    length = int(batch["attention_mask"][row].sum())
    return batch["input_ids"][row, :length].tolist(), batch["labels"][row, :length].tolist()


def of_example(example: Example) -> tuple[list[int], list[int]]:
    """Ids and labels."""
    start = len(example.prompt_ids)
    ids = [*example.prompt_ids, *example.completion_ids]
    return ids, learned(ids, [start + place for place in example.loss_positions])


@pytest.mark.parametrize("name", ["prompt_completion.jsonl", "prompt_completion_space.jsonl"])
def test_prompts_and_completions_of_text(name: str, tmp_path: Path) -> None:
    rows = rows_of(name)
    batch = sft(rows, tmp_path)
    for number, example in enumerate(ours(rows, None, tmp_path)):
        assert of_example(example) == unpadded(batch, number)


def test_a_document_is_learned_but_for_its_first_token_which_nothing_predicts(tmp_path: Path) -> None:
    rows = [{"text": rows_of("prompt_completion.jsonl")[0]["completion"]}]
    (example,) = ours(rows, None, tmp_path)
    ids, labels = unpadded(sft(rows, tmp_path), 0)
    assert of_example(example) == (ids, [-100, *labels[1:]]) and -100 not in labels


@pytest.mark.parametrize("name", ["chat_plain.jsonl", "chat_system.jsonl", "prompt_completion_conv.jsonl"])
def test_conversations_that_the_template_marks(name: str, tmp_path: Path) -> None:
    """Ours ends with the last answer: nothing that follows it is learned."""
    rows = rows_of(name)
    batch = sft(rows, tmp_path, MARKED, assistant_only=True)
    for number, example in enumerate(ours(rows, MARKED, tmp_path)):
        (ids, labels), (all_ids, all_labels) = of_example(example), unpadded(batch, number)
        assert ids == all_ids[: len(ids)] and labels == all_labels[: len(ids)]
        assert {*all_labels[len(ids) :]} <= {-100} and any(label >= 0 for label in labels)


def test_messages_as_prompt_and_completion_end_with_the_turn(tmp_path: Path) -> None:
    """On purpose: TRL also learns the line break after the turn, which the model is never asked for."""
    rows = rows_of("prompt_completion_conv.jsonl")
    batch, tokenizer = sft(rows, tmp_path), Tokenizer.from_folder(asset_folder("smollm2-135m"))
    for number, example in enumerate(ours(rows, None, tmp_path)):
        (ids, labels), (all_ids, all_labels) = of_example(example), unpadded(batch, number)
        assert (all_ids, all_labels) == (ids + tokenizer.encode("\n"), labels + tokenizer.encode("\n"))
        assert tokenizer.token(ids[-1]) == "<|im_end|>"


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str, tmp_path: Path) -> None:
    """An answer of text ends with end-of-text once, one of messages with its turn and nothing after it (trl#4481)."""
    rows = rows_of(name)
    made, pad = theirs(DPOTrainer, rows, DPOConfig(output_dir=str(tmp_path), **OPTIONS), None)
    batch = DataCollatorForPreference(pad)(made)
    examples = ours(rows, None, tmp_path)
    for number, example in enumerate(examples):
        for row, answer in ((number, example.completion_ids), (len(rows) + number, example.rejected_ids)):
            length = int(batch["attention_mask"][row].sum())
            assert batch["input_ids"][row, :length].tolist() == [*example.prompt_ids, *answer]
            mask = [0] * (len(example.prompt_ids) + example.skip) + [1] * (len(answer) - example.skip)
            assert batch["completion_mask"][row, :length].tolist() == mask
        assert [*example.completion_ids].count(Tokenizer.from_folder(asset_folder("smollm2-135m")).eot) == 1


@pytest.mark.parametrize("name", ["kto.jsonl", "pref_conv.jsonl"])
def test_unpaired_answers(name: str, tmp_path: Path) -> None:
    rows = rows_of(name)
    rows = rows if "label" in rows[0] else unpaired(rows)
    made, pad = theirs(KTOTrainer, rows, KTOConfig(output_dir=str(tmp_path), **OPTIONS), None)
    batch = DataCollatorForUnpairedPreference(pad)(made)
    for number, example in enumerate(ours(rows, None, tmp_path)):
        length, prompt = int(batch["attention_mask"][number].sum()), len(example.prompt_ids)
        assert batch["input_ids"][number, :length].tolist() == [*example.prompt_ids, *example.completion_ids]
        assert batch["completion_mask"][number, :length].tolist() == [0] * prompt + [1] * (length - prompt)
        assert bool(batch["label"][number]) is example.desirable and not example.skip
