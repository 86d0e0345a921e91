"""`graft train`: lock the run folder, set everything up once (`setup.py`), and run the loop (`trainer.py`)."""

import os
import shutil
import time
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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
from graftlm.training.activation_cache import ActivationCache, CacheSpec, open_activation_cache
from graftlm.training.checkpoint import FIRST_SCALE, CheckpointManager, TrainState, truncate_metrics
from graftlm.training.distributed import DistContext, model_is_sharded
from graftlm.training.estimate import make_plan
from graftlm.training.loggers import MetricsLogger, start_loggers
from graftlm.training.reporting import format_estimate, mfu, parameter_counts, peak_rss_mb, results_of_state
from graftlm.training.run_manifest import check_out_dir, read_previous
from graftlm.training.schedule import FIRST_STEPS, BackgroundCompile, KernelSwitch
from graftlm.training.setup import RunContext, prepare, shard_and_load
from graftlm.training.trainer import Trainer, make_optimizer


def train(
    config: TrainConfig,
    *,
    given: Set[str] | None = None,
    console: Console | None = None,
    started: float | None = None,
) -> dict[str, Any]:
    """Adapt a model as `config` says and leave a run folder; returns the object of `graft train --json`.

    Args:
        config: what to do.
        given: names of the explicit flags, which --resume compares with the recorded ones; None: all that differ from
            their defaults.
        console: where progress and notes go; None for silence.
        started: time.perf_counter() when the command began, for the time to the first step; None: now.

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
        results = _train(_same_dtype(config, dist), console, given, started, dist, previous)
    dist.close()
    return results


def _train(
    config: TrainConfig,
    console: Console,
    given: Set[str] | None,
    started: float,
    dist: DistContext,
    previous: dict[str, Any] | None,
) -> dict[str, Any]:
    """Set up and run, in a folder that is locked."""
    with dist.same_error_on_all_ranks():
        run = prepare(config, given, dist, previous)
    _check_same_on_all_ranks(run)
    shard_and_load(run)
    print_header(run, console)
    if config.plan:
        estimate = dist.broadcast_object(make_plan(run, time.perf_counter() - started).to_json())
        return {**estimate, **parameter_counts(run.manifest.values)}
    with _cleanup_on_failure(run, console):
        trainer = make_trainer(run, console, started)
        try:
            trainer.run()
        finally:
            trainer.metrics.close()
        trainer.checkpoints.consolidate()
        results = _results(run, trainer)
        run.manifest.update(results=results)
    return results


def make_trainer(run: RunContext, console: Console, started: float) -> Trainer:
    """The run's folder, reference, estimate, checkpoint, kernels, cache and loggers, in this order."""
    manifest, model = run.manifest, run.loaded.model
    checkpoints = _checkpoints(run)
    optimizer = make_optimizer(model, run.config, run.method)
    _check_folder(run, checkpoints)
    _setup_objective(run, console)
    if manifest.values["plan"] is None:  # a resumed run keeps its estimate
        estimate = make_plan(run, time.perf_counter() - started, repeats=1).to_json()
        estimate = manifest.values["plan"] = dict(run.dist.broadcast_object(estimate))
        console.print(format_estimate(estimate), highlight=False)
    state = _restore(run, checkpoints, optimizer, console)
    if manifest.values["cpp_kernels"] is None:
        manifest.values["cpp_kernels"] = _decide_kernels(run, console)
    kernels = BackgroundCompile(KernelSwitch(**manifest.values["cpp_kernels"]), model)
    manifest.update()
    loader = replace(run.loader, cache=_open_cache(run, console))
    return Trainer(
        config=run.config,
        model=model,
        optimizer=optimizer,
        loader=loader,
        objective=run.objective,
        data=run.data,
        dist=run.dist,
        checkpoints=checkpoints,
        metrics=_open_metrics(run, state, console),
        kernels=kernels,
        manifest=manifest,
        console=console,
        state=state,
        started=started,
    )


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
            console.print(f"nothing was saved: {out_dir} was cleared", markup=False, highlight=False)


