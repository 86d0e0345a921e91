"""Examples -> padded tensors ready for a forward pass, and the order in which a run visits its examples.

The tokens that all prompts of a batch share run once, with gradient, and every row attends to their keys and values
(`CausalLM.forward_shared_prefix`). The head runs only at target positions. Neither changes the gradient
(tests/training/test_objectives.py); with dropout, the rows share the masks of the shared tokens.

A preference pair is one row, prompt, chosen, rejected, so that its prompt runs once; with --packing a row holds several
records (`packing.py`). `models/row_layout.py` says what then belongs together.

Letters: B rows, T tokens of the longest row without the shared prefix, P shared tokens, R records, N targets, S scored
sequences.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from graftlm.config import TrainConfig
from graftlm.inference.decoder import MAX_PASS_TOKENS, shared_prefix_length
from graftlm.models.base import CausalLM, flat_to_padded
from graftlm.models.row_layout import PackedRows, PairedRow, RowLayout
from graftlm.text.boundary import Tokens
from graftlm.text.collate import SORT_WINDOW, Example, epoch_batches
from graftlm.text.example_table import lengths_of
from graftlm.training.activation_cache import ActivationCache
from graftlm.training.distributed import DistContext
from graftlm.training.packing import pack_rows, row_width

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
    progress: Callable[[int], object] | None = None
    """Called in a validation with the number of examples just evaluated."""

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
    row_tokens: int = 0
    """Maximum tokens of a row into which records are packed, the shared ones excluded; 0: a row for each record."""

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
    """[B, T] each row's own tokens, of each record without its last, which is only predicted."""
    starts: Tensor
    """[R] flat index in `ids` of each record's first own token."""
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
    layout: RowLayout | None = None
    """What a row holds, if it is more than one text."""
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
        return self.tokens - len(self.starts) * self.shared.shape[1]

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
            for name in ("shared", "ids", "starts", "positions", "target_index", "targets", "layout", "sequence_index")
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
    texts = [(*prompt, *(t for ids in some for t in ids[:-1])) for prompt, some in zip(prompts, answers, strict=True)]
    packed = pack_rows(list(map(len, texts)), options.row_tokens) if options.row_tokens else None
    ids, starts, layout = _place(texts, packed or [[i] for i in range(len(texts))])
    index, targets, sequence = list[int](), list[int](), list[int]()
    for i, (example, prompt, text, start) in enumerate(zip(examples, prompts, texts, starts, strict=True)):
        if loss_on == "all":
            targets += (*text[1:], example.completion_ids[-1])
            index += range(start, start + len(text))
        first, fed = start + len(prompt) - 1, 0  # predicts the first token of each answer
        for n, answer in enumerate(answers[i] if loss_on == "completion" else ()):
            learned = range(example.skip, len(answer)) if pairs else example.loss_positions
            index += [first + (fed + k if k else 0) for k in learned]
            targets += [answer[k] for k in learned]
            sequence += [len(answers[i]) * i + n] * len(learned)
            fed += len(answer) - 1
    target_index, positions = torch.tensor(index, dtype=torch.long), None
    if loss_on == "completion" and options.targets_only:
        flat, back = target_index.unique(return_inverse=True)  # one token predicts the first tokens of both answers
        positions, slots = flat_to_padded(flat, *ids.shape)
        target_index = slots[back]
    ends = (
        [len(prompt) for prompt in prompts],
        [len(p) + len(some[0]) - 1 for p, some in zip(prompts, answers, strict=True)],
    )
    return TrainingBatch(
        torch.tensor(examples[0].prompt_ids[:p], dtype=torch.long)[None],
        ids,
        torch.tensor(starts),
        positions,
        target_index,
        torch.tensor(targets, dtype=torch.long),
        # loss_on all: the shared tokens but the first, and each row's first own token, which the last of them predicts.
        weight=len(targets) + (p * len(examples) if loss_on == "all" else 0),
        tokens=sum(e.length for e in examples),
        full_logits=not options.targets_only,
        layout=PairedRow(*map(torch.tensor, ends)) if pairs else layout,
        sequence_index=torch.tensor(sequence, dtype=torch.long),
        sequences=sum(map(len, answers)),
    )


