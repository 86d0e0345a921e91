"""The arithmetic of the smaller benchmarks, and that what they call exists."""

import asyncio
import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from graftlm.cli import COMMANDS
from graftlm.cli.parser import parse
from graftlm.config import EvaluateConfig, ServeConfig, TrainConfig
from graftlm.methods import METHODS
from tiny import model_folder

BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")


@pytest.fixture(scope="module")
def load() -> Iterator[object]:
    sys.path.insert(0, BENCHMARKS)
    yield importlib.import_module
    sys.path.remove(BENCHMARKS)


def run(speed: float, accuracy: float = 0.75) -> dict[str, float]:
    return {"examples_per_s": speed, "accuracy": accuracy, "peak_rss_mb": 1.0}


def test_scores_compare_with_the_faster_peer_of_their_round(load: type[ModuleType]) -> None:
    bench = load("evaluate_vs_peers")
    rounds = [
        {"graft-score": run(36), "graft-generate": run(32), "hf-score": run(18), "hf-generate": run(20)},
        {"graft-score": run(38), "graft-generate": run(30), "hf-score": run(20), "hf-generate": run(10)},
    ]
    summary = bench.summarise(rounds)
    assert summary["ratios"]["score graft/best peer"]["rounds"] == [1.8, 1.9]
    assert summary["ratios"]["generate graft/hf"]["median"] == pytest.approx(2.3)
    assert list(summary["claims"].values()) == [True, True, True]
    rounds = [{**each, "graft-score": run(30, 0.70)} for each in rounds]
    assert list(bench.summarise(rounds)["claims"].values()) == [False, True, False]
    assert "equal accuracy?" in bench.table(summary)


def shot(speed: float, *scores: float) -> dict[str, Any]:
    return {**run(speed), "scores": [[-1.0, -2.0], list(scores or (-3.0, -4.0))]}


def test_few_shot_compares_formats_alone_and_each_sides_fastest(load: type[ModuleType]) -> None:
    bench = load("fewshot_vs_peers")
    names = ("graft-float32", "harness-float32", "graft-bfloat16", "harness-bfloat16")
    rounds = [
        dict(zip(names, (shot(30), shot(2, -3.0005, -4.0), shot(64), shot(4, -3.5, -4.0)), strict=True)),
        dict(zip(names, (shot(30), shot(5), shot(60), shot(4)), strict=True)),
    ]
    summary = bench.summarise(rounds)
    assert summary["ratios"]["graft/harness bfloat16"]["rounds"] == [16, 15]
    assert summary["ratios"]["graft/harness, each in its fastest format"]["rounds"] == [16, 12]
    assert summary["scores_apart"] == {"float32": pytest.approx(5e-4), "bfloat16": 0.5}
    assert list(summary["claims"].values()) == [True, False, True]
    slow = [{name: each[name] for name in names[:2]} for each in rounds]
    assert list(bench.summarise(slow)["claims"].values()) == [None, False, True]
    apart = [{**each, "harness-float32": shot(2, -3.002, -4.0)} for each in slow]
    assert list(bench.summarise(apart)["claims"].values()) == [None, True, False]
    assert "to 1e-3?" in bench.table(summary)


def test_few_shot_uses_flags_that_exist(load: type[ModuleType]) -> None:
    text = (Path(BENCHMARKS) / "fewshot_vs_peers.py").read_text()
    for flag in ("init_from", "data", "limit", "shots", "dtype", "read", "predictions"):
        assert f'"--{flag}"' in text and flag in {f.name for f in dataclasses.fields(EvaluateConfig)}


def test_every_piece_of_the_prompting_page_is_a_command_that_parses(load: type[ModuleType]) -> None:
    for verb, *words in load("prompting").pieces(200, 2, "runs/x").values():
        assert parse(verb, COMMANDS[verb].config, [*words, "--json"]).explicit


def test_the_committed_page_of_prompting_is_what_its_result_gives(load: type[ModuleType]) -> None:
    bench = load("prompting")
    newest = max((bench.ROOT / "benchmarks" / "results").glob("*-prompting.json"))
    found = bench.blocks(json.loads(newest.read_text(encoding="utf-8")), newest.stem[:10])
    text = bench.PAGE.read_text(encoding="utf-8")
    assert bench.fill(text, found) == text


