"""sweep.toml -> the cells of a comparison: every run that is to be made, with its flags and its name.

    [train]                  flags of `graft train` that all rows share
    batch_size = 16

    [grid]                   every combination of these; the seeds of one setting make one row of the table
    lr = [1e-4, 2.5e-4]
    seed = [0, 1, 2]

    [[rows]]                 settings written out, each with all of the grid; the first is what others are held against
    name = "LoRA r=16"
    rank = 16
    alpha = 64

A row with method = "zero-shot" is the base model as it is, with the same template. Whatever stands beside the tables is
a flag of `graft compare`.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, get_type_hints

from graftlm.config import EvaluateConfig, TrainConfig
from graftlm.config.parsing import read_toml_flags
from graftlm.errors import InputError
from graftlm.files.formats import sha256_file

Flags = dict[str, Any]
ZERO_SHOT = "zero-shot"
OURS = ("out_dir", "resume", "plan")  # compare sets them
# What matters where nothing is trained; a seed chooses demonstrations there, and a sweep has none.
READ_BY = {f.name for f in fields(EvaluateConfig)} - {"out_dir", "batch_size", "seed"}
CONTENT = ("init_from", "data", "val_data", "test_data", "template")  # flags that may name a file or a folder


@dataclass(frozen=True)
class Trial:
    """One run of a comparison."""

    row: str
    """The table's row it belongs to: its name, or the flags that set it apart."""
    flags: Flags
    """Flags of `graft train`, as far as they are given."""
    id: str
    """A hash of the flags and of the local files they name: a cell that was done under this id is done."""

    @property
    def seed(self) -> int:
        """The seed it trains with."""
        return int(self.flags.get("seed", TrainConfig.seed))

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return self.flags.get("method") != ZERO_SHOT

    @property
    def folder(self) -> str:
        """The run folder's name: readable, and different for different content."""
        words = "".join(c if c.isalnum() or c in ".=-" else "-" for c in self.row)
        return f"{words.strip('-.')[:48]}-seed{self.seed}-{self.id[:8]}"


def read_sweep(file: str, overrides: Mapping[str, Any], budget: Mapping[str, float]) -> list[Trial]:
    """The cells of a sweep file, row by row; `overrides` are flags that hold for all, whatever the file says.

    A `budget` that is not known in steps yet is part of what makes a cell what it is.

    Raises InputError that names the file, the row and the key.
    """
    try:
        tables = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {file}: cannot read it: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, brackets without end
        raise InputError(f"{file}: not a TOML file: {error}") from None
    common = _flags(f"{file}: [train]", _table(file, tables, "train"))
    grid = _grid(file, _table(file, tables, "grid"))
    rows = tables.get("rows", [{}])
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{file}: rows are written as [[rows]], one table each")
    found = [cell for n, row in enumerate(rows, 1) for cell in _cells(f"{file}: row {n}", row, common, grid, overrides)]
    names: dict[str, Flags] = {}
    for name, flags in found:
        rest = {k: v for k, v in flags.items() if k != "seed"}
        if names.setdefault(name, rest) != rest:
            raise InputError(f"{file}: two rows are called {name!r}: give each [[rows]] a name of its own")
    cells = [Trial(name, flags, content_id(flags, budget)) for name, flags in found]
    seen: dict[str, Trial] = {}
    for cell in cells:
        if seen.setdefault(cell.id, cell) is not cell and cell.trains:
            raise InputError(f"{file}: {cell.row!r} with seed {cell.seed} stands there twice")
    return list(seen.values())


def _cells(
    where: str, row: Mapping[str, Any], common: Flags, grid: Mapping[str, Sequence[Any]], overrides: Mapping[str, Any]
) -> Iterator[tuple[str, Flags]]:
    own = _flags(where, {k: v for k, v in row.items() if k != "name"})
    for values in product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        flags = {**common, **chosen, **own, **overrides}
        _check(where, flags)
        if flags.get("method") == ZERO_SHOT:
            flags = {name: value for name, value in flags.items() if name in READ_BY or name == "method"}
        told = chosen if "name" in row else {**own, **chosen}  # what the name must say besides
        words = [str(row["name"])] if "name" in row else []
        words += [f"{k}={_round_sig(v)}" for k, v in told.items() if k != "seed"]
        yield " ".join(words) or "as given", flags


def _round_sig(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(file: str, tables: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = tables.get(name, {})
    if not isinstance(found, dict):
        raise InputError(f"{file}: {name} is a table: write [{name}] and its keys below")
    return found


def _grid(file: str, table: Mapping[str, Any]) -> dict[str, list[Any]]:
    grid: dict[str, list[Any]] = {}
    for key, values in table.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{file}: [grid] {key}: needs a list of values, such as {key} = [{values!r}]")
        each = [_flags(f"{file}: [grid]", {key: value}) for value in values]
        ((name, _),) = each[0].items()
        grid[name] = [one[name] for one in each]
    return grid


def _flags(where: str, table: Mapping[str, Any]) -> Flags:
    """The table's keys as fields of `graft train`, their values checked against the fields' types."""
    for key in table:
        if key.replace("-", "_") in OURS:
            raise InputError(f"{where}: {key}: graft compare sets it itself; leave it out")
    return read_toml_flags(where, table, get_type_hints(TrainConfig), "train")


def _check(where: str, flags: Flags) -> None:
    """What `graft train` would refuse at once is refused here, before anything runs."""
    try:
        TrainConfig(**{**flags, "out_dir": "checked"})
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('--')}") from None


def content_id(flags: Mapping[str, Any], budget: Mapping[str, float]) -> str:
    """sha256 over the flags that differ from the defaults, the budget, and the local files that flags name."""
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    said = {name: value for name, value in flags.items() if value != defaults[name]}
    files = {name: _content(str(said[name])) for name in CONTENT if name in said}
    return hashlib.sha256(json.dumps([said, files, dict(budget)], sort_keys=True).encode("utf-8")).hexdigest()


@cache
def _content(name: str) -> list[str] | None:
    """Hashes of a file or of a folder's files; None for a name that is neither (a built-in, a hub id, a template)."""
    try:
        path = Path(name)
        if path.is_file():
            return [sha256_file(path)]
        if path.is_dir():
            return [f"{p.relative_to(path)} {sha256_file(p)}" for p in sorted(path.rglob("*")) if p.is_file()]
    except OSError:  # a template's text is no file's name, and may be longer than one can be
        pass
    return None
