"""graft report: what folders hold becomes a page that can be read without scripts; no text in it does anything."""

import json
import math
import re
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from conftest import Graft
from fake_runs import compared, metrics, predictions, realistic, record, run_folder, write
from graftlm import cli
from graftlm.errors import InputError
from graftlm.studies.report import calibration, charts, disagreements, downsample, make_page, moving_average
from graftlm.studies.report_data import Predictions, Run, read_folders

TODAY = date(2026, 11, 24)
NASTY = '</script><img src=x onerror="alert(1)"> & <b>{{title}}</b>\u2028\x85'


def measured(folder: Path, right: str = "1101", **changes: Any) -> Path:
    """A run folder with predictions, right where there is a 1."""
    run_folder(folder, **changes)
    write(folder / "test-best.jsonl", predictions([c == "1" for c in right]))
    return folder


def page(*folders: Path) -> str:
    return make_page(read_folders([str(folder) for folder in folders]), "A title", TODAY)


class Tables(HTMLParser):
    """The texts of all cells, by the region's name and row."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: dict[str, list[list[str]]] = {}
        self.where: list[str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        named = dict(attrs)
        if named.get("role") == "region":
            self.rows = self.found[named["aria-label"]] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
            self.where = self.rows[-1]

    def handle_data(self, data: str) -> None:
        if self.where is not None:
            self.where[-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td"):
            self.where = None


# What is found


def test_a_run_folder_is_shown_with_its_figures_and_its_answers(tmp_path: Path) -> None:
    tables = Tables(page(measured(tmp_path / "mine"))).found
    names, row = tables["Results on 4 test examples"]
    assert dict(zip(names, row, strict=True)) == {
        "run": "mine",
        "accuracy": "75.0%",
        "95% interval": "30.1 to 95.4",
        "garbage": "–",
        "validation loss": "0.310",
        "trainable": "1,290,240 (0.95%)",
        "steps": "6",
        "minutes (predicted)": "1.2 (1.5)",
        "examples/s": "9.5",
        "peak MB": "1,500",
    }
    assert tables["Confusion of mine"][1:] == [["true negative", "1", "1", "0"], ["true positive", "0", "2", "0"]]
    assert tables["Validation loss"] == [["step", "mine"], ["2", "0.8000"], ["4", "0.5000"], ["6", "0.4000"]]


def test_a_comparison_stands_for_its_cells_in_order(tmp_path: Path) -> None:
    one = predictions([True, False])
    cells = [
        {"row": "base", "flags": {"method": "zero-shot"}, "predictions": one},
        {"row": "LoRA", "flags": {}, "losses": [0.5], "predictions": one},
        {"row": "LoRA", "flags": {"seed": 3}, "losses": [0.5], "predictions": one},
        {"row": "wide", "flags": {}, "failed": "--rank 1000: above the width"},
        {"row": "late", "flags": {}},
    ]
    folder = compared(tmp_path / "sweep", cells)
    runs = read_folders([str(folder)])
    assert [run.name for run in runs] == ["base", "LoRA, seed 0", "LoRA, seed 3", "wide", "late"]
    assert [run.note for run in runs[3:]] == ["failed: --rank 1000: above the width", "not evaluated yet"]
    assert runs[0].cost["trainable"] == runs[0].cost["minutes"] == 0
    assert runs[4].cost["trainable"] is None
    names = [row[0] for row in Tables(page(folder)).found["Results on 2 test examples"][1:]]
    assert names[3:] == ["widefailed: --rank 1000: above the width", "latenot evaluated yet"]


def test_names_are_told_apart_and_a_folder_given_twice_is_shown_once(tmp_path: Path) -> None:
    a, b = measured(tmp_path / "x" / "run7"), measured(tmp_path / "y" / "run7")
    assert [run.name for run in read_folders([str(a), str(b), f"{a}/"])] == ["x/run7", "y/run7"]


def test_both_checkpoints_are_rows_and_garbage_has_a_rate_where_text_was_generated(tmp_path: Path) -> None:
    folder = measured(tmp_path / "mine")
    rows = [{**row, "generated": "uh", "garbage": n == 0} for n, row in enumerate(predictions([True] * 4))]
    write(folder / "test-last.jsonl", rows)
    _, best, last = Tables(page(folder)).found["Results on 4 test examples"]
    assert (best[0], best[1], best[3]) == ("mine (best)", "75.0%", "–")
    assert (last[0], last[1], last[3]) == ("mine (last)", "100.0%", "25.0%")


def test_a_run_at_work_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "it's", done=False)
    write(folder / "run.json", record(100, done=False, plan=None))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "train')  # a process that is writing, or was killed
    html = page(folder)
    _, row = Tables(html.replace("<br>", " ")).found["Results"]
    assert row[0] == "it's not finished: step 6 of 100"
    assert row[1:] == ["–", "–", "–", "0.400", "1,290,240 (0.95%)", "6", "0.2", "–", "1,500"]


def test_an_imported_run_is_shown_with_what_is_known_of_it(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine")
    (folder / "metrics.jsonl").unlink()
    changed: dict[str, Any] = {"config": {}, "data": {"name": None}, "versions": {"graftlm": "0.1.0"}, "results": None}
    known = record(**changed)
    write(folder / "run.json", {key: known[key] for key in known.keys() - {"dtype", "device", "plan"}})
    html = page(folder)
    assert "1 run: smollm2-135m, graft 0.1.0. Written on 2026-11-24" in html and "not finished: step 0<" in html


def test_missing_predictions_are_told_with_the_command_that_makes_them(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "my run")
    (run,) = read_folders([str(folder)])
    assert run.command == f"graft evaluate --out_dir '{folder}' --predictions '{folder}/test-best.jsonl'"
    assert f"<code>{run.command.replace(chr(39), '&#39;')}</code>" in page(folder)


def test_predictions_are_split_at_line_feeds_alone(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine")
    rows = predictions([True, True], ["next\x85line\u2028", "\r"])
    (folder / "test-best.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), newline="")
    (run,) = read_folders([str(folder)])
    assert run.predictions[0].texts == ["next\x85line\u2028", "\r"]


# What is refused


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("run.json", b"{", "run.json, line 1: broken JSON: Expecting property name"),
        ("run.json", b"[]", "run.json: is not as graft wrote it: restore the file, or leave the run out"),
        ("run.json", b'{"results": null}', "run.json: is not as graft wrote it"),
        ("metrics.jsonl", b'{"step": 1}\n{\n{"step": 3}\n', "metrics.jsonl: is not as graft wrote it"),
        ("metrics.jsonl", b'{"train_loss": 1.5}\n', "metrics.jsonl: is not as graft wrote it"),
        ("metrics.jsonl", b'{"step": 1, "train_loss": "x"}\n', "metrics.jsonl: is not as graft wrote it"),
        ("metrics.jsonl", b'{"step": 1, "val_loss": NaN}\n', "metrics.jsonl: is not as graft wrote it"),
        ("test-best.jsonl", b"", "test-best.jsonl: is not as graft wrote it"),
        ("test-best.jsonl", b"\xff\n", "test-best.jsonl: is not as graft wrote it"),
        ("test-best.jsonl", b"3\n", "test-best.jsonl: is not as graft wrote it"),
        ("test-best.jsonl", b'{"text": "a"}\n', "test-best.jsonl: is not as graft wrote it"),
        ("test-best.jsonl", b'{"text": "", "label": 1, "predicted": 2}\n', "test-best.jsonl: is not as graft wrote it"),
        (
            "test-best.jsonl",
            b'{"text": "a", "label": 1, "predicted": 1, "scores": {"a": NaN, "b": 1}}\n',
            "test-best.jsonl: is not as graft wrote it",
        ),
        (
            "test-best.jsonl",
            b'{"text": "a", "label": 1, "predicted": 1, "scores": {"a": 1, "b": 2}}\n'
            b'{"text": "a", "label": 1, "predicted": 1, "scores": {}}\n',
            "test-best.jsonl: is not as graft wrote it",
        ),
    ],
)
def test_a_broken_file_is_named_and_nothing_is_written(
    name: str, content: bytes, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = measured(tmp_path / "mine")
    (folder / name).write_bytes(content)
    assert cli.run(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"graft: {folder}/{line}") and err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_wrong_figures_in_a_record_are_refused(tmp_path: Path) -> None:
    folder = measured(tmp_path / "mine")
    for changes in ({"trainable": "many"}, {"plan": {"train_seconds": "x"}}, {"total": math.nan}):
        write(folder / "run.json", record(**changes))
        with pytest.raises(InputError, match=r"run\.json: is not as graft wrote it"):
            read_folders([str(folder)])


def test_wrong_words_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    measured(tmp_path / "mine")
    compared(tmp_path / "begun", [{"row": "a", "flags": {}}])
    write(tmp_path / "odd" / "sweep.json", {"cells": [{"row": "a", "flags": {}}]})
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.html").mkdir()
    (tmp_path / "file").write_text("")
    for words, line in (
        (["none"], "none: no such folder"),
        (["file"], "file: is a file; name a run folder"),
        (["empty"], "empty: has no run.json or sweep.json: name the out_dir of graft"),
        (["begun"], "begun: no run has started yet: there is nothing to show"),
        (["odd"], "odd/sweep.json: is not as graft wrote it"),
        (["mine", "--out=page.html"], "--out page.html: is a folder; name a file"),
        (["mine", "--out=no/page.html"], "--out no/page.html: there is no folder no: create it first, or name another"),
    ):
        assert cli.run(["report", *words]) == 2
        assert capsys.readouterr().err.startswith(f"graft: {line}")
    assert not (tmp_path / "no").exists() and not (tmp_path / "report.html").exists()


# The command and the page


def test_the_command_writes_the_page_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    measured(tmp_path / "mine")
    assert cli.run(["report", "mine"]) == 0
    assert capsys.readouterr().out == "report.html\n"
    first = Path("report.html").read_bytes()
    assert cli.run(["report", "mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"path": "report.html", "runs": 1, "bytes": len(first)}
    assert Path("report.html").read_bytes() == first
    assert cli.run(["report", "mine", "--title", "Films & more"]) == 0
    assert "<h1>Films &amp; more</h1>" in Path("report.html").read_text()


def test_it_needs_no_torch(tmp_path: Path, graft_process: Graft) -> None:
    (tmp_path / "torch.py").write_text("raise AssertionError('torch was imported')")
    measured(tmp_path / "mine")
    done = graft_process("report", "mine", cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{Path(cli.__file__).parent.parent}")
    assert (done.returncode, done.stderr) == (0, "")


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    cells = [
        {"row": NASTY, "flags": {}, "losses": [0.5], "predictions": predictions([True], [NASTY]), "failed": NASTY},
        {"row": "b", "flags": {}, "losses": [0.5], "predictions": predictions([False], [NASTY + "\ud800"])},
    ]
    cells[1]["predictions"] += predictions([False], [NASTY])
    html = make_page(read_folders([str(compared(tmp_path / "sweep", cells))]), NASTY, TODAY)
    assert "<img" not in html and "<b>" not in html and html.count("</script>") == 2
    assert html.count("<h1>") == 1 and "{{title}}" in html  # what is filled in is not filled again
    (data,) = re.findall(r'<script type="application/json" id="data">(.*)</script>\n<script>', html)
    assert data.isascii() and json.loads(data)["runs"][0] == NASTY
    html.encode("utf-8")


def test_the_policy_lets_nothing_run_but_the_pages_own_script(tmp_path: Path) -> None:
    import base64
    import hashlib

    html = page(measured(tmp_path / "mine"))
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        (source,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy
    assert not re.findall(r'(?:src|href)="(?!#|data:)|url\(|@import|innerHTML|\bon\w+=| style="', html)


def test_the_same_folders_make_the_same_bytes(tmp_path: Path) -> None:
    folder = realistic(tmp_path / "sweep", rows=3, examples=40, steps=20)
    assert page(folder) == page(folder)


# Figures


def answers(scores: list[list[float]] | None, true: list[int], predicted: list[int]) -> Predictions:
    texts = [f"text {n}" for n in range(len(true))]
    return Predictions("best", ["no", "yes"], texts, true, predicted, None, scores)


def test_calibration_by_hand() -> None:
    def sure(confidence: float) -> list[float]:  # of label 1, whatever else the scores have in common
        return [math.log(1 - confidence) - 3, math.log(confidence) - 3]

    # .62 and .68, one of them right; .95, .95 and 1, two of them right: the last bin takes 1.
    found = calibration(
        answers([sure(0.62), sure(0.68), sure(0.95), sure(0.95), [-math.inf, -1.0]], [1, 0, 1, 0, 1], [1] * 5)
    )
    assert found is not None
    bins, error = found
    assert [b.n for b in bins] == [0, 0, 0, 0, 0, 0, 2, 0, 0, 3]
    assert (bins[6].confidence, bins[6].accuracy) == pytest.approx((0.65, 0.5))
    assert (bins[9].confidence, bins[9].accuracy) == pytest.approx((2.9 / 3, 2 / 3))
    assert error == pytest.approx((2 * 0.15 + 3 * 0.3) / 5)
    assert calibration(answers(None, [1], [1])) is None


def test_disagreements_are_those_that_two_read_and_the_most_divided_come_first() -> None:
    one, two, three = (answers(None, [1, 1, 1, 0], p) for p in ([1, 1, 0, 0], [1, 0, 0, 0], [1, 0, -1, 0]))
    found = disagreements([one, two, three])
    assert [review.text for review in found] == ["text 1", "text 2"]
    assert found[0].predictions == [("yes", True), ("no", False), ("no", False)]
    assert found[1].predictions == [("no", False), ("no", False), ("garbage", False)]
    other = Predictions("best", ["no", "yes"], ["text 1", "text 1"], [1, 1], [0, 1], None, None)
    (twice,) = disagreements([one, other])  # the second time nobody else read it
    assert twice.predictions == [("yes", True), ("no", False)]


def test_curves_are_smoothed_without_running_late_and_thinned_to_their_end() -> None:
    assert moving_average([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]
    line = [float(n) for n in range(400)]
    assert moving_average(line) == pytest.approx(line)
    noise = [float(n % 2) for n in range(400)]
    assert max(abs(value - 0.5) for value in moving_average(noise)[20:-20]) < 0.05
    assert (
        downsample(5, 3) == [0, 2, 4]
        and downsample(6, 3) == [0, 2, 4, 5]
        and downsample(0) == []
        and len(downsample(100_000)) <= 1001
    )


def test_charts_hold_curves_costs_and_reliability(tmp_path: Path) -> None:
    (run,) = read_folders([str(measured(tmp_path / "mine"))])
    found = charts([run])["charts"]
    assert found["val_accuracy"] == [{"run": 0, "name": "mine", "points": [[2, 0.65], [4, 0.8], [6, 0.85]]}]
    assert found["train_loss"][0]["raw"][0] == [1, 0.9]
    assert found["parameters"][0]["points"] == [[1_290_240, 0.75, 0.30064, 0.95441]]
    assert found["calibration"][0]["points"] == [[0.8, 0.75]]
    assert charts([Run("base", tmp_path, {}, (), run.predictions)])["charts"]["minutes"][0]["points"][0][0] == 0.0


def test_long_curves_are_thinned_in_the_page(tmp_path: Path) -> None:
    folder = measured(tmp_path / "mine")
    write(folder / "metrics.jsonl", metrics([1.0] * 5000, every=500))
    (run,) = read_folders([str(folder)])
    assert len(charts([run])["charts"]["train_loss"][0]["points"]) == 1001
    assert "Training loss, 41 of 5,000 steps" in make_page([run], "t", TODAY)