def test_what_prompts_share_is_computed_once(load: type[ModuleType]) -> None:
    result = {"n": 4, "prompt_tokens": 110, "shared_prompt_tokens": 80, "new_tokens": 7.0}
    assert load("prompting").computed(result) == 30 + 20 + 7


def test_start_up_claims_are_medians(load: type[ModuleType]) -> None:
    bench = load("startup")
    found = {
        "graft --help": [{"cpu_seconds": s, "seconds": s} for s in (0.1, 0.2, 9.0)],
        "graft train": [{"cpu_seconds": 9, "seconds": 9, "seconds_to_first_step": s} for s in (4.0, 6.0, 5.5)],
        "graft train --compile on": [{"cpu_seconds": 9, "seconds": 9, "seconds_to_first_step": 11.9}],
    }
    assert list(bench.summarise(found)["claims"].values()) == [True, False, True]
    assert "first step after 5.50 s" in bench.table(bench.summarise(found))


def test_the_commands_use_flags_that_exist(load: type[ModuleType]) -> None:
    flags = {word.removeprefix("--") for word in load("startup").FIRST_STEP if word.startswith("--")}
    assert flags - {"json"} <= {f.name for f in dataclasses.fields(TrainConfig)}
    text = (Path(BENCHMARKS) / "evaluate_vs_peers.py").read_text()
    for flag in ("init_from", "data", "limit", "batch_size", "read"):
        assert f'"--{flag}"' in text and flag in {f.name for f in dataclasses.fields(EvaluateConfig)}


def test_the_first_epoch_stands_apart(load: type[ModuleType]) -> None:
    bench = load("train_layers")
    rows = [{"examples": 16 * (i + 1), "tokens": 100 * (i + 1), "tokens_per_s": 50 if i < 2 else 200} for i in range(6)]
    assert bench.speeds(rows, 2) == {"first_epoch": 8.0, "later_epochs": 32.0}
    figures = {"peak_rss_mb": 1.0, "val_loss": 0.5, "first_epoch": 8.0}
    summary = bench.summarise([{"upper": {**figures, "later_epochs": 26}, "all": {**figures, "later_epochs": 10}}])
    assert summary["claims"] == {"at least 2.5 times the full depth behind the first epoch": True}
    assert "2.600" in bench.table(summary)


def test_one_figure_beyond_a_fifth_breaks_the_plans_claim(load: type[ModuleType]) -> None:
    bench = load("plan_vs_run")

    def run(seconds: float, memory: float) -> dict[str, dict[str, float]]:
        return {"seconds": bench._pair(100, seconds), "peak_rss_mb": bench._pair(1000, memory)}

    assert bench.summarise({"a": run(119, 900), "b": run(81, 1100)})["claims"].popitem()[1] is True
    summary = bench.summarise({"a": run(119, 900), "b": run(81, 1201)})
    assert summary["claims"].popitem()[1] is False
    assert "1.19" in bench.table(bench.summarise({"a": run(119, 900)}))
    assert all(set(flags) <= {f.name for f in dataclasses.fields(TrainConfig)} for flags in bench.RUNS.values())


