"""One run in several processes: what it comes to beside one process, how it stops and goes on, what it refuses.

Launches are few, since each takes seconds: processes are started by torchrun on loopback, with gloo.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graftlm.cli import run
from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.files.formats import load_safetensors
from graftlm.training.distributed import World, buckets, from_environment
from graftlm.training.prepare import prepare
from graftlm.training.train import train
from tiny import TEMPLATE, data_folder, model_folder

STOPPER = """
import signal, sys
from graftlm.__main__ import main
from graftlm.training.train import Trainer
rank, at = int(sys.argv.pop(1)), int(sys.argv.pop(1))
step = Trainer._step
def stopped(self, number, batches):
    if number == at and self.world.rank == rank:
        signal.raise_signal(signal.SIGTERM)
    return step(self, number, batches)
Trainer._step = stopped
sys.exit(main())
"""
PLAIN = {
    "template": TEMPLATE,
    "alpha": 16.0,
    "lr": 3e-3,
    "max_iters": 20,
    "eval_every": 10,
    "batch_size": 5,  # 48 examples: the last batch of an epoch has 3, and a process's share of it 1 or 2
    "grad_accum": 2,
    "lora_dropout": 0.0,
    "dtype": "float32",
    "device": "cpu",
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    model_folder(folder / "model")
    data_folder(folder / "data")
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(assets: Path, out_dir: Path, **changes: Any) -> dict[str, Any]:
    return {
        **PLAIN,
        "init_from": str(assets / "model"),
        "data": str(assets / "data"),
        "out_dir": str(out_dir),
        **changes,
    }


def torchrun(what: list[str], **flags: Any) -> subprocess.CompletedProcess[str]:
    """`graft train` in two processes; `what` is the module or the script that torchrun starts."""
    words = [word for name, value in flags.items() for word in (f"--{name}", *([] if value is True else [str(value)]))]
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *meet, *what, "train", *words]
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": source}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def rows(out_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def check_same(one: Path, several: Path, weights: str) -> None:
    """The same rows and the same tensors, to rounding."""
    a, b = rows(one), rows(several)
    assert [row["step"] for row in a] == [row["step"] for row in b] == list(range(1, 21))
    for x, y in zip(a, b, strict=True):
        assert (x["examples"], x["tokens"], x["lr"]) == (y["examples"], y["tokens"], y["lr"])
        assert y["train_loss"] == pytest.approx(x["train_loss"], rel=1e-6)
        assert (y["val_loss"] is None) == (x["val_loss"] is None)
        if x["val_loss"] is not None:
            assert y["val_loss"] == pytest.approx(x["val_loss"], rel=1e-6) and y["val_accuracy"] == x["val_accuracy"]
    assert a[0]["train_loss"] > 1.2 * a[-1]["train_loss"]  # it has learned: weights and moments matter
    ours, theirs = (load_safetensors(run / "last" / weights) for run in (one, several))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-5)
    moments = [load_safetensors(run / "last" / "optimizer.safetensors") for run in (one, several)]
    assert {k: t.shape for k, t in moments[0].items()} == {k: t.shape for k, t in moments[1].items()}
    assert {p.name for p in (one / "last").iterdir()} == {p.name for p in (several / "last").iterdir()}


def test_two_processes_train_an_adapter_as_one_does(assets: Path, tmp_path: Path) -> None:
    train(TrainConfig(**settings(assets, tmp_path / "one", rank=4)))
    done = torchrun(["-m", "graftlm"], **settings(assets, tmp_path / "two", rank=4), json=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)  # one object: the others say nothing
    assert results["processes"]["size"] == 2 and len(results["processes"]["peak_rss_mb"]) == 2
    assert results["processes"]["bytes_sent"] > 20 * results["trainable"] * 4
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == {"size": 2, "backend": "gloo"}
    assert done.stderr.count("step    20  train loss") == 1
    check_same(tmp_path / "one", tmp_path / "two", "adapter_model.safetensors")


def test_sharded_weights_train_as_whole_ones_and_go_on_in_another_number_of_processes(
    assets: Path, tmp_path: Path
) -> None:
    """Full fine-tuning: two processes up to step 7, then one, and from step 14 on two again."""
    train(TrainConfig(**settings(assets, tmp_path / "one", rank=0)))
    script, out = tmp_path / "stopper.py", tmp_path / "several"
    script.write_text(STOPPER)
    first = torchrun([str(script), "1", "7"], **settings(assets, out, rank=0))
    assert first.returncode != 0 and len(rows(out)) == 7
    assert [line for line in first.stderr.splitlines() if line.startswith("graft:")] == [
        f"graft: interrupted; step 7 is saved in {out / 'last'}: go on with graft train --resume --out_dir {out}"
    ]
    alone = [sys.executable, str(script), "0", "14", "train", "--resume", "--out_dir", str(out)]
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    second = subprocess.run(alone, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert second.returncode == 130 and len(rows(out)) == 14
    third = torchrun(["-m", "graftlm"], resume=True, out_dir=out)
    assert third.returncode == 0, third.stderr
    check_same(tmp_path / "one", out, "model.safetensors")
    one, two = {"size": 1, "backend": None}, {"size": 2, "backend": "gloo"}
    changes = json.loads((out / "run.json").read_text())["resumed"]
    assert [change["processes"] for change in changes] == [[two, one], [one, two]]


def test_what_is_wrong_for_all_processes_is_told_once(assets: Path, tmp_path: Path) -> None:
    done = torchrun(["-m", "graftlm"], **settings(assets, tmp_path / "run", rank=0, train_layers="1:"))
    said = [line for line in done.stderr.splitlines() if line.startswith("graft:")]
    assert done.returncode != 0 and len(said) == 1 and "--train_layers 1:" in said[0] and "torchrun" in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 16, 33])
def test_shares_are_complete_and_balanced(size: int, count: int) -> None:
    lengths = [(7 * i) % 41 + 5 for i in range(100)]
    batch = [(13 * i) % 100 for i in range(count)]
    shares = [World(rank, size).share(batch, lengths) for rank in range(size)]
    assert sorted(row for share in shares for row in share) == sorted(batch)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    work = [sum(lengths[row] for row in share) for share in shares]
    assert max(work) - min(work) <= 2 * max(lengths[row] for row in batch)
    assert World().share(batch, lengths) == batch


def test_buckets_hold_every_parameter_once() -> None:
    params = [nn.Parameter(torch.zeros(n)) for n in (4, 4, 4, 20, 1)]
    params.insert(2, nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    made = buckets(params, most=8)
    assert [p for bucket in made for p in bucket] == params
    assert [[p.numel() for p in bucket] for bucket in made] == [[4, 4], [3], [4], [20], [1]]


def test_alone_nothing_is_sent() -> None:
    world = from_environment({})
    assert world.size == 1 and world.first and world.sum([1, 2.5]) == [1, 2.5] and world.tell({"a": 1}) == {"a": 1}
    world.agree(None)
    with pytest.raises(InputError, match="no such"), world.alike():
        raise InputError("no such")
    assert world.sent == 0


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x: is no number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "ranks are 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-"}, "LOCAL_RANK=-: is no number"),
    ],
)
def test_an_environment_that_torchrun_does_not_make(environment: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        from_environment(environment)


def test_verbs_that_run_in_one_process_say_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, told in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert run(["evaluate"]) == 2
        assert capsys.readouterr().err.count("graft evaluate: only graft train runs in several processes") == told


def test_what_cut_weights_do_not_allow(assets: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for split in ("train", "validation", "test"):
        (pairs / f"{split}.jsonl").write_text('{"prompt": "Say:", "chosen": " yes", "rejected": " no"}\n')
    plain = settings(assets, tmp_path / "run", rank=0)
    for changes, said in (
        ({"train_layers": "1:"}, "--train_layers 1:"),
        ({"data": str(pairs), "objective": "dpo", "kl_samples": 4}, "--kl_samples 4"),
    ):
        with pytest.raises(InputError, match=said):
            prepare(TrainConfig(**{**plain, **changes}), world=World(0, 2, backend="gloo"))


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="--device mps: in several processes"):
        World.start("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="2 processes on a machine with 1 GPU") as caught:
        World.start("auto")
    assert caught.value.told  # process 0 prints it
