"""What the routes need: the engine, the tokenizer, and the models that requests can name."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from graftlm.errors import did_you_mean
from graftlm.inference.engine import Engine
from graftlm.inference.grammar import Grammars
from graftlm.serving.schemas import APIError
from graftlm.text.chat import Chat
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer
from graftlm.text.tool_calls import ToolSupport


@dataclass(frozen=True)
class ServedModel:
    """A model that requests can name: the base, or one of its adapters."""

    name: str
    adapter: str | None
    """Its name in the engine; None for the base."""
    template: Template
    """The prompt of a classification."""
    max_seq_len: int
    stop_tokens: frozenset[int] = frozenset()
    """What ends its texts, besides the base's end-of-text tokens."""


@dataclass(frozen=True)
class Service:
    """What the routes need."""

    engine: Engine
    tokenizer: Tokenizer
    models: Mapping[str, ServedModel]
    """By name; the base is the first."""
    max_tokens: int

    @cached_property
    def grammars(self) -> Grammars:
        """Of the tokenizer."""
        return Grammars(self.tokenizer)

    @cached_property
    def tool_support(self) -> ToolSupport:
        """What the chat template writes of tools."""
        has_chat = self.tokenizer.chat_template is not None
        return ToolSupport.of(Chat(self.tokenizer)) if has_chat else ToolSupport(False, False, False, None)

    @property
    def base(self) -> ServedModel:
        """The model without an adapter."""
        return next(iter(self.models.values()))

    def model(self, name: str) -> ServedModel:
        """A model by its name. Raises APIError with status 404."""
        if name not in self.models:
            hint = did_you_mean(name[:100], self.models)
            message = f"there is no model {name[:100]!r}: {hint}GET /v1/models lists them"
            raise APIError(404, message, param="model", code="model_not_found")
        return self.models[name]


CONCURRENCY = 64
"""Prompts of one classification, or texts to embed, that are submitted to the engine at the same time."""


def listed(texts: Any) -> Any:
    """One text, or the ids of one, as a list of one."""
    return [texts] if isinstance(texts, str) or isinstance(texts[0], int) else texts
