"""The training loop, the same for every method and objective.

    micro-batches -> accumulate gradients -> all-reduce -> clip -> AdamW step -> log -> evaluate -> checkpoint

Everything random is a pure function of (seed, step), so a run that is killed at any moment and resumed ends with the
same bits. Ctrl-C finishes the step and saves a checkpoint. Across ranks (`distributed.py`) each takes its rows of every
batch; rank 0 writes and prints.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from graftlm.config import TrainConfig
from graftlm.errors import GraftError, Interrupted, stop_on_signal
from graftlm.files.formats import full_tensor, is_sharded
from graftlm.methods import Method
from graftlm.methods.base import trainable
from graftlm.models.base import CausalLM
from graftlm.training.batches import BatchLoader, TrainingBatch, TrainingData
from graftlm.training.callbacks import Callbacks
from graftlm.training.checkpoint import CheckpointManager, TrainState
from graftlm.training.distributed import DistContext, model_is_sharded, uneven_forward
from graftlm.training.objectives import Objective, validate
from graftlm.training.reporting import MetricsLogger, StepMetrics, metrics_row, print_eval, progress_bar


def make_optimizer(model: CausalLM, config: TrainConfig, method: Method) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019); weight decay on matrices only, learning rates scaled by the method."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, p in trainable(model).items():
        groups.setdefault((p.dim() < 2, method.lr_multiplier(name)), []).append(p)
    return torch.optim.AdamW(
        [
            {"params": params, "weight_decay": 0.0 if is_vector else config.weight_decay, "ratio": ratio}
            for (is_vector, ratio), params in sorted(groups.items(), key=lambda item: item[0])
        ],
        lr=config.lr or 0.0,
        fused=True,
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of `step` (1 is the first): linear warmup to the peak, then cosine decay to almost zero.

    It is never zero: the first step and the last one change the weights too.
    """
    assert config.lr is not None and config.warmup_steps is not None and config.max_iters is not None
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    part = (step - config.warmup_steps) / (config.max_iters - config.warmup_steps + 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * part))


@dataclass(frozen=True)
class StepBatch:
    """The micro-batches of one optimizer step on this rank, and their totals over all ranks."""

    parts: list[TrainingBatch]
    spare: list[TrainingBatch]
    """Computed with weight 0: another rank's rows, so that all ranks issue the same collectives and log the same."""
    weight: float
    examples: int
    tokens: int
    unique_tokens: int


