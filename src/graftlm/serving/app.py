"""The routes: OpenAI's completions and chat completions, our own classification, and the page.

    GET  /                       the page, with page.css and page.js
    GET  /health                 whether the server is running
    GET  /v1/models              the base and its adapters; /v1/models/NAME is one of them
    GET  /v1/stats               counters of the engine
    POST /v1/completions         continue prompts
    POST /v1/chat/completions    answer messages, in the model's own chat template
    POST /v1/classify            label probabilities of texts, from the base and its adapters

The base and all its adapters are models of one engine, so requests to different ones are decoded in one batch.
Tokenisation runs off the event loop: a long prompt does not block other requests.
"""

import asyncio
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi import Request as HTTPRequest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from graftlm.errors import GraftError, InputError, did_you_mean
from graftlm.inference.engine import Engine
from graftlm.inference.requests import Request
from graftlm.serving.middleware import SecurityMiddleware, error_response, read_body
from graftlm.serving.responses import (
    ParsedRequest,
    cancel_on_disconnect,
    choices,
    complete_response,
    future_result,
    stream_response,
    to_http_error,
)
from graftlm.serving.schemas import MAX_CHOICES, APIError, ChatBody, ClassifyBody, CompletionBody, Sampling, parse_body
from graftlm.text.chat import Chat
from graftlm.text.collate import encode_rows, label_ids
from graftlm.text.layouts import Labelled
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
"""Of a completion whose request does not set max_tokens, as in OpenAI's API."""
CLASSIFY_CONCURRENCY = 64
"""Prompts of one classification that are submitted to the engine at the same time."""

PAGE = {
    "/": (("page.html",), "text/html"),
    "/page.css": (("report_base.css", "page.css"), "text/css"),
    "/page.js": (("report_parts.js", "page.js"), "text/javascript"),
}
"""Path -> files to concatenate, and their media type. The report_* files belong to `graft report`."""


@dataclass(frozen=True)
class ServedModel:
    """A model that requests can name: the base, or one of its adapters."""

    name: str
    adapter: str | None
    """Its name in the engine; None for the base."""
    template: Template
    """The prompt of a classification."""
    max_seq_len: int


@dataclass(frozen=True)
class Service:
    """What the routes need."""

    engine: Engine
    tokenizer: Tokenizer
    models: Mapping[str, ServedModel]
    """By name; the base is the first."""
    vocab: int
    max_tokens: int

    @property
    def base(self) -> ServedModel:
        """The model without an adapter."""
        return next(iter(self.models.values()))

    def model(self, name: str) -> ServedModel:
        """A model by its name. Raises APIError with status 404."""
        if name not in self.models:
            hint = did_you_mean(name[:100], self.models)
            message = f"there is no model {name[:100]!r}: {hint}GET /v1/models lists them"
            raise APIError(404, message, param="model", code="model_not_found")
        return self.models[name]


