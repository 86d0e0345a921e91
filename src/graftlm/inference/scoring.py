"""Log-probabilities of labels and of an example's own completion after its prompt.

A label's score is the sum of its tokens' log-probabilities, for labels of any number of tokens. The common prefix of
all prompts is computed once per call, the common prefix of an example's tails once per example, and the head runs only
where a tail's token is predicted. Rows are sorted by length for speed and returned in the data's order.

Letters: N examples, L labels, B rows of a batch, T tokens of a pass, V tokens of the vocabulary, d hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.exchange.load import to_float64
from graftlm.inference.decoder import prefill_shared_prefix, right_pad
from graftlm.inference.generate import Batching, eval_mode
from graftlm.models import CausalLM, KVCache
from graftlm.models.base import flat_to_padded
from graftlm.models.layers import FUSED_FROM
from graftlm.text.boundary import Tokens
from graftlm.text.collate import Example

LabelIds = Sequence[Sequence[int]]

MAX_POSITIONS = 1024
"""Logits of this many positions are computed at once; at V = 50,000 they take 200 MB."""


@dataclass(frozen=True)
class Scores:
    """Sums of log-probabilities (natural logarithm) in the order of the examples, on the CPU."""

    labels: Tensor
    """[N, L] float64: of each label's tokens."""
    completion: Tensor
    """[N] float64: of the example's own completion with its end-of-text; in a conversation, of all answers."""
    completion_tokens: Tensor
    """[N] int64: the number of tokens in that sum; 0 without a completion."""


@dataclass(frozen=True)
class ScoringPlan:
    """What to feed after one prompt and which log-probabilities to read.

    `tails` are scored: the labels and, last, the completion. To score a tail, all of it but its last token is fed.
    `paths` are the distinct token sequences to feed, without those that are prefixes of another one; at least one,
    maybe empty. `owner[i]` is the path that feeds tail i.
    """

    prompt: Tokens
    tails: tuple[Tokens, ...]
    paths: tuple[Tokens, ...]
    owner: tuple[int, ...]
    scored: tuple[Sequence[int], ...]
    """The indices of the scored tokens of each tail."""

    @classmethod
    def make(cls, example: Example, label_ids: LabelIds, with_completion: bool = True) -> "ScoringPlan":
        """label_ids: for an example that has none of its own; empty if labels are not scored."""
        own = example.label_ids if example.label_ids and label_ids else label_ids
        prompt, completion = tuple(example.prompt_ids), tuple(example.completion_ids) * with_completion
        tails = (*map(tuple, own), completion)
        fed = [tail[:-1] for tail in tails]
        paths: list[Tokens] = []
        for tokens in sorted(fed, key=len, reverse=True):
            if not any(path[: len(tokens)] == tokens for path in paths):
                paths.append(tokens)
        owner = tuple(next(i for i, path in enumerate(paths) if path[: len(tokens)] == tokens) for tokens in fed)
        labels = [range(example.skip, len(tail)) for tail in tails[:-1]]
        return cls(prompt, tails, tuple(paths), owner, (*labels, example.loss_positions if with_completion else ()))

    def reads(self, path: int, start: int) -> Iterator[tuple[int, int, int]]:
        """(position, token, tail) of each token to score in pass `path`; `start` is where the path's tokens begin.

        The first token of every tail is predicted by the prompt's last token, which precedes the first path.
        """
        for tail, tokens in enumerate(self.tails):
            for i in self.scored[tail]:
                if (0 if i == 0 else self.owner[tail]) == path:
                    yield start + i - 1, tokens[i], tail


def score(model: CausalLM, examples: Sequence[Example], label_ids: LabelIds | None = None, **batching: Any) -> Scores:
    """The log-probability of each label, and of each example's own completion, after its prompt.

    label_ids: the tokens of each label (`text.collate.label_ids`), for examples that have none of their own
    (`Example.label_ids`); None or empty where no labels are scored.
    batching: fields of `Batching` by name, as in batch_size=8; they change the scores by rounding only.

    Raises InputError for an example whose prompt and tail are longer than the context.
    """
    labels = label_ids or ()
    plans = [ScoringPlan.make(example, labels) for example in examples]
    sums = _sums(model, plans, examples, len(labels) + 1, Batching(**batching))
    counts = torch.tensor([len(plan.scored[-1]) for plan in plans], dtype=torch.int64)
    return Scores(sums[:, :-1], sums[:, -1], counts)


def score_labels(
    model: CausalLM, examples: Sequence[Example], label_ids: LabelIds, batching: Batching | None = None
) -> Tensor:
    """The labels' scores [N, L] alone, as in `Scores.labels`."""
    plans = _label_plans(examples, label_ids)
    return _sums(model, plans, examples, len(label_ids) + 1, batching or Batching())[:, :-1]


def mean_hidden_states(model: CausalLM, rows: Sequence[Sequence[int]]) -> Tensor:
    """The mean over each row's tokens of the hidden states after the last norm, [B, d] float64."""
    ids, lengths = right_pad(rows, model.device)
    hidden = to_float64(model.hidden_states(ids))
    lengths = lengths.to(hidden.device)
    real = torch.arange(ids.shape[1], device=hidden.device) < lengths[:, None]
    return hidden.masked_fill(~real[..., None], 0).sum(1) / lengths[:, None]


def score_batches(
    examples: Sequence[Example], label_ids: LabelIds, batch_size: int, shared: int = 0
) -> list[list[int]]:
    """The rows of each batch of `score_labels`. Any run of batches forms the same batches again."""
    return list(_batches(_label_plans(examples, label_ids), Batching(batch_size), shared))


def _label_plans(examples: Sequence[Example], label_ids: LabelIds) -> list[ScoringPlan]:
    return [ScoringPlan.make(example, label_ids, with_completion=False) for example in examples]


