"""Many runs, one table: every cell of a sweep trained and measured, each a process of its own.

    out_dir/
      sweep.json                what is compared
      table.json, table.md      what came of it, made anew after every cell
      {row}-seed{n}-{hash}/     one cell
        run/                      a run folder like any other
        test-best.json(l)         what `graft evaluate` read, and each prediction
        steps.json                the steps that a budget in seconds or TFLOP comes to, decided once
        log.txt, failed.json      what the commands said; why there is nothing more

What is unusual here: a cell is nothing but `graft train` and `graft evaluate`, two lines that a user could type, and
nothing is known about it that is not in its folder. So killing a comparison at any moment and giving the same command
again goes on where it stopped and ends with the same table, and so does a cell whose worker on a cluster is lost. A
process it started ends with it, even behind a SIGKILL.
"""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from graftlm.config import CompareConfig, TrainConfig
from graftlm.errors import GraftError, InputError, Interrupted
from graftlm.files.atomic import cleanup_tmp, disk_errors, write_json, write_text
from graftlm.files.formats import read_json
from graftlm.files.locks import LOCK_NAME, lock_dir
from graftlm.studies.results_table import FAILED, CellResult, failures, make_rows, markdown, read_test
from graftlm.studies.subprocess_runner import MAX_RETRIES, CommandFailed, JobRunner, LocalRunner, WorkerLost
from graftlm.studies.sweep import Trial, read_sweep
from graftlm.training.signals import stop_on_signal

PLANNED_STEPS = 100  # steps of the plan that tells what one of them takes
MAX_PENDING = 256  # cells that wait for a cluster's answer at the same time, each in a thread
LOCK_TIMEOUT = 5.0  # seconds that another comparison's last process may take to end


def compare(config: CompareConfig, sweep: str, console: Console | None = None, debug: bool = False) -> dict[str, Any]:
    """Train and measure all cells of the sweep file that are not done yet; returns the table.

    With `debug` a cluster's logs are shown.

    Raises InputError for a wrong sweep before anything is written, GraftError when no cell came to anything, and
    Interrupted after Ctrl-C or SIGTERM, with every run's last step saved.
    """
    console = console or Console(quiet=True)
    if not sweep:
        raise InputError(
            "graft compare needs --config SWEEP.toml, which says what to compare (see graft compare --help)"
        )
    overrides = {name: value for name in ("init_from", "device") if (value := getattr(config, name))}
    budget = {name: value for name, value in asdict(config).items() if name.startswith("budget_") and value is not None}
    if "budget_steps" in budget:
        overrides["max_iters"] = budget.pop("budget_steps")
    cells = read_sweep(sweep, overrides, budget)
    with _run_lock(Path(config.out_dir)) as lock, _commands(config, len(cells), lock, debug) as commands:
        return _Sweep(config, cells, budget, console, commands).run()


@contextlib.contextmanager
def _commands(config: CompareConfig, cells: int, lock: tuple[int, ...], debug: bool) -> Iterator[JobRunner]:
    """Where the cells' commands run: on this machine, or on the cluster that --ray names."""
    if not config.ray:
        yield LocalRunner(config.jobs or 1, lock)
        return
    from graftlm.studies.ray_cluster import connected
    from graftlm.studies.ray_jobs import commands

    with connected(config, debug) as cluster:
        max_parallel = min(config.jobs or MAX_PENDING, cells)
        with commands(cluster, Path(config.out_dir), max_parallel) as elsewhere:
            yield elsewhere


def _run_lock(out_dir: Path) -> contextlib.AbstractContextManager[tuple[int, ...]]:
    """The folder's lock: its descriptor. The commands inherit it, so none of them outlives the lock."""
    if out_dir.is_dir() and any(out_dir.iterdir()) and not (out_dir / LOCK_NAME).exists():
        raise InputError(f"--out_dir {out_dir}: holds other files; name a folder that is empty or does not exist")
    return lock_dir(out_dir, LOCK_TIMEOUT, keep=True)


