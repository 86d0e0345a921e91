"""The canonical records: the six kinds that the rest of the program knows, from files of any layout."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from graftlm.errors import InputError
from graftlm.text.chat import Message
from graftlm.text.transcripts import Said, all_said, written_turns


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
    question: str = field(default="", compare=False)
    """What a user would say, where the prompt is more: Alpaca's prompt without its frame."""

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with two answers, as texts or all as messages: the chosen one was preferred to the rejected one."""

    prompt: Said
    chosen: Said
    rejected: Said
    source: str = ""
    finished: tuple[bool, bool] = (True, True)
    """As in `Completion`, for each answer."""
    tools: tuple[Any, ...] = ()
    """As in `Conversation`."""
    question: str = field(default="", compare=False)
    """As in `Completion`."""

    @property
    def text(self) -> str:
        """The prompt."""
        return all_said(self.prompt)

    @property
    def answers(self) -> tuple[Said, Said]:
        """The chosen and the rejected answer."""
        return self.chosen, self.rejected


@dataclass(frozen=True, slots=True)
class Unpaired:
    """A prompt with one answer, as texts or both as messages, and whether that answer is desirable (KTO)."""

    prompt: Said
    completion: Said
    label: bool
    source: str = ""
    finished: bool = True
    tools: tuple[Any, ...] = ()
    question: str = field(default="", compare=False)

    @property
    def text(self) -> str:
        """The prompt."""
        return all_said(self.prompt)

    @property
    def answers(self) -> tuple[Said]:
        """The answer."""
        return (self.completion,)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages of several roles; what the assistant says is learned."""

    messages: tuple[Message, ...]
    source: str = ""
    tools: tuple[Any, ...] = ()
    """What the assistant may call, as JSON schemas."""
    unlearned: tuple[int, ...] = ()
    """The assistant's messages that are not learned, by number."""

    @property
    def text(self) -> str:
        """All that is said."""
        return all_said(self.messages)


@dataclass(frozen=True, slots=True)
class Document:
    """A text on its own: to learn as a whole, or a prompt to answer."""

    text: str
    source: str = ""


Record = Labelled | Completion | Preference | Unpaired | Conversation | Document
AnyRecord = TypeVar("AnyRecord", bound=Record)


CHUNK_RECORDS, CHUNK_CHARACTERS = 4096, 2_000_000


def chunks(records: Iterable[AnyRecord]) -> Iterator[list[AnyRecord]]:
    """The records in parts that are tokenized at a time, of a few MB of text unless one record is longer."""
    part, characters = list[AnyRecord](), 0
    for record in records:
        part.append(record)
        characters += len(record.text)
        if len(part) == CHUNK_RECORDS or characters >= CHUNK_CHARACTERS:
            yield part
            part, characters = [], 0
    if part:
        yield part


def is_chat(record: Record) -> bool:
    """Whether a record is written by the model's chat template."""
    return isinstance(record, Conversation) or not isinstance(getattr(record, "prompt", ""), str)


def has_texts(record: Record) -> bool:
    """Whether a record is a prompt with answers, all of them texts, which may be written as messages."""
    return isinstance(record, Completion | Preference | Unpaired) and isinstance(record.prompt, str)


def is_finished(record: Record) -> bool:
    """Whether every answer of a record ends its text."""
    finished = getattr(record, "finished", True)
    return all(finished) if isinstance(finished, tuple) else finished


def as_messages(records: Sequence[Record]) -> list[Record]:
    """The records, with prompts and answers of text as messages of a user and the assistant.

    White space between prompt and answer is left out, Alpaca's prompt is its question alone, and a prompt that is a
    conversation already (`transcripts.MARKUPS`) becomes its turns, of which those of the prompt are not learned. Raises
    InputError for an answer that is not finished: a message ends its turn.
    """
    return [_as_messages(record) if has_texts(record) else record for record in records]


def _as_messages(record: Record) -> Record:
    if not is_finished(record):
        raise InputError(f"{record.source}: an answer that is not finished cannot be a message: use --chat off")
    question: Message = ("user", (getattr(record, "question", "") or record.text).rstrip())

    def said(*answers: Said) -> list[tuple[Message, ...]]:
        texts = [answer for answer in answers if isinstance(answer, str)]
        return written_turns(record.text, *texts) or [(question,), *((("assistant", t.lstrip()),) for t in texts)]

    match record:
        case Completion(completion=answer):
            prompt, completion = said(answer)
            earlier = tuple(n for n, message in enumerate(prompt) if message[0] == "assistant")
            return Conversation(prompt + completion, record.source, unlearned=earlier)
        case Preference(chosen=chosen, rejected=rejected):
            prompt, first, second = said(chosen, rejected)
            return replace(record, prompt=prompt, chosen=first, rejected=second)
        case Unpaired(completion=answer):
            prompt, completion = said(answer)
            return replace(record, prompt=prompt, completion=completion)
    raise AssertionError("texts have one of these kinds")


def hashed_values(record: Record) -> list[Any]:
    """What a data set's fingerprint hashes. Runs record the hash, so the values of existing data must not change."""
    match record:
        case Labelled(text, label):
            return [text, label, None]
        case Completion(prompt, completion, finished=finished):
            return [prompt, None, completion, *([] if finished else [(False, True)])]
        case Preference(prompt, chosen, rejected, finished=finished, tools=tools):
            return [prompt, None, chosen, rejected, *([] if all(finished) else [finished]), *([tools] if tools else [])]
        case Unpaired(prompt, completion, label, finished=finished, tools=tools):
            return [prompt, None, completion, label, *([] if finished else [False]), *([tools] if tools else [])]
        case Conversation(messages, tools=tools, unlearned=unlearned):
            hidden = [{"unlearned": unlearned}] if unlearned else []
            return [record.text, None, None, messages, *([tools] if tools else []), *hidden]
        case Document(text):
            return [text]
