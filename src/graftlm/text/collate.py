"""Records -> examples (token ids and what is learned of them) -> batches.

Prompt and completion are tokenised as one text; `text/boundary.py` decides where the completion begins. End-of-text is
the completion's last token and is learned. Only the text inside a template is ever truncated. The order of batches is a
pure function of seed and epoch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from graftlm.errors import InputError
from graftlm.text.boundary import (
    Split,
    Tokens,
    common_length,
    encode_answers,
    longest_label,
    scored_labels,
    split_prompt,
    split_tokens,
)
from graftlm.text.chat import Chat
from graftlm.text.dataset import text_hash
from graftlm.text.records import (
    Completion,
    Conversation,
    Document,
    Labelled,
    Preference,
    Record,
    Unpaired,
    as_messages,
)
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer
from graftlm.text.windows import windows

SORT_WINDOW = 64  # batches that are sorted by length together: little padding, and still well mixed
CHARS_PER_TOKEN = 5  # an upper estimate for English


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised record. End-of-text is the last of `completion_ids`, unless the answer is truncated."""

    prompt_ids: Tokens
    """What precedes every answer; all of the prompt, unless a token spans the boundary (`text/boundary.py`)."""
    completion_ids: Tokens
    label: int | None
    text: str
    """The record's text, never truncated."""
    instr_tuned_text: str
    """Prompt and completion as one string, as the course handout names it."""
    source: str
    rejected_ids: Tokens = ()
    """Of a preference, the rejected answer; `completion_ids` is the chosen one."""
    reference: tuple[float, ...] | None = None
    """Of a preference, the log-probability of each answer under the initial model, once it is computed."""
    desirable: bool | None = None
    """Of an unpaired preference (KTO), whether the answer is a good one."""
    finished: bool = True
    """Whether every answer ends with end-of-text."""
    masked_spans: tuple[range, ...] = ()
    """Of a conversation, the parts of `completion_ids` between the answers, which are not learned."""
    label_ids: tuple[Tokens, ...] = ()
    """Of a text with a label, the tokens to score for each label; may be empty."""
    rest: Tokens = ()
    """The prompt's other tokens, where a token spans the boundary."""
    skip: int = 0
    """How many first tokens of each answer and label belong to the prompt, and are neither learned nor scored."""

    is_window: bool = False
    """Whether it is a window of documents (`text/windows.py`), which begins and ends at any token."""

    @property
    def answers(self) -> list[Tokens]:
        """The completion and, of a preference, the rejected answer."""
        return [ids for ids in (self.completion_ids, self.rejected_ids) if ids]

    @property
    def full_prompt_ids(self) -> Tokens:
        """The whole prompt, as a model continues it."""
        return self.prompt_ids + self.rest

    @property
    def length(self) -> int:
        """The number of tokens."""
        return len(self.prompt_ids) + len(self.completion_ids) + len(self.rejected_ids)

    @property
    def loss_positions(self) -> list[int]:
        """The positions in `completion_ids` that are learned: those outside `masked_spans`, from `skip` on."""
        hidden = set(range(self.skip)).union(*self.masked_spans)
        return [position for position in range(len(self.completion_ids)) if position not in hidden]


class _HasText(Protocol):
    @property
    def text(self) -> str: ...


T = TypeVar("T", bound=_HasText)


# Examples -------------------------------------------------------------------------------------------------------------


def encode_rows(
    rows: Sequence[Record],
    template: Template,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    score_labels: bool = True,
    packing: bool = False,
) -> tuple[list[Example], int]:
    """Tokenise records, prompt and completion as one text, into at most `max_length` tokens each.

    A text that is too long is truncated inside the template; a prompt of the user's own never is. All texts leave room
    for the longest label's completion, so that any label can be scored and truncation does not depend on the label.
    A conversation that is too long ends with the last answer that fits. Documents become windows, of which all tokens
    but the first are learned. score_labels: tokenise all labels after a text. packing: no window of two documents.

    Returns the examples in order (of conversations and documents not one a record), and how many texts were
    truncated. Raises InputError if template and completion leave no room for the text, or a prompt of the user's own is
    too long.
    """
    rows = as_messages(rows) if template.chat else rows
    if conversations := [row for row in rows if isinstance(row, Conversation)]:
        assert len(conversations) == len(rows), "conversations among other records"
        return _conversations(conversations, tokenizer, max_length)
    if any(isinstance(row, Preference | Unpaired) and not isinstance(row.prompt, str) for row in rows):
        return [_chat_preference(row, tokenizer, max_length) for row in rows], 0
    if documents := [row for row in rows if isinstance(row, Document)]:
        assert len(documents) == len(rows), "documents among other records"
        return list(window_examples(documents, tokenizer, max_length, packing)), 0
    if template.chat and all(isinstance(row, Labelled) for row in rows):
        return _labelled_in_chat(rows, template, tokenizer, max_length)
    prompts = _prompts(rows, template, tokenizer, max_length)
    scored = range(len(template.labels)) if score_labels else ()
    answers = [_answers(row, prompt.space, template, scored) for row, prompt in zip(rows, prompts, strict=True)]
    wholes = encode_answers([(prompt.text, prompt.ids) for prompt in prompts], answers, tokenizer)
    examples: list[Example] = []
    for row, prompt, own, ids in zip(rows, prompts, answers, wholes, strict=True):
        split = split_tokens(prompt.ids, ids)
        if not isinstance(row, Labelled) and not all(split.answers):
            raise InputError(f"{row.source}: an answer has no tokens for this model: leave the row out")
        examples.append(_example(row, prompt.text + own[0], split, tokenizer.eot))
        if not isinstance(row, Labelled):
            _check_length(examples[-1], max_length)
    return examples, sum(prompt.truncated for prompt in prompts)


