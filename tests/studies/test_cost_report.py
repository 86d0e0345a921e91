"""`graft estimate` through the command: the figures that are published, and that nothing but config.json is read."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm import cli
from graftlm.config import EstimateConfig
from graftlm.files.assets import model_folder as asset_folder
from graftlm.methods import Adapter, BitFit, DoRA, Full, LoRA, Method, PrefixTuning
from graftlm.models import CausalLM
from graftlm.studies.cost_report import activation_bytes, estimate
from graftlm.training.reporting import saved_activation_bytes
from hub_mirror import serve
from tiny import FAMILIES, config_json, shape_of

FFN = "--mlp_widths=1024,512,256,128,64,32,16,8,4,2,1"
Account = Callable[..., dict[str, Any]]
METHODS = (
    LoRA(rank=3),
    DoRA(rank=3),
    Adapter(rank=4),
    PrefixTuning(length=4, init="random"),
    BitFit(add_biases=True),
    Full(),
)


@pytest.fixture(autouse=True)
def no_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a download would be needed there is none, so names that have a shape must do without."""
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path / "graft"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Account:
    def asked(*words: str) -> dict[str, Any]:
        assert cli.run(["estimate", *words, "--json"]) == 0
        out, err = capsys.readouterr()
        assert err == "" and out.count("\n") == 1
        result: dict[str, Any] = json.loads(out)
        assert {"total", "trainable", "trainable_fraction", "by_module", "flops_per_token", "bytes"} <= result.keys()
        for key in ("total", "trainable"):
            assert sum(module[key] for module in result["by_module"].values()) == result[key]
        assert result["trainable_fraction"] == result["trainable"] / result["total"]
        for sums in (*result["flops_per_token"].values(), result["bytes"]):
            assert sums["total"] == sum(count for name, count in sums.items() if name != "total")
        return result

    return asked


@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_gpt2s_sizes(name: str, count: int, run: Account) -> None:
    result = run(f"--init_from={name}", "--method=full")
    assert result["total"] == result["trainable"] == result["base"] == count
    assert result["bytes"] == {"frozen": 0, **{k: n * count for k, n in TRAINING_BYTES.items()}, "total": 16 * count}


TRAINING_BYTES = {"trained": 4, "gradients": 4, "optimizer_state": 8}


@pytest.mark.parametrize(("rank", "count"), [(128, 18_874_368), (16, 2_359_296), (196, 28_901_376)])
def test_lora_on_q_k_v_of_gpt2_medium(rank: int, count: int, run: Account) -> None:
    result = run("--init_from=gpt2-medium", f"--rank={rank}")
    assert result["trainable"] == count and result["total"] == 354_823_168 + count
    if rank == 128:
        assert (round(100 * result["trainable_fraction"], 2), round(100 * result["trainable_vs_base"], 2)) == (
            5.05,
            5.32,
        )
    assert result["bytes"]["frozen"] == 2 * 354_823_168


@pytest.mark.parametrize(
    ("words", "exact", "millions", "agrees", "note"),
    [
        ("gpt2-medium --method full", 354_823_168, 354.92, False, "354.92M; exact: 354,823,168, -0.03%"),
        ("gpt2-medium --method adapter --rank 112", 11_064_576, 11.09, False, "11.09M; exact: 11,064,576, -0.23%"),
        ("gpt2-medium --method prefix --prefix_length 7", 344_064, 0.35, False, "0.35M; exact: 344,064, -1.70%"),
        ("gpt2-medium --rank 4 --targets q,v", 393_216, 0.35, False, "0.35M; exact: 393,216, +12.35%"),
        ("gpt2-large --rank 0", 774_030_080, 774.03, True, "774.03M; the same when rounded"),
        ("gpt2-large --rank 4 --targets q,v --alpha 32", 737_280, 0.77, False, "0.77M; exact: 737,280, -4.25%"),
    ],
)
def test_exact_counts_beside_the_lora_papers(
    words: str, exact: int, millions: float, agrees: bool, note: str, run: Account
) -> None:
    result = run("--init_from", *words.split())
    assert result["trainable"] == exact
    found = result["paper"]
    assert (found["millions"], found["exact"], found["agrees"]) == (millions, exact, agrees)
    assert note in found["note"] and found["note"].startswith("LoRA paper, Table 3, ")


