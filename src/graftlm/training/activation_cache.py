"""Hidden states of frozen lower layers, computed once and cached on disk for later epochs and runs.

With --train_layers 20: the input of block 20 depends only on the base and the example. So it is computed the first
time an example is needed, written to a memory-mapped file, and read from there afterwards, by later runs too.

A matrix product's rounding depends on the rows of its batch. So examples are computed in groups that depend on the data
alone (of similar length, GROUP at a time, after the shared prefix of all prompts), never in the run's batches. A run
gives the same bits with an empty cache, with a full one, and after a kill.

    GRAFT_HOME/frozen/<sha256 of base, tokens, layer, dtype, versions>/
        hidden    [R, d]: P rows of the shared prefix, then each example's own tokens, group by group
        groups    for each group 8 bytes: 0, or 1 << 32 and the crc32 of its rows, which are valid only if it matches

Letters: P shared tokens, T tokens of the longest row, B rows, d model width, L the first trained block.
"""

import hashlib
import mmap
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graftlm.inference.decoder import shared_prefix_length, token_batches
from graftlm.inference.generate import eval_mode
from graftlm.models.base import CausalLM
from graftlm.text.collate import Example
from graftlm.text.example_table import Prompts

GROUP = 32
FORMAT_VERSION = 1  # raised when the same name would hold other values


class ActivationCache:
    """The hidden states of one data set, for one model and one L; use `open_activation_cache`."""

    def __init__(self, folder: Path, model: CausalLM, examples: Sequence[Example], layers: int, prefix: int) -> None:
        self.model, self.examples, self.layers, self.prefix = model, examples, layers, prefix
        sizes = [suffix_length(e, prefix) for e in examples]
        order = sorted(range(len(examples)), key=lambda i: (sizes[i], i))
        self.groups = list(token_batches(order, sizes, GROUP))
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

    def read(self, rows: Sequence[int], starts: Tensor, count: int) -> Tensor:
        """The input of block L for these examples, shared prefix first: [P + count, d], with zeros for padding.

        starts: where each example's own tokens begin among the `count` tokens after the prefix.
        """
        for group in sorted({0, *(self.group_of[i] for i in rows)} - self._ready):  # group 0 has the shared prefix
            self._ensure(group)
        p = self.prefix
        x = torch.zeros(p + count, self.hidden.shape[1], dtype=self.hidden.dtype)
        x[:p] = self.hidden[:p]
        for i, at in zip(rows, starts.tolist(), strict=True):
            x[p + at :][: self.sizes[i]] = self.hidden[self.start[i] :][: self.sizes[i]]
        return x

    def _ensure(self, group: int) -> None:
        """Verify a group's bytes, or compute them. A process killed meanwhile leaves a group whose checksum fails."""
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
    """Tokens of an example's row after the shared prefix, without its last, which is only predicted."""
    return len(example.prompt_ids) - prefix + len(example.completion_ids) - 1


@dataclass(frozen=True)
class CacheSpec:
    """What a cache is of, and how large it may get."""

    layers: int
    """L, the number of frozen lower layers."""
    base_sha256: str
    share_prefix: bool
    max_bytes: float


def open_activation_cache(
    home: Path, model: CausalLM, examples: Sequence[Example], spec: CacheSpec
) -> tuple[ActivationCache | None, str]:
    """The cache of these examples under `home`, and a note about it.

    None if it would take more than `max_bytes`, or more than the disk has left: then the lower layers are recomputed in
    each step. Caches of other runs are deleted, least recently used first, until all fit into `max_bytes`.
    """
    prefix = shared_prefix_length(Prompts(examples)) if spec.share_prefix else 0
    rows = prefix + sum(suffix_length(e, prefix) for e in examples)
    size = rows * model.config.hidden_size * torch.empty(0, dtype=model.dtype).element_size()
    what = f"the output of the {spec.layers} frozen lower layers takes {size / 1e9:.2f} GB"
    if size > spec.max_bytes:
        allowed = f"--activation_cache_gb allows {spec.max_bytes / 1e9:g}"
        return None, f"{what}, {allowed}: it is recomputed in each step"
    folder = home / "frozen" / _name(model, examples, prefix, spec)
    if not folder.is_dir():
        _evict_lru(home / "frozen", spec.max_bytes - size)
        home.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(home).free) < size:
            return None, f"{what}, the disk of {home} has {free / 1e9:.2f} left: it is recomputed in each step"
    cache = ActivationCache(folder, model, examples, spec.layers, prefix)
    os.utime(folder)  # marks it as most recently used
    return cache, f"{what}: computed once, kept in {folder}"


def _name(model: CausalLM, examples: Sequence[Example], prefix: int, spec: CacheSpec) -> str:
    """A hash of all that decides the values: base, tokens, layer, prefix, dtype, device, version of torch."""
    base, layers = spec.base_sha256, spec.layers
    decisive = (FORMAT_VERSION, base, layers, prefix, str(model.dtype), model.device.type, torch.__version__)
    digest = hashlib.sha256(repr(decisive).encode())
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
    """A shared memory map of a file of this size; new bytes are 0 and allocated on disk."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, size)
            if hasattr(os, "posix_fallocate"):  # otherwise a full disk would kill the process at a later write
                os.posix_fallocate(descriptor, 0, size)
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
