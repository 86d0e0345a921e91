"""The API over a real socket: what OpenAI's own client makes of it, what is refused with which words, who is let in.

The engine is a fake whose answers, pace and failures a test decides; `test_server.py` has the real one.
"""

import asyncio
import base64
import gzip
import json
import logging
import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import limits
import openai
import pytest

import graftlm.serving.app
from graftlm.errors import GraftError, InputError, ShuttingDown
from graftlm.inference.sampling import SamplingParams
from graftlm.serving import middleware
from graftlm.serving.api_docs import ROUTES
from graftlm.serving.middleware import RateLimiter, TrustedHosts, is_loopback
from graftlm.serving.responses import Formatter
from graftlm.serving.schemas import APIError
from graftlm.serving.service import Service
from serving.fakes import FakeEngine, eventually, service, serving

TEXT = {"model": "base", "prompt": "a film"}
TALK = {"model": "base", "messages": [{"role": "user", "content": "a film"}]}
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Service, FakeEngine]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return service(folder, "one", "two")


@pytest.fixture(scope="module")
def url(made: tuple[Service, FakeEngine]) -> Iterator[str]:
    with serving(made[0]) as url:
        yield url


@pytest.fixture
def engine(made: tuple[Service, FakeEngine]) -> FakeEngine:
    made[1].reset()
    return made[1]


@pytest.fixture(scope="module")
def clients(url: str) -> Iterator[tuple[httpx.Client, openai.OpenAI]]:
    """Made once: a client reads all certificates of the machine."""
    with (
        httpx.Client(base_url=url, timeout=20) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=20) as client,
    ):
        yield http, client


@pytest.fixture
def http(clients: tuple[httpx.Client, openai.OpenAI], engine: FakeEngine) -> httpx.Client:
    return clients[0]


@pytest.fixture
def client(clients: tuple[httpx.Client, openai.OpenAI], engine: FakeEngine) -> openai.OpenAI:
    return clients[1]


