"""`graft train`: a folder that is ours, everything that comes before step 1, and then the loop (`trainer.py`)."""

import time
from collections.abc import Set
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.exchange.device import pick_device, pick_dtype
from graftlm.exchange.load import read_run
from graftlm.files.locks import LOCK_NAME, lock_dir, lock_owner
from graftlm.training.distributed import DistContext
from graftlm.training.estimate import make_plan
from graftlm.training.mfu import parameter_counts
from graftlm.training.reporting import print_header
from graftlm.training.setup import RunContext, check_out_dir, prepare, shard_and_load
from graftlm.training.trainer import Trainer


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
        given: names of the fields a user typed, which --resume holds against the recorded ones; None: all that
            differ from the defaults.
        console: where progress and notes go; None for silence.
        started: time.perf_counter() when the command began, for the time to the first step; None: now.

    Raises InputError for wrong input, before anything is written; GraftError when the loss is not a number;
    Interrupted after Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    console = console or Console(quiet=True)
    started = time.perf_counter() if started is None else started
    world = DistContext.start(_device_flag(config))
    if not world.is_main:
        console = Console(quiet=True)
    with ExitStack() as held:
        with world.same_error_on_all_ranks():
            if world.is_main:  # it writes for all
                held.enter_context(_run_lock(config))
        results = _train(config, console, given, started, world)
    world.close()
    return results


def _train(
    config: TrainConfig, console: Console, given: Set[str] | None, started: float, world: DistContext
) -> dict[str, Any]:
    """The run, in a folder that is ours."""
    if world.size > 1 and config.dtype == "auto" and not config.resume:  # what is measured may differ
        with world.same_error_on_all_ranks():
            dtype = str(pick_dtype("auto", pick_device(world.device_flag))[0])
        config = replace(config, dtype=world.broadcast_object(dtype).removeprefix("torch."))
    with world.same_error_on_all_ranks():
        prepared = prepare(config, given, world)
    _check_same(prepared)
    shard_and_load(prepared)
    print_header(prepared, console)
    if config.plan:
        plan = world.broadcast_object(make_plan(prepared, time.perf_counter() - started).to_json())
        return {**plan, **parameter_counts(prepared.run)}
    return Trainer(prepared, console, started).run()


def _run_lock(config: TrainConfig) -> AbstractContextManager[object]:
    """The run folder's lock; a plan writes nothing and needs none. A folder that cannot be ours is not touched."""
    out_dir = Path(config.out_dir)
    if config.plan:
        return nullcontext()
    if not lock_owner(out_dir / LOCK_NAME):
        read_run(out_dir) if config.resume else check_out_dir(out_dir)
    return lock_dir(out_dir)


def _device_flag(config: TrainConfig) -> str:
    """--device, or what it was at the run's start; what is wrong with a run folder is told by `prepare`."""
    try:
        said = read_run(Path(config.out_dir))["config"] if config.resume else {}
        return str(said.get("device", config.device))
    except InputError:
        return config.device


def _check_same(prepared: RunContext) -> None:
    """An InputError where this process would train something else than the first one."""
    run = prepared.run
    mine = {"base": run["base"]["sha256"], "data": run["data"]["fingerprint"], "dtype": run["dtype"]}
    first = prepared.world.broadcast_object(mine)
    with prepared.world.same_error_on_all_ranks():
        for what, value in mine.items():
            if first[what] != value:
                raise InputError(f"the {what} here is not that of process 0 ({value[:12]}, {first[what][:12]})")
