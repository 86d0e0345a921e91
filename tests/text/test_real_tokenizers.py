"""The tokenizers and chat templates that people have: texts, conversations and loss masks are transformers' own.

`tests/real_tokenizers.py` fetches the tokenizers. Templates that their packages lack, and those that mark what the
assistant says, are TRL's copies of the originals.
"""

import json
import time
from collections.abc import Iterator
from datetime import datetime
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unicodedata import normalize

import pytest
import transformers

from graftlm.files.assets import data_folder
from graftlm.text.chat import Chat
from graftlm.text.tokenizer import MarkedTokenizer, Tokenizer
from real_tokenizers import SHA256, tokenizer_folder

ENDS = {
    "qwen3": "<|im_end|>",
    "gemma3": "<end_of_turn>",
    "llama3_1": "<|eot_id|>",
    "gptoss": "<|return|>",
}
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
    for number in range(20)
]


def trl_template(name: str) -> str:
    """A chat template of TRL's; the package is not imported."""
    spec = find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=SHA256)
def both(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A tokenizer as graft and as transformers read it, with its own template or TRL's copy. It is New Year."""
    name, folder = request.param, tokenizer_folder(request.param)
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    template = theirs.chat_template or trl_template(name)
    ours.__dict__["chat_template"] = theirs.chat_template = template
    ours.date = NEW_YEAR.date().isoformat()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.utils.chat_template_utils.datetime", SimpleNamespace(now=lambda: NEW_YEAR))
        yield SimpleNamespace(name=name, ours=ours, theirs=theirs)


def test_a_thousand_reviews_have_the_tokens_of_transformers(both: Any) -> None:
    with open(data_folder("rotten-tomatoes-pypi") / "train.jsonl", encoding="utf-8", newline="\n") as file:
        texts = [json.loads(line)["text"] for line in islice(file, 1000)]
    ids = both.theirs(texts).input_ids
    assert both.ours.encode_prompts(texts) == ids and len(ids) == 1000
    bare = both.theirs(texts, add_special_tokens=False).input_ids
    assert both.ours.encode_batch(texts) == bare
    assert [both.ours.decode(own) for own in bare] == both.theirs.batch_decode(bare, skip_special_tokens=True)


def test_the_vocabulary_is_not_copied_for_chat(both: Any) -> None:
    """A copy took 1 to 4 seconds."""
    start = time.process_time()
    MarkedTokenizer(both.ours._backend)
    assert time.process_time() - start < 0.3


def as_pairs(talk: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in talk]


def rendered(theirs: Any, messages: list[dict[str, Any]], **options: Any) -> tuple[str, list[int]]:
    """The text and the tokens of transformers' own."""
    text = theirs.apply_chat_template(messages, tokenize=False, **options)
    return text, theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def test_conversations_and_what_is_learned_of_them_are_as_the_model_is_asked(both: Any) -> None:
    """The tokens are transformers'; learned are exactly an answer's tokens and the token that ends its turn."""
    chat, end = Chat(both.ours), ENDS[both.name]
    assert both.ours.decode_with_special([chat.turn_end]) == end and chat.turn_end in chat.stop_tokens
    for talk in TALKS:
        parts = chat.conversations(as_pairs(talk))
        learned = [(part.ids, answer) for part in parts for answer in part.answers]
        answers = [number for number, message in enumerate(talk) if message["role"] == "assistant"]
        rewrites = both.name in ("qwen3", "gptoss") and len(answers) > 1
        assert len(learned) == len(answers) and len(parts) == (len(answers) if rewrites else 1)
        for (ids, answer), number in zip(learned, answers, strict=True):
            asked_text, asked = rendered(both.theirs, talk[:number], add_generation_prompt=True)
            text, whole = rendered(both.theirs, talk[: number + 1])
            assert ids[: len(whole)] == whole and chat.encode(as_pairs(talk[:number])) == asked
            assert ids[: answer.start] == asked and text.startswith(asked_text)
            own = both.ours.decode_with_special(ids[answer.start : answer.stop])
            expected = normalize("NFC", text[len(asked_text) :].removesuffix("\n"))
            assert normalize("NFC", own) == expected and own.count(end) == 1 and own.endswith(end)


def test_what_a_template_marks_is_what_transformers_marks(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = trl_template({"llama3_1": "llama3"}.get(both.name, both.name) + "_training")
    monkeypatch.setitem(both.ours.__dict__, "chat_template", template)
    chat = Chat(both.ours)
    for talk in TALKS:
        found = both.theirs.apply_chat_template(
            talk, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        (part,) = chat.conversations(as_pairs(talk))
        learned = {place for answer in part.answers for place in answer}
        assert part.ids == found["input_ids"]
        assert [int(place in learned) for place in range(len(part.ids))] == found["assistant_masks"]
