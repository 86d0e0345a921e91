"""Compiled kernels give torch's results to rounding, for every shape; they are loaded from a folder that is ours."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from graftlm.methods import LoRA
from graftlm.methods.base import trainable
from graftlm.models import cpp
from graftlm.models.cpp import KernelsUnavailable
from graftlm.models.fused_ops import TORCH, CppKernels, DropoutMask, load_kernels
from tiny import FAMILIES, model_of

# How far apart two results may be, for values of about one.
CLOSE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 4e-2}
SHAPES = [(3, 8), (2, 5, 7), (600, 33), (1, 1), (40, 576)]


@pytest.fixture(scope="module")
def compiled() -> CppKernels:
    return load_kernels()


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(got: object, want: object, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got, want, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(compiled: CppKernels, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, g, w = (random(*s, dtype=dtype, seed=i) for i, s in enumerate((shape, shape, shape[-1:])))
    y, s = compiled.norm(x, w, 1e-5)
    same((y, s), TORCH.norm(x, w, 1e-5), dtype)
    same(compiled.rms_norm_backward(g, x, w, s), TORCH.rms_norm_backward(g, x, w, s), dtype)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated(compiled: CppKernels, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    y, g, u = (random(*shape, dtype=dtype, seed=i) for i in range(3))
    same(compiled.silu_mul_backward(y, 9 * g, u), TORCH.silu_mul_backward(y, 9 * g, u), dtype)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("table", [(5, 1, 4), (2, 5, 1, 4), (1, 5, 1, 4)])
def test_rotate(compiled: CppKernels, table: tuple[int, ...], sign: int, dtype: torch.dtype) -> None:
    x, cos, sin = random(2, 5, 3, 8, dtype=dtype), *(random(*table, dtype=dtype, seed=i) for i in (1, 2))
    same(compiled.apply_rotary_emb(x, cos, sin, sign), TORCH.apply_rotary_emb(x, cos, sin, sign), dtype)
    x, cos, sin = x.flatten(0, 1), *(t.expand(2, 5, 1, 4).flatten(0, 1) for t in (cos, sin))
    same(compiled.apply_rotary_emb(x, cos, sin, sign), TORCH.apply_rotary_emb(x, cos, sin, sign), dtype)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("n", [1, 3, 4, 511, 512, 513, 20_001])
def test_masks_are_the_same_to_the_element(compiled: CppKernels, n: int, dtype: torch.dtype) -> None:
    x = random(n, dtype=dtype) + 10
    for seed, below in ((0, 3277), (2**62, 60_000), (-(2**62), 1)):
        assert torch.equal(
            compiled.apply_dropout_mask(x, DropoutMask(seed, below)),
            TORCH.apply_dropout_mask(x, DropoutMask(seed, below)),
        )


def test_what_is_not_contiguous(compiled: CppKernels) -> None:
    x, g = (random(9, 40, dtype=torch.float64, seed=i).T for i in (0, 1))
    w = random(18, dtype=torch.float64)[::2]
    y, s = compiled.norm(x, w, 1e-5)
    same((y, s), TORCH.norm(x, w, 1e-5), torch.float64)
    same(compiled.rms_norm_backward(g, x, w, s), TORCH.rms_norm_backward(g, x, w, s), torch.float64)
    same(compiled.silu_mul_backward(g, x, g), TORCH.silu_mul_backward(g, x, g), torch.float64)
    assert torch.equal(
        compiled.apply_dropout_mask(x, DropoutMask(5, 9000)), TORCH.apply_dropout_mask(x, DropoutMask(5, 9000))
    )
    q, cos = random(2, 3, 5, 8, dtype=torch.float64).transpose(1, 2), random(5, 1, 4, dtype=torch.float64)
    same(compiled.apply_rotary_emb(q, cos, cos), TORCH.apply_rotary_emb(q, cos, cos), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_stay_visible(compiled: CppKernels, dtype: torch.dtype) -> None:
    one = torch.ones(4, dtype=dtype)
    for value in (float("nan"), float("inf"), float("-inf")):
        x = torch.tensor([[1.0, value, 2.0, 3.0]], dtype=dtype)
        y, s = compiled.norm(x, one, 1e-5)
        assert not y.isfinite().all()
        assert not compiled.rms_norm_backward(torch.ones_like(x), x, one, s).isfinite().all()
        assert not compiled.silu_mul_backward(x, torch.ones_like(x), torch.ones_like(x))[0].isfinite().all()
        assert not compiled.apply_dropout_mask(x, DropoutMask(0, 1)).isfinite().all()
    # The sigmoid's ends: the gradient is 0 far below, that of the identity far above.
    extreme, one = torch.tensor([-1e4, -100.0, 100.0, 1e4], dtype=dtype), torch.ones(4, dtype=dtype)
    dg, du = compiled.silu_mul_backward(one, extreme, one)
    torch.testing.assert_close(dg, torch.tensor([0.0, 0, 1, 1], dtype=dtype), rtol=0, atol=1e-30)
    torch.testing.assert_close(du, extreme.clamp(min=0), rtol=0, atol=1e-30)


def test_other_formats_and_devices_go_torchs_way(compiled: CppKernels) -> None:
    x, w = random(3, 8, dtype=torch.float16), random(8, dtype=torch.float16, seed=1)
    for got, want in zip(compiled.norm(x, w, 1e-5), TORCH.norm(x, w, 1e-5), strict=True):
        assert torch.equal(got, want)
    assert compiled.silu_mul_backward(*(torch.empty(3, 8, device="meta") for _ in range(3)))[0].device.type == "meta"
    assert compiled.apply_dropout_mask(x, DropoutMask(1, 9)).dtype == torch.float16
    table = torch.ones(3, 1, 4, dtype=torch.float16)
    assert torch.equal(
        compiled.apply_rotary_emb(x[:, None], table, table), TORCH.apply_rotary_emb(x[:, None], table, table)
    )


def test_results_do_not_depend_on_the_number_of_threads(compiled: CppKernels) -> None:
    x, g, w = (random(*s, dtype=torch.float32, seed=i) for i, s in enumerate(((300, 100), (300, 100), (100,))))
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            y, s = compiled.norm(x, w, 1e-5)
            more = (
                compiled.rms_norm_backward(g, x, w, s),
                *compiled.silu_mul_backward(g, x, x),
                compiled.apply_dropout_mask(x, DropoutMask(3, 9000)),
            )
            results.append([y, s, *more])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("trained", ["lora", "all"])
def test_a_models_gradients_equal_the_plain_way(compiled: CppKernels, kind: str, trained: str) -> None:
    model, ids = model_of(kind), torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(1))
    if trained == "lora":
        LoRA(rank=3, alpha=6.0, dropout=0.3).install(model, torch.Generator().manual_seed(1))
        for name, p in trainable(model).items():
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    rows, targets = torch.arange(36), ids.flatten().roll(-1)
    lead = torch.randint(0, 61, (1, 5), generator=torch.Generator().manual_seed(2))
    model.train()
    used: set[str] = set()

    def gradients() -> list[Tensor]:
        torch.manual_seed(7)  # the same dropout masks
        _, h = model.forward_shared_prefix(lead, ids)
        loss = model.loss(h.flatten(0, 1), rows, targets, torch.ones(36))
        return [loss.detach(), *torch.autograd.grad(loss, list(trainable(model).values()))]

    model.use_fused_ops(False)
    want = gradients()
    model.use_fused_ops(True)
    model.set_kernels(_Watched(compiled, used))
    got = gradients()
    all_kernels = {"norm", "rms_norm_backward", "apply_rotary_emb", "silu_mul_backward"}
    expected = {"gpt2": set[str](), "neox": {"apply_rotary_emb"}}.get(kind, all_kernels)
    assert used == expected | ({"apply_dropout_mask"} if trained == "lora" else set())
    norm = sum(g.norm().item() ** 2 for g in want[1:]) ** 0.5
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-9 * norm
    # Evaluation goes torch's way: what a run reports is what `graft evaluate` finds.
    used.clear()
    model.eval()(ids)
    assert not used


KERNELS = ("norm", "rms_norm_backward", "apply_rotary_emb", "silu_mul_backward", "apply_dropout_mask")


class _Watched:
    """Kernels that write down which of them are called."""

    def __init__(self, kernels: CppKernels, used: set[str]) -> None:
        self._kernels, self._used = kernels, used

    def __getattr__(self, name: str) -> Callable[..., object]:
        if name in KERNELS:
            self._used.add(name)
        method: Callable[..., object] = getattr(self._kernels, name)
        return method


# Where they come from


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"


def test_they_are_compiled_once_into_a_folder_of_the_users_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_kernels()
    (file,) = (home / "compiled").iterdir()
    assert file.name.startswith("kernels-") and stat.S_IMODE((home / "compiled").stat().st_mode) == 0o700
    (home / "compiled").chmod(0o777)
    monkeypatch.setattr(cpp, "_compile", None)  # not called again
    load_kernels()
    assert stat.S_IMODE((home / "compiled").stat().st_mode) == 0o700
    monkeypatch.setattr(cpp, "FLAGS", (*cpp.FLAGS, "-g"))
    with pytest.raises(TypeError):  # another flag is another file
        load_kernels()


def test_a_folder_of_somebody_else_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "compiled").mkdir(parents=True)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(KernelsUnavailable, match="belongs to another user, and code would be loaded from it"):
        load_kernels()


def test_a_file_that_is_no_library_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "_compile", lambda cxx, openmp, source, path: path.write_bytes(b"nothing"))
    with pytest.raises(KernelsUnavailable, match=r"kernels-.*\.so cannot be loaded: "):
        load_kernels()


def test_no_compiler_and_one_that_fails(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelsUnavailable, match=r"^no C\+\+ compiler is found \(no-such-compiler\)$"):
        load_kernels()
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\necho "x.cpp:1: error: no" >&2; exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(KernelsUnavailable, match=r"^the C\+\+ compiler .*/broken failed: x\.cpp:1: error: no$"):
        load_kernels()
    assert not list((home / "compiled").iterdir())
    broken.chmod(0o755)
    broken.write_text("not a program")
    with pytest.raises(KernelsUnavailable, match="cannot be run: "):
        load_kernels()


@pytest.mark.parametrize("changed", ["n.h", "n.cpp"])
def test_a_changed_source_or_header_is_compiled_again(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path / "home"))
    source = tmp_path / "n.cpp"
    (tmp_path / "n.h").write_text("#define IN_HEADER 10\n")
    source.write_text('#include "n.h"\nextern "C" int n() { return IN_HEADER + 1; }\n')
    assert cpp.load_library(source).n() == 11
    text = (tmp_path / changed).read_text()
    (tmp_path / changed).write_text(text.replace("IN_HEADER 10", "IN_HEADER 20").replace("+ 1", "+ 2"))
    assert cpp.load_library(source).n() == {"n.h": 21, "n.cpp": 12}[changed]
