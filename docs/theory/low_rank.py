"""Checks of low_rank.md on a LoRALinear of four inputs, three outputs and rank 2.

The gradients are our own layer's, written out by hand in methods/lora.py; the formulas' side uses plain products and
the gradient G of a whole weight by autograd.

Letters: W0 [out, in] frozen weight, A [r, in], B [out, r], s = alpha / r, G the gradient with respect to W0 + s B A.
"""

import random

import torch
import torch.nn.functional as F
from _equation import Row, drawn, equation, worst
from torch import Tensor

from graftlm.methods.lora import LoRALinear, mark_only_lora_as_trainable

IN, OUT, R, ALPHA = 4, 3, 2, 6.0
S = ALPHA / R
NO_EPSILON = 1e-30
"""Adam's epsilon where its formula is checked: negligible next to a gradient, but 0 / epsilon is 0."""

_rng = random.Random(1)
W0, A0, B1 = drawn(_rng, OUT, IN), drawn(_rng, R, IN), drawn(_rng, OUT, R)
X, TARGET = drawn(_rng, 5, IN), drawn(_rng, 5, OUT)


def layer(alpha: float = ALPHA, b: Tensor | None = None) -> LoRALinear:
    """The layer at its start, B = 0, or with this B."""
    made = LoRALinear(IN, OUT, bias=False, rank=R, alpha=alpha).double()
    with torch.no_grad():
        made.weight.copy_(W0)
        made.lora_A.copy_(A0)
        made.lora_B.copy_(torch.zeros(OUT, R) if b is None else b)
    mark_only_lora_as_trainable(made)
    return made


def loss(y: Tensor) -> Tensor:
    """Half the squared distance to the targets."""
    return 0.5 * (y - TARGET).square().sum()


def gradient_of_whole(weight: Tensor) -> Tensor:
    """G: the gradient of the loss with respect to a whole weight [out, in], by autograd."""
    leaf = weight.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(F.linear(X, leaf)), leaf)
    return g


def update(made: LoRALinear) -> Tensor:
    """(alpha / r) B A, currently."""
    return (made.scale * made.lora_B @ made.lora_A).detach()


def trained(optimizer: str, steps: int, alpha: float, lr_a: float, lr_b: float) -> LoRALinear:
    """The layer after `steps` steps of "Adam" or "SGD", A and B each at its own learning rate."""
    made = layer(alpha)
    groups = [{"params": [made.lora_A], "lr": lr_a}, {"params": [made.lora_B], "lr": lr_b}]
    how = torch.optim.SGD(groups) if optimizer == "SGD" else torch.optim.Adam(groups, eps=NO_EPSILON)
    for _ in range(steps):
        how.zero_grad()
        loss(made(X)).backward()
        how.step()
    return made


@equation("1.1", "LoRALinear", "formula")
def low_rank_update(sign: float = 1.0) -> list[Row]:
    """Our layer computes W0 x + (alpha / r) B A x, merged or not."""
    made, x = layer(b=B1), X[0]
    h = W0 @ x + sign * (ALPHA / R) * (B1 @ (A0 @ x))
    rows = [Row(f"$h_{i + 1}$", value.item(), h[i].item()) for i, value in enumerate(made.train()(x))]
    return [*rows, Row("$h_1$, merged", made.eval()(x)[0].item(), h[0].item())]


@equation("1.2", "LoRALinear's backward", "formula")
def gradients(b: float = 1.0, a: float = 1.0) -> list[Row]:
    """dL/dB = s G A^T and dL/dA = s B^T G; the latter is zero at the start, where B is."""
    made = layer(b=B1)
    loss(made(X)).backward()
    g = gradient_of_whole(W0 + S * B1 @ A0)
    d_b, d_a = b * S * g @ A0.T, a * S * B1.T @ g
    fresh = layer()
    loss(fresh(X)).backward()
    assert made.lora_A.grad is not None and made.lora_B.grad is not None and fresh.lora_A.grad is not None
    return [
        Row("$B$, first element", made.lora_B.grad[0, 0].item(), d_b[0, 0].item()),
        Row("$A$, first element", made.lora_A.grad[0, 0].item(), d_a[0, 0].item()),
        Row("$B$, largest difference of all elements", worst(made.lora_B.grad, d_b), 0.0),
        Row("$A$, largest difference of all elements", worst(made.lora_A.grad, d_a), 0.0),
        Row("$A$ at the start, largest element", fresh.lora_A.grad.abs().max().item(), 0.0),
    ]


