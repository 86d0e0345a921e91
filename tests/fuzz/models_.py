"""A model's folder: config.json, safetensors and their index, tokenizer.json and its settings, and gguf files."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from hypothesis import strategies as st

from fuzz.base import ODD, Target, changed_files, changed_json
from graftlm.exchange.huggingface import load_model
from graftlm.exchange.load import read_tokenizer
from graftlm.files.formats import load_safetensors, read_weights
from graftlm.files.gguf import gguf_to_folder
from graftlm.text.chat import Chat
from graftlm.text.tokenizer import Tokenizer
from tiny import model_folder

FAMILIES = ("llama", "gpt2", "llama-biased")
CPU = torch.device("cpu")
CHATS = (
    "{% for m in messages %}<|endoftext|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    "{{ bos_token }}{% for m in messages %}[{{ loop.index }}] {{ m.content | trim }}{% endfor %}",
)


def tiny_folders(folder: Path) -> list[Path]:
    return [model_folder(folder / f"model-{kind}", kind, layers=1) for kind in FAMILIES]


def one_of_folder(file: str, read: Callable[[Path], object]):
    """A reader that puts the content into the tiny model's folder."""

    def with_file(folder: Path, content: bytes) -> object:
        kinds = {b'"gpt2"': "gpt2", b'"qwen2"': "llama-biased"}
        kind = next((k for word, k in kinds.items() if word in content), "llama")
        path = folder / f"model-{kind}" / file
        kept = path.read_bytes() if path.exists() else None
        try:
            path.write_bytes(content)
            return read(path.parent)
        finally:
            if kept is None:
                path.unlink()
            else:
                path.write_bytes(kept)

    return with_file


def read_tensors(folder: Path, content: bytes) -> object:
    (folder / "x.safetensors").write_bytes(content)
    return load_safetensors(folder / "x.safetensors")


def made_tensors(valid: Sequence[bytes]) -> "st.SearchStrategy[bytes]":
    """The header changed as JSON, its length right or odd."""
    (content, *_) = valid
    size = int.from_bytes(content[:8], "little")
    head, rest = json.loads(content[8 : 8 + size]), content[8 + size :]

    def whole(parts: tuple[object, int | None]) -> bytes:
        text = json.dumps(parts[0]).encode()
        length = len(text) if parts[1] is None else parts[1]
        return (length & (2**64 - 1)).to_bytes(8, "little") + text + rest

    return st.tuples(changed_json(head), st.one_of(st.none(), st.none(), st.sampled_from(ODD))).map(whole)


def small_tensors(_: Path) -> list[bytes]:
    from safetensors.torch import save

    return [save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int64), "c": torch.ones(0)}, {"format": "pt"})]


def tokenizer_settings(folder: Path) -> list[bytes]:
    tiny_folders(folder)
    texts = [
        {"eos_token": "<|endoftext|>", "bos_token": {"content": "<|endoftext|>"}, "chat_template": c} for c in CHATS
    ]
    return [json.dumps(text).encode() for text in texts]


def read_chat(folder: Path) -> object:
    chat = Chat(Tokenizer.from_folder(folder)) if Tokenizer.from_folder(folder).chat_template else None
    return chat and chat.encode([("user", "hello <|endoftext|>"), ("assistant", "hi")])


def read_text(folder: Path) -> object:
    tokenizer = read_tokenizer(folder)
    ids = tokenizer.encode("good fun ½")
    return tokenizer.decode(ids), tokenizer.encode_prompts(["a", "b"]), list(map(tokenizer.token, ids))


def folder_and(file: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [(made / file).read_bytes() for made in tiny_folders(folder)]


def shards(folder: Path) -> list[bytes]:
    made = tiny_folders(folder)[0]
    (made / "model.safetensors").rename(made / "model-1.safetensors")
    names = load_safetensors(made / "model-1.safetensors")
    return [json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}).encode()]


def small_gguf(folder: Path) -> list[bytes]:
    from files.test_gguf import tiny

    made = []
    for number, settings in enumerate(({}, {"pre": "smollm", "tied": False})):
        tiny(folder / f"{number}.gguf", **settings)
        made.append((folder / f"{number}.gguf").read_bytes())
    return made


def read_gguf(folder: Path, content: bytes) -> object:
    (folder / "x.gguf").write_bytes(content)
    shutil.rmtree(folder / "out", ignore_errors=True)
    gguf_to_folder(folder / "x.gguf", folder / "out")
    return sorted(p.name for p in (folder / "out").iterdir())


def load(folder: Path) -> object:
    return load_model(folder, CPU, torch.float32)


TARGETS = [
    Target("safetensors", small_tensors, read_tensors, made_tensors),
    Target("safetensors index", shards, one_of_folder("model.safetensors.index.json", read_weights), changed_files),
    Target("config.json", folder_and("config.json"), one_of_folder("config.json", load), changed_files),
    Target("tokenizer.json", folder_and("tokenizer.json"), one_of_folder("tokenizer.json", read_text), changed_files),
    Target(
        "tokenizer_config.json", tokenizer_settings, one_of_folder("tokenizer_config.json", read_chat), changed_files
    ),
    Target("gguf", small_gguf, read_gguf),
]
