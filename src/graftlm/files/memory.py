"""How much memory is free, and the error where there is too little."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from graftlm.errors import InputError, require_posix

if TYPE_CHECKING:
    import torch


def proc_mb(name: str, field: str) -> float | None:
    """A field of a file in /proc; None where the system has none."""
    path = Path("/proc") / name
    if not path.exists():
        return None
    kilobytes = int(path.read_text().partition(f"{field}:")[2].split()[0])
    return round(kilobytes * 1024 / 1e6, 1)


def free_mb(device: torch.device | None = None) -> float:
    """MB that this process may still take on the device, by default the CPU; infinite where the system does not say."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0] / 1e6
    free = [math.inf]
    if (available := proc_mb("meminfo", "MemAvailable")) is not None:
        free.append(available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        free.append((int(text) - int(used.read_text())) / 1e6)
    if (size := proc_mb("self/status", "VmSize")) is not None:
        resource = require_posix("resource")
        limit_bytes = resource.getrlimit(resource.RLIMIT_AS)[0]
        free += [limit_bytes / 1e6 - size] if limit_bytes != resource.RLIM_INFINITY else []
    return min(free)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, torch or safetensors says that memory ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "allocate memory" in text or "out of memory" in text


def out_of_memory_error(what: str, required: float | None = None, device: torch.device | None = None) -> InputError:
    """An error with the bytes that are required, if that is known, and the memory that is free."""
    numbers = [f"needs {required / 1e6:,.1f} MB"] if required else []
    numbers += [f"{free:,.1f} MB are free"] if (free := free_mb(device)) < math.inf else []
    return InputError(
        f"{what}: out of memory ({', '.join(numbers) or 'the system does not say how much is free'}): "
        "close other programs, or use a smaller model, batch or --dtype"
    )
