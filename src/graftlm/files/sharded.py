"""Tensors that several processes hold some rows of each, and safetensors files that several write beside each other.

    model-00001-of-00002.safetensors   whole tensors: some of them in each file, about as many bytes in each
    model-00002-of-00002.safetensors   (Hugging Face's own way to cut a large model into files)
    model.safetensors.index.json       {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}

What is unusual here: *each process writes a file*. A tensor is gathered when its writer's turn comes, one for each
writer at a time; so no process ever holds more than one tensor beside its own rows, and all disks write at once. And
nothing in it is a process's own: any number of them reads the files, and `join` makes them the one file that one
process would have written, to the byte.

A cut tensor is torch's DTensor, cut along its first dimension. Letters: N processes.
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
    """Whether this process holds only some rows of it."""
    return hasattr(t, "device_mesh")


def full_tensor(t: Tensor) -> Tensor:
    """All of a cut tensor, which all processes must ask for; any other as it is."""
    gather = getattr(t, "full_tensor", None)
    found: Tensor = t if gather is None else gather()
    return found


def to_local(t: Tensor) -> Tensor:
    """The rows of a cut tensor that this process holds, in the memory they have; any other as it is."""
    part = getattr(t, "to_local", None)
    found: Tensor = t if part is None else part()
    return found


def local_rows(t: Tensor) -> range:
    """Which rows (of its first dimension) this process holds; all of a tensor that is not cut."""
    held: Any = t
    count = t.shape[0] if t.dim() else 1
    if not is_sharded(t):
        return range(count)
    each = -(-count // held.device_mesh.size())  # as torch.chunk cuts
    first = min(count, each * held.device_mesh.get_local_rank())
    return range(first, min(count, first + each))


def wrap_like(t: Tensor, rows: Tensor) -> Tensor:
    """A tensor cut as `t` is, of which this process holds `rows`; where `t` is not cut, `rows` themselves."""
    if not is_sharded(t):
        return rows
    from torch.distributed.tensor import DTensor

    assert isinstance(t, DTensor)
    return DTensor.from_local(rows, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())


# Files ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    """All processes call it, at the same place in an order that they agree on."""

    @classmethod
    def of(cls, t: Tensor) -> "LazyTensor":
        """One that is there, maybe cut."""
        return cls(t.dtype, tuple(t.shape), lambda: full_tensor(t))

    @property
    def stored(self) -> str:
        """safetensors' name of its dtype."""
        return _NAMES[str(self.dtype).removeprefix("torch.")]

    @property
    def bytes(self) -> int:
        """Its size."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def partition_by_size(tensors: Mapping[str, LazyTensor], size: int) -> list[list[str]]:
    """Which tensors are whose of `size` writers, each list in the order of its file, about as many bytes in each.

    The largest first, always to the one that has least. Writers that would have nothing are left out.
    """
    given: list[list[str]] = [[] for _ in range(size)]
    held = [0] * size
    for name in sorted(tensors, key=lambda n: (-tensors[n].bytes, n)):
        least = held.index(min(held))
        given[least].append(name)
        held[least] += tensors[name].bytes
    return [file_order({name: tensors[name].stored for name in names}) for names in given if names]


def save_sharded(folder: Path, stem: str, tensors: Mapping[str, LazyTensor], rank: int, size: int) -> None:
    """Write {stem}-0000I-of-0000N.safetensors, this process's file, into a folder that all see; the first, the index.

    All processes call it with the same names. Where one cannot write, the others' gathering is still taken part in,
    and then its error is raised there alone.
    """
    given = partition_by_size(tensors, size)
    files = [f"{stem}-{number + 1:05}-of-{len(given):05}.safetensors" for number in range(len(given))]

    def mine() -> Iterator[memoryview]:
        """The bytes of this process's tensors; between two of them the others' are gathered."""
        for names in zip_longest(*given):
            own = None
            for number, name in enumerate(names):
                made = tensors[name].make() if name is not None else None
                own = made if number == rank else own
                del made
            if own is not None:
                yield tensor_bytes(own)

    stream = mine()
    try:
        if rank < len(given):
            own = ((name, tensors[name]) for name in given[rank])
            write_safetensors(folder / files[rank], [(n, t.stored, t.shape, islice(stream, 1)) for n, t in own])
        if rank == 0:
            where = {name: file for names, file in zip(given, files, strict=True) for name in names}
            size_of_all = sum(t.bytes for t in tensors.values())
            index = {"metadata": {"total_size": size_of_all}, "weight_map": dict(sorted(where.items()))}
            write_json(folder / f"{stem}.safetensors.index.json", index)
    finally:
        for _ in stream:
            pass


def consolidate(folder: Path, stem: str) -> None:
    """Make {stem}.safetensors of what several processes wrote, a tensor at a time; nothing happens where it is one.

    Killed at any moment, the folder can be read all the same, and the next call ends the work.
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


def remove(folder: Path, stem: str) -> None:
    """Take {stem}.safetensors away, or the files that it is cut into."""
    for file in (*folder.glob(f"{stem}-*-of-*.safetensors"), *folder.glob(f"{stem}.safetensors*")):
        file.unlink(missing_ok=True)
