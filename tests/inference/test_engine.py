"""The engine: whoever shares the batch, each gets what is its own; whatever goes wrong, the next ones are served."""

import gc
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exchange.runs import run_of
from graftlm.errors import GraftError, InputError, Overloaded, ShuttingDown
from graftlm.exchange.huggingface import load_model, save_adapter
from graftlm.exchange.load import ModelBundle, load, read_tokenizer
from graftlm.inference import engine as module
from graftlm.inference.engine import Engine
from graftlm.inference.evaluate import evaluate
from graftlm.inference.generate import generate, generate_ids
from graftlm.inference.prefix_cache import PrefixCache
from graftlm.inference.requests import Completion, Request, RequestHandle, TokenLogprob, TokenOutput
from graftlm.inference.sampling import SamplingParams
from graftlm.methods import DoRA, LoRA, Method
from graftlm.methods.lora import LoRALinear
from graftlm.models import CausalLM, KVCache, clone_with_shared_weights
from graftlm.text.boundary import label_ids
from graftlm.text.collate import encode_rows
from graftlm.text.records import Labelled
from inference.tiny import stopping
from tiny import data_folder, model_folder

METHODS: dict[str, Method] = {
    "narrow": LoRA(rank=2, alpha=4.0, targets=("q", "v")),
    "wide": LoRA(rank=5, alpha=10.0, targets=("k", "o", "up", "down")),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """A tiny model in float64, whose tokens are bytes."""
    folder = model_folder(tmp_path_factory.mktemp("engine") / "model")
    model = load_model(folder, torch.device("cpu"), torch.float64)
    return ModelBundle(model, read_tokenizer(folder), str(folder), folder, "")


@pytest.fixture(scope="module")
def alone(loaded: ModelBundle) -> dict[str | None, CausalLM]:
    """The base, and it with each adapter of random A and B."""
    models: dict[str | None, CausalLM] = {None: loaded.model}
    for seed, (name, method) in enumerate(METHODS.items()):
        model, rng = clone_with_shared_weights(loaded.model), torch.Generator().manual_seed(seed)
        method.install(model, rng)
        for module_ in model.modules():
            if isinstance(module_, LoRALinear):
                module_.merge_on_eval = False
                # A whole multiple of a float32, so that the folder holds the very numbers.
                b = torch.randn(module_.lora_B.shape, generator=rng) * 0.3
                module_.lora_B.data, module_.lora_A.data = b.double(), module_.lora_A.data.float().double()
        models[name] = model.eval()
    return models


@pytest.fixture(scope="module")
def folders(
    loaded: ModelBundle, alone: dict[str | None, CausalLM], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The adapters as PEFT's folders."""
    found = {}
    for name, method in METHODS.items():
        found[name] = tmp_path_factory.mktemp(name)
        save_adapter(found[name], alone[name], method, loaded.name)
    return found


@pytest.fixture(scope="module")
def engine(loaded: ModelBundle, folders: dict[str, Path]) -> Iterator[Engine]:
    engine = Engine(loaded, folders, max_rows=8)
    yield engine
    engine.close()


def ids(text: str, loaded: ModelBundle) -> tuple[int, ...]:
    return tuple(loaded.tokenizer.encode(text))


def ask(prompt: Sequence[int], adapter: str | None = None, **settings: Any) -> Request:
    """A request that samples at temperature 1 unless told otherwise."""
    return Request(tuple(prompt), SamplingParams(**{"temperature": 1.0, **settings}), adapter)


def changed(asked: Request, **settings: Any) -> Request:
    """The request with other sampling settings."""
    return replace(asked, params=replace(asked.params, **settings))


class Gate:
    """Lets the engine's thread go on step by step: it waits in `on_piece` of a request made for the purpose."""

    def __init__(self, engine: Engine, loaded: ModelBundle, tokens: int = 50) -> None:
        self.reached, self.go = threading.Semaphore(0), threading.Semaphore(0)
        prompt = endless(loaded)
        self.ticket = engine.submit(ask(prompt, max_new_tokens=tokens, temperature=0), self._held)
        self.reached.acquire()

    def _held(self, piece: TokenOutput) -> None:
        self.reached.release()
        self.go.acquire()

    def open(self) -> None:
        self.go.release(10_000)


def endless(loaded: ModelBundle, tokens: int = 60) -> list[int]:
    """A prompt behind which the base goes on, greedily, for so many tokens."""
    for first in range(1, 200):
        new = generate_ids(
            loaded.model,
            [[first]],
            stopping(tokens, loaded.tokenizer.eot),
        )[0]
        if len(new) == tokens:
            return [first]
    raise AssertionError("there is none")


def requests(loaded: ModelBundle, count: int, **settings: Any) -> list[Request]:
    """Prompts of different lengths, for the base and the adapters in turn."""
    names = (None, "narrow", "wide", "wide")
    texts = ["a film", "it was so", "x", "the plot of this one is", "no"]
    return [
        ask(ids(f"{n}{texts[n % 5]}", loaded), names[n % 4], max_new_tokens=6 + 3 * (n % 4), **settings)
        for n in range(count)
    ]


def values(logprobs: Sequence[TokenLogprob]) -> list[float | None]:
    return [each.logprob for each in logprobs]


def results(tickets: Sequence[RequestHandle]) -> list[Completion]:
    return [ticket.done.result(timeout=60) for ticket in tickets]


# What is answered -----------------------------------------------------------------------------------------------------


def test_prompts_are_read_beside_rows_that_are_decoded(folders: dict[str, Path], loaded: ModelBundle) -> None:
    """In float32, where one pass of the C++ program does both: as with passes of PyTorch."""
    answers = []
    for fused in (True, False):
        model = load_model(loaded.folder, torch.device("cpu"), torch.float32)
        model.use_fused_ops(fused)
        engine = Engine(replace(loaded, model=model), folders, max_rows=8)
        asked = [changed(each, max_new_tokens=20) for each in requests(loaded, 20, temperature=0)]  # others join later
        asked += [replace(each, prompt=(*each.prompt, *each.prompt, 7)) for each in asked]  # known in part
        answers.append([done.tokens for done in results([engine.submit(each) for each in asked])])
        engine.close()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_mixed_batch_gives_each_what_generate_gives_it_alone(
    engine: Engine, loaded: ModelBundle, alone: dict[str | None, CausalLM], temperature: float
) -> None:
    asked = requests(loaded, 20, temperature=temperature)
    asked = [changed(request, seed=n, top_k=n % 3 * 20) for n, request in enumerate(asked)]
    penalties = {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.5, "logit_bias": {9: 3.0}}
    asked[::2] = [changed(request, **penalties) for request in asked[::2]]
    found = results([engine.submit(request) for request in asked])
    for request, completion in zip(asked, found, strict=True):
        expected = generate_ids(
            alone[request.adapter],
            [request.prompt],
            replace(request.params, stop_token_ids=frozenset({loaded.tokenizer.eot})),
        )[0]
        assert list(completion.tokens) == expected
        assert completion.text == loaded.tokenizer.decode(expected)
        assert completion.finish_reason == ("length" if len(expected) == request.params.max_new_tokens else "stop")
        assert completion.prompt_tokens == len(request.prompt)
        with torch.no_grad():
            logps = alone[request.adapter](torch.tensor([[*request.prompt, *expected]]))[0].log_softmax(-1)
        scores = [float(logps[len(request.prompt) - 1 + i, token]) for i, token in enumerate(expected)]
        assert values(completion.logprobs)[: len(expected)] == pytest.approx(scores, rel=1e-9)
    assert engine.stats()["max_batch_size_seen"] > 1


def test_one_prompt_has_the_answer_of_each_adapter(
    engine: Engine, loaded: ModelBundle, alone: dict[str | None, CausalLM]
) -> None:
    """At once and one after the other: what is computed for one adapter is never another's."""
    prompt, options = ids("The film was so", loaded), [(5, 6), (7,)]
    names = [None, "narrow", "wide", "narrow", None]
    expected = {
        name: generate_ids(model, [prompt], stopping(12, loaded.tokenizer.eot))[0] for name, model in alone.items()
    }
    assert len({tuple(tokens) for tokens in expected.values()}) == 3
    asked = [ask(prompt, name, max_new_tokens=12, temperature=0) for name in names]
    together = results([engine.submit(request) for request in asked])
    in_turn = [results([engine.submit(request)])[0] for request in asked]
    for found in (together, in_turn):
        assert [list(completion.tokens) for completion in found] == [expected[name] for name in names]
    futures = [engine.score(prompt, options, name) for name in names]
    scores = [future.result(timeout=60) for future in futures]
    assert len({tuple(row) for row in scores}) == 3 and scores[0] == scores[4] and scores[1] == scores[3]


def test_greedy_text_is_that_of_generate(engine: Engine, loaded: ModelBundle) -> None:
    prompt = "The film was"
    [expected] = generate(loaded.model, loaded.tokenizer, [prompt], max_new_tokens=30)
    asked = ask(ids(prompt, loaded), max_new_tokens=30, temperature=0)
    assert engine.submit(asked).done.result(60).text == expected


def test_a_sample_depends_on_its_seed_and_not_on_the_batch(engine: Engine, loaded: ModelBundle) -> None:
    asked = ask(ids("a film", loaded), "wide", max_new_tokens=20, top_p=0.9, seed=11)
    [first] = results([engine.submit(asked)])
    others = [engine.submit(request) for request in requests(loaded, 7)]
    again = results([engine.submit(asked), engine.submit(changed(asked, seed=12)), engine.submit(asked)])
    results(others)
    assert again[0].tokens == again[2].tokens == first.tokens != again[1].tokens
    assert values(again[0].logprobs) == pytest.approx(values(first.logprobs), rel=1e-9)


def test_pieces_come_in_order_and_make_up_the_answer(engine: Engine, loaded: ModelBundle) -> None:
    for asked in requests(loaded, 6):
        pieces: list[TokenOutput] = []
        done = engine.submit(changed(asked, seed=3), pieces.append).done.result(60)
        assert "".join(piece.text for piece in pieces) == done.text
        assert tuple(piece.token for piece in pieces if piece.token is not None) == done.tokens
        assert tuple(piece.logprob for piece in pieces if piece.logprob is not None) == done.logprobs
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [done.finish_reason]


def test_rows_join_while_others_are_decoded(
    engine: Engine, loaded: ModelBundle, alone: dict[str | None, CausalLM]
) -> None:
    expected = {}
    for request in requests(loaded, 5, temperature=0):
        new = generate_ids(
            alone[request.adapter],
            [request.prompt],
            stopping(9, loaded.tokenizer.eot),
        )
        expected[request] = new[0]
    gate = Gate(engine, loaded)
    tickets = []
    for request in expected:  # one joins behind each step of the first
        tickets.append(engine.submit(changed(request, max_new_tokens=9)))
        gate.go.release()
        gate.reached.acquire()
    assert engine.stats()["running"] > 1
    gate.open()
    assert [list(completion.tokens) for completion in results(tickets)] == list(expected.values())
    new = generate_ids(
        loaded.model,
        [endless(loaded)],
        stopping(50, loaded.tokenizer.eot),
    )
    assert list(gate.ticket.done.result(60).tokens) == new[0]


def test_a_stop_text_ends_the_answer(engine: Engine, loaded: ModelBundle) -> None:
    asked = ask(endless(loaded), max_new_tokens=60, temperature=0)
    text = engine.submit(asked).done.result(60).text
    pairs = [(n, text[n : n + 2]) for n in range(5, len(text) - 4)]
    at, stop = next((n, pair) for n, pair in pairs if pair.isascii() and text.find(pair) == n)  # two bytes, two tokens
    pieces: list[TokenOutput] = []
    done = engine.submit(changed(asked, stop=("never comes", stop)), pieces.append).done.result(60)
    assert (done.text, done.finish_reason) == (text[:at], "stop")
    assert pieces[-1].finish_reason == "stop" and "".join(piece.text for piece in pieces) == text[:at]
    assert loaded.tokenizer.decode(done.tokens) == text[: at + 2]


def test_a_token_of_its_own_ends_a_request_and_not_those_beside_it(engine: Engine, loaded: ModelBundle) -> None:
    asked = ask(endless(loaded), max_new_tokens=30, temperature=0)
    whole = engine.submit(asked).done.result(60).tokens
    end = next(token for token in reversed(whole) if token != whole[0])
    told: list[TokenOutput] = []
    ends = changed(asked, stop_token_ids=frozenset({end}))
    found = results([engine.submit(ends, told.append), engine.submit(asked)])
    new = generate_ids(
        loaded.model,
        [asked.prompt],
        stopping(30, (end, loaded.tokenizer.eot)),
    )[0]
    assert found[0].tokens == tuple(new) == whole[: whole.index(end)] and found[0].finish_reason == "stop"
    assert (told[-1].token, told[-1].finish_reason) == (None, "stop")
    assert found[1].tokens == whole and found[1].finish_reason == "length"


def test_an_answer_ends_where_it_fills_the_context(loaded: ModelBundle) -> None:
    context, prompt = loaded.model.max_seq_len, endless(loaded)
    engine = Engine(loaded, {}, max_tokens=20)
    try:
        assert engine.max_seq_len == 20 < context
        done = engine.submit(ask(prompt * 5, max_new_tokens=90, temperature=0)).done.result(60)
        assert len(done.tokens) <= 15 and (done.finish_reason == "stop" or len(done.tokens) == 15)
        with pytest.raises(InputError, match="the prompt has 20 tokens and prompt and answer at most 20: shorten it"):
            engine.submit(ask(prompt * 20))
    finally:
        engine.close()


# Log-probabilities ----------------------------------------------------------------------------------------------------


def test_logprobs_of_prompts_and_answers_are_those_of_a_plain_forward_pass(
    engine: Engine, loaded: ModelBundle, alone: dict[str | None, CausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch with requests that ask for less, and also where the prompt's beginning has been read before."""
    monkeypatch.setattr(module, "MAX_SCORED_TOKENS", 4)
    asked = [
        replace(request, top_logprobs=n % 4, prompt_logprobs=n % 3 > 0, prompt_only=n % 3 > 1)
        for n, request in enumerate(requests(loaded, 24, temperature=0, frequency_penalty=0.4))
    ]
    plain = [replace(request, prompt_logprobs=False, prompt_only=False) for request in asked]
    expected = results([engine.submit(request) for request in plain])
    pieces: list[list[TokenOutput]] = [[] for _ in asked]
    found = results([engine.submit(request, own.append) for request, own in zip(asked, pieces, strict=True)])
    ended = 0
    for request, completion, wanted, own in zip(asked, found, expected, pieces, strict=True):
        assert completion.tokens == (() if request.prompt_only else wanted.tokens)
        stop = [each.token for each in completion.logprobs[len(completion.tokens) :]]
        assert stop == [loaded.tokenizer.eot] * (completion.finish_reason == "stop")
        ended += len(stop)
        given = [*request.prompt, *completion.tokens, *stop]
        with torch.no_grad():
            logps = alone[request.adapter](torch.tensor([given]))[0].log_softmax(-1)
        scored = [*completion.prompt_logprobs, *completion.logprobs]
        first = 0 if request.prompt_logprobs else len(request.prompt)
        assert [each.token for each in scored] == given[first:]
        for at, each in enumerate(scored, start=first):
            if at == 0:
                assert each.logprob is None and each.top == ()
                continue
            assert each.logprob == pytest.approx(float(logps[at - 1, each.token]), rel=1e-9)
            top = logps[at - 1].topk(request.top_logprobs)
            assert [token for token, _ in each.top] == top.indices.tolist()
            assert [value for _, value in each.top] == pytest.approx(top.values.tolist(), rel=1e-9)
        told = [each for piece in own for each in (*piece.prompt_logprobs, piece.logprob) if each is not None]
        assert told == scored and not any(piece.prompt_logprobs for piece in own[1:])
    assert ended > 0


def test_a_prompt_alone_may_fill_the_context(loaded: ModelBundle) -> None:
    engine = Engine(loaded, {}, max_tokens=20)
    try:
        whole = Request(tuple(range(1, 21)), prompt_logprobs=True, prompt_only=True)
        done = engine.submit(whole).done.result(60)
        assert (done.text, done.tokens, done.finish_reason) == ("", (), "length") and len(done.prompt_logprobs) == 20
        with pytest.raises(InputError, match="the prompt has 21 tokens and prompt and answer at most 20: shorten it"):
            engine.submit(replace(whole, prompt=tuple(range(1, 22))))
    finally:
        engine.close()


# Scores ---------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_evaluate(loaded: ModelBundle, tmp_path: Path) -> None:
    data_folder(tmp_path / "data")
    run = run_of(tmp_path / "run", loaded.folder, tmp_path / "data", "lora")
    adapted = load("resume", run, device="cpu", dtype="float32")
    assert adapted.template is not None
    texts = ["good fun", "dull", "a film that is neither", "bad", "fine", "good"]
    examples, _ = encode_rows(
        [Labelled(text, 0) for text in texts], adapted.template, adapted.tokenizer, adapted.model.max_seq_len
    )
    evaluation = evaluate(adapted.model, adapted.tokenizer, adapted.template, examples, mode="score")
    base = load(str(loaded.folder), device="cpu", dtype="float32")
    options = label_ids(adapted.template, base.tokenizer)
    engine = Engine(base, {"run": run})
    try:
        gate = Gate(engine, base)  # meanwhile the questions line up, and are answered together
        futures = [engine.score(example.prompt_ids, options, "run") for example in examples]
        of_base = engine.score(examples[0].prompt_ids, options)
        gate.open()
        for row, future in zip(evaluation.rows, futures, strict=True):
            assert future.result(60) == pytest.approx(list(row["scores"].values()), abs=1e-5)
        assert of_base.result(60) != pytest.approx(futures[0].result(), abs=1e-2)
    finally:
        engine.close()


def test_embeddings_of_a_batch_are_those_of_each_text_alone(
    engine: Engine, loaded: ModelBundle, alone: dict[str | None, CausalLM]
) -> None:
    gate = Gate(engine, loaded)  # meanwhile they line up, and are computed together
    texts = [ids(text, loaded) for text in ("a film", "x", "the plot of this one is")]
    futures = [(name, text, engine.embed(text, name)) for text in texts for name in alone]
    gate.open()
    for name, text, future in futures:
        with torch.no_grad():
            expected = alone[name].hidden_states(torch.tensor([text]))[0].mean(0)
        assert future.result(60) == pytest.approx(expected.tolist(), rel=1e-9)
    for wrong, message in (((), "the text is empty"), ((257,), "the text has a token 257"), ((1,) * 97, "has 97 tok")):
        with pytest.raises(InputError, match=message):
            engine.embed(wrong)


# What goes wrong ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": ()}, "the prompt is empty: give at least one token"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0: must be 1 or more"),
        ({"temperature": -0.5}, "--temperature -0.5: must be 0 or more"),
        ({"stop": ("a", "")}, "--stop .*: must be texts that are not empty"),
        ({"adapter": "wyde"}, "unknown adapter 'wyde': did you mean 'wide'"),
        ({"prompt": (5, 257)}, "the prompt has a token 257: the model's are 0 to 256"),
        ({"logit_bias": {257: 1.0}}, "logit_bias has a token 257: the model's are 0 to 256"),
        ({"prompt": (5,) * 96}, "the prompt has 96 tokens and prompt and answer at most 96: shorten it"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(engine: Engine, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        engine.submit(ask(**{"prompt": (1, 2), **settings}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ((), [(1,)], "the prompt is empty"),
        ((1,), [], "options: give at least one"),
        ((1,), [(1,), ()], "options: give at least one, and each at least one token"),
        ((1,), [(1, 999)], "an option has a token 999"),
        ((1,) * 96, [(1, 2)], "prompt and option have 98 tokens, the model reads at most 96"),
    ],
)
def test_wrong_questions_are_refused_in_one_line(engine: Engine, prompt: Any, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine.score(prompt, options)


def test_an_adapter_that_cannot_be_served_is_refused(
    loaded: ModelBundle, tmp_path: Path, alone: Any, folders: Any
) -> None:
    model = clone_with_shared_weights(loaded.model)
    dora = DoRA(rank=2, alpha=4.0, targets=("q",))
    dora.install(model, torch.Generator().manual_seed(0))
    (tmp_path / "dora").mkdir()
    save_adapter(tmp_path / "dora", model, dora, loaded.name)
    with pytest.raises(InputError, match=r"adapter two: is dora, and only lora .* as the base"):
        Engine(loaded, {"one": folders["wide"], "two": tmp_path / "dora"})
    with pytest.raises(InputError, match="no such folder"):
        Engine(loaded, {"one": tmp_path / "nowhere"})
    data_folder(tmp_path / "data")
    other = model_folder(tmp_path / "other", seed=5)
    run = run_of(tmp_path / "run", other, tmp_path / "data", "lora")
    with pytest.raises(InputError, match=r"was trained on .*other with weights"):
        Engine(loaded, {"one": run})
    with pytest.raises(InputError, match="is a run's model, adapted already"):
        Engine(load("resume", run, device="cpu", dtype="float32"), {"one": run})
    full = run_of(tmp_path / "full", other, tmp_path / "data", "full")
    with pytest.raises(InputError, match="adapter one: is full, and only lora"):
        Engine(load(str(other), device="cpu", dtype="float32"), {"one": full})
    (run / "best").unlink()
    with pytest.raises(InputError, match="best: no such checkpoint"):
        Engine(load(str(other), device="cpu", dtype="float32"), {"one": run})


def test_any_run_is_served_as_the_base(loaded: ModelBundle, tmp_path: Path) -> None:
    data_folder(tmp_path / "data")
    run = load("resume", run_of(tmp_path / "run", loaded.folder, tmp_path / "data", "prefix"), dtype="float32")
    engine = Engine(run, {})
    try:
        done = engine.submit(ask(ids("a film", loaded), max_new_tokens=9, temperature=0)).done.result(60)
        [expected] = generate(run.model, run.tokenizer, ["a film"], max_new_tokens=9)
        assert done.text == expected
        with pytest.raises(InputError, match="unknown adapter 'x': there is none, only the base"):
            engine.submit(ask((1,), "x"))
    finally:
        engine.close()


def test_cancel_ends_a_row_and_one_that_waits(loaded: ModelBundle) -> None:
    engine = Engine(loaded, {}, max_rows=2)
    try:
        gate = Gate(engine, loaded)
        pieces: list[TokenOutput] = []
        running = engine.submit(ask(endless(loaded), max_new_tokens=50, temperature=0), pieces.append)
        for _ in range(4):
            gate.go.release()
            gate.reached.acquire()
        waiting = engine.submit(ask((1,), max_new_tokens=5))
        assert engine.stats()["waiting"] == 1
        running.cancel()
        waiting.cancel()
        gate.open()
        done = running.done.result(60)
        assert done.finish_reason == "cancelled" and 0 < len(done.tokens) < 50
        assert pieces[-1] == TokenOutput("", None, None, "cancelled") and len(pieces) == len(done.tokens) + 1
        assert waiting.done.result(60) == Completion("", (), (), "cancelled", 1)
        assert gate.ticket.done.result(60).finish_reason == "length"
        running.cancel()  # once more changes nothing
        assert engine.stats()["cancelled"] == 2 and engine.stats()["completed"] == 1
    finally:
        engine.close()


def test_the_engine_outlives_what_is_raised_in_it(loaded: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(loaded, {})
    try:
        asked = ask(endless(loaded), max_new_tokens=20, temperature=0)
        real, calls = module.DecodingBatch.step, list[int]()

        def step(batch: Any) -> Any:
            calls.append(len(batch.rows))
            if len(calls) == 3:
                raise RuntimeError("out of\nmemory")
            return real(batch)

        monkeypatch.setattr(module.DecodingBatch, "step", step)
        pieces: list[TokenOutput] = []
        failed = engine.submit(asked, pieces.append)
        with pytest.raises(GraftError, match=r"^the engine failed: RuntimeError: out of memory$"):
            failed.done.result(60)
        assert pieces[-1] == TokenOutput("", None, None, "error")
        assert len(engine.submit(asked).done.result(60).tokens) == 20
        monkeypatch.setattr(module, "score_labels", lambda *_, **__: 1 / 0)
        with pytest.raises(GraftError, match="the engine failed: ZeroDivisionError: division by zero"):
            engine.score((1,), [(2,)]).result(60)
        assert len(engine.submit(asked).done.result(60).tokens) == 20
        assert engine.stats()["failed"] == 2
    finally:
        engine.close()


def test_who_listens_badly_fails_alone(engine: Engine, loaded: ModelBundle) -> None:
    def bad(piece: TokenOutput) -> None:
        raise KeyError("mine")

    asked = ask(endless(loaded), max_new_tokens=10, temperature=0)
    fine = engine.submit(asked)
    failed = engine.submit(asked, bad)
    with pytest.raises(GraftError, match="on_output failed: KeyError: 'mine'"):
        failed.done.result(60)
    assert len(fine.done.result(60).tokens) == 10


def test_rows_without_numbers_fail_alone(loaded: ModelBundle, folders: dict[str, Path]) -> None:
    engine = Engine(loaded, folders)
    try:
        assert engine._stack is not None
        for stacked in engine._stack.model.modules():
            if isinstance(b := getattr(stacked, "b", None), torch.Tensor):
                b[engine.names.index("wide")] = float("nan")
        asked = requests(loaded, 8, temperature=0)
        tickets = [engine.submit(request) for request in asked]
        for request, ticket in zip(asked, tickets, strict=True):
            if request.adapter == "wide":
                with pytest.raises(GraftError, match="the logits are NaN or infinite"):
                    ticket.done.result(60)
            else:
                assert ticket.done.result(60).finish_reason in ("stop", "length")
    finally:
        engine.close()


# Bounds and the end ---------------------------------------------------------------------------------------------------


def test_the_line_has_an_end(loaded: ModelBundle) -> None:
    engine = Engine(loaded, {}, max_rows=1, max_waiting=2)
    try:
        gate = Gate(engine, loaded)
        waiting = engine.submit(ask((1,), max_new_tokens=2))
        score = engine.score((1,), [(2,)])
        with pytest.raises(Overloaded, match="2 requests are waiting already: ask again later"):
            engine.submit(ask((1,)))
        with pytest.raises(Overloaded):
            engine.score((1,), [(2,)])
        gate.open()
        waiting.done.result(60), score.result(60)
        assert engine.submit(ask((1,), max_new_tokens=2)).done.result(60)
    finally:
        engine.close()


def test_a_request_is_not_lost_while_the_queue_is_replaced(loaded: ModelBundle) -> None:
    engine = Engine(loaded, {})
    try:
        taken: list[RequestHandle] = []
        asking = threading.Thread(target=lambda: taken.append(engine.submit(ask((1,), max_new_tokens=2))))
        with engine._changed:  # as the engine's thread, which has the lock while the request arrives
            asking.start()
            asking.join(0.3)
            engine._waiting = type(engine._waiting)(engine._waiting)
        asking.join()
        assert taken[0].done.result(60)
    finally:
        engine.close(drain=False)


def test_memory_is_bounded_by_waiting(loaded: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(loaded, {}, max_rows=8, max_tokens=100)
    sizes: list[tuple[int, int]] = []
    real = module.DecodingBatch.step

    def step(batch: Any) -> Any:
        logits = real(batch)
        sizes.append(batch.reserved)
        return logits

    monkeypatch.setattr(module.DecodingBatch, "step", step)
    try:
        gate = Gate(engine, loaded, tokens=2)
        lengths = [(3, 20), (30, 50), (3, 3), (5, 9), (2, 4), (1, 1), (20, 70)]
        prompt = endless(loaded)
        asked = [ask(prompt * n, max_new_tokens=new, temperature=0) for n, new in lengths]
        tickets = [engine.submit(request) for request in asked]
        gate.open()
        results(tickets)
        assert max(rows for rows, _ in sizes) > 1
        assert all(rows * tokens <= 100 for rows, tokens in sizes), sizes
        assert engine._batch.reserved == (0, 0)
    finally:
        engine.close()


def test_nothing_is_kept_of_requests_that_have_ended(engine: Engine, loaded: ModelBundle) -> None:
    def tensors() -> int:
        gc.collect()
        kept = sum(len(text.cache().keys) + len(text.cache().values) for text in engine._prefixes._texts)
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()) - kept

    def serve(times: int) -> None:
        for _ in range(times):
            results([engine.submit(request) for request in requests(loaded, 12, stop=("q",))])
            engine.score((1, 2), [(3,), (4,)], "wide").result(60)

    serve(2)
    before, tickets = tensors(), sum(type(thing) is RequestHandle for thing in gc.get_objects())
    serve(6)
    assert abs(tensors() - before) <= 5
    assert sum(type(thing) is RequestHandle for thing in gc.get_objects()) <= tickets


def test_a_beginning_that_was_read_with_the_same_adapter_is_not_read_again(
    loaded: ModelBundle, folders: dict[str, Path]
) -> None:
    engine, plain = Engine(loaded, folders), Engine(loaded, folders, prefix_tokens=0)
    first = ids("a long instruction: say what it is: ", loaded)
    second, chat = (*first[:-2], *ids("? a film", loaded)), [5, 6, 7, 8]
    try:

        def read_of(*asked: Request) -> int:
            """How many tokens of prompts are read for these, which are answered as without the cache."""
            before = engine.stats()["prompt_tokens_read"]
            got = results([engine.submit(request) for request in asked])
            assert [each.tokens for each in got] == [plain.submit(each).done.result(60).tokens for each in asked]
            return int(engine.stats()["prompt_tokens_read"]) - before

        for adapter in (None, "narrow", "wide"):  # none has what another has read (llama.cpp#26207)
            assert read_of(ask(first, adapter, max_new_tokens=5)) == len(first)
            assert read_of(ask(first, adapter, max_new_tokens=5)) == 1  # its last token, for the logits
            assert read_of(ask(second, adapter, max_new_tokens=5)) == len(second) - len(first) + 2
        both = [ask(first, "wide"), ask(second, "narrow"), ask(first[:3], None), ask((9, *first), None)]
        assert read_of(*both) == 1 + 1 + 3 + 1 + len(first)
        for _ in range(3):  # a conversation: what was answered is not read again either
            answer = engine.submit(ask(chat, max_new_tokens=9, temperature=0)).done.result(60).tokens
            if len(answer) < 9:
                break
            chat = [*chat, *answer, 11, 12]
            assert read_of(ask(chat, max_new_tokens=2)) == 3  # the last answered token was never fed
    finally:
        engine.close(), plain.close()


def test_a_row_that_is_running_is_read_from(loaded: ModelBundle) -> None:
    engine = Engine(loaded, {}, prefix_tokens=0)
    try:
        prompt = [*endless(loaded), *range(20, 40)]
        reached, held = threading.Semaphore(0), threading.Semaphore(0)

        def hold(piece: TokenOutput) -> None:
            reached.release()
            held.acquire()

        running = engine.submit(ask(prompt, max_new_tokens=9, temperature=0), hold)
        reached.acquire()
        late = engine.submit(ask([*prompt, 50], max_new_tokens=3, temperature=0))
        held.release(100)
        expected = generate_ids(loaded.model, [[*prompt, 50]], stopping(3, loaded.tokenizer.eot))
        assert [list(late.done.result(60).tokens)] == expected
        assert running.done.result(60) and engine.stats()["prompt_tokens_read"] == len(prompt) + 1
    finally:
        engine.close()


def test_the_texts_that_are_kept_are_bounded() -> None:
    def cache(n: int) -> KVCache:
        tensor = torch.arange(n).view(1, 1, n, 1)
        return KVCache([tensor], [tensor])

    kept = PrefixCache(30)
    for start in (0, 100, 200, 300):
        kept.add("one", range(start, start + 10), cache(10))
    assert kept.size == 30 and kept.find("one", range(10)) is None
    found = kept.find("one", [*range(100, 109), 7])
    assert found is not None and found.size == 9 and found.keys[0].flatten().tolist() == list(range(9))
    assert kept.find("two", range(100, 110)) is None and kept.find(None, range(100, 110)) is None
    kept.add("one", range(100, 115), cache(15))  # in place of its beginning, which was the last used
    assert kept.size == 25 and kept.find("one", range(200, 210)) is None
    kept.add("one", range(300, 309), cache(9))  # is known already
    kept.add("one", range(7), cache(7))  # is too short
    kept.add("one", range(400, 431), cache(31))  # does not fit
    assert kept.size == 25


def test_close_finishes_what_was_taken_and_refuses_what_is_new(loaded: ModelBundle) -> None:
    engine = Engine(loaded, {}, max_rows=2)
    asked = [replace(request, adapter=None) for request in requests(loaded, 6, temperature=0)]
    tickets = [engine.submit(request) for request in asked]
    score = engine.score((1,), [(2,)])
    engine.close()
    assert all(ticket.done.done() and ticket.done.result().finish_reason in ("stop", "length") for ticket in tickets)
    assert score.done() and not engine._thread.is_alive()
    with pytest.raises(ShuttingDown, match="the engine is closed: it takes no new requests"):
        engine.submit(ask((1,)))
    engine.close()


def test_close_at_once_cancels(loaded: ModelBundle) -> None:
    engine = Engine(loaded, {}, max_rows=1)
    gate = Gate(engine, loaded)
    waiting = engine.submit(ask((1,)))
    score = engine.score((1,), [(2,)])
    closing = threading.Thread(target=engine.close, kwargs={"drain": False})
    closing.start()
    with pytest.raises(ShuttingDown, match="closed before it could answer"):
        score.result(60)
    gate.open()
    closing.join(60)
    assert waiting.done.result(60).finish_reason == gate.ticket.done.result(60).finish_reason == "cancelled"
    assert not engine._thread.is_alive()


def test_many_threads_at_once(engine: Engine, loaded: ModelBundle) -> None:
    asked = requests(loaded, 24, seed=5)
    expected = [completion.tokens for completion in results([engine.submit(request) for request in asked])]
    found: dict[int, tuple[int, ...]] = {}

    def client(numbers: range) -> None:
        for number in numbers:
            found[number] = engine.submit(asked[number]).done.result(60).tokens

    threads = [threading.Thread(target=client, args=(range(n, 24, 8),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[number] for number in range(24)] == expected
