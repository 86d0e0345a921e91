"""A cache of the tokens of large data sets on disk, with all that a run records of its data and its notes on it.

    GRAFT_HOME/tokens/<sha256>.safetensors
        train.values, train.starts, …    the arrays of each split (`text/example_table.py`), mapped into memory
        facts                            JSON: fingerprint, labels, notes, …, and a sha256 of the arrays and of itself

The file's name is a hash of what decides its content (`DataKey`): the bytes of the data files, the flags, the
tokenizer, and the code of this package. So nothing that is read here can be out of date. A damaged file is made again.
Files are written atomically: runs that start together may both write one, with equal content.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graftlm.config import TrainConfig
from graftlm.config.flags import DataFlags
from graftlm.config.paths import user_path
from graftlm.errors import InputError
from graftlm.files.assets import data_source
from graftlm.files.formats import DTYPES, sha256_file, write_safetensors
from graftlm.files.readers import DATA_CARD, is_readable
from graftlm.text.example_table import ExampleTable
from graftlm.text.template import load_template
from graftlm.text.tokenizer import Tokenizer

MIN_EXAMPLES = 10_000
"""Fewer are tokenized in about a second, and not cached."""
MAX_BYTES = 20e9
"""Of all files together; the least recently used are deleted."""
SPELLING = {"data", "val_data", "test_data", "template", "labels"}
"""Flags of which notes show the spelling. A resumed run has other ones, such as absolute paths."""
PACKAGES = ("tokenizers", "jinja2")


@dataclass(frozen=True)
class PreparedData:
    """What a run reads, what it records of its data, and its notes on it."""

    name: str
    fingerprint: str
    is_chat: bool
    """Whether the chat template writes the prompts."""
    in_chat: bool
    """Whether it writes them because of --chat, and not as the data are messages."""
    labels: str
    """The label words, as in --labels."""
    label_ids: tuple[tuple[int, ...], ...]
    """As in `TrainingData`."""
    notes: tuple[str, ...]
    examples: Mapping[str, ExampleTable]
    """By split."""
    cached_as: str = ""
    """The file's name in the cache; for a resumed run, whose flags are not those that were typed."""


