"""The layouts of data files, and how their rows are converted to canonical records.

The rest of the program knows six kinds of record (`records.py`). Files differ in their columns: `LAYOUTS`
and `MORE_LAYOUTS` have one entry for each set of columns, with a function that converts a row to a canonical record.
A file's first row decides which layout it has (`recognise`). Every value is checked (`rows.py`); errors name file and
line.

To add a layout, write its function and its entry here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from graftlm.errors import InputError, did_you_mean
from graftlm.text.chat import Message
from graftlm.text.fields import Columns, missing_column
from graftlm.text.records import Completion, Conversation, Document, Labelled, Preference, Record, Unpaired
from graftlm.text.rows import BOOLEANS, Row, as_bool
from graftlm.text.transcripts import (
    Said,
    all_said,
    alpaca_prompt,
    asked,
    asked_alpaca,
    best_branch,
    history,
    said,
    transcript,
    whole_pair,
    with_system,
)

# Layouts --------------------------------------------------------------------------------------------------------------

CONTEXT = (
    *("system", "tools", "functions", "documents", "history", "chat_template_kwargs"),
    *("images", "image", "videos", "audios"),
)
"""Columns that hold a part of what an answer answers."""


@dataclass(frozen=True)
class Layout:
    """A set of columns, and how a row that has them becomes a canonical record."""

    name: str
    keys: tuple[str, ...]
    """A row with all of these columns has this layout."""
    convert: Callable[[Row], Record]
    optional: tuple[str, ...] = ()
    """Columns that `convert` reads if they are there."""
    matches: Callable[[Mapping[str, Any]], bool] = lambda columns: True
    """A further condition on the columns, where other layouts have the same keys."""
    refused: tuple[str, ...] = CONTEXT
    """Columns without which a row would mean something else, unless they are optional."""
    columns: tuple[tuple[str, str], ...] = ()
    """The columns that are read for some of the keys, as (key, column)."""

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(dict(self.columns).get(key, key) for key in self.keys)})"

    def record(self, row: Row) -> Record:
        """A row as a canonical record. Raises InputError for wrong values, and for what would be lost."""
        if named := {key: row.columns[column] for key, column in self.columns if column in row.columns}:
            row = replace(row, columns={**row.columns, **named})
        row.refuse(name for name in self.refused if name not in (*self.keys, *self.optional))
        record = self.convert(row)
        if not self.matches(row.columns):
            raise row.error(f"its columns do not fit the file's layout, {self}: write all rows in one layout")
        return record

    def unused(self, columns: Mapping[str, Any]) -> set[str]:
        """The columns with a value that the layout does not read."""
        return {name for name, value in columns.items() if value is not None} - {
            *(dict(self.columns).get(key, key) for key in self.keys),
            *self.optional,
        }


def _labelled(row: Row) -> Labelled:
    return Labelled(row.text("text"), row.label(), row.source)


def _completion(row: Row) -> Completion:
    prompt, completion = row.text("prompt"), row.text("completion")
    (finished,) = row.finished(1)
    return Completion(prompt, completion, row.source, finished)


def _pair(prompt: str, completion: str) -> Callable[[Row], Completion]:
    """A prompt and its completion, unchanged, in columns of these names."""
    return lambda row: Completion(row.text(prompt), row.text(completion), row.source)


def _preference(ask: Callable[[Row], Said]) -> Callable[[Row], Preference]:
    """A pair of answers to what `ask` finds in a row."""

    def convert(row: Row) -> Preference:
        prompt, chosen, rejected = said(row, ask(row), "chosen", "rejected")
        return _pair_of_answers(row, prompt, chosen, rejected)

    return convert


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
        messages = with_system(row, "system", row.messages(name))
        if messages[-1][0] != "assistant" or len(messages) < 2:
            raise row.error("its last message is no answer of the assistant: leave the row out")
        return Unpaired(messages[:-1], messages[-1:], row.desirable(), row.source, tools=row.tools())

    return convert


def _openai_preference(row: Row) -> Preference:
    """OpenAI's pair: messages and tools are in its input."""
    source = f"{row.source}: input"
    inner = Row(source, given) if isinstance(given := row.columns.get("input"), dict) else row
    row = Row(row.source, {**row.columns, **{name: inner.columns.get(name) for name in ("tools", "functions")}})
    prompt, chosen, rejected = said(row, inner.messages("messages"), "preferred_output", "non_preferred_output")
    return _pair_of_answers(row, prompt, chosen, rejected)


