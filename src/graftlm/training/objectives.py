"""Model + batch -> (sum of losses, weight). A step divides the sum by the weight of all its batches.

    completion   -sum of log p(token | what stands before it) over the completion and its end-of-text; of a
                 conversation over the assistant's answers
    all          the same over every token but the first
    pairs        what `preferences.py` makes of the log-probabilities of two answers to each prompt

What is unusual here: the tokens that all prompts of a batch begin with run once, with gradient, and every row reads
their keys and values (`CausalLM.forward_shared_prefix`); and the head is applied only at the positions that are
trained on.
Neither changes the gradient (tests/training/test_objectives.py); with dropout on, the rows share the masks of the
shared tokens.

A pair of answers is one row, prompt, first answer, second answer, so that the prompt runs once (`attention.PairedRow`).

Letters: B rows, T longest row in tokens behind the P shared ones, N targets, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from graftlm.models.attention import PairedRow
from graftlm.models.base import CausalLM, flat_to_padded
from graftlm.text.collate import Example, common_prefix_length

LossOn = Literal["completion", "all", "pairs"]
Objective = Callable[[CausalLM, "TrainingBatch"], Tensor]


@dataclass(frozen=True)
class TrainingBatch:
    """Rows ready for a forward pass; made on the CPU, padded on the right with token 0, which nothing ever reads."""

    shared: Tensor
    """[1, P] tokens that stand before every row; P may be 0."""
    ids: Tensor
    """[B, T] each row's own tokens, without its last, which nothing follows."""
    positions: Tensor | None
    """[B, M] the positions of each row whose next token is a target, filled up with 0; None: every position."""
    target_index: Tensor
    """[N] where the targets' positions are in `at`, or in `ids` where that is None; flat."""
    targets: Tensor
    """[N] those next tokens."""
    weight: int
    """Target tokens of all rows, the shared ones counted once for each row; of pairs, their number."""
    tokens: int
    """Tokens of all rows as the data has them: shared, repeated, last and first, no padding; a pair's prompt once."""
    full_logits: bool = False
    """Whether the head runs at every position, also where there is no target: the plain way."""
    cached_hidden: tuple[int, Tensor] | None = None
    """(L, x): what enters block L, [P + B T, d] as `CausalLM.lower` gives it, where that is known already."""
    fork: PairedRow | None = None
    """Where the rows' second answers begin, where they are pairs."""
    answer: Tensor | None = None
    """[N] of pairs, whose target it is: 2 b for what was chosen in row b, 2 b + 1 for what was not."""
    reference: Tensor | None = None
    """[B, 2] of pairs, the reference's log-probability of both answers, where there is one; float64, on the CPU."""

    @property
    def non_shared_tokens(self) -> int:
        """Tokens of all rows without the shared ones."""
        return self.tokens - self.ids.shape[0] * self.shared.shape[1]

    def to(self, device: torch.device) -> "TrainingBatch":
        """The same batch on a device."""
        at = None if self.positions is None else self.positions.to(device)
        below = None if self.cached_hidden is None else (self.cached_hidden[0], self.cached_hidden[1].to(device))
        shared, ids, pick, targets = (t.to(device) for t in (self.shared, self.ids, self.target_index, self.targets))
        moved = replace(
            self, shared=shared, ids=ids, positions=at, target_index=pick, targets=targets, cached_hidden=below
        )
        if self.fork is None or self.answer is None:
            return moved
        return replace(moved, fork=self.fork.to(device), answer=self.answer.to(device))


def collate(
    examples: Sequence[Example],
    loss_on: LossOn,
    share: bool = True,
    targets_only: bool = True,
    prefix: int | None = None,
) -> TrainingBatch:
    """The batch of these examples; with `share`, their longest common prompt prefix is taken out (when P >= 4).

    With `targets_only`, what follows the last layer's keys and values is computed only where there is a target.
    With `prefix`, P is that number of tokens, which all prompts must begin with.
    """
    p = common_prefix_length([e.prompt_ids for e in examples]) if share and len(examples) > 1 else 0
    p = p if p >= 4 else 0  # the attention of its own costs more than a few tokens do
    p = p if prefix is None else prefix
    if loss_on == "pairs":
        return _pairs(examples, p, targets_only)
    rows = [(*e.prompt_ids[p:], *e.completion_ids) for e in examples]
    width = max(len(row) for row in rows) - 1
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    at: list[int] = []
    targets: list[int] = []
    for b, (example, row) in enumerate(zip(examples, rows, strict=True)):
        ids[b, : len(row) - 1] = torch.tensor(row[:-1])
        first = len(example.prompt_ids) - p
        own = [first + t for t in example.loss_positions] if loss_on == "completion" else range(1, len(row))
        at += [b * width + t - 1 for t in own]
        targets += [row[t] for t in own]
    shared = torch.tensor(examples[0].prompt_ids[:p], dtype=torch.long)[None]
    # loss_on all: the shared tokens but the first, and each row's own first token, which the last shared one predicts.
    weight = len(targets) + (p * len(rows) if loss_on == "all" else 0)
    pick = torch.tensor(at, dtype=torch.long)
    where = None
    if loss_on == "completion" and targets_only:
        where, pick = flat_to_padded(pick, *ids.shape)
    return TrainingBatch(
        shared,
        ids,
        where,
        pick,
        torch.tensor(targets, dtype=torch.long),
        weight=weight,
        tokens=sum(p + len(row) for row in rows),
        full_logits=not targets_only,
    )


