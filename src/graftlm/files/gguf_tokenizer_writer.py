"""tokenizer.json -> the settings `tokenizer.*` of a .gguf file: the inverse of `gguf_tokenizer.py`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from graftlm.errors import InputError
from graftlm.files.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    PreTokenizer,
    splitter,
)

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
PIECES = (
    "I'VE we'll DON'T 3.14 1234567 x=1\n\n\n\ty   z  \r\n (a+b)*c/d <b>q</b> caf\u00e9",
    "e\u0301 日本語、正面。 ٣٤ ½ 🙂👍🏽",
    "  HTTPServer parseURL fooBar snake_case // #!? ... a'b 'S\t\tq \u00a0x 12 345 6789 Ünï ЖЗ\n \n  end ",
)
"""Texts on which two pre-tokenizers that differ in writing are compared."""


def tokenizer_settings(
    content: Mapping[str, Any], size: int, named: Mapping[str, int], before: Sequence[int]
) -> dict[str, Any]:
    """The settings of a tokenizer.

    content: its tokenizer.json. size: rows of the embedding. named: ids of bos, eos, eot, unknown and padding, as far
    as the model has them. before: the ids that precede a text. Raises InputError for a kind that llama.cpp has not.
    """
    model = content.get("model") or {}
    kind = str(model.get("type"))
    if kind != "BPE" or not model["merges"] or list(before) not in ([], [named.get("bos")]):
        kind += " without merges" if kind == "BPE" and not model["merges"] else ""
        raise InputError(f"no .gguf file is written with this tokenizer ({kind}): llama.cpp has BPE, with merges")
    pieces = bool(model.get("byte_fallback")) and SPACE in json.dumps(content.get("normalizer"), ensure_ascii=False)
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    tokens, types = _tokens(content, size, pieces)
    found: dict[str, Any] = {"model": "llama" if pieces else "gpt2", "tokens": tokens, "token_type": types}
    if pieces:
        ranks = {left + right: -rank for rank, (left, right) in reversed([*enumerate(pairs)])}
        found["pre"] = "default"
        found["scores"] = [float(ranks.get(token, -len(pairs) - i)) for i, token in enumerate(tokens)]
        found["add_space_prefix"] = "Prepend" in json.dumps(content["normalizer"])
    else:
        found["pre"] = _pre_tokenizer(content, bool(model.get("ignore_merges")))
        found["merges"] = [" ".join(pair) for pair in pairs]
    found |= {f"{name}_token_id": index for name, index in named.items()}
    found |= {"add_bos_token": bool(before), "add_eos_token": False}
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


def _tokens(content: Mapping[str, Any], size: int, pieces: bool) -> tuple[list[str], list[int]]:
    """The tokens by id, and their types; ids without a token are named [PADn] and unused."""
    unknown, rows = content["model"].get("unk_token"), {}
    for token, index in content["model"]["vocab"].items():
        byte = pieces and BYTE_TOKEN.fullmatch(token)
        rows[index] = (token, BYTE if byte else UNKNOWN if token == unknown else NORMAL)
    for token in content.get("added_tokens", []):
        text = token["content"] if token["special"] or not pieces else token["content"].replace(SPACE, " ")
        kind = UNKNOWN if text == unknown else CONTROL if token["special"] else USER_DEFINED
        rows[token["id"]] = (text, kind)
    if rows and max(rows) >= size:
        raise InputError(f"no .gguf file is written: token {max(rows)} has no row among the model's {size}")
    filled = [rows.get(index, (f"[PAD{index}]", UNUSED)) for index in range(size)]
    return [token for token, _ in filled], [kind for _, kind in filled]


def _pre_tokenizer(content: Mapping[str, Any], ignore_merges: bool) -> str:
    """llama.cpp's name for the way a byte-level tokenizer splits a text."""
    from tokenizers import Tokenizer, models

    nfc = "NFC" in json.dumps(content.get("normalizer"))
    bare = {"model": json.loads(Tokenizer(models.BPE()).to_str())["model"], "added_tokens": []}
    given = Tokenizer.from_str(json.dumps({**bare, "version": "1.0", "pre_tokenizer": content["pre_tokenizer"]}))
    assert given.pre_tokenizer is not None
    expected = [given.pre_tokenizer.pre_tokenize_str(text) for text in PIECES]

    def splits_alike(pre: PreTokenizer) -> bool:
        return [splitter(pre).pre_tokenize_str(text) for text in PIECES] == expected

    for name, pre in PRE_TOKENIZERS.items():
        if (pre.nfc, pre.ignore_merges) == (nfc, ignore_merges) and splits_alike(pre):
            return name
    raise InputError("no .gguf file is written with this tokenizer: llama.cpp's name for its rule is not known")
