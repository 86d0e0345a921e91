"""Messages of conversations in a row, as OpenAI, ShareGPT and the tools around them write them."""

import json
from collections.abc import Mapping
from typing import Any

from graftlm.errors import InputError
from graftlm.files.json_rows import short_repr
from graftlm.text.chat import ROLES, THINKING, THINKING_NAMES, Message
from graftlm.text.rows import BLANK, Row

ROLE_NAMES = {
    **{"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"},
    **{"model": "assistant", "developer": "system", "function": "tool", "observation": "tool"},
    **{"function_call": "assistant", "function_response": "tool", "tool_response": "tool", "ipython": "tool"},
}
"""What roles are called elsewhere: ShareGPT, LLaMA-Factory, OASST, OpenAI (developer, function), Gemma (model)."""

ROLE_KEYS = (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content"), ("role", "text"))
"""The keys of a message's role and content."""

PAIRS = (("input", "output"), ("human", "assistant"))
"""The keys of what was asked and what was said, where one object holds both: Capybara's, MOSS's."""

ABOUT_MESSAGES = {
    *("id", "message_id", "parent_id", "model", "source", "timestamp", "created", "created_at", "date"),
    *("language", "lang"),
}
"""Fields that say where a message is from; they are not learned."""
NOT_WRITTEN = {"weight", "train", *ABOUT_MESSAGES}
"""Fields that are not the template's."""


def read_messages(row: Row, name: str) -> tuple[Message, ...]:
    """A column of messages."""
    if name not in row.columns:
        raise row.error(f"no field {name!r}: every row needs it")
    items = _turns(row.columns[name])
    if not isinstance(items, list) or not items:
        raise row.error(f"{name} must be a list of role and content, not {short_repr(items)}")
    return tuple(_message(f"{row.source}: message {number}", item) for number, item in enumerate(items, 1))


def unlearned(row: Row, name: str) -> tuple[int, ...]:
    """The messages of a column whose weight is 0 (OpenAI's files; axolotl calls it train): they are not learned."""
    items = _turns(row.columns.get(name))
    return tuple(n for n, item in enumerate(items) if _weight(f"{row.source}: message {n + 1}", item) == 0)


def unread_fields(value: Any) -> set[str]:
    """The fields of ABOUT_MESSAGES in a list of messages."""
    messages = (item for item in value if isinstance(item, Mapping) and not ABOUT_MESSAGES.isdisjoint(item))
    return {name for message in messages for name in ABOUT_MESSAGES & message.keys()}


def _turns(value: Any) -> Any:
    """A column of messages as a list of them, also from JSON text; a pair of what was asked and said is two messages.

    One message, as LLaMA-Factory's pairs have it, is a list of one.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    items = [value] if isinstance(value, dict) else value
    for keys in PAIRS:
        if isinstance(items, list) and all(isinstance(item, dict) and {*keys} <= item.keys() for item in items):
            roles = tuple(zip(("user", "assistant"), keys, strict=True))
            return [
                {"role": role, "content": item[key]}
                for item in items
                for role, key in (("system", "system"), *roles)
                if item.get(key) is not None
            ]
    return items


def _weight(source: str, message: dict[str, Any]) -> int | None:
    """A message's weight in the loss, 0 or 1; None if it has none."""
    name = next((name for name in ("weight", "train") if message.get(name) is not None), "")
    value = message.get(name)
    if name and value not in (0, 1):
        raise InputError(f"{source}: {name} must be 0 or 1, not {short_repr(value)}")
    return None if not name else int(value or 0)


def _message(source: str, message: Any) -> Message:
    """A message's role and content, under any of ROLE_KEYS, and what else templates read.

    That is an assistant's reasoning, the tools that it calls, and a speaker's name. Anything else but ABOUT_MESSAGES
    would be lost, and is an error.
    """
    if not isinstance(message, dict):
        raise InputError(f"{source} must be an object with role and content, not {short_repr(message)}")
    keys = next((keys for keys in ROLE_KEYS if message.keys() >= {*keys}), None)
    keys = keys or (ROLE_KEYS[1] if "from" in message and "role" not in message else ROLE_KEYS[0])
    row = Row(source, {name: _joined(source, value) if name == keys[1] else value for name, value in message.items()})
    written = row.text(keys[0]).lower()
    role = ROLE_NAMES.get(written, written)
    if role not in ROLES:
        raise row.error(f"unknown role {short_repr(message[keys[0]])}: known are {', '.join(ROLES)}")
    others = message.keys() - NOT_WRITTEN - {*keys}
    rest = {name: message[name] for name in message if name in others and message[name] not in BLANK}
    if written == "function_call":
        return (role, "", {"tool_calls": _tool_calls(row, _as_function(row.json(keys[1])))})
    fields: dict[str, Any] = {name: rest.pop(name) for name in ("name",) if isinstance(rest.get(name), str)}
    if role == "assistant":
        name = next((name for name in THINKING_NAMES if name in rest), "")
        if thinking := row.optional_text(name):
            fields[THINKING] = thinking
        rest.pop(name, None)
        before = _as_function(rest.pop("function_call", None) or [])
        if calls := rest.pop("tool_calls", None) or before:
            fields["tool_calls"] = _tool_calls(row, calls)
    elif role == "tool" and "tool_call_id" in rest:
        fields["tool_call_id"] = rest.pop("tool_call_id")
    if rest:
        raise row.error(f"{short_repr(next(iter(rest)))} is not understood: a message has role and content, of text")
    may_be_empty = "tool_calls" in fields or (role in ("system", "tool") and message.get(keys[1]) is not None)
    content = row.optional_text(keys[1]) if may_be_empty else row.text(keys[1])
    return (role, content, fields) if fields else (role, content)


def _joined(source: str, content: Any) -> Any:
    """A content of parts (OpenAI's files), of which all are text, as one text; any other content as it is."""
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        return content
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InputError(
                f"{source}: content holds a part of type {short_repr(part.get('type'))}, and models here read text "
                "alone: leave the row out"
            )
    return "".join(part["text"] for part in content)


def _as_function(calls: Any) -> list[Any]:
    """Calls of functions, one or several, as calls of tools."""
    every = calls if isinstance(calls, list) else [calls]
    return [{"type": "function", "function": call} for call in every]


def _tool_calls(row: Row, calls: Any) -> list[dict[str, Any]]:
    calls = calls if isinstance(calls, list) else [calls]
    return [_tool_call(row, call) for call in row.as_json("tool_calls", calls)]


def _tool_call(row: Row, call: Any) -> dict[str, Any]:
    """A call of a tool. OpenAI's files have its arguments as JSON text; chat templates take an object."""
    inner = call.get("function", call) if isinstance(call, dict) else {}
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise row.error(f"tool_calls must be a list of functions with name and arguments, not {short_repr(call)}")
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise row.error(f"the arguments of {inner['name']} are broken JSON: {short_repr(arguments)}") from None
    inner = {**inner, "arguments": arguments}
    return {**call, "function": inner} if "function" in call else inner
