"""graft compare: a sweep becomes cells, cells become one table, and killing it on the way changes nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graftlm import cli
from graftlm.errors import InputError
from graftlm.studies import sweep as sweep_module
from graftlm.studies.report_data import read_folders
from graftlm.studies.results_table import TrialResult, make_rows, markdown
from graftlm.studies.sweep import read_sweep
from soak.forks import Forks, Life
from tiny import TEMPLATE, data_folder, model_folder

TRAIN = """
[train]
init_from = "{assets}/model"
data = "{assets}/data"
template = {template}
batch_size = 4
dtype = "float32"
kernels = "torch"
"""
ROWS = """
[[rows]]
name = "LoRA"
rank = 2
[[rows]]
name = "too wide"
rank = 1000
[[rows]]
name = "as it is"
method = "zero-shot"
"""


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    model_folder(folder / "model")
    data_folder(folder / "data")
    return folder


def sweep(folder: Path, assets: Path, rest: str, head: str = "") -> Path:
    file = folder / "sweep.toml"
    file.write_text(head + TRAIN.format(assets=assets, template=json.dumps(TEMPLATE)) + rest)
    return file


def timeless(out_dir: Path) -> Any:
    """The table without times, memory and what was planned of them."""
    table = json.loads((out_dir / "table.json").read_text())
    for row in table["rows"]:
        for name in ("seconds", "examples_per_s", "peak_rss_mb", "predicted"):
            row.pop(name, None)
    return table["rows"]


# What is compared


def cells(tmp_path: Path, text: str, **overrides: Any) -> list[Any]:
    file = tmp_path / "sweep.toml"
    file.write_text(text)
    return read_sweep(str(file), overrides, {})


def test_rows_take_all_of_the_grid_and_seeds_share_a_row(tmp_path: Path) -> None:
    text = (
        "[train]\nlr = 1e-3\n[grid]\nalpha = [8, 16]\nseed = [0, 1]\n[[rows]]\nname = 'a'\nrank = 4\n[[rows]]\nrank = 0"
    )
    found = cells(tmp_path, text, device="cpu")
    assert [(c.row, c.seed) for c in found[:4]] == [
        ("a alpha=8", 0),
        ("a alpha=8", 1),
        ("a alpha=16", 0),
        ("a alpha=16", 1),
    ]
    assert found[4].row == "rank=0 alpha=8"
    assert found[0].flags == {"lr": 1e-3, "alpha": 8.0, "seed": 0, "rank": 4, "device": "cpu"}
    assert len({c.id for c in found}) == len({c.folder for c in found}) == 8


def test_a_base_model_as_it_is_stands_there_once_for_all_seeds(tmp_path: Path) -> None:
    found = cells(
        tmp_path, "[grid]\nseed = [0, 1]\n[[rows]]\nname = 'zero'\nmethod = 'zero-shot'\n[[rows]]\nname = 'b'"
    )
    assert [(c.row, c.trains) for c in found] == [("zero", False), ("b", True), ("b", True)]


def test_a_cell_is_its_flags_and_the_files_they_name(tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_text("text,label\na,0\n")
    text = f"[train]\ndata = '{data}'"
    (first,) = cells(tmp_path, text)
    (named,) = cells(tmp_path, f"{text}\nrank = 128\n[[rows]]\nname = 'another name'\nseed = 0")
    assert named.id != first.id  # 128 is said, and not left to the method
    (again,) = cells(tmp_path, f"{text}\nbatch_size = 16\n[[rows]]\nname = 'another name'")
    assert again.id == first.id
    data.write_text("text,label\nb,0\n")
    sweep_module._file_hashes.cache_clear()  # one comparison reads a file once
    assert cells(tmp_path, text)[0].id != first.id


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[train]\nrnak = 4", "[train]: unknown key 'rnak': did you mean rank? keys are flags of graft train"),
        ("[train]\nrank = '4'", "[train]: rank = '4': not a whole number"),
        ("[train]\nresume = true", "[train]: resume: is set by graft compare; leave it out"),
        ("[grid]\nrank = 4", "[grid] rank: needs a list of values, such as rank = [4]"),
        ("[grid]\nrank = []", "[grid] rank: needs a list of values, such as rank = [[]]"),
        ("[grid]\nrank = [4, -1]", "row 1: rank -1: must be 0 (full fine-tuning) or more"),
        ("train = 4", "train is a table: write [train] and its keys below"),
        ("rows = []", "rows are written as [[rows]], one table each"),
        ("[[rows]]\nname = 'a'\nrank = 4\n[[rows]]\nname = 'a'\nrank = 8", "two rows are called 'a': give each"),
        ("[[rows]]\nname = 'a'\n[[rows]]\nname = 'b'", "'b' with seed 0 is listed twice"),
        ("[train]\nepochs = 2\nmax_iters = 9", "row 1: epochs and max_iters both say how long a run is; give one"),
        ("[train", "not a TOML file"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(InputError) as error:
        cells(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'sweep.toml'}: {line}")


def test_wrong_words_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.toml").write_text("jobz = 2\n[train]\nrank = 2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "table.toml").write_text("[[row]]\nrank = 2")
    (tmp_path / "good.toml").write_text("[train]\nrank = 2")
    for words, line in (
        ([], "graft compare needs --config SWEEP.toml"),
        (["--config", "sweep.toml"], "sweep.toml: unknown key 'jobz': did you mean jobs?"),
        (["--config", "table.toml"], "table.toml: unknown table 'row': the tables are [train], [grid], [[rows]]"),
        (["--config", "good.toml", "--jobs", "0"], "--jobs 0: must be 1 or more"),
        (["--config", "good.toml", "--budget_steps=3", "--budget_tflop=3"], "--budget_steps and --budget_tflop: all"),
        (["--config", "good.toml", "--out_dir", "full"], "--out_dir full: has other files"),
        (["--config", "none.toml"], "--config none.toml: cannot read it: No such file"),
    ):
        assert cli.run(["compare", *words]) == 2
        assert capsys.readouterr().err.startswith(f"graft: {line}")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["file"] and not (tmp_path / "graft-compare").exists()


# The table


def outcome(folder: Path, cell: Any, accuracy: str, texts: str = "abcd", peak: float = 5.0) -> TrialResult:
    """An outcome whose predictions are right where `accuracy` has a 1."""
    at = folder / cell.folder
    (at / "run").mkdir(parents=True)
    right = [c == "1" for c in accuracy]
    rows = [{"text": t, "label": 1, "predicted": int(r)} for t, r in zip(texts, right, strict=True)]
    (at / "test-best.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    share = sum(right) / len(right)
    reading = {"n": 4, "accuracy": share, "ci_low": 0.1, "ci_high": 0.9, "macro_f1": share, "garbage_rate": 0.0}
    (at / "test-best.json").write_text(json.dumps({"eval_config": {}, "reading": reading}))
    results = {"steps": 3, "seconds": 60.0, "examples_per_s": 2.0, "peak_rss_mb": peak, "trainable": 7}
    results |= {"trainable_fraction": 0.5, "best": {"val_loss": 0.25, "val_accuracy": None}}
    plan = {"train_seconds": 30.0, "validation_seconds": 60.0, "peak_rss_mb": 4.0}
    (at / "run" / "run.json").write_text(json.dumps({"results": results, "plan": plan}))
    return TrialResult(cell, "best", at)


def test_a_row_is_held_against_the_first_example_by_example(tmp_path: Path) -> None:
    found = cells(tmp_path, "[grid]\nrank = [1, 2]\nseed = [0, 1]\n[[rows]]")
    rights = ["1100", "1101", "1111", "0111"]
    first, second = make_rows([outcome(tmp_path, c, r) for c, r in zip(found, rights, strict=True)])
    assert first["accuracy_per_seed"] == [0.5, 0.75] and first["accuracy"] == 0.625 and "p" not in first
    assert first["interval"] == "t over seeds" and (first["ci_low"], first["ci_high"]) == (0.0, 1.0)
    # Sums over seeds 2, 2, 0, 1 against 1, 2, 2, 2, times two seeds: differences -2, 0, 4, 2.
    assert second["delta_vs_baseline"] == pytest.approx(0.25)
    assert second["p"] == pytest.approx(6 / 8)  # ±2 ±4 ±2 makes 8, 4, 4, 0, 0, -4, -4, -8; seen was 4
    assert "1.0 (1.5)" in markdown([first, second]) and "+25.0, p = 0.75" in markdown([first, second])


def test_the_memory_of_a_row_is_that_of_its_largest_run(tmp_path: Path) -> None:
    found = cells(tmp_path, "[grid]\nrank = [1]\nseed = [0, 1, 2]")
    (row,) = make_rows([outcome(tmp_path, c, "1100", peak=p) for c, p in zip(found, (5.0, 9.0, 4.0), strict=True)])
    assert row["peak_rss_mb"] == 9.0


def test_rows_that_read_other_examples_are_not_held_against_each_other(tmp_path: Path) -> None:
    a, b = cells(tmp_path, "[grid]\nrank = [1, 2]")
    _, row = make_rows([outcome(tmp_path, a, "1100"), outcome(tmp_path, b, "1111", texts="abce")])
    assert row["delta_vs_baseline"] is None and row["p"] is None


# For real


@pytest.mark.usefixtures("forked_children")
def test_rows_are_trained_measured_skipped_and_may_fail(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep(tmp_path, assets, ROWS, f'out_dir = "{tmp_path}/out"\nbudget_steps = 6\n')
    words = ["compare", "--config", str(file), "--jobs", "2", "--checkpoint", "last", "--limit", "8"]
    assert cli.run([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    lora, wide, zero = result["rows"]
    assert result["failed"] == 1 and wide["failed"][0].startswith("seed 0: --rank 1000: above the width of ")
    assert "3 of 3: " in err
    assert (lora["steps"], lora["n"], zero["n"], zero["steps"]) == (6, 8, 8, None) and lora["trainable"] == 2 * 320
    (trial,) = tmp_path.glob("out/LoRA*")
    file = trial / json.loads((trial / "test-last.json").read_text())["predictions"]
    predictions = [json.loads(x) for x in file.read_text().splitlines()]
    assert lora["accuracy"] == sum(p["predicted"] == p["label"] for p in predictions) / 8
    # In the report the trial's run is like any other, on its own and among the trials.
    (alone,), (among, _, base) = (read_folders([str(folder)]) for folder in (trial / "run", tmp_path / "out"))
    for run in (alone, among):
        (shown,) = run.predictions
        assert (shown.accuracy, shown.checkpoint, shown.settings["limit"]) == (lora["accuracy"], "last", 8)
    assert base.predictions[0].accuracy == zero["accuracy"] and alone.name == trial.name
    log = next(tmp_path.glob("out/LoRA*/log.txt")).read_text()
    assert log.count("$ graft train") == log.count("$ graft evaluate") == 1
    # Again: only what failed is tried again, and another reading needs no other training.
    before = timeless(tmp_path / "out")
    assert cli.run(words) == 0 and timeless(tmp_path / "out") == before
    assert "failed: too wide, seed 0: --rank 1000" in capsys.readouterr().out
    assert next(tmp_path.glob("out/LoRA*/log.txt")).read_text() == log
    # As an older version left it: the predictions are in the trial's folder.
    test = json.loads((trial / "test-last.json").read_text())
    file.rename(trial / "test-last.jsonl")
    shutil.rmtree(trial / "run/evaluations")
    (trial / "test-last.json").write_text(json.dumps({key: test[key] for key in ("eval_config", "reading")}))
    assert cli.run(words) == 0 and timeless(tmp_path / "out") == before
    (old,) = read_folders([str(trial / "run")])
    assert [each.accuracy for each in old.predictions] == [lora["accuracy"]]
    assert (trial / "log.txt").read_text() == log
    assert cli.run([*words[:-1], "4"]) == 0
    assert next(tmp_path.glob("out/LoRA*/log.txt")).read_text().count("$ graft train") == 1
    assert timeless(tmp_path / "out")[0]["n"] == 4


@pytest.mark.usefixtures("forked_children")
def test_rows_of_one_file_are_measured_on_the_same_split(assets: Path, tmp_path: Path) -> None:
    rest = "epochs = 2\n[[rows]]\nname = 'trained'\nrank = 2\n[[rows]]\nname = 'base'\nmethod = 'zero-shot'\n"
    file = sweep(tmp_path, assets, rest, f'out_dir = "{tmp_path}/out"\nbudget_steps = 1\n')
    file.write_text(file.read_text().replace(f"{assets}/data", f"{assets}/data/train.jsonl"))
    assert cli.run(["compare", "--config", str(file)]) == 0
    trained, base = timeless(tmp_path / "out")
    assert (trained["steps"], trained["n"], base["n"]) == (1, 5, 5)


@pytest.mark.usefixtures("forked_children")
def test_a_budget_of_work_gives_wider_rows_fewer_steps(assets: Path, tmp_path: Path) -> None:
    rest = "[[rows]]\nname = 'one'\nbatch_size = 1\nshared_prefix = false\n"
    rest += "[[rows]]\nname = 'four'\nbatch_size = 4\nshared_prefix = false\n"
    file = sweep(tmp_path, assets, rest, f'out_dir = "{tmp_path}/out"\nbudget_tflop = 2e-4\n')
    file.write_text(file.read_text().replace("batch_size = 4\ndtype", "rank = 2\ndtype"))
    assert cli.run(["compare", "--config", str(file)]) == 0
    one, four = (row["steps"] for row in timeless(tmp_path / "out"))
    assert one == pytest.approx(4 * four, rel=0.2) and four >= 2


@pytest.mark.usefixtures("forked_children")
def test_all_rows_failing_is_a_failure(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sweep(tmp_path, assets, "[[rows]]\nrank = 1000\n", f'out_dir = "{tmp_path}/out"\n')
    assert cli.run(["compare", "--config", str(file)]) == 1
    assert "every row failed: rank=1000, seed 0: --rank 1000" in capsys.readouterr().err


def test_killed_three_times_it_ends_with_the_same_table(
    assets: Path, tmp_path: Path, forks: Forks, forked_children: str
) -> None:
    rest = "max_iters = 60\neval_every = 5\n[grid]\nrank = [1, 2]\n"
    file, log = sweep(tmp_path, assets, rest), tmp_path / "log.txt"

    def begin(out: Path) -> Life:
        words = ["compare", "--config", str(file), "--out_dir", str(out)]
        return forks.start(*words, cwd=tmp_path, log=log, prelude=forked_children)

    assert begin(tmp_path / "quiet").wait() == 0, log.read_text()
    out, folders = tmp_path / "killed", [p.name for p in (tmp_path / "quiet").glob("rank=*")]
    folders.sort(key=lambda name: name.startswith("rank=2"))
    moments = [(0, 3), (0, 59), (1, 20)]  # which cell, and after which step
    for cell, step in moments:
        life = begin(out)
        wait_for(out / folders[cell] / "run" / "metrics.jsonl", step, life.ended)
        life.kill()
        assert life.wait() == -signal.SIGKILL, log.read_text()
    assert begin(out).wait() == 0, log.read_text()
    assert timeless(out) == timeless(tmp_path / "quiet")
    text = "".join((out / name / "log.txt").read_text() for name in folders)
    assert text.count("--resume") >= 2


def start(file: Path, out_dir: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "graftlm", "compare", "--config", str(file), "--out_dir", str(out_dir)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for(path: Path, rows: int, ended: Callable[[], object]) -> None:
    while not ended() and not (path.is_file() and path.read_bytes().count(b"\n") >= rows):
        time.sleep(0.01)


def test_what_it_started_ends_with_it_and_another_one_waits_for_its_lock(assets: Path, tmp_path: Path) -> None:
    file = sweep(tmp_path, assets, "max_iters = 100000\neval_every = 50\nrank = 2\n")
    process = start(file, tmp_path / "out")
    try:
        wait_for(next_metrics(tmp_path / "out", process), 2, lambda: process.poll() is not None)
        second = subprocess.run(
            [sys.executable, "-m", "graftlm", "compare", "--config", str(file), "--out_dir", str(tmp_path / "out")],
            capture_output=True,
            text=True,
        )
        assert second.returncode == 2 and " is locked by another graft process (pid " in second.stderr
    finally:
        process.kill()
        process.wait()
    rows = next((tmp_path / "out").glob("*/run/metrics.jsonl"))
    time.sleep(0.3)
    count = rows.read_bytes().count(b"\n")
    time.sleep(0.3)
    assert rows.read_bytes().count(b"\n") == count


def next_metrics(out: Path, process: "subprocess.Popen[bytes]") -> Path:
    while process.poll() is None:
        if found := list(out.glob("*/run/metrics.jsonl")):
            return found[0]
        time.sleep(0.02)
    raise AssertionError("it ended before it trained")


def test_ctrl_c_saves_every_run_and_the_same_command_goes_on(assets: Path, tmp_path: Path) -> None:
    file = sweep(tmp_path, assets, "max_iters = 100000\neval_every = 50000\nrank = 2\n")
    process = start(file, tmp_path / "out")
    wait_for(next_metrics(tmp_path / "out", process), 3, lambda: process.poll() is not None)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 130
    run = next((tmp_path / "out").glob("*/run"))
    assert (run / "last" / "adapter_model.safetensors").is_file()
    assert not (run.parent / "failed.json").exists()
