"""Packed weights: the values of the `gguf` package to the bit, and layers equal to those with dequantised weights."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import dequantize as gguf_dequantize

from graftlm.errors import InputError
from graftlm.methods import Method
from graftlm.methods.adapter import Adapter
from graftlm.methods.base import count_parameters, trainable
from graftlm.methods.bitfit import BitFit
from graftlm.methods.dora import DoRA
from graftlm.methods.ia3 import IA3
from graftlm.methods.lora import LoRA
from graftlm.methods.multi_lora import stack
from graftlm.models import CausalLM, clone_with_shared_weights
from graftlm.models import packed as packed_module
from graftlm.models.packed import FORMATS, HasWeight, PackedWeight, linear
from tiny import random_model, shape_of


def blocks_of(name: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Random blocks with finite scales: [rows, bytes]."""
    _, n = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
    if name in ("f16", "bf16"):
        values = torch.randn(rows, blocks, generator=torch.Generator().manual_seed(seed))
        return values.to(FORMATS[name].dtype).view(torch.uint8).numpy()
    raw = np.random.default_rng(seed).integers(0, 256, (rows, blocks, n), dtype=np.uint8)
    scale_at = {"q6_k": (208,), "q4_0": (0,), "q5_0": (0,), "q8_0": (0,)}.get(name, (0, 2))
    for at in scale_at:
        raw[..., at + 1] &= 0xBF  # a float16 exponent that is not all ones
    return raw.reshape(rows, blocks * n)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (7, 3), (64, 5)])
