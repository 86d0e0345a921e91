"""The engine's output in OpenAI's format: complete responses, and streams of server-sent events.

The engine runs on its own thread and reports each token by a callback; here every callback becomes an item in a queue
of the event loop. Pending requests are cancelled when the client disconnects, or when anything else ends a response.
"""

import asyncio
import json
import logging
import secrets
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from fastapi import Request as HTTPRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from graftlm.errors import GraftError, InputError, Overloaded, ShuttingDown
from graftlm.inference.requests import CaptureError, Completion, Request, RequestHandle, TokenLogprob, TokenOutput
from graftlm.serving.schemas import APIError, ChatBody, Sampling
from graftlm.text.stream import PlacedToken, TokenStream
from graftlm.text.tokenizer import Tokenizer
from graftlm.text.tool_calls import CallStream

T = TypeVar("T")
Event = dict[str, Any]
Submit = Callable[[Request, Callable[[TokenOutput], None] | None], RequestHandle]
"""As `Engine.submit`."""
Row = tuple[PlacedToken, TokenLogprob]
Outputs = asyncio.Queue[tuple[int, TokenOutput | None]]
"""(choice, its next output); None after its last."""
RETRY_AFTER = 1
INTERNAL_ERROR = APIError(500, "the server failed at this request")


def to_http_error(error: GraftError) -> APIError:
    """An error of the engine as an HTTP error."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, Overloaded):
        return APIError(503, str(error), code="overloaded", retry_after=RETRY_AFTER)
    if isinstance(error, ShuttingDown):
        return APIError(503, "the server is stopping", code="stopping")
    return APIError(400 if isinstance(error, InputError) else 500, str(error))


# Complete responses ---------------------------------------------------------------------------------------------------


async def complete_response(
    submit: Submit, requests: Sequence[Request], formatter: "Formatter", http: HTTPRequest
) -> dict[str, Any]:
    """All choices at once. Raises APIError."""
    handles = _submit(submit, requests)
    try:
        found = await cancel_on_disconnect(http, asyncio.gather(*(future_result(handle.done) for handle in handles)))
    except GraftError as error:
        raise to_http_error(error) from None
    finally:
        _cancel(handles)
    for completion in found:
        _raise_if_unfinished(completion.finish_reason)
    body = [formatter.choice(number, completion) for number, completion in enumerate(found)]
    return {**formatter.head(), "choices": body, "usage": formatter.usage(found)}


def _submit(
    submit: Submit, requests: Sequence[Request], on_output: Callable[[int, TokenOutput], None] | None = None
) -> list[RequestHandle]:
    """Submit all of the requests or, where the engine rejects one, none."""
    handles: list[RequestHandle] = []
    try:
        for number, request in enumerate(requests):
            handles.append(submit(request, None if on_output is None else partial(on_output, number)))
    except GraftError as error:
        _cancel(handles)
        raise to_http_error(error) from None
    return handles


def _cancel(handles: Sequence[RequestHandle]) -> None:
    for handle in handles:
        handle.cancel()


def future_result(future: Future[T]) -> Awaitable[T]:
    """Await a future of the engine's thread. Shielded, since only the engine may end it."""
    return asyncio.shield(asyncio.wrap_future(future))


