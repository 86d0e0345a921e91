"""`graft export`: what it writes is what PEFT and transformers load, proven by itself and by them, or nothing."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from exchange.runs import ADAPTERS, MERGEABLE, run_of
from graftlm.config import ExportConfig
from graftlm.errors import GraftError, InputError
from graftlm.exchange import export as export_module
from graftlm.exchange.export import export
from graftlm.exchange.huggingface import base_hash, load_model
from graftlm.exchange.load import load
from graftlm.exchange.verify import SHARES, verification_prompts
from graftlm.files.formats import load_safetensors, read_json
from graftlm.inference.evaluate import evaluate
from graftlm.models import CausalLM
from graftlm.text.boundary import label_ids
from graftlm.text.collate import encode_rows
from graftlm.text.dataset import load_dataset
from tiny import FAMILIES, data_folder, model_folder

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
BASES = (*FAMILIES, "mistral")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of every family, data, and the runs that tests ask for."""
    folder = tmp_path_factory.mktemp("exporting")
    data_folder(folder / "data")
    for kind in FAMILIES:
        model_folder(folder / kind, kind)
    mistral = model_folder(folder / "mistral", "llama", seed=3)
    config = json.loads((mistral / "config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None, "head_dim": 8}
    (mistral / "config.json").write_text(json.dumps(config))
    (mistral / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.5, "do_sample": true}')
    return folder


def a_run(place: Path, base: str, name: str) -> Path:
    return run_of(place / f"run {base} {name}", place / base, place / "data", name)


def in_transformers(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids_of(run: Path) -> torch.Tensor:
    tokenizer = load("resume", run, device="cpu", dtype="float32").tokenizer
    return torch.tensor([tokenizer.encode("Review: a fine film, and good fun\nIs it:")])


@pytest.mark.parametrize(
    ("base", "name"),
    [(base, name) for base in BASES for name in (MERGEABLE if base in ("llama", "gpt2") else ("lora", "full"))],
)
def test_a_merged_run_is_the_same_in_transformers(base: str, name: str, place: Path, tmp_path: Path) -> None:
    run = a_run(place, base, name)
    result = export(ExportConfig(out_dir=str(run), to=str(tmp_path / "out"), format="merged"))
    assert result == {"path": str(tmp_path / "out"), "max_abs_logit_diff": pytest.approx(0, abs=1e-4)} | {
        "format": "huggingface"
    }
    ids = ids_of(run)
    with torch.no_grad():
        expected = load("resume", run, device="cpu", dtype="float32").model(ids)
        plain = load_model(place / base, torch.device("cpu"), torch.float32)(ids)
        got = in_transformers(tmp_path / "out")(ids).logits
    assert (expected - plain).abs().max() > 1e-2, "a run that changed nothing proves nothing"
    assert (got - expected).abs().max() <= 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a fine film")["input_ids"] == tokenizer_of(run).encode("a fine film")
    assert {str(t.dtype) for t in load_safetensors(tmp_path / "out" / "model.safetensors").values()} == {
        "torch.float32"
    }


def tokenizer_of(run: Path) -> Any:
    return load("resume", run, device="cpu", dtype="float32").tokenizer


@pytest.mark.parametrize("base", ["llama", "llama-biased", "mistral"])
def test_added_biases_are_a_llamas(base: str, place: Path, tmp_path: Path) -> None:
    export(ExportConfig(out_dir=str(a_run(place, base, "bitfit")), to=str(tmp_path / "out"), format="merged"))
    config = read_json(tmp_path / "out" / "config.json")
    expected = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True}
    assert {key: config[key] for key in expected} == expected and "sliding_window" not in config
    stored = load_safetensors(tmp_path / "out" / "model.safetensors")
    assert sum(name.endswith("bias") for name in stored) == 2 * 7
    assert all(bool(t.any()) for name, t in stored.items() if name.endswith("bias") and "k_proj" not in name)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_the_same_in_peft_or_is_our_own(base: str, name: str, place: Path, tmp_path: Path) -> None:
    run, own = a_run(place, base, name), name in ("bitfit", "adapter")
    result = export(ExportConfig(out_dir=str(run), to=str(tmp_path / "out"), checkpoint="last"))
    assert result["format"] == ("graft" if own else "peft") and result["max_abs_logit_diff"] <= 1e-5
    files = {path.name for path in (tmp_path / "out").iterdir()}
    stem = "graft_adapter{}" if own else "adapter_{}"
    assert files == {"export.json", "generation_config.json"} | {
        stem.format(end) for end in ((".json", ".safetensors") if own else ("config.json", "model.safetensors"))
    }
    if not own:
        ids = ids_of(run)
        with torch.no_grad():
            expected = load("resume", run, "last", device="cpu", dtype="float32").model(ids)
            got = peft.PeftModel.from_pretrained(in_transformers(place / base), tmp_path / "out").eval()(ids).logits
        assert (got - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["lora", "bitfit"])
def test_transformers_labels_each_example_as_evaluate_does(name: str, place: Path, tmp_path: Path) -> None:
    run = a_run(place, "llama", name)
    export(ExportConfig(out_dir=str(run), to=str(tmp_path / "out"), format="merged"))
    ours = load("resume", run, device="cpu", dtype="float32")
    assert ours.template is not None
    rows = load_dataset(str(place / "data"), labels=ours.template.labels).splits["test"]
    examples, _ = encode_rows(rows, ours.template, ours.tokenizer, ours.model.max_seq_len)
    expected = evaluate(ours.model, ours.tokenizer, ours.template, examples, mode="score").rows
    theirs, labels = in_transformers(tmp_path / "out"), label_ids(ours.template, ours.tokenizer)
    for example, prediction in zip(examples, expected, strict=True):
        scores = []
        for label in labels:
            ids = torch.tensor([[*example.prompt_ids, *label]])
            with torch.no_grad():
                log_p = theirs(ids).logits[0].log_softmax(-1)
            first = len(example.prompt_ids) - 1
            scores.append(sum(log_p[first + n, token].item() for n, token in enumerate(label)))
        assert scores.index(max(scores)) == prediction["predicted"]
        for word, score in zip(ours.template.labels, scores, strict=True):
            assert prediction["scores"][word] == pytest.approx(score, abs=1e-3)


def test_what_the_folder_says_of_itself(place: Path, tmp_path: Path) -> None:
    run = a_run(place, "mistral", "lora")
    said: list[str] = []
    result = export(ExportConfig(out_dir=str(run), to=str(tmp_path / "my model"), format="merged"), said.append)
    assert said == ["comparing logits on 8 prompts of the test split of data"]
    about, record = read_json(tmp_path / "my model" / "export.json"), read_json(run / "run.json")
    assert about["format"] == "huggingface" and about["base"] == record["base"] and about["method"] == record["method"]
    assert about["base"]["sha256"] == base_hash(place / "mistral")
    assert about["data"] == {"name": str(place / "data"), "fingerprint": record["data"]["fingerprint"], "chat": False}
    assert about["val_metrics"] == record["results"]["best"] and about["template"] == record["template"]
    assert (
        about["verification"]["max_abs_logit_diff"]
        == result["max_abs_logit_diff"]
        <= about["verification"]["tolerance"]
    )
    card = (tmp_path / "my model" / "README.md").read_text()
    for part in (
        "# my model",
        'from_pretrained("my model")',
        f"| base weights | sha256 {about['base']['sha256']} |",
        "| method | lora (rank 4, alpha 16.0, targets q+k+v",
        f"| data | data, fingerprint {about['data']['fingerprint']} |",
        f"| checkpoint | {about['checkpoint']}: validation loss {about['val_metrics']['val_loss']:.4f}, accuracy ",
        f"| made with | graftlm {about['graftlm']}, {about['date']} |",
        f"is {result['max_abs_logit_diff']:.1e} (",
        "Review: {text}\nIs it:",
    ):
        assert part in card, part
    unlabelled = {**about, "val_metrics": {"val_loss": 1.0, "val_accuracy": None}}
    assert "Review: {text}" not in export_module._card("t", unlabelled), "such a run has no prompt template"
    assert "base_model:" not in card and str(place) not in card, "a local path is nobody else's business"
    assert read_json(tmp_path / "my model" / "generation_config.json")["temperature"] == 0.5


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_smaller_dtypes_state_a_larger_tolerance(dtype: Any, stored: torch.dtype, place: Path, tmp_path: Path) -> None:
    run = a_run(place, "gpt2", "lora")
    result = export(ExportConfig(out_dir=str(run), to=str(tmp_path / "out"), format="merged", dtype=dtype))
    proof = read_json(tmp_path / "out" / "export.json")["verification"]
    assert (
        1e-4
        < result["max_abs_logit_diff"]
        <= proof["tolerance"]
        == pytest.approx(SHARES[dtype] * proof["max_abs_logit"])
    )
    assert {t.dtype for t in load_safetensors(tmp_path / "out" / "model.safetensors").values()} == {stored}
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == dtype
    assert f"| dtype | {dtype} |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("form", ["peft", "merged"])
@pytest.mark.parametrize("value", [0.01, float("nan")])
def test_files_that_do_not_give_the_same_logits_are_not_kept(
    form: Any, value: float, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, read_back = a_run(place, "llama", "lora"), export_module._read_back

    def worse(*given: Any) -> CausalLM:
        model = read_back(*given)
        with torch.no_grad():
            model.norm.weight[0] += value
        return model

    monkeypatch.setattr(export_module, "_read_back", worse)
    with pytest.raises(GraftError, match=r"export of .*: read back, its logits differ by .*; nothing was written") as e:
        export(ExportConfig(out_dir=str(run), to=str(tmp_path / "a" / "b" / "out"), format=form))
    assert e.value.exit_status == 1 and not list(tmp_path.iterdir())


def test_an_update_that_is_not_merged_is_found_out(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's logits are those of the update added, so a mistake in merging cannot hide."""
    monkeypatch.setattr("graftlm.methods.lora.LoRALinear.merge", lambda self: None)
    with pytest.raises(GraftError, match="its logits differ by"):
        export(ExportConfig(out_dir=str(a_run(place, "gpt2", "lora")), to=str(tmp_path / "out"), format="merged"))
    assert not list(tmp_path.iterdir())


def test_without_the_runs_data_built_in_texts_are_compared(place: Path, tmp_path: Path) -> None:
    data = data_folder(tmp_path / "data", train=16, other=4)
    run = run_of(tmp_path / "run", place / "llama", data, "lora")
    for line in ('{"words": "spoiled"}\n', None):
        for file in data.iterdir():
            file.write_text(line) if line else file.unlink()
        said: list[str] = []
        result = export(ExportConfig(out_dir=str(run), to=str(tmp_path / str(line))), said.append)
        assert said == ["comparing logits on 4 built-in texts, for want of the run's data"]
        assert result["max_abs_logit_diff"] <= 1e-5


def test_the_folder_to_write_must_be_free(place: Path, tmp_path: Path) -> None:
    run = a_run(place, "llama", "lora")
    (tmp_path / "empty").mkdir()
    export(ExportConfig(out_dir=str(run), to=str(tmp_path / "empty")))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(InputError, match=re.escape(f"--to {tmp_path / 'empty'}: holds other files; name a folder")):
        export(ExportConfig(out_dir=str(run), to=str(tmp_path / "empty")))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_windows_of_documents_are_compared_whole(place: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Once upon a time there was a king. " * 60)
    run = load("resume", run_of(tmp_path / "run", place / "llama", corpus, "lora"), device="cpu", dtype="float32")
    prompts, source = verification_prompts(run, {"data": str(corpus), "max_length": 40})
    assert source.endswith("prompts of the test split of corpus.txt")
    assert max(map(len, prompts)) == 40