def error(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, in OpenAI's form."""
    assert answer.status_code == status, answer.text
    content = answer.json()
    assert set(content) == {"error"} and set(content["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in content["error"]["message"]
    return content["error"]


# OpenAI's client ------------------------------------------------------------------------------------------------------


def test_models_are_listed_the_base_first(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "one", "two"]
    assert client.models.retrieve("two").id == "two"
    with pytest.raises(openai.NotFoundError, match="there is no model 'tow': did you mean 'two'"):
        client.models.retrieve("tow")


def test_a_completion(client: openai.OpenAI, engine: FakeEngine) -> None:
    found = client.completions.create(model="one", prompt="a film", max_tokens=4, temperature=0, stop=["x"], seed=7)
    assert (found.object, found.model, found.choices[0].text) == ("text_completion", "one", "fine")
    assert found.choices[0].finish_reason == "stop" and found.choices[0].logprobs is None
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (6, 4, 10)
    (asked,) = engine.requests
    params = SamplingParams(max_new_tokens=4, temperature=0, stop=("x",), seed=7)
    assert (asked.adapter, asked.params) == ("one", params)


def test_several_prompts_several_choices_in_order_each_with_its_own_seed(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    found = client.completions.create(
        model="base", prompt=["a film", "b"], n=2, seed=5, logprobs=0, top_p=0.5, extra_body={"top_k": 3, "min_p": 0.1}
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [(len(asked.prompt), asked.params.seed) for asked in engine.requests] == [(6, 5), (6, 6), (1, 5), (1, 6)]
    first = engine.requests[0].params
    assert (first.top_k, first.top_p, first.min_p) == (3, 0.5, 0.1)
    assert found.usage is not None and found.usage.prompt_tokens == 7 and found.usage.completion_tokens == 36
    logprobs = found.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens == list("fine film") and logprobs.token_logprobs == [-0.5] * 9
    assert logprobs.text_offset == list(range(9))


def test_bias_and_penalties_of_the_client(client: openai.OpenAI, engine: FakeEngine) -> None:
    penalties: Any = {"frequency_penalty": 0.5, "presence_penalty": -2, "logit_bias": {"5": -100, "7": 1.5}, "seed": 1}
    extra = {"repetition_penalty": 1.2}
    client.completions.create(model="base", prompt="a", **penalties, extra_body=extra)
    messages: Any = [{"role": "user", "content": "a"}]
    client.chat.completions.create(model="base", messages=messages, **penalties, extra_body=extra)
    for asked in engine.requests:
        assert asked.params.logit_bias == "5=-100.0,7=1.5" and asked.params.biases == {5: -100.0, 7: 1.5}
        assert (asked.params.frequency_penalty, asked.params.presence_penalty) == (0.5, -2.0)
        assert asked.params.repetition_penalty == 1.2


def test_without_a_seed_each_choice_draws_its_own(client: openai.OpenAI, engine: FakeEngine) -> None:
    for _ in range(2):
        client.completions.create(model="base", prompt="a", n=3)
    assert len({asked.params.seed for asked in engine.requests}) == 6


def test_tokens_instead_of_text(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.completions.create(model="base", prompt=[5, 6, 7])
    client.completions.create(model="base", prompt=[[5], [6, 7]])
    assert [list(asked.prompt) for asked in engine.requests] == [[5, 6, 7], [5], [6, 7]]
    assert [asked.params.max_new_tokens for asked in engine.requests] == [16, 16, 16]


def test_a_streamed_completion_comes_token_by_token(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.pause = 0.02
    parts = list(
        client.completions.create(
            model="two", prompt="a", stream=True, n=2, logprobs=0, stream_options={"include_usage": True}
        )
    )
    texts = {0: "", 1: ""}
    for part in parts[:-1]:
        texts[part.choices[0].index] += part.choices[0].text
    assert texts == {0: "fine film", 1: "fine film"} and len(parts) == 2 * 10 + 1
    finishes = [(p.choices[0].index, p.choices[0].finish_reason) for p in parts[:-1] if p.choices[0].finish_reason]
    assert sorted(finishes) == [(0, "stop"), (1, "stop")]
    assert parts[-1].choices == [] and parts[-1].usage is not None and parts[-1].usage.completion_tokens == 18
    offsets = [part.choices[0].logprobs.text_offset for part in parts[:-1] if part.choices[0].logprobs]
    assert sorted(offsets) == sorted([[n] for n in range(9)] * 2)
    assert len({part.id for part in parts}) == 1


@pytest.mark.parametrize("answer", ["é🙂 ok", "a\u200d🙂", "no…"])
def test_parts_of_characters_have_their_bytes_and_the_characters_place(
    answer: str, client: openai.OpenAI, engine: FakeEngine
) -> None:
    """The tokens are bytes. A part of a character is where the character is, in a stream too."""
    engine.answer = answer
    encoded = [bytes([byte]) for character in answer for byte in character.encode()]
    places = [n for n, character in enumerate(answer) for _ in character.encode()]
    parts = ["".join(f"\\x{byte[0]:02x}") if byte[0] > 127 else byte.decode() for byte in encoded]
    asked: Any = {"model": "base", "prompt": "a", "logprobs": 0, "max_tokens": 64}
    whole = client.completions.create(**asked).choices[0].logprobs
    assert whole is not None and whole.text_offset == places
    assert whole.tokens == [f"bytes:{part}" if part[0] == "\\" else part for part in parts]
    pieces = [part.choices[0].logprobs for part in client.completions.create(**asked, stream=True)]
    assert [n for piece in pieces if piece for n in piece.text_offset or ()] == places
    assert [token for piece in pieces if piece for token in piece.tokens or ()] == whole.tokens
    chat: Any = {"model": "base", "messages": [{"role": "user", "content": "a"}], "logprobs": True}
    content = client.chat.completions.create(**chat).choices[0].logprobs
    assert content is not None and content.content is not None
    assert [(each.token, bytes(each.bytes or ())) for each in content.content] == list(zip(parts, encoded, strict=True))
    chunks = [part.choices[0].logprobs for part in client.chat.completions.create(**chat, stream=True)]
    assert [each for chunk in chunks if chunk for each in chunk.content or ()] == content.content


def test_tokens_of_a_stop_text_have_no_logprobs(client: openai.OpenAI, engine: FakeEngine) -> None:
    asked: Any = {"model": "base", "prompt": "a", "logprobs": 0, "stop": [" fi"]}
    whole = client.completions.create(**asked)
    assert whole.choices[0].logprobs is not None and whole.usage is not None
    assert whole.choices[0].logprobs.tokens == list("fine") and whole.usage.completion_tokens == 9
    pieces = [part.choices[0].logprobs for part in client.completions.create(**asked, stream=True)]
    assert [token for piece in pieces if piece for token in piece.tokens or ()] == list("fine")


def streamed(client: openai.OpenAI, **asked: Any) -> tuple[str, dict[str, list[Any]]]:
    """Text and log-probabilities of a stream's choice 0."""
    text, columns = "", dict[str, list[Any]]()
    for part in client.completions.create(stream=True, **asked):
        if part.choices and part.choices[0].index == 0:
            text += part.choices[0].text
            for name, values in part.choices[0].logprobs or ():
                columns[name] = [*columns.get(name, []), *(values or [])]
    return text, columns


@pytest.mark.parametrize("prompt", ["a film", "é🙂 ok", "ends in a space: ", "spaces  ", "\n"])
def test_an_echoed_prompt_has_its_tokens_and_their_places(
    prompt: str, client: openai.OpenAI, engine: FakeEngine, made: tuple[Service, FakeEngine]
) -> None:
    """The tokens are bytes; those of an answer begin with the space that the prompt's text ends in."""
    engine.ends, engine.others = True, made[0].tokenizer.encode("xy")
    stripped = prompt.rstrip(" ")
    space = prompt[len(stripped) :]
    engine.answer = f"{space}fine é"
    whole = f"{stripped}{engine.answer}"
    asked: Any = {"model": "base", "prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 64}
    choice = client.completions.create(**asked, n=2).choices[0]
    assert choice.text == whole
    logprobs = choice.logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs
    offsets = [n for n, character in enumerate(whole) for _ in character.encode()]
    assert logprobs.text_offset == [*offsets, len(whole)]
    assert logprobs.tokens[-1] == "<|endoftext|>" and len(logprobs.tokens) == len(offsets) + 1
    for token, at in zip(logprobs.tokens[:-1], offsets, strict=True):
        assert token.startswith("bytes:") or whole[at] == token
    assert logprobs.token_logprobs == [None, *[-0.5] * len(offsets)]
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[1:] == [{"x": 0.0, "y": -0.1, token: -0.5} for token in logprobs.tokens[1:]]
    text, columns = streamed(client, **asked)
    assert text == choice.text and columns == logprobs.model_dump()
    requests = engine.requests
    assert all(each.prompt_logprobs and each.top_logprobs == 2 and not each.prompt_only for each in requests)


def test_echo_without_logprobs_and_without_an_answer(
    client: openai.OpenAI, engine: FakeEngine, made: tuple[Service, FakeEngine]
) -> None:
    asked: Any = {"model": "base", "prompt": ["a film", "b"], "echo": True}
    found = client.completions.create(**asked, n=2)
    assert [choice.text for choice in found.choices] == ["a filmfine film"] * 2 + ["bfine film"] * 2
    assert all(choice.logprobs is None for choice in found.choices)
    assert streamed(client, **asked) == ("a filmfine film", {})
    assert not any(each.prompt_logprobs or each.prompt_only for each in engine.requests)
    for extra in ({}, {"logprobs": 1}):
        asked = {"model": "base", "prompt": made[0].tokenizer.encode("aé"), "echo": True, "max_tokens": 0, **extra}
        found = client.completions.create(**asked)
        (choice,) = found.choices
        assert found.usage is not None and (found.usage.prompt_tokens, found.usage.completion_tokens) == (3, 0)
        assert choice.text == "aé" and engine.requests[-1].prompt_only
        text, columns = streamed(client, **asked)
        assert text == "aé" and columns == (choice.logprobs.model_dump() if choice.logprobs else {})
        assert columns.get("tokens", []) == (["a", r"bytes:\xc3", r"bytes:\xa9"] if extra else [])


def test_of_tokens_with_equal_text_the_likeliest_is_reported(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.others = [999_999, 999_998]  # have no text, as ids without a token
    asked: Any = {"model": "base", "prompt": "a", "logprobs": 3, "max_tokens": 1}
    logprobs = client.completions.create(**asked).choices[0].logprobs
    assert logprobs is not None and logprobs.top_logprobs == [{"": 0.0, "f": -0.5}]


def test_the_likeliest_tokens_of_a_chat(client: openai.OpenAI, engine: FakeEngine, made: Any) -> None:
    engine.answer, engine.ends = "é!", True
    engine.others = [*made[0].tokenizer.encode("ü"), made[0].tokenizer.eot]
    asked: Any = {"model": "base", "messages": TALK["messages"], "logprobs": True, "top_logprobs": 4}
    found = client.chat.completions.create(**asked).choices[0].logprobs
    assert found is not None and found.content is not None
    assert [each.token for each in found.content] == ["\\xc3", "\\xa9", "!"]  # without the end of the turn
    for each in found.content:
        top = [(likely.token, likely.bytes, likely.logprob) for likely in each.top_logprobs]
        own = (each.token, each.bytes, -0.5)
        assert top == [("\\xc3", [195], 0), ("\\xbc", [188], -0.1), ("<|endoftext|>", None, -0.2), own]
    chunks = [part.choices[0].logprobs for part in client.chat.completions.create(**asked, stream=True)]
    assert [each for chunk in chunks if chunk for each in chunk.content or ()] == found.content


def test_a_chat_and_its_stream(client: openai.OpenAI, engine: FakeEngine, made: tuple[Service, FakeEngine]) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Is it"}, {"type": "text", "text": " fine?"}]},
        {"role": "assistant", "content": "Yes.", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "Why?"},
    ]
    found = client.chat.completions.create(model="base", messages=messages, logprobs=True, max_completion_tokens=4)
    assert found.choices[0].message.content == "fine" and found.choices[0].message.role == "assistant"
    logprobs = found.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [each.token for each in logprobs.content] == list("fine")
    asked = made[0].tokenizer.decode(engine.requests[0].prompt)
    wanted = "<system>Be brief.</system><user>Is it fine?</user><assistant>Yes.</assistant><user>Why?</user><assistant>"
    assert asked == wanted
    parts = list(client.chat.completions.create(model="base", messages=messages, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "fine film"
    assert parts[-1].choices[0].finish_reason == "stop" and parts[0].object == "chat.completion.chunk"
    assert engine.requests[1].params.max_new_tokens == 64  # the server's own limit


def test_the_asynchronous_client_too(url: str, engine: FakeEngine) -> None:
    engine.pause = 0.005

    async def work() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:

            async def one(model: str) -> str:
                parts = await client.completions.create(model=model, prompt="a", stream=True)
                return "".join([part.choices[0].text async for part in parts])

            return await asyncio.gather(*(one(model) for model in ("base", "one", "two") * 8))

    assert asyncio.run(work()) == ["fine film"] * 24
    assert {asked.adapter for asked in engine.requests} == {None, "one", "two"}


def test_the_client_raises_what_happened(client: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model 'three'"):
        client.completions.create(model="three", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature: must be a number from 0 to 2") as refused:
        client.completions.create(model="base", prompt="a", temperature=9)
    assert refused.value.param == "temperature" and refused.value.type == "invalid_request_error"
    engine.refuse = InputError("the prompt is odd")
    with pytest.raises(openai.BadRequestError, match="the prompt is odd"):
        client.completions.create(model="base", prompt="a")
    engine.refuse = ShuttingDown("closed")
    with pytest.raises(openai.InternalServerError, match="the server is stopping"):
        client.completions.create(model="base", prompt="a")
    engine.refuse, engine.fails = None, GraftError("the logits are NaN")
    with pytest.raises(openai.InternalServerError, match="the logits are NaN"):
        client.completions.create(model="base", prompt="a")


def test_a_stream_that_fails_midway_says_so(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.fails = GraftError("the logits are NaN")
    parts = iter(client.completions.create(model="base", prompt="a", stream=True))
    assert next(parts).choices[0].text == "f"
    with pytest.raises(openai.APIError, match="the logits are NaN"):
        next(parts)
    engine.fails, engine.finish = None, "error"
    with pytest.raises(openai.APIError, match="the engine failed"):
        list(client.completions.create(model="base", prompt="a", stream=True))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (GraftError("the logits are NaN"), "the logits are NaN"),
        (KeyError("a bug"), "the server failed at this request"),
    ],
)
def test_any_error_in_a_stream_is_an_event_and_the_stream_ends_as_promised(
    failure: Exception, message: str, http: httpx.Client, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fails = failure
    for path, body in (("completions", TEXT), ("chat/completions", TALK)):
        lines = http.post(f"/v1/{path}", json={**body, "stream": True}).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""] and json.loads(lines[-3][6:])["error"]["message"] == message
    assert ("a bug" in caplog.text) == isinstance(failure, KeyError)


def test_an_error_of_writing_a_stream_is_an_event_too(
    http: httpx.Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Formatter, "chunk", lambda *_: 1 / 0)
    lines = http.post("/v1/completions", json={**TEXT, "stream": True}).text.split("\n\n")
    assert json.loads(lines[0][6:])["error"]["type"] == "server_error" and lines[1:] == ["data: [DONE]", ""]


def test_a_text_ends_where_its_model_learned_to_end_a_turn(tmp_path: Path) -> None:
    given, engine = service(tmp_path, "talks", "reviews")
    models: Any = given.models
    models["talks"] = replace(models["talks"], stop_tokens=frozenset({7}))
    with serving(given) as url:
        for name in given.models:
            assert httpx.post(f"{url}/v1/completions", json={**TEXT, "model": name}).status_code == 200
    assert [request.params.stop_token_ids for request in engine.requests] == [{*()}, {7}, {*()}]


def test_where_one_of_several_is_not_taken_none_is(http: httpx.Client, engine: FakeEngine) -> None:
    engine.most, engine.pause = 2, 5.0
    answer = http.post("/v1/completions", json={**TEXT, "n": 3})
    assert error(answer, 503)["code"] == "overloaded" and answer.headers["retry-after"] == "1"
    assert len(engine.tickets) == 2 and all(ticket.cancelled.is_set() for ticket in engine.tickets)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(url: str, engine: FakeEngine, stream: bool) -> None:
    engine.pause = 0.2 if stream else 5.0
    body = json.dumps({**TEXT, "stream": stream}).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as line:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert eventually(lambda: bool(engine.tickets))
        if stream:
            assert line.recv(100).startswith(b"HTTP/1.1 200")
        assert not engine.tickets[0].cancelled.is_set()
    assert eventually(engine.tickets[0].cancelled.is_set)


# Label probabilities --------------------------------------------------------------------------------------------------


def test_classify_asks_base_and_adapters_the_same(http: httpx.Client, engine: FakeEngine, made: Any) -> None:
    found = http.post("/v1/classify", json={"text": "a joy"}).json()
    (result,) = found["results"]
    assert list(result["models"]) == ["base", "one", "two"]
    for name, reading in result["models"].items():
        apart = 1.0 if name == "base" else 2.0  # what the fake says of the two labels' log-probabilities
        assert reading["label"] == "negative" and not reading["truncated"]
        expected = 1 / (1 + 2.718281828459045**-apart)
        assert reading["probabilities"] == {
            "negative": pytest.approx(expected, rel=1e-12),
            "positive": pytest.approx(1 - expected, rel=1e-12),
        }
    prompts = [made[0].tokenizer.decode(prompt) for prompt, _, _ in engine.scored]
    assert prompts == ["Review: a joy\nIs it:"] * 3
    assert [adapter for _, _, adapter in engine.scored] == [None, "one", "two"]
    options = [made[0].tokenizer.decode(option) for option in engine.scored[0][1]]
    assert options == [" negative", " positive"]


def test_classify_many_texts_of_some_models_and_says_what_was_cut(http: httpx.Client, engine: FakeEngine) -> None:
    texts = [f"text {n}" for n in range(63)] + ["long " * 100]
    found = http.post("/v1/classify", json={"texts": texts, "models": ["two", "base"]}).json()
    assert [result["index"] for result in found["results"]] == list(range(64))
    assert all(list(result["models"]) == ["two", "base"] for result in found["results"])
    assert [result["models"]["two"]["truncated"] for result in found["results"]] == [False] * 63 + [True]
    assert max(len(prompt) for prompt, _, _ in engine.scored) <= 200
    assert error(http.post("/v1/classify", json={"text": "a", "models": ["x"]}), 404)["code"] == "model_not_found"


# Embeddings and tokens ------------------------------------------------------------------------------------------------


def test_embeddings_as_numbers_and_in_base64(client: openai.OpenAI, engine: FakeEngine) -> None:
    found = client.embeddings.create(model="base", input="a film")  # which OpenAI's client asks for in base64
    assert [each.embedding for each in found.data] == [[6.0, 0.5]]
    assert (found.usage.prompt_tokens, found.usage.total_tokens) == (6, 6)
    assert (found.model_extra or {})["pooling"] == "mean of the last hidden states"
    for encoding in ("float", "base64"):
        asked: Any = {"model": "one", "input": ["é"] * 70 + ["abc"], "encoding_format": encoding, "user": "me"}
        found = client.embeddings.create(**asked)
        assert [each.index for each in found.data] == list(range(71)) and found.usage.total_tokens == 143
        numbers = [each.embedding for each in found.data[-2:]]
        if encoding == "base64":
            numbers = [list(struct.unpack("<2f", base64.b64decode(str(text)))) for text in numbers]
        assert numbers == [[2.0, pytest.approx(-0.1)], [3.0, pytest.approx(-0.1)]]
    found = client.embeddings.create(model="base", input=[[5, 6, 7], [5]], encoding_format="float")
    assert [each.embedding[0] for each in found.data] == [3.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": ""}, "input: must be a text, a list of texts"),
        ({"input": []}, "input: must be a text, a list of texts"),
        ({"input": ["a"] * 2049}, "input: at most 2048 texts"),
        ({"input": ["a", "x" * 201]}, "201 tokens, and base reads at most 200: shorten the text"),
        ({"dimensions": 2}, "dimensions is not supported: leave it out"),
        ({"encoding_format": "int8"}, "encoding_format: must be float or base64"),
    ],
)
def test_embeddings_refuse(change: dict[str, Any], message: str, http: httpx.Client) -> None:
    body = {"model": "base", "input": "a", **change}
    assert error(http.post("/v1/embeddings", json=body), 400)["message"].startswith(message)


def test_an_embedding_without_numbers_is_an_error(http: httpx.Client, engine: FakeEngine) -> None:
    engine.embedded = float("nan")
    found = error(http.post("/v1/embeddings", json={"model": "base", "input": "a"}), 500)
    assert found["message"].startswith("the hidden states are NaN")


def test_texts_to_tokens_and_back(http: httpx.Client, made: tuple[Service, FakeEngine]) -> None:
    tokenizer = made[0].tokenizer
    text = "é <|endoftext|> ok "
    found = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == tokenizer.encode(text) and found["count"] == len(found["tokens"]) == len(text.encode())
    assert found["max_model_len"] == 200 and found["token_strs"][2:5] == [" ", "<", "|"]
    back = http.post("/detokenize", json={"tokens": found["tokens"], "model": "one"}).json()
    assert back == {"prompt": text}
    assert http.post("/detokenize", json={"tokens": [tokenizer.eot]}).json() == {"prompt": "<|endoftext|>"}
    assert http.post("/tokenize", json={"prompt": "", "add_special_tokens": False}).json()["tokens"] == []
    talk = http.post("/tokenize", json=TALK).json()
    assert tokenizer.decode(talk["tokens"]) == "<user>a film</user><assistant>" and talk["token_strs"] is None


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("tokenize", {}, 400, "give either prompt or messages"),
        ("tokenize", {"prompt": "a", "messages": TALK["messages"]}, 400, "give either prompt or messages"),
        (
            "tokenize",
            {"messages": TALK["messages"], "add_generation_prompt": False},
            400,
            "add_generation_prompt: must",
        ),
        ("tokenize", {"prompt": "a", "model": "no"}, 404, "there is no model 'no'"),
        ("detokenize", {"tokens": [5, 257]}, 400, "tokens has a token 257: the model's are 0 to 256"),
        ("detokenize", {"tokens": "a"}, 400, "tokens: must be a list of token ids"),
        ("detokenize", {}, 400, "tokens is missing: a list of token ids"),
    ],
)
def test_tokenize_refuses(path: str, body: dict[str, Any], status: int, message: str, http: httpx.Client) -> None:
    assert error(http.post(f"/{path}", json=body), status)["message"].startswith(message)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "change", "message", "param"),
    [
        ("completions", {"prompt": None}, "prompt is missing: a text, a list of texts, ", "prompt"),
        ("completions", {"prompt": ""}, "prompt: must be a text, ", "prompt"),
        ("completions", {"prompt": []}, "of such lists, none empty", "prompt"),
        ("completions", {"prompt": [[]]}, "of such lists, none empty", "prompt"),
        ("completions", {"prompt": ["a", ""]}, "of such lists, none empty", "prompt"),
        ("completions", {"prompt": [1, "a"]}, "prompt: must be a text, ", "prompt"),
        ("completions", {"prompt": [-1]}, "prompt: must be a text, ", "prompt"),
        ("completions", {"prompt": [True]}, "prompt: must be a text, ", "prompt"),
        ("completions", {"prompt": "x" * 200}, "200 tokens and 1 new ones, and base reads at most 200", None),
        ("completions", {"prompt": "x" * 190, "max_tokens": 11}, "or lower max_tokens", None),
        ("completions", {"max_tokens": 65}, "max_tokens: at most 64 here", "max_tokens"),
        ("completions", {"max_tokens": 0}, "max_tokens: 0 needs echo", "max_tokens"),
        ("completions", {"max_tokens": -1, "echo": True}, "max_tokens: must be a whole number, 1 or mor", "max_tokens"),
        ("chat/completions", {"max_tokens": 0}, "max_tokens: must be a whole number, 1 or more", "max_tokens"),
        ("completions", {"prompt": "x" * 201, "max_tokens": 0, "echo": True}, "201 tokens and 0 new ones, and b", None),
        ("completions", {"max_tokens": "16"}, "max_tokens: must be a whole number", "max_tokens"),
        ("completions", {"max_tokens": 10**400}, "max_tokens: ", "max_tokens"),
        ("completions", {"temperature": -1}, "temperature: must be a number from 0 to 2", "temperature"),
        ("completions", {"temperature": "NaN"}, "temperature: must be a number from 0 to 2", "temperature"),
        ("completions", {"temperature": True}, "temperature: must be a number from 0 to 2", "temperature"),
        ("completions", {"top_p": 0}, "top_p: must be a number above 0", "top_p"),
        ("completions", {"top_k": 0.5}, "top_k: must be a whole number, 0 or more", "top_k"),
        ("completions", {"min_p": 1.5}, "min_p: must be a number from 0 to 1", "min_p"),
        ("completions", {"seed": -1}, "seed: must be a whole number, 0 or more", "seed"),
        ("completions", {"seed": 2**63}, "seed: must be a whole number, 0 or more", "seed"),
        ("completions", {"n": 65}, "n: must be 1 to 64", "n"),
        ("completions", {"n": 33, "prompt": ["a", "b"]}, "n: 2 prompts times 33: at most 64", "n"),
        ("completions", {"stop": ["a"] * 5}, "stop: must be at most 4 texts", "stop"),
        ("completions", {"stop": ""}, "stop: must be at most 4 texts, none of them empty", "stop"),
        ("completions", {"logprobs": 21}, "logprobs: must be a whole number from 0 to 20", "logprobs"),
        ("completions", {"logprobs": True}, "logprobs: must be a whole number from 0 to 20", "logprobs"),
        ("completions", {"echo": 1}, "echo: must be true or false", "echo"),
        ("completions", {"top_logprobs": 2}, "top_logprobs is not supported", "top_logprobs"),
        ("chat/completions", {"echo": True}, "echo is not supported: leave it out", "echo"),
        *(
            ("completions", {"logit_bias": bias}, "logit_bias: must be an object of biases from -100 ", "logit_bias")
            for bias in ({"5": 101}, {"5": "1"}, {"-5": 1}, {"a": 1}, [5], 5)
        ),
        ("completions", {"presence_penalty": 2.5}, "presence_penalty: must be a number from -2 to 2", "presence_penal"),
        ("chat/completions", {"frequency_penalty": "a"}, "frequency_penalty: must be a number from -2", "frequency_pe"),
        ("completions", {"repetition_penalty": 0}, "repetition_penalty: must be a number greater than", "repetition_p"),
        ("completions", {"temprature": 1}, "unknown field 'temprature': did you mean temperature? ", "temprature"),
        ("completions", {"stream_options": {"a": 1}}, "unknown field 'stream_options.a'", "stream_options.a"),
        ("completions", {"model": 5}, "model: must be the name of a model", "model"),
        ("chat/completions", {"messages": []}, "messages: must be a list of messages", "messages"),
        ("chat/completions", {"messages": [5]}, "messages: must be a list", "messages"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "a"}]},
            "tool_calls (number 2 is wrong)",
            "messages",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "(number 1 is wrong)",
            "messages",
        ),
        ("chat/completions", {"messages": [{"role": "user", "content": "a", "name": "b"}]}, "name is not supp", "name"),
        ("chat/completions", {"functions": [{}]}, "functions is not supported", "functions"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs: needs logprobs: true", "top_logprobs"),
        (
            "chat/completions",
            {"top_logprobs": 21, "logprobs": True},
            "top_logprobs: must be a whole numb",
            "top_logprobs",
        ),
    ],
)
def test_what_is_refused_says_why(
    http: httpx.Client, engine: FakeEngine, path: str, change: dict[str, Any], message: str, param: str | None
) -> None:
    body = {**(TEXT if path == "completions" else TALK), **change}
    found = error(http.post(f"/v1/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"}), 400)
    assert found["message"].startswith(message) or message in found["message"]
    assert param is None or found["param"].startswith(param)
    assert engine.requests == []


def test_what_changes_nothing_is_taken(http: httpx.Client, engine: FakeEngine) -> None:
    neutral = {"best_of": 1, "echo": False, "suffix": None, "presence_penalty": 0.0, "logit_bias": {}, "user": "me"}
    nothing = dict.fromkeys(("max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "logprobs"))
    assert http.post("/v1/completions", json={**TEXT, **neutral, **nothing}).status_code == 200
    assert (engine.requests[0].params.temperature, engine.requests[0].params.max_new_tokens) == (1.0, 16)
    talk = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "logprobs": False, "store": False}
    assert http.post("/v1/chat/completions", json={**TALK, **talk}).status_code == 200


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b"5", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b'{"model": "\\ud800"}'],
)
@pytest.mark.parametrize("path", ["completions", "chat/completions", "classify", "embeddings"])
def test_malformed_bodies(http: httpx.Client, path: str, content: bytes) -> None:
    answer = http.post(f"/v1/{path}", content=content, headers={"Content-Type": "application/json; charset=utf-8"})
    assert error(answer, 400)["message"].startswith("the body is no")


def test_cut_and_mangled_bodies_never_break_anything(http: httpx.Client, engine: FakeEngine) -> None:
    """Every prefix of a good body, and the body with each byte replaced: answered, with a status below 500."""
    whole = json.dumps({**TEXT, "stop": ["x"], "temperature": 0.5, "stream_options": {"include_usage": True}}).encode()
    cut = [whole[:n] for n in range(0, len(whole), 3)]
    mangled = [whole[:n] + bytes([b]) + whole[n + 1 :] for n in range(0, len(whole), 4) for b in (0, 34, 91, 255)]
    for content in [*cut, *mangled]:
        answer = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 400, 404), (content, answer.text)
    assert http.get("/health").json() == {"status": "ok"}


def test_classify_refuses(http: httpx.Client) -> None:
    cases = ({}, {"text": "a", "texts": ["b"]}, {"texts": []}, {"texts": ["a"] * 65}, {"text": 5}, {"txt": "a"})
    lines = [error(http.post("/v1/classify", json=body), 400)["message"] for body in cases]
    assert lines[0] == lines[1] == "give either text or texts"
    assert lines[2] == lines[3] == "texts: must be a list of 1 to 64 texts" and lines[4] == "text: must be a text"
    assert lines[5].startswith("unknown field 'txt': did you mean text? ")


def test_paths_and_methods_that_are_not_there(http: httpx.Client) -> None:
    assert error(http.get("/v2"), 404)["message"] == "GET /v2: there is nothing at this path"
    assert error(http.get("/v1/completions"), 405)["message"] == "GET /v1/completions: method not allowed"
    for path in ("/redoc", "/page.html", "/../cli.py", "/%2e%2e/cli.py"):
        error(http.get(path), 404)


def test_a_body_must_say_that_it_is_json(http: httpx.Client) -> None:
    """A form of another site's page could not."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = http.post("/v1/completions", content=json.dumps(TEXT), headers={"Content-Type": kind})
        assert error(answer, 415)["message"].startswith("send the body as JSON")


def test_a_body_that_is_too_large(http: httpx.Client) -> None:
    content = json.dumps({**TEXT, "prompt": "x" * 2**20}).encode()

    def pieces() -> Iterator[bytes]:  # without a Content-Length
        yield from (content[n : n + 65536] for n in range(0, len(content), 65536))

    headers = {"Content-Type": "application/json"}
    for body in (content, pieces()):
        found = error(http.post("/v1/completions", content=body, headers=headers), 413)
        assert found["message"] == "the body is too large: at most 1048576 bytes"


def test_a_body_that_does_not_come(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_TIMEOUT", 0.2)
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as line:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        line.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert line.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_packed_body_is_never_unpacked(http: httpx.Client, engine: FakeEngine) -> None:
    """So a small one cannot become a large one."""
    content = gzip.compress(json.dumps(TEXT).encode())
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    assert error(http.post("/v1/completions", content=content, headers=headers), 400)["message"].startswith(
        "the body is"
    )
    assert engine.requests == []


HEAD = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
CHUNKS = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("sent", "starts"),
    [
        (CHUNKS + b"nothing of a length\r\n", b"HTTP/1.1 400"),
        (CHUNKS + b'1\r\n{\r\n1\r\n"no', b"HTTP/1.1 400"),
        (CHUNKS.replace(b"127.0.0.1", b"evil.example") + b"nothing of a length\r\n", b"HTTP/1.1 40"),
        (f"{HEAD}Content-Length: 2\r\n\r\n{{}}and more".encode(), b"HTTP/1.1 400"),
        (f"{HEAD}Content-Length: -1\r\n\r\n".encode(), b"HTTP/1.1 400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"HTTP/1.1 400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"HTTP/1.1 40"),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 100_000, b"HTTP/1.1 400"),
        (b"GET /\xff HTTP/1.1\r\n\r\n", b"HTTP/1.1 400"),
        (b"\x00" * 50 + b"\r\n\r\n", b"HTTP/1.1 400"),
        (f"{HEAD}Content-Length: 50\r\n\r\n".encode(), b""),
        (b"", b""),
    ],
)
def test_broken_bytes_are_answered_or_hung_up_on(
    url: str, http: httpx.Client, caplog: pytest.LogCaptureFixture, sent: bytes, starts: bytes
) -> None:
    """uvicorn's own way with a request that breaks behind its head was a 400 and a traceback."""
    host, port = url.removeprefix("http://").split(":")
    with caplog.at_level(logging.ERROR), socket.create_connection((host, int(port)), timeout=5) as line:
        line.sendall(sent)
        line.shutdown(socket.SHUT_WR)
        heard = b""
        while more := line.recv(65536):
            heard += more
        assert heard.startswith(starts) and b" 50" not in heard[:15]
        assert http.get("/health").json() == {"status": "ok"}
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_chats_answer_ends_with_its_turn_and_plain_text_with_the_text(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE.replace("</{{ m['role'] }}>", "<|end|>"))
    made, engine = service(tmp_path / "model", control=["<|end|>"])
    with serving(made) as url:
        for path, body in (("chat/completions", TALK), ("completions", TEXT)):
            assert httpx.post(f"{url}/v1/{path}", json=body).status_code == 200
    chat, plain = engine.requests
    assert chat.prompt[-len("<assistant>") - 1] == made.tokenizer.special_tokens["<|end|>"] == 257
    assert chat.params.stop_token_ids == {257, made.tokenizer.eot} and plain.params.stop_token_ids == set()


def test_a_template_that_shows_no_answer_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    alone = "{% if messages|length > 1 %}{{ raise_exception('one at a time') }}{% endif %}{{ messages[0].content }}"
    (tmp_path / "model" / "chat_template.jinja").write_text(alone)
    made, engine = service(tmp_path / "model")
    with serving(made) as url:
        found = error(httpx.post(f"{url}/v1/chat/completions", json=TALK), 400)
    assert "rejects these messages (one at a time): send text to /v1/completions" in found["message"]
    assert not engine.requests


def test_a_model_without_a_chat_template_says_what_to_do(tmp_path: Path) -> None:
    made, _ = service(tmp_path / "plain")
    with serving(made) as url:
        found = error(httpx.post(f"{url}/v1/chat/completions", json=TALK), 400)
    assert found["message"] == "base has no chat template: send text to /v1/completions"


def test_a_mistake_of_ours_is_a_500_and_the_server_goes_on(
    http: httpx.Client, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.refuse = RuntimeError("a bug")
    with caplog.at_level(logging.ERROR):
        found = error(http.post("/v1/completions", json=TEXT), 500)
        assert found["message"] == "the server failed at this request"
        assert eventually(lambda: "a bug" in caplog.text)  # the answer is sent first
    engine.refuse = None
    assert http.post("/v1/completions", json=TEXT).status_code == 200


# Who is let in --------------------------------------------------------------------------------------------------------


def test_the_key(made: tuple[Service, FakeEngine], engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), serving(made[0], api_key="s3cret-key") as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret-key"}):
            for answer in (
                httpx.post(f"{url}/tokenize", json={"prompt": "a"}, headers=headers),
                httpx.post(f"{url}/detokenize", json={"tokens": [1]}, headers=headers),
                httpx.post(f"{url}/v1/completions", json=TEXT, headers=headers),
                httpx.get(f"{url}/v1/models", headers=headers),
            ):
                found = error(answer, 401)
                assert found["code"] == "invalid_api_key" and answer.headers["www-authenticate"] == "Bearer"
                assert "s3cret" not in answer.text
        assert engine.requests == []
        with openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret-key", max_retries=0) as client:
            assert client.completions.create(model="base", prompt="a").choices[0].text == "fine film"
        assert httpx.get(f"{url}/health").status_code == httpx.get(url).status_code == 200
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError, match="the key is wrong"),
        ):
            client.models.list()
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore", "openai"))]
    assert not any("s3cret" in record.getMessage() for record in ours)


