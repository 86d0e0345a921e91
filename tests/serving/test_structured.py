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
from graftlm.serving.app import ServedModel, Service
from graftlm.text.template import load_template
from graftlm.text.tokenizer import Tokenizer
from serving.fakes import serving
from tiny import byte_tokenizer, model_of

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
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
