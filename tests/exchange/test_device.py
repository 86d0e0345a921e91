"""The device and the number format are picked by what the machine does, and the reason is told."""

from pathlib import Path

import pytest
import torch

import graftlm
from graftlm.errors import InputError
from graftlm.exchange import load


@pytest.mark.parametrize(("float32", "bfloat16"), [(3.0, 1.0), (1.0, 2.0)])
def test_auto_takes_the_format_that_is_multiplied_faster(
    float32: float, bfloat16: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {torch.float32: float32, torch.bfloat16: bfloat16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(load, "_matmul_seconds", seconds.__getitem__)
    dtype, reason = load.pick_dtype("auto", torch.device("cpu"))
    assert dtype == min(seconds, key=seconds.__getitem__)
    assert f"{max(seconds.values()) / min(seconds.values()):.1f} times as fast" in reason


def test_auto_is_float32_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    dtype, reason = load.pick_dtype("auto", torch.device("cpu"))
    assert dtype == torch.float32 and "no native bfloat16" in reason


def test_the_probe_times_a_product_once() -> None:
    seconds = load._matmul_seconds(torch.float32, width=64, tries=2)
    assert seconds > 0 and load._matmul_seconds(torch.float32, width=64, tries=2) is seconds


def test_what_is_asked_for_is_not_second_guessed() -> None:
    assert load.pick_dtype("bfloat16", torch.device("cpu")) == (torch.bfloat16, "asked for")
    with pytest.raises(InputError, match="unknown --dtype 'int8'"):
        load.pick_dtype("int8", torch.device("cpu"))


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_a_gpu_without_bfloat16_gets_float16(
    native: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert load.pick_dtype("auto", torch.device("cuda"))[0] == expected


def test_float64_is_asked_of_no_device_that_may_have_none() -> None:
    """Apple's MPS has none, and there is none here to try: `exact` alone says where float64 is computed."""
    src = Path(graftlm.__file__).parent
    lines = [(path.name, line) for path in src.rglob("*.py") for line in path.read_text("utf-8").splitlines()]
    asked = [(name, line.strip()) for name, line in lines if ".double()" in line.replace(".cpu().double()", "")]
    assert [name for name, _ in asked] == ["load.py"], asked
    x = torch.ones(3, dtype=torch.bfloat16)
    assert load.to_float64(x).dtype == torch.float64 and load.to_float64(x).device == x.device
