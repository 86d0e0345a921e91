"""Where a run's rows go: metrics.jsonl always; Weights & Biases and TensorBoard if asked.

What is unusual here: metrics.jsonl is the record, the others are copies. One that fails, at whatever call, is told
of once and left out from then on; it never stops a run. What is missing before the start (a package, a key) is wrong
input instead, and nothing starts.

A key for Weights & Biases comes from WANDB_API_KEY or a git-ignored wandb_api.json; it is handed to wandb and never
printed or saved.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.files.atomic import disk_errors
from graftlm.files.formats import read_json

KEY_FILE = Path("wandb_api.json")
MetricsRow = dict[str, Any]


class Logger(Protocol):
    """What takes a copy of every row."""

    def log(self, row: MetricsRow) -> None:
        """One row of metrics.jsonl; a value of None was not measured at this step."""

    def close(self) -> None:
        """There are no more rows."""


class MetricsLogger:
    """Appends rows to metrics.jsonl, one line each, on disk as soon as they are written, and copies them to loggers."""

    def __init__(self, path: Path, loggers: Iterable[tuple[str, Logger]], warn: Callable[[str], None]) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._path = path
        self._loggers = dict(loggers)
        self._warn = warn

    def write(self, row: MetricsRow) -> None:
        """Add one row."""
        with disk_errors(self._path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        self._each(lambda logger: logger.log(row))

    def close(self) -> None:
        """Close the file, and the loggers."""
        try:
            with disk_errors(self._path):
                self._file.close()  # what a full disk refused is written once more
        finally:
            self._each(lambda logger: logger.close())

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                call(logger)
            except Exception as error:  # whatever it is: another's library, network or disk must not stop a run
                del self._loggers[name]
                self._warn(disabled_message(name, error))


def disabled_message(name: str, error: Exception) -> str:
    """The line that tells of a logger that failed."""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{name} failed and is left out from here on, metrics.jsonl goes on: {what[:200]}"


def check_loggers(config: TrainConfig) -> None:
    """An InputError before anything starts if a logger's package or key is missing."""
    if config.wandb_project:
        _wandb()
        _key()
    if config.tensorboard:
        _summary_writer()


def start_loggers(
    config: TrainConfig, run: dict[str, Any], step: int, warn: Callable[[str], None]
) -> list[tuple[str, Logger]]:
    """The loggers asked for, by name, for a run that goes on behind `step`; one that cannot start is left out."""
    out_dir = Path(config.out_dir)
    asked: dict[str, Callable[[], Logger]] = {}
    if config.wandb_project:
        asked["Weights & Biases"] = lambda: Wandb(config.wandb_project, run["wandb_id"], out_dir, run["config"])
    if config.tensorboard:
        asked["TensorBoard"] = lambda: TensorBoard(out_dir / "tensorboard", step)
    started: list[tuple[str, Logger]] = []
    for name, start in asked.items():
        try:
            started.append((name, start()))
        except Exception as error:  # as in Metrics
            warn(disabled_message(name, error))
    return started


class TensorBoard:
    """Event files for TensorBoard, one scalar a number of the row."""

    def __init__(self, folder: Path, step: int) -> None:
        # What was written behind the checkpoint that a run goes on from is purged from what TensorBoard shows.
        self._writer = _summary_writer()(str(folder), purge_step=step + 1)

    def log(self, row: MetricsRow) -> None:
        """Every number but the step itself, at its step."""
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs the tensorboard package: pip install 'graftlm[tensorboard]'") from None
    return SummaryWriter


class Wandb:
    """A Weights & Biases run that a resumed run continues."""

    def __init__(self, project: str, run_id: str, out_dir: Path, config: dict[str, Any]) -> None:
        wandb = _wandb()
        if key := _key():
            os.environ["WANDB_API_KEY"] = key
        self._run = wandb.init(
            project=project, id=run_id, resume="allow", name=out_dir.name, dir=str(out_dir), config=config
        )

    def log(self, row: MetricsRow) -> None:
        """What was measured at this step."""
        self._run.log({k: v for k, v in row.items() if v is not None}, step=row["step"])

    def close(self) -> None:
        """Let it send the rest."""
        self._run.finish()


def _wandb() -> ModuleType:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb
    except ImportError:
        raise InputError("--wandb_project needs the wandb package: pip install 'graftlm[wandb]'") from None
    return wandb


def _key() -> str | None:
    """The key, or None where none is needed; an InputError where one is and there is none."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return None
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    if KEY_FILE.is_file():
        data = read_json(KEY_FILE)
        key = data.get("key") or data.get("api_key") or data.get("wandb_api_key") if isinstance(data, dict) else None
        if isinstance(key, str) and key:
            return key
        raise InputError(f'{KEY_FILE}: holds no key; write {{"key": "..."}}')
    raise InputError(
        f'--wandb_project: no key; set WANDB_API_KEY, write {{"key": "..."}} to {KEY_FILE}, or set WANDB_MODE=offline'
    )
