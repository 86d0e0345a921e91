"""What a benchmark needs to know about the machine: what it is, who used its cores, how much memory a process took.

Linux only (/proc). Unusual: a run is trusted only if nothing else used the cores meanwhile, so `run_measured`
subtracts the CPU seconds of the child (and of this process) from all CPU seconds of the machine; the rest was spent by
others, stolen time included. No torch here: the process that starts and watches the runs should itself stay small.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from resource import struct_rusage

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
PACKAGES = ("torch", "transformers", "peft", "trl", "tokenizers", "lm_eval")


def cpu_description(cpuinfo: str) -> dict[str, object]:
    """The first processor of /proc/cpuinfo's text: model, family/model/stepping, and which of CPU_FLAGS it has."""
    first = cpuinfo.split("\n\n", 1)[0]
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    flags = set(fields.get("flags", "").split())
    family = "/".join(fields.get(key, "?") for key in ("cpu family", "model", "stepping"))
    present = [flag for flag in CPU_FLAGS if flag in flags]
    return {"cpu": fields.get("model name", platform.machine()), "family_model_stepping": family, "flags": present}


def worth_trying(formats: Sequence[str], cpuinfo: str = "") -> list[str]:
    """Those of the number formats that this processor has instructions for: without, one step takes minutes."""
    flags = set((cpuinfo or Path("/proc/cpuinfo").read_text(encoding="utf-8")).split())
    native = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    return [name for name in formats if native or name in ("fp32", "float32")]


def describe() -> dict[str, object]:
    """The machine and the software: what a figure must be read with."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        **cpu_description(Path("/proc/cpuinfo").read_text(encoding="utf-8")),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far (VmHWM), in MB (10^6 bytes), as `graft train --json` counts it."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/self/status has no VmHWM line")


def descendants_mb(pid: int) -> float:
    """Resident memory of all processes below `pid` at this moment, in MB; pages that they share count for each."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # it has ended
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])  # behind the name, which may hold anything
    below, pages = {pid}, 0
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    for each in below - {pid}:
        try:
            pages += int(Path(f"/proc/{each}/statm").read_text(encoding="utf-8").split()[1])
        except OSError:
            continue
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


PEAKS = """
import json, time, torch
def best(n, dtype, tries):
    x, seconds = torch.ones(n, n, dtype=dtype), []
    for _ in range(tries + 1):
        began = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / min(seconds[1:])
peaks = {}
for dtype in (torch.float32, torch.bfloat16):
    rate = best(256, dtype, 10)
    # Without instructions for a format one product of 2,048 takes minutes: the small one must do there.
    large = 2 * 2048**3 / rate < 2
    peaks[str(dtype).removeprefix("torch.")] = (best(2048, dtype, 40) if large else rate) / 1e9
print(json.dumps(peaks))
"""


def matrix_peaks(folder: Path) -> dict[str, float]:
    """GFLOP/s of products of two matrices of 2,048 (of 256 where they are slow) in float32 and bfloat16, all cores."""
    done = subprocess.run([sys.executable, "-c", PEAKS], cwd=folder, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def busy_seconds(stat: str, ticks_per_second: int) -> float:
    """CPU seconds all cores have been busy, from /proc/stat's text: everything but idle and waiting for the disk.

    Fields: user nice system idle iowait irq softirq steal guest guest_nice; guest time is already in user and nice.
    """
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.split("\n", 1)[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / ticks_per_second


def machine_busy_seconds() -> float:
    return busy_seconds(Path("/proc/stat").read_text(encoding="utf-8"), os.sysconf("SC_CLK_TCK"))


@dataclass(frozen=True)
class Measured:
    """One finished process, seen from outside. Seconds are wall seconds of the whole process, start-up included."""

    stdout: str
    stderr: str
    status: int
    seconds: float
    cpu_seconds: float
    other_cpu_seconds: float
    other_cpu_share: float
    max_rss_mb: float


def others_share(other_cpu_seconds: float, seconds: float, cores: int) -> float:
    """The part of the machine's capacity that others used: CPU seconds over wall seconds times cores."""
    return other_cpu_seconds / (seconds * cores)


Watch = Callable[[int], bool]
"""Called with a running process's id a few times a second; True ends the process by SIGTERM."""
LOOK_EVERY_S = 0.2


def _wait(pid: int, watch: Watch | None) -> tuple[int, struct_rusage]:
    """A child's status and what it used."""
    while watch is not None:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            return status, usage
        if watch(pid):
            os.kill(pid, signal.SIGTERM)
            break
        time.sleep(LOOK_EVERY_S)
    return os.wait4(pid, 0)[1:]


def run_measured(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], watch: Watch | None = None
) -> Measured:
    """Run `command` to its end in `folder`, with its output kept there too; never raises for a failed process."""
    out, err = folder / "stdout", folder / "stderr"
    own_before, busy_before, began = time.process_time(), machine_busy_seconds(), time.perf_counter()
    with out.open("wb") as stdout, err.open("wb") as stderr:
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=stdout, stderr=stderr)
        try:
            status, usage = _wait(child.pid, watch)
            child.returncode = exit_status = os.waitstatus_to_exitcode(status)
        finally:
            if child.returncode is None:  # interrupted: leave no training run behind
                child.kill()
                child.wait()
    seconds = time.perf_counter() - began
    cpu = usage.ru_utime + usage.ru_stime
    other = max(0.0, machine_busy_seconds() - busy_before - cpu - (time.process_time() - own_before))
    return Measured(
        stdout=out.read_text(encoding="utf-8"),
        stderr=err.read_text(encoding="utf-8", errors="replace"),
        status=exit_status,
        seconds=seconds,
        cpu_seconds=cpu,
        other_cpu_seconds=other,
        other_cpu_share=others_share(other, seconds, os.cpu_count() or 1),
        max_rss_mb=usage.ru_maxrss * 1024 / 1e6,
    )