def two_forms_error(row: Record) -> InputError:
    """The error for a row of texts among rows of messages."""
    return InputError(f"{row.source}: its prompt is text, and other rows have messages: write all rows in one form")


def _example(row: Record, text: str, split: Split, eot: int) -> Example:
    """A record's example; of a labelled one the first answer is its own label, and the others are all labels."""
    finished = row.finished if isinstance(row, Preference) else (getattr(row, "finished", True),)
    ended = [ids + (eot,) * end for ids, end in zip(split.answers, finished, strict=False)]
    return Example(
        prompt_ids=split.prompt,
        completion_ids=ended[0],
        label=row.label if isinstance(row, Labelled) else None,
        text=row.text,
        instr_tuned_text=text,
        source=row.source,
        rejected_ids=ended[1] if len(ended) > 1 else (),
        desirable=row.label if isinstance(row, Unpaired) else None,
        finished=all(finished),
        label_ids=scored_labels(split.answers[1:], eot) if isinstance(row, Labelled) else (),
        rest=split.rest,
        skip=split.skip,
    )


def _check_length(example: Example, max_length: int) -> None:
    limit = max_length - max(map(len, example.answers))
    if len(example.prompt_ids) > limit:
        raise InputError(f"{example.source}: {too_long_message(len(example.prompt_ids), limit)}")


def _chat_preference(row: Record, tokenizer: Tokenizer, max_length: int) -> Example:
    """A preference of messages, in TRL's tokens: an answer is all that its text adds to what the texts share."""
    if not isinstance(row, Preference | Unpaired) or isinstance(row.prompt, str):
        raise two_forms_error(row)
    chat, answers = _chat_of(row, tokenizer).with_tools(row.tools), [a for a in row.answers if not isinstance(a, str)]
    try:
        prompt, *wholes = chat.answered(row.prompt, *answers)
    except InputError as error:
        raise InputError(f"{row.source}: {error}") from None
    shared = common_length(prompt, *wholes)
    chosen, *rejected = (tuple(whole[shared:]) for whole in wholes)
    example = Example(
        prompt_ids=tuple(prompt[:shared]),
        completion_ids=chosen,
        label=None,
        text=row.text,
        instr_tuned_text=tokenizer.decode_with_special(wholes[0]),
        source=row.source,
        rejected_ids=rejected[0] if rejected else (),
        desirable=row.label if isinstance(row, Unpaired) else None,
        finished=False,
    )
    _check_length(example, max_length)
    return example


def _chat_of(row: Record, tokenizer: Tokenizer) -> Chat:
    """The model's chat template, for messages."""
    if tokenizer.chat_template is None:
        raise InputError(
            f"{row.source}: the base model has no chat template to write messages in: choose one that is tuned for "
            "chat, or give records with prompt and completion"
        )
    return Chat(tokenizer, "leave the row out, choose another base model, or give prompts with completions")


