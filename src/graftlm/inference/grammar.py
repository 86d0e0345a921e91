"""Answers of a given form: which tokens may follow, so that the text matches a JSON schema (the llguidance package).

    grammars = Grammars(tokenizer)
    engine.submit(Request(ids, grammar=grammars.json_schema({"type": "object"})))

At each step the logits of all other tokens become -inf, before temperature and the other sampling settings. Where the
text may end, so may the tokens that end it; where it must end, the answer is complete. Special tokens are never part
of a text.

Left out: grammars other than JSON schemas.

Letters: B rows, V tokens of the vocabulary.
"""

import json
from collections.abc import Sequence
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

WHITE_SPACE = r"(\x20|\x0A[\x20\x09]{0,20})?"
"""What may separate the parts of a JSON text. Without a limit, small models write nothing else."""
MAX_NUMBER = 2**53
"""Of a schema: integers up to here are exact for every JSON parser (RFC 8259)."""


class Grammars:
    """Makes grammars for the texts of one tokenizer, whose vocabulary is read once, when the first is made."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def json_schema(self, schema: dict[str, Any]) -> "Grammar":
        """JSON that the schema accepts, its properties in the order of the schema.

        Raises InputError for a schema that is wrong, that no text can match, or that uses what llguidance does not
        support. Nothing is ever left out of a schema, and no reference fetched.
        """
        from llguidance import LLMatcher, LLParserLimits

        _refuse_numbers(schema)
        options: Any = {"whitespace_flexible": True, "whitespace_pattern": WHITE_SPACE, "lenient": False}
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise InputError(" ".join(matcher.get_error().replace("<non-verbose/>", "").split())[:200])
        return Grammar(matcher, self._tokenizer.stop_tokens)

    @cached_property
    def _vocabulary(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        try:
            return LLTokenizer(json.dumps(self._tokenizer.tokenizer_json()), eos_token=[*self._tokenizer.stop_tokens])
        except ValueError as error:
            reason = " ".join(str(error).split())[:100]
            raise InputError(f"llguidance does not read this model's tokenizer ({reason})") from None


def _refuse_numbers(schema: Any, key: str = "") -> None:
    """Raise InputError for numbers at which llguidance 1.9 crashes (-2^63) or computes for minutes (multiples)."""
    if isinstance(schema, dict | list):
        for name, value in schema.items() if isinstance(schema, dict) else ((key, value) for value in schema):
            _refuse_numbers(value, name)
    elif isinstance(schema, int | float) and not isinstance(schema, bool):
        if abs(schema) > MAX_NUMBER:
            raise InputError(f"{key}: {str(schema)[:30]} is not within -2^53 to 2^53")
        _, digits, exponent = Decimal(str(schema)).normalize().as_tuple()
        if key == "multipleOf" and not (-6 <= int(exponent) <= 3 and len(digits) + max(int(exponent), 0) <= 3):
            raise InputError(f"multipleOf: {schema} is not supported: at most three digits, up to six decimal places")


class Grammar:
    """The texts that an answer may be."""

    def __init__(self, matcher: "LLMatcher", stop_tokens: frozenset[int]) -> None:
        self._matcher, self._stop_tokens = matcher, stop_tokens

    def start(self, stop_tokens: frozenset[int] = frozenset()) -> "GrammarState":
        """The state of an answer that has not begun. stop_tokens: the ids that end it besides the tokenizer's."""
        return GrammarState(self._matcher.deep_copy(), sorted(self._stop_tokens | stop_tokens))


class GrammarState:
    """What may follow in one answer."""

    def __init__(self, matcher: "LLMatcher", stop_tokens: list[int]) -> None:
        self._matcher, self._stop_tokens = matcher, stop_tokens
        self.stuck = False
        """Whether `allowed` has found that the text can neither end nor continue."""

    def allowed(self, size: int) -> Tensor:
        """Which of `size` tokens [V] may be next."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")[:size]
        allowed = torch.zeros(size, dtype=torch.bool)
        allowed[: len(bits)] = torch.from_numpy(bits).bool()
        # By itself llguidance also lets a text end where it knows of no way to continue.
        allowed[self._stop_tokens] = self._matcher.is_accepting()
        self.stuck = not allowed.any()
        return allowed

    def accept(self, token: int) -> None:
        """Take the next token, one that was allowed and does not end the answer."""
        self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Whether the text must end here."""
        return self._matcher.is_stopped() and self._matcher.is_accepting()


def constrain(logits: Tensor, states: Sequence[GrammarState | None]) -> Tensor:
    """Logits [B, V] with -inf for the tokens that a row's grammar does not allow; None: a row without one.

    A row that is stuck stays as it is.
    """
    if not any(states):
        return logits
    excluded = torch.zeros(logits.shape, dtype=torch.bool)
    for row, state in enumerate(states):
        if state is not None:
            allowed = state.allowed(logits.shape[-1])
            excluded[row] = ~allowed & (not state.stuck)
    return logits.masked_fill(excluded.to(logits.device), float("-inf"))
