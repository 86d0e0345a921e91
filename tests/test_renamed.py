"""Names of version 0.1: on the command line they are refused by a line that names the new one; run folders are read."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from graftlm import cli
from graftlm.cli import COMMANDS
from graftlm.config import TrainConfig
from graftlm.config.renamed import COMMANDS as OLD_COMMANDS
from graftlm.config.renamed import FLAGS, upgrade_run, upgrade_state
from graftlm.errors import InputError
from graftlm.exchange.runs import read_run
from graftlm.files.formats import read_json
from graftlm.studies.sweep import read_sweep
from tiny import TEMPLATE, data_folder, model_folder

OLD = Path(__file__).parent / "old_run"
"""run.json and progress.json as version 0.1 wrote them."""


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.run(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("graft: ") and err.count("\n") == 1
    return err.removeprefix("graft: ").rstrip("\n")


@pytest.mark.parametrize(("old", "new"), OLD_COMMANDS.items())
def test_an_old_subcommand_is_refused_with_the_new_name(old: str, new: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert new in COMMANDS
    assert refused(capsys, old, "--json") == f"graft {old} is now graft {new}"


@pytest.mark.parametrize(("old", "new"), FLAGS.items())
def test_an_old_flag_or_key_is_refused_with_the_new_name(
    old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    users = [name for name, command in COMMANDS.items() if new in {f.name for f in fields(command.config)}]
    assert users
    for name in users:
        assert old not in {f.name for f in fields(COMMANDS[name].config)}
        for flag in (f"--{old}", f"--{old.replace('_', '-')}=1"):
            assert refused(capsys, name, flag).startswith(f"{flag.partition('=')[0]} is now --{new}")
        (tmp_path / "recipe.toml").write_text(f"{old} = 1\n")
        line = refused(capsys, name, f"--config={tmp_path / 'recipe.toml'}")
        assert line.startswith(f"{tmp_path / 'recipe.toml'}: {old} is now {new}")


def test_what_changed_beside_the_name_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "train", "--compile=off") == "--compile is now --kernels (auto, cpp for on, torch for off)"
    assert refused(capsys, "train", "--text_field=a") == "--text_field is now --columns, as in --columns text=NAME"
    assert refused(capsys, "train", "--no-buckets") == "--no-buckets is now --group_by_length"


def test_an_old_key_of_a_sweep_is_refused_with_the_new_name(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text("[train]\nwarmup = 3\n")
    with pytest.raises(InputError, match=r"sweep\.toml: \[train\]: warmup is now warmup_steps$"):
        read_sweep(str(file), {}, {})


# Run folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains a tiny model for four steps into a folder of that name; more words may change that."""
    place = tmp_path_factory.mktemp("renamed")
    model_folder(place / "model")
    data_folder(place / "data")

    def run(name: str, *more: str) -> Path:
        flags = {"init_from": place / "model", "data": place / "data", "template": TEMPLATE, "device": "cpu"}
        flags |= {"rank": 4, "batch_size": 4, "dtype": "float32", "max_iters": 4, "eval_every": 2, "warmup_steps": 1}
        words = [] if "--resume" in more else [f"--{key}={value}" for key, value in flags.items()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("graftlm.cli.main.tune_malloc_retain", lambda: False)
            assert cli.run(["train", *words, f"--out_dir={place / name}", "--json", *more]) == 0
        return place / name

    return run


def keys(value: Any, at: str = "") -> set[str]:
    """The paths of all keys in nested dictionaries."""
    if not isinstance(value, dict):
        return set()
    return {f"{at}/{key}" for key in value} | {path for key in value for path in keys(value[key], f"{at}/{key}")}


ADDED = {
    "bad_rows",
    "base_format",
    "chat",
    "completion",
    "desirable_weight",
    "messages",
    "packing",
    "prompt",
    "undesirable_weight",
}
"""Flags that are newer than old runs, which a resumed run takes by their defaults."""


def test_an_old_run_json_has_the_new_names_when_it_is_read(train: Callable[..., Path]) -> None:
    new = read_run(train("new"))
    old = upgrade_run(read_json(OLD / "run.json"))
    added = {
        *(f"/config/{flag}" for flag in ADDED),
        "/base/format",
        "/data/tokens",
        "/date",
        "/template/chat",
        "/template/fields",
        "/template/values",
    }
    assert keys(old) == keys(new) - added
    assert set(old["config"]) == {f.name for f in fields(TrainConfig)} - ADDED
    expected = {"grad_clip": 0.5, "warmup_steps": 3, "microbatch_tokens": 256, "kernels": "cpp", "columns": "text=body"}
    assert {name: old["config"][name] for name in expected} == expected
    assert upgrade_run(new) == new and upgrade_run(old) == old
    state = upgrade_state(read_json(OLD / "progress.json"))
    assert set(state) == set(read_json(train("state") / "last" / "trainer_state.json"))


def downgrade(run: Path) -> None:
    """Rewrite a run folder as version 0.1 would have written it."""
    old, new = read_json(OLD / "run.json"), read_json(run / "run.json")
    flags = {FLAGS.get(flag, flag): flag for flag in old["config"] if not flag.endswith("_field")}
    flags["kernels"] = "compile"
    config = {flags[flag]: value for flag, value in new["config"].items() if flag in flags}
    config |= {"compile": "auto", "text_field": "text", "label_field": "label"}
    assert set(config) == set(old["config"])
    names = {"cpp_kernels": "compile", "parent_run": "start", "resume_history": "resumed", "distributed": "processes"}
    record = {names.get(key, key): value for key, value in new.items()} | {"config": config}
    record["processes"] = {"size": 1, "backend": None}
    record["compile"] = {"from_step": record["compile"]["start_step"], "reason": record["compile"]["reason"]}
    (run / "run.json").write_text(json.dumps(record))
    for checkpoint in (run / "checkpoints").iterdir():
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        names = {"evals_since_best": "stale", "steps_since_overflow": "clean_steps"}
        names |= {"timed_model_tokens": "timed_needed"}
        state = {names.get(key, key): value for key, value in state.items()}
        assert set(state) == set(read_json(OLD / "progress.json"))
        (checkpoint / "progress.json").write_text(json.dumps(state))
        (checkpoint / "trainer_state.json").unlink()
        if (checkpoint / "trainable.safetensors").exists():
            (checkpoint / "trainable.safetensors").rename(checkpoint / "trained.safetensors")
        if (checkpoint / "graft_adapter_config.json").exists():
            (checkpoint / "graft_adapter_config.json").rename(checkpoint / "graft_adapter.json")


@pytest.mark.parametrize("method", ["lora", "prefix", "adapter"])
def test_an_old_run_folder_is_resumed_to_the_same_bits(method: str, train: Callable[..., Path]) -> None:
    flags = [f"--method={method}", *(["--rank=none", "--prefix_hidden=8"] if method == "prefix" else [])]
    new = train(method, *flags)
    old = new.with_name(f"{method}-old")
    shutil.copytree(new, old, symlinks=True)
    downgrade(old)
    for run in (new, old):
        train(run.name, "--resume", "--max_iters=8")
    ends = [sorted((run / "last").resolve().glob("*.safetensors")) for run in (new, old)]
    assert [file.name for file in ends[0]] == [file.name for file in ends[1]] and ends[0]
    for a, b in zip(*ends, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name
    assert read_run(old)["config"]["max_iters"] == 8
    assert cli.run(["evaluate", str(old), "--limit=4", "--json"]) == 0
