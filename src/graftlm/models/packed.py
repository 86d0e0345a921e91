"""Frozen weights that stay packed in memory and are dequantised where they are used.

Packed is: as blocks of a GGUF file, or in 16 bits while the arithmetic is float32. In training, a layer's weight is
dequantised into a buffer that all layers share, once in the forward and once in the backward pass; it has no gradient
of its own (QLoRA, Dettmers et al. 2023, arXiv:2305.14314). The values are, to the bit, those that the `gguf` package's
`dequantize` gives, so a packed base computes what the dequantised one computes. Without gradient, products in float32
are `packed.cpp`'s, which needs no buffer and differs by rounding.

To add a storage format is one entry of `FORMATS`; blocks.h has them for C++.

Letters: N blocks; R rows (outputs) and C columns (inputs) of a weight.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.models.cpp import KernelsUnavailable, load_library

AT_A_TIME = 1 << 20
"""Values that are dequantised at a time, where temporary tensors are several times as large as the result."""
HEAD_PART = 1 << 24
"""Values of a head that are dequantised at a time: all of a large vocabulary's would take more than a layer's weights
do. Its products are then summed part by part, so they equal the dense ones up to rounding."""


@dataclass(frozen=True)
class BlockFormat:
    """How values are stored: blocks of `block_bytes` bytes for `block_size` values."""

    block_size: int
    block_bytes: int
    unpack: Callable[[Tensor], Tensor]
    """[N, block_bytes] uint8 -> [N, block_size] float32."""
    dtype: torch.dtype | None = None
    """Set if a value is stored as this torch dtype."""


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at this byte of each block, as float32: [N, 1]."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _bits(packed: Tensor, width: int) -> Tensor:
    """[..., B] bytes -> [..., 8 / width, B] numbers of `width` bits, the lowest bits first."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return (packed[..., None, :] >> shifts[:, None]) & ((1 << width) - 1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """The 32 bits that start at this byte of each block, times 16: [N, 32]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return (((blocks[:, at : at + 4, None] >> shifts) & 1) << 4).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_bits(blocks[:, 2:], 4).flatten(1).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _bits(blocks[:, 4:], 4).flatten(1).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * ((_bits(blocks[:, 6:], 4).flatten(1) | _fifth_bits(blocks, 2)).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    quants = _bits(blocks[:, 8:], 4).flatten(1) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * quants.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].view(torch.int8).float()


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and minima of the 8 sub-blocks of Q4_K and Q5_K, in 6 bits each: two [N, 8, 1] float32."""
    low, minima, high = blocks[:, 4:16].unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([low & 0x3F, (high & 0x0F) | ((low >> 2) & 0x30)], dim=1)
    minima = torch.cat([minima & 0x3F, (high >> 4) | ((minima >> 2) & 0x30)], dim=1)
    return (_half(blocks, 0) * scales.float())[..., None], (_half(blocks, 2) * minima.float())[..., None]


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _k_scales(blocks)
    quants = _bits(blocks[:, 16:].unflatten(1, (4, 32)), 4).flatten(1, 2)
    return (scales * quants.float() - minima).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _k_scales(blocks)
    quants = _bits(blocks[:, 48:].unflatten(1, (4, 32)), 4).flatten(1, 2) | (_bits(blocks[:, 16:48], 1) << 4)
    return (scales * quants.float() - minima).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _bits(blocks[:, :128].unflatten(1, (2, 64)), 4).reshape(-1, 256)
    high = _bits(blocks[:, 128:192].unflatten(1, (2, 32)), 2).reshape(-1, 256)
    scales = (_half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float())[..., None]
    return (scales * ((low | (high << 4)).float() - 32).unflatten(1, (16, 16))).flatten(1)


FORMATS: dict[str, BlockFormat] = {
    "f16": BlockFormat(1, 2, lambda b: b.view(torch.float16).float(), torch.float16),
    "bf16": BlockFormat(1, 2, lambda b: b.view(torch.bfloat16).float(), torch.bfloat16),
    "q4_0": BlockFormat(32, 18, _q4_0),
    "q4_1": BlockFormat(32, 20, _q4_1),
    "q5_0": BlockFormat(32, 22, _q5_0),
    "q5_1": BlockFormat(32, 24, _q5_1),
    "q8_0": BlockFormat(32, 34, _q8_0),
    "q4_k": BlockFormat(256, 144, _q4_k),
    "q5_k": BlockFormat(256, 176, _q5_k),
    "q6_k": BlockFormat(256, 210, _q6_k),
}
"""Name, as GGUF's in lower case -> format."""


