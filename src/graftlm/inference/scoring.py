"""The log-probabilities of labels and of an example's own completion behind its prompt.

What is unusual here: a label's score is the sum of its tokens' log-probabilities, for labels of any number of tokens.
What the prompts begin with is run once for the whole call; the tokens that tails have in common once for each prompt;
and the head runs only where a tail's token is predicted. Rows are sorted by length for speed and come back in the
data's order.

Letters: N examples, L labels, B rows of a batch, T tokens at hand, V tokens of the vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.exchange.device import to_float64
from graftlm.inference.generate import ProgressCallback, eval_mode, prefill_shared_prefix, right_pad
from graftlm.models import CausalLM, KVCache
from graftlm.text.collate import Example

Tokens = tuple[int, ...]
LabelIds = Sequence[Sequence[int]]

MAX_POSITIONS = 1024
"""Logits of so many positions are made at once; at V = 50,000 they take 200 MB."""


@dataclass(frozen=True)
class Scores:
    """Sums of log-probabilities in natural units, in the order of the examples, on the CPU."""

    labels: Tensor
    """[N, L] float64: of each label's tokens."""
    completion: Tensor
    """[N] float64: of the example's own completion, with its end-of-text; of a conversation of all answers."""
    completion_tokens: Tensor
    """[N] int64: how many tokens that sum has; 0 where there is no completion."""


@dataclass(frozen=True)
class ScoringPlan:
    """What to feed behind one prompt and what to read.

    `tails` are what is scored: the labels and last the completion. To score a tail, all of it but its last token is
    fed. `paths` are the distinct runs of tokens to feed, without those that another one begins with; there is always
    one, maybe empty. `owner[i]` is the path that feeds tail i.
    """

    prompt: Tokens
    tails: tuple[Tokens, ...]
    paths: tuple[Tokens, ...]
    owner: tuple[int, ...]
    scored: tuple[Sequence[int], ...]
    """Of each tail the places of the tokens to score."""

    @classmethod
    def make(cls, prompt: Tokens, tails: tuple[Tokens, ...], learned: Sequence[int] | None = None) -> "ScoringPlan":
        """`learned`: the places of the last tail that are scored; None: all, as of the others."""
        runs = [tail[:-1] for tail in tails]
        paths: list[Tokens] = []
        for run in sorted(runs, key=len, reverse=True):
            if not any(path[: len(run)] == run for path in paths):
                paths.append(run)
        owner = tuple(next(i for i, path in enumerate(paths) if path[: len(run)] == run) for run in runs)
        scored = [range(len(tail)) for tail in tails[:-1]]
        return cls(prompt, tails, tuple(paths), owner, (*scored, range(len(tails[-1])) if learned is None else learned))

    def reads(self, path: int, start: int) -> Iterator[tuple[int, int, int]]:
        """(position, token, tail) of each token to score in pass `path`; `start` is where the path's tokens begin.

        The first token of every tail is predicted by the prompt's last token, which stands before the first path.
        """
        for tail, tokens in enumerate(self.tails):
            for i in self.scored[tail]:
                if (0 if i == 0 else self.owner[tail]) == path:
                    yield start + i - 1, tokens[i], tail


def score(
    model: CausalLM,
    examples: Sequence[Example],
    label_ids: LabelIds | None = None,
    *,
    batch_size: int = 32,
    shared: int | None = None,
    completions: bool = True,
    progress: ProgressCallback | None = None,
) -> Scores:
    """The log-probability of each label, and of each example's own completion, behind its prompt.

    label_ids: the tokens of each label (`text.data.label_ids`); None or empty where the data has no labels.
    shared: run so many first tokens, which all prompts have, once for the whole call; 0: none, None: as many as pay.
        It changes the scores by rounding only.
    completions: False leaves the completions out (their sums and counts are 0), for when only labels matter.

    Raises InputError for an example whose prompt and tail are longer than the context.
    """
    plans = _plans(examples, label_ids or (), completions)
    _check(plans, examples, model.max_seq_len)
    sums = torch.zeros(len(plans), len(label_ids or ()) + 1, dtype=torch.float64)
    with eval_mode(model):
        past, skip = prefill_shared_prefix(model, [plan.prompt for plan in plans], shared)
        for rows in _batches(plans, batch_size):
            batch = _score_batch(model, [plans[row] for row in rows], past, skip)
            sums[rows] = torch.tensor(batch, dtype=torch.float64)
            if progress is not None:
                progress(len(rows))
    counts = torch.tensor([len(plan.scored[-1]) for plan in plans], dtype=torch.int64)
    return Scores(sums[:, :-1], sums[:, -1], counts)


