"""Models of transformers, written as .gguf files and read back: the same weights, settings and logits."""

from pathlib import Path

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType

from gguf_files import CASES, VOCAB, tiny_model, write_gguf
from graftlm.files.formats import load_safetensors, read_json
from graftlm.files.gguf import gguf_to_folder
from graftlm.models.config import FAMILIES, read_model_config


@pytest.mark.parametrize("name", CASES)
def test_a_file_gives_the_model_it_was_written_from(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "model")
    write_gguf(model, tmp_path / "m.gguf")
    gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    weights, found = (load_safetensors(tmp_path / folder / "model.safetensors") for folder in ("model", "out"))
    assert weights.keys() == found.keys()
    for tensor, values in found.items():  # of norms 1 is added and taken away again
        assert torch.allclose(values, weights[tensor], rtol=0, atol=2e-7), tensor
    config = read_json(tmp_path / "out" / "config.json")
    if any(config["model_type"] in family.model_types for family in FAMILIES.values()):
        ours = read_model_config(read_json(tmp_path / "model" / "config.json"), "model")
        assert read_model_config(config, "file") == ours
    ids = torch.randint(0, VOCAB, (2, 40), generator=torch.Generator().manual_seed(1))
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        expected, logits = model(ids).logits, read(ids).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["llama tied", "qwen2", "gemma2", "gemma3", "phi3", "starcoder2", "stablelm"])
def test_transformers_reads_the_same_weights_in_the_file(name: str, tmp_path: Path) -> None:
    write_gguf(tiny_model(name), tmp_path / "m.gguf", change=lambda writer: writer.add_pad_token_id(0))
    gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").state_dict()
    for tensor, values in load_safetensors(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(values, theirs[tensor]), tensor


def test_quantised_matrices_are_within_the_types_error(tmp_path: Path) -> None:
    model = tiny_model("qwen3", width=32)
    model.save_pretrained(tmp_path / "model")
    write_gguf(model, tmp_path / "m.gguf", GGMLQuantizationType.Q8_0)
    gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out")
    weights, found = (load_safetensors(tmp_path / folder / "model.safetensors") for folder in ("model", "out"))
    for tensor, values in found.items():
        step = weights[tensor].abs().max() / 127
        assert (values - weights[tensor]).abs().max() <= (0.51 * step if values.dim() == 2 else 0), tensor
