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
from graftlm.files.sharded import to_local
from graftlm.inference.scoring import score
from graftlm.methods.base import trainable
from graftlm.methods.cost_model import model_flops
from graftlm.models.base import CausalLM
from graftlm.text.collate import Example
from graftlm.training.distributed import unsharded_root
from graftlm.training.memory import peak_rss_mb, rss_mb, saved_activation_bytes
from graftlm.training.objectives import TrainingBatch, forward_batch, make_microbatches
from graftlm.training.preferences import batch_kind, make_loss
from graftlm.training.reference_logps import InitialWeights, reference_logps, sampled_kl, with_reference
from graftlm.training.schedule import batch_stream
from graftlm.training.setup import RunContext

PROBE_LAYERS_SMALL, PROBE_LAYERS_LARGE = 1, 3  # blocks of the two lower buildings
PROBED = 64  # batches that are looked at to find a small and a large one; the rest of the run is like them
PROBE_BATCH = 32  # examples that are scored together


@dataclass(frozen=True)
class Estimate:
    """A prediction. Seconds are wall seconds on this machine as it is now."""

    steps: int
    examples: int
    model_tflop: float
    """Work in the layers' matrices that cannot be done without (`accounting.model_flops`), 10^12 operations."""
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


def make_plan(prepared: RunContext, startup_seconds: float, repeats: int = 3) -> Estimate:
    """Predict a prepared run. Leaves no trace: no gradient, no change of random numbers or of the model's mode."""
    config, model = prepared.config, prepared.loaded.model
    steps, device = config.max_iters or 0, model.device
    made = _batches(prepared, min(steps * config.grad_accum, PROBED))
    sizes = [[padded_tokens(part) for part in parts] for parts in made]
    flat = sorted((padded_tokens(part), i, j) for i, parts in enumerate(made) for j, part in enumerate(parts))
    ends = [made[i][j].to(device) for _, i, j in (flat[len(flat) // 10], flat[-1])]
    first, layers = prepared.method.layer_range(model.config).start, model.config.num_layers
    with _preserve_state(model):
        times = [_step_seconds(model, batch, config, layers, first, repeats) for batch in ends]
        saved = _saved_mb(model, ends[-1], config, layers - first)
        validation, reference = _validation_seconds(model, prepared), _reference_seconds(model, prepared)
        held = rss_mb()  # before the whole pass, whose memory the process keeps for the steps to come
        wrong = _whole_seconds(model, ends[0], config, repeats) / times[0]
    (n0, t0), (n1, t1) = ((padded_tokens(batch), wrong * seconds) for batch, seconds in zip(ends, times, strict=True))
    slope = max(0.0, t1 - t0) / (n1 - n0) if n1 > n0 else 0.0
    per_batch = sum(max(0.0, t0 + slope * (n - n0)) for parts in sizes for n in parts) / len(sizes)
    update = _update_seconds(sum(to_local(p).numel() for p in trainable(model).values()))
    train_seconds = steps * (config.grad_accum * per_batch + update)
    judged = -(-steps // (config.eval_every or steps))
    world = prepared.world
    validation, reference = validation / world.size, reference / world.size
    needed = world.size * sum(part.non_shared_tokens for parts in made for part in parts)
    needed += world.size * sum(p[0].shared.shape[1] for p in made)
    flops = model_flops(model.config, needed, prepared.method.passes(model.config))
    examples = steps * config.grad_accum * min(config.batch_size, len(prepared.train))
    return Estimate(
        steps=steps,
        examples=examples,
        model_tflop=flops / len(made) * steps * config.grad_accum / 1e12,
        examples_per_s=examples / train_seconds,
        train_seconds=train_seconds,
        validation_seconds=judged * validation,
        startup_seconds=startup_seconds,
        minutes=(startup_seconds + reference + train_seconds + judged * validation) / 60,
        peak_rss_mb=round(_peak_mb(model, held, saved, max(n for parts in sizes for n in parts)), 0),
    )


def padded_tokens(batch: TrainingBatch) -> int:
    """Tokens a pass computes: shared ones once, padding too."""
    return batch.shared.shape[1] + batch.ids.numel()


def _batches(prepared: RunContext, count: int) -> list[list[TrainingBatch]]:
    config, examples = prepared.config, _timed(prepared.train, prepared)
    lengths = [e.length for e in examples]
    how = (batch_kind(config), config.shared_prefix, config.microbatch_tokens or 0, config.target_positions)
    stream = islice(batch_stream(lengths, config, 0), count)
    mine = (prepared.world.partition(rows, lengths) or rows[:1] for rows in stream)
    return [make_microbatches([examples[i] for i in rows], *how) for rows in mine]


def _timed(examples: Sequence[Example], prepared: RunContext) -> list[Example]:
    """The examples; pairs with any number for the reference where it is not known yet, which takes no other time."""
    if prepared.config.objective == "dpo" and any(e.reference is None for e in examples):
        return with_reference(examples, torch.zeros(len(examples), 2))
    return list(examples)


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


@contextmanager
def _blocks(model: CausalLM, blocks: Sequence[nn.Module]) -> Iterator[None]:
    whole = model.blocks
    model.blocks = nn.ModuleList(blocks)
    try:
        yield
    finally:
        model.blocks = whole


def _step_seconds(
    model: CausalLM, batch: TrainingBatch, config: TrainConfig, layers: int, first: int, repeats: int
) -> float:
    """Forward and backward of one batch: blocks from `first` on with gradient, those below forward only."""

    def both() -> None:
        shared, h, _ = forward_batch(model, batch)
        (h.sum() if shared is None else h.sum() + shared.sum()).backward()

    # The head apart, on hidden states of the size the final norm gives: those that a few blocks alone make have
    # likelihoods so small that arithmetic with them is many times slower.
    n = batch.target_index.numel() + (batch.shared.numel() + len(batch.ids) if batch.positions is None else 0)
    n = int(batch.target_index.unique().numel()) if batch.fork is not None else n
    h = torch.randn(n, model.config.hidden_size, dtype=model.dtype, device=model.device, requires_grad=True)
    rows = torch.arange(n, device=model.device)

    def head() -> None:
        if batch.fork is not None:
            model.log_probs(h, rows, rows % model.config.vocab_size).sum().backward()
            return
        model.loss(h, rows, rows % model.config.vocab_size, torch.ones(n, device=model.device)).backward()

    upper = _extrapolate_layers(model, both, layers - first, model.blocks[first:], repeats)
    with unsharded_root(model):
        upper += _median_time(head, repeats)
    if not first:
        return upper

    def lower() -> None:
        with torch.no_grad():
            model.forward_lower_layers(batch.shared, batch.ids, len(model.blocks), batch.fork)

    with unsharded_root(model):
        return upper + _extrapolate_layers(model, lower, first, model.blocks[:first], repeats)


def _extrapolate_layers(
    model: CausalLM, run: Callable[[], None], count: int, blocks: nn.ModuleList, repeats: int
) -> float:
    """Seconds of `run` with `count` blocks, from its seconds with the last FEW and MANY of `blocks`."""
    seconds = {}
    for k in (min(PROBE_LAYERS_SMALL, count), min(PROBE_LAYERS_LARGE, count)):
        with _blocks(model, list(blocks)[-k:]):
            seconds[k] = _median_time(run, repeats)
    few, many = min(seconds), max(seconds)
    # A noisy moment may let three blocks look cheaper than one; no block takes less than no time.
    each = max(0.0, seconds[many] - seconds[few]) / (many - few) if many > few else 0.0
    return seconds[few] + each * (count - few)


def _whole_seconds(model: CausalLM, batch: TrainingBatch, config: TrainConfig, repeats: int) -> float:
    """Forward and backward of one batch through all blocks, with head and loss."""

    def whole() -> None:
        make_loss(config)(model, batch)[0].backward()

    return _median_time(whole, repeats - 1) if repeats > 1 else _seconds(whole)


def _median_time(run: Callable[[], None], repeats: int) -> float:
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


def _saved_mb(model: CausalLM, batch: TrainingBatch, config: TrainConfig, layers: int) -> float:
    """MB that autograd keeps from forward to backward."""
    found = []
    for k in (min(PROBE_LAYERS_SMALL, layers), min(PROBE_LAYERS_LARGE, layers)):
        with _blocks(model, list(model.blocks)[-k:]), saved_activation_bytes(model) as kept:
            loss, _ = make_loss(config)(model, batch)
            found.append((k, kept() / 1e6))
            del loss
    (few, least), (many, most) = found
    each = (most - least) / (many - few) if many > few else 0.0
    return least + each * (layers - few)


def _validation_seconds(model: CausalLM, prepared: RunContext) -> float:
    """One validation, from the scores of a few examples of middling length."""
    examples, config = prepared.validation, prepared.config
    some = _median_length_examples(examples)
    if config.objective == "dpo":
        seconds = _pairs_seconds(model, some) * len(examples) / len(some)
        if not config.kl_samples:
            return seconds

        def sample() -> None:
            eot = prepared.loaded.tokenizer.eot
            sampled_kl(model, InitialWeights.of(model), prepared.validation, config.kl_samples, eot, config.seed)

        return seconds + _extrapolate_layers(model, sample, model.config.num_layers, model.blocks, 1)

    def read() -> None:
        score(model, some, prepared.label_ids, batch_size=PROBE_BATCH)

    return _extrapolate_layers(model, read, model.config.num_layers, model.blocks, 1) * len(examples) / len(some)


def _reference_seconds(model: CausalLM, prepared: RunContext) -> float:
    """What the log-probabilities of all pairs under the reference take; 0 where they are known, or need not be."""
    pairs = [*prepared.train, *prepared.validation]
    if prepared.config.objective != "dpo" or not prepared.wants_reference or pairs[0].reference is not None:
        return 0.0
    some = _median_length_examples(pairs)
    return _pairs_seconds(model, some) * len(pairs) / len(some)


def _median_length_examples(examples: Sequence[Example]) -> list[Example]:
    """A few examples of middling length."""
    ordered = sorted(examples, key=lambda e: e.length)
    return ordered[max(0, len(ordered) // 2 - PROBE_BATCH // 2) :][:PROBE_BATCH]


def _pairs_seconds(model: CausalLM, some: Sequence[Example]) -> float:
    """A forward pass of these pairs."""

    def read() -> None:
        reference_logps(model, some)

    return _extrapolate_layers(model, read, model.config.num_layers, model.blocks, 1)


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
    trained = sum(to_local(p).numel() * p.element_size() for p in trainable(model).values())
    item = torch.empty(0, dtype=model.dtype).element_size()
    working = 4 * tokens * model.config.intermediate_size * item  # the gradients in flight of the widest part, the MLP
    return max(peak_rss_mb(), held_mb + saved_mb + (3 * trained + working) / 1e6)
