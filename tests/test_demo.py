"""examples/demo.py on a tiny model: `graft report` of its folder shows everything, as the demo promises."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from graftlm import cli
from tiny import TEMPLATE, data_folder, model_folder

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"


def test_a_report_of_the_demo_has_all_sections_and_a_row_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("graftlm.cli.main.tune_malloc_retain", lambda: False)
    recipe = {
        "init_from": str(model_folder(tmp_path / "model")),
        "data": str(data_folder(tmp_path / "data")),
        "template": TEMPLATE,
        **{"rank": 4, "lr": 1e-2, "batch_size": 8, "device": "cpu", "dtype": "float32"},
    }
    (tmp_path / "demo.toml").write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in recipe.items()))
    main = runpy.run_path(str(DEMO))["main"]
    monkeypatch.setitem(main.__globals__, "RECIPE", tmp_path / "demo.toml")
    run = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["demo.py", f"--out_dir={run}", "--max_iters=20", "--limit=10"])
    main()
    monkeypatch.chdir(tmp_path)
    assert cli.run(["evaluate", str(run), "--mode=score", "--limit=10"]) == 0
    assert len(list((run / "evaluations").iterdir())) == 4  # the same evaluation, so it replaces the demo's
    assert cli.run(["report", str(run), "--json"]) == 0
    page = (tmp_path / "report.html").read_text()
    sections = ["Results", "Curves", "Accuracy and cost", "Confusion", "Disagreements", "Calibration"]
    assert re.findall(r"<h2[^>]*>(.*)</h2>", page) == sections
    assert f"<caption><span>Results on 10 examples of {tmp_path}/data, test split</span>" in page
    for name in ("model (zero-shot)", "run"):
        assert f'<tr><th scope="row">{name}</th>\n<td data-value="0.' in page
    assert f"graft report {run} --open" in capsys.readouterr().out
