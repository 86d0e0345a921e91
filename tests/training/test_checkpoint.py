"""Checkpoints by themselves: what a run begins with, what several processes write, and what is not this run's."""

import json
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graftlm.errors import InputError
from graftlm.exchange.huggingface import load_model
from graftlm.exchange.load import load
from graftlm.files.formats import load_safetensors, save_safetensors
from graftlm.methods import Full, LoRA, Method, PrefixTuning
from graftlm.methods.base import trainable
from graftlm.models import CausalLM
from graftlm.training.checkpoint import OPTIMIZER, TRAINABLE, CheckpointManager, TrainState
from graftlm.training.distributed import DistContext
from graftlm.training.reporting import truncate_metrics
from tiny import model_folder


@dataclass
class Threads(DistContext):
    """Processes that are threads: what each says is laid on one table, and none goes on before all have."""

    table: list[Any] = field(default_factory=list)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def all_gather(self, numbers: Any) -> list[Any]:
        return self._all(list(numbers))

    def broadcast_object(self, said: Any) -> Any:
        return self._all(said)[0]

    def _all(self, said: Any) -> list[Any]:
        self.table[self.rank] = json.dumps(said)
        self.barrier.wait(30)
        found = [json.loads(each) for each in self.table]
        self.barrier.wait(30)
        return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("checkpoint") / "base", "gpt2")


def trained(base: Path, method: Method, steps: int = 1) -> tuple[CausalLM, torch.optim.Optimizer]:
    """A model that AdamW has moved, by gradients of no meaning."""
    model = load_model(base, torch.device("cpu"), torch.float32)
    method.install(model, torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1)
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in trainable(model).values():
            p.grad = torch.randn(p.shape, generator=rng)
        optimizer.step()
    return model, optimizer


def store(base: Path, out: Path, method: Method, world: DistContext | None = None) -> CheckpointManager:
    return CheckpointManager(out, method, str(base), None, load(str(base), device="cpu"), dist=world or DistContext())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [optimizer.state[p][m] for p in trainable(model).values() for m in ("exp_avg", "exp_avg_sq", "step")]
    return [*trainable(model).values(), *moments]


def test_a_run_begins_with_nothing_done() -> None:
    said = asdict(TrainState())
    assert said.pop("last") == said.pop("best") == {} and said.pop("loss_scale") == 1.0
    assert set(said.values()) == {0}


@pytest.mark.parametrize("method", [LoRA(rank=2, alpha=4.0), PrefixTuning(length=3, hidden=4), Full()])
def test_what_was_saved_is_restored_to_the_bit(base: Path, tmp_path: Path, method: Method) -> None:
    """Prefix tuning's adapter holds what its net comes to; the net itself stands beside it."""
    model, optimizer = trained(base, method, steps=3)
    kept = store(base, tmp_path, method)
    folder = kept.save(model, optimizer, TrainState(step=3, skipped=0))
    assert (folder / TRAINABLE).exists() == isinstance(method, PrefixTuning)
    again, other = trained(base, method, steps=0)
    assert kept.load_checkpoint(again, other) == TrainState(step=3)
    assert all(torch.equal(a, b) for a, b in zip(state(again, other), state(model, optimizer), strict=True))


def test_skipped_steps_moved_no_moment(base: Path, tmp_path: Path) -> None:
    method = LoRA(rank=2, alpha=4.0)
    model, optimizer = trained(base, method)
    store(base, tmp_path, method).save(model, optimizer, TrainState(step=5, skipped=2))
    store(base, tmp_path, method).load_checkpoint(model, optimizer)
    assert {optimizer.state[p]["step"].item() for p in trainable(model).values()} == {3.0}


@pytest.mark.parametrize("change", ["missing", "another shape"])
def test_moments_of_another_run_are_refused(base: Path, tmp_path: Path, change: str) -> None:
    method = LoRA(rank=2, alpha=4.0)
    model, optimizer = trained(base, method)
    folder = store(base, tmp_path, method).save(model, optimizer, TrainState(step=1))
    moments = load_safetensors(folder / OPTIMIZER)
    name = next(iter(moments))
    moments[name] = moments[name][:1]
    if change == "missing":
        del moments[name]
    save_safetensors(folder / OPTIMIZER, moments)
    with pytest.raises(InputError, match="is missing or has another shape; this checkpoint is of another run"):
        store(base, tmp_path, method).load_checkpoint(model, optimizer)


def test_several_processes_write_what_one_would_have(base: Path, tmp_path: Path) -> None:
    """Each its part, with an index, until `join`; then the same files, to the byte."""
    one = store(base, tmp_path / "one", Full())
    one.save(*trained(base, Full()), TrainState(step=1))
    table, barrier, left = [""] * 3, threading.Barrier(3), list[Path]()

    def process(rank: int) -> None:
        world = Threads(rank=rank, size=3, backend="gloo", table=table, barrier=barrier)
        mine = store(base, tmp_path / "three", Full(), world)
        assert mine.writes_sharded
        folder = mine.save(*trained(base, Full()), TrainState(step=1))
        if rank == 0:
            left.extend(sorted(folder.glob("*.safetensors")))
        mine.consolidate()

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(left) == 6 and (tmp_path / "three" / "last" / "trainer_state.json").is_file()
    assert files(tmp_path / "three" / "last") == files(tmp_path / "one" / "last")


def test_an_adapter_is_whole_in_every_process_and_written_by_one(base: Path, tmp_path: Path) -> None:
    two = DistContext(size=2, backend="gloo")
    assert store(base, tmp_path, Full(), two).writes_sharded and not store(base, tmp_path, Full()).writes_sharded
    assert not store(base, tmp_path, LoRA(rank=2, alpha=4.0), two).writes_sharded


def test_rows_behind_the_step_and_half_a_line_are_cut(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    truncate_metrics(file, 2)  # there is none yet
    assert not file.exists()
    lines = [json.dumps({"step": step}) + "\n" for step in (1, 2, 3)]
    file.write_text("".join(lines) + '{"step": 1, "tra')
    truncate_metrics(file, 2)
    assert file.read_text() == "".join(lines[:2])
