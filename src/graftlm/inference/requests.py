"""What is asked of the engine (`engine.py`) and what it answers: requests, their pieces, and the tickets for them.

What is unusual here: a ticket keeps all that belongs to one request (its seed, tokens and text), so that an answer
depends on nothing else. What goes wrong with it is its own end, and is told in one line.
"""

import secrets
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from graftlm.errors import GraftError, InputError
from graftlm.inference.sampling import counter_based_uniform
from graftlm.text.detokenizer import TextStream


@dataclass(frozen=True)
class Request:
    """What to continue, with which adapter, and how. Raises InputError for a setting that means nothing."""

    prompt: Sequence[int]
    """Token ids, not empty."""
    adapter: str | None = None
    """None: the base as it is."""
    max_new_tokens: int = 64
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token, and the other settings then mean nothing."""
    top_k: int | None = None
    """Sample among the k likeliest tokens; None: all."""
    top_p: float | None = None
    """And of these, among the fewest likeliest that together have this probability; None: all."""
    seed: int | None = None
    """Decides the sample, whoever shares the batch; None: a seed of its own, drawn anew."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    stop_tokens: Collection[int] = ()
    """Tokens that end it beside the end of text, as the end of a turn does (`Chat.ends`); they are not part of it."""

    def __post_init__(self) -> None:
        checks = (
            ("prompt", len(self.prompt) > 0, "at least one token to continue"),
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("stop", all(self.stop), "texts that are not empty"),
        )
        for field, fine, wanted in checks:
            if not fine:
                raise InputError(f"{field} is {getattr(self, field)!r}: must be {wanted}")


@dataclass(frozen=True)
class TokenOutput:
    """What became of one token, or of the request."""

    text: str
    """New text: never half a character, never the beginning of what may become a stop text."""
    token: int | None
    """None for the end of text, and where the request ended for another reason than a token."""
    logprob: float | None
    """Of the token under the model, at temperature 1."""
    finish_reason: str | None
    """None while it goes on; "stop" (end of text, or a stop text), "length", "cancelled", "error"."""


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    """All pieces' text."""
    tokens: tuple[int, ...]
    """With those of a stop text as far as they were made, without the end of text."""
    logprobs: tuple[float, ...]
    finish_reason: str
    prompt_tokens: int


CANCELLED = TokenOutput("", None, None, "cancelled")
FinishOutput = TokenOutput | GraftError
"""The last piece, or what went wrong."""


class RequestHandle:
    """A request that was taken. `done` gives the whole answer, or raises the GraftError that became of it."""

    def __init__(
        self, request: Request, room: int, stream: TextStream, on_piece: Callable[[TokenOutput], None] | None
    ) -> None:
        self.request = request
        self.done: Future[Completion] = Future()
        self.done.set_running_or_notify_cancel()  # it is ended by `cancel` below, and not behind the engine's back
        self._room, self._stream, self._on_piece = room, stream, on_piece
        self._seed = secrets.randbits(62) if request.seed is None else request.seed
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._text: list[str] = []
        self._cancelled = False

    def cancel(self) -> None:
        """End it before the next step; `done` then gives what there is, with finish "cancelled". From any thread."""
        self._cancelled = True

    # What follows is called by the engine, on its thread.

    @property
    def _max_row_len(self) -> int:
        """The most tokens that its row will hold: the last one that it samples is never fed."""
        return len(self.request.prompt) + self._room - 1

    def _uniform(self) -> float:
        """The number that decides its next token: what `generate` takes for its first row."""
        return counter_based_uniform(self._seed, 0, len(self._tokens))

    def _append_token(self, token: int, logprob: float, eot: int) -> TokenOutput:
        """What the next token makes of it."""
        if token == eot or token in self.request.stop_tokens:
            return TokenOutput(self._stream.finish(), None, None, "stop")
        self._tokens.append(token)
        self._logprobs.append(logprob)
        text, finish = self._stream.add(token), None
        if not self._stream.stopped and len(self._tokens) == self._room:
            text, finish = text + self._stream.finish(), "length"
        return TokenOutput(text, token, logprob, "stop" if self._stream.stopped else finish)

    def _emit(self, piece: TokenOutput) -> GraftError | None:
        """Give a piece to who asked; what that raises is this request's own end."""
        self._text.append(piece.text)
        if self._on_piece is None:
            return None
        with CaptureError() as caught:
            self._on_piece(piece)
        return None if caught.error is None else failure(caught.error, "on_piece")

    def _completed(self, finish: str) -> Completion:
        tokens, logprobs = tuple(self._tokens), tuple(self._logprobs)
        return Completion("".join(self._text), tokens, logprobs, finish, len(self.request.prompt))


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """Options to score behind a prompt."""

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    adapter: str | None
    done: "Future[list[float]]"


class CaptureError:
    """Keeps what is raised within it, whatever it is.

    Above the engine's thread there is nobody who could be told, so whoever catches must tell the requests.
    """

    error: Exception | None = None

    def __enter__(self) -> "CaptureError":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


def failure(error: Exception, what: str) -> GraftError:
    """One line for who asked; the error itself is its cause."""
    if isinstance(error, GraftError):
        return error
    said = " ".join(str(error).split())[:200]
    failed = GraftError(f"{what} failed: {type(error).__name__}{': ' if said else ''}{said}")
    failed.__cause__ = error
    return failed
