"""A run is named in the same ways in every command: RUN, --out_dir or --init_from, its folder or a checkpoint's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exchange.runs import run_of
from graftlm import cli, load
from graftlm.config import ServeConfig, TrainConfig
from graftlm.config.flags import parse
from graftlm.errors import InputError
from graftlm.exchange.load import load_base
from graftlm.exchange.runs import base_name, find_run
from graftlm.serving.server import _with_run_as_base
from graftlm.training.train import train
from tiny import TEMPLATE, data_folder, model_folder

Command = Callable[..., tuple[int, Any, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, data, and runs on it: LoRA with both checkpoints, full fine-tuning, and prefix tuning."""
    folder = tmp_path_factory.mktemp("names")
    model_folder(folder / "model")
    data_folder(folder / "data")
    for name in ("full", "prefix"):
        run_of(folder / name, folder / "model", folder / "data", name)
    common = {"template": TEMPLATE, "batch_size": 8, "device": "cpu", "dtype": "float32", "max_iters": 2}
    paths = {"init_from": str(folder / "model"), "data": str(folder / "data"), "out_dir": str(folder / "lora")}
    train(TrainConfig(**common, **paths, rank=4, lr=2e-2, eval_every=1, keep_checkpoints=True))
    return folder


@pytest.fixture
def graft(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command next to the runs; returns its exit status, JSON object and notes."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("graftlm.cli.main.tune_malloc_retain", lambda: False)

    def run(*words: str) -> tuple[int, Any, str]:
        status = cli.run([*words, "--json"])
        out, notes = capsys.readouterr()
        return status, json.loads(out) if status == 0 else None, notes

    return run


def logits(name: str, **flags: Any) -> torch.Tensor:
    with torch.no_grad():
        return load(name, device="cpu", dtype="float32", **flags).model(torch.tensor([[5, 6, 7, 8]]))


def test_a_folder_of_a_run_or_of_a_checkpoint_is_loaded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    expected = {step: logits("resume", out_dir="lora", checkpoint=f"checkpoints/step-{step}") for step in (1, 2)}
    assert not torch.equal(expected[1], expected[2])
    assert torch.equal(logits("lora/checkpoints/step-1"), expected[1])
    assert torch.equal(logits("lora", checkpoint="last"), expected[2])
    assert torch.equal(logits("lora/last"), expected[2])
    assert torch.equal(logits(str(place / "lora")), logits("resume", out_dir="lora"))
    assert torch.equal(logits("resume", out_dir="lora/last"), expected[2])
    assert find_run("model") is None and find_run("") is None and find_run("smollm2-135m") is None


def test_every_command_takes_a_run_in_every_way(graft: Command) -> None:
    ways = (
        ["lora"],
        ["--out_dir=lora"],
        ["--init_from=lora"],
        ["--init_from=resume", "--out_dir=lora/"],
        ["lora/best"],
    )
    Path("task.jsonl").write_text('{"question": "One?", "answer": "1"}\n')
    for command in (
        ["evaluate", "--mode=score", "--limit=4"],
        ["generate", "--prompt=bad", "--max_new_tokens=3"],
        ["export", "--format=merged"],
        ["prompt", "--task=task.jsonl", "--style=zero-shot", "--max_new_tokens=2"],
        ["pairs", "--prompts=data", "--prompt_words=1", "--limit=4", "--reward_model=lora", "--max_new_tokens=2"],
    ):
        results = []
        for number, way in enumerate(ways):
            if command[0] == "export" and way[0].startswith("--init_from"):
                continue
            if command[0] in ("prompt", "pairs") and not way[0].startswith("--"):  # have no RUN
                way = [f"--init_from={way[0]}"]
            new = {"export": [f"--to=out{number}"], "pairs": [f"--out={number}.jsonl"]}.get(command[0], [])
            status, result, notes = graft(*command, *new, *way)
            assert status == 0, (command, way, notes)
            assert "is not read" not in notes
            volatile = ("path", "out", "seconds", "examples_per_s", "styles")
            results.append({key: value for key, value in result.items() if key not in volatile})
        assert len(results) > 2 and all(result == results[0] for result in results), (command, results)


def test_estimates_of_a_run_are_those_of_its_method(graft: Command, place: Path) -> None:
    flags = ["--rank=4", "--alpha=512"]
    expected = graft("estimate", "--init_from=model", *flags)[1]
    found = graft("estimate", "--init_from=lora")[1]
    assert {**found, "model": "model"} == {**expected, "method": found["method"]}
    assert found["method"]["rank"] == 4
    status, _, notes = graft("estimate", "--init_from=lora", "--rank=8")
    assert status == 2 and "--rank 8: lora is of lora, with rank 4" in notes
    assert graft("estimate", "--init_from=full", *flags)[1]["trainable"] == expected["trainable"]


def test_a_run_of_full_fine_tuning_is_a_base_and_an_adapter_is_none(place: Path, graft: Command) -> None:
    assert base_name("full") == "full/best" and base_name("model") == "model"
    assert torch.equal(
        load_base("full", "cpu", "float32").model.embed.weight,
        load("full", device="cpu", dtype="float32").model.embed.weight,
    )
    with pytest.raises(InputError, match=r"^lora: is a run that adapts .*model, and a base is needed here"):
        load_base("lora")
    status, _, notes = graft("import", "lora/best", "--init_from=lora", "--out_dir=new", f"--template={TEMPLATE}")
    assert status == 2 and notes.startswith("graft: lora: is a run that adapts")
    status, _, notes = graft("serve", "lora", "--init_from=lora", "--port=0")
    assert status == 2 and notes.startswith("graft: ") and "a base is needed here" in notes


def test_two_names_for_a_run_are_one_line(graft: Command) -> None:
    for words, line in (
        ("evaluate lora --out_dir=full", "lora and --out_dir full: name the same thing twice: leave one of them out"),
        ("evaluate --out_dir full lora", "lora and --out_dir full: name the same thing twice"),
        ("evaluate --init_from=lora --out_dir=full", "--init_from lora and --out_dir full: name two runs"),
        ("train --init_from=resume --data=data", "--init_from resume: is for graft generate and evaluate"),
        ("generate smollm2-135m", "smollm2-135m: holds no run (no run.json); train one with graft train --out_dir"),
        ("evaluate --init_from=lora/checkpoints/step-9", "lora/checkpoints/step-9: no such checkpoint"),
    ):
        status, _, notes = graft(*words.split())
        assert status == 2 and notes.startswith(f"graft: {line}") and notes.count("\n") == 1, notes
    status, _, notes = graft(
        "generate", "--init_from=lora/last", "--checkpoint=best", "--prompt=a", "--max_new_tokens=1"
    )
    assert status == 0 and "--checkpoint best: is not read, as --init_from is lora/last" in notes


def test_an_evaluation_is_saved_with_the_run_and_checkpoint_that_were_read(graft: Command) -> None:
    found = [graft("evaluate", way, "--mode=score", "--limit=4")[1] for way in ("lora/last", "--init_from=lora/last")]
    assert found[0]["saved"] == found[1]["saved"] and found[0]["saved"].startswith("lora/evaluations/last-test-")
    assert json.loads(Path(found[0]["saved"]).read_text())["step"] == 2
    base = graft("evaluate", "--init_from=lora", "--checkpoint=base", "--mode=score", "--limit=4")[1]
    assert base["saved"].startswith("lora/evaluations/base-test-")
    _, other, notes = graft("evaluate", "lora/checkpoints/step-1", "--mode=score", "--limit=4")
    assert "saved" not in other and "the results of lora/checkpoints/step-1 are not saved" in notes


def test_report_and_serve_take_runs_as_out_dir_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    words = ["lora", "--out_dir=full", "--port=0"]
    assert parse("serve", ServeConfig, words, "adapters").config.adapters == ("lora", "full")
    assert cli.run(["report", "--out_dir", "lora", "--out", "lora.html"]) == 0
    alone = _with_run_as_base(ServeConfig(adapters=("prefix",)))
    assert (alone.adapters, alone.init_from) == ((), "prefix")
    for kept in (ServeConfig(adapters=("lora",)), ServeConfig(adapters=("prefix", "lora")), ServeConfig()):
        assert _with_run_as_base(kept) is kept


def test_a_sweep_from_a_run_compares_with_that_run(graft: Command, place: Path, forked_children: str) -> None:
    """Its zero-shot row reads the sweep's data in the sweep's template, not those of the run."""
    (place / "sweep.toml").write_text(
        '[train]\ninit_from = "full"\ndata = "data"\nbatch_size = 4\nmax_iters = 1\nrank = 2\ndevice = "cpu"\n'
        'dtype = "float32"\ntemplate = "Say: {text} It is"\n[[rows]]\nname = "base"\nmethod = "zero-shot"\n'
    )
    status, table, notes = graft("compare", "--config=sweep.toml", "--out_dir=sweep", "--limit=6")
    assert status == 0, notes
    words = ["--init_from=full", "--data=data", "--split=test", "--template=Say: {text} It is", "--mode=score"]
    assert table["rows"][0]["accuracy"] == graft("evaluate", *words, "--limit=6")[1]["accuracy"]
