"""Canonical records, and the layouts of data files that are converted to them.

The rest of the program knows six kinds of record (`Labelled` … `Document`). Files differ in their columns: `LAYOUTS`
has one entry for each set of columns, with a function that converts a row to a canonical record. A file's first row
decides which layout it has (`recognise`). Every value is checked; errors name file and line.

To add a layout, write its function and its entry here.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from graftlm.errors import InputError, did_you_mean
from graftlm.files.readers import short_repr
from graftlm.text.chat import ROLES, THINKING, THINKING_NAMES, Message
from graftlm.text.words import normalize

# Canonical records ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text to classify, and its label number."""

    text: str
    label: int
    source: str = ""
    """File and line of a record, for errors."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and the completion to learn."""

    prompt: str
    completion: str
    source: str = ""
    finished: bool = True
    """Whether the text ends where the completion does; False for a truncated answer, which gets no end-of-text."""

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with two answers: the chosen one was preferred to the rejected one."""

    prompt: str
    chosen: str
    rejected: str
    source: str = ""
    finished: tuple[bool, bool] = (True, True)
    """As in `Completion`, for each answer."""

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt


@dataclass(frozen=True, slots=True)
class Unpaired:
    """A prompt with one answer, and whether that answer is desirable (KTO)."""

    prompt: str
    completion: str
    label: bool
    source: str = ""
    finished: bool = True

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of several roles; what the assistant says is learned."""

    messages: tuple[Message, ...]
    source: str = ""
    tools: tuple[Any, ...] = ()
    """What the assistant may call, as JSON schemas."""

    @property
    def text(self) -> str:
        """All that is said."""
        return "\n\n".join(f"{message[0]}: {message[1]}" for message in self.messages)


@dataclass(frozen=True, slots=True)
class Document:
    """A text on its own, such as a prompt to answer."""

    text: str
    source: str = ""


Record = Labelled | Completion | Preference | Unpaired | Conversation


def hashed_values(record: Record) -> list[Any]:
    """What a data set's fingerprint hashes. Runs record the hash, so the values of existing data must not change."""
    match record:
        case Labelled(text, label):
            return [text, label, None]
        case Completion(prompt, completion, finished=finished):
            return [prompt, None, completion, *([] if finished else [(False, True)])]
        case Preference(prompt, chosen, rejected, finished=finished):
            return [prompt, None, chosen, rejected, *([] if all(finished) else [finished])]
        case Unpaired(prompt, completion, label, finished=finished):
            return [prompt, None, completion, label, *([] if finished else [False])]
        case Conversation(messages, tools=tools):
            return [record.text, None, None, messages, *([tools] if tools else [])]


