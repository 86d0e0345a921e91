"""Examples -> padded tensors ready for a forward pass, and the order in which a run visits its examples.

The tokens that all prompts of a batch share run once, with gradient, and every row attends to their keys and values
(`CausalLM.forward_shared_prefix`). The head runs only at target positions. Neither changes the gradient
(tests/training/test_objectives.py); with dropout, the rows share the masks of the shared tokens.

A preference pair is one row, prompt, chosen, rejected, so that its prompt runs once (`layers.PairedRow`).

Letters: B rows, T tokens of the longest row without the shared prefix, P shared tokens, N targets, S scored sequences.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from graftlm.config import TrainConfig
from graftlm.inference.decoder import MAX_PASS_TOKENS, shared_prefix_length
from graftlm.models.base import CausalLM, flat_to_padded
from graftlm.models.layers import PairedRow
from graftlm.text.boundary import Tokens
from graftlm.text.collate import SORT_WINDOW, Example, epoch_batches
from graftlm.text.example_table import lengths_of
from graftlm.training.activation_cache import ActivationCache
from graftlm.training.distributed import DistContext

LossOn = Literal["completion", "all"]


@dataclass
class TrainingData:
    """The tokenized data of a run."""

    train: Sequence[Example]
    validation: Sequence[Example]
    label_ids: list[Tokens]
    """The tokens scored for each label after a short text; empty for data without labels."""
    stop_tokens: frozenset[int]
    """The tokens that end a text."""
    max_tokens: int = MAX_PASS_TOKENS
    """Padded tokens of a pass without gradient, unless a single row has more."""

    @property
    def splits(self) -> dict[str, Sequence[Example]]:
        """Examples by split name."""
        return {"train": self.train, "validation": self.validation}


@dataclass(frozen=True)
class CollateOptions:
    """How examples become tensors. None of it changes a gradient."""

    share_prefix: bool = True
    """Run the longest common prompt prefix once, if it is long enough to pay."""
    targets_only: bool = True
    """Run the head, and the last layer's queries and MLP, only where a token is predicted."""
    max_tokens: int = 0
    """Maximum B * T of a micro-batch; 0: no limit."""
    prefix: int | None = None
    """P, if it is fixed; every prompt must begin with these tokens."""

    def prefix_length(self, examples: Sequence[Example]) -> int:
        """P for these examples."""
        if self.prefix is not None:
            return self.prefix
        return shared_prefix_length([e.prompt_ids for e in examples]) if self.share_prefix else 0