def test_the_page_shows_the_newest_result_of_each_kind_on_each_processor(
    load: type[ModuleType], tmp_path: Path
) -> None:
    page = load("page")
    machine = {
        "cores": 2,
        "cpu": "A CPU",
        "family_model_stepping": "6/1/1",
        "flags": ["avx2", "fma"],
        "memory_gb": 24.0,
        "torch": "2.13.0",
    }
    result = {
        "machine": machine,
        "graftlm": "abc",
        "medians": {"graft": {"examples_per_s": 20.0, "peak_rss_mb": 1500.0}, "a<b": {"examples_per_s": 10.0}},
        "ratios": {"examples_per_s graft/peft": {"median": 2.0, "rounds": [1.9, 2.1]}},
        "claims": {"fast": True, "small": False, "other": None},
    }
    for date, name in (("2026-01-02", "new"), ("2026-01-01", "old")):
        (tmp_path / f"{date}-train.json").write_text(json.dumps({**result, "graftlm": name}))
    other = {**machine, "family_model_stepping": "7/1/1"}
    (tmp_path / "2026-01-01-train.seven.json").write_text(
        json.dumps({**result, "graftlm": "elsewhere", "machine": other})
    )
    text, pictures = page.page(tmp_path)
    assert list(pictures) == ["2026-01-02-train.svg", "2026-01-01-train.seven.svg"]
    assert "graftlm at new." in text and "graftlm at old" not in text and "graftlm at elsewhere." in text
    assert "| graft | 20 | 1,500 |" in text and "**2.00** (rounds: 1.90, 2.10)" in text
    assert "- *small*: does **not** hold" in text and "(benchmarks/2026-01-02-train.svg)" in text
    root = ElementTree.fromstring(pictures["2026-01-02-train.svg"])
    widths = [float(each.attrib["width"]) for each in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert widths == [420.0, 210.0]


def test_curves_are_drawn_from_zero_and_no_name_covers_another(load: type[ModuleType], tmp_path: Path) -> None:
    page = load("page")
    curves = {
        "plain": [[1, 10.0], [64, 10.0]],
        "graft": [[1, 10.0], [8, 40.0], [64, 80.0]],
        "a<b": [[1, 9], [64, 10.0]],
    }
    root = ElementTree.fromstring(page.lines(curves, "tokens_per_s", "clients"))
    svg = "{http://www.w3.org/2000/svg}"
    paths = [each.attrib["d"] for each in root.iter(f"{svg}path")]
    assert paths[1] == "M60.0 244.0L270.0 154.0L480.0 34.0"  # zero lies at 274, the most at 34, in even steps
    names = {each.text: float(each.attrib["y"]) for each in root.iter(f"{svg}text") if ": " in (each.text or "")}
    assert list(names) == ["graft: 80", "plain: 10", "a<b: 10"]
    heights = sorted(names.values())
    assert all(b - a >= 15 for a, b in pairwise(heights))


def test_the_committed_page_is_what_the_committed_results_give(load: type[ModuleType]) -> None:
    page = load("page")
    text, pictures = page.page(page.ROOT / "benchmarks" / "results")
    docs = page.ROOT / "docs"
    assert (docs / "benchmarks.md").read_text(encoding="utf-8") == text
    assert {p.name: p.read_text(encoding="utf-8") for p in (docs / "benchmarks").iterdir()} == pictures


def test_methods_compare_with_lora_and_with_peft_in_their_round(load: type[ModuleType]) -> None:
    bench = load("methods")

    def run(speed: float) -> dict[str, float]:
        return {"examples_per_s": speed, "peak_rss_mb": 1.0, "trainable": 5}

    rounds = [
        {"graft lora": run(8), "peft lora": run(4), "graft prefix": run(6), "peft prefix": run(4)},
        {"graft lora": run(10), "peft lora": run(4), "graft full": run(6)},
    ]
    summary = bench.summarise(rounds)
    assert summary["ratios"]["examples/s lora / PEFT's"] == {"rounds": [2.0, 2.5], "median": 2.25}
    assert summary["ratios"]["examples/s prefix / lora"]["rounds"] == [0.75]
    claims = summary["claims"]
    assert claims["prefix / lora: at least 0.8"] is False and claims["full / lora: at least 0.5"] is True
    assert claims["dora / PEFT's: at least 2"] is None and "graft full" in bench.table(summary)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["lora", "dora", "prefix"])
