"""The layouts of data files, and how their rows are converted to canonical records.

The rest of the program knows six kinds of record (`records.py`). Files differ in their columns: `LAYOUTS`
and `MORE_LAYOUTS` have one entry for each set of columns, with a function that converts a row to a canonical record.
A file's first row decides which layout it has (`recognise.py`). Every value is checked (`rows.py`); errors name file
and line.

To add a layout, write its function and its entry here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from graftlm.text.chat import Message
from graftlm.text.column_names import ASIDE, BEFORE, CHOICES, CONTEXT, ENDS, LABELS, PAIRED, SPEAKERS, TASK, TEXTS, TURN
from graftlm.text.layout import Layout, small
from graftlm.text.messages import read_messages, unlearned
from graftlm.text.records import Completion, Conversation, Document, Labelled, Preference, Unpaired
from graftlm.text.rows import BOOLEANS, Row, as_bool
from graftlm.text.transcripts import (
    Said,
    all_said,
    alpaca_prompt,
    asked,
    asked_alpaca,
    best_branch,
    history,
    instruction,
    said,
    transcript,
    whole_pair,
    with_system,
)

# Rows to records ------------------------------------------------------------------------------------------------------


def _labelled(row: Row) -> Labelled:
    return Labelled(row.text("text"), row.label(), row.source)


def _completion(row: Row) -> Completion:
    prompt, completion = row.text("prompt"), row.text("completion")
    (finished,) = row.finished(1)
    return Completion(prompt, completion, row.source, finished)


def _summary(row: Row) -> Completion:
    return Completion(row.text("text"), row.text("summary"), row.source)


def _answered_from_text(row: Row) -> Completion:
    """A question about a text; of several answers the first (SQuAD's evaluation files have several) is learned.

    axolotl's context_qa.load_v2 writes it so.
    """
    answer = row.columns.get("answer")
    answer = answer.get("text") if isinstance(answer, dict) else answer
    if isinstance(answer, list):
        first = answer[0] if answer else None
        answer = first.get("text") if isinstance(first, dict) else first
    if isinstance(answer, bool):
        answer = "yes" if answer else "no"
    answer = Row(row.source, {"answer": answer}).text("answer")
    context = f"Context: {text}\n" if (text := row.optional_text("context")) else ""
    return Completion(f"{context}Question: {row.text('question')}\nAnswer:", f" {answer}", row.source)


def _document(row: Row) -> Document:
    return Document(row.optional_text("text"), row.source)


def _unprompted(row: Row) -> Document:
    """A completion of nothing, or of a line break."""
    return Document((row.columns["prompt"] or "") + row.text("completion"), row.source)


def _two_texts(first: str, second: str) -> Callable[[Row], Labelled]:
    """Two texts with one label, as one text: each follows its column's name, as T5 reads GLUE (Raffel et al. 2020)."""

    def convert(row: Row) -> Labelled:
        texts = f"{first}: {row.text(first)}\n{second}: {row.text(second)}"
        return Labelled(texts, row.label(), row.source)

    return convert


def _preference(ask: Callable[[Row], Said]) -> Callable[[Row], Preference]:
    """A pair of answers to what `ask` finds in a row."""

    def convert(row: Row) -> Preference:
        prompt, chosen, rejected = said(row, ask(row), "chosen", "rejected")
        return _pair_of_answers(row, prompt, chosen, rejected)

    return convert


def _alpaca_preference(row: Row) -> Preference:
    """A pair of answers to Alpaca's prompt."""
    return replace(_preference(asked_alpaca)(row), question=instruction(row))


def _implicit_preference(row: Row) -> Preference:
    """A pair that says its prompt in a column or, as TRL reads it, at the beginning of both answers."""
    return _pair_of_answers(row, *whole_pair(row))


def _pair_of_answers(row: Row, prompt: Said, chosen: Said, rejected: Said) -> Preference:
    if all_said(chosen).strip() == all_said(rejected).strip():
        raise row.error("chosen and rejected are the same text: leave the pair out")
    first, second = _finished(row, 2, prompt)
    return Preference(prompt, chosen, rejected, row.source, (first, second), row.tools())


def _unpaired(row: Row) -> Unpaired:
    prompt, completion = said(row, asked(row, "prompt"), "completion")
    label, (finished,) = row.desirable(), _finished(row, 1, prompt)
    return Unpaired(prompt, completion, label, row.source, finished, row.tools())


def _unpaired_chat(name: str) -> Callable[[Row], Unpaired]:
    """LLaMA-Factory's conversation in the column of this name, whose last answer is desirable or not."""

    def convert(row: Row) -> Unpaired:
        messages = with_system(row, "system", read_messages(row, name))
        if messages[-1][0] != "assistant" or len(messages) < 2:
            raise row.error("its last message is no answer of the assistant: leave the row out")
        return Unpaired(messages[:-1], messages[-1:], row.desirable(), row.source, tools=row.tools())

    return convert


def _openai_preference(row: Row) -> Preference:
    """OpenAI's pair: messages and tools are in its input."""
    source = f"{row.source}: input"
    inner = Row(source, given) if isinstance(given := row.columns.get("input"), dict) else row
    row = Row(row.source, {**row.columns, **{name: inner.columns.get(name) for name in ("tools", "functions")}})
    prompt, chosen, rejected = said(row, read_messages(inner, "messages"), "preferred_output", "non_preferred_output")
    return _pair_of_answers(row, prompt, chosen, rejected)


def _finished(row: Row, answers: int, prompt: Said) -> tuple[bool, ...]:
    """Whether the text ends with each answer; messages always end theirs."""
    finished = row.finished(answers)
    if not isinstance(prompt, str) and not all(finished):
        raise row.error("an answer that is not finished must be text: a message ends its turn")
    return finished


def _chat(name: str) -> Callable[[Row], Conversation]:
    """Messages in the column of this name."""
    return lambda row: _conversation(row, read_messages(row, name), unlearned(row, name))


def _conversation(row: Row, messages: tuple[Message, ...], without_loss: Iterable[int] = ()) -> Conversation:
    """A conversation, after the column system if there is one. without_loss: the messages that are not learned."""
    before = len(messages)
    messages = with_system(row, "system", messages)
    hidden = {n + len(messages) - before for n in without_loss}
    said = [n for n, message in enumerate(messages) if message[0] == "assistant"]
    if hidden.issuperset(said):
        raise row.error("the assistant says nothing, so there is nothing to learn: leave the row out")
    return Conversation(messages, row.source, row.tools(), tuple(n for n in said if n in hidden))


def _chat_completion(row: Row) -> Conversation:
    """TRL's conversational prompt and completion: only what the completion says is learned."""
    prompt, completion = read_messages(row, "prompt"), read_messages(row, "completion")
    return _conversation(row, prompt + completion, range(len(prompt)))


def _alpaca(row: Row) -> Completion:
    prompt = alpaca_prompt(row.text("instruction"), row.optional_text("input"))
    return Completion(prompt, row.text("output"), row.source, question=instruction(row))


def _alpaca_chat(row: Row) -> Conversation:
    """LLaMA-Factory's Alpaca: earlier pairs of question and answer are a history, and all answers are learned."""
    return _conversation(row, (*history(row), ("user", instruction(row)), ("assistant", row.text("output"))))


def _unpaired_alpaca(row: Row) -> Unpaired:
    prompt, completion = said(row, asked_alpaca(row), "output")
    return Unpaired(prompt, completion, row.desirable(), row.source, tools=row.tools(), question=instruction(row))


def _single_turn(row: Row) -> Conversation:
    """A question and its answer, after a history or a system message."""
    return _conversation(row, (*history(row), ("user", row.text("prompt")), ("assistant", row.text("completion"))))


def _guanaco(row: Row) -> Conversation:
    return _conversation(row, transcript(row, "text"))


def _oasst_tree(row: Row) -> Conversation:
    tree = row.columns.get("prompt")
    if not isinstance(tree, dict):
        raise row.error("prompt must be a tree of messages with text, role and replies")
    return _conversation(row, best_branch(row, tree))


def _oasst_messages(row: Row) -> Conversation:
    if row.columns.get("parent_id") is not None:
        raise row.error(f"the message before it, {row.columns['parent_id']}, is not in the file: leave the row out")
    return _conversation(row, best_branch(row, row.columns))


# Conditions on columns ------------------------------------------------------------------------------------------------


def _is_list(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether any of these columns holds a list, as messages are."""
    return lambda columns: any(isinstance(columns.get(name), list) for name in names)


def _lacks(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether none of these columns has a value; a blank one counts."""
    return lambda columns: all(columns.get(name) is None for name in names)


def _is_pair(columns: Mapping[str, Any]) -> bool:
    return columns.keys() >= {"chosen", "rejected"}


def _is_marked(columns: Mapping[str, Any]) -> bool:
    """Whether an answer is marked as desirable or not; LLaMA-Factory's mark is kto_tag."""
    return not _is_pair(columns) and small(columns.get("label", columns.get("kto_tag"))) in BOOLEANS


def _is_chat(columns: Mapping[str, Any]) -> bool:
    """Whether what a row answers is learned."""
    return not _is_pair(columns) and not _is_marked(columns)


def _is_turn(columns: Mapping[str, Any]) -> bool:
    """Whether prompt and completion are texts."""
    return _is_chat(columns) and not _is_list("prompt", "completion")(columns) and not _is_unprompted(columns)


def _is_unprompted(columns: Mapping[str, Any]) -> bool:
    prompt = columns.get("prompt")
    return isinstance(prompt, str) and not prompt.strip()


def _is_transcript(columns: Mapping[str, Any]) -> bool:
    return str(columns["text"]).lstrip().startswith("### Human:")


# The tables -----------------------------------------------------------------------------------------------------------

LABELLED = "labelled"

TEXT_AND_LABEL = Layout(LABELLED, ("text", "label"), _labelled, refused=CHOICES, also=TEXTS | LABELS)
PAIR = Layout("completion", ("prompt", "completion"), _completion, ENDS, _is_turn, BEFORE, also=TURN)
ALPACA = Layout("alpaca", ("instruction", "output"), _alpaca, ("input",), _is_chat, BEFORE, also=TASK)
UNPAIRED = Layout(
    "unpaired preference",
    ("prompt", "completion", "label"),
    _unpaired,
    (*ENDS, *SPEAKERS),
    lambda columns: as_bool(columns.get("label")) is not None,
    also=TURN,
)

CHATS = tuple(
    Layout(name, (column,), _chat(column), SPEAKERS, _is_chat)
    for name, column in (("chat", "messages"), ("sharegpt", "conversations"))
)
PREFERENCE = Layout(
    "preference", ("chosen", "rejected"), _implicit_preference, ("prompt", *ENDS, *SPEAKERS), also=PAIRED
)
PREFERENCES = tuple(
    Layout(
        f"preference after {prompt}",
        (prompt, "chosen", "rejected"),
        convert,
        (*optional, *SPEAKERS),
        _lacks("prompt"),
        without,
        also=PAIRED,
    )
    for prompt, optional, convert, without in (
        ("instruction", ("input", "history"), _alpaca_preference, ()),
        *(
            (name, (), _preference(partial(asked, name=name)), ("instruction",))
            for name in ("question", "query", "input", "conversations")
        ),
    )
)

LAYOUTS = (
    TEXT_AND_LABEL,
    PAIR,
    PREFERENCE,
    UNPAIRED,
    *CHATS,
    ALPACA,
    *PREFERENCES,
    Layout(
        "preference after messages",
        ("messages", "chosen", "rejected"),
        _preference(partial(asked, name="messages")),
        SPEAKERS,
        lambda columns: _lacks("prompt")(columns) and not _is_list("chosen")(columns),
    ),
    Layout("OpenAI preference", ("input", "preferred_output", "non_preferred_output"), _openai_preference),
)
"""The layouts that are tried first."""
COMMON = 7
"""How many of them errors list."""

UNPAIRED_CHATS = tuple(
    Layout(f"unpaired {layout}", (name, "label"), _unpaired_chat(name), SPEAKERS, _is_marked, also=TURN)
    for layout, name in (("chat", "messages"), ("sharegpt", "conversations"))
)
UNPAIRED_ALPACA = Layout(
    "unpaired alpaca",
    ("instruction", "output", "label"),
    _unpaired_alpaca,
    ("input", "history", *SPEAKERS),
    _is_marked,
    also=TASK,
)
ALPACA_CHAT = Layout(
    "alpaca chat", ("instruction", "output"), _alpaca_chat, ("input", "history", *SPEAKERS), _is_chat, also=TASK
)
CHAT_TURN = Layout(
    "chat of one turn", ("prompt", "completion"), _single_turn, ("history", *SPEAKERS), _is_turn, also=TURN
)
ABOUT_A_TEXT = Layout(
    "question about a text",
    ("context", "question", "answer"),
    _answered_from_text,
    refused=(*CONTEXT, *CHOICES),
    also={"context": ("passage", "article", "document", "text"), "answer": ("answers",)},
)
TWO_TEXTS = tuple(
    Layout(LABELLED, (*texts, "label"), _two_texts(*texts), refused=(), also=LABELS)
    for texts in (
        *(("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2")),
        *(("question", "sentence"), ("question", "passage")),
    )
)

MORE_LAYOUTS = (
    *UNPAIRED_CHATS,
    UNPAIRED_ALPACA,
    ALPACA_CHAT,
    CHAT_TURN,
    Layout("chat completion", ("prompt", "completion"), _chat_completion, SPEAKERS, _is_list("prompt")),
    Layout("documents", ("prompt", "completion"), _unprompted, (), _is_unprompted),
    Layout("completion", ("text", "summary"), _summary, matches=_lacks("label")),
    ABOUT_A_TEXT,
    *TWO_TEXTS,
    *(
        Layout(f"chat in {name}", (name,), _chat(name), SPEAKERS, _is_list(name))
        for name in ("conversation", "dialogue", "dialog")
    ),
    Layout("guanaco", ("text",), _guanaco, matches=_is_transcript),
    Layout("best branch of OASST's tree", ("prompt", "message_tree_id"), _oasst_tree),
    Layout(
        "best branch of OASST's messages", ("message_id", "parent_id", "text", "role"), _oasst_messages, ("replies",)
    ),
)
"""The layouts that are tried where none of LAYOUTS fits."""

OTHER_NAMES = (
    ABOUT_A_TEXT,
    *TWO_TEXTS,
    *UNPAIRED_CHATS,
    *(ALPACA, UNPAIRED_ALPACA, ALPACA_CHAT),
    *(*PREFERENCES, PREFERENCE),
    *(*CHATS, UNPAIRED, replace(PAIR, refused=ASIDE), CHAT_TURN, TEXT_AND_LABEL),
)
"""The layouts that are tried with other names of their columns, in this order."""

DOCUMENTS = Layout("documents", ("text",), _document, refused=())
"""The layout of a file with a column text, and no other but ABOUT_DOCUMENTS; a text may be empty."""
