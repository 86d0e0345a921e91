"""The routes: OpenAI's completions and chats, our own classification, the page.

    GET  /                       the page (page.css and page.js beside it)
    GET  /health                 whether the server is there
    GET  /v1/models              the base and its adapters; /v1/models/NAME is one of them
    GET  /v1/stats               what the engine is doing
    POST /v1/completions         continue prompts
    POST /v1/chat/completions    answer messages, in the model's own chat template
    POST /v1/classify            label probabilities of texts, by the base and its adapters side by side

What is unusual here: the base and all its adapters are models of one engine, so requests for different ones are
decoded in one batch. Tokenising happens off the event loop: a long prompt holds nobody up.
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
from graftlm.serving.answers import ParsedRequest, cancel_on_disconnect, choices, done, stream, to_http_error, whole
from graftlm.serving.limits import SecurityMiddleware, error_response, read_body
from graftlm.serving.schemas import (
    MAX_CHOICES,
    APIError,
    ChatBody,
    ClassifyBody,
    CompletionBody,
    Sampling,
    read,
)
from graftlm.text.chat import Chat
from graftlm.text.collate import encode_rows, label_ids
from graftlm.text.dataset import Record
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer

SHORT = 16
"""Tokens of a completion where the request does not say, as in OpenAI's API."""
CLASSIFY_CONCURRENCY = 64
"""Prompts of one classification that the engine is given together."""

PARTS = {
    "/": (("page.html",), "text/html"),
    "/page.css": (("report_base.css", "page.css"), "text/css"),
    "/page.js": (("report_parts.js", "page.js"), "text/javascript"),
}
"""Path -> files, one behind the other, and what they are; the looks and the small parts are the report's own."""


@dataclass(frozen=True)
class ServedModel:
    """A model that can be asked for: the base, or an adapter of it."""

    name: str
    adapter: str | None
    """The engine's name of it; None for the base."""
    template: Template
    """How it is asked about a review."""
    max_seq_len: int
    """The most tokens that it reads."""


@dataclass(frozen=True)
class Service:
    """Everything that the routes need."""

    engine: Engine
    tokenizer: Tokenizer
    models: Mapping[str, ServedModel]
    """By name; the base comes first."""
    vocab: int
    max_tokens: int

    @property
    def base(self) -> ServedModel:
        """The model without an adapter."""
        return next(iter(self.models.values()))

    def model(self, name: str) -> ServedModel:
        """A model by its name. Raises Refused with status 404."""
        if name not in self.models:
            tip = did_you_mean(name[:100], self.models)
            message = f"there is no model {name[:100]!r}: {tip}GET /v1/models lists them"
            raise APIError(404, message, param="model", code="model_not_found")
        return self.models[name]


