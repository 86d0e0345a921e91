"""Rows in layouts of which no file is in layouts/ (`test_layout_table.py`): the records that they become."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from graftlm.errors import InputError
from graftlm.text.dataset import load_dataset
from graftlm.text.records import Completion, Conversation, Document, Labelled, Preference, Record, Unpaired

ASKED, SAID = "What does the red fox mean?", "It means that the fox is red, number 0."
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    f"### Instruction:\n{ASKED}\n\n### Response:\n"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "d",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


LOST = (
    "would be lost, and it changes what is learned: write it into the texts (--prompt and --completion name fields), "
    "or leave it out"
)


def talk(*messages: Any, tools: tuple[Any, ...] = (), unlearned: tuple[int, ...] = ()) -> Conversation:
    return Conversation(messages, "", tools, unlearned)


def read(file: Path, folder: Path) -> tuple[Record, str]:
    """The first record of a file, without its source, and what the run says of its layout."""
    shutil.copy(file, folder / f"validation{file.suffix}")
    data = load_dataset(str(folder))
    (record, *_) = data.splits["validation"]
    object.__setattr__(record, "source", "")
    return record, data.notes[-1].removeprefix(f"{folder}: read as ")


A, B = ("user", "a"), ("assistant", "b")
SAY_A, SAY_B = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TREE: dict[str, Any] = {
    "text": "a",
    "role": "prompter",
    "replies": [
        {"text": "unranked", "role": "assistant", "rank": None, "replies": []},
        {"text": "x", "role": "assistant", "rank": 0, "deleted": True, "replies": []},
        {"text": "b", "role": "assistant", "rank": 1, "replies": [{"text": "c", "role": "prompter", "replies": []}]},
    ],
}
ROWS: list[tuple[dict[str, Any], str, Record]] = [
    ({"instruction": ASKED, "response": SAID}, "alpaca (instruction, response)", Completion(ALPACA, SAID)),
    (
        {"system_prompt": "Be kind.", "question": "a", "response": "b"},
        "chat of one turn (question, response, system_prompt)",
        talk(("system", "Be kind."), A, B),
    ),
    (
        {"system_prompt": "", "question": "a", "response": "b"},
        "chat of one turn (question, response, system_prompt)",
        talk(A, B),
    ),
    ({"prompt": "a", "response": "b"}, "completion (prompt, response)", Completion("a", "b")),
    ({"document": "a", "summary": "b"}, "completion (document, summary)", Completion("a", "b")),
    ({"dialogue": "A: hi", "summary": "b"}, "completion (dialogue, summary)", Completion("A: hi", "b")),
    ({"dialogue": [SAY_A, SAY_B]}, "chat in dialogue (dialogue)", talk(A, B)),
    (
        {"conversation": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}]},
        "chat in conversation (conversation)",
        talk(A, B, ("user", "c"), ("assistant", "d")),
    ),
    (
        {"prompt": [SAY_A, SAY_B, SAY_A], "completion": [SAY_B], "system": "s"},
        "chat completion (prompt, completion)",
        talk(("system", "s"), A, B, A, B, unlearned=(2,)),
    ),
    (
        {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "train": True}]},
        "chat (messages)",
        talk(A, B),
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "!")]}, SAY_B]},
        "chat (messages)",
        talk(("user", "a!"), B),
    ),
    (
        {"text": "### Human: a ### Assistant: b\n### Human: c### Assistant: d"},
        "guanaco (text)",
        talk(A, B, ("user", "c"), ("assistant", "d")),
    ),
    ({"message_tree_id": "t", "prompt": TREE}, "best branch of OASST's tree (prompt, message_tree_id)", talk(A, B)),
    (
        {"review": "a", "rating": 3, "title": "t"},
        "labelled (review, rating); columns not read: title",
        Labelled("a", 3),
    ),
    (
        {"chosen": [SAY_A, SAY_B], "rejected": [SAY_A, {**SAY_B, "content": "c"}], "system": "s"},
        "preference (chosen, rejected)",
        Preference((("system", "s"), A), (B,), (("assistant", "c"),)),
    ),
    (
        {"prompt": [SAY_A], "chosen": "b", "rejected": "c"},
        "preference (chosen, rejected)",
        Preference((A,), (B,), (("assistant", "c"),)),
    ),
    (
        {"prompt": "a", "chosen": [SAY_B], "rejected": [{**SAY_B, "content": "c"}], "tools": [WEATHER]},
        "preference (chosen, rejected)",
        Preference((A,), (B,), (("assistant", "c"),), tools=(WEATHER,)),
    ),
    (
        {"instruction": "a", "history": [["x", "y"]], "chosen": "b", "rejected": "c"},
        "preference after instruction (instruction, chosen, rejected)",
        Preference((("user", "x"), ("assistant", "y"), A), (B,), (("assistant", "c"),)),
    ),
    (
        {
            "input": {"messages": [SAY_A], "tools": [WEATHER], "parallel_tool_calls": True},
            "preferred_output": [SAY_B],
            "non_preferred_output": [{**SAY_B, "content": "c"}],
        },
        "OpenAI preference (input, preferred_output, non_preferred_output)",
        Preference((A,), (B,), (("assistant", "c"),), tools=(WEATHER,)),
    ),
    (
        {"prompt": [SAY_A], "completion": [SAY_B], "label": True},
        "unpaired preference (prompt, completion, label)",
        Unpaired((A,), (B,), True),
    ),
    (
        {"prompt": "a", "completion": "b", "label": False, "system": "s"},
        "unpaired preference (prompt, completion, label)",
        Unpaired((("system", "s"), A), (B,), False),
    ),
    ({"Text": "a", " Label": 0}, "labelled (Text,  Label)", Labelled("a", 0)),
    ({"tweet": "a", "class": 0}, "labelled (tweet, class)", Labelled("a", 0)),
    ({"text": "a", "label": 1, "stars": 5}, "labelled (text, label); columns not read: stars", Labelled("a", 1)),
    ({"messages": [SAY_A, SAY_B], "chosen": [SAY_B]}, "chat (messages); columns not read: chosen", talk(A, B)),
    (
        {"messages": [SAY_A, SAY_B], "question": "q", "answer": "b"},
        "chat (messages); columns not read: answer, question",
        talk(A, B),
    ),
    (
        {"QUESTION": "a", "Answer ": "b", "id": 1},
        "completion (QUESTION, Answer ); columns not read: id",
        Completion("a", "b"),
    ),
    (
        {"article": "c", "question": "a", "answer": "b"},
        "question about a text (article, question, answer)",
        Completion("Context: c\nQuestion: a\nAnswer:", " b"),
    ),
    (
        {"context": "c", "question": "a", "answers": [{"text": "b", "answer_start": 0}, {"text": "d"}]},
        "question about a text (context, question, answers)",
        Completion("Context: c\nQuestion: a\nAnswer:", " b"),
    ),
    (
        {"prompt": "a", "completion": "b", "tools": [WEATHER]},
        "chat of one turn (prompt, completion)",
        talk(A, B, tools=(WEATHER,)),
    ),
    (
        {"INSTRUCTION": "a", "RESPONSE": "b"},
        "alpaca (INSTRUCTION, RESPONSE)",
        Completion(ALPACA.replace(ASKED, "a"), "b"),
    ),
    (
        {"instruction": "a", "output": "b", "system_prompt": "s"},
        "alpaca chat (instruction, output, system_prompt)",
        talk(("system", "s"), A, B),
    ),
    (
        {"instruction": "a", "input": "", "output": "b", "kto_tag": False},
        "unpaired alpaca (instruction, output, kto_tag)",
        Unpaired(ALPACA.replace(ASKED, "a"), "b", False),
    ),
    (
        {"messages": [SAY_A, SAY_B], "kto_tag": True},
        "unpaired chat (messages, kto_tag)",
        Unpaired((A,), (B,), True),
    ),
    (
        {"question": "a", "answer": "b", "label": True},
        "unpaired preference (question, answer, label)",
        Unpaired("a", "b", True),
    ),
    (
        {"system": "s", "input": "a", "chosen": "b", "rejected": "c"},
        "preference after input (input, chosen, rejected)",
        Preference((("system", "s"), A), (B,), (("assistant", "c"),)),
    ),
    (
        {"conversation": [{"human": "a", "assistant": "b"}]},
        "chat in conversation (conversation)",
        talk(A, B),
    ),
    ({"messages": json.dumps([SAY_A, SAY_B])}, "chat (messages)", talk(A, B)),
    (
        {"messages": [{"role": "system", "content": ""}, SAY_A, SAY_B]},
        "chat (messages)",
        talk(("system", ""), A, B),
    ),
    (
        {"messages": [{"role": "User", "content": "a", "id": "7"}, {**SAY_B, "model": "m", "annotations": []}]},
        "chat (messages); columns not read: messages.id, messages.model",
        talk(A, B),
    ),
    (
        {"instruction": "a", "system": "s", "chosen_response": "b", "rejected_response": "c"},
        "preference after instruction (instruction, chosen_response, rejected_response)",
        Preference((("system", "s"), A), (B,), (("assistant", "c"),)),
    ),
    (
        {"text": "a", "summary": "b", "title": "t"},
        "completion (text, summary); columns not read: title",
        Completion("a", "b"),
    ),
    (
        {"messages": [SAY_A], "chosen": SAY_B, "rejected": {**SAY_B, "content": "c"}},
        "preference after messages (messages, chosen, rejected)",
        Preference((A,), (B,), (("assistant", "c"),)),
    ),
    (
        {"question": "a", "sentence": "b", "label": 1, "idx": 0},
        "labelled (question, sentence, label); columns not read: idx",
        Labelled("question: a\nsentence: b", 1),
    ),
    (
        {"review_text": "a", "star_rating": 2, "star_label": 1},
        "labelled (review_text, star_label); columns not read: star_rating",
        Labelled("a", 1),
    ),
    (
        {"context": "", "question": "a", "answer": ["b"]},
        "question about a text (context, question, answer)",
        Completion("Question: a\nAnswer:", " b"),
    ),
    ({"Text": "a", "ID": 5}, "documents (Text); columns not read: ID", Document("a")),
    ({"Messages": [SAY_A, SAY_B]}, "chat (Messages)", talk(A, B)),
    (
        {"question": "a", "answer": "b", "label": 0},
        "unpaired preference (question, answer, label)",
        Unpaired("a", "b", False),
    ),
    ({"text": "a", "lang": ["en"], "id": 5}, "documents (text); columns not read: id, lang", Document("a")),
]


def write(path: Path, row: dict[str, Any]) -> Path:
    path.write_text(json.dumps(row) + "\n")
    return path


@pytest.mark.parametrize(("row", "note", "record"), ROWS, ids=[note for _, note, _ in ROWS])
def test_the_record_of_a_row(tmp_path: Path, row: dict[str, Any], note: str, record: Record) -> None:
    (tmp_path / "d").mkdir()
    assert read(write(tmp_path / "a.jsonl", row), tmp_path / "d") == (record, note)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"sentence": "a", "review": "b", "label": 1},
            ": the text may be in column sentence or review: choose --columns text=sentence or --columns text=review",
        ),
        (
            {"text": "a", "sentiment": 1, "stars": 5},
            ": the label may be in column sentiment or stars: choose --columns label=sentiment or --columns "
            "label=stars",
        ),
        (
            {"messages": [SAY_A, {**SAY_B, "weight": 0}]},
            ":1: the assistant says nothing, so there is nothing to learn: leave the row out",
        ),
        ({"messages": [SAY_A, {**SAY_B, "weight": 0.5}]}, ":1: message 2: weight must be 0 or 1, not 0.5"),
        (
            {"messages": [SAY_A, {"from": "function_call", "value": "f()"}]},
            ":1: message 2: value is broken JSON: 'f()'",
        ),
        (
            {"prompt": "q", "answer": "a", "context": "c"},
            f":1: context {LOST}",
        ),
        (
            {"chosen": [SAY_A, SAY_B], "rejected": [SAY_A, SAY_B]},
            ":1: chosen and rejected must begin with the same messages, and each end with an answer of its own: leave "
            "the pair out, or give a column prompt",
        ),
        (
            {"chosen": "a b", "rejected": "a c", "system": "s"},
            f":1: system {LOST}",
        ),
        (
            {"prompt": [SAY_A], "chosen": [SAY_A], "rejected": [SAY_B]},
            ":1: the last message of chosen is no answer of the assistant: leave the pair out",
        ),
        (
            {"prompt": [SAY_A], "chosen": [SAY_B], "rejected": "c", "finished": [True, False]},
            ":1: an answer that is not finished must be text: a message ends its turn",
        ),
        (
            {"text": "### Human: a### Assistant: "},
            ":1: text is no transcript of ### Human: and ### Assistant: with a text after each",
        ),
        (
            {"message_tree_id": "t", "prompt": "a"},
            ":1: prompt must be a tree of messages with text, role and replies",
        ),
    ],
)
def test_rows_that_are_refused(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "validation.jsonl", row)
    with pytest.raises(InputError, match=f"^{re.escape(f'{path}{message}')}$"):
        load_dataset(str(tmp_path))


def messages_of_a_tree() -> list[dict[str, Any]]:
    """The rows of a flat file: the reply of best rank comes last."""
    common = {"role": "assistant", "parent_id": "t", "deleted": False}
    return [
        {"message_id": "t", "parent_id": None, "role": "prompter", "text": "a"},
        {**common, "message_id": "r1", "rank": 1, "text": "second"},
        {**common, "message_id": "r2", "rank": None, "text": "unranked"},
        {**common, "message_id": "r0", "rank": 0, "text": "b"},
        {**common, "message_id": "u", "parent_id": "r0", "role": "prompter", "text": "c"},
    ]


def lines(folder: Path, rows: list[dict[str, Any]]) -> str:
    (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_messages_of_a_tree_are_one_conversation(tmp_path: Path) -> None:
    (record,) = load_dataset(lines(tmp_path, messages_of_a_tree())).splits["validation"]
    assert isinstance(record, Conversation) and record.messages == (A, B)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*messages_of_a_tree(), messages_of_a_tree()[1]], ":6: message_id r1 occurs twice: leave one row out"),
        (messages_of_a_tree()[1:2], ":1: the message before it, t, is not in the file: leave the row out"),
        ([{"title": "t", "paragraphs": [{"context": "c"}]}], ":1: paragraphs must be a list of objects with context"),
        (
            [{"title": "t", "paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": []}]}]}],
            ":1, question 1: empty answer",
        ),
    ],
)
def test_rows_that_cannot_be_put_together(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"validation.jsonl{message}")):
        load_dataset(lines(tmp_path, rows))
