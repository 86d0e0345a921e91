"""The routes: OpenAI's completions and chat completions, our own classification, and the page.

    GET  /                       the page, with page.css and page.js
    GET  /docs                   the routes and their fields, also as /openapi.json
    GET  /health                 whether the server is running
    GET  /v1/models              the base and its adapters; /v1/models/NAME is one of them
    GET  /v1/stats               counters of the engine
    GET  /metrics                counters and histograms for Prometheus
    POST /v1/completions         continue prompts
    POST /v1/chat/completions    answer messages, in the model's own chat template
    POST /v1/classify            label probabilities of texts, from the base and its adapters
    POST /v1/embeddings          the mean of each text's last hidden states
    POST /tokenize, /detokenize  text to token ids and back, as vLLM has it

The base and all its adapters are models of one engine, so requests to different ones are decoded in one batch.
Tokenisation runs off the event loop: a long prompt does not block other requests.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI
from fastapi import Request as HTTPRequest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from graftlm.errors import GraftError, InputError
from graftlm.inference.grammar import Grammar
from graftlm.inference.requests import Request
from graftlm.inference.sampling import check_tokens
from graftlm.serving import api_docs
from graftlm.serving.classify import classify_texts
from graftlm.serving.embeddings import embed_texts
from graftlm.serving.metrics import Metrics, MetricsMiddleware
from graftlm.serving.middleware import SecurityMiddleware, error_response, read_body
from graftlm.serving.responses import (
    INTERNAL_ERROR,
    Formatter,
    Submit,
    cancel_on_disconnect,
    complete_response,
    stream_response,
    to_http_error,
)
from graftlm.serving.schemas import (
    MAX_CHOICES,
    APIError,
    ChatBody,
    ClassifyBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    MessageBody,
    Sampling,
    TokenizeBody,
    parse_body,
)
from graftlm.serving.service import ServedModel, Service, listed
from graftlm.serving.tools import call_streams, check_messages, forced_call, written_tools
from graftlm.text.boundary import split_prompt
from graftlm.text.chat import Chat

DEFAULT_MAX_TOKENS = 16
"""Of a completion whose request does not set max_tokens, as in OpenAI's API."""

PAGE = {
    "/": (("page.html",), "text/html"),
    "/page.css": (("report_base.css", "page.css"), "text/css"),
    "/page.js": (("report_parts.js", "page_stream.js", "page.js"), "text/javascript"),
}
"""Path -> files to concatenate, and their media type. The report_* files belong to `graft report`."""


