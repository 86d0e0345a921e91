"""Logits -> the next token of each row: the likeliest, or a sample by temperature, top_k and top_p.

What is unusual here: the sample of a row is a pure function of (seed, row, step) and of the row's own logits. Batch
size and the other rows have no say in it.

Letters: B rows, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from graftlm.errors import GraftError
from graftlm.exchange.device import to_float64

TOPK_FIRST = 512
"""Of so many tokens, the likeliest, top_p has mostly enough."""


def counter_based_uniform(seed: int, row: int, step: int) -> float:
    """A number in [0, 1) that depends on nothing else: no state, no device, the same on every machine."""
    digest = blake2b(f"{seed} {row} {step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53  # the 53 bits that a float keeps


def sample_tokens(
    logits: Tensor, u: Sequence[float], temperature: float, top_k: int = 0, top_p: float = 1.0
) -> list[int]:
    """One token for each row of logits [B, V], by inverting the cumulative distribution at u [B], each in [0, 1).

    The order is temperature, top_k, top_p. All arithmetic is in float32 and above, whatever the model computes in.
    """
    logits = logits.float()
    best = logits.max(dim=-1, keepdim=True).values
    _refuse_nan(best)
    # The largest is now 0, so that no temperature overflows; and below `tiny` a temperature would be 0 in float32.
    logits = (logits - best) / max(temperature, torch.finfo(torch.float32).tiny)
    ids = None
    if 0 < top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k, dim=-1)  # likeliest first
    weights = torch.softmax(logits, dim=-1)
    if top_p < 1 and ids is None:
        weights, ids = _likely(weights, top_p)
    weights = to_float64(weights)
    cumulative = weights.cumsum(dim=-1)
    if top_p < 1:
        # A token stays when those before it do not yet reach top_p; so the first always stays.
        weights = weights.masked_fill(cumulative - weights >= top_p, 0)
        cumulative = weights.cumsum(dim=-1)
    target = torch.tensor(u, dtype=weights.dtype, device=weights.device)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)  # the first whose cumulative weight exceeds it
    return (index if ids is None else ids.to(index.device).gather(-1, index))[:, 0].tolist()


def _likely(weights: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens first, at least as many as have top_p together: few, unless a row needs more.

    Sorting a whole vocabulary for a few tokens would take longer than a step of a small model.
    """
    few, ids = weights.topk(min(TOPK_FIRST, weights.shape[-1]), dim=-1)
    if bool((to_float64(few).sum(dim=-1) < top_p).any()):
        return weights.sort(dim=-1, descending=True, stable=True)
    return few, ids


def greedy(logits: Tensor) -> list[int]:
    """The likeliest token of each row of logits [B, V]."""
    best = logits.max(dim=-1)
    _refuse_nan(best.values)
    return best.indices.tolist()


def _refuse_nan(best: Tensor) -> None:
    if bool(best.isnan().any()):
        raise GraftError("the model's logits are NaN: its weights are broken, or overflow in this --dtype; try float32")
