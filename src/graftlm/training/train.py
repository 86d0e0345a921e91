"""`graft train`: lock the run folder, set everything up once (`setup.py`), and run the loop (`trainer.py`)."""

import os
import shutil
import threading
import time
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.exchange.load import pick_device, pick_dtype
from graftlm.files.assets import cache_home
from graftlm.files.atomic import LOCK_NAME, cleanup_tmp, lock_dir, lock_owner
from graftlm.models.cpp import KernelsUnavailable, compiler
from graftlm.models.fused_ops import CppKernels, load_kernels
from graftlm.training.activation_cache import ActivationCache, CacheSpec, open_activation_cache
from graftlm.training.callbacks import Callbacks
from graftlm.training.checkpoint import FIRST_SCALE, CheckpointManager, TrainState
from graftlm.training.distributed import DistContext, model_is_sharded
from graftlm.training.estimate import make_plan
from graftlm.training.objectives import Notify
from graftlm.training.reporting import (
    MetricsLogger,
    format_estimate,
    mfu,
    parameter_counts,
    peak_rss_mb,
    results_of_state,
    start_loggers,
    truncate_metrics,
)
from graftlm.training.run_manifest import check_out_dir, read_previous
from graftlm.training.setup import RunContext, prepare, shard_and_load
from graftlm.training.trainer import Trainer, make_optimizer

FIRST_STEPS = 10
"""With --kernels auto, steps with torch's kernels, while the compiler works in the background (about a second)."""


def train(
    config: TrainConfig,
    *,
    given: Set[str] | None = None,
    console: Console | None = None,
    started: float | None = None,
    callbacks: Callbacks | None = None,
) -> dict[str, Any]:
    """Adapt a model as `config` says and leave a run folder; returns the object of `graft train --json`.

    Args:
        config: what to do.
        given: names of the explicit flags, which --resume compares with the recorded ones; None: all that differ from
            their defaults.
        console: where progress and notes go; None for silence.
        started: time.perf_counter() when the command began, for the time to the first step; None: now.
        callbacks: what is called in the run, and metrics of its validations.

    Raises InputError for wrong input, before anything is written; GraftError when the loss is not a number;
    Interrupted after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    console = console or Console(quiet=True)
    started = time.perf_counter() if started is None else started
    previous, failure = None, None
    try:
        previous = read_previous(config)
    except InputError as error:
        failure = error
    dist = DistContext.start(previous["config"].get("device", config.device) if previous else config.device)
    if not dist.is_main:
        console = Console(quiet=True)
    with ExitStack() as stack:
        with dist.same_error_on_all_ranks():
            if dist.is_main and not config.plan:
                stack.enter_context(_run_lock(config, failure))
            if failure is not None:
                raise failure
        config = _same_dtype(config, dist)
        with dist.same_error_on_all_ranks():
            run = prepare(config, given, dist, previous)
        results = _train(run, console, started, callbacks or Callbacks())
    dist.close()
    return results


def _train(run: RunContext, console: Console, started: float, callbacks: Callbacks) -> dict[str, Any]:
    """Run what is set up, in a folder that is locked."""
    dist = run.dist
    if callbacks.metrics and not run.data.label_ids:
        raise InputError("metrics: are functions of labels, and the data has none: evaluate the run instead")
    _check_same_on_all_ranks(run)
    shard_and_load(run)
    notify, values = _notifier(console), run.manifest.values
    _print_header(run, notify)
    if run.config.plan or values["plan"] is None:  # a resumed run keeps its estimate
        estimate = make_plan(run, time.perf_counter() - started, repeats=3 if run.config.plan else 1)
        values["plan"] = dist.broadcast_object(asdict(estimate))
        if run.config.plan:
            return {**values["plan"], **parameter_counts(values)}
        notify(format_estimate(values["plan"]))
    with _cleanup_on_failure(run, console):
        trainer = make_trainer(run, console, started, callbacks)
        try:
            trainer.run()
            trainer.callbacks.call("on_end")
        finally:
            trainer.metrics.close()
        trainer.checkpoints.consolidate()
        results = _results(run, trainer)
        run.manifest.update(results=results)
    kind = {"chat": bool(values["data"].get("chat")), "documents": run.data.validation[0].is_window}
    return {**results, "objective": run.config.objective, **kind, "eval_split": _eval_split(run.config)}


def _eval_split(config: TrainConfig) -> str:
    """The split to evaluate the run on: validation if its data are files of which none is the test split."""
    return "validation" if config.val_data and not config.test_data else "test"


def make_trainer(run: RunContext, console: Console, started: float, callbacks: Callbacks | None = None) -> Trainer:
    """The run's folder, reference, checkpoint, kernels, cache and loggers, in this order."""
    manifest, model, notify = run.manifest, run.loaded.model, _notifier(console)
    checkpoints = _checkpoints(run)
    optimizer = make_optimizer(model, run.config, run.method)
    _check_folder(run, checkpoints)
    _setup_objective(run, notify)
    state = _restore(run, checkpoints, optimizer, notify)
    if manifest.values["cpp_kernels"] is None:
        manifest.values["cpp_kernels"] = _decide_kernels(run, notify)
    kernels = BackgroundCompile(run, notify)
    callbacks = callbacks or Callbacks()
    if callbacks.hooks or callbacks.metrics:
        manifest.values["python"] = callbacks.to_json()
    manifest.update()
    if not run.dist.is_main:
        callbacks = replace(callbacks, hooks=())
    callbacks.call("on_start", run)
    return Trainer(
        config=run.config,
        model=model,
        optimizer=optimizer,
        loader=replace(run.loader, cache=_open_cache(run, notify)),
        objective=run.objective,
        data=run.data,
        dist=run.dist,
        checkpoints=checkpoints,
        metrics=_open_metrics(run, state, notify),
        before_step=kernels.before_step,
        out_dir=manifest.folder,
        console=console,
        state=state,
        started=started,
        callbacks=callbacks,
    )


