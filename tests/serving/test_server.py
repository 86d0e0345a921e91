"""`graft serve` itself, in a fork of its own, with a tiny model and real adapters: what it says, how it ends, what
it refuses to begin with; and many clients at once on the real engine."""

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
from safetensors.torch import save_file

from conftest import child_environment
from exchange.runs import run_of
from graftlm import cli
from graftlm.config import ServeConfig
from graftlm.exchange.load import load
from graftlm.files.formats import load_safetensors
from graftlm.inference.evaluate import label_probabilities
from graftlm.inference.generate import generate
from graftlm.inference.scoring import score
from graftlm.text.boundary import label_ids
from graftlm.text.collate import encode_rows
from graftlm.text.records import Labelled
from serving.fakes import eventually, service, serving
from soak.forks import Forks
from tiny import TEMPLATE, data_folder, model_folder

KEY = "a-very-secret-key"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, another one, data, LoRA runs on the first (one and two), on the other, and one of a prefix."""
    folder = tmp_path_factory.mktemp("home")
    base, other, data = (
        model_folder(folder / "base"),
        model_folder(folder / "other", seed=3),
        data_folder(folder / "data"),
    )
    run_of(folder / "one", base, data, "lora")
    run_of(folder / "two", base, data, "rslora")
    run_of(folder / "prefix", base, data, "prefix")
    run_of(folder / "elsewhere", other, data, "lora")
    return folder


class Process:
    """A running `graft serve --json` and what it said."""

    def __init__(self, forks: Forks, words: Sequence[str], errors: Path, **environment: str) -> None:
        self.errors = errors
        reading, writing = os.pipe()
        self.output = open(reading, encoding="utf-8")  # noqa: SIM115
        words = ["serve", *words, "--port", "0", "--json", "--device", "cpu"]
        env = child_environment(**environment)
        with open(os.devnull, "rb") as nothing, open(writing, "wb") as out, open(errors, "wb") as err:
            self.process = forks.begin(words, Path.cwd(), env, [nothing, out, err])
        line = self.output.readline()
        assert line, errors.read_text()
        self.said = json.loads(line)
        self.url: str = self.said["url"]

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Exit status, and what came behind the first line of the output, and on the standard error."""
        os.kill(self.process.pid, number)
        rest = self.output.read()
        return self.process.wait(30), rest, self.errors.read_text()

    def rss(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


Start = Callable[..., AbstractContextManager[Process]]


@pytest.fixture(scope="module")
def start(forks: Forks) -> Start:
    """A server that does not outlive its block."""

    @contextmanager
    def started(words: Sequence[str], errors: Path, **environment: str) -> Iterator[Process]:
        process = Process(forks, words, errors, **environment)
        with process.output:
            try:
                yield process
            finally:
                if not process.process.ended():
                    process.process.kill()
                    process.process.wait()

    return started


@pytest.fixture(scope="module")
def running(home: Path, start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    words = [str(home / "one"), f"second={home / 'two'}", "--dtype", "float32"]
    with start(words, tmp_path_factory.mktemp("log") / "stderr", GRAFT_API_KEY=KEY) as process:
        yield process
        assert process.end() == (0, "", "")  # and so the key stands nowhere


@pytest.fixture(scope="module")
def client(running: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


# What it serves -------------------------------------------------------------------------------------------------------


def test_it_says_where_and_what(running: Process, client: openai.OpenAI) -> None:
    assert set(running.said) == {"url", "models"}
    assert running.said["models"] == ["base", "one", "second"] == [model.id for model in client.models.list()]
    assert running.url.startswith("http://127.0.0.1:")
    described = client.models.list().model_dump_json()
    assert str(Path(running.errors).parent) not in described and '"parent":"base"' in described


def test_each_model_says_what_generate_says_streamed_or_not(client: openai.OpenAI, home: Path) -> None:
    for name, folder in (("base", None), ("one", "one"), ("second", "two")):
        loaded = load("resume", home / folder, dtype="float32") if folder else load(str(home / "base"), dtype="float32")
        prompts = ["good fun", "Review: dull\nIs it:"]
        expected = generate(loaded.model, loaded.tokenizer, prompts, max_new_tokens=12)
        found = client.completions.create(model=name, prompt=prompts, max_tokens=12, temperature=0)
        assert [choice.text for choice in found.choices] == expected
        parts = client.completions.create(model=name, prompt=prompts[0], max_tokens=12, temperature=0, stream=True)
        assert "".join(part.choices[0].text for part in parts) == expected[0]


def test_echoed_logprobs_are_those_of_a_plain_forward_pass(client: openai.OpenAI, home: Path) -> None:
    prompt = "Review: good fun, é\nIs it: "
    for name, folder in (("base", None), ("one", "one"), ("second", "two")):
        loaded = load("resume", home / folder, dtype="float32") if folder else load(str(home / "base"), dtype="float32")
        asked: Any = {"model": name, "prompt": prompt, "max_tokens": 4, "temperature": 0, "logprobs": 2}
        answer = client.completions.create(**asked).choices[0]  # and so the prompt has been read before
        (choice,) = client.completions.create(**asked, echo=True).choices
        assert choice.text == prompt + answer.text
        logprobs = choice.logprobs
        assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs
        assert logprobs.text_offset is not None
        ids = loaded.tokenizer.encode_prompt(prompt.rstrip())
        with torch.no_grad():
            rows = loaded.model.eval()(torch.tensor([ids]))[0, :-1].log_softmax(-1)
        plain = [float(row[token]) for row, token in zip(rows, ids[1:], strict=True)]
        assert logprobs.token_logprobs[: len(ids)] == [None, *(pytest.approx(value, abs=1e-5) for value in plain)]
        for row, top in zip(rows, logprobs.top_logprobs[1 : len(ids)], strict=True):
            assert sorted(top.values())[-2:] == pytest.approx(sorted(row.tolist())[-2:], abs=1e-5)
        for token, at in zip(logprobs.tokens, logprobs.text_offset, strict=True):
            assert token.startswith(("bytes:", "<|")) or choice.text[at:].startswith(token)


def test_lm_evaluation_harness_gets_the_label_scores_of_evaluate(client: openai.OpenAI, home: Path) -> None:
    """As its local-completions asks and reads; benchmarks/evaluate_vs_peers.py runs the harness itself."""
    loaded = load("resume", home / "one", dtype="float32")
    assert loaded.template is not None
    texts = ["good fun", "dull", "so bad", "a joy"]
    records = [Labelled(text, 0) for text in texts]
    examples, _ = encode_rows(records, loaded.template, loaded.tokenizer, loaded.model.max_seq_len)
    labels = label_ids(loaded.template, loaded.tokenizer)
    expected = score(loaded.model, examples, labels).labels
    prompts = [[*example.prompt_ids, *label] for example in examples for label in labels]
    found = client.completions.create(
        model="one", prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    sums = []
    for choice, prompt, label in zip(found.choices, prompts, [*labels] * len(texts), strict=True):
        assert choice.logprobs is not None and choice.logprobs.token_logprobs and choice.logprobs.top_logprobs
        scored = slice(len(prompt) - len(label), -1)  # whatever follows is one token, a stop token too
        values, top = choice.logprobs.token_logprobs[scored], choice.logprobs.top_logprobs[scored]
        sums.append(sum(values))
        with torch.no_grad():
            rows = loaded.model.eval()(torch.tensor([prompt]))[0, len(prompt) - len(label) - 1 : -1]
        is_greedy = [value == max(each.values()) for value, each in zip(values, top, strict=True)]
        assert is_greedy == [int(row.argmax()) == token for row, token in zip(rows, label, strict=True)]
    assert sums == pytest.approx(expected.flatten().tolist(), abs=1e-5)


def test_embeddings_are_means_of_the_last_hidden_states(client: openai.OpenAI, home: Path) -> None:
    texts = ["good fun", "dull", "a film that is neither é"]
    for name, folder in (("base", None), ("one", "one")):
        loaded = load("resume", home / folder, dtype="float32") if folder else load(str(home / "base"), dtype="float32")
        found = client.embeddings.create(model=name, input=texts)
        for text, each in zip(texts, found.data, strict=True):
            with torch.no_grad():
                hidden = loaded.model.eval().hidden_states(torch.tensor([loaded.tokenizer.encode_prompt(text)]))
            assert each.embedding == pytest.approx(hidden[0].mean(0).tolist(), abs=1e-5)


def test_a_seed_decides_the_answer(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str]:
        found = client.completions.create(model="one", prompt="good", max_tokens=12, seed=seed, n=3)
        return [choice.text for choice in found.choices]

    assert ask(1) == ask(1) != ask(2) and len(set(ask(1))) > 1


def test_classify_gives_the_probabilities_that_python_gives(running: Process, home: Path) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    texts = ["good fun", "dull", "x" * 500]
    found = httpx.post(f"{running.url}/v1/classify", json={"texts": texts}, headers=headers, timeout=60).json()
    for name, folder in (("one", "one"), ("second", "two")):
        loaded = load("resume", home / folder, dtype="float32")
        assert loaded.template is not None and loaded.template.text == TEMPLATE
        expected = label_probabilities(loaded.model, loaded.tokenizer, loaded.template, texts)
        for result, wanted in zip(found["results"], expected, strict=True):
            assert list(result["models"][name]["probabilities"].values()) == pytest.approx(wanted, abs=1e-5)
    assert [result["models"]["base"]["truncated"] for result in found["results"]] == [False, False, True]


def test_an_adapters_folder_that_is_no_run_is_served_too(home: Path, start: Start, tmp_path: Path) -> None:
    zero = shutil.copytree((home / "one" / "best").resolve(), tmp_path / "zero")
    tensors = load_safetensors(zero / "adapter_model.safetensors")
    save_file({name: t * ("lora_A" in name) for name, t in tensors.items()}, zero / "adapter_model.safetensors")
    words = [f"peft={home / 'one' / 'best'}", str(zero), "--init_from", str(home / "base")]
    words += ["--template", TEMPLATE, "--labels", "sad,happy,mixed"]
    with start(words, tmp_path / "stderr") as process:
        assert process.said["models"] == ["base", "peft", "zero"]
        assert (tmp_path / "stderr").read_text().count("zero: changes nothing: its weights are those from before") == 1
        found = httpx.post(f"{process.url}/v1/classify", json={"text": "a"}, timeout=60).json()
        (result,) = found["results"]
        assert list(result["models"]["peft"]["probabilities"]) == ["sad", "happy", "mixed"]
        assert process.end()[0] == 0


def test_a_run_of_any_method_is_served_alone(home: Path, start: Start, tmp_path: Path) -> None:
    with start(["--init_from", str(home / "prefix"), "--dtype", "float32"], tmp_path / "stderr") as process:
        assert process.said["models"] == ["prefix"]
        (described,) = httpx.get(f"{process.url}/v1/models").json()["data"]
        assert described["context"] == 92  # 96, less the prefix
        loaded = load("resume", home / "prefix", dtype="float32")
        expected = generate(loaded.model, loaded.tokenizer, ["good fun"], max_new_tokens=12)
        body = {"model": "prefix", "prompt": "good fun", "max_tokens": 12, "temperature": 0}
        found = httpx.post(f"{process.url}/v1/completions", json=body, timeout=60).json()
        assert [choice["text"] for choice in found["choices"]] == expected
        found = httpx.post(f"{process.url}/v1/classify", json={"text": "good"}, timeout=60).json()
        scores = label_probabilities(loaded.model, loaded.tokenizer, loaded.template, ["good"])[0]
        assert list(found["results"][0]["models"]["prefix"]["probabilities"].values()) == pytest.approx(scores, 1e-5)


# Many at once ---------------------------------------------------------------------------------------------------------


def test_sixty_four_clients_for_some_seconds_no_error_and_no_growth(running: Process) -> None:
    async def work(seconds: float) -> list[int]:
        limit, headers = httpx.Limits(max_connections=64), {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=running.url, limits=limit, timeout=60, headers=headers) as client:
            end = time.monotonic() + seconds

            async def one(number: int) -> list[int]:
                body: dict[str, Any] = {"model": ("base", "one", "second")[number % 3], "prompt": "good fun " * 3}
                body |= {"max_tokens": 8 + number % 16, "stream": number % 2 == 0, "seed": number}
                statuses = []
                while time.monotonic() < end:
                    answer = await client.post("/v1/completions", json=body)
                    streamed = "[DONE]" in answer.text and '"error"' not in answer.text
                    whole = streamed if body["stream"] else "usage" in answer.json()
                    statuses.append(answer.status_code if whole else 0)
                return statuses

            return [status for found in await asyncio.gather(*map(one, range(64))) for status in found]

    asyncio.run(work(2))
    before = running.rss()
    statuses = asyncio.run(work(4))
    assert set(statuses) == {200} and len(statuses) >= 64
    assert running.rss() - before < 30e6
    stats = httpx.get(f"{running.url}/v1/stats", headers={"Authorization": f"Bearer {KEY}"}).json()
    assert stats["running"] == stats["waiting"] == stats["failed"] == 0 and stats["max_batch_size_seen"] > 8


# How it ends ----------------------------------------------------------------------------------------------------------


def test_what_is_in_flight_at_sigterm_is_answered_and_nothing_new_is_taken(
    home: Path, start: Start, tmp_path: Path
) -> None:
    words = [str(home / "one"), "--max_batch_size", "1", "--dtype", "float32"]
    with start(words, tmp_path / "stderr") as process:
        body = {"model": "one", "prompt": "good", "max_tokens": 80, "n": 30, "logprobs": 0}
        found: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: found.append(httpx.post(f"{process.url}/v1/completions", json=body, timeout=60))
        )
        asking.start()
        with httpx.Client() as http:
            assert eventually(lambda: http.get(f"{process.url}/v1/stats").json()["running"] > 0)
        assert not found
        os.kill(process.process.pid, signal.SIGTERM)
        host, port = process.url.removeprefix("http://").split(":")

        def refused() -> bool:
            try:
                socket.create_connection((host, int(port)), timeout=1).close()
            except ConnectionRefusedError:
                return True
            return False

        assert eventually(refused) and not found
        asking.join(60)
        assert found[0].status_code == 200 and len(found[0].json()["choices"]) == 30
        assert process.process.wait(30) == 0 and process.errors.read_text() == ""


def test_ctrl_c_ends_it_with_130(home: Path, start: Start, tmp_path: Path) -> None:
    with start(["--init_from", str(home / "base")], tmp_path / "stderr") as process:
        assert process.said["models"] == ["base"]
        assert process.end(signal.SIGINT) == (130, "", "graft: stopped\n")


def test_what_does_not_end_within_the_grace_is_told(tmp_path: Path) -> None:
    made, engine = service(tmp_path / "model")
    engine.hold = 2
    found: list[httpx.Response] = []
    body = {"model": "base", "prompt": "a"}
    with serving(made, grace=0.3) as url:

        def ask(stream: bool) -> None:
            found.append(httpx.post(f"{url}/v1/completions", json={**body, "stream": stream}, timeout=20))

        asking = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
        for thread in asking:
            thread.start()
        assert eventually(lambda: len(engine.tickets) == 2)
    for thread in asking:
        thread.join(20)
    whole, streamed = sorted(found, key=lambda answer: answer.status_code, reverse=True)
    assert whole.status_code == 503 and whole.json()["error"]["code"] == "stopping"
    *_, last, end = streamed.text.strip().split("data: ")
    assert json.loads(last)["error"]["message"] == "the server is stopping: the answer is incomplete"
    assert end == "[DONE]"


# What it refuses to begin with ----------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.run(["serve", *words, "--port", "0"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("graft: ") and err.count("\n") == 1, err
    return err.removeprefix("graft: ").rstrip("\n")


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftlm.cli.main.tune_malloc_retain", lambda: False)


def test_adapters_that_cannot_be_served(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = str(home / "one")
    assert "holds no run" in refusal(capsys, str(home / "nothing"))
    assert refusal(capsys, one, f"one={home / 'two'}").endswith(f"'one' is {one} already; write NAME=FOLDER")
    assert refusal(capsys, f"={one}").endswith("has no name; write NAME=FOLDER")
    assert "use the base it was trained on" in refusal(capsys, one, str(home / "elsewhere"))
    assert "use the base it was trained on" in refusal(capsys, one, "--init_from", str(home / "other"))
    assert "is the base's own name" in refusal(capsys, f"base={one}")
    assert "only lora is served together with others" in refusal(capsys, one, str(home / "prefix"))
    assert "a base is needed here" in refusal(capsys, one, "--init_from", str(home / "prefix"))
    assert refusal(capsys, f"peft={home / 'one' / 'best'}").endswith("give --init_from")


def test_a_port_in_use_and_a_host_that_is_not_ours(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert cli.run(["serve", "--init_from", str(home / "base"), "--port", port]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"graft: --host 127.0.0.1 --port {port}: ") and "already in use" in err
    assert refusal(capsys, "--host", "192.0.2.1").startswith("--host 192.0.2.1 --port 0: ")
    assert refusal(capsys, "--host", "no host").startswith("--host no host --port 0: ")


def test_a_key_that_could_not_be_sent_is_refused_and_not_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = "must be made of printable ASCII characters without spaces"
    assert refusal(capsys, "--api_key", "two words") == f"--api_key (not shown): {wanted}"
    assert "secret" not in refusal(capsys, "--api_key", "--secret") and "secret" not in repr(
        ServeConfig(api_key="secret")
    )
    (tmp_path / "recipe.toml").write_text("key = 12345")
    assert "12345" not in refusal(capsys, "--config", str(tmp_path / "recipe.toml"))
    monkeypatch.setenv("GRAFT_API_KEY", "söcret")
    assert refusal(capsys) == f"GRAFT_API_KEY (not shown): {wanted}"


@pytest.mark.parametrize("package", ["fastapi", "llguidance"])
def test_without_the_extra_it_says_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("graftlm.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert refusal(capsys) == f"graft serve needs the {package} package: pip install 'graftlm[serve]'"
