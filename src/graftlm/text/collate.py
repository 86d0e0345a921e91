"""Rows -> examples (prompt tokens, completion tokens) -> batches whose order is a pure function of seed and epoch.

Unusual: prompt and completion are tokenised apart, so where the answer begins is known and never searched for; the
end-of-text token is the completion's last token and is learned like any other; only the text inside the template is
ever cut. No torch here, and no padding: lengths say where a row ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np

from graftlm.errors import InputError
from graftlm.text.chat import Chat
from graftlm.text.dataset import Dataset, load_dataset, text_hash
from graftlm.text.layouts import Completion, Conversation, Labelled, Preference, Record, Unpaired
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer

__all__ = [
    "Dataset",
    "Example",
    "common_prefix_length",
    "encode_rows",
    "epoch_batches",
    "label_ids",
    "load_dataset",
    "sort_by_hash",
    "subset",
]

WINDOW = 64  # batches that are sorted by length together: little padding, and still well mixed
CHARS_PER_TOKEN = 5  # characters a token: what English takes, and a little more


@dataclass(frozen=True, slots=True)
class Example:
    """One example as training and evaluation see it; the end-of-text token is the last of `completion_ids`.

    (Of an answer that was cut, as the row says, it is not.)
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    label: int | None
    text: str
    """The record's text, whole, also where the prompt holds only its beginning."""
    instr_tuned_text: str
    """Prompt and completion as one string, as the course handout names it."""
    source: str
    rejected_ids: tuple[int, ...] = ()
    """Of a pair, the answer that was not preferred; `completion_ids` is then the one that was."""
    reference: tuple[float, float] | None = None
    """Of a pair, the log-probability of both answers under the model that training starts from, once it is known."""
    desirable: bool | None = None
    """Of an unpaired preference (KTO), whether the answer is a good one."""
    finished: bool = True
    """Whether every answer ends with the text, and so with its end-of-text token."""
    masked_spans: tuple[range, ...] = ()
    """Of a conversation, the parts of `completion_ids` between the answers: read, and not learned."""

    @property
    def length(self) -> int:
        """All its tokens."""
        return len(self.prompt_ids) + len(self.completion_ids) + len(self.rejected_ids)

    @property
    def loss_positions(self) -> list[int]:
        """Which of `completion_ids` are learned, by place: all but those given."""
        given = set().union(*self.masked_spans)
        return [place for place in range(len(self.completion_ids)) if place not in given]


class _HasText(Protocol):
    @property
    def text(self) -> str: ...


Texted = TypeVar("Texted", bound=_HasText)


# ------------------------------------------------------------------------------------------------ examples


def encode_rows(
    rows: Sequence[Record], template: Template, tokenizer: Tokenizer, max_length: int
) -> tuple[list[Example], int]:
    """Tokenise records, prompt and completion separately, into at most `max_length` tokens each.

    A text that is too long is truncated inside the template; a prompt of the user's own never is. All texts leave room
    for the longest label's completion, so that any label can be scored and truncation does not depend on the label.
    A conversation that is too long ends with the last answer that fits.

    Returns the examples in order, and how many texts were truncated. Raises InputError if the template and a
    completion leave no room for the text, or if a prompt of the user's own is too long.
    """
    if conversations := [row for row in rows if isinstance(row, Conversation)]:
        assert len(conversations) == len(rows), "conversations among other records"
        return _conversations(conversations, tokenizer, max_length)
    labelled = any(isinstance(row, Labelled) for row in rows)
    label_tokens = _max_example_tokens(template, tokenizer, max_length) if labelled else 0
    strings = [_answers(row, template) for row in rows]
    distinct = sorted({text for answers in strings for text, _ in answers})
    ids_of = {text: tuple(ids) for text, ids in zip(distinct, tokenizer.encode_batch(distinct), strict=True)}
    answers = [[ids_of[text] + (tokenizer.eot,) * finished for text, finished in row] for row in strings]
    limits = [
        max_length - (label_tokens if isinstance(row, Labelled) else max(map(len, ids)))
        for row, ids in zip(rows, answers, strict=True)
    ]
    texts, prompts = _truncate_to_fit(rows, limits, template, tokenizer)
    examples = [
        Example(
            prompt_ids=tuple(prompt_ids),
            completion_ids=ids[0],
            label=row.label if isinstance(row, Labelled) else None,
            text=row.text,
            instr_tuned_text=_prompt(row, text, template) + row_strings[0][0],
            source=row.source,
            rejected_ids=ids[1] if len(ids) > 1 else (),
            desirable=row.label if isinstance(row, Unpaired) else None,
            finished=all(finished for _, finished in row_strings),
        )
        for row, text, prompt_ids, row_strings, ids in zip(rows, texts, prompts, strings, answers, strict=True)
    ]
    return examples, sum(text != row.text for text, row in zip(texts, rows, strict=True))


