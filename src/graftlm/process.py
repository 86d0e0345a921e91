"""Settings of the whole process, made by the `graft` command before torch is loaded and never by importing graftlm.

A library must leave its caller's process alone; a command owns its process and may arrange it for the work at hand.
"""

import ctypes
import os
import sys

BEGAN: float | None = None
"""time.perf_counter() when the command began; None where graftlm is used as a library."""

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4


def world_size() -> int:
    """How many processes torchrun started this command in; 1 without it."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() else 1


def is_rank0() -> bool:
    """Whether this one of them prints what all have come to."""
    return os.environ.get("RANK", "0") == "0"


def tune_malloc_retain() -> bool:
    """Tell the C library to keep freed memory instead of giving it back; True where it agreed.

    glibc maps every large block afresh from the kernel and unmaps it when it is freed, so each large tensor is paid
    for in page faults, again in every step: half the time of a training step that makes logits for a whole batch.
    Without mapped blocks (M_MMAP_MAX 0) and without trimming (M_TRIM_THRESHOLD -1, the largest size there is) memory
    once touched is used again. THP_MEM_ALLOC_ENABLE lets PyTorch ask for huge pages. All of it must come before the
    first large allocation. glibc ignores settings it dislikes, so what it answers is looked at: 1 is yes.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return _agrees((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))


def tune_malloc_release() -> bool:
    """Tell the C library to give freed blocks of a megabyte and more back at once; True where it agreed.

    For weights that are cut over several processes: each block's are gathered, and freed again. What was kept of them
    would soon hold a few activations, too small a hole for the next block's; in the end the holes are as large as
    the model. Left to itself, glibc maps fewer blocks the larger those are that were freed, and comes to the same.
    """
    return _agrees((M_MMAP_THRESHOLD, 1 << 20))


def _agrees(*settings: tuple[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # musl has neither the trouble nor the knobs
        return False
    return all(libc.mallopt(knob, value) == 1 for knob, value in settings)