def _finished(row: Row, answers: int, prompt: Said) -> tuple[bool, ...]:
    """Whether the text ends with each answer; messages always end theirs."""
    finished = row.finished(answers)
    if not isinstance(prompt, str) and not all(finished):
        raise row.error("an answer that is not finished must be text: a message ends its turn")
    return finished


def _chat(name: str) -> Callable[[Row], Conversation]:
    """Messages in the column of this name."""

    def convert(row: Row) -> Conversation:
        messages, unlearned = row.messages(name), row.unlearned(name)
        return _conversation(row, messages, unlearned)

    return convert


def _conversation(row: Row, messages: tuple[Message, ...], unlearned: Iterable[int] = ()) -> Conversation:
    """A conversation, after the column system if there is one. unlearned: the messages that are not learned."""
    before = len(messages)
    messages = with_system(row, "system", messages)
    hidden = tuple(n + len(messages) - before for n in unlearned)
    if not any(message[0] == "assistant" and n not in hidden for n, message in enumerate(messages)):
        raise row.error("the assistant says nothing, so there is nothing to learn: leave the row out")
    hidden = tuple(n for n in hidden if messages[n][0] == "assistant")
    return Conversation(messages, row.source, row.tools(), hidden)


def _chat_completion(row: Row) -> Conversation:
    """TRL's conversational prompt and completion: only what the completion says is learned."""
    prompt, completion = row.messages("prompt"), row.messages("completion")
    return _conversation(row, prompt + completion, range(len(prompt)))


def _alpaca(answer: str, context: str = "input") -> Callable[[Row], Completion]:
    """Alpaca's prompt, with the answer and the input in columns of these names."""

    def convert(row: Row) -> Completion:
        prompt = alpaca_prompt(row.text("instruction"), row.optional_text(context))
        return Completion(prompt, row.text(answer), row.source)

    return convert


def _alpaca_chat(row: Row) -> Conversation:
    """LLaMA-Factory's Alpaca: earlier pairs of question and answer are a history, and all answers are learned."""
    asked = "\n".join(filter(None, (row.text("instruction"), row.optional_text("input"))))
    return _conversation(row, (*history(row), ("user", asked), ("assistant", row.text("output"))))


def _orca(row: Row) -> Conversation:
    messages: tuple[Message, ...] = (("user", row.text("question")), ("assistant", row.text("response")))
    return _conversation(row, with_system(row, "system_prompt", messages))


def _guanaco(row: Row) -> Conversation:
    return _conversation(row, transcript(row, "text"))


def _oasst_tree(row: Row) -> Conversation:
    return _conversation(row, best_branch(row, "prompt"))


def _oasst_message(row: Row) -> Conversation:
    raise row.error("a row is one message of a tree: use OASST's file of trees, or write a conversation a row")