def _conversations(rows: Sequence[Conversation], tokenizer: Tokenizer, max_length: int) -> tuple[list[Example], int]:
    """Conversations in the model's chat template; the assistant's answers are learned."""
    if tokenizer.chat_template is None:
        raise InputError(
            f"{rows[0].source}: the base model has no chat template to write messages in: choose one that is tuned for "
            "chat, or give records with prompt and completion"
        )
    chat = Chat(tokenizer, "choose another base model, or give records with prompt and completion")
    examples, truncated = [], 0
    for row in rows:
        try:
            encoded = chat.conversation(row.messages)
        except InputError as error:
            raise InputError(f"{row.source}: {error}") from None
        answers = [answer for answer in encoded.answers if answer.stop <= max_length]
        if not answers:
            raise InputError(
                f"{row.source}: the assistant's first answer ends with token {encoded.answers[0].stop}, and "
                f"{max_length} fit: shorten the row, or raise --max_length"
            )
        start, stop = answers[0].start, answers[-1].stop
        example = Example(
            prompt_ids=tuple(encoded.ids[:start]),
            completion_ids=tuple(encoded.ids[start:stop]),
            label=None,
            text=row.text,
            instr_tuned_text=tokenizer.decode(encoded.ids[:stop], skip_special=False),
            source=row.source,
            finished=False,
            masked_spans=tuple(range(a.stop - start, b.start - start) for a, b in pairwise(answers)),
        )
        examples.append(example)
        truncated += len(answers) < len(encoded.answers)
    return examples, truncated


def _prompt(row: Record, text: str, template: Template) -> str:
    return template.prompt(text) if isinstance(row, Labelled) else row.text.rstrip(" ")


def _answers(row: Record, template: Template) -> list[tuple[str, bool]]:
    """The strings that follow the prompt, and whether end-of-text follows each.

    Spaces at the end of a prompt of the user's own belong to its completions.
    """
    space = row.text[len(row.text.rstrip(" ")) :]
    match row:
        case Labelled():
            return [(template.completion(row.label), True)]
        case Completion() | Unpaired():
            return [(space + row.completion, row.finished)]
        case Preference():
            return [(space + row.chosen, row.finished[0]), (space + row.rejected, row.finished[1])]
        case Conversation():
            raise AssertionError("conversations have answers of their own")


def _max_example_tokens(template: Template, tokenizer: Tokenizer, max_length: int) -> int:
    """Tokens of the longest label's completion; an error unless it and the template leave one for the text."""
    instruction = len(tokenizer.encode(template.head.rstrip(" ") + template.tail, bos=True))
    words = [template.completion(number) for number in range(len(template.labels))]
    longest, word = max((len(ids) + 1, word) for word, ids in zip(words, tokenizer.encode_batch(words), strict=True))
    if longest >= max_length:
        raise InputError(
            f"completion longer than the context: {word!r} and end-of-text take {longest} tokens, and {max_length} "
            "fit with the prompt: use a shorter label word, or raise --max_length"
        )
    if instruction + longest >= max_length:
        raise InputError(
            f"no room for the text: template {template.name!r} takes {instruction} tokens and its completion "
            f"{longest}, and {max_length} fit: use a shorter template, or raise --max_length"
        )
    return longest


def _truncate_to_fit(
    rows: Sequence[Record], rooms: Sequence[int], template: Template, tokenizer: Tokenizer
) -> tuple[list[str], list[list[int]]]:
    """Each row's text, shortened where its prompt would take more tokens than its room, and the prompts' tokens.

    The end of a cut text may take more tokens than it took inside the whole, so a second round is sometimes needed;
    every round shortens what is left, so it ends.
    """
    # Of a text that cannot fit by far, only the beginning is read: tokens hold fewer than 5 characters on average.
    texts = [
        row.text[: CHARS_PER_TOKEN * room] if isinstance(row, Labelled) else row.text
        for row, room in zip(rows, rooms, strict=True)
    ]
    prompts: list[list[int]] = [[]] * len(rows)

    def encode(which: Sequence[int]) -> None:
        strings = [_prompt(rows[n], texts[n], template) for n in which]
        for n, ids in zip(which, tokenizer.encode_batch(strings, bos=True), strict=True):
            prompts[n] = ids

    encode(range(len(rows)))
    misjudged = [n for n, row in enumerate(rows) if texts[n] != row.text and len(prompts[n]) <= rooms[n]]
    for n in misjudged:
        texts[n] = rows[n].text
    encode(misjudged)
    over = [n for n in range(len(rows)) if len(prompts[n]) > rooms[n]]
    while over:
        for n in over:
            if not isinstance(rows[n], Labelled):
                raise InputError(f"{rows[n].source}: {too_long(len(prompts[n]), rooms[n])}")
            texts[n] = _without_end(texts[n], len(prompts[n]) - rooms[n], template, tokenizer)
            if not texts[n]:
                raise InputError(f"{rows[n].source}: nothing of the text fits beside the template: raise --max_length")
        encode(over)
        over = [n for n in over if len(prompts[n]) > rooms[n]]
    return texts, prompts


