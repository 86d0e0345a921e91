"""An engine without a model, whose answers and failures a test decides; and a server in a thread of this process."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftlm.errors import Overloaded
from graftlm.inference.requests import Completion, Request, RequestHandle, TokenLogprob, TokenOutput
from graftlm.serving.app import make_app
from graftlm.serving.server import Server, listening, url_of
from graftlm.serving.service import ServedModel, Service
from graftlm.text.boundary import without_space
from graftlm.text.stream import TextStream
from graftlm.text.template import load_template
from graftlm.text.tokenizer import Tokenizer
from tiny import byte_tokenizer


class FakeTicket(RequestHandle):
    def __init__(self) -> None:
        self.done: Future[Completion] = Future()
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()


class FakeEngine:
    """Answers each request, on a thread of its own, with the tokens of `answer`, `pause` seconds apart."""

    names = ("one", "two")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        """As it was made."""
        self.answer, self.pause, self.finish = "fine film", 0.0, "stop"
        self.embedded = 0.5  # the last number of the base's embeddings
        self.ends = False  # whether an end-of-text token is reported, too
        self.others: list[int] = []  # tokens that are likelier than any other
        self.refuse: Exception | None = None
        self.fails: Exception | None = None
        self.tickets: list[FakeTicket] = []
        self.requests: list[Request] = []
        self.scored: list[tuple[Sequence[int], Any, str | None]] = []
        self.most = 10**9  # requests that are taken
        self.hold = 10**9  # tokens that a request has, until this is raised

    def submit(self, request: Request, on_output: Callable[[TokenOutput], None] | None = None) -> RequestHandle:
        if self.refuse is not None:
            raise self.refuse
        if len(self.tickets) >= self.most:
            raise Overloaded("too many requests are waiting: try again later")
        ticket = FakeTicket()
        self.tickets.append(ticket)
        self.requests.append(request)
        threading.Thread(target=self._work, args=(request, ticket, on_output), daemon=True).start()
        return ticket

    def _work(self, request: Request, ticket: FakeTicket, on_output: Callable[[TokenOutput], None] | None) -> None:
        tokens = self.tokenizer.encode(self.answer)[: 0 if request.prompt_only else request.params.max_new_tokens]
        stream, told = TextStream(self.tokenizer, request.prompt, space=request.space), list[int]()
        finish = self.finish
        prompt: tuple[TokenLogprob, ...] = ()
        if request.prompt_logprobs:
            prompt = tuple(self._logprob(request, token, number) for number, token in enumerate(request.prompt))
        for token in tokens:
            while len(told) >= self.hold and not ticket.cancelled.wait(0.01):
                pass
            if ticket.cancelled.wait(self.pause) if self.pause else ticket.cancelled.is_set():
                finish = "cancelled"
                break
            if self.fails is not None and told:
                ticket.done.set_exception(self.fails)
                return
            told.append(token)
            if on_output:
                logprob, own = self._logprob(request, token), () if told[1:] else prompt
                on_output(TokenOutput(stream.add(token), token, logprob, None, own))
        end = self._logprob(request, self.tokenizer.eot) if self.ends and finish == "stop" else None
        if on_output:
            on_output(TokenOutput(stream.finish(), None, end, finish, () if told else prompt))
        logprobs = [self._logprob(request, token) for token in told] + ([end] if end else [])
        text = without_space(self.tokenizer.decode(told), request.space)
        result = Completion(text, tuple(told), tuple(logprobs), finish, len(request.prompt), prompt)
        ticket.done.set_result(result)

    def _logprob(self, request: Request, token: int, place: int = 1) -> TokenLogprob:
        """-0.5, or None for the first token of a prompt; after `others` the token itself is the likeliest."""
        ranked = [(other, -0.1 * n) for n, other in enumerate(self.others)] + [(token, -0.5)]
        return TokenLogprob(token, -0.5 if place else None, tuple(ranked[: request.top_logprobs] if place else ()))

    def score(
        self, prompt: Sequence[int], options: Sequence[Sequence[int]], adapter: str | None = None, skip: int = 0
    ) -> "Future[list[float]]":
        if self.refuse is not None:
            raise self.refuse
        self.scored.append((prompt, options, adapter))
        found: Future[list[float]] = Future()
        found.set_result([-1.0 - number - (adapter is not None) * number for number in range(len(options))])
        return found

    def embed(self, text: Sequence[int], adapter: str | None = None) -> "Future[list[float]]":
        """The number of tokens, and a number of the model's."""
        found: Future[list[float]] = Future()
        found.set_result([float(len(text)), self.embedded if adapter is None else -0.1])
        return found

    def stats(self) -> dict[str, Any]:
        return {"running": 0}

    def close(self, drain: bool = True) -> None:
        for ticket in self.tickets:
            ticket.cancel()


def service(
    folder: Path, *adapters: str, room: int = 200, max_tokens: int = 64, control: Sequence[str] = ()
) -> tuple[Service, FakeEngine]:
    """A service on a fake engine and a byte-level tokenizer, with these control tokens, in `folder`."""
    folder.mkdir(exist_ok=True)
    byte_tokenizer(folder, *control)
    tokenizer = Tokenizer.from_folder(folder)
    engine = FakeEngine(tokenizer)
    template = load_template("Review: {text}\nIs it:")
    models = {"base": ServedModel("base", None, template, room)}
    models |= {name: ServedModel(name, name, template, room) for name in adapters}
    engine_: Any = engine
    return Service(engine_, tokenizer, models, max_tokens), engine


@contextmanager
def serving(made: Service, grace: float = 5.0, **gate: Any) -> Iterator[str]:
    """A real server on loopback, on a thread of this process; yields its url."""
    with listening("127.0.0.1", 0) as listener:
        url = url_of("127.0.0.1", listener)
        app = make_app(made, host="127.0.0.1", **gate)
        server = Server(app, grace, lambda: made.engine.close(drain=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield url
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def eventually(what: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether it comes true in time."""
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.01)
    return what()
