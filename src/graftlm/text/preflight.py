"""The checks before training: unusable data stops a run, notes follow, and one example is shown."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import combinations
from typing import Protocol

import numpy as np
import numpy.typing as npt

from graftlm.errors import InputError
from graftlm.text.boundary import label_ids
from graftlm.text.chat import Chat, any_of
from graftlm.text.collate import Example, too_long_message
from graftlm.text.example_table import lengths_of
from graftlm.text.records import Conversation, Document, Record, has_texts
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer
from graftlm.text.words import UNSPACED, normalize

BACKSLASH = "has a backslash and an n, not a line break: in a shell, write $'…\\n…'"
CHAT_TOKENS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]", "<|user|>", "<|assistant|>")
"""Names of special tokens that begin a turn in chat templates."""
JOIN_SHOWN = 12
"""Characters on each side of a join that its note shows."""
WINDOW_SHOWN = 40
"""Tokens of a window that its example shows."""


def preflight(
    splits: Mapping[str, Sequence[Example]],
    template: Template,
    tokenizer: Tokenizer,
    max_length: int,
    truncated: Mapping[str, int],
) -> list[str]:
    """Check what a run will read, before its first step.

    Args:
        splits: the examples by split. truncated: how many of their texts were truncated, by split.

    Returns notes to show: texts in two splits, truncated texts, one-sided labels, and last one example with its target
    tokens in ⟦brackets⟧. Raises InputError for a split without examples, an empty text, an unknown label, label words
    with equal tokens, and a completion that is truncated or too long.
    """
    checks = Preflight(template, tokenizer, max_length)
    for split, examples in splits.items():
        checks.add(split, examples)
    return checks.notes(truncated)


class _Keys:
    """Many hashes of 16 bytes."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def add(self, *values: object) -> None:
        """Append the hash of values."""
        text = values[0] if len(values) == 1 else repr(values)
        self._bytes += hashlib.blake2b(str(text).encode(), digest_size=16).digest()

    @property
    def hashes(self) -> npt.NDArray[np.bytes_]:
        """All of them, in order. Equal where all bytes are, although numpy leaves out zeros at the end."""
        return np.frombuffer(self._bytes, dtype="S16")


class _Split:
    """What the notes on a split count."""

    def __init__(self) -> None:
        self.first: Example | None = None
        self.count = self.spanned = 0
        self.labels: Counter[int | None] = Counter()
        self.marks: Counter[bool | None] = Counter()
        self.texts, self.answered, self.answers = _Keys(), _Keys(), _Keys()
        self.pairs, self.reversed_pairs = _Keys(), _Keys()

    def add(self, e: Example) -> None:
        """Count an example, whose texts are not kept."""
        self.first = self.first or e
        self.count += 1
        self.spanned += bool(e.rest)
        self.labels[e.label] += 1
        self.marks[e.desirable] += 1
        if e.is_window:  # it may begin at any token
            return
        self.texts.add(_normalized(e.text))
        if e.rejected_ids:
            self.pairs.add(e.text, e.completion_ids, e.rejected_ids)
            self.reversed_pairs.add(e.text, e.rejected_ids, e.completion_ids)
        elif e.desirable is None:  # one prompt may have many preferences
            self.answered.add(e.text)
            self.answers.add(e.text, e.completion_ids)

    def duplicates(self, split: str) -> list[str]:
        """Notes on texts with different answers, and on preferences that occur in both directions."""
        notes = []
        _, which = np.unique(self.answers.hashes, return_index=True)
        _, answers = np.unique(self.answered.hashes[which], return_counts=True)
        if several := int((answers > 1).sum()):
            notes.append(f"{_count_texts(several)} in {split} with different answers")
        if reversed_pairs := len(np.intersect1d(self.pairs.hashes, self.reversed_pairs.hashes)) // 2:
            subject = "pair is" if reversed_pairs == 1 else "pairs are"
            notes.append(f"{reversed_pairs} {subject} in {split} the other way round too")
        return notes


