"""A text and a label -> a prompt and a completion, as strings.

    head  "Decide whether … .\\n\\nReview: "   equal in all prompts, so its tokens can be computed once
    text  "a gorgeous, witty film"             the only part that truncation may shorten
    tail  "\\nSentiment:"                       never ends in a space
    completion  " positive"                    one space and the label word

The space belongs to the completion (`text/boundary.py`), so a trailing space of the template moves there. Without one,
a space is added, but not after a line break, nor in scripts that are written without spaces (Chinese, Japanese, Thai).
A template that ends in `{label}` says itself what precedes the label: "{text} ({label}".

A template may name any fields of the data (`text/fields.py`); `{text}` alone is the common case. The text is then all
from the first field to the last, and is truncated as one:

    "Premise: {premise}\\nHypothesis: {hypothesis}\\nAnswer:"
    head  "Premise: "       text  "{premise}\\nHypothesis: {hypothesis}"       tail  "\\nAnswer:"
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from graftlm.config.flags import DataFlags, parse_columns
from graftlm.config.paths import read_text, user_path
from graftlm.errors import InputError, unknown_name_error
from graftlm.text.fields import Columns, FieldText, with_one_field
from graftlm.text.labels import parse_labels
from graftlm.text.words import UNSPACED, normalize

FIELD, LABEL = "{text}", "{label}"
WIDE_PUNCTUATION = "\u3000-\u303f\uff01-\uff60"

# The text is last where possible: the tokens before it are equal for all and are computed once per batch.
# In built-in templates only, {labels} is replaced by the label words: "negative or positive".
BUILTIN = {
    "sentiment": (
        "Decide whether the sentiment of the following movie review is {labels}.\n\nReview: {text}\nSentiment:"
    ),
    "question": "{text}\n\nQuestion: Is this review {labels}?\nAnswer:",
    "plain": "{text}",
}
DEFAULT = "sentiment"
CUSTOM = "custom"  # the name of a template given as a string
DEFAULT_LABELS = "negative,positive"
AUTO_LABELS = "auto"  # the label words that the data names
COLUMN_FLAGS = ("columns", "prompt", "completion", "messages")
"""The flags that, with the template, say what of the data is read."""


@dataclass(frozen=True)
class Template:
    """The prompt for a text and the completion for a label.

    text: has a field, and none of them twice. labels: the label words by label number.
    Raises InputError if it has not, or if label words are equal.
    """

    name: str
    text: str
    labels: tuple[str, ...]
    text_prefix: str = ""
    """Put before the template unchanged: few-shot demonstrations (`inference/fewshot.py`)."""
    chat: bool = False
    """Whether prompts are a user's messages in the model's chat template, and labels the assistant's."""
    values: tuple[tuple[str, str], ...] = ()
    """The data's values, each with its label word, where `--labels` names them."""

    @classmethod
    def of_run(cls, run: Mapping[str, Any]) -> "Template":
        """The template that run.json records."""
        recorded = run["template"]
        text = recorded["text"] if "fields" in recorded else with_one_field(recorded["text"], "text")
        values = tuple(recorded.get("values", {}).items())
        return cls(recorded["name"], text, tuple(recorded["labels"]), chat=recorded.get("chat", False), values=values)

    def to_json(self) -> dict[str, Any]:
        """What run.json records."""
        fields = list(self._fields.fields)
        return {
            "name": self.name,
            "text": self.text,
            "labels": list(self.labels),
            "fields": fields,
            "chat": self.chat,
            "values": dict(self.values),
        }

    def __post_init__(self) -> None:
        fields = self._fields.fields
        if len(fields) != len(set(fields)) or not fields:
            twice = next((name for name in fields if fields.count(name) > 1), "")
            problem = f"has {{{twice}}} {fields.count(twice)} times" if fields else f"has no {FIELD}"
            name = repr(self.name if self.name != CUSTOM else self.text)
            raise InputError(f"template {name} {problem}: write it once, where the text belongs")
        _check_labels(self.labels)
        try:
            (self.text + "".join(self.labels)).encode()
        except UnicodeEncodeError:  # a command-line argument in another encoding
            raise InputError(f"template {self.name!r} or its labels hold bytes that are not UTF-8") from None

    @cached_property
    def head(self) -> str:
        """The prompt before the text."""
        return self.text_prefix + self._fields.parts[0][0]

    @cached_property
    def tail(self) -> str:
        """The prompt after the text, without trailing spaces, which belong to the completion."""
        return self._fields.end.rstrip(" ")

    @cached_property
    def columns(self) -> Columns:
        """What of the data is the text; empty if it is the column "text"."""
        (_, first), *others = self._fields.parts
        return {} if self._fields.fields == ("text",) else {"text": FieldText((("", first), *others), "")}

    @property
    def label_values(self) -> tuple[str, ...]:
        """The parts of --labels: the label words, or "value=word" of each value of the data."""
        return tuple(map("=".join, self.values)) or self.labels

    @cached_property
    def _fields(self) -> FieldText:
        return FieldText.parse(self._prompt_text, plain="label")

    @property
    def _prompt_text(self) -> str:
        return self.text.removesuffix(LABEL)

    def prompt(self, text: str) -> str:
        """The prompt for one text, without trailing space."""
        return (self.head + text + self.tail).rstrip(" ")

    def completion(self, label: int) -> str:
        """The completion for label number `label`: a space, where one belongs there, and the label word."""
        assert 0 <= label < len(self.labels), f"label {label} of {len(self.labels)}"
        text, word = self._prompt_text, self.labels[label]
        if text != self.text:
            return text[len(text.rstrip(" ")) :] + word
        return (" " if text.endswith(" ") else answer_space(text, word)) + word

    def label_number(self, word: str) -> int | None:
        """The number of a label word, ignoring case and surrounding spaces; None if it is not a label word."""
        word = normalize(word.strip())
        return next((number for number, label in enumerate(self.labels) if normalize(label) == word), None)


