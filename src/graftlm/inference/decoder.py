"""The batched decoder: read prompts once (prefill), then one token per row and step with a KV cache (decode).

- One pass of the C++ program (`models/decode_kernels.py`) feeds each row what it has not read: a prompt, or one token.
- Without the program rows are right-padded, and prompts are read in passes of their own. Each row decodes at its own
  position, so a ragged batch needs no mask and no position correction, and computes what each row computes alone.
- The common prefix of all prompts is computed once per call and never copied (a shared `KVCache`).
- A finished row leaves the batch: the cache is compacted in place, and a step costs what its unfinished rows cost.
  Rows may also join between steps (continuous batching), which the server's engine (`engine.py`) does.
- The cache grows with its rows: a large `max_new_tokens` costs nothing where rows end early.

Letters: B rows, T tokens of a pass, V tokens of the vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from graftlm.inference.sampling import SamplingParams, adjust_logits, next_tokens
from graftlm.models import CausalLM, KVCache
from graftlm.models.decode_kernels import decode_program
from graftlm.text.collate import common_prefix_length
from graftlm.text.stream import TextStream

MIN_SHARED_PREFIX = 4
"""A common prefix of fewer tokens is not worth a forward pass of its own."""
FIRST_CAPACITY = 32
"""New tokens per row that the cache first has capacity for; when they are used up, the capacity doubles."""
MAX_PASS_TOKENS = 4096
"""Padded tokens of a pass without gradient, unless a single row has more. Such a pass keeps one layer's activations, so
it takes less memory than a training pass of an eighth of them (--microbatch_tokens 512) in 8 layers or more."""
MAX_PROGRAM_TOKENS = 1024
"""Tokens of a pass of the C++ program (`decode_kernels.py`); what one row has beyond them is read in the next pass."""


class Row:
    """A sequence in the decoder: its prompt, its settings and its new tokens.

    number: with seed and step it decides the row's samples. limit: the maximum number of new tokens. stream: finds the
    stop texts, if the row has any. context: the prompt with what precedes it (a shared prefix), if anything does.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        number: int,
        limit: int,
        stream: TextStream | None = None,
        context: Sequence[int] | None = None,
    ) -> None:
        self.prompt, self.params, self.number, self.limit, self.stream = prompt, params, number, limit, stream
        self.context = prompt if context is None else context
        self.tokens: list[int] = []
        self.stop_token: int | None = None
        """The stop token that ended it, which is not in `tokens`."""

    @property
    def capacity(self) -> int:
        """Cache positions that the row needs at most: its last new token is never fed."""
        return len(self.prompt) + max(self.limit, 1) - 1

    def append(self, token: int) -> bool:
        """Take the next token; False if it ends the row."""
        if token in self.params.stop_token_ids:
            self.stop_token = token
            return False
        self.tokens.append(token)
        if self.stream is not None:
            self.stream.add(token)
        return len(self.tokens) < self.limit and (self.stream is None or not self.stream.stopped)