class Preflight:
    """`preflight` of examples that arrive in parts; see there. Of each a few bytes are kept."""

    def __init__(self, template: Template, tokenizer: Tokenizer, max_length: int) -> None:
        self._template, self._tokenizer, self._max_length = template, tokenizer, max_length
        self._splits: dict[str, _Split] = {}
        self._labels_checked = False

    def add(self, split: str, examples: Iterable[Example]) -> None:
        """Check the next examples of a split."""
        counts = self._splits.setdefault(split, _Split())
        for example in examples:
            if example.label is not None and not self._labels_checked:
                label_ids(self._template, self._tokenizer)
                self._labels_checked = True
            _check(example, self._template, self._tokenizer.eot, self._max_length)
            counts.add(example)

    def notes(self, truncated: Mapping[str, int]) -> list[str]:
        """The notes, once all splits are complete."""
        for split, counts in self._splits.items():
            if not counts.count:
                raise InputError(f"split {split} has no examples")
        notes = _common({split: counts.texts for split, counts in self._splits.items()})
        for split, counts in self._splits.items():
            notes += counts.duplicates(split)
        for split, counts in self._splits.items():
            notes += self._split_notes(split, counts, truncated.get(split, 0))
        if "\\n" in self._template.text:
            notes.append(f"the template {BACKSLASH}")
        first = next((counts.first for counts in self._splits.values() if counts.first), None)
        return [*notes, f"example: {show_targets(first, self._tokenizer)}"] if first else notes

    def _split_notes(self, split: str, counts: _Split, truncated: int) -> list[str]:
        """Notes on truncated texts, on tokens that span prompt and completion, and on one-sided labels."""
        notes = []
        if truncated:
            notes.append(f"{truncated} of {counts.count} texts in {split} are truncated to {self._max_length} tokens")
        if counts.spanned:
            notes.append(
                f"in {counts.spanned} of {counts.count} examples in {split} a token spans prompt and completion, and "
                "is not learned: begin completions with a space, or end prompts with a line break"
            )
        (label, *others), (mark, *other_marks) = counts.labels, counts.marks
        if label is not None and not others and counts.count > 1:
            notes.append(f"every example in {split} is labelled {self._template.labels[label]!r}")
        if mark is not None and not other_marks:
            notes.append(f"every example in {split} is {'desirable' if mark else 'undesirable'}: KTO learns from both")
        return notes


def show_targets(example: Example, tokenizer: Tokenizer, width: int = 160) -> str:
    """An example in one line, decoded: the end of the prompt, then every target token in ⟦brackets⟧.

    Of a window of documents only the first tokens are shown.
    """
    if example.is_window and (hidden_tokens := example.length - WINDOW_SHOWN) > 0:
        shown = replace(example, completion_ids=example.completion_ids[: WINDOW_SHOWN - 1])
        more = f" … and {hidden_tokens:,} more tokens"
        return show_targets(replace(shown, is_window=False), tokenizer, width) + more
    prompt = tokenizer.decode_with_special(example.prompt_ids)
    prompt = prompt if len(prompt) <= width else "… " + prompt[-width:].partition(" ")[2]
    hidden = set().union(*example.masked_spans)
    targets = " rather than ".join(
        "".join(
            tokenizer.token(token) if position in hidden else f"⟦{tokenizer.token(token)}⟧"
            for position, token in enumerate(ids)
        )
        for ids in example.answers
    )
    return (prompt + targets).replace("\r", "\\r").replace("\n", "\\n")


