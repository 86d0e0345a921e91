"""What a run will take, before it starts: FLOPs, speed, minutes and memory, from a short measurement on this machine.

The measurement runs the run's own loader and objective. Blocks of one kind take the same, so the forward and backward
pass of real batches is timed on truncated models, with the last block and with two more of each kind, and extrapolated
to full depth; so are the bytes that autograd saves. One pass through the whole model then corrects the sum: a few
blocks have their weights in the processor's caches, thirty do not.

    seconds(batch) = f (head(n) + layers * block(n))      each linear between a small and a large batch of n tokens

First comes the memory of the longest rows of both splits, measured on short pieces of them: a run that does not fit is
refused before anything large is computed.

    bytes(row) = a + b n + c n^2                          of the tensors alive at once, n tokens

Across ranks each measures its own part of the batches, all at the same time, so the communication of sharded weights is
included. Not included: checkpoints, and the all-reduce of adapters' gradients. Nothing depends on the weights' values:
`graft train --plan` fills the model with random ones (`exchange.huggingface.random_weights_model`).
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from heapq import nsmallest
from itertools import islice
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.files.formats import to_local
from graftlm.files.memory import free_mb
from graftlm.methods.base import trainable
from graftlm.methods.cost_model import model_flops
from graftlm.models.base import CausalLM
from graftlm.models.config import LayerConfig
from graftlm.text.collate import Example
from graftlm.text.example_table import lengths_of
from graftlm.training.batches import BatchLoader, HiddenStates, TrainingBatch, TrainingData, forward_batch
from graftlm.training.distributed import DistContext, unsharded_root
from graftlm.training.objectives import Objective
from graftlm.training.reporting import PeakTensorBytes, peak_rss_mb, rss_mb
from graftlm.training.setup import RunContext

PROBED_LAYERS = (1, 3)  # blocks of the two truncated models
MEMORY_LAYERS = (2, 4)  # where memory is measured: with one block the attention mask would be the largest tensor
PROBED = 64  # batches from which a small and a large one are chosen; the rest of the run is like them
PROBE_BATCH = 32  # examples of the validation that is timed
PROBE_LENGTHS = (1280, 1664, 2048)  # tokens of the pieces on which the memory of a longer row is measured


@dataclass(frozen=True)
class Estimate:
    """A prediction. Seconds are wall seconds on this machine under its present load."""

    steps: int
    examples: int
    model_tflop: float
    """Model FLOPs (`cost_model.model_flops`), 10^12."""
    examples_per_s: float
    train_seconds: float
    validation_seconds: float
    startup_seconds: float
    """What had passed when this was predicted: loading and checking. `--plan` reads no weights, so it is less there."""
    minutes: float
    """Everything, including what the objective computes before the first step."""
    peak_rss_mb: float


def make_plan(run: RunContext, startup_seconds: float, repeats: int = 3) -> Estimate:
    """Predict a run. The model's gradients, mode and random numbers are restored.

    Raises InputError, with the row's source, if its longest row needs more memory than is free.
    """
    config, model, dist, objective = run.config, run.loaded.model, run.dist, run.objective
    steps = config.max_iters or 0
    loader = replace(run.loader, examples=objective.with_placeholders(run.data.train))
    rows = list(islice(loader.stream(0), min(steps * config.grad_accum, PROBED)))
    with _preserve_state(model):
        probe = Probe(model, objective, run.method.layer_range(model.config).start, repeats)
        with dist.same_error_on_all_ranks():
            largest_mb = MemoryProbe(run, probe).checked_mb()
        batches = probe.batches(loader, rows, dist)
        sizes = [[part.padded_tokens for part in parts] for parts in batches]
        flat = sorted((part.padded_tokens, i, j) for i, parts in enumerate(batches) for j, part in enumerate(parts))
        small, large = (batches[i][j].to(model.device) for _, i, j in (flat[len(flat) // 10], flat[-1]))
        times = [probe.step_seconds(batch) for batch in (small, large)]
        statistics = probe.statistics_seconds(loader, rows[0], dist)
        validation, reference = probe.validation_seconds(run.data, config.seed), probe.setup_seconds(run.data)
        resident = rss_mb()  # before the whole pass, whose memory the process keeps for later steps
        correction = probe.whole_seconds(small) / times[0]
    (n0, t0), (n1, t1) = ((b.padded_tokens, correction * t) for b, t in zip((small, large), times, strict=True))
    slope = max(0.0, t1 - t0) / (n1 - n0) if n1 > n0 else 0.0
    per_batch = statistics + sum(max(0.0, t0 + slope * (n - n0)) for parts in sizes for n in parts) / len(sizes)
    update = _update_seconds(sum(to_local(p).numel() for p in trainable(model).values()))
    train_seconds = steps * (config.grad_accum * per_batch + update)
    validation_seconds = -(-steps // (config.eval_every or steps)) * validation / dist.size
    unique = dist.size * sum(part.non_shared_tokens for parts in batches for part in parts)
    unique += dist.size * sum(parts[0].shared.shape[1] for parts in batches)
    flops = model_flops(model.config, unique, run.method.passes(model.config))
    examples = loader.examples_in(steps * config.grad_accum)
    return Estimate(
        steps=steps,
        examples=examples,
        model_tflop=flops / len(batches) * steps * config.grad_accum / 1e12,
        examples_per_s=examples / train_seconds,
        train_seconds=train_seconds,
        validation_seconds=validation_seconds,
        startup_seconds=startup_seconds,
        minutes=(startup_seconds + reference / dist.size + train_seconds + validation_seconds) / 60,
        peak_rss_mb=round(max(peak_rss_mb(), resident + largest_mb), 0),
    )


@contextmanager
def _preserve_state(model: CausalLM) -> Iterator[None]:
    state, training = torch.get_rng_state(), model.training
    model.train()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        model.zero_grad(set_to_none=True)
        model.train(training)


@dataclass(frozen=True)
class Probe:
    """Times parts of a run on truncated models and extrapolates them to full depth."""

    model: CausalLM
    objective: Objective
    first: int
    """The first trained block; those below only run forward."""
    repeats: int

    def batches(self, loader: BatchLoader, rows: list[list[int]], dist: DistContext) -> list[list[TrainingBatch]]:
        """This rank's micro-batches; a rank without rows takes one of another's, as a step does."""
        examples = [loader.examples[row] for row in rows[0]]
        extra = self.objective.batch_statistics(self.model, examples, dist)
        parts = [loader.microbatches(loader.partition(some) or some[:1]) for some in rows]
        return [[part.with_extra(extra) for part in some] for some in parts]

    def time(self, run: Callable[[], object]) -> float:
        """The median of the seconds that `run` takes."""
        return _median_time(run, self.repeats)

    def step_seconds(self, batch: TrainingBatch) -> float:
        """Forward and backward pass of one micro-batch."""
        model, layers = self.model, self.model.config.num_layers
        hidden: list[HiddenStates] = []

        def upper() -> None:
            hidden[:] = [forward_batch(model, batch)]
            shared, h, _ = hidden[0]
            (h.sum() if shared is None else h.sum() + shared.sum()).backward()

        seconds = self.extrapolate(lambda: self.time(upper), range(self.first, layers))
        # The head is timed on random hidden states of the size the final norm gives: those of a truncated model have
        # likelihoods so small that arithmetic with them is many times slower.
        shared, h, index = hidden[0]
        random = HiddenStates(None if shared is None else _random_like(shared), _random_like(h), index)
        with unsharded_root(model):
            seconds += self.time(lambda: self.objective.loss_from_hidden(model, random, batch)[0].backward())
        if not self.first:
            return seconds

        def lower() -> None:
            with torch.no_grad():
                model.forward_lower_layers(batch.shared, batch.ids, len(model.blocks), batch.layout)

        with unsharded_root(model):
            return seconds + self.extrapolate(lambda: self.time(lower), range(self.first))

    def extrapolate(
        self, measure: Callable[[], float], blocks: range, probed: tuple[int, int] = PROBED_LAYERS
    ) -> float:
        """What `measure` returns with these blocks, from what it returns with few of them.

        These are the last probed[0] blocks that are trained, and then probed[1] - probed[0] more of each kind. Frozen
        ones come after them, so that gradients flow through all.
        """
        every = self.model.blocks
        trained = [i for i in blocks if any(p.requires_grad for p in every[i].parameters())]

        def with_blocks(indices: Sequence[int]) -> float:
            with _truncated(self.model, [every[i] for i in sorted(indices, key=lambda i: (i not in trained, i))]):
                return measure()

        last, others = (trained or blocks)[-probed[0] :], defaultdict[LayerConfig, list[int]](list)
        for i in (i for i in blocks if i not in last):
            others[self.model.config.layer(i)].append(i)
        base = with_blocks(last)
        total = base
        for same in others.values():
            more = same[probed[0] - probed[1] :]
            # With noise more blocks may look faster; no block takes negative time.
            total += len(same) * max(0.0, with_blocks([*more, *last]) - base) / len(more)
        return total

    def whole_seconds(self, batch: TrainingBatch) -> float:
        """Forward and backward pass of one micro-batch through all blocks, with head and loss."""

        def whole() -> None:
            self.objective.loss(self.model, batch)[0].backward()

        return _median_time(whole, self.repeats - 1) if self.repeats > 1 else _seconds(whole)

    def step_mb(self, batch: TrainingBatch) -> float:
        """MB of tensors at the peak of a micro-batch's forward and backward pass, its gradients included."""

        def measure() -> float:
            with PeakTensorBytes(self.model) as tensors:
                self.objective.loss(self.model, batch)[0].backward()
            self.model.zero_grad(set_to_none=True)
            return tensors.peak / 1e6

        return self.extrapolate(measure, range(self.first, self.model.config.num_layers), MEMORY_LAYERS)

    def evaluation_mb(self, data: TrainingData) -> float:
        """MB of tensors at the peak of an evaluation of `data.validation`."""
        extra = self.objective.batch_statistics(self.model, data.validation, DistContext())

        def measure() -> float:
            with PeakTensorBytes(self.model) as tensors:
                self.objective.evaluate(self.model, data, extra)
            return tensors.peak / 1e6

        return self.extrapolate(measure, range(self.model.config.num_layers), MEMORY_LAYERS)

    def statistics_seconds(self, loader: BatchLoader, rows: list[int], dist: DistContext) -> float:
        """The objective's `batch_statistics` of one batch."""
        examples = [loader.examples[row] for row in rows]
        return self._full_depth(lambda: self.objective.batch_statistics(self.model, examples, dist))

    def validation_seconds(self, data: TrainingData, seed: int) -> float:
        """One validation, from examples of median length, and the objective's other measurements."""
        return self._evaluation_seconds([data.validation], data) + self._full_depth(
            lambda: self.objective.monitor(self.model, data, seed)
        )

    def setup_seconds(self, data: TrainingData) -> float:
        """What the objective computes before the first step."""
        count = self.objective.unknown(data)
        parts = (data.train, data.validation)
        return self._evaluation_seconds(parts, data) * count / sum(map(len, parts)) if count else 0.0

    def _evaluation_seconds(self, parts: Sequence[Sequence[Example]], data: TrainingData) -> float:
        ordered = _by_length(parts)
        middle = ordered[max(0, len(ordered) // 2 - PROBE_BATCH // 2) :][:PROBE_BATCH]
        some = self.objective.with_placeholders([parts[part][row] for _, part, row in middle])
        extra = self.objective.batch_statistics(self.model, some, DistContext())
        part = replace(data, validation=some)
        seconds = self._full_depth(lambda: self.objective.evaluate(self.model, part, extra))
        return seconds * len(ordered) / len(some)

    def _full_depth(self, run: Callable[[], object]) -> float:
        return self.extrapolate(lambda: _median_time(run, 1), range(self.model.config.num_layers))


@dataclass(frozen=True)
class MemoryProbe:
    """The memory of a run's largest passes."""

    run: RunContext
    probe: Probe

    def checked_mb(self) -> float:
        """MB that the largest pass takes besides what is resident now; an InputError if less is free."""
        state = 2 * sum(to_local(p).numel() * p.element_size() for p in trainable(self.probe.model).values()) / 1e6
        free, largest = free_mb(self.run.device) - state, 0.0
        for what, measure, rows in (
            ("training", self.train_mb, self.largest_microbatch),
            ("validating", self.validate_mb, self.largest_pass),
        ):
            mb = self.megabytes(measure, rows())
            if mb > free:
                fits = next((n for n in _halved(rows()[0].length) if self.megabytes(measure, rows(n)) <= free), 0)
                raise InputError(_too_large(rows(), what, (mb + state, free + state), fits))
            largest = max(largest, mb)
        return largest + state

    def megabytes(self, measure: Callable[[Sequence[Example]], float], rows: Sequence[Example]) -> float:
        """MB of a pass over these rows, the longest first."""
        tokens = rows[0].length
        if len(rows) * tokens <= PROBE_LENGTHS[-1]:
            return measure(rows)
        values = [measure([_shortened(rows[0], n)]) for n in PROBE_LENGTHS]
        mask = 6 * tokens**2 / 1e6  # while it is built; of short pieces other tensors are larger
        return len(rows) * max(mask, float(np.polyval(np.polyfit(PROBE_LENGTHS, values, 2), tokens)))

    def largest_microbatch(self, limit: int = 2**62) -> list[Example]:
        """The rows of the micro-batch with the longest row, that one first, each shortened to `limit` tokens."""
        rows = _longest_first([self.run.data.train], self.run.config.batch_size, limit)
        parts, _ = replace(self.run.loader, examples=rows).split(range(len(rows)))
        return [rows[i] for i in parts[0]]

    def largest_pass(self, limit: int = 2**62) -> list[Example]:
        """The same of the pass without gradient that has the longest row."""
        data = self.run.data
        parts = [data.validation, *([data.train] if self.probe.objective.unknown(data) else [])]
        rows = _longest_first(parts, PROBE_BATCH, limit)
        return rows[: max(1, data.max_tokens // rows[0].length)]

    def train_mb(self, rows: Sequence[Example]) -> float:
        """MB of a training step on these rows."""
        extra = self.probe.objective.batch_statistics(self.probe.model, rows, DistContext())
        loader = replace(self.run.loader, examples=self.probe.objective.with_placeholders(rows))
        batch = loader.microbatches(list(range(len(rows))))[0]
        return self.probe.step_mb(batch.with_extra(extra).to(self.probe.model.device))

    def validate_mb(self, rows: Sequence[Example]) -> float:
        """MB of a validation of these rows."""
        return self.probe.evaluation_mb(replace(self.run.data, validation=self.probe.objective.with_placeholders(rows)))


def _halved(tokens: int) -> Iterator[int]:
    while (tokens := tokens // 2) >= 32:
        yield tokens


def _by_length(parts: Sequence[Sequence[Example]]) -> list[tuple[int, int, int]]:
    """(length, part, number) of all examples, by length; those of one length stay in order."""
    return sorted((length, part, n) for part, some in enumerate(parts) for n, length in enumerate(lengths_of(some)))


def _longest_first(parts: Sequence[Sequence[Example]], count: int, limit: int) -> list[Example]:
    longest = nsmallest(count, ((-length, part, n) for length, part, n in _by_length(parts)))
    return [_shortened(parts[part][n], limit) for _, part, n in longest]


def _shortened(example: Example, tokens: int) -> Example:
    """The example with at most about this many tokens, each of its texts shortened by the same factor."""
    if example.length <= tokens:
        return example
    texts = {name: getattr(example, name) for name in ("prompt_ids", "completion_ids", "rejected_ids")}
    return replace(example, **{n: ids[: max(2, len(ids) * tokens // example.length)] for n, ids in texts.items()})


def _too_large(rows: Sequence[Example], what: str, megabytes: tuple[float, float], fits: int) -> str:
    """What is wrong with rows that need more memory than is free (megabytes: both), and what to set."""
    longest, (mb, free) = rows[0], megabytes
    cure = "use a smaller model or another --method"
    if len(rows) > 1:
        cure = f"set --microbatch_tokens {max(64, longest.length // 8)}"
    elif fits and (longest.label is not None or longest.masked_spans):
        cure = f"set --max_length {fits} to truncate it"
    elif fits:
        cure = f"shorten it to {fits:,} tokens or leave it out"
    count = "a row" if len(rows) == 1 else f"{len(rows)} rows"
    return (
        f"{longest.source}: not enough memory: {what} {count} of {longest.length:,} tokens takes about "
        f"{mb:,.0f} MB, and {free:,.0f} MB are free: {cure}"
    )


@contextmanager
def _truncated(model: CausalLM, blocks: Sequence[nn.Module]) -> Iterator[None]:
    every = model.blocks
    model.blocks = nn.ModuleList(blocks)
    try:
        yield
    finally:
        model.blocks = every


def _random_like(t: Tensor) -> Tensor:
    return torch.randn_like(t).requires_grad_()


def _median_time(run: Callable[[], object], repeats: int) -> float:
    """The median of the seconds it takes, after one run to warm up."""
    run()
    return median(_seconds(run) for _ in range(repeats))


def _seconds(run: Callable[[], object]) -> float:
    start = _now()
    run()
    return _now() - start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # work on a GPU is only queued
    return time.perf_counter()


def _update_seconds(trained: int, sample: int = 1_000_000) -> float:
    """Clipping and AdamW's step on this many parameters, from a sample."""
    p = nn.Parameter(torch.zeros(min(trained, sample)))
    optimizer = torch.optim.AdamW([p], lr=1e-3, fused=True)
    p.grad = torch.ones_like(p)
    optimizer.step()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        optimizer.step()

    return _seconds(update) * trained / p.numel()
