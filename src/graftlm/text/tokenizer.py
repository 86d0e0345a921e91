"""Text <-> token ids, by the `tokenizers` package and the tokenizer files of a model folder.

- Text is never a special token: `<|im_end|>` in a review becomes the tokens of its characters. Only the control tokens
  of a chat template are (`MarkedTokenizer`).
- Tokens are decoded as what follows a prompt (`decode`): tokenizers of SentencePiece's kind write a space before a
  text, which is no part of it, and drop it again before the first token.
- No padding, no truncation. A prompt begins with the tokens that the model expects before a text (Llama's BOS; none for
  GPT-2 and SmolLM2). `eot` ends a text that is learned; a generated one ends at any of `stop_tokens`.
- `save` writes the files back byte for byte, so other programs see the same tokenizer.

Read from tokenizer.json, else GPT-2's vocab.json + merges.txt, else OpenAI's encoder.json + vocab.bpe. `text/stream.py`
decodes tokens that arrive one at a time.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from graftlm.config.keywords import listed
from graftlm.config.paths import read_text, user_path
from graftlm.errors import InputError
from graftlm.files.atomic import atomic_write
from graftlm.files.formats import read_json
from graftlm.text.word_starts import shared_beginning, splits_at_spaces

if TYPE_CHECKING:
    import tokenizers

TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
# The files of a tokenizer; those that a folder has are saved again.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    TOOL_TEMPLATE,
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
)
GPT2_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
OTHER_KINDS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.txt")
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
GPT2_EOT = "<|endoftext|>"
BROKEN = "\ufffd"  # how decoders show bytes that are not a whole character
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's byte fallback
_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTES = {chr(byte): byte for byte in _PRINTED} | {
    chr(256 + number): byte for number, byte in enumerate(byte for byte in range(256) if byte not in _PRINTED)
}
"""The byte of each character of byte-level BPE (GPT-2's table)."""
LETTER = "a"  # any text that a decoder leaves as it is, before tokens that are not the first of a text


class Tokenizer:
    """The tokenizer of a model folder.

    eot: the id of the token that ends a text in training. stop_tokens: the ids that end a generated text, `eot` among
    them. vocab_size: added tokens included.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, eot: int, files: dict[str, bytes], stop_tokens: Collection[int] = ()
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # special tokens written in a text are text
        self._backend = backend
        self._files = files
        self._prefix = _prompt_prefix(backend)
        self.eot, self.stop_tokens = eot, frozenset({eot, *stop_tokens})
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.date: str | None = None  # YYYY-MM-DD, of the run, for chat templates that print today's; None: today
        self._letter = backend.encode(LETTER, add_special_tokens=False).ids

    @cached_property
    def sha256(self) -> str:
        """A hash of all that decides the ids of texts and conversations."""
        templates = f"{self.chat_template}{self.tool_template}"
        date = self.date if "strftime_now" in templates else None
        digest = hashlib.sha256(repr((self.eot, sorted(self.stop_tokens), date)).encode())
        for name, content in sorted(self._files.items()):
            digest.update(f"\n{name} {len(content)}\n".encode() + content)
        return digest.hexdigest()

    @property
    def largest(self) -> int:
        """The largest id that a prompt or a text can contain; other special tokens are excluded."""
        of_text = {*self._backend.get_vocab(with_added_tokens=True).values()} - self.special_ids
        return max(of_text | {self.eot, *self._prefix})

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """Read a model folder's tokenizer. Raises InputError if it is missing, broken or has no end-of-text token."""
        folder = user_path(folder)
        files = {name: read_text(folder / name).encode() for name in FILES if (folder / name).is_file()}
        backend = _backend(folder, files)
        ends = _ends_of_text(folder, backend)
        return cls(backend, ends[0], files, ends)

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: str | Sequence[str]) -> list[list[int]]:
        """The ids of each text, in parallel; the same ids as `encode` gives."""
        texts = listed(texts)
        shared = shared_beginning(texts) if self.splits_at_spaces else ""
        rest = [text[len(shared) :] for text in texts] if shared else list(texts)
        encodings = self._backend.encode_batch_fast(rest, add_special_tokens=False)
        before = self.encode(shared) if shared else []
        return [before + encoding.ids for encoding in encodings]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text, after the tokens that the model expects before it."""
        return [*self._prefix, *self.encode(text)]

    def encode_prompts(self, texts: str | Sequence[str]) -> list[list[int]]:
        """The ids of each prompt, in parallel; the same ids as `encode_prompt` gives."""
        return [[*self._prefix, *ids] for ids in self.encode_batch(texts)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, and for each id the characters (first, last + 1) that it covers."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], prompt: Sequence[int] = ()) -> str:
        """The text of some ids, without special tokens.

        prompt: the ids before them; none if a text begins with `ids`. The space that the tokenizer writes before a text
        (or before each piece of it, after special tokens) is left out; a space after a prompt's text never is.
        """
        if list(prompt) in ([], self._prefix):
            return self._backend.decode(list(ids), skip_special_tokens=True)
        text = self._decode_after_text(ids)
        return text.removeprefix(" ") if prompt[-1] in self.special_ids and self._marks_pieces else text

    def _decode_after_text(self, ids: Sequence[int]) -> str:
        before = self._backend.decode(self._letter, skip_special_tokens=True)
        return self._backend.decode([*self._letter, *ids], skip_special_tokens=True)[len(before) :]

    def decode_with_special(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def token(self, index: int) -> str:
        """One token for display: its text, or its raw name if it is a part of a character.

        Empty for an id without a token: models embed more ids than their tokenizers have, to a round number.
        """
        raw = self._backend.id_to_token(index) or ""
        text = self._backend.decode([index], skip_special_tokens=False)
        return raw if BROKEN in text or not text else text

    def token_bytes(self, index: int, prompt: Sequence[int] | None = None) -> bytes | None:
        """The bytes that a token adds to a text; None for a special token and an id without a token.

        prompt: the ids before it, if it is the first of a text; None after other tokens of the text.
        """
        raw = self._backend.id_to_token(index)
        if raw is None or index in self.special_ids:
            return None
        text = self._decode_after_text([index]) if prompt is None else self.decode([index], prompt)
        if BROKEN not in text:
            return text.encode()
        if fallback := BYTE_TOKEN.fullmatch(raw):
            return bytes.fromhex(fallback[1])
        byte_level = all(character in BYTES for character in raw)
        return bytes(BYTES[character] for character in raw) if byte_level else text.encode()

    def has_text(self, index: int) -> bool:
        """Whether a token can add text: not a special token, nor an id without a token."""
        return index not in self.special_ids and self._backend.id_to_token(index) is not None

    def is_fallback(self, index: int) -> bool:
        """Whether a token is a byte of SentencePiece's byte fallback: what it is read as depends on its neighbours."""
        raw = self._backend.id_to_token(index) or ""
        return BYTE_TOKEN.fullmatch(raw) is not None and self._decode_after_text([index]) != raw

    @cached_property
    def splits_at_spaces(self) -> bool:
        """Whether a text that begins with a space has the same ids after any other that ends with no white space."""
        return splits_at_spaces(self._backend)

    @cached_property
    def marking(self) -> MarkedTokenizer:
        """The same tokenizer for texts of a chat template."""
        return MarkedTokenizer(self._backend)

    @cached_property
    def _marks_pieces(self) -> bool:
        """Whether the tokenizer writes a space before the text after a special token (Llama 2's)."""
        ids, _ = self.marking.encode(next(iter(self.marking.marks.values())) + LETTER)
        return self._decode_after_text(ids).startswith(" ")

    def token_id(self, token: str) -> int | None:
        """The id of a token, special or not."""
        return self._backend.token_to_id(token)

    def tokenizer_json(self) -> dict[str, Any]:
        """Its tokenizer.json, also if it was read from other files."""
        content: dict[str, Any] = json.loads(self._backend.to_str())
        return content

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of the special tokens."""
        return frozenset(self.special_tokens.values())

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the special tokens by name. No text is encoded as one of them."""
        return {token.content: n for n, token in self._backend.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """The ids of all added tokens by name, special or not; without those that are white space."""
        found = self._backend.get_added_tokens_decoder()
        return {token.content: n for n, token in found.items() if token.content.strip()}

    @cached_property
    def chat_template(self) -> str | None:
        """The jinja template of a chat-tuned model, which `text/chat.py` runs; None if the files have none."""
        return self._chat_templates.get("default")

    @cached_property
    def tool_template(self) -> str | None:
        """The template for conversations with tools, where it is another one."""
        return self._chat_templates.get("tool_use")

    @property
    def _chat_templates(self) -> dict[str, str]:
        """By name. Files take precedence over tokenizer_config.json, as in transformers."""
        names = {"default": "chat_template.jinja", "tool_use": TOOL_TEMPLATE}
        if found := {name: self._files[file].decode() for name, file in names.items() if file in self._files}:
            return found
        template = self._config.get("chat_template")
        if isinstance(template, list):
            named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        else:
            named = {"default": template}
        return {str(name): text for name, text in named.items() if isinstance(text, str)}

    @cached_property
    def named_tokens(self) -> dict[str, str]:
        """bos_token, eos_token and so on, for chat templates; tokenizer_config.json takes precedence."""
        return {**_token_names(self._settings("special_tokens_map.json")), **_token_names(self._config)}

    @cached_property
    def _config(self) -> dict[str, Any]:
        return self._settings("tokenizer_config.json")

    def _settings(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads(self._files.get(name, b"{}"))
        except (ValueError, RecursionError):
            raise InputError(f"the model's {name} is broken JSON: fetch it again") from None
        return content if isinstance(content, dict) else {}

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer's files into `folder`, unchanged but for a byte order mark, which others do not read."""
        for name, content in self._files.items():
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            with atomic_write(Path(folder) / name) as file:
                file.write(content)


class MarkedTokenizer:
    """A tokenizer in whose texts marks take the place of special tokens. What looks like a special token is text.

    A mark is an added token that is not special, so it is found where special tokens are not, and splits the text as
    the special token would. It is random: no message contains it. Vocabulary, merges and rules are the tokenizer's own
    objects, which may be large; only the added tokens are copied.

    marks: by the special tokens' names.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        from tokenizers import AddedToken

        nonce, self.marks = token_hex(4), dict[str, str]()
        added, copies = backend.get_added_tokens_decoder(), []
        for index, token in added.items():
            kind = {name: getattr(token, name) for name in ("normalized", "lstrip", "rstrip", "single_word")}
            copies.append(AddedToken(token.content, special=token.special, **kind))
            if token.special:
                mark = self.marks[token.content] = f"\ue000{nonce}{index}\ue001"
                copies.append(AddedToken(mark, special=False, **kind))
        self._backend = type(backend)(backend.model)
        self._backend.normalizer, self._backend.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        self._backend.add_tokens(copies)
        self._backend.encode_special_tokens = True
        names = {token.content: index for index, token in added.items()}
        self._special = {self._backend.token_to_id(mark): names[name] for name, mark in self.marks.items()}
        self._ids = {self._backend.token_to_id(name): index for name, index in names.items()} | self._special

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text, and the places of the special tokens among them."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        places = [place for place, index in enumerate(ids) if index in self._special]
        return [self._ids.get(index, index) for index in ids], places


# Reading a folder -----------------------------------------------------------------------------------------------------


class _TranslateErrors:
    """Turns the bare `Exception` that `tokenizers` raises, exactly this type, into an InputError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is Exception:
            read_json(self._path)  # for an error with the line
            reason = " ".join(str(error).split())[:100]
            message = f"{self._path}: not a tokenizer that the tokenizers package reads ({reason}): fetch it again"
            raise InputError(message) from error


def _prompt_prefix(backend: tokenizers.Tokenizer) -> list[int]:
    """The special tokens that the tokenizer's post-processor puts before a text."""
    encoding = backend.encode("a", add_special_tokens=True)
    prefix = []
    for index, special in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
        if not special:
            break
        prefix.append(index)
    return prefix


def _backend(folder: Path, files: dict[str, bytes]) -> tokenizers.Tokenizer:
    """The tokenizer of the first set of files that the folder has."""
    if "tokenizer.json" in files:
        from tokenizers import Tokenizer as Backend

        with _TranslateErrors(folder / "tokenizer.json"):
            backend = Backend.from_str(files["tokenizer.json"].decode("utf-8"))
        _add_tokens(folder, backend)
        return backend
    for vocabulary, merges in GPT2_PAIRS:
        if vocabulary in files and merges in files:
            _refuse_other_than_gpt2(folder)
            return _gpt2(folder, vocabulary, merges)
    if other := next((name for name in OTHER_KINDS if (folder / name).is_file()), None):
        raise InputError(
            f"{folder}: has its tokenizer as {other} only, and tokenizer.json is read: transformers makes one, by "
            "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    wanted = " or ".join(["tokenizer.json", *(" + ".join(pair) for pair in GPT2_PAIRS)])
    raise InputError(f"{folder}: has no tokenizer: add {wanted}")


def _refuse_other_than_gpt2(folder: Path) -> None:
    """vocab.json and merges.txt do not say how text is split before merging; for GPT-2 the rule is known."""
    kind = _settings(folder / "tokenizer_config.json").get("tokenizer_class")
    model = _settings(folder / "config.json").get("model_type", "gpt2")
    if kind not in GPT2_CLASSES if kind else model != "gpt2":
        raise InputError(f"{folder}: a {kind or model} tokenizer needs its tokenizer.json: add that file")


def _gpt2(folder: Path, vocabulary: str, merges: str) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    vocab = read_json(folder / vocabulary)
    lines = read_text(folder / merges).replace("\r\n", "\n").split("\n")
    lines = [line for line in lines if line.strip() and not line.startswith("#version")]
    pairs = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
    for number, pair in enumerate(pairs, 1):
        if not {*pair, pair[0] + pair[1]} <= vocab.keys():
            raise InputError(f"{folder / merges}: merge {number} ({' '.join(pair)!r}) has tokens not in {vocabulary}")
    backend = Backend(models.BPE(vocab=vocab, merges=pairs))
    settings = _settings(folder / "tokenizer_config.json")
    space = settings.get("add_prefix_space") is True
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    _add_tokens(folder, backend)
    named = _token_names(_settings(folder / "special_tokens_map.json")) | _token_names(settings)
    specials = [text for text in dict.fromkeys([*named.values(), GPT2_EOT]) if backend.token_to_id(text) is not None]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    if (first := named.get("bos_token")) in specials and settings.get("add_bos_token") is True:  # OPT's
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, backend.token_to_id(first))]
        )
    return backend


