"""One run in several processes: what it comes to beside one process, how it stops and goes on, what it refuses.

All commands of several processes are given in one start of torchrun (`jobs.py`), on loopback, with gloo: a start takes
seconds.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from family_cases import base_folder
from graftlm.cli import run
from graftlm.config import TrainConfig
from graftlm.errors import InputError, Interrupted
from graftlm.files.formats import load_safetensors, read_weights
from graftlm.training import train as train_module
from graftlm.training.distributed import DistContext, buckets, from_environment
from graftlm.training.setup import prepare
from graftlm.training.train import train
from graftlm.training.trainer import Trainer
from jobs import unplanned
from tiny import TEMPLATE, data_folder, model_folder

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
SHORT = {"max_iters": 2, "eval_every": 1}
METHODS: dict[str, dict[str, Any]] = {
    "dora": {"method": "dora", "rank": 4},
    "adapter": {"method": "adapter", "rank": 4, "alpha": None},
    "bitfit": {"method": "bitfit", "alpha": None},
    "ia3": {"method": "ia3", "alpha": None},
    "prefix": {"method": "prefix", "prefix_length": 4, "prefix_hidden": 8, "alpha": None},
    "span": {"rank": 4, "train_layers": "1:"},
    "pairs": {"rank": 4, "objective": "dpo", "kl_samples": 3},
}
"""Of an adapter whose base is cut over the processes, each for a few steps."""
WATCHED = ("straight", "bfloat16", "shard", *METHODS)
"""Jobs of which the memory is looked at."""
FEW: dict[str, dict[str, Any]] = {
    "one to validate": {"rank": 4, "val_limit": 1},
    "one to validate, all weights cut": {"rank": 0, "val_limit": 1},
    "one pair to validate": {"rank": 4, "objective": "dpo", "kl_samples": 3, "val_limit": 1},
}
"""Validation splits of fewer examples than processes: one process has nothing to evaluate."""


FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": {"rank": 0},
    "gpt-oss": {"rank": 4, "shard": True},
    "lfm2": {"rank": 0},
    "phi3 longrope": {"rank": 4, "shard": True},
    "qwen3 moe": {"rank": 0},
}
"""Files with windows, experts in one tensor, convolutions, fused linears with permuted heads, and single experts."""


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    model_folder(folder / "model")
    model_folder(folder / "gpt2", "gpt2", layers=3)  # files that hold q, k and v as one, and transposed
    for case in FAMILIES:
        base_folder(folder / case, case)
    data_folder(folder / "data")
    (folder / "pairs").mkdir()
    for split, count in (("train", 14), ("validation", 5), ("test", 5)):
        rows = [{"prompt": f"Say {i}:", "chosen": " yes" + "!" * (i % 3), "rejected": " no"} for i in range(count)]
        (folder / "pairs" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(autouse=True)
def no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "make_plan", unplanned)


def settings(assets: Path, out_dir: Path, **changes: Any) -> dict[str, Any]:
    pairs = changes.get("objective") == "dpo"
    return {
        **PLAIN,
        "init_from": str(assets / changes.pop("base", "model")),
        "data": str(assets / ("pairs" if pairs else "data")),
        "out_dir": str(out_dir),
        **changes,
    }


def words(**flags: Any) -> list[str]:
    """`graft train` with these flags."""
    given = {name: value for name, value in flags.items() if value is not None}
    return ["train", *(f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items())]


def one_process(assets: Path, out_dir: Path, **changes: Any) -> Path:
    train(TrainConfig(**settings(assets, out_dir, **changes)))
    return out_dir


def stopped(step: int, config: TrainConfig) -> None:
    """Train in this process until SIGTERM comes in that step."""
    plain = Trainer.train_step

    def signalled(self: Trainer, number: int, batches: list[list[int]]) -> Any:
        if number == step:
            signal.raise_signal(signal.SIGTERM)
        return plain(self, number, batches)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "train_step", signalled)
        train(config)


@pytest.fixture(scope="module")
def place(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def several(assets: Path, place: Path) -> list[dict[str, Any]]:
    """What both processes say of all jobs, by their names."""
    jobs: dict[str, dict[str, Any]] = {}

    def job(
        name: str, stop: int | None = None, copy: str = "", plan: bool = False, full: bool = False, **flags: Any
    ) -> None:
        from_where = [str(place / copy), str(place / name)] if copy else None
        made = words(**flags) if flags.get("resume") else words(**settings(assets, place / name, **flags))
        jobs[name] = {"words": [*made, "--json"], "plan": plan, "stop": stop, "copy": from_where, "full": full}
        jobs[name]["watch"] = name in WATCHED

    stopped(7, TrainConfig(**settings(assets, place / "full", rank=0)))
    job("lora", rank=4)
    job("shard", plan=True, rank=4, base="gpt2", shard=True)
    job("full", stop=14, resume=True, out_dir=place / "full")
    short = {**SHORT, "rank": 0, "base": "gpt2"}
    job("straight", plan=True, **short)
    job("left", stop=1, **short)
    job("again", copy="left", resume=True, out_dir=place / "again")
    job("bfloat16", **{**short, "dtype": "bfloat16"})
    job("pairs of all", **short, objective="dpo", kl_samples=0)
    for name, flags in METHODS.items():
        job(name, **{**SHORT, "base": "gpt2", **flags}, shard=True, plan=name in ("span", "pairs"))
    for case, flags in FAMILIES.items():
        job(case, **{**SHORT, "template": "R: {text}\nA:", "base": case, **flags})
    for name, flags in FEW.items():
        job(name, **SHORT, **flags)
    job("wrong", rank=0, train_layers="1:")
    job("disk", full=True, **short)
    (place / "jobs.json").write_text(json.dumps(jobs))
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *meet]
    source = str(Path(__file__).parents[2] / "src")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": source}
    command = [*torchrun, str(Path(__file__).parents[1] / "jobs.py"), str(place)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads((place / f"answers-{rank}.json").read_text()) for rank in range(2)]


def rows(out_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def check_same(one: Path, several: Path, steps: int = 20) -> None:
    """The same rows and the same tensors, to rounding."""
    a, b = rows(one), rows(several)
    assert [row["step"] for row in a] == [row["step"] for row in b] == list(range(1, steps + 1))
    for x, y in zip(a, b, strict=True):
        assert (x["examples"], x["tokens"], x["lr"]) == (y["examples"], y["tokens"], y["lr"])
        assert y["train_loss"] == pytest.approx(x["train_loss"], rel=1e-6)
        assert (y["val_loss"] is None) == (x["val_loss"] is None)
        if x["val_loss"] is not None:
            assert y["val_loss"] == pytest.approx(x["val_loss"], rel=1e-6) and y["val_accuracy"] == x["val_accuracy"]
            assert y.get("kl") == pytest.approx(x.get("kl"), abs=1e-4)
    files = sorted(p.name for p in (one / "last").iterdir())
    assert files == sorted(p.name for p in (several / "last").iterdir())
    for name in (name for name in files if name.endswith(".safetensors")):
        ours, theirs = (load_safetensors(run / "last" / name) for run in (one, several))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            if key.endswith("attn.c_attn.bias") or ".attn.k.bias" in key:
                continue  # a key's bias has a gradient of zero, and AdamW makes steps of what rounding leaves of it
            rough = name == "optimizer.safetensors"  # moments of what has hardly a gradient
            torch.testing.assert_close(theirs[key], tensor, rtol=1e-2 if rough else 1e-4, atol=1e-5)


def test_two_processes_train_an_adapter_as_one_does(
    assets: Path, place: Path, several: list[dict[str, Any]], tmp_path: Path
) -> None:
    first, second = (answers["lora"] for answers in several)
    assert first["status"] == second["status"] == 0
    results = json.loads(first["out"])  # one object: the others say nothing
    assert second["out"] == second["err"] == ""
    assert results["distributed"]["world_size"] == 2 and len(results["distributed"]["peak_rss_mb"]) == 2
    assert results["distributed"]["comm_bytes"] > 20 * results["trainable"] * 4
    assert json.loads((place / "lora" / "run.json").read_text())["distributed"] == {"world_size": 2, "backend": "gloo"}
    assert first["err"].count("step    20  train loss") == 1
    check_same(one := one_process(assets, tmp_path / "one", rank=4), place / "lora")
    losses = [row["train_loss"] for row in rows(one)]
    assert losses[0] > 1.2 * losses[-1]  # it has learned: weights and moments matter


def test_a_base_that_is_cut_trains_an_adapter_as_a_whole_one(
    assets: Path, place: Path, several: list[dict[str, Any]], tmp_path: Path
) -> None:
    check_same(one_process(assets, tmp_path / "one", rank=4, base="gpt2"), place / "shard")
    assert "weights sharded across ranks" in several[0]["shard"]["err"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_a_base_that_is_cut(
    name: str, assets: Path, place: Path, several: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert several[0][name]["status"] == 0, several[0][name]["err"]
    check_same(one_process(assets, tmp_path / "one", **{**SHORT, "base": "gpt2", **METHODS[name]}), place / name, 2)


@pytest.mark.parametrize("case", FAMILIES)
def test_files_of_other_families_are_read_and_written_in_parts(
    case: str, assets: Path, place: Path, several: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert several[0][case]["status"] == 0, several[0][case]["err"]
    flags = {**SHORT, "template": "R: {text}\nA:", "base": case, **FAMILIES[case], "shard": False}
    check_same(one_process(assets, tmp_path / "one", **flags), place / case, 2)


@pytest.mark.parametrize("name", FEW)
def test_a_process_without_an_example_to_validate_waits_for_the_others(
    name: str, assets: Path, place: Path, several: list[dict[str, Any]], tmp_path: Path
) -> None:
    assert [answers[name]["status"] for answers in several] == [0, 0], several[0][name]["err"]
    check_same(one_process(assets, tmp_path / "one", **{**SHORT, **FEW[name]}), place / name, 2)


def test_cut_weights_go_on_in_another_number_of_processes(
    assets: Path, place: Path, several: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Full fine-tuning: one process up to step 7, then two, and from step 14 on one again."""
    one = one_process(assets, tmp_path / "one", rank=0)
    run = place / "full"
    said = [answers["full"]["err"].splitlines()[-1:] for answers in several]
    assert [answers["full"]["status"] for answers in several] == [130, 130] and len(rows(run)) == 14
    assert said[0][0].startswith(f"graft: interrupted; step 14 is saved in {run / 'last'}") and not said[1]
    train(TrainConfig(resume=True, out_dir=str(run)), given={"resume", "out_dir"})
    check_same(one, run)
    alone, two = {"world_size": 1, "backend": None}, {"world_size": 2, "backend": "gloo"}
    changes = json.loads((run / "run.json").read_text())["resume_history"]
    assert [change["distributed"] for change in changes] == [[alone, two], [two, alone]]


