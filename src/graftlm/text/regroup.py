"""Rows that are not one record each: messages of a tree are put together, articles with questions are divided."""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from graftlm.errors import InputError

Sourced = tuple[str, dict[str, Any]]
"""A row, after its file and line."""


def regroup(rows: Iterator[Sourced]) -> Iterator[Sourced]:
    """The rows of a file, one for each record; the first row decides what is done."""
    first = next(rows, None)
    if first is None:
        return iter(())
    rows, columns = chain([first], rows), first[1]
    if columns.keys() >= {"message_id", "parent_id", "text", "role"} and "replies" not in columns:
        return _trees(rows)
    if isinstance(columns.get("paragraphs"), list):
        return _questions(rows)
    return rows


def _trees(rows: Iterator[Sourced]) -> Iterator[Sourced]:
    """The first messages of OASST's trees, each with its replies; all rows are in memory."""
    messages: dict[str, Sourced] = {}
    for source, values in rows:
        own = str(values.get("message_id"))
        if own in messages:
            raise InputError(f"{source}: message_id {own} occurs twice: leave one row out")
        messages[own] = source, {**values, "replies": []}
    parents = [messages.get(str(message.get("parent_id"))) for _, message in messages.values()]
    for (_, message), parent in zip(messages.values(), parents, strict=True):
        if parent is not None:
            parent[1]["replies"].append(message)
    return (message for message, parent in zip(messages.values(), parents, strict=True) if parent is None)


def _questions(rows: Iterator[Sourced]) -> Iterator[Sourced]:
    """The questions of articles as SQuAD's files have them, each with its paragraph."""
    for source, article in rows:
        try:
            asked = [(part["context"], question) for part in article["paragraphs"] for question in part["qas"]]
            answered = [{"context": context, **question} for context, question in asked]
        except (KeyError, TypeError):
            raise InputError(f"{source}: paragraphs must be a list of objects with context and qas") from None
        rest = {name: value for name, value in article.items() if name != "paragraphs"}
        yield from ((f"{source}, question {n}", rest | question) for n, question in enumerate(answered, 1))
