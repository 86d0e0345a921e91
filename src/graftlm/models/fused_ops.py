"""Autograd functions with explicit gradients: fewer passes over memory and fewer saved activations than autograd's own.

    RMSNorm                  w x / sqrt(mean(x^2) + eps)
    ApplyRoPE                rotary position embedding
    SwiGLU                   silu(g) u
    FusedLinearCrossEntropy  head and sum of cross entropies
    FusedLinearLogProbs      head and log-probabilities, for losses that are not a sum of them

Each is tested against autograd on the plain formula (tests/models/test_fused_ops.py). Their element-wise parts are
`ReferenceKernels` in PyTorch, or in training `CppKernels`: kernels.cpp, which `cpp.py` compiles in a second, where
torch.compile takes minutes for the same blocks. One object serves every shape, so longer batches do not recompile, and
a resumed run computes the same bits. Tensors on GPUs, and silu(g) u forward, which PyTorch computes as fast, use
`ReferenceKernels`.

Letters: N tokens, d width, H heads, D width of a head, V vocabulary, K targets.
"""

import ctypes
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graftlm.models.cpp import load_library
from graftlm.models.packed import PackedWeight, Weight, embedding, head_backward, head_logits


@dataclass
class DropoutMask:
    """A dropout mask as a function of a seed and an element's index, so that it need not be stored.

    PyTorch's CPU kernel draws a 64-bit number for each element in sequence, which is slow; here the index is mixed with
    the seed (SplitMix64, Steele et al. 2014), and each 64 bits serve four elements. The probability is rounded to a
    multiple of 2^-16.
    """

    seed: int
    """Any 64 bits."""
    threshold: int
    """An element is dropped if its 16 random bits are below this."""
    _kept: Tensor | None = field(default=None, repr=False)

    @property
    def scale(self) -> float:
        """1 / (1 - p)."""
        return 65536 / (65536 - self.threshold)

    def keep_mask(self, x: Tensor) -> Tensor:
        """Bool, of x's shape and device; computed once."""
        if self._kept is None:
            places = torch.arange(1, (x.numel() + 3) // 4 + 1, device=x.device)
            z = places.mul_(_signed(0x9E3779B97F4A7C15)).add_(self.seed)
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
                # torch's shift is arithmetic; the mask makes it logical
                z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(factor))
            self._kept = z.view(torch.int16)[: x.numel()].view(x.shape) >= self.threshold - 32768
        return self._kept


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


class ReferenceKernels:
    """The element-wise parts of the fused operations, in PyTorch; `CppKernels` are faster."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """[..., d], [d] -> w x s and s = 1 / sqrt(mean(x^2) + eps), [..., 1] in float32 or wider."""
        exact = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        s = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        return (x * s).to(x.dtype).mul_(weight), s

    def rms_norm_backward(self, g: Tensor, x: Tensor, weight: Tensor, s: Tensor) -> Tensor:
        """dx = s (g w - x s^2 mean(g w x))."""
        gw = g * weight
        share = (gw * x).mean(dim=-1, keepdim=True, dtype=s.dtype) * s.square()
        return torch.addcmul(gw, x, share.to(x.dtype), value=-1).mul_(s.to(x.dtype))

    def apply_rotary_emb(self, x: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> Tensor:
        """Rotate (x_i, x_{i + D/2}) of [..., H, D] by the angles of [..., 1, D/2]; negated if `sign` is -1."""
        half = x.shape[-1] // 2
        x1, x2 = x[..., :half], x[..., half:]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        torch.mul(x1, cos, out=y[..., :half]).addcmul_(x2, sin, value=-sign)
        torch.mul(x2, cos, out=y[..., half:]).addcmul_(x1, sin, value=sign)
        return y

    def silu_mul(self, g: Tensor, u: Tensor) -> Tensor:
        """silu(g) u."""
        return F.silu(g).mul_(u)

    def silu_mul_backward(self, y: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """With s = sigmoid(g): dg = y u s (1 + g (1 - s)), du = y s g."""
        return torch.ops.aten.silu_backward(y * u, g), F.silu(g).mul_(y)

    def apply_dropout_mask(self, x: Tensor, mask: DropoutMask) -> Tensor:
        """x where dropout keeps it, 0 elsewhere; the same elements for the gradient."""
        return torch.where(mask.keep_mask(x), x, 0)


TORCH = ReferenceKernels()
CHUNK = 128
"""Rows whose logits are held at a time."""


class RMSNorm(torch.autograd.Function):
    """RMSNorm with an explicit gradient: a third of autograd's passes over memory.

    With s = 1 / sqrt(mean(x^2) + eps):   dw = sum(g x s),   dx = s (g w - x s^2 mean(g w x)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: ReferenceKernels = TORCH) -> Tensor:
        """[..., d], [d] -> [..., d]. The statistics are float32 or wider."""
        y, s = kernels.norm(x, weight, eps)
        ctx.save_for_backward(x, weight, s)
        ctx.kernels = kernels
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """The gradients of x and of the weight, if needed."""
        g, (x, weight, s) = grads[0], ctx.saved_tensors
        dx = ctx.kernels.rms_norm_backward(g, x, weight, s) if ctx.needs_input_grad[0] else None
        dw = (g * (x * s).to(x.dtype)).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return dx, dw, None, None


