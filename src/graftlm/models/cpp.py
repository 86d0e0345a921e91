"""C++ sources next to this file, compiled by this machine's compiler once per processor, and loaded with ctypes.

They are plain C++ with a C interface: without torch's headers they compile in seconds. One object serves every shape.

    GRAFT_HOME/compiled/kernels-KEY.so      KEY: hash of source and headers, the compiler, its flags and the processor

The objects are loaded as code, so their folder must belong to the user (mode 0700).
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from graftlm.errors import GraftError
from graftlm.files.assets import cache_home
from graftlm.files.atomic import atomic_write

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
TIMEOUT_S = 120


class KernelsUnavailable(GraftError):
    """The kernels cannot be compiled or loaded on this machine; the message says why."""


def compiler() -> str:
    """The C++ compiler's path: $CXX, else g++; raises KernelsUnavailable."""
    asked = os.environ.get("CXX") or "g++"
    found = shutil.which(asked)
    if platform.system() != "Linux":
        raise KernelsUnavailable("kernels are compiled on Linux only")
    if found is None:
        raise KernelsUnavailable(f"no C++ compiler is found ({asked})")
    return found


def load_library(source: Path) -> ctypes.CDLL:
    """The library of a source, compiled first if needed. Raises KernelsUnavailable."""
    cxx = compiler()
    version, openmp = _run([cxx, "--version"]).splitlines()[0], _openmp()
    texts = (path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h"))))
    parts = (*texts, version, *FLAGS, str(openmp), _processor())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    path = _own_folder(cache_home() / "compiled") / f"kernels-{key}.so"
    if not path.is_file():
        _compile(cxx, openmp, source, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailable(f"{path} cannot be loaded: {error}") from error


def _own_folder(folder: Path) -> Path:
    """The folder, created if needed; code is loaded from it, so it must be ours and closed to others."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise KernelsUnavailable(f"{folder} belongs to another user, and code would be loaded from it")
        if stat.S_IMODE(folder.stat().st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError as error:
        raise KernelsUnavailable(f"cannot use {folder}: {error.strerror}") from error
    return folder


def _compile(cxx: str, openmp: Path, source: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="graft-") as scratch:
        part, whole = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
        _run([cxx, *FLAGS, "-c", str(source), "-o", str(part)])
        # Linked against the OpenMP that torch has loaded: a second one would start threads of its own, which compete
        # with torch's for the cores.
        _run([cxx, "-shared", str(part), str(openmp), "-o", str(whole)])
        try:
            with atomic_write(path) as file:
                file.write(whole.read_bytes())
        except GraftError as error:
            raise KernelsUnavailable(str(error)) from error


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f"the C++ compiler {command[0]} cannot be run: {error}") from error
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise KernelsUnavailable(f"the C++ compiler {command[0]} failed: {reason.strip()}")
    return done.stdout


@cache
def _processor() -> str:
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    found = {line.split(":")[0].strip(): line for line in lines if ":" in line}
    return "\n".join(found.get(name, "") for name in ("vendor_id", "cpu family", "model", "flags", "Features"))


def _openmp() -> Path:
    """The OpenMP library that this process has loaded with torch."""
    torch.get_num_threads()
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    paths = sorted({line.split(maxsplit=5)[5] for line in lines if re.search(r"/lib(gomp|iomp5)[^/]*\.so", line)})
    if len(paths) != 1:
        raise KernelsUnavailable(f"torch has loaded {len(paths)} GNU-compatible OpenMP libraries, not one")
    return Path(paths[0])
