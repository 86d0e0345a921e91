"""HTTP requests to `graft serve`: the bytes of a connection, through uvicorn's own parser into the real app and engine.

An input is all that a client sends. It is a result where an answer has a 2xx, else an error. A defect is an answer with
a 5xx (but for the documented ones of a server that is busy or stopping), an answer that breaks its own form, anything
that is logged as an error, and an engine that still works for a client that has left.

What is unusual here: the transport is a list, so there is no socket and no port. One client in eight hangs up as soon
as it has sent all, and half send in two pieces.
"""

import asyncio
import atexit
import functools
import json
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from fuzz.base import ANY, Target, changed_json
from graftlm.errors import GraftError
from graftlm.exchange.huggingface import save_adapter
from graftlm.exchange.load import load
from graftlm.inference.engine import Engine
from graftlm.methods import LoRA
from graftlm.serving.app import make_app
from graftlm.serving.middleware import HEADERS
from graftlm.serving.server import Server
from graftlm.serving.service import ServedModel, Service
from graftlm.text.template import load_template
from tiny import model_folder

KEY = "the-key"
TALK = "{% for m in messages %}<|endoftext|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": "base", "prompt": "a film", "max_tokens": 3, "temperature": 0, "stop": ["x"]}),
    ("/v1/completions", {"model": "one", "prompt": [[5, 6], [7]], "n": 2, "seed": 5, "logprobs": 0, "top_p": 0.5}),
    ("/v1/completions", {"model": "one", "prompt": ["a", "½"], "stream": True, "top_k": 3}),
    ("/v1/completions", {"model": "one", "prompt": "é: ", "echo": True, "logprobs": 2, "max_tokens": 0, "n": 2}),
    (
        "/v1/completions",
        {"model": "base", "prompt": "a", "logit_bias": {"5": 3}, "presence_penalty": 1, "repetition_penalty": 1.5},
    ),
    (
        "/v1/chat/completions",
        {"model": "base", "messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2},
    ),
    (
        "/v1/chat/completions",
        {
            "model": "one",
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
                {"role": "assistant", "content": "yes", "refusal": None},
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_completion_tokens": 2,
        },
    ),
    ("/v1/embeddings", {"model": "one", "input": ["a film", "b"], "encoding_format": "base64"}),
    ("/tokenize", {"prompt": "a <|endoftext|>", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
    ("/detokenize", {"tokens": [5, 0, 200], "model": "one"}),
    ("/v1/classify", {"text": "a dull film"}),
    ("/v1/classify", {"texts": ["good", "x" * 200], "models": ["one", "base"]}),
]
PATHS = ["/", "/page.css", "/page.js", "/health", "/v1/models", "/v1/models/one", "/v1/stats", "/v1/models/no%2Fne"]
SETTINGS = sorted({key for _, body in BODIES for key in body} - {"model"} | {"max_tokens", "best_of", "echo", "user"})
ALLOWED_503 = ("overloaded", "stopping")


@dataclass
class Answer:
    """What the app said to one request."""

    method: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False

    def check(self) -> None:
        """It has the form that docs/serving.md gives it."""
        kind = self.headers.get("content-type", "").partition(";")[0]
        assert self.headers.keys() >= HEADERS.keys(), f"{self.status}: without the headers that hold a browser back"
        if self.status == 499 or not self.whole:
            return  # nobody was there to read it
        if kind == "text/event-stream":
            *events, end = self.body.decode().split("\n\n")
            assert not end and events and all(event.startswith("data: ") for event in events), self.body
            said = [event.removeprefix("data: ") for event in events]
            found = [_loads(event) for event in said if event != "[DONE]"]
            errors = [event["error"] for event in found if "error" in event]
            assert said[-1] == "[DONE]" and len(errors) <= 1, self.body
        elif kind == "application/json":
            found = _loads(self.body)
            errors = [found["error"]] if "error" in found else []
            assert bool(errors) == (self.status >= 400), self.body
        else:
            errors = []
            assert self.status == 200, (self.status, kind)
        for error in errors:
            assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"], error
            assert error["type"] != "server_error" or error["code"] in ALLOWED_503, error


def _loads(content: str | bytes) -> Any:
    def no(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(content, parse_constant=no)


class Line(asyncio.Transport):
    """What a connection's protocol writes to."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 5), "sockname": ("127.0.0.1", 8000)})
        self.protocol: Any = None
        self.sent = bytearray()
        self.closing = self.lost = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self.hang_up)

    def hang_up(self) -> None:
        if not self.lost:
            self.closing = self.lost = True
            self.protocol.connection_lost(None)

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Worries(logging.Handler):
    """Whatever is logged as an error, and what the event loop reports."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        self.found.append(cause or AssertionError(record.getMessage()))

    def of_loop(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.found.append(context.get("exception") or AssertionError(context["message"]))


def kept(app: Any, answers: list[Answer]) -> Any:
    """The app, with all that it answers kept."""

    async def heard(scope: Any, receive: Any, send: Any) -> None:
        answer = Answer(scope["method"])
        answers.append(answer)

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status = message["status"]
                answer.headers = {n.decode("latin-1"): v.decode("latin-1") for n, v in message["headers"]}
            else:
                answer.body += message.get("body", b"")
                answer.whole = not message.get("more_body", False)
            await send(message)

        await app(scope, receive, sent)

    return heard


class House:
    """The server of one folder: a tiny model, an adapter, their app behind uvicorn's protocol."""

    def __init__(self, folder: Path) -> None:
        base = model_folder(folder / "served", layers=1)
        (base / "chat_template.jinja").write_text(TALK)
        loaded = load(str(base), str(base), device="cpu", dtype="float32")
        method, rng = LoRA(rank=2, alpha=4.0, targets=("q", "v")), torch.Generator().manual_seed(0)
        tuned = load(str(base), str(base), device="cpu", dtype="float32").model
        method.install(tuned, rng)
        (folder / "adapter").mkdir()
        save_adapter(folder / "adapter", tuned, method, str(base))
        self.engine = Engine(loaded, {"one": folder / "adapter"})
        template = load_template("Review: {text}\nIs it:")
        names = {"base": None, "one": "one"}
        models = {
            name: ServedModel(name, adapter, template, self.engine.max_seq_len) for name, adapter in names.items()
        }
        service = Service(self.engine, loaded.tokenizer, models, 4)
        app = make_app(service, host="127.0.0.1", allowed_hosts=("my.name",), api_key=KEY, rate_limit=10**9)
        self.answers: list[Answer] = []
        self.server = Server(kept(app, self.answers), 1.0, lambda: None)
        self.server.config.load()
        self.loop, self.worries = asyncio.new_event_loop(), Worries()
        self.loop.set_exception_handler(self.worries.of_loop)
        logging.getLogger().addHandler(self.worries)
        atexit.register(self.engine.close, drain=False)

    def take(self, content: bytes) -> bytes:
        """All that one client sends -> all that it reads. Raises for a defect."""
        self.answers.clear()
        self.worries.found.clear()
        sent = self.loop.run_until_complete(self._take(content))
        if self.worries.found:
            raise self.worries.found[0]
        for answer in self.answers:
            answer.check()
        return sent

    async def _take(self, content: bytes) -> bytes:
        line, state = Line(), self.server.server_state
        protocol: Any = self.server.config.http_protocol_class
        line.protocol = protocol(self.server.config, state, {})
        line.protocol.connection_made(line)
        middle = len(content) // 2 if zlib.crc32(content) % 2 else len(content)
        for part in (content[:middle], content[middle:]):
            if part and not line.closing:
                line.protocol.data_received(part)
                await asyncio.sleep(0)
        turns = 0 if leaves(content) else 50
        while not line.lost and (turns := turns - 1) > 0:
            cycle = line.protocol.cycle
            if cycle is None or cycle.response_complete:
                break  # it waits for what will not come
            if cycle.more_body:
                await asyncio.sleep(0)
            elif state.tasks:
                await asyncio.wait(state.tasks, return_when=asyncio.FIRST_COMPLETED)
        line.hang_up()
        while state.tasks:
            await asyncio.wait(state.tasks)
        while any(self.engine.stats()[what] for what in ("running", "waiting")):
            await asyncio.sleep(0.001)
        return bytes(line.sent)


house = functools.cache(House)


def leaves(content: bytes) -> bool:
    """Whether the client hangs up when it has sent this."""
    return zlib.crc32(content) // 2 % 8 == 0


def request(method: str, target: str, headers: Sequence[tuple[str, str]], body: bytes, framing: int | str) -> bytes:
    """The bytes of a request. framing: how many bytes it says that it has, "chunked", or ""."""
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    if framing == "chunked":
        lines.append("Transfer-Encoding: chunked")
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
    elif framing != "":
        lines.append(f"Content-Length: {framing}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + body


OURS = [("Host", "127.0.0.1:8000"), ("Authorization", f"Bearer {KEY}")]
POST = [*OURS, ("Content-Type", "application/json")]


def valid(folder: Path) -> list[bytes]:
    house(folder)
    bodies = [(path, json.dumps(body).encode()) for path, body in BODIES]
    posts = [request("POST", path, POST, body, len(body)) for path, body in bodies]
    chunked = [request("POST", path, [*POST, ("Expect", "100-continue")], b, "chunked") for path, b in bodies[:2]]
    gets = [request("GET", f"{path}?a=b&c", OURS, b"", "") for path in PATHS[:-1]]
    several = [gets[3] + posts[0] + gets[4], posts[2] + posts[5]]
    return [*posts, *chunked, *gets, *several]


def read(folder: Path, content: bytes) -> bytes:
    found = house(folder)
    sent = found.take(content)
    if not leaves(content) and not any(200 <= answer.status < 300 for answer in found.answers):
        raise GraftError(f"refused: {sent[:40]!r}")
    return sent


# Requests that are nearly right ---------------------------------------------------------------------------------------

VISIBLE = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=12)
VALUE = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=20)
METHOD = st.one_of(
    st.sampled_from(["GET", "POST", "POST"]),
    st.sampled_from(["HEAD", "OPTIONS", "PUT", "DELETE", "CONNECT", "TRACE", "get"]),
    VISIBLE,
)
HOSTS = [
    "127.0.0.1",
    "localhost:1",
    "my.name",
    "[::1]:5",
    "[::1",
    "evil.example",
    "127.0.0.1.evil.example",
    "",
    "[",
    ":",
]
ORIGINS = [
    "http://127.0.0.1:8000",
    "null",
    "http://evil.example",
    "http://[",
    "//",
    "http://127.0.0.1:8000@evil.example",
]
HEADER = st.one_of(
    st.sampled_from(HOSTS).map(lambda host: ("Host", host)),
    st.sampled_from(ORIGINS).map(lambda origin: ("Origin", origin)),
    VALUE.map(lambda value: ("Authorization", value)),
    st.sampled_from(
        [
            ("Content-Type", "application/json; charset=utf-16"),
            ("Content-Type", "text/plain"),
            ("Content-Encoding", "gzip"),
            ("Connection", "close"),
            ("Connection", "upgrade"),
            ("Upgrade", "websocket"),
            ("Expect", "100-continue"),
            ("X-Forwarded-For", "10.0.0.1"),
            ("Content-Length", "5"),
            ("Transfer-Encoding", "gzip, chunked"),
        ]
    ),
    st.tuples(st.sampled_from(["Host", "Origin", "Accept", "Cookie", "Range", "If-None-Match", "X"]), VALUE),
    st.tuples(VISIBLE, VALUE),
)
TARGET = st.one_of(
    st.sampled_from([path for path, _ in BODIES] + PATHS),
    st.tuples(st.sampled_from([path for path, _ in BODIES] + PATHS), VISIBLE).map("?".join),
    VISIBLE.map(lambda text: f"/v1/models/{text}"),
    VISIBLE.map(lambda text: f"/{text}"),
    st.sampled_from(["*", "http://evil.example/", "//v1/models", "/../../etc/passwd", "/v1/models/%ff%00", "/%2e%2e/"]),
)
FRAMING = st.sampled_from([None, None, None, "chunked", "", 0, 3, 10**6, 2**63])


def made(some: Sequence[bytes]) -> "st.SearchStrategy[bytes]":
    """A good request with another body; another request altogether; the parts of one, some of them odd."""
    texts = st.one_of(st.text(max_size=40), st.sampled_from(["a" * 5000, "\ud800", "\ue0000\ue001", "<|endoftext|>"]))
    likely = st.one_of(st.integers(0, 5), st.floats(0, 2), st.booleans(), st.none(), texts, ANY)

    def varied(body: dict[str, Any]) -> "st.SearchStrategy[Any]":
        third = st.integers(0, 2).map(lambda n: n == 0)

        def each(key: str) -> "st.SearchStrategy[Any]":
            return third.flatmap(lambda other: likely if other and key != "model" else st.just(body[key]))

        same = st.fixed_dictionaries({key: each(key) for key in body})
        more = st.dictionaries(st.sampled_from(SETTINGS), likely, max_size=2)
        return st.one_of(changed_json(body), st.tuples(same, more).map(lambda pair: {**pair[0], **pair[1]}))

    def posted(path: str, body: dict[str, Any]) -> "st.SearchStrategy[tuple[str, bytes]]":
        return st.tuples(st.just(path), varied(body).map(lambda value: json.dumps(value).encode()))

    bodies = [posted(path, body) for path, body in BODIES]
    posts = st.one_of(bodies)
    good = posts.map(lambda pair: request("POST", pair[0], POST, pair[1], len(pair[1])))

    def odd(parts: tuple[str, str, list[tuple[str, str]], bool, tuple[str, bytes], int | str | None]) -> bytes:
        method, target, headers, ours, (_, body), framing = parts
        headers = [*(POST if ours else []), *headers]
        return request(method, target, headers, body, len(body) if framing is None else framing)

    parts = st.tuples(METHOD, TARGET, st.lists(HEADER, max_size=3), st.booleans(), posts, FRAMING)
    raw = st.one_of(
        st.binary(max_size=60), st.sampled_from([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00"])
    )
    return st.one_of(good, good, parts.map(odd), parts.map(odd), raw, st.tuples(good, parts.map(odd)).map(b"".join))


TARGETS = [Target("HTTP requests", valid, read, made)]
