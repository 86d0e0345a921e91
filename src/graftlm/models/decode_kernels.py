"""A pass of a model in C++: the next tokens of each row, one or a whole prompt, from embedding to logits, in one call.

A decode step of plain PyTorch is some 40 small operations a layer, whose overhead exceeds their work; it needs weights
in the dtype of the arithmetic, and prompts padded to the same length. Here one call reads each weight once, as it is
stored, and multiplies in float32 (`decode_kernels.cpp`). A row's logits do not depend on the number of threads, nor on
the other rows but for rounding: a pass of few tokens adds up in another order than one of many.

| computed here | by the plain model instead |
|---|---|
| every other setting of the generic block (`LayerConfig`) | mixtures of experts, short convolutions |
| weights in float32, bfloat16 and float16, and packed ones | |
| a model that computes in float32 or bfloat16, on the CPU | float64 and float16; GPUs |
| LoRA, merged or not, one adapter or one for each row; other methods, merged | other methods, not merged |
| learned prefixes and shared prefixes | caches that are filled from rows of different lengths, other than the last |
| whole weights | weights sharded across ranks |
| Linux with a C++ compiler | elsewhere |

A model that computes in bfloat16 has its cache in bfloat16; what is between two caches is float32, so the logits are
closer to those of float32 than the plain model's.

Letters: B rows, N tokens of a pass, d hidden size, V vocabulary, r rank, S tokens.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.files.formats import is_sharded
from graftlm.models.base import CausalLM
from graftlm.models.cpp import KernelsUnavailable, load_library
from graftlm.models.decoder import DecoderBlock
from graftlm.models.layers import Attention, KVCache, LayerNorm, Linear, LowRankUpdate, RMSNorm
from graftlm.models.mlp import MLP
from graftlm.models.packed import Matrix, Weight, matrix
from graftlm.models.rope import rope_cos_sin

SOURCE = Path(__file__).with_name("decode_kernels.cpp")
CHUNK = 32
"""Columns are padded to a multiple of it."""
CACHE_DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "clamped_swiglu")
QK_NORMS = ("none", "head", "all")
_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


def _structure(name: str, **fields: type) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


# The structs of decode_kernels.cpp, field by field; Matrix is packed.py's.
_Norm = _structure("Norm", weight=_P, bias=_P, kind=_I, eps=_D)
_Linear = _structure("Linear", weight=Matrix, bias=_P, a=Matrix, b=Matrix, a_distance=_I, b_distance=_I)
_NORMS = ("norm1", "post_norm1", "norm2", "post_norm2", "q_norm", "k_norm")
_ROLES = ("q", "k", "v", "o", "gate", "up", "down")
_Layer = _structure(
    "Layer",
    **dict.fromkeys(_NORMS, _Norm),
    **dict.fromkeys(_ROLES, _Linear),
    sinks=_P,
    **dict.fromkeys(("rope", "window", "qk_norm", "activation", "gated", "parallel", "single_norm"), _I),
    **dict.fromkeys(("scale", "softcap", "residual"), _D),
)
_Model = _structure(
    "Model",
    layers=_P,
    **dict.fromkeys(("count", "width", "heads", "kv_heads", "head_dim", "inner", "wide_cache"), _I),
    norm=_Norm,
    head=_Linear,
    **dict.fromkeys(("logits_multiplier", "logits_softcap"), _D),
)
_Segment = _structure(
    "Segment",
    keys=_P,
    values=_P,
    **dict.fromkeys(("length", "text_stride", "head_stride", "token_stride"), _I),
)
_Step = _structure(
    "Step",
    **dict.fromkeys(
        ("embedded", "logits", "positions", "texts", "adapters", "last", "cosines", "sines", "segments"), _P
    ),
    **dict.fromkeys(("tokens", "outputs", "segment_count", "before", "adapted"), _I),
    scratch=_P,
)


@cache
def load_decode_kernels() -> ctypes.CDLL:
    """The library, compiled first if needed (some seconds). Raises KernelsUnavailable."""
    library = load_library(SOURCE)
    library.decode_scratch.argtypes, library.decode_scratch.restype = (_P, _I, _I, _I, _I), _I
    library.decode_step.argtypes, library.decode_step.restype = (_P, _P, _I, _I, _I), None
    library.decode_product.argtypes, library.decode_product.restype = (_P, _P, _I, _P, _I), None
    return library


class NotCovered(Exception):
    """This part of a model is computed by PyTorch; the message says which."""


def decode_program(model: CausalLM) -> "DecodeProgram | None":
    """The program of a model's decode step; None if PyTorch computes it, as the table above says."""
    if not model.fused or model.training or model.device.type != "cpu" or model.dtype not in CACHE_DTYPES:
        return None
    if any(is_sharded(p) for p in model.parameters()):
        return None
    try:
        return DecodeProgram(model)
    except (NotCovered, KernelsUnavailable):
        return None


