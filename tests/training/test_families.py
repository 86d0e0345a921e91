"""Every model type through the commands: estimated, trained, resumed, evaluated, generated with and served."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from family_cases import CASES, base_folder, config_of
from graftlm.config import EstimateConfig, TrainConfig
from graftlm.errors import Interrupted
from graftlm.exchange.huggingface import save_adapter
from graftlm.exchange.load import ModelBundle, load
from graftlm.files.formats import read_json
from graftlm.inference.engine import Engine
from graftlm.inference.evaluate import evaluate
from graftlm.inference.generate import generate
from graftlm.inference.requests import Request
from graftlm.inference.sampling import SamplingParams
from graftlm.methods import LoRA
from graftlm.methods.base import trainable
from graftlm.studies.cost_report import estimate
from graftlm.text.collate import encode_rows
from graftlm.text.dataset import load_dataset
from graftlm.training import train as train_module
from graftlm.training import trainer as trainer_module
from graftlm.training.estimate import Estimate
from graftlm.training.train import train
from tiny import data_folder

MODEL_TYPES = {config_of(case).model_type: case for case in reversed(CASES)}
"""Model type -> its first case."""
EACH_KIND = ("gpt2", "gemma3", "gpt-oss", "lfm2", "phi3", "qwen3 moe")
"""One of each kind of block: plain, with norms on both sides, experts, short convolutions, fused weights. What is
resumed, and what autograd saves, depends on nothing else of a model type."""
PROMPTS = ["good fun", "Review: dull\nIs it:"]
SHORT = "R: {text}\nA:"
"""The contexts of the cases are short."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_folder(tmp_path_factory.mktemp("families") / "data", train=24, other=6)


def config(plain: ModelBundle, data: Path, out_dir: Path, **changes: Any) -> TrainConfig:
    targets = ",".join(plain.model.config.roles)
    settings: dict[str, Any] = {"rank": 2, "alpha": 8.0, "targets": targets, "lr": 2e-2, "template": SHORT}
    settings |= {"max_iters": 3, "eval_every": 2, "batch_size": 8, "dtype": "float32", "device": "cpu"}
    return TrainConfig(
        init_from=plain.name, data=str(data), out_dir=str(out_dir), kernels="torch", **{**settings, **changes}
    )


def random_adapter(base: Path, folder: Path) -> ModelBundle:
    """The base with a LoRA of q and v with random values, which the folder gets."""
    loaded, method = load(str(base), device="cpu", dtype="float32"), LoRA(rank=3, alpha=30.0, targets=("q", "v"))
    method.install(loaded.model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in trainable(loaded.model).values():
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    folder.mkdir()
    save_adapter(folder, loaded.model, method, str(base))
    return loaded


def interrupted_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Let Ctrl-C come in this step."""
    real = trainer_module.Trainer.train_step

    def train_step(self: Any, now: int, batches: Any) -> Any:
        if now == step:
            signal.raise_signal(signal.SIGINT)
        return real(self, now, batches)

    patch.setattr(trainer_module.Trainer, "train_step", train_step)


def test_planned_where_the_last_block_is_frozen(data: Path, tmp_path: Path) -> None:
    """LoRA of q, k and v leaves convolutions as they are; gradients flow through those above."""
    base_folder(tmp_path / "base", "lfm2")
    plain = load(str(tmp_path / "base"), device="cpu", dtype="float32")
    assert train(config(plain, data, tmp_path / "run", targets="q,k,v"))["last"]["step"] == 3


@pytest.mark.parametrize("case", MODEL_TYPES.values(), ids=list(MODEL_TYPES))
def test_estimated_trained_resumed_evaluated_and_served(
    case: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, whole, parts = base_folder(tmp_path / "base", case), tmp_path / "whole", tmp_path / "parts"
    plain = load(str(base), device="cpu", dtype="float32")
    step = {"batch_size": 4} if case in EACH_KIND else {}
    counted = estimate(EstimateConfig(init_from=str(base), rank=2, **step), {"rank", *step})
    assert counted["total"] - counted["trainable"] == sum(p.numel() for p in plain.model.parameters())
    assert train(config(plain, data, whole))["last"]["step"] == 3
    planned = read_json(whole / "run.json")["plan"]
    assert planned["minutes"] > 0
    if case in EACH_KIND:
        assert counted["step"]["activation_bytes"] > 0
        plan = Estimate(**planned)
        monkeypatch.setattr(train_module, "make_plan", lambda *args, **kwargs: plan)  # once is enough
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match="step 2 is saved in"):
            interrupted_at(2, patch)
            train(config(plain, data, parts))
        train(config(plain, data, parts, resume=True))
        for file in ("best/adapter_model.safetensors", "last/adapter_model.safetensors"):
            assert (whole / file).read_bytes() == (parts / file).read_bytes()

    loaded = load("resume", whole, device="cpu", dtype="float32")
    assert loaded.template is not None
    rows = load_dataset(str(data)).splits["test"]
    examples, _ = encode_rows(rows, loaded.template, loaded.tokenizer, loaded.model.max_seq_len)
    found = evaluate(loaded.model, loaded.tokenizer, loaded.template, examples, mode="score")
    assert len(found.rows) == len(rows) and {row["predicted"] for row in found.rows} <= {0, 1}

    models: dict[str | None, ModelBundle] = {
        None: plain,
        "run": loaded,
        "other": random_adapter(base, tmp_path / "other"),
    }
    params = SamplingParams(max_new_tokens=8, temperature=1.0, seed=1)
    texts = {
        name: [generate(m.model, m.tokenizer, [text], params)[0] for text in PROMPTS] for name, m in models.items()
    }
    assert len({str(text) for text in texts.values()}) == 3, "adapters that say the same prove nothing"
    engine = Engine(plain, {"run": whole, "other": tmp_path / "other"})
    try:
        prompts = [tuple(plain.tokenizer.encode(text)) for text in PROMPTS]
        asked = {name: [engine.submit(Request(prompt, params, name)) for prompt in prompts] for name in models}
        for name, handles in asked.items():
            assert [handle.done.result(60).text for handle in handles] == texts[name]
    finally:
        engine.close()
