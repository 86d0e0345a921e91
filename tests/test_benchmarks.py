"""benchmarks/: each script in its smallest form on a tiny model, in this process, and the arithmetic of the figures."""

import contextlib
import http.server
import importlib
import io
import itertools
import json
import math
import sys
import threading
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from graftlm import cli
from graftlm.config import PairsConfig, TrainConfig
from graftlm.config.flags import parse
from graftlm.exchange.huggingface import load_model
from graftlm.inference.scoring import score_labels
from graftlm.text.collate import Example
from graftlm.training.trainer import learning_rate
from inference.tiny import VOCAB, full_logits, ragged, tiny
from tiny import TEMPLATE, data_folder, model_folder

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text())
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def load(name: str) -> Any:
    return importlib.import_module(name)


def in_process(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> Any:
    """What harness.run_process gives, without a process of its own: torch is loaded once."""
    words = list(command[1:])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        if "graftlm" in words:
            status = cli.run(words[words.index("graftlm") + 1 :])
        else:
            settings = json.loads(Path(words[words.index("--child") + 1]).read_text())
            status = print(json.dumps(load(Path(words[0]).stem).child(settings))) or 0
    return load("harness").Process(out.getvalue(), "", status, 1.0, 100.0, 0.0)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiny model and data for any script, whose children then run in this process."""
    harness = load("harness")
    monkeypatch.setattr(harness, "run_process", in_process)
    monkeypatch.setattr(harness, "native_dtypes", lambda names: ["float32"])
    monkeypatch.setattr(
        harness, "graft", lambda *words: json.loads(in_process(["", "graftlm", *words, "--json"], tmp_path, {}).stdout)
    )
    monkeypatch.setattr("graftlm.cli.main.tune_malloc_retain", lambda: True)
    model, data = model_folder(tmp_path / "model"), data_folder(tmp_path / "data", train=256)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))  # long prompts
    return [f"--model={model}", f"--data={data}"]


def report(name: str, words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON object that a script prints last."""
    script, harness = load(name), load("harness")
    capsys.readouterr()
    assert harness.main(script.__doc__, script.run, script.FLAGS | getattr(script, "OWN", {}), words) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["machine"]["cores"] >= 1 and str(Path.home()) not in json.dumps(found["machine"])
    return found


# ------------------------------------------------------------------------------------------------------- the scripts

ONCE = ["--rounds", "1"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_a_help_page(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = load(name)
    with pytest.raises(SystemExit) as stop:
        if name == "page":
            monkeypatch.setattr(sys, "argv", ["page", "--help"])
            script.main()
        load("harness").main(script.__doc__, script.run, script.FLAGS, ["--help"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("usage:")


def test_packing_computes_less_than_padding(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [small[0], "--rounds=1", "--batches=2", "--layers=1", "--only=short"]
    medians = report("packing", words, capsys)["medians"]
    computed = {name: figures["computed"] for name, figures in medians.items()}
    assert 1 < computed["short random packed"] < computed["short random"] - 0.2
    assert 1 <= computed["short grouped packed"] <= computed["short grouped"] < computed["short random"]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_training_and_methods(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [*small, *ONCE, "--steps", "4", "--batch_size", "4"]
    found = report("train_vs_peers", [*words, "--only", "graft,peft"], capsys)
    assert list(found["medians"]) == ["graft", "peft"] and found["claims"]["at least 6.5 times trl"] is None
    assert found["runs"][0]["graft"]["trainable"] == found["runs"][0]["peft"]["trainable"]
    graft, peft = (found["medians"][name]["val_loss"] for name in ("graft", "peft"))
    assert graft == pytest.approx(peft, rel=0.05)
    found = report("methods", [*words, "--only", "prefix"], capsys)
    assert list(found["medians"]) == ["graft prefix", "peft prefix"]
    assert list(found["ratios"]) == ["examples/s prefix / PEFT's"]


GENERAL = {"imdb": ["a long and a good film\n" * 4, "dull"], "licences": ["no warranty of any kind, " * 4, "nor any"]}
ANCHORED = ("lora", "rslora", "dora", "ia3", "prefix", "full")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_pefts_methods_and_ours_start_and_learn_equally(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetting, anchor = load("forgetting"), load("peft_anchor")
    monkeypatch.setattr(forgetting, "general_texts", lambda: GENERAL)
    file = tmp_path / "found.json"
    words = [*small, "--steps=3", "--batch_size=4", "--seeds=1", f"--json-out={file}"]
    found = report("peft_anchor", [*words, f"--methods={','.join(ANCHORED)}"], capsys)
    runs = {(run["method"], run["implementation"]): run for run in found["runs"]}
    assert len(runs) == 2 * (1 + len(ANCHORED))
    peft, graft = runs["base", "peft"], runs["base", "graft"]
    assert peft["predicted"] == graft["predicted"] and len(set(found["config"]["answers"])) == 2
    for text in GENERAL:
        assert peft["losses"][text]["nats"] == pytest.approx(graft["losses"][text]["nats"], rel=1e-5)
    for method in ANCHORED:
        peft, graft = runs[method, "peft"], runs[method, "graft"]
        assert peft["trainable"] == graft["trainable"] > 0
        assert peft["first_loss"] == pytest.approx(graft["first_loss"], abs=2e-4)
        assert graft["seconds"] > 0 and peft["seconds"] > 0
    for method in ("ia3", "prefix", "full"):  # nothing is drawn at random
        peft, graft = runs[method, "peft"], runs[method, "graft"]
        assert peft["last_loss"] == pytest.approx(graft["last_loss"], abs=5e-4)
        assert abs(peft["last_loss"] - peft["first_loss"]) > 1e-3
        for text, measured in peft["forgetting"].items():
            assert measured["change"] == pytest.approx(graft["forgetting"][text]["change"], abs=1e-3)
    monkeypatch.setattr(anchor, "measure", None)  # nothing is measured twice
    assert report("peft_anchor", [*words, "--methods=lora,full"], capsys)["runs"] == found["runs"]
    other = [*small, "--steps=2", "--batch_size=4", f"--json-out={file}"]
    assert load("harness").main(anchor.__doc__, anchor.run, anchor.FLAGS, other) == 1
    assert "other settings" in capsys.readouterr().err


def test_the_anchors_learning_rate_is_that_of_graft_train() -> None:
    anchor = load("peft_anchor")
    job = load("peers").Job("", "", 0, steps=40, batch_size=1, lr=0.5)
    config = TrainConfig(out_dir="x", lr=0.5, warmup_steps=job.warmup, max_iters=40)
    for step in range(1, 41):
        assert 0.5 * anchor.learning_rate(step, job) == pytest.approx(learning_rate(step, config))


def test_the_anchors_page_compares_in_pairs_and_hides_seconds_next_to_other_work() -> None:
    anchor = load("peft_anchor")
    change = {"sha256": "x", "change": 0.25, "ci_low": 0.125, "ci_high": 0.375}
    answers, common = "01" * 50, {"seed": 0, "first_loss": 1.0, "trainable": 1000, "peak_rss_mb": 2000.0}
    common |= {"forgetting": {"imdb": change, "licences": change}}
    peft = {**common, "method": "lora", "implementation": "peft", "predicted": "11" * 10 + "01" * 40, "seconds": 99.4}
    graft = {**common, "method": "lora", "implementation": "graft", "predicted": "11" * 4 + "01" * 46, "seconds": 50.0}
    graft |= {"first_loss": 1.0005}
    runs = [{**peft, "other_work": False, "graftlm": "abc"}, {**graft, "other_work": True, "graftlm": "def"}]
    config = {"answers": answers, "steps": 2, "batch_size": 4}
    about = {"cpu": "c", "family_model_stepping": "1/2/3", "flags": [], "cores": 2, "memory_gb": 8, "torch": "2"}
    result = {"config": config, "runs": runs, "machine": about, "graftlm": "later"}
    result |= {"date": "2026-01-02", "file": "f.json"}
    text = anchor.block([result])
    first, second = [line.split(" | ") for line in text.splitlines() if line.startswith("| LoRA")]
    assert first[1:5] == ["PEFT", "1,000", "90.0% (82.6 to 94.5)", ""]
    assert first[5:] == ["+0.250 (0.125 to 0.375) / +0.250 (0.125 to 0.375)", "99", "2,000 |"]
    assert second[1:5] == ["graft", "1,000", "96.0% (90.2 to 98.4)", "+6.0 (1.3 to 10.7), p = 0.031"]
    assert second[6] == ""
    assert "first step differ by at most 5.0e-04 nats" in text and "next to other work (no seconds)" in text
    assert "graftlm at abc, def." in text and text.startswith("Missing: untrained base, DoRA r=16, IA3, ")
    assert anchor.block([]).startswith("Missing: untrained base, LoRA r=16, DoRA")
    # Pairs of several machines: of each method the newest pair with the newest settings.
    ia3 = [{**each, "method": "ia3", "trainable": 7} for each in runs]
    alone = {**peft, "method": "dora", "other_work": False}
    newer = {**result, "runs": [*ia3, alone], "machine": {**about, "cpu": "d"}, "date": "2026-01-03", "file": "g.json"}
    longer = {**result, "config": {**config, "steps": 9}, "runs": [alone], "file": "a.json"}
    text = anchor.block([longer, {**result, "runs": [*runs, *ia3]}, newer])
    assert text.startswith("Missing: untrained base, DoRA r=16, prefix tuning")
    names = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")][2:]
    assert names == [[f"| {method}", name] for method in ("LoRA r=16", "IA3") for name in ("PEFT", "graft")]
    one, other = [line for line in text.splitlines() if line.startswith("- ")]
    assert "f.json), LoRA r=16: 2 steps" in one and "cores of c (" in one
    assert "g.json), IA3: 2 steps" in other and "cores of d (" in other


def test_preferences(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = report("dpo_vs_trl", [*small, *ONCE, "--steps", "3", "--batch_size", "4", "--only", "graft"], capsys)
    graft = found["medians"]["graft"]
    assert graft["first_loss"] == pytest.approx(math.log(2), rel=0.02)
    assert 0 < graft["pairs_per_s_with_reference"] < graft["pairs_per_s"]


def test_classification(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--only", "graft-score,graft-generate,hf-generate"]
    found = report("evaluate_vs_peers", [*small, *ONCE, "--limit", "4", *only], capsys)
    assert found["medians"]["graft-generate"]["accuracy"] == found["medians"]["hf-generate"]["accuracy"]
    assert found["claims"]["equal accuracy"] is True


def test_classification_through_a_server(
    small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With doubles of the server and of lm_eval: its client scores here (test_server.py asks a server as it does)."""
    bench = load("evaluate_vs_peers")

    class Client:
        def __init__(self, base_url: str, model: str, tokenizer: str, **settings: Any) -> None:
            assert (base_url, model) == ("http://host:1/v1/completions", "name")
            assert settings == {"tokenizer_backend": "huggingface", "batch_size": 16}
            self.model = load_model(Path(tokenizer), torch.device("cpu"), torch.float32)

        def _loglikelihood_tokens(self, requests: Any) -> list[tuple[float, bool]]:
            examples = [Example(prompt, (), None, "", "", "") for _, prompt, _ in requests]
            each = zip(examples, requests, strict=True)
            return [(float(score_labels(self.model, [example], [label])), False) for example, (*_, label) in each]

    server = load("serve_load").Server(0, "host", 1, ["name"])
    monkeypatch.setattr(bench, "started", lambda command, folder: contextlib.nullcontext(server))
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.models", ModuleType("lm_eval.models"))
    client = SimpleNamespace(LocalCompletionsAPI=Client)
    monkeypatch.setitem(sys.modules, "lm_eval.models.openai_completions", client)
    only = ["--only", "graft-score,harness-server"]
    found = report("evaluate_vs_peers", [*small, *ONCE, "--limit", "20", *only], capsys)
    assert found["medians"]["graft-score"]["accuracy"] == found["medians"]["harness-server"]["accuracy"] > 0
    assert found["claims"]["equal accuracy"] is True


def test_decoding(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rows", "3", "--new_tokens", "3", "--prompt_tokens", "3", "--repeats", "1", "--threads", "1"]
    found = report("decode_vs_peers", [*small, *ONCE, *words], capsys)
    assert list(found["medians"]) == ["graft-float32", "transformers"]  # the folder holds no .gguf file
    assert found["claims"]["the tokens of transformers in float32"] is True
    assert (
        found["medians"]["graft-float32"]["tokens_per_s_rows"] > 0
        and "tokens_rows" not in found["runs"][0]["transformers"]
    )


def test_packed_bases(small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = report("packed_scoring", [*small, *ONCE, "--limit", "4"], capsys)
    assert found["claims"]["equal labels"] is True and list(found["medians"]) == ["dense", "stored"]
    monkeypatch.setattr(load("packed_scoring"), "TRAINED", ("dense", "bf16"))
    found = report("packed_scoring", [*small, *ONCE, "--study", "demo", "--steps", "2"], capsys)
    assert found["claims"]["within float32's interval"] is True and list(found["medians"]) == ["dense", "bf16"]
    assert found["medians"]["bf16"]["seconds_to_first_step"] > 0


def test_reading_and_tokenizing(
    small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftlm.training.token_cache.MIN_EXAMPLES", 1)
    found = report("data_vs_datasets", [*small, *ONCE, "--rows", "100", "--large", "200"], capsys)
    assert list(found["medians"]) == ["graft", "graft again", "datasets", "datasets again"]
    examples = {name: run["examples"] for name, run in found["runs"][0].items()}
    assert examples["datasets"] == examples["datasets again"] == 80
    assert examples["graft"] == examples["graft again"] == pytest.approx(80, abs=3)  # a fifth of the different texts
    assert found["large"]["datasets"]["examples"] == 160
    assert found["large"]["graft"]["array_mb"] > found["runs"][0]["graft"]["array_mb"] > 0


def test_few_shot(small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval is not installed here: graft takes its place, and its scores are changed a little."""
    bench, measure = load("fewshot_vs_peers"), load("fewshot_vs_peers").measure

    def double(side: str, task: Any, folder: Path) -> Any:
        found = measure("graft", task, folder)
        return {**found, "scores": [[x + 5e-4 * (side != "graft") for x in row] for row in found["scores"]]}

    monkeypatch.setattr(bench, "measure", double)
    flags = ["--limit", "4", "--shots", "1", "--batch_sizes", "2", "--dtypes", "float32"]
    found = report("fewshot_vs_peers", [*small, *ONCE, *flags], capsys)
    assert found["scores_apart"] == {"float32": pytest.approx(5e-4, rel=1e-3)}
    assert found["claims"]["the same log-likelihoods in float32, to 1e-3"] is True
    assert "scores" not in found["runs"][0]["harness-float32"]


def test_options_and_plan(
    small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = load("options")
    monkeypatch.setitem(bench.OPTIONS, "train-layers", {"upper": {"train_layers": "1:"}, "all": {}})
    monkeypatch.setitem(bench.OPTIONS, "processes", {"full one": bench.FULL})
    words = ["--reviews", "32", "--only", "train-layers,processes"]
    found = report("options", [*small, *ONCE, *words], capsys)
    assert list(found["medians"]) == ["upper", "all", "full one"]
    assert list(found["ratios"]) == ["later epochs upper/all"]
    monkeypatch.setattr(load("plan_vs_run"), "RUNS", {"all weights": {"rank": 0, "batch_size": 4}})
    found = report("plan_vs_run", [*small, "--steps", "3"], capsys)
    assert list(found["ratios"]) == ["seconds, all weights", "peak_rss_mb, all weights"]


def test_serving(small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a server of our own that refuses its 30th request."""
    bench, count = load("serve_load"), itertools.count(1)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            usage = {"usage": {"completion_tokens": 5}, "choices": [{"text": body["prompt"].upper()}]}
            status, answer = (503, b"busy") if next(count) == 30 else (200, json.dumps(usage).encode())
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *words: object) -> None:
            pass

    @contextlib.contextmanager
    def started(command: Sequence[str], folder: Path) -> Iterator[Any]:
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield SimpleNamespace(
                host="127.0.0.1", port=server.server_port, cpu_seconds=lambda: 0.0, rss_mb=lambda: 7.0
            )
            server.shutdown()

    monkeypatch.setattr(bench, "started", started)
    words = ["--clients", "1,2", "--seconds", "0.2", "--long", "1.5", "--max-other", "9", "--prompts", "12"]
    found = report("serve_load", [*small, *words, "--only", "graft,graft adapters"], capsys)
    assert found["medians"]["graft, 2 clients"]["tokens_per_s"] > 0 and found["long"]["memory_mb"] == [7.0]
    assert found["claims"]["no request failed"] is False
    assert found["claims"]["the plain server's texts in float32"] is None
    command = bench.graft_command("m", "float32", {"one": Path("a")}, 32, 64)
    assert command[1:5] == ["-m", "graftlm", "serve", "one=a"]


def test_before_and_now(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    bench = load("before_and_now")
    words = [*small, *ONCE, "--before", str(FOLDER.parent), "--only", "score,help"]
    found = report("before_and_now", words, capsys)
    assert list(found["ratios"]) == ["score now/before", "help now/before"] and found["unknown_before"] == []
    assert bench.spelled({"mode": 1, "limit": 2}, "__read {both} __limit INT") == {"read": 1, "limit": 2}
    assert bench.spelled({"mode": 1, "limit": 2}, "__mode {both} __limit INT") == {"mode": 1, "limit": 2}


def test_every_piece_of_the_prompting_page_is_a_command_that_parses() -> None:
    from graftlm.config.flags import parse

    for verb, *words in load("prompting").pieces(200, 2, "runs/x").values():
        assert parse(verb, cli.COMMANDS[verb].config, [*words, "--json"]).explicit


# ---------------------------------------------------------------------------------------------------- the arithmetic


def run(speed: float, share: float = 0.0) -> dict[str, Any]:
    return {"speed": speed, "other_cpu_share": share}


def test_a_disturbed_run_is_repeated_and_repeats_are_bounded(tmp_path: Path) -> None:
    harness = load("harness")
    runs = iter([run(1, 0.2), run(2, 0.031), run(3, 0.03), *[run(4, 0.5)] * 3])
    args = SimpleNamespace(rounds=2, max_other=0.03, attempts=3)
    rounds, rejected = harness.run_rounds({"a": lambda folder: next(runs)}, args, tmp_path, "speed")
    assert rounds == [{"a": run(3, 0.03)}, {}]  # exactly the limit is accepted
    assert [each["speed"] for each in rejected] == [1, 2, 4, 4, 4]
    with pytest.raises(harness.BenchmarkError, match="no undisturbed run of a"):
        harness.run_rounds({"a": lambda folder: run(1, 0.5)}, args, tmp_path, "speed")


def test_ratios_are_formed_within_a_round_and_goals_compare_their_median() -> None:
    """The machine slows down in round 2: the median of the ratios is 4, the ratio of the medians would be 12 / 3.5."""
    harness = load("harness")
    rounds = [{"trl": run(5), "graft": run(20)}, {"trl": run(2), "graft": run(8)}, {"trl": run(6), "graft": run(12)}]
    rounds.append({"trl": run(1)})
    goals = {
        "4 times": ("r", ">=", 4.0),
        "5 times": ("r", ">=", 5.0),
        "at most 4": ("r", "<=", 4.0),
        "?": ("q", ">=", 1.0),
    }
    pairs = {"r": ("speed", "graft", "trl"), "q": ("speed", "graft", "peft")}
    summary = harness.summarise(rounds, ("speed",), pairs, goals)
    assert summary["ratios"] == {"r": {"rounds": [4, 4, 2], "median": 4}}
    assert summary["medians"] == {"trl": {"speed": 3.5}, "graft": {"speed": 12}}
    assert list(summary["claims"].values()) == [True, False, True, None]
    text = harness.table(summary)
    assert "4.000   (4.000  4.000  2.000)" in text and "does NOT hold" in text and "not measured" in text


def test_the_machine() -> None:
    harness = load("harness")
    cpuinfo = (
        "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: A CPU\nstepping\t: 1\nflags\t\t: fpu avx2\n\n"
    )
    cpuinfo += "processor\t: 1\nmodel name\t: Another\nflags\t\t: amx_bf16\n"
    about = {"cpu": "A CPU", "family_model_stepping": "25/17/1", "flags": ["avx2"]}
    assert harness.cpu_description(cpuinfo) == about
    assert harness.native_dtypes(("float32", "bfloat16"), "flags : avx2 avx512f") == ["float32"]
    assert harness.native_dtypes(("float32", "bfloat16"), "flags : avx512_bf16") == ["float32", "bfloat16"]
    ticks = 100 + 20 + 30 + 4 + 6 + 40  # idle 9000, waiting 800; stolen time counts, guest time is in user time already
    assert harness.busy_seconds("cpu  100 20 30 9000 800 4 6 40 7 0\ncpu0 1") == pytest.approx(ticks / 100)


def test_a_process_is_measured(tmp_path: Path) -> None:
    code = "import sys; x = bytearray(200_000_000); print(1); print('no', file=sys.stderr); sys.exit(3)"
    seen = load("harness").run_process([sys.executable, "-c", code], tmp_path, {})
    assert (seen.status, seen.stdout, seen.stderr) == (3, "1\n", "no\n")
    assert seen.peak_rss_mb > 190 and seen.seconds > 0 and seen.other_cpu_share >= 0


def test_what_is_slower_than_noise_is_found() -> None:
    def round_of(*speeds: float) -> dict[str, dict[str, float]]:
        return {
            side: {"speed": s, "peak_rss_mb": 1.0} for side, s in zip(("before", "now", "again"), speeds, strict=True)
        }

    found = {
        "train": [round_of(10, 9.6, 10), round_of(10, 9.5, 10), round_of(20, 20, 20)],  # within the 5% always allowed
        "score": [round_of(10, 9.4, 10)] * 3,
        "help": [round_of(10, 8.1, 8)] * 3,  # the two runs of before differ by a fifth
    }
    summary = load("before_and_now").summarise(found)
    assert list(summary["claims"].values()) == [True, False, True]
    assert summary["ratios"]["train now/before"] == {"rounds": [0.96, 0.95, 1.0], "median": 0.96}
    assert summary["medians"]["help"]["noise"] == pytest.approx(0.2)


def test_small_figures() -> None:
    serve, peers, options = load("serve_load"), load("peers"), load("options")
    values = [float(n) for n in range(1, 101)]
    assert [serve.quantile(values, share) for share in (0.5, 0.95, 1.0)] == [50.0, 95.0, 100.0]
    assert serve.quantile([], 0.5) == 0
    assert serve.growth([100.0] * 2 + [200.0] * 4 + [210.0] * 2) == pytest.approx(210 / 200)
    assert peers.speed([100.0, 110.0, 111.0, 112.0, 113.0], 2, 4) == 4.0
    rows = [{"examples": 16 * (i + 1), "tokens": 100 * (i + 1), "tokens_per_s": 50 if i < 2 else 200} for i in range(6)]
    assert options.epoch_speeds(rows, 2) == {"first_epoch": 8.0, "later_epochs": 32.0}
    one, two = ({"losses": [2.0, x]} for x in (1.0, 1.001))
    assert options.loss_difference([{"one": one, "two": two}], "one", "two") == pytest.approx(1e-3)
    run = {"seconds": {"ratio": 1.19}, "peak_rss_mb": {"ratio": 0.81}}
    assert list(load("plan_vs_run").summarise({"a": run})["claims"].values()) == [True]
    run = {**run, "peak_rss_mb": {"ratio": 1.21}}
    assert list(load("plan_vs_run").summarise({"a": run})["claims"].values()) == [False]
    shared = {"n": 4, "prompt_tokens": 110, "shared_prompt_tokens": 80, "new_tokens": 7.0}
    assert load("prompting").computed(shared) == 30 + 20 + 7


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("method", ["lora", "dora", "prefix"])
def test_the_peft_loop_computes_what_its_peft_model_computes(method: str, tmp_path: Path) -> None:
    """With the head at target tokens only, without a mask, and with a prefix passed by hand."""
    peers = load("peers")
    job = peers.Job(str(model_folder(tmp_path / "model")), "", 0, 2, 2, method=method, rank=4, lora_dropout=0.0)
    loop = peers.PeftLoop(job)
    rows = [peers.Encoded([5, 6, 7, 8], [9, 0]), peers.Encoded([5, 9], [11, 0])]
    (batch,) = peers.length_batches(rows, 2)
    labels, mask = torch.full((2, 6), -100), torch.zeros(2, 6, dtype=torch.long)
    for b, row in enumerate(sorted(rows, key=lambda row: row.length)):
        mask[b, : row.length] = 1
        labels[b, len(row.prompt) : row.length] = torch.tensor(row.completion)
    with torch.no_grad():
        past = loop.model.get_prompt(batch_size=2) if method == "prefix" else None
        ours = peers.summed_loss(loop.causal_lm, batch, past) / 4
        expected = loop.model(input_ids=batch.ids, attention_mask=mask, labels=labels).loss
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    before = {name: p.detach().clone() for name, p in loop.trained.items()}
    loop.step(batch)
    assert any(not torch.equal(p, before[name]) for name, p in loop.trained.items())


# --------------------------------------------------------------------------------------------------------- the pages


def test_the_committed_pages_are_what_the_committed_results_give() -> None:
    for path, text in load("page").all_pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python benchmarks/page.py"


def test_a_claim_has_a_row_for_each_processor_and_says_what_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    page = load("page")
    machine = {"family_model_stepping": "25/1/1"}
    result = {"machine": machine, "date": "2026-01-02", "file": "x.json", "claims": {"fast": False}}
    result |= {"medians": {"graft": {"speed": 2.0}}, "ratios": {"r": {"rounds": [1.9, 2.1, 2.0], "median": 2.0}}}
    monkeypatch.setattr(page, "results", lambda kind: [result, {**result, "ratios": {}}])
    (cells,) = page.rows("train", "a / b", "{m[graft][speed]:.1f}", "r", "other | fast")
    assert cells[1:4] == ["2.0", "**2.00** (1.90, 2.10, 2.00)", "fast: does **not** hold"]


def test_marked_parts_are_filled_and_charts_have_every_point_at_its_place() -> None:
    render = load("render")
    page = "before\n<!-- a -->\nold\n<!-- end -->\nafter\n"
    assert render.fill(page, {"a": "new"}) == page.replace("old", "new")
    with pytest.raises(render.BenchmarkError, match="marks"):
        render.fill(page, {"b": "new"})
    lines = {"one": [(0.0, 0.5), (4.0, 0.7), (16.0, 0.9)], "a<b": [(1.0, 0.6)]}
    root = ElementTree.fromstring(render.chart(lines, "title", "KL", (0, 4, 99), root=True))
    first, second = [line.attrib["points"].split() for line in root.iter(f"{SVG}polyline")]
    assert [point.split(",")[0] for point in first] == ["56.0", "346.0", "636.0"]  # square roots 0, 2, 4
    heights = [float(point.split(",")[1]) for point in first]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2) and heights[0] > heights[2]
    assert len(second) == 1 and {"a<b", "KL", "4"} <= {text.text for text in root.iter(f"{SVG}text")}


def test_the_page_on_large_models_is_what_the_formulas_give() -> None:
    text = (FOLDER.parent / "docs" / "large_models.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(("| 7B", "| 70B"))]
    (command,) = [line.split()[1:] for line in text.splitlines() if line.startswith("graft ")]
    assert len(rows) == 6
    for name, batch_size, *shown in rows:
        size, method, *_, gpus = name.split(", ")
        flags = [f"--init_from=meta-llama/Llama-2-{size.lower()}-hf", f"--rank={16 if method != 'full' else 0}"]
        flags += [f"--world_size={gpus.split()[0]}", f"--batch_size={batch_size}", "--shard" * ("shard" in name)]
        flags += ["--bandwidth_gbs=35" if gpus == "64 GPUs" else "--bandwidth_gbs=315"]
        words = [*command, *filter(None, flags), "--json"]
        found = json.loads(in_process(["", "graftlm", *words], FOLDER, {}).stdout)
        ranks, step = found["distributed"], found["step"]
        held, saved = ranks["bytes"]["total"] / 1e9, step["activation_bytes"] / 1e9
        fits = "yes" if held + saved < 80 else "**no**"
        cells = [held, saved, held + saved, ranks["comm_bytes_per_step"]["total"] / 1e9]
        numbers = [load("render").number(cell) for cell in (*cells, step["compute_seconds"], step["comm_seconds"])]
        assert shown == [*numbers[:3], fits, *numbers[3:]]


# ------------------------------------------------------------------------------------------ the controlled experiment


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("One two three  four five six. Seven\n\teight.", ("One two", " three four five six. Seven eight.")),
        ("One two three four five six (seven!) Eight nine", ("One two", " three four five six (seven!)")),
        ("One two three four five six?<br /><br />Eight.", ("One two", " three four five six?")),
        ("One two three. Four five six seven eight nine ten", None),  # too few words follow the prompt
        ("One two three four five six seven eight nine ten.", None),  # the sentence is too long
    ],
)
def test_a_text_is_whole_sentences_after_a_prompt(text: str, found: tuple[str, str] | None) -> None:
    assert load("controlled_sentiment").beginning(text, 2, 9) == found


def test_best_of_n_is_the_mean_over_all_subsets_and_has_its_kl() -> None:
    frontier, rewards = load("frontier"), np.array([[0.1, 0.9, 0.4, 0.4, 0.7], [5.0, 1.0, 2.0, 3.0, 4.0]])
    for n in range(1, 6):
        expected = [np.mean([max(some) for some in itertools.combinations(row, n)]) for row in rewards]
        assert frontier.best_of_n(rewards, n) == pytest.approx(expected, rel=1e-12)
    chance = np.diff((np.arange(100_001) / 100_000) ** 8)
    assert frontier.kl_of_best(8) == pytest.approx(float((chance * np.log(chance * 100_000)).sum()), abs=1e-3)


def test_the_kl_of_answers_is_the_kl_of_their_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all answers of up to two tokens, weighted by their probability; and ragged prompts do not mix."""
    policy, reference, prompt = tiny("llama"), tiny("llama", seed=1), ragged([5])[0]
    answers = [[0], *([a, b] for a in range(1, VOCAB) for b in range(VOCAB))]

    def log_probs(model: Any) -> Any:
        first = full_logits(model, prompt)[-1].log_softmax(-1)
        second = {a: full_logits(model, [*prompt, a])[-1].log_softmax(-1) for a in range(1, VOCAB)}
        return np.array([float(first[a[0]]) + (float(second[a[0]][a[1]]) if len(a) > 1 else 0.0) for a in answers])

    ours, others = log_probs(policy), log_probs(reference)
    chance, kl_of_answers = np.exp(ours), load("controlled_sentiment").kl_of_answers
    models = SimpleNamespace(model=policy), SimpleNamespace(model=reference)
    prompts, some = ragged([5, 9, 3]), [[4, 7, 0], [], [9]]
    alone = [kl_of_answers(*models, [p], [a])[0] for p, a in zip(prompts, some, strict=True)]
    assert kl_of_answers(*models, prompts, some) == pytest.approx(alone, rel=1e-4) and alone[1] == 0
    monkeypatch.setattr(load("controlled_sentiment"), "ROWS", 600)
    kl = kl_of_answers(*models, [prompt] * len(answers), answers)
    assert float((chance * kl).sum()) == pytest.approx(float((chance * (ours - others)).sum()), rel=1e-4)


def line(*points: tuple[float, list[float]]) -> list[Any]:
    """A line of points (KL, rewards of the prompts)."""
    return [load("frontier").Point(np.array(r), np.full(len(r), float(kl))) for kl, r in points]


def test_a_line_has_a_reward_at_each_kl_up_to_its_end_and_a_kl_at_each_reward() -> None:
    frontier = load("frontier")
    one = line((0, [0.4, 0.6]), (8, [0.9, 0.9]), (2, [0.6, 0.8]))  # sorted by KL: 0.5, 0.7, 0.9
    short = line((0, [0.4, 0.6]), (4, [0.5, 0.7]))
    every = np.array([[0, 1], [0, 0]])
    rewards, resampled = frontier.rewards_at([one, short], np.array([1.0, 5.0]), every)
    assert rewards[:, 0] == pytest.approx([0.6, 0.525]) and rewards[0, 1] == pytest.approx(0.8)
    assert np.isnan(rewards[1, 1])  # it ends at 4 nats
    assert resampled[0, :, 0] == pytest.approx([0.6, 0.525]) and resampled[1, 0] == pytest.approx([0.5, 0.75])
    assert frontier.kl_at_reward(one, 0.8) == pytest.approx(5) and frontier.kl_at_reward(one, 0.7) == pytest.approx(2)
    assert frontier.kl_at_reward(one, 0.91) is None


def test_intervals_over_seeds_are_students_and_a_verdict_needs_both_intervals() -> None:
    frontier, half = load("frontier"), 4.3027 * 0.03 / math.sqrt(3)  # t at 0.975 with 2 degrees of freedom
    assert frontier.seed_interval([0.80, 0.86, 0.83]) == pytest.approx((0.83 - half, 0.83 + half), abs=1e-4)
    assert frontier.seed_interval([0.8]) is None

    def verdict(seeds: tuple[float, float] | None, prompts: tuple[float, float]) -> str:
        return str(frontier.verdict({"ci_seeds": seeds, "ci_prompts": prompts}))

    assert verdict((0.1, 0.2), (0.05, 0.3)) == "higher" and verdict((-0.2, -0.1), (-0.3, -0.1)) == "lower"
    assert verdict((0.1, 0.2), (-0.05, 0.3)) == verdict((-0.1, 0.2), (0.1, 0.3)) == "not distinguished"
    assert verdict(None, (0.1, 0.2)) == "one seed"


def test_variants_are_compared_seed_by_seed_where_both_lines_have_the_kl() -> None:
    frontier, every = load("frontier"), np.array([[0, 1], [1, 0]])
    kls, start = np.array([1.0, 4.0]), (0, [0.5, 0.5])
    other = [line(start, (4, [0.5 + x, 0.7 + x])) for x in (0.0, 0.1, 0.4)]
    own = [line(start, (2, [0.7 + x, 0.9 + x])) for x in (0.0, 0.1)]
    own[0] += line((5, [0.9, 0.9]))
    at, at_other = (frontier.rewards_at(lines, kls, every) for lines in (own, other))
    found = frontier.compare(at, at_other, 0)  # only the first two seeds: 0.65 and 0.7, less 0.525 and 0.55
    assert found["seeds"] == pytest.approx([0.125, 0.15]) and found["mean"] == pytest.approx(0.1375)
    assert found["ci_prompts"] == pytest.approx([0.1375, 0.1375]) and found["verdict"] == "not distinguished"
    assert frontier.compare(at, at_other, 1) is None  # the second seed ends at 2 nats


def test_the_best_pair_is_the_one_that_pairing_best_takes() -> None:
    bench, pairs = load("controlled_sentiment"), importlib.import_module("graftlm.inference.pairs")
    answers = [pairs.SampledCompletion(f" {i}", i != 1, True) for i in range(4)]
    scored = {"a": [0.3, 0.9, 0.1, 0.9], "b": [0.5, 0.5, 0.5, 0.5], "c": [0.2, 0.1, 0.7, 0.4]}
    given = list(scored), [answers] * 3, list(scored.values())
    every, best = (pairs.make_pairs(*given, pairing=pairing)[0] for pairing in ("all", "best"))
    by_prompt = [[row for row in every if row["prompt"] == prompt] for prompt in scored]
    assert [row for rows in by_prompt for row in bench.widest(rows)] == best and len(best) == 2
    rows = bench.chosen([*best, best[0]])
    assert rows[0] == {"prompt": "a", "completion": " 1", "finished": False} and len(rows) == 2


TINY = """
classifier = {{ init_from = "{0}/model", data = "{0}/data", template = {1}, rank = 4, max_iters = 4, batch_size = 4 }}
sft = {{ init_from = "{0}/model", rank = 4, max_iters = 4, batch_size = 4 }}
answers = {{ num_samples = 3, max_new_tokens = 16 }}
pairs = {{ first = 0, prompts = 8, pairing = "best", validation = 2 }}
train = {{ objective = "dpo", beta = 0.1, max_iters = 4, batch_size = 4, eval_every = 2, kl_samples = 0 }}
[texts]
data = "{0}/reviews"
prompt_words = 2
words = 12
train = 16
validation = 4
prompts = 12
tuning = 2
held_out = 5
[evaluation]
prompts = "held_out"
limit = 4
max_new_tokens = 16
best_of = 4
seed = 1
resamples = 20
kl = [1e-7, 1e9]
reward = 0.9
claim_kl = 1e-7
[[variants]]
name = "first"
why = "first of all"
seeds = 2
steps = [2, 4]
[[variants]]
name = "all"
why = "more"
against = "first"
pairs = {{ pairing = "all" }}
train = {{ lr = 1e-3 }}
steps = [4]
[[variants]]
name = "chosen"
why = "SFT"
against = "first"
train = {{ objective = "sft" }}
steps = [4]
[[variants]]
name = "again"
why = "on-policy"
against = "first"
after = "first"
after_step = 2
pairs = {{ first = 8, prompts = 4 }}
steps = [4]
[[variants]]
name = "other"
why = "another reference"
against = "first"
sft = {{ max_iters = 6 }}
steps = [4]
"""


def test_the_whole_experiment_on_a_tiny_model(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, page, work = load("controlled_sentiment"), load("frontier_page"), tmp_path / "work"
    monkeypatch.setattr(bench, "graft", load("harness").graft)
    for split, first in (("train", 0), ("validation", 100), ("test", 200)):
        texts = [f"film{n} was {'good' if n % 2 else 'bad'} and x{n} is so. The end." for n in range(first, first + 40)]
        load("harness").write_rows(tmp_path / "reviews" / f"{split}.jsonl", [{"text": t, "label": 0} for t in texts])
    (tmp_path / "tiny.toml").write_text(TINY.format(tmp_path, json.dumps(TEMPLATE)))
    words = ["--recipe", str(tmp_path / "tiny.toml"), "--work", str(work)]
    report("controlled_sentiment", [*words, "--until", "answers"], capsys)
    other = {"sft-max_iters=6", "answers-max_iters=6", "evaluation-max_iters=6"}
    stages = {path.stem for path in work.glob("*.json")}
    assert stages == {"texts", "classifier", "sft", "answers", "evaluation"} | other
    result = report("controlled_sentiment", words, capsys)
    lines = result["variants"]
    assert {name: list(about["points"]) for name, about in lines.items()} == {
        "first": ["0", "1"], "all": ["0"], "chosen": ["0"], "again": ["0"], "other": ["0"]
    }  # fmt: skip
    rows = [row for about in lines.values() for steps in about["points"].values() for row in steps.values()]
    assert all(row["kl"] > 0 for row in rows) and lines["first"]["points"]["0"] != lines["first"]["points"]["1"]
    assert len(page.seed_lines(result, "again")[0]) == 3  # the reference, the first round at step 2, its own
    assert result["found"]["pairs all"]["pairs"] > result["found"]["pairs first"]["pairs"]
    assert list(result["claims"].values()) == [False, None, None, None, None]
    found, pictures = page.blocks({**result, "date": "2026-01-02"})
    assert "best-of-n" in load("render").fill(page.PAGE.read_text(encoding="utf-8"), found)
    drawn = {name: len(list(ElementTree.fromstring(each).iter(f"{SVG}polyline"))) for name, each in pictures.items()}
    assert drawn == {"seeds.svg": 2, "one-seed.svg": 6}
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}  # run again, nothing is done
    assert report("controlled_sentiment", words, capsys)["variants"] == lines
    assert report("controlled_sentiment", [*words, "--finished"], capsys)["variants"] == lines
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == before
    (work / "evaluation first seed 1 step 4.json").unlink()
    partly = report("controlled_sentiment", [*words, "--finished"], capsys)["variants"]
    assert {seed: list(points) for seed, points in partly["first"]["points"].items()} == {"0": ["2", "4"], "1": ["2"]}
    changed = (tmp_path / "tiny.toml").read_text().replace("num_samples = 3", "num_samples = 4")
    (tmp_path / "tiny.toml").write_text(changed)
    with pytest.raises(bench.BenchmarkError, match=r"answers was begun with another \[answers\]: choose another"):
        bench.run(SimpleNamespace(recipe=tmp_path / "tiny.toml", work=work, until="runs", finished=False), tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "x", "dpo": {}}, "variant x: unknown dpo"),
        ({"name": "x", "against": "y"}, "variant x: no earlier variant is called y"),
    ],
)
def test_a_wrong_variant_is_an_error(wrong: dict[str, Any], message: str) -> None:
    bench = load("controlled_sentiment")
    with pytest.raises(bench.BenchmarkError, match=message):
        bench.variants({"sft": {}, "pairs": {}, "train": {}, "variants": [wrong]})


def test_the_recipe_of_the_controlled_experiment_holds_flags_and_checkpoints_that_exist() -> None:
    bench, words = load("controlled_sentiment"), load("harness").graft_words
    recipe = tomllib.loads(bench.RECIPE.read_text(encoding="utf-8"))
    pairs = parse("pairs", PairsConfig, words("pairs", {**recipe["answers"], "prompts": "x", "reward_model": "y"})[1:])
    assert {*recipe["answers"]} <= pairs.explicit
    parse("train", TrainConfig, words("train", recipe["classifier"])[1:])
    for variant in bench.variants(recipe).values():
        for flags in (variant.sft, variant.train):
            assert {*flags} <= parse("train", TrainConfig, words("train", flags)[1:]).explicit
        assert not any(step % variant.train["eval_every"] for step in variant.steps), variant.name
        assert variant.pairs["first"] + variant.pairs["prompts"] <= recipe["texts"]["prompts"]


def test_the_readings_say_first_what_does_not_reproduce() -> None:
    page = load("frontier_page")

    def about(mean: float, **differences: Any) -> dict[str, Any]:
        at = {"mean": mean, "ci_seeds": [mean - 0.01, mean + 0.01], "ci_prompts": [mean - 0.02, mean + 0.02]}
        return {"at": {"2.5": at}, "against": "first", "differences": differences}

    def difference(verdict: str) -> dict[str, Any]:
        seeds = None if verdict == "one seed" else [0.02, 0.06]
        return {"mean": 0.04, "ci_seeds": seeds, "ci_prompts": [0.01, 0.07], "verdict": verdict}

    shown = {"first": about(0.7), "a": about(0.8, **{"2.5": difference("higher")})}
    shown |= {"b": about(0.75, **{"2.5": difference("not distinguished")})}
    shown |= {"c": about(0.72, **{"2.5": difference("one seed")})}
    best = {"reference": {"8": {"reward": 0.88, "kl": 1.2}}}
    result = {"variants": shown, "references": best, "recipe": {"evaluation": {"claim_kl": 2.5, "reward": 0.9}}}
    first, second, third, last = page.readings(result).splitlines()
    assert "does **not** reach the paper's 0.9 at 2.5 nats" in first and "*a*, has 0.800 (0.790 to 0.810" in first
    assert "*b* is **not** shown to differ from *first*" in second and "*a* lies above" in third
    assert "+0.040 (one seed, +0.010 to +0.070 over prompts)" in last
    result["recipe"]["evaluation"]["reward"] = 0.8
    assert "DPO reaches the paper's 0.8" in page.readings(result).splitlines()[0]