def too_long(prompt: int, room: int) -> str:
    """What is wrong with a prompt that leaves no room for its completion."""
    what = "completion longer than the context" if room < 1 else "prompt and completion longer than the context"
    return f"{what}: the prompt takes {prompt} tokens, and {max(room, 0)} fit before its completion: shorten the row"


def _without_end(text: str, tokens: int, template: Template, tokenizer: Tokenizer) -> str:
    """The text without its last `tokens` tokens, counted inside the prompt, and without space at its end."""
    _, spans = tokenizer.encode_with_offsets(template.prompt(text))
    first, end = len(template.head), len(template.head) + len(text)
    starts = [start for start, stop in spans if stop > first and start < end]
    keep = len(starts) - tokens
    return text[: max(0, starts[keep] - first)].rstrip() if keep > 0 else ""


def subset(items: Sequence[Texted], limit: int) -> list[Texted]:
    """A fixed, label-blind sample of rows or examples: the `limit` first by a hash of the text, in the data's order.

    Official files list one label first, so the first N of a split would be of one class. A limit of 0 means all.
    The hash is salted: derived splits are cut by the plain one, label by label, and would give a lopsided sample.
    """
    if limit <= 0 or limit >= len(items):
        return list(items)
    return [items[n] for n in sorted(_by_hash(items)[:limit])]


def sort_by_hash(items: Sequence[Texted]) -> list[Texted]:
    """All of them in a fixed order that is blind to labels and to the data's own order."""
    return [items[n] for n in _by_hash(items)]


def _by_hash(items: Sequence[Texted]) -> list[int]:
    return sorted(range(len(items)), key=lambda n: (text_hash("sample\n" + items[n].text), n))


# ------------------------------------------------------------------------------------------------ batches


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, buckets: bool = True
) -> list[list[int]]:
    """The batches of one epoch, as indices into `lengths` [tokens]: every index once, equal lengths together.

    A pure function of its arguments, so that a resumed run needs to remember only how many steps it made. Shuffled,
    then sorted by length within windows of 64 batches (ties stay shuffled), cut into batches, and the batches
    shuffled. The last batch of the last window holds what is left over, and may come at any place. Without `buckets`
    nothing is sorted.
    """
    assert batch_size >= 1
    # Only raw random numbers are taken from numpy: its shuffles may change between releases, these may not.
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).random
    order = np.argsort(random(len(lengths)), kind="stable")
    sizes = np.asarray(lengths, dtype=np.int64)
    batches: list[list[int]] = []
    for start in range(0, len(order), WINDOW * batch_size):
        window = order[start : start + WINDOW * batch_size]
        if buckets:
            window = window[np.argsort(sizes[window], kind="stable")]
        batches += [window[n : n + batch_size].tolist() for n in range(0, len(window), batch_size)]
    return [batches[n] for n in np.argsort(random(len(batches)), kind="stable")]


def common_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts share, at most the shortest prompt less one.

    That one token stays with each row: its position predicts the row's first target.
    """
    if not prompts:
        return 0
    low, high = min(map(tuple, prompts)), max(map(tuple, prompts))  # what the outermost share, all share
    shared = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return max(0, min(shared, min(map(len, prompts)) - 1))


# ------------------------------------------------------------------------------------------------ labels


def label_ids(template: Template, tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens to score for each label: its completion's, without end-of-text.

    Where one label's tokens begin another's ("good", "good enough") the longer could never win, so then end-of-text
    is scored too, for all labels. Raises InputError when two labels have equal tokens.
    """
    words = [template.completion(number) for number in range(len(template.labels))]
    ids = tokenizer.encode_batch(words)
    begins = False
    for n, own in enumerate(ids):
        if not own:
            raise InputError(f"label word {template.labels[n]!r} has no tokens for this model: choose other --labels")
        for m, other in enumerate(ids[:n]):
            if own == other:
                pair = f"{template.labels[m]!r} and {template.labels[n]!r}"
                raise InputError(f"label words {pair} have equal tokens for this model: choose other --labels")
            begins |= own == other[: len(own)] or other == own[: len(other)]
    return [[*own, tokenizer.eot] for own in ids] if begins else ids
