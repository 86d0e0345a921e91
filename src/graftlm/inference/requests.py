"""Requests to the engine (`engine.py`), their outputs, and the handles that the caller waits on.

A handle holds all state of one request (seed, tokens, text), so a completion depends on nothing else. An error of one
request ends that request only.
"""

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from graftlm.errors import GraftError, InputError
from graftlm.inference.decoder import Row
from graftlm.inference.grammar import Grammar
from graftlm.inference.sampling import SamplingParams
from graftlm.text.stream import TextStream


@dataclass(frozen=True)
class Request:
    """A prompt to continue. Raises InputError if it is empty."""

    prompt: Sequence[int]
    """Token ids."""
    params: SamplingParams = field(default_factory=SamplingParams)
    adapter: str | None = None
    """None: the base model."""
    space: str = ""
    """White space that ends the prompt's text and is not among its tokens: the answer does not repeat it."""
    grammar: Grammar | None = None
    """The texts that the answer may be; None: any."""
    top_logprobs: int = 0
    """How many of the most likely tokens are reported in the place of each token."""
    prompt_logprobs: bool = False
    """Whether the log-probabilities of the prompt's tokens are reported."""
    prompt_only: bool = False
    """Whether the request ends with its prompt, without an answer."""

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise InputError("the prompt is empty: give at least one token to continue")


@dataclass(frozen=True)
class TokenLogprob:
    """A token and its log-probability under the model: at temperature 1, before penalties and filters."""

    token: int
    logprob: float | None
    """None for the first token of a prompt."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens in its place, in descending order, as many as the request asks for."""


@dataclass(frozen=True)
class TokenOutput:
    """The output of one step of a request, or its end."""

    text: str
    """New text: never part of a character, never the beginning of a possible stop text."""
    token: int | None
    """None for a stop token, and if the request ended for another reason than a token."""
    logprob: TokenLogprob | None
    """Of the token, a stop token too."""
    finish_reason: str | None
    """None while it continues; "stop" (a stop token or text, the grammar's end), "length", "cancelled", "error"."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """In the first output, if asked for: of all tokens of the prompt."""


@dataclass(frozen=True)
class Completion:
    """A finished request."""

    text: str
    """The text of all outputs."""
    tokens: tuple[int, ...]
    """Including those of a stop text as far as they were generated, without the stop token."""
    logprobs: tuple[TokenLogprob, ...]
    """Of the tokens and, last, of the stop token, if one ended it."""
    finish_reason: str
    prompt_tokens: int
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


CANCELLED = TokenOutput("", None, None, "cancelled")
FinishOutput = TokenOutput | GraftError
"""The last output, or the error that ended the request."""


class RequestHandle(Row):
    """A submitted request and its row in the decoder. `done` returns the completion, or raises a GraftError."""

    def __init__(
        self, request: Request, limit: int, stream: TextStream, on_output: Callable[[TokenOutput], None] | None
    ) -> None:
        super().__init__(request.prompt, request.params, 0, limit)  # row 0, so its samples are those of `generate`
        self.request = request
        self.grammar = request.grammar.start(request.params.stop_token_ids) if request.grammar is not None else None
        self.done: Future[Completion] = Future()
        self.done.set_running_or_notify_cancel()  # it is cancelled by `cancel` only, not through the future
        self.cancel_requested = False
        self._stream, self._on_output = stream, on_output
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()  # set when the prompt has been read, if asked for
        self._logprobs: list[TokenLogprob] = []
        self._text: list[str] = []

    def cancel(self) -> None:
        """End it before the next step; `done` then returns what was generated so far. From any thread."""
        self.cancel_requested = True

    # Called by the engine, on its thread.

    def _append_token(self, new: TokenLogprob, stop_tokens: Collection[int]) -> TokenOutput:
        """Take the next token; the output of this step."""
        prompt = () if self.tokens else self.prompt_logprobs
        if self.request.prompt_only:
            return TokenOutput("", None, None, "length", prompt)
        self._logprobs.append(new)
        if new.token in stop_tokens or new.token in self.params.stop_token_ids:
            return TokenOutput(self._stream.finish(), None, new, "stop", prompt)
        self.tokens.append(new.token)
        if self.grammar is not None:
            self.grammar.accept(new.token)
        complete = self.grammar is not None and self.grammar.complete
        text, finish_reason = self._stream.add(new.token), None
        if not self._stream.stopped and (complete or len(self.tokens) == self.limit):
            text, finish_reason = text + self._stream.finish(), "stop" if complete else "length"
        return TokenOutput(text, new.token, new, "stop" if self._stream.stopped else finish_reason, prompt)

    def _emit(self, output: TokenOutput) -> GraftError | None:
        """Pass an output to the caller; an error of its callback ends this request."""
        self._text.append(output.text)
        if self._on_output is None:
            return None
        with CaptureError() as caught:
            self._on_output(output)
        return None if caught.error is None else as_graft_error(caught.error, "on_output")

    def _completed(self, finish_reason: str) -> Completion:
        tokens, logprobs = tuple(self.tokens), tuple(self._logprobs)
        text = "".join(self._text)
        return Completion(text, tokens, logprobs, finish_reason, len(self.prompt), self.prompt_logprobs)


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """Options to score after a prompt; without options, a text whose mean hidden state is asked for."""

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    adapter: str | None
    skip: int
    done: "Future[list[float]]"


class CaptureError:
    """Keeps any exception raised within it. The engine's thread has no caller, so errors must reach the requests."""

    error: Exception | None = None

    def __enter__(self) -> "CaptureError":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


def as_graft_error(error: Exception, what: str) -> GraftError:
    """The error in one line for the caller; the original is its cause."""
    if isinstance(error, GraftError):
        return error
    message = " ".join(str(error).split())[:200]
    failed = GraftError(f"{what} failed: {type(error).__name__}{': ' if message else ''}{message}")
    failed.__cause__ = error
    return failed
