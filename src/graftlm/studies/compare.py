"""`graft compare`: trains and evaluates every trial of a sweep, each in a process of its own, and writes one table.

    out_dir/
      sweep.json                the trials
      table.json, table.md      the results, updated after every trial
      {row}-seed{n}-{hash}/     one trial
        run/                      a run folder, in which `graft evaluate` keeps its result and predictions
        test-best.json            the result again, and where the predictions are; for zero-shot test-.json and .jsonl
        steps.json                the steps that fit a budget in seconds or TFLOP
        log.txt, failed.json      the commands' stderr; why the trial failed

A trial is two commands, `graft train` and `graft evaluate`, and its only state is its folder. So a comparison that is
killed at any moment and run again resumes and ends with the same table, and so does a trial whose worker on a cluster
is lost. Child processes end with the process that started them, even after SIGKILL.
"""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from graftlm.config import CompareConfig, TrainConfig
from graftlm.errors import GraftError, InputError, Interrupted, stop_on_signal
from graftlm.files.atomic import LOCK_NAME, cleanup_tmp, disk_errors, lock_dir, write_json, write_text
from graftlm.files.formats import read_json
from graftlm.inference.saved_evaluations import FOLDER
from graftlm.studies.results_table import FAILED, TrialResult, failures, make_rows, markdown, read_test
from graftlm.studies.subprocess_runner import MAX_RETRIES, CommandFailed, JobRunner, LocalRunner, WorkerLost
from graftlm.studies.sweep import Trial, read_sweep

PLANNED_STEPS = 100  # of the `graft train --plan` that predicts the cost of a step
MAX_PENDING = 256  # trials that wait for a cluster at the same time, each in a thread
LOCK_TIMEOUT = 5.0  # seconds to wait for the last process of another comparison


def compare(
    config: CompareConfig,
    sweep: str | Mapping[str, Any],
    console: Console | None = None,
    ray_log_level: str = "ERROR",
) -> dict[str, Any]:
    """Train and evaluate the trials of the sweep file, or of its tables, that are not done yet; returns the table.

    Raises InputError for an invalid sweep before anything is written, GraftError if every trial failed, and
    Interrupted after Ctrl-C or SIGTERM, when every run has saved its last step.
    """
    if not sweep:
        raise InputError("graft compare needs --config SWEEP.toml (see graft compare --help)")
    overrides = {name: value for name in ("init_from", "data", "device") if (value := getattr(config, name))}
    budget = {name: value for name, value in asdict(config).items() if name.startswith("budget_") and value is not None}
    if "budget_steps" in budget:
        overrides["max_iters"] = budget.pop("budget_steps")
    trials = read_sweep(sweep, overrides, budget)
    out_dir = Path(config.out_dir)
    if out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / LOCK_NAME).exists():
        raise InputError(f"--out_dir {out_dir}: has other files; name a folder that is empty or does not exist")
    with contextlib.ExitStack() as stack:
        # Commands inherit the lock's descriptor, so none of them outlives the lock.
        lock = stack.enter_context(lock_dir(out_dir, LOCK_TIMEOUT, keep=True))
        runner: JobRunner = LocalRunner(config.jobs or 1, lock)
        if config.ray:
            from graftlm.studies.ray_cluster import connected, ray_runner

            cluster = stack.enter_context(connected(config, ray_log_level))
            max_parallel = min(config.jobs or MAX_PENDING, len(trials))
            runner = stack.enter_context(ray_runner(cluster, out_dir, max_parallel))
        return _Sweep(config, trials, budget, console or Console(quiet=True), runner).run()


