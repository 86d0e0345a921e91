"""Metrics loggers: metrics.jsonl always; Weights & Biases and TensorBoard if their flags are set.

metrics.jsonl is the record, the others are copies. A copy that fails is disabled with one warning and never stops a
run. A package or key that is missing before the start is an InputError.

A key for Weights & Biases comes from WANDB_API_KEY or a git-ignored wandb_api.json; it is passed to wandb and never
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
    """A destination for copies of the rows."""

    def log(self, row: MetricsRow) -> None:
        """One row of metrics.jsonl; a value of None was not measured at this step."""

    def close(self) -> None:
        """Called after the last row."""


class MetricsLogger:
    """Appends rows to metrics.jsonl, flushing each, and copies them to loggers."""

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
        self._call_all(lambda logger: logger.log(row))

    def close(self) -> None:
        """Close the file, and the loggers."""
        try:
            with disk_errors(self._path):
                self._file.close()  # retries what a full disk refused
        finally:
            self._call_all(lambda logger: logger.close())

    def _call_all(self, call: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                call(logger)
            except Exception as error:  # of any kind: another library, network or disk must not stop a run
                del self._loggers[name]
                self._warn(disabled_message(name, error))


def disabled_message(name: str, error: Exception) -> str:
    """The warning about a logger that failed."""
    what = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{name} failed and is disabled; metrics.jsonl continues: {what[:200]}"


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
    """The loggers that the flags select, by name, for a run that continues after `step`; without those that fail."""
    out_dir = Path(config.out_dir)
    selected: dict[str, Callable[[], Logger]] = {}
    if config.wandb_project:
        selected["Weights & Biases"] = lambda: Wandb(config.wandb_project, run["wandb_id"], out_dir, run["config"])
    if config.tensorboard:
        selected["TensorBoard"] = lambda: TensorBoard(out_dir / "tensorboard", step)
    started: list[tuple[str, Logger]] = []
    for name, start in selected.items():
        try:
            started.append((name, start()))
        except Exception as error:  # as in MetricsLogger
            warn(disabled_message(name, error))
    return started


class TensorBoard:
    """TensorBoard event files with one scalar per number of a row."""

    def __init__(self, folder: Path, step: int) -> None:
        # Events after the checkpoint that a run resumes from are purged from what TensorBoard shows.
        self._writer = _summary_writer()(str(folder), purge_step=step + 1)

    def log(self, row: MetricsRow) -> None:
        """Every number but the step itself, at its step."""
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the files."""
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
        """The values measured at this step."""
        self._run.log({k: v for k, v in row.items() if v is not None}, step=row["step"])

    def close(self) -> None:
        """Send the remaining rows."""
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
    """The API key, or None if none is needed; an InputError if it is missing."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return None
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    if KEY_FILE.is_file():
        data = read_json(KEY_FILE)
        key = data.get("key") or data.get("api_key") or data.get("wandb_api_key") if isinstance(data, dict) else None
        if isinstance(key, str) and key:
            return key
        raise InputError(f'{KEY_FILE}: contains no key; write {{"key": "..."}}')
    raise InputError(
        f'--wandb_project: no key; set WANDB_API_KEY, write {{"key": "..."}} to {KEY_FILE}, or set WANDB_MODE=offline'
    )
