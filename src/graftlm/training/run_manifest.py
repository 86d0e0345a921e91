"""run.json: what it records of a run, and which flags a resumed run may change."""

import os
import platform
import secrets
import subprocess
from collections.abc import Set
from dataclasses import MISSING, asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.exchange.load import read_run
from graftlm.files.atomic import LOCK_NAME, write_json
from graftlm.methods.base import count_parameters
from graftlm.text.dataset import Dataset
from graftlm.text.layouts import Conversation
from graftlm.training.distributed import DistContext
from graftlm.training.reference import REFERENCE_FILES

if TYPE_CHECKING:
    from graftlm.training.setup import RunContext

CONTENT_CHECKED = {"init_from", "data", "val_data", "test_data"}
"""Flags that name files: on resume they may name another place, because the content is checked by its hash."""
RESUME_MUTABLE = {*CONTENT_CHECKED, "resume", "plan", "shard", "max_iters", "epochs", "wandb_project", "tensorboard"}
"""Flags that a resumed run may change; all others decide its numbers."""


@dataclass
class RunManifest:
    """The content of a run's run.json."""

    folder: Path
    values: dict[str, Any]
    is_writer: bool = True
    """Whether this rank writes the file."""

    def update(self, **changes: Any) -> None:
        """Change entries and write the file."""
        self.values |= changes
        if self.is_writer:
            write_json(self.folder / "run.json", self.values)


def new_manifest(
    run: "RunContext", dataset: Dataset, base_sha256: str, start: dict[str, Any] | None, previous: dict[str, Any] | None
) -> RunManifest:
    """The manifest of a run that is ready to start; of a resumed run what its start recorded is taken over.

    start: the adapter that training starts from. previous: run.json of the run that is resumed.
    """
    trained, total = count_parameters(run.loaded.model)
    template = run.loaded.template
    assert template is not None
    history = [*previous["resume_history"], config_diff(previous, run.config, run.dist)] if previous else []
    previous = previous or {}
    values = {
        "config": asdict(run.config),
        "method": run.method.to_json(),
        "base": {"name": run.loaded.name, "sha256": base_sha256},
        "parent_run": start,
        "data": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "examples": {split: len(examples) for split, examples in run.data.splits.items()},
            "chat": isinstance(dataset.splits["train"][0], Conversation),
        },
        "template": {"name": template.name, "text": template.text, "labels": list(template.labels)},
        "device": str(run.device),
        "dtype": str(run.loaded.model.dtype).removeprefix("torch."),
        "dtype_reason": run.loaded.dtype_reason,
        "trainable": trained,
        "total": total,
        "versions": _versions(),
        "git": _git_state(),
        "wandb_id": previous.get("wandb_id") or secrets.token_hex(8),
        "notes": run.notes,
        "plan": previous.get("plan"),
        "cpp_kernels": previous.get("cpp_kernels"),
        "reference": previous.get("reference"),
        "distributed": run.dist.to_json(),
        "resume_history": history,
        "results": None,
    }
    return RunManifest(Path(run.config.out_dir), values, run.dist.is_main)


def config_diff(previous: dict[str, Any], config: TrainConfig, dist: DistContext) -> dict[str, Any]:
    """What a resume changed, {flag: [before, now]}. A new last step changes the learning rate's schedule."""
    recorded, was = previous["config"], previous.get("distributed", DistContext().to_json())
    distributed = {"distributed": [was, dist.to_json()]} if was != dist.to_json() else {}
    flags = {k: [recorded.get(k), v] for k, v in asdict(config).items() if k != "resume" and recorded.get(k) != v}
    return {**flags, **distributed}


# Resume ---------------------------------------------------------------------------------------------------------------


def check_out_dir(out_dir: Path) -> None:
    """An InputError unless a new run can start there."""
    if (out_dir / "run.json").exists():
        raise InputError(f"--out_dir {out_dir}: holds a run already; add --resume to continue it, or name another")
    if out_dir.is_file():
        raise InputError(f"--out_dir {out_dir}: is a file; name a folder")
    # Of a first start that was killed before it wrote run.json:
    leftovers = (LOCK_NAME, ".run.json.tmp-", REFERENCE_FILES, f".{REFERENCE_FILES}")
    if out_dir.is_dir() and any(not p.name.startswith(leftovers) for p in out_dir.iterdir()):
        raise InputError(f"--out_dir {out_dir}: holds other files; name a folder that is empty or does not exist")


def read_previous(config: TrainConfig) -> dict[str, Any] | None:
    """run.json of the run to resume; None without --resume. An InputError if it cannot be resumed."""
    if not config.resume:
        return None
    out_dir = Path(config.out_dir)
    previous = read_run(out_dir)
    if "imported" in previous:
        raise InputError(
            f"{out_dir}: was imported without optimizer state, so there is no training to resume; "
            f"merge it (graft export --out_dir {out_dir} --merged --to FOLDER) and train that (--init_from FOLDER)"
        )
    return previous


def resumed_config(config: TrainConfig, recorded: dict[str, Any], explicit: Set[str] | None) -> TrainConfig:
    """The recorded flags with the new last step; an InputError if an explicit flag contradicts them."""
    changes: dict[str, Any] = {"resume": True}
    for f in fields(TrainConfig):
        value = getattr(config, f.name)
        was = recorded.get(f.name, None if f.default is MISSING else f.default)
        is_explicit = value != f.default if explicit is None else f.name in explicit
        if f.name in RESUME_MUTABLE:
            if f.name != "resume" and is_explicit:
                changes[f.name] = value
        elif is_explicit and f.name != "out_dir" and value != was:
            raise InputError(f"--resume with --{f.name} {value}: the run has {was}; leave it out, or start a new run")
    if "epochs" in changes and "max_iters" not in changes:
        changes["max_iters"] = None
    kept = {f.name: recorded[f.name] for f in fields(TrainConfig) if f.name in recorded}
    return replace(TrainConfig(**{**kept, "out_dir": config.out_dir}), **changes)


def explicit_flags(config: TrainConfig, given: Set[str] | None) -> Set[str]:
    """The flags that were typed; if that is unknown, those that differ from their defaults."""
    return {f.name for f in fields(config) if getattr(config, f.name) != f.default} if given is None else given


# Environment ----------------------------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("graftlm", "torch", "tokenizers", "safetensors", "numpy")}
    return {"python": platform.python_version(), "platform": platform.platform(), **packages}


def _git_state() -> str | None:
    """Commit and dirtiness of the checkout graftlm runs from; None when it is installed elsewhere."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None
