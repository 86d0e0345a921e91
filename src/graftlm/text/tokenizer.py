"""Text <-> token ids, through the `tokenizers` package and the files of the model's own folder.

What is unusual:

- Text is only text: `<|im_end|>` written in a review becomes the tokens of its characters, never the control token.
- Nothing is added: no padding, no truncation, and no control token unless `bos=True` asks for what the model wants
  before a text (Llama's BOS; nothing for GPT-2 and SmolLM2). Which token *ends* a text is `eot`, read from the
  folder, and no token means padding.
- `save` writes the files back byte for byte as they were read, so another program sees the tokenizer it knows.

Read from tokenizer.json, else GPT-2's vocab.json + merges.txt, else OpenAI's encoder.json + vocab.bpe.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.errors import InputError
from graftlm.files.atomic import atomic_write
from graftlm.files.formats import read_json

if TYPE_CHECKING:
    import tokenizers

# The files a tokenizer may be made of; those a folder has are kept and saved again.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
)
GPT2_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
GPT2_EOT = "<|endoftext|>"


class Tokenizer:
    """A folder's tokenizer. `eot` is the id of the token that ends a text, `vocab_size` counts added tokens too."""

    def __init__(self, backend: tokenizers.Tokenizer, eot: int, files: dict[str, bytes]) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # control tokens written in a text are text
        self._backend = backend
        self._files = files
        self._before = _tokens_before(backend)
        self.eot = eot
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    @property
    def largest(self) -> int:
        """The largest id that a text, what stands before it or its end can have: control tokens apart."""
        control = {index for index, token in self._backend.get_added_tokens_decoder().items() if token.special}
        of_text = set(self._backend.get_vocab(with_added_tokens=True).values()) - control
        return max(of_text | {self.eot, *self._before})

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """Read a model folder's tokenizer; `InputError` when it has none, a broken one, or one without an end."""
        folder = Path(folder)
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        backend = _backend(folder, files)
        return cls(backend, _end_of_text(folder, backend), files)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """The ids of a text; with `bos` after what the model wants to stand before it."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [*self._before, *ids] if bos else ids

    def encode_batch(self, texts: Sequence[str], bos: bool = False) -> list[list[int]]:
        """The ids of each text, in parallel; the same ids as `encode` gives."""
        before = self._before if bos else []
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[*before, *encoding.ids] for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a text, and for each the (first, last + 1) characters of the text that it stands for."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of some ids; control tokens are left out unless `skip_special` is False."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def token(self, index: int) -> str:
        """One token to show to a person: its text, or its raw name where it is only a part of a character."""
        raw = self._backend.id_to_token(index)
        assert raw is not None, f"no token has id {index}"
        text = self._backend.decode([index], skip_special_tokens=False)
        return raw if "\ufffd" in text or not text else text

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The control tokens by name, which no text is ever made into."""
        return {token.content: n for n, token in self._backend.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def chat_template(self) -> str | None:
        """The jinja template of a model tuned for chat; None where the files have none. `text/chat.py` runs it."""
        if "chat_template.jinja" in self._files:
            return self._files["chat_template.jinja"].decode("utf-8", errors="replace")
        template = self._config.get("chat_template")
        if isinstance(template, list):  # several, by name
            named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
            template = named.get("default")
        return template if isinstance(template, str) else None

    @cached_property
    def named_tokens(self) -> dict[str, str]:
        """bos_token, eos_token and their kin, as the settings name them: chat templates use them."""
        named = {key: value for key, value in self._config.items() if key.endswith("_token")}
        texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
        return {key: text for key, text in texts.items() if isinstance(text, str)}

    @cached_property
    def _config(self) -> dict[str, Any]:
        try:
            content = json.loads(self._files.get("tokenizer_config.json", b"{}"))
        except (ValueError, RecursionError):
            raise InputError("the model's tokenizer_config.json is broken JSON: fetch it again") from None
        return content if isinstance(content, dict) else {}

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer's files into `folder`, as they were."""
        for name, content in self._files.items():
            with atomic_write(Path(folder) / name) as file:
                file.write(content)


class _TokenizerErrors:
    """Turn the bare `Exception` that `tokenizers` raises into one line; exactly that type and no other is meant."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is Exception:
            reason = " ".join(str(error).split())[:100]
            raise InputError(
                f"{self.path}: is no tokenizer that tokenizers reads ({reason}): fetch it again"
            ) from error


def _tokens_before(backend: tokenizers.Tokenizer) -> list[int]:
    """The control tokens that the tokenizer's post-processor puts before a text."""
    encoding = backend.encode("a", add_special_tokens=True)
    before = []
    for index, special in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
        if not special:
            break
        before.append(index)
    return before


def _backend(folder: Path, files: dict[str, bytes]) -> tokenizers.Tokenizer:
    """Build the tokenizer from the first kind of files that the folder has."""
    if "tokenizer.json" in files:
        from tokenizers import Tokenizer as Backend

        read_json(folder / "tokenizer.json")  # broken JSON is told by line
        with _TokenizerErrors(folder / "tokenizer.json"):
            return Backend.from_str(files["tokenizer.json"].decode("utf-8"))
    for vocabulary, merges in GPT2_PAIRS:
        if vocabulary in files and merges in files:
            _refuse_other_than_gpt2(folder)
            return _gpt2(folder, vocabulary, merges)
    wanted = " or ".join(["tokenizer.json", *(" + ".join(pair) for pair in GPT2_PAIRS)])
    raise InputError(f"{folder}: holds no tokenizer that we read: it needs {wanted}")


def _refuse_other_than_gpt2(folder: Path) -> None:
    """vocab.json and merges.txt do not say how text is cut before merging: only GPT-2's rule is known for them."""
    kind = _settings(folder / "tokenizer_config.json").get("tokenizer_class")
    model = _settings(folder / "config.json").get("model_type", "gpt2")
    if kind not in GPT2_CLASSES if kind else model != "gpt2":
        raise InputError(f"{folder}: a {kind or model} tokenizer needs its tokenizer.json: add that file")


def _gpt2(folder: Path, vocabulary: str, merges: str) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocab = read_json(folder / vocabulary)
    try:
        lines = (folder / merges).read_bytes().decode("utf-8").split("\n")
        lines = [line for line in lines if line.strip() and not line.startswith("#version")]
        pairs = [(first, second) for first, _, second in (line.partition(" ") for line in lines)]
    except UnicodeDecodeError as error:
        raise InputError(f"{folder / merges}: not UTF-8 text (byte {error.start}): fetch it again") from error
    for number, pair in enumerate(pairs, 1):
        if not {*pair, pair[0] + pair[1]} <= vocab.keys():
            raise InputError(f"{folder / merges}: merge {number} ({' '.join(pair)!r}) is not made of known tokens")
    backend = Backend(models.BPE(vocab=vocab, merges=pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    if GPT2_EOT in vocab:
        backend.add_special_tokens([AddedToken(GPT2_EOT, special=True, normalized=False)])
    return backend


def _settings(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: is no JSON object: fetch it again")
    return content


def _end_of_text(folder: Path, backend: tokenizers.Tokenizer) -> int:
    """The end-of-text id: generation_config.json and config.json name an id, the tokenizer's settings a token."""
    size = backend.get_vocab_size(with_added_tokens=True)
    for name in ("generation_config.json", "config.json"):
        given = _settings(folder / name).get("eos_token_id")
        first = given[0] if isinstance(given, list) and given else given
        if isinstance(first, int):
            if not 0 <= first < size:
                raise InputError(f"{folder / name}: eos_token_id {first} is no token: the vocabulary has {size}")
            return first
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        given = _settings(folder / name).get("eos_token")
        token = given.get("content") if isinstance(given, dict) else given
        if isinstance(token, str) and (index := backend.token_to_id(token)) is not None:
            return index
    if (index := backend.token_to_id(GPT2_EOT)) is not None:
        return index
    raise InputError(f"{folder}: names no token that ends a text: add eos_token_id to its generation_config.json")
