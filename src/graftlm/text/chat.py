"""A model's chat template: messages -> the text, and the tokens, that the model was tuned on.

What is unusual here: what people write can never become a control token. The template is rendered with marks in the
place of the messages, control tokens are looked for in that, and only then are the messages put in, as plain text. For
messages without control tokens the tokens are those of transformers' `apply_chat_template`; a test holds this.

A template is a program out of a downloaded file: it runs in jinja2's sandbox, which lets it change nothing.
"""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from graftlm.errors import InputError
from graftlm.text.tokenizer import Tokenizer

Message = tuple[str, str]
"""(role, content): the roles are user and assistant."""

OPEN, CLOSE = "\ue000", "\ue001"  # a mark is a number between these two: no text has them


class Chat:
    """A tokenizer's chat template. Raises InputError when it cannot be read or refuses what it is given.

    instead: what its errors tell the user to do.
    """

    def __init__(self, tokenizer: Tokenizer, instead: str = "use --chat off") -> None:
        assert tokenizer.chat_template is not None, "the tokenizer has no chat template: look before"
        self._tokenizer, self._instead = tokenizer, instead

    def render(self, messages: Sequence[Message], begun: str = "") -> str:
        """The conversation as text, up to where the model's answer begins, and how that begins."""
        return "".join(text for text, _ in self._parts(messages, begun))

    def encode(self, messages: Sequence[Message], begun: str = "") -> list[int]:
        """The same as tokens."""
        ids: list[int] = []
        for text, control in self._parts(messages, begun):
            ids += [control] if control is not None else self._tokenizer.encode(text)
        return ids

    def _parts(self, messages: Sequence[Message], begun: str) -> list[tuple[str, int | None]]:
        """Texts and control tokens in turn; a control token has its id beside it."""
        contents = [content.strip() for _, content in messages]
        marks = [f"{OPEN}{number}{CLOSE}" for number in range(len(messages))]
        frame = self._run([(role, mark) for (role, _), mark in zip(messages, marks, strict=True)])
        whole = self._run([(role, content) for (role, _), content in zip(messages, contents, strict=True)])

        def filled(text: str) -> str:
            return re.sub(f"{OPEN}(\\d+){CLOSE}", lambda match: contents[int(match[1])], text)

        if filled(frame) != whole:
            raise InputError(f"the model's chat template changes the messages it is given: {self._instead}")
        control = self._tokenizer.control
        found = re.split(f"({'|'.join(map(re.escape, sorted(control, key=len, reverse=True)))})", frame)
        parts: list[tuple[str, int | None]] = []
        for text in filter(None, found):
            parts.append((text, control[text]) if text in control else (filled(text), None))
        if begun:  # one text with what the template ends in, as it would be had it come from there
            last = parts.pop()[0] if parts and parts[-1][1] is None else ""
            parts.append((last + begun, None))
        return parts

    def _run(self, messages: Sequence[Message]) -> str:
        from jinja2.exceptions import TemplateError

        given = [{"role": role, "content": content} for role, content in messages]
        try:
            return self._template.render(
                messages=given, tools=None, documents=None, add_generation_prompt=True, **self._tokenizer.named_tokens
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"the model's chat template refuses these messages ({error}): {self._instead}") from None

    @cached_property
    def _template(self) -> Any:
        from jinja2.exceptions import TemplateSyntaxError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> NoReturn:
            raise ValueError(message)

        def tojson(value: Any, **how: Any) -> str:  # jinja's own escapes for HTML
            return json.dumps(value, **{"ensure_ascii": False, **how})

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = tojson
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            return environment.from_string(self._tokenizer.chat_template or "")
        except TemplateSyntaxError as error:
            raise InputError(f"the model's chat template is broken ({error}): {self._instead}") from None
