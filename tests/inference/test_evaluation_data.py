"""Which rows `graft evaluate` and `graft generate` read: a file that is named is read whole, or refused in one line."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm import cli
from tiny import TEMPLATE, model_folder

Answer = tuple[int, dict[str, Any], str]
Command = Callable[..., Answer]


def rows(path: str, count: int, start: int = 0) -> str:
    lines = ({"text": f"{('bad', 'good')[n % 2]} {n}", "label": n % 2} for n in range(start, start + count))
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a run that was trained on a file with other names of columns."""
    folder = tmp_path_factory.mktemp("assets")
    model_folder(folder / "model")
    lines = ({"review": f"{('bad', 'good')[n % 2]} {n}", "stars": n % 2} for n in range(60))
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = f"--init_from={folder / 'model'} --data={folder / 'all.jsonl'} --columns=text=review,label=stars --rank=4"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graftlm.cli.main.tune_malloc_retain", lambda: False)
        words = ["train", *flags.split(), f"--template={TEMPLATE}", f"--out_dir={folder / 'run'}"]
        assert cli.run([*words, "--max_iters=1", "--batch_size=4", "--device=cpu", "--dtype=float32", "--json"]) == 0
    return folder


@pytest.fixture
def graft(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Command]:
    """Run a command on the model; returns its exit status, JSON object and notes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("graftlm.cli.main.tune_malloc_retain", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(command: str, *words: str) -> Answer:
        base = ["--device=cpu", "--dtype=float32", "--json"]
        if not any(word.startswith(("--out_dir", "--init_from")) for word in words):
            base += [f"--init_from={assets / 'model'}", *([f"--template={TEMPLATE}"] if command == "evaluate" else [])]
        capsys.readouterr()
        status = cli.run([command, *words, *base])
        out, notes = capsys.readouterr()
        return status, json.loads(out) if status == 0 else {}, notes

    yield run
    torch.set_num_threads(threads)


def test_a_named_file_is_read_whole(graft: Command, assets: Path) -> None:
    rows("mine.jsonl", 37)
    for words in (
        ["--data=mine.jsonl"],
        ["--test_data=mine.jsonl"],
        ["--val_data=mine.jsonl", "--split=validation"],
        ["--data=mine.jsonl", f"--out_dir={assets / 'run'}"],
    ):
        status, result, notes = graft("evaluate", *words, "--mode=score")
        assert (status, result["n"]) == (0, 37), words
        assert "mine.jsonl: read as labelled" in notes and "held out" not in notes
    status, result, _ = graft("generate", "--data=mine.jsonl", f"--out_dir={assets / 'run'}")
    assert (status, result["n"]) == (0, 37)


def test_a_split_of_a_file_is_the_one_that_training_held_out(graft: Command, assets: Path) -> None:
    run, mapped = f"--out_dir={assets / 'run'}", "--columns=text=review,label=stars"
    own = graft("evaluate", run, "--mode=score", "--predictions=own.jsonl")
    named = graft(
        "evaluate", run, f"--data={assets / 'all.jsonl'}", mapped, "--split=test", "--predictions=named.jsonl"
    )
    assert own[1]["n"] == named[1]["n"] == 6
    texts = [
        [json.loads(line)["text"] for line in Path(name).read_text().splitlines()]
        for name in ("own.jsonl", "named.jsonl")
    ]
    assert texts[0] == texts[1]


def test_a_file_beside_the_runs_data(graft: Command, assets: Path) -> None:
    """Its columns are the run's unless they are named; demonstrations come from the run's train split."""
    run = f"--out_dir={assets / 'run'}"
    rows("mine.jsonl", 9, start=100)
    assert "no column 'review'" in graft("evaluate", run, "--test_data=mine.jsonl")[2]
    named = ["--test_data=mine.jsonl", "--columns=text=text,label=label", "--mode=score"]
    assert graft("evaluate", run, *named)[1]["n"] == 9
    lines = ({"review": f"a {n}", "stars": 1} for n in range(5))
    Path("same.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, result, _ = graft("evaluate", run, "--test_data=same.jsonl", "--shots=2", "--mode=score")
    assert (status, result["n"]) == (0, 5) and result["prompt_tokens"] > 3 * len("Review: a 0\nIs it:")


def test_files_beside_named_data(graft: Command) -> None:
    rows("train.jsonl", 30)
    rows("held-out.jsonl", 7, start=28)
    words = ["--data=train.jsonl", "--test_data=held-out.jsonl", "--mode=score"]
    status, result, notes = graft("evaluate", *words, "--shots=2")
    assert (status, result["n"]) == (0, 7) and "of the evaluated texts are in the train split too" in notes
    assert graft("evaluate", *words)[1]["n"] == 7


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--val_data=mine.jsonl", "--val_data mine.jsonl: is read with --split validation or together with --data"),
        (
            "--test_data=mine.jsonl --split=train",
            "--test_data mine.jsonl: is read with --split test or together with --",
        ),
        ("--data=mine.jsonl --shots=2", "--shots 2: mine.jsonl is read whole, so there is no train split for "),
        ("--data=mine.jsonl --val_data=mine.jsonl", "--split test: mine.jsonl has no such split; it has train, valid"),
        ("--test_data=none.jsonl", "graft: none.jsonl: no such file"),
        ("--data=mine.jsonl --demo_selection=bm25", "--demo_selection bm25: chooses demonstrations; add --shots"),
    ],
)
def test_what_would_be_ignored_is_refused(words: str, line: str, graft: Command) -> None:
    rows("mine.jsonl", 9)
    status, _, notes = graft("evaluate", *words.split())
    assert status == 2 and line in notes.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "words", "line"),
    [
        ("generate", "--prompt=x --data=mine.jsonl", "--data mine.jsonl: is not read with --prompt"),
        ("generate", "--prompt=x --limit=3", "--limit 3: is not read with --prompt"),
        ("generate", "--num_samples=3", "--num_samples 3: needs --prompt"),
        ("generate", "--chat=on", "--chat on: needs --prompt"),
        (
            "pairs",
            "--prompts=mine.jsonl --split=test --prompt_words=2 --reward_command=cat",
            "--split test: mine.jsonl ",
        ),
    ],
)
def test_flags_of_other_commands_that_would_be_ignored(command: str, words: str, line: str, graft: Command) -> None:
    rows("mine.jsonl", 9)
    status, _, notes = graft(command, *words.split())
    assert status == 2 and line in notes and notes.count("\n") == 1


def test_a_run_that_is_not_read(graft: Command, assets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, model = f"--out_dir={assets / 'run'}", f"--init_from={assets / 'model'}"
    status, _, notes = graft("generate", run, model, "--prompt=x", "--max_new_tokens=1")
    assert status == 0 and f"--out_dir {assets / 'run'}: is not read, as --init_from is {assets / 'model'}" in notes
    status, _, notes = graft("prompt", run, "--task=arithmetic")  # has another default, and reads the run nevertheless
    assert status == 2 and "but the model reads at most 96" in notes


def test_label_words_of_a_parquet_file_without_a_run(graft: Command) -> None:
    import pyarrow.parquet

    features = {"label": {"names": ["good", "bad"], "_type": "ClassLabel"}}
    table = pyarrow.table({"text": ["fine", "dull"], "label": [0, 1]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), "mine.parquet")
    status, result, _ = graft("evaluate", "--data=mine.parquet")
    assert (status, result["n"], result["labels"]) == (0, 2, ["good", "bad"])
    status, _, notes = graft("evaluate", "--data=mine.parquet", "--labels=bad,good")
    assert status == 2 and "its labels are good, bad in this order, and --labels are bad, good" in notes


def test_a_runs_template_names_the_fields_of_its_data_and_of_other_files(graft: Command, tmp_path: Path) -> None:
    lines = [
        {"claim": f"c{n}", "about": {"said": f"{('bad', 'good')[n % 2]} {n}"}, "stars": n % 2 + 4} for n in range(30)
    ]
    Path("all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("other.jsonl").write_text("".join(json.dumps(line | {"id": 1}) + "\n" for line in lines[:6]))
    words = ["--data=all.jsonl", "--template=Claim {claim}: {about.said} ?", "--labels=4=no,5=yes", "--out_dir=run"]
    words += ["--columns=label=stars", "--max_iters=1", "--batch_size=4", "--rank=2"]
    status, _, notes = graft("train", *words)
    assert status == 0 and "text from claim, about.said" in notes
    status, own, _ = graft("evaluate", "--out_dir=run", "--mode=score", "--predictions=own.jsonl")
    assert status == 0 and own["labels"] == ["no", "yes"]
    status, other, _ = graft("evaluate", "--out_dir=run", "--mode=score", "--data=other.jsonl", "--columns=label=stars")
    assert status == 0 and other["n"] == 6
    text = json.loads(Path("own.jsonl").read_text().splitlines()[0])["text"]
    assert text.startswith("c") and text.count(": ") == 1 and "?" not in text
    message = "no field 'claim': the fields are text, label; --template names it"
    assert message in graft("evaluate", "--out_dir=run", f"--data={rows('plain.jsonl', 6)}")[2]


# What is saved


def saved(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in sorted((folder / "evaluations").glob("*.json"))}


@pytest.fixture
def own_run(assets: Path, tmp_path: Path) -> Path:
    unseen = shutil.ignore_patterns("evaluations")  # of the tests above
    return Path(shutil.copytree(assets / "run", tmp_path / "own", symlinks=True, ignore=unseen))


def test_results_of_a_run_are_saved_in_its_folder(graft: Command, assets: Path, own_run: Path) -> None:
    run = f"--out_dir={own_run}"
    _, result, _ = graft("evaluate", run, "--mode=score", "--predictions=rows.jsonl")
    assert "saved" not in result and not (own_run / "evaluations").exists()
    _, result, _ = graft("evaluate", run, "--mode=score")
    path = Path(result.pop("saved"))
    assert path.with_suffix(".jsonl").read_text() == Path("rows.jsonl").read_text()
    settings = {"mode": "score", "dtype": "float32", "checkpoint": "best", "split": "test"}
    settings["data"] = str(assets / "all.jsonl")
    assert json.loads(path.read_text()) == {"settings": settings, "step": 1, "result": result}
    rows("mine.jsonl", 9)
    mine = ("--data=mine.jsonl", "--columns=text=text,label=label")
    others = [(), ("--limit=3",), ("--checkpoint=last",), ("--split=train", "--limit=4"), ("--shots=2",), mine]
    paths = {graft("evaluate", run, "--mode=score", *words)[1]["saved"] for words in others}
    assert str(path) in paths and len(paths) == len(others) == len(saved(own_run))
    assert {Path(name).name[:9] for name in paths} == {"best-all-", "best-test", "best-trai", "last-test"}
    assert "saved" not in graft("evaluate", "--data=mine.jsonl", "--mode=score")[1]  # no run


def test_the_base_of_a_run_is_asked_as_the_run_is(graft: Command, assets: Path, own_run: Path) -> None:
    words = ["train", f"--init_from={assets / 'model'}", f"--data={assets / 'all.jsonl'}", f"--template={TEMPLATE}"]
    words += ["--columns=text=review,label=stars", "--rank=0", "--max_iters=1", "--batch_size=4", "--lr=0.1"]
    assert cli.run([*words, "--out_dir=full", "--device=cpu", "--dtype=float32", "--json"]) == 0
    data = (f"--data={assets / 'all.jsonl'}", "--columns=text=review,label=stars", "--split=test", "--mode=score")
    assert graft("evaluate", *data, "--predictions=rows.jsonl")[0] == 0
    for run in (own_run, Path("full")):
        _, result, _ = graft("evaluate", f"--out_dir={run}", "--mode=score", "--checkpoint=base")
        path = Path(result["saved"])
        assert path.with_suffix(".jsonl").read_text() == Path("rows.jsonl").read_text()
        assert json.loads(path.read_text())["step"] is None
    _, result, _ = graft("evaluate", "--out_dir=full", "--mode=score")
    assert Path(result["saved"]).with_suffix(".jsonl").read_text() != Path("rows.jsonl").read_text()


def test_a_run_folder_that_cannot_be_written_to_is_a_note(graft: Command, own_run: Path) -> None:
    (own_run / "evaluations").write_text("in the way")
    status, result, notes = graft("evaluate", f"--out_dir={own_run}", "--mode=score")
    assert status == 0 and result["n"] == 6 and "saved" not in result
    assert "the results are not saved: cannot write " in notes


def test_an_evaluated_run_is_resumed_and_knows_its_results_are_old(graft: Command, own_run: Path) -> None:
    graft("evaluate", f"--out_dir={own_run}", "--mode=score", "--checkpoint=last")
    assert cli.run(["train", "--resume", f"--out_dir={own_run}", "--max_iters=2", "--json"]) == 0
    assert cli.run(["report", str(own_run)]) == 0
    assert "of step 1; last is step 2 now: evaluate it again" in Path("report.html").read_text()
