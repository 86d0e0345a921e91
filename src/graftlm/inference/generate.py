"""Continue prompts: read each once (prefill), then one token a step with a cache of keys and values (decode).

What is unusual here:
- Rows are padded on the right only. Each row decodes at its own position, so a ragged batch needs no mask and no
  position correction, and gives what its rows give alone.
- What all prompts begin with is run once for the whole call and never copied (a shared `KVCache`).
- A row that has ended leaves the `Batch`: the cache is compacted in place, and a step costs what its living rows cost.
  Rows may join it too, which is how a server (`engine.py`) decodes requests that came at different times together.
- Prompts are read a batch at a time and continued several batches together: a step of decoding reads every weight for
  one token a row, so it costs little more for more rows.
- The cache grows as rows do: a large `max_new_tokens` costs nothing where rows end early.
- The sample of a row is a pure function of (seed, row, step) and of the row's own logits (`sampling.py`).

Left out: beam search, repetition penalties, speculative decoding.

Letters: B rows, T tokens at hand, V tokens of the vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.inference.sampling import counter_based_uniform, greedy, sample_tokens
from graftlm.models import CausalLM, KVCache
from graftlm.text.chat import Chat
from graftlm.text.collate import common_prefix_length
from graftlm.text.tokenizer import Tokenizer

MIN_SHARED_PREFIX = 4
"""A common prefix of fewer tokens is not worth a forward pass of its own."""

FIRST_ROOM = 32
"""New tokens that the cache has room for at first; when they are used up the room is doubled."""

TOGETHER, MOST_CACHED = 4, 8192
"""So many batches are decoded together, unless their prompts have more tokens than this (200 MB of a small model)."""

Stop = Callable[[Sequence[int]], bool]
ProgressCallback = Callable[[int], object]
"""Called with the number of examples that were just finished."""


def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    chat: Chat | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: ProgressCallback | None = None,
) -> list[str]:
    """The continuation of each prompt, without the prompt and without the end-of-text token.

    With `chat` each prompt is what a user says in that template, and what is made is the answer, up to the end of its
    turn. See `generate_ids` for the settings. Raises InputError for an empty prompt or one longer than the context.
    """
    ids = [chat.encode([("user", prompt)]) if chat else tokenizer.encode(prompt, bos=True) for prompt in prompts]
    new = generate_ids(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        eot=chat.stop_tokens if chat else tokenizer.eot,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    return [tokenizer.decode(tokens) for tokens in new]


def generate_ids(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eot: int | Collection[int],
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    stop: Stop | None = None,
    shared: int | None = None,
    progress: ProgressCallback | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt, in the order given, without the end-of-text token `eot` that ended them.

    A continuation ends at `eot` (or at any of several: `Chat.ends`), after `max_new_tokens`, or where prompt and
    continuation fill the model's context.
    temperature: divides the logits; 0 takes the likeliest token (greedy), and the other settings then mean nothing.
    top_k: sample among the k likeliest tokens; 0 means all. top_p: and of these, among the fewest likeliest that
    together have this probability (Holtzman et al. 2020, "nucleus sampling"); 1 means all.
    seed: with it, a row's index and the step, the sample is decided.
    stop: called with a row's new tokens after each step; True ends the row, which keeps them.
    shared: see `prefill_shared_prefix`.

    Raises InputError for an empty prompt or one longer than the context, GraftError where the logits are NaN.
    """
    assert max_new_tokens >= 1 and batch_size >= 1 and temperature >= 0 and top_k >= 0 and 0 < top_p <= 1
    _check(prompts, model.max_seq_len)
    ends = frozenset({eot} if isinstance(eot, int) else eot)

    def pick(logits: Tensor, rows: Sequence[int], step: int) -> list[int]:
        if temperature == 0:
            return greedy(logits)
        return sample_tokens(
            logits, [counter_based_uniform(seed, row, step) for row in rows], temperature, top_k, top_p
        )

    new: list[list[int]] = [[] for _ in prompts]
    with eval_mode(model):
        past, skip = prefill_shared_prefix(model, prompts, shared)
        for rows in decode_groups([len(prompt) - skip for prompt in prompts], batch_size):
            room = [min(max_new_tokens, model.max_seq_len - len(prompts[row])) for row in rows]
            own = [prompts[row][skip:] for row in rows]
            continuations = _continue(model, own, rows, past, room, ends, pick, batch_size, stop)
            for row, tokens in zip(rows, continuations, strict=True):
                new[row] = tokens
            if progress is not None:
                progress(len(rows))
    return new