# Reading a row --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelWords:
    """The label words by label number; without words a label is any number.

    Words that are numbers themselves, such as 1,2,3,4,5, leave the label numbers (0 to 4) without a reading of their
    own: then a label must be a word.
    """

    words: tuple[str, ...] = ()

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """By normalized word; by label number too, unless a number is the word of another label."""
        words = {normalize(word): number for number, word in enumerate(self.words)}
        numbers = {str(number): number for number in range(len(self.words))}
        return {**words, **numbers} if numbers.items() >= {(n, words[n]) for n in numbers if n in words} else words

    def number(self, value: object) -> int | None:
        """A label's number, from 1, "1" or "Positive". True only if it is a label word; 1.0 never."""
        text = normalize(str(value).strip()) if isinstance(value, int | str) else ""
        if not self.words and text.isascii() and text.isdecimal() and len(text) < 10:
            return int(text)
        return self._numbers.get(text)

    def problem(self, value: object) -> str:
        """What is wrong with a value that is no label, and what is allowed."""
        shown, words = short_repr(value), ",".join(self.words)
        if not self.words:
            return f"unknown label {shown}: a number from 0 on is needed, or --labels with the words"
        if str(value).strip() in map(str, range(len(self.words))):
            return (
                f"label {shown} has two readings: as a word it is not in --labels {words}, and as a label's number it "
                f"is {self.words[int(str(value))]!r}: write the words, or give the data's own numbers as --labels"
            )
        allowed = (f"{n} or {word!r}" if str(n) in self._numbers else repr(word) for n, word in enumerate(self.words))
        return f"unknown label {shown}: allowed are {', '.join(allowed)}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file. Its methods read a column and raise InputError, with file and line, for a wrong value."""

    source: str
    columns: Mapping[str, Any]
    labels: LabelWords = LabelWords()

    def error(self, message: str) -> InputError:
        """An error in this row, to raise."""
        return InputError(f"{self.source}: {message}")

    def text(self, name: str) -> str:
        """A column's text, which must not be blank."""
        value = self.columns.get(name)
        if value is None or (isinstance(value, str) and not value.strip()):
            if name in self.columns:
                raise self.error(f"empty {name}: fill it in, or leave the row out")
            raise self.error(f"no field {name!r}: every row needs it")
        if not isinstance(value, str):
            raise self.error(f"{name} must be text, not {short_repr(value)}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            bad = f"U+{ord(value[error.start]):04X}"
            raise self.error(f"{name} holds half a character ({bad} alone); write the whole one") from None
        return value

    def optional_text(self, name: str) -> str:
        """A column's text, "" if the column is missing or blank."""
        value = self.columns.get(name)
        return "" if value is None or (isinstance(value, str) and not value.strip()) else self.text(name)

    def label(self) -> int:
        """Column "label" as a label number."""
        value = self.columns.get("label")
        if value is None or value == "":
            raise self.error("no label (field 'label' is missing or empty): every row needs one")
        number = self.labels.number(value)
        if number is None:
            raise self.error(self.labels.problem(value))
        return number

    def refuse(self, names: Iterable[str]) -> None:
        """Raise InputError if one of these columns has a value: it would be lost."""
        for name in names:
            if self.columns.get(name) not in (None, "", [], {}, "[]", "{}"):
                raise self.error(
                    f"{name} would be lost, and it changes what is learned: write it into the texts, or leave it out"
                )

    def desirable(self) -> bool:
        """Column "label" as true or false, or 1 or 0."""
        value = _as_bool(self.columns.get("label"))
        if value is None:
            raise self.error(f"label must be true or false, not {short_repr(self.columns.get('label'))}")
        return value

    def messages(self, name: str) -> tuple[Message, ...]:
        """A column of messages."""
        messages = self.columns.get(name)
        if not isinstance(messages, list) or not messages:
            raise self.error(f"{name} must be a list of role and content, not {short_repr(messages)}")
        return tuple(_message(f"{self.source}: message {number}", item) for number, item in enumerate(messages, 1))

    def tools(self) -> tuple[Any, ...]:
        """Column "tools": a list of JSON schemas, also as JSON text."""
        value = self.columns.get("tools") or []
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                raise self.error(f"tools is broken JSON: {short_repr(value)}") from None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise self.error(f"tools must be a list of JSON schemas, not {short_repr(value)}")
        return tuple(self.as_json("tools", value))

    def as_json(self, name: str, value: list[Any]) -> list[Any]:
        """A list, which a chat template may write as JSON."""
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise self.error(f"{name} holds what JSON and UTF-8 cannot ({error}): write it as text") from None
        return value

    def finished(self, answers: int) -> tuple[bool, ...]:
        """Column "finished" ("ended" in old files): whether the text ends with each answer. Without it, it does."""
        name = "finished" if "finished" in self.columns else "ended"
        value = self.columns.get(name)
        if value is None:
            return (True,) * answers
        flags = value if isinstance(value, list) else [value]
        if len(flags) != answers or not all(isinstance(flag, bool) for flag in flags):
            allowed = "true or false" if answers == 1 else "a list of two, each true or false: for chosen and rejected"
            raise self.error(f"{name} must be {allowed}, not {short_repr(value)}")
        return tuple(flags)


SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
"""What the roles of messages with the keys from and value are called elsewhere."""


BOOLEANS = {"true": True, "false": False}


def _as_bool(value: object) -> bool | None:
    """True or false, also as 1 or 0, and as text: csv has no booleans."""
    return {**BOOLEANS, "1": True, "0": False}.get(str(value).strip().casefold())


def _message(source: str, message: Any) -> Message:
    """A message's role and content, or from and value, and what else templates read.

    That is an assistant's reasoning, and the tools that it calls. Anything else would be lost, and is an error.
    """
    if not isinstance(message, dict):
        raise InputError(f"{source} must be an object with role and content, not {short_repr(message)}")
    row, keys = Row(source, message), ("role", "content")
    if "from" in message and "role" not in message:
        keys = ("from", "value")
    role = row.text(keys[0])
    role = SHAREGPT_ROLES.get(role, role) if keys[0] == "from" else role
    if role not in ROLES:
        raise row.error(f"unknown role {short_repr(role)}: known are {', '.join(ROLES)}")
    rest = {name: value for name, value in message.items() if name not in keys and value is not None}
    fields: dict[str, Any] = {}
    if role == "assistant":
        name = next((name for name in THINKING_NAMES if name in rest), "")
        if thinking := row.optional_text(name):
            fields[THINKING] = thinking
        rest.pop(name, None)
        if calls := rest.pop("tool_calls", None):
            calls = calls if isinstance(calls, list) else [calls]
            fields["tool_calls"] = [_tool_call(row, call) for call in row.as_json("tool_calls", calls)]
    elif role == "tool":
        fields = {name: rest.pop(name) for name in ("name", "tool_call_id") if name in rest}
    if rest:
        raise row.error(f"{short_repr(next(iter(rest)))} is not understood: a message has role and content, of text")
    content = row.optional_text(keys[1]) if "tool_calls" in fields else row.text(keys[1])
    return (role, content, fields) if fields else (role, content)


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

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.keys)})"

    def record(self, row: Row) -> Record:
        """A row as a canonical record. Raises InputError for wrong values, and for what would be lost."""
        row.refuse(name for name in self.refused if name not in self.optional)
        record = self.convert(row)
        if not self.matches(row.columns):
            raise row.error(f"its columns do not fit the file's layout, {self}: write all rows in one layout")
        return record

    def unused(self, columns: Mapping[str, Any]) -> set[str]:
        """The columns with a value that the layout does not read."""
        return {name for name, value in columns.items() if value is not None} - {*self.keys, *self.optional}