def _notifier(console: Console) -> Notify:
    """Prints a line as it is."""
    return partial(console.print, markup=False, highlight=False)


# Parts of the set-up --------------------------------------------------------------------------------------------------


@contextmanager
def _run_lock(config: TrainConfig, failure: InputError | None) -> Iterator[None]:
    """The run folder's lock. A folder that cannot be this run's is not touched; another process's lock is named."""
    out_dir = Path(config.out_dir)
    if not lock_owner(out_dir / LOCK_NAME):
        if failure is not None:
            raise failure
        if not config.resume:
            check_out_dir(out_dir)
    with lock_dir(out_dir):
        yield


def _same_dtype(config: TrainConfig, dist: DistContext) -> TrainConfig:
    """--dtype auto decided by rank 0: what is measured may differ between ranks."""
    if dist.size == 1 or config.dtype != "auto" or config.resume:
        return config
    with dist.same_error_on_all_ranks():
        dtype = str(pick_dtype("auto", pick_device(dist.device_flag))[0])
    return replace(config, dtype=dist.broadcast_object(dtype).removeprefix("torch."))


def _check_same_on_all_ranks(run: RunContext) -> None:
    """An InputError if this rank would train something else than rank 0."""
    values = run.manifest.values
    mine = {"base": values["base"]["sha256"], "data": values["data"]["fingerprint"], "dtype": values["dtype"]}
    first = run.dist.broadcast_object(mine)
    with run.dist.same_error_on_all_ranks():
        for what, value in mine.items():
            if first[what] != value:
                raise InputError(f"the {what} on this rank differs from process 0's ({value[:12]}, {first[what][:12]})")


@contextmanager
def _cleanup_on_failure(run: RunContext, console: Console) -> Iterator[None]:
    """Remove the run folder when a new run fails before its first checkpoint, so that the command can be repeated.

    The lock goes last, and with it a folder that was created for it.
    """
    out_dir = run.manifest.folder
    try:
        yield
    finally:  # a run that ends well has saved its last step
        saved = _checkpoints(run).latest() is not None
        if run.dist.is_main and not run.config.resume and not saved and out_dir.is_dir():
            for path in out_dir.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != LOCK_NAME:
                    path.unlink()
            _notifier(console)(f"nothing was saved: {out_dir} was cleared")


