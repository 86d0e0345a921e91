"""What a run says of data that is probably not what it seems: one line each, before the first step."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.exchange.load import load
from graftlm.text.chat import Chat
from graftlm.text.preflight import JoinedWords
from graftlm.text.records import Completion, Labelled, Preference
from graftlm.training.setup import prepare
from graftlm.training.train import train
from tiny import TEMPLATE, byte_tokenizer, data_folder, model_folder

TODAY = (
    "{{ strftime_now('%d %b %Y') }} {% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("base") / "model")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(base: Path, data: str, out: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {"template": TEMPLATE, "rank": 2, "max_iters": 2, "dtype": "float32", "max_length": 80}
    return TrainConfig(init_from=str(base), data=data, out_dir=str(out), device="cpu", **{**values, **changes})


def notes(*args: Any, **changes: Any) -> list[str]:
    return prepare(config(*args, **changes)).notes


def test_rows_with_the_names_of_special_tokens_are_counted(base: Path, tmp_path: Path) -> None:
    chat = "<|endoftext|>user: hi"
    answers = [{"prompt": chat if n % 3 == 0 else f"q{n}", "completion": f"a{n}"} for n in range(30)]
    pairs = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b" + "<|endoftext|>x" * (n == 4)} for n in range(30)]
    for name, rows in (("answers", answers), ("pairs", pairs)):
        data = write(tmp_path / f"{name}.jsonl", rows)
        objective = "dpo" if name == "pairs" else "sft"
        (line,) = [
            note
            for note in notes(base, data, tmp_path / "run", val_data=data, objective=objective)
            if "in train hold names of special tokens" in note
        ]
        count = sum("<|endoftext|>" in json.dumps(row) for row in rows)
        assert line.startswith(f"{count} of 30 rows") and "<|endoftext|>" in line and "messages" in line
    plain = write(tmp_path / "plain.jsonl", [{"prompt": f"q{n} <|im_end|>", "completion": "a"} for n in range(30)])
    assert not any("special tokens" in note for note in notes(base, plain, tmp_path / "run"))  # none of this tokenizer


def test_the_review_question_on_other_data_is_said(base: Path, tmp_path: Path) -> None:
    data = str(data_folder(tmp_path / "data"))
    long = {"max_length": None}
    model = model_folder(tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 300}))
    for labels in ("negative,positive", "ham,spam"):
        found = notes(model, data, tmp_path / "r", template="sentiment", labels=labels, **long)
        (line,) = [note for note in found if "default template" in note]
        assert labels.replace(",", " or ") in line and "--template and --labels" in line
    assert not any("default template" in note for note in notes(model, data, tmp_path / "r", **long))
    answers = write(tmp_path / "answers.jsonl", [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(30)])
    assert not any("default template" in n for n in notes(model, answers, tmp_path / "r", template="sentiment"))


@pytest.mark.parametrize("blank", [" ", "\n\t "])
def test_white_space_that_leaves_no_room_for_a_text(blank: str, base: Path, tmp_path: Path) -> None:
    rows = [{"text": f"fine {n}", "label": n % 2} for n in range(30)]
    rows[7]["text"] = blank * (300_000 // len(blank)) + "good"
    with pytest.raises(InputError, match=r":8: no token of the text fits .* remove the 300,000 white-space characters"):
        prepare(config(base, write(tmp_path / "data.jsonl", rows), tmp_path / "run"))


def test_a_template_that_prints_the_date_prints_that_of_the_runs_start(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "model")
    byte_tokenizer(base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TODAY}))
    answer = {"role": "assistant", "content": "yes"}
    talks = [{"messages": [{"role": "user", "content": str(n)}, answer]} for n in range(30)]
    data, out = write(tmp_path / "talks.jsonl", talks), tmp_path / "run"
    train(config(base, data, out))
    path = out / "run.json"
    run = json.loads(path.read_text())
    assert len(run["date"]) == 10
    path.write_text(json.dumps({**run, "date": "2024-07-26"}))
    resumed = prepare(config(base, data, out, resume=True, max_iters=4), given={"max_iters"})
    assert resumed.loaded.tokenizer.decode(resumed.data.train[0].prompt_ids).startswith("26 Jul 2024 ")
    assert resumed.manifest.values["date"] == "2024-07-26"
    assert Chat(load("resume", out, device="cpu").tokenizer).render([("user", "a")]).startswith("26 Jul 2024 ")
    assert not Chat(load(str(base), device="cpu").tokenizer).render([("user", "a")]).startswith("26 Jul 2024 ")


CHATS = {
    # template -> how many of 20 conversations end with what stops no text, and with what
    "<{r}>{c}<|endoftext|>": (0, ""),
    "{r}: {c}\n": (20, r"\n"),  # no token ends a turn
    "<{r}>{generation}{c}<|endoftext|>\n{endgeneration}": (0, ""),  # LFM2.5's
    "<{r}>{generation}{c}{endgeneration}<|endoftext|>": (20, "!"),  # left out of what is learned
}


@pytest.mark.parametrize("form", CHATS)
def test_answers_that_end_with_nothing_that_stops_a_text_are_counted(form: str, base: Path, tmp_path: Path) -> None:
    count, end = CHATS[form]
    words = {"r": "{{ m.role }}", "c": "{{ m.content }}", "generation": "", "endgeneration": ""}
    marks = {**words, "generation": "{% generation %}", "endgeneration": "{% endgeneration %}"}
    turns = [form.format(**marked) for marked in (marks, words)]
    asked = form.partition("{generation}")[0].partition("{c}")[0].format(r="assistant")
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + "{% else %}".join(turns) + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + asked + "{% endif %}"
    )
    model = shutil.copytree(base, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "yes!"}]
    data = write(tmp_path / "chat.jsonl", [{"messages": talk}] * 20)
    found = [note for note in notes(model, data, tmp_path / "run", val_data=data) if "stops no text" in note]
    assert len(found) == 2 * (count > 0)  # of both splits
    assert all(note.startswith(f"{count} of 20 conversations in ") and f"end with '{end}'" in note for note in found)


@pytest.mark.parametrize(
    ("prompts", "joined"),
    [("q", True), ("q ", False), ("q\n", False), ("q?", False), ("猫", False), ("é", True)],
)
def test_completions_that_continue_the_prompts_last_word_are_noted(prompts: str, joined: bool) -> None:
    rows = [Completion(f"some {prompts}", "猫" if prompts == "猫" else "answer")] * 3 + [Completion("a", " b")] * 2
    pairs = [Preference(row.prompt, row.completion, " no") for row in rows]
    shown = f"'some {prompts}|answer'"
    for some in (rows, pairs, [*rows, Labelled("a", 1)]):
        counts = JoinedWords()
        counts.add(some[:2])
        counts.add(some[2:])
        found = counts.notes()
        assert bool(found) is joined
        assert not found or found[0].startswith(
            "in 3 of 5 rows the completion begins without a space after the prompt's last word, as in " + shown
        )
    counts = JoinedWords()
    counts.add(rows[2:])
    assert not counts.notes()