def make_app(
    service: Service, *, host: str, allowed_hosts: tuple[str, ...] = (), api_key: str = "", rate_limit: int = 0
) -> FastAPI:
    """The application. See `middleware.SecurityMiddleware` for the keyword arguments."""
    app = FastAPI(title="graft serve", openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(
        SecurityMiddleware, host=host, allowed_hosts=allowed_hosts, api_key=api_key, rate_limit=rate_limit
    )
    app.add_exception_handler(GraftError, _on_graft_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(500, _on_internal_error)
    _add_page(app)
    _add_models(app, service)
    _add_inference(app, service)
    return app


async def _on_graft_error(http: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, GraftError)
    return error_response(to_http_error(error))


async def _on_http_error(http: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = "there is nothing at this path" if error.status_code == 404 else str(error.detail).lower()
    response = error_response(APIError(error.status_code, f"{http.method[:20]} {http.url.path[:100]}: {problem}"))
    response.headers.update(error.headers or {})
    return response


async def _on_internal_error(http: HTTPRequest, error: Exception) -> Response:
    """A bug: this request fails, its traceback is logged, and the server continues."""
    return error_response(APIError(500, "the server failed at this request"))


# The page and the models ----------------------------------------------------------------------------------------------


def _add_page(app: FastAPI) -> None:
    def add(path: str, content: str, media_type: str) -> None:
        app.add_api_route(path, lambda: Response(content, media_type=media_type), methods=["GET"])

    for path, (names, media_type) in PAGE.items():
        add(path, "".join(_page_file(name) for name in names), media_type)


def _page_file(name: str) -> str:
    package = "graftlm.studies" if name.startswith("report") else "graftlm.serving"
    return (files(package) / name).read_text(encoding="utf-8")


def _add_models(app: FastAPI, service: Service) -> None:
    created = int(time.time())

    def describe(model: ServedModel) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": created,
            "owned_by": "graftlm",
            "parent": None if model.adapter is None else service.base.name,
            "labels": list(model.template.labels),
            "context": model.max_seq_len,
        }

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(model) for model in service.models.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return describe(service.model(name))

    @app.get("/v1/stats")
    async def stats() -> dict[str, Any]:
        return service.engine.stats()


# Completions and chats ------------------------------------------------------------------------------------------------


def _body(schema: type[BaseModel]) -> Callable[[HTTPRequest], Any]:
    """A route's body as a dependency. FastAPI's own parsing would bound neither its size nor its depth."""

    async def body(http: HTTPRequest) -> Any:
        return parse_body(schema, await read_body(http))

    return body


def _add_inference(app: FastAPI, service: Service) -> None:
    engine, tokenizer = service.engine, service.tokenizer
    chat = Chat(tokenizer, "send text to /v1/completions") if tokenizer.chat_template is not None else None

    async def respond(http: HTTPRequest, body: Sampling, parse: Callable[[], ParsedRequest]) -> Response:
        parsed = await asyncio.to_thread(parse)
        if body.stream:
            return stream_response(engine, tokenizer, parsed)
        return JSONResponse(await complete_response(engine, tokenizer, parsed, http))

    @app.post("/v1/completions")
    async def completions(http: HTTPRequest, body: Annotated[Any, Depends(_body(CompletionBody))]) -> Response:
        return await respond(http, body, lambda: _parse_completion(service, body))

    @app.post("/v1/chat/completions")
    async def chats(http: HTTPRequest, body: Annotated[Any, Depends(_body(ChatBody))]) -> Response:
        return await respond(http, body, lambda: _parse_chat(service, chat, body))

    @app.post("/v1/classify")
    async def classify(http: HTTPRequest, body: Annotated[Any, Depends(_body(ClassifyBody))]) -> Response:
        return JSONResponse(await cancel_on_disconnect(http, _classify(service, body)))


@dataclass(frozen=True)
class _Prompts:
    """The prompts of a body, and what differs between completions and chats."""

    model: ServedModel
    field: str
    """The field they came from, for errors."""
    tokens: Sequence[Sequence[int]]
    max_tokens: int | None
    """What the body sets."""
    default_max_tokens: int | None
    """Where it sets nothing; None for as many as fit."""
    logprobs: bool
    stop_tokens: Collection[int] | None = None
    """Tokens that end the model's turn in a chat; None for a completion."""


def _parse_completion(service: Service, body: CompletionBody) -> ParsedRequest:
    model, logprobs = service.model(body.model), body.logprobs is not None
    tokens = _prompt_tokens(service, body.prompt)
    return _parse(service, body, _Prompts(model, "prompt", tokens, body.max_tokens, DEFAULT_MAX_TOKENS, logprobs))


def _prompt_tokens(service: Service, prompt: Any) -> list[list[int]]:
    """The tokens of each prompt: of a text, of texts, of token ids, or of lists of them."""
    multiple = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))
    prompts: list[Any] = prompt if multiple else [prompt]
    texts = [each for each in prompts if isinstance(each, str)]
    tokens = service.tokenizer.encode_prompts(texts) if texts else prompts
    if not tokens or not all(tokens):
        raise APIError(400, "prompt: is empty: give at least one token to continue", param="prompt")
    if not texts and (largest := max(map(max, tokens))) >= service.vocab:
        raise APIError(400, f"prompt: {largest} is not a token: the model has {service.vocab}", param="prompt")
    return tokens


def _parse_chat(service: Service, chat: Chat | None, body: ChatBody) -> ParsedRequest:
    model = service.model(body.model)
    if chat is None:
        message = f"{service.base.name} has no chat template: send text to /v1/completions"
        raise APIError(400, message, param="messages", code="no_chat_template")
    roles = {"developer": "system"}  # OpenAI's name for it in newer models
    messages = [(roles.get(message.role, message.role), message.text_content) for message in body.messages]
    try:
        prompt, stop_tokens = chat.encode(messages), chat.stop_tokens
    except InputError as error:
        raise APIError(400, f"messages: {error}", param="messages") from None
    max_tokens = min(filter(None, (body.max_tokens, body.max_completion_tokens)), default=None)
    logprobs = bool(body.logprobs)
    return _parse(service, body, _Prompts(model, "messages", [prompt], max_tokens, None, logprobs, stop_tokens))