def test_the_paper_is_named_beside_just_its_own_settings(run: Account) -> None:
    for words in ("gpt2-medium --rank 5 --targets q,v", "gpt2-medium --rank 4", "gpt2 --rank 4 --targets q,v"):
        assert run("--init_from", *words.split())["paper"] is None


def test_the_feed_forward_exercise(run: Account) -> None:
    """D_0 = 1024 inputs, ten layers of half the width each."""
    net = run(FFN)
    assert net["total"] == net["trainable"] == 700_073
    assert net["units"] == {"hidden": 1_022, "hidden_and_output": 1_023}
    biases = run(FFN, "--method=bitfit")
    assert biases["trainable"] == 1_023 and round(100 * biases["trainable_fraction"], 2) == 0.15
    adapters = run(FFN, "--method=adapter", "--rank=4")
    assert adapters["trainable"] == 9_247 and adapters["total"] == 709_320
    assert (round(100 * adapters["trainable_fraction"], 2), round(100 * adapters["trainable_vs_base"], 2)) == (
        1.30,
        1.32,
    )
    # All but the first layer's input needs a gradient: 699,050 weights of which 524,288 are the first layer's.
    assert net["flops_per_token"]["forward"]["total"] == 2 * 699_050
    assert net["flops_per_token"]["training"]["total"] == 6 * 699_050 - 2 * 524_288


def test_work_grows_with_the_text_and_the_prefix(run: Account) -> None:
    short = run("--max_length=100")["flops_per_token"]
    longer = run("--max_length=200")["flops_per_token"]
    for way, times in (("forward", 1), ("training", 3)):
        more = longer[way]["attention"] - short[way]["attention"]
        assert more == times * 30 * 4 * 576 * 100 / 2  # half of the keys that came are behind a query
        assert short[way]["layers"] == longer[way]["layers"]
    prefix = run("--method=prefix", "--prefix_length=10", "--max_length=100")["flops_per_token"]["forward"]
    assert prefix["attention"] - short["forward"]["attention"] == 30 * 4 * 576 * 10
    upper = run("--train_layers=20:", "--max_length=100")["flops_per_token"]["training"]
    assert upper["layers"] * 2 == short["training"]["layers"] / 60 * (30 + 10) * 2


def test_times_only_at_a_speed_that_was_given(run: Account) -> None:
    assert "seconds_per_million_tokens" not in run(FFN)
    times = run(FFN, "--device_gflops=100")["seconds_per_million_tokens"]
    assert times["forward"] == pytest.approx(2 * 699_050 * 1e6 / 100e9)


def test_people_see_every_number_with_its_formula(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["estimate", "--init_from=gpt2-medium", "--device_gflops=500", "--rank=4", "--targets=q,v"]) == 0
    out = capsys.readouterr().out
    for part in (
        "354,823,168",
        "L r (in + out) = 24 × 4 × (1,024 + 1,024)",
        "2 (L + B + G) W = 2 × (24 + 24 + 0) × 12,582,912",
        "393,216 of 355,216,384 parameters (0.11%), 0.11% of the base's 354,823,168",
        "LoRA paper, Table 3, LoRA: 0.35M; exact: 393,216, +12.35%",
        "per million, at 500 GFLOP/s",
    ):
        assert part in out, part
    assert cli.run(["estimate", FFN]) == 0
    out = capsys.readouterr().out
    assert "1,022 hidden, 1,023 hidden and output" in out and "700,073" in out and "FLOPs per example" in out


@pytest.mark.parametrize(
    ("method", "dtype", "tokens"),
    [*((method, torch.float32, 12) for method in METHODS), *((METHODS[i], torch.bfloat16, 600) for i in (0, -1))],
    ids=str,
)
@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_kept_for_the_backward_pass_is_what_autograd_keeps(
    kind: str, method: Method, dtype: torch.dtype, tokens: int
) -> None:
    """Against real tensors, where real attention takes one way for few tokens and another for many."""
    shape = replace(shape_of(kind), max_positions=700, num_layers=5)
    model = CausalLM(shape)
    method.install(model, torch.Generator())
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.to(dtype)
    model.compute_dtype = dtype
    ids = torch.zeros(2, tokens, dtype=torch.long)
    with saved_activation_bytes(model) as kept:
        _, h = model.train().forward_shared_prefix(ids[:1, :0], ids)
        before = kept()
        targets, weights = ids.flatten(), torch.ones(2 * tokens)
        model.loss(h.flatten(0, 1), torch.arange(2 * tokens), targets, weights)
    head = 2 * tokens * shape.hidden_size * dtype.itemsize
    assert activation_bytes(shape, method, (2, tokens), dtype) == before + head
    assert kept() >= before + head  # the head's own gradient besides, which is not kept for long


