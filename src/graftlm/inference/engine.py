"""The server's scheduler: requests from many threads, each with its own adapter, decoded together on one base model.

    engine = Engine(load("smollm2-135m"), {"reviews": Path("runs/demo")})
    handle = engine.submit(Request(ids, SamplingParams(max_new_tokens=20), "reviews"), on_output=print)
    handle.done.result().text

- Rows join and leave between two steps (continuous batching; Yu et al. 2022, "Orca"), regardless of their adapters
  (`methods/multi_lora.py`). The decoder is that of `generate`, and label scores are those of `evaluate`.
- A completion depends on its own prompt, adapter and seed only, and equals what `generate` returns for that prompt
  alone with that seed, up to rounding.
- Memory is bounded: a request joins when all rows, each as long as the longest may become, fit into `max_tokens`.
- A prompt that begins like one that was read before, with the same adapter, is read from there on (`prefix_cache.py`).
  Nothing else is kept of finished requests.
- One thread computes. An error there fails the requests it concerns, with one line; the next ones are served.

Left out: chunked prefill, beam search.

Letters: B rows, V tokens of the vocabulary.
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.errors import GraftError, InputError, Overloaded, ShuttingDown, unknown_name_error
from graftlm.exchange.load import ModelBundle, read_adapters
from graftlm.inference.decoder import DecodingBatch, Row, choose_tokens
from graftlm.inference.grammar import constrain
from graftlm.inference.prefix_cache import PrefixCache, ReadText
from graftlm.inference.requests import (
    CANCELLED,
    CaptureError,
    FinishOutput,
    Request,
    RequestHandle,
    ScoreRequest,
    TokenLogprob,
    TokenOutput,
    as_graft_error,
)
from graftlm.inference.sampling import check_tokens
from graftlm.inference.scoring import mean_hidden_states, score_labels
from graftlm.methods.multi_lora import MultiLoRAModel, stack
from graftlm.models import KVCache
from graftlm.text.collate import Example
from graftlm.text.stream import TextStream

MAX_SCORED_TOKENS = 256
"""Logits of this many prompt tokens are computed at once; at V = 50,000 they take 50 MB."""
MAX_PREFILL_TOKENS = 512
"""Tokens of new prompts, padded, that are read in one step: a longer pass would keep the running rows waiting."""


class Engine:
    """One base model, its adapters, and the one thread that runs them.

    adapters: name -> run folder or adapter folder; LoRA only, trained on exactly this base.
    max_rows: the maximum number of requests decoded together. max_tokens: the maximum of rows times tokens in the
    cache; one request may use all of it. max_waiting: the maximum number of waiting requests. prefix_tokens: the
    maximum of tokens that are kept of texts that were read; None: an eighth of max_tokens.

    Raises InputError for an adapter that cannot be served on this base.
    """

    def __init__(
        self,
        loaded: ModelBundle,
        adapters: Mapping[str, Path],
        *,
        max_rows: int = 32,
        max_tokens: int = 16384,
        max_waiting: int = 256,
        prefix_tokens: int | None = None,
    ) -> None:
        assert max_rows >= 1 and max_tokens >= 2 and max_waiting >= 1
        layers = read_adapters(loaded, adapters)
        self._stack: MultiLoRAModel | None = stack(loaded.model, layers) if layers else None
        self._model = loaded.model.eval() if self._stack is None else self._stack.model
        self._tokenizer = loaded.tokenizer
        self._max_rows, self._max_tokens, self._max_waiting = max_rows, max_tokens, max_waiting
        self.names = tuple(adapters)
        self._changed = threading.Condition()  # guards the fields below
        self._waiting: deque[RequestHandle] = deque()
        self._score_requests: deque[ScoreRequest] = deque()
        self._closed = False
        self._counts = {"completed": 0, "cancelled": 0, "failed": 0, "tokens_generated": 0, "max_batch_size_seen": 0}
        self._counts["prompt_tokens_read"] = 0
        self._rows: list[RequestHandle] = []
        self._batch = DecodingBatch(self._model, using=self._using)  # used by the engine's thread only, as is the next
        self._prefixes = PrefixCache(max_tokens // 8 if prefix_tokens is None else prefix_tokens)
        self._thread = threading.Thread(target=self._work, name="graft-engine", daemon=True)
        self._thread.start()

    # For all threads

    @property
    def max_seq_len(self) -> int:
        """The maximum number of tokens of a prompt and its completion together."""
        return min(self._model.max_seq_len, self._max_tokens)

    def submit(self, request: Request, on_output: Callable[[TokenOutput], None] | None = None) -> RequestHandle:
        """Take a request, from any thread. `on_output` is called on the engine's thread and must return soon.

        A completion that fills the context ends with "length". Raises InputError for a wrong request, Overloaded if too
        many are waiting, ShuttingDown after `close`.
        """
        self._check(request.prompt, request.adapter, "the prompt")
        self._check(request.params.biases, request.adapter, "logit_bias")
        free = self.max_seq_len - len(request.prompt)
        limit = 0 if request.prompt_only else min(request.params.limit, free)
        if free < 0 or (limit < 1 and not request.prompt_only):
            raise InputError(
                f"the prompt has {len(request.prompt)} tokens and prompt and answer at most "
                f"{self.max_seq_len}: shorten it"
            )
        stream = TextStream(self._tokenizer, request.prompt, request.params.stop, request.space)
        handle = RequestHandle(request, limit, stream, on_output)
        self._enqueue(handle)
        return handle

    def score(
        self, prompt: Sequence[int], options: Sequence[Sequence[int]], adapter: str | None = None, skip: int = 0
    ) -> "Future[list[float]]":
        """For each option the sum of its tokens' log-probabilities after the prompt, as in `graft evaluate`.

        skip: how many first tokens of each option are not scored.

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
        return self._submit_score(ScoreRequest(tuple(prompt), tuple(map(tuple, options)), adapter, skip, Future()))

    def embed(self, text: Sequence[int], adapter: str | None = None) -> "Future[list[float]]":
        """The mean of the last hidden states over a text's tokens. Raises as `submit`."""
        if not len(text):
            raise InputError("the text is empty: give at least one token")
        self._check(text, adapter, "the text")
        if len(text) > self._model.max_seq_len:
            raise InputError(f"the text has {len(text)} tokens, the model reads at most {self._model.max_seq_len}")
        return self._submit_score(ScoreRequest(tuple(text), (), adapter, 0, Future()))

    def _submit_score(self, request: ScoreRequest) -> "Future[list[float]]":
        request.done.set_running_or_notify_cancel()
        self._enqueue(request)
        return request.done

    def stats(self) -> dict[str, Any]:
        """Numbers of requests running, waiting, completed, cancelled and failed, and of tokens_generated.

        max_batch_size_seen: the largest batch so far. prompt_tokens_read: without those that were known.
        """
        with self._changed:
            waiting = len(self._waiting) + len(self._score_requests)
            return {"running": len(self._rows), "waiting": waiting, **self._counts}

    def close(self, drain: bool = True) -> None:
        """Refuse new requests; finish those taken (`drain`), or cancel them; then end the thread.

        May be called again, from any thread, but not from the engine's own callbacks.
        """
        with self._changed:
            self._closed = True
            cancelled: list[ScoreRequest] = []
            if not drain:
                for handle in (*self._waiting, *self._rows):
                    handle.cancel()
                cancelled = list(self._score_requests)
                self._score_requests.clear()
            self._changed.notify_all()
        for request in cancelled:
            request.done.set_exception(ShuttingDown("the engine was closed before it could answer"))
        self._thread.join()

    def _check(self, ids: Iterable[int], adapter: str | None, what: str) -> None:
        if adapter is not None and not self.names:
            raise InputError(f"unknown adapter {adapter!r}: there is none, only the base")
        if adapter is not None and adapter not in self.names:
            raise unknown_name_error("adapter", adapter, self.names)
        check_tokens(ids, self._model.config.vocab_size, what)

    def _enqueue(self, request: RequestHandle | ScoreRequest) -> None:
        with self._changed:  # the engine's thread replaces the queues, so they are looked up in here
            if self._closed:
                raise ShuttingDown("the engine is closed: it takes no new requests")
            if len(self._waiting) + len(self._score_requests) >= self._max_waiting:
                raise Overloaded(f"{self._max_waiting} requests are waiting already: ask again later")
            if isinstance(request, RequestHandle):
                self._waiting.append(request)
            else:
                self._score_requests.append(request)
            self._changed.notify_all()

    # For the engine's thread

    def _work(self) -> None:
        try:
            with torch.no_grad():
                while self._wait():
                    self._step_loop()
        finally:  # also if reporting an error failed: no caller may wait forever
            with self._changed:
                self._closed = True
                handles, requests = [*self._rows, *self._waiting], list(self._score_requests)
            for request in requests:
                request.done.set_exception(GraftError("the engine has ended"))
            for handle in handles:
                self._finish(handle, GraftError("the engine has ended"))

    def _wait(self) -> bool:
        """Wait for work; False if there is none and the engine is closed."""
        with self._changed:
            while not (self._rows or self._waiting or self._score_requests):
                if self._closed:
                    return False
                self._changed.wait()
        return True

    def _step_loop(self) -> None:
        """New rows join, some score requests are answered, and all rows take one step."""
        for work in (self._join, self._score, self._step):
            affected: list[Any] = []  # the requests to fail if an error is raised
            with CaptureError() as caught:
                work(affected)
            if caught.error is not None:
                if not affected:  # the same error would follow again
                    raise caught.error
                self._fail_batch(affected, as_graft_error(caught.error, "the engine"))

    def _join(self, affected: list[Any]) -> None:
        """Take in the requests that join now; their prompts are read in the next step."""
        joining = self._schedule()
        affected += [*self._rows, *joining]  # a partly written cache is lost for all rows
        if not joining:
            return
        running = [
            ReadText(handle.request.adapter, self._batch.tokens_of(row), partial(self._batch.cache_of, row))
            for row, handle in enumerate(self._rows)
        ]
        known = [  # a prompt whose log-probabilities are asked for is read from its beginning
            None
            if each.request.prompt_logprobs
            else self._prefixes.find(each.request.adapter, each.prompt[:-1], running)
            for each in joining
        ]
        found = sorted(zip(joining, known, strict=True), key=lambda pair: (_is_scored(pair[0]), _size(pair[1])))
        self._batch.add([handle for handle, _ in found], [cache for _, cache in found])
        with self._changed:
            self._rows = [*self._rows, *(handle for handle, _ in found)]
            self._counts["max_batch_size_seen"] = max(self._counts["max_batch_size_seen"], len(self._rows))
            self._counts["prompt_tokens_read"] += sum(len(handle.prompt) - _size(cache) for handle, cache in found)
        if scored := [handle for handle in self._rows if _is_scored(handle) and handle in joining]:
            self._read_scored(scored)

    def _read_scored(self, handles: Sequence[RequestHandle]) -> None:
        """Read the prompts of the last rows, whose log-probabilities are asked for."""
        first = len(self._rows) - len(handles)
        hidden = self._batch.read(first, len(self._rows), every=True)
        for handle, own in zip(handles, hidden, strict=True):
            handle.prompt_logprobs = self._score_prompt(handle, own)
        last = [len(handle.prompt) - 1 for handle in handles]
        self._sample_and_emit(handles, self._model.logits(hidden[range(len(handles)), last]))

    def _score_prompt(self, handle: RequestHandle, hidden: Tensor) -> tuple[TokenLogprob, ...]:
        """The log-probabilities of a prompt's tokens from the hidden states [T, d] after each."""
        first, *tokens = handle.prompt
        found = [TokenLogprob(first, None)]
        for start in range(0, len(tokens), MAX_SCORED_TOKENS):
            part = tokens[start : start + MAX_SCORED_TOKENS]
            logits = self._model.logits(hidden[start : start + len(part)])
            top = [handle.request.top_logprobs] * len(part)
            found += token_logprobs(logits, logits.logsumexp(dim=-1), part, top)
        return tuple(found)

    def _schedule(self) -> list[RequestHandle]:
        """The requests that may join now, first come, first served; cancelled ones are finished."""
        joining: list[RequestHandle] = []
        with self._changed:
            cancelled = [handle for handle in self._waiting if handle.cancel_requested]
            self._waiting = deque(handle for handle in self._waiting if handle not in cancelled)
            while self._waiting and len(self._rows) + len(joining) < self._max_rows:
                handle = self._waiting[0]
                rows = [*self._rows, *joining, handle]
                width = max(len(each.prompt) for each in (*joining, handle))
                size = DecodingBatch.rows_for(len(rows)) * max(row.capacity for row in rows)
                prefill_full = joining and (len(joining) + 1) * width > MAX_PREFILL_TOKENS
                if prefill_full or (len(rows) > 1 and size > self._max_tokens):
                    break
                joining.append(self._waiting.popleft())
        for handle in cancelled:
            self._finish(handle, CANCELLED)
        return joining

    def _score(self, affected: list[Any]) -> None:
        """Answer the first score request, and those with the same options and adapter."""
        with self._changed:
            if not self._score_requests:
                return
            first = self._score_requests[0]
            similar = [r for r in self._score_requests if (r.adapter, r.options) == (first.adapter, first.options)]
            longest = max(len(request.prompt) for request in similar) + max(map(len, first.options), default=0)
            affected += similar[: max(1, MAX_PREFILL_TOKENS // longest)]
            self._score_requests = deque(request for request in self._score_requests if request not in affected)
        examples = [Example(each.prompt, (), None, "", "", "the prompt", skip=each.skip) for each in affected]
        with self._with_adapters(first.adapter):
            if first.options:
                rows = score_labels(self._model, examples, first.options)
            else:
                rows = mean_hidden_states(self._model, [each.prompt for each in affected])
        for request, scores in zip(affected, rows.tolist(), strict=True):
            request.done.set_result(scores)
            self._count("completed")

    def _step(self, affected: list[Any]) -> None:
        """One token for every row."""
        affected += self._rows
        self._leave([(handle, CANCELLED) for handle in self._rows if handle.cancel_requested])
        if self._rows:
            self._sample_and_emit(self._rows, self._batch.step())

    def _sample_and_emit(self, handles: Sequence[RequestHandle], logits: Tensor) -> None:
        """Choose each row's next token from logits [B, V], and pass it to the caller."""
        sums = logits.logsumexp(dim=-1)
        broken = (~sums.isfinite()).tolist()
        if any(broken):  # these rows fail, the others continue
            logits = logits.masked_fill(~sums.isfinite()[:, None], 0)
        tokens = choose_tokens(constrain(logits, [handle.grammar for handle in handles]), handles)
        chosen = token_logprobs(logits, sums, tokens, [handle.request.top_logprobs for handle in handles])
        finished: list[tuple[RequestHandle, FinishOutput]] = []
        for handle, new, failed in zip(handles, chosen, broken, strict=True):
            prompt = () if handle.tokens else handle.prompt_logprobs
            if failed or not all(math.isfinite(each.logprob or 0) for each in prompt):
                error = GraftError("the logits are NaN or infinite: broken weights, or an overflow in --dtype float16")
                finished.append((handle, error))
                continue
            if handle.grammar is not None and handle.grammar.stuck:
                finished.append((handle, InputError("the answer's grammar has no finite text: change the JSON schema")))
                continue
            output = handle._append_token(new, self._tokenizer.stop_tokens)
            if output.token is not None:
                self._count("tokens_generated")
            if output.finish_reason is not None:
                finished.append((handle, output))
            elif (callback_error := handle._emit(output)) is not None:
                finished.append((handle, callback_error))
        self._leave(finished)

    def _leave(self, finished: Sequence[tuple[RequestHandle, FinishOutput]]) -> None:
        """Take rows out of the batch, and then finish their requests."""
        handles = {handle for handle, _ in finished}
        if handles:
            self._keep_texts([handle for handle, output in finished if not isinstance(output, GraftError)])
            slots = self._batch.evict([handle not in handles for handle in self._rows])
            with self._changed:
                self._rows = [self._rows[slot] for slot in slots]
        for handle, output in finished:
            self._finish(handle, output)

    def _keep_texts(self, handles: Sequence[RequestHandle]) -> None:
        """Keep what rows have read, before they leave."""
        for handle in handles:
            row = self._rows.index(handle)
            self._prefixes.add(handle.request.adapter, self._batch.tokens_of(row), self._batch.cache_of(row))

    def _finish(self, handle: RequestHandle, output: FinishOutput) -> None:
        """Count the request, pass on its last output, and resolve its future."""
        if handle.done.done():
            return
        error = output if isinstance(output, GraftError) else handle._emit(output)
        if isinstance(output, GraftError):
            handle._emit(TokenOutput("", None, None, "error"))
        if error is not None:
            self._count("failed")
            handle.done.set_exception(error)
        elif isinstance(output, TokenOutput) and output.finish_reason is not None:
            self._count("cancelled" if output is CANCELLED else "completed")
            handle.done.set_result(handle._completed(output.finish_reason))

    def _count(self, what: str) -> None:
        with self._changed:
            self._counts[what] += 1

    def _fail_batch(self, affected: Sequence[Any], error: GraftError) -> None:
        """Fail the affected requests; if rows are among them, an empty batch replaces theirs."""
        handles = [request for request in affected if isinstance(request, RequestHandle)]
        for request in affected:
            if isinstance(request, ScoreRequest) and not request.done.done():
                self._count("failed")
                request.done.set_exception(error)
        if handles:
            self._batch = DecodingBatch(self._model, using=self._using)
            with self._changed:
                self._rows = []
            for handle in handles:
                self._finish(handle, error)

    def _using(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        return self._with_adapters([row.request.adapter for row in rows if isinstance(row, RequestHandle)])

    def _with_adapters(self, adapters: Sequence[str | None] | str | None) -> AbstractContextManager[None]:
        return nullcontext() if self._stack is None else self._stack.adapters_for(adapters)


def token_logprobs(logits: Tensor, sums: Tensor, tokens: Sequence[int], top: Sequence[int]) -> list[TokenLogprob]:
    """The log-probability of each of these tokens, and of the `top` most likely ones in its place.

    From logits [N, V] and `sums` [N], their logsumexp.
    """
    chosen = logits.gather(-1, torch.tensor([*tokens], device=logits.device)[:, None])[:, 0] - sums
    values, ids = logits.topk(min(max(top), logits.shape[-1]), dim=-1)
    ranked = zip((values - sums[:, None]).tolist(), ids.tolist(), strict=True)
    return [
        TokenLogprob(token, value, tuple((i, v) for i, v in zip(own_ids, own, strict=True) if v > -math.inf)[:count])
        for token, value, count, (own, own_ids) in zip(tokens, chosen.tolist(), top, ranked, strict=True)
    ]


def _is_scored(handle: RequestHandle) -> bool:
    return handle.request.prompt_logprobs


def _size(cache: KVCache | None) -> int:
    return 0 if cache is None else cache.size