def test_the_key_stands_in_no_answer(made: tuple[Service, FakeEngine], engine: FakeEngine) -> None:
    right = {"Authorization": "Bearer s3cret-key"}
    with serving(made[0], api_key="s3cret-key") as url, httpx.Client(base_url=url) as http:
        for headers in ({}, right, {**right, "Origin": "http://evil.example"}):
            for path in ("/", "/page.js", "/page.css", "/health", "/v1/models", "/v1/models/none", "/v1/stats", "/no"):
                answer = http.get(path, headers=headers)
                assert "s3cret" not in answer.text and "s3cret" not in str(answer.headers)
            for path in ("completions", "chat/completions", "classify"):
                assert "s3cret" not in http.post(f"/v1/{path}", json={**TEXT, "s": 1}, headers=headers).text


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the rate limit reads; it begins 20 seconds into a minute."""
    clock = [6_000_020.0]
    fake = SimpleNamespace(time=lambda: clock[0])
    for module in (middleware, limits.strategies, limits.storage.memory):
        monkeypatch.setattr(module, "time", fake)
    return clock


def test_the_rate(made: tuple[Service, FakeEngine], engine: FakeEngine, now: list[float]) -> None:
    with serving(made[0], rate_limit=3, api_key="k") as url:
        statuses = [httpx.post(f"{url}/v1/completions", json=TEXT).status_code for _ in range(3)]
        answer = httpx.post(f"{url}/v1/completions", json=TEXT, headers={"Authorization": "Bearer k"})
        assert statuses == [401] * 3 and answer.headers["retry-after"] == "40"
        assert error(answer, 429)["code"] == "rate_limit_exceeded"
        forged = {"X-Forwarded-For": "10.1.1.1"}
        assert httpx.get(f"{url}/v1/models", headers=forged).status_code == 429
        assert httpx.get(f"{url}/health").status_code == 200
        now[0] += 61
        assert httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200


def test_the_window_of_the_rate_slides_and_clients_are_forgotten(now: list[float]) -> None:
    limiter, admitted = RateLimiter(60), list[float]()
    assert [limiter.hit("a") for _ in range(60)] == [0] * 60 and limiter.hit("a") == 40 and limiter.hit("b") == 0
    now[0] += 120
    for _ in range(1200):  # four requests a second for five minutes: one a second is admitted
        if (wait := limiter.hit("a")) == 0:
            admitted.append(now[0])
        assert 0 <= wait <= 60
        now[0] += 0.25
    minutes = [sum(60 * n <= time - admitted[0] < 60 * (n + 1) for time in admitted) for n in range(5)]
    assert 60 <= minutes[0] <= 90 and minutes[1:] == [60] * 4, minutes  # two counters approximate the first minute
    small = RateLimiter(1)
    assert small.hit("2001:db8::1") == 0 and small.hit("2001:db8::2") > 0 and small.hit("2001:db8:0:1::2") == 0
    now[0] += 1000
    assert small.hit("2001:db8::1") == 0


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "", "[::2]"])
def test_another_sites_name_is_refused(http: httpx.Client, host: str) -> None:
    for path in ("/", "/health", "/v1/models"):
        assert error(http.get(path, headers={"Host": host}), 403)["code"] == "host_not_allowed"


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost", "http://["]
)
def test_another_sites_page_is_refused(http: httpx.Client, engine: FakeEngine, origin: str) -> None:
    answer = http.post("/v1/completions", json=TEXT, headers={"Origin": origin})
    assert error(answer, 403)["code"] == "origin_not_allowed" and engine.requests == []
    assert "access-control-allow-origin" not in answer.headers


def test_our_own_page_and_names_are_let_in(http: httpx.Client, url: str) -> None:
    port = url.rpartition(":")[2]
    assert http.post("/v1/completions", json=TEXT, headers={"Origin": url}).status_code == 200
    for host in ("localhost", f"localhost:{port}", f"LOCALHOST:{port}", "127.0.0.1:9", "[::1]:5", "me.localhost"):
        assert http.get("/health", headers={"Host": host}).status_code == 200, host


def test_which_names_an_open_server_has() -> None:
    everywhere = TrustedHosts("0.0.0.0", ("My.Machine",))
    for host in ("192.168.1.5:8000", "my.machine:8000", "localhost", "[2001:db8::1]:80"):
        everywhere.check(host, None)
    with pytest.raises(APIError, match=r"this server is not called 'evil.example': add it with graft serve --allow"):
        everywhere.check("evil.example", None)
    with pytest.raises(APIError):
        TrustedHosts("127.0.0.1").check("192.168.1.5", None)
    assert is_loopback("127.8.8.8") and is_loopback("::1") and not is_loopback("0.0.0.0")
    assert not is_loopback("localhost.evil.example")


def test_every_answer_has_the_headers_that_hold_a_browser_back(http: httpx.Client) -> None:
    for path, status in (("/", 200), ("/v1/models", 200), ("/nothing", 404), ("/page.js", 200)):
        answer = http.get(path)
        assert answer.status_code == status and answer.headers["x-content-type-options"] == "nosniff"
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ") and "unsafe" not in policy
        assert "server" not in answer.headers
    assert http.get("/", headers={"Host": "evil.example"}).headers["x-content-type-options"] == "nosniff"


# Many at once ---------------------------------------------------------------------------------------------------------


def test_sixty_four_clients_at_once(url: str, engine: FakeEngine) -> None:
    engine.pause = 0.001

    async def work() -> list[int]:
        limit = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=url, limits=limit, timeout=30) as client:

            async def one(number: int) -> list[int]:
                model = ("base", "one", "two")[number % 3]
                body = {**TEXT, "model": model, "stream": number % 2 == 0}
                return [(await client.post("/v1/completions", json=body)).status_code for _ in range(5)]

            return [status for found in await asyncio.gather(*map(one, range(64))) for status in found]

    assert asyncio.run(work()) == [200] * 320


# The page of the routes -----------------------------------------------------------------------------------------------


def test_docs_list_every_route_and_fetch_nothing_from_elsewhere(http: httpx.Client) -> None:
    page, document = http.get("/docs"), http.get("/openapi.json").json()
    assert page.headers["content-type"].startswith("text/html") and "<script" not in page.text
    links = re.findall(r'(?:href|src)="([^"]*)"', page.text)
    assert {link for link in links if not link.startswith("#")} == {"data:,", "page.css", "openapi.json"}
    source = Path(graftlm.serving.app.__file__).read_text()
    served = set(re.findall(r'@app\.(get|post)\("([^"]+)"', source)) | {("get", "/metrics")}
    listed = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert listed == {(method, path.replace("{name:path}", "{name}")) for method, path in served}
    for path in document["paths"]:
        assert f'id="{path}"' in page.text
    references = re.findall(r'"\$ref": "#/components/schemas/(\w+)"', json.dumps(document))
    assert {*references} <= document["components"]["schemas"].keys() and "ChatBody" in references
    for field in ("response_format", "tool_choice", "logit_bias"):
        assert field in page.text and field in document["components"]["schemas"]["ChatBody"]["properties"]


def test_the_examples_of_the_docs_work(http: httpx.Client, engine: FakeEngine) -> None:
    for route in ROUTES:
        body = {**(route.example or {}), **({"model": "base"} if "model" in (route.example or {}) else {})}
        path = route.path.replace("{name}", "base")
        answer = http.get(path) if route.body is None else http.post(path, json=body)
        assert answer.status_code == 200, (route, answer.text)


# Prometheus -----------------------------------------------------------------------------------------------------------


def test_metrics_count_requests_tokens_and_times(made: tuple[Service, FakeEngine], engine: FakeEngine) -> None:
    engine.pause = 0.01
    with serving(made[0]) as url, httpx.Client(base_url=url) as http:
        for stream in (False, True):
            assert http.post("/v1/completions", json={**TEXT, "stream": stream}).status_code == 200
        for path in ("/v1/models/one", "/v1/models/two", "/no/such", "/nor/this", "/health", "/"):
            http.get(path)
        http.post("/v1/completions", json={})
        answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if line[0] != "#")
    found = {name: float(value) for name, value in lines.items() if "_created" not in name}
    counted = {
        ("/v1/completions", 200): 2, ("/v1/completions", 400): 1, ("/v1/models/{name:path}", 200): 2,
        ("other", 404): 2, ("/health", 200): 1, ("/", 200): 1,
    }  # fmt: skip
    for (route, status), count in counted.items():
        assert found[f'graft:http_requests_total{{route="{route}",status="{status}"}}'] == count
    assert (found["graft:generation_tokens_total"], found["graft:prompt_tokens_total"]) == (18, 12)
    assert found["graft:time_to_first_token_seconds_count"] == found["graft:tokens_per_second_count"] == 2
    assert 0.02 <= found["graft:time_to_first_token_seconds_sum"] < 2
    assert 0 < found["graft:tokens_per_second_sum"] < 2 * 100
    assert found["graft:num_requests_running"] == found["graft:num_requests_waiting"] == 0


def test_metrics_need_the_key_too(made: tuple[Service, FakeEngine]) -> None:
    with serving(made[0], api_key="k") as url:
        assert error(httpx.get(f"{url}/metrics"), 401)["code"] == "invalid_api_key"
        answer = httpx.get(f"{url}/metrics", headers={"Authorization": "Bearer k"})
    assert 'graft:http_requests_total{route="/metrics",status="401"} 1.0' in answer.text