async def cancel_on_disconnect(http: HTTPRequest, work: Awaitable[T]) -> T:
    """The result of `work`; if the client disconnects first, `work` is cancelled and APIError is raised."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait((task, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise APIError(499, "the client has disconnected")
    finally:
        disconnected.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _disconnected(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


# Streams --------------------------------------------------------------------------------------------------------------


class EventStream(StreamingResponse):
    """Server-sent events of some requests, which are cancelled when the stream ends."""

    def __init__(self, events: AsyncIterator[str], handles: Sequence[RequestHandle]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self._handles = handles

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel(self._handles)


def stream_response(submit: Submit, requests: Sequence[Request], formatter: "Formatter") -> EventStream:
    """All choices, token by token. Raises APIError: the requests are submitted before the stream begins."""
    loop = asyncio.get_running_loop()
    outputs: Outputs = asyncio.Queue()

    def put(number: int, output: TokenOutput | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server was stopped at once
            loop.call_soon_threadsafe(outputs.put_nowait, (number, output))

    handles = _submit(submit, requests, put)
    for number, handle in enumerate(handles):
        handle.done.add_done_callback(partial(lambda number, _: put(number, None), number))
    return EventStream(_events(handles, outputs, formatter), handles)


async def _events(handles: Sequence[RequestHandle], outputs: Outputs, formatter: "Formatter") -> AsyncIterator[str]:
    head = formatter.head(".chunk")
    running = len(handles)
    with CaptureError() as caught:
        if formatter.chat:
            for number in range(len(handles)):
                yield _event({**head, "choices": [_choice(number, {"delta": {"role": "assistant", "content": ""}})]})
        while running:
            number, output = await outputs.get()
            if output is None:  # this choice has ended: its future holds the result or raises the error
                running -= 1
                _raise_if_unfinished(handles[number].done.result().finish_reason)
                continue
            if output.finish_reason in ("cancelled", "error"):
                continue  # the future has more about these
            if (choice := formatter.chunk(number, output)) is not None:
                yield _event({**head, "choices": [choice]})
        if formatter.body.stream_options.include_usage:
            usage = formatter.usage([handle.done.result() for handle in handles])
            yield _event({**head, "choices": [], "usage": usage})
    if (error := caught.error) is not None:
        if not isinstance(error, GraftError):  # a bug: as for a 500, its traceback is logged
            logging.getLogger(__name__).error("a stream failed", exc_info=error)
            error = INTERNAL_ERROR
        yield _event(to_http_error(error).to_json())
    yield "data: [DONE]\n\n"


def _event(content: Event) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"


def _raise_if_unfinished(finish_reason: str) -> None:
    if finish_reason == "cancelled":
        raise APIError(503, "the server is stopping: the answer is incomplete", code="stopping")
    if finish_reason == "error":
        raise APIError(500, "the engine failed at this request")


# JSON -----------------------------------------------------------------------------------------------------------------


class Formatter:
    """OpenAI's JSON of one request's choices, of completions and of chats."""

    def __init__(
        self, tokenizer: Tokenizer, body: Sampling, requests: Sequence[Request], calls: Sequence[CallStream] = ()
    ) -> None:
        self.tokenizer, self.body, self.chat = tokenizer, body, isinstance(body, ChatBody)
        self._calls = calls  # of each choice, where the model has tools
        self._prompts: list[tuple[str, list[PlacedToken]]] = [("", [])] * len(requests)  # to be written before answers
        if body.echoes:
            self._prompts = [self._echo(request) for request in requests[:: body.n] for _ in range(body.n)]
        self._streams = [
            TokenStream(tokenizer, request.prompt, request.params.stop, request.space, len(text))
            for request, (text, _) in zip(requests, self._prompts, strict=True)
        ]
        self._values = [deque[TokenLogprob]() for _ in requests]  # of tokens that have not been written

    def _echo(self, request: Request) -> tuple[str, list[PlacedToken]]:
        """The text of a prompt's tokens, and their places in it."""
        stream = TokenStream(self.tokenizer)
        text = "".join([*map(stream.add, request.prompt), stream.finish()])
        return text + request.space, stream.take()

    def head(self, chunk: str = "") -> Event:
        """The common fields of a response; `chunk`: ".chunk" for an event of a stream."""
        kind = f"chat.completion{chunk}" if self.chat else "text_completion"
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.body.model}

    def choice(self, index: int, completion: Completion) -> Event:
        """A complete choice."""
        prompt, rows = self._take_prompt(index, completion.prompt_logprobs)
        text, calls, finish_reason = self._called(index, completion.text, completion.finish_reason)
        message = {"role": "assistant", "content": text or None if calls else text, "refusal": None, **calls}
        content = {"message": message} if self.chat else {"text": prompt + text}
        count = len(completion.tokens)
        rows += self._placed(index, completion.logprobs[:count], is_last=True)
        rows += self._ending(index, completion.logprobs[count:])
        return _choice(index, content, self._logprobs(rows), finish_reason)

    def chunk(self, index: int, output: TokenOutput) -> Event | None:
        """One output as a choice of an event; None if it is empty. Tokens are in the event that has their text."""
        prompt, rows = self._take_prompt(index, output.prompt_logprobs)
        found = [] if output.logprob is None else [output.logprob]
        is_text = output.token is not None
        rows += self._placed(index, found if is_text else [], is_last=output.finish_reason is not None)
        rows += self._ending(index, [] if is_text else found)
        new, calls, finish_reason = self._called(index, output.text, output.finish_reason)
        text = prompt + new
        if not text and finish_reason is None and not rows:
            return None
        content: Event = {"delta": ({"content": text} if text else {}) | calls}
        logprobs = self._logprobs(rows) if rows else None
        return _choice(index, content if self.chat else {"text": text}, logprobs, finish_reason)

    def _called(self, index: int, text: str, finish_reason: str | None) -> tuple[str, Event, str | None]:
        """The next text of a choice without calls of tools and, at its end, these calls; and why it ends."""
        if not self._calls:
            return text, {}, finish_reason
        text = self._calls[index].add(text)
        if finish_reason is None:
            return text, {}, None
        rest, found = self._calls[index].finish()
        if not found:
            return text + rest, {}, finish_reason
        assert isinstance(self.body, ChatBody)
        calls = [
            {
                **({"index": number} if self.body.stream else {}),
                "id": secrets.token_hex(5)[:9],  # Mistral's templates accept no other length
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
            }
            for number, (name, arguments) in enumerate(found if self.body.parallel_tool_calls else found[:1])
        ]
        return text + rest, {"tool_calls": calls}, "tool_calls" if finish_reason == "stop" else finish_reason

    def usage(self, completions: Sequence[Completion]) -> Event:
        """The numbers of tokens; a prompt with n choices counts once."""
        prompt = sum(completion.prompt_tokens for completion in completions[:: self.body.n])
        completion = sum(len(completion.tokens) for completion in completions)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _take_prompt(self, index: int, logprobs: Sequence[TokenLogprob]) -> tuple[str, list[Row]]:
        """What precedes a choice's first text: with `echo`, its prompt."""
        (text, placed), self._prompts[index] = self._prompts[index], ("", [])
        return text, list(zip(placed, logprobs, strict=True)) if logprobs else []

    def _placed(self, index: int, tokens: Iterable[TokenLogprob], is_last: bool) -> list[Row]:
        """The tokens whose text is known with the next `tokens` of a choice; those of a stop text are left out."""
        if self.body.num_logprobs is None:
            return []
        stream, values = self._streams[index], self._values[index]
        for each in tokens:
            values.append(each)
            stream.add(each.token)
        if is_last:
            stream.finish()
        return [(placed, values.popleft()) for placed in stream.take()]

    def _ending(self, index: int, stop: Sequence[TokenLogprob]) -> list[Row]:
        """The stop token that ended a choice, which OpenAI lists in completions, not in chats."""
        if self.chat or self.body.num_logprobs is None:
            return []
        return [(PlacedToken(each.token, None, self._streams[index].end), each) for each in stop]

    def _logprobs(self, rows: Sequence[Row]) -> Event | None:
        count = self.body.num_logprobs
        if count is None:
            return None
        if self.chat:
            return {"content": [self._chat_token(*row) for row in rows], "refusal": None}
        return {
            "tokens": [self._text(placed.token, placed.piece) for placed, _ in rows],
            "token_logprobs": [each.logprob for _, each in rows],
            "top_logprobs": [self._likeliest(*row) for row in rows] if count else None,
            "text_offset": [placed.offset for placed, _ in rows],
        }

    def _likeliest(self, placed: PlacedToken, each: TokenLogprob) -> dict[str, float] | None:
        """The likeliest tokens in a token's place, and the token itself; of those with equal text the likeliest."""
        if each.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, value in each.top:
            found.setdefault(self._text(token, self.tokenizer.token_bytes(token, placed.before)), value)
        found.setdefault(self._text(placed.token, placed.piece), each.logprob)
        return found

    def _chat_token(self, placed: PlacedToken, each: TokenLogprob) -> Event:
        top = [(token, self.tokenizer.token_bytes(token, placed.before), value) for token, value in each.top]
        return {
            **self._described(placed.token, placed.piece, each.logprob),
            "top_logprobs": [self._described(*likely) for likely in top],
        }

    def _described(self, token: int, piece: bytes | None, logprob: float | None) -> Event:
        text = self._text(token, piece)
        return {"token": text, "logprob": logprob, "bytes": None if piece is None else list(piece)}

    def _text(self, token: int, piece: bytes | None) -> str:
        """A token's text. Parts of characters are bytes, as OpenAI writes them: \\xe2, in completions bytes:\\xe2."""
        if piece is None:
            return self.tokenizer.token(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return ("" if self.chat else "bytes:") + "".join(f"\\x{byte:02x}" for byte in piece)


def _choice(index: int, content: Event, logprobs: Event | None = None, finish_reason: str | None = None) -> Event:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish_reason}