def _conversations(rows: Sequence[Conversation], tokenizer: Tokenizer, max_length: int) -> tuple[list[Example], int]:
    """Conversations in the model's chat template; the assistant's answers are learned."""
    chat, examples, truncated = _chat_of(rows[0], tokenizer), [], 0
    for row in rows:
        try:
            encoded = chat.with_tools(row.tools).conversations(row.messages, row.unlearned)
        except InputError as error:
            raise InputError(f"{row.source}: {error}") from None
        fitting = [[answer for answer in some.answers if answer.stop <= max_length] for some in encoded]
        if not any(fitting):
            first = next((answer.stop for some in encoded for answer in some.answers), 0)
            raise InputError(
                f"{row.source}: the assistant's first answer ends with token {first}, and {max_length} fit: "
                "shorten the row, or raise --max_length"
            )
        for ids, answers in ((some.ids, own) for some, own in zip(encoded, fitting, strict=True) if own):
            start, stop = answers[0].start, answers[-1].stop
            text = tokenizer.decode_with_special(ids[:stop])
            example = Example(
                prompt_ids=tuple(ids[:start]),
                completion_ids=tuple(ids[start:stop]),
                label=None,
                text=row.text if len(encoded) == 1 else text,
                instr_tuned_text=text,
                source=row.source,
                finished=False,
                masked_spans=tuple(range(a.stop - start, b.start - start) for a, b in pairwise(answers)),
            )
            examples.append(example)
        truncated += sum(map(len, fitting)) < sum(len(some.answers) for some in encoded)
    return examples, truncated


def _labelled_in_chat(
    rows: Sequence[Record], template: Template, tokenizer: Tokenizer, max_length: int
) -> tuple[list[Example], int]:
    """Texts with labels as a user's message, the prompt, and the assistant's, the label word."""
    chat, examples, truncated = Chat(tokenizer), [], 0
    for row in rows:
        assert isinstance(row, Labelled), "texts with labels"
        text, split = row.text, _chat_labels(row.text, template, chat)
        while (excess := len(split.prompt) + max(map(len, split.answers)) - max_length) > 0:
            if not (text := _without_end(text, excess, template, tokenizer)):
                raise InputError(f"{row.source}: no token of the text fits in the template: raise --max_length")
            split = _chat_labels(text, template, chat)
        truncated += text != row.text
        own, scored = split.answers[row.label], [_without_turn_end(ids, chat.turn_end) for ids in split.answers]
        example = Example(
            prompt_ids=split.prompt,
            completion_ids=own,
            label=row.label,
            text=row.text,
            instr_tuned_text=tokenizer.decode_with_special(split.prompt + split.rest + own),
            source=row.source,
            finished=False,
            label_ids=scored_labels(scored, chat.turn_end),
            rest=split.rest,
            skip=split.skip,
        )
        examples.append(example)
    return examples, truncated


def _chat_labels(text: str, template: Template, chat: Chat) -> Split:
    """The tokens of a text's prompt in the chat template, and of each label after it, up to the end of its turn."""
    asked, wholes = ("user", template.prompt(text)), []
    for word in template.labels:
        whole = chat.conversation([asked, ("assistant", word)])
        if not whole.answers:
            raise InputError(f"label word {word!r} has no tokens for this model: choose other --labels")
        wholes.append(whole.ids[: whole.answers[-1].stop])
    return split_tokens(chat.encode([asked]), wholes)


def _without_turn_end(ids: Tokens, end: int) -> Tokens:
    """An answer's tokens without the one that ends its turn."""
    return ids[:-1] if ids[-1:] == (end,) else ids


def _answers(row: Record, space: str, template: Template, scored: Sequence[int]) -> list[str]:
    """The strings that follow the prompt. space: the white space of the record's prompt that belongs to them.

    scored: the labels that follow a labelled record's own.
    """
    match row:
        case Labelled():
            return [space + template.completion(number) for number in (row.label, *scored)]
        case Completion(completion=str(answer)) | Unpaired(completion=str(answer)):
            return [space + answer]
        case Preference(chosen=str(chosen), rejected=str(rejected)):
            return [space + chosen, space + rejected]
        case _:
            raise AssertionError("messages are written by the chat template")


def window_examples(
    rows: Iterable[Document], tokenizer: Tokenizer, max_length: int, isolated: bool
) -> Iterator[Example]:
    """The windows of documents. Their first token is the prompt, as nothing predicts it."""
    for ids, source in windows(rows, tokenizer, max_length, isolated):
        text = tokenizer.decode_with_special(ids)
        yield Example(ids[:1], ids[1:], None, text, text, source, finished=False, is_window=True)


class _Prompt(NamedTuple):
    """A row's prompt, its tokens, the white space at its end, and whether its text was truncated."""

    text: str
    ids: list[int]
    space: str
    truncated: bool


