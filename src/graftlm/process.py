"""Process-wide settings: torchrun's environment and glibc's allocator.

Only the `graft` command applies them, before torch is loaded; importing graftlm changes nothing in its caller's
process.
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
    """torchrun's world size; 1 without torchrun."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() else 1


def is_rank0() -> bool:
    """Whether this is the rank that prints results."""
    return os.environ.get("RANK", "0") == "0"


def tune_malloc_retain() -> bool:
    """Make glibc keep freed memory for reuse; True if it accepted.

    By default glibc maps every large block anew and unmaps it when it is freed, so each large tensor costs page faults
    in every step: half the time of a training step that computes logits for a whole batch. Without mapped blocks
    (M_MMAP_MAX 0) and without trimming (M_TRIM_THRESHOLD -1, the maximum) touched memory is reused.
    THP_MEM_ALLOC_ENABLE lets PyTorch ask for huge pages. All of this must precede the first large allocation. mallopt
    returns 1 for a setting that it accepts.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return _agrees((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))


def tune_malloc_release() -> bool:
    """Make glibc return freed blocks of at least 1 MiB to the kernel at once; True if it accepted.

    For sharded weights: the weights of each block are gathered and freed again. If glibc retained them, activations
    would fragment that memory, and the next block's weights would not fit: in the end the fragments are as large as
    the model. glibc's default threshold grows with the blocks that are freed and has the same effect.
    """
    return _agrees((M_MMAP_THRESHOLD, 1 << 20))


def _agrees(*settings: tuple[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # musl has neither the trouble nor the knobs
        return False
    return all(libc.mallopt(knob, value) == 1 for knob, value in settings)
