"""A record becomes a prompt and a completion: where the answer begins is decided here, as strings.

    head  "Decide whether … .\\n\\nReview: "   the same in every prompt, so its tokens can be shared
    text  "a gorgeous, witty film"             the only part that truncation may cut
    tail  "\\nSentiment:"                       never ends in a space
    completion  " positive"                    one space and the label word

The space belongs to the completion because tokenizers of this family keep a word's space inside its token: a prompt
that ends in a space would end in a token that never stands before a word. So a template's trailing space moves to the
completion, and after a line break no space is added. Braces other than the one `{text}` are plain characters.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from graftlm.errors import InputError, unknown_name_error

FIELD = "{text}"

# The sentence comes first and the text after it: tokens before the text are the same for all and run once per batch.
# In these built-in ones (only), {labels} stands for the label words: "negative or positive".
BUILTIN = {
    "sentiment": (
        "Decide whether the sentiment of the following movie review is {labels}.\n\nReview: {text}\nSentiment:"
    ),
    "question": "{text}\n\nQuestion: Is this review {labels}?\nAnswer:",
    "plain": "{text}",
}
DEFAULT = "sentiment"
CUSTOM = "custom"  # the name of a template that was given as a string
DEFAULT_LABELS = "negative,positive"


@dataclass(frozen=True)
class Template:
    """How a text is asked about and what is answered.

    `text` holds `{text}` exactly once; `labels` are the label words by label number.
    Raises InputError when it does not, or when the words cannot be told apart.
    """

    name: str
    text: str
    labels: tuple[str, ...]
    text_prefix: str = ""
    """What stands before all of it, as it is: few-shot demonstrations (`inference/fewshot.py`)."""

    def __post_init__(self) -> None:
        found = self.text.count(FIELD)
        if found != 1:
            problem = f"has no {FIELD}" if found == 0 else f"has {FIELD} {found} times"
            shown = repr(self.name if self.name != CUSTOM else self.text)
            raise InputError(f"template {shown} {problem}: write it once, where the text belongs")
        _check_labels(self.labels)
        try:
            (self.text + "".join(self.labels)).encode()
        except UnicodeEncodeError:  # what Python makes of an argument in another encoding
            raise InputError(f"template {self.name!r} or its labels hold bytes that are not UTF-8") from None

    @cached_property
    def head(self) -> str:
        """What stands before the text."""
        return self.text_prefix + self.text.partition(FIELD)[0]

    @cached_property
    def tail(self) -> str:
        """What stands between the text and the completion; its trailing spaces moved to the completion."""
        return self.text.partition(FIELD)[2].rstrip(" ")

    def prompt(self, text: str) -> str:
        """The prompt for one text, without trailing space."""
        return (self.head + text + self.tail).rstrip(" ")

    def completion(self, label: int) -> str:
        """The answer for label number `label`: one space (none after a line break) and the label word."""
        assert 0 <= label < len(self.labels), f"label {label} of {len(self.labels)}"
        return ("" if self.text.endswith("\n") else " ") + self.labels[label]

    def label_number(self, word: str) -> int | None:
        """The number of a label word, whatever its case and the spaces around it; None when it is none of them."""
        wanted = word.strip().casefold()
        return next((number for number, known in enumerate(self.labels) if known.casefold() == wanted), None)


def load_template(spec: str, labels: str = DEFAULT_LABELS) -> Template:
    """The template that `--template` and `--labels` mean.

    Args:
        spec: a built-in name, a string that holds `{text}`, or the path of a UTF-8 file that does (the line break that
            ends the file's last line is not part of it). Nothing is unescaped: a line break is a line break.
        labels: the label words by label number, separated by commas: "negative,positive".

    Raises InputError for an unknown name, an unreadable file, and whatever `Template` refuses.
    """
    words = tuple(word.strip() for word in labels.split(","))
    if spec in BUILTIN:
        _check_labels(words)
        return Template(spec, BUILTIN[spec].replace("{labels}", " or ".join(words)), words)
    if FIELD in spec:
        return Template(CUSTOM, spec, words)
    path = Path(spec)
    if spec.strip() and _is_file(path):
        return Template(spec, _read(path), words)
    error = unknown_name_error("template", spec, BUILTIN)
    raise InputError(f"{error}; or give a file, or a string with {FIELD} in it")


def get_sentiment_prompt(text: str, label: int | str | None = None) -> str:
    """The default instruction about one review; with a label (0 or "negative", 1 or "positive") the answer follows.

    The course handout's function of this name: without `label` the prompt that a model continues, with it the whole
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
    given = ",".join(labels)
    if len(labels) < 2:
        raise InputError(f"--labels {given!r}: name two label words or more, as in {DEFAULT_LABELS}")
    if not all(label.strip() for label in labels):
        raise InputError(f"--labels {given!r}: an empty label word; name them as in {DEFAULT_LABELS}")
    seen: dict[str, str] = {}
    for label in labels:
        if label.casefold() in seen:
            other = seen[label.casefold()]
            raise InputError(f"--labels {given!r}: {other!r} and {label!r} are the same word; label words must differ")
        seen[label.casefold()] = label


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than a name may be, or with a NUL: no file's name
        return False


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"template {path}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise InputError(f"template {path}: {error.strerror}") from None
    return text.removesuffix("\n")  # editors end every file with one