def test_the_strong_peer_computes_what_its_peft_model_computes(
    method: str, load: type[ModuleType], tmp_path: Path
) -> None:
    """With the head at target tokens only and a prefix handed on by hand: the loss PEFT itself gives the same rows."""
    peers = load("_peers")
    job = peers.Job(
        model=str(model_folder(tmp_path / "model")), eot=0, examples="", steps=1, batch_size=2, rank=4, alpha=16,
        lora_dropout=0.0, targets=("q", "k", "v"), lr=0.01, warmup=1, untimed_steps=1, precision="fp32",
        trl_precision="fp32", loss_on="completion", seed=0, method=method,
    )  # fmt: skip
    peer = peers.StrongPeer(job)
    rows = [peers.Encoded([5, 6, 7, 8], [9, 0]), peers.Encoded([5, 9], [11, 0])]
    labels = torch.full((2, 6), -100)
    ids, mask = torch.zeros(2, 6, dtype=torch.long), torch.zeros(2, 6, dtype=torch.long)
    for b, row in enumerate(rows):
        whole = torch.tensor(row.prompt + row.completion)
        ids[b, : len(whole)], mask[b, : len(whole)] = whole, 1
        labels[b, len(row.prompt) : len(whole)] = torch.tensor(row.completion)
    with torch.no_grad():
        past = peer.model.get_prompt(batch_size=2) if method == "prefix" else None
        ours = peers.summed_loss(peer.causal_lm, peers.collate(rows), past) / 4
        theirs = peer.model(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    before = {n: p.detach().clone() for n, p in peer.trained.items()}
    peer.step(peers.collate(rows))
    assert any(not torch.equal(p, before[n]) for n, p in peer.trained.items())


def test_every_method_is_measured_with_flags_that_exist(load: type[ModuleType]) -> None:
    bench = load("methods")
    assert sorted(bench.METHODS) == sorted(METHODS)
    flags = {name for words in bench.METHODS.values() for name, _ in words}
    assert flags <= {field.name for field in dataclasses.fields(TrainConfig)}


# The course handout's experiments


def handout_result() -> dict[str, Any]:
    row = {
        "name": "a|b",
        "checkpoint": "best",
        "seeds": [0],
        "accuracy": 0.8,
        "low": 0.7,
        "high": 0.9,
        "val_loss": 0.5,
        "trainable": 10,
        "share_trained": 0.1,
        "steps": 4,
        "seconds": 60.0,
        "planned": {"seconds": 90.0},
        "examples_per_s": 2.0,
        "peak_rss_mb": 1.0,
    }
    curve = [{"step": 2, "val_loss": 0.7, "val_accuracy": 0.6}, {"step": 4, "val_loss": 0.5, "val_accuracy": 0.8}]
    machine = {"cores": 2, "cpu": "A", "family_model_stepping": "6/1/1", "flags": [], "memory_gb": 24, "torch": "2"}
    return {
        "machine": machine,
        "graftlm": "abc",
        "config": {"budget_steps": 4, "jobs": 2},
        "share": {"trainable": 10, "total": 100, "share_trained": 0.1},
        "tables": {"ranks": [row], "zero_shot": [{**row, "steps": None}]},
        "curves": {"ranks": {"a|b": curve}, "zero_shot": {}},
    }


def test_the_handouts_page_is_filled_between_its_marks(load: type[ModuleType]) -> None:
    bench = load("handout")
    found, pictures = bench.blocks(bench.STUDIES["handout"], handout_result(), "2026-01-02")
    assert found["share"] == "10 of 100 parameters: **10.00%**."
    assert found["machine"].startswith("2026-01-02, 4 steps of 16 reviews a run, 2 at a time. 2 cores of A")
    assert "80.0%" in found["ranks"] and "1.0 (1.5)" in found["ranks"] and "![" not in found["zero_shot"]
    assert set(pictures) == {"ranks-val_loss.svg", "ranks-val_accuracy.svg"}
    lines = ElementTree.fromstring(pictures["ranks-val_loss.svg"]).iter("{http://www.w3.org/2000/svg}polyline")
    (points,) = [line.attrib["points"].split() for line in lines]
    assert points[0].startswith("336.0,") and points[1].startswith("616.0,")
    assert float(points[0].split(",")[1]) < float(points[1].split(",")[1])  # the larger loss stands higher
    page = "".join(f"before\n<!-- {name} -->\nold\n<!-- end -->\nafter\n" for name in found)
    filled = bench.fill(page, found)
    assert "old" not in filled and filled.count("after") == len(found) and bench.fill(filled, found) == filled
    with pytest.raises(bench.BenchmarkError, match="marks"):
        bench.fill(page.replace("<!-- ranks -->", "<!-- rnaks -->"), found)


@pytest.mark.parametrize("name", ["handout", "methods"])
def test_the_committed_page_of_a_study_is_what_its_result_gives(name: str, load: type[ModuleType]) -> None:
    bench = load("handout")
    study = bench.STUDIES[name]
    newest = max((bench.ROOT / "benchmarks" / "results").glob(f"*-{name}*.json"))
    found, pictures = bench.blocks(study, json.loads(newest.read_text(encoding="utf-8")), newest.stem[:10])
    text = study.page.read_text(encoding="utf-8")
    assert bench.fill(text, found) == text
    assert {p.name: p.read_text(encoding="utf-8") for p in study.page.with_suffix("").iterdir()} == pictures


def test_processes_counts_bytes_and_compares_within_rounds(load: type[ModuleType]) -> None:
    bench = load("processes")
    text = "Inter-|   Receive  |  Transmit\n face |bytes\n    lo: 11 2 0 0 0 0 0 0 4321 5 0 0 0 0 0 0\n  eth0: 9 9\n"
    assert bench.loopback_bytes(text) == 4321
    assert bench.needed_bytes("lora one", "smollm2-135m") == 0
    # Two processes: each sends half of what it has and then half of the sum.
    trained = 16 * 30 * (576 + 576 + 2 * (576 + 192))
    assert bench.needed_bytes("lora two", "smollm2-135m") == 2 * 4 * trained

    def run(speed: float, losses: list[float]) -> dict[str, Any]:
        figures = {"examples_per_s": speed, "peak_rss_mb": 100.0, "sent_mb_per_step": 1.0, "needed_mb_per_step": 1.0}
        return {**figures, "losses": losses}

    one, two = run(10.0, [2.0, 1.0]), run(8.0, [2.0, 1.001])
    found = bench.summarise([{"lora one": one, "lora two": two, "full one": one, "full two": one}])
    assert found["ratios"]["examples_per_s lora two/one"]["median"] == pytest.approx(0.8)
    assert found["losses_apart"] == {"lora": pytest.approx(1e-3), "full": 0.0}
    assert "lora two" in bench.table(found)


# Serving


def answered(clients: int, tokens: float, errors: tuple[str, ...] = ()) -> dict[str, Any]:
    run = {"tokens_per_s": tokens, "requests_per_s": tokens / 32, "p50_s": 1.0, "p95_s": 2.0, "rss_mb": 900.0}
    return {**run, "clients": clients, "errors": list(errors)}


def test_serving_claims_what_its_turns_show(load: type[ModuleType]) -> None:
    bench = load("serve_load")
    turns = {
        "graft": [answered(1, 10), answered(64, 80)],
        "graft adapters": [answered(1, 9), answered(64, 26)],
        "plain": [answered(1, 12), answered(64, 16)],
    }
    steady = {"errors": [], "memory_mb": [100.0] * 2 + [200.0] * 5 + [201.0]}
    summary = bench.summarise(turns, steady, True)
    assert list(summary["claims"].values()) == [True, False, True, True, True]
    assert summary["ratios"]["tokens_per_s graft/plain, 64 clients"]["median"] == 5
    assert summary["curves"]["tokens_per_s"]["graft"] == [[1, 10], [64, 80]]
    assert "graft, 64 clients" in summary["medians"] and "graft, 1 client" in summary["medians"]
    assert "no request failed?" in bench.table(summary)
    turns["graft"][1]["errors"].append("ValueError: HTTP/1.1 500")
    growing = {"errors": [], "memory_mb": [100.0, 100.0, 200.0, 200.0, 210.0, 210.0, 220.0, 220.0]}
    assert list(bench.summarise(turns, growing, None)["claims"].values()) == [True, False, False, False, None]


def test_latencies_are_those_that_a_share_of_requests_keeps(load: type[ModuleType]) -> None:
    bench = load("serve_load")
    values = [float(n) for n in range(1, 101)]
    assert [bench.quantile(values, share) for share in (0.5, 0.95, 1.0)] == [50.0, 95.0, 100.0]
    assert bench.quantile([3.0], 0.95) == 3.0 and bench.quantile([1.0, 2.0], 0.95) == 2.0
    assert bench.quantile([], 0.5) == 0


def test_the_load_is_heard_out_and_errors_are_kept(load: type[ModuleType]) -> None:
    """Against a server of our own, whose third answer is a refusal: that client stops, the others go on."""
    import http.server
    import threading

    bench = load("serve_load")
    count = iter(range(1, 100))

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            usage = {"usage": {"completion_tokens": 5}, "choices": [{"text": body["prompt"].upper()}]}
            status, answer = (503, b"busy") if next(count) == 3 else (200, json.dumps(usage).encode())
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        one = bench.Server(None, "127.0.0.1", server.server_port)
        bodies = bench.bodies_of(["a", "b"], ["x", "y", "z"], 5)
        assert [json.loads(body)["model"] for body in bodies] == ["x", "y"]
        answers, seconds = asyncio.run(bench.load(one, bodies, 2, 60, most=9))
        server.shutdown()
    figures = bench.figures(answers, seconds)
    assert figures["requests"] == 8 and answers.tokens == 40 and answers.texts == {0: "A", 1: "B"}
    assert len(answers.errors) == 1 and "503" in answers.errors[0] and "busy" in answers.errors[0]


@pytest.mark.parametrize("words", [["--clients", "8,1"], ["--only", "plain"], ["--only", "graft,vllm"]])
def test_the_load_refuses_wrong_flags(load: type[ModuleType], words: list[str]) -> None:
    with pytest.raises(SystemExit):
        load("serve_load").parse(words)


def test_the_load_calls_serve_with_flags_that_exist(load: type[ModuleType]) -> None:
    words = load("serve_load").graft_command("m", "float32", [Path("a"), Path("b")], 32, 64)
    assert words[1:4] == ["-m", "graftlm", "serve"]
    config = parse("serve", ServeConfig, words[4:], "adapters").config
    assert config.adapters == ("one=a", "two=b") and (config.max_rows, config.max_tokens, config.port) == (64, 32, 0)


def test_what_became_slower_than_noise_is_said(load: type[ModuleType]) -> None:
    module = load("before_and_now")

    def round_of(before: float, now: float, again: float) -> dict[str, dict[str, float]]:
        speeds = {"before": before, "now": now, "again": again}
        return {side: {"speed": speed, "peak_rss_mb": 100.0 + 10 * (side == "now")} for side, speed in speeds.items()}

    found = {
        "train": [round_of(10, 9.6, 10), round_of(10, 9.5, 10), round_of(20, 20, 20)],  # within the 5% always allowed
        "score": [round_of(10, 9.4, 10)] * 3,
        "help": [round_of(10, 8.1, 8)] * 3,  # before itself lies a fifth apart
    }
    summary = module.summarise(found)
    assert list(summary["claims"].values()) == [True, False, True]
    assert summary["ratios"]["train now/before"] == {"rounds": [0.96, 0.95, 1.0], "median": 0.96}
    assert summary["medians"]["help"] == {
        "before": 9.0,
        "now": 8.1,
        "noise": pytest.approx(0.2),
        "memory now/before": pytest.approx(1.1),
    }
    said = module.table(summary)
    assert [line.endswith("SLOWER") for line in said.split("\n")] == [False, False, True, False]


def test_before_and_now_use_flags_that_exist(load: type[ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    module = load("before_and_now")
    for verb, *words in module.TASKS.values():
        assert verb == "--help" or parse(verb, COMMANDS[verb].config, words).explicit
    args = module.parse(["--before", str(module.ROOT), "--only", "full,score"])
    assert args.only == ["full", "score"]
    for words in (["--before", "nowhere"], ["--before", str(module.ROOT), "--only", "sleep"]):
        with pytest.raises(SystemExit):
            module.parse(words)
    assert "no checkout of graftlm" in capsys.readouterr().err
