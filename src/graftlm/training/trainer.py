"""One loop for every method and every objective.

    for step in 1 … max_iters:
        gradient of (sum of losses) / (weight of the step's batches)  ->  clip  ->  AdamW at lr(step)
        a row to metrics.jsonl;  every eval_every steps a validation and an atomic checkpoint

What is unusual here: everything random is a pure function of (seed, step), so a run that is killed at any moment and
resumed ends with the same bits. Ctrl-C finishes the step, saves, and says how to go on. In several processes
(`distributed.py`) each takes its rows of every batch; the first one writes (of cut weights all do) and speaks.
"""

import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from torch import Tensor

from graftlm.config import TrainConfig
from graftlm.errors import GraftError, InputError, Interrupted
from graftlm.files.assets import cache_home
from graftlm.files.atomic import cleanup_tmp, write_json
from graftlm.files.locks import LOCK_NAME
from graftlm.files.sharded import full_tensor
from graftlm.methods import Method
from graftlm.methods.base import trainable
from graftlm.models.base import CausalLM
from graftlm.models.kernels import KernelsUnavailable
from graftlm.training.activation_cache import ActivationCache, open_frozen
from graftlm.training.checkpoint import FIRST_SCALE, CheckpointManager, TrainState, truncate_metrics
from graftlm.training.distributed import model_is_sharded, uneven_forward
from graftlm.training.estimate import make_plan
from graftlm.training.kernel_schedule import FIRST_STEPS, BackgroundCompile, KernelSwitch
from graftlm.training.loggers import MetricsLogger, start_loggers
from graftlm.training.mfu import format_estimate
from graftlm.training.objectives import TrainingBatch, make_microbatches
from graftlm.training.preferences import batch_kind, make_loss
from graftlm.training.reference_logps import InitialWeights, reference_logps, sampled_kl, save_reference
from graftlm.training.reporting import StepMetrics, final_results, metrics_row, print_eval, progress_bar
from graftlm.training.schedule import batch_stream, learning_rate
from graftlm.training.setup import RunContext
from graftlm.training.signals import stop_on_signal
from graftlm.training.validate import validate


