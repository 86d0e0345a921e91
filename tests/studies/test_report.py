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
from graftlm.inference.saved_evaluations import save_evaluation
from graftlm.studies.report import calibration, charts, disagreements, downsample, make_page
from graftlm.studies.report_data import Predictions, Run, read_folders
from graftlm.studies.report_tables import example_sets

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
        "macro F1": "0.733",
        "validation loss": "0.310",
        "trainable": "1,290,240 (0.95%)",
        "steps": "6",
        "minutes (predicted)": "1.2 (1.5)",
        "examples/s": "9.5",
        "peak MB": "1,500",
    }
    assert tables["Confusion of mine"][1:] == [["true negative", "1", "1"], ["true positive", "0", "2"]]
    assert tables["Validation loss"] == [["step", "mine"], ["2", "0.8000"], ["4", "0.5000"], ["6", "0.4000"]]


def test_of_many_labels_the_most_frequent_mistakes_are_shown(tmp_path: Path) -> None:
    answered = [(0, 10), (0, 10), (3, 2), (1, 1), (0, 0), (4, -1)]  # label, predicted
    rows = [{"text": f"text {n}", "label": label, "predicted": got} for n, (label, got) in enumerate(answered)]
    write(run_folder(tmp_path / "mine") / "test-best.jsonl", rows)
    words = [f"intent {n}" for n in range(11)]
    write(tmp_path / "mine" / "test-best.json", {"eval_config": {}, "reading": {"labels": words}})
    tables = Tables(page(tmp_path / "mine")).found
    assert "Confusion of mine" not in tables
    assert tables["The most frequent mistakes of mine"] == [
        ["true", "predicted", "examples", "fraction of the true label's examples"],
        ["true intent 0", "intent 10", "2", "66.7%"],
        ["true intent 3", "intent 2", "1", "100.0%"],
        ["true intent 4", "garbage", "1", "100.0%"],
    ]


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
    assert [run.name for run in read_folders([str(folder / "cell-1" / "run")])] == ["cell-1"]
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
    assert (best[0], best[1], best[4]) == ("mine (best)", "75.0%", "–")
    assert (last[0], last[1], last[4]) == ("mine (last)", "100.0%", "25.0%")


def test_confusion_has_a_column_of_garbage_where_there_is_some(tmp_path: Path) -> None:
    folder = measured(tmp_path / "mine")
    rows = predictions([True] * 4)
    rows[0] = {**rows[0], "predicted": -1}
    write(folder / "test-best.jsonl", rows)
    names, *counts = Tables(page(folder)).found["Confusion of mine"]
    assert names[-1] == "predicted garbage" and sum(int(row[-1]) for row in counts) == 1


def test_a_run_at_work_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "it's", done=False)
    write(folder / "run.json", record(100, done=False, plan=None))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "train')  # a process that is writing, or was killed
    html = page(folder)
    names, row = Tables(html.replace("<br>", " ")).found["Results"]
    assert names == ["run", "validation loss", "trainable", "steps", "minutes (predicted)", "peak MB"]
    assert row == ["it's not finished: step 6 of 100", "0.400", "1,290,240 (0.95%)", "6", "0.2", "1,500"]


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
    assert run.command == f"graft evaluate '{folder}'"
    saved(folder, "10", limit=2, shots=4, data="my.csv", split="all")
    command = f"graft evaluate '{folder}' --checkpoint=base --data=my.csv --limit=2 --shots=4"
    assert [run.command for run in read_folders([str(folder)])] == [command]
    saved(folder, "10", checkpoint="base")
    assert [run.command for run in read_folders([str(folder)])] == ["", ""]
    other = run_folder(tmp_path / "other")
    saved(other, "10", data="rotten-tomatoes-pypi", split="validation", calibrate=True)
    command = f"graft evaluate {other} --checkpoint=base --calibrate=true --split=validation"
    assert [run.command for run in read_folders([str(other)])] == [command]
    more = run_folder(tmp_path / "more")
    saved(more, "10", data="a.csv", test_data="b.csv")
    (run,) = read_folders([str(more)])
    assert run.command == f"graft evaluate {more} --checkpoint=base --data=a.csv --test_data=b.csv"
    assert run.predictions[0].source == "b.csv, test split"