def test_a_checkpoint_that_each_process_wrote_a_part_of(
    assets: Path, place: Path, several: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Shards that transformers loads; resumed by as many processes to the same bits, and in the end one file."""
    from transformers import AutoModelForCausalLM

    left = place / "left" / "last"
    for stem in ("model", "optimizer"):
        parts = [left / f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2)]
        assert sorted(left.glob(f"{stem}*")) == [*parts, left / f"{stem}.safetensors.index.json"]
        sizes = [part.stat().st_size for part in parts]
        assert max(sizes) < 1.2 * min(sizes)
    theirs = AutoModelForCausalLM.from_pretrained(left).state_dict()
    stored = read_weights(left)
    assert len(stored) > 30 and all(torch.equal(theirs[name], stored[name]) for name in stored)
    straight, again = place / "straight", place / "again"
    times = {"seconds", "examples_per_s", "tokens_per_s", "peak_rss_mb"}
    assert [{k: v for k, v in row.items() if k not in times} for row in rows(straight)] == [
        {k: v for k, v in row.items() if k not in times} for row in rows(again)
    ]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (straight / "last" / name).read_bytes() == (again / "last" / name).read_bytes()
    check_same(one_process(assets, tmp_path / "one", **{**SHORT, "rank": 0, "base": "gpt2"}), straight, 2)
    for best in (straight / "best", again / "best"):
        assert [p.name for p in best.glob("model*")] == ["model.safetensors"]


def test_pairs_with_all_weights_cut(assets: Path, place: Path, several: list[dict[str, Any]], tmp_path: Path) -> None:
    flags = {**SHORT, "rank": 0, "base": "gpt2", "objective": "dpo", "kl_samples": 0}
    check_same(one_process(assets, tmp_path / "one", **flags), place / "pairs of all", 2)


@pytest.mark.parametrize("name", WATCHED)
def test_no_process_ever_holds_the_whole_model(name: str, several: list[dict[str, Any]]) -> None:
    """What is alive while it is read; and behind a block's forward pass nothing of its gathered weights is kept."""
    for answers in several:
        saw = answers[name]
        assert saw["own"] < 0.65 * saw["whole"]  # half, and what each has: a method's own, the odd row
        assert 0 < saw["peak"] < 0.65 * saw["whole"] and 0 < saw["read"] < 0.6 * saw["whole"]
        assert saw["kept"] == 0 and saw["saved"] > 0


def test_what_is_wrong_for_all_processes_is_told_once(place: Path, several: list[dict[str, Any]]) -> None:
    first, second = (answers["wrong"] for answers in several)
    said = [line for line in first["err"].splitlines() if line.startswith("graft:")]
    assert first["status"] == second["status"] == 2 and second["err"] == ""
    assert len(said) == 1 and "--train_layers 1:" in said[0] and "sharded full fine-tuning" in said[0]
    assert not (place / "wrong").exists()


def test_a_process_that_cannot_write_its_part_ends_all(place: Path, several: list[dict[str, Any]]) -> None:
    first, second = (answers["disk"] for answers in several)
    said = [line for line in first["err"].splitlines() if line.startswith("graft:")]
    assert first["status"] == second["status"] == 2 and second["err"] == ""
    assert len(said) == 1 and said[0].startswith("graft: process 1: disk full: cannot write ")
    assert "step-1/model-00002-of-00002.safetensors" in said[0] and not (place / "disk").exists()


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 16, 33])
def test_shares_are_complete_and_balanced(size: int, count: int) -> None:
    lengths = [(7 * i) % 41 + 5 for i in range(100)]
    batch = [(13 * i) % 100 for i in range(count)]
    shares = [DistContext(rank, size).partition(batch, lengths) for rank in range(size)]
    assert sorted(row for share in shares for row in share) == sorted(batch)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    work = [sum(lengths[row] for row in share) for share in shares]
    assert max(work) - min(work) <= 2 * max(lengths[row] for row in batch)
    assert DistContext().partition(batch, lengths) == batch


