"""Tools in chats: what the model's chat template writes of them, and the calls that an answer must be or may have."""

from collections.abc import Sequence
from typing import Any

from graftlm.errors import InputError
from graftlm.serving.schemas import APIError, ChatBody, MessageBody, Sampling
from graftlm.text.tool_calls import CallFormat, CallStream, ToolSupport

PROBLEM = "the model's chat template does not write"


def check_messages(support: ToolSupport, messages: Sequence[MessageBody]) -> None:
    """Raise APIError for calls and results that the chat template does not write."""
    if any(each.tool_calls for each in messages) and not support.calls:
        raise APIError(400, f"messages: {PROBLEM} tool_calls", param="messages", code="unsupported_tools")
    if any(each.role == "tool" for each in messages) and not support.results:
        raise APIError(400, f"messages: {PROBLEM} messages of role tool", param="messages", code="unsupported_tools")


def written_tools(support: ToolSupport, body: ChatBody) -> list[dict[str, Any]]:
    """The tools for the chat template. Raises APIError if it cannot write them, and no call is forced."""
    if not body.callable or (body.forces_call and not support.tools):
        return []
    if not body.forces_call and not (support.tools and support.format):
        lost = "calls as JSON objects" if support.tools else "tools"
        message = f"tools: {PROBLEM} {lost}: force a call by tool_choice, or leave them out"
        raise APIError(400, message, param="tools", code="unsupported_tools")
    return [{"type": "function", "function": each} for each in body.callable]


def forced_call(support: ToolSupport, body: ChatBody) -> tuple[str, dict[str, Any] | None]:
    """The beginning of an answer that must be a call, and the JSON schema of the rest; ("", None) for other answers."""
    if not body.forces_call:
        return "", None
    form = support.format or CallFormat()
    try:
        return form.before, form.schema(body.callable)
    except InputError as error:
        raise APIError(400, f"tools: {error}", param="tools", code="invalid_json_schema") from None


def call_streams(support: ToolSupport, body: Sampling) -> list[CallStream]:
    """What finds the calls in each choice; empty without tools."""
    if not isinstance(body, ChatBody) or not body.callable:
        return []
    names = [each["name"] for each in body.callable]
    return [CallStream(support.format or CallFormat(), names, body.forces_call) for _ in range(body.n)]