def _checkpoints(run: RunContext) -> CheckpointManager:
    """The run folder's checkpoints."""
    loaded, (name, _, revision) = run.loaded, run.manifest.values["base"]["name"].partition("@")
    return CheckpointManager(
        run.manifest.folder,
        run.method,
        name,
        revision or None,
        loaded.folder,
        loaded.tokenizer,
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


def _setup_objective(run: RunContext, console: Console) -> None:
    """Compute what the objective needs of the initial model, and store it for a resumed run."""
    notify = partial(console.print, markup=False, highlight=False)
    if (record := run.objective.setup(run.loaded.model, run.data, run.dist, notify)) is not None:
        run.manifest.values["reference"] = record
    if run.dist.is_main and not run.config.resume:
        run.manifest.folder.mkdir(parents=True, exist_ok=True)
        run.objective.save(run.manifest.folder)


def _restore(
    run: RunContext, checkpoints: CheckpointManager, optimizer: torch.optim.Optimizer, console: Console
) -> TrainState:
    """The state of the latest checkpoint, whose weights are loaded; a fresh one for a new run."""
    state = TrainState()
    if run.config.resume:
        with run.dist.same_error_on_all_ranks():
            state = checkpoints.load_checkpoint(run.loaded.model, optimizer)
        if run.dist.is_main:
            truncate_metrics(run.manifest.folder / "metrics.jsonl", state.step)
        console.print(f"resumed after step {state.step}", highlight=False)
    if state.step == 0 and run.loaded.model.dtype == torch.float16:
        state.loss_scale = FIRST_SCALE
    return state


def _decide_kernels(run: RunContext, console: Console) -> dict[str, Any]:
    """At which step kernels change, as run.json records it."""
    with run.dist.same_error_on_all_ranks():
        switch = KernelSwitch.decide(run.config, run.loaded.model.device)
    if run.config.kernels == "auto" and switch.start_step is None and (run.config.max_iters or 0) > FIRST_STEPS:
        console.print(f"not compiled: {switch.reason}", markup=False, highlight=False)
    return dict(run.dist.broadcast_object(switch.to_json()))


def _open_cache(run: RunContext, console: Console) -> ActivationCache | None:
    """The cached hidden states of frozen lower layers; None, with a note, if they are recomputed in each step."""
    config, model = run.config, run.loaded.model
    layers = run.method.layer_range(model.config).start
    if layers == 0 or config.activation_cache_gb == 0:
        return None
    cache, note = None, ""
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
    console.print(note, markup=False, highlight=False)
    return cache


def _open_metrics(run: RunContext, state: TrainState, console: Console) -> MetricsLogger:
    """metrics.jsonl and the other loggers; on other ranks than 0 rows go nowhere."""
    warn = partial(console.print, markup=False, highlight=False)
    if not run.dist.is_main:
        return MetricsLogger(Path(os.devnull), [], warn)
    loggers = start_loggers(run.config, run.manifest.values, state.step, warn)
    return MetricsLogger(run.manifest.folder / "metrics.jsonl", loggers, warn)


def print_header(run: RunContext, console: Console) -> None:
    """What is about to be trained, and on which data."""
    values, model = run.manifest.values, run.loaded.model
    console.print(
        f"{values['base']['name']} in {values['dtype']} on {values['device']}: {run.loaded.dtype_reason}",
        highlight=False,
    )
    console.print(
        f"{run.method.name} trains {values['trainable']:,} of {values['total']:,} parameters "
        f"({values['trainable'] / values['total']:.2%})",
        highlight=False,
    )
    if line := run.method.describe_scale(model, run.config.lr or 0.0):
        console.print(line, highlight=False)
    if run.dist.size > 1:
        how = "weights sharded across ranks" if model_is_sharded(model) else "every rank holds the model"
        console.print(f"{run.dist.size} processes ({run.dist.backend}): {how}", highlight=False)
    for note in run.notes:
        console.print(note, markup=False, highlight=False)


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
