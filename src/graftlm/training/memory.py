"""How much memory this process holds and has held, in MB (10^6 bytes)."""

import resource
import sys
from pathlib import Path


def peak_rss_mb() -> float:
    """The most memory this process has held so far."""
    if (peak := _status_mb("VmHWM")) is not None:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def rss_mb() -> float:
    """What it holds now; where the system does not tell, the most it has held."""
    now = _status_mb("VmRSS")
    return peak_rss_mb() if now is None else now


def _status_mb(field: str) -> float | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(x for x in status.read_text().splitlines() if x.startswith(field))
    return round(int(line.split()[1]) * 1024 / 1e6, 1)
