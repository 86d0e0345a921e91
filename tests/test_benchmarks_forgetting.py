"""benchmarks/forgetting.py: the loss on general text, its change with an interval, and its column of a page."""

import importlib
import json
import sys
from collections.abc import Iterator
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from fake_runs import write
from graftlm import cli
from graftlm.exchange.load import load
from graftlm.inference.metrics import t_quantile
from test_benchmarks_handout import BENCHMARKS, finish, machine
from tiny import TEMPLATE, data_folder, model_folder

DOCUMENTS = {"imdb": ["a good film, and a long one\n" * 6, "dull"], "licences": ["no warranty of any kind, " * 8]}
WINDOWS = {"imdb": 64, "licences": 48}
METHODS = {
    "lora": ["--method=lora", "--rank=4", "--alpha=8"],
    "ia3": ["--method=ia3"],
    "prefix": ["--method=prefix", "--prefix_length=3"],
}


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def forgetting(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with short texts for a tiny model."""
    found: Any = importlib.import_module("forgetting")
    monkeypatch.setattr(found, "general_texts", lambda: DOCUMENTS)
    monkeypatch.setattr(found, "WINDOWS", WINDOWS)
    return found


def same_texts(nats: list[float], tokens: list[int]) -> dict[str, Any]:
    return {"sha256": "x", "nats": nats, "tokens": tokens}


def test_the_interval_of_windows_of_one_length_is_that_of_their_mean(forgetting: Any) -> None:
    differences = [0.5, -0.25, 1.0, 0.75]
    base, trained = same_texts([3.0] * 4, [10] * 4), same_texts([3.0 + 10 * each for each in differences], [10] * 4)
    change = forgetting.change(base, trained)
    half = t_quantile(4) * stdev(differences) / sqrt(4)
    assert change == pytest.approx((mean(differences), mean(differences) - half, mean(differences) + half))


def test_a_window_counts_by_its_tokens(forgetting: Any) -> None:
    change = forgetting.change(same_texts([8.0, 1.0], [8, 2]), same_texts([16.0, 3.0], [8, 2]))
    assert change == pytest.approx((1.0, 1.0, 1.0))  # 1 nat per token in both windows: nothing varies
    change = forgetting.change(same_texts([8.0, 1.0], [8, 2]), same_texts([16.0, 1.0], [8, 2]))
    assert change.mean == pytest.approx(0.8) and change.ci_low < 0 < change.ci_high
    with pytest.raises(sys.modules["harness"].BenchmarkError, match="different windows"):
        forgetting.change(same_texts([8.0, 1.0], [8, 2]), same_texts([8.0, 1.0], [7, 3]))


def test_the_licences_are_those_of_the_pinned_packages() -> None:
    module: Any = importlib.import_module("forgetting")
    texts = [module.licence(*each) for each in module.LICENCES.items()]
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in texts[0] and "Apache License" in texts[1]
    with pytest.raises(sys.modules["harness"].BenchmarkError, match="typing_extensions: has no LICENSE with"):
        module.licence("typing_extensions", "00")
    with pytest.raises(sys.modules["harness"].BenchmarkError, match="no-such-package"):
        module.licence("no-such-package", "00")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each of METHODS."""
    folder = tmp_path_factory.mktemp("runs")
    model, data = model_folder(folder / "model"), data_folder(folder / "data")
    common = [f"--init_from={model}", f"--data={data}", f"--template={TEMPLATE}", "--max_iters=4"]
    for name, words in METHODS.items():
        run = [*common, *words, "--batch_size=8", "--lr=0.05", "--val_limit=4", f"--out_dir={folder / name}"]
        assert cli.run(["train", *run, "--json"]) == 0
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_the_losses_are_those_of_graft_evaluate_and_merging_does_not_change_them(
    name: str, trained: Path, forgetting: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(trained / name)
    base = load(run, checkpoint="base", dtype="float32")
    merged, attached = load(run, checkpoint="last", dtype="float32"), load(str(trained / "model"), dtype="float32")
    attached = load(run, checkpoint="last", base=attached)
    before, after, without_merging = (
        forgetting.losses(each.model, each.tokenizer) for each in (base, merged, attached)
    )
    found, same = forgetting.compared(before, after), forgetting.compared(before, without_merging)
    for text, documents in DOCUMENTS.items():
        assert found[text]["change"] == pytest.approx(same[text]["change"], abs=1e-5)
        assert abs(found[text]["change"]) > 1e-3  # the run has learned something
        assert found[text]["change"] == pytest.approx(found[text]["trained"] - found[text]["base"], abs=1e-9)
        nats = 0.0
        for number, document in enumerate(documents):
            (tmp_path / f"{number}.txt").write_text(document)
            capsys.readouterr()
            words = [f"--out_dir={run}", "--checkpoint=last", "--dtype=float32", f"--max_length={WINDOWS[text]}"]
            assert cli.run(["evaluate", *words, f"--data={tmp_path / f'{number}.txt'}", "--json"]) == 0
            result = json.loads(capsys.readouterr().out)
            nats += result["loss"] * result["tokens"]
        assert sum(after[text]["nats"]) == pytest.approx(nats, rel=1e-5)
        assert sum(after[text]["tokens"]) == found[text]["tokens"]


def test_a_process_of_its_own_measures_a_checkpoint(
    trained: Path, forgetting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    harness = sys.modules["harness"]

    def in_process(command: list[str], folder: Path, environment: Any) -> Any:
        capsys.readouterr()
        words = command[command.index("--child") :]
        assert harness.main(forgetting.__doc__, forgetting.run, forgetting.FLAGS, words, forgetting.child) == 0
        return harness.Process(capsys.readouterr().out, "", 0, 1.0, 100.0, 0.0)

    monkeypatch.setattr(harness, "run_process", in_process)
    loaded = load(str(trained / "lora"), checkpoint="last", dtype="float32")
    assert forgetting.measure(trained / "lora", "last", tmp_path) == forgetting.losses(loaded.model, loaded.tokenizer)
    words = [f"--run={trained / 'lora'}", f"--json-out={tmp_path / 'found.json'}"]
    assert harness.main(forgetting.__doc__, forgetting.run, forgetting.FLAGS, words) == 0
    assert json.loads((tmp_path / "found.json").read_text())["forgetting"].keys() == DOCUMENTS.keys()
    assert harness.main(forgetting.__doc__, forgetting.run, forgetting.FLAGS, []) == 1


# ---------------------------------------------------------------------------------------------------- with the trials

RECIPE = """
out_dir = "runs/small"
checkpoint = "last"
[train]
init_from = "smollm2-135m"
[[rows]]
name = "narrow"
rank = 4
[[rows]]
name = "wide"
rank = 8
[[rows]]
name = "as it is"
method = "zero-shot"
"""


@pytest.fixture
def measured(forgetting: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Measuring takes no model; the list of (folder, checkpoint) that were measured."""
    calls: list[tuple[str, str]] = []

    def measure(run: Path, checkpoint: str, folder: Path) -> dict[str, Any]:
        calls.append((run.parent.name, checkpoint))
        more = 0.0 if checkpoint == "base" else 5.0 + len(calls)
        return {name: same_texts([20.0, 30.0 + more], [10, 10]) for name in WINDOWS}

    monkeypatch.setattr(forgetting, "measure", measure)
    return calls


def test_forgetting_is_added_once_to_trials_whose_run_is_there(
    forgetting: Any, measured: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handout: Any = importlib.import_module("handout")
    recipe = handout.Recipe(write_text(tmp_path / "all.toml", RECIPE))
    narrow, wide, zero_shot = recipe.trials
    for trial in (narrow, wide, zero_shot):
        finish(tmp_path / "out", trial, wrong=1)
    committed = json.loads(json.dumps(handout.collect(recipe, tmp_path / "out", {}, machine("one"))))
    monkeypatch.setattr(handout, "STUDIES", {"methods": ("all",)})
    monkeypatch.setattr(handout, "recipes", lambda study: {"all": recipe})
    without, _ = handout.blocks("methods", [{"trials": list(committed.values())}])
    assert forgetting.HEAD not in without["all"] and "| narrow |" in without["all"]
    (tmp_path / "out" / narrow.folder).rename(tmp_path / "away")  # its run is on another machine
    found = handout.measure_forgetting(recipe, tmp_path / "out", committed, tmp_path)
    assert list(found) == [wide.id] and measured == [(wide.folder, "base"), (wide.folder, "last")]
    assert found[wide.id]["tests"] == committed[wide.id]["tests"]
    (tmp_path / "away").rename(tmp_path / "out" / narrow.folder)
    known = handout.merge(committed.values(), found.values())
    assert "forgetting" in known[wide.id]  # a result without it does not hide it
    some, _ = handout.blocks("methods", [{"trials": list(known.values())}])
    lines = [line for line in some["all"].splitlines() if line.startswith("| ")]
    assert lines[0].endswith(f"| {forgetting.HEAD} |")
    assert lines[2].endswith("|  |") and lines[3].endswith("+0.350 (-4.097 to 4.797) / +0.350 (-4.097 to 4.797) |")
    found = handout.measure_forgetting(recipe, tmp_path / "out", known, tmp_path)
    assert list(found) == [narrow.id] and len(measured) == 4


def test_another_run_in_the_folder_is_not_taken_for_the_results(
    measured: list[tuple[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handout: Any = importlib.import_module("handout")
    recipe = handout.Recipe(write_text(tmp_path / "all.toml", RECIPE))
    narrow = recipe.trials[0]
    finish(tmp_path / "out", narrow, wrong=1)
    known = handout.collect(recipe, tmp_path / "out", {}, machine("one"))
    file = tmp_path / "out" / narrow.folder / "run" / "run.json"
    run = json.loads(file.read_text())
    write(file, {**run, "results": {**run["results"], "seconds": 1.0}})
    assert handout.measure_forgetting(recipe, tmp_path / "out", known, tmp_path) == {} and not measured
    assert "has another run than the result" in capsys.readouterr().err


def write_text(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
