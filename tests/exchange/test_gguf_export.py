"""`graft export --format gguf`, `gguf-lora` and `ollama`: read back by us, and loaded by llama.cpp itself."""

import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader

from exchange.runs import run_of
from gguf_files import TOKENS, tiny_model
from graftlm.config import ExportConfig
from graftlm.errors import GraftError, InputError
from graftlm.exchange import gguf_export
from graftlm.exchange.export import export
from graftlm.exchange.gguf_plan import GGUFPlan
from graftlm.exchange.huggingface import load_model
from graftlm.exchange.llama_cpp import LlamaCpp
from graftlm.files.formats import read_json
from graftlm.files.gguf import gguf_to_folder
from graftlm.files.gguf_writer import TYPES
from graftlm.models.config import to_file
from tiny import FAMILIES, data_folder, merging_tokenizer, model_folder

CPU = torch.device("cpu")
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, *[1] * (len(TOKENS) - 2), 5],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.eos_token_id": 0,
}


@pytest.mark.parametrize("kind", TYPES)
def test_the_types_of_matrices(kind: str, tmp_path: Path) -> None:
    tiny_model("llama", 64).save_pretrained(tmp_path / "m")
    model = load_model(tmp_path / "m", CPU, torch.float32)
    state = to_file(model.config, dict(model.named_parameters()))
    plan = GGUFPlan(model.config, read_json(tmp_path / "m" / "config.json"), state, TOKENIZER, str(tmp_path))
    plan.write(tmp_path / "m.gguf", state, kind)
    stored = {tensor.name: tensor.tensor_type.name.lower() for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert stored["blk.0.attn_q.weight"] == kind and stored["blk.0.attn_norm.weight"] == "f32"
    assert stored["output.weight"] == stored["token_embd.weight"] == ("q8_0" if kind[:2] in ("q4", "q5") else kind)
    gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    back = load_model(tmp_path / "out", CPU, torch.float32)
    largest = {"f32": 0, "f16": 2e-3, "bf16": 1e-2, "q8_0": 1e-2, "q5": 7e-2, "q4": 0.14}
    for name, p in model.named_parameters():
        assert (p - back.get_parameter(name)).abs().max() <= largest.get(kind, largest.get(kind[:2], 0)) * p.abs().max()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, and data."""
    folder = tmp_path_factory.mktemp("gguf")
    data_folder(folder / "data")
    for kind in FAMILIES:
        merging_tokenizer(model_folder(folder / kind, kind))
    return folder


def a_run(place: Path, base: str, name: str) -> Path:
    return run_of(place / f"run {base} {name}", place / base, place / "data", name)


@pytest.mark.parametrize(
    ("base", "name"), [("gpt2", "lora"), ("llama", "rslora"), ("llama-biased", "full"), ("llama", "dora")]
)
def test_a_run_as_a_model_in_llama_cpp(base: str, name: str, place: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "m.gguf"
    said: list[str] = []
    result = export(
        ExportConfig(out_dir=str(a_run(place, base, name)), to=str(target), format="gguf", quantization="f32"),
        said.append,
    )
    llama = result["llama_cpp"]
    assert result["max_abs_logit_diff"] <= 1e-4 and llama["max_abs_logprob_diff"] <= llama["tolerance"]
    assert llama["equal_texts"] == llama["texts"] == 8
    record = read_json(target.with_suffix(".export.json"))
    assert record["llama_cpp"] == llama and record["quantization"] == "f32"
    assert {path.name for path in target.parent.iterdir()} == {"m.gguf", "m.export.json"}


@pytest.mark.parametrize(("base", "name"), [("gpt2", "lora"), ("llama", "rslora"), ("llama-biased", "lora")])
def test_a_run_as_an_adapter_in_llama_cpp(base: str, name: str, place: Path, tmp_path: Path) -> None:
    config = ExportConfig(out_dir=str(a_run(place, base, name)), to=str(tmp_path / "a.gguf"), format="gguf-lora")
    result = export(config)
    assert result["max_abs_logit_diff"] <= 1e-4 and result["llama_cpp"]["equal_texts"] == 8
    names = {tensor.name for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    assert names and all(re.fullmatch(r"blk\.\d+\.\w+\.weight\.lora_[ab]", name) for name in names)


def test_what_llama_cpp_reads_otherwise_is_not_left_behind(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(self: LlamaCpp, prompts: Any, top: int, shown: int) -> list[dict[int, float]]:
        return [{5: 0.0}] * len(prompts)

    monkeypatch.setattr(gguf_export.LlamaCpp, "next_logprobs", other)
    config = ExportConfig(out_dir=str(a_run(place, "gpt2", "lora")), to=str(tmp_path / "m.gguf"), format="gguf")
    with pytest.raises(GraftError, match=r"in llama\.cpp, log-probabilities differ by .*; nothing was written"):
        export(config)
    assert not any(tmp_path.iterdir())


def test_on_a_full_disk_nothing_is_left(place: Path, tmp_path: Path) -> None:
    run, (soft, hard) = a_run(place, "gpt2", "lora"), resource.getrlimit(resource.RLIMIT_FSIZE)
    config = ExportConfig(out_dir=str(run), to=str(tmp_path / "m.gguf"), format="gguf", quantization="f32")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
        with pytest.raises(InputError, match=r"^disk full: cannot write "):
            export(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any(tmp_path.iterdir())


def test_a_record_of_another_export_is_not_replaced(place: Path, tmp_path: Path) -> None:
    record = tmp_path / "m.export.json"
    record.write_text("{}")
    config = ExportConfig(out_dir=str(a_run(place, "gpt2", "lora")), to=str(tmp_path / "m.gguf"), format="gguf")
    with pytest.raises(InputError, match=re.escape(f"--to {record}: exists; name a file that does not")):
        export(config)
    assert record.read_text() == "{}" and [*tmp_path.iterdir()] == [record]


def test_without_llama_cpp_it_is_said(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_export, "is_installed", lambda: False)
    said: list[str] = []
    config = ExportConfig(out_dir=str(a_run(place, "gpt2", "lora")), to=str(tmp_path / "m.gguf"), format="gguf")
    assert export(config, said.append)["llama_cpp"] is None
    assert said[-1].startswith("llama.cpp was not asked: the file is kept; pip install 'graftlm[llamacpp]'")
    assert (tmp_path / "m.gguf").is_file()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"to": "m"}, "--to m: name the file to create, as in --to m.gguf"),
        ({"name": "dora", "format": "gguf-lora"}, "--format gguf-lora: llama.cpp adds LoRA only, not dora: use"),
        ({"name": "full", "format": "gguf-lora"}, "--format gguf-lora: a run of full fine-tuning has no adapter"),
        ({"name": "adapter"}, "--format gguf: what adapter adds is no change of the base's weights"),
        ({"format": "gguf-lora", "quantization": "q8_0"}, "--quantization q8_0: only for --format gguf and ollama"),
        ({"dtype": "float16"}, "--dtype float16: an adapter is kept in float32; use --quantization"),
    ],
)
def test_what_cannot_be(words: dict[str, Any], line: str, place: Path, tmp_path: Path) -> None:
    name = words.pop("name", "lora")
    run = a_run(place, "gpt2", name)
    with pytest.raises(InputError, match="^" + re.escape(line)):
        export(ExportConfig(**{"out_dir": str(run), "to": str(tmp_path / "m.gguf"), "format": "gguf"} | words))
    assert not any(tmp_path.iterdir())
