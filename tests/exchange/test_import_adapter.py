"""`graft import`: an adapter's folder becomes a run folder that every other verb reads, or there is no folder."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file

from exchange.runs import ADAPTERS, run_of
from graftlm import cli
from graftlm.config import ExportConfig, ImportConfig
from graftlm.errors import GraftError, InputError
from graftlm.exchange import import_adapter as import_module
from graftlm.exchange.export import export
from graftlm.exchange.huggingface import base_hash
from graftlm.exchange.import_adapter import import_adapter
from graftlm.exchange.load import ModelBundle, adapter_notes, load
from graftlm.files.formats import load_safetensors, read_json
from tiny import TEMPLATE, byte_tokenizer, data_folder, model_folder

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, data, and adapters of every method that were exported from runs on the first."""
    folder = tmp_path_factory.mktemp("importing")
    data_folder(folder / "data")
    for kind in ("gpt2", "llama"):
        model_folder(folder / kind, kind)
    return folder


def exported(place: Path, base: str, name: str) -> tuple[Path, Path]:
    """A run, and the folder of its adapter."""
    run, to = run_of(place / f"run {base} {name}", place / base, place / "data", name), place / f"to {base} {name}"
    if not to.exists():
        export(ExportConfig(out_dir=str(run), to=str(to)))
    return run, to


def config(folder: Path, out_dir: Path, **more: str) -> ImportConfig:
    return ImportConfig(folder=str(folder), out_dir=str(out_dir), template=TEMPLATE, **more)


