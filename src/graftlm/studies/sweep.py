"""A sweep file as the list of trials of a comparison, each with its flags and its name.

    [train]                  flags of `graft train` that all rows share
    batch_size = 16

    [grid]                   every combination of these; the seeds of one setting are one row of the table
    lr = [1e-4, 2.5e-4]
    seed = [0, 1, 2]

    [[rows]]                 settings, each combined with all of the grid; the first is the baseline
    name = "LoRA r=16"
    rank = 16
    alpha = 64

A row with method = "zero-shot" is the base model with the same template. Keys outside the tables are flags of
`graft compare`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import product
from typing import Any, get_type_hints

from graftlm.config import EvaluateConfig, TrainConfig
from graftlm.config.paths import split_choices, user_path
from graftlm.config.values import read_toml, read_toml_flags
from graftlm.errors import InputError
from graftlm.files.formats import sha256_file

Flags = dict[str, Any]
ZERO_SHOT = "zero-shot"
RESERVED = ("out_dir", "resume", "plan")  # set by compare
# The flags that matter for zero-shot. There a seed only selects demonstrations, which a sweep does not have.
EVALUATE_FLAGS = {f.name for f in fields(EvaluateConfig)} - {"out_dir", "batch_size", "seed"}
PATH_FLAGS = ("init_from", "data", "val_data", "test_data", "template")  # may name a file or a folder


@dataclass(frozen=True)
class Trial:
    """One run of a comparison."""

    row: str
    """The table's row: its name, or the flags that distinguish it."""
    flags: Flags
    """The flags of `graft train` that the sweep sets."""
    id: str
    """A hash of the flags and of the local files they name; a trial that is done under this id is not run again."""

    @property
    def seed(self) -> int:
        """The random seed of its training."""
        return int(self.flags.get("seed", TrainConfig.seed))

    @property
    def trains(self) -> bool:
        """Whether it trains; zero-shot does not."""
        return self.flags.get("method") != ZERO_SHOT

    @property
    def folder(self) -> str:
        """A readable folder name, unique to the id."""
        name = "".join(c if c.isalnum() or c in ".=-" else "-" for c in self.row)
        return f"{name.strip('-.')[:48]}-seed{self.seed}-{self.id[:8]}"


def read_sweep(
    sweep: str | Mapping[str, Any], overrides: Mapping[str, Any], budget: Mapping[str, float]
) -> list[Trial]:
    """The trials of a sweep file, row by row. Raises InputError that names the file, the row and the key.

    Args:
        sweep: the TOML file, or its tables.
        overrides: flags of all trials, which take precedence over the file.
        budget: a budget in seconds or TFLOP, if any; it is part of a trial's id.
    """
    tables, file = (read_toml(sweep, "--config "), sweep) if isinstance(sweep, str) else (sweep, "compare")
    common = _flags(f"{file}: [train]", _table(file, tables, "train"))
    grid = _grid(file, _table(file, tables, "grid"))
    rows = tables.get("rows", [{}])
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file}: rows are written as [[rows]], one table each")
    settings: dict[str, Flags] = {}
    trials: dict[str, Trial] = {}
    for number, row in enumerate(rows, 1):
        for name, flags in _expand(f"{file}: row {number}", row, common, grid, overrides):
            setting = {flag: value for flag, value in flags.items() if flag != "seed"}
            if settings.setdefault(name, setting) != setting:
                raise InputError(f"{file}: two rows are called {name!r}: give each [[rows]] a name of its own")
            trial = Trial(name, flags, content_id(flags, budget))
            if trials.setdefault(trial.id, trial) is not trial and trial.trains:
                raise InputError(f"{file}: {trial.row!r} with seed {trial.seed} is listed twice")
    return list(trials.values())


def _expand(
    where: str, row: Mapping[str, Any], common: Flags, grid: Mapping[str, Sequence[Any]], overrides: Mapping[str, Any]
) -> Iterator[tuple[str, Flags]]:
    """(name, flags) for each combination of a row with the grid."""
    own = _flags(where, {key: value for key, value in row.items() if key != "name"})
    for values in product(*grid.values()):
        combination = dict(zip(grid, values, strict=True))
        flags = {**common, **combination, **own}
        if {"epochs", "max_iters"} <= flags.keys():
            raise InputError(f"{where}: epochs and max_iters both say how long a run is; give one of them")
        flags |= overrides
        try:
            TrainConfig(**{**flags, "out_dir": "any"})  # what `graft train` would reject is rejected before any run
        except InputError as error:
            raise InputError(f"{where}: {str(error).removeprefix('--')}") from None
        if flags.get("method") == ZERO_SHOT:
            flags = {name: value for name, value in flags.items() if name in EVALUATE_FLAGS or name == "method"}
        named = combination if "name" in row else {**own, **combination}
        parts = [str(row["name"])] if "name" in row else []
        parts += [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in named.items() if k != "seed"]
        yield " ".join(parts) or "default", flags


def _table(file: str, tables: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise InputError(f"{file}: {name} is a table: write [{name}] and its keys below")
    return table


def _grid(file: str, table: Mapping[str, Any]) -> dict[str, list[Any]]:
    grid: dict[str, list[Any]] = {}
    for key, values in table.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{file}: [grid] {key}: needs a list of values, such as {key} = [{values!r}]")
        for value in values:
            ((name, parsed),) = _flags(f"{file}: [grid]", {key: value}).items()
            grid.setdefault(name, []).append(parsed)
    return grid


def _flags(where: str, table: Mapping[str, Any]) -> Flags:
    """A table's keys as flags of `graft train`, with values of the flags' types."""
    for key in table:
        if key.replace("-", "_") in RESERVED:
            raise InputError(f"{where}: {key}: is set by graft compare; leave it out")
    return read_toml_flags(where, table, get_type_hints(TrainConfig), "train")


def content_id(flags: Mapping[str, Any], budget: Mapping[str, float]) -> str:
    """sha256 of the flags that differ from the defaults, the budget, and the local files that flags name."""
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    changed = {name: value for name, value in flags.items() if value != defaults[name]}
    hashes = {name: _file_hashes(str(changed[name])) for name in PATH_FLAGS if name in changed}
    return hashlib.sha256(json.dumps([changed, hashes, dict(budget)], sort_keys=True).encode("utf-8")).hexdigest()


@cache
def _file_hashes(name: str) -> list[str] | None:
    """Hashes of a file or of a folder's files; None for other names (a built-in, a hub id, a template's text)."""
    try:
        path = user_path(split_choices(name)[0])
        if path.is_file():
            return [sha256_file(path)]
        if path.is_dir():
            return [f"{p.relative_to(path)} {sha256_file(p)}" for p in sorted(path.rglob("*")) if p.is_file()]
    except OSError:  # a template's text can be too long for a file name
        pass
    return None
