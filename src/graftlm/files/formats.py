"""JSON, safetensors and hashes. Readers validate files; writers are atomic (`atomic.py`).

- safetensors files are *read* by the safetensors package (memory-mapped) but *written* here, tensor by tensor: the
  package needs all tensors in memory and hides a full disk in an error of its own. The bytes are identical.
- Nothing is read by pickle: a folder with only .bin, .pt or .pth weights is an error.

torch is imported only by the functions that need it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.errors import InputError
from graftlm.files.atomic import atomic_write
from graftlm.files.readers import GGUF, PICKLE_SUFFIXES, SAFETENSORS, has_suffix

if TYPE_CHECKING:
    import torch

MAX_FILE_NAME = 255  # bytes

# safetensors' name of a dtype -> torch's name and bytes per value, in safetensors' own order: its files are sorted by
# it, beginning with the last of this table.
DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
}


# ----------------------------------------------------------------------------------------------- json and hashes


def read_json(path: Path | str) -> Any:
    """Read one JSON value. Raises InputError with the file and the line of the error."""
    path = Path(path)
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: broken JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}): write it again as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or endless brackets
        raise InputError(f"{path}: broken JSON: {str(error).partition(';')[0]}") from error


def sha256_file(path: Path | str) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over sorted names, shapes, dtypes and bytes: a hash of weights that does not depend on their files."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]  # one at a time: together they may exceed the memory
        header = [name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        digest.update(json.dumps(header).encode("utf-8"))
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The values as bytes, in row-major order; not copied if the tensor is contiguous and on the CPU."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


# ------------------------------------------------------------------------------------------------- safetensors


def write_safetensors(path: Path | str, entries: Sequence[tuple[str, str, Sequence[int], Iterable[Any]]]) -> None:
    """Write a safetensors file atomically from entries (name, dtype such as "F32", shape, chunks of bytes).

    Chunks are iterated lazily, so only one is in memory. Their lengths must add up to the shape.
    """
    place = {name: n for n, name in enumerate(file_order({entry[0]: entry[1] for entry in entries}))}
    ordered = sorted(entries, key=lambda entry: place[entry[0]])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # one key only: the order of several varies
    offset = 0
    for name, dtype, shape, _ in ordered:
        size = DTYPES[dtype][1]
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    head += b" " * (-len(head) % 8)
    with atomic_write(Path(path)) as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, _, _, chunks in ordered:
            for chunk in chunks:
                file.write(chunk)
            end = 8 + len(head) + header[name]["data_offsets"][1]
            assert file.tell() == end, f"{name}: chunks end at byte {file.tell()}, not {end}"


def file_order(dtypes: Mapping[str, str]) -> list[str]:
    """Names of tensors, given their dtypes, in the order of a safetensors file."""
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES)}
    return sorted(dtypes, key=lambda name: (-ranks[dtypes[name]], name))


def save_safetensors(path: Path | str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `tensors` as one safetensors file with metadata {"format": "pt"}, atomically."""
    names = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
    entries = []
    for name, tensor in tensors.items():
        dtype = names.get(str(tensor.dtype).removeprefix("torch."))
        assert dtype is not None, f"{name}: safetensors has no dtype for {tensor.dtype}"
        entries.append((name, dtype, tuple(tensor.shape), (tensor_bytes(t) for t in [tensor])))
    write_safetensors(path, entries)


REMAP_AFTER = 64_000_000


