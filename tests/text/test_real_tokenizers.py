"""The tokenizers and chat templates that people have: texts, conversations and loss masks are transformers' own.

`tests/real_tokenizers.py` fetches the tokenizers. Templates that their packages lack, and those that mark what the
assistant says, are TRL's copies of the originals.
"""

import json
import re
import time
from collections.abc import Iterator
from datetime import datetime
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unicodedata import normalize

import pytest
import transformers

from graftlm.errors import InputError
from graftlm.files.assets import data_folder
from graftlm.text.chat import Chat
from graftlm.text.collate import encode_rows
from graftlm.text.recognise import recognise
from graftlm.text.records import Completion, Conversation, Labelled, Record
from graftlm.text.rows import Row
from graftlm.text.template import load_template
from graftlm.text.tokenizer import MarkedTokenizer, Tokenizer
from real_tokenizers import tokenizer_folder
from tiny import byte_tokenizer

TEMPLATES: dict[tuple[str, str | None], dict[str, Any]] = {
    ("qwen3", None): {"ends": ("<|im_end|>",), "rewrites": True, "thinks": True, "calls": True},
    ("gemma3", None): {"ends": ("<end_of_turn>",), "rewrites": False, "thinks": False, "calls": False},
    ("llama3_1", None): {"ends": ("<|eot_id|>",), "rewrites": False, "thinks": False, "calls": False},
    ("llama3_1", "llama3_1"): {"ends": ("<|eot_id|>",), "rewrites": False, "thinks": False, "calls": True},
    ("gptoss", "gptoss"): {"ends": ("<|return|>", "<|call|>"), "rewrites": True, "thinks": True, "calls": True},
}
"""The tokenizers with their own template or TRL's copy: the tokens that end turns; whether a template writes answers
differently once more is said, writes what is thought, and knows tools."""
NEW_YEAR = datetime(2026, 1, 1)
SAID = (
    "Is it good?",
    "  indented\n\n",
    "def f():\n    return x\n",
    "日本語のテキスト, 正面。",
    "e\u0301 ½ … film's",
    "1,600 🙂👍🏽",
    "a\r\nb\t",
    "<b>bold</b> & \"quoted\"",
)  # fmt: skip
TALKS: list[list[dict[str, Any]]] = [
    [
        *([{"role": "system", "content": "Be brief.\nAnd kind. "}] if number % 3 == 1 else []),
        *(
            {"role": ("user", "assistant")[n % 2], "content": SAID[(number + 3 * n) % len(SAID)]}
            for n in range(2 * (1 + number % 4))
        ),
    ]
    for number in range(13)
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "Its name"}},
                "required": ["city"],
            },
        },
    }
]
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}]
ANSWER = {"role": "assistant", "content": " Yes.\n"}
THOUGHTFUL: list[list[dict[str, Any]]] = [
    [
        {"role": "user", "content": "Is it good?"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "Let me see.\nIt is."},
        *more,
    ]
    for more in (
        [],
        [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "No.", "reasoning_content": "Hm."}],
        [{"role": "user", "content": "And now?"}, {"role": "assistant", "content": "No."}],
    )
]
CALLING: list[list[dict[str, Any]]] = [
    [
        *system,
        {"role": "user", "content": "How is the weather in Zürich?"},
        {"role": "assistant", "content": "", "tool_calls": CALL, **thought},
        {"role": "tool", "content": "15 °C"},
        {"role": "assistant", "content": "Warm."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Any time."},
    ]
    for system in ([], [{"role": "system", "content": "Be brief."}])
    for thought in ({}, {"reasoning_content": "I must ask."})
]


def trl_templates() -> Path:
    """The folder of TRL's chat templates; the package is not imported."""
    spec = find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "chat_templates"


def trl_template(name: str) -> str:
    return (trl_templates() / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def new_year() -> Iterator[None]:
    """What transformers takes for today."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.utils.chat_template_utils.datetime", SimpleNamespace(now=lambda: NEW_YEAR))
        yield


@lru_cache(maxsize=1)
def loaded(name: str) -> tuple[Tokenizer, Any]:
    """A tokenizer as graft and as transformers read it."""
    folder = tokenizer_folder(name)
    return Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=TEMPLATES, ids=lambda pair: "-".join(filter(None, pair)))
def both(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A tokenizer as graft and as transformers read it, with its own template or TRL's copy."""
    name, copied = request.param
    ours, theirs = loaded(name)
    with pytest.MonkeyPatch.context() as patch:
        if copied:
            template = trl_template(copied)
            patch.setitem(ours.__dict__, "chat_template", template)
            patch.setattr(theirs, "chat_template", template)
        ours.date = NEW_YEAR.date().isoformat()
        yield SimpleNamespace(name=name, ours=ours, theirs=theirs, **TEMPLATES[request.param])


def test_a_thousand_reviews_have_the_tokens_of_transformers(both: Any) -> None:
    with open(data_folder("rotten-tomatoes-pypi") / "train.jsonl", encoding="utf-8", newline="\n") as file:
        texts = [json.loads(line)["text"] for line in islice(file, 1000)]
    ids = both.theirs(texts).input_ids
    assert both.ours.encode_prompts(texts) == ids and len(ids) == 1000
    bare = both.theirs(texts, add_special_tokens=False).input_ids
    assert both.ours.encode_batch(texts) == bare
    assert [both.ours.decode(own) for own in bare] == both.theirs.batch_decode(bare, skip_special_tokens=True)


def test_training_scoring_and_generation_begin_a_prompt_as_transformers_does(both: Any) -> None:
    """With begin-of-text where the tokenizer itself adds it, and never twice."""
    template = load_template("sentiment", "negative,positive")
    rows: list[Record] = [Labelled("so funny", 1), Completion("Is it good?", " Yes.")]
    for row, prompt in zip(rows, (template.prompt("so funny"), "Is it good?"), strict=True):
        ((example,), _) = encode_rows([row], template, both.ours, 99)
        expected = both.theirs(prompt).input_ids
        assert list(example.prompt_ids) == both.ours.encode_prompt(prompt) == expected
        answer = " positive" if isinstance(row, Labelled) else " Yes."
        assert [*expected, *example.completion_ids[:-1]] == both.theirs(prompt + answer).input_ids
    begins = both.theirs("a").input_ids[0] == both.theirs.bos_token_id
    assert begins == (both.name in ("gemma3", "llama3_1"))


def test_the_vocabulary_is_not_copied_for_chat(both: Any) -> None:
    """A copy took 1 to 4 seconds."""
    start = time.process_time()
    MarkedTokenizer(both.ours._backend)
    assert time.process_time() - start < 0.3


def conversation(talk: list[dict[str, Any]], **columns: Any) -> Conversation:
    """A row of a data file, as training reads it."""
    row = {"messages": talk, **columns}
    found = recognise("chat.jsonl", row).record(Row("chat.jsonl:1", row))
    assert isinstance(found, Conversation)
    return found


def rendered(theirs: Any, messages: list[dict[str, Any]], **options: Any) -> tuple[str, list[int]]:
    """The text and the tokens of transformers' own."""
    text = theirs.apply_chat_template(messages, tokenize=False, **options)
    return text, theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def test_conversations_and_what_is_learned_of_them_are_as_the_model_is_asked(both: Any) -> None:
    """The tokens are transformers'; learned are exactly an answer's tokens and the token that ends its turn."""
    chat = Chat(both.ours)
    assert both.ours.decode_with_special([chat.turn_end]) == both.ends[0] and chat.turn_end in chat.stop_tokens
    thoughtful, calling = THOUGHTFUL * both.thinks, CALLING[:: 1 if both.thinks else 2] * both.calls
    for talk, tools in [*((talk, None) for talk in TALKS + thoughtful), *((talk, TOOLS) for talk in calling)]:
        row = conversation(talk, tools=tools)
        parts = chat.with_tools(row.tools).conversations(row.messages)
        learned = [(part.ids, answer) for part in parts for answer in part.answers]
        answers = [number for number, message in enumerate(talk) if message["role"] == "assistant"]
        assert len(learned) == len(answers) and len(parts) == (len(answers) if both.rewrites else 1)
        for (ids, answer), number in zip(learned, answers, strict=True):
            asked_text, asked = rendered(both.theirs, talk[:number], tools=tools, add_generation_prompt=True)
            text, whole = rendered(both.theirs, talk[: number + 1], tools=tools)
            assert ids[: answer.start] == asked == chat.with_tools(row.tools).encode(row.messages[:number])
            if text.startswith(asked_text):
                answered = text[len(asked_text) :]
                assert ids[: len(whole)] == whole
            else:  # gpt-oss's leaves out why a tool was called once its result is answered
                assert both.name == "gptoss" and talk[number - 1]["role"] == "tool" and thoughtful
                answered = text.rpartition("<|start|>assistant")[2]
            own, content = (
                normalize("NFC", some)
                for some in (both.ours.decode_with_special(ids[answer.start : answer.stop]), talk[number]["content"])
            )
            assert own == normalize("NFC", answered.removesuffix("\n")) and content.strip() in own
            end = both.ends[-1] if "tool_calls" in talk[number] else both.ends[0]
            assert own.count(end) == 1 and own.endswith(end)


def test_what_a_template_does_not_write_is_not_lost_in_silence(both: Any) -> None:
    chat = Chat(both.ours, "leave the row out")
    thoughtful, calling = conversation(THOUGHTFUL[1]), conversation(CALLING[0], tools=TOOLS)
    if not both.thinks:
        with pytest.raises(InputError, match=r"template does not write reasoning_content: leave the row out"):
            chat.conversations(thoughtful.messages)
    if not both.calls:
        with pytest.raises(InputError, match=r"template (does not write tools|rejects .*): leave the row out"):
            chat.with_tools(calling.tools).conversations(calling.messages)
    elif both.name == "llama3_1":
        attack = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "description": "<|eot_id|>"}}]
        (part,) = chat.with_tools(attack).conversations(calling.messages)
        assert part.ids.count(chat.turn_end) == 7