def test_buckets_hold_every_parameter_once() -> None:
    params = [nn.Parameter(torch.zeros(n)) for n in (4, 4, 4, 20, 1)]
    params.insert(2, nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    made = buckets(params, most=8)
    assert [p for bucket in made for p in bucket] == params
    assert [[p.numel() for p in bucket] for bucket in made] == [[4, 4], [3], [4], [20], [1]]


def test_alone_nothing_is_sent() -> None:
    world = from_environment({})
    assert (
        world.size == 1
        and world.is_main
        and world.all_reduce_numbers([1, 2.5]) == [1, 2.5]
        and world.broadcast_object({"a": 1}) == {"a": 1}
    )
    world.raise_on_any_rank(None)
    with pytest.raises(InputError, match="no such"), world.same_error_on_all_ranks():
        raise InputError("no such")
    assert world.bytes_communicated == 0


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x: not a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "ranks are 0 to 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "-"}, "LOCAL_RANK=-: not a number"),
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
    for changes, said in (
        ({"train_layers": "1:"}, "--train_layers 1:"),
        ({"objective": "dpo", "kl_samples": 4}, "--kl_samples 4"),
    ):
        config = TrainConfig(**settings(assets, tmp_path / "run", rank=0, **changes))
        with pytest.raises(InputError, match=said):
            prepare(config, dist=DistContext(0, 2, backend="gloo"))


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="--device mps: in several processes"):
        DistContext.start("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="2 processes on a machine with 1 GPU") as caught:
        DistContext.start("auto")
    assert caught.value.told  # process 0 prints it