def answer_space(before: str, answer: str) -> str:
    """What separates a text from an answer: a space, but not after a line break or in a script without spaces."""
    unspaced = re.search(f"[{UNSPACED}{WIDE_PUNCTUATION}]", before[-1:] + answer[:1])
    return "" if not before or not answer or before.endswith("\n") or unspaced else " "


def load_template(spec: str, labels: str = DEFAULT_LABELS) -> Template:
    """The template of `--template` and `--labels`.

    Args:
        spec: a built-in name, a string with `{text}` or other fields in it, or the path of a UTF-8 file with such a
            string (without the line break at its end). Escapes such as \\n are not interpreted.
        labels: the label words by label number, comma-separated: "negative,positive"; or the word of each value of the
            data (`labels.parse_labels`).

    Raises InputError for an unknown name, an unreadable file or an invalid template.
    """
    words, values = parse_labels(labels)
    if spec in BUILTIN:
        _check_labels(words)
        return Template(spec, BUILTIN[spec].replace("{labels}", " or ".join(words)), words, values=values)
    if FieldText.parse(spec, plain="label").fields:
        return Template(CUSTOM, spec, words, values=values)
    path = user_path(spec, "template ")
    if spec.strip() and _is_file(path):
        text = read_text(path, "template ").replace("\r\n", "\n")
        return Template(spec, text.removesuffix("\n"), words, values=values)  # which editors add
    error = unknown_name_error("template", spec, BUILTIN)
    raise InputError(f"{error}; or give a file, or a string with {FIELD} in it")


def read_columns(flags: DataFlags, template: Template) -> Columns:
    """What of the data is read, by `--columns`, `--prompt`, `--completion`, `--messages` and the template.

    Raises InputError if a key is named twice, and for a completion without fields.
    """
    named, own = parse_columns(flags.columns), dict[str, str | FieldText]()
    if flags.prompt:
        own = {"prompt": FieldText.parse(flags.prompt), "completion": FieldText.parse(flags.completion)}
    elif flags.messages:
        own = {"messages": flags.messages}
    else:
        own = dict(template.columns)
    if flags.prompt and not FieldText.parse(flags.completion).fields:
        raise InputError(f"--completion {flags.completion!r}: names no field: write one in braces, as in {{output}}")
    for key in named.keys() & own.keys():
        flag = "template" if key == "text" else key
        raise InputError(f"--columns {key}={named[key]}: --{flag} names the {key}'s fields already: leave one out")
    return {**named, **own}


def get_sentiment_prompt(text: str, label: int | str | None = None) -> str:
    """The default prompt for a review; with a label (0 or "negative", 1 or "positive") the completion follows.

    The course handout's function of this name: without `label` it is the prompt that a model continues, with it the
    instruction-tuned text of a training record. Raises InputError for any other label.
    """
    template = load_template(DEFAULT)
    if label is None:
        return template.prompt(text)
    number = template.label_number(label) if isinstance(label, str) else label
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(template.labels):
        words = ", ".join(f"{n} or {word!r}" for n, word in enumerate(template.labels))
        raise InputError(f"unknown label {label!r}: use {words}")
    return template.prompt(text) + template.completion(number)


def _check_labels(labels: tuple[str, ...]) -> None:
    flag = f"--labels {','.join(labels)!r}"
    if len(labels) < 2:
        raise InputError(f"{flag}: name two label words or more, as in {DEFAULT_LABELS}")
    if not all(label.strip() for label in labels):
        raise InputError(f"{flag}: an empty label word; name them as in {DEFAULT_LABELS}")
    seen: dict[str, str] = {}
    for label in labels:
        if normalize(label) in seen:
            other = seen[normalize(label)]
            raise InputError(f"{flag}: {other!r} and {label!r} are the same word; label words must differ")
        seen[normalize(label)] = label


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long for a file name, or with a NUL
        return False
