"""A name as a run or a base, for every subcommand; and what a run folder contains. Does not import torch.

smollm2-135m                     a base
runs/demo                        a run: its best checkpoint, or the one that --checkpoint names
runs/demo/last                   that checkpoint of the run; likewise runs/demo/checkpoints/step-20
resume                           the run in --out_dir
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.config.paths import user_path
from graftlm.config.renamed import upgrade_run
from graftlm.errors import InputError
from graftlm.files.formats import read_json

RESUME = "resume"
BASE = "base"
DEFAULT_RUN = "graft-run"


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a run, or its base."""

    folder: Path
    """The run folder."""
    checkpoint: str
    """best, last, another path in the run folder, or base."""
    record: dict[str, Any]
    """Its run.json."""
    step: int | None
    """The checkpoint's step, when it was looked up; None for the base and for an imported run."""

    @property
    def path(self) -> Path | None:
        """The checkpoint's folder; None for the base."""
        return None if self.checkpoint == BASE else self.folder / self.checkpoint

    @property
    def is_full_finetune(self) -> bool:
        """Whether the run trained the base's own weights, so that the checkpoint is a base itself."""
        return bool(self.record["method"]["method"] == "full")


def find_run(name: str, out_dir: str | Path | None = None, checkpoint: str = "best") -> RunCheckpoint | None:
    """The run that a name means; None for a base. checkpoint: is read if the name is not of a checkpoint itself.

    Raises InputError for a run without run.json or without the checkpoint.
    """
    folder = user_path((out_dir or DEFAULT_RUN) if name == RESUME else name)
    up, up2 = folder.parent, folder.parent.parent
    if folder.name in ("best", "last") and (up / "run.json").is_file():
        folder, checkpoint = up, folder.name
    elif up.name == "checkpoints" and (up2 / "run.json").is_file():
        folder, checkpoint = up2, f"checkpoints/{folder.name}"
    elif name != RESUME and not (name and (folder / "run.json").is_file()):
        return None
    record = read_run(folder)
    if checkpoint != BASE:
        checkpoint_folder(folder, checkpoint)
    return RunCheckpoint(folder, checkpoint, record, checkpoint_step(folder, checkpoint))


def base_name(name: str) -> str:
    """The name of a model to adapt: itself, or of a run that trained all weights the folder of its checkpoint.

    Raises InputError for a run of any other method: its model is a base with an adapter.
    """
    run = find_run(name)
    if run is None:
        return name
    if not run.is_full_finetune:
        raise InputError(
            f"{name}: is a run that adapts {run.record['base']['name']}, and a base is needed here: name that, or "
            f"merge the run first (graft export {run.folder} --format merged --to FOLDER)"
        )
    return str(run.path)


def read_run(run_dir: Path) -> dict[str, Any]:
    """The run.json of a run folder; an InputError if there is no valid one."""
    if not (run_dir / "run.json").is_file():
        raise InputError(
            f"{run_dir}: holds no run (no run.json); train one with graft train --out_dir {run_dir}, or name a base "
            "model by --init_from"
        )
    run = read_json(run_dir / "run.json")
    if not isinstance(run, dict) or not {"config", "method", "base", "data", "template"} <= run.keys():
        raise InputError(f"{run_dir / 'run.json'}: is no record of a run; restore it, or train again in another folder")
    return upgrade_run(run)


def checkpoint_folder(run_dir: Path, checkpoint: str) -> Path:
    """The folder of a run's checkpoint: best, last, or a path inside the run; an InputError if it is missing."""
    path = run_dir / checkpoint
    if not path.is_dir():
        raise InputError(f"{path}: no such checkpoint; the run has not saved one yet, go on with graft train --resume")
    return path


def checkpoint_step(run_dir: Path, checkpoint: str) -> int | None:
    """The step of a checkpoint, by the folder that it is or links to; None if that does not say."""
    step = (run_dir / checkpoint).resolve().name.removeprefix("step-")
    return int(step) if step.isdecimal() else None


def format_of_run(run: dict[str, Any]) -> str:
    """The format in which the base of a run was kept: that of its hash."""
    return str(run["base"].get("format", "dense"))
