"""Tiny random models in float64, and a tokenizer of a few words, for the tests of inference."""

import re
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from graftlm.inference.sampling import SamplingParams
from graftlm.models import CausalLM, ModelConfig
from graftlm.text.tokenizer import Tokenizer
from tiny import random_model

VOCAB, CONTEXT = 48, 40


def tiny(family: str, seed: int = 0) -> CausalLM:
    """Two layers in float64; weights large enough that the likeliest token changes from step to step."""
    gpt2 = family == "gpt2"
    shape = ModelConfig(
        family="gpt2" if gpt2 else "llama",
        num_layers=2,
        num_heads=4,
        num_kv_heads=4 if gpt2 else 2,
        hidden_size=32,
        head_dim=8,
        intermediate_size=64,
        vocab_size=VOCAB,
        max_positions=CONTEXT,
        norm_eps=1e-5,
        qkv_bias=gpt2,
        out_bias=gpt2,
        mlp_bias=gpt2,
    )
    return random_model(shape, seed=seed, std=0.3, dtype=torch.float64)


def ragged(lengths: Sequence[int], shared: int = 0, seed: int = 1) -> list[list[int]]:
    """Random prompts of these lengths, none with token 0, the first `shared` tokens the same in all."""
    rng = torch.Generator().manual_seed(seed)
    head = torch.randint(1, VOCAB, (shared,), generator=rng).tolist()
    rows = [torch.randint(1, VOCAB, (n - shared,), generator=rng).tolist() for n in lengths]
    return [head + row for row in rows]


def full_logits(model: CausalLM, ids: Sequence[int]) -> Tensor:
    """The plain way: one row, no past, every position: [T, V]."""
    with torch.no_grad():
        return model(torch.tensor([list(ids)]))[0]


def stopping(max_new_tokens: int, eot: int | Collection[int], **settings: Any) -> SamplingParams:
    """Sampling settings with these tokens as the end of text."""
    ends = frozenset({eot} if isinstance(eot, int) else eot)
    return SamplingParams(max_new_tokens=max_new_tokens, stop_token_ids=ends, **settings)


class Words:
    """A tokenizer whose tokens are words with the space before them; unknown words share one token."""

    eot, stop_tokens = 0, frozenset({0})
    vocab_size = VOCAB
    splits_at_spaces = False

    def __init__(self, *words: str) -> None:
        self.words = ["<eot>", *words]
        assert len(self.words) <= VOCAB

    def encode(self, text: str) -> list[int]:
        return [self.words.index(word) if word in self.words else VOCAB - 1 for word in text.split()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    encode_prompt, encode_prompts = encode, encode_batch

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return self.encode(text), [match.span() for match in re.finditer(r"\S+", text)]

    def has_text(self, index: int) -> bool:
        return True

    def is_fallback(self, index: int) -> bool:
        return False

    def decode(self, ids: Sequence[int], prompt: Sequence[int] = ()) -> str:
        return "".join(f" {self.words[n] if n < len(self.words) else 'hm'}" for n in ids)


def words(*known: str) -> Tokenizer:
    return cast(Tokenizer, Words(*known))
