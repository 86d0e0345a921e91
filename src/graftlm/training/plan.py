"""What a run will take, before it starts: work, speed, minutes and memory, from a short probe of this machine.

What is unusual here: *the probe is the step itself on a lower building*. All blocks are alike, so the model with its
last block alone, and with its last three, is run forward and backward on batches of this very run; what two more
blocks add, times the layers, and what is left at none are the step's time. The bytes autograd keeps are counted alike.
So whatever a step does, with this method, objective and number format, is in the figure without being described twice.
One pass through the whole building, of the small batch, then says by how much the sum of its parts is wrong: a few
blocks find their weights in the processor's caches, thirty do not.

    seconds(batch) = f (head(n) + layers * block(n))      each linear between a small and a large batch of n tokens

Of several processes each probes its own share of the batches, all at once, and where weights are cut over them, what
they send each other is in it. Left out: the time of checkpoints, and of adapters' gradients on their way.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import nn

from graftlm.config import TrainConfig
from graftlm.files.cut import local
from graftlm.inference.scoring import score
from graftlm.methods.accounting import needed_flops
from graftlm.methods.base import trainable
from graftlm.models.base import CausalLM
from graftlm.text.data import Example
from graftlm.training.distributed import outside_blocks
from graftlm.training.memory import kept_for_backward, peak_rss_mb, rss_mb
from graftlm.training.objectives import Batch, make_batches, read_batch
from graftlm.training.preferences import loss_of, targets_of
from graftlm.training.prepare import Prepared
from graftlm.training.reference import Start, reference_sums, sampled_kl, with_reference
from graftlm.training.schedule import batch_stream

FEW, MANY = 1, 3  # blocks of the two lower buildings
PROBED = 64  # batches that are looked at to find a small and a large one; the rest of the run is like them
VALIDATED = 32  # examples that are scored together


@dataclass(frozen=True)
class Plan:
    """A prediction. Seconds are wall seconds on this machine as it is now."""

    steps: int
    examples: int
    needed_tflop: float
    """Work in the layers' matrices that cannot be done without (`accounting.needed_flops`), 10^12 operations."""
    examples_per_s: float
    train_seconds: float
    validation_seconds: float
    startup_seconds: float
    """What had passed when this was predicted: loading and checking."""
    minutes: float
    """All together, with the reference's log-probabilities of pairs, where they are to be computed."""
    peak_rss_mb: float

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def make_plan(prepared: Prepared, startup_seconds: float, repeats: int = 3) -> Plan:
    """Predict a prepared run. Leaves no trace: no gradient, no change of random numbers or of the model's mode."""
    config, model = prepared.config, prepared.loaded.model
    steps, device = config.max_iters or 0, model.device
    made = _batches(prepared, min(steps * config.grad_accum, PROBED))
    sizes = [[computed(part) for part in parts] for parts in made]
    flat = sorted((computed(part), i, j) for i, parts in enumerate(made) for j, part in enumerate(parts))
    ends = [made[i][j].to(device) for _, i, j in (flat[len(flat) // 10], flat[-1])]
    first, layers = prepared.method.span(model.shape).start, model.shape.layers
    with _no_trace(model):
        times = [_step_seconds(model, batch, config, layers, first, repeats) for batch in ends]
        saved = _saved_mb(model, ends[-1], config, layers - first)
        validation, reference = _validation_seconds(model, prepared), _reference_seconds(model, prepared)
        held = rss_mb()  # before the whole pass, whose memory the process keeps for the steps to come
        wrong = _whole_seconds(model, ends[0], config, repeats) / times[0]
    (n0, t0), (n1, t1) = ((computed(batch), wrong * seconds) for batch, seconds in zip(ends, times, strict=True))
    slope = max(0.0, t1 - t0) / (n1 - n0) if n1 > n0 else 0.0
    per_batch = sum(max(0.0, t0 + slope * (n - n0)) for parts in sizes for n in parts) / len(sizes)
    update = _update_seconds(sum(local(p).numel() for p in trainable(model).values()))
    train_seconds = steps * (config.grad_accum * per_batch + update)
    judged = -(-steps // (config.eval_every or steps))
    world = prepared.world
    validation, reference = validation / world.size, reference / world.size
    needed = world.size * sum(part.own_tokens for parts in made for part in parts)
    needed += world.size * sum(p[0].shared.shape[1] for p in made)
    flops = needed_flops(model.shape, needed, first_trained=first, weights_trained=prepared.method.stores_model)
    examples = steps * config.grad_accum * min(config.batch_size, len(prepared.train))
    return Plan(
        steps=steps,
        examples=examples,
        needed_tflop=flops / len(made) * steps * config.grad_accum / 1e12,
        examples_per_s=examples / train_seconds,
        train_seconds=train_seconds,
        validation_seconds=judged * validation,
        startup_seconds=startup_seconds,
        minutes=(startup_seconds + reference + train_seconds + judged * validation) / 60,
        peak_rss_mb=round(_peak_mb(model, held, saved, max(n for parts in sizes for n in parts)), 0),
    )


def computed(batch: Batch) -> int:
    """Tokens a pass computes: shared ones once, padding too."""
    return batch.shared.shape[1] + batch.ids.numel()


def _batches(prepared: Prepared, count: int) -> list[list[Batch]]:
    config, examples = prepared.config, _timed(prepared.train, prepared)
    lengths = [e.length for e in examples]
    how = (targets_of(config), config.shared_prefix, config.micro_tokens or 0, config.target_positions)
    stream = islice(batch_stream(lengths, config, 0), count)
    mine = (prepared.world.share(rows, lengths) or rows[:1] for rows in stream)
    return [make_batches([examples[i] for i in rows], *how) for rows in mine]


def _timed(examples: Sequence[Example], prepared: Prepared) -> list[Example]:
    """The examples; pairs with any number for the reference where it is not known yet, which takes no other time."""
    if prepared.config.objective == "dpo" and any(e.reference is None for e in examples):
        return with_reference(examples, torch.zeros(len(examples), 2))
    return list(examples)


@contextmanager
def _no_trace(model: CausalLM) -> Iterator[None]:
    state, training = torch.get_rng_state(), model.training
    model.train()
    try:
        yield
    finally:
        torch.set_rng_state(state)
        model.zero_grad(set_to_none=True)
        model.train(training)


@contextmanager
def _blocks(model: CausalLM, blocks: Sequence[nn.Module]) -> Iterator[None]:
    whole = model.blocks
    model.blocks = nn.ModuleList(blocks)
    try:
        yield
    finally:
        model.blocks = whole


def _step_seconds(model: CausalLM, batch: Batch, config: TrainConfig, layers: int, first: int, repeats: int) -> float:
    """Forward and backward of one batch: blocks from `first` on with gradient, those below forward only."""

    def both() -> None:
        shared, h, _ = read_batch(model, batch)
        (h.sum() if shared is None else h.sum() + shared.sum()).backward()

    # The head apart, on hidden states of the size the final norm gives: those that a few blocks alone make have
    # likelihoods so small that arithmetic with them is many times slower.
    n = batch.pick.numel() + (batch.shared.numel() + len(batch.ids) if batch.at is None else 0)
    n = int(batch.pick.unique().numel()) if batch.fork is not None else n
    h = torch.randn(n, model.shape.d_model, dtype=model.dtype, device=model.device, requires_grad=True)
    rows = torch.arange(n, device=model.device)

    def head() -> None:
        if batch.fork is not None:
            model.log_probs(h, rows, rows % model.shape.vocab).sum().backward()
            return
        model.loss(h, rows, rows % model.shape.vocab, torch.ones(n, device=model.device)).backward()

    upper = _extrapolated(model, both, layers - first, model.blocks[first:], repeats)
    with outside_blocks(model):
        upper += _typical(head, repeats)
    if not first:
        return upper

    def lower() -> None:
        with torch.no_grad():
            model.lower(batch.shared, batch.ids, len(model.blocks), batch.fork)

    with outside_blocks(model):
        return upper + _extrapolated(model, lower, first, model.blocks[:first], repeats)


def _extrapolated(model: CausalLM, run: Callable[[], None], count: int, blocks: nn.ModuleList, repeats: int) -> float:
    """Seconds of `run` with `count` blocks, from its seconds with the last FEW and MANY of `blocks`."""
    seconds = {}
    for k in (min(FEW, count), min(MANY, count)):
        with _blocks(model, list(blocks)[-k:]):
            seconds[k] = _typical(run, repeats)
    few, many = min(seconds), max(seconds)
    # A noisy moment may let three blocks look cheaper than one; no block takes less than no time.
    each = max(0.0, seconds[many] - seconds[few]) / (many - few) if many > few else 0.0
    return seconds[few] + each * (count - few)


def _whole_seconds(model: CausalLM, batch: Batch, config: TrainConfig, repeats: int) -> float:
    """Forward and backward of one batch through all blocks, with head and loss."""

    def whole() -> None:
        loss_of(config)(model, batch)[0].backward()

    return _typical(whole, repeats - 1) if repeats > 1 else _seconds(whole)


def _typical(run: Callable[[], None], repeats: int) -> float:
    """The middle of the seconds it takes, behind one run to warm up."""
    run()
    return median(_seconds(run) for _ in range(repeats))


def _seconds(run: Callable[[], None]) -> float:
    began = _now()
    run()
    return _now() - began


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what was asked of a GPU is only queued
    return time.perf_counter()


def _saved_mb(model: CausalLM, batch: Batch, config: TrainConfig, layers: int) -> float:
    """MB that autograd keeps from forward to backward."""
    found = []
    for k in (min(FEW, layers), min(MANY, layers)):
        with _blocks(model, list(model.blocks)[-k:]), kept_for_backward(model) as kept:
            loss, _ = loss_of(config)(model, batch)
            found.append((k, kept() / 1e6))
            del loss
    (few, least), (many, most) = found
    each = (most - least) / (many - few) if many > few else 0.0
    return least + each * (layers - few)


def _validation_seconds(model: CausalLM, prepared: Prepared) -> float:
    """One validation, from the scores of a few examples of middling length."""
    examples, config = prepared.validation, prepared.config
    some = _middling(examples)
    if config.objective == "dpo":
        seconds = _pairs_seconds(model, some) * len(examples) / len(some)
        if not config.kl_samples:
            return seconds

        def sample() -> None:
            eot = prepared.loaded.tokenizer.eot
            sampled_kl(model, Start.of(model), prepared.validation, config.kl_samples, eot, config.seed)

        return seconds + _extrapolated(model, sample, model.shape.layers, model.blocks, 1)

    def read() -> None:
        score(model, some, prepared.label_ids, batch_size=VALIDATED)

    return _extrapolated(model, read, model.shape.layers, model.blocks, 1) * len(examples) / len(some)


def _reference_seconds(model: CausalLM, prepared: Prepared) -> float:
    """What the log-probabilities of all pairs under the reference take; 0 where they are known, or need not be."""
    pairs = [*prepared.train, *prepared.validation]
    if prepared.config.objective != "dpo" or not prepared.wants_reference or pairs[0].reference is not None:
        return 0.0
    some = _middling(pairs)
    return _pairs_seconds(model, some) * len(pairs) / len(some)


def _middling(examples: Sequence[Example]) -> list[Example]:
    """A few examples of middling length."""
    ordered = sorted(examples, key=lambda e: e.length)
    return ordered[max(0, len(ordered) // 2 - VALIDATED // 2) :][:VALIDATED]


def _pairs_seconds(model: CausalLM, some: Sequence[Example]) -> float:
    """A forward pass of these pairs."""

    def read() -> None:
        reference_sums(model, some)

    return _extrapolated(model, read, model.shape.layers, model.blocks, 1)


def _update_seconds(trained: int, sample: int = 1_000_000) -> float:
    """Clipping and AdamW's step on so many parameters, from a small sample of its own."""
    p = nn.Parameter(torch.zeros(min(trained, sample)))
    optimizer = torch.optim.AdamW([p], lr=1e-3, fused=True)
    p.grad = torch.ones_like(p)
    optimizer.step()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        optimizer.step()

    return _seconds(update) * trained / p.numel()


def _peak_mb(model: CausalLM, held_mb: float, saved_mb: float, tokens: int) -> float:
    """What stands in memory at the height of the largest step, and at least what has been reached already."""
    trained = sum(local(p).numel() * p.element_size() for p in trainable(model).values())
    item = torch.empty(0, dtype=model.dtype).element_size()
    working = 4 * tokens * model.shape.d_ff * item  # the gradients in flight of the widest part, the MLP
    return max(peak_rss_mb(), held_mb + saved_mb + (3 * trained + working) / 1e6)
