"""benchmarks/handout.py: finished trials become results, results become pages, and only what is missing is trained.

The trials are written by hand; no model is trained.
"""

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fake_runs import metrics, predictions, record, write
from graftlm.inference.metrics import t_interval
from graftlm.studies.results_table import TrialResult, make_rows
from graftlm.studies.sweep import Trial, read_sweep

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SVG = "{http://www.w3.org/2000/svg}"
RECIPE = """
out_dir = "runs/small"
checkpoint = "both"
[train]
init_from = "smollm2-135m"
data = "rotten-tomatoes-pypi"
epochs = 2
[grid]
seed = [0, 1, 2]
[[rows]]
name = "narrow"
rank = 4
lr = 1e-5
[[rows]]
name = 'wide, "r=8"'
rank = 8
[[rows]]
name = "as it is"
method = "zero-shot"
"""
EXAMPLES = 9


@pytest.fixture(scope="module")
def handout() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("handout")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def recipe(handout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The only recipe of a study, which has no result yet."""
    monkeypatch.setattr(handout, "ROOT", tmp_path)
    monkeypatch.setattr(handout, "STUDIES", {"handout": ("small",), "methods": ()})
    monkeypatch.setattr(handout, "all_results", lambda study: [{"share": SHARE}])
    file = tmp_path / "recipes" / "handout" / "small.toml"
    file.parent.mkdir(parents=True)
    file.write_text(RECIPE)
    return handout.recipes("handout")["small"]


SHARE = {"trainable": 1, "total": 8, "trainable_fraction": 0.125}


def finish(out_dir: Path, trial: Trial, wrong: int, seconds: float = 60.0, checkpoints: Sequence[str] = ()) -> None:
    """Write what `graft compare` leaves of a trial that is wrong on its first examples."""
    folder, right = out_dir / trial.folder, [number >= wrong for number in range(EXAMPLES)]
    accuracy = sum(right) / EXAMPLES
    reading = {"n": EXAMPLES, "accuracy": accuracy, "ci_low": 0.1, "ci_high": 0.9, "macro_f1": accuracy}
    for name in checkpoints or (("best", "last") if trial.trains else ("",)):
        write(folder / f"test-{name}.jsonl", predictions(right))
        test = {"eval_config": {"mode": "score", "limit": 0}, "reading": {**reading, "garbage_rate": 0.0}}
        write(folder / f"test-{name}.json", test)
    if trial.trains:
        run = record(6, date="2026-01-02", git="abc123")
        run["results"] |= {"seconds": seconds, "trainable": 1290, "trainable_fraction": 0.01}
        run["plan"] |= {"peak_rss_mb": 900.0}
        write(folder / "run" / "run.json", run)
        write(folder / "run" / "metrics.jsonl", metrics([0.9, 0.7, 0.5, 0.4, 0.35, 0.3 + 0.1 * trial.seed]))


def machine(name: str) -> dict[str, Any]:
    here = {"cpu": name, "family_model_stepping": "1/2/3", "flags": [], "cores": 2, "memory_gb": 8.0, "torch": "2"}
    return {"machine": here, "graftlm": "later", "jobs": 1, "other_work": False}


@pytest.fixture
def command(handout: Any, recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the script with these words; its report."""

    def run(*words: str) -> Any:
        status = sys.modules["harness"].main(handout.__doc__, handout.run, handout.FLAGS, words)
        out = capsys.readouterr().out
        return json.loads(out) if status == 0 else status

    return run


@pytest.mark.parametrize("study", ["handout", "methods"])
def test_a_part_of_a_recipe_has_the_same_trials_and_checkpoints(handout: Any, study: str, tmp_path: Path) -> None:
    for recipe in handout.recipes(study).values():
        some = recipe.trials[1:]
        part = handout.Recipe(recipe.write(some, tmp_path / "part.toml"))
        assert part.trials == some and [part.checkpoints(t) for t in some] == [recipe.checkpoints(t) for t in some]
        assert (part.config.mode, part.config.limit) == (recipe.config.mode, recipe.config.limit)


def test_a_result_gives_the_rows_that_the_run_folders_give(handout: Any, recipe: Any, tmp_path: Path) -> None:
    for number, trial in enumerate(recipe.trials):
        finish(tmp_path / "out", trial, wrong=number, seconds=100.0 * number)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    trials = json.loads(json.dumps(handout.collect(recipe, tmp_path / "out", {}, machine("one"))))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    each = [(trial, name) for trial in recipe.trials for name in recipe.checkpoints(trial)]
    expected = make_rows([TrialResult(trial, name, tmp_path / "out" / trial.folder) for trial, name in each])
    table = handout.table_of_trials(recipe, trials)
    assert table.rows == expected and table.note == "" and expected[-1]["p"] < 1
    assert table.rows[0]["accuracy_per_seed"] == [1.0, 8 / 9, 7 / 9]
    assert (table.rows[0]["ci_low"], table.rows[0]["ci_high"]) == t_interval([1.0, 8 / 9, 7 / 9])
    saved = trials[recipe.trials[0].id]
    assert (saved["date"], saved["graftlm"], saved["dtype"]) == ("2026-01-02", "abc123", "float32")
    assert trials[recipe.trials[-1].id]["graftlm"] == "later"


def test_a_trial_counts_when_all_checkpoints_of_the_table_are_evaluated_as_it_asks(
    handout: Any, recipe: Any, tmp_path: Path
) -> None:
    first, second, *_ = recipe.trials
    finish(tmp_path / "out", first, wrong=1, checkpoints=["best"])
    finish(tmp_path / "out", second, wrong=1)
    other = tmp_path / "out" / second.folder / "test-last.json"
    write(other, {**json.loads(other.read_text()), "eval_config": {"mode": "score", "limit": 4}})
    assert handout.collect(recipe, tmp_path / "out", {}, machine("one")) == {}
    finish(tmp_path / "out", first, wrong=1)
    assert list(handout.collect(recipe, tmp_path / "out", {}, machine("one"))) == [first.id]


def test_of_the_same_trial_the_one_with_more_checkpoints_is_kept(handout: Any) -> None:
    one = {"id": "x", "date": "1", "tests": {"best": {}}}
    both = {"id": "x", "date": "2", "tests": {"best": {}, "last": {}}}
    assert handout.merge([one], [both])["x"]["date"] == handout.merge([both], [one])["x"]["date"] == "2"
    assert handout.merge([one, {**one, "date": "3"}])["x"]["date"] == "1"


def test_only_what_is_missing_is_trained(
    handout: Any, recipe: Any, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[str, int]] = []

    def compare(verb: str, *words: str) -> None:
        flags = dict(word.removeprefix("--").split("=", 1) for word in words)
        assert verb == "compare" and flags["jobs"] == "2"
        for trial in read_sweep(flags["config"], {}, {}):
            if len(trained) == 4:
                raise sys.modules["harness"].BenchmarkError("killed")
            trained.append((trial.row, trial.seed))
            finish(Path(flags["out_dir"]), trial, wrong=trial.seed)

    monkeypatch.setattr(sys.modules["harness"], "graft", compare)
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    words = [f"--out_dir={tmp_path}/here", "--jobs=2"]
    assert command(*words, f"--json-out={first}") == 1  # killed after the first seed and one trial of the second
    assert trained == [("narrow", 0), ('wide, "r=8"', 0), ("as it is", 0), ("narrow", 1)]
    taken = command(*words, f"--json-out={first}", "--collect")["trials"]
    assert len(taken) == len(trained) == 4 and all(trial["jobs"] == 2 for trial in taken)
    # Another machine, which has the committed result and no run folders.
    trained.clear()
    committed = [{"share": SHARE, **json.loads(first.read_text())}]
    monkeypatch.setattr(handout, "all_results", lambda study: committed)
    words[0] = f"--out_dir={tmp_path}/there"
    command(*words, f"--json-out={second}")
    assert trained == [('wide, "r=8"', 1), ("narrow", 2), ('wide, "r=8"', 2)]
    # Both are complete together; a file keeps what it has.
    trained.clear()
    both = handout.merge(*(json.loads(file.read_text())["trials"] for file in (first, second)))
    assert recipe.missing(both) == []
    committed = [{"share": SHARE, **json.loads(second.read_text())}]
    assert len(command(*words, f"--json-out={first}")["trials"]) == 4 and not trained


def test_collecting_computes_the_share_that_no_result_has(
    handout: Any, recipe: Any, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handout, "all_results", lambda study: [])
    monkeypatch.setattr(sys.modules["harness"], "graft", lambda verb, *words: {"verb": verb, **SHARE})
    found = command(f"--out_dir={tmp_path}/none", f"--json-out={tmp_path}/found.json", "--collect")
    assert found["share"] == {"verb": "train", **SHARE} and found["trials"] == []


def results_of(handout: Any, recipe: Any, folder: Path, of: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """Two results: the seeds 0 of one machine, the others of another."""
    for trial in recipe.trials:
        if trial.seed in of.get(trial.row, ()):
            finish(folder / ("a" if trial.seed == 0 else "b"), trial, wrong=trial.seed, seconds=120 - 30 * trial.seed)
    return [
        {"trials": list(handout.collect(recipe, folder / name, {}, {**machine(cpu), **more}).values())}
        for name, cpu, more in (("a", "one CPU", {}), ("b", "another", {"other_work": True}))
    ]


def test_a_page_from_two_machines_names_seeds_machines_and_what_is_missing(
    handout: Any, recipe: Any, tmp_path: Path
) -> None:
    results = results_of(handout, recipe, tmp_path, {"narrow": [0, 1, 2], 'wide, "r=8"': [1]})
    found, pictures = handout.blocks("handout", [*results, {"share": SHARE}])
    rows = [line for line in found["small"].splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[:2] for row in rows[2:]] == [
        ["| narrow (best), 3 seeds", "88.9%"],
        ["| narrow (last), 3 seeds", "88.9%"],
        ['| wide, "r=8" (best), 1 seed', "88.9%"],
        ['| wide, "r=8" (last), 1 seed', "88.9%"],
    ]
    assert [row.split(" | ")[7:9] for row in rows[2::2]] == [["2.0 (1.5)", "9.5"], ["", ""]]  # of the idle machine
    assert 'Missing: wide, "r=8" (seeds 0, 2); as it is (seed 0).' in found["small"]
    assert "![validation loss against the step, mean and range of seeds](handout/small-val_loss.svg)" in found["small"]
    one, another = sorted(found["machine"].splitlines(), reverse=True)
    assert "one CPU" in one and one.endswith("graftlm at abc123: narrow (seed 0).")
    assert "next to other work" in another and another.endswith('narrow (seeds 1, 2); wide, "r=8" (seed 1).')
    assert found["share"] == "1 of 8 parameters: **12.50%**."
    root = ElementTree.fromstring(pictures["small-val_loss.svg"])
    band, _ = [each.attrib["points"].split() for each in root.iter(f"{SVG}polygon")]
    middle = next(root.iter(f"{SVG}polyline")).attrib["points"].split()
    heights = [float(point.split(",")[1]) for point in band]
    assert len(band) == 2 * len(middle) == 6 and heights[1] == heights[4]  # the seeds differ at the last step only
    assert heights[2] - heights[3] > 10
    assert float(middle[2].split(",")[1]) == pytest.approx((heights[2] + heights[3]) / 2, abs=0.1)


def test_an_earlier_table_stays_until_each_row_has_a_trial(handout: Any, recipe: Any, tmp_path: Path) -> None:
    row = {"name": "old", "checkpoint": "best", "seeds": [0], "accuracy": 0.7, "ci_low": 0.6, "ci_high": 0.8}
    row |= {"steps": 100, "val_loss": 0.1, "trainable": 1, "trainable_fraction": 0.1, "seconds": 60.0}
    row |= {"predicted": {"seconds": 60.0}, "examples_per_s": 1.0, "peak_rss_mb": 9.0}
    points = [{"step": step, "val_loss": 0.5, "val_accuracy": 0.5} for step in (50, 100)]
    earlier = {"tables": {"small": [row]}, "curves": {"small": {"old": points, "two": points}}, "date": "2025-01-01"}
    earlier |= {"config": {"budget_steps": 100, "jobs": 2}, **{k: machine("old")[k] for k in ("machine", "graftlm")}}
    found, pictures = handout.blocks("handout", [earlier])
    assert found["small"].startswith("Missing: narrow (seeds 0, 1, 2); ") and "| old | 70.0% |" in found["small"]
    assert "Until then, runs of 100 steps with one seed:" in found["small"] and len(pictures) == 2
    assert found["machine"].startswith("- 2025-01-01, 2 at a time. 2 cores of old ")
    assert found["machine"].endswith(": the tables of `small.toml`.")
    results = results_of(handout, recipe, tmp_path, {"narrow": [0]})
    found, pictures = handout.blocks("handout", [*results, earlier])
    assert (
        "| narrow (best) |" in found["small"]
        and "| old |" in found["small"]
        and len(found["machine"].split("\n- ")) == 2
    )
    assert ">old</text>" in pictures["small-val_loss.svg"] and "mean and range" not in found["small"]
    results = results_of(handout, recipe, tmp_path, {"narrow": [0, 2], 'wide, "r=8"': [1], "as it is": [0]})
    found, pictures = handout.blocks("handout", [*results, earlier])
    assert ">narrow</text>" in pictures["small-val_loss.svg"]
    assert found["small"].startswith('Missing: narrow (seed 1); wide, "r=8" (seeds 0, 2).\n\n| row |')
    assert "old" not in found["small"] + found["machine"]
    assert handout.blocks("handout", [])[0]["small"].startswith("Missing: ")
    whole = {**earlier, "config": {"budget_steps": 200, "jobs": 1}}  # these runs were as long as the recipe's
    assert handout.blocks("handout", [whole])[0]["small"].startswith("| row |")
