"""Messages and prompts from rows that hold them as one text, as a tree, or as a history of pairs."""

import re
from typing import Any

from graftlm.text.boundary import common_length
from graftlm.text.chat import Message
from graftlm.text.messages import ROLE_NAMES, read_messages
from graftlm.text.rows import Row

Said = str | tuple[Message, ...]
"""A prompt or an answer: a text, or messages."""

HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
TURN = re.compile(r"### ?(Human|Assistant): ?")
MARKUPS = (
    (re.compile(r"\n\n(Human|Assistant):"), ""),
    (re.compile(r"<\|im_start\|>(\w+)\n"), "<|im_end|>"),
    (re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>\n\n"), "<|eot_id|>"),
    (re.compile(r"<start_of_turn>(\w+)\n"), "<end_of_turn>"),
)
"""How a text may begin a turn, with its speaker, and end it: Anthropic's transcripts (HH), ChatML, Llama 3, Gemma."""


def alpaca_prompt(instruction: str, context: str) -> str:
    """Stanford Alpaca's prompt (Taori et al. 2023), without or with an input."""
    task = "Below is an instruction that describes a task"
    if context:
        task += ", paired with an input that provides further context"
        context = f"### Input:\n{context}\n\n"
    task += ". Write a response that appropriately completes the request."
    return f"{task}\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n"


def instruction(row: Row) -> str:
    """An instruction with its input, as LLaMA-Factory writes them into a message."""
    return "\n".join(filter(None, (row.text("instruction"), row.optional_text("input"))))


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


def written_turns(prompt: str, *answers: str) -> list[tuple[Message, ...]]:
    """The messages of a prompt that is a conversation in one of MARKUPS, and of its answers; [] for any other text."""
    for begins, end in MARKUPS:
        if begins.match(prompt.removeprefix("<|begin_of_text|>").removeprefix("<bos>")):
            *asked, (_, unanswered) = _turns(prompt, begins, end)
            opening = [match[0] for match in begins.finditer(prompt)][-1]
            said = [tuple(_turns(opening + answer, begins, end)) for answer in answers]
            return [] if unanswered else [tuple(asked), *said]
    return []


def _turns(text: str, begins: re.Pattern[str], end: str) -> list[tuple[str, str]]:
    """The speakers' roles and what they say, without the space around it."""
    _, *pieces = begins.split(text)
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [(ROLE_NAMES.get(who.lower(), who.lower()), said.strip().removesuffix(end).strip()) for who, said in turns]


def best_branch(row: Row, node: Any) -> tuple[Message, ...]:
    """The branch of a tree of messages (OASST) with the reply of best rank after each, up to its last answer.

    A reply without a rank comes after those that have one; a deleted one is left out.
    """
    messages: list[Message] = []
    while node is not None:
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


# Preferences ----------------------------------------------------------------------------------------------------------


def all_said(value: Said) -> str:
    """A text, or what messages say, as one text."""
    return value if isinstance(value, str) else "\n\n".join(f"{message[0]}: {message[1]}" for message in value)


def asked(row: Row, name: str) -> Said:
    """A prompt in the column of this name."""
    return read_messages(row, name) if isinstance(row.columns.get(name), list | dict) else row.text(name)


def asked_alpaca(row: Row) -> Said:
    """What Alpaca's columns ask: its prompt or, where there may be a history or a system message, messages."""
    if row.columns.get("history") is None and row.columns.get("system") is None:
        return alpaca_prompt(row.text("instruction"), row.optional_text("input"))
    return (*history(row), ("user", instruction(row)))


def said(row: Row, prompt: Said, *names: str) -> tuple[Said, ...]:
    """A prompt and the answers in the columns of these names.

    They are texts or, if one of them is messages or the row has a system message, all are messages.
    """
    are_texts = [not isinstance(row.columns.get(name), list | dict) for name in names]
    if isinstance(prompt, str) and all(are_texts) and row.columns.get("system") in (None, [], {}):
        row.refuse(("tools", "functions"))
        return (prompt, *map(row.text, names))
    prompt = with_system(row, "system", (("user", prompt),) if isinstance(prompt, str) else prompt)
    answers: list[Said] = []
    for name, is_text in zip(names, are_texts, strict=True):
        answer = (("assistant", row.text(name)),) if is_text else read_messages(row, name)
        if answer[-1][0] != "assistant":
            raise row.error(f"the last message of {name} is no answer of the assistant: leave the pair out")
        answers.append(answer)
    return (prompt, *answers)


def whole_pair(row: Row) -> tuple[Said, Said, Said]:
    """Prompt, chosen and rejected answer; without a prompt it is what both answers begin with, as TRL extracts it.

    Of texts that are transcripts of Anthropic's (HH) it ends with their last shared "Assistant:".
    """
    is_messages, prompt = isinstance(row.columns.get("chosen"), list | dict), row.columns.get("prompt")
    if prompt is not None and is_messages <= isinstance(prompt, list | dict):
        first, second, third = said(row, asked(row, "prompt"), "chosen", "rejected")
        return first, second, third
    if not is_messages:
        return _whole_texts(row, row.text("chosen"), row.text("rejected"))
    whole, other = read_messages(row, "chosen"), read_messages(row, "rejected")
    end = common_length(whole, other)
    before: tuple[Message, ...] = whole[:end] or ((("user", row.text("prompt")),) if prompt else ())
    answers = (whole[end:], other[end:])
    if not before or not all(answer and answer[-1][0] == "assistant" for answer in answers):
        raise row.error(
            "chosen and rejected must begin with the same messages, and each end with an answer of its own: leave the "
            "pair out, or give a column prompt"
        )
    return with_system(row, "system", before), *answers


def _whole_texts(row: Row, chosen: str, rejected: str) -> tuple[str, str, str]:
    row.refuse(("system", "tools", "functions"))
    end = common_length(chosen, rejected)
    if chosen.startswith(HH_HUMAN):
        end = chosen.rfind(HH_ASSISTANT, 0, end) + len(HH_ASSISTANT)
        end = 0 if end < len(HH_ASSISTANT) else end
    elif chosen[end - 1 : end] == " ":
        end -= 1
    if chosen.strip() == rejected.strip():
        raise row.error("chosen and rejected are the same text: leave the pair out")
    if not chosen[:end].strip() or not chosen[end:].strip() or not rejected[end:].strip():
        raise row.error(
            "no field 'prompt', and chosen and rejected are not one beginning with two ends: add the prompt"
        )
    return chosen[:end], chosen[end:], rejected[end:]
