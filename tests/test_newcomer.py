"""What a newcomer types, one command after the other, with files of their own: each works with what the last one left.

The model is tiny and random, so only what happens is looked at, not how good it is. The installation itself is tested
in test_supply.py.
"""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

import graftlm
from conftest import Graft, child_environment
from graftlm.exchange.llama_cpp import LlamaCpp
from tiny import chat_model_folder, merging_tokenizer

TEMPLATE = "{text}:"
CHAT = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
WORDS = {"positive": ("good", "fine", "warm"), "negative": ("bad", "dull", "cold")}


def reviews(path: Path, number: int) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "sentiment"])
        for n in range(number):
            label = ("negative", "positive")[n % 2]
            writer.writerow([f"a {WORDS[label][n % 3]} film, number {n}", label])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a file of reviews, and a file to evaluate on."""
    folder = tmp_path_factory.mktemp("newcomer")
    chat_model_folder(folder / "base", CHAT, merging_tokenizer)
    reviews(folder / "reviews.csv", 60)
    reviews(folder / "test.csv", 10)
    return folder


@pytest.fixture(scope="module")
def trained(home: Path, graft: Graft) -> Path:
    """The first command: train on their own file."""
    settings = "--rank 4 --alpha 8 --max_iters 6 --batch_size 4 --device cpu"
    line = f"train --init_from base --data reviews.csv --template {TEMPLATE} {settings} --out_dir runs/mine"
    done = graft(*line.split(), cwd=home)
    assert done.returncode == 0, done.stderr
    assert "graft evaluate runs/mine" in done.stdout
    return home / "runs" / "mine"


def typed(graft: Graft, line: str, cwd: Path) -> Any:
    """The JSON object of a command line."""
    done = graft(*line.split(), "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_they_evaluate_it_on_their_own_file_and_read_the_report(
    home: Path, trained: Path, graft: Graft, browser: Browser
) -> None:
    found = typed(graft, "evaluate runs/mine --data test.csv --device cpu", home)
    assert found["n"] == 10 and found["labels"] == ["negative", "positive"]
    report = typed(graft, "report runs/mine --out report.html", home)
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((home / report["path"]).as_uri())
    text = page.inner_text("body")
    assert f"{found['accuracy']:.1%}" in text and "runs/mine" in text and not problems


def test_they_chat_with_it_and_load_it_in_python(home: Path, trained: Path) -> None:
    command = [sys.executable, "-m", "graftlm", "chat", "runs/mine", "--max_new_tokens", "5", "--device", "cpu"]
    done = subprocess.run(
        command, cwd=home, env=child_environment(), input="Hello?\n/reset\nAgain?\n", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "the conversation begins anew" in done.stderr
    loaded = graftlm.load(str(trained), device="cpu")
    assert len(graftlm.generate(loaded, ["A good film"], max_new_tokens=5)) == 1


def test_they_compare_two_ranks(home: Path, graft: Graft, forked_children: str) -> None:
    (home / "sweep.toml").write_text(
        'out_dir = "runs/compared"\nbudget_steps = 2\nmode = "score"\n'
        f'[train]\ninit_from = "base"\ndata = "reviews.csv"\ntemplate = "{TEMPLATE}"\nbatch_size = 4\ndevice = "cpu"\n'
        "[grid]\nrank = [2, 4]\n"
    )
    table = typed(graft, "compare --config sweep.toml", home)
    assert len(table["rows"]) == 2 and table["failed"] == 0


def test_they_run_it_in_llama_cpp(home: Path, trained: Path, graft: Graft) -> None:
    assert typed(graft, "export runs/mine --format gguf --to mine.gguf", home)["format"] == "gguf"
    answer = LlamaCpp(home / "mine.gguf", 90).ask("v1/completions", {"prompt": "A good film", "max_tokens": 4})
    assert answer["usage"]["completion_tokens"] >= 1


def test_they_press_ctrl_c_and_resume(home: Path, graft: Graft) -> None:
    settings = (
        f"--init_from base --data reviews.csv --template {TEMPLATE} --rank 4 --batch_size 4 --eval_every 5 --device cpu"
    )
    command = f"{sys.executable} -m graftlm train {settings} --max_iters 5000 --out_dir runs/long".split()
    with subprocess.Popen(command, cwd=home, env=child_environment(), stderr=subprocess.PIPE, text=True) as child:
        metrics = home / "runs" / "long" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == 130
    steps = len(metrics.read_text().splitlines())
    resumed = typed(graft, f"train --resume --out_dir runs/long --max_iters {steps + 3}", home)
    assert resumed["steps"] == steps + 3
