"""benchmarks/: the figures' arithmetic on made-up runs, the peers' batches, the scripts' help. Nothing is measured."""

import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from graftlm.cli.parser import parse
from graftlm.config import TrainConfig

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def load(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """A benchmark's module, found as it finds its neighbours when it is run as a script."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(name)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "train_vs_peers")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_peers")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "_machine")


def run(speed: float, memory: float = 1000.0, loss: float = 0.3, share: float = 0.01) -> dict[str, Any]:
    return {"examples_per_s": speed, "peak_rss_mb": memory, "val_loss": loss, "other_cpu_share": share}


def job(peers: ModuleType, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "model": "model", "eot": 2, "examples": "examples.json", "steps": 10, "batch_size": 16, "rank": 16, "alpha": 64,
        "lora_dropout": 0.05, "targets": ("q", "k", "v"), "lr": 2.5e-4, "warmup": 1, "untimed_steps": 2,
        "precision": "autocast", "trl_precision": "bf16", "loss_on": "completion", "seed": 0,
    }  # fmt: skip
    return peers.Job(**{**fields, **changes})


# ----------------------------------------------------------------------------------------------------- the scripts


def scripts() -> list[str]:
    return sorted(path.name for path in FOLDER.glob("*.py") if not path.name.startswith("_"))


@pytest.mark.parametrize("script", scripts())
def test_help_of_every_script(script: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, FOLDER / script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


@pytest.mark.parametrize("words", [["--steps", "3"], ["--rounds", "0"], ["--only", "trl,unsloth"], ["--run", "trl"]])
def test_wrong_flags_are_refused(bench: ModuleType, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.parse(words)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_only_keeps_the_order_given(bench: ModuleType) -> None:
    assert bench.parse(["--only", "graft,trl"]).only == ["graft", "trl"]


# -------------------------------------------------------------------------------------------------- the statistics


def test_a_disturbed_run_is_repeated(bench: ModuleType) -> None:
    runs = [run(1, share=0.2), run(2, share=0.031), run(3, share=0.03), run(4, share=0.0)]
    accepted, rejected = bench.accepted_run(iter(runs).__next__, 0.03, 3)
    assert accepted == runs[2]  # exactly the limit is still quiet
    assert rejected == runs[:2]


def test_repeats_are_bounded(bench: ModuleType) -> None:
    runs = iter([run(1, share=0.5)] * 5)
    accepted, rejected = bench.accepted_run(runs.__next__, 0.03, 3)
    assert accepted is None
    assert len(rejected) == 3
    assert len(list(runs)) == 2


def test_ratios_are_formed_within_a_round(bench: ModuleType) -> None:
    """The machine slows down in round 2: the median of the ratios is 4, the ratio of the medians would be 12 / 3.5."""
    rounds = [
        {"trl": run(5), "graft": run(20)},
        {"trl": run(2), "graft": run(8)},
        {"trl": run(6), "graft": run(12)},
        {"trl": run(1)},  # graft had no quiet run
    ]
    summary = bench.summarise(rounds)
    assert summary["ratios"]["examples_per_s graft/trl"] == {"rounds": [4, 4, 2], "median": 4}
    assert summary["medians"]["graft"]["examples_per_s"] == 12
    assert summary["rounds"]["trl"]["examples_per_s"] == [5, 2, 6, 1]
    assert not any("peft" in name for name in summary["ratios"])


def test_claims(bench: ModuleType) -> None:
    good = {"trl": run(2, 3000), "peft": run(6, 2300), "graft": run(13.8, 1500)}
    claims = bench.summarise([good])["claims"]
    assert list(claims.values()) == [True] * 5
    bad = {"trl": run(2.2, 3000), "peft": run(6, 2100), "graft": run(13.7, 1501, loss=0.36)}
    assert list(bench.summarise([bad])["claims"].values()) == [False] * 5
    assert list(bench.summarise([bad], "all")["claims"].values()) == [False, True, False]
    alone = bench.summarise([{"graft": run(15)}])
    assert list(alone["claims"].values()) == [None] * 5


def test_the_share_of_the_peak_is_told_for_both_formats(bench: ModuleType) -> None:
    rounds = [{"graft": {"needed_gflops": done, "precision": "float32"}} for done in (90.0, 100.0, 300.0)]
    share = bench.shares(rounds, {"float32": 200.0, "bfloat16": 400.0})
    assert share["of_bfloat16_peak"] == 0.25 and share["of_its_formats_peak"] == 0.5
    assert bench.shares([{}], {}) == {}


def test_the_table_names_every_figure(bench: ModuleType) -> None:
    rounds = [{"trl": run(5, 3000), "graft": run(15, 1500)}, {"trl": run(4, 3000), "graft": run(16, 1500)}]
    text = bench.table(bench.summarise(rounds))
    assert "15.00  16.00" in text
    assert "3.500   (3.000  4.000)" in text
    assert "at least 6.5 times trl?" in text
    assert "not measured" in text


# ----------------------------------------------------------------------------------------------------- the machine


def test_busy_seconds_leave_out_idle_and_disk_waits_but_count_stolen_time(machine: ModuleType) -> None:
    stat = "cpu  100 20 30 9000 800 4 6 40 7 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    assert machine.busy_seconds(stat, 100) == pytest.approx(2.0)
    assert machine.others_share(3.0, seconds=50.0, cores=2) == pytest.approx(0.03)


def test_cpu_description(machine: ModuleType) -> None:
    text = (
        "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: A CPU\nstepping\t: 1\n"
        "flags\t\t: fpu avx2 avx512_bf16\n\n"
        "processor\t: 1\nmodel name\t: Another\nflags\t\t: amx_bf16\n"
    )
    assert machine.cpu_description(text) == {
        "cpu": "A CPU", "family_model_stepping": "25/17/1", "flags": ["avx2", "avx512_bf16"],
    }  # fmt: skip


def test_a_format_is_only_tried_where_there_are_instructions_for_it(machine: ModuleType) -> None:
    formats = ("fp32", "autocast", "bf16")
    assert machine.worth_trying(formats, "flags\t\t: fpu avx2 avx512f\n") == ["fp32"]
    assert machine.worth_trying(formats, "flags\t\t: fpu avx2 avx512_bf16\n") == list(formats)


def test_the_description_can_be_written_and_names_no_user_or_host(machine: ModuleType) -> None:
    about = machine.describe()
    assert about["cores"] >= 1
    assert about["torch"] == importlib.metadata.version("torch")
    assert str(Path.home()) not in json.dumps(about)


def test_run_measured_sees_its_child(machine: ModuleType, tmp_path: Path) -> None:
    code = "import sys; x = bytearray(200_000_000); print(sum(range(10**6))); print('no', file=sys.stderr); sys.exit(3)"
    seen = machine.run_measured([sys.executable, "-c", code], tmp_path, {})
    assert (seen.status, seen.stdout, seen.stderr) == (3, "499999500000\n", "no\n")
    assert seen.max_rss_mb > 190
    assert seen.cpu_seconds > 0
    assert seen.other_cpu_seconds >= 0


def test_a_watch_can_end_a_process_and_sees_those_below_it(machine: ModuleType, tmp_path: Path) -> None:
    child = "x = bytearray(100_000_000); print('made', flush=True); import time; time.sleep(10)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    seen: list[float] = []

    def watch(pid: int) -> bool:
        seen.append(machine.descendants_mb(pid))
        return seen[-1] > 100

    done = machine.run_measured([sys.executable, "-c", code], tmp_path, {}, watch)
    assert done.status == -15
    assert seen[-1] > 100 and max(seen) < 200
    quick = machine.run_measured([sys.executable, "-c", "print(1)"], tmp_path, {}, lambda pid: False)
    assert (quick.status, quick.stdout) == (0, "1\n")


# ------------------------------------------------------------------------------------------------ graft's own command


def test_graft_is_called_with_flags_that_exist(bench: ModuleType, peers: ModuleType, tmp_path: Path) -> None:
    words = bench.graft_command(job(peers), tmp_path, tmp_path / "run")
    assert words[1:4] == ["-m", "graftlm", "train"]
    assert words[-1] == "--json"
    assert parse("train", TrainConfig, words[4:]).config.targets == "q,k,v"
    assert not any(word.startswith("--train_layers") for word in words)
    upper = bench.graft_command(job(peers, first_layer=20), tmp_path, tmp_path / "run")
    assert parse("train", TrainConfig, upper[4:]).config.train_layers == "20:"


def test_graft_understands_how_each_method_is_asked_for(
    bench: ModuleType, peers: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, flags in load(monkeypatch, "methods").METHODS.items():
        words = bench.graft_command(job(peers, method=name, flags=flags), tmp_path, tmp_path / "run")
        config = parse("train", TrainConfig, words[4:]).config
        assert (config.method, config.add_biases) == (name, name == "bitfit")


def test_graft_figures(bench: ModuleType, peers: ModuleType, tmp_path: Path) -> None:
    """By the clock: 10 steps of 16, the first two and the last (its row counts the validation) apart: 112 in 14 s."""
    clock = [30.0, 31.0, *(33.0 + 2 * i for i in range(7)), 99.0]
    rows = [json.dumps({"examples": 16 * (i + 1), "seconds": seconds}) + "\n" for i, seconds in enumerate(clock)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    (tmp_path / "run.json").write_text(json.dumps({"dtype": "float32"}))
    result = {"examples": 160, "examples_per_s": 8.5, "peak_rss_mb": 1500.0, "trainable": 7, "last": {"val_loss": 0.4}}
    result["needed_gflops"] = 99.0
    figures = bench.graft_figures(json.dumps(result) + "\n", tmp_path, job(peers))
    assert figures["examples_per_s_by_clock"] == pytest.approx(112 / 14)
    assert figures["examples_per_s"] == 8.5
    assert figures["val_loss"] == 0.4 and figures["precision"] == "float32" and figures["needed_gflops"] == 99
    with pytest.raises(json.JSONDecodeError):
        bench.graft_figures("a note\n" + json.dumps(result), tmp_path, job(peers))


# ------------------------------------------------------------------------------------------------------- the peers


def test_speed_leaves_the_first_steps_out(peers: ModuleType) -> None:
    ends = [100.0, 110.0, 111.0, 112.0, 113.0]
    figures = peers.speed(ends, job(peers, steps=5, batch_size=4, untimed_steps=2))
    assert figures == {"examples": 20, "seconds": 3.0, "examples_per_s": 4.0}


def test_batches_hold_every_example_once_by_length(peers: ModuleType) -> None:
    rows = [peers.Encoded([9] * n, [n, 2]) for n in (5, 3, 8, 4, 7)]
    batches = list(peers.length_batches(rows, 2))
    assert [batch.ids.shape[1] for batch in batches] == [6, 9, 10]
    assert [batch.targets.tolist() for batch in batches] == [[3, 2, 4, 2], [5, 2, 7, 2], [8, 2]]


def test_the_fast_peer_computes_the_loss_of_the_slow_one(peers: ModuleType) -> None:
    """No mask and the head at targets only against transformers' own masked loss over all positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rows = [peers.Encoded([7, 8, 9], [10, 2]), peers.Encoded([11, 12, 13, 14, 15], [16, 17, 2])]
    labels = torch.full((2, 8), -100)
    mask = torch.zeros(2, 8, dtype=torch.int64)
    for b, row in enumerate(rows):
        labels[b, len(row.prompt) : row.length] = torch.tensor(row.completion)
        mask[b, : row.length] = 1
    batch = peers.collate(rows)
    with torch.no_grad():
        expected = model(input_ids=batch.ids, attention_mask=mask, labels=labels).loss * len(batch.targets)
        torch.testing.assert_close(peers.summed_loss(model, batch), expected, rtol=1e-5, atol=1e-5)