@dataclass(frozen=True)
class TrainingBatch:
    """A micro-batch, built on the CPU and padded on the right with token 0, which no target depends on."""

    shared: Tensor
    """[1, P] tokens that precede every row; P may be 0."""
    ids: Tensor
    """[B, T] each row's own tokens, without its last, which is only predicted."""
    positions: Tensor | None
    """[B, M] positions in each row whose next token is a target, padded with 0; None: every position."""
    target_index: Tensor
    """[N] flat indices of the targets' positions in `positions`, or in `ids` where that is None."""
    targets: Tensor
    """[N] those next tokens."""
    weight: int
    """What the batch's loss is divided by: target tokens (shared ones counted once per row), pairs, or examples."""
    tokens: int
    """Tokens of all rows as in the data: shared, repeated, last and first ones, no padding; a pair's prompt once."""
    full_logits: bool = False
    """Whether the head runs at every position (reference implementation)."""
    cached_hidden: tuple[int, Tensor] | None = None
    """(L, x): the input of block L, [P + B T, d] as from `CausalLM.forward_lower_layers`, if it is cached."""
    fork: PairedRow | None = None
    """Where the rows' second answers begin, if rows are pairs."""
    sequence_index: Tensor | None = None
    """[N] the sequence, 0 to S - 1, that each target belongs to; of pairs 2 b is row b's chosen, 2 b + 1 its rejected
    answer."""
    sequences: int = 0
    """S."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """What else the objective needs, such as reference log-probabilities; always on the CPU."""

    @property
    def non_shared_tokens(self) -> int:
        """Tokens of all rows without the shared prefix."""
        return self.tokens - self.ids.shape[0] * self.shared.shape[1]

    @property
    def padded_tokens(self) -> int:
        """Tokens a forward pass computes: the shared prefix once, padding included."""
        return self.shared.shape[1] + self.ids.numel()

    def with_extra(self, values: Mapping[str, Tensor]) -> "TrainingBatch":
        """The same batch with more entries in `extra`."""
        return replace(self, extra={**self.extra, **values}) if values else self

    def to(self, device: torch.device) -> "TrainingBatch":
        """The same batch on a device."""
        moved = {
            name: value.to(device)
            for name in ("shared", "ids", "positions", "target_index", "targets", "sequence_index", "fork")
            if (value := getattr(self, name)) is not None
        }
        if self.cached_hidden is not None:
            moved["cached_hidden"] = (self.cached_hidden[0], self.cached_hidden[1].to(device))
        return replace(self, **moved)


# Collate --------------------------------------------------------------------------------------------------------------


def collate(examples: Sequence[Example], options: CollateOptions, loss_on: LossOn = "completion") -> TrainingBatch:
    """Prompt and answers as one row, which forks after the prompt if there are two; targets are the answers' tokens.

    loss_on: "all" makes every token but the first a target; a row then has one answer.
    """
    p, pairs = options.prefix_length(examples), bool(examples[0].rejected_ids)
    prompts = [e.prompt_ids[p:] for e in examples]
    answers = [(e.completion_ids, e.rejected_ids) if pairs else (e.completion_ids,) for e in examples]
    # The last token of an answer is predicted, never fed.
    rows = [(*prompt, *(t for ids in some for t in ids[:-1])) for prompt, some in zip(prompts, answers, strict=True)]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    index, targets, sequence = list[int](), list[int](), list[int]()
    for b, (example, prompt, row) in enumerate(zip(examples, prompts, rows, strict=True)):
        ids[b, : len(row)] = torch.tensor(row)
        if loss_on == "all":
            targets += (*row[1:], example.completion_ids[-1])
            index += range(b * ids.shape[1], b * ids.shape[1] + len(row))
        last, start = b * ids.shape[1] + len(prompt) - 1, 0  # predicts the first token of each answer
        for n, answer in enumerate(answers[b] if loss_on == "completion" else ()):
            learned = range(example.skip, len(answer)) if pairs else example.loss_positions
            index += [last + (start + i if i else 0) for i in learned]
            targets += [answer[i] for i in learned]
            sequence += [len(answers[b]) * b + n] * len(learned)
            start += len(answer) - 1
    target_index, positions = torch.tensor(index, dtype=torch.long), None
    if loss_on == "completion" and options.targets_only:
        flat, back = target_index.unique(return_inverse=True)  # one token predicts the first tokens of both answers
        positions, slots = flat_to_padded(flat, *ids.shape)
        target_index = slots[back]
    lengths = [(len(prompt), len(some[0]) - 1) for prompt, some in zip(prompts, answers, strict=True)]
    return TrainingBatch(
        torch.tensor(examples[0].prompt_ids[:p], dtype=torch.long)[None],
        ids,
        positions,
        target_index,
        torch.tensor(targets, dtype=torch.long),
        # loss_on all: the shared tokens but the first, and each row's first own token, which the last of them predicts.
        weight=len(targets) + (p * len(rows) if loss_on == "all" else 0),
        tokens=sum(e.length for e in examples),
        full_logits=not options.targets_only,
        fork=PairedRow(*(torch.tensor(ends) for ends in ([n for n, _ in lengths], [sum(n) for n in lengths])))
        if pairs
        else None,
        sequence_index=torch.tensor(sequence, dtype=torch.long),
        sequences=sum(map(len, answers)),
    )


Collate = Callable[[Sequence[Example], CollateOptions], TrainingBatch]


def make_microbatches(
    examples: Sequence[Example], collate: Collate, options: CollateOptions | None = None
) -> list[TrainingBatch]:
    """One batch, or, if its `ids` would exceed `options.max_tokens`, several of about equal size.

    Their losses, and so their gradients, add up to the one batch's. A single row is never split.
    """
    options = options or CollateOptions()
    batch = collate(examples, options)
    if batch.ids.numel() <= options.max_tokens or not options.max_tokens:
        return [batch]
    fit = max(1, options.max_tokens // batch.ids.shape[1])
    parts = math.ceil(len(examples) / fit)
    rows = math.ceil(len(examples) / parts)  # as even as possible: a small last part would waste its pass
    return [collate(examples[i : i + rows], options) for i in range(0, len(examples), rows)]


# Forward --------------------------------------------------------------------------------------------------------------


class HiddenStates(NamedTuple):
    """The final hidden states of a batch."""

    shared: Tensor | None
    """[P, d] of the shared tokens; None where only target positions are computed."""
    rows: Tensor
    """[R, d] of the rows."""
    target_index: Tensor
    """[N] the row of `rows` that predicts each target."""


def forward_batch(model: CausalLM, batch: TrainingBatch) -> HiddenStates:
    """Run the model on a batch, without the head."""
    shared, h = model.forward_shared_prefix(batch.shared, batch.ids, batch.positions, batch.cached_hidden, batch.fork)
    h = h.flatten(0, 1)
    if batch.full_logits or batch.fork is not None:
        return HiddenStates(shared, h, batch.target_index)
    return HiddenStates(shared, h[batch.target_index], torch.arange(len(batch.target_index), device=h.device))


def sequence_logps(model: CausalLM, hidden: HiddenStates, batch: TrainingBatch) -> tuple[Tensor, Tensor]:
    """Sums of the target tokens' log-probabilities by sequence [S], with gradient, and the numbers of tokens [S]."""
    assert batch.sequence_index is not None
    log_p = model.log_probs(hidden.rows, hidden.target_index, batch.targets)
    zeros = torch.zeros(batch.sequences, dtype=log_p.dtype, device=log_p.device)
    sums = zeros.index_add(0, batch.sequence_index, log_p)
    return sums, zeros.index_add(0, batch.sequence_index, torch.ones_like(log_p))


