"""`--chat`: prompts and answers of text as messages, if the base is tuned for chat, and what a run does afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest

import graftlm.cli.main as cli
from graftlm.config import DataConfig, TrainConfig
from graftlm.errors import InputError
from graftlm.exchange.load import is_chat_tuned, load
from graftlm.files.formats import read_json
from graftlm.inference.generate import generate
from graftlm.text.chat import Chat
from graftlm.text.collate import encode_rows
from graftlm.text.dataset import load_dataset
from graftlm.text.records import Completion, Conversation, Labelled, Preference, Record, Unpaired, as_messages
from graftlm.text.tokenizer import Tokenizer
from graftlm.training.data_report import describe_data
from graftlm.training.setup import prepare
from graftlm.training.train import train
from tiny import chat_model_folder, model_folder

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:"
TURNS = (("user", "Hi"), ("assistant", "Yes?"), ("user", "Bye"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model_folder(tmp_path_factory.mktemp("chat") / "model", CHAT)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def flags(base: Path, folder: Path, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    files = {flag: write(folder / f"{flag}.jsonl", rows) for flag in ("data", "val_data", "test_data")}
    small = {"rank": 2, "max_iters": 1, "batch_size": 4, "eval_every": 1}
    return {**files, **small, "init_from": str(base), "out_dir": str(folder / "run"), **more}


def asked(n: int) -> dict[str, Any]:
    return {"prompt": f"ask {n}\n", "completion": f" yes {n}"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (Completion("a \n", " b "), Conversation((("user", "a"), ("assistant", "b ")))),
        (Completion("Below is …", "b", question="a"), Conversation((("user", "a"), ("assistant", "b")))),
        (Preference("a", " b", " c"), Preference((("user", "a"),), (("assistant", "b"),), (("assistant", "c"),))),
        (Unpaired("a", " b", True), Unpaired((("user", "a"),), (("assistant", "b"),), True)),
        (
            Preference(HH, " Bye.", " So?\n\nHuman: a\n\nAssistant: b"),
            Preference(TURNS, (("assistant", "Bye."),), (("assistant", "So?"), ("user", "a"), ("assistant", "b"))),
        ),
        (
            Completion(HH, " Bye."),
            Conversation((*TURNS, ("assistant", "Bye.")), unlearned=(1,)),
        ),
        (
            Completion("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Yes?<|im_end|>\n"),
            Conversation((("user", "Hi"), ("assistant", "Yes?"))),
        ),
        (
            Unpaired("<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", "Yes?", True),
            Unpaired((("user", "Hi"),), (("assistant", "Yes?"),), True),
        ),
        (
            Completion("<|im_start|>user\nHi", " Yes?"),  # not up to an answer
            Conversation((("user", "<|im_start|>user\nHi"), ("assistant", "Yes?"))),
        ),
        (Labelled("a", 1), Labelled("a", 1)),
    ],
)
def test_texts_become_messages(record: Record, expected: Record) -> None:
    assert as_messages([record]) == [expected]


def test_alpaca_is_asked_without_its_frame(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", "chosen": "3", "rejected": "4"}
    for names in (("instruction", "input", "output"), ("instruction", "input", "chosen", "rejected")):
        path = write(tmp_path / "a.jsonl", [{name: row[name] for name in names}])
        (record,) = as_messages(load_dataset("", path).splits["validation"])
        prompt = record.messages[:1] if isinstance(record, Conversation) else getattr(record, "prompt", None)
        assert prompt == (("user", "Add.\n1, 2"),)


def test_a_base_is_tuned_for_chat_if_turns_end_as_its_texts_do(base: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(base)
    assert is_chat_tuned(base, tokenizer)
    for template in (None, CHAT.replace("<|endoftext|>", "<|end|>"), "{{ broken"):
        tokenizer.__dict__["chat_template"] = template
        tokenizer.__dict__["added_tokens"] = {**tokenizer.added_tokens, "<|end|>": 3}
        assert not is_chat_tuned(base, tokenizer)
    (tmp_path / "export.json").write_text(json.dumps({"data": {"chat": False}}))
    assert not is_chat_tuned(tmp_path, Tokenizer.from_folder(base))


@pytest.mark.parametrize(
    ("objective", "rows"),
    [
        ("sft", [asked(n) for n in range(4)]),
        ("dpo", [{"prompt": f"ask {n}", "chosen": " yes", "rejected": " no"} for n in range(4)]),
        ("kto", [asked(n) | {"label": n % 2 == 0} for n in range(4)]),
    ],
)
def test_texts_are_trained_on_as_the_same_messages_are(
    objective: str, rows: list[dict[str, Any]], base: Path, tmp_path: Path
) -> None:
    def messages(text: str, name: str) -> Any:
        return [{"role": "user" if name == "prompt" else "assistant", "content": text.strip()}]

    said = [{k: v if isinstance(v, bool) else messages(v, k) for k, v in row.items()} for row in rows]
    examples = []
    for name, own in (("texts", rows), ("messages", said)):
        (tmp_path / name).mkdir()
        run = prepare(TrainConfig(**flags(base, tmp_path / name, own, objective=objective)))
        examples.append(
            [(e.prompt_ids, e.completion_ids, e.rejected_ids, e.desirable, e.finished) for e in run.data.train]
        )
        assert run.manifest.values["data"]["chat"]
        assert run.manifest.values["template"]["chat"] is (name == "texts")
        note = "prompts are a user's and answers the assistant's messages in the model's chat template (--chat auto); "
        assert any(line.startswith(note) for line in run.notes) is (name == "texts")
    assert examples[0] == examples[1] and len(examples[0]) == len(rows)


def test_a_run_chats_afterwards(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [asked(n) for n in range(4)]
    train(TrainConfig(**flags(base, tmp_path, rows, lr=0.05)))
    run = str(tmp_path / "run")
    loaded = load("resume", run)
    expected = generate(loaded.model, loaded.tokenizer, ["Hi"], chat=Chat(loaded.tokenizer), max_new_tokens=4)
    assert cli.run(["generate", f"--out_dir={run}", "--prompt=Hi", "--max_new_tokens=4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["texts"] == expected
    labelled, tokens = write(tmp_path / "labelled.jsonl", [{"text": "fine", "label": n % 2} for n in range(4)]), {}
    for chat in ("auto", "off"):
        words = ["evaluate", f"--out_dir={run}", f"--data={labelled}", "--mode=score", "--template={text} is", "--json"]
        assert cli.run([*words, f"--chat={chat}"]) == 0
        tokens[chat] = json.loads(capsys.readouterr().out)["prompt_tokens"]
    assert (tokens["off"], tokens["auto"]) == (len("fine is"), len("<user>fine is\n<assistant>") + 1)
    resumed = prepare(TrainConfig(resume=True, out_dir=run, max_iters=2))
    assert resumed.manifest.values["template"]["chat"] and resumed.manifest.values["data"]["chat"]
    # A run that starts from it learns as it has learned; one that starts from plain text stays plain.
    assert describe_data_chat(flags(base, tmp_path, rows, init_from=run))
    record = read_json(tmp_path / "run" / "run.json")
    record["data"]["chat"] = False
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert not describe_data_chat(flags(base, tmp_path, rows, init_from=run))


def describe_data_chat(flags: dict[str, Any]) -> bool:
    names = ("data", "val_data", "test_data", "init_from", "chat", "template")
    report = describe_data(DataConfig(**{name: flags[name] for name in names if name in flags}), frozenset())
    return any("messages in the model's chat template" in note for note in report["notes"])


def test_labelled_texts_are_plain_unless_chat_is_on(base: Path, tmp_path: Path) -> None:
    rows = [{"text": f"{'good' if n % 2 else 'bad'} {'x' * 30 * n}", "label": n % 2} for n in range(4)]
    more = {"template": "{text}\nIs it:", "max_length": 70}
    (tmp_path / "a").mkdir()
    assert not describe_data_chat(flags(base, tmp_path / "a", rows, template="{text} is"))
    run = prepare(TrainConfig(**flags(base, tmp_path / "a", rows, chat="on", **more)))
    template, tokenizer = run.loaded.template, run.loaded.tokenizer
    assert run.manifest.values["data"]["chat"] and template is not None and template.chat
    (whole,), _ = encode_rows([Labelled("good x", 1)], template, tokenizer, 70)
    shown = tokenizer.decode_with_special(whole.prompt_ids + whole.completion_ids)
    assert shown == "<user>good x\nIs it:<|endoftext|>\n<assistant>positive<|endoftext|>"
    answers = [Conversation((("user", "good x\nIs it:"), ("assistant", word))) for word in template.labels]
    talks, _ = encode_rows(answers, template, tokenizer, 70)
    assert whole.label_ids == tuple(talk.completion_ids[:-1] for talk in talks)
    assert whole.completion_ids == talks[1].completion_ids and whole.prompt_ids == talks[1].prompt_ids
    (truncated,), count = encode_rows([Labelled("good " + "x" * 99, 1)], template, tokenizer, 70)
    assert count == 1 and len(truncated.prompt_ids) + len("positive") + 1 == 70


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"text": "a"}], {"chat": "on"}, "--chat on: documents are learned as they are: leave --chat out"),
        ([asked(1) | {"finished": False}], {"chat": "on"}, r".*:1: an answer that is not finished cannot be a message"),
    ],
)
def test_what_cannot_be_messages(
    rows: list[dict[str, Any]], more: dict[str, str], message: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        describe_data_chat(flags(base, tmp_path, rows * 4, **more))


def test_answers_that_are_not_finished_stay_text(base: Path, tmp_path: Path) -> None:
    run = prepare(TrainConfig(**flags(base, tmp_path, [asked(n) | {"finished": n > 0} for n in range(4)])))
    assert any(note.startswith("--chat auto: off, as 2 answers are not finished") for note in run.notes)
    assert not run.manifest.values["data"]["chat"]


def test_a_base_without_a_chat_template(base: Path, tmp_path: Path) -> None:
    plain = model_folder(tmp_path / "plain")
    rows = [asked(n) for n in range(4)]
    assert not describe_data_chat(flags(plain, tmp_path, rows))
    with pytest.raises(InputError, match=r"^--chat on: the base model has no chat template: use --chat off$"):
        describe_data_chat(flags(plain, tmp_path, rows, chat="on"))