def _labelled(row: Row) -> Labelled:
    return Labelled(row.text("text"), row.label(), row.source)


def _completion(row: Row) -> Completion:
    prompt, completion = row.text("prompt"), row.text("completion")
    (finished,) = row.finished(1)
    return Completion(prompt, completion, row.source, finished)


def _preference(row: Row) -> Preference:
    prompt, chosen, rejected = row.text("prompt"), row.text("chosen"), row.text("rejected")
    if chosen.strip() == rejected.strip():
        raise row.error("chosen and rejected are the same text: leave the pair out")
    first, second = row.finished(2)
    return Preference(prompt, chosen, rejected, row.source, (first, second))


def _unpaired(row: Row) -> Unpaired:
    prompt, completion, label = row.text("prompt"), row.text("completion"), row.desirable()
    (finished,) = row.finished(1)
    return Unpaired(prompt, completion, label, row.source, finished)


def _chat(row: Row) -> Conversation:
    messages = row.messages("messages" if "messages" in row.columns else "conversations")
    if system := row.optional_text("system"):
        if any(message[0] == "system" for message in messages):
            raise row.error("both a column system and a system message: leave one out")
        messages = (("system", system), *messages)
    if str(row.columns.get("label")).strip().casefold() in BOOLEANS:
        raise row.error(
            "label would be lost: the answers of all rows are learned: leave out the bad ones, and the column"
        )
    if not any(message[0] == "assistant" for message in messages):
        raise row.error("the assistant says nothing, so there is nothing to learn: leave the row out")
    return Conversation(messages, row.source, row.tools())


def _alpaca(row: Row) -> Completion:
    """Stanford Alpaca's prompt (Taori et al. 2023), without or with an input."""
    instruction, context, output = row.text("instruction"), row.optional_text("input"), row.text("output")
    task = "Below is an instruction that describes a task"
    if context:
        task += ", paired with an input that provides further context"
        context = f"### Input:\n{context}\n\n"
    task += ". Write a response that appropriately completes the request."
    prompt = f"{task}\n\n### Instruction:\n{instruction}\n\n{context}### Response:\n"
    return Completion(prompt, output, row.source)


