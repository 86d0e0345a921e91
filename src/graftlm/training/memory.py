"""How much memory this process holds and has held, in MB (10^6 bytes)."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from graftlm.errors import require_posix
from graftlm.files.sharded import to_local


def peak_rss_mb() -> float:
    """The most memory this process has held so far."""
    if (peak := _status_mb("VmHWM")) is not None:
        return peak
    resource = require_posix("resource")
    most = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return round(most * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def rss_mb() -> float:
    """What it holds now; where the system does not tell, the most it has held."""
    now = _status_mb("VmRSS")
    return peak_rss_mb() if now is None else now


@contextmanager
def saved_activation_bytes(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Yields what counts the bytes that autograd keeps of what is run within: storages once, parameters not at all."""
    known = {to_local(p).untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # a storage that is held here is not made anew under the same number

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        # To be asked behind the pass: of cut weights that were gathered for a block nothing is left then.
        yield lambda: sum(storage.nbytes() for storage in kept.values())


def _status_mb(field: str) -> float | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(x for x in status.read_text().splitlines() if x.startswith(field))
    return round(int(line.split()[1]) * 1024 / 1e6, 1)
