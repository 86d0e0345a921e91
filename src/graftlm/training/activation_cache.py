"""What frozen lower layers make of the data, computed once and kept on disk for every later epoch.

With --train_layers 20: the hidden state that enters block 20 is a function of the base and of the example alone. So it
is computed the first time an example is needed, written to a memory-mapped file, and read from there ever after, by
later runs too.

What is unusual here: *the values do not depend on the run*. A matrix product's rounding depends on which rows stand
beside each other, so examples are computed in groups that the data alone decides (of similar length, GROUP at a time,
behind what all prompts of the data begin with), never as the run's batches happen to be made. So a run gives the same
bytes with an empty file and with a full one, and after a kill.

    GRAFT_HOME/frozen/<sha256 of base, tokens, layer, dtype, versions>/
        hidden    [R, d]: P rows of the shared beginning, then each example's own tokens, group by group
        groups    for each group 8 bytes: 0, or 1 << 32 and the crc32 of its rows; rows count only if that fits

Letters: P shared tokens, T tokens of the longest row, B rows, d model width, L the first trained block.
"""

import hashlib
import mmap
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graftlm.inference.generate import eval_mode
from graftlm.models.base import CausalLM
from graftlm.text.collate import Example, common_prefix_length

GROUP = 32
FORMAT_VERSION = 1  # raised when the same name would hold other values
MIN_SHARED_PREFIX = 4  # as in objectives.make_batch


class ActivationCache:
    """The kept hidden states of one data set, for one model and one L; use `open_frozen`."""

    def __init__(self, folder: Path, model: CausalLM, examples: Sequence[Example], layers: int, prefix: int) -> None:
        self.model, self.examples, self.layers, self.prefix = model, examples, layers, prefix
        sizes = [suffix_length(e, prefix) for e in examples]
        order = sorted(range(len(examples)), key=lambda i: (sizes[i], i))
        self.groups = [order[i : i + GROUP] for i in range(0, len(order), GROUP)]
        self.group_of = {i: g for g, group in enumerate(self.groups) for i in group}
        ends = np.cumsum([prefix, *(sizes[i] for i in order)])
        self.start = {i: int(end) for i, end in zip(order, ends, strict=False)}
        self.sizes = sizes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        width, item = model.config.hidden_size, torch.empty(0, dtype=model.dtype).element_size()
        self.row_bytes = width * item
        self._bytes = _map(folder / "hidden", int(ends[-1]) * self.row_bytes)
        self.hidden = torch.frombuffer(self._bytes, dtype=model.dtype).view(-1, width)
        self._index = np.frombuffer(_map(folder / "groups", 8 * len(self.groups)), dtype=np.uint64)
        self._ready: set[int] = set()  # groups whose bytes this process has checked or written

    def read(self, rows: Sequence[int], t: int) -> Tensor:
        """What enters block L for these examples behind the shared beginning: [P + B t, d], padded with zeros."""
        for group in sorted({0, *(self.group_of[i] for i in rows)} - self._ready):  # group 0 brings the shared rows
            self._ensure(group)
        p = self.prefix
        x = torch.zeros(p + len(rows) * t, self.hidden.shape[1], dtype=self.hidden.dtype)
        x[:p] = self.hidden[:p]
        for b, i in enumerate(rows):
            x[p + b * t :][: self.sizes[i]] = self.hidden[self.start[i] :][: self.sizes[i]]
        return x

    def _ensure(self, group: int) -> None:
        """Check a group's bytes, or compute them; killed at any moment, it leaves a group that does not check out."""
        if int(self._index[group]) != self._checksum(group):
            self._index[group] = 0
            self._compute(group)
            self._index[group] = self._checksum(group)
        self._ready.add(group)

    def _checksum(self, group: int) -> int:
        members = self.groups[group]
        first = 0 if group == 0 else self.start[members[0]]
        end = self.start[members[-1]] + self.sizes[members[-1]]
        return 1 << 32 | zlib.crc32(memoryview(self._bytes)[first * self.row_bytes : end * self.row_bytes])

    def _compute(self, group: int) -> None:
        members, p, device = self.groups[group], self.prefix, self.model.device
        t = max(self.sizes[i] for i in members)
        ids = torch.zeros(len(members), t, dtype=torch.long)
        for b, i in enumerate(members):
            example = self.examples[i]
            own = (*example.prompt_ids[p:], *example.completion_ids[:-1])
            ids[b, : len(own)] = torch.tensor(own)
        lead = torch.tensor(self.examples[0].prompt_ids[:p], dtype=torch.long)[None]
        with eval_mode(self.model):
            x = self.model.forward_lower_layers(lead.to(device), ids.to(device), self.layers).cpu()
        if group == 0:
            self.hidden[:p] = x[:p]
        for b, i in enumerate(members):
            self.hidden[self.start[i] :][: self.sizes[i]] = x[p + b * t :][: self.sizes[i]]