class DecodingBatch:
    """Rows that are decoded together, and their KV cache: new rows join at the end, finished ones leave anywhere.

    prefix: what precedes every row's prompt. using: what surrounds a pass of these rows. The cache is one block of
    memory of as many rows and tokens as were reserved; a step reads only the rows in use, up to the length of the
    longest one.
    """

    def __init__(
        self,
        model: CausalLM,
        prefix: Sequence[KVCache] = (),
        using: Callable[[Sequence[Row]], AbstractContextManager[None]] = lambda rows: nullcontext(),
    ) -> None:
        self._model, self._prefix, self._program, self._using = model, prefix, decode_program(model), using
        self._cache = model.empty_cache(0, 0)
        self.rows: list[Row] = []
        self._lengths: list[int] = []  # tokens in the cache, by row

    @property
    def reserved(self) -> tuple[int, int]:
        """The rows, and the tokens of each, that memory is allocated for."""
        return self._cache.keys[0].shape[0], self._cache.size

    @staticmethod
    def rows_for(rows: int) -> int:
        """The rows to allocate for this many: a power of two, so that few joins copy the cache."""
        return 1 << (rows - 1).bit_length()

    def reserve(self, rows: int, tokens: int) -> None:
        """Allocate memory for this many rows and tokens, no fewer than in use; the contents are copied."""
        used = (slice(len(self._lengths)), slice(None), slice(max(self._lengths, default=0)))
        for tensors in (self._cache.keys, self._cache.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_zeros(rows, old.shape[1], tokens, old.shape[3])
                tensors[layer][used] = old[used]

    def add(self, rows: Sequence[Row], known: Sequence[KVCache | None] = ()) -> None:
        """New rows, whose prompts are read in the next step. known: keys and values of each prompt's first tokens."""
        first, every = len(self.rows), [*self.rows, *rows]
        longest = max(len(row.prompt) for row in rows)
        self._ensure_capacity(len(every), longest, FIRST_CAPACITY, max(row.capacity for row in every))
        for row, cache in enumerate(known, start=first):
            if cache is not None:
                for own, read in ((self._cache.keys, cache.keys), (self._cache.values, cache.values)):
                    for mine, its in zip(own, read, strict=True):
                        mine[row, :, : cache.size] = its[0]
        self._lengths += [0 if cache is None else cache.size for cache in known or [None] * len(rows)]
        self.rows = every

    def join(self, rows: Sequence[Row]) -> Tensor:
        """Read the prompts of B new rows; the logits [B, V] after each."""
        self.add(rows)
        return self._feed(len(self.rows) - len(rows), len(self.rows))

    def step(self) -> Tensor:
        """Feed each of the B rows what it has not read, its prompt or its newest token; the logits [B, V] after it."""
        return self._feed(0, len(self.rows))

    def _feed(self, first: int, end: int) -> Tensor:
        """The logits after what these rows have not read."""
        if self._program is None:
            passes = list(self._padded_passes(first, end))
            return torch.cat([self._model.logits(self.read(start, stop)[:, 0]) for start, stop in passes])
        longest = max(len(row.prompt) + len(row.tokens) for row in self.rows)
        self._ensure_capacity(len(self.rows), longest, longest, max(row.capacity for row in self.rows))
        logits = torch.empty(end - first, self._model.config.vocab_size)
        row = first
        while row < end:
            fed, left = list[list[int]](), MAX_PROGRAM_TOKENS
            while left and row + len(fed) < end:
                fed.append(self._unread(row + len(fed))[:left])
                left -= len(fed[-1])
            self._run_program(row, fed, logits[row - first : row - first + len(fed)])
            row += len(fed)
            row -= bool(self._unread(row - 1))  # the rest of the last one is fed in the next pass
        return logits

    def _run_program(self, first: int, fed: Sequence[Sequence[int]], logits: Tensor) -> None:
        """Feed these tokens to as many rows, from the first on; the logits [B, V] after them are written."""
        assert self._program is not None
        rows = slice(first, first + len(fed))
        cache = KVCache(self._cache.keys, self._cache.values, torch.tensor(self._lengths[rows]))
        if first:
            cache.keys, cache.values = ([t[rows] for t in tensors] for tensors in (cache.keys, cache.values))
        ids = torch.tensor([token for tokens in fed for token in tokens])
        with self._using(self.rows[rows]):
            self._program.step(ids, self._prefix, cache, [len(tokens) for tokens in fed], logits)
        self._lengths[rows] = [length + len(tokens) for length, tokens in zip(self._lengths[rows], fed, strict=True)]

    def read(self, first: int, end: int, every: bool = False) -> Tensor:
        """Feed B rows what they have not read, without the program; the hidden states [B, 1, d] after the last token.

        every: instead those [B, T, d] after every token that is read.
        """
        starts = self._lengths[first:end]
        ids, lengths = right_pad([self._unread(row) for row in range(first, end)], self._model.device)
        tokens = max(starts) + ids.shape[1]
        self._ensure_capacity(len(self.rows), tokens, tokens, max(row.capacity for row in self.rows))
        part = self._part(slice(first, end), tokens, starts)
        past = [*self._prefix, part] if any(starts) else self._prefix
        with self._using(self.rows[first:end]):
            hidden = self._model.hidden_states(ids, past, part, None if every else lengths[:, None] - 1)
        self._lengths[first:end] = [start + length for start, length in zip(starts, lengths.tolist(), strict=True)]
        return hidden

    def _padded_passes(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Runs of rows, all new or none, that are read in one pass, padded to the longest.

        The padding comes after what each row has read, and must fit into the cache.
        """
        most, start = max(row.capacity for row in self.rows), first
        longest = widest = 0
        for row in range(first, end):
            length, width = self._lengths[row], len(self._unread(row))
            same = bool(self.rows[row].tokens) == bool(self.rows[start].tokens)
            if row > start and not (same and max(longest, length) + max(widest, width) <= most):
                yield start, row
                start, longest, widest = row, 0, 0
            longest, widest = max(longest, length), max(widest, width)
        yield start, end

    def _unread(self, row: int) -> list[int]:
        """The tokens that a row has not read: of its prompt, or its newest one."""
        length, own = self._lengths[row], self.rows[row]
        read = length - len(own.prompt)
        return own.tokens[read:] if read >= 0 else [*own.prompt[length:], *own.tokens]

    def evict(self, stays: Sequence[bool]) -> list[int]:
        """Drop rows; returns the old index of each remaining row. Without rows the memory is freed."""
        slots = compact(self._part(slice(len(self.rows)), max(self._lengths), self._lengths), stays)
        self._lengths = [self._lengths[slot] for slot in slots]
        self.rows = [self.rows[slot] for slot in slots]
        if not slots:
            self.reserve(0, 0)
        return slots

    def _ensure_capacity(self, rows: int, tokens: int, extra: int, most: int) -> None:
        """Reserve memory where it is missing: for more rows, and for `extra` more tokens, `most` at the most."""
        has_rows, has_tokens = self.reserved
        if rows > has_rows or tokens > has_tokens:
            self.reserve(
                self.rows_for(rows) if rows > has_rows else min(has_rows, self.rows_for(rows)),
                min(most, tokens + extra) if tokens > has_tokens else min(most, has_tokens),
            )

    def tokens_of(self, row: int) -> list[int]:
        """The tokens that a row has read."""
        return [*self.rows[row].prompt, *self.rows[row].tokens][: self._lengths[row]]

    def cache_of(self, row: int) -> KVCache:
        """Their keys and values; views, until rows leave."""
        return self._part(slice(row, row + 1), self._lengths[row], [self._lengths[row]])

    def _part(self, rows: slice, tokens: int, lengths: Sequence[int]) -> KVCache:
        """Views of some rows of these lengths, up to this many tokens."""
        keys, values = ([t[rows, :, :tokens] for t in tensors] for tensors in (self._cache.keys, self._cache.values))
        return KVCache(keys, values, torch.tensor(lengths, device=self._model.device))


def choose_tokens(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """The next token of each of these rows, from logits [B, V]."""
    params = [row.params for row in rows]
    logits = adjust_logits(logits, params, [(row.context, row.tokens) for row in rows])
    return next_tokens(logits, params, [(row.number, len(row.tokens)) for row in rows])


def compact(cache: KVCache, stays: Sequence[bool]) -> list[int]:
    """Drop rows of a cache in place: the last rows that stay move into the places of those that leave.

    Returns the old index of each remaining row. Only as many rows are copied as there are gaps; the tensors become
    views of their first rows.
    """
    assert cache.lengths is not None
    n = sum(stays)
    slots = list(range(n))
    gaps = [row for row in range(n) if not stays[row]]
    movers = [row for row in range(n, len(stays)) if stays[row]]
    for gap, mover in zip(gaps, movers, strict=True):
        slots[gap] = mover
    if n < len(stays):
        for tensors in (cache.keys, cache.values):
            for layer, tensor in enumerate(tensors):
                tensor[gaps] = tensor[movers]
                tensors[layer] = tensor[:n]
        cache.lengths = cache.lengths[torch.tensor(slots, dtype=torch.long, device=cache.lengths.device)]
    return slots


def token_batches(
    order: Iterable[int], lengths: Sequence[int], batch_size: int, max_tokens: int = MAX_PASS_TOKENS
) -> Iterator[list[int]]:
    """Rows in this order, in batches of at most `batch_size` rows and `max_tokens` padded tokens, or of one row."""
    batch, width = list[int](), 0
    for row in order:
        widest = max(width, lengths[row])
        if batch and (len(batch) == batch_size or (len(batch) + 1) * widest > max_tokens):
            yield batch
            batch, widest = [], lengths[row]
        batch.append(row)
        width = widest
    if batch:
        yield batch


def shared_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many common first tokens are worth a forward pass of their own; each prompt keeps at least its last token."""
    length = common_prefix_length(prompts) if len(prompts) > 1 else 0
    return length if length >= MIN_SHARED_PREFIX else 0


def prefill_shared_prefix(
    model: CausalLM, prompts: Sequence[Sequence[int]], length: int | None = None
) -> tuple[tuple[KVCache, ...], int]:
    """The cache of the prompts' first `length` tokens, which they share, computed once; and that length.

    length: None for `shared_prefix_length`; given where the prompts are part of a larger set, or 0 to share nothing.
    """
    length = shared_prefix_length(prompts) if length is None else length
    if not length:
        return (), 0
    cache = KVCache()
    model.hidden_states(torch.tensor([list(prompts[0][:length])], device=model.device), cache=cache)
    return (cache,), length


def right_pad(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token ids [B, T], padded with zeros on the right, and the rows' lengths [B]."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    return ids, torch.tensor([len(row) for row in rows], device=device)
