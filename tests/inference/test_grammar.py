"""Answers that follow a JSON schema: whatever the model would rather say, with every tokenizer, beside other rows."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from graftlm.errors import InputError
from graftlm.exchange.load import ModelBundle
from graftlm.inference.engine import Engine
from graftlm.inference.grammar import Grammars, constrain
from graftlm.inference.requests import Completion, Request
from graftlm.inference.sampling import SamplingParams
from graftlm.text.tokenizer import Tokenizer
from tiny import PIECES, byte_tokenizer, model_of, piece_tokenizer

FILM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 12},
        "stars": {"type": "integer", "minimum": 0, "maximum": 5},
        "tags": {"type": "array", "items": {"enum": ["fun", "dull", "é🙂"]}, "maxItems": 3},
        "seen": {"type": ["boolean", "null"]},
    },
    "required": ["title", "stars", "seen"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    FILM,
    {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 4, "$defs": {"n": {"type": "integer", "maximum": 9}}},
    {"anyOf": [{"const": "yes"}, {"const": {"no": 1}}]},
    {"type": "string", "pattern": "^[a-f]{2,8}$"},
    {"type": "integer", "minimum": -20, "maximum": 20, "multipleOf": 5},
]


def bundle(folder: Path, tokenizer: str) -> ModelBundle:
    """A tiny random model whose texts have room for a whole object."""
    if tokenizer == "bytes":
        vocab = byte_tokenizer(folder, "<|end|>")
    else:
        vocab = piece_tokenizer(folder, tokenizer, ['a film, {"title": "fun", "stars": 5}'], "<|end|>")
    model = model_of("llama", dtype=torch.float32, vocab=vocab + 3, context=400)  # models embed more ids
    return ModelBundle(model.eval(), Tokenizer.from_folder(folder), str(folder), folder, "")


@pytest.fixture(scope="module", params=["bytes", *PIECES])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return bundle(tmp_path_factory.mktemp("grammar"), request.param)


@pytest.fixture(scope="module")
def engine(loaded: ModelBundle) -> Iterator[Engine]:
    engine = Engine(loaded, {}, max_rows=16)
    yield engine
    engine.close()


def answers(engine: Engine, requests: list[Request]) -> list[Completion]:
    return [handle.done.result(60) for handle in [engine.submit(request) for request in requests]]


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "repetition_penalty": 1.2, "presence_penalty": 1.0},
    {"temperature": 2.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
]


def test_what_ends_by_itself_always_matches_the_schema(loaded: ModelBundle, engine: Engine) -> None:
    """Over seeds and settings; rows without a grammar in the same batch say what they say alone."""
    ids, grammars = loaded.tokenizer.encode_prompt("a film"), Grammars(loaded.tokenizer)
    free = [Request(ids, SamplingParams(temperature=1.0, max_new_tokens=20, seed=seed)) for seed in range(4)]
    alone = [answers(engine, [request])[0] for request in free]
    asked: list[tuple[dict[str, Any], Request]] = []
    for schema in SCHEMAS:
        grammar = grammars.json_schema(schema)
        for seed in range(4):
            for settings in SETTINGS:
                params = SamplingParams(max_new_tokens=300, seed=seed, **settings)
                asked.append((schema, Request(ids, params, grammar=grammar)))
    found = answers(engine, [*free, *(request for _, request in asked)])
    assert [each.tokens for each in found[:4]] == [each.tokens for each in alone]
    texts = [set() for _ in SCHEMAS]
    for (schema, _), answer in zip(asked, found[4:], strict=True):
        assert answer.finish_reason == "stop", answer.text
        jsonschema.validate(json.loads(answer.text), schema)
        assert not {*answer.tokens} & loaded.tokenizer.special_ids
        texts[SCHEMAS.index(schema)].add(answer.text)
    assert min(map(len, texts)) > 1  # the model still decides what it says


def test_logprobs_are_the_models_own(loaded: ModelBundle, engine: Engine) -> None:
    ids = loaded.tokenizer.encode_prompt("a film")
    grammar = Grammars(loaded.tokenizer).json_schema({"const": True})
    (answer,) = answers(engine, [Request(ids, SamplingParams(temperature=0, max_new_tokens=9), grammar=grammar)])
    assert answer.text == "true"
    with torch.no_grad():
        logits = loaded.model(torch.tensor([[*ids, *answer.tokens]]))[0]
    rows = logits.log_softmax(-1)[len(ids) - 1 : -1]
    expected = [row[token].item() for row, token in zip(rows, answer.tokens, strict=True)]
    found = [each.logprob for each in answer.logprobs]
    assert found == pytest.approx(expected, abs=1e-4) and max(expected) < -1


def test_an_answer_may_end_where_it_may_and_at_a_token_of_its_own(tmp_path: Path) -> None:
    """After 5 another digit may follow, or one of the tokens that end this request."""
    loaded = bundle(tmp_path, "bytes")
    tokenizer, end = loaded.tokenizer, loaded.tokenizer.special_tokens["<|end|>"]
    state = Grammars(tokenizer).json_schema({"type": "integer"}).start(frozenset({end}))
    digits = {tokenizer.encode(digit)[0] for digit in "0123456789"}
    assert {*state.allowed(300).nonzero()[:, 0].tolist()} == digits | {tokenizer.encode("-")[0]}
    state.accept(tokenizer.encode("5")[0])
    assert {*state.allowed(300).nonzero()[:, 0].tolist()} == digits | {tokenizer.eot, end} and not state.complete
    logits = torch.zeros(2, 300)
    assert constrain(logits, [None, None]) is logits
    kept = constrain(logits, [state, None])
    assert (kept[1] == 0).all() and {*(kept[0] == 0).nonzero()[:, 0].tolist()} == digits | {tokenizer.eot, end}


def test_one_that_is_cut_says_so_and_an_endless_one_fails_alone(tmp_path: Path) -> None:
    loaded = bundle(tmp_path, "bytes")
    engine, grammars = Engine(loaded, {}), Grammars(loaded.tokenizer)
    ids, params = loaded.tokenizer.encode("a film"), SamplingParams(temperature=0, max_new_tokens=4)
    endless = engine.submit(Request(ids, params, grammar=grammars.json_schema({"$ref": "#"})))
    cut, free = (
        engine.submit(Request(ids, params, grammar=grammars.json_schema(FILM))),
        engine.submit(Request(ids, params)),
    )
    with pytest.raises(InputError, match="no finite text: change the JSON schema"):
        endless.done.result(60)
    assert cut.done.result(60).finish_reason == "length" and cut.done.result(60).text.startswith("{")
    assert free.done.result(60).finish_reason in ("length", "stop")
    engine.close()


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "nonsense"}, "nonsense"),
        ({"not": {"type": "string"}}, "Unimplemented keys"),
        ({"not": {"type": "string"}, "x-guidance": {"lenient": True}}, "Unimplemented keys"),
        ({"type": "string", "pattern": "(a"}, "unclosed group"),
        ({"items": [{"const": -(2**63)}]}, r"const: -9223372036854775808 is not within -2\^53 to 2\^53"),  # it crashed
        ({"enum": [10**20]}, "enum: 100000000000000000000 is not within"),
        ({"type": "integer", "multipleOf": 99991}, "multipleOf: 99991 is not supported"),  # it took six seconds
        ({"type": "number", "multipleOf": 3.14159}, "multipleOf: 3.14159 is not supported"),
        ({"$ref": "http://example.com/schema.json"}, "does not fetch"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable"),
    ],
)
def test_a_schema_that_cannot_be_kept_is_refused_in_a_line(tmp_path: Path, schema: Any, message: str) -> None:
    byte_tokenizer(tmp_path)
    with pytest.raises(InputError, match=message) as refused:
        Grammars(Tokenizer.from_folder(tmp_path)).json_schema(schema)
    assert "\n" not in str(refused.value) and len(str(refused.value)) <= 200
