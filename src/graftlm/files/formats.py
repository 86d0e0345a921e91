"""JSON, hashes and safetensors. Readers validate files; writers are atomic (`atomic.py`).

- safetensors files are *read* by the safetensors package (memory-mapped) but *written* here, tensor by tensor: the
  package needs all tensors in memory and hides a full disk in an error of its own. The bytes are identical.
- Nothing is read by pickle: a folder with only .bin, .pt or .pth weights is an error.
- Checkpoints that ranks write in parallel are in Hugging Face's sharded format, one file for each rank:

      model-00001-of-00002.safetensors   full tensors, of about the same total size in each file
      model-00002-of-00002.safetensors
      model.safetensors.index.json       {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}

  Tensors are gathered in rounds, one for each writer: no rank holds more than one full tensor in addition to its
  shards. The files do not depend on the number of ranks that read them, and `consolidate` turns them into the file that
  a single process writes, byte for byte.

A sharded tensor is torch's DTensor, sharded along its first dimension. torch is imported only by the functions that
need it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from graftlm.config.paths import has_suffix, read_text
from graftlm.errors import InputError
from graftlm.files.atomic import atomic_write, write_json
from graftlm.files.memory import is_out_of_memory, out_of_memory_error
from graftlm.files.readers import GGUF, PICKLE_SUFFIXES, SAFETENSORS

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.tensor import DTensor

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
STORED = {torch_name: name for name, (torch_name, _) in DTYPES.items()}  # the reverse


# ----------------------------------------------------------------------------------------------- json and hashes


def read_json(path: Path) -> Any:
    """Read one JSON value. Raises InputError with the file and the line of the error."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: broken JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or endless brackets
        raise InputError(f"{path}: broken JSON: {str(error).partition(';')[0]}") from error


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over sorted names, shapes, dtypes and bytes: a hash of weights that does not depend on their files."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]  # one at a time: together they may exceed the memory
        header = [name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        digest.update(json.dumps(header).encode("utf-8"))
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The values as bytes, in row-major order; not copied if the tensor is contiguous and on the CPU."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


# ------------------------------------------------------------------------------------------------- safetensors


def write_safetensors(path: Path, entries: Sequence[tuple[str, str, Sequence[int], Iterable[Any]]]) -> None:
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
    with atomic_write(path) as file:
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


def save_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` as one safetensors file with metadata {"format": "pt"}, atomically."""
    entries = []
    for name, tensor in tensors.items():
        dtype = STORED.get(str(tensor.dtype).removeprefix("torch."))
        assert dtype is not None, f"{name}: safetensors has no dtype for {tensor.dtype}"
        entries.append((name, dtype, tuple(tensor.shape), (tensor_bytes(t) for t in [tensor])))
    write_safetensors(path, entries)


REMAP_AFTER = 64_000_000


class LazyTensors(Mapping[str, "Tensor"]):
    """Name -> tensor over one or more safetensors files, memory-mapped: a tensor is read on access.

    A file is mapped again after every REMAP_AFTER bytes, which frees the pages read before: with one mapping they would
    stay resident to the end, a second copy of the weights. A file that changes in between is an error.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = dict(paths)
        self._states = {path: _state(path) for path in set(self._paths.values())}
        self._open: tuple[Path, Any, int] | None = None  # mapped file, its handle, bytes read from it

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = self._read(name, lambda file: file.get_tensor(name))
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._paths  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def part(self, name: str, *index: slice) -> Tensor:
        """`tensor[index]`, reading nothing else of the tensor. No slice may be empty."""
        found: Tensor = self._read(name, lambda file: file.get_slice(name)[index])
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, from the header."""
        return tuple(self._read(name, lambda file: file.get_slice(name).get_shape()))

    def dtype(self, name: str) -> str:
        """safetensors' name of the tensor's dtype, such as "F32", from the header."""
        return str(self._read(name, lambda file: file.get_slice(name).get_dtype()))

    def _read(self, name: str, read: Callable[[Any], Any]) -> Any:
        """What `read` returns, given the mapped file that holds the tensor."""
        from safetensors import safe_open

        path = self._paths[name]
        with _reading(path):
            if self._open is None or self._open[0] != path or self._open[2] > REMAP_AFTER:
                self._open = None  # unmap before mapping again
                if _state(path) != self._states[path]:
                    raise InputError(f"{path}: was changed while it was being read: try again")
                self._open = (path, safe_open(path, framework="pt"), 0)
            _, file, size = self._open
            found = read(file)
        self._open = (path, file, size + getattr(found, "nbytes", 0))
        return found


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
    except (MemoryError, SafetensorError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise out_of_memory_error(str(path), path.stat().st_size) from error
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: corrupted or truncated safetensors file ({reason}): fetch it again") from error
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise out_of_memory_error(str(path), path.stat().st_size) from error
        raise InputError(f"{path}: cannot read it: {error.strerror or error}") from error


def open_safetensors(path: Path) -> LazyTensors:
    """Open a safetensors file, memory-mapped. Raises InputError if it is missing, corrupted or truncated."""
    from safetensors import safe_open

    with _reading(path), safe_open(path, framework="pt") as handle:
        names = list(handle.keys())
    return LazyTensors(dict.fromkeys(names, path))


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, copied into memory."""
    return {name: tensor.clone() for name, tensor in open_safetensors(path).items()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder's weights. Raises InputError if there are none."""
    return sorted(set(_weight_map(folder).values()))


def read_weights(folder: Path, stem: str = "model") -> LazyTensors:
    """The weights of a model folder by name, from model.safetensors or the shards of its index."""
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


# ---------------------------------------------------------------------------------------------- sharded tensors


def is_sharded(t: Tensor) -> TypeGuard[DTensor]:
    """Whether this rank holds only some rows of it."""
    return hasattr(t, "device_mesh")


def full_tensor(t: Tensor) -> Tensor:
    """All rows of a sharded tensor, a collective; any other tensor as it is."""
    return t.full_tensor() if is_sharded(t) else t


def to_local(t: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, not copied; any other tensor as it is."""
    return t.to_local() if is_sharded(t) else t


def local_rows(t: Tensor) -> range:
    """The indices of this rank's rows; all rows of a tensor that is not sharded."""
    count = t.shape[0] if t.dim() else 1
    if not is_sharded(t):
        return range(count)
    per_rank = -(-count // t.device_mesh.size())  # as torch.chunk splits
    first = min(count, per_rank * t.device_mesh.get_local_rank())
    return range(first, min(count, first + per_rank))


def wrap_like(t: Tensor, rows: Tensor) -> Tensor:
    """`rows` as this rank's rows of a tensor sharded like `t`; `rows` themselves if `t` is not sharded."""
    if not is_sharded(t):
        return rows
    return type(t).from_local(rows, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())


# ------------------------------------------------------------------------------------------------ sharded files


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    """A collective: all ranks call it, in the same order."""

    @classmethod
    def of(cls, t: Tensor) -> LazyTensor:
        """An existing tensor, which may be sharded."""
        return cls(t.dtype, tuple(t.shape), lambda: full_tensor(t))

    @property
    def stored(self) -> str:
        """safetensors' name of the dtype."""
        return STORED[str(self.dtype).removeprefix("torch.")]

    @property
    def bytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def partition_by_size(tensors: Mapping[str, LazyTensor], size: int) -> list[list[str]]:
    """The tensors of each of `size` files, in file order, with about the same number of bytes in each.

    Greedy: the largest tensor first, to the smallest file. Empty files are left out.
    """
    files: list[list[str]] = [[] for _ in range(size)]
    sizes = [0] * size
    for name in sorted(tensors, key=lambda n: (-tensors[n].bytes, n)):
        smallest = sizes.index(min(sizes))
        files[smallest].append(name)
        sizes[smallest] += tensors[name].bytes
    return [file_order({name: tensors[name].stored for name in names}) for names in files if names]


def save_sharded(folder: Path, stem: str, tensors: Mapping[str, LazyTensor], rank: int, size: int) -> None:
    """Write this rank's file {stem}-0000I-of-0000N.safetensors into a shared folder, and on rank 0 the index.

    A collective: all ranks call it with the same names. A rank that cannot write still takes part in gathering the
    tensors of the others, and raises its error afterwards.
    """
    parts = partition_by_size(tensors, size)
    files = [f"{stem}-{number + 1:05}-of-{len(parts):05}.safetensors" for number in range(len(parts))]

    def gathered() -> Iterator[memoryview]:
        """The bytes of this rank's tensors. All ranks gather all tensors, in rounds of one for each file."""
        for names in zip_longest(*parts):
            own = None
            for number, name in enumerate(names):
                full = tensors[name].make() if name is not None else None
                own = full if number == rank else own
                del full
            if own is not None:
                yield tensor_bytes(own)

    stream = gathered()
    try:
        if rank < len(parts):
            own = ((name, tensors[name]) for name in parts[rank])
            write_safetensors(folder / files[rank], [(n, t.stored, t.shape, islice(stream, 1)) for n, t in own])
        if rank == 0:
            weight_map = {name: file for names, file in zip(parts, files, strict=True) for name in names}
            total = sum(t.bytes for t in tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(folder / f"{stem}.safetensors.index.json", index)
    finally:
        for _ in stream:
            pass


def consolidate(folder: Path, stem: str) -> None:
    """Merge the files of `save_sharded` into {stem}.safetensors, one tensor at a time; a single file is left alone.

    The folder stays readable if the process is killed, and the next call completes the work.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return
    if not single.is_file():
        stored = read_weights(folder, stem)
        write_safetensors(single, [(n, stored.dtype(n), stored.shape(n), _bytes(stored, n)) for n in stored])
    for part in folder.glob(f"{stem}-*-of-*.safetensors"):
        part.unlink()
    index.unlink()


def _bytes(stored: LazyTensors, name: str) -> Iterator[memoryview]:
    yield tensor_bytes(stored[name])


def remove_weights(folder: Path, stem: str) -> None:
    """Delete {stem}.safetensors, or its shards."""
    for file in (*folder.glob(f"{stem}-*-of-*.safetensors"), *folder.glob(f"{stem}.safetensors*")):
        file.unlink(missing_ok=True)