class ControlTokens:
    """Counts records, other than conversations, that hold special tokens' names; they may arrive in parts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._names = any_of({*tokenizer.special_tokens, *CHAT_TOKENS})
        self._rows: Counter[str] = Counter()
        self._found: dict[str, list[str]] = {}

    def add(self, split: str, rows: Sequence[Record]) -> None:
        """Count the next records of a split."""
        self._rows[split] += len(rows)
        for row in rows:
            values = (getattr(row, f.name) for f in fields(row) if f.name not in ("source", "messages"))
            if match := self._names.search("\n".join(value for value in values if isinstance(value, str))):
                self._found.setdefault(split, []).append(match[0])

    def notes(self) -> list[str]:
        """A note for each split that has some."""
        return [
            f"{len(found)} of {self._rows[split]} rows in {split} hold names of special tokens, such as {found[0]}, "
            "which are read as plain text: give conversations as messages"
            for split, found in self._found.items()
        ]


def conversation_notes(
    splits: Mapping[str, Sequence[Record]], examples: Mapping[str, Sequence[Example]], tokenizer: Tokenizer
) -> list[str]:
    """Notes on conversations that become several examples, and on answers that end with no token that stops a text."""
    notes = []
    for split, rows in splits.items():
        some = examples[split]
        if not rows or not isinstance(rows[0], Conversation):
            continue
        if len(some) > len(rows):
            notes.append(
                f"{len(rows)} conversations in {split} are read as {len(some)} examples, each up to one answer: the "
                "model's chat template writes an answer differently once another turn follows"
            )
        stops = Chat(tokenizer).stop_tokens
        # some templates mark the line break after the end of a turn too
        if endless := [e.completion_ids[-1] for e in some if stops.isdisjoint(e.completion_ids[-2:])]:
            end = tokenizer.token(endless[0])
            notes.append(
                f"{len(endless)} of {len(some)} conversations in {split} end with {end!r}, which stops no text: the "
                "model will not learn to stop; give graft generate --stop, or another chat template"
            )
    return notes


class JoinedWords:
    """Counts prompts and completions, added part by part, that meet inside a word of their text."""

    INSIDE = re.compile(rf"[^\W{UNSPACED}]{{2}}")  # elsewhere words follow each other without spaces

    def __init__(self) -> None:
        self._rows = self._joined = 0
        self._first = ""

    def add(self, part: Sequence[Record]) -> None:
        """Count the records of a part that are prompts with answers of text."""
        for row in filter(has_texts, part):
            answer = str(getattr(row, "chosen", getattr(row, "completion", "")))
            self._rows += 1
            if self.INSIDE.match(row.text[-1:] + answer[:1]):
                self._joined += 1
                self._first = self._first or f"{row.text[-JOIN_SHOWN:]}|{answer[:JOIN_SHOWN]}"

    def notes(self) -> list[str]:
        """A note if most do."""
        if 2 * self._joined <= self._rows:
            return []
        return [
            f"in {self._joined} of {self._rows} rows the completion begins without a space after the prompt's last "
            f"word, as in {self._first!r}: begin completions with a space, or end prompts with a line break (--prompt "
            "$'{prompt}\\n' --completion '{completion}')"
        ]


def document_notes(
    splits: Mapping[str, Sequence[Record]], examples: Mapping[str, Sequence[Example]], max_length: int, packing: bool
) -> list[str]:
    """A note on what documents become, and those on documents that are empty, or in two splits."""
    documents = {split: rows for split, rows in splits.items() if rows and isinstance(rows[0], Document)}
    if not documents:
        return []
    keys = {split: _Keys() for split in documents}
    for split, rows in documents.items():
        for row in rows:
            if row.text.strip():
                keys[split].add(_normalized(row.text))
    sizes = {split: lengths_of(examples[split]) for split in documents}
    parts = [
        f"{split} {len(keys[split].hashes):,} documents, {sum(sizes[split]):,} tokens, {len(sizes[split]):,} windows"
        for split in documents
    ]
    kind = "of one document each and " if packing else ""
    notes = [f"windows {kind}of at most {max_length:,} tokens, all but the first learned: {'; '.join(parts)}"]
    for split, rows in documents.items():
        if empty := len(rows) - len(keys[split].hashes):
            notes.append(f"{empty:,} of {len(rows):,} documents in {split} are empty, and left out")
    return notes + _common(keys)


def _check(example: Example, template: Template, eot: int, max_length: int) -> None:
    source, prompt = example.source, len(example.prompt_ids)
    answers = example.answers
    longest = max(map(len, answers), default=0)
    if not example.is_window and not example.text.strip():
        raise InputError(f"{source}: empty text")
    if example.label is not None and not 0 <= example.label < len(template.labels):
        raise InputError(f"{source}: unknown label {example.label}: the labels are {', '.join(template.labels)}")
    if not prompt:
        raise InputError(f"{source}: the prompt has no tokens")
    if not answers or (example.finished and any(len(ids) < 2 or ids[-1] != eot for ids in answers)):
        raise InputError(f"{source}: the completion is truncated, or lacks its end-of-text token")
    if example.completion_ids == example.rejected_ids:
        raise InputError(f"{source}: chosen and rejected have the same tokens: leave the pair out")
    if prompt + longest > max_length:
        raise InputError(f"{source}: {too_long_message(prompt, max_length - longest)}")


class _HasText(Protocol):
    @property
    def text(self) -> str: ...


def common_texts(splits: Mapping[str, Iterable[_HasText]]) -> dict[tuple[str, str], int]:
    """How many texts are in both of each two splits. Case, Unicode form and amount of white space do not count."""
    keys = {split: _Keys() for split in splits}
    for split, rows in splits.items():
        for row in rows:
            keys[split].add(_normalized(row.text))
    return _count_common(keys)


def _count_common(keys: Mapping[str, _Keys]) -> dict[tuple[str, str], int]:
    distinct = {split: np.unique(some.hashes) for split, some in keys.items()}
    return {
        (first, second): len(np.intersect1d(distinct[first], distinct[second], assume_unique=True))
        for first, second in combinations(distinct, 2)
    }


def _common(keys: Mapping[str, _Keys]) -> list[str]:
    """Notes on texts in two splits."""
    common = _count_common(keys).items()
    return [f"{_count_texts(count)} in both {first} and {second}" for (first, second), count in common if count]


def _normalized(text: str) -> str:
    return " ".join(normalize(text).split())


def _count_texts(count: int) -> str:
    return "1 text is" if count == 1 else f"{count} texts are"