def make_app(service: Service, *, host: str, names: tuple[str, ...] = (), key: str = "", rate: int = 0) -> FastAPI:
    """The whole server but its socket. See `limits.SecurityMiddleware` for what stands before the routes."""
    app = FastAPI(title="graft serve", openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(SecurityMiddleware, host=host, names=names, key=key, rate=rate)
    app.add_exception_handler(GraftError, _on_refusal)
    app.add_exception_handler(HTTPException, _on_no_route)
    app.add_exception_handler(500, _on_failure)
    _add_page(app)
    _add_models(app, service)
    _add_answers(app, service)
    return app


async def _on_refusal(http: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, GraftError)
    return error_response(to_http_error(error))


async def _on_no_route(http: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = "there is nothing at this path" if error.status_code == 404 else str(error.detail).lower()
    answer = error_response(APIError(error.status_code, f"{http.method[:20]} {http.url.path[:100]}: {what}"))
    answer.headers.update(error.headers or {})
    return answer


async def _on_failure(http: HTTPRequest, error: Exception) -> Response:
    """A mistake of ours: this request is lost, its traceback is in the log, and the server goes on."""
    return error_response(APIError(500, "the server failed at this request"))


# The page, and what there is ------------------------------------------------------------------------------------------


def _add_page(app: FastAPI) -> None:
    def add(path: str, content: str, kind: str) -> None:
        app.add_api_route(path, lambda: Response(content, media_type=kind), methods=["GET"])

    for path, (names, kind) in PARTS.items():
        add(path, "".join(_part(name) for name in names), kind)


def _part(name: str) -> str:
    folder = "graftlm.studies" if name.startswith("report") else "graftlm.serving"
    return (files(folder) / name).read_text(encoding="utf-8")


def _add_models(app: FastAPI, service: Service) -> None:
    created = int(time.time())

    def described(model: ServedModel) -> dict[str, Any]:
        parent = None if model.adapter is None else service.base.name
        return {
            "id": model.name,
            "object": "model",
            "created": created,
            "owned_by": "graftlm",
            "parent": parent,
            "labels": list(model.template.labels),
            "context": model.max_seq_len,
        }

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described(model) for model in service.models.values()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return described(service.model(name))

    @app.get("/v1/stats")
    async def stats() -> dict[str, Any]:
        return service.engine.stats()


# Answers --------------------------------------------------------------------------------------------------------------


def _body(schema: type[BaseModel]) -> Callable[[HTTPRequest], Any]:
    """A route's body. FastAPI's own way to read one would bound neither its size nor its depth."""

    async def body(http: HTTPRequest) -> Any:
        return read(schema, await read_body(http))

    return body


def _add_answers(app: FastAPI, service: Service) -> None:
    engine, tokenizer = service.engine, service.tokenizer
    chat = Chat(tokenizer, "send text to /v1/completions") if tokenizer.chat_template is not None else None

    async def answer(asked: ParsedRequest, streams: bool, http: HTTPRequest) -> Response:
        if streams:
            return stream(engine, tokenizer, asked)
        return JSONResponse(await whole(engine, tokenizer, asked, http))

    @app.post("/v1/completions")
    async def completions(http: HTTPRequest, body: Annotated[Any, Depends(_body(CompletionBody))]) -> Response:
        asked = await asyncio.to_thread(_completions, service, body)
        return await answer(asked, bool(body.stream), http)

    @app.post("/v1/chat/completions")
    async def chats(http: HTTPRequest, body: Annotated[Any, Depends(_body(ChatBody))]) -> Response:
        asked = await asyncio.to_thread(_chat, service, chat, body)
        return await answer(asked, bool(body.stream), http)

    @app.post("/v1/classify")
    async def classify(http: HTTPRequest, body: Annotated[Any, Depends(_body(ClassifyBody))]) -> Response:
        return JSONResponse(await cancel_on_disconnect(http, _classify(service, body)))


def _completions(service: Service, body: CompletionBody) -> ParsedRequest:
    model = service.model(body.model)
    prompts = _prompts(service, body.prompt)
    logprobs = body.logprobs is not None
    return _asked(service, model, body, "prompt", prompts, body.max_tokens, SHORT, logprobs=logprobs)


def _prompts(service: Service, prompt: Any) -> list[list[int]]:
    """The tokens of each prompt, however they were given."""
    several = isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int))
    given: list[Any] = prompt if several else [prompt]
    texts = [each for each in given if isinstance(each, str)]
    found = service.tokenizer.encode_batch(texts, bos=True) if texts else given
    if not found or not all(found):
        raise APIError(400, "prompt: is empty: give at least one token to continue", param="prompt")
    if not texts and (largest := max(map(max, found))) >= service.vocab:
        raise APIError(400, f"prompt: {largest} is no token: the model has {service.vocab}", param="prompt")
    return found


def _chat(service: Service, chat: Chat | None, body: ChatBody) -> ParsedRequest:
    model = service.model(body.model)
    if chat is None:
        message = f"{service.base.name} has no chat template: send text to /v1/completions"
        raise APIError(400, message, param="messages", code="no_chat_template")
    roles = {"developer": "system"}  # as OpenAI's newer models call it
    messages = [(roles.get(message.role, message.role), message.text_content) for message in body.messages]
    try:
        prompt, ends = chat.encode(messages), chat.stop_tokens
    except InputError as error:
        raise APIError(400, f"messages: {error}", param="messages") from None
    given = [value for value in (body.max_tokens, body.max_completion_tokens) if value is not None]
    limit, logprobs = min(given, default=None), bool(body.logprobs)
    return _asked(service, model, body, "messages", [prompt], limit, None, ends=ends, logprobs=logprobs)


