"""Where to compute and in which number format, each with the reason, because both change what a run costs."""

import time

import torch

from graftlm.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device called auto, cpu, cuda, cuda:N or mps; an InputError if this machine does not have it."""
    if name == "auto":
        kinds = [("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())]
        return torch.device(next((kind for kind, there in kinds if there), "cpu"))
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not (kind == "cuda" and number.isdigit())):
        raise InputError(f"unknown --device {name!r}: known are auto, cpu, cuda, cuda:N, mps")
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(number or 0) >= there:
        raise InputError(f"--device {name}: this machine has {there or 'no'} {kind} device(s); use --device auto")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of base and arithmetic, and why; `auto` takes bfloat16 only where the hardware multiplies it faster."""
    if name != "auto":
        if name not in DTYPES:
            raise InputError(f"unknown --dtype {name!r}: known are auto, {', '.join(DTYPES)}")
        return DTYPES[name], "asked for"
    if device.type == "cuda":
        # Without including_emulation=False a T4, which has none, would be counted.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU multiplies bfloat16 natively"
        return torch.float16, "this GPU has no native bfloat16; its loss is scaled"
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        if not any(flags.get(flag) for flag in ("amx_bf16", "amx_tile", "avx512_bf16")):
            return torch.float32, "this processor has no native bfloat16"
        # Having the instructions is not enough: some processors with avx512_bf16 multiply float32 twice as fast.
        gain = _product_seconds(torch.float32) / _product_seconds(torch.bfloat16)
        if gain >= 1:
            return torch.bfloat16, f"this processor multiplies it {gain:.1f} times as fast as float32"
        return torch.float32, f"this processor multiplies it {1 / gain:.1f} times as fast as bfloat16"
    return torch.float32, f"bfloat16 is not relied on for {device.type}"


SLOW = 0.01
"""Seconds of a product of 256 x 256 above which there is no need of larger ones: 3 GFLOP/s."""


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, width: int = 1024) -> float:
    """FLOP/s of square matrix products: the best of some, what this device reaches at most in this dtype.

    Of a device that only emulates the dtype (any processor float16, some bfloat16) small ones tell as much, and soon.
    """
    small = _product_seconds(dtype, width // 4, tries=2, device=device)
    if small > SLOW:
        return 2 * (width // 4) ** 3 / small
    return 2 * width**3 / _product_seconds(dtype, width, tries=10, device=device)


def _product_seconds(dtype: torch.dtype, width: int = 512, tries: int = 5, device: torch.device | str = "cpu") -> float:
    """Wall seconds of one square matrix product: the best of some, behind one to warm up."""
    x = torch.ones(width, width, dtype=dtype, device=device)
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    seconds = []
    for _ in range(tries + 1):
        wait()
        began = time.perf_counter()
        x @ x
        wait()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def to_float64(t: torch.Tensor) -> torch.Tensor:
    """In float64, in which long sums lose nothing that matters; on the CPU where its device has none (Apple's MPS)."""
    return (t.cpu() if t.device.type == "mps" else t).double()