class LazyTensors(Mapping[str, "torch.Tensor"]):
    """Name -> tensor over one or more safetensors files, memory-mapped: a tensor is read on access.

    A file is mapped again after every REMAP_AFTER bytes, which frees the pages read before: with one mapping they would
    stay resident to the end, a second copy of the weights. A file that changes in between is an error.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = dict(paths)
        self._states = {path: _state(path) for path in set(self._paths.values())}
        self._open: tuple[Path, Any, int] | None = None  # mapped file, its handle, bytes read from it

    def __getitem__(self, name: str) -> torch.Tensor:
        path = self._paths[name]
        with _reading(path):
            handle, read = self._handle(path)
            tensor = handle.get_tensor(name)
        self._open = (path, handle, read + tensor.nbytes)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def part(self, name: str, *index: slice) -> torch.Tensor:
        """`tensor[index]`, reading nothing else of the tensor. No slice may be empty."""
        path = self._paths[name]
        with _reading(path):
            handle, read = self._handle(path)
            tensor: torch.Tensor = handle.get_slice(name)[index]
        self._open = (path, handle, read + tensor.nbytes)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the header."""
        path = self._paths[name]
        with _reading(path):
            return tuple(self._handle(path)[0].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """safetensors' name of the tensor's dtype, such as "F32", from the header."""
        path = self._paths[name]
        with _reading(path):
            return str(self._handle(path)[0].get_slice(name).get_dtype())

    def _handle(self, path: Path) -> tuple[Any, int]:
        from safetensors import safe_open

        if self._open is None or self._open[0] != path or self._open[2] > REMAP_AFTER:
            self._open = None  # unmap before mapping again
            if _state(path) != self._states[path]:
                raise InputError(f"{path}: was changed while it was being read: try again")
            self._open = (path, safe_open(path, framework="pt"), 0)
        return self._open[1], self._open[2]


def _state(path: Path) -> tuple[int, int, int]:
    with _reading(path):
        found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (SafetensorError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: corrupted or truncated safetensors file ({reason}): fetch it again") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror or error}") from error


def open_safetensors(path: Path | str) -> LazyTensors:
    """Open a safetensors file, memory-mapped. Raises InputError if it is missing, corrupted or truncated."""
    from safetensors import safe_open

    path = Path(path)
    with _reading(path), safe_open(path, framework="pt") as handle:
        names = list(handle.keys())
    return LazyTensors(dict.fromkeys(names, path))


def load_safetensors(path: Path | str) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, copied into memory."""
    return {name: tensor.clone() for name, tensor in open_safetensors(path).items()}


def weight_files(folder: Path | str) -> list[Path]:
    """The safetensors files of a model folder's weights. Raises InputError if there are none."""
    return sorted(set(_weight_map(Path(folder)).values()))


def read_weights(folder: Path | str, stem: str = "model") -> LazyTensors:
    """The weights of a model folder by name, from model.safetensors or the shards of its index."""
    folder = Path(folder)
    if (folder / f"{stem}.safetensors").exists():
        return open_safetensors(folder / f"{stem}.safetensors")
    paths = _weight_map(folder, stem)
    opened = {path: open_safetensors(path) for path in sorted(set(paths.values()))}
    for name, path in paths.items():
        if name not in opened[path]:
            raise InputError(f"{path}: has no tensor {name!r}, which the folder's index lists: fetch it again")
    return LazyTensors(paths)


def _weight_map(folder: Path, stem: str = "model") -> dict[str, Path]:
    """Tensor name -> file, from the folder's index; {"": file} for a single file."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.exists():
        return {"": single}
    if not index.exists():
        raise _no_weights(folder)
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index}: has no weight_map that names the shards: fetch the folder again")
    for name, file in names.items():
        plain = isinstance(file, str) and Path(file).name == file and has_suffix(file, SAFETENSORS)
        if not plain or len(file.encode("utf-8", "replace")) > MAX_FILE_NAME:
            raise InputError(f"{index}: shard {file!r:.100} of {name!r} is not a safetensors file of this folder")
        if not (folder / file).exists():
            raise InputError(f"{folder}: shard {file} is missing: fetch the folder again")
    return {name: folder / file for name, file in names.items()}


def _no_weights(folder: Path) -> InputError:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if pickled := [name for name in names if has_suffix(name, *PICKLE_SUFFIXES)]:
        return InputError(
            f"{folder}: holds only {pickled[0]}: only safetensors and gguf are read (a pickle can run code): "
            "convert it to model.safetensors"
        )
    if gguf := [name for name in names if has_suffix(name, GGUF)]:
        return InputError(f"{folder}: holds no model.safetensors: name the file itself, {folder / gguf[0]}")
    return InputError(f"{folder}: holds no model.safetensors (only safetensors and gguf weights are read)")