def _add_tokens(folder: Path, backend: tokenizers.Tokenizer) -> None:
    """Add the tokens that only tokenizer_config.json names, or else added_tokens.json, with their ids."""
    from tokenizers import AddedToken

    path = folder / "tokenizer_config.json"
    entries = _settings(path).get("added_tokens_decoder")
    if entries is None:
        path = folder / "added_tokens.json"
        entries = {index: {"content": text, "special": False} for text, index in _settings(path).items()}
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        tokens = {
            int(index): AddedToken(entry["content"], **{key: entry[key] for key in flags if key in entry})
            for index, entry in entries.items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path}: its added tokens are broken: fetch it again") from None
    for index, token in sorted(tokens.items()):
        if backend.token_to_id(token.content) is None:
            backend.add_tokens([token])
            if (found := backend.token_to_id(token.content)) != index:
                raise InputError(
                    f"{path}: added token {token.content!r} has id {index}, but {found} is the next one after the "
                    "vocabulary: fetch the tokenizer's files again"
                )


def _settings(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object: fetch it again")
    return content


def _token_names(settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and so on of tokenizer_config.json or special_tokens_map.json, as texts."""
    named = {key: value for key, value in settings.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _ends_of_text(folder: Path, backend: tokenizers.Tokenizer) -> list[int]:
    """The ids that end a text. The first is `eot`: the token that the tokenizer's settings name, if it is one of them.

    generation_config.json and config.json name ids, one or a list; the tokenizer's settings a token.
    """
    size = backend.get_vocab_size(with_added_tokens=True)
    settings = (
        _settings(folder / name).get("eos_token") for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    texts = [value.get("content") if isinstance(value, dict) else value for value in settings]
    tokens = [backend.token_to_id(text) for text in (*texts, GPT2_EOT) if isinstance(text, str)]
    named = [index for index in tokens if index is not None]
    for name in ("generation_config.json", "config.json"):
        value = _settings(folder / name).get("eos_token_id")
        ids = [index for index in (value if isinstance(value, list) else [value]) if isinstance(index, int)]
        ids.sort(key=lambda index: (not 0 <= index < size, index != next(iter(named), None)))
        if ids and not 0 <= ids[0] < size:
            raise InputError(f"{folder / name}: eos_token_id {ids[0]} is not a token: the vocabulary has {size}")
        if ids:
            return ids
    if named:
        return named[:1]
    raise InputError(f"{folder}: names no token that ends a text: add eos_token_id to its generation_config.json")