def _parse(service: Service, body: Sampling, prompts: _Prompts) -> ParsedRequest:
    model, n, limit = prompts.model, body.n or 1, prompts.max_tokens
    if len(prompts.tokens) * n > MAX_CHOICES:
        message = f"n: {len(prompts.tokens)} prompts times {n}: at most {MAX_CHOICES} answers a request"
        raise APIError(400, message, param="n")
    if limit is not None and limit > service.max_tokens:
        message = f"max_tokens: at most {service.max_tokens} here (graft serve --max_tokens)"
        raise APIError(400, message, param="max_tokens")
    requests: list[Request] = []
    for prompt in prompts.tokens:
        space = model.max_seq_len - len(prompt)
        if space < (limit or 1):
            raise _too_long(prompts, len(prompt))
        request = Request(
            tuple(prompt),
            body.sampling_params(
                limit or min(prompts.default_max_tokens or service.max_tokens, service.max_tokens, space),
                prompts.stop_tokens,
            ),
            model.adapter,
        )
        requests += choices(request, n)
    chat = prompts.stop_tokens is not None
    return ParsedRequest(tuple(requests), model.name, n, chat, prompts.logprobs, body.wants_usage)


def _too_long(prompts: _Prompts, length: int) -> APIError:
    text = "prompt" if prompts.stop_tokens is None else "conversation"
    message = (
        f"{prompts.field}: {length} tokens and {prompts.max_tokens or 1} new ones, and {prompts.model.name} reads at "
        f"most {prompts.model.max_seq_len}: shorten the {text}{' or lower max_tokens' if prompts.max_tokens else ''}"
    )
    return APIError(400, message, param=prompts.field, code="context_length_exceeded")


# Label probabilities --------------------------------------------------------------------------------------------------


async def _classify(service: Service, body: ClassifyBody) -> dict[str, Any]:
    """For each text and model the probability of each label: a softmax over the labels' scores."""
    models = [service.model(name) for name in dict.fromkeys(body.models or service.models)]
    texts = [body.text] if body.text is not None else list(body.texts or ())
    jobs = await asyncio.to_thread(_classification_prompts, service, models, texts)
    results: list[dict[str, Any]] = [{"index": number, "models": {}} for number in range(len(texts))]
    for start in range(0, len(jobs), CLASSIFY_CONCURRENCY):
        batch = jobs[start : start + CLASSIFY_CONCURRENCY]
        scores = await asyncio.gather(*(_score(service, job.model, job.prompt) for job in batch))
        for job, labels in zip(batch, scores, strict=True):
            results[job.text]["models"][job.model.name] = {
                **_softmax(job.model.template, labels),
                "truncated": job.truncated,
            }
    return {"object": "classification", "results": results}


@dataclass(frozen=True)
class _Classification:
    """One text for one model."""

    text: int
    model: ServedModel
    prompt: Sequence[int]
    truncated: bool
    """Whether the text lost its end to fit."""


def _classification_prompts(
    service: Service, models: Sequence[ServedModel], texts: Sequence[str]
) -> list[_Classification]:
    jobs = []
    for number, text in enumerate(texts):
        for model in models:
            records = [Labelled(text, 0, source="text")]
            examples, truncated = encode_rows(records, model.template, service.tokenizer, model.max_seq_len)
            jobs.append(_Classification(number, model, examples[0].prompt_ids, bool(truncated)))
    return jobs


async def _score(service: Service, model: ServedModel, prompt: Sequence[int]) -> list[float]:
    labels = label_ids(model.template, service.tokenizer)
    return await future_result(service.engine.score(prompt, labels, model.adapter))


def _softmax(template: Template, scores: Sequence[float]) -> dict[str, Any]:
    """The most likely label and all probabilities. Raises GraftError if a score is NaN or infinite."""
    if not all(map(math.isfinite, scores)):
        raise GraftError("the labels' scores are NaN: the weights are broken, or overflow in this --dtype; try float32")
    weights = [math.exp(score - max(scores)) for score in scores]
    probabilities = dict(zip(template.labels, (weight / sum(weights) for weight in weights), strict=True))
    return {"label": max(probabilities, key=probabilities.__getitem__), "probabilities": probabilities}
