"""Continue many prompts: in batches of similar length, several of which are decoded together (`decoder.py`).

Left out: beam search, speculative decoding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from graftlm.config.keywords import listed
from graftlm.errors import InputError
from graftlm.inference.decoder import (
    FIRST_CAPACITY,
    MAX_PASS_TOKENS,
    DecodingBatch,
    Row,
    choose_tokens,
    prefill_shared_prefix,
    token_batches,
)
from graftlm.inference.sampling import SamplingParams, check_tokens
from graftlm.models import CausalLM
from graftlm.text.boundary import split_prompt, without_space
from graftlm.text.chat import Chat
from graftlm.text.stream import TextStream
from graftlm.text.tokenizer import Tokenizer

MAX_BATCHES, MAX_CACHED_TOKENS = 4, 8192
"""This many batches are decoded together, unless their prompts have more tokens (200 MB of a small model)."""

ProgressCallback = Callable[[int], object]
"""Called with the number of examples that were just finished."""


@dataclass(frozen=True)
class Batching:
    """How many prompts are computed together, and who follows the progress."""

    batch_size: int = 32
    shared: int | None = None
    """The number of common first tokens to compute once; see `prefill_shared_prefix`."""
    progress: ProgressCallback | None = None
    max_tokens: int = MAX_PASS_TOKENS
    """Padded tokens of a pass, unless a single row has more."""


def generate(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: str | Sequence[str],
    params: SamplingParams | None = None,
    *,
    chat: Chat | None = None,
    batch_size: int = 32,
    **settings: Any,
) -> list[str]:
    """The continuation of each prompt (of one text: a list of one), without the prompt, end-of-text and stop texts.

    White space at the end of a prompt belongs to what follows (`text/boundary.py`), and is not repeated in it.

    params: how to sample; greedy by default. settings: fields of SamplingParams by name, as in max_new_tokens=20.
    chat: each prompt is a user's message in that template, and its continuation is the answer.

    Raises InputError for a wrong setting, and for a prompt that is empty or longer than the model's context.
    """
    prompts, params = listed(prompts), replace(params or SamplingParams(), **settings)
    params = replace(params, stop_token_ids=params.stop_token_ids | (chat or tokenizer).stop_tokens)
    spaces = [""] * len(prompts)
    if chat:
        ids = [chat.encode([("user", prompt)]) for prompt in prompts]
    else:
        split = [split_prompt(prompt, tokenizer) for prompt in prompts]
        ids, spaces = [tokenizer.encode_prompt(prompt) for prompt, _ in split], [space for _, space in split]
    streams = [TextStream(tokenizer, prompt, params.stop, space) for prompt, space in zip(ids, spaces, strict=True)]
    new = generate_ids(model, ids, params, streams=streams, batching=Batching(batch_size))
    texts = [
        without_space(tokenizer.decode(own, prompt), space) for own, prompt, space in zip(new, ids, spaces, strict=True)
    ]
    return [truncate_at_stop(text, params.stop) for text in texts]


def generate_ids(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    streams: Sequence[TextStream] | None = None,
    batching: Batching | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt, in the order given, without the stop token that ended them.

    A continuation ends at a token of `params.stop_token_ids`, after `params.limit` tokens, at the end of the model's
    context, or where its text contains a text of `params.stop` (which its tokens include). A sample depends on the
    seed, the row's index and the step only.

    streams: of each prompt, needed for stop texts.

    Raises InputError for a prompt that is empty or longer than the context, GraftError if the logits are NaN.
    """
    return [row.tokens for row in generate_rows(model, prompts, params, streams=streams, batching=batching)]


def generate_rows(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    streams: Sequence[TextStream] | None = None,
    batching: Batching | None = None,
) -> list[Row]:
    """`generate_ids`, with the stop token that ended each row."""
    _check(prompts, model.max_seq_len)
    check_tokens(params.biases, model.config.vocab_size, "--logit_bias")
    assert streams is not None or not params.stop, "stop texts need streams"
    batching = batching or Batching()
    with eval_mode(model):
        prefix, skip = prefill_shared_prefix(model, prompts, batching.shared)
        each: Sequence[TextStream | None] = streams or [None] * len(prompts)
        rows = [
            Row(prompt[skip:], params, number, min(params.limit, model.max_seq_len - len(prompt)), stream, prompt)
            for number, (prompt, stream) in enumerate(zip(prompts, each, strict=True))
        ]
        for group in decode_groups([len(row.prompt) for row in rows], batching.batch_size):
            unfinished = [rows[number] for number in group if rows[number].limit > 0]
            if unfinished:
                _decode(DecodingBatch(model, prefix), unfinished, batching.batch_size)
            if batching.progress is not None:
                batching.progress(len(group))
    return rows


def _decode(batch: DecodingBatch, rows: Sequence[Row], batch_size: int) -> None:
    """Read the rows' prompts, `batch_size` at a time, and decode all rows together until each is finished."""
    capacity = max(row.capacity for row in rows)
    batch.reserve(len(rows), min(capacity, max(len(row.prompt) for row in rows) + FIRST_CAPACITY))
    tokens: list[int] = []
    for numbers in token_batches(range(len(rows)), [len(row.prompt) for row in rows], batch_size):
        joining = [rows[number] for number in numbers]
        tokens += choose_tokens(batch.join(joining), joining)
    while any(unfinished := [row.append(token) for row, token in zip(batch.rows, tokens, strict=True)]):
        batch.evict(unfinished)
        tokens = choose_tokens(batch.step(), batch.rows)


def decode_groups(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """The indices of the prompts to decode together, by their lengths: at most MAX_BATCHES batches of similar length.

    A group also has at most MAX_CACHED_TOKENS padded prompt tokens, unless it is a single row. Any run of these groups
    forms the same groups again.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    group: list[int] = []
    for batch in token_batches(order, lengths, batch_size, MAX_CACHED_TOKENS):
        rows = len(group) + len(batch)
        if group and (rows > MAX_BATCHES * batch_size or rows * lengths[batch[-1]] > MAX_CACHED_TOKENS):
            yield group
            group = []
        group += batch
    if group:
        yield group


def truncate_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop text."""
    return text[: min((at for end in stop if (at := text.find(end)) >= 0), default=len(text))]


def _check(prompts: Sequence[Sequence[int]], context: int) -> None:
    for number, prompt in enumerate(prompts, start=1):
        which = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        if not len(prompt):
            raise InputError(f"{which} is empty: give at least one token to continue")
        if len(prompt) > context:
            raise InputError(f"{which} has {len(prompt)} tokens, the model reads at most {context}: shorten it")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch the model to evaluation mode without gradients; afterwards every module's mode is restored.

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