@pytest.mark.parametrize("base", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_exported_adapter_comes_back(base: str, name: str, place: Path, tmp_path: Path) -> None:
    run, adapter = exported(place, base, name)
    said: list[str] = []
    result = import_adapter(config(adapter, tmp_path / "run"), said.append)
    assert result["path"] == str(tmp_path / "run") and result["max_abs_logit_diff"] <= 1e-4
    assert said == [
        f"base model, as the adapter says: {place / base}",
        "comparing logits on 4 built-in texts, for want of the run's data",
    ]
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        loaded = [load("resume", at, device="cpu", dtype="float32") for at in (run, tmp_path / "run")]
        before, after = (one.model(ids) for one in loaded)
    assert (before - after).abs().max() <= 1e-5
    assert loaded[1].template is not None and loaded[1].template.text == TEMPLATE
    # The same evaluation, to the example, and the same adapter when it is exported again.
    rows = []
    for at in (run, tmp_path / "run"):
        predictions = tmp_path / f"{len(rows)}.jsonl"
        words = [f"--out_dir={at}", f"--data={place / 'data'}", "--device=cpu", "--dtype=float32", "--mode=score"]
        assert cli.run(["evaluate", *words, f"--predictions={predictions}", "--json"]) == 0
        rows.append([json.loads(row)["predicted"] for row in predictions.read_text().splitlines()])
    assert rows[0] == rows[1] and len(rows[0]) == 12
    export(ExportConfig(out_dir=str(tmp_path / "run"), to=str(tmp_path / "again")))
    if (base, name) != ("gpt2", "dora"):  # q and v alone: PEFT's c_attn has lengths for k, too
        weights = next(adapter.glob("*.safetensors")).name
        was, now = (load_safetensors(folder / weights) for folder in (adapter, tmp_path / "again"))
        assert was.keys() == now.keys() and all(torch.equal(was[key], now[key]) for key in was)


def test_peft_folder_becomes_a_run(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(place / "gpt2", dtype=torch.float32)
    made = peft.LoraConfig(r=5, lora_alpha=10, target_modules="all-linear", fan_in_fan_out=True, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(reference, made).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(4))
    theirs.save_pretrained(tmp_path / "theirs")
    words = [str(tmp_path / "theirs"), f"--out_dir={tmp_path / 'run'}", f"--template={TEMPLATE}", "--labels=no,yes"]
    assert cli.run(["import", *words, "--json"]) == 0
    out, _ = capsys.readouterr()
    result = json.loads(out)
    assert result.keys() == {"path", "max_abs_logit_diff", "format"} and result["format"] == "peft"
    loaded = load("resume", tmp_path / "run", "last", "cpu", "float32")
    assert loaded.template is not None and loaded.template.labels == ("no", "yes")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        assert (loaded.model(ids) - theirs(ids).logits).abs().max() <= 1e-4
    record = read_json(tmp_path / "run" / "run.json")
    assert record["method"]["method"] == "lora" and record["method"]["rank"] == 5
    assert record["base"] == {"name": str(place / "gpt2"), "sha256": base_hash(place / "gpt2")}
    assert record["imported"]["from"] == str(tmp_path / "theirs")
    assert record["imported"]["verification"]["max_abs_logit_diff"] == result["max_abs_logit_diff"]
    assert cli.run(["generate", f"--out_dir={tmp_path / 'run'}", "--prompt=a", "--max_new_tokens=2", "--json"]) == 0
    assert "texts" in capsys.readouterr().out
    export(ExportConfig(out_dir=str(tmp_path / "run"), to=str(tmp_path / "again")))
    assert read_json(tmp_path / "again" / "adapter_config.json")["r"] == 5


WRONG_NAMES: dict[str, tuple[Callable[[str], str], str]] = {
    # what another program wrote -> its name of a tensor, the error
    "under a wrapper": (lambda name: name.replace("model.model.", "model.model.language_model."), "is missing"),
    "without a prefix": (lambda name: name.removeprefix("base_model.model."), "is missing"),
    "with an adapter's name": (lambda name: name.replace(".weight", ".default.weight"), "is missing"),
    "of a part of the layers": (lambda name: name if ".layers.0." in name else "", r"layers\.1\..* is missing"),
    "of new tokens too": (str, r"embed_tokens\.weight belongs to no target"),
}


@pytest.mark.parametrize("written", WRONG_NAMES)
def test_an_adapter_of_which_a_part_would_not_be_loaded_is_refused(written: str, place: Path, tmp_path: Path) -> None:
    renamed, line = WRONG_NAMES[written]
    folder = shutil.copytree(exported(place, "llama", "lora")[1], tmp_path / "adapter")
    (folder / "export.json").unlink()
    tensors = load_safetensors(folder / "adapter_model.safetensors")
    tensors = {name: t for key, t in tensors.items() if (name := renamed(key))}
    if written == "of new tokens too":
        tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(260, 32)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=line):
        import_adapter(config(folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert cli.run(["serve", f"--adapters=x={folder}", "--port=0", "--device=cpu"]) == 2


@pytest.mark.parametrize("name", ["lora", "adapter"])
def test_an_adapter_next_to_a_model_is_not_passed_over(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would load both; `graft import` makes a run of them."""
    both = shutil.copytree(place / "llama", tmp_path / "both")
    for file in exported(place, "llama", name)[1].glob("*adapter*"):
        shutil.copy(file, both)
    for words in (
        ["generate", "--prompt=a"],
        ["evaluate", f"--data={place / 'data'}"],
        ["train", f"--data={place / 'data'}", f"--out_dir={tmp_path / 'none'}"],
        ["serve", "--port=0"],
    ):
        assert cli.run([*words, f"--init_from={both}", "--device=cpu"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(f"graft: {both}: holds an adapter (") and f"graft import {both}" in line
    import_adapter(config(both, tmp_path / "run", init_from=str(both)))
    assert (tmp_path / "run" / "best").is_dir() and not (tmp_path / "none").exists()


def test_notes_on_an_adapter_that_changes_nothing_or_has_another_tokenizer(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load(str(place / "llama"), device="cpu", dtype="float32")
    for name, kind in (("lora", "lora_B"), ("ia3", "")):
        folder = shutil.copytree(exported(place, "llama", name)[1], tmp_path / name)
        assert adapter_notes(folder, base.model.config, base.tokenizer) == []
        tensors = load_safetensors(folder / "adapter_model.safetensors")
        untrained = {key: t * 0 + (name == "ia3") if kind in key else t for key, t in tensors.items()}
        save_file(untrained, folder / "adapter_model.safetensors", {"format": "pt"})
        (note,) = adapter_notes(folder, base.model.config, base.tokenizer)
        assert note == f"{folder}: changes nothing: its weights are those from before any training"
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    byte_tokenizer(folder, "<|new|>")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    assert cli.run(["import", str(folder), "--out_dir", str(tmp_path / "run"), f"--template={TEMPLATE}"]) == 0
    said = capsys.readouterr().err
    use = "the base's is used; to use it, copy it into the base's folder"
    assert f"{folder}: its chat template is another one than the base's: {use}" in said
    assert f"{folder}: its tokenizer has tokens that the base's lacks, such as <|new|>: {use}" in said


def test_the_base_is_the_one_that_is_given_else_the_one_that_is_named(place: Path, tmp_path: Path) -> None:
    _, adapter = exported(place, "llama", "lora")
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(file.read_text())
    for name, line in (
        (None, f"{file}: names no base model; give it with --init_from"),
        ("", f"{file}: names no base model; give it with --init_from"),
        ("./gone", f"{file}: its base './gone' cannot be loaded; give --init_from (./gone: no such file or folder"),
    ):
        file.write_text(json.dumps({**said, "base_model_name_or_path": name}))
        with pytest.raises(InputError, match=re.escape(line)):
            import_adapter(config(tmp_path / "adapter", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    import_adapter(config(tmp_path / "adapter", tmp_path / "run", init_from=str(place / "llama")))
    assert read_json(tmp_path / "run" / "run.json")["base"]["name"] == str(place / "llama")


def test_an_adapter_that_knows_its_base_is_put_on_no_other(place: Path, tmp_path: Path) -> None:
    _, adapter = exported(place, "llama", "lora")
    other = model_folder(tmp_path / "other", "llama", seed=9)
    with pytest.raises(InputError, match=r"was trained on .* with weights .*; use the base it was trained on"):
        import_adapter(config(adapter, tmp_path / "run", init_from=str(other)))
    with pytest.raises(InputError, match="use the base it was trained on"):
        import_adapter(config(adapter, tmp_path / "run", init_from=str(place / "gpt2")))
    shutil.copytree(adapter, tmp_path / "foreign", ignore=shutil.ignore_patterns("export.json"))
    import_adapter(config(tmp_path / "foreign", tmp_path / "run", init_from=str(other)))


def test_an_import_cannot_be_resumed_but_trained_on_when_merged(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapter = exported(place, "llama", "lora")
    run, merged = tmp_path / "run", tmp_path / "merged"
    import_adapter(config(adapter, run))
    assert cli.run(["train", f"--out_dir={run}", "--resume"]) == 2
    assert capsys.readouterr().err == (
        f"graft: {run}: was imported without optimizer state, so there is no training to resume; merge "
        f"it (graft export --out_dir {run} --format merged --to FOLDER) and train that (--init_from FOLDER)\n"
    )
    assert cli.run(["export", f"--out_dir={run}", "--format=merged", f"--to={merged}"]) == 0
    out = capsys.readouterr().out
    assert f"folder       {merged}\nformat       a model that transformers loads\nverified     after reloading, " in out
    words = [f"--init_from={merged}", f"--data={place / 'data'}", f"--out_dir={tmp_path / 'next'}", "--max_iters=1"]
    assert cli.run(["train", *words, f"--template={TEMPLATE}", "--rank=2", "--device=cpu", "--dtype=float32"]) == 0


def test_a_run_that_does_not_give_the_folders_logits_is_not_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = exported(place, "gpt2", "lora")

    def worse(*given: Any, **more: Any) -> ModelBundle:
        loaded = load(*given, **more)
        with torch.no_grad():
            loaded.model.norm.weight[0] += 0.01
        return loaded

    monkeypatch.setattr(import_module, "load", worse)
    with pytest.raises(GraftError, match=r"import of .*: read back, its logits differ by .*; nothing was written") as e:
        import_adapter(config(adapter, tmp_path / "run"))
    assert e.value.exit_status == 1 and not list(tmp_path.iterdir())


def test_own_folders_are_read_strictly(place: Path, tmp_path: Path) -> None:
    _, adapter = exported(place, "llama", "bitfit")
    shutil.copytree(adapter, tmp_path / "own")
    file = tmp_path / "own" / "graft_adapter.json"
    said = json.loads(file.read_text())
    for change, line in (
        ({"format": 2}, "is no adapter of format 1"),
        ({"method": {"method": "vera"}}, "names no method of ours; known are "),
        ({"method": {**said["method"], "invented": 1}}, "its method is not understood: "),
        ({"method": {**said["method"], "add_biases": False}}, "has no biases to train"),
        ({"method": {**said["method"], "layers": [0, 1]}}, "belongs to no trained part of this model"),
    ):
        file.write_text(json.dumps({**said, **change}))
        with pytest.raises(InputError, match=re.escape(line)):
            import_adapter(config(tmp_path / "own", tmp_path / "run"))
        assert not (tmp_path / "run").exists()
