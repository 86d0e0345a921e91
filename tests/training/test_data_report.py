"""`graft data` tells what `graft train` then does, in the same numbers, and refuses what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import Graft
from graftlm import cli
from graftlm.config import DataConfig, TrainConfig
from graftlm.files.formats import read_json
from graftlm.training.batches import CollateOptions
from graftlm.training.data_report import describe_data
from graftlm.training.setup import prepare
from graftlm.training.train import train
from hub_mirror import serve
from tiny import TEMPLATE, chat_model_folder

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def talk(number: int) -> dict[str, Any]:
    said = [("user", f"q{number}"), ("assistant", "yes"), ("user", "x" * number), ("assistant", "no")]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


ROWS: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    # rows, their layout, the objective that trains on them
    "labelled": (
        [{"text": "fun " * n, "label": n % 2, "id": n} for n in range(1, 16)],
        "labelled (text, label)",
        "sft",
    ),
    "chat": ([talk(n) for n in range(1, 16)], "chat (messages)", "sft"),
    "completion": (
        [{"prompt": f"p{n}", "completion": " a" * n} for n in range(1, 16)],
        "completion (prompt, completion)",
        "sft",
    ),
    "preference": (
        [{"prompt": f"p{n}", "chosen": " a" * n, "rejected": " b"} for n in range(1, 16)],
        "preference (chosen, rejected)",
        "dpo",
    ),
    "unpaired": (
        [{"prompt": f"p{n}", "completion": " a" * n, "label": n % 2 == 0} for n in range(1, 16)],
        "unpaired preference (prompt, completion, label)",
        "kto",
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template."""
    return chat_model_folder(tmp_path_factory.mktemp("data") / "model", CHAT)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def describe(base: Path, data: str, **flags: Any) -> dict[str, Any]:
    flags = {"init_from": str(base), "data": data, "template": TEMPLATE, "max_length": 60, **flags}
    return describe_data(DataConfig(**flags), set(flags))


def run_config(base: Path, data: str, out: Path, **flags: Any) -> TrainConfig:
    flags = {"template": TEMPLATE, "max_length": 60, "rank": 2, "dtype": "float32", "batch_size": 4, **flags}
    return TrainConfig(init_from=str(base), data=data, out_dir=str(out), device="cpu", **flags)


@pytest.mark.parametrize("kind", ROWS)
def test_the_numbers_are_those_of_a_run(kind: str, base: Path, tmp_path: Path) -> None:
    rows, layout, objective = ROWS[kind]
    data = write(tmp_path / "rows.jsonl", rows)
    told = describe(base, data)
    run = prepare(run_config(base, data, tmp_path / "run", objective=objective))
    assert told["layouts"] == [layout] and told["objective"] == objective
    assert told["unused_columns"] == (["id"] if kind == "labelled" else [])
    assert told["fingerprint"] == run.manifest.values["data"]["fingerprint"]
    assert told["max_length"] == run.config.max_length
    for split, examples in run.data.splits.items():
        assert told["splits"][split]["examples"] == len(examples)
        assert told["splits"][split]["tokens_per_epoch"] == sum(e.length for e in examples)
    batch = run.objective.collate(run.data.train, CollateOptions(share_prefix=False))
    assert told["splits"]["train"]["targets"] == len(batch.targets)
    assert told["splits"]["train"]["tokens_per_epoch"] == batch.tokens
    assert [*told["notes"], f"example: {told['examples'][0]['text']}"] == run.notes