def make_app(service: Service, **security: Any) -> FastAPI:
    """The application. See `middleware.SecurityMiddleware` for the keyword arguments."""
    app = FastAPI(title="graft serve", openapi_url=None, docs_url=None, redoc_url=None)
    metrics = Metrics(service.engine)
    app.add_middleware(SecurityMiddleware, **security)
    app.add_middleware(MetricsMiddleware, metrics=metrics, routes=app)
    app.add_exception_handler(GraftError, _on_graft_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(500, _on_internal_error)
    _add_page(app)
    _add_models(app, service)
    _add_inference(app, service, metrics.submit)
    app.add_route("/metrics", lambda _: Response(metrics.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4))
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
    return error_response(INTERNAL_ERROR)


# The page and the models ----------------------------------------------------------------------------------------------


def _add_page(app: FastAPI) -> None:
    for path, (names, media_type) in PAGE.items():
        page = Response("".join(map(_page_file, names)), media_type=media_type)
        app.add_route(path, partial(lambda page, _: page, page))
    docs, schema = Response(api_docs.page(), media_type="text/html"), JSONResponse(api_docs.openapi())
    app.add_route("/docs", lambda _: docs)
    app.add_route("/openapi.json", lambda _: schema)


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
            "max_tokens": service.max_tokens,
            "chat": service.tokenizer.chat_template is not None,
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


def _add_inference(app: FastAPI, service: Service, submit: Submit) -> None:
    tokenizer = service.tokenizer
    chat = Chat(tokenizer, "send text to /v1/completions") if tokenizer.chat_template is not None else None

    async def respond(http: HTTPRequest, body: Sampling, parse: Callable[[], list[Request]]) -> Response:
        def prepare() -> tuple[list[Request], Formatter]:
            requests = parse()
            return requests, Formatter(tokenizer, body, requests, call_streams(service.tool_support, body))

        requests, formatter = await asyncio.to_thread(prepare)
        if body.stream:
            return stream_response(submit, requests, formatter)
        return JSONResponse(await complete_response(submit, requests, formatter, http))

    @app.post("/v1/completions")
    async def completions(http: HTTPRequest, body: Annotated[Any, Depends(_body(CompletionBody))]) -> Response:
        return await respond(http, body, lambda: _parse_completion(service, body))

    @app.post("/v1/chat/completions")
    async def chats(http: HTTPRequest, body: Annotated[Any, Depends(_body(ChatBody))]) -> Response:
        return await respond(http, body, lambda: _parse_chat(service, chat, body))

    @app.post("/v1/embeddings")
    async def embeddings(http: HTTPRequest, body: Annotated[Any, Depends(_body(EmbeddingBody))]) -> Response:
        return JSONResponse(await cancel_on_disconnect(http, embed_texts(service, body)))

    @app.post("/tokenize")
    async def tokenize(body: Annotated[Any, Depends(_body(TokenizeBody))]) -> dict[str, Any]:
        return await asyncio.to_thread(_tokenize, service, chat, body)

    @app.post("/detokenize")
    async def detokenize(body: Annotated[Any, Depends(_body(DetokenizeBody))]) -> dict[str, Any]:
        service.model(body.model or service.base.name)
        check_tokens(body.tokens, tokenizer.vocab_size, "tokens")
        return {"prompt": await asyncio.to_thread(tokenizer.decode_with_special, body.tokens)}

    @app.post("/v1/classify")
    async def classify(http: HTTPRequest, body: Annotated[Any, Depends(_body(ClassifyBody))]) -> Response:
        return JSONResponse(await cancel_on_disconnect(http, classify_texts(service, body)))


def _parse_completion(service: Service, body: CompletionBody) -> list[Request]:
    prompts = listed(body.prompt)
    if not isinstance(prompts[0], str):
        return _requests(service, body, prompts, body.max_tokens, DEFAULT_MAX_TOKENS)
    split = [split_prompt(text, service.tokenizer) for text in prompts]
    tokens = service.tokenizer.encode_prompts([text for text, _ in split])
    spaces = [space for _, space in split for _ in range(body.n)]
    requests = _requests(service, body, tokens, body.max_tokens, DEFAULT_MAX_TOKENS)
    return [replace(request, space=space) for request, space in zip(requests, spaces, strict=True)]


def _parse_chat(service: Service, chat: Chat | None, body: ChatBody) -> list[Request]:
    tools, (prefix, schema) = written_tools(service.tool_support, body), forced_call(service.tool_support, body)
    chat, prompt = _chat_prompt(service, chat, body.messages, tools, prefix)
    limit = min(filter(None, (body.max_tokens, body.max_completion_tokens)), default=None)
    requests = _requests(service, body, [prompt], limit, service.max_tokens, chat.stop_tokens)
    grammar = _grammar(service, schema, "tools")
    return [replace(request, grammar=grammar) for request in requests] if grammar is not None else requests


def _chat_prompt(
    service: Service,
    chat: Chat | None,
    messages: Sequence[MessageBody],
    tools: Sequence[Any] = (),
    answer_prefix: str = "",
) -> tuple[Chat, list[int]]:
    """The model's chat, and the tokens of messages in it, up to the beginning of the answer. Raises APIError."""
    if chat is None:
        message = f"{service.base.name} has no chat template: send text to /v1/completions"
        raise APIError(400, message, param="messages", code="no_chat_template")
    check_messages(service.tool_support, messages)
    try:
        prompt = chat.with_tools(tools).encode([each.to_message() for each in messages], answer_prefix)
    except InputError as error:
        raise APIError(400, f"messages: {error}", param="messages") from None
    return chat, prompt


def _requests(
    service: Service,
    body: Sampling,
    prompts: Sequence[Sequence[int]],
    limit: int | None,
    default_limit: int,
    stop_tokens: Collection[int] = (),
) -> list[Request]:
    """The requests to the engine, n for each prompt: the first with the body's seed, each with one of its own.

    limit: what the body sets as the maximum of new tokens.
    """
    model = service.model(body.model)
    if len(prompts) * body.n > MAX_CHOICES:
        message = f"n: {len(prompts)} prompts times {body.n}: at most {MAX_CHOICES} answers a request"
        raise APIError(400, message, param="n")
    if limit is not None and limit > service.max_tokens:
        message = f"max_tokens: at most {service.max_tokens} here (graft serve --max_tokens)"
        raise APIError(400, message, param="max_tokens")
    longest, new = max(map(len, prompts)), 1 if limit is None else limit
    if longest + new > model.max_seq_len:
        message = (
            f"{longest} tokens and {new} new ones, and {model.name} reads at most {model.max_seq_len}: "
            f"shorten the text{' or lower max_tokens' if limit else ''}"
        )
        raise APIError(400, message, code="context_length_exceeded")
    params = body.sampling_params(limit or min(default_limit, service.max_tokens), {*stop_tokens, *model.stop_tokens})
    each = [replace(params, seed=(params.seed + number) % 2**63) for number in range(body.n)]
    scored = body.echoes and body.num_logprobs is not None
    first = Request(
        prompts[0],
        params,
        model.adapter,
        grammar=_grammar(service, body.response_format.schema_of_answer, "response_format"),
        top_logprobs=body.num_logprobs or 0,
        prompt_logprobs=scored,
        prompt_only=limit == 0,
    )
    return [replace(first, prompt=tuple(prompt), params=own) for prompt in prompts for own in each]


def _grammar(service: Service, schema: dict[str, Any] | None, field: str) -> Grammar | None:
    """The grammar of a JSON schema, which is in this field of the body."""
    try:
        return None if schema is None else service.grammars.json_schema(schema)
    except InputError as error:
        raise APIError(400, f"{field}: {error}", param=field, code="invalid_json_schema") from None


def _tokenize(service: Service, chat: Chat | None, body: TokenizeBody) -> dict[str, Any]:
    """The ids that a completion of this text, or a chat of these messages, reads."""
    model, tokenizer = service.model(body.model or service.base.name), service.tokenizer
    if body.messages is not None:
        _, ids = _chat_prompt(service, chat, body.messages)
    else:
        ids = (tokenizer.encode_prompt if body.add_special_tokens else tokenizer.encode)(body.prompt or "")
    texts = [tokenizer.token(token) for token in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": model.max_seq_len, "tokens": ids, "token_strs": texts}