@dataclass
class _Sweep:
    config: CompareConfig
    cells: Sequence[Trial]
    budget: Mapping[str, float]
    console: Console
    commands: JobRunner
    stopping: threading.Event = field(default_factory=threading.Event)
    writing: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.out_dir = Path(self.config.out_dir)
        self.checkpoints = ["best", "last"] if self.config.checkpoint == "both" else [self.config.checkpoint]

    def run(self) -> dict[str, Any]:
        """All cells, so many at a time as there is room for; the table."""
        cleanup_tmp(self.out_dir / "sweep.json")
        write_json(self.out_dir / "sweep.json", {"cells": [{**asdict(c), "folder": c.folder} for c in self.cells]})
        with stop_on_signal() as stop, self._bar() as bar, ThreadPoolExecutor(self.commands.max_parallel) as pool:
            tasks: dict[str, TaskID] = {}
            futures = [pool.submit(self._cell, cell) for cell in self.cells]
            while not self._over(futures):
                self._show(bar, tasks)
                if stop.is_set() and not self.stopping.is_set():
                    self._stop()
        if self.stopping.is_set():
            raise Interrupted("interrupted; every run has saved its last step: go on with the same command")
        table = self._table()
        if not any("accuracy" in row for row in table["rows"]):
            raise GraftError(f"every row failed: {failures(table['rows'])[0]}")
        return table

    def _over(self, futures: Sequence["Future[None]"]) -> bool:
        done, running = wait(futures, timeout=0.3)
        for future in done:
            if error := future.exception():
                self._stop()
                raise error
        return not running

    def _stop(self) -> None:
        """Let every command finish its step and save, and begin no other."""
        self.stopping.set()
        self.commands.stop()

    # One cell -----------------------------------------------------------------------------------------------------

    def _cell(self, cell: Trial) -> None:
        folder = self.out_dir / cell.folder
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
        if self._done(cell):
            return
        if self.stopping.is_set():
            return
        began = time.monotonic()
        (folder / FAILED).unlink(missing_ok=True)
        reason = self._tried(cell, folder)
        if self.stopping.is_set():
            return
        if reason:
            write_json(folder / FAILED, {"reason": reason})
        self._say(cell, time.monotonic() - began)
        self._table()

    def _tried(self, cell: Trial, folder: Path) -> str:
        """Train and measure; why that failed, or nothing. Behind a lost worker it goes on from what is on the disk."""
        for left in range(MAX_RETRIES, -1, -1):
            try:
                if cell.trains:
                    self._train(cell, folder)
                for checkpoint in self._measured(cell):
                    self._measure(cell, folder, checkpoint)
            except CommandFailed as failure:
                return str(failure)
            except WorkerLost as lost:
                if not left or self.stopping.is_set():
                    return f"{MAX_RETRIES + 1} workers were lost one after the other: {lost}"
                self._print(f"a worker was lost; {cell.row}, seed {cell.seed} goes on from its last checkpoint")
            else:
                break
        return ""

    def _measured(self, cell: Trial) -> Sequence[str]:
        return self.checkpoints if cell.trains else [""]

    def _asked(self) -> dict[str, Any]:
        return {"mode": self.config.mode, "limit": self.config.limit}

    def _done(self, cell: Trial) -> bool:
        folder = self.out_dir / cell.folder
        found = [folder / f"test-{checkpoint}.json" for checkpoint in self._measured(cell)]
        return all(path.is_file() and read_test(path)["eval_config"] == self._asked() for path in found)

    def _train(self, cell: Trial, folder: Path) -> None:
        run = folder / "run"
        record = read_json(run / "run.json") if (run / "run.json").is_file() else None
        if record is not None and record["results"] is not None:
            return
        if record is None and run.is_dir():  # killed before it had written anything
            shutil.rmtree(run)
        flags = {**cell.flags, **self._budgeted(cell, folder), "out_dir": str(run)}
        resumed = ["--resume"] if record is not None else []
        self.commands.run(["train", *_words(flags), *resumed, "--json"], folder)

    def _budgeted(self, cell: Trial, folder: Path) -> dict[str, int]:
        """The steps that a budget in seconds or TFLOP comes to for this cell; decided once, so that a resume agrees."""
        if not self.budget:
            return {}
        steps = folder / "steps.json"
        if not steps.is_file():
            ((name, most),) = self.budget.items()
            flags = {**cell.flags, "max_iters": PLANNED_STEPS, "out_dir": str(folder / "planned")}
            plan = json.loads(self.commands.run(["train", *_words(flags), "--plan", "--json"], folder))
            each = plan["train_seconds" if name == "budget_seconds" else "model_tflop"] / PLANNED_STEPS
            write_json(steps, {"max_iters": max(1, int(most / each)), name: most})
        return {"max_iters": read_json(steps)["max_iters"]}

    def _measure(self, cell: Trial, folder: Path, checkpoint: str) -> None:
        rows = folder / f"test-{checkpoint}.jsonl"
        words = ["--mode", self.config.mode, "--limit", str(self.config.limit), f"--predictions={rows}"]
        if cell.trains:
            words += [f"--out_dir={folder / 'run'}", "--checkpoint", checkpoint]
            words += _words({name: cell.flags[name] for name in ("device", "dtype") if name in cell.flags})
        else:
            flags = {name: value for name, value in cell.flags.items() if name != "method"}
            words += _words({"init_from": TrainConfig.init_from, **flags})
        reading = json.loads(self.commands.run(["evaluate", *words, "--json"], folder))
        write_json(folder / f"test-{checkpoint}.json", {"eval_config": self._asked(), "reading": reading})

    # What is shown ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _bar(self) -> Iterator[Progress]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            yield bar

    def _show(self, bar: Progress, tasks: dict[str, TaskID]) -> None:
        """A line of progress for each run at work."""
        for cell in self.cells:
            rows, run = (
                self.out_dir / cell.folder / "run" / "metrics.jsonl",
                self.out_dir / cell.folder / "run/run.json",
            )
            if bar.disable or not rows.is_file() or not run.is_file():
                continue
            if cell.id not in tasks:
                total = read_json(run)["config"]["max_iters"]
                tasks[cell.id] = bar.add_task(f"{cell.row}, seed {cell.seed}", total=total)
            bar.update(tasks[cell.id], completed=rows.read_bytes().count(b"\n"))

    def _say(self, cell: Trial, seconds: float) -> None:
        done = sum(self._done(each) or (self.out_dir / each.folder / FAILED).is_file() for each in self.cells)
        found = [self._outcome(cell, checkpoint) for checkpoint in self._measured(cell)]
        what = found[0].reason or " and ".join(f"{o.reading['accuracy']:.3f}" for o in found)
        self._print(f"{done} of {len(self.cells)}: {cell.row}, seed {cell.seed}: {what} ({seconds / 60:.1f} min)")

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False)

    # The table ----------------------------------------------------------------------------------------------------

    def _outcome(self, cell: Trial, checkpoint: str) -> CellResult:
        folder, reason = self.out_dir / cell.folder, ""
        if not self._done(cell):
            failed = folder / FAILED
            reason = read_json(failed)["reason"] if failed.is_file() else "not done yet"
        return CellResult(cell, checkpoint, folder, reason)

    def _table(self) -> dict[str, Any]:
        """Made from what is on the disk, and written there."""
        with self.writing:
            rows = make_rows([self._outcome(cell, c) for cell in self.cells for c in self._measured(cell)])
            failed = sum((self.out_dir / cell.folder / FAILED).is_file() for cell in self.cells)
            table = {"rows": rows, "failed": failed, "out_dir": str(self.out_dir)}
            write_json(self.out_dir / "table.json", table)
            write_text(self.out_dir / "table.md", markdown(rows))
        return table


def _words(flags: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={str(v).lower() if isinstance(v, bool) else v}" for name, v in flags.items()]