def _is_list(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether any of these columns holds a list, as messages are."""
    return lambda columns: any(isinstance(columns.get(name), list) for name in names)


def _without(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether none of these columns is there."""
    return lambda columns: columns.keys().isdisjoint(names)


def _is_completion(columns: Mapping[str, Any]) -> bool:
    return str(columns.get("label")).strip().casefold() not in BOOLEANS and not _is_list("prompt")(columns)


def _is_pair(columns: Mapping[str, Any]) -> bool:
    return columns.keys() >= {"chosen", "rejected"}


def _is_marked(columns: Mapping[str, Any]) -> bool:
    """Whether a conversation is marked as desirable or not."""
    return not _is_pair(columns) and str(columns.get("label")).strip().casefold() in BOOLEANS


def _is_chat(columns: Mapping[str, Any]) -> bool:
    return not _is_pair(columns) and not _is_marked(columns)


def _is_transcript(columns: Mapping[str, Any]) -> bool:
    return str(columns["text"]).lstrip().startswith("### Human:")


LABELLED = "labelled"
ENDS = ("finished", "ended")
SPEAKERS = ("system", "tools", "functions")
"""What conversations may have with their messages."""
ASIDE = (*CONTEXT, "context", "passage", "input")

LAYOUTS = (
    Layout(LABELLED, ("text", "label"), _labelled, refused=()),
    Layout("completion", ("prompt", "completion"), _completion, ENDS, _is_completion),
    Layout("preference", ("chosen", "rejected"), _implicit_preference, ("prompt", *ENDS, *SPEAKERS)),
    Layout(
        "unpaired preference",
        ("prompt", "completion", "label"),
        _unpaired,
        (*ENDS, *SPEAKERS),
        lambda columns: as_bool(columns.get("label")) is not None,
    ),
    Layout("chat", ("messages",), _chat("messages"), SPEAKERS, _is_chat),
    Layout("sharegpt", ("conversations",), _chat("conversations"), SPEAKERS, _is_chat),
    Layout("alpaca", ("instruction", "output"), _alpaca("output"), ("input",), _without("history", "system")),
    Layout("unpaired chat", ("messages", "label"), _unpaired_chat("messages"), SPEAKERS, _is_marked),
    Layout("unpaired sharegpt", ("conversations", "label"), _unpaired_chat("conversations"), SPEAKERS, _is_marked),
    *(
        Layout(
            f"preference after {keys[0]}",
            (*keys, "chosen", "rejected"),
            convert,
            (*optional, *SPEAKERS),
            _without("prompt"),
        )
        for keys, optional, convert in (
            (("instruction",), ("input", "history"), _preference(asked_alpaca)),
            (("question",), (), _preference(lambda row: asked(row, "question"))),
            (("conversations",), (), _preference(lambda row: row.messages("conversations"))),
        )
    ),
    Layout(
        "OpenAI preference",
        ("input", "preferred_output", "non_preferred_output"),
        _openai_preference,
    ),
)
"""The layouts that are tried first."""
COMMON = 7
"""How many of them errors list."""

MORE_LAYOUTS = (
    Layout(
        "alpaca chat",
        ("instruction", "output"),
        _alpaca_chat,
        ("input", "history", *SPEAKERS),
        lambda columns: not _without("history", "system")(columns),
    ),
    Layout("instruction", ("instruction", "response"), _alpaca("response"), ("input",), _without("context")),
    Layout("dolly", ("instruction", "context", "response"), _alpaca("response", "context")),
    Layout("orca", ("system_prompt", "question", "response"), _orca, SPEAKERS),
    Layout("chat completion", ("prompt", "completion"), _chat_completion, SPEAKERS, _is_list("prompt")),
    *(
        Layout(f"{prompt} and {answer}", (prompt, answer), _pair(prompt, answer), refused=ASIDE)
        for prompt, answer in (
            *(("prompt", "response"), ("prompt", "generation"), ("prompt", "output"), ("prompt", "answer")),
            *(("question", "answer"), ("question", "response"), ("query", "response"), ("document", "summary")),
            *(("article", "highlights"), ("article", "summary"), ("dialogue", "summary")),
        )
    ),
    Layout("input and output", ("input", "output"), _pair("input", "output"), matches=_without("instruction")),
    *(
        Layout(f"chat in {name}", (name,), _chat(name), SPEAKERS, _is_list(name))
        for name in ("conversation", "dialogue", "dialog")
    ),
    Layout("guanaco", ("text",), _guanaco, matches=_is_transcript),
    Layout("oasst tree", ("prompt", "message_tree_id"), _oasst_tree),
    Layout("oasst message", ("message_id", "parent_id", "text", "role"), _oasst_message),
)
"""The layouts that are tried where none of LAYOUTS fits."""

LABELLED_NAMES = {
    "text": ("text", "sentence", "review", "content", "tweet", "question", "comment"),
    "label": ("label", "labels", "sentiment", "stars", "rating", "category", "class"),
}
"""What the columns of a labelled text are called elsewhere, in any case; tried last."""


DOCUMENTS = Layout("documents", ("text",), lambda row: Document(row.optional_text("text"), row.source), refused=())
"""The layout of a file with a column text, and no other but ABOUT_DOCUMENTS; a text may be empty."""
ABOUT_DOCUMENTS = {
    *("id", "url", "title", "source", "version", "meta", "metadata", "file_path", "dump"),
    *("date", "timestamp", "added", "created", "language", "language_score", "token_count"),
}
"""Columns that say where a document is from; they are not learned."""


def check_columns(columns: Columns) -> None:
    """Raise InputError for fields of --columns that no layout reads, or none reads together."""
    every = (*LAYOUTS, *MORE_LAYOUTS)
    fields = list(dict.fromkeys(key for layout in every for key in (*layout.keys, *layout.optional)))
    for key, column in columns.items():
        if key not in fields:
            hint = did_you_mean(key, fields)
            raise InputError(f"--columns {key}={column}: no field {key!r}: {hint}fields are {', '.join(fields)}")
    if not _readable(every, columns):
        raise InputError(
            f"--columns: no layout reads {' and '.join(columns)} together: leave one out; the layouts are {_names()}"
        )


def recognise(path: object, columns: Mapping[str, Any], mapped: Sequence[str] = ()) -> Layout:
    """The layout of a file, from the columns of its first row.

    mapped: the columns named by --columns; the layout must read all of them. LAYOUTS are tried before MORE_LAYOUTS, and
    those before the other names of a labelled text's columns. A layout whose keys are a part of another's gives way to
    it, unless --columns names exactly its keys. Raises InputError for an unknown layout, and where several remain.
    """
    for layouts in (LAYOUTS, MORE_LAYOUTS):
        readable = _readable(layouts, mapped)
        fitting = [layout for layout in readable if columns.keys() >= {*layout.keys} and layout.matches(columns)]
        fitting = [layout for layout in fitting if {*layout.keys} <= {*mapped}] or fitting
        fitting = [layout for layout in fitting if not any({*layout.keys} < {*other.keys} for other in fitting)]
        if len(fitting) > 1:
            choices = " or ".join(f"--columns {','.join(f'{key}={key}' for key in layout.keys)}" for layout in fitting)
            raise InputError(
                f"{path}: the columns fit several layouts, {' and '.join(map(str, fitting))}: choose {choices}"
            )
        if fitting:
            return fitting[0]
    if columns.keys() - ABOUT_DOCUMENTS == {"text"} and {*mapped} <= {"text"}:
        return DOCUMENTS
    named = _named_otherwise(path, columns)
    if named is None or not {*mapped} <= {*named.keys}:
        raise _unknown(path, columns, _readable((*LAYOUTS, *MORE_LAYOUTS), mapped))
    return named


def _named_otherwise(path: object, columns: Mapping[str, Any]) -> Layout | None:
    """The layout of a labelled text whose columns have other names. Raises InputError if there are several of them."""
    found: dict[str, list[str]] = {}
    written = {str(column).strip().casefold(): column for column in columns}
    for key, known in LABELLED_NAMES.items():
        found[key] = [key] if key in columns else [written[name] for name in known if name in written]
        found[key] = [name for name in found[key] if name.strip().casefold() == key] or found[key]
    if not all(found.values()):
        return None
    for key, names in found.items():
        if len(names) > 1:
            choices = " or ".join(f"--columns {key}={name}" for name in names)
            raise InputError(f"{path}: the {key} may be in column {' or '.join(names)}: choose {choices}")
    return replace(LAYOUTS[0], columns=tuple((key, names[0]) for key, names in found.items() if names != [key]))


def _unknown(path: object, columns: Mapping[str, Any], layouts: Sequence[Layout]) -> InputError:
    """The error for columns without a layout: it names the first column that the closest layout lacks."""
    if columns and not any(columns.keys() & {*layout.keys} for layout in layouts):
        present = ", ".join(map(str, columns))
        return InputError(
            f"{path}: its columns, {present}, fit no layout: map them with --columns; they are {_names()}"
        )
    lacking = [layout for layout in layouts if not columns.keys() >= {*layout.keys}] or layouts
    shared = [len(columns.keys() & {*layout.keys}) for layout in lacking]
    ranks = [(count, count / len(layout.keys)) for count, layout in zip(shared, lacking, strict=True)]
    closest = lacking[ranks.index(max(ranks))]
    missing = next((key for key in closest.keys if key not in columns), closest.keys[0])
    return InputError(f"{path}: {missing_column(missing, columns, missing)}; the layouts are {_names()}")


def _readable(layouts: Sequence[Layout], fields: Iterable[str]) -> list[Layout]:
    """Those of the layouts that read all these fields."""
    return [layout for layout in layouts if {*fields} <= {*layout.keys, *layout.optional}]


def _names() -> str:
    others = len(LAYOUTS) + len(MORE_LAYOUTS) - COMMON
    return f"{', '.join(map(str, LAYOUTS[:COMMON]))}, and {others} more (docs/how-to.md)"
