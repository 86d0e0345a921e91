"""When a run goes over to compiled kernels, what it records of it, and what becomes of it without a compiler."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.files.formats import load_safetensors
from graftlm.models.fused_ops import CppKernels
from graftlm.training import trainer as trainer_module
from graftlm.training.train import FIRST_STEPS, KernelSwitch, train
from tiny import TEMPLATE, data_folder, model_folder

CPU = torch.device("cpu")
LONG = TrainConfig(max_iters=100)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    model_folder(folder / "model")
    data_folder(folder / "data")
    return folder


def config(assets: Path, out_dir: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "init_from": str(assets / "model"),
            "data": str(assets / "data"),
            "out_dir": str(out_dir),
            "template": TEMPLATE,
            "rank": 4,
            "max_iters": 14,
            "eval_every": 7,
            "batch_size": 8,
            "dtype": "float32",
            "device": "cpu",
            **changes,
        }
    )


def recorded(out_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out_dir / "run.json").read_text())["cpp_kernels"]
    return found


def test_what_each_mode_comes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def decide(mode: Any, device: torch.device = CPU, **changes: Any) -> KernelSwitch:
        return KernelSwitch.decide(replace(LONG, kernels=mode, **changes), device)

    assert decide("auto") == KernelSwitch(FIRST_STEPS + 1, "the same gradients in less time")
    assert decide("auto", max_iters=FIRST_STEPS) == KernelSwitch(None, "not for 10 steps or fewer")
    assert decide("auto", max_iters=FIRST_STEPS + 1).start_step == FIRST_STEPS + 1
    assert decide("cpp", max_iters=1) == KernelSwitch(1, "--kernels cpp")
    assert decide("torch") == KernelSwitch(None, "--kernels torch")
    cuda = torch.device("cuda")
    why = "kernels are compiled for the CPU, and this run is on cuda"
    assert decide("auto", cuda) == KernelSwitch(None, why)
    with pytest.raises(InputError, match=f"^--kernels cpp: {why}: leave it out, or use --kernels torch$"):
        decide("cpp", cuda)
    assert decide("auto", fused=False).start_step is None
    with pytest.raises(InputError, match=r"^--kernels cpp: --fused is off"):
        decide("cpp", fused=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert decide("auto") == KernelSwitch(None, "no C++ compiler is found (no-such-compiler)")
    with pytest.raises(InputError, match=r"^--kernels cpp: no C\+\+ compiler is found \(no-such-compiler\): leave it"):
        decide("cpp")


def test_a_run_switches_at_the_step_it_recorded(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[bool] = []
    step = trainer_module.Trainer.train_step

    def watched(self: Any, number: int, batches: Any) -> Any:
        used.append(isinstance(self.model.kernels, CppKernels))
        return step(self, number, batches)

    monkeypatch.setattr(trainer_module.Trainer, "train_step", watched)
    tensors = {}
    for mode, expected in (("auto", [False] * 10 + [True] * 4), ("cpp", [True] * 14), ("torch", [False] * 14)):
        used.clear()
        train(config(assets, tmp_path / mode, kernels=mode))
        assert used == expected
        tensors[mode] = load_safetensors(tmp_path / mode / "last" / "adapter_model.safetensors")
    assert recorded(tmp_path / "auto")["start_step"] == 11 and recorded(tmp_path / "torch")["start_step"] is None
    # Dropout is on: the masks, too, are the same, and only the rounding differs.
    for mode in ("auto", "cpp"):
        for key, tensor in tensors["torch"].items():
            torch.testing.assert_close(tensors[mode][key], tensor, rtol=0, atol=2e-5)


def test_a_resumed_run_keeps_to_it_and_needs_the_compiler(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(assets, tmp_path / "run"))
    longer = config(assets, tmp_path / "run", resume=True, max_iters=16)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"run: computes with compiled kernels from step 11 on, and no C\+\+ compiler"):
        train(longer, given={"resume", "max_iters"})
    assert (tmp_path / "run" / "last").resolve().name == "step-14"
    monkeypatch.delenv("CXX")
    assert train(longer, given={"resume", "max_iters"})["steps"] == 16


def test_a_compiler_that_fails_beside_the_first_steps(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path / "home"))
    said = Console(file=io.StringIO(), width=200)
    monkeypatch.setenv("CXX", "no-such-compiler")
    train(config(assets, tmp_path / "none"), console=said)
    assert "not compiled: no C++ compiler is found (no-such-compiler)\n" in said.file.getvalue()  # type: ignore[attr-defined]
    monkeypatch.setenv("CXX", "false")  # is found, and compiles nothing
    with pytest.raises(InputError, match=r"computes with compiled kernels from step 1 on, and the C\+\+ compiler"):
        train(config(assets, tmp_path / "cpp", kernels="cpp"))
    assert not (tmp_path / "cpp").exists()
    train(config(assets, tmp_path / "auto"))
    assert recorded(tmp_path / "auto")["start_step"] is None
    assert "the C++ compiler" in recorded(tmp_path / "auto")["reason"]
    train(config(assets, tmp_path / "torch", kernels="torch"))
    ends = [load_safetensors(tmp_path / mode / "last" / "adapter_model.safetensors") for mode in ("auto", "torch")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[1])
