"""Recipes hold what a verb takes, and those of the course handout share their runs.

recipes/preferences is a benchmark's, which calls several verbs: tests/test_benchmarks.py runs one like it.
"""

import tomllib
from pathlib import Path

import pytest

from graftlm.config import CompareConfig, TrainConfig
from graftlm.config.flags import parse
from graftlm.methods import METHODS
from graftlm.studies.sweep import Trial, read_sweep

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.toml") if path.parent.name != "preferences")
SWEEPS = [path for path in RECIPES if "rows" in tomllib.loads(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", [p for p in RECIPES if p not in SWEEPS], ids=lambda path: path.name)
def test_a_recipe_for_train_holds_nothing_but_its_flags(path: Path) -> None:
    keys = set(tomllib.loads(path.read_text(encoding="utf-8")))
    assert parse("train", TrainConfig, ["--config", str(path)]).explicit == keys


def cells(path: Path) -> list[Trial]:
    return read_sweep(str(path), {}, {})


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_a_recipe_for_compare_is_a_sweep(path: Path) -> None:
    config = parse("compare", CompareConfig, ["--config", str(path)]).config
    assert config.out_dir.startswith(f"runs/{path.parent.name}") and len(cells(path)) >= 2


def test_the_handouts_recipes_are_all_there_and_share_their_runs() -> None:
    handout = [path for path in SWEEPS if path.parent.name == "handout"]
    assert [path.stem for path in handout] == ["alpha", "alpha_or_lr", "ranks", "templates", "zero_shot"]
    found = [cell for path in handout for cell in cells(path)]
    folders = {cell.folder for cell in found}
    assert len(folders) == len({cell.id for cell in found}) == 17 and len(found) == 22
    listed = cells(ROOT / "recipes" / "handout" / "ranks.toml")
    ranks = {cell.row: cell.flags for cell in listed}
    assert [(cell.row, cell.seed) for cell in listed] == [(row, seed) for row in ranks for seed in range(3)]
    assert "r=16--alpha=64-seed0-202ecc23" in folders  # runs made before there were more seeds are found again
    assert {flags["alpha"] / flags["rank"] for flags in ranks.values() if flags["rank"]} == {4}
    assert ranks["full"]["dropout"] == 0.05


def test_the_recipes_of_lora_without_regret_share_their_runs() -> None:
    found = [cell for path in SWEEPS if path.parent.name == "lora_without_regret" for cell in cells(path)]
    assert len({cell.folder for cell in found}) == len({cell.id for cell in found}) == 37 and len(found) == 46


def test_every_method_has_its_row() -> None:
    found = [cell.flags["method"] for cell in cells(ROOT / "recipes" / "methods" / "all.toml")]
    assert sorted(found) == sorted(METHODS)
