"""The evaluations that a run folder keeps, for `graft report`. Does not import torch.

    RUN/evaluations/
      best-test-1f0c9a3e.json     settings, the checkpoint's step, and the result of `graft evaluate --json`
      best-test-1f0c9a3e.jsonl    a row per example: text, label, predicted, …; none for documents

The name has the checkpoint, the split and a hash of the settings, so an evaluation that is repeated replaces itself and
no other. The .json is written last: without it there is no evaluation.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.files.atomic import write_json, write_text
from graftlm.files.formats import read_json

FOLDER = "evaluations"


@dataclass(frozen=True)
class SavedEvaluation:
    """An evaluation in a run folder."""

    path: Path
    """The .json; the predictions have the same name with .jsonl."""
    settings: Mapping[str, Any]
    """checkpoint, data and split, and every other flag that is not at its default and changes the result."""
    step: int | None
    """The checkpoint's step; None for the base and for an imported run."""
    result: Mapping[str, Any]
    """What `graft evaluate --json` prints."""


def save_evaluation(
    run_dir: Path,
    settings: Mapping[str, Any],
    step: int | None,
    result: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write an evaluation into its run folder; returns the path of the .json. Raises a GraftError if it cannot."""
    name = hashlib.sha256(_as_text(settings).encode()).hexdigest()[:8]
    path = run_dir / FOLDER / f"{settings['checkpoint']}-{settings['split']}-{name}.json"
    if rows:
        write_predictions(path.with_suffix(".jsonl"), rows)
    write_json(path, {"settings": settings, "step": step, "result": _finite(result)})
    return path


def _finite(value: Any) -> Any:
    """A user's metric may be NaN, which JSON lacks: null."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_evaluations(run_dir: Path) -> list[SavedEvaluation]:
    """The evaluations of a run folder: base, best, last, each with the fewest settings first.

    Raises LookupError or TypeError for a file of another kind.
    """
    found = [SavedEvaluation(path, **read_json(path)) for path in (run_dir / FOLDER).glob("*.json")]
    return sorted(found, key=lambda e: (e.settings["checkpoint"], len(e.settings), _as_text(e.settings)))


def _as_text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def write_predictions(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows of predictions as jsonl, atomically. In ASCII, for readers that split lines at U+0085."""
    write_text(Path(path), "".join(json.dumps(row) + "\n" for row in rows))
