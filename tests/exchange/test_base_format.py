"""`--base_format`: a packed base has the logits, the hash and the runs of the dequantised one."""

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from gguf_files import VOCAB, tiny_model, write_gguf
from graftlm.config import EstimateConfig, ExportConfig, TrainConfig
from graftlm.errors import InputError, Interrupted
from graftlm.exchange.base_format import choose_format, dense_hash, dequantize_base, format_note
from graftlm.exchange.export import export
from graftlm.exchange.huggingface import base_hash, load_model, random_weights_model
from graftlm.exchange.load import load
from graftlm.files.gguf import gguf_to_folder
from graftlm.files.gguf_file import KEPT
from graftlm.models import CausalLM
from graftlm.models.packed import FORMATS, packed_weights
from graftlm.studies.cost_report import estimate
from graftlm.training.train import train
from graftlm.training.trainer import Trainer
from tiny import data_folder, fresh_home

CPU = torch.device("cpu")
IDS = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model: CausalLM) -> torch.Tensor:
    """As training computes them: to the bit those of the dequantised weights; without gradient, up to rounding."""
    found = model(IDS).detach()
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS), found, rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize("name", ["llama", "llama tied", "gpt2", "gpt_neox", "phi3", "gemma2", "lfm2"])
def test_blocks_of_a_file_compute_what_the_dequantised_file_computes(name: str, tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q8_0 if name == "phi3" else GGMLQuantizationType.BF16
    write_gguf(tiny_model(name, width=32 if name == "phi3" else None), tmp_path / "m.gguf", kind)
    gguf_to_folder(tmp_path / "m.gguf", tmp_path / "dense")
    gguf_to_folder(tmp_path / "m.gguf", tmp_path / "packed", packed=True)
    assert dense_hash(tmp_path / "packed") == base_hash(tmp_path / "dense") and dense_hash(tmp_path / "dense") is None
    dense = load_model(tmp_path / "dense", CPU, torch.float32)
    packed = load_model(tmp_path / "packed", CPU, torch.float32, "stored")
    assert {weight.format for weight in packed_weights(packed)} == {kind.name.lower()}
    assert torch.equal(logits(packed), logits(dense))
    read_dense = load_model(tmp_path / "packed", CPU, torch.float32)
    assert not packed_weights(read_dense) and torch.equal(logits(read_dense), logits(dense))
    dequantize_base(packed)
    assert not packed_weights(packed) and torch.equal(logits(packed), logits(dense))


def test_every_format_is_kept_and_no_other() -> None:
    assert {name.lower() for name in KEPT} == set(FORMATS)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q8_0"])
def test_a_corrupted_scale_is_one_line(kind: str, tmp_path: Path) -> None:
    write_gguf(tiny_model("qwen3", width=32), tmp_path / "m.gguf", GGMLQuantizationType[kind])
    raw = np.memmap(tmp_path / "m.gguf", mode="r+")
    tensor = next(t for t in GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.ffn_up.weight")
    raw[tensor.data_offset : tensor.data_offset + 2] = (0x80, 0x7F) if kind == "BF16" else (0x00, 0x7C)
    raw.flush()
    with pytest.raises(InputError, match=r"m\.gguf: tensor blk\.0\.ffn_up\.weight holds infinite values"):
        gguf_to_folder(tmp_path / "m.gguf", tmp_path / "out", packed=True)
    for kept in ("auto", "stored"):
        with pytest.raises(InputError, match=r"m\.gguf: tensor blk\.0\.ffn_up\.weight holds infinite values"):
            load(str(tmp_path / "m.gguf"), device="cpu", dtype="float32", base_format=kept)


def test_a_base_in_16_bits_stays_so_and_has_the_same_logits(tmp_path: Path) -> None:
    model = tiny_model("qwen3", width=32)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    dense, stored = (load_model(tmp_path, CPU, torch.float32, kind) for kind in ("dense", "stored"))
    assert {weight.format for weight in packed_weights(stored)} == {"bf16"}
    assert torch.equal(logits(stored), logits(dense))
    assert not packed_weights(load_model(tmp_path, CPU, torch.bfloat16, "stored")), "as it is stored is bfloat16"
    packed = load_model(tmp_path, CPU, torch.float32, "q4_0")
    kinds = {weight.format for weight in packed_weights(packed)}
    assert kinds == {"q4_0", "q8_0"} and "q4_0" in format_note(packed)[0]
    random = random_weights_model(tmp_path, CPU, torch.float32, "q4_0")
    assert [w.data.shape for w in packed_weights(random)] == [w.data.shape for w in packed_weights(packed)]
    held = sum(w.data.nbytes for w in packed_weights(packed)) + sum(p.nbytes for p in packed.parameters())
    flags: dict[str, Any] = {"init_from": str(tmp_path), "rank": 2, "dtype": "float32", "base_format": "q4_0"}
    assert estimate(EstimateConfig(**flags), {"rank"})["bytes"]["frozen"] == held
    with pytest.raises(InputError, match="--method full trains the base's own weights"):
        estimate(EstimateConfig(**flags | {"method": "full", "rank": None}), {"method"})


def test_rows_that_are_no_whole_blocks_are_one_line(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"--base_format q8_0: embed.weight has rows of 24 values, no multiple of 32"):
        load_model(tmp_path, CPU, torch.float32, "q8_0")


def test_auto_is_dense_where_there_is_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("qwen3", width=32).save_pretrained(tmp_path)
    assert choose_format("auto", str(tmp_path), CPU, torch.float32) == "dense"
    monkeypatch.setattr("graftlm.exchange.base_format.free_mb", lambda device: 0.01)
    assert choose_format("auto", str(tmp_path), CPU, torch.float32) == "stored"
    assert choose_format("q8_0", str(tmp_path), CPU, torch.float32) == "q8_0"


def test_auto_is_stored_for_inference_on_a_cpu(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(str(base), device="cpu", dtype="float32")
    assert {weight.format for weight in packed_weights(loaded.model)} == {"q8_0"}
    with torch.inference_mode():
        dense = load(str(base), device="cpu", dtype="float32", base_format="dense").model(IDS)
        torch.testing.assert_close(loaded.model(IDS), dense, rtol=1e-5, atol=1e-5)
    assert not packed_weights(load(str(base), device="cpu", dtype="bfloat16").model)
    write_gguf(tiny_model("qwen3", width=32), tmp_path / "m.gguf", GGMLQuantizationType.F32)
    assert not packed_weights(load(str(tmp_path / "m.gguf"), device="cpu", dtype="float32").model), "float32 is stored"
    monkeypatch.setattr("graftlm.models.packed._library", lambda: None)
    assert not packed_weights(load(str(base), device="cpu", dtype="float32").model), "slow without a compiler"


def run_config(base: Path, data: Path, out_dir: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"rank": 3, "alpha": 30.0, "targets": "q,v,down", "lr": 2e-2, "max_iters": 4}
    settings |= {"eval_every": 2, "batch_size": 4, "dtype": "float32", "device": "cpu", "template": "R: {text}\nA:"}
    settings |= {"init_from": str(base), "data": str(data), "out_dir": str(out_dir), "kernels": "torch"}
    return TrainConfig(**{**settings, **changes})


def losses(out_dir: Path) -> list[float]:
    rows = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFT_HOME", fresh_home(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "m.gguf"
    write_gguf(tiny_model("qwen3", width=32), path, GGMLQuantizationType.Q8_0)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_folder(tmp_path_factory.mktemp("data") / "data", train=24, other=6)


def test_a_run_on_packed_weights_is_the_run_on_dense_ones(base: Path, data: Path, tmp_path: Path) -> None:
    for kind in ("dense", "stored"):
        train(run_config(base, data, tmp_path / kind, base_format=kind))
    assert losses(tmp_path / "stored") == losses(tmp_path / "dense")
    dense, stored = (json.loads((tmp_path / kind / "run.json").read_text()) for kind in ("dense", "stored"))
    assert stored["base"]["format"] == "stored" and stored["base"]["sha256"] != dense["base"]["sha256"]
    assert any("stay packed (8 q8_0)" in note for note in stored["notes"])
    assert not any("packed" in note for note in dense["notes"])
    assert (stored["trainable"], stored["total"]) == (dense["trainable"], dense["total"])
    loaded = {
        (kind, flag): load("resume", tmp_path / kind, device="cpu", dtype="float32", base_format=flag).model
        for kind, flag in [("dense", "auto"), ("dense", "stored"), ("stored", "auto"), ("stored", "dense")]
    }
    assert [bool(packed_weights(model)) for model in loaded.values()] == [False, True, True, False]
    first, *others = map(logits, loaded.values())
    for other in others:  # merged or not
        torch.testing.assert_close(other, first, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"--base_format q4_0: .* was trained with dense; use that, or dense"):
        load("resume", tmp_path / "dense", device="cpu", base_format="q4_0")


def test_a_packed_run_resumes_to_the_same_bits_and_is_exported(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, part = (run_config(base, data, tmp_path / name, base_format="q4_0") for name in ("whole", "part"))
    train(whole)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupted_at(2, patch)
        train(part)
    train(replace(part, resume=True, base_format="auto"))
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    said: list[str] = []
    export(ExportConfig(out_dir=str(tmp_path / "whole"), to=str(tmp_path / "model"), format="merged"), said.append)
    assert any("q4_0" in line and "merged into the dequantised weights" in line for line in said)
    merged = load(str(tmp_path / "model"), device="cpu", dtype="float32").model
    run = load("resume", tmp_path / "whole", device="cpu", dtype="float32").model
    torch.testing.assert_close(logits(merged), logits(run), rtol=1e-4, atol=1e-4)


def test_full_fine_tuning_refuses_a_packed_base(base: Path, data: Path, tmp_path: Path) -> None:
    full: dict[str, Any] = {"rank": 0, "targets": None, "alpha": None, "method": "full"}
    with pytest.raises(InputError, match="--base_format stored with --method full: trains the base's own weights"):
        train(run_config(base, data, tmp_path / "run", base_format="stored", **full))
    assert not (tmp_path / "run").exists()


def interrupted_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C come in this step."""
    real = Trainer.train_step

    def train_step(self: Any, now: int, batches: Any) -> Any:
        if now == step:
            signal.raise_signal(signal.SIGINT)
        return real(self, now, batches)

    patch.setattr(Trainer, "train_step", train_step)
