"""The notebook runs from top to bottom, on the CPU and offline with its small settings; its stored outputs are its own.

It runs in a process and a home folder of its own, by the command that a user would type (`jupyter execute`). The graft
commands that it starts are forks.
"""

import ast
import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from conftest import child_environment
from graftlm.cli import COMMANDS, main
from graftlm.config import TrainConfig
from graftlm.config.flags import parse
from soak.forks import Forks, ask_script
from tiny import data_folder, fresh_home, model_folder, shape_of

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "run_in_colab.ipynb"
JUPYTER_EXECUTE = "from nbclient.cli import main; main()"
RANK = 8  # of the small settings
SHAPE = shape_of("llama")
NOISE = ("/.", "/__pycache__")  # what tools keep in a checkout


class Ran(NamedTuple):
    """The notebook after its run, and the folder in which it ran."""

    folder: Path
    cells: dict[str, Any]
    new_in_checkout: set[str]

    def text(self, cell: str) -> str:
        return "".join(out["text"] for out in self.cells[cell]["outputs"] if out["output_type"] == "stream")


def lora_parameters(rank: int) -> int:
    """r (in + out) for each of q, k and v, in every layer."""
    q, kv = SHAPE.num_heads * SHAPE.head_dim, SHAPE.num_kv_heads * SHAPE.head_dim
    return SHAPE.num_layers * rank * (3 * SHAPE.hidden_size + q + 2 * kv)


def files_of(folder: Path) -> set[str]:
    found = (str(path.relative_to(folder)) for path in [*folder.iterdir(), *(folder / "notebooks").rglob("*")])
    return {name for name in found if not any(noise in f"/{name}" for noise in NOISE)}


def home_of_its_own(folder: Path) -> dict[str, str]:
    """An environment in which what any tool keeps for its user lands in `folder`."""
    theirs = ("JUPYTER", "IPYTHON", "XDG_", "MPL", "GRAFT_", "FORCE_COLOR")
    kept = {name: value for name, value in child_environment().items() if not name.startswith(theirs)}
    (folder / "tmp").mkdir()
    own = {"HOME": str(folder), "GRAFT_HOME": fresh_home(folder / "graft"), "TMPDIR": str(folder / "tmp")}
    return {**kept, **own, "OMP_NUM_THREADS": "1"}  # what is so small only waits for a second thread


def roomy_model(folder: Path) -> Path:
    """A tiny model with room for the built-in template in bytes."""
    model_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Ran:
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "home").mkdir()
    begin = folder / "home" / ".ipython" / "profile_default" / "startup"
    begin.mkdir(parents=True)
    instead = f"import sys; sys.executable = {str(ask_script(folder / 'home' / 'ask'))!r}"
    (begin / "forks.py").write_text(instead)
    environment = {
        **home_of_its_own(folder / "home"),
        "SOAK_SERVER": forks.address,
        "SOAK_PRELUDE": instead,
        "GRAFT_NOTEBOOK_SMALL": "1",
        "GRAFT_NOTEBOOK_MODEL": str(roomy_model(folder / "model")),
        "GRAFT_NOTEBOOK_DATA": str(data_folder(folder / "data", train=192, other=64)),
    }
    shutil.copyfile(NOTEBOOK, folder / NOTEBOOK.name)
    before = files_of(ROOT)
    command = [sys.executable, "-c", JUPYTER_EXECUTE, "--inplace", "--timeout=300", NOTEBOOK.name]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    cells = {cell["id"]: cell for cell in nbformat.read(folder / NOTEBOOK.name, as_version=4).cells}
    return Ran(folder, cells, files_of(ROOT) - before)


