"""Answers of a given form through OpenAI's client: JSON schemas, on a real engine with a tiny random model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import jsonschema
import openai
import pytest
import torch
from pydantic import BaseModel, Field

from graftlm.exchange.load import ModelBundle
from graftlm.inference.engine import Engine
from graftlm.serving.service import ServedModel, Service
from graftlm.text.template import load_template
from graftlm.text.tokenizer import Tokenizer
from serving.fakes import FakeEngine, serving
from serving.fakes import service as fake_service
from tiny import byte_tokenizer, model_of

TEMPLATE = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}\n</tool_call>{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK: Any = [{"role": "user", "content": "How was the film?"}]


def service_of(folder: Path, template: str) -> Service:
    """A tiny random model that speaks by a chat template, served by a real engine."""
    vocab = byte_tokenizer(folder, "<|end|>")
    (folder / "chat_template.jinja").write_text(template)
    model = model_of("llama", dtype=torch.float32, vocab=vocab, context=1200).eval()
    bundle = ModelBundle(model, Tokenizer.from_folder(folder), str(folder), folder, "")
    engine = Engine(bundle, {}, max_tokens=8 * 1200)
    served = ServedModel("base", None, load_template("Review: {text}\nIs it:"), 1200)
    return Service(engine, bundle.tokenizer, {"base": served}, 400)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    made = service_of(tmp_path_factory.mktemp("model"), TEMPLATE)
    with serving(made) as url:
        yield url
    made.engine.close()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


class Film(BaseModel, extra="forbid"):
    title: str = Field(max_length=10)
    stars: int = Field(ge=0, le=5)
    seen: bool | None


FILM = {"type": "json_schema", "json_schema": {"name": "film", "schema": Film.model_json_schema(), "strict": True}}


def test_a_chat_keeps_to_its_schema_with_any_seed_streamed_or_not(client: openai.OpenAI) -> None:
    asked: Any = {"model": "base", "messages": TALK, "response_format": FILM, "n": 3, "seed": 5}
    found = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in found.choices]
    assert [choice.finish_reason for choice in found.choices] == ["stop"] * 3 and len({*texts}) == 3
    for text in texts:
        Film.model_validate_json(text)
    streamed = ["", "", ""]
    for part in client.chat.completions.create(**asked, stream=True):
        for choice in part.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_the_clients_own_way_to_ask_for_a_class(client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(model="base", messages=TALK, response_format=Film, seed=1)
    assert isinstance(found.choices[0].message.parsed, Film)


def test_completions_take_a_schema_too_greedily(client: openai.OpenAI) -> None:
    schema = {"type": "array", "items": {"enum": ["good", "bad"]}, "minItems": 2, "maxItems": 3}
    form = {"type": "json_schema", "json_schema": {"name": "list", "schema": schema}}
    found = client.completions.create(
        model="base", prompt=["a", "b"], max_tokens=100, temperature=0, extra_body={"response_format": form}
    )
    for choice in found.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.text), schema)


def test_any_object_begins_as_one_and_one_that_is_cut_says_so(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_object"}
    found = client.chat.completions.create(model="base", messages=TALK, response_format=form, max_tokens=1)
    assert (found.choices[0].finish_reason, found.choices[0].message.content) == ("length", "{")


@pytest.mark.parametrize(
    ("form", "message", "code"),
    [
        ({"type": "xml"}, 'response_format: must be {"type": "text"}, {"type": "json_object"}, or {', None),
        ({"type": "json_schema"}, "response_format: must be ", None),
        ({"type": "json_object", "json_schema": {"schema": {}}}, "response_format: must be ", None),
        ({"type": "json_schema", "json_schema": {"schema": 5}}, "response_format: must be ", None),
        (
            {"type": "json_schema", "json_schema": {"schema": {"not": {"type": "string"}}}},
            'response_format: Unimplemented keys: ["not"]',
            "invalid_json_schema",
        ),
        ({"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}, "the answer's grammar has no finite", None),
    ],
)
def test_what_cannot_be_kept_is_refused(url: str, form: Any, message: str, code: str | None) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "base", "messages": TALK, "response_format": form})
    assert answer.status_code == 400, answer.text
    found = answer.json()["error"]
    assert found["message"].startswith(message) and found["code"] == code and "\n" not in found["message"]


# Tools ----------------------------------------------------------------------------------------------------------------

WEATHER = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "time", "strict": True}},
]
TOOLS[0]["function"]["parameters"]["additionalProperties"] = False
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
CALLS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_forced_call_is_always_one_of_the_tools(client: openai.OpenAI, choice: Any) -> None:
    asked: Any = {"model": "base", "messages": TALK, "tools": TOOLS, "tool_choice": choice, "n": 4, "seed": 1}
    found = client.chat.completions.create(**asked)
    calls = []
    for each in found.choices:
        assert (each.finish_reason, each.message.content) == ("tool_calls", None)
        (call,) = each.message.tool_calls or ()
        calls.append((call.function.name, json.loads(call.function.arguments)))
    possible = [("weather", {"city": "Oslo"}), ("weather", {"city": "Rome"}), ("time", {})]
    assert all(call in possible[: 2 if choice is NAMED else 3] for call in calls)
    streamed = [[] for _ in calls]
    for part in client.chat.completions.create(**asked, stream=True):
        for each in part.choices:
            assert not each.delta.content and each.finish_reason in (None, "tool_calls")
            streamed[each.index] += [call.function for call in each.delta.tool_calls or ()]
    assert [(one.name, json.loads(one.arguments)) for (one,) in streamed] == calls


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[openai.OpenAI, FakeEngine]]:
    """A client of a server whose model says what a test decides."""
    folder = tmp_path_factory.mktemp("told")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    made, engine = fake_service(folder, room=2000, max_tokens=400, control=["<|end|>"])
    with serving(made) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client, engine


def test_a_call_that_the_model_chooses_and_the_turn_after_it(told: tuple[openai.OpenAI, FakeEngine]) -> None:
    client, engine = told
    engine.reset()
    engine.answer = f"I look.{CALLS}\n{CALLS.replace('Oslo', 'Rome')}"
    asked: Any = {"model": "base", "messages": TALK, "tools": TOOLS}
    choice = client.chat.completions.create(**asked).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    calls = choice.message.tool_calls or []
    assert [call.function.arguments for call in calls] == ['{"city": "Oslo"}', '{"city": "Rome"}']
    assert len({call.id for call in calls}) == 2
    one = client.chat.completions.create(**asked, parallel_tool_calls=False).choices[0].message.tool_calls
    assert len(one or ()) == 1
    parts = [part.choices[0] for part in client.chat.completions.create(**asked, stream=True)]
    assert "".join(part.delta.content or "" for part in parts) == "I look."
    streamed = [call for part in parts for call in part.delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in streamed] == [(0, "weather"), (1, "weather")]
    assert parts[-1].finish_reason == "tool_calls"
    engine.answer = "It rains."
    turns: Any = [*TALK, choice.message, {"role": "tool", "tool_call_id": calls[0].id, "content": "rain"}]
    answer = client.chat.completions.create(model="base", messages=turns, tools=TOOLS, tool_choice="none").choices[0]
    assert (answer.finish_reason, answer.message.content, answer.message.tool_calls) == ("stop", "It rains.", None)
    first, *_, last = (engine.tokenizer.decode(request.prompt) for request in engine.requests)
    assert '<tools>{"type": "function", "function": {"name": "weather", "description": "The weather.", ' in first
    assert f"I look.{CALLS}" in last and last.endswith("<tool>rain<assistant>") and "<tools>" not in last


@pytest.mark.parametrize(
    ("change", "message", "code"),
    [
        ({"tools": [{}]}, 'tools: must be a list of {"type": "function", ', None),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools: must be a list of ", None),
        ({"tool_choice": "required", "tools": []}, "tool_choice: names no function of tools", None),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice: names no function", None),
        ({"tool_choice": "always"}, 'tool_choice: must be "none", "auto", "required" or ', None),
        ({"logprobs": True}, "logprobs: not supported together with tools", None),
        ({"response_format": {"type": "json_object"}}, "response_format: not supported together with tools", None),
        (
            {
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "a", "parameters": {"not": {}}}}],
            },
            'tools: Unimplemented keys: ["not"]',
            "invalid_json_schema",
        ),
        ({"messages": [{"role": "tool", "content": "rain"}]}, "messages: must be a list of messages", None),
        ({"messages": [{"role": "assistant"}]}, "messages: must be a list of messages", None),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "a", "arguments": "["}}]}
                ]
            },
            "messages: must be a list of messages",
            None,
        ),
    ],
)
def test_tools_that_are_refused(url: str, change: dict[str, Any], message: str, code: str | None) -> None:
    body = {"model": "base", "messages": TALK, "tools": TOOLS, **change}
    found = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert found.status_code == 400, found.text
    assert found.json()["error"]["message"].startswith(message) and found.json()["error"]["code"] == code


def test_a_template_without_tools_refuses_them_but_a_call_can_be_forced(tmp_path: Path) -> None:
    plain = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}<assistant>"
    made = service_of(tmp_path, plain)
    with serving(made) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        asked: Any = {"model": "base", "messages": TALK, "tools": TOOLS}
        with pytest.raises(
            openai.BadRequestError, match="does not write tools: force a call by tool_choice"
        ) as refused:
            client.chat.completions.create(**asked)
        assert refused.value.code == "unsupported_tools"
        (call,) = client.chat.completions.create(**asked, tool_choice=NAMED).choices[0].message.tool_calls or ()
        assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
        turns = [*TALK, {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}]
        with pytest.raises(openai.BadRequestError, match="does not write tool_calls"):
            client.chat.completions.create(model="base", messages=turns)
    made.engine.close()