def test_a_run_trains_on_as_many_examples_and_tokens(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS["labelled"][0])
    told = describe(base, data)
    result = train(run_config(base, data, tmp_path / "run", epochs=1.0, batch_size=1))
    run = read_json(tmp_path / "run" / "run.json")
    assert run["data"]["examples"] == {split: told["splits"][split]["examples"] for split in ("train", "validation")}
    assert result["examples"] == told["splits"]["train"]["examples"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["tokens"] == told["splits"]["train"]["tokens_per_epoch"]
    cut = {split: told["splits"][split]["truncated"]["rows"] for split in ("train", "validation")}
    notes = [
        f"{count} of {run['data']['examples'][split]} texts in {split} are" for split, count in cut.items() if count
    ]
    assert notes and all(any(said.startswith(note) for said in run["notes"]) for note in notes)


def test_lengths_are_those_before_truncation_and_percentiles_those_of_rows(base: Path, tmp_path: Path) -> None:
    """One token is a byte: a row is the template, its text, and what the label word takes."""
    rows = [{"text": "x" * n, "label": 0} for n in range(1, 101)]
    data, val = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", [{"text": "fine", "label": 1}])
    train = describe(base, data, val_data=val, max_length=96)["splits"]["train"]
    fixed = len(TEMPLATE.replace("{text}", "") + " negative") + 1
    assert train["tokens"] == {"p50": fixed + 50, "p90": fixed + 90, "p99": fixed + 99, "max": fixed + 100}
    beyond = [n + fixed - 96 for n in range(1, 101) if n + fixed > 96]
    assert train["truncated"] == {"rows": len(beyond), "tokens": sum(beyond), "targets": 0}
    assert train["targets"] == 100 * (len(" negative") + 1)


def test_answers_that_do_not_fit_are_counted(base: Path, tmp_path: Path) -> None:
    told = describe(base, write(tmp_path / "rows.jsonl", [talk(n) for n in range(1, 40)]))["splits"]
    longer = [n for n in range(1, 40) if len(f"<user>q{n}.<assistant>yes.<user>{'x' * n}.<assistant>no.") > 60]
    counts = [split["truncated"] for split in told.values()]
    assert sum(count["rows"] for count in counts) == len(longer) > 0
    assert sum(count["targets"] for count in counts) == len(longer) * len("no.")


def test_texts_in_two_splits_are_counted_without_case_and_white_space(base: Path, tmp_path: Path) -> None:
    texts = {
        "train": ["Good  fun", "Caf\u00e9", "same"],
        "validation": ["good fun\n", "new"],
        "test": ["CAFE\u0301", "same"],
    }
    for split, some in texts.items():
        write(tmp_path / f"{split}.jsonl", [{"text": text, "label": 1} for text in some])
    told = describe(base, str(tmp_path))
    assert told["duplicates"] == {"train_validation": 1, "train_test": 2, "validation_test": 0}
    assert "1 text is in both train and validation" in told["notes"]


def test_a_test_row_that_training_does_not_read_is_a_note(base: Path, tmp_path: Path) -> None:
    for split, completion in (("train", " a"), ("validation", " a"), ("test", "x" * 99)):
        write(tmp_path / f"{split}.jsonl", [{"prompt": "p", "completion": completion}])
    told = describe(base, str(tmp_path))
    assert told["splits"]["test"] == {"rows": 1}
    assert any(note.startswith("test is not counted in tokens: ") and "test.jsonl:1" in note for note in told["notes"])
    assert prepare(run_config(base, str(tmp_path), tmp_path / "run")).data.train


REFUSED: list[tuple[str, list[str]]] = [
    ('{"text": "a", "label": 7}', []),
    ('{"text": "a"', []),
    ('{"prompt": "p", "completion": "' + 99 * "x" + '"}', []),
    ('{"text": "a", "label": 1}', ["--columns=text=body"]),
    ('{"text": "a", "label": 1}', [f"--labels=good,{99 * 'x'}"]),
    ('{"text": "a", "label": 1}', ["--template=no place"]),
    ('{"text": "a", "label": 1}', ["--init_from=nowhere/"]),
    ('{"nothing": 1}', []),
]


@pytest.mark.parametrize(("row", "flags"), REFUSED)
def test_what_training_refuses_is_refused_with_the_same_line(
    row: str, flags: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, val = tmp_path / "rows.jsonl", tmp_path / "val.jsonl"
    for path in (data, val):
        path.write_text(row + "\n")
    words = [f"--init_from={base}", f"--val_data={val}", *flags]
    lines = []
    for verb in (["data", str(data)], ["train", f"--data={data}", f"--out_dir={tmp_path / 'run'}", "--device=cpu"]):
        assert cli.run([*verb, *words]) == 2
        out, line = capsys.readouterr()
        assert out == "" and line.startswith("graft: ")
        lines.append(line)
    assert lines[0] == lines[1]


def test_the_command_reads_no_weights_and_fits_a_screen(base: Path, tmp_path: Path, graft: Graft) -> None:
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    write(tmp_path / "rows.jsonl", ROWS["preference"][0])
    words = ["data", "rows.jsonl", "--init_from", "model", "--max_length", "90"]
    done = graft(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(max(1, -(-len(line) // 80)) for line in lines) <= 40
    assert "train with   --objective dpo" in lines and "⟦" in done.stdout and " rather than " in done.stdout
    assert "rows.jsonl: read as preference (chosen, rejected)" in done.stderr
    told = json.loads(graft(*words, "--json", cwd=tmp_path).stdout)
    assert {*told["splits"]} == {"train", "validation", "test"} and len(told["examples"]) == 3


def test_no_weights_are_fetched_from_the_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    data = write(tmp_path / "rows.jsonl", ROWS["chat"][0])
    with serve(models={"org/name": base}) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        told = describe(Path("org/name"), data)
        assert any("tokenizer.json" in request for request in mirror.requests)
        assert not any("safetensors" in request for request in mirror.requests)
    assert {**told, "tokenizer": ""} == {**describe(base, data), "tokenizer": ""}
