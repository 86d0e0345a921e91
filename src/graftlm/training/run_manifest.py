"""What run.json holds of a run before its first step; the loop adds its plan, how it computes, and what it came to."""

import os
import platform
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from graftlm.config import TrainConfig
from graftlm.exchange.load import Loaded
from graftlm.methods import Method
from graftlm.methods.base import count_parameters
from graftlm.text.collate import Dataset, Example
from graftlm.text.layouts import Conversation
from graftlm.training.distributed import DistContext


def run_manifest(
    config: TrainConfig,
    method: Method,
    loaded: Loaded,
    data: Dataset,
    examples: Mapping[str, Sequence[Example]],
    *,
    base_sha256: str,
    start: dict[str, str | None] | None,
    device: torch.device,
    dtype: torch.dtype,
    notes: list[str],
    previous: dict[str, Any] | None,
    world: DistContext,
) -> dict[str, Any]:
    """The object of run.json, of a run whose method is installed; every flag of `config` is decided.

    examples: by split, as they are read. start: the adapter that the run started from. previous: the record of the run
    that is gone on with; what it found at its start is kept.
    """
    trained, total = count_parameters(loaded.model)
    assert loaded.template is not None
    template = loaded.template
    return {
        "config": asdict(config),
        "method": method.to_json(),
        "base": {
            "name": loaded.name,
            "sha256": base_sha256,
        },
        "parent_run": start,
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "examples": {split: len(some) for split, some in examples.items()},
            "chat": isinstance(data.splits["train"][0], Conversation),
        },
        "template": {"name": template.name, "text": template.text, "labels": list(template.labels)},
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "dtype_reason": loaded.dtype_reason,
        "trainable": trained,
        "total": total,
        "versions": _versions(),
        "git": _git_state(),
        "wandb_id": previous["wandb_id"] if previous else secrets.token_hex(8),
        "notes": notes,
        "plan": previous.get("plan") if previous else None,
        "cpp_kernels": previous.get("cpp_kernels") if previous else None,
        "reference": previous.get("reference") if previous else None,
        "distributed": world.to_json(),
        "resume_history": [*previous["resume_history"], config_diff(previous, config, world)] if previous else [],
        "results": None,
    }


def config_diff(previous: dict[str, Any], config: TrainConfig, world: DistContext) -> dict[str, Any]:
    """What this resume changed: {flag: [before, now]}; a new end plans the learning rate's schedule anew."""
    recorded, was = previous["config"], previous.get("distributed", DistContext().to_json())
    several = {"distributed": [was, world.to_json()]} if was != world.to_json() else {}
    flags = {k: [recorded.get(k), v] for k, v in asdict(config).items() if k != "resume" and recorded.get(k) != v}
    return {**flags, **several}


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("graftlm", "torch", "tokenizers", "safetensors", "numpy")}
    return {"python": platform.python_version(), "platform": platform.platform(), **packages}


def _git_state() -> str | None:
    """Commit and dirtiness of the checkout graftlm runs from; None when it is installed elsewhere."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
