"""Tensors sharded across ranks, and checkpoints that the ranks write in parallel, in Hugging Face's sharded format.

    model-00001-of-00002.safetensors   full tensors, of about the same total size in each file
    model-00002-of-00002.safetensors
    model.safetensors.index.json       {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}

Each rank writes one file. Tensors are gathered in rounds, one for each writer: no rank holds more than one full tensor
in addition to its shards. The files do not depend on the number of ranks that read them, and `consolidate` turns them
into the file that a single process writes, byte for byte.

A sharded tensor is torch's DTensor, sharded along its first dimension.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.files.atomic import write_json
from graftlm.files.formats import DTYPES, LazyTensors, file_order, read_weights, tensor_bytes, write_safetensors

_NAMES = {torch_name: name for name, (torch_name, _) in DTYPES.items()}


# One tensor -----------------------------------------------------------------------------------------------------------


def is_sharded(t: Tensor) -> bool:
    """Whether this rank holds only some rows of it."""
    return hasattr(t, "device_mesh")


def full_tensor(t: Tensor) -> Tensor:
    """All rows of a sharded tensor, a collective; any other tensor as it is."""
    gather = getattr(t, "full_tensor", None)
    found: Tensor = t if gather is None else gather()
    return found


def to_local(t: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, not copied; any other tensor as it is."""
    part = getattr(t, "to_local", None)
    found: Tensor = t if part is None else part()
    return found


def local_rows(t: Tensor) -> range:
    """The indices of this rank's rows; all rows of a tensor that is not sharded."""
    count = t.shape[0] if t.dim() else 1
    if not is_sharded(t):
        return range(count)
    sharded: Any = t
    per_rank = -(-count // sharded.device_mesh.size())  # as torch.chunk splits
    first = min(count, per_rank * sharded.device_mesh.get_local_rank())
    return range(first, min(count, first + per_rank))


def wrap_like(t: Tensor, rows: Tensor) -> Tensor:
    """`rows` as this rank's rows of a tensor sharded like `t`; `rows` themselves if `t` is not sharded."""
    if not is_sharded(t):
        return rows
    from torch.distributed.tensor import DTensor

    assert isinstance(t, DTensor)
    return DTensor.from_local(rows, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())


# Files ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    """A collective: all ranks call it, in the same order."""

    @classmethod
    def of(cls, t: Tensor) -> "LazyTensor":
        """An existing tensor, which may be sharded."""
        return cls(t.dtype, tuple(t.shape), lambda: full_tensor(t))

    @property
    def stored(self) -> str:
        """safetensors' name of the dtype."""
        return _NAMES[str(self.dtype).removeprefix("torch.")]

    @property
    def bytes(self) -> int:
        """The size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


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
