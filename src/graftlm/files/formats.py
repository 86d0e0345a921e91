"""File formats: json, safetensors and hashes. A reader never trusts a file; writers leave whole ones (`atomic.py`).

What is unusual here:

- safetensors are *read* by the safetensors package (memory-mapped) but *written* here, tensor by tensor: the package
  wants all tensors in memory at once and hides a full disk in an error of its own. The bytes are the same.
- Nothing is read through pickle: a folder that holds only .bin, .pt or .pth weights is refused.

torch is imported only by the functions that handle tensors.
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

if TYPE_CHECKING:
    import torch

LONGEST_NAME = 255  # bytes of a file's name that file systems take
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# safetensors' name of a dtype -> torch's name and bytes per value, in safetensors' own order (its files are sorted
# by it, the last of this table first).
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
    """Read one JSON value; `InputError` names the file, and the line where it is broken."""
    path = Path(path)
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: broken JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}): write it again as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise InputError(f"{path}: broken JSON: {str(error).partition(';')[0]}") from error


def sha256_file(path: Path | str) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over sorted names, shapes, dtypes and bytes: one hash for a set of weights, whatever file they are in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]  # one at a time: all of them may be more than there is memory for
        header = [name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        digest.update(json.dumps(header).encode("utf-8"))
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's values as raw bytes, in row-major order, without a copy where it is contiguous on the CPU."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


# ------------------------------------------------------------------------------------------------- safetensors


def write_safetensors(path: Path | str, entries: Sequence[tuple[str, str, Sequence[int], Iterable[Any]]]) -> None:
    """Write a safetensors file atomically from (name, dtype such as "F32", shape, chunks of bytes) entries.

    Chunks are asked for one after the other, so only one need be in memory. Their lengths must add up to the shape.
    """
    place = {name: n for n, name in enumerate(file_order({entry[0]: entry[1] for entry in entries}))}
    ordered = sorted(entries, key=lambda entry: place[entry[0]])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # a single key: several make the bytes vary
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
    """The names of tensors, whose dtypes are given, in the order in which a safetensors file holds them."""
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
    """Name -> tensor over one or more safetensors files, memory-mapped: a tensor is read when it is asked for.

    A file is mapped anew after every REMAP_AFTER bytes, so that what was read before no longer counts as this process's
    memory: one mapping for all would stay resident until the last, a second copy of the weights beside the one made of
    it. A file that changes in between is an error.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = dict(paths)
        self._states = {path: _state(path) for path in set(self._paths.values())}
        self._open: tuple[Path, Any, int] | None = None  # the file that is mapped, its handle, the bytes read from it

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
        """`tensor[index]`, of which nothing more is read; no slice may be empty."""
        path = self._paths[name]
        with _reading(path):
            handle, read = self._handle(path)
            tensor: torch.Tensor = handle.get_slice(name)[index]
        self._open = (path, handle, read + tensor.nbytes)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the file's header alone."""
        path = self._paths[name]
        with _reading(path):
            return tuple(self._handle(path)[0].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The file's name of the tensor's dtype, such as "F32", from the header alone."""
        path = self._paths[name]
        with _reading(path):
            return str(self._handle(path)[0].get_slice(name).get_dtype())

    def _handle(self, path: Path) -> tuple[Any, int]:
        from safetensors import safe_open

        if self._open is None or self._open[0] != path or self._open[2] > REMAP_AFTER:
            self._open = None  # the old mapping goes before the new one comes
            if _state(path) != self._states[path]:
                raise InputError(f"{path}: was changed while it was read: try again")
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
    """Open a safetensors file, memory-mapped; `InputError` when it is missing, corrupted or truncated."""
    from safetensors import safe_open

    path = Path(path)
    with _reading(path), safe_open(path, framework="pt") as handle:
        names = list(handle.keys())
    return LazyTensors(dict.fromkeys(names, path))


def load_safetensors(path: Path | str) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, in memory of their own."""
    return {name: tensor.clone() for name, tensor in open_safetensors(path).items()}


def weight_files(folder: Path | str) -> list[Path]:
    """The safetensors files that hold a model folder's weights; `InputError` where there are none that we read."""
    return sorted(set(_weight_map(Path(folder)).values()))


def read_weights(folder: Path | str, stem: str = "model") -> LazyTensors:
    """A model folder's weights by name, from model.safetensors or the shards of model.safetensors.index.json."""
    folder = Path(folder)
    if (folder / f"{stem}.safetensors").exists():
        return open_safetensors(folder / f"{stem}.safetensors")
    paths = _weight_map(folder, stem)
    opened = {path: open_safetensors(path) for path in sorted(set(paths.values()))}
    for name, path in paths.items():
        if name not in opened[path]:
            raise InputError(f"{path}: has no tensor {name!r}, though the folder's index says so: fetch it again")
    return LazyTensors(paths)


def _weight_map(folder: Path, stem: str = "model") -> dict[str, Path]:
    """Tensor name -> file of a folder's index; for a single file the one entry "" -> file."""
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
        named = (
            isinstance(file, str) and Path(file).name == file and len(file.encode("utf-8", "replace")) <= LONGEST_NAME
        )
        if not named or not file.endswith(".safetensors"):
            raise InputError(f"{index}: shard {file!r:.100} of {name!r} is not a safetensors file of this folder")
        if not (folder / file).exists():
            raise InputError(f"{folder}: shard {file} is missing: fetch the folder again")
    return {name: folder / file for name, file in names.items()}


def _no_weights(folder: Path) -> InputError:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if pickled := [name for name in names if name.endswith(PICKLED)]:
        return InputError(
            f"{folder}: holds only {pickled[0]}: only safetensors and gguf are read (a pickle can run code): "
            "convert it to model.safetensors"
        )
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return InputError(f"{folder}: holds no model.safetensors: name the file itself, {folder / gguf[0]}")
    return InputError(f"{folder}: holds no model.safetensors (only safetensors and gguf weights are read)")
