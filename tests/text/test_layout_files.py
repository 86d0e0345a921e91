"""Files as they are found in the world (`tests/layouts`, the first rows of each): the records that they become."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from graftlm.errors import InputError
from graftlm.text.dataset import load_dataset
from graftlm.text.layouts import LAYOUTS, MORE_LAYOUTS
from graftlm.text.records import Completion, Conversation, Labelled, Preference, Record, Unpaired

FILES = Path(__file__).parent.parent / "layouts"
ASKED, SAID, BAD = "What does the red fox mean?", "It means that the fox is red, number 0.", "No 0."
ASKED2, SAID2 = "What does the blue teacher mean?", "It means that the teacher is blue, number 1."
USER, ANSWER = ("user", ASKED), ("assistant", SAID)
STEM = "Write a response that appropriately completes the request."
ALPACA = f"Below is an instruction that describes a task. {STEM}\n\n### Instruction:\n{ASKED}\n\n### Response:\n"
ALPACA_INPUT = (
    f"Below is an instruction that describes a task, paired with an input that provides further context. {STEM}\n\n"
    f"### Instruction:\n{ASKED}\n\n### Input:\n{{}}\n\n### Response:\n"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "d",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def talk(*messages: Any, tools: tuple[Any, ...] = (), unlearned: tuple[int, ...] = ()) -> Conversation:
    return Conversation(messages, "", tools, unlearned)


def pair(*prompt: Any) -> Preference:
    return Preference(prompt, (ANSWER,), (("assistant", BAD),))


def call(name: str, arguments: dict[str, Any], **others: str) -> tuple[str, str, dict[str, Any]]:
    inner = {"name": name, "arguments": arguments}
    return "assistant", "", {"tool_calls": [{**others, "type": "function", "function": inner}]}


def read(file: Path, folder: Path) -> tuple[Record, str]:
    """The first record of a file, without its source, and what the run says of its layout."""
    shutil.copy(file, folder / f"validation{file.suffix}")
    data = load_dataset(str(folder))
    (record, *_) = data.splits["validation"]
    object.__setattr__(record, "source", "")
    return record, data.notes[-1].removeprefix(f"{folder}: read as ")


READ: dict[str, tuple[str, Record]] = {
    "alpaca.json": (
        "alpaca (instruction, output)",
        Completion(ALPACA_INPUT.format("Context number 0."), SAID),
    ),
    "alpaca_gpt4_text.jsonl": ("alpaca (instruction, output); columns not read: text", Completion(ALPACA, SAID)),
    "alpaca_history.json": (
        "alpaca chat (instruction, output)",
        talk(("system", "Be brief."), ("user", ASKED2), ("assistant", SAID2), USER, ANSWER),
    ),
    "chat.json": ("chat (messages)", talk(USER, ANSWER)),
    "chat.parquet": ("chat (messages)", talk(USER, ANSWER)),
    "chat_null_tool_calls.parquet": ("chat (messages)", talk(USER, ANSWER)),
    "chat_bare_list.json": ("chat (messages)", talk(USER, ANSWER)),
    "chat_developer.jsonl": ("chat (messages)", talk(("system", "Be a pirate."), USER, ANSWER)),
    "chat_system.jsonl": ("chat (messages)", talk(("system", "Be a pirate."), USER, ANSWER)),
    "chat_system_column.jsonl": ("chat (messages)", talk(("system", "Answer in rhyme."), USER, ANSWER)),
    "chat_ends_user.jsonl": ("chat (messages)", talk(USER, ANSWER, ("user", "Thanks!"))),
    "chat_name.jsonl": ("chat (messages)", talk(("user", ASKED, {"name": "Bob"}), ANSWER)),
    "chat_plain.jsonl": ("chat (messages)", talk(USER, ANSWER, ("user", ASKED2), ("assistant", SAID2))),
    "chat_weight.jsonl": (
        "chat (messages)",
        talk(USER, ("assistant", "BAD ANSWER"), ("user", ASKED2), ANSWER, unlearned=(1,)),
    ),
    "chat_function.jsonl": (
        "chat (messages)",
        talk(
            *(USER, call("f", {}), ("tool", "1", {"name": "f"}), ANSWER),
            tools=({"type": "function", "function": {"name": "f", "parameters": {}}},),
        ),
    ),
    "chat_tools.jsonl": (
        "chat (messages); columns not read: parallel_tool_calls",
        talk(
            *(USER, call("get_weather", {"city": "Paris"}, id="call_1")),
            *(("tool", "15 C", {"tool_call_id": "call_1"}), ANSWER),
            tools=(WEATHER,),
        ),
    ),
    "chat_tools_column_only.jsonl": ("chat (messages)", talk(USER, ANSWER, tools=(WEATHER,))),
    "chat_prompt_and_messages.jsonl": ("chat (messages); columns not read: prompt, prompt_id", talk(USER, ANSWER)),
    "chat_reasoning_content.jsonl": (
        "chat (messages)",
        talk(USER, (*ANSWER, {"reasoning_content": "Let me see 0."})),
    ),
    "chat_think.jsonl": ("chat (messages)", talk(USER, ("assistant", f"<think>\nLet me see 0.\n</think>\n\n{SAID}"))),
    "conversations_role_content.jsonl": ("sharegpt (conversations)", talk(USER, ANSWER)),
    "dolly.jsonl": (
        "dolly (instruction, context, response); columns not read: category",
        Completion(ALPACA_INPUT.format("Context 0."), SAID),
    ),
    "gsm8k.jsonl": (
        "question and answer (question, answer)",
        Completion("Ann has 0 apples and buys 2 more. How many?", "She has 0 + 2 = <<0+2=2>>2 apples.\n#### 2"),
    ),
    "input_output.jsonl": ("input and output (input, output)", Completion(ASKED, SAID)),
    "kto.jsonl": ("unpaired preference (prompt, completion, label)", Unpaired(ASKED, BAD, False)),
    "metharme.jsonl": ("prompt and generation (prompt, generation)", Completion(ASKED, SAID)),
    "oasst_guanaco.jsonl": ("guanaco (text)", talk(USER, ANSWER)),
    "oasst_trees.jsonl": (
        "oasst tree (prompt, message_tree_id); columns not read: tree_state",
        talk(USER, ANSWER),
    ),
    "prompt_completion.jsonl": ("completion (prompt, completion)", Completion(ASKED, SAID)),
    "prompt_completion_space.jsonl": ("completion (prompt, completion)", Completion(ASKED, f" {SAID}")),
    "prompt_completion_conv.jsonl": ("chat completion (prompt, completion)", talk(USER, ANSWER)),
    "sharegpt.json": (
        "sharegpt (conversations); columns not read: id",
        talk(("system", "You are kind."), USER, ANSWER, ("user", ASKED2), ("assistant", SAID2)),
    ),
    "sharegpt_tools.json": (
        "sharegpt (conversations)",
        talk(USER, call("f", {}), ("tool", '{"r":1}'), ANSWER, tools=({"name": "f"},)),
    ),
    "hh.jsonl": (
        "preference (chosen, rejected)",
        Preference(
            f"\n\nHuman: {ASKED}\n\nAssistant: Which?\n\nHuman: The old one.\n\nAssistant:", f" {SAID}", f" {BAD}"
        ),
    ),
    "pref_conv.jsonl": ("preference (chosen, rejected)", pair(USER)),
    "pref_implicit_text.jsonl": ("preference (chosen, rejected)", Preference(ASKED, f" {SAID}", f" {BAD}")),
    "pref_lf_alpaca.json": (
        "preference after instruction (instruction, chosen, rejected)",
        Preference(ALPACA, SAID, BAD),
    ),
    "pref_lf_sharegpt.json": ("preference after conversations (conversations, chosen, rejected)", pair(USER)),
    "pref_orca.jsonl": (
        "preference after question (question, chosen, rejected)",
        pair(("system", "Be kind."), USER),
    ),
    "pref_prompt_system.jsonl": ("preference (chosen, rejected)", pair(("system", "Answer in rhyme."), USER)),
    "pref_std.jsonl": ("preference (chosen, rejected)", Preference(ASKED, SAID, BAD)),
    "pref_std_space.jsonl": ("preference (chosen, rejected)", Preference(ASKED, f" {SAID}", f" {BAD}")),
    "ultrafeedback.jsonl": (
        "preference (chosen, rejected); columns not read: messages, prompt_id, score_chosen, score_rejected",
        pair(USER),
    ),
    "sst2.jsonl": (
        "labelled (sentence, label); columns not read: idx",
        Labelled("the red fox was a bore to see , take 0", 0),
    ),
    "stars.jsonl": ("labelled (text, stars)", Labelled("the red fox was a bore to see , take 0", 1)),
}

EVERY = f"{', '.join(map(str, LAYOUTS[:7]))}, and {len(LAYOUTS) + len(MORE_LAYOUTS) - 7} more (docs/how-to.md)"
REFUSED = {
    "banking77_names.jsonl": "FILE:1: unknown label 'intent_00': a number from 0 on is needed, or --labels with the "
    "words",
    "boolq.jsonl": "FILE:1: passage would be lost, and it changes what is learned: write it into the texts, or leave "
    "it out",
    "chat_empty_assistant.jsonl": "FILE:2: message 2: empty content: fill it in, or leave the row out",
    "chat_image_parts.jsonl": "FILE:1: message 1: content holds a part of type 'image_url', and models here read text "
    "alone: leave the row out",
    "extra_fields.jsonl": "FILE: the columns fit several layouts, labelled (text, label) and unpaired preference "
    "(prompt, completion, label) and chat (messages): choose --columns text=text,label=label or --columns "
    "prompt=prompt,completion=completion,label=label or --columns messages=messages",
    "oasst_flat.jsonl": "FILE:1: a row is one message of a tree: use OASST's file of trees, or write a conversation a "
    "row",
    "squad_hf.jsonl": f"FILE: no column 'answer': did you mean 'answers'? the columns are id, title, context, "
    f"question, answers; name it with --columns answer=COLUMN; the layouts are {EVERY}",
}


@pytest.mark.parametrize("name", READ)
def test_the_records_of_a_file(tmp_path: Path, name: str) -> None:
    note, record = READ[name]
    assert read(FILES / name, tmp_path) == (record, note)


@pytest.mark.parametrize("name", REFUSED)
def test_the_line_that_refuses_a_file(tmp_path: Path, name: str) -> None:
    message = REFUSED[name].replace("FILE", str(tmp_path / f"validation{Path(name).suffix}"))
    with pytest.raises(InputError, match=f"^{re.escape(message)}( \\(.* bad.*\\))?$"):
        read(FILES / name, tmp_path)


def test_every_file_has_its_outcome() -> None:
    assert {path.name for path in FILES.iterdir()} == READ.keys() | REFUSED.keys()


# ------------------------------------------------------------------------------------------------ other rows

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
    ({"instruction": ASKED, "response": SAID}, "instruction (instruction, response)", Completion(ALPACA, SAID)),
    (
        {"system_prompt": "Be kind.", "question": "a", "response": "b"},
        "orca (system_prompt, question, response)",
        talk(("system", "Be kind."), A, B),
    ),
    ({"system_prompt": "", "question": "a", "response": "b"}, "orca (system_prompt, question, response)", talk(A, B)),
    ({"prompt": "a", "response": "b"}, "prompt and response (prompt, response)", Completion("a", "b")),
    ({"document": "a", "summary": "b"}, "document and summary (document, summary)", Completion("a", "b")),
    ({"dialogue": "A: hi", "summary": "b"}, "dialogue and summary (dialogue, summary)", Completion("A: hi", "b")),
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
    ({"message_tree_id": "t", "prompt": TREE}, "oasst tree (prompt, message_tree_id)", talk(A, B)),
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
            {"question": "q", "answer": "a", "context": "c"},
            ":1: context would be lost, and it changes what is learned: write it into the texts, or leave it out",
        ),
        (
            {"chosen": [SAY_A, SAY_B], "rejected": [SAY_A, SAY_B]},
            ":1: chosen and rejected must begin with the same messages, and each end with an answer of its own: leave "
            "the pair out, or give a column prompt",
        ),
        (
            {"chosen": "a b", "rejected": "a c", "system": "s"},
            ":1: system would be lost, and it changes what is learned: write it into the texts, or leave it out",
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
