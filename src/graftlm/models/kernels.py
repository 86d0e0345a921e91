"""Compile kernels.cpp with this machine's C++ compiler, once per processor, and call it through ctypes.

It is plain C++ with a C interface: without torch's headers it compiles in about a second, where torch.compile takes
minutes for the same blocks. One object serves every shape, so longer batches do not recompile, and a resumed run
computes the same bits.

    GRAFT_HOME/compiled/kernels-KEY.so      KEY: hash of the source, the compiler, its flags and the processor

The objects are loaded as code, so their folder must belong to the user (mode 0700). Tensors on GPUs, and silu(g) u
forward, which PyTorch computes as fast, use `ReferenceKernels`.
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
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from graftlm.errors import GraftError
from graftlm.files.assets import cache_home
from graftlm.files.atomic import atomic_write
from graftlm.models.fused_ops import DropoutMask, ReferenceKernels

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
TIMEOUT_S = 120
_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
SIGNATURES = {
    "norm": (_P, _P, _I, _I, _D, _P, _P),
    "norm_back": (_P, _P, _P, _P, _I, _I, _P),
    "gated_back": (_P, _P, _P, _I, _P, _P),
    "rotate": (_P, _P, _P, _I, _I, _I, _I, _D, _P),
    "masked": (_P, _I, _I, _I, _P),
}
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


class KernelsUnavailable(GraftError):
    """The kernels cannot be compiled or loaded on this machine; the message says why."""


def compiler() -> str:
    """The C++ compiler's path: $CXX, else g++; raises KernelsUnavailable."""
    asked = os.environ.get("CXX") or "g++"
    found = shutil.which(asked)
    if not platform.system() == "Linux":
        raise KernelsUnavailable("kernels are compiled on Linux only")
    if found is None:
        raise KernelsUnavailable(f"no C++ compiler is found ({asked})")
    return found


def load_kernels() -> "CppKernels":
    """Load the kernels, compiled first if needed (about a second). Raises KernelsUnavailable."""
    cxx = compiler()
    version = _run([cxx, "--version"]).splitlines()[0]
    openmp = _openmp()
    parts = (SOURCE.read_text(encoding="utf-8"), version, *FLAGS, str(openmp), _processor())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    path = _own_folder(cache_home() / "compiled") / f"kernels-{key}.so"
    if not path.is_file():
        _compile(cxx, openmp, path)
    return CppKernels(path)


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


def _compile(cxx: str, openmp: Path, path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="graft-") as scratch:
        part, whole = Path(scratch) / "kernels.o", Path(scratch) / "kernels.so"
        _run([cxx, *FLAGS, "-c", str(SOURCE), "-o", str(part)])
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
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise KernelsUnavailable(f"the C++ compiler {command[0]} failed: {said.strip()}")
    return done.stdout


@cache
def _processor() -> str:
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    told = {line.split(":")[0].strip(): line for line in lines if ":" in line}
    return "\n".join(told.get(name, "") for name in ("vendor_id", "cpu family", "model", "flags", "Features"))


def _openmp() -> Path:
    """The OpenMP library that this process has loaded with torch."""
    torch.get_num_threads()
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    paths = sorted({line.split(maxsplit=5)[5] for line in lines if re.search(r"/lib(gomp|iomp5)[^/]*\.so", line)})
    if len(paths) != 1:
        raise KernelsUnavailable(f"torch has loaded {len(paths)} GNU-compatible OpenMP libraries, not one")
    return Path(paths[0])


class CppKernels(ReferenceKernels):
    """Each operation in one pass, equal to `ReferenceKernels` up to rounding, which handles unsupported tensors."""

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
            for name, dtype, signature in _entries():
                function = getattr(library, f"{name}_{dtype}")
                function.argtypes, function.restype = signature, None
        except (OSError, AttributeError) as error:
            raise KernelsUnavailable(f"{path} cannot be loaded: {error}") from error
        self._library = library

    def _call(self, name: str, x: Tensor, *arguments: Tensor | float) -> None:
        function = getattr(self._library, f"{name}_{DTYPES[x.dtype]}")
        function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """As in ReferenceKernels."""
        if not _takes(x, weight):
            return super().norm(x, weight, eps)
        x, weight, y = x.contiguous(), weight.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        s = torch.empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))
        self._call("norm", x, x, weight, s.numel(), x.shape[-1], eps, y, s)
        return y, s

    def rms_norm_backward(self, g: Tensor, x: Tensor, weight: Tensor, s: Tensor) -> Tensor:
        """As in ReferenceKernels."""
        if not _takes(g, x, weight):
            return super().rms_norm_backward(g, x, weight, s)
        g, x, weight, dx = g.contiguous(), x.contiguous(), weight.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        self._call("norm_back", x, g, x, weight, s, s.numel(), x.shape[-1], dx)
        return dx

    def silu_mul_backward(self, y: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """As in ReferenceKernels."""
        if not _takes(y, g, u):
            return super().silu_mul_backward(y, g, u)
        y, g, u = y.contiguous(), g.contiguous(), u.contiguous()
        dg, du = torch.empty(g.shape, dtype=g.dtype), torch.empty(g.shape, dtype=g.dtype)
        self._call("gated_back", g, y, g, u, g.numel(), dg, du)
        return dg, du

    def apply_rotary_emb(self, x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
        """As in ReferenceKernels."""
        heads, half, places = x.shape[-2], x.shape[-1] // 2, cos.numel() // max(1, cos.shape[-1])
        # The table is [..., 1, D/2] for the last axes of x's [..., H, D]: of all rows, or repeated for each sequence.
        if not _takes(x, cos, sin) or cos.shape[:-2] != x.shape[x.dim() - cos.dim() : -2]:
            return super().apply_rotary_emb(x, cos, sin, back)
        x, cos, sin, y = x.contiguous(), cos.contiguous(), sin.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        rows = x.numel() // (heads * 2 * half)
        self._call("rotate", x, x, cos, sin, rows, heads, half, places, -1.0 if back else 1.0, y)
        return y

    def apply_dropout_mask(self, x: Tensor, mask: DropoutMask) -> Tensor:
        """As in ReferenceKernels; the mask is computed again each time instead of being stored."""
        if not _takes(x):
            return super().apply_dropout_mask(x, mask)
        x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        self._call("masked", x, x, mask.seed, mask.threshold - 32768, x.numel(), y)
        return y


def _entries() -> Iterator[tuple[str, str, tuple[type, ...]]]:
    for name, signature in SIGNATURES.items():
        for dtype in DTYPES.values():
            yield name, dtype, signature


def _takes(*tensors: Tensor) -> bool:
    first = tensors[0].dtype
    return first in DTYPES and all(t.device.type == "cpu" and t.dtype == first for t in tensors)