def _pairs(examples: Sequence[Example], p: int, targets_only: bool) -> TrainingBatch:
    """The batch of these pairs behind their first p tokens; each row is a fork."""
    parts = [(e.prompt_ids[p:], e.completion_ids, e.rejected_ids) for e in examples]
    # The last token of an answer is predicted, never fed.
    rows = [(*prompt, *chosen[:-1], *rejected[:-1]) for prompt, chosen, rejected in parts]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    at: list[int] = []
    answer: list[int] = []
    for b, (row, (prompt, chosen, rejected)) in enumerate(zip(rows, parts, strict=True)):
        ids[b, : len(row)] = torch.tensor(row)
        for n, (tokens, start) in enumerate(((chosen, 0), (rejected, len(chosen) - 1))):
            last = b * ids.shape[1] + len(prompt) - 1  # predicts the first token of both
            at += [last, *(last + start + i for i in range(1, len(tokens)))]
            answer += [2 * b + n] * len(tokens)
    pick, where = torch.tensor(at), None
    if targets_only:
        flat, back = pick.unique(return_inverse=True)  # both answers begin behind the same token
        where, slots = flat_to_padded(flat, *ids.shape)
        pick = slots[back]
    known = [e.reference for e in examples]
    return TrainingBatch(
        torch.tensor(examples[0].prompt_ids[:p], dtype=torch.long)[None],
        ids,
        where,
        pick,
        torch.tensor([token for _, chosen, rejected in parts for token in (*chosen, *rejected)]),
        weight=len(rows),
        tokens=sum(p + len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in parts),
        full_logits=not targets_only,
        fork=PairedRow(
            torch.tensor([len(prompt) for prompt, _, _ in parts]),
            torch.tensor([len(prompt) + len(chosen) - 1 for prompt, chosen, _ in parts]),
        ),
        answer=torch.tensor(answer),
        reference=None if None in known else torch.tensor(known, dtype=torch.float64),
    )


def make_microbatches(
    examples: Sequence[Example],
    loss_on: LossOn,
    share: bool = True,
    most_tokens: int = 0,
    targets_only: bool = True,
    prefix: int | None = None,
) -> list[TrainingBatch]:
    """The examples as one batch, or, where `ids` would have more than `most_tokens`, as several of about equal size.

    Their losses, and so their gradients, add up to the one batch's. 0 is no bound; a single row is never split.
    """
    whole = collate(examples, loss_on, share, targets_only, prefix)
    if whole.ids.numel() <= most_tokens or not most_tokens:
        return [whole]
    fit = max(1, most_tokens // whole.ids.shape[1])
    parts = math.ceil(len(examples) / fit)
    rows = math.ceil(len(examples) / parts)  # as even as can be: a small last part would waste its pass
    cuts = [examples[i : i + rows] for i in range(0, len(examples), rows)]
    return [collate(some, loss_on, share, targets_only, prefix) for some in cuts]


def forward_batch(model: CausalLM, batch: TrainingBatch) -> tuple[Tensor | None, Tensor, Tensor]:
    """Hidden states of the shared tokens [P, d] (None: not asked for), of the rows [R, d], and pick [N] in those."""
    shared, h = model.forward_shared_prefix(batch.shared, batch.ids, batch.positions, batch.cached_hidden, batch.fork)
    h = h.flatten(0, 1)
    if batch.full_logits or batch.fork is not None:
        return shared, h, batch.target_index
    return shared, h[batch.target_index], torch.arange(len(batch.target_index), device=h.device)


def completion(model: CausalLM, batch: TrainingBatch) -> Tensor:
    """Sum of the completion tokens' losses; the batch was made with loss_on="completion"."""
    _, h, pick = forward_batch(model, batch)
    return model.loss(h, pick, batch.targets, torch.ones(len(pick), device=h.device))


def all_tokens(model: CausalLM, batch: TrainingBatch) -> Tensor:
    """Sum of all tokens' losses; the batch was made with loss_on="all"."""
    shared, h, pick = forward_batch(model, batch)
    ones = torch.ones(len(pick), device=h.device)
    if shared is None:
        return model.loss(h, pick, batch.targets, ones)
    # Each shared token is predicted by the one before it, once for every row; and the last one predicts what each
    # row begins with.
    rows, p, begins = batch.ids.shape[0], len(shared), batch.ids[:, 0]
    inside = torch.arange(p - 1, device=h.device)
    return model.loss(
        torch.cat([shared, h]),
        torch.cat([inside, torch.full_like(begins, p - 1), p + pick]),
        torch.cat([batch.shared[0, 1:], begins, batch.targets]),
        torch.cat([torch.full((p - 1,), float(rows), device=h.device), torch.ones(rows, device=h.device), ones]),
    )


OBJECTIVES: dict[str, Objective] = {"completion": completion, "all": all_tokens}