def test_the_command_for_what_is_missing_is_in_the_page(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "my run")
    (run,) = read_folders([str(folder)])
    assert f"<code>{run.command.replace(chr(39), '&#39;')}</code>" in page(folder)


def test_predictions_are_split_at_line_feeds_alone(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine")
    rows = predictions([True, True], ["next\x85line\u2028", "\r"])
    (folder / "test-best.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), newline="")
    (run,) = read_folders([str(folder)])
    assert run.predictions[0].texts == ["next\x85line\u2028", "\r"]


# What graft evaluate saved


def saved(folder: Path, right: str, step: int | None = None, **settings: Any) -> Path:
    """An evaluation in a run folder, right where there is a 1."""
    flags = {"checkpoint": "best", "data": "reviews.csv", "split": "test", **settings}
    rows = predictions([c == "1" for c in right])
    return save_evaluation(folder, flags, step, {"labels": ["negative", "positive"]}, rows)


def test_saved_evaluations_are_rows_and_the_base_is_one_of_them(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine")
    saved(folder, "1101")
    assert saved(folder, "1111") == saved(folder, "1111")  # the same again replaces the first
    saved(folder, "1001", checkpoint="base")
    saved(folder, "0101", shots=4)
    saved(folder, "1100", checkpoint="base", shots=4)
    found = Tables(page(folder)).found
    rows = found["Results on 4 examples of reviews.csv, test split"][1:]
    assert [(row[0], row[1]) for row in rows] == [
        ("smollm2-135m (zero-shot)", "50.0%"),
        ("smollm2-135m (4 shots)", "50.0%"),
        ("mine", "100.0%"),
        ("mine (shots 4)", "50.0%"),
    ]
    assert {"Confusion of mine (shots 4)", "Calibration of smollm2-135m (zero-shot)"} <= found.keys()
    assert found["Training loss"][0] == ["step", "mine"]
    (base, _) = read_folders([str(folder)])
    assert base.cost["trainable"] == base.cost["minutes"] == 0
    other = run_folder(tmp_path / "other")
    saved(other, "1001", checkpoint="base")
    saved(other, "1100", checkpoint="base", shots=4)
    names = [run.name for run in read_folders([str(folder), str(other)])]
    assert names == ["smollm2-135m", "mine", "other"]  # the same base, evaluated twice


def test_a_users_metrics_are_columns(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine")
    settings = {"checkpoint": "best", "data": "reviews.csv", "split": "test"}
    result = {"labels": ["negative", "positive"], "accuracy": 1.0, "mcc": 0.25, "odd": math.nan}
    path = save_evaluation(folder, settings, None, result, predictions([True]))
    assert json.loads(path.read_text())["result"]["odd"] is None
    names, row = Tables(page(folder)).found["Results on 1 examples of reviews.csv, test split"]
    assert names[3:6] == ["macro F1", "mcc", "validation loss"] and row[4] == "0.250"


def test_other_examples_have_another_table(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine")
    saved(folder, "10", limit=2)
    saved(folder, "1101")
    saved(folder, "1001", checkpoint="base")
    html = page(folder)
    found = Tables(html).found
    assert [row[0] for row in found["Results on 4 examples of reviews.csv, test split"][1:]] == [
        "smollm2-135m (zero-shot)",
        "mine",
    ]
    assert [row[0] for row in found["Results on 2 examples of reviews.csv, test split"][1:]] == ["mine (limit 2)"]
    assert "The evaluations are on different examples" in html
    assert [row[2:] for row in found["Different predictions: 1 reviews, the most evenly divided first"][1:]] == [
        ["✗ negative wrong", "✓ positive correct"]
    ]
    (costs,) = [chart for chart in charts_of(html)["parameters"] if chart["name"].startswith("mine")]
    assert costs["name"] == "mine"


def charts_of(html: str) -> Any:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*)</script>\n<script>', html)
    return json.loads(data)["charts"]


def test_an_evaluation_of_an_earlier_checkpoint_says_so(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine")
    (folder / "checkpoints" / "step-6").mkdir(parents=True)
    (folder / "best").symlink_to("checkpoints/step-6")
    saved(folder, "11", step=6)
    note = "of step 4; best is step 6 now: evaluate it again"
    assert note not in page(folder)
    saved(folder, "11", step=4)
    assert note in page(folder)


def test_settings_that_differ_are_columns_and_empty_sections_are_left_out(tmp_path: Path) -> None:
    for name, rank in (("a", 8), ("b", 16)):
        config = {"max_iters": 6, "rank": rank, "lr": 2.5e-4, "out_dir": name, "seed": 0}
        saved(run_folder(tmp_path / name, config=config), "11")
    html = page(tmp_path / "a", tmp_path / "b")
    table = Tables(html).found["Results on 2 examples of reviews.csv, test split"]
    assert [row[:2] for row in table] == [["run", "rank"], ["a", "8"], ["b", "16"]]
    assert "On 2 examples of reviews.csv, test split all predictions are the same." in html
    alone = page(run_folder(tmp_path / "alone"))
    titles = re.findall(r"<h[23][^>]*>(.*)</h", alone)
    assert titles == ["Results", "Curves", "Training loss", "Validation loss", "Validation accuracy"]
    assert re.findall(r'<li><a href="#(.*?)"', alone) == ["results", "curves"]


def test_loss_on_documents_is_a_table(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "mine")
    settings = {"checkpoint": "best", "data": "books", "split": "test"}
    result = {"n": 2, "windows": 3, "tokens": 1500, "loss": 2.5, "perplexity": 12.18, "tokens_per_s": 99.0}
    save_evaluation(folder, settings, None, result)
    table = Tables(page(folder)).found["Loss on documents; only that of the same data can be compared"]
    assert table[1] == ["mine", "best", "books, test split", "2", "1,500", "2.5000", "12.18"]


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
        ("evaluations/a.json", b"[]", "evaluations: is not as graft wrote it"),
        ("evaluations/a.json", b'{"settings": {}, "step": 1, "result": {}}', "evaluations: is not as graft wrote it"),
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
    (folder / name).parent.mkdir(exist_ok=True)
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


def test_the_page_is_opened_if_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    found = [True, False]
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or found.pop(0))
    measured(tmp_path / "mine")
    words = ["report", str(tmp_path / "mine"), "--out", str(tmp_path / "my page.html")]
    page = (tmp_path / "my page.html").as_uri()
    assert cli.run(words) == 0 and opened == []
    assert cli.run([*words, "--open"]) == 0 and opened == [page]
    assert capsys.readouterr().err == ""
    assert cli.run([*words, "--open"]) == 0
    assert capsys.readouterr().err == f"--open: found no browser; open {page} yourself\n"


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


def test_curves_are_thinned_to_their_end() -> None:
    assert (
        downsample(5, 3) == [0, 2, 4]
        and downsample(6, 3) == [0, 2, 4, 5]
        and downsample(0) == []
        and len(downsample(100_000)) <= 1001
    )


def test_charts_hold_curves_costs_and_reliability(tmp_path: Path) -> None:
    (run,) = read_folders([str(measured(tmp_path / "mine"))])
    found = charts([run], example_sets([run]))["charts"]
    (curve,) = found["val_accuracy"]
    assert curve["steps"] == [2, 4, 6] and curve["values"] == [0.65, 0.8, 0.85]
    assert curve["minutes"] == [0.066667, 0.13333, 0.2]
    assert found["parameters"][0]["points"] == [[1_290_240, 0.75, 0.30064, 0.95441]]
    assert found["calibration"][0]["points"] == [[0.8, 0.75]]
    assert "lr" not in found  # not in these rows
    base = [Run("base", tmp_path, {}, (), run.predictions)]
    assert charts(base, example_sets(base))["charts"]["minutes"][0]["points"][0][0] == 0.0


def test_long_curves_are_thinned_in_the_page(tmp_path: Path) -> None:
    folder = measured(tmp_path / "mine")
    write(folder / "metrics.jsonl", metrics([1.0] * 5000, every=500))
    (run,) = read_folders([str(folder)])
    assert len(charts([run], [])["charts"]["train_loss"][0]["steps"]) == 1001
    assert "Training loss, 41 of 5,000 steps" in make_page([run], "t", TODAY)