# Loader ---------------------------------------------------------------------------------------------------------------


@dataclass
class BatchLoader:
    """The batches of a run. Their order is a function of the seed alone, so a resumed run needs only its step."""

    examples: Sequence[Example]
    collate: Collate
    config: TrainConfig
    dist: DistContext
    cache: ActivationCache | None = None

    def stream(self, first: int) -> Iterator[list[int]]:
        """The endless stream of batches, as indices into `examples`, from batch number `first` on."""
        config, lengths = self.config, lengths_of(self.examples)
        per_epoch = math.ceil(len(lengths) / config.batch_size)
        epoch, skip = divmod(first, per_epoch)
        window = SORT_WINDOW if config.group_by_length else 0
        while True:
            yield from epoch_batches(lengths, config.batch_size, config.seed, epoch, window)[skip:]
            epoch, skip = epoch + 1, 0

    def examples_in(self, batches: int) -> int:
        """The number of examples in the first batches of the stream; an epoch's last batch may be smaller."""
        per_epoch = math.ceil(len(self.examples) / self.config.batch_size)
        epochs, rest = divmod(batches, per_epoch)
        return epochs * len(self.examples) + sum(map(len, islice(self.stream(epochs * per_epoch), rest)))

    def partition(self, rows: list[int]) -> list[int]:
        """This rank's rows of a batch; may be empty."""
        return self.dist.partition(rows, {row: self.examples[row].length for row in rows})

    def microbatches(self, rows: list[int]) -> list[TrainingBatch]:
        """These examples as micro-batches, with cached hidden states if there is a cache."""
        if not rows:
            return []
        examples, config = [self.examples[row] for row in rows], self.config
        options = CollateOptions(config.shared_prefix, config.target_positions, config.microbatch_tokens or 0)
        if self.cache is None:
            return make_microbatches(examples, self.collate, options)
        batches, start = [], 0
        for batch in make_microbatches(examples, self.collate, replace(options, prefix=self.cache.prefix)):
            b, t = batch.ids.shape
            hidden = self.cache.read(rows[start : start + b], t)
            batches.append(replace(batch, cached_hidden=(self.cache.layers, hidden)))
            start += b
        return batches