def _asked(
    service: Service,
    model: ServedModel,
    body: Sampling,
    field: str,
    prompts: Sequence[Sequence[int]],
    limit: int | None,
    default: int | None,
    *,
    ends: Collection[int] | None = None,
    logprobs: bool,
) -> ParsedRequest:
    """limit: tokens that the request allows; default: those it gets where it does not say; None: as many as fit.

    ends: of a chat, the tokens that end the model's turn.
    """
    n = 1 if body.n is None else body.n
    if len(prompts) * n > MAX_CHOICES:
        raise APIError(400, f"n: {len(prompts)} prompts times {n}: at most {MAX_CHOICES} answers a request", param="n")
    if limit is not None and limit > service.max_tokens:
        message = f"max_tokens: at most {service.max_tokens} here (graft serve --max_tokens)"
        raise APIError(400, message, param="max_tokens")
    chat = ends is not None
    requests: list[Request] = []
    for prompt in prompts:
        room, least = model.max_seq_len - len(prompt), limit or 1
        if room < least:
            message = (
                f"{field}: {len(prompt)} tokens and {least} new ones, and {model.name} reads at most "
                f"{model.max_seq_len}: "
                f"shorten the {'conversation' if chat else 'prompt'}{' or lower max_tokens' if limit else ''}"
            )
            raise APIError(400, message, param=field, code="context_length_exceeded")
        request = Request(
            prompt=tuple(prompt),
            adapter=model.adapter,
            max_new_tokens=limit or min(default or service.max_tokens, service.max_tokens, room),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=body.top_k or None,
            top_p=None if body.top_p in (None, 1) else body.top_p,
            seed=body.seed,
            stop=body.stops,
            stop_tokens=ends or (),
        )
        requests += choices(request, n)
    return ParsedRequest(tuple(requests), model.name, n, chat, logprobs, body.wants_usage)


# Label probabilities --------------------------------------------------------------------------------------------------


async def _classify(service: Service, body: ClassifyBody) -> dict[str, Any]:
    """For each text and model the probability of each label: a softmax over the labels' scores alone."""
    models = [service.model(name) for name in dict.fromkeys(body.models or service.models)]
    texts = [body.text] if body.text is not None else list(body.texts or ())
    questions = await asyncio.to_thread(lambda: [_questions(service, model, texts) for model in models])
    asked = list(zip(models, questions, strict=True))
    jobs = [(number, model, prompts[number]) for number in range(len(texts)) for model, prompts in asked]
    results: list[dict[str, Any]] = [{"index": number, "models": {}} for number in range(len(texts))]
    for start in range(0, len(jobs), CLASSIFY_CONCURRENCY):
        some = jobs[start : start + CLASSIFY_CONCURRENCY]
        found = await asyncio.gather(*(_score(service, model, prompt) for _, model, (prompt, _) in some))
        for (number, model, (_, cut)), scores in zip(some, found, strict=True):
            results[number]["models"][model.name] = {**_read(model.template, scores), "cut": cut}
    return {"object": "classification", "results": results}


async def _score(service: Service, model: ServedModel, prompt: Sequence[int]) -> list[float]:
    labels = label_ids(model.template, service.tokenizer)
    return await done(service.engine.score(prompt, labels, model.adapter))


def _questions(service: Service, model: ServedModel, texts: Sequence[str]) -> list[tuple[tuple[int, ...], bool]]:
    """Each text's prompt, and whether it lost its end to fit."""
    found = []
    for text in texts:
        examples, cut = encode_rows(
            [Record(text, 0, source="text")], model.template, service.tokenizer, model.max_seq_len
        )
        found.append((examples[0].prompt_ids, bool(cut)))
    return found


def _read(template: Template, scores: Sequence[float]) -> dict[str, Any]:
    """Scores -> the likeliest label and all probabilities. Raises GraftError where a score is no number."""
    if not all(map(math.isfinite, scores)):
        raise GraftError("the labels' scores are NaN: the weights are broken, or overflow in this --dtype; try float32")
    weights = [math.exp(score - max(scores)) for score in scores]
    probabilities = [weight / sum(weights) for weight in weights]
    pairs = dict(zip(template.labels, probabilities, strict=True))
    return {"label": max(pairs, key=pairs.__getitem__), "probabilities": pairs}