class PackedWeight(nn.Module):
    """A frozen weight [R, C] stored as blocks; each row has blocks of its own."""

    data: Tensor
    """The blocks as they are in a GGUF file: uint8 [R, bytes of a row]. A buffer: moved with the model, not saved."""
    dtype: torch.dtype
    """Of the model's arithmetic, in which the weight is used."""

    def __init__(self, data: Tensor, format: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        assert data.dtype == torch.uint8 and data.dim() == 2 and format in FORMATS
        self.format, self.blocks, self.dtype = format, FORMATS[format], dtype
        if data.shape[1] % self.blocks.block_bytes:
            raise InputError(f"a row of {data.shape[1]} bytes is no whole number of {format} blocks: fetch it again")
        self.register_buffer("data", data.contiguous(), persistent=False)

    @classmethod
    def pack(cls, weight: Tensor, format: str, dtype: torch.dtype = torch.float32) -> "PackedWeight":
        """A weight [R, C] rounded to a format. Raises InputError if the `gguf` package cannot, or C is no multiple."""
        if (stored := FORMATS[format].dtype) is not None:
            return cls(weight.to(stored, copy=True).contiguous().view(torch.uint8), format, dtype)
        from gguf import GGMLQuantizationType, quantize

        if weight.shape[1] % FORMATS[format].block_size:
            size = FORMATS[format].block_size
            raise InputError(f"rows of {weight.shape[1]} values are no multiple of {format}'s {size}")
        try:
            blocks = quantize(weight.float().cpu().numpy(), GGMLQuantizationType[format.upper()])
        except NotImplementedError:
            raise InputError(f"{format}: is read from GGUF files, but weights cannot be packed to it") from None
        return cls(torch.from_numpy(blocks).to(weight.device), format, dtype)

    @property
    def shape(self) -> torch.Size:
        """[R, C]."""
        return torch.Size([self.data.shape[0], self.data.shape[1] // self.blocks.block_bytes * self.blocks.block_size])

    @property
    def device(self) -> torch.device:
        """Where the blocks are."""
        return self.data.device

    def numel(self) -> int:
        """R C."""
        return self.shape.numel()

    @torch.no_grad()
    def dequantize(self, out: Tensor | None = None, rows: slice | Tensor | None = None) -> Tensor:
        """The values of these rows (a slice or indices; None: all) in float32: [R or fewer, C], written to `out`."""
        data = self.data if rows is None else self.data[rows]
        if out is None:
            out = torch.empty(data.shape[0], self.shape[1], device=data.device)
        assert out.shape == (data.shape[0], self.shape[1]) and out.dtype == torch.float32 and out.is_contiguous()
        if self.blocks.dtype is not None:
            return out.copy_(data.view(self.blocks.dtype))
        if (kernels := _kernels(self)) is not None:
            library, struct = kernels
            struct.data, struct.rows = data.data_ptr(), len(data)
            library.packed_dequantize(ctypes.byref(struct), out.data_ptr())
            return out
        step = max(1, AT_A_TIME // max(1, self.shape[1]))
        for start in range(0, len(data), step):
            part = self.blocks.unpack(data[start : start + step].reshape(-1, self.blocks.block_bytes))
            out[start : start + step] = part.view(-1, self.shape[1])
        return out

    @torch.no_grad()
    def in_buffer(self, dtype: torch.dtype) -> Tensor:
        """All values in this dtype, in a buffer that the next call overwrites: use it up before."""
        if self.blocks.dtype == dtype:
            return self.data.view(dtype)
        values = self.dequantize(_buffer(self.shape, torch.float32, self.device))
        return values if dtype == torch.float32 else _buffer(self.shape, dtype, self.device).copy_(values)

    def parts(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and their values in this dtype, at most `HEAD_PART` at a time, in a buffer that the next overwrite."""
        step = max(1, HEAD_PART // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = slice(start, min(start + step, self.shape[0]))
            shape = torch.Size([rows.stop - start, self.shape[1]])
            values = self.dequantize(_buffer(shape, torch.float32, self.device), rows)
            yield rows, values.to(dtype)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.shape[0]}, {self.shape[1]}, {self.format}"


Weight = Tensor | PackedWeight
CPP_FORMATS = ("f32", "bf16", "f16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k")
"""The formats of blocks.h, in its order."""
CPP_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class HasWeight(nn.Module):
    """A module with a weight that may be packed: then `weight` is None."""

    weight: Tensor

    @property
    def packed(self) -> PackedWeight | None:
        """The packed weight; None if it is not packed."""
        packed = self._modules.get("packed_weight")
        assert packed is None or isinstance(packed, PackedWeight)
        return packed

    @property
    def stored_weight(self) -> Weight:
        """The weight as it is in memory."""
        return self.weight if self.packed is None else self.packed

    def set_weight(self, weight: Weight) -> None:
        """Set a parameter, or a packed weight in its place. Neither is copied."""
        if isinstance(weight, PackedWeight):
            self.register_parameter("weight", None)
            self.add_module("packed_weight", weight)
        else:
            assert isinstance(weight, nn.Parameter)
            self.register_parameter("weight", weight)
            self._modules.pop("packed_weight", None)


class Matrix(ctypes.Structure):
    """A matrix as the C++ kernels take it (`Matrix` of blocks.h); it points to the weight's own memory."""

    _fields_: ClassVar = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("format", "rows", "columns", "row_bytes")),
    ]


def matrix(weight: Weight) -> Matrix | None:
    """The struct of a weight in memory of the CPU; None if the C++ kernels lack its format."""
    if isinstance(weight, PackedWeight):
        kind, data = weight.format, weight.data
    else:
        kind, data = CPP_DTYPES.get(weight.dtype, ""), weight
    if kind not in CPP_FORMATS or data.stride(1) != 1:
        return None
    return Matrix(data.data_ptr(), CPP_FORMATS.index(kind), *weight.shape, data.stride(0) * data.element_size())


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there is no compiler."""
    try:
        library = load_library(Path(__file__).with_name("packed.cpp"))
    except KernelsUnavailable:
        return None
    library.packed_dequantize.argtypes, library.packed_dequantize.restype = (ctypes.c_void_p, ctypes.c_void_p), None
    product = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)
    library.packed_product.argtypes, library.packed_product.restype = product, None
    return library


def has_kernels() -> bool:
    """Whether packed weights are multiplied in C++ here; without it they are slower than dense ones."""
    return _library() is not None


def _kernels(weight: PackedWeight) -> tuple[ctypes.CDLL, Matrix] | None:
    """The compiled kernels and the struct of this weight; None if torch's operations compute with it."""
    if weight.device.type != "cpu" or (library := _library()) is None or (struct := matrix(weight)) is None:
        return None
    return library, struct


def packed_weights(model: nn.Module) -> list[PackedWeight]:
    """Those of a model, each once."""
    return [module for module in model.modules() if isinstance(module, PackedWeight)]


_kept = threading.local()


def _buffer(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of this thread, reused by every call: a new tensor each time would cost more than dequantising."""
    buffers = vars(_kept).setdefault("buffers", {})
    if (found := buffers.get((dtype, device))) is None or found.numel() < shape.numel():
        buffers.pop((dtype, device), None)
        with torch.inference_mode(False):
            found = buffers[dtype, device] = torch.empty(shape.numel(), dtype=dtype, device=device)
    return found[: shape.numel()].view(shape)


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight in this dtype. A packed one is in a buffer that the next call overwrites: use it up before."""
    return weight.in_buffer(dtype) if isinstance(weight, PackedWeight) else weight.to(dtype)


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x W^T + b: [..., C] -> [..., R]; the bias has x's dtype."""
    if not isinstance(weight, PackedWeight):
        return F.linear(x, weight.to(x.dtype), bias)
    if torch.is_grad_enabled():
        y: Tensor = _PackedLinear.apply(x, weight, bias)
        return y
    if x.dtype != torch.float32 or (kernels := _kernels(weight)) is None:
        return F.linear(x, weight.in_buffer(x.dtype), bias)
    y, x, (library, struct) = torch.empty(*x.shape[:-1], weight.shape[0]), x.contiguous(), kernels
    library.packed_product(ctypes.byref(struct), x.data_ptr(), x.numel() // x.shape[-1], y.data_ptr())
    return y if bias is None else y.add_(bias)


def head_logits(h: Tensor, head: Weight) -> Tensor:
    """h W^T for the matrix of the head: [N, C] -> [N, R], without gradient."""
    if not isinstance(head, PackedWeight) or head.numel() <= HEAD_PART:
        return F.linear(h, dense(head, h.dtype))
    logits = torch.empty(len(h), head.shape[0], dtype=h.dtype, device=h.device)
    for rows, part in head.parts(h.dtype):
        logits[:, rows] = h @ part.T
    return logits


def head_backward(d_logits: Tensor, head: Weight, out: Tensor) -> None:
    """d_logits W for the matrix of the head, into `out`: [N, R] -> [N, C]."""
    if not isinstance(head, PackedWeight) or head.numel() <= HEAD_PART:
        torch.mm(d_logits, dense(head, d_logits.dtype), out=out)
        return
    out.zero_()
    for rows, part in head.parts(d_logits.dtype):
        out.addmm_(d_logits[:, rows], part)


class _PackedLinear(torch.autograd.Function):
    """x W^T + b, where the backward pass dequantises W again instead of keeping its values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.weight, ctx.dtype = weight, x.dtype
        return F.linear(x, weight.in_buffer(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        g = grads[0].reshape(-1, grads[0].shape[-1])
        need_x, _, need_bias = ctx.needs_input_grad
        d_x = (g @ ctx.weight.in_buffer(ctx.dtype)).view(*grads[0].shape[:-1], -1) if need_x else None
        return d_x, None, g.sum(0) if need_bias else None


def embedding(ids: Tensor, weight: Weight) -> Tensor:
    """The rows of a table: [...] int64 -> [..., C]; of a packed one in float32, and only these are dequantised."""
    if not isinstance(weight, PackedWeight):
        return F.embedding(ids, weight)
    return weight.dequantize(rows=ids.reshape(-1)).view(*ids.shape, -1)