@pytest.mark.parametrize("compiled", [True, False])
def test_values_are_those_of_the_gguf_package(
    name: str, rows: int, blocks: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(packed_module, "_library", lambda: None)
    else:
        assert packed_module._library() is not None, "the tests need a C++ compiler"
    raw = blocks_of(name, rows, blocks)
    expected = torch.from_numpy(gguf_dequantize(raw, GGMLQuantizationType[name.upper()]))
    weight = PackedWeight(torch.from_numpy(raw), name)
    assert weight.shape == expected.shape == (rows, blocks * FORMATS[name].block_size)
    assert torch.equal(weight.dequantize().view(torch.int32), expected.view(torch.int32))
    picked = torch.tensor([rows - 1, 0, rows // 2])
    assert torch.equal(weight.dequantize(rows=picked), expected[picked])
    assert torch.equal(weight.dequantize(rows=slice(rows // 2, rows)), expected[rows // 2 :])
    out = torch.empty(expected.shape)
    assert weight.dequantize(out) is out and torch.equal(out, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", FORMATS)
def test_products_equal_those_of_the_dequantised_weights(name: str) -> None:
    threads = torch.get_num_threads()
    for outputs, blocks in ((1, 1), (33, 5), (70, 1000 // FORMATS[name].block_size + 1)):
        weight = PackedWeight(torch.from_numpy(blocks_of(name, outputs, blocks)), name)
        values, columns = weight.dequantize(), weight.shape[1]
        ones = torch.eye(columns)[:: max(1, columns // 40)]
        assert torch.equal(linear(ones, weight, None), ones @ values.T), "not the very weights"
        x, bias = (torch.randn(n, generator=torch.Generator().manual_seed(1)) for n in ((2, 10, columns), (outputs,)))
        whole, exact = linear(x, weight, bias), x.double() @ values.double().T + bias
        bound = 3e-7 * columns**0.5 * (x.double().abs() @ values.double().abs().T + bias.abs())
        assert whole.shape == exact.shape and ((whole - exact).abs() <= bound).all()
        for count in (1, 5, 6):  # a row's sums are the same in any company, with any number of threads
            assert torch.equal(linear(x[0, -count:], weight, bias), whole[0, -count:])
        torch.set_num_threads(3)
        assert torch.equal(linear(x, weight, bias), whole)
        torch.set_num_threads(threads)


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    for name, block in FORMATS.items():
        assert (block.block_size, block.block_bytes) == GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "bf16"])
def test_packing_rounds_as_the_gguf_package_does(name: str) -> None:
    from gguf import quantize

    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    expected = quantize(weight.numpy(), GGMLQuantizationType[name.upper()])
    assert np.array_equal(PackedWeight.pack(weight, name).data.numpy(), expected.view(np.uint8))


def test_what_cannot_be_packed_is_one_line() -> None:
    with pytest.raises(InputError, match="multiple of q8_0's 32"):
        PackedWeight.pack(torch.zeros(2, 33), "q8_0")
    with pytest.raises(InputError, match="cannot be packed"):
        PackedWeight.pack(torch.zeros(2, 256), "q4_k")
    with pytest.raises(InputError, match="no whole number of q4_0 blocks"):
        PackedWeight(torch.zeros(2, 19, dtype=torch.uint8), "q4_0")


def packed_copy(model: CausalLM, name: str) -> CausalLM:
    """The same model with all matrices packed; the originals get the values that the packed ones have."""
    new = copy.deepcopy(model)
    for module, own in zip(list(model.modules()), list(new.modules()), strict=True):
        if isinstance(module, HasWeight) and isinstance(own, HasWeight):
            packed = PackedWeight.pack(module.weight.data, name, module.weight.dtype)
            module.weight.data = packed.dequantize().to(module.weight.dtype)
            own.set_weight(packed)
    return new


def wide_model(kind: str, dtype: torch.dtype) -> CausalLM:
    """Every matrix has rows of whole blocks."""
    config = replace(shape_of(kind), intermediate_size=64)
    return random_model(config, std=0.2, dtype=dtype)


METHODS = [
    LoRA(rank=3, alpha=6.0, dropout=0.2, targets=("q", "k", "v", "o", "up", "down")),
    DoRA(rank=3, alpha=6.0, dropout=0.0),
    IA3(),
    Adapter(rank=3),
    BitFit(add_biases=True),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize(("kind", "fused"), [("gpt2", False), ("llama", True), ("llama-biased", True), ("neox", True)])
def test_methods_train_on_a_packed_base_as_on_the_dequantised_one(kind: str, method: Method, fused: bool) -> None:
    plain = wide_model(kind, torch.float32)
    packed = packed_copy(plain, "q8_0")
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    rows, targets, results = torch.tensor([3, 7, 12]), torch.tensor([1, 2, 3]), []
    for model in (plain, packed):
        method.install(model, torch.Generator().manual_seed(0))
        with torch.no_grad():
            for name, p in trainable(model).items():
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        model.use_fused_ops(fused)
        model.train()
        torch.manual_seed(1)
        h = model.hidden_states(ids).flatten(0, 1)
        loss = model.loss(h, rows, targets, torch.ones(3)) + model.log_probs(h, rows, targets).square().sum()
        loss.backward()
        results.append([loss, *(p.grad for p in trainable(model).values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not list(packed.buffers()) or all(not p.requires_grad for p in packed.buffers())
    assert count_parameters(plain) == count_parameters(packed)
    with torch.no_grad():
        a, b = plain.eval()(ids), packed.eval()(ids)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # the plain one is merged, the packed one never


def test_the_products_of_a_large_head_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_copy(wide_model("llama", torch.float32), "q8_0")
    rows, targets = torch.arange(5), torch.tensor([3, 60, 0, 9, 9])
    results = []
    for part in (1 << 24, 7 * 32):
        monkeypatch.setattr(packed_module, "HEAD_PART", part)
        h = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        loss = model.loss(h, rows, targets, torch.ones(5)) + model.log_probs(h, rows, targets).square().sum()
        loss.backward()
        results.append((loss.detach(), h.grad))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_adapters_are_served_together_on_a_packed_base() -> None:
    plain, method = wide_model("llama", torch.float64), LoRA(rank=3, alpha=6.0)
    packed, adapted = packed_copy(plain, "q8_0"), copy.deepcopy(plain)
    method.install(adapted, torch.Generator().manual_seed(0))
    state = {name: p + 0.1 for name, p in trainable(adapted).items()}
    results = []
    for base in (plain, packed):
        stacked = stack(base, {"a": (method, state)})
        with stacked.adapters_for(["a", None]):
            results.append(stacked.model(torch.arange(10).view(2, 5)))
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["q4_0", "bf16"])
def test_logits_are_equal_to_the_bit(name: str, dtype: torch.dtype) -> None:
    plain = wide_model("llama", dtype)
    packed = packed_copy(plain, name)
    ids = torch.arange(10)[None]
    assert packed.dtype == dtype
    for model in (packed, clone_with_shared_weights(packed), copy.deepcopy(packed)):
        assert torch.equal(model(ids), plain(ids))