def test_every_cell_ran_without_an_error_or_a_warning(ran: Ran) -> None:
    code = [cell for cell in ran.cells.values() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        for out in cell["outputs"]:
            assert out["output_type"] in ("stream", "display_data", "execute_result"), (cell["id"], out)
            assert out.get("name") != "stderr", (cell["id"], out["text"])
            assert "\x1b" not in out.get("text", ""), f"{cell['id']}: a terminal's control codes"


def test_the_share_trained_is_the_closed_form(ran: Ran) -> None:
    run = json.loads((ran.folder / "runs/notebook/lora/run.json").read_text())
    assert run["trainable"] == lora_parameters(RANK) == 2560
    share = f"{run['trainable']:,} of {run['total']:,} parameters"
    assert f"by hand: {share} would be trained" in ran.text("share")
    assert f"trained: {share}" in ran.text("train")


def test_progress_shows_and_the_model_learns(ran: Ran) -> None:
    assert "step    24  train loss" in ran.text("train")
    rows = [json.loads(line) for line in (ran.folder / "runs/notebook/lora/metrics.jsonl").read_text().splitlines()]
    judged = [row["val_loss"] for row in rows if row["val_loss"] is not None]
    assert len(rows) == 24 and len(judged) == 6 and judged[-1] < judged[0]
    assert "before: accuracy 0." in ran.text("before") and "64 reviews)" in ran.text("before")
    assert ran.text("after").count("95% interval") == 2
    assert "differ by at most" in ran.text("merge")


@pytest.mark.parametrize("cell", ["curves", "after", "table"])
def test_pictures_are_drawn(ran: Ran, cell: str) -> None:
    pictures = [out["data"]["image/png"] for out in ran.cells[cell]["outputs"] if "image/png" in out.get("data", {})]
    assert len(pictures) == 1
    png = base64.b64decode(pictures[0])
    assert png.startswith(b"\x89PNG") and int.from_bytes(png[16:20]) > 400  # its width


def test_the_comparison_has_its_three_rows_and_its_page(ran: Ran) -> None:
    rows = json.loads((ran.folder / "runs/notebook/compare/table.json").read_text())["rows"]
    total = json.loads((ran.folder / "runs/notebook/lora/run.json").read_text())["total"]
    assert "3 of 3: " in ran.text("compare")
    trained = {row["name"]: row["trainable"] for row in rows}
    assert trained == {
        "r = 4": lora_parameters(4),
        "r = 16": lora_parameters(16),
        "full": total - lora_parameters(RANK),
    }
    assert all(row["n"] == 64 and row["ci_low"] <= row["accuracy"] <= row["ci_high"] for row in rows)
    assert "r = 16" in (ran.folder / "runs/notebook/report.html").read_text(encoding="utf-8")


def test_nothing_is_written_beside_its_own_folder(ran: Ran) -> None:
    assert not ran.new_in_checkout
    mine = {"home", "model", "data", "runs", NOTEBOOK.name}
    assert set(os.listdir(ran.folder)) - {".ipynb_checkpoints"} == mine
    assert os.listdir(ran.folder / "runs") == ["notebook"]


# As it is committed


COMMITTED = nbformat.from_dict(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
STORED = {cell["id"]: cell for cell in COMMITTED.cells if cell["cell_type"] == "code"}
CODE = {name: cell["source"] for name, cell in STORED.items()}
LINES = [line for cell in COMMITTED.cells for line in "".join(cell["source"]).splitlines()]
SHOWN = [line for line in LINES if line.startswith("!graft ")]


def test_the_committed_notebook_is_valid() -> None:
    nbformat.validate(COMMITTED)
    assert (COMMITTED.nbformat, COMMITTED.nbformat_minor) == (4, 5)
    assert COMMITTED.metadata["accelerator"] == "GPU" and COMMITTED.metadata["colab"]["gpuType"] == "T4"
    assert COMMITTED.metadata["kernelspec"]["name"] == "python3"


def test_its_stored_outputs_are_those_of_its_source() -> None:
    """`make pictures` stores them, with the hash of the cells that it ran; run it again when a code cell changes."""
    source = "\n\n".join("".join(text) for text in CODE.values())
    assert COMMITTED.metadata["executed"]["sha256"] == hashlib.sha256(source.encode()).hexdigest()
    assert [cell["execution_count"] for cell in STORED.values()] == list(range(1, len(CODE) + 1))
    assert [name for name, cell in STORED.items() if not cell["outputs"]] == ["install"]
    for cell in ("curves", "after", "table"):
        assert sum("image/png" in out.get("data", {}) for out in STORED[cell]["outputs"]) == 1, cell


def test_its_stored_outputs_tell_of_no_error_and_of_no_machine() -> None:
    for name, cell in STORED.items():
        for out in cell["outputs"]:
            assert out["output_type"] in ("stream", "display_data", "execute_result"), (name, out)
            assert out.get("name") != "stderr", (name, out["text"])
            assert set(out.get("data", {})) <= {"text/plain", "text/markdown", "image/png"}, name
            data = {kind: shown for kind, shown in out.get("data", {}).items() if kind != "image/png"}
            text = "".join([*out.get("text", ()), *("".join(shown) for shown in data.values())])
            assert not re.search(r"[\r\x1b]|(?<![\w.:/])/\w+/|[A-Z]:\\", text), (name, text)
    assert NOTEBOOK.stat().st_size < 400_000


@pytest.mark.parametrize("cell", CODE)
def test_every_code_cell_compiles(cell: str) -> None:
    compile(TransformerManager().transform_cell("".join(CODE[cell])), cell, "exec")


def test_the_lines_that_it_shows_are_lines_that_graft_takes() -> None:
    assert len(SHOWN) == 4
    for line in SHOWN:
        verb, *words = shlex.split(line.removeprefix("!graft "))
        assert parse(verb, COMMANDS[verb].config, words).explicit


@pytest.mark.parametrize(
    ("gpu", "names", "lora"),
    [
        (True, ("gpt2-medium", "rotten_tomatoes"), (128, 512)),
        (False, ("smollm2-135m", "rotten-tomatoes-pypi"), (16, 64)),
    ],
)
def test_the_settings_that_no_test_runs_are_settings(gpu: bool, names: tuple[str, str], lora: tuple[int, int]) -> None:
    (choice,) = (node for node in ast.parse("".join(CODE["settings"])).body if isinstance(node, ast.If))
    chosen = {"SMALL": False, "torch": SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: gpu))}
    exec(compile(ast.Module([choice], []), "settings", "exec"), chosen)
    assert (chosen["MODEL"], chosen["DATA"]) == names
    config = TrainConfig(out_dir="run", **chosen["TRAIN"])
    assert (config.rank, config.alpha) == lora


@pytest.mark.parametrize(
    ("project", "here", "found"),
    [
        ("", "", "."),
        ("", "notebooks", ".."),
        ("graftlm", "", "graftlm"),
        ("elsewhere/project", "", "graftlm"),
    ],
)
def test_the_project_is_found_and_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project: str, here: str, found: str
) -> None:
    for folder in (project, here):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / project / "pyproject.toml")
    monkeypatch.chdir(tmp_path / here)
    folder_alone = SimpleNamespace(origin=None, submodule_search_locations=None)  # no package
    monkeypatch.setattr("importlib.util.find_spec", lambda name: folder_alone)
    monkeypatch.setattr(main, "tune_malloc_retain", lambda: None)
    installed: list[tuple[str, str]] = []
    cloned: list[str] = []
    shell = SimpleNamespace(run_line_magic=lambda *words: installed.append(words), system=cloned.append)
    names: dict[str, Any] = {"get_ipython": lambda: shell}
    cell = compile(TransformerManager().transform_cell("".join(CODE["install"])), "install", "exec")
    exec(cell, names)
    assert bool(cloned) == (project == "elsewhere/project")
    assert installed == [("pip", 'install --quiet "{source}[notebook]"')]
    assert names["source"] == (tmp_path / here / found).resolve()
