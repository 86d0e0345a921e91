"""A model's chat template: messages -> the text, and the tokens, of a conversation.

What people write never becomes a special token: the template is rendered with a mark in place of each message (the
skeleton), special tokens are looked up in that, and only then are the messages inserted, as plain text. For messages
without special tokens the result equals transformers' `apply_chat_template`; a test compares them.

A whole conversation (`conversation`) is split where each answer begins and ends, and the pieces are tokenised
separately, so the tokens before an answer are exactly those that the model is given when it generates one.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n | Hello<|im_end|> | \n<|im_start|>user\n ...

A template is a program from a downloaded file: it runs in jinja2's immutable sandbox.
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
OPEN, CLOSE = "\ue000", "\ue001"  # a mark is a message's number between these two
BEGIN, END = "\ue002", "\ue003"  # enclose the template's {% generation %} blocks


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation's tokens, and the spans of the assistant's answers in them."""

    ids: list[int]
    answers: list[range]
    """In order; each covers the answer and the token that ends its turn."""


class Chat:
    """A tokenizer's chat template. Raises InputError if it is broken or rejects the messages.

    hint: what errors tell the user to do.
    """

    def __init__(self, tokenizer: Tokenizer, hint: str = "use --chat off") -> None:
        assert tokenizer.chat_template is not None, "the tokenizer has no chat template"
        self._tokenizer, self._hint = tokenizer, hint
        self._skeletons: dict[tuple[object, ...], str] = {}

    def render(self, messages: Sequence[Message], answer_prefix: str = "") -> str:
        """The text of a prompt: the conversation up to the next answer, and the beginning of that answer."""
        return "".join(text for text, _ in self._parts(messages, answer_prefix))

    def encode(self, messages: Sequence[Message], answer_prefix: str = "") -> list[int]:
        """The tokens of the same prompt."""
        ids: list[int] = []
        for text, special in self._parts(messages, answer_prefix):
            ids += [special] if special is not None else self._tokenizer.encode(text)
        return ids

    def conversation(self, messages: Sequence[Message]) -> EncodedConversation:
        """The tokens of a whole conversation, and its answers.

        Answers are what the template marks by {% generation %}. Without marks an answer begins after the generation
        prompt, and ends with the first special token after its content or, if there is none, with its turn.
        """
        roles = tuple(role for role, _ in messages)
        skeleton = self._skeleton(roles)
        contents = self._contents(messages, skeleton)
        spans = self._marked_answers(skeleton) if BEGIN in skeleton else self._answers(roles, skeleton)
        expected = roles.count("assistant")
        if len(spans) != expected:
            raise InputError(
                f"the model's chat template marks {len(spans)} answers by {{% generation %}}, and the conversation has "
                f"{expected}: {self._hint}"
            )
        ids: list[int] = []
        answers, end = [], 0
        for start, stop in spans:
            ids += self._ids(skeleton[end:start], contents)
            first = len(ids)
            ids += self._ids(skeleton[start:stop], contents)
            answers.append(range(first, len(ids)))
            end = stop
        return EncodedConversation(ids + self._ids(skeleton[end:], contents), answers)

    @cached_property
    def turn_end(self) -> int:
        """The token that ends the model's turn: the first special token after an answer, or else end-of-text."""
        skeleton = self._skeleton(("user", "assistant"))
        answer = skeleton.find(f"{OPEN}1{CLOSE}")
        match = self._special_re.search(skeleton, answer) if answer >= 0 else None
        return self._tokenizer.special_tokens[match[0]] if match else self._tokenizer.eot

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The tokens that end an answer: `turn_end` and end-of-text."""
        return frozenset({self.turn_end, self._tokenizer.eot})

    def _answers(self, roles: tuple[str, ...], skeleton: str) -> list[tuple[int, int]]:
        """The spans of the answers in a skeleton without {% generation %} marks."""
        spans: list[tuple[int, int]] = []
        for number in (n for n, role in enumerate(roles) if role == "assistant"):
            prompt, answered = self._prompt_skeleton(roles[:number]), self._skeleton(roles[: number + 1])
            is_prefix = skeleton.startswith(prompt) and skeleton.startswith(answered)
            is_later = not spans or spans[-1][1] <= len(prompt)
            mark = f"{OPEN}{number}{CLOSE}"
            if not (is_prefix and is_later and mark in answered[len(prompt) :]):
                raise InputError(
                    "the model's chat template formats an answer differently from its generation prompt, or changes it "
                    f"in later turns: {self._hint}"
                )
            match = self._special_re.search(skeleton, skeleton.index(mark), len(answered))
            spans.append((len(prompt), match.end() if match else len(answered)))
        return spans

    def _marked_answers(self, skeleton: str) -> list[tuple[int, int]]:
        """The spans between BEGIN and END."""
        return [(match.start() + 1, match.end() - 1) for match in re.finditer(f"{BEGIN}[^{END}]*{END}", skeleton)]

    def _skeleton(self, roles: tuple[str, ...]) -> str:
        """The rendered template, with marks in place of the messages."""
        return self._cached_skeleton(roles, add_generation_prompt=False)

    def _prompt_skeleton(self, roles: tuple[str, ...]) -> str:
        """The same with the generation prompt, after which the model answers."""
        return self._cached_skeleton(roles, add_generation_prompt=True)

    def _cached_skeleton(self, roles: tuple[str, ...], **options: bool) -> str:
        key = (roles, *options.items())
        if key not in self._skeletons:
            self._skeletons[key] = self._run([(role, f"{OPEN}{n}{CLOSE}") for n, role in enumerate(roles)], **options)
        return self._skeletons[key]

    def _contents(self, messages: Sequence[Message], skeleton: str) -> list[str]:
        """The contents as the template inserts them: unchanged, or stripped."""
        whole = self._run(messages, add_generation_prompt=False)
        for contents in ([c for _, c in messages], [c.strip() for _, c in messages]):
            if _filled(skeleton, contents) == whole:
                return contents
        raise InputError(f"the model's chat template changes the messages' texts: {self._hint}")

    def _ids(self, skeleton: str, contents: Sequence[str]) -> list[int]:
        """The tokens of a piece of a skeleton."""
        ids: list[int] = []
        for text in self._special_re.split(skeleton.replace(BEGIN, "").replace(END, "")):
            special = self._tokenizer.special_tokens.get(text)
            ids += self._tokenizer.encode(_filled(text, contents)) if special is None else [special]
        return ids

    @cached_property
    def _special_re(self) -> re.Pattern[str]:
        """Matches any special token."""
        names = sorted(self._tokenizer.special_tokens, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})" if names else r"((?!))")

    def _parts(self, messages: Sequence[Message], answer_prefix: str) -> list[tuple[str, int | None]]:
        """A prompt as texts and special tokens in order; a special token comes with its id."""
        contents = [content.strip() for _, content in messages]
        skeleton = self._prompt_skeleton(tuple(role for role, _ in messages))
        stripped = [(role, content) for (role, _), content in zip(messages, contents, strict=True)]
        if _filled(skeleton, contents) != self._run(stripped, add_generation_prompt=True):
            raise InputError(f"the model's chat template changes the messages' texts: {self._hint}")
        special = self._tokenizer.special_tokens
        parts: list[tuple[str, int | None]] = []
        for text in filter(None, self._special_re.split(skeleton.replace(BEGIN, "").replace(END, ""))):
            parts.append((text, special[text]) if text in special else (_filled(text, contents), None))
        if answer_prefix:  # tokenised together with the end of the generation prompt
            last = parts.pop()[0] if parts and parts[-1][1] is None else ""
            parts.append((last + answer_prefix, None))
        return parts

    def _run(self, messages: Sequence[Message], **options: bool) -> str:
        """Render the template; `options` are those of `apply_chat_template`."""
        from jinja2.exceptions import TemplateError

        dicts = [{"role": role, "content": content} for role, content in messages]
        try:
            return self._template.render(
                messages=dicts, tools=None, documents=None, **options, **self._tokenizer.named_tokens
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"the model's chat template rejects these messages ({error}): {self._hint}") from None

    @cached_property
    def _template(self) -> Any:
        from jinja2 import nodes
        from jinja2.exceptions import TemplateSyntaxError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> NoReturn:
            raise ValueError(message)

        def tojson(value: Any, **options: Any) -> str:  # jinja's own filter escapes for HTML
            return json.dumps(value, **{"ensure_ascii": False, **options})

        class Generation(Extension):
            """{% generation %} ... {% endgeneration %}, as in transformers: marks what the assistant says."""

            def parse(self, parser: Parser) -> nodes.Node:
                line = next(parser.stream).lineno
                body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
                return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

            def _mark(self, caller: Callable[[], str]) -> str:
                return f"{BEGIN}{caller()}{END}"

        Generation.tags = {"generation"}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = tojson
        environment.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": lambda format: datetime.now().strftime(format),
        }
        try:
            return environment.from_string(self._tokenizer.chat_template or "")
        except TemplateSyntaxError as error:
            raise InputError(f"the model's chat template is broken ({error}): {self._hint}") from None


def _filled(text: str, contents: Sequence[str]) -> str:
    """A piece of a skeleton with the messages inserted."""
    marks = {f"{OPEN}{number}{CLOSE}": content for number, content in enumerate(contents)}
    return re.sub(f"{OPEN}\\d+{CLOSE}", lambda match: marks.get(match[0], match[0]), text)
