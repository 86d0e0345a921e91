"""The engine's answers in OpenAI's form: whole, or as a stream of events while they come.

What is unusual here: the engine runs on a thread of its own and tells of each token by a call; here every such call
becomes an item in a queue of the event loop. However a request ends, its client's leaving included, its tickets are
cancelled, so that nobody computes for nobody.
"""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import Request as HTTPRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from graftlm.errors import GraftError, InputError, Overloaded, ShuttingDown
from graftlm.inference.engine import Engine
from graftlm.inference.requests import Completion, Request, RequestHandle, TokenOutput
from graftlm.serving.schemas import APIError
from graftlm.text.tokenizer import Tokenizer

T = TypeVar("T")
Event = dict[str, Any]
RETRY_AFTER = 1


@dataclass(frozen=True)
class ParsedRequest:
    """What one HTTP request wants of the engine."""

    requests: tuple[Request, ...]
    """One for each choice, prompt after prompt."""
    model: str
    n: int
    """Choices of each prompt."""
    chat: bool
    logprobs: bool
    usage: bool
    """Whether a stream ends with the number of tokens."""


def choices(request: Request, n: int) -> list[Request]:
    """The same request n times; of one with a seed each has a seed of its own, the first the given one."""
    seeds = [None if request.seed is None else (request.seed + number) % 2**63 for number in range(n)]
    return [replace(request, seed=seed) for seed in seeds]


def to_http_error(error: GraftError) -> APIError:
    """What the engine raised, as an HTTP answer."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, Overloaded):
        return APIError(503, str(error), code="overloaded", retry_after=RETRY_AFTER)
    if isinstance(error, ShuttingDown):
        return APIError(503, "the server is stopping", code="stopping")
    return APIError(400 if isinstance(error, InputError) else 500, str(error))


# Whole answers --------------------------------------------------------------------------------------------------------


async def whole(engine: Engine, tokenizer: Tokenizer, asked: ParsedRequest, http: HTTPRequest) -> Event:
    """All choices at once. Raises Refused."""
    tickets = _submit(engine, asked.requests)
    try:
        found = await cancel_on_disconnect(http, asyncio.gather(*(done(ticket.done) for ticket in tickets)))
    except GraftError as error:
        raise to_http_error(error) from None
    finally:
        for ticket in tickets:
            ticket.cancel()
    for completion in found:
        _check(completion.finish_reason)
    body = _head(asked, streams=False)
    body["choices"] = [_choice(asked, tokenizer, number, completion) for number, completion in enumerate(found)]
    prompts = [completion.prompt_tokens for completion in found[:: asked.n]]
    return {**body, "usage": _usage(prompts, sum(len(completion.tokens) for completion in found))}


def _choice(asked: ParsedRequest, tokenizer: Tokenizer, index: int, completion: Completion) -> Event:
    logprobs = None
    if asked.logprobs:
        pairs = list(zip(completion.tokens, completion.logprobs, strict=True))
        logprobs = _logprobs(asked.chat, tokenizer, pairs, 0)
    said = {"message": {"role": "assistant", "content": completion.text, "refusal": None}}
    text = said if asked.chat else {"text": completion.text}
    return {"index": index, **text, "logprobs": logprobs, "finish_reason": completion.finish_reason}


def _submit(
    engine: Engine, requests: Sequence[Request], on_piece: Callable[[int, TokenOutput], None] | None = None
) -> list[RequestHandle]:
    """All of the requests or, where one is refused, none."""
    tickets: list[RequestHandle] = []
    try:
        for number, request in enumerate(requests):
            told = None if on_piece is None else _numbered(on_piece, number)
            tickets.append(engine.submit(request, told))
    except GraftError as error:
        for ticket in tickets:
            ticket.cancel()
        raise to_http_error(error) from None
    return tickets


def _numbered(on_piece: Callable[[int, TokenOutput], None], number: int) -> Callable[[TokenOutput], None]:
    return lambda piece: on_piece(number, piece)


def done(future: Future[T]) -> Awaitable[T]:
    """A future of the engine's thread, to be awaited here. Shielded: it belongs to the engine, which fulfils it."""
    return asyncio.shield(asyncio.wrap_future(future))


