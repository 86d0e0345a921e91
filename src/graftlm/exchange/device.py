"""Choose the device and the dtype, each with a reason, because both change what a run costs."""

import time

import torch

from graftlm.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device called auto, cpu, cuda, cuda:N or mps; an InputError if this machine does not have it."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        return torch.device(next(device for device, count in counts.items() if count))
    device, _, number = name.partition(":")
    if device not in counts or (number and not (device == "cuda" and number.isdigit())):
        raise InputError(f"unknown --device {name!r}: known are auto, cpu, cuda, cuda:N, mps")
    count = counts[device]
    if int(number or 0) >= count:
        raise InputError(f"--device {name}: this machine has {count or 'no'} {device} device(s); use --device auto")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of base and computation, and why; `auto` takes bfloat16 only if the hardware multiplies it faster."""
    if name != "auto":
        if name not in DTYPES:
            raise InputError(f"unknown --dtype {name!r}: known are auto, {', '.join(DTYPES)}")
        return DTYPES[name], "asked for"
    if device.type == "cuda":
        # Without including_emulation=False a T4, which has no bfloat16, would count.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU multiplies bfloat16 natively"
        return torch.float16, "this GPU has no native bfloat16; its loss is scaled"
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        if not any(flags.get(flag) for flag in ("amx_bf16", "amx_tile", "avx512_bf16")):
            return torch.float32, "this processor has no native bfloat16"
        # The instructions are not enough: some processors with avx512_bf16 multiply float32 twice as fast.
        gain = _matmul_seconds(torch.float32) / _matmul_seconds(torch.bfloat16)
        if gain >= 1:
            return torch.bfloat16, f"this processor multiplies it {gain:.1f} times as fast as float32"
        return torch.float32, f"this processor multiplies it {1 / gain:.1f} times as fast as bfloat16"
    return torch.float32, f"bfloat16 is not relied on for {device.type}"


SLOW = 0.01
"""Seconds of a 256 x 256 matrix product (3 GFLOP/s) above which no larger one is measured."""


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, width: int = 1024) -> float:
    """The best measured FLOP/s of square matrix products, a bound for this device and dtype.

    If the device emulates the dtype (any CPU float16, some bfloat16), small products show as much, and sooner.
    """
    small = _matmul_seconds(dtype, width // 4, tries=2, device=device)
    if small > SLOW:
        return 2 * (width // 4) ** 3 / small
    return 2 * width**3 / _matmul_seconds(dtype, width, tries=10, device=device)


def _matmul_seconds(dtype: torch.dtype, width: int = 512, tries: int = 5, device: torch.device | str = "cpu") -> float:
    """Wall seconds of a square matrix product: the shortest after one to warm up."""
    x = torch.ones(width, width, dtype=dtype, device=device)
    seconds = []
    for _ in range(tries + 1):
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        x @ x
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def to_float64(t: torch.Tensor) -> torch.Tensor:
    """In float64, for long sums; on the CPU if the device has no float64 (Apple's MPS)."""
    return (t.cpu() if t.device.type == "mps" else t).double()