def test_several_processes(run: Account) -> None:
    words = ("--init_from=meta-llama/Llama-2-7b-hf", "--rank=16", "--max_length=128", "--batch_size=64")
    n, t = 6_738_415_616, run(*words)["trainable"]
    one, whole = run(*words), run(*words, "--world_size=8")["distributed"]
    assert "processes" not in one and one["step"]["per_device_batch_size"] == 64
    assert whole["sharding"] == "none" and whole["bytes"] == one["bytes"]
    assert whole["comm_bytes_per_step"] == {"gradients": 7 * t, "total": 7 * t}  # 2 (n - 1) / n of 4 bytes
    cut = run(*words, "--world_size=8", "--shard", "--device_gflops=1000", "--bandwidth_gbs=50")
    assert (
        cut["distributed"]["bytes"]["frozen"] == 2 * n / 8 and cut["distributed"]["bytes"]["optimizer_state"] == 8 * t
    )
    outside = 2 * 32_000 * 4_096 + 4_096
    weights = (2 * 2 * (n - outside) + 2 * outside) * 7 // 8
    assert cut["distributed"]["comm_bytes_per_step"] == {
        "weights": weights,
        "gradients": 7 * t,
        "total": weights + 7 * t,
    }
    assert cut["step"]["per_device_batch_size"] == 8 and cut["step"]["activation_bytes"] * 8 == pytest.approx(
        one["step"]["activation_bytes"],
        rel=1e-3,  # all rows have the same cosines and sines
    )
    assert cut["step"]["compute_seconds"] == pytest.approx(cut["step"]["flops"] / 8e12)
    assert cut["step"]["comm_seconds"] == pytest.approx((weights + 7 * t) / 50e9)
    full = run("--init_from=meta-llama/Llama-2-7b-hf", "--rank=0", "--world_size=8")["distributed"]
    assert full["sharding"] == "full" and full["bytes"]["optimizer_state"] == n
    assert full["comm_bytes_per_step"] == {
        "weights": 3.5 * n,
        "gradients": 3.5 * n,
        "total": 7 * n,
    }


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--world_size 0", "--world_size 0: must be greater than 0"),
        ("--shard", "--shard needs --world_size N with N > 1"),
        ("--bandwidth_gbs 5", "--bandwidth_gbs needs --world_size N with N > 1"),
        ("--rank 0 --world_size 2 --shard", "--shard is for frozen weights"),
        ("--batch_size -1", "--batch_size -1: must be greater than 0"),
    ],
)
def test_wrong_flags_of_several_processes(words: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["estimate", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and line in err, err


def test_of_a_folder_and_of_the_hub_nothing_but_the_config_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = shape_of("llama-biased")
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "config.json").write_text(json.dumps(config_json(shape, "llama-biased")))
    expected = estimate(EstimateConfig(init_from=str(tmp_path / "repo"), method="bitfit"), {"method"})
    (tmp_path / "repo" / "model.safetensors").write_bytes(b"not read")
    assert expected["trainable"] == 2 * (32 + 16 + 16)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with serve(models={"org/name": tmp_path / "repo"}) as mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror.url)
        found = estimate(EstimateConfig(init_from="org/name", method="bitfit"), {"method"})
        assert found == {**expected, "model": "org/name"}
        assert not any("safetensors" in request for request in mirror.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the config is in the cache now
    assert estimate(EstimateConfig(init_from="org/name", method="bitfit"), {"method"}) == found


def test_a_gguf_file_is_read_no_further_than_its_header(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GRAFT_HOME")
    path = next(asset_folder("smollm2-135m").glob("*.gguf"))
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path / "empty"))
    found = estimate(EstimateConfig(init_from=str(path), rank=16), {"rank"})
    assert found == {**estimate(EstimateConfig(rank=16), {"rank"}), "model": str(path)}
    assert not (tmp_path / "empty").exists()