LAYOUTS = (
    Layout("labelled", ("text", "label"), _labelled, refused=()),
    Layout(
        "completion",
        ("prompt", "completion"),
        _completion,
        optional=("finished", "ended"),
        matches=lambda columns: str(columns.get("label")).strip().casefold() not in BOOLEANS,
    ),
    Layout("preference", ("chosen", "rejected"), _preference, optional=("prompt", "finished", "ended")),
    Layout(
        "unpaired preference",
        ("prompt", "completion", "label"),
        _unpaired,
        optional=("finished", "ended"),
        matches=lambda columns: _as_bool(columns.get("label")) is not None,
    ),
    Layout("chat", ("messages",), _chat, ("system", "tools"), matches=lambda columns: "chosen" not in columns),
    Layout("sharegpt", ("conversations",), _chat, ("system", "tools"), matches=lambda columns: "chosen" not in columns),
    Layout("alpaca", ("instruction", "output"), _alpaca, optional=("input",)),
)


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise InputError for fields of --columns that no layout reads, or none reads together."""
    fields = list(dict.fromkeys(key for layout in LAYOUTS for key in (*layout.keys, *layout.optional)))
    for key, column in columns.items():
        if key not in fields:
            hint = did_you_mean(key, fields)
            raise InputError(f"--columns {key}={column}: no field {key!r}: {hint}fields are {', '.join(fields)}")
    if not _readable(columns):
        raise InputError(
            f"--columns: no layout reads {' and '.join(columns)} together: leave one out; the layouts are {_names()}"
        )


def recognise(path: object, columns: Mapping[str, Any], mapped: Sequence[str] = ()) -> Layout:
    """The layout of a file, from the columns of its first row.

    mapped: the columns named by --columns; the layout must read all of them. A layout whose keys are a part of
    another's gives way to it, unless --columns names exactly its keys. Raises InputError for an unknown layout, and
    where several remain.
    """
    readable = _readable(mapped)
    fitting = [layout for layout in readable if columns.keys() >= {*layout.keys} and layout.matches(columns)]
    fitting = [layout for layout in fitting if {*layout.keys} <= {*mapped}] or fitting
    fitting = [layout for layout in fitting if not any({*layout.keys} < {*other.keys} for other in fitting)]
    if not fitting:
        raise _unknown(path, columns, readable)
    if len(fitting) > 1:
        choices = " or ".join(f"--columns {','.join(f'{key}={key}' for key in layout.keys)}" for layout in fitting)
        raise InputError(
            f"{path}: the columns fit several layouts, {' and '.join(map(str, fitting))}: choose {choices}"
        )
    return fitting[0]


def _unknown(path: object, columns: Mapping[str, Any], layouts: Sequence[Layout]) -> InputError:
    """The error for columns without a layout: it names the first column that the closest layout lacks."""
    if columns and not any(columns.keys() & {*layout.keys} for layout in layouts):
        present = ", ".join(map(str, columns))
        return InputError(
            f"{path}: its columns, {present}, fit no layout: map them with --columns; they are {_names()}"
        )
    if set(columns) == {"text"}:
        return InputError(
            f"{path}: is plain text, with nothing to learn from it: add a column label, or give prompt and completion"
        )
    lacking = [layout for layout in layouts if not columns.keys() >= {*layout.keys}] or layouts
    closest = max(lacking, key=lambda layout: len(columns.keys() & {*layout.keys}))
    missing = next((key for key in closest.keys if key not in columns), closest.keys[0])
    return InputError(f"{path}: {missing_column(missing, columns, missing)}; the layouts are {_names()}")


def _readable(fields: Iterable[str]) -> list[Layout]:
    """The layouts that read all these fields."""
    return [layout for layout in LAYOUTS if {*fields} <= {*layout.keys, *layout.optional}]


def _names() -> str:
    return ", ".join(map(str, LAYOUTS))


def missing_column(column: str, columns: Mapping[str, Any], key: str) -> str:
    """What is wrong when a file has no column of this name, and what to do."""
    near = get_close_matches(column, list(map(str, columns)), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    present = ", ".join(map(str, columns)) or "none"
    return f"no column {column!r}: {hint}the columns are {present}; name it with --columns {key}=COLUMN"