@dataclass(frozen=True)
class DataKey:
    """What decides the content of a file of the cache."""

    identity: dict[str, Any]
    """What decides the tokens."""
    spelling: dict[str, Any]
    """What decides notes and label words besides."""

    @classmethod
    def of(cls, config: TrainConfig, explicit: Set[str], tokenizer: Tokenizer, max_length: int) -> "DataKey":
        """The key of a run's data. max_length: tokens of an example. Raises InputError for data that is not there."""
        names = {f.name for f in fields(DataFlags)}
        flags = {name: getattr(config, name) for name in sorted(names - {*SPELLING, "max_length"})}
        flags |= {name: getattr(config, name) for name in ("objective", "loss_on", "val_limit", "packing")}
        source = data_source(config.data)
        paths = [source.path, *(user_path(f) for f in (config.val_data, config.test_data) if f)]
        identity = {
            "flags": flags,
            "max_length": max_length,
            "content": [content_sha256(path) for path in paths],
            "choices": [source.config, source.kind, bool(config.val_data), bool(config.test_data)],
            "tokenizer": tokenizer.sha256,
            "code": code_sha256(),
            "versions": [platform.python_version(), *map(version, PACKAGES)],
        }
        spelling = {
            "flags": {name: getattr(config, name) for name in sorted(SPELLING)},
            "template": load_template(config.template).text,
            "explicit": sorted(names & explicit),
            "paths": [str(path) for path in paths],
        }
        return cls(identity, spelling)

    @property
    def name(self) -> str:
        """The file's name, without a suffix."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def content_sha256(path: Path) -> str:
    """A hash of a data file's bytes; of a folder, of the names of all files and the bytes of those that are read."""
    if not path.is_dir():
        return sha256_file(path) if path.is_file() else ""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    content = {
        str(file.relative_to(path)): sha256_file(file) if is_readable(file) or file.name == DATA_CARD else ""
        for file in files
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@cache
def code_sha256() -> str:
    """A hash of the source code that turns data files into tokens."""
    package = Path(__file__).parents[1]
    folders = [package / name for name in ("config", "files", "text")]
    files = [file for folder in folders for file in sorted(folder.glob("*.py"))]
    files += [Path(__file__), Path(__file__).with_name("data.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


class TokenCache:
    """The files of a folder, GRAFT_HOME/tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """The file of this name."""
        return self.folder / f"{name}.safetensors"

    def read(self, name: str, key: DataKey) -> PreparedData | None:
        """The data of this file; None if it is missing or, for a resumed run, has other tokens.

        Raises InputError if it is damaged.
        """
        path = self.path(name)
        if not path.is_file():
            return None
        try:
            arrays = dict(_map(path))
            facts = _checked(arrays)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error) or type(error).__name__
            raise InputError(f"{path}: damaged ({reason}): the data is tokenized again") from None
        if facts.pop("identity") != json.loads(json.dumps(key.identity)):
            return None
        with suppress(OSError):
            os.utime(path, ns=(time.time_ns(), time.time_ns()))  # most recently used; without ns the clock is coarse
        places: Mapping[str, Sequence[str]] = facts.pop("places")
        examples = {
            split: ExampleTable(arrays[f"{split}.values"], arrays[f"{split}.starts"], places[split]) for split in places
        }
        facts |= {"notes": tuple(facts["notes"]), "label_ids": tuple(map(tuple, facts["label_ids"]))}
        return PreparedData(**facts, examples=examples, cached_as=name)

    def write(self, key: DataKey, data: PreparedData) -> None:
        """Store the data under its key, unless it is small. Raises InputError if that is impossible."""
        if sum(map(len, data.examples.values())) < MIN_EXAMPLES:
            return
        arrays = {
            f"{split}.{name}": getattr(table, name)
            for split, table in data.examples.items()
            for name in ("values", "starts")
        }
        facts = {f.name: getattr(data, f.name) for f in fields(data) if f.name not in ("examples", "cached_as")}
        facts |= {"identity": key.identity, "places": {split: table.places for split, table in data.examples.items()}}
        text = json.dumps(facts).encode()
        arrays["facts"] = np.frombuffer(_digest(arrays, text) + text, dtype=np.uint8)
        dtypes = {"uint8": "U8", "int32": "I32", "int64": "I64"}
        entries = [(name, dtypes[str(each.dtype)], each.shape, [each.data]) for name, each in arrays.items()]
        write_safetensors(self.path(key.name), entries)
        self._evict()

    def _evict(self) -> None:
        """Delete the least recently used files that are more than `MAX_BYTES` together."""
        left = MAX_BYTES
        with suppress(OSError):  # another process may delete them too
            for file in sorted(self.folder.glob("*.safetensors"), key=lambda f: f.stat().st_mtime_ns, reverse=True):
                left -= file.stat().st_size
                if left < 0:
                    file.unlink()


def _map(path: Path) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """The arrays of a safetensors file, mapped into memory. Raises ValueError and others for another file."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError("truncated")
        header = json.loads(file.read(size))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, (count,), (start, stop) = np.dtype(DTYPES[entry["dtype"]][0]), entry["shape"], entry["data_offsets"]
        if stop - start != count * dtype.itemsize or 8 + size + stop > path.stat().st_size:
            raise ValueError("truncated")
        empty = np.zeros(0, dtype)  # which cannot be mapped
        yield name, np.asarray(np.memmap(path, dtype, "r", 8 + size + start, (count,))) if count else empty


def _checked(arrays: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    """The facts, taken out of the arrays. Raises ValueError if a byte is not as it was written."""
    content = arrays.pop("facts").tobytes()
    digest, text = content[:32], content[32:]
    if digest != _digest(arrays, text):
        raise ValueError("its checksum differs")
    facts: dict[str, Any] = json.loads(text)
    return facts


def _digest(arrays: Mapping[str, npt.NDArray[Any]], text: bytes) -> bytes:
    digest = hashlib.sha256(text)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {len(arrays[name])}\n".encode())
        digest.update(arrays[name].data)
    return digest.digest()
