"""Calls of tools in a model's answers, in the form in which its chat template writes them.

    <tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>      Qwen, Hermes
    {"name": "weather", "parameters": {"city": "Oslo"}}                                Llama 3

The form is read off a conversation with a call that the template renders. Left out: forms in which a call is not one
JSON object with its name and its arguments (gpt-oss, DeepSeek, Qwen3-Coder).
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from graftlm.errors import InputError
from graftlm.text.boundary import common_length
from graftlm.text.chat import Chat, Message

NAME, ARGUMENTS, RESULT = "probe_name", {"probe_key": "probe_value"}, "probe_result"
PROBE = {"name": NAME, "description": "", "parameters": {"type": "object", "properties": {}}}

Call = tuple[str, dict[str, Any]]
"""(name, arguments) of a call."""


@dataclass(frozen=True)
class CallFormat:
    """A call is `before`, a JSON object with these two keys, and `after`."""

    name: str = "name"
    arguments: str = "arguments"
    before: str = ""
    after: str = ""

    def schema(self, functions: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The JSON schema of a call of one of these functions, each with name and parameters.

        Raises InputError where two functions define different things by one name.
        """
        calls, definitions = list[dict[str, Any]](), dict[str, Any]()
        for each in functions:
            parameters = {"type": "object", **each.get("parameters", {"additionalProperties": False})}
            for key in ("$defs", "definitions"):  # references are relative to the whole schema
                for name, value in parameters.pop(key, {}).items():
                    if definitions.setdefault(key, {}).setdefault(name, value) != value:
                        raise InputError(f"two functions define {name!r} differently in {key}: rename one")
            call = {self.name: {"const": each["name"]}, self.arguments: parameters}
            closed = {"required": [*call], "additionalProperties": False}
            calls.append({"type": "object", "properties": call, **closed})
        return {"anyOf": calls, **definitions}

    def call(self, value: Any) -> Call | None:
        """The call that a JSON value is."""
        if not isinstance(value, dict):
            return None
        name, arguments = value.get(self.name), value.get(self.arguments)
        return (name, arguments) if isinstance(name, str) and isinstance(arguments, dict) else None


@dataclass(frozen=True)
class ToolSupport:
    """What a chat template writes of tools."""

    tools: bool
    calls: bool
    results: bool
    format: CallFormat | None
    """Of calls; None if it is not one of those above."""

    @classmethod
    def of(cls, chat: Chat) -> "ToolSupport":
        """By rendering a tool, a call of it, and its result."""
        call = {"id": "000000000", "type": "function", "function": {"name": NAME, "arguments": ARGUMENTS}}
        asked: list[Message] = [("user", "a")]
        called: list[Message] = [*asked, ("assistant", "", {"tool_calls": [call]})]
        answered: list[Message] = [*called, ("tool", RESULT, {"tool_call_id": "000000000", "name": NAME})]
        try:
            with_probe = chat.with_tools([{"type": "function", "function": PROBE}])
            tools = NAME in with_probe.render(asked)
            answer = with_probe.answer_text(called)
            results = RESULT in with_probe.render(answered)
        except InputError:  # some templates raise an error at tools
            return cls(False, False, False, None)
        plain = _rendered(with_probe, [*asked, ("assistant", "")])
        return cls(tools, NAME in answer, results, _format(answer, plain))


def _rendered(chat: Chat, messages: Sequence[Message]) -> str:
    try:
        return chat.answer_text(messages)
    except InputError:  # an answer without text
        return ""


def _format(answer: str, plain: str) -> CallFormat | None:
    """The form of the one call in an answer; `plain`: what the template writes for an empty answer."""
    for start in (place for place, character in enumerate(answer) if character == "{"):
        value, end = _json_at(answer, start)
        keys = {json.dumps(item): key for key, item in value.items()} if isinstance(value, dict) else {}
        if (name := keys.get(json.dumps(NAME))) and (arguments := keys.get(json.dumps(ARGUMENTS))):
            before = answer[common_length(answer[:start], plain) : start]
            return CallFormat(name, arguments, before, answer[end:].rstrip())
    return None


def _json_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins at a place, and where it ends; (None, start) if it is no JSON."""
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start


class CallStream:
    """Separates the calls in an answer, which arrives in pieces, from its text.

    names: the functions that can be called; what calls another is text. forced: the answer is the JSON of one call,
    without what the format writes before it.
    """

    def __init__(self, format: CallFormat, names: Collection[str], forced: bool = False) -> None:
        self._format, self._names, self._forced = format, names, forced
        self._marker = format.before.strip()
        self._list = self._marker.endswith("[")  # of calls
        self._marker = self._marker.removesuffix("[").rstrip()
        self._held, self._is_text = "", False

    def add(self, text: str) -> str:
        """What is surely no part of a call."""
        self._held += text
        if self._forced:
            return ""
        if self._marker:
            start = self._held.find(self._marker)
            ends = (n for n in range(1, len(self._marker)) if self._held.endswith(self._marker[:n]))
            start = start if start >= 0 else len(self._held) - max(ends, default=0)
        else:
            self._is_text |= self._held.lstrip()[:1] not in ("", "{", "[")
            start = len(self._held) if self._is_text else 0
        found, self._held = self._held[:start], self._held[start:]
        return found

    def finish(self) -> tuple[str, list[Call]]:
        """The rest of the text, and the calls."""
        text, calls, place = "", list[Call](), 0
        while place < len(self._held):
            start = self._held.find(self._marker, place) if self._marker and not self._forced else place
            if start < 0:
                break
            first = start + (0 if self._forced else len(self._marker))
            first += len(self._held[first:]) - len(self._held[first:].lstrip())
            value, end = _json_at(self._held, first)
            found = [self._format.call(each) for each in (value if self._list and isinstance(value, list) else [value])]
            known = [call for call in found if call is not None and call[0] in self._names]
            if not found or len(known) < len(found):
                break
            text, calls = text + self._held[place:start], calls + known
            place = end
            after = self._format.after.strip().removeprefix("]" if self._list else "").strip()
            rest = self._held[place:]
            if after and rest.lstrip().startswith(after):
                place += len(rest) - len(rest.lstrip()) + len(after)
            if not self._marker:
                break
        rest = self._held[place:]
        return (text + rest).strip() if calls else text + rest, calls