@equation("1.3", "one step of SGD", "formula")
def first_step_of_sgd(sign: float = 1.0) -> list[Row]:
    """The weight's first step is -lr s^2 G A^T A: three times alpha is nine times the learning rate."""
    lr, c = 0.01, 3.0
    step = sign * -lr * S**2 * gradient_of_whole(W0) @ A0.T @ A0
    own = update(trained("SGD", 1, ALPHA, lr, lr))
    scaled = update(trained("SGD", 1, c * ALPHA, lr, lr))
    faster = update(trained("SGD", 1, ALPHA, c**2 * lr, c**2 * lr))
    return [
        Row("first element", own[0, 0].item(), step[0, 0].item()),
        Row("$3 \\alpha$, first element", scaled[0, 0].item(), 9 * step[0, 0].item()),
        Row("$9 \\eta$, first element", faster[0, 0].item(), 9 * step[0, 0].item()),
        Row("largest difference of all elements", worst(own, step), 0.0),
    ]


@equation("1.4", "one step of Adam", "formula")
def first_step_of_adam(sign: float = 1.0) -> list[Row]:
    """The weight's first step is -lr s sign(G A^T) A: three times alpha is three times the learning rate."""
    lr, c = 0.01, 3.0
    step = sign * -lr * S * torch.sign(gradient_of_whole(W0) @ A0.T) @ A0
    own = update(trained("Adam", 1, ALPHA, lr, lr))
    scaled = update(trained("Adam", 1, c * ALPHA, lr, lr))
    faster = update(trained("Adam", 1, ALPHA, c * lr, c * lr))
    return [
        Row("first element", own[0, 0].item(), step[0, 0].item()),
        Row("$3 \\alpha$, first element", scaled[0, 0].item(), 3 * step[0, 0].item()),
        Row("$3 \\eta$, first element", faster[0, 0].item(), 3 * step[0, 0].item()),
        Row("largest difference of all elements", worst(own, step), 0.0),
    ]


@equation("1.5", "$c \\alpha$", "$\\alpha$, and $B$ at its own learning rate")
def alpha_is_the_rate_of_b(power: float = 1.0) -> list[Row]:
    """For whole runs: c alpha is the same as c times B's rate under Adam, c^2 times under SGD, A's unchanged."""
    rows, gaps, c = [], [], 3.0
    for optimizer, lr, exponent in (("Adam", 0.01, 1.0), ("SGD", 0.001, 2.0)):
        for steps in (1, 50):
            scaled = update(trained(optimizer, steps, c * ALPHA, lr, lr))
            faster = update(trained(optimizer, steps, ALPHA, lr, c ** (power * exponent) * lr))
            what = f"{optimizer}, {steps} step{'s' * (steps > 1)}: first element of $\\Delta W$"
            rows.append(Row(what, scaled[0, 0].item(), faster[0, 0].item()))
            gaps.append(worst(scaled, faster))
    return [*rows, Row("all elements of these: largest difference", max(gaps), 0.0)]


@equation("1.6", "measured", "expected")
def where_it_ends(motion: float = 1.0) -> list[Row]:
    """The update is s B A_0 + s B (A - A_0); only the second part differs between c alpha and c lr."""
    rows, sums, c, lr = [], [], 3.0, 0.01
    for steps in (1, 10, 100):
        scaled, faster = trained("Adam", steps, c * ALPHA, lr, lr), trained("Adam", steps, ALPHA, c * lr, c * lr)
        b = scaled.scale * scaled.lora_B.detach()
        still, moved = b @ A0, motion * b @ (scaled.lora_A.detach() - A0)
        sums.append(worst(still + moved, update(scaled)))
        after, relation = f"{steps} step{'s' * (steps > 1)}", "=" if steps == 1 else ">"
        share = (moved.norm() / still.norm()).item()
        gap = ((update(scaled) - update(faster)).norm() / update(scaled).norm()).item()
        rows += [
            Row(f"{after}: size of the second term by the first's", share, 0.0, relation),
            Row(f"{after}: $c \\alpha$ against $c \\eta$, difference by size", gap, 0.0, relation),
        ]
    held = [update(trained("Adam", 100, x * ALPHA, 0.0, c / x * lr)) for x in (c, 1.0)]
    return [
        *rows,
        Row("both terms together less $\\Delta W$, largest", max(sums), 0.0),
        Row("100 steps with $A$ held: $c \\alpha$ against $c \\eta$, largest difference", worst(*held), 0.0),
    ]
