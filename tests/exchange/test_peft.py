"""PEFT loads our folders, and its logits equal ours: GPT-2 with its fused c_attn, and the Llama family."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

from graftlm.errors import InputError
from graftlm.exchange.huggingface import load_model
from graftlm.exchange.peft import read_adapter, save_adapter
from graftlm.methods.base import delta_state, trainable
from graftlm.methods.lora import LoRA
from tiny import FAMILIES, model_folder

TARGETS = {
    "gpt2": [
        ("q", "k", "v"),
        ("q", "v"),
        ("k",),
        ("q", "v", "o"),
        ("o",),
        ("down", "up"),
        ("q", "k", "v", "o", "up", "down"),
    ],
    "llama": [("q", "k", "v"), ("q", "v"), ("o", "gate", "down")],
    "llama-biased": [("q", "k", "v"), ("v", "up")],
}


# PEFT reads an attribute that the newest transformers has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", FAMILIES)
def test_peft_computes_what_we_compute(kind: str, tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", kind)
    ids = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    spans = [None] * len(TARGETS[kind]) + [(1, 2), (0, 1)]
    for n, (targets, span) in enumerate(zip(TARGETS[kind] + TARGETS[kind][:2], spans, strict=True)):
        method = LoRA(rank=3, alpha=7.0, targets=targets, dropout=0.0, layers=span)
        model = load_model(base, torch.device("cpu"), torch.float32)
        method.install(model, torch.Generator().manual_seed(1))
        with torch.no_grad():
            for p in trainable(model).values():
                p.normal_(std=0.2, generator=torch.Generator().manual_seed(n))
        folder = tmp_path / f"adapter-{n}"
        folder.mkdir()
        save_adapter(folder, model.shape, method, delta_state(model), str(base))
        reference = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        plain = reference(ids).logits
        adapted = peft.PeftModel.from_pretrained(reference, folder).eval()
        with torch.no_grad():
            expected = adapted(ids).logits
            assert (expected - plain).abs().max() > 0.1, "an adapter that does nothing proves nothing"
            assert (model.train()(ids) - expected).abs().max() <= 1e-4
            assert (model.eval()(ids) - expected).abs().max() <= 1e-4


def test_the_files_hold_what_the_format_says(tmp_path: Path) -> None:
    from safetensors import safe_open

    base = model_folder(tmp_path / "base", "gpt2")
    model = load_model(base, torch.device("cpu"), torch.float32)
    method = LoRA(rank=3, alpha=7.0)
    method.install(model, torch.Generator())
    save_adapter(tmp_path, model.shape, method, delta_state(model), "some/base", "abc")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 9,
        "lora_alpha": 21.0,
        "target_modules": ["attn.c_attn"],
        "fan_in_fan_out": True,
        "bias": "none",
        "lora_dropout": 0.05,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "base_model_name_or_path": "some/base",
        "revision": "abc",
    }
    assert {key: config[key] for key in expected} == expected
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
        key = "base_model.model.transformer.h.1.attn.c_attn.lora_"
        assert f.get_tensor(f"{key}A.weight").shape == (9, 32) and f.get_tensor(f"{key}B.weight").shape == (96, 9)


def test_a_folder_of_another_adapter_is_refused(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base", "llama")
    model = load_model(base, torch.device("cpu"), torch.float32)
    method = LoRA(rank=3, alpha=7.0)
    method.install(model, torch.Generator())
    save_adapter(tmp_path, model.shape, method, delta_state(model), "base")
    read_adapter(tmp_path, model.shape, method)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for key, value in {"use_dora": True, "lora_alpha": 8, "peft_type": "IA3"}.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(InputError, match=f"adapter_config.json: {key} is {value!r}, the run says"):
            read_adapter(tmp_path, model.shape, method)
