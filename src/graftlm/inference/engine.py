"""Serve requests from many threads on one base model: each chooses an adapter, all are decoded together.

Letters: B rows, V tokens of the vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftlm.exchange.load import Loaded


@dataclass(frozen=True)
class Request:
    """What to continue, with which adapter, and how."""

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


@dataclass(frozen=True)
class Piece:
    """What became of one token, or of the request."""

    text: str
    """New text: never half a character, never the beginning of what may become a stop text."""
    token: int | None
    logprob: float | None
    """Of the token under the model, at temperature 1."""
    finish: str | None
    """None while it goes on; "stop" (end of text, or a stop text), "length", "cancelled", "error"."""


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str
    prompt_tokens: int


class Ticket:
    """A request that was taken."""

    done: Future[Completion]

    def cancel(self) -> None:
        """End it soon; `done` then gives what there is, with finish "cancelled"."""
        raise NotImplementedError


class Engine:
    """One base model, its adapters, and the one thread that runs them."""

    names: tuple[str, ...]

    def __init__(
        self,
        loaded: Loaded,
        adapters: Mapping[str, Path],
        *,
        max_rows: int = 32,
        max_tokens: int = 16384,
        max_waiting: int = 256,
    ) -> None:
        raise NotImplementedError

    def submit(self, request: Request, on_piece: Callable[[Piece], None] | None = None) -> Ticket:
        """Take a request, from any thread. `on_piece` is called on the engine's thread and must return soon.

        Raises InputError for a request that cannot be answered, Busy where too many wait, Closed after `close`.
        """
        raise NotImplementedError

    def score(
        self, prompt: Sequence[int], options: Sequence[Sequence[int]], adapter: str | None = None
    ) -> Future[list[float]]:
        """For each option the sum of its tokens' log-probabilities behind the prompt. Raises as `submit`."""
        raise NotImplementedError

    def stats(self) -> dict[str, Any]:
        """How many requests are running, waiting and completed, tokens_generated, and rows_at_most in one batch."""
        raise NotImplementedError

    def close(self, drain: bool = True) -> None:
        """Refuse what is new; finish what was taken (`drain`), or end it as cancelled; then end the thread."""
        raise NotImplementedError
