"""A model's chat template: messages -> the text, and the tokens, of a conversation.

The template renders the messages as they were written; nothing is stripped that it does not strip. The text is
tokenised as a whole, so the tokens equal those of transformers' `apply_chat_template`, with one exception: what people
write never becomes a special token. A special token's name in a message is replaced while the template runs, and put
back as plain text.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n | Hello<|im_end|> | \n<|im_start|>user\n ...

An answer begins where the prompt that asks for it ends, by the rule of `text/boundary.py`, and ends with the token
that ends its turn. Some templates write earlier answers differently from the last one (Qwen3's leaves out their
thinking): then each answer is learned in a conversation that ends with it.

A template is a program from a downloaded file: it runs in jinja2's immutable sandbox.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, NoReturn

from graftlm.errors import InputError
from graftlm.text.boundary import common_length
from graftlm.text.tokenizer import Tokenizer

Message = tuple[str, str] | tuple[str, str, Mapping[str, Any]]
"""(role, content), or (role, content, fields): a role is one of ROLES, and fields are what else templates read.

THINKING is what an assistant thought before its answer; tool_calls are as in transformers.
"""

ROLES = ("system", "user", "assistant", "tool")
THINKING = "reasoning_content"
THINKING_NAMES = (THINKING, "thinking", "reasoning")
"""What data calls it; templates read the first two."""
BEGIN, END = "\ue002", "\ue003"  # enclose the template's {% generation %} blocks
HERE = "\ue006"  # ends messages where it is asked what the template writes after them
PRIVATE = "[\ue000-\ue006]"  # what a message has of these is escaped, as special tokens are
ESCAPED = re.compile("\ue004([0-9a-fA-F]+)\ue005")  # while the template runs


@dataclass(frozen=True)
class EncodedConversation:
    """A conversation's tokens, and the spans of the assistant's answers in them that are learned."""

    ids: list[int]
    answers: list[range]
    """In order; each covers the answer and the token that ends its turn."""


class Chat:
    """A tokenizer's chat template. Raises InputError if it is broken or rejects the messages.

    hint: what errors tell the user to do.
    """

    def __init__(self, tokenizer: Tokenizer, hint: str = "use --chat off") -> None:
        if tokenizer.chat_template is None:
            raise InputError(f"the model has no chat template: {hint}")
        self._tokenizer, self._marking, self._hint = tokenizer, tokenizer.marking, hint
        self._tools: Sequence[Any] = ()
        self._special_re = any_of(tokenizer.special_tokens)
        self._written_re = re.compile(f"{self._special_re.pattern}|{PRIVATE}")  # what no message may have in a template

    def with_tools(self, tools: Sequence[Any]) -> "Chat":
        """The same template, with tools that the model may call, as JSON schemas."""
        if not tools and not self._tools:
            return self
        chat = copy(self)
        chat._tools = tools
        chat.__dict__["_turn_end"] = self._turn_end  # the same with tools
        return chat

    def render(self, messages: Sequence[Message], answer_prefix: str = "") -> str:
        """The text of a prompt: the conversation up to the next answer, and the beginning of that answer."""
        return self._as_written(self._prompt(messages)) + answer_prefix

    def encode(self, messages: Sequence[Message], answer_prefix: str = "") -> list[int]:
        """The tokens of the same prompt."""
        return self._ids(self._prompt(messages) + self._escaped(answer_prefix))[0]

    def answer_text(self, messages: Sequence[Message]) -> str:
        """The text of the last message, an answer, as the model generates it, without special tokens."""
        prompt = self._prompt(messages[:-1])
        whole = self._run(messages, add_generation_prompt=False).replace(BEGIN, "").replace(END, "")
        answer = whole[common_length(whole, prompt) :]
        return self._tokenizer.decode(self._ids(answer)[0], self._ids(prompt)[0])

    def answered(self, prompt: Sequence[Message], *answers: Sequence[Message]) -> list[list[int]]:
        """The tokens of a prompt, and those of it with each answer, as TRL's trainers of preferences take them.

        Raises InputError as `conversations` does.
        """
        wholes = [[*prompt, *answer] for answer in answers]
        for whole in wholes:
            self._refuse_lost(whole)
        texts = [self._run(whole, add_generation_prompt=False).replace(BEGIN, "").replace(END, "") for whole in wholes]
        return [self.encode(prompt), *(self._ids(text)[0] for text in texts)]

    def conversation(self, messages: Sequence[Message]) -> EncodedConversation:
        """The tokens of a whole conversation, and the answers in it that are as the model is to give them.

        Answers are what the template marks by {% generation %}. Without marks an answer begins after the generation
        prompt, and ends with the token that ends turns or, if there is none, with its turn. Left out are answers that
        the template writes differently once another turn follows; the last message is never left out.
        """
        text, spans, _ = self._answers(messages)
        return self._encoded(text, spans)

    def conversations(self, messages: Sequence[Message], unlearned: Collection[int] = ()) -> list[EncodedConversation]:
        """A whole conversation with all its answers or, if the template rewrites earlier ones, one for each answer.

        unlearned: the messages, by number, that are no answers to learn. Raises InputError if the template writes no
        tools, no result of one, or another field of an answer nowhere.
        """
        self._refuse_lost(messages)
        text, spans, answers = self._answers(messages, unlearned)
        if len(spans) < len(answers):
            return [self._encoded(turn, [(start, stop)]) for turn, start, stop in answers]
        return [self._encoded(text, spans)]

    @property
    def turn_end(self) -> int:
        """The token that ends the model's turn: the first added token after an answer, or else end-of-text.

        Most are special tokens, but not all: some models' files, and users who add tokens, do not mark them so.
        """
        return self._tokenizer.added_tokens.get(self._turn_end, self._tokenizer.eot)

    @cached_property
    def _turn_end(self) -> str:
        turn = self._run([("user", "a"), ("assistant", "a")], add_generation_prompt=False, after_content=HERE)
        match = any_of(self._tokenizer.added_tokens).search(turn, turn.rfind(HERE)) if HERE in turn else None
        return match[0] if match else ""

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The tokens that end an answer: `turn_end` and those that end a text."""
        return self._tokenizer.stop_tokens | {self.turn_end}

    def _answers(
        self, messages: Sequence[Message], unlearned: Collection[int] = ()
    ) -> tuple[str, list[tuple[int, int]], list[tuple[str, int, int]]]:
        """A conversation's text, where the answers in it are, and without marks each answer as of `_answer`."""
        text = self._run(messages, add_generation_prompt=False)
        ends = [n + 1 for n, message in enumerate(messages) if message[0] == "assistant" and n not in unlearned]
        if BEGIN in text:
            return *_marked(self._without_marks(text, messages, unlearned) if unlearned else text), []
        answers = [self._answer(messages[:end], messages[end : end + 1]) for end in ends]
        text = answers[-1][0] if ends and ends[-1] == len(messages) else text
        self._refuse_unwritten(messages, text)
        return text, [(start, stop) for turn, start, stop in answers if text.startswith(turn[:stop])], answers

    def _without_marks(self, text: str, messages: Sequence[Message], unlearned: Collection[int]) -> str:
        """A conversation's text, where the template marks no answers that are not learned."""
        ended = self._run(messages, add_generation_prompt=False, after_content=HERE)
        pieces, found = text.split(BEGIN), ended.split(BEGIN)
        if ended.count(HERE) != len(messages) or len(pieces) != len(found):
            raise InputError(
                f"the model's chat template does not show which answer is which, and some have weight 0: {self._hint}"
            )
        numbers = accumulate(piece.count(HERE) for piece in found[:-1])
        marked = [
            piece.replace(END, "", 1) if n in unlearned else BEGIN + piece
            for n, piece in zip(numbers, pieces[1:], strict=True)
        ]
        return "".join([pieces[0], *marked])

    def _encoded(self, text: str, spans: Sequence[tuple[int, int]]) -> EncodedConversation:
        ids, ranges = self._ranges(text, spans)
        return EncodedConversation(ids, [answer for answer in ranges if answer])

    def _refuse_lost(self, messages: Sequence[Message]) -> None:
        """Raise InputError for what was given and what the template does not write."""

        def written(messages: Sequence[Message], tools: Sequence[Any]) -> str:
            return self.with_tools(tools)._run(messages, add_generation_prompt=False)

        without: list[tuple[str, Sequence[Message], Sequence[Message], Sequence[Any]]] = []
        if self._tools:
            without.append(("tools", messages, messages, ()))
        for end, (role, content, *fields) in enumerate(messages, 1):
            before, own = messages[: end - 1], fields[0] if fields else {}
            if role == "tool":
                without.append(("messages of role tool", messages[:end], before, self._tools))
            for name in [key for key in own if key != "name"] if role == "assistant" else ():
                rest = {key: value for key, value in own.items() if key != name}
                without.append((name, messages[:end], [*before, (role, content, rest)], self._tools))
        for name, whole, part, tools in without:
            if written(whole, self._tools) == written(part, tools):
                raise InputError(f"the model's chat template does not write {name}: {self._hint}")

    def _answer(self, messages: Sequence[Message], following: Sequence[Message]) -> tuple[str, int, int]:
        """A conversation's text up to its last message, an answer, and where the answer begins and ends in it.

        A template may end the generation prompt with what it does not write before an answer (DeepSeek-R1's does): then
        the answer begins where the two differ. It may write a prompt differently once it is answered (gpt-oss's leaves
        out the reasoning before a call of a tool): then the text is that of the prompt, with the answer.

        following: the next message, if any. Where no token ends a turn, one that begins the next and ends a text does
        (GLM's <|user|>).
        """
        turn, prompt = self._run(messages, add_generation_prompt=False), self._prompt(messages[:-1])
        start = common_length(turn, prompt)
        if start < len(prompt):
            shared = common_length(prompt, self._run(messages[:-1], add_generation_prompt=False))
            if start < shared:
                turn, start = prompt + self._after(prompt[shared:], turn, messages), len(prompt)
        turn += "" if self._turn_end else self._end_after(turn, messages, following)
        end = turn.rfind(self._turn_end, start) if self._turn_end else -1
        return turn, start, end + len(self._turn_end) if end >= 0 else len(turn)

    def _end_after(self, turn: str, messages: Sequence[Message], following: Sequence[Message]) -> str:
        """The token that begins the turn after an answer, if it ends a text; else nothing."""
        more = self._run([*messages, *(following or [("user", "a")])], add_generation_prompt=False)
        match = self._special_re.match(more, len(turn)) if more.startswith(turn) else None
        return match[0] if match and self._tokenizer.special_tokens[match[0]] in self._tokenizer.stop_tokens else ""

    def _after(self, cue: str, turn: str, messages: Sequence[Message]) -> str:
        """What follows the last generation prompt, `cue`, in a conversation's text: its last message, an answer."""
        role, content, *fields = messages[-1]
        own = {name: value for name, value in (fields[0] if fields else {}).items() if name != THINKING}
        plain = self._run([*messages[:-1], (role, content if own else "a", own)], add_generation_prompt=False)
        before, found, _ = plain.rpartition(cue or "\0")
        if not found or not turn.startswith(before + cue):
            raise InputError(
                f"the model's chat template writes the conversation differently once it is answered: {self._hint}"
            )
        return turn[len(before + cue) :]

    def _prompt(self, messages: Sequence[Message]) -> str:
        """The text of a prompt, after which the model answers."""
        text = self._run(messages, add_generation_prompt=True)
        self._refuse_unwritten(messages, text)
        return text.replace(BEGIN, "").replace(END, "")

    def _refuse_unwritten(self, messages: Sequence[Message], text: str) -> None:
        """Raise InputError if no message is in a conversation's text: some templates read parts of text and images."""
        if not messages or any(self._escaped(message[1]).strip() in text for message in messages):
            return
        if HERE not in self._run(messages, after_content=HERE, add_generation_prompt=False):
            raise InputError(f"the model's chat template does not write messages of text: {self._hint}")

    def _ids(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a text of the template's, and the places of its special tokens among them."""
        marked = self._special_re.sub(lambda name: self._marking.marks[name[0]], text)
        return self._marking.encode(self._as_written(marked))

    def _ranges(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[range]]:
        """The tokens of a text, and the tokens of some spans of it.

        A span begins after as many tokens as the text before it has on its own, without spaces at its end if a token
        spans the boundary. What precedes a special token has no influence on what follows it, so only what follows the
        last one is tokenised again.
        """
        ids, places = self._ids(text)

        def before(end: int) -> int:
            special = [match.start() for match in self._special_re.finditer(text, 0, end)]
            start, first = (special[-1], places[len(special) - 1]) if special else (0, 0)
            own, _ = self._ids(text[start:end])
            if own != ids[first : first + len(own)]:
                own, _ = self._ids(text[start:end].rstrip(" "))
            return first + len(own)

        return ids, [range(before(start), before(stop)) for start, stop in spans]

    def _escaped(self, value: Any) -> Any:
        """A message, or a part of one or of a tool, without names of special tokens in its texts."""
        if isinstance(value, Mapping):
            return {self._escaped(key): self._escaped(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._escaped(item) for item in value]
        if not isinstance(value, str):
            return value
        return self._written_re.sub(lambda name: f"\ue004{name[0].encode().hex()}\ue005", value)

    def _as_written(self, text: str) -> str:
        """A text of the template's, with the messages as they were written."""
        return ESCAPED.sub(lambda match: bytes.fromhex(match[1]).decode(), text)

    def _run(self, messages: Sequence[Message], after_content: str = "", **options: bool) -> str:
        """Render the template. after_content: ends every message. options: those of `apply_chat_template`."""
        from jinja2.exceptions import TemplateError, TemplateSyntaxError

        dicts = [self._dict(message, after_content) for message in messages]
        templates = (self._tokenizer.tool_template if self._tools else None, self._tokenizer.chat_template)
        try:
            return _compiled(next(filter(None, templates), "")).render(
                messages=dicts,
                tools=self._escaped(self._tools) or None,
                documents=None,
                strftime_now=self._strftime,
                **options,
                **self._tokenizer.named_tokens,
            )
        except TemplateSyntaxError as error:
            raise InputError(f"the model's chat template is broken ({error}): {self._hint}") from None
        except (TemplateError, TypeError, ValueError) as error:
            raise InputError(f"the model's chat template rejects these messages ({error}): {self._hint}") from None

    def _dict(self, message: Message, after_content: str) -> dict[str, Any]:
        """A message as templates read it."""
        role, content, *fields = message
        named = {"role": role, "content": self._escaped(content) + after_content}
        for name, value in (fields[0] if fields else {}).items():
            named |= dict.fromkeys(THINKING_NAMES[:2] if name == THINKING else [name], self._escaped(value))
        return named

    def _strftime(self, format: str) -> str:
        """The time now or, where the tokenizer is a run's, its date."""
        date = self._tokenizer.date
        return (datetime.fromisoformat(date) if date else datetime.now()).strftime(format)


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Matches any of these tokens' names, the longer of two."""
    ordered = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, ordered))})" if ordered else r"((?!))")


def _marked(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without BEGIN and END, and the spans between them, of which adjacent ones are one."""
    pieces = re.split(f"[{BEGIN}{END}]", text)
    ends = [0, *accumulate(map(len, pieces))]
    spans: list[tuple[int, int]] = []
    for start, stop in zip(ends[1::2], ends[2::2], strict=False):
        first = spans.pop()[0] if spans and spans[-1][1] == start else start
        spans.append((first, stop))
    return "".join(pieces), spans


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    """A chat template with the functions and blocks that transformers gives it."""
    from jinja2 import nodes
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
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)