def _checkpoints(run: RunContext) -> CheckpointManager:
    """The run folder's checkpoints."""
    name, _, revision = run.manifest.values["base"]["name"].partition("@")
    return CheckpointManager(
        run.manifest.folder,
        run.method,
        name,
        revision or None,
        replace(run.loaded, run=run.manifest.values),
        run.config.keep_checkpoints,
        run.dist,
    )


def _check_folder(run: RunContext, checkpoints: CheckpointManager) -> None:
    """Remove what a killed process left, and check that all ranks that will write see the same folder."""
    out_dir = run.manifest.folder
    for name in ("run.json", "metrics.jsonl", "best", "last") if run.dist.is_main else ():
        cleanup_tmp(out_dir / name)
    with run.dist.same_error_on_all_ranks():
        if checkpoints.writes_sharded and not (out_dir / LOCK_NAME).exists():
            raise InputError(
                f"--out_dir {out_dir}: is not the folder that process 0 sees; with several machines name a shared "
                "one: each process writes its part of a checkpoint"
            )


def _setup_objective(run: RunContext, notify: Notify) -> None:
    """Compute what the objective needs of the initial model, and store it for a resumed run."""
    if (record := run.objective.setup(run.loaded.model, run.data, run.dist, notify)) is not None:
        run.manifest.values["reference"] = record
    if run.dist.is_main and not run.config.resume:
        run.manifest.folder.mkdir(parents=True, exist_ok=True)
        run.objective.save(run.manifest.folder)


def _restore(
    run: RunContext, checkpoints: CheckpointManager, optimizer: torch.optim.Optimizer, notify: Notify
) -> TrainState:
    """The state of the latest checkpoint, whose weights are loaded; a fresh one for a new run."""
    state = TrainState()
    if run.config.resume:
        with run.dist.same_error_on_all_ranks():
            state = checkpoints.load_checkpoint(run.loaded.model, optimizer)
        if run.dist.is_main:
            truncate_metrics(run.manifest.folder / "metrics.jsonl", state.step)
        notify(f"resumed after step {state.step}")
    if state.step == 0 and run.loaded.model.dtype == torch.float16:
        state.loss_scale = FIRST_SCALE
    return state


def _open_cache(run: RunContext, notify: Notify) -> ActivationCache | None:
    """The cached hidden states of frozen lower layers; None, with a note, if they are recomputed in each step."""
    config, model = run.config, run.loaded.model
    layers = run.method.layer_range(model.config).start
    if layers == 0 or config.activation_cache_gb == 0:
        return None
    cache = None
    if model_is_sharded(model):
        note = "--shard: hidden states of the frozen lower layers are recomputed in each step"
    elif not run.objective.caches_activations:
        note = f"--objective {config.objective}: hidden states of the frozen lower layers are recomputed in each step"
    elif config.dropout:
        note = "--dropout acts in the frozen lower layers too: they are recomputed in each step"
    else:
        base = run.manifest.values["base"]["sha256"]
        spec = CacheSpec(layers, base, config.shared_prefix, config.activation_cache_gb * 1e9)
        cache, note = open_activation_cache(cache_home(), model, run.data.train, spec)
    notify(note)
    return cache


def _open_metrics(run: RunContext, state: TrainState, notify: Notify) -> MetricsLogger:
    """metrics.jsonl and the other loggers; on other ranks than 0 rows go nowhere."""
    if not run.dist.is_main:
        return MetricsLogger(Path(os.devnull), [], notify)
    loggers = start_loggers(run.config, run.manifest.values, state.step, notify)
    return MetricsLogger(run.manifest.folder / "metrics.jsonl", loggers, notify)


def _print_header(run: RunContext, notify: Notify) -> None:
    """What is about to be trained, and on which data."""
    values, model = run.manifest.values, run.loaded.model
    notify(f"{values['base']['name']} in {values['dtype']} on {values['device']}: {run.loaded.dtype_reason}")
    trained, total = values["trainable"], values["total"]
    notify(f"{run.method.name} trains {trained:,} of {total:,} parameters ({trained / total:.2%})")
    # It is relative to the size of the weights, which an estimate does not read.
    if not run.config.plan and (line := run.method.describe_scale(model, run.config.lr or 0.0)):
        notify(line)
    if run.dist.size > 1:
        how = "weights sharded across ranks" if model_is_sharded(model) else "every rank holds the model"
        notify(f"{run.dist.size} processes ({run.dist.backend}): {how}")
    for note in run.notes:
        notify(note)