async def cancel_on_disconnect(http: HTTPRequest, work: Awaitable[T]) -> T:
    """The work's result; where the client leaves before it is there, the work ends and Refused is raised."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_left(http))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise APIError(499, "the client has left")
    finally:
        left.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _left(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


# Streams --------------------------------------------------------------------------------------------------------------


class Stream(StreamingResponse):
    """Server-sent events of some tickets, which end with it."""

    def __init__(self, events: AsyncIterator[str], tickets: Sequence[RequestHandle]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self._tickets = tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for ticket in self._tickets:
                ticket.cancel()


def stream(engine: Engine, tokenizer: Tokenizer, asked: ParsedRequest) -> Stream:
    """All choices as they come. Raises Refused: the requests are taken before the stream begins."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[tuple[int, TokenOutput | None]] = asyncio.Queue()

    def tell(number: int, piece: TokenOutput | None) -> None:
        with suppress(RuntimeError):  # the loop has ended: the server was told to stop at once
            loop.call_soon_threadsafe(pieces.put_nowait, (number, piece))

    tickets = _submit(engine, asked.requests, tell)
    for number, ticket in enumerate(tickets):
        ticket.done.add_done_callback(_ended(tell, number))  # behind its last piece
    return Stream(_events(tickets, pieces, tokenizer, asked), tickets)


def _ended(tell: Callable[[int, None], None], number: int) -> Callable[[object], None]:
    return lambda _: tell(number, None)


async def _events(
    tickets: Sequence[RequestHandle],
    pieces: "asyncio.Queue[tuple[int, TokenOutput | None]]",
    tokenizer: Tokenizer,
    asked: ParsedRequest,
) -> AsyncIterator[str]:
    head = _head(asked, streams=True)
    going, lengths = len(tickets), [0] * len(tickets)
    try:
        if asked.chat:
            for number in range(len(tickets)):
                yield _event({**head, "choices": [_delta(number, {"role": "assistant", "content": ""})]})
        while going:
            number, piece = await pieces.get()
            if piece is None:  # it has ended, or this raises what ended it
                going -= 1
                _check(tickets[number].done.result().finish_reason)
                continue
            if piece.finish_reason in ("cancelled", "error"):
                continue  # what is behind says more
            choice = _part(asked, tokenizer, number, piece, lengths[number])
            lengths[number] += len(piece.text)
            if choice is not None:
                yield _event({**head, "choices": [choice]})
        if asked.usage:
            found = [ticket.done.result() for ticket in tickets]
            prompts = [completion.prompt_tokens for completion in found[:: asked.n]]
            usage = _usage(prompts, sum(len(completion.tokens) for completion in found))
            yield _event({**head, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"
    except GraftError as error:
        yield _event(to_http_error(error).to_json())


def _part(asked: ParsedRequest, tokenizer: Tokenizer, index: int, piece: TokenOutput, offset: int) -> Event | None:
    """A piece as a choice of an event; None for one that says nothing."""
    logprobs = None
    if asked.logprobs and piece.token is not None and piece.logprob is not None:
        logprobs = _logprobs(asked.chat, tokenizer, [(piece.token, piece.logprob)], offset)
    if not piece.text and piece.finish_reason is None and logprobs is None:
        return None
    if asked.chat:
        return _delta(index, {"content": piece.text} if piece.text else {}, logprobs, piece.finish_reason)
    return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}


def _delta(index: int, delta: Event, logprobs: Event | None = None, finish: str | None = None) -> Event:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _event(content: Event) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"


# Both -----------------------------------------------------------------------------------------------------------------


def _check(finish: str) -> None:
    """Raises for an answer that did not come to its own end."""
    if finish == "cancelled":
        raise APIError(503, "the server is stopping: the answer was cut", code="stopping")
    if finish == "error":
        raise APIError(500, "the engine failed at this request")


def _head(asked: ParsedRequest, streams: bool) -> Event:
    kind = ("chat.completion" if asked.chat else "text_completion") + (".chunk" if asked.chat and streams else "")
    name = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": asked.model}


def _usage(prompts: Sequence[int], completion: int) -> Mapping[str, int]:
    prompt = sum(prompts)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _logprobs(chat: bool, tokenizer: Tokenizer, pairs: Sequence[tuple[int, float]], offset: int) -> Event:
    """The tokens and their log-probabilities; `offset`: the characters of the answer that stand before them."""
    names = [tokenizer.token(token) for token, _ in pairs]
    values = [value for _, value in pairs]
    if chat:
        rows = zip(names, values, strict=True)
        none: dict[str, Any] = {"bytes": None, "top_logprobs": []}
        return {"content": [{"token": name, "logprob": value, **none} for name, value in rows], "refusal": None}
    offsets = [offset + sum(map(len, names[:number])) for number in range(len(names))]
    return {"tokens": names, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}
