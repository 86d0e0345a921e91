"""Where a run's rows go: metrics.jsonl always, Weights & Biases if asked.

A key for Weights & Biases comes from WANDB_API_KEY or a git-ignored wandb_api.json; it is handed to wandb and never
printed or saved.
"""

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from graftlm.errors import InputError
from graftlm.files.formats import disk_errors, read_json

KEY_FILE = Path("wandb_api.json")


class Metrics:
    """Appends rows to metrics.jsonl, one line each, on disk as soon as they are written; optionally to wandb too."""

    def __init__(self, path: Path, wandb_run: Any = None) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._path = path
        self._wandb = wandb_run

    def write(self, row: dict[str, Any]) -> None:
        """Add one row."""
        with disk_errors(self._path):
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in row.items() if v is not None}, step=row["step"])

    def close(self) -> None:
        """Close the file and finish the wandb run."""
        try:
            with disk_errors(self._path):
                self._file.close()  # what a full disk refused is written once more
        finally:
            if self._wandb is not None:
                self._wandb.finish()


def check_wandb(project: str) -> None:
    """An InputError before anything starts if the package or the key is missing."""
    if not project:
        return
    _wandb()
    _key()


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


def start_wandb(project: str, run_id: str, out_dir: Path, config: dict[str, Any]) -> Any:
    """A wandb run that a resumed run continues; None without a project."""
    if not project:
        return None
    wandb = _wandb()
    key = _key()
    if key:
        os.environ["WANDB_API_KEY"] = key
    try:
        return wandb.init(
            project=project, id=run_id, resume="allow", name=out_dir.name, dir=str(out_dir), config=config
        )
    except wandb.errors.Error as e:
        raise InputError(f"--wandb_project {project}: {str(e).splitlines()[0]}") from None
