"""GET /openapi.json and GET /docs: the API's routes, their fields, and an example of each.

FastAPI's own page fetches its scripts from another site, and its schema has no bodies, which `schemas.py` parses.
"""

import json
from importlib.resources import files
from typing import Any, NamedTuple

import jinja2
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from graftlm.serving.schemas import (
    ChatBody,
    ClassifyBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    TokenizeBody,
)

REFERENCE = "#/components/schemas/{model}"
MODEL = "MODEL"
"""In the examples, in place of a model's name."""


class Route(NamedTuple):
    """A route of the API; example: a body for it."""

    method: str
    path: str
    summary: str
    body: type[BaseModel] | None = None
    example: dict[str, Any] | None = None


HELLO = [{"role": "user", "content": "What is the capital of France?"}]
ROUTES = (
    Route("post", "/v1/chat/completions", "Answer messages", ChatBody, {"model": MODEL, "messages": HELLO}),
    Route("post", "/v1/completions", "Continue texts", CompletionBody, {"model": MODEL, "prompt": "The film was"}),
    Route("post", "/v1/embeddings", "Embed texts", EmbeddingBody, {"model": MODEL, "input": "a joy"}),
    Route("post", "/v1/classify", "Label probabilities of texts", ClassifyBody, {"text": "a joy"}),
    Route("get", "/v1/models", "The base and its adapters"),
    Route("get", "/v1/models/{name}", "One of them"),
    Route("get", "/v1/stats", "Counters of the engine"),
    Route("post", "/tokenize", "The tokens of a text", TokenizeBody, {"model": MODEL, "prompt": "a joy"}),
    Route("post", "/detokenize", "The text of tokens", DetokenizeBody, {"model": MODEL, "tokens": [5, 6]}),
    Route("get", "/metrics", "Counters and histograms for Prometheus"),
    Route("get", "/health", "Whether the server is running"),
)


def openapi() -> dict[str, Any]:
    """The API as an OpenAPI 3.1 document."""
    bodies: Any = [(route.body, "validation") for route in ROUTES if route.body is not None]
    references, definitions = models_json_schema(bodies, ref_template=REFERENCE)
    paths: dict[str, Any] = {}
    for route in ROUTES:
        operation: dict[str, Any] = {"summary": route.summary, "responses": {"200": {"description": "The answer"}}}
        if route.body is not None:
            content = {"schema": references[route.body, "validation"], "example": route.example}
            operation["requestBody"] = {"required": True, "content": {"application/json": content}}
        if "{name}" in route.path:
            operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths[route.path] = {route.method: operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "graft serve", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],  # a server may have no key
    }


def page() -> str:
    """The routes as a page."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"fields": _fields, "curl": _curl}
    template = (files("graftlm.serving") / "api_docs.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(routes=ROUTES)


def _fields(body: type[BaseModel]) -> list[tuple[str, bool, str]]:
    """Name, whether it is required, and description of each field; required ones first."""
    fields = [(name, f.is_required(), f.description or "") for name, f in body.model_fields.items()]
    return sorted(fields, key=lambda field: not field[1])


def _curl(route: Route) -> str:
    """A command for a shell."""
    address = f"http://127.0.0.1:8000{route.path.replace('{name}', MODEL)}"
    if route.example is None:
        return f"curl {address}"
    body = json.dumps(route.example)
    return f"curl {address} \\\n  -H 'Content-Type: application/json' \\\n  -d '{body}'"
