"""Operations whose gradient is written out, because autograd's own would make more passes over memory and keep more.

    RMSNorm   w x / sqrt(mean(x^2) + eps)
    Rotate    rotary positions
    Gated     silu(g) u
    HeadLoss  sum of cross entropies behind the head

Each is tested against what autograd makes of the plain formula (tests/models/test_gradients.py).

Letters: N tokens, d width, H heads, D width of a head, V vocabulary, K targets.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RMSNorm(torch.autograd.Function):
    """RMSNorm with its gradient written out: a third of the passes over memory that autograd's own would make.

    With s = 1 / sqrt(mean(x^2) + eps) and n = s x:   dw = sum(g n),   dx = s (g w - n mean(g w n)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., d], [d] -> [..., d]. The statistics are float32 or wider."""
        exact = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        s = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        n = (x * s).to(x.dtype)
        ctx.save_for_backward(n, weight, s)
        return n * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The gradients of x and of the weight, where they are asked for."""
        (g,) = grads
        n, weight, s = ctx.saved_tensors
        gn = g * weight
        dx = dw = None
        if ctx.needs_input_grad[0]:
            mean = (gn * n).mean(dim=-1, keepdim=True, dtype=s.dtype)
            dx = torch.addcmul(gn, n, mean.to(n.dtype), value=-1).mul_(s.to(n.dtype))
        if ctx.needs_input_grad[1]:
            dw = (g * n).flatten(0, -2).sum(0)
        return dx, dw, None


class Rotate(torch.autograd.Function):
    """A rotation; its gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[..., H, D] by [..., 1, D/2] -> [..., H, D]."""
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """The gradient of x."""
        (g,) = grads
        cos, sin = ctx.saved_tensors
        return _rotated(g, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    x1, x2 = x[..., :half], x[..., half:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    torch.mul(x1, cos, out=y[..., :half]).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y[..., half:]).addcmul_(x1, sin)
    return y


class Gated(torch.autograd.Function):
    """silu(g) u (Shazeer 2020), which keeps g and u only.

    With s = sigmoid(g):   du = y s g,   dg = y u s (1 + g (1 - s))   for the gradient y of the result.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, u: Tensor) -> Tensor:
        """Two [..., d] -> [..., d]."""
        ctx.save_for_backward(g, u)
        return F.silu(g).mul_(u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of g and u."""
        (y,) = grads
        g, u = ctx.saved_tensors
        return torch.ops.aten.silu_backward(y * u, g), F.silu(g).mul_(y)


class HeadLoss(torch.autograd.Function):
    """sum_k w_k (logsumexp(W h_r) - (W h_r)_t) over K targets: row r = rows[k], token t = targets[k], w = weights[k].

    Some rows at a time, and the gradient at once: no [N, V] of logits, nor of anything else, is ever kept.

        dlogits_r = v_r softmax(W h_r) - sum over the row's k of w_k e_t,   v_r = the sum of the row's w_k
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, head: Tensor, rows: Tensor, targets: Tensor, weights: Tensor, chunk: int = 128
    ) -> Tensor:
        """h [N, d], head [V, d], rows, targets [K] int64, weights [K] float -> the sum, in float32 or wider."""
        need_h, need_head = ctx.needs_input_grad[:2]
        exact = torch.promote_types(h.dtype, torch.float32)
        w = head.to(h.dtype)
        total = torch.zeros((), dtype=exact, device=h.device)
        d_h = torch.empty_like(h) if need_h else None
        d_head = torch.zeros_like(head) if need_head else None
        row_weights = torch.zeros(len(h), dtype=exact, device=h.device).index_add_(0, rows, weights.to(exact))
        for start in range(0, len(h), chunk):
            here = slice(start, start + chunk)
            mine = (rows >= start) & (rows < start + chunk)
            r, t, weight = rows[mine] - start, targets[mine], weights[mine].to(exact)
            log_p = F.linear(h[here], w).to(exact).log_softmax(-1)
            total -= (log_p[r, t] * weight).sum()
            if d_h is None and d_head is None:
                continue
            d_logits = log_p.exp_().mul_(row_weights[here, None]).index_put_((r, t), -weight, accumulate=True)
            d_logits = d_logits.to(h.dtype)
            if d_h is not None:
                torch.mm(d_logits, w, out=d_h[here])
            if d_head is not None:
                d_head += d_logits.T @ h[here]
        ctx.save_for_backward(d_h, d_head)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of h and of the head, where they are asked for."""
        (g,) = grads
        d_h, d_head = ctx.saved_tensors
        scaled = (None if d is None else d * g.to(d.dtype) for d in (d_h, d_head))
        return *scaled, None, None, None, None
