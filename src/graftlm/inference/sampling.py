"""The sampling settings and the sampler: logits -> the next token of each row.

A sample is a pure function of (seed, row, step) and the row's logits: neither batch size nor other rows change it.

Letters: B rows, V tokens of the vocabulary, C candidate tokens.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from graftlm.config.flags import bounded, require
from graftlm.config.inference import SamplingFlags, parse_logit_bias
from graftlm.errors import GraftError, InputError
from graftlm.exchange.load import to_float64

TOPK_FIRST = 512
"""This many of the most likely tokens are usually enough for top_p."""
DEFAULT_MAX_NEW_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class SamplingParams(SamplingFlags):
    """How a prompt is continued; the names are vLLM's, except max_new_tokens. Raises InputError for a wrong value."""

    max_new_tokens: int | None = bounded(ge=1)
    """Maximum number of new tokens. Default: DEFAULT_MAX_NEW_TOKENS, or what the caller says."""
    stop: tuple[str, ...] = ()
    """Texts that end the continuation; they are not part of its text."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the continuation, such as end-of-text; they are not part of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(all(self.stop), "stop", self.stop, "texts that are not empty")

    @classmethod
    def from_flags(cls, flags: SamplingFlags, **changes: Any) -> "SamplingParams":
        """The settings of a subcommand's flags, as far as it has them, with changes."""
        names = [f.name for f in fields(cls) if hasattr(flags, f.name)]
        return cls(**{**{name: getattr(flags, name) for name in names}, **changes})

    @property
    def limit(self) -> int:
        """The maximum number of new tokens."""
        return self.max_new_tokens or DEFAULT_MAX_NEW_TOKENS

    @cached_property
    def biases(self) -> dict[int, float]:
        """What is added to the logits, by token."""
        return parse_logit_bias(self.logit_bias)

    @cached_property
    def adjusts_logits(self) -> bool:
        """Whether logits are adjusted before sampling."""
        settings = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty, self.logit_bias)
        return settings != (1, 0, 0, "")

    @cached_property
    def distribution(self) -> tuple[float | str, ...]:
        """The settings that decide the probabilities; rows that agree in them are sampled in one call."""
        if self.temperature == 0:
            return (0.0,)
        return tuple(getattr(self, f.name) for f in fields(SamplingFlags) if f.name != "seed")


def check_tokens(ids: Iterable[int], vocab_size: int, what: str) -> None:
    """Raise InputError unless all of these are ids of the model."""
    if wrong := [token for token in ids if not 0 <= token < vocab_size]:
        raise InputError(f"{what} has a token {wrong[0]}: the model's are 0 to {vocab_size - 1}")


def adjust_logits(
    logits: Tensor, params: Sequence[SamplingParams], texts: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Tensor:
    """Logits [B, V] with bias and penalties, in vLLM's order; the same tensor where no row has any.

    texts: the tokens of each row's prompt, and of its answer so far.
    """
    rows = [row for row, own in enumerate(params) if own.adjusts_logits]
    logits = logits.clone() if rows else logits
    for row in rows:
        _adjust(logits[row], params[row], *texts[row])
    return logits


def _adjust(logits: Tensor, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """Change one row's logits [V] in place."""

    def on_device(values: Iterable[float], dtype: torch.dtype = logits.dtype) -> Tensor:
        return torch.tensor([*values], dtype=dtype, device=logits.device)

    logits[on_device(params.biases, torch.long)] += on_device(params.biases.values())
    if params.repetition_penalty != 1:
        seen = on_device({*prompt, *answer}, torch.long)
        own = logits[seen]
        logits[seen] = torch.where(own > 0, own / params.repetition_penalty, own * params.repetition_penalty)
    counts = Counter(answer)
    penalties = params.frequency_penalty * on_device(counts.values()) + params.presence_penalty
    logits[on_device(counts, torch.long)] -= penalties


def next_tokens(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[tuple[int, int]]) -> list[int]:
    """The next token of each row of logits [B, V], greedy or sampled.

    positions: each row's (number, step), which decide its sample together with its seed. Raises GraftError for NaN.
    """
    groups: dict[tuple[float | str, ...], list[int]] = {}
    for row, own in enumerate(params):
        groups.setdefault(own.distribution, []).append(row)
    tokens = [0] * len(params)
    for rows in groups.values():
        part, first = logits if len(groups) == 1 else logits[rows], params[rows[0]]
        if first.temperature == 0:
            new = greedy(part)
        else:
            new = sample_tokens(part, [counter_based_uniform(params[row].seed, *positions[row]) for row in rows], first)
        for row, token in zip(rows, new, strict=True):
            tokens[row] = token
    return tokens


def counter_based_uniform(seed: int, row: int, step: int) -> float:
    """A number in [0, 1) without state: a hash of its arguments, the same on every machine."""
    digest = blake2b(f"{seed} {row} {step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53  # the 53 bits of a float's mantissa


def sample_tokens(logits: Tensor, u: Sequence[float], params: SamplingParams) -> list[int]:
    """One token for each row of logits [B, V], by inverting the cumulative distribution at u [B], each in [0, 1)."""
    weights, ids = candidates(logits, params)
    cumulative = weights.cumsum(dim=-1)
    target = torch.tensor(u, dtype=weights.dtype, device=weights.device)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)  # the first whose cumulative weight exceeds it
    return (index if ids is None else ids.to(index.device).gather(-1, index))[:, 0].tolist()


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Unnormalised probabilities [B, C] in float64, 0 for excluded tokens, and the tokens' ids; None: all V in order.

    The settings apply in transformers' order: temperature, top_k, top_p, min_p. Arithmetic is in float32 or above,
    regardless of the model's dtype.
    """
    logits = logits.float()
    best = logits.max(dim=-1, keepdim=True).values
    _refuse_nan(best)
    # The largest is now 0, so no temperature overflows; below `tiny` a temperature would be 0 in float32.
    logits = (logits - best) / max(params.temperature, torch.finfo(torch.float32).tiny)
    ids = None
    if 0 < params.top_k < logits.shape[-1]:
        logits, ids = logits.topk(params.top_k, dim=-1)  # in descending order
    weights = torch.softmax(logits, dim=-1)
    if params.top_p < 1 and ids is None:
        weights, ids = _most_likely(weights, params.top_p)
    weights = to_float64(weights)
    if params.top_p < 1:
        # A token stays if those before it do not reach top_p; so the first always stays.
        weights = weights.masked_fill(weights.cumsum(dim=-1) - weights >= params.top_p, 0)
    if params.min_p > 0:  # Nguyen et al. 2024, "Turning up the heat: min-p sampling"
        weights = weights.masked_fill(weights < params.min_p * weights.amax(dim=-1, keepdim=True), 0)
    return weights, ids


def _most_likely(weights: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The most likely tokens in descending order, at least as many as top_p needs.

    Sorting the whole vocabulary for a few tokens would take longer than a step of a small model.
    """
    few, ids = weights.topk(min(TOPK_FIRST, weights.shape[-1]), dim=-1)
    if bool((to_float64(few).sum(dim=-1) < top_p).any()):
        return weights.sort(dim=-1, descending=True, stable=True)
    return few, ids


def greedy(logits: Tensor) -> list[int]:
    """The most likely token of each row of logits [B, V]."""
    best = logits.max(dim=-1)
    _refuse_nan(best.values)
    return best.indices.tolist()


def _refuse_nan(best: Tensor) -> None:
    if bool(best.isnan().any()):
        raise GraftError("the model's logits are NaN: its weights are broken, or overflow in this --dtype; try float32")
