"""The tokenizer of a .gguf file -> tokenizer.json and tokenizer_config.json.

Two kinds are read:

- "gpt2", byte-level BPE. `tokenizer.ggml.pre` names the rule that splits a text before merging; `PRE_TOKENIZERS` has
  the regular expressions of the original tokenizers.
- "llama", BPE of SentencePiece: of two neighbours those whose union has the best score are merged. As transformers
  does, each way to split a token into two others becomes a merge, in the order of scores. A file does not say whether a
  space is written before a text only, or also after special tokens; llama.cpp does the latter, as Llama 2.

What a file lacks: whether white space next to a special token belongs to it, and which of the tokens that look like
`<|name|>` are special (llama.cpp's converter calls all of them so).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.errors import InputError
from graftlm.files.atomic import write_json, write_text
from graftlm.files.gguf_file import GGUFFile

if TYPE_CHECKING:
    import tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types of gguf
SPACE = "\u2581"  # SentencePiece's
TURN_ENDS = (
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>"),
    *("<|end_of_text|>", "<end_of_utterance>", "<eos>", "<EOT>", "[EOT]"),
)
"""Control tokens at which llama.cpp ends a text in any case. Some files name only one end of several."""

# Pre-tokenizers -------------------------------------------------------------------------------------------------------

DIGIT = r"\p{N}"
_CASELESS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST
_QWEN2 = _CASELESS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST
_QWEN35 = _CASELESS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = [rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{upper}{_LOWER}{lower}" for upper, lower in ("*+", "+*")]
_CASE_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = "|".join([*(cases + _CASELESS + "?" for cases in _CASES), r"\p{N}{1,3}", _CASE_REST])
_TEKKEN = "|".join([*_CASES, r"\p{N}", _CASE_REST])
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level tokenizer splits a text before merging."""

    splits: tuple[str, ...] = ()
    """Regular expressions, one after the other; empty: GPT-2's rule."""
    nfc: bool = False
    """Whether texts are normalised to NFC. The file does not say so; the tokenizers of this name do it."""
    ignore_merges: bool = False
    """Whether a piece that is a token is not split further."""
    bos: bool = False
    """Whether a text begins with the begin-of-text token unless the file says otherwise."""


_LLAMA_BPE = PreTokenizer((_LLAMA3,), ignore_merges=True, bos=True)
_DIGITS = PreTokenizer((DIGIT,))
_QWEN = PreTokenizer((_QWEN2,), nfc=True)
PRE_TOKENIZERS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LLAMA_BPE),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN),
    "qwen35": PreTokenizer((_QWEN35,), nfc=True),
    "default": PreTokenizer(_DEFAULT),
    **dict.fromkeys(("gpt-2", "phi-2", "exaone4", "trillion", "mellum", "a.x-4.0"), PreTokenizer()),
    **dict.fromkeys(("mpt", "olmo"), PreTokenizer(nfc=True)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    "command-r": replace(_DIGITS, nfc=True),
    "smaug-bpe": replace(_LLAMA_BPE, bos=False),  # Llama 3's tokenizer without begin-of-text: SmolLM3
    **dict.fromkeys(("dbrx", "glm4", "chatglm-bpe"), PreTokenizer((_LLAMA3,))),
    **dict.fromkeys(("stablelm2", "megrez", "hunyuan"), PreTokenizer((_QWEN2,))),
    **dict.fromkeys(("gpt-4o", "llama4"), PreTokenizer((_GPT4O,), ignore_merges=True)),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", DIGIT)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, bos=True),
}
"""tokenizer.ggml.pre -> the rule. The regular expressions are those of the original tokenizer.json files; llama.cpp has
its own writing of some."""


# Files ----------------------------------------------------------------------------------------------------------------


def token_ids(file: GGUFFile) -> dict[str, Any]:
    """The ids of the begin of a text, of its end (several: a list) and of padding, as in generation_config.json."""
    tokens, kinds = "tokenizer.ggml.tokens", file.get("tokenizer.ggml.token_type", [])
    ids: dict[str, Any] = {}
    for name, index in _special(file).items():
        if name != "unk":
            ids[f"{name}_token_id"] = index
    ends = [ids.get("eos_token_id"), *(file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))]
    named = {file.text(tokens, index): index for index, kind in enumerate(kinds) if kind == CONTROL}
    turns = [name for name in TURN_ENDS if name in named]
    if {"<|return|>", "<|call|>"} <= {*turns}:
        turns.remove("<|end|>")  # ends a message of gpt-oss, after which others follow
    found = dict.fromkeys(int(end) for end in [*ends, *(named[name] for name in turns)] if end is not None)
    if len(found) > 1:
        ids["eos_token_id"] = list(found)
    return ids


def _special(file: GGUFFile) -> dict[str, int]:
    """bos, eos, unk and pad -> id, as far as the file has them. SentencePiece's first three have default ids."""
    defaults = {"unk": 0, "bos": 1, "eos": 2} if file.get("tokenizer.ggml.model") == "llama" else {}
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {name: file.get(f"tokenizer.ggml.{key}_token_id", defaults.get(name)) for name, key in keys.items()}
    return {name: int(index) for name, index in found.items() if index is not None}