@dataclass
class Trainer:
    """Runs a prepared training to its end."""

    config: TrainConfig
    model: CausalLM
    optimizer: torch.optim.Optimizer
    loader: BatchLoader
    objective: Objective
    data: TrainingData
    dist: DistContext
    checkpoints: CheckpointManager
    metrics: MetricsLogger
    before_step: Callable[[int], None]
    """Called with the number of each step before it."""
    out_dir: Path
    console: Console
    state: TrainState
    started: float
    """time.perf_counter() at the command's start."""
    callbacks: Callbacks = field(default_factory=Callbacks)

    def run(self) -> None:
        """Train from `state` to the last step."""
        steps, state = self.config.max_iters or 0, self.state
        stream = self.loader.stream(state.step * self.config.grad_accum)
        offset = state.seconds - time.perf_counter()
        not_evaluated = dict.fromkeys((*self.callbacks.metrics, *self.objective.validation_metrics))
        self.model.train()
        with stop_on_signal(patient=self.dist.size > 1) as stop, progress_bar(self.console) as bar:
            task = bar.add_task("train", total=steps, completed=state.step, info="")
            while not (
                state.step >= steps or self.callbacks.ended or 0 < self.config.patience <= state.evals_since_best
            ):
                step = state.step + 1
                self.before_step(step)
                done = self.train_step(step, [next(stream) for _ in range(self.config.grad_accum)])
                self.count(done, steps)
                state.seconds = offset + time.perf_counter()
                row = metrics_row(done, state, self.model, not_evaluated)
                self.callbacks.call("on_step", row)
                stopping, self.callbacks.ended = self.on_any_rank(stop.is_set(), self.callbacks.ended)
                is_eval_step = step % (self.config.eval_every or 1) == 0 or step == steps or self.callbacks.ended
                if is_eval_step:
                    evaluated = self.evaluate(bar)
                    state.seconds = offset + time.perf_counter()
                    row = metrics_row(done, state, self.model, evaluated)
                self.metrics.write(row)
                if is_eval_step:
                    print_eval(row, bar.console, state.best, self.data.validation[0].is_window)
                bar.update(task, completed=step, info=f"loss {done.loss:.3f}  {done.examples_per_s:.1f} examples/s")
                if is_eval_step or stopping:
                    self.checkpoints.save(self.model, self.optimizer, state)
                    self.report(row if is_eval_step else None)
                if stopping and step < steps:
                    raise self.dist.on_all_ranks(
                        Interrupted(
                            f"interrupted; step {step} is saved in {self.out_dir / 'last'}: resume with graft train "
                            f"--resume --out_dir {self.out_dir}"
                        )
                    )

    @property
    def ends_early(self) -> bool:
        """Whether a callback or --patience ends the run."""
        return self.callbacks.ended or 0 < self.config.patience <= self.state.evals_since_best

    def report(self, evaluated: dict[str, Any] | None) -> None:
        """Call the callbacks after a checkpoint; evaluated: the row, if it was validated."""
        if evaluated is not None:
            self.callbacks.call("on_evaluate", evaluated)
        self.callbacks.call("on_checkpoint", self.out_dir / "last")
        (self.callbacks.ended,) = self.on_any_rank(self.callbacks.ended)

    def on_any_rank(self, *here: bool) -> list[bool]:
        """Whether each of these is so on some rank."""
        return [any(column) for column in zip(*self.dist.all_gather(here), strict=True)]

    def train_step(self, step: int, batches: list[list[int]]) -> StepMetrics:
        """Optimizer step number `step` on these batches of example indices, whose gradients are accumulated."""
        start, scale = time.perf_counter(), self.state.loss_scale
        torch.manual_seed(self.config.seed * 1_000_003 + step + (self.dist.rank << 40))  # dropout masks
        batch = self.make_step_batch(batches)
        losses, sums = self.accumulate(batch, scale)
        norm = self.reduce_and_clip(scale)
        # One transfer, so that a GPU is waited for once per step.
        values = torch.stack([t.to(norm.dtype) for t in (norm, *losses, *sums.values())]).tolist()
        loss = sum(values[1 : 1 + len(losses)])
        loss, *totals = self.dist.all_reduce_numbers([loss, *values[1 + len(losses) :]])
        lr = self.update(step, loss, values[0])
        metrics = self.objective.metrics(dict(zip(sums, totals, strict=True)), batch.weight)
        seconds = time.perf_counter() - start
        return StepMetrics(loss, lr, values[0], batch.examples, batch.tokens, batch.unique_tokens, seconds, metrics)

    def make_step_batch(self, batches: list[list[int]]) -> StepBatch:
        """Collate this rank's rows of each batch."""
        examples = self.loader.examples
        statistics = [
            self.objective.batch_statistics(self.model, [examples[row] for row in rows], self.dist) for rows in batches
        ]
        parts = [
            [part.with_extra(extra) for part in self.loader.microbatches(self.loader.partition(rows))]
            for rows, extra in zip(batches, statistics, strict=True)
        ]
        flat = [part for some in parts for part in some]
        tokens = sum(part.tokens for part in flat)
        unique = sum(part.non_shared_tokens for part in flat) + sum(some[0].shared.shape[1] for some in parts if some)
        by_rank = self.dist.all_gather([sum(part.weight for part in flat), tokens, unique, len(flat)])
        weight, tokens, unique = (sum(column) for column in list(zip(*by_rank, strict=True))[:3])
        passes = max(int(numbers[-1]) for numbers in by_rank) if model_is_sharded(self.model) else 1
        spare = []
        if passes > len(flat):
            one = self.loader.microbatches(batches[0][:1])[0].with_extra(statistics[0])
            spare = [one] * (passes - len(flat))
        return StepBatch(flat, spare, weight, sum(map(len, batches)), int(tokens), int(unique))

    def accumulate(self, batch: StepBatch, scale: float) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Forward and backward pass of each micro-batch: their losses, and the sums of the objective's metrics."""
        losses, totals = [], dict[str, Tensor]()
        for part, is_spare in [*((part, False) for part in batch.parts), *((part, True) for part in batch.spare)]:
            loss, sums = self.objective.loss(self.model, part.to(self.model.device))
            loss = loss / batch.weight
            if is_spare:
                loss, sums = loss * 0, {name: value * 0 for name, value in sums.items()}
            (loss * scale).backward()
            losses.append(loss.detach())
            totals = {name: totals[name] + value if totals else value for name, value in sums.items()}
        return losses, totals

    def reduce_and_clip(self, scale: float) -> Tensor:
        """Sum the gradients over all ranks, undo the loss scale, clip; returns the gradient's norm before clipping."""
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.dist.all_reduce_gradients([p for p in params if not is_sharded(p)])  # FSDP has reduced sharded ones
        if scale != 1:
            torch._foreach_mul_([p.grad for p in params if p.grad is not None], 1 / scale)
        return full_tensor(nn.utils.clip_grad_norm_(params, self.config.grad_clip or math.inf))

    def update(self, step: int, loss: float, norm: float) -> float:
        """The optimizer's step, skipped if a float16 gradient overflowed; returns the learning rate."""
        if not math.isfinite(loss):
            raise self._not_finite(step, "loss", loss)
        scaled, finite = self.model.dtype == torch.float16, math.isfinite(norm)
        if not finite and not (scaled and self.state.loss_scale > 1):
            raise self._not_finite(step, "gradient's norm", norm)
        if scaled:
            self.state.update_loss_scale(finite)
        lr = learning_rate(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return lr

    def count(self, done: StepMetrics, steps: int) -> None:
        """Add a step to the run's totals; the first 5% of the steps are not timed."""
        state = self.state
        state.step += 1
        state.examples += done.examples
        state.tokens += done.tokens
        if state.seconds_to_first_step == 0:
            state.seconds_to_first_step = round(time.perf_counter() - self.started, 3)
        if state.step > math.floor(0.05 * steps):
            state.timed_examples += done.examples
            state.timed_seconds += done.seconds
            state.timed_model_tokens += done.unique_tokens

    def evaluate(self, bar: Progress) -> dict[str, float | None]:
        """Validate, and update the best checkpoint; returns the columns that only a validation measures."""
        task = bar.add_task("validating", total=math.ceil(len(self.data.validation) / self.dist.size), info="")
        data = replace(self.data, progress=partial(bar.advance, task))
        loss, accuracy, own = validate(self.model, self.objective, data, self.dist, self.callbacks.metrics)
        bar.remove_task(task)
        if not math.isfinite(loss):
            raise self._not_finite(self.state.step, "validation loss", loss)
        with uneven_forward(self.model, self.dist):
            monitored = self.objective.monitor(self.model, self.data, self.config.seed)
        self.state.update_best(loss, accuracy, own)
        return {"val_loss": loss, "val_accuracy": accuracy, **own, **monitored}

    def _not_finite(self, step: int, what: str, value: float) -> GraftError:
        latest = self.checkpoints.latest()
        good = f"the last good checkpoint is {latest.resolve()}" if latest else "no checkpoint was saved before"
        return self.dist.on_all_ranks(
            GraftError(f"step {step}: the {what} is {value}; {good}; try a lower --lr or --alpha, or --dtype float32")
        )
