"""`best/` of a run, as it lies there, is what PEFT loads: real weights of SmolLM2, and GPT-2 with its fused c_attn."""

from pathlib import Path

import peft
import pytest
import torch
import transformers

from graftlm.config import TrainConfig
from graftlm.exchange.load import load
from graftlm.files import assets
from graftlm.training.train import train
from tiny import TEMPLATE, data_folder, model_folder


@pytest.fixture(params=["smollm2-135m", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    name: str = request.param
    return model_folder(tmp_path / name, name) if name == "gpt2" else assets.model_folder(name)


# PEFT reads an attribute that the newest transformers has renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_peft_loads_best_of_a_run(base: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "run", data_folder(tmp_path / "data", train=16, other=4)
    train(
        TrainConfig(
            init_from=str(base),
            data=str(data),
            out_dir=str(out),
            template=TEMPLATE,
            rank=8,
            alpha=32.0,
            lr=1e-2,
            max_iters=3,
            batch_size=4,
            dtype="float32",
            device="cpu",
        )
    )
    ours = load("resume", out, "best", device="cpu", dtype="float32")
    ids = torch.tensor([ours.tokenizer.encode("Review: a fine film, and good fun\nIs it:")])
    reference = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        plain = reference(ids).logits
        expected = peft.PeftModel.from_pretrained(reference, out / "best").eval()(ids).logits
        assert (expected - plain).abs().max() > 1e-2, "an adapter that does nothing proves nothing"
        assert (ours.model(ids) - expected).abs().max() <= 1e-4