def write_tokenizer(file: GGUFFile, context: int, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json. InputError for a kind that is not supported."""
    kind, pre = file.require("tokenizer.ggml.model"), file.get("tokenizer.ggml.pre")
    tokens = file.require("tokenizer.ggml.tokens")
    if kind == "llama":
        backend, bos_default = _sentencepiece(file, tokens), True
    elif kind == "gpt2" and pre in PRE_TOKENIZERS:
        backend, bos_default = _byte_level(file, tokens, PRE_TOKENIZERS[pre]), PRE_TOKENIZERS[pre].bos
    else:
        known = f"read are 'llama', and 'gpt2' with {', '.join(PRE_TOKENIZERS)}"
        raise InputError(
            f"{file.path}: tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported ({known}): use the model's "
            "Hugging Face folder"
        )
    special = {name: tokens[index] for name, index in _special(file).items()}
    before = special.get("bos") if file.get("tokenizer.ggml.add_bos_token", bos_default) else None
    after = special.get("eos") if file.get("tokenizer.ggml.add_eos_token", False) else None
    if before or after:
        _add_around(backend, before, after)
    write_text(folder / "tokenizer.json", backend.to_str(pretty=True))
    settings: dict[str, Any] = {f"{name}_token": token for name, token in special.items()}
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    if (template := file.get("tokenizer.chat_template")) is not None:
        settings["chat_template"] = template
    write_json(folder / "tokenizer_config.json", settings)


def _add_around(backend: tokenizers.Tokenizer, before: str | None, after: str | None) -> None:
    """Tokens before and after each text."""
    from tokenizers import processors

    first, second = (" ".join(filter(None, [before, text, after])) for text in ("$A", "$B"))
    special = [(token, backend.token_to_id(token)) for token in (before, after) if token]
    backend.post_processor = processors.TemplateProcessing(
        single=first, pair=f"{first} {second}", special_tokens=list(dict(special).items())
    )


def _vocabulary(tokens: list[str], kinds: list[int]) -> dict[str, int]:
    """Token -> id, without those that only pad the vocabulary to a round number."""
    if len({*tokens}) != len(tokens) or len(kinds) not in (0, len(tokens)):
        raise ValueError("its vocabulary contains a token twice, or has another length than their types")
    return {token: index for index, token in enumerate(tokens) if token != f"[PAD{index}]"}


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], kinds: list[int], rstrip: bool) -> None:
    """The tokens that are found in a text before it is split."""
    from tokenizers import AddedToken

    added = []
    for index, kind in enumerate(kinds):
        if kind in (CONTROL, UNKNOWN, USER_DEFINED) and tokens[index] != f"[PAD{index}]":
            special = kind != USER_DEFINED
            added.append(AddedToken(tokens[index], special=special, normalized=False, rstrip=rstrip and special))
    backend.add_tokens(added)


def splitter(pre: PreTokenizer) -> tokenizers.pre_tokenizers.PreTokenizer:
    """The rule as the `tokenizers` package has it, with bytes written as characters."""
    from tokenizers import Regex, pre_tokenizers

    parts: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if split == DIGIT
        else pre_tokenizers.Split(Regex(split), behavior="isolated")
        for split in pre.splits
    ]
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.splits in ((), (DIGIT,))))
    return pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]


def _byte_level(file: GGUFFile, tokens: list[str], pre: PreTokenizer) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    kinds = file.get("tokenizer.ggml.token_type", [])
    vocab = _vocabulary(tokens, kinds)
    merges = [tuple(merge.split(" ")) for merge in file.require("tokenizer.ggml.merges")]
    for merge in merges:
        if len(merge) != 2 or merge[0] not in vocab or merge[1] not in vocab or merge[0] + merge[1] not in vocab:
            raise ValueError(f"its merge {' '.join(merge)!r} is not made of its tokens")
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = splitter(pre)
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, tokens, kinds, rstrip=False)
    return backend


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    kinds, scores = file.require("tokenizer.ggml.token_type"), file.require("tokenizer.ggml.scores")
    rows = list(zip(tokens, kinds, scores, strict=True))
    # llama.cpp's converter writes a user's token of spaces with spaces, and a number that means no score.
    tokens = [token.replace(" ", SPACE) if kind == USER_DEFINED else token for token, kind, _ in rows]
    vocab = _vocabulary(tokens, kinds)
    if len({score for _, kind, score in rows if kind == NORMAL}) < 2:
        raise InputError(f"{file.path}: its tokens have no scores to merge by: use the model's Hugging Face folder")
    pieces = {token: score for token, kind, score in rows if kind == NORMAL}
    pieces |= {token: 0.0 for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED}
    unknown = _special(file).get("unk")
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges_of_scores(pieces, vocab),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=BYTE in kinds,
        )
    )
    prefix, space = file.get("tokenizer.ggml.add_space_prefix", True), normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), space]) if prefix else space
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    # Phi-3's special tokens swallow the white space after them; llama.cpp knows it by the model's name.
    _add_tokens(backend, tokens, kinds, rstrip=file.architecture == "phi3")
    return backend


def merges_of_scores(pieces: dict[str, float], vocab: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of SentencePiece's BPE: the best score first, and of one piece the longest left part first."""
    found = []
    for piece, score in pieces.items():
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        found += [(score, *pair) for pair in sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    found.sort(key=lambda one: (one[0], len(one[1]), len(one[2])), reverse=True)
    return [(left, right) for _, left, right in found]