def _plans(examples: Sequence[Example], label_ids: LabelIds, completions: bool) -> list[ScoringPlan]:
    labels = [tuple(ids) for ids in label_ids]
    return [
        ScoringPlan.make(tuple(e.prompt_ids), (*labels, tuple(e.completion_ids)), e.loss_positions)
        if completions
        else ScoringPlan.make(tuple(e.prompt_ids), (*labels, ()))
        for e in examples
    ]


def score_batches(examples: Sequence[Example], label_ids: LabelIds, batch_size: int) -> list[list[int]]:
    """The rows of each batch in which `score` reads the labels. Any run of them, on its own, makes the same batches."""
    return list(_batches(_plans(examples, label_ids, False), batch_size))


def _check(plans: Sequence[ScoringPlan], examples: Sequence[Example], context: int) -> None:
    for plan, example in zip(plans, examples, strict=True):
        assert plan.prompt, f"an empty prompt at {example.source}"
        # The last token of a tail is predicted, never fed.
        fed = len(plan.prompt) + len(plan.paths[0])
        if fed > context:
            raise InputError(
                f"{example.source or 'an example'}: prompt and answer have {fed + 1} tokens, the model reads at most "
                f"{context}: lower --max_length or shorten the text"
            )


def _batches(plans: Sequence[ScoringPlan], batch_size: int) -> Iterator[list[int]]:
    """Rows of similar length together, at most `batch_size` of them, and at most MOST_POSITIONS predicted tokens.

    Padding never reaches beyond the context (where GPT-2 has no position to give), whichever rows meet: behind the
    first pass come only paths that are no longer than the longest label's, and every row has room for that.
    """
    batch: list[int] = []
    positions = 0
    for row in sorted(range(len(plans)), key=lambda row: len(plans[row].prompt) + len(plans[row].paths[0])):
        own = 1 + sum(len(path) for path in plans[row].paths)
        if batch and (len(batch) == batch_size or positions + own > MAX_POSITIONS):
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

    The first pass reads the prompt with its first path, so a single path (one label word and the completion that holds
    it) needs no further one. Each further path is read behind the prompts' keys and values, kept in a cache.
    """
    passes = max(len(plan.paths) for plan in plans)
    own = [plan.prompt[skip:] for plan in plans]
    fed = [[*prompt, *plan.paths[0]] for prompt, plan in zip(own, plans, strict=True)]
    sums = [[0.0] * len(plan.tails) for plan in plans]
    cache = None
    if passes > 1:
        cache = KVCache.cache(model.config, len(plans), max(map(len, fed)), model.device, model.dtype)
    for number in range(passes):
        if number == 1:
            assert cache is not None
            # Only the prompt counts from here on: the first path lies beyond these lengths and is not seen.
            cache.lengths = torch.tensor([len(prompt) for prompt in own], device=model.device)
            past = [*past, cache]
        if number:
            fed = [list(plan.paths[number]) if number < len(plan.paths) else [] for plan in plans]
        wanted = [
            (row, *read)
            for row, plan in enumerate(plans)
            for read in plan.reads(number, 0 if number else len(own[row]))
        ]
        if not wanted and number == passes - 1:
            break
        logps = _log_probs(model, fed, [w[:3] for w in wanted], past, cache if number == 0 else None)
        for (row, _, _, tail), logp in zip(wanted, logps, strict=True):
            sums[row][tail] += logp
    return sums


def _log_probs(
    model: CausalLM,
    fed: Sequence[Sequence[int]],
    wanted: Sequence[tuple[int, int, int]],
    past: Sequence[KVCache],
    keep: KVCache | None,
) -> list[float]:
    """The log-probability of `token` behind position `position` of row `row`, for each (row, position, token)."""
    ids, _ = right_pad(fed, model.device)
    slots: dict[int, int] = {}  # a position is read once, whichever tails want a token there
    where = [slots.setdefault(row * ids.shape[1] + position, len(slots)) for row, position, _ in wanted]
    at = torch.tensor(list(slots), dtype=torch.long, device=model.device)
    logits = model(ids, past=past, keep=keep, at=at)
    index = torch.tensor(where, dtype=torch.long, device=logits.device)
    tokens = torch.tensor([token for _, _, token in wanted], dtype=torch.long, device=logits.device)
    return (to_float64(logits[index, tokens]) - to_float64(logits.logsumexp(dim=-1)[index])).tolist()
