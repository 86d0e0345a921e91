"""Serve requests from many threads on one base model: each chooses an adapter, all are decoded together.

    engine = Engine(load("smollm2-135m"), {"reviews": Path("runs/demo")})
    ticket = engine.submit(Request(prompt=ids, adapter="reviews", temperature=0), on_piece=print)
    ticket.done.result().text

What is unusual here:
- Rows join and leave between two steps (continuous batching; Yu et al. 2022, "Orca"), whatever adapter each asks for
  (`methods/multi_lora.py`). The decoder is the one of `generate`, the label scores are those of `evaluate`.
- A row's answer depends on its own prompt, adapter and seed, and is what `generate` gives for that prompt alone with
  that seed. Only rounding can tell who shared the batch.
- Memory has a bound that is kept by waiting: a request joins when all rows, each as long as the longest may become, fit
  into `max_tokens`. Nothing is kept of a request that has ended.
- One thread computes. What goes wrong there fails the requests at hand, with one line, and the next ones are served.

Left out: a cache of prompts seen before, long prompts read in parts, beam search.

Letters: B rows, V tokens of the vocabulary.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.errors import GraftError, InputError, Overloaded, ShuttingDown, unknown_name_error
from graftlm.exchange.load import Loaded
from graftlm.exchange.serving_adapters import read_adapters
from graftlm.inference.generate import DecodingBatch
from graftlm.inference.requests import (
    CANCELLED,
    CaptureError,
    FinishOutput,
    Request,
    RequestHandle,
    ScoreRequest,
    TokenOutput,
    failure,
)
from graftlm.inference.sampling import greedy, sample_tokens
from graftlm.inference.scoring import score
from graftlm.methods.multi_lora import MultiLoRAModel, stack
from graftlm.text.collate import Example
from graftlm.text.detokenizer import TextStream

MAX_PREFILL_TOKENS = 512
"""Tokens of new prompts, filled up, that are read between two steps: a longer pass would keep the others waiting."""


class Engine:
    """One base model, its adapters, and the one thread that runs them.

    adapters: name -> run folder or adapter folder; LoRA only, of the base's very weights.
    max_rows: requests that are decoded together at most. max_tokens: rows times tokens that the cache has room for at
    most; one request can use all of it. max_waiting: requests that may wait, beyond which `Overloaded` is raised.

    Raises InputError for an adapter that cannot be served on this base.
    """

    def __init__(
        self,
        loaded: Loaded,
        adapters: Mapping[str, Path],
        *,
        max_rows: int = 32,
        max_tokens: int = 16384,
        max_waiting: int = 256,
    ) -> None:
        assert max_rows >= 1 and max_tokens >= 2 and max_waiting >= 1
        found = read_adapters(loaded, adapters)
        self._stack: MultiLoRAModel | None = stack(loaded.model, found) if found else None
        self._model = loaded.model.eval() if self._stack is None else self._stack.model
        self._tokenizer = loaded.tokenizer
        self._max_rows, self._max_tokens, self._max_waiting = max_rows, max_tokens, max_waiting
        self.names = tuple(adapters)
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[RequestHandle] = deque()
        self._asked: deque[ScoreRequest] = deque()
        self._closed = False
        self._counts = {"completed": 0, "cancelled": 0, "failed": 0, "tokens_generated": 0, "max_batch_size_seen": 0}
        self._batch = DecodingBatch(self._model)  # from here on the thread's own
        self._rows: list[RequestHandle] = []
        self._thread = threading.Thread(target=self._work, name="graft-engine", daemon=True)
        self._thread.start()

    # For all threads

    @property
    def max_seq_len(self) -> int:
        """The most tokens that a prompt and its answer may have together."""
        return min(self._model.max_seq_len, self._max_tokens)

    def submit(self, request: Request, on_piece: Callable[[TokenOutput], None] | None = None) -> RequestHandle:
        """Take a request, from any thread. `on_piece` is called on the engine's thread and must return soon.

        An answer ends by "length" where it fills the context. Raises InputError for a request that cannot be answered,
        Busy where too many wait, Closed after `close`.
        """
        self._check(request.prompt, request.adapter, "the prompt")
        room = min(request.max_new_tokens, self.max_seq_len - len(request.prompt))
        if room < 1:
            raise InputError(
                f"the prompt has {len(request.prompt)} tokens and prompt and answer at most "
                f"{self.max_seq_len}: shorten it"
            )
        ticket = RequestHandle(request, room, TextStream(self._tokenizer.decode, request.stop), on_piece)
        self._enqueue(self._waiting, ticket)
        return ticket

    def score(
        self, prompt: Sequence[int], options: Sequence[Sequence[int]], adapter: str | None = None
    ) -> "Future[list[float]]":
        """For each option the sum of its tokens' log-probabilities behind the prompt: what `graft evaluate` scores.

        Raises as `submit`.
        """
        if not options or not all(len(option) for option in options):
            raise InputError("options: give at least one, and each at least one token")
        if not len(prompt):
            raise InputError("the prompt is empty: give at least one token to continue")
        self._check(prompt, adapter, "the prompt")
        for option in options:
            self._check(option, adapter, "an option")
        fed = len(prompt) + max(map(len, options)) - 1  # the last token is predicted, never fed
        if fed > self._model.max_seq_len:
            raise InputError(
                f"prompt and option have {fed + 1} tokens, the model reads at most {self._model.max_seq_len}"
            )
        question = ScoreRequest(tuple(prompt), tuple(map(tuple, options)), adapter, Future())
        question.done.set_running_or_notify_cancel()
        self._enqueue(self._asked, question)
        return question.done

    def stats(self) -> dict[str, Any]:
        """How many requests are running and waiting; were completed, cancelled and failed, with the tokens_generated.

        rows_at_most: the largest batch so far.
        """
        with self._changed:
            waiting = len(self._waiting) + len(self._asked)
            return {"running": len(self._rows), "waiting": waiting, **self._counts}

    def close(self, drain: bool = True) -> None:
        """Refuse what is new; finish what was taken (`drain`), or end it as cancelled; then end the thread.

        May be called again, from any thread; only one of the engine's own callbacks must not wait for the engine.
        """
        with self._changed:
            self._closed = True
            if not drain:
                for ticket in (*self._waiting, *self._rows):
                    ticket.cancel()
                questions = list(self._asked)
                self._asked.clear()
            self._changed.notify_all()
        if not drain:
            for question in questions:
                question.done.set_exception(ShuttingDown("the engine was closed before it could answer"))
        self._thread.join()

    def _check(self, ids: Sequence[int], adapter: str | None, what: str) -> None:
        if adapter is not None and not self.names:
            raise InputError(f"unknown adapter {adapter!r}: there is none, only the base")
        if adapter is not None and adapter not in self.names:
            raise unknown_name_error("adapter", adapter, self.names)
        vocab = self._model.config.vocab_size
        if wrong := [token for token in ids if not 0 <= token < vocab]:
            raise InputError(f"{what} has a token {wrong[0]}: the model's are 0 to {vocab - 1}")

    def _enqueue(self, line: deque[Any], one: RequestHandle | ScoreRequest) -> None:
        with self._changed:
            if self._closed:
                raise ShuttingDown("the engine is closed: it takes no new requests")
            if len(self._waiting) + len(self._asked) >= self._max_waiting:
                raise Overloaded(f"{self._max_waiting} requests are waiting already: ask again later")
            line.append(one)
            self._changed.notify_all()

    # For the engine's thread

    def _work(self) -> None:
        try:
            with torch.no_grad():
                while self._wait():
                    self._step_loop()
        finally:  # where even telling of an error failed: nobody is left to wait for ever
            with self._changed:
                self._closed = True
                left, questions = [*self._rows, *self._waiting], list(self._asked)
            for question in questions:
                question.done.set_exception(GraftError("the engine has ended"))
            for ticket in left:
                self._end(ticket, GraftError("the engine has ended"))

    def _wait(self) -> bool:
        """Wait for work; False when there is none and never will be."""
        with self._changed:
            while not (self._rows or self._waiting or self._asked):
                if self._closed:
                    return False
                self._changed.wait()
        return True

    def _step_loop(self) -> None:
        """One step of all rows; before it new rows join, and some questions are answered."""
        for work in (self._join, self._answer, self._step):
            at_hand: list[Any] = []
            with CaptureError() as caught:
                work(at_hand)
            if caught.error is not None:
                if not at_hand:  # then going on would only meet it again
                    raise caught.error
                self._fail_batch(at_hand, failure(caught.error, "the engine"))

    def _join(self, at_hand: list[Any]) -> None:
        """Read the prompts of those whose turn it is."""
        joining = self._schedule()
        at_hand += [*self._rows, *joining]  # a cache that was half written is of no use to anyone
        if joining:
            with self._using([ticket.request.adapter for ticket in joining]):
                logits = self._batch.join([t.request.prompt for t in joining], [t._max_row_len for t in joining])
            with self._changed:
                self._rows = [*self._rows, *joining]
                self._counts["max_batch_size_seen"] = max(self._counts["max_batch_size_seen"], len(self._rows))
            self._sample_and_emit(joining, logits)

    def _schedule(self) -> list[RequestHandle]:
        """Who may join now, in the order of coming; those who were cancelled meanwhile are ended."""
        joining: list[RequestHandle] = []
        with self._changed:
            cancelled = [ticket for ticket in self._waiting if ticket._cancelled]
            while self._waiting and len(self._rows) + len(joining) < self._max_rows:
                ticket = self._waiting[0]
                if not ticket._cancelled:
                    rows = [*self._rows, *joining, ticket]
                    width = max(len(each.request.prompt) for each in (*joining, ticket))
                    size = DecodingBatch.rows_for(len(rows)) * max(each._max_row_len for each in rows)
                    too_much = joining and (len(joining) + 1) * width > MAX_PREFILL_TOKENS
                    if too_much or (len(rows) > 1 and size > self._max_tokens):
                        break
                    joining.append(ticket)
                self._waiting.popleft()
            self._waiting = deque(ticket for ticket in self._waiting if not ticket._cancelled)
        for ticket in cancelled:
            self._end(ticket, CANCELLED)
        return joining

    def _answer(self, at_hand: list[Any]) -> None:
        """Score the options of the first question, and of those that ask for the same options of the same adapter."""
        with self._changed:
            if not self._asked:
                return
            first = self._asked[0]
            alike = [q for q in self._asked if (q.adapter, q.options) == (first.adapter, first.options)]
            longest = max(len(question.prompt) for question in alike) + max(map(len, first.options))
            at_hand += alike[: max(1, MAX_PREFILL_TOKENS // longest)]
            self._asked = deque(question for question in self._asked if question not in at_hand)
        examples = [Example(q.prompt, (), None, "", "", "the prompt") for q in at_hand]
        with self._using(first.adapter):
            found = score(self._model, examples, first.options, completions=False).labels.tolist()
        for question, scores in zip(at_hand, found, strict=True):
            question.done.set_result(scores)
            self._update_counters("completed")

    def _step(self, at_hand: list[Any]) -> None:
        """One token for every row."""
        at_hand += self._rows
        self._leave([(ticket, CANCELLED) for ticket in self._rows if ticket._cancelled])
        if self._rows:
            with self._using([ticket.request.adapter for ticket in self._rows]):
                logits = self._batch.step([ticket._tokens[-1] for ticket in self._rows])
            self._sample_and_emit(self._rows, logits)

    def _sample_and_emit(self, tickets: Sequence[RequestHandle], logits: Tensor) -> None:
        """Choose each one's next token behind logits [B, V], and tell of it."""
        sums = logits.logsumexp(dim=-1)
        broken = (~sums.isfinite()).tolist()
        if any(broken):  # these rows' own; the others go on
            logits = logits.masked_fill(~sums.isfinite()[:, None], 0)
        tokens = choose(logits, tickets)
        chosen = logits.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
        endings: list[tuple[RequestHandle, FinishOutput]] = []
        for ticket, token, logprob, wrong in zip(tickets, tokens, (chosen - sums).tolist(), broken, strict=True):
            if wrong:
                endings.append((ticket, GraftError("the logits are no numbers: broken weights, or --dtype float16")))
                continue
            piece = ticket._append_token(token, logprob, self._tokenizer.eot)
            if piece.token is not None:
                self._update_counters("tokens_generated")
            if piece.finish_reason is not None:
                endings.append((ticket, piece))
            elif (error := ticket._emit(piece)) is not None:
                endings.append((ticket, error))
        self._leave(endings)

    def _leave(self, endings: Sequence[tuple[RequestHandle, FinishOutput]]) -> None:
        """Take rows out of the batch, and then end their requests."""
        ended = {ticket for ticket, _ in endings}
        if ended:
            slots = self._batch.evict([ticket not in ended for ticket in self._rows])
            with self._changed:
                self._rows = [self._rows[slot] for slot in slots]
        for ticket, ending in endings:
            self._end(ticket, ending)

    def _end(self, ticket: RequestHandle, ending: FinishOutput) -> None:
        """End a request: count it, tell of its last piece, and fulfil what was promised."""
        if ticket.done.done():
            return
        error = ending if isinstance(ending, GraftError) else ticket._emit(ending)
        if isinstance(ending, GraftError):
            ticket._emit(TokenOutput("", None, None, "error"))
        if error is not None:
            self._update_counters("failed")
            ticket.done.set_exception(error)
        elif isinstance(ending, TokenOutput) and ending.finish_reason is not None:
            self._update_counters("cancelled" if ending is CANCELLED else "completed")
            ticket.done.set_result(ticket._completed(ending.finish_reason))

    def _update_counters(self, what: str) -> None:
        with self._changed:
            self._counts[what] += 1

    def _fail_batch(self, at_hand: Sequence[Any], error: GraftError) -> None:
        """Fail what was at hand; rows begin again with an empty batch."""
        tickets = [one for one in at_hand if isinstance(one, RequestHandle)]
        for question in (one for one in at_hand if isinstance(one, ScoreRequest) and not one.done.done()):
            self._update_counters("failed")
            question.done.set_exception(error)
        if tickets:
            self._batch = DecodingBatch(self._model)
            with self._changed:
                self._rows = []
            for ticket in tickets:
                self._end(ticket, error)

    def _using(self, adapters: Sequence[str | None] | str | None) -> AbstractContextManager[None]:
        return nullcontext() if self._stack is None else self._stack.adapters_for(adapters)


def choose(logits: Tensor, tickets: Sequence[RequestHandle]) -> list[int]:
    """Each row's next token behind logits [B, V]; rows with the same settings are sampled together."""
    groups: dict[tuple[float, int, float], list[int]] = {}
    for row, ticket in enumerate(tickets):
        asked = ticket.request
        settings = (
            (0.0, 0, 1.0) if asked.temperature == 0 else (asked.temperature, asked.top_k or 0, asked.top_p or 1.0)
        )
        groups.setdefault(settings, []).append(row)
    tokens = [0] * len(tickets)
    for (temperature, top_k, top_p), rows in groups.items():
        part = logits if len(groups) == 1 else logits[rows]
        u = [tickets[row]._uniform() for row in rows]
        found = greedy(part) if temperature == 0 else sample_tokens(part, u, temperature, top_k, top_p)
        for row, token in zip(rows, found, strict=True):
            tokens[row] = token
    return tokens