@dataclass
class _Sweep:
    config: CompareConfig
    trials: Sequence[Trial]
    budget: Mapping[str, float]
    console: Console
    runner: JobRunner
    stopping: threading.Event = field(default_factory=threading.Event)
    table_lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.out_dir = Path(self.config.out_dir)
        self.eval_config = {"mode": self.config.mode, "limit": self.config.limit}

    def run(self) -> dict[str, Any]:
        """Run all trials, `runner.max_parallel` at a time; returns the table."""
        cleanup_tmp(self.out_dir / "sweep.json")
        listed = [{**asdict(trial), "folder": trial.folder} for trial in self.trials]
        write_json(self.out_dir / "sweep.json", {"cells": listed})
        with stop_on_signal() as stop, self._progress() as bar, ThreadPoolExecutor(self.runner.max_parallel) as pool:
            tasks: dict[str, TaskID] = {}
            futures = [pool.submit(self._run_trial, trial) for trial in self.trials]
            while not self._all_done(futures):
                self._update_progress(bar, tasks)
                if stop.is_set() and not self.stopping.is_set():
                    self._stop()
        if self.stopping.is_set():
            raise Interrupted("interrupted; every run has saved its last step: resume with the same command")
        table = self._write_table()
        if not any("accuracy" in row for row in table["rows"]):
            raise GraftError(f"every row failed: {failures(table['rows'])[0]}")
        return table

    def _all_done(self, futures: Sequence["Future[None]"]) -> bool:
        done, running = wait(futures, timeout=0.3)
        for future in done:
            if error := future.exception():
                self._stop()
                raise error
        return not running

    def _stop(self) -> None:
        self.stopping.set()
        self.runner.stop()

    # One trial ----------------------------------------------------------------------------------------------------

    def _run_trial(self, trial: Trial) -> None:
        folder = self.out_dir / trial.folder
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        if self._is_done(trial) or self.stopping.is_set():
            return
        start = time.monotonic()
        (folder / FAILED).unlink(missing_ok=True)
        error = self._train_and_evaluate(trial, folder)
        if self.stopping.is_set():
            return
        if error:
            write_json(folder / FAILED, {"reason": error})
        self._report(trial, time.monotonic() - start)
        self._write_table()

    def _train_and_evaluate(self, trial: Trial, folder: Path) -> str:
        """Returns why it failed, or "". After a lost worker it resumes from the files in the folder."""
        for retries_left in range(MAX_RETRIES, -1, -1):
            try:
                if trial.trains:
                    self._train(trial, folder)
                for checkpoint in self._checkpoints(trial):
                    self._evaluate(trial, folder, checkpoint)
            except CommandFailed as failure:
                return str(failure)
            except WorkerLost as lost:
                if not retries_left or self.stopping.is_set():
                    return f"{MAX_RETRIES + 1} workers were lost in a row: {lost}"
                self._print(f"a worker was lost; {trial.row}, seed {trial.seed} resumes from its last checkpoint")
            else:
                break
        return ""

    def _checkpoints(self, trial: Trial) -> Sequence[str]:
        if not trial.trains:
            return [""]
        return ["best", "last"] if self.config.checkpoint == "both" else [self.config.checkpoint]

    def _is_done(self, trial: Trial) -> bool:
        folder = self.out_dir / trial.folder
        tests = [folder / f"test-{checkpoint}.json" for checkpoint in self._checkpoints(trial)]
        return all(path.is_file() and read_test(path)["eval_config"] == self.eval_config for path in tests)

    def _train(self, trial: Trial, folder: Path) -> None:
        run = folder / "run"
        manifest = read_json(run / "run.json") if (run / "run.json").is_file() else None
        if manifest is not None and manifest["results"] is not None:
            return
        if manifest is None and run.is_dir():  # killed before its run.json was written
            shutil.rmtree(run)
        flags = {**trial.flags, **self._budgeted_steps(trial, folder), "out_dir": str(run)}
        resume = ["--resume"] if manifest is not None else []
        self.runner.run(["train", *_argv(flags), *resume, "--json"], folder)

    def _budgeted_steps(self, trial: Trial, folder: Path) -> dict[str, int]:
        """The steps that fit a budget in seconds or TFLOP; decided once, so that a resumed run has the same."""
        if not self.budget:
            return {}
        steps = folder / "steps.json"
        if not steps.is_file():
            ((name, limit),) = self.budget.items()
            flags = {**trial.flags, "max_iters": PLANNED_STEPS, "out_dir": str(folder / "planned")}
            plan = json.loads(self.runner.run(["train", *_argv(flags), "--plan", "--json"], folder))
            per_step = plan["train_seconds" if name == "budget_seconds" else "model_tflop"] / PLANNED_STEPS
            write_json(steps, {"max_iters": max(1, int(limit / per_step)), name: limit})
        return {"max_iters": read_json(steps)["max_iters"]}

    def _evaluate(self, trial: Trial, folder: Path, checkpoint: str) -> None:
        path = folder / f"test-{checkpoint}.json"
        flags: dict[str, Any] = {**self.eval_config}
        if trial.trains:
            flags |= {name: trial.flags[name] for name in ("device", "dtype") if name in trial.flags}
            flags |= {"out_dir": folder / "run", "checkpoint": checkpoint}
        else:
            # The defaults of training, which are not those of evaluating a run that --init_from names.
            defaults = {name: getattr(TrainConfig, name) for name in ("init_from", "data", "template", "labels")}
            flags |= {**defaults, "chat": "off", **trial.flags, "split": "test"}
            flags["predictions"] = path.with_suffix(".jsonl")
            del flags["method"]
        metrics = json.loads(self.runner.run(["evaluate", *_argv(flags), "--json"], folder))
        rows = path.with_suffix(".jsonl").name
        if trial.trains:
            if "saved" not in metrics:
                raise CommandFailed(f"graft evaluate could not write to {folder / 'run'}: see {folder / 'log.txt'}")
            rows = f"run/{FOLDER}/{Path(metrics.pop('saved')).with_suffix('.jsonl').name}"
        write_json(path, {"eval_config": self.eval_config, "predictions": rows, "reading": metrics})

    # Progress -----------------------------------------------------------------------------------------------------

    def _progress(self) -> Progress:
        what, loss = TextColumn("{task.description}"), TextColumn("{task.fields[loss]}")
        columns = (what, BarColumn(), MofNCompleteColumn(), loss, TimeRemainingColumn())
        return Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)

    def _update_progress(self, bar: Progress, tasks: dict[str, TaskID]) -> None:
        """A bar for each run that has started."""
        for trial in self.trials:
            run = self.out_dir / trial.folder / "run"
            if bar.disable or not (run / "metrics.jsonl").is_file() or not (run / "run.json").is_file():
                continue
            if trial.id not in tasks:
                total = read_json(run / "run.json")["config"]["max_iters"]
                tasks[trial.id] = bar.add_task(f"{trial.row}, seed {trial.seed}", total=total, loss="")
            *rows, _ = (run / "metrics.jsonl").read_bytes().split(b"\n")  # the last may be half written
            loss = f"loss {json.loads(rows[-1])['train_loss']:.3f}" if rows else ""
            bar.update(tasks[trial.id], completed=len(rows), loss=loss)

    def _report(self, trial: Trial, seconds: float) -> None:
        done = sum(self._is_done(other) or self._failed(other) for other in self.trials)
        results = [self._result(trial, checkpoint) for checkpoint in self._checkpoints(trial)]
        outcome = results[0].error or " and ".join(map(_outcome, results))
        title = f"{done} of {len(self.trials)}: {trial.row}, seed {trial.seed}"
        self._print(f"{title}: {outcome} ({seconds / 60:.1f} min)")

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False)

    # The table ----------------------------------------------------------------------------------------------------

    def _failed(self, trial: Trial) -> bool:
        return (self.out_dir / trial.folder / FAILED).is_file()

    def _result(self, trial: Trial, checkpoint: str) -> TrialResult:
        folder, error = self.out_dir / trial.folder, ""
        if not self._is_done(trial):
            error = read_json(folder / FAILED)["reason"] if self._failed(trial) else "not done yet"
        return TrialResult(trial, checkpoint, folder, error)

    def _write_table(self) -> dict[str, Any]:
        with self.table_lock:
            rows = make_rows([self._result(trial, c) for trial in self.trials for c in self._checkpoints(trial)])
            table = {"rows": rows, "failed": sum(map(self._failed, self.trials)), "out_dir": str(self.out_dir)}
            write_json(self.out_dir / "table.json", table)
            write_text(self.out_dir / "table.md", markdown(rows))
        return table


def _outcome(result: TrialResult) -> str:
    loss = f", validation loss {result.run['results'][result.checkpoint]['val_loss']:.4f}" if result.run else ""
    return f"accuracy {result.metrics['accuracy']:.3f}{loss}"


def _argv(flags: Mapping[str, Any]) -> list[str]:
    """Words of a command; --max_iters, such as a budget's, replaces --epochs."""
    given = {name: value for name, value in flags.items() if name != "epochs" or "max_iters" not in flags}
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in given.items()]
