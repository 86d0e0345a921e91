"""No answer is lost, or learned in part, where a row is longer than --max_length: whatever the objective."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.text.collate import Example
from graftlm.text.tokenizer import Tokenizer
from graftlm.training.setup import prepare
from graftlm.training.train import train
from tiny import TEMPLATE, chat_model_folder

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LONG = "x" * 50
"""Of 40 tokens that fit, this leaves nothing for an answer."""


def chat(question: str, *answers: str) -> dict[str, Any]:
    turns = [[("user", question), ("assistant", answer)] for answer in answers]
    return {"messages": [{"role": role, "content": content} for turn in turns for role, content in turn]}


ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # a row that fits, one that does not, flags
    "long prompt": ({"prompt": "q", "completion": " a"}, {"prompt": LONG, "completion": " a"}, {}),
    "long answer": ({"prompt": "q", "completion": " a"}, {"prompt": "q", "completion": LONG}, {}),
    "loss on all": ({"prompt": "q", "completion": " a"}, {"prompt": LONG, "completion": " a"}, {"loss_on": "all"}),
    "long question": (chat("q", "a"), chat(LONG, "a"), {}),
    "long reply": (chat("q", "a"), chat("q", LONG), {}),
    **{
        f"{loss} {key}": (pair, {**pair, key: LONG}, {"objective": "dpo", "loss_type": loss})
        for loss in ("sigmoid", "simpo", "orpo")
        for key in ("prompt", "chosen", "rejected")
        for pair in [{"prompt": "q", "chosen": " a", "rejected": " b"}]
    },
    **{
        f"kto {key}": (row, {**row, key: LONG}, {"objective": "kto"})
        for key in ("prompt", "completion")
        for row in [{"prompt": "q", "completion": " a", "label": True}]
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model_folder(tmp_path_factory.mktemp("truncation") / "model", CHAT)


def config(base: Path, data: Path, rows: list[dict[str, Any]], **flags: Any) -> TrainConfig:
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {"rank": 2, "max_iters": 1, "dtype": "float32", "max_length": 40, "template": TEMPLATE}
    values |= {"init_from": str(base), "data": str(data), "val_data": str(data), "device": "cpu", **flags}
    return TrainConfig(out_dir=str(data.parent / "run"), kernels="torch", **values)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_without_room_for_its_answer_refuses_the_run(name: str, base: Path, tmp_path: Path) -> None:
    fits, too_long, flags = ROWS[name]
    with pytest.raises(InputError, match=r"rows\.jsonl:3: .*(longer than the context|ends with token \d+, and 40 fit)"):
        train(config(base, tmp_path / "rows.jsonl", [fits, fits, too_long], **flags))
    assert not (tmp_path / "run").exists()


def learned(example: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.decode_with_special([example.completion_ids[n] for n in example.loss_positions])


def test_what_is_truncated_keeps_whole_answers(base: Path, tmp_path: Path) -> None:
    """A text is cut inside its template; of a conversation, the answers that do not fit are left out."""
    texts = [{"text": "x" * (9 * n + 1), "label": n % 2} for n in range(8)]
    run = prepare(config(base, tmp_path / "texts.jsonl", texts))
    tokenizer = run.loaded.tokenizer
    words = {0: " negative<|endoftext|>", 1: " positive<|endoftext|>"}
    assert [learned(e, tokenizer) for e in run.data.train] == [words[n % 2] for n in range(8)]
    assert max(e.length for e in run.data.train) == 40 and "are truncated to 40 tokens" in " ".join(run.notes)
    talks = [chat("q", "yes"), chat("q", "yes", LONG), chat("q", "y" * 9, "z" * 9, "no")]
    run = prepare(config(base, tmp_path / "talks.jsonl", talks))
    assert [learned(e, tokenizer) for e in run.data.train] == [
        "yes<|endoftext|>",
        "yes<|endoftext|>",
        "yyyyyyyyy<|endoftext|>",
    ]
    assert "2 of 3 texts in train are truncated to 40 tokens" in run.notes