class ApplyRoPE(torch.autograd.Function):
    """A rotation; its gradient is the inverse rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, kernels: ReferenceKernels = TORCH) -> Tensor:
        """[..., H, D] by [..., 1, D/2] -> [..., H, D]."""
        ctx.save_for_backward(cos, sin)
        ctx.kernels = kernels
        return kernels.apply_rotary_emb(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient of x."""
        return ctx.kernels.apply_rotary_emb(grads[0], *ctx.saved_tensors, sign=-1), None, None, None


class SwiGLU(torch.autograd.Function):
    """silu(g) u (Shazeer 2020); saves only g and u."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor, kernels: ReferenceKernels = TORCH) -> Tensor:
        """Two [..., d] -> [..., d]."""
        ctx.save_for_backward(g, u)
        ctx.kernels = kernels
        return kernels.silu_mul(g, u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients of g and u."""
        return *ctx.kernels.silu_mul_backward(grads[0], *ctx.saved_tensors), None


class FusedLinearCrossEntropy(torch.autograd.Function):
    """sum_k w_k (logsumexp(W h_r) - (W h_r)_t) over K targets: row r = rows[k], token t = targets[k], w = weights[k].

    In chunks of `CHUNK` rows, with the gradient computed in the forward pass: no [N, V] tensor is ever stored.

        dlogits_r = v_r softmax(W h_r) - sum over the row's k of w_k e_t,   v_r = the sum of the row's w_k
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, head: Weight, rows: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """h [N, d], head [V, d], rows, targets [K] int64, weights [K] float -> the sum, in float32 or wider."""
        need_h, need_head = ctx.needs_input_grad[:2]
        exact = torch.promote_types(h.dtype, torch.float32)
        w = head if isinstance(head, PackedWeight) else head.to(h.dtype)
        total = torch.zeros((), dtype=exact, device=h.device)
        d_h = torch.empty_like(h) if need_h else None
        d_head = torch.zeros_like(head) if need_head and isinstance(head, Tensor) else None
        row_weights = torch.zeros(len(h), dtype=exact, device=h.device).index_add_(0, rows, weights.to(exact))
        for start in range(0, len(h), CHUNK):
            here, mine = slice(start, start + CHUNK), (rows >= start) & (rows < start + CHUNK)
            r, t, weight = rows[mine] - start, targets[mine], weights[mine].to(exact)
            log_p = head_logits(h[here], w).to(exact).log_softmax(-1)
            total -= (log_p[r, t] * weight).sum()
            if d_h is None and d_head is None:
                continue
            d_logits = (
                log_p.exp_().mul_(row_weights[here, None]).index_put_((r, t), -weight, accumulate=True).to(h.dtype)
            )
            if d_h is not None:
                head_backward(d_logits, w, d_h[here])
            if d_head is not None:
                d_head += d_logits.T @ h[here]
        ctx.save_for_backward(d_h, d_head)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of h and of the head, if needed."""
        return *(None if d is None else d * grads[0].to(d.dtype) for d in ctx.saved_tensors), None, None, None


