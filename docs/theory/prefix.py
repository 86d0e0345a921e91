"""Checks of prefix.md on one head: two prefix positions, three content tokens, five numbers a head.

The left side is our own attention (models/layers.py), which reads the prefix as a segment of the past. Its weights
are seen by giving it the rows of an identity as values: what it returns is then the weights themselves.

Letters: n prefix positions, T content tokens, d width of the head; q, k, v [T, d], P_k, P_v [n, d].
"""

import math
import random

import torch
from _equation import Row, drawn, equation, worst
from torch import Tensor

from graftlm.models.config import LayerConfig
from graftlm.models.layers import Dropout, KVCache, attention_masks, scaled_dot_product

N, T, D = 2, 3, 5
_rng = random.Random(2)
Q, K, V = (2 * drawn(_rng, T, D) for _ in range(3))
P_K, P_V = 2 * drawn(_rng, N, D), 2 * drawn(_rng, N, D)
LAST = T - 1
"""The last token's query, which sees all content."""


def head(prefix: bool, v: Tensor, p_v: Tensor) -> Tensor:
    """What our attention returns for every query, [T, D], with the prefix or without."""

    def batched(x: Tensor) -> Tensor:
        return x[None, None]  # one row, one key/value head

    past = [KVCache([batched(P_K)], [batched(p_v)])] if prefix else []
    pairs = [(segment.keys[0], segment.values[0]) for segment in past]
    mask = attention_masks((None,), past, N * prefix + torch.arange(T), Q.dtype)[None]
    parts = [*pairs, (batched(K), batched(v))]
    return scaled_dot_product(Q[None, :, None], parts, mask, LayerConfig(), Dropout())[0, :, 0]


def weights(prefix: bool) -> Tensor:
    """Our attention's weights, [T, n + T]: those on the prefix first, 0 without one."""
    one_hot = torch.eye(D, dtype=torch.float64)
    return head(prefix, one_hot[N:], one_hot[:N])


def scores(i: int, keys: Tensor) -> Tensor:
    """q_i k_j / sqrt(d) for each key."""
    return keys @ Q[i] / math.sqrt(D)


def share(i: int) -> Tensor:
    """lambda_i, the prefix's share of query i's weight; the query sees the content up to itself."""
    prefix, content = scores(i, P_K).exp().sum(), scores(i, K[: i + 1]).exp().sum()
    return prefix / (prefix + content)


@equation("2.1", "our attention", "formula")
def weight(sign: float = 1.0) -> list[Row]:
    """A~_ij = exp(q_i k~_j / sqrt d) over the sum of the same for prefix and content."""
    powers = (sign * scores(LAST, torch.cat([P_K, K]))).exp()
    a = weights(prefix=True)[LAST]
    names = [*(f"on the prefix's position {j + 1}" for j in range(N)), *(f"on token {j + 1}" for j in range(T))]
    return [Row(name, a[j].item(), (powers[j] / powers.sum()).item()) for j, name in enumerate(names)]


@equation("2.2", "$\\tilde A_{ij}$ of our attention", "$(1 - \\lambda_i) A_{ij}$")
def shrunk(sign: float = 1.0) -> list[Row]:
    """A~_ij = (1 - lambda_i) A_ij for every query and content token."""
    with_prefix, without = weights(prefix=True)[:, N:], weights(prefix=False)[:, N:]
    expected = torch.stack([(1 - sign * share(i)) * without[i] for i in range(T)])
    rows = [
        Row(f"query {i + 1} on token {j + 1}, $\\lambda = {share(i).item():.4f}$", with_prefix[i, j].item(), e.item())
        for i, j in ((0, 0), (1, 0), (1, 1), (2, 0), (2, 2))
        for e in [expected[i, j]]
    ]
    return [*rows, Row("largest difference of all", worst(with_prefix, expected), 0.0)]


@equation("2.3", "with the prefix", "$\\exp$ of the scores' difference")
def ratio(sign: float = 1.0) -> list[Row]:
    """A~_ij / A~_ik = exp(q_i (k_j - k_k) / sqrt d) = A_ij / A_ik."""
    a, plain, rows = weights(prefix=True)[LAST, N:], weights(prefix=False)[LAST, N:], []
    for j, k in ((0, 1), (0, 2), (1, 2)):
        right = math.exp(sign * (scores(LAST, K)[j] - scores(LAST, K)[k]).item())
        rows.append(Row(f"token {j + 1} to token {k + 1}", (a[j] / a[k]).item(), right))
        rows.append(Row("the same without the prefix", (plain[j] / plain[k]).item(), right))
    return rows


@equation("2.4", "our attention", "the mixture")
def mixture(sign: float = 1.0) -> list[Row]:
    """The head's output is a mixture of its output without the prefix and attention over the prefix alone."""
    with_prefix, without = head(True, V, P_V)[LAST], head(False, V, P_V)[LAST]
    over_prefix = torch.softmax(scores(LAST, P_K), dim=0) @ P_V
    mixed = (1 - share(LAST)) * without + sign * share(LAST) * over_prefix
    rows = [Row(f"output {i + 1}", with_prefix[i].item(), mixed[i].item()) for i in range(3)]
    return [*rows, Row("largest difference of all five", worst(with_prefix, mixed), 0.0)]
