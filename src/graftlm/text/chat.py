"""A model's chat template: messages -> the text, and the tokens, that the model was tuned on.

What is unusual here: what people write can never become a control token. The template is rendered with marks in the
place of the messages, control tokens are looked for in that, and only then are the messages put in, as plain text. For
messages without control tokens the tokens are those of transformers' `apply_chat_template`; a test holds this.

A whole conversation (`conversation`) is cut where an answer begins and where it ends, and its pieces are tokenised
apart: what stands before an answer is, token by token, what the model is given when it is asked for one.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n | Hello<|im_end|> | \n<|im_start|>user\n ...

A template is a program out of a downloaded file: it runs in jinja2's sandbox, which lets it change nothing.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

from graftlm.errors import InputError
from graftlm.text.tokenizer import Tokenizer

Message = tuple[str, str]
"""(role, content): a role is one of ROLES."""

ROLES = ("system", "user", "assistant")
OPEN, CLOSE = "\ue000", "\ue001"  # a mark is a number between these two: no text has them
BEGIN, END = "\ue002", "\ue003"  # stand where the template's {% generation %} begins and ends


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation's tokens, and where in them the assistant's answers are."""

    ids: list[int]
    answers: list[range]
    """In order; each holds the answer and the token that ends its turn."""


class Chat:
    """A tokenizer's chat template. Raises InputError when it cannot be read or refuses what it is given.

    instead: what its errors tell the user to do.
    """

    def __init__(self, tokenizer: Tokenizer, instead: str = "use --chat off") -> None:
        assert tokenizer.chat_template is not None, "the tokenizer has no chat template: look before"
        self._tokenizer, self._instead = tokenizer, instead
        self._frames: dict[tuple[tuple[str, ...], bool], str] = {}

    def render(self, messages: Sequence[Message], begun: str = "") -> str:
        """The conversation as text, up to where the model's answer begins, and how that begins."""
        return "".join(text for text, _ in self._parts(messages, begun))

    def encode(self, messages: Sequence[Message], begun: str = "") -> list[int]:
        """The same as tokens."""
        ids: list[int] = []
        for text, control in self._parts(messages, begun):
            ids += [control] if control is not None else self._tokenizer.encode(text)
        return ids

    def conversation(self, messages: Sequence[Message]) -> EncodedConversation:
        """A whole conversation. What its answers are the template says, by {% generation %} or by how it asks for one.

        Without {% generation %} an answer begins where the template leaves off when it asks for it, and ends with the
        first control token behind what was answered, or, where its turn has none, with the turn.
        """
        roles = tuple(role for role, _ in messages)
        frame = self._rendered_skeleton(roles)
        contents = self._contents(messages, frame)
        spans = self._marked_answers(frame) if BEGIN in frame else self._answers(roles, frame)
        wanted = roles.count("assistant")
        if len(spans) != wanted:
            raise InputError(
                f"the model's chat template marks {len(spans)} answers by {{% generation %}}, and the conversation has "
                f"{wanted}: {self._instead}"
            )
        ids: list[int] = []
        answers, done = [], 0
        for start, stop in spans:
            ids += self._ids(frame[done:start], contents)
            first = len(ids)
            ids += self._ids(frame[start:stop], contents)
            answers.append(range(first, len(ids)))
            done = stop
        return EncodedConversation(ids + self._ids(frame[done:], contents), answers)

    @cached_property
    def turn_end(self) -> int:
        """The token that the model ends its turn with: the first control token that the template puts behind an answer.

        Where it puts none there, the tokenizer's end of text.
        """
        frame = self._rendered_skeleton(("user", "assistant"))
        ends = self._control.search(frame, frame.find(f"{OPEN}1{CLOSE}")) if f"{OPEN}1{CLOSE}" in frame else None
        return self._tokenizer.special_tokens[ends[0]] if ends else self._tokenizer.eot

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The tokens that an answer is over at: `end`, and the end of text, which ends everything."""
        return frozenset({self.turn_end, self._tokenizer.eot})

    def _answers(self, roles: tuple[str, ...], frame: str) -> list[tuple[int, int]]:
        """Where the answers stand in a frame."""
        spans: list[tuple[int, int]] = []
        for number in (n for n, role in enumerate(roles) if role == "assistant"):
            asked, said = (
                self._rendered_skeleton(roles[:number], asks=True),
                self._rendered_skeleton(roles[: number + 1]),
            )
            goes_on = frame.startswith(asked) and frame.startswith(said)
            behind = not spans or spans[-1][1] <= len(asked)
            if not (goes_on and behind and f"{OPEN}{number}{CLOSE}" in said[len(asked) :]):
                raise InputError(
                    "the model's chat template writes an answer otherwise than it asks for it, or changes it when more "
                    f"is said: {self._instead}"
                )
            content = frame.index(f"{OPEN}{number}{CLOSE}")
            ends = self._control.search(frame, content, len(said))
            spans.append((len(asked), ends.end() if ends else len(said)))
        return spans

    def _marked_answers(self, frame: str) -> list[tuple[int, int]]:
        """The same where the template marks them; BEGIN and END, which stand at their sides, belong to none."""
        return [(match.start() + 1, match.end() - 1) for match in re.finditer(f"{BEGIN}[^{END}]*{END}", frame)]

    def _rendered_skeleton(self, roles: tuple[str, ...], asks: bool = False) -> str:
        """What the template makes of messages of these roles, with marks in their place; kept."""
        if (roles, asks) not in self._frames:
            self._frames[roles, asks] = self._run([(role, f"{OPEN}{n}{CLOSE}") for n, role in enumerate(roles)], asks)
        return self._frames[roles, asks]

    def _contents(self, messages: Sequence[Message], frame: str) -> list[str]:
        """The contents as the template takes them: as they are, or without space at their ends."""
        whole = self._run(messages, asks=False)
        for contents in ([c for _, c in messages], [c.strip() for _, c in messages]):
            if _filled(frame, contents) == whole:
                return contents
        raise InputError(f"the model's chat template changes the messages it is given: {self._instead}")

    def _ids(self, frame: str, contents: Sequence[str]) -> list[int]:
        """The tokens of a piece of a frame."""
        ids: list[int] = []
        for text in self._control.split(frame.replace(BEGIN, "").replace(END, "")):
            control = self._tokenizer.special_tokens.get(text)
            ids += self._tokenizer.encode(_filled(text, contents)) if control is None else [control]
        return ids

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Any control token."""
        names = sorted(self._tokenizer.special_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})" if names else r"((?!))")

    def _parts(self, messages: Sequence[Message], begun: str) -> list[tuple[str, int | None]]:
        """Texts and control tokens in turn; a control token has its id beside it."""
        contents = [content.strip() for _, content in messages]
        frame = self._rendered_skeleton(tuple(role for role, _ in messages), asks=True)
        whole = self._run([(role, content) for (role, _), content in zip(messages, contents, strict=True)], asks=True)
        if _filled(frame, contents) != whole:
            raise InputError(f"the model's chat template changes the messages it is given: {self._instead}")
        control = self._tokenizer.special_tokens
        parts: list[tuple[str, int | None]] = []
        for text in filter(None, self._control.split(frame.replace(BEGIN, "").replace(END, ""))):
            parts.append((text, control[text]) if text in control else (_filled(text, contents), None))
        if begun:  # one text with what the template ends in, as it would be had it come from there
            last = parts.pop()[0] if parts and parts[-1][1] is None else ""
            parts.append((last + begun, None))
        return parts

    def _run(self, messages: Sequence[Message], asks: bool) -> str:
        from jinja2.exceptions import TemplateError

        given = [{"role": role, "content": content} for role, content in messages]
        try:
            return self._template.render(
                messages=given, tools=None, documents=None, add_generation_prompt=asks, **self._tokenizer.named_tokens
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"the model's chat template refuses these messages ({error}): {self._instead}") from None

    @cached_property
    def _template(self) -> Any:
        from jinja2 import nodes
        from jinja2.exceptions import TemplateSyntaxError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> NoReturn:
            raise ValueError(message)

        def tojson(value: Any, **how: Any) -> str:  # jinja's own escapes for HTML
            return json.dumps(value, **{"ensure_ascii": False, **how})

        class Generation(Extension):
            """{% generation %} ... {% endgeneration %}, as transformers has it: what the assistant says."""

            def parse(self, parser: Parser) -> nodes.Node:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return nodes.CallBlock(self.call_method("_between"), [], [], body).set_lineno(line)

            def _between(self, caller: Callable[[], str]) -> str:
                return f"{BEGIN}{caller()}{END}"

        Generation.tags = {"generation"}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            return environment.from_string(self._tokenizer.chat_template or "")
        except TemplateSyntaxError as error:
            raise InputError(f"the model's chat template is broken ({error}): {self._instead}") from None


def _filled(text: str, contents: Sequence[str]) -> str:
    """A piece of a frame with the messages in it."""
    marks = {f"{OPEN}{number}{CLOSE}": content for number, content in enumerate(contents)}
    return re.sub(f"{OPEN}\\d+{CLOSE}", lambda match: marks.get(match[0], match[0]), text)