def _place(
    texts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]]
) -> tuple[Tensor, list[int], PackedRows | None]:
    """These texts in rows: ids [B, T], where each text starts in the flattened ids, and the layout of packed rows."""
    t = max(sum(len(texts[i]) for i in row) for row in rows)
    ids, starts = torch.zeros(len(rows), t, dtype=torch.long), [0] * len(texts)
    layout = torch.arange(t).repeat(len(rows), 1)  # a token of padding is a record of its own
    for b, row in enumerate(rows):
        at = 0
        for i in row:
            end = at + len(texts[i])
            ids[b, at:end], layout[b, at:end], starts[i] = torch.tensor(texts[i]), at, b * t + at
            at = end
    return ids, starts, PackedRows(layout) if len(rows) < len(texts) else None


Collate = Callable[[Sequence[Example], CollateOptions], TrainingBatch]


def make_microbatches(
    examples: Sequence[Example], collate: Collate, options: CollateOptions | None = None
) -> list[TrainingBatch]:
    """One batch, or, if its `ids` would exceed `options.max_tokens`, several of about equal size.

    Their losses, and so their gradients, add up to the one batch's. A single row is never split.
    """
    parts, options = split_microbatches(examples, options or CollateOptions())
    return [collate([examples[i] for i in part], options) for part in parts]


def split_microbatches(examples: Sequence[Example], options: CollateOptions) -> tuple[list[list[int]], CollateOptions]:
    """The examples of each micro-batch, and the options to collate them with."""
    p = options.prefix_length(examples)
    sizes = [e.length - p - len(e.answers) for e in examples]  # the last token of an answer is never fed
    rows = [[i] for i in range(len(examples))]
    if options.row_tokens:
        options = replace(options, prefix=p, row_tokens=row_width(sizes, options.row_tokens))
        rows = pack_rows(sizes, options.row_tokens)
    width = max(sum(sizes[i] for i in row) for row in rows)
    parts = math.ceil(len(rows) / max(1, options.max_tokens // width)) if options.max_tokens else 1
    count = math.ceil(len(rows) / parts)  # as even as possible: a small last part would waste its pass
    return [[i for row in rows[n : n + count] for i in row] for n in range(0, len(rows), count)], options


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
    shared, h = model.forward_shared_prefix(batch.shared, batch.ids, batch.positions, batch.cached_hidden, batch.layout)
    h = h.flatten(0, 1)
    if batch.full_logits or isinstance(batch.layout, PairedRow):  # targets may share a row
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

    def split(self, rows: Sequence[int]) -> tuple[list[list[int]], CollateOptions]:
        """The rows of each micro-batch, and the options to collate them with."""
        config, cache = self.config, self.cache
        row_tokens = min(config.max_length or 0, config.microbatch_tokens or sys.maxsize) if config.packing else 0
        options = CollateOptions(
            config.shared_prefix,
            config.target_positions,
            config.microbatch_tokens or 0,
            cache.prefix if cache else None,
            row_tokens,
        )
        parts, options = split_microbatches([self.examples[row] for row in rows], options)
        return [[rows[i] for i in part] for part in parts], options

    def microbatches(self, rows: Sequence[int]) -> list[TrainingBatch]:
        """These examples as micro-batches, with cached hidden states if there is a cache."""
        if not rows:
            return []
        parts, options = self.split(rows)
        batches = [self.collate([self.examples[row] for row in part], options) for part in parts]
        if (cache := self.cache) is None:
            return batches
        hidden = (cache.read(part, b.starts, b.ids.numel()) for part, b in zip(parts, batches, strict=True))
        return [replace(b, cached_hidden=(cache.layers, x)) for b, x in zip(batches, hidden, strict=True)]
