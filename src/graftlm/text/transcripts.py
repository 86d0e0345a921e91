"""Messages and prompts from rows that hold them as one text, as a tree, or as a history of pairs."""

import re
from typing import Any

from graftlm.text.chat import Message
from graftlm.text.rows import ROLE_NAMES, Row

TURN = re.compile(r"### ?(Human|Assistant): ?")


def alpaca_prompt(instruction: str, context: str) -> str:
    """Stanford Alpaca's prompt (Taori et al. 2023), without or with an input."""
    task = "Below is an instruction that describes a task"
    if context:
        task += ", paired with an input that provides further context"
        context = f"### Input:\n{context}\n\n"
    task += ". Write a response that appropriately completes the request."
    return f"{task}\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n"


def with_system(row: Row, name: str, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages after the system message in the column of this name, if it has one."""
    system = row.optional_text(name)
    if system and any(message[0] == "system" for message in messages):
        raise row.error(f"both a column {name} and a system message: leave one out")
    return (("system", system), *messages) if system else messages


def history(row: Row) -> tuple[Message, ...]:
    """Column "history" as messages: pairs of what was asked and answered."""
    messages: list[Message] = []
    for pair in row.columns.get("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise row.error("history must be a list of pairs, what was asked and what was answered")
        turn = Row(row.source, {"the question in history": pair[0], "the answer in history": pair[1]})
        messages += zip(("user", "assistant"), map(turn.text, turn.columns), strict=True)
    return tuple(messages)


def transcript(row: Row, name: str) -> tuple[Message, ...]:
    """A column with the text "### Human: …### Assistant: …" (Guanaco) as messages, without the space around them."""
    before, *pieces = TURN.split(row.text(name))
    messages = tuple(zip(pieces[::2], map(str.strip, pieces[1::2]), strict=True))
    if before.strip() or not all(text for _, text in messages):
        raise row.error(f"{name} is no transcript of ### Human: and ### Assistant: with a text after each")
    return tuple((ROLE_NAMES.get(speaker.lower(), speaker.lower()), text) for speaker, text in messages)


def best_branch(row: Row, name: str) -> tuple[Message, ...]:
    """The branch of a tree of messages (OASST) with the reply of best rank after each, up to its last answer.

    A reply without a rank comes after those that have one; a deleted one is left out.
    """
    messages: list[Message] = []
    node: Any = row.columns.get(name)
    while node is not None:
        if not isinstance(node, dict):
            raise row.error(f"{name} must be a tree of messages with text, role and replies")
        part = Row(row.source, node)
        messages.append((ROLE_NAMES.get(part.text("role"), part.text("role")), part.text("text")))
        replies = [reply for reply in node.get("replies") or () if isinstance(reply, dict) and not reply.get("deleted")]
        node = min(replies, key=_rank, default=None)
    while messages and messages[-1][0] != "assistant":
        messages.pop()
    return tuple(messages)


def _rank(reply: dict[str, Any]) -> float:
    rank = reply.get("rank")
    return float(rank) if isinstance(rank, int | float) else float("inf")