class FusedLinearLogProbs(torch.autograd.Function):
    """(W h_r)_t - logsumexp(W h_r) for K targets: row r = rows[k], token t = targets[k]; for preference losses.

    The gradient g_k of each is known only in the backward pass, when the logits are gone. But the part that needs the
    logits is known in the forward pass, one vector of width d per row:

        dh_r = sum over the row's k of g_k (W_t - m_r),   m_r = W^T softmax(W h_r)

    As in `FusedLinearCrossEntropy`, no [N, V] tensor is stored and none is computed twice. Only if the head is trained
    are the logits computed again, by `FusedLinearCrossEntropy` with the weights -g.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, head: Weight, rows: Tensor, targets: Tensor) -> Tensor:
        """h [N, d], head [V, d], rows, targets [K] int64 -> [K], in float32 or wider."""
        exact = torch.promote_types(h.dtype, torch.float32)
        w = head if isinstance(head, PackedWeight) else head.to(h.dtype)
        found = torch.empty(len(rows), dtype=exact, device=h.device)
        means = torch.empty_like(h) if ctx.needs_input_grad[0] and not ctx.needs_input_grad[1] else None
        for start in range(0, len(h), CHUNK):
            here, mine = slice(start, start + CHUNK), (rows >= start) & (rows < start + CHUNK)
            log_p = head_logits(h[here], w).to(exact).log_softmax(-1)
            found[mine] = log_p[rows[mine] - start, targets[mine]]
            if means is not None:
                head_backward(log_p.exp_().to(h.dtype), w, means[here])
        ctx.packed = head if isinstance(head, PackedWeight) else None
        ctx.save_for_backward(h if means is None else None, None if ctx.packed else head, rows, targets, means)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of h and of the head, if needed."""
        g, (h, head, rows, targets, means) = grads[0], ctx.saved_tensors
        if means is not None:
            of_rows = torch.zeros(len(means), dtype=g.dtype, device=g.device).index_add_(0, rows, g)
            d_h = means.to(g.dtype) * -of_rows[:, None]
            d_h.index_add_(0, rows, embedding(targets, ctx.packed or head).to(g.dtype) * g[:, None])
            return d_h.to(means.dtype), None, None, None
        h, head = h.detach().requires_grad_(ctx.needs_input_grad[0]), head.detach().requires_grad_()
        with torch.enable_grad():
            surrogate = FusedLinearCrossEntropy.apply(h, head, rows, targets, -g)
        d = iter(torch.autograd.grad(surrogate, [t for t in (h, head) if t.requires_grad]))
        return *(next(d) if t.requires_grad else None for t in (h, head)), None, None


# The C++ kernels ------------------------------------------------------------------------------------------------------


SOURCE = Path(__file__).with_name("kernels.cpp")
_P, _I, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
SIGNATURES = {
    "norm": (_P, _P, _I, _I, _D, _P, _P),
    "norm_back": (_P, _P, _P, _P, _I, _I, _P),
    "gated_back": (_P, _P, _P, _I, _P, _P),
    "rotate": (_P, _P, _P, _I, _I, _I, _I, _D, _P),
    "masked": (_P, _I, _I, _I, _P),
}
DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


def load_kernels() -> "CppKernels":
    """Load the kernels, compiled first if needed (about a second). Raises KernelsUnavailable."""
    return CppKernels(load_library(SOURCE))


class CppKernels(ReferenceKernels):
    """Each operation in one pass, equal to `ReferenceKernels` up to rounding, which handles unsupported tensors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, dtype in product(SIGNATURES, DTYPES.values()):
            function = getattr(library, f"{name}_{dtype}")
            function.argtypes, function.restype = SIGNATURES[name], None
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

    def apply_rotary_emb(self, x: Tensor, cos: Tensor, sin: Tensor, sign: int = 1) -> Tensor:
        """As in ReferenceKernels."""
        heads, half, places = x.shape[-2], x.shape[-1] // 2, cos.numel() // max(1, cos.shape[-1])
        # The table is [..., 1, D/2] for the last axes of x's [..., H, D]: of all rows, or repeated for each sequence.
        if not _takes(x, cos, sin) or cos.shape[:-2] != x.shape[x.dim() - cos.dim() : -2]:
            return super().apply_rotary_emb(x, cos, sin, sign)
        x, cos, sin, y = x.contiguous(), cos.contiguous(), sin.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        rows = x.numel() // (heads * 2 * half)
        self._call("rotate", x, x, cos, sin, rows, heads, half, places, float(sign), y)
        return y

    def apply_dropout_mask(self, x: Tensor, mask: DropoutMask) -> Tensor:
        """As in ReferenceKernels; the mask is computed again each time instead of being stored."""
        if not _takes(x):
            return super().apply_dropout_mask(x, mask)
        x, y = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
        self._call("masked", x, x, mask.seed, mask.threshold - 32768, x.numel(), y)
        return y


def _takes(*tensors: Tensor) -> bool:
    first = tensors[0].dtype
    return first in DTYPES and all(t.device.type == "cpu" and t.dtype == first for t in tensors)