class DecodeProgram:
    """The decode step of a model, whose weights must stay where they are as long as the program is used.

    Raises NotCovered, or KernelsUnavailable.
    """

    def __init__(self, model: CausalLM) -> None:
        self._model, self._kept = model, list[object]()  # memory that the structs point to
        self._update: LowRankUpdate | None = None
        self._ranks = 0
        config = model.config
        layers = (_Layer * len(model.blocks))(*map(self._layer, model.blocks))  # fewer where an estimate measures some
        self._struct = _Model(
            layers=self._address(layers),
            count=len(model.blocks),
            width=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            inner=config.intermediate_size,
            wide_cache=model.dtype == torch.float32,
            norm=self._norm(model.norm),
            head=_Linear(
                weight=self._matrix((model.embed if model.head is None else model.head).stored_weight),
                bias=None if model.head is None else self._floats(model.head.bias),
            ),
            logits_multiplier=config.logits_multiplier,
            logits_softcap=config.logits_softcap or 0,
        )
        self._library = load_decode_kernels()
        self._scratch = torch.empty(0)
        self._ropes: list[tuple[Tensor, Tensor]] = []

    def step(
        self,
        ids: Tensor,
        prefix: Sequence[KVCache],
        cache: KVCache,
        counts: Sequence[int] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The logits [B, V] in float32 after the next tokens of each row: counts [B] of the ids [N], or one of each.

        prefix: what all rows share. cache: the rows', in its first B; the new keys and values are written after each
        row's length. out: where the logits are written.
        """
        model, threads = self._model, torch.get_num_threads()
        segments = (*model.learned_prefix, *prefix, cache)
        assert cache.lengths is not None and all(segment.lengths is None for segment in segments[:-1])
        shared = sum(segment.size for segment in segments[:-1])
        last = (torch.tensor(counts) if counts is not None else torch.ones_like(ids)).cumsum(0) - 1
        rows = torch.searchsorted(last, torch.arange(len(ids)))
        first = torch.cat([torch.zeros(1, dtype=torch.long), last[:-1] + 1])
        positions = shared + (cache.lengths - first)[rows] + torch.arange(len(ids))
        context = int(positions.max()) + 1
        embedded = model.embed_tokens(ids[:, None], positions[:, None]).float().contiguous()
        logits = torch.empty(len(last), model.config.vocab_size) if out is None else out
        adapters = None if self._update is None else self._update.adapters(len(last))
        adapters = None if adapters is None else adapters[rows]
        needed = self._library.decode_scratch(ctypes.byref(self._struct), len(ids), self._ranks, context, threads)
        if needed > self._scratch.numel():
            self._scratch = torch.empty(needed)
        kept = [_segment(segment) for segment in segments]
        segment_array = (_Segment * len(kept))()
        for n, (struct, *_) in enumerate(kept):
            segment_array[n] = struct
        cos, sin = zip(*self._rope_tables(context), strict=True) if model.rope_configs else ((), ())
        step = _Step(
            embedded=embedded.data_ptr(),
            logits=logits.data_ptr(),
            positions=positions.data_ptr(),
            texts=rows.data_ptr(),
            adapters=None if adapters is None else adapters.data_ptr(),
            last=last.data_ptr(),
            cosines=ctypes.addressof(cosines := _pointers(cos)),
            sines=ctypes.addressof(sines := _pointers(sin)),
            segments=ctypes.addressof(segment_array),
            tokens=len(ids),
            outputs=len(last),
            segment_count=len(kept),
            before=shared,
            adapted=adapters is not None,
            scratch=self._scratch.data_ptr(),
        )
        self._library.decode_step(ctypes.byref(self._struct), ctypes.byref(step), self._ranks, context, threads)
        del cosines, sines, kept  # they must live until here
        return logits

    def _rope_tables(self, position: int) -> list[tuple[Tensor, Tensor]]:
        """Cosine and sine of positions 0 up to at least this one, for each kind of rotation."""
        if not self._ropes or len(self._ropes[0][0]) <= position:
            at, head_dim = torch.arange(1 << max(8, position.bit_length())), self._model.config.head_dim
            self._ropes = [rope_cos_sin(at, head_dim, rope, torch.float32) for rope in self._model.rope_configs]
        return self._ropes

    # The model's structs ----------------------------------------------------------------------------------------------

    def _layer(self, block: nn.Module) -> ctypes.Structure:
        assert isinstance(block, DecoderBlock)
        attention, mlp = block.attn, block.mlp
        if not isinstance(attention, Attention) or not isinstance(mlp, MLP):
            raise NotCovered(f"{type(attention).__name__} and {type(mlp).__name__}")
        layer, ropes = attention.layer, self._model.rope_configs
        norms = {"q_norm": attention.q_norm, "k_norm": attention.k_norm}
        norms |= {name: getattr(block, name) for name in _NORMS[:4]}
        linears = {role: getattr(attention, role) for role in _ROLES[:4]}
        linears |= {role: getattr(mlp, role) for role in _ROLES[4:]}
        for group in (("q", "k", "v"), ("gate", "up"), ("o",), ("down",)):
            self._ranks = max(self._ranks, sum(map(_padded_rank, map(linears.get, group))))
        return _Layer(
            **{name: self._norm(norm) for name, norm in norms.items()},
            **{role: self._linear(linear) for role, linear in linears.items()},
            sinks=self._floats(attention.sinks),
            rope=-1 if layer.rope is None else ropes.index(layer.rope),
            window=layer.window or 0,
            qk_norm=QK_NORMS.index(layer.qk_norm),
            activation=ACTIVATIONS.index(layer.activation),
            gated=layer.gated,
            parallel=layer.parallel,
            single_norm=layer.single_norm,
            scale=attention.head_dim**-0.5 if layer.attention_scale is None else layer.attention_scale,
            softcap=layer.attention_softcap or 0,
            residual=layer.residual_multiplier,
        )

    def _norm(self, norm: nn.Module | None) -> ctypes.Structure:
        if isinstance(norm, RMSNorm):
            return _Norm(weight=self._floats(norm.weight.float() + norm.offset), kind=1, eps=norm.eps)
        if isinstance(norm, LayerNorm):
            return _Norm(weight=self._floats(norm.weight), bias=self._floats(norm.bias), kind=2, eps=norm.eps)
        return _Norm()

    def _linear(self, linear: Linear | None) -> ctypes.Structure:
        if linear is None:
            return _Linear()
        weight, bias = self._matrix(linear.stored_weight), self._floats(linear.bias)
        if (update := _update_of(linear)) is None:
            return _Linear(weight=weight, bias=bias)
        self._update = update
        a, b = self._matrix(update.a[0]), self._matrix(update.b[0])
        distances = (t.stride(0) * t.element_size() for t in (update.a, update.b))
        self._kept += [update.a, update.b]
        return _Linear(weight, bias, a, b, *distances)

    def _matrix(self, weight: Weight) -> Matrix:
        """A matrix as it is stored; no copy."""
        self._kept.append(weight)
        if (found := matrix(weight)) is None:
            raise NotCovered(f"a weight in {weight.dtype}, or a transposed one")
        return found

    def _floats(self, t: Tensor | None) -> int | None:
        """The address of a vector in float32."""
        if t is None:
            return None
        self._kept.append(t := t.detach().float().contiguous())
        return t.data_ptr()

    def _address(self, array: ctypes.Array) -> int:
        self._kept.append(array)
        return ctypes.addressof(array)


def _update_of(linear: Linear) -> LowRankUpdate | None:
    """A linear's low-rank update; None without one. NotCovered if its forward pass is another."""
    updates = linear.low_rank_updates()
    if updates is None:
        raise NotCovered(type(linear).__name__)
    return updates[0] if updates else None


def _padded_rank(linear: Linear | None) -> int:
    update = None if linear is None else _update_of(linear)
    return 0 if update is None else -(-update.a.shape[1] // CHUNK) * CHUNK


def _segment(cache: KVCache) -> tuple[Any, ...]:
    """The struct of a cache, and the memory that it points to."""
    strides = [_strides(t) for t in (*cache.keys, *cache.values)]
    assert strides == [strides[0]] * len(strides) and not (cache.lengths is None and strides[0][0])
    keys, values = _pointers(cache.keys), _pointers(cache.values)
    segment = _Segment(ctypes.addressof(keys), ctypes.addressof(values), cache.size, *strides[0][:3])
    return segment, keys, values


def _strides(t: Tensor) -> list[int]:
    """The strides, 0 of dimensions of size 1."""
    return [stride if size > 1 else 0 for size, stride in zip(t.shape, t.stride(), strict=True)]


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (_P * len(tensors))(*(t.data_ptr() for t in tensors))