def test_what_a_template_marks_is_what_transformers_marks(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = trl_template({"llama3_1": "llama3"}.get(both.name, both.name) + "_training")
    monkeypatch.setitem(both.ours.__dict__, "chat_template", template)
    chat = Chat(both.ours)
    for talk in TALKS:
        found = both.theirs.apply_chat_template(
            talk, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        (part,) = chat.conversations(conversation(talk).messages)
        learned = {place for answer in part.answers for place in answer}
        assert part.ids == found["input_ids"]
        assert [int(place in learned) for place in range(len(part.ids))] == found["assistant_masks"]


CONTROL = re.compile(r"<[|\uff5c][^<>]*[|\uff5c]>|<\|?(?:start_of_turn|end_of_turn|turn|end_of_utterance)\|?>")
SEEING = {"idefics3", "llava_next", "smolvlm"}
"""Models that read parts of text and images."""


def test_the_templates_of_many_models_write_and_mark_what_they_do_in_transformers(tmp_path: Path) -> None:
    talk = [message for text in ("Hi 5", "And?") for message in ({"role": "user", "content": text}, ANSWER)]
    refused, names = set(), sorted(path.stem for path in trl_templates().glob("*.jinja"))
    for name in names:
        template = trl_template(name)
        byte_tokenizer(tmp_path, *sorted({*CONTROL.findall(template), "<s>"}))
        settings = {"eos_token": "<|endoftext|>", "bos_token": "<s>", "chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path), Tokenizer.from_folder(tmp_path)
        ours.date = NEW_YEAR.date().isoformat()
        try:
            parts = Chat(ours).conversations(conversation(talk).messages)
        except InputError:
            refused.add(name.removesuffix("_training"))
            continue
        marks = "{%- generation" in template or "{% generation" in template
        found = theirs.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=marks)
        assert parts[-1].ids == found["input_ids"], name
        learned = {place for answer in parts[-1].answers for place in answer}
        if marks:
            assert [int(n in learned) for n in range(len(parts[-1].ids))] == found["assistant_masks"], name
        assert sum(len(part.answers) for part in parts) == 2, name
    assert refused == SEEING and len(names) > 60