def _results(run: RunContext, trainer: Trainer) -> dict[str, Any]:
    """What the run did, for run.json and `graft train --json`; all ranks must call it."""
    values, model, dist, cache = run.manifest.values, run.loaded.model, run.dist, trainer.loader.cache
    results = {
        **results_of_state(trainer.state, model, values["plan"]),
        **mfu(model, run.method, trainer.state, cache.layers if cache else 0),
        **parameter_counts(values),
        "out_dir": str(run.manifest.folder),
    }
    if dist.size > 1:
        peaks = [peak for (peak,) in dist.all_gather([peak_rss_mb()])]
        results["distributed"] = {**dist.to_json(), "peak_rss_mb": peaks, "comm_bytes": dist.bytes_communicated}
    return results


# C++ kernels ----------------------------------------------------------------------------------------------------------
#
# They round differently. So the step at which they replace torch's is recorded in run.json before the first step: a
# resumed run must not depend on what happens to be compiled already.


@dataclass(frozen=True)
class KernelSwitch:
    """From which step on kernels are C++, and why."""

    start_step: int | None
    """None: never."""
    reason: str

    @classmethod
    def decide(cls, config: TrainConfig, device: torch.device) -> "KernelSwitch":
        """What --kernels means for a run; an InputError if "cpp" is impossible."""
        if config.kernels == "torch":
            return cls(None, "--kernels torch")
        obstacle = _unavailable_reason(config, device)
        if obstacle and config.kernels == "cpp":
            raise InputError(f"--kernels cpp: {obstacle}: leave it out, or use --kernels torch")
        if config.kernels == "cpp":
            return cls(1, "--kernels cpp")
        if obstacle:
            return cls(None, obstacle)
        if (config.max_iters or 0) <= FIRST_STEPS:
            return cls(None, f"not for {FIRST_STEPS} steps or fewer")
        return cls(FIRST_STEPS + 1, "the same gradients in less time")


def _unavailable_reason(config: TrainConfig, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"kernels are compiled for the CPU, and this run is on {device.type}"
    if not config.fused:
        return "--fused is off, and compiled kernels are its gradients"
    try:
        compiler()
    except KernelsUnavailable as error:
        return str(error)
    return None


def _decide_kernels(run: RunContext, notify: Notify) -> dict[str, Any]:
    """At which step kernels change, as run.json records it."""
    with run.dist.same_error_on_all_ranks():
        switch = KernelSwitch.decide(run.config, run.loaded.model.device)
    if run.config.kernels == "auto" and switch.start_step is None and (run.config.max_iters or 0) > FIRST_STEPS:
        notify(f"not compiled: {switch.reason}")
    return dict(run.dist.broadcast_object(asdict(switch)))


class BackgroundCompile:
    """Compiles the C++ kernels during the first steps."""

    def __init__(self, run: RunContext, notify: Notify) -> None:
        self._run, self._notify = run, notify
        self._start: int | None = run.manifest.values["cpp_kernels"]["start_step"]
        self._result: CppKernels | KernelsUnavailable | None = None
        self._thread = threading.Thread(target=self._load, daemon=True)
        if self._start is not None:
            self._thread.start()

    def _load(self) -> None:
        try:
            self._result = load_kernels()
        except KernelsUnavailable as error:
            self._result = error

    def before_step(self, step: int) -> None:
        """Use C++ kernels from this step on if the run does, or record that it cannot; waits for the compiler."""
        start, model, config = self._start, self._run.loaded.model, self._run.config
        if start is None or step < start or self._result is model.kernels:
            return
        self._thread.join()
        if isinstance(self._result, CppKernels):
            model.set_kernels(self._result)
            return
        error = self._result or KernelsUnavailable("the compiler's thread died")
        if config.kernels == "cpp" or step != start:
            raise InputError(f"{config.out_dir}: computes with compiled kernels from step {start} on, and {error}")
        self._notify(f"not compiled: {error}")
        self._start = None
        self._run.manifest.update(cpp_kernels=asdict(KernelSwitch(None, str(error))))
