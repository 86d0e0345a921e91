"""Tokenizers whose tokens never span a space after another character, so that a text can be tokenized in parts.

    tokens("a good" + " film") = tokens("a good") + tokens(" film")

That holds for byte pairs within words whose rule puts a space nowhere but at the start of a word, and looks ahead only
after white space: GPT-2's, Llama 3's, Qwen's and gpt-oss's. The template before a text is then tokenized once for all
texts, and an answer without its prompt. Of a tokenizer with any other rule nothing is assumed
(tests/text/test_word_starts.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MARK, _MARKS, _END = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+", r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"{_MARK}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_MARK}{_UPPER}+{_LOWER}*{_SUFFIX}?"
RULES = {
    rf"{_SUFFIX}|{_MARK}\p{{L}}+|\p{{N}}{{1,3}}|{_MARKS}[\r\n]*|{_END}",
    rf"{_SUFFIX}|{_MARK}\p{{L}}+|\p{{N}}|{_MARKS}[\r\n]*|{_END}",
    rf"{_CASED}|\p{{N}}{{1,3}}|{_MARKS}[\r\n/]*|{_END}",
}
"""Llama 3's, Qwen's and gpt-oss's; GPT-2's is built into `ByteLevel`."""
MIN_SHARED = 8
"""Texts that share a beginning, for it to be tokenized once."""
_WORD_START = re.compile(r"(?<=\S) ")


def splits_at_spaces(backend: tokenizers.Tokenizer) -> bool:
    """Whether the tokens of a text are those of its two parts, wherever a space follows another character."""
    from tokenizers import models, normalizers

    if not isinstance(backend.model, models.BPE) or not isinstance(backend.normalizer, normalizers.NFC | None):
        return False
    added = [token for token in backend.get_added_tokens_decoder().values() if not token.special]
    if any(token.rstrip or re.search(r"\S\s", token.content) for token in added):
        return False
    rule = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer else {}
    parts = rule["pretokenizers"] if rule.get("type") == "Sequence" else [rule]
    splitting = next((n for n, part in enumerate(parts) if _splits(part)), len(parts))
    return splitting < len(parts) and all(part["type"] in ("Digits", "ByteLevel") for part in parts[:splitting])


def _splits(rule: Mapping[str, Any]) -> bool:
    """Whether a rule starts a word at each space after another character."""
    if rule.get("type") == "ByteLevel":
        return bool(rule["use_regex"])
    plain = rule.get("type") == "Split" and rule["behavior"] == "Isolated" and not rule["invert"]
    return plain and rule["pattern"].get("Regex") in RULES


def shared_beginning(texts: Sequence[str]) -> str:
    """What all texts begin with, before a space after another character; "" if they are few."""
    if len(texts) < MIN_SHARED:
        return ""
    low, high = min(texts), max(texts)  # in sorted order: what these share, all share
    shared = low[: next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]
    return shared[: max((match.start() for match in _WORD_START.finditer(shared)), default=0)]