def _sums(
    model: CausalLM, plans: Sequence[ScoringPlan], examples: Sequence[Example], tails: int, batching: Batching
) -> Tensor:
    """The sum for each plan's tails, [N, tails] float64."""
    _check(plans, examples, model.max_seq_len)
    sums = torch.zeros(len(plans), tails, dtype=torch.float64)
    with eval_mode(model):
        past, skip = prefill_shared_prefix(model, [plan.prompt for plan in plans], batching.shared)
        for rows in _batches(plans, batching, skip):
            batch = [plans[row] for row in rows]
            # Attention to a shared past holds all scores in memory: too much for long rows.
            is_long = max(len(plan.prompt) + len(plan.paths[0]) for plan in batch) - skip >= FUSED_FROM
            values = _score_batch(model, batch, *(((), 0) if is_long else (past, skip)))
            sums[rows] = torch.tensor(values, dtype=torch.float64)
            if batching.progress is not None:
                batching.progress(len(rows))
    return sums


def _check(plans: Sequence[ScoringPlan], examples: Sequence[Example], context: int) -> None:
    for plan, example in zip(plans, examples, strict=True):
        if not plan.prompt:
            raise InputError(f"{example.source or 'an example'}: no token precedes the answer: add text to the prompt")
        fed = len(plan.prompt) + len(plan.paths[0])  # the last token of a tail is predicted, never fed
        if fed > context:
            raise InputError(
                f"{example.source or 'an example'}: prompt and answer have {fed + 1} tokens, the model reads at most "
                f"{context}: lower --max_length or shorten the text"
            )


def _batches(plans: Sequence[ScoringPlan], batching: Batching, skip: int) -> Iterator[list[int]]:
    """Batches of rows of similar length, within the limits of `batching` and of MAX_POSITIONS predicted tokens each.

    skip: the tokens at the beginning of every prompt that are not computed with the rows.

    Padding never exceeds the context (GPT-2 has no positions beyond it): after the first pass only paths no longer than
    the longest label's are fed, and every row has capacity for that.
    """
    lengths = [len(plan.prompt) + len(plan.paths[0]) - skip for plan in plans]
    order = sorted(range(len(plans)), key=lengths.__getitem__)
    batch: list[int] = []
    positions = 0
    for row in order:
        own = 1 + sum(len(path) for path in plans[row].paths)
        too_wide = (len(batch) + 1) * lengths[row] > batching.max_tokens
        if batch and (len(batch) == batching.batch_size or positions + own > MAX_POSITIONS or too_wide):
            yield batch
            batch, positions = [], 0
        batch.append(row)
        positions += own
    if batch:
        yield batch


def _score_batch(
    model: CausalLM, plans: Sequence[ScoringPlan], past: Sequence[KVCache], skip: int
) -> list[list[float]]:
    """The sum for each plan's tails. `past` holds the first `skip` tokens of every prompt.

    The first pass feeds the prompt with its first path, so a single path (one label word and the completion that
    contains it) needs no second pass. Each further path is fed after the prompts' keys and values, kept in a cache.
    """
    passes = max(len(plan.paths) for plan in plans)
    own = [plan.prompt[skip:] for plan in plans]
    fed = [[*prompt, *plan.paths[0]] for prompt, plan in zip(own, plans, strict=True)]
    sums = [[0.0] * len(plan.tails) for plan in plans]
    cache = None
    if passes > 1:
        cache = model.empty_cache(len(plans), max(map(len, fed)))
    for number in range(passes):
        if number == 1:
            assert cache is not None
            # Only the prompts remain visible: the first path's tokens lie beyond these lengths.
            cache.lengths = torch.tensor([len(prompt) for prompt in own], device=model.device)
            past = [*past, cache]
        if number:
            fed = [list(plan.paths[number]) if number < len(plan.paths) else [] for plan in plans]
        reads = [
            (row, *read)
            for row, plan in enumerate(plans)
            for read in plan.reads(number, 0 if number else len(own[row]))
        ]
        if not reads and number == passes - 1:
            break
        logps = _log_probs(model, fed, [read[:3] for read in reads], past, cache if number == 0 else None)
        for (row, _, _, tail), logp in zip(reads, logps, strict=True):
            sums[row][tail] += logp
    return sums


def _log_probs(
    model: CausalLM,
    fed: Sequence[Sequence[int]],
    reads: Sequence[tuple[int, int, int]],
    past: Sequence[KVCache],
    keep: KVCache | None,
) -> list[float]:
    """The log-probability of `token` after position `position` of row `row`, for each (row, position, token)."""
    ids, _ = right_pad(fed, model.device)
    slots: dict[int, int] = {}  # each position is computed once, even if several tails read it
    index = [slots.setdefault(row * ids.shape[1] + position, len(slots)) for row, position, _ in reads]
    at = torch.tensor(list(slots), dtype=torch.long, device=model.device)
    padded, slot = flat_to_padded(at, *ids.shape)
    hidden = model.hidden_states(ids, past, keep, padded).flatten(0, 1)[slot]
    logps = [0.0] * len(reads)
    for start in range(0, len(at), MAX_POSITIONS):
        logits = model.logits(hidden[start : start + MAX_POSITIONS])
        mine = [i for i, row in enumerate(index) if start <= row < start + MAX_POSITIONS]
        rows = torch.tensor([index[i] - start for i in mine], dtype=torch.long, device=logits.device)
        tokens = torch.tensor([reads[i][2] for i in mine], dtype=torch.long, device=logits.device)
        found = to_float64(logits[rows, tokens]) - to_float64(logits.logsumexp(dim=-1)[rows])
        for i, logp in zip(mine, found.tolist(), strict=True):
            logps[i] = logp
    return logps