def suffix_length(example: Example, prefix: int) -> int:
    """Tokens of an example's row behind the shared beginning, without its last, which nothing follows."""
    return len(example.prompt_ids) - prefix + len(example.completion_ids) - 1


def open_frozen(
    home: Path,
    model: CausalLM,
    examples: Sequence[Example],
    layers: int,
    base_sha256: str,
    *,
    share: bool,
    most_bytes: float,
) -> tuple[ActivationCache | None, str]:
    """The store for these examples under `home`, and a line that says what became of it.

    None where it would take more than `most_bytes`, or than the disk has left: then the lower layers are computed in
    each step. What other runs left there is deleted, the longest unused first, until all fits into `most_bytes`.
    """
    prefix = common_prefix_length([e.prompt_ids for e in examples]) if share and len(examples) > 1 else 0
    prefix = prefix if prefix >= MIN_SHARED_PREFIX else 0
    rows = prefix + sum(suffix_length(e, prefix) for e in examples)
    size = rows * model.config.hidden_size * torch.empty(0, dtype=model.dtype).element_size()
    what = f"the output of the {layers} frozen lower layers takes {size / 1e9:.2f} GB"
    if size > most_bytes:
        return None, f"{what}, --activation_cache_gb allows {most_bytes / 1e9:g}: it is computed anew in each step"
    folder = home / "frozen" / _name(model, examples, layers, prefix, base_sha256)
    if not folder.is_dir():
        _evict_lru(home / "frozen", most_bytes - size)
        home.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(home).free) < size:
            return None, f"{what}, the disk of {home} has {free / 1e9:.2f} left: it is computed anew in each step"
    frozen = ActivationCache(folder, model, examples, layers, prefix)
    os.utime(folder)  # used last, deleted last
    return frozen, f"{what}: computed once, kept in {folder}"


def _name(model: CausalLM, examples: Sequence[Example], layers: int, prefix: int, base_sha256: str) -> str:
    """A hash of all that decides the values: base, data and template (through the tokens they make), layer, dtype."""
    about = (FORMAT_VERSION, base_sha256, layers, prefix, str(model.dtype), model.device.type, torch.__version__)
    digest = hashlib.sha256(repr(about).encode())
    for e in examples:
        digest.update(repr((e.prompt_ids, e.completion_ids)).encode())
    return digest.hexdigest()[:32]


def _evict_lru(folder: Path, most_bytes: float) -> None:
    kept = sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True) if folder.is_dir() else []
    for each in kept:
        most_bytes -= sum(f.stat().st_size for f in each.iterdir())
        if most_bytes < 0:
            shutil.rmtree(each, ignore_errors=True)


def _map(path: Path, size: int) -> mmap.mmap:
    """A file of this size, shared with whoever else maps it; new bytes are 0 and have their place on the disk."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, size)
            if hasattr(os, "posix_fallocate"):  # a disk that fills up later would kill the process at a write
                os.posix_fallocate(descriptor, 0, size)
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