def _prompts(rows: Sequence[Record], template: Template, tokenizer: Tokenizer, max_length: int) -> list[_Prompt]:
    """Each row's prompt; the text of a labelled row is truncated where its prompt has too many tokens.

    The end of a truncated text may take more tokens than before, so a second round is sometimes needed. Every round
    shortens the text, so the loop ends.
    """
    labelled = [n for n, row in enumerate(rows) if isinstance(row, Labelled)]
    limit = max_length - longest_label(template, tokenizer, max_length) if labelled else 0
    texts = [row.text for row in rows]
    for n in labelled:  # of a text far beyond its limit only the beginning is tokenised
        texts[n] = texts[n][: CHARS_PER_TOKEN * limit]
    prompts: list[_Prompt] = [_Prompt("", [], "", False)] * len(rows)

    def encode(numbers: Sequence[int]) -> None:
        own = [template.prompt(texts[n]) if isinstance(rows[n], Labelled) else texts[n] for n in numbers]
        split = [split_prompt(text, tokenizer) for text in own]
        found = tokenizer.encode_prompts([text for text, _ in split])
        for n, (text, space), ids in zip(numbers, split, found, strict=True):
            prompts[n] = _Prompt(text, ids, space, texts[n] != rows[n].text)

    encode(range(len(rows)))
    underestimated = [n for n in labelled if texts[n] != rows[n].text and len(prompts[n].ids) <= limit]
    for n in underestimated:
        texts[n] = rows[n].text
    encode(underestimated)
    too_long = [n for n in labelled if len(prompts[n].ids) > limit]
    while too_long:
        for n in too_long:
            texts[n] = _without_end(texts[n], len(prompts[n].ids) - limit, template, tokenizer)
            if not texts[n]:
                blank = len(rows[n].text) - len(rows[n].text.lstrip())
                cure = f"remove the {blank:,} white-space characters at its start" if blank else "raise --max_length"
                raise InputError(f"{rows[n].source}: no token of the text fits in the template: {cure}")
        encode(too_long)
        too_long = [n for n in too_long if len(prompts[n].ids) > limit]
    return prompts


def too_long_message(prompt: int, limit: int) -> str:
    """What is wrong with a prompt of this many tokens that leaves no room for its completion."""
    problem = "completion longer than the context" if limit < 1 else "prompt and completion longer than the context"
    return (
        f"{problem}: the prompt takes {prompt} tokens, and {max(limit, 0)} fit before its completion: shorten the row"
    )


def _without_end(text: str, tokens: int, template: Template, tokenizer: Tokenizer) -> str:
    """The text without its last `tokens` tokens, as tokenised inside the prompt, and without trailing space."""
    _, spans = tokenizer.encode_with_offsets(template.prompt(text))
    start, stop = len(template.head), len(template.head) + len(text)
    starts = [first for first, last in spans if last > start and first < stop]
    remaining = len(starts) - tokens
    return text[: max(0, starts[remaining] - start)].rstrip() if remaining > 0 else ""


def subset(items: Sequence[T], limit: int) -> list[T]:
    """A fixed sample, independent of labels: the `limit` first items by a hash of the text, in the data's order.

    Official files list one label first, so the first N rows of a split would be of one class. 0 means all. The hash is
    salted: held-out splits are the first by the plain hash, and their samples would be unbalanced.
    """
    if limit <= 0 or limit >= len(items):
        return list(items)
    return [items[n] for n in sorted(_order_by_hash(items)[:limit])]


def sort_by_hash(items: Sequence[T]) -> list[T]:
    """All items in a fixed order that does not depend on labels or on the data's order."""
    return [items[n] for n in _order_by_hash(items)]


def _order_by_hash(items: Sequence[T]) -> list[int]:
    return sorted(range(len(items)), key=lambda n: (text_hash("sample\n" + items[n].text), n))


# Batches --------------------------------------------------------------------------------------------------------------


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, sort_window: int = SORT_WINDOW
) -> list[list[int]]:
    """The batches of one epoch, as indices into `lengths` [tokens]; every index once.

    A pure function of its arguments, so a resumed run needs only its step number. The indices are shuffled, sorted by
    length within windows of `sort_window` batches (ties stay shuffled; 0: not sorted) and split into batches, which are
    shuffled. The smaller batch at the end of the last window may take any place.
    """
    assert batch_size >= 1
    # Only random numbers are taken from numpy: its shuffles may change between releases, its generators do not.
    random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).random
    order = np.argsort(random(len(lengths)), kind="stable")
    sizes = np.asarray(lengths, dtype=np.int64)
    batches: list[list[int]] = []
    step = max(1, sort_window) * batch_size
    for start in range(0, len(order), step):
        window = order[start : start + step]
        if sort_window:
            window = window[np.argsort(sizes[window], kind="stable")]
        batches += [window[n : n + batch_size].tolist() for n in range(0, len(window), batch_size)]
    return [batches[n] for n in np.argsort(random(len(batches)), kind="stable")]


def common_prefix_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts share, at most the shortest prompt's length minus one.

    The last token of a prompt is never shared: its position predicts the first target.
    """
    if not prompts:
        return 0
    low, high = min(map(tuple, prompts)), max(map(tuple, prompts))  # in sorted order: what these share, all share
    return max(0, min(common_length(low, high), min(map(len, prompts)) - 1))
