"""Checks of in_context.md: the word problem, tasks inferred from examples, attention as a step, a step differentiated.

Letters: theta a task, x an observation, N examples (x_i, y_i) of a linear task, x_q the query, eta a step's size.
"""

import itertools
import math
import random

import torch
from _equation import Row, drawn, equation, worst
from torch import Tensor


@equation("5.1", "tried out", "formula")
def word_problem(sign: float = 1.0) -> list[Row]:
    """150 p + 100 (p + 5) = 4,500 cents gives p = (4,500 - 500) / 250."""
    right = [p for p in range(1, 46) if sum([p] * 150) + sum([p + 5] * 100) == 4500]
    return [
        Row("prices from 1 to 45 cents that make 45 dollars", len(right), 1),
        Row("the old price, cents", right[0], (4500 - sign * 500) / 250),
    ]


HEADS = (0.2, 0.5, 0.9)
"""Three tasks: coins, by how often they show heads."""
PRIOR = (0.5, 0.3, 0.2)
"""How often each is met in pretraining."""


def likelihood(text: tuple[int, ...], task: int) -> float:
    """p(text | theta): independent throws, 1 for heads."""
    return math.prod(HEADS[task] if x else 1 - HEADS[task] for x in text)


def frequency(text: tuple[int, ...]) -> float:
    """How often a pretraining text begins so: what a perfect next-token model has learned, tasks unnamed."""
    return sum(p * likelihood(text, task) for task, p in enumerate(PRIOR))


@equation("5.2", "the next-token model", "posterior over tasks")
def tasks_inferred(sign: float = 1.0) -> list[Row]:
    """p(x | prompt) = sum over tasks of p(x | theta) p(theta | prompt), the latter ~ p(theta) exp(log-likelihood)."""
    rows, gaps = [], []
    for n in range(6):
        for prompt in itertools.product((0, 1), repeat=n):
            left = frequency((*prompt, 1)) / frequency(prompt)
            unnormalised = [p * math.exp(sign * math.log(likelihood(prompt, t))) for t, p in enumerate(PRIOR)]
            right = sum(u * h for u, h in zip(unnormalised, HEADS, strict=True)) / sum(unnormalised)
            gaps.append(abs(left - right))
            if prompt in ((), (1,), (1, 1, 1), (1, 1, 1, 1, 1), (0, 0, 0)):
                shown = "".join("TH"[x] for x in prompt) or "nothing"
                rows.append(Row(f"heads after {shown}", left, right))
    return [*rows, Row(f"all {len(gaps)} prompts of up to 5: largest difference", max(gaps), 0.0)]


_rng = random.Random(5)
N, D, ETA = 6, 3, 0.3
W0, TRUE = drawn(_rng, D), drawn(_rng, D)
XS, QUERY = drawn(_rng, N, D), drawn(_rng, 3, D)
YS = XS @ TRUE


def squared(w: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Half the mean squared error of a linear model."""
    return 0.5 * (xs @ w - ys).square().mean()


def linear_attention(queries: Tensor, sign: float) -> Tensor:
    """One layer over tokens (x, y), as von Oswald et al. set it: keys and queries read x, values y - W0 x, no softmax.

    A query's token starts with the model's own guess in place of y; the layer adds to it.
    """
    read_x = torch.cat([torch.eye(D, dtype=torch.float64), torch.zeros(D, 1, dtype=torch.float64)], dim=1)
    read_error = torch.cat([-W0, torch.ones(1, dtype=torch.float64)])
    context = torch.cat([XS, YS[:, None]], dim=1)
    tokens = torch.cat([queries, (queries @ W0)[:, None]], dim=1)
    scores = (tokens @ read_x.T) @ (context @ read_x.T).T
    return tokens[:, -1] + sign * ETA / N * scores @ (context @ read_error)


@equation("5.3", "a step of gradient descent", "linear attention")
def attention_is_a_step(sign: float = 1.0) -> list[Row]:
    """f(x_q; W_1) = W_0 x_q + eta / N sum_i (y_i - W_0 x_i) (x_i . x_q)."""
    leaf = W0.clone().requires_grad_()
    (g,) = torch.autograd.grad(squared(leaf, XS, YS), leaf)
    left, right = QUERY @ (W0 - ETA * g), linear_attention(QUERY, sign)
    rows = [Row(f"prediction for query {i + 1}", left[i].item(), right[i].item()) for i in range(len(QUERY))]
    before, after = ((QUERY @ w - QUERY @ TRUE).square().mean().item() for w in (W0, W0 - ETA * g))
    return [*rows, Row("mean squared error after the step, and before", after, before, "<")]


@equation("5.4", "autograd through the step", "formula")
def meta_gradient(curvature: float = 1.0) -> list[Row]:
    """The gradient of L_query(theta - eta grad L_support(theta)) is (I - eta H) grad L_query at the new theta."""
    support, query = (XS[: N // 2], YS[: N // 2]), (XS[N // 2 :], YS[N // 2 :])
    theta = W0.clone().requires_grad_()
    (g,) = torch.autograd.grad(squared(theta, *support), theta, create_graph=True)
    adapted = theta - ETA * g
    (left,) = torch.autograd.grad(squared(adapted, *query), theta)
    hessian = support[0].T @ support[0] / len(support[0])
    leaf = adapted.detach().requires_grad_()
    (at_adapted,) = torch.autograd.grad(squared(leaf, *query), leaf)
    right = (torch.eye(D, dtype=torch.float64) - curvature * ETA * hessian) @ at_adapted
    rows = [Row(f"$\\theta_{i + 1}$", left[i].item(), right[i].item()) for i in range(D)]
    return [*rows, Row("largest difference", worst(left, right), 0.0)]