def decode_groups(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Rows to decode together, by their prompts' own lengths: up to TOGETHER batches, below MOST_CACHED tokens.

    Rows are sorted by length, so that neighbours differ little and there is less padding. Any run of these groups, on
    its own, makes the same groups again.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    group: list[int] = []
    for start in range(0, len(order), batch_size):
        batch = list(order[start : start + batch_size])
        rows = len(group) + len(batch)
        if group and (rows > TOGETHER * batch_size or rows * max(lengths[row] for row in batch) > MOST_CACHED):
            yield group
            group = []
        group += batch
    if group:
        yield group


def _continue(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    names: Sequence[int],
    shared: Sequence[KVCache],
    room: Sequence[int],
    eot: Collection[int],
    pick: Callable[[Tensor, Sequence[int], int], list[int]],
    batch_size: int,
    stop: Stop | None,
) -> list[list[int]]:
    """At most `room` tokens for each of the B prompts, which are read `batch_size` at a time and decoded together.

    `names` are the rows' numbers in the whole call.
    """
    new: list[list[int]] = [[] for _ in prompts]
    live = [row for row in range(len(prompts)) if room[row] > 0]
    if not live:
        return new
    # The last token that a row samples is never fed and needs no place.
    ends = {row: len(prompts[row]) + room[row] - 1 for row in live}
    batch = DecodingBatch(model, shared)
    batch.reserve(len(live), min(max(ends.values()), max(len(prompts[row]) for row in live) + FIRST_ROOM))
    tokens: list[int] = []
    for start in range(0, len(live), batch_size):
        rows = live[start : start + batch_size]
        logits = batch.join([prompts[row] for row in rows], [ends[row] for row in rows])
        tokens += pick(logits, [names[row] for row in rows], 0)
    step = 0
    while True:
        for row, token in zip(live, tokens, strict=True):
            if token not in eot:
                new[row].append(token)
        goes_on = [
            token not in eot and len(new[row]) < room[row] and not (stop and stop(new[row]))
            for row, token in zip(live, tokens, strict=True)
        ]
        if not any(goes_on):
            return new
        slots = batch.evict(goes_on)
        live, tokens = [live[slot] for slot in slots], [tokens[slot] for slot in slots]
        logits = batch.step(tokens)
        step += 1
        tokens = pick(logits, [names[row] for row in live], step)


class DecodingBatch:
    """Rows that are decoded together, and their cache: rows join behind the others and leave from anywhere.

    shared: what stands before every row. The cache is one block of memory for as many rows and tokens as were reserved;
    a step reads of it only the rows there are, up to the longest one's tokens.
    """

    def __init__(self, model: CausalLM, shared: Sequence[KVCache] = ()) -> None:
        self._model, self._shared = model, shared
        self._cache = KVCache.cache(model.config, 0, 0, model.device, model.dtype)
        self.lengths: list[int] = []
        """How many tokens each row holds."""
        self._ends: list[int] = []

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def reserved(self) -> tuple[int, int]:
        """The rows, and the tokens of each, that there is memory for."""
        return self._cache.keys[0].shape[0], self._cache.size

    @staticmethod
    def rows_for(rows: int) -> int:
        """How many rows it makes room for when so many are needed: a power of two, so that few joins copy the cache."""
        return 1 << (rows - 1).bit_length()

    def reserve(self, rows: int, tokens: int) -> None:
        """Make room for so many rows of so many tokens, no fewer than there are; what they hold is copied."""
        held = (slice(len(self)), slice(None), slice(max(self.lengths, default=0)))
        for tensors in (self._cache.keys, self._cache.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_zeros(rows, old.shape[1], tokens, old.shape[3])
                tensors[layer][held] = old[held]

    def join(self, prompts: Sequence[Sequence[int]], ends: Sequence[int]) -> Tensor:
        """Read B prompts as new rows, which will hold `ends` tokens at most; the logits [B, V] behind each prompt."""
        ids, lengths = right_pad(prompts, self._model.device)
        first, width = len(self), ids.shape[1]
        self._ends += ends
        self._ensure_capacity(first + len(prompts), width, FIRST_ROOM)
        part = self._part(slice(first, first + len(prompts)), width)
        last = torch.arange(len(prompts), device=ids.device) * width + lengths - 1
        logits = self._model(ids, past=self._shared, keep=part, at=last)
        self.lengths += map(len, prompts)
        return logits

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Feed each of the B rows its token; the logits [B, V] behind it."""
        longest = max(self.lengths) + 1
        self._ensure_capacity(len(self), longest, longest)
        part = self._part(slice(len(self)), longest)
        ids = torch.tensor(tokens, device=self._model.device)[:, None]
        logits = self._model(ids, past=[*self._shared, part], keep=part)[:, 0]
        self.lengths = [length + 1 for length in self.lengths]
        return logits

    def evict(self, stays: Sequence[bool]) -> list[int]:
        """Drop rows; returns which old row each new row is. Without rows the memory is given back."""
        slots = compact(self._part(slice(len(self)), max(self.lengths)), stays)
        self.lengths = [self.lengths[slot] for slot in slots]
        self._ends = [self._ends[slot] for slot in slots]
        if not slots:
            self.reserve(0, 0)
        return slots

    def _ensure_capacity(self, rows: int, tokens: int, spare: int) -> None:
        """Make room where there is none: for more rows, and for `spare` more tokens as far as the rows want them."""
        has_rows, has_tokens = self.reserved
        most = max(self._ends)
        if rows > has_rows or tokens > has_tokens:
            self.reserve(
                self.rows_for(rows) if rows > has_rows else min(has_rows, self.rows_for(rows)),
                min(most, tokens + spare) if tokens > has_tokens else min(most, has_tokens),
            )

    def _part(self, rows: slice, tokens: int) -> KVCache:
        """Views of some rows, up to so many tokens; rows that are only joining hold none yet."""
        lengths = self.lengths[rows] or [0] * (rows.stop - rows.start)
        keys, values = ([t[rows, :, :tokens] for t in tensors] for tensors in (self._cache.keys, self._cache.values))
        return KVCache(keys, values, torch.tensor(lengths, device=self._model.device))


def compact(cache: KVCache, stays: Sequence[bool]) -> list[int]:
    """Drop rows of a cache in place: the last rows that stay move into the places of those that go.

    Returns which old row each new row is. Only as many rows are copied as there are holes to fill; the tensors become
    views of their first rows.
    """
    assert cache.lengths is not None
    n = sum(stays)
    slots = list(range(n))
    holes = [row for row in range(n) if not stays[row]]
    movers = [row for row in range(n, len(stays)) if stays[row]]
    for hole, mover in zip(holes, movers, strict=True):
        slots[hole] = mover
    if n < len(stays):
        for tensors in (cache.keys, cache.values):
            for layer, tensor in enumerate(tensors):
                tensor[holes] = tensor[movers]
                tensors[layer] = tensor[:n]
        cache.lengths = cache.lengths[torch.tensor(slots, dtype=torch.long, device=cache.lengths.device)]
    return slots


def _check(prompts: Sequence[Sequence[int]], context: int) -> None:
    for number, prompt in enumerate(prompts, start=1):
        which = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        if not len(prompt):
            raise InputError(f"{which} is empty: give at least one token to continue")
        if len(prompt) > context:
            raise InputError(f"{which} has {len(prompt)} tokens, the model reads at most {context}: shorten it")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode and without gradients; after it, every module's mode is as before.

    Not `inference_mode`: a tensor that a module keeps from it could never take part in training again.
    """
    before = {module: module.training for module in model.modules()}
    if any(before.values()):
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before.items():  # parents first, and each `train` reaches the children
            if module.training != training:
                module.train(training)


def shared_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens of all prompts are worth a forward pass of their own; each keeps at least its last."""
    length = common_prefix_length(prompts) if len(prompts) > 1 else 0
    return length if length >= MIN_SHARED_PREFIX else 0


def prefill_shared_prefix(
    model: CausalLM, prompts: Sequence[Sequence[int]], length: int | None = None
) -> tuple[tuple[KVCache, ...], int]:
    """What all prompts begin with, as a past that was run once, and how many tokens it is; nothing where it is 0.

    length: `shared_prefix_length` of them; another where they are some of many prompts, or to share nothing.
    """
    length = shared_prefix_length(prompts) if length is None else length
    if not length:
        return (), 0
    segment = KVCache()
    model.hidden_states(torch.tensor([list(prompts[0][:length])], device=model.device), keep=segment)
    return (segment,), length


def right_pad(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Token ids [B, T], filled up with zeros on the right, and the rows' lengths [B]. The zeros mean nothing."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    return ids, torch.tensor([len(row) for row in rows], device=device)