def make_optimizer(model: CausalLM, config: TrainConfig, method: Method) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with fused steps; weight decay on matrices only, rates as the method says."""
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for name, p in trainable(model).items():
        groups.setdefault((p.dim() < 2, method.lr_multiplier(name)), []).append(p)
    return torch.optim.AdamW(
        [
            {"params": params, "weight_decay": 0.0 if thin else config.weight_decay, "ratio": ratio}
            for (thin, ratio), params in sorted(groups.items(), key=lambda item: item[0])
        ],
        lr=config.lr or 0.0,
        fused=True,
    )


@dataclass
class Trainer:
    """A prepared run's loop and its state."""

    prepared: RunContext
    console: Console
    started: float
    """time.perf_counter() at the command's start."""
    progress: TrainState = field(default_factory=TrainState)

    def __post_init__(self) -> None:
        self.config, self.model = self.prepared.config, self.prepared.loaded.model
        run, loaded = self.prepared.run, self.prepared.loaded
        self.world = self.prepared.world
        self.cut = model_is_sharded(self.model)
        self.out_dir = self.prepared.out_dir
        name, _, revision = run["base"]["name"].partition("@")
        self.store = CheckpointManager(
            self.out_dir,
            self.prepared.method,
            name,
            revision or None,
            loaded.folder,
            loaded.tokenizer,
            self.config.keep_checkpoints,
            world=self.world,
        )
        self.optimizer = make_optimizer(self.model, self.config, self.prepared.method)
        self.loss = make_loss(self.config)
        self.lengths = [e.length for e in self.prepared.train]
        self.frozen: ActivationCache | None = None
        self.start: InitialWeights | None = None
        self.steps = self.config.max_iters or 0

    def run(self) -> dict[str, Any]:
        """From the newest checkpoint to the end; returns the results."""
        with self._cleanup_on_failure():
            return self._run()

    @contextmanager
    def _cleanup_on_failure(self) -> Iterator[None]:
        """Take the run folder away again when a first start fails before its first checkpoint.

        There would be nothing to load and nothing to go on with, and the same command could not be given again. The
        lock goes last, and with it a folder that was made for it.
        """
        try:
            yield
        finally:  # a run that ends well has saved its last step
            if self.world.is_main and not self.config.resume and self.store.latest() is None and self.out_dir.is_dir():
                for path in self.out_dir.iterdir():
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path)
                    elif path.name != LOCK_NAME:
                        path.unlink()
                self.console.print(f"nothing was saved: {self.out_dir} is cleared again", markup=False, highlight=False)

    def _run(self) -> dict[str, Any]:
        for name in ("run.json", "metrics.jsonl", "best", "last") if self.world.is_main else ():
            cleanup_tmp(self.out_dir / name)  # of a process that was killed while it wrote
        with self.world.same_error_on_all_ranks():
            if self.store.writes_sharded and not (self.out_dir / LOCK_NAME).exists():
                raise InputError(
                    f"--out_dir {self.out_dir}: is not the folder that process 0 sees; on several machines name one "
                    "that they share: each process writes its part of a checkpoint"
                )
        self._compute_reference()
        run = self.prepared.run
        if run["plan"] is None:  # a resumed run keeps what was said of it at its start
            plan = make_plan(self.prepared, time.perf_counter() - self.started, repeats=1).to_json()
            plan = run["plan"] = dict(self.world.broadcast_object(plan))
            self.console.print(format_estimate(plan), highlight=False)
        self._restore()
        if run["cpp_kernels"] is None:
            with self.world.same_error_on_all_ranks():
                switch = KernelSwitch.decide(self.config, self.model.device)
            if self.config.kernels == "auto" and switch.start_step is None and self.steps > FIRST_STEPS:
                self.console.print(f"not compiled: {switch.reason}", markup=False, highlight=False)
            run["cpp_kernels"] = self.world.broadcast_object(switch.to_json())
        self.compiling = BackgroundCompile(KernelSwitch(**run["cpp_kernels"]), self.model)
        self._write_manifest(run)
        self.frozen = self._open_frozen()
        loggers = start_loggers(self.config, run, self.progress.step, self._warn) if self.world.is_main else []
        path = self.out_dir / "metrics.jsonl" if self.world.is_main else Path(os.devnull)
        metrics = MetricsLogger(path, loggers, self._warn)
        try:
            with stop_on_signal(patient=self.world.size > 1) as stop, progress_bar(self.console) as bar:
                self._loop(metrics, stop, bar)
        finally:
            metrics.close()
        self.store.consolidate()
        results = final_results(self.prepared, self.progress, below_kept=self.frozen is not None)
        self._write_manifest({**self.prepared.run, "results": results})
        return results

    def _restore(self) -> None:
        """Go back to the newest checkpoint."""
        if self.config.resume:
            with self.world.same_error_on_all_ranks():
                self.progress = self.store.load_checkpoint(self.model, self.optimizer)
            if self.world.is_main:
                truncate_metrics(self.out_dir / "metrics.jsonl", self.progress.step)
            self.console.print(f"resumed behind step {self.progress.step}", highlight=False)
        if self.progress.step == 0 and self.model.dtype == torch.float16:
            self.progress.loss_scale = FIRST_SCALE

    def _write_manifest(self, run: dict[str, Any]) -> None:
        if self.world.is_main:
            write_json(self.out_dir / "run.json", run)

    def _warn(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False)

    def _loop(self, metrics: MetricsLogger, stop: threading.Event, bar: Bar) -> None:
        config, progress = self.config, self.progress
        stream = batch_stream(self.lengths, config, progress.step * config.grad_accum)
        offset = progress.seconds - time.perf_counter()
        task = bar.add_task("train", total=self.steps, completed=progress.step, info="")
        self.model.train()
        while progress.step < self.steps and not self._should_early_stop():
            step = progress.step + 1
            self._compile(step)
            done = self._step(step, [next(stream) for _ in range(config.grad_accum)])
            self._update_counters(done)
            stopping = any(each for (each,) in self.world.all_gather([stop.is_set()]))
            judged = step % (config.eval_every or 1) == 0 or step == self.steps
            new_best, kl = self._validate() if judged else (False, None)
            progress.seconds = offset + time.perf_counter()
            about = {"kl": kl} if self.start is not None else {}
            row = metrics_row(done, progress, self.model, judged=judged, **about)
            metrics.write(row)
            bar.update(task, completed=step, info=f"loss {done.loss:.3f}  {done.examples_per_s:.1f} examples/s")
            if judged:
                print_eval(row, self.console, new_best=new_best)
            if judged or stopping:
                self.store.save(self.model, self.optimizer, progress)
            if stopping and step < self.steps:
                raise self.world.on_all_ranks(
                    Interrupted(
                        f"interrupted; step {step} is saved in {self.out_dir / 'last'}: go on with graft train "
                        f"--resume --out_dir {self.out_dir}"
                    )
                )

    def _compile(self, step: int) -> None:
        """Go over to compiled kernels if the run does so at this step, or note that it cannot and never will."""
        try:
            self.compiling.ensure_ready(step)
        except KernelsUnavailable as error:
            switch = KernelSwitch(**self.prepared.run["cpp_kernels"])
            if self.config.kernels == "cpp" or step != switch.start_step:
                raise InputError(
                    f"{self.out_dir}: computes with compiled kernels from step {switch.start_step} on, and {error}"
                ) from error
            self.console.print(f"not compiled: {error}", markup=False, highlight=False)
            self.prepared.run["cpp_kernels"] = KernelSwitch(None, str(error)).to_json()
            self.compiling = BackgroundCompile(KernelSwitch(None, str(error)), self.model)
            self._write_manifest(self.prepared.run)

    def _should_early_stop(self) -> bool:
        return 0 < self.config.patience <= self.progress.evals_since_best

    def _step(self, step: int, batches: list[list[int]]) -> StepMetrics:
        """Optimiser step number `step` on these batches of example numbers; their gradients add up."""
        began, config = time.perf_counter(), self.config
        torch.manual_seed(config.seed * 1_000_003 + step + (self.world.rank << 40))  # dropout masks
        parts = [some for rows in batches if (some := self._collate(self.world.partition(rows, self.lengths)))]
        made = [part for some in parts for part in some]
        tokens = sum(batch.tokens for batch in made)
        needed = sum(part.non_shared_tokens for part in made) + sum(some[0].shared.shape[1] for some in parts)
        of_all = self.world.all_gather([sum(batch.weight for batch in made), tokens, needed, len(made)])
        weight, tokens, needed = (sum(column) for column in list(zip(*of_all, strict=True))[:3])
        passes = max(int(each[-1]) for each in of_all) if self.cut else 1
        losses, scale, told = [], self.progress.loss_scale, dict[str, Tensor]()
        # A process with too few rows reads one that is another's, so that all take the same passes, and counts it 0.
        spare = [(self._collate(batches[0][:1])[0], 0)] * (passes - len(made)) if passes > len(made) else []
        for batch, counts in [*((batch, 1) for batch in made), *spare]:
            loss, about = self.loss(self.model, batch.to(self.model.device))
            loss = loss / weight
            if not counts:
                loss, about = loss * 0, {name: each * 0 for name, each in about.items()}
            (loss * scale).backward()
            losses.append(loss.detach())
            told = {name: told[name] + each if told else each for name, each in about.items()}
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not (self.cut and self.prepared.method.is_full_finetune):  # those of cut weights the backward pass has added
            self.world.all_reduce_gradients(params)
        if scale != 1:
            torch._foreach_mul_([p.grad for p in params if p.grad is not None], 1 / scale)
        gradient = full_tensor(torch.nn.utils.clip_grad_norm_(params, config.grad_clip or math.inf))
        # Read together, so that a GPU is waited for once a step.
        norm, *rest = torch.stack([t.to(gradient.dtype) for t in (gradient, *losses, *told.values())]).tolist()
        total, *sums = self.world.all_reduce_numbers([sum(rest[: len(losses)]), *rest[len(losses) :]])
        if not math.isfinite(total):
            raise self._not_finite(step, "loss", total)
        scaled, finite = self.model.dtype == torch.float16, math.isfinite(norm)
        if not finite and not (scaled and scale > 1):
            raise self._not_finite(step, "gradient's norm", norm)
        if scaled:
            self.progress.update_loss_scale(finite)
        lr = learning_rate(step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        means = {name: each / weight for name, each in zip(told, sums, strict=True)}
        return StepMetrics(
            total, lr, sum(map(len, batches)), int(tokens), int(needed), time.perf_counter() - began, means
        )

    def _collate(self, rows: list[int]) -> list[TrainingBatch]:
        """The batches of these example numbers, with what frozen lower layers make of them where that is kept."""
        config, frozen = self.config, self.frozen
        if not rows:
            return []
        how = (batch_kind(config), config.shared_prefix, config.microbatch_tokens or 0, config.target_positions)
        examples = [self.prepared.train[i] for i in rows]
        if frozen is None:
            return make_microbatches(examples, *how)
        made, batches, at = make_microbatches(examples, *how, prefix=frozen.prefix), [], 0
        for batch in made:
            b, t = batch.ids.shape
            batches.append(replace(batch, cached_hidden=(frozen.layers, frozen.read(rows[at : at + b], t))))
            at += b
        return batches

    def _open_frozen(self) -> ActivationCache | None:
        """The store of what the lower layers make of the data, where some are frozen, and a note about it."""
        config, first = self.config, self.prepared.method.layer_range(self.model.config).start
        if first == 0 or config.activation_cache_gb == 0:
            return None
        if self.cut:
            self.console.print("--shard: what the frozen lower layers give is computed anew in each step")
            return None
        if config.objective == "dpo":
            self.console.print("pairs: what the frozen lower layers give is computed anew in each step")
            return None
        if config.dropout:
            self.console.print("--dropout acts in the frozen lower layers too: they are computed anew in each step")
            return None
        frozen, note = open_frozen(
            cache_home(),
            self.model,
            self.prepared.train,
            first,
            self.prepared.run["base"]["sha256"],
            share=config.shared_prefix,
            most_bytes=config.activation_cache_gb * 1e9,
        )
        self.console.print(note, markup=False, highlight=False)
        return frozen

    def _not_finite(self, step: int, what: str, value: float) -> GraftError:
        newest = self.store.latest()
        good = f"the last good checkpoint is {newest.resolve()}" if newest else "no checkpoint was saved before"
        return self.world.on_all_ranks(
            GraftError(f"step {step}: the {what} is {value}; {good}; try a lower --lr or --alpha, or --dtype float32")
        )

    def _update_counters(self, done: StepMetrics) -> None:
        progress = self.progress
        progress.step += 1
        progress.examples += done.examples
        progress.tokens += done.tokens
        if progress.seconds_to_first_step == 0:
            progress.seconds_to_first_step = round(time.perf_counter() - self.started, 3)
        if progress.step > math.floor(0.05 * self.steps):
            progress.timed_examples += done.examples
            progress.timed_seconds += done.seconds
            progress.timed_model_tokens += done.unique_tokens

    def _compute_reference(self) -> None:
        """Of pairs: find out what the model at its start thinks of them, and keep its trained tensors."""
        config, prepared, model = self.config, self.prepared, self.model
        if config.objective != "dpo":
            return
        if config.kl_samples:
            self.start = InitialWeights.of(model)
        if not prepared.wants_reference:
            return
        if prepared.reference is None:
            count, began = len(prepared.train) + len(prepared.validation), time.perf_counter()
            self._warn(f"computing what the start thinks of {count:,} pairs, once")
            sums = {split: reference_logps(model, pairs, self.world) for split, pairs in prepared.splits.items()}
            prepared.attach_reference(sums)
            prepared.run["reference"] = {"pairs": count, "seconds": round(time.perf_counter() - began, 3)}
        if self.world.is_main and not config.resume and prepared.reference is not None:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            save_reference(self.out_dir, prepared.reference, prepared.reference_fingerprint())

    def _validate(self) -> tuple[bool, float | None]:
        """Whether this is the best validation so far, and of preference training the KL to the start."""
        examples, label_ids = self.prepared.validation, self.prepared.label_ids
        loss, accuracy = validate(self.model, examples, label_ids, self.config, self.world)
        if not math.isfinite(loss):
            raise self._not_finite(self.progress.step, "validation loss", loss)
        kl = None
        if self.start is not None:
            eot, config = self.prepared.loaded.tokenizer.eot, self.config
            with uneven_forward(self.model, self.world):
                kl = sampled_kl(self.model, self.start, examples, config.kl_samples, eot, config.seed)
        return self.progress.update_best(loss, accuracy), kl
