"""The checks before training: unusable data stops a run, notes follow, and one example is shown."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import combinations
from typing import Protocol

from graftlm.errors import InputError
from graftlm.text.boundary import label_ids
from graftlm.text.chat import Chat, any_of
from graftlm.text.collate import Example, too_long_message
from graftlm.text.records import Conversation, Document, Record
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer
from graftlm.text.words import normalize

BACKSLASH = "has a backslash and an n, not a line break: in a shell, write $'…\\n…'"
CHAT_TOKENS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]", "<|user|>", "<|assistant|>")
"""Names of special tokens that begin a turn in chat templates."""
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
    if any(example.label is not None for examples in splits.values() for example in examples):
        label_ids(template, tokenizer)
    for split, examples in splits.items():
        if not examples:
            raise InputError(f"split {split} has no examples")
        for example in examples:
            _check(example, template, tokenizer.eot, max_length)
    notes = _duplicates(splits)
    for split, examples in splits.items():
        if truncated.get(split):
            notes.append(f"{truncated[split]} of {len(examples)} texts in {split} are truncated to {max_length} tokens")
        if spanned := sum(bool(example.rest) for example in examples):
            notes.append(
                f"in {spanned} of {len(examples)} examples in {split} a token spans prompt and completion, and is not "
                "learned: begin completions with a space, or end prompts with a line break"
            )
        labels = Counter(example.label for example in examples)
        if len(labels) == 1 and len(examples) > 1 and examples[0].label is not None:
            notes.append(f"every example in {split} is labelled {template.labels[examples[0].label]!r}")
        if (mark := examples[0].desirable) is not None and all(example.desirable is mark for example in examples):
            notes.append(f"every example in {split} is {'desirable' if mark else 'undesirable'}: KTO learns from both")
    if "\\n" in template.text:
        notes.append(f"the template {BACKSLASH}")
    first = next((example for examples in splits.values() for example in examples), None)
    return [*notes, f"example: {show_targets(first, tokenizer)}"] if first else notes


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


def control_token_notes(splits: Mapping[str, Sequence[Record]], tokenizer: Tokenizer) -> list[str]:
    """A note for each split with records, other than conversations, that hold special tokens' names."""
    names = any_of({*tokenizer.special_tokens, *CHAT_TOKENS})
    notes = []
    for split, rows in splits.items():
        texts = [[getattr(row, f.name) for f in fields(row) if f.name not in ("source", "messages")] for row in rows]
        found = [match for row in texts if (match := names.search("\n".join(t for t in row if isinstance(t, str))))]
        if found:
            notes.append(
                f"{len(found)} of {len(rows)} rows in {split} hold names of special tokens, such as {found[0][0]}, "
                "which are read as plain text: give conversations as messages"
            )
    return notes


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
        if endless := [example for example in some if stops.isdisjoint(example.completion_ids[-2:])]:
            end = tokenizer.token(endless[0].completion_ids[-1])
            notes.append(
                f"{len(endless)} of {len(some)} conversations in {split} end with {end!r}, which stops no text: the "
                "model will not learn to stop; give graft generate --stop, or another chat template"
            )
    return notes


def document_notes(
    splits: Mapping[str, Sequence[Record]], examples: Mapping[str, Sequence[Example]], max_length: int
) -> list[str]:
    """A note on what documents become, and those on documents that are empty, or in two splits."""
    documents = {
        split: [row for row in rows if row.text.strip()]
        for split, rows in splits.items()
        if rows and isinstance(rows[0], Document)
    }
    if not documents:
        return []
    sizes = {split: [some.length for some in examples[split]] for split in documents}
    parts = [
        f"{split} {len(rows):,} documents, {sum(sizes[split]):,} tokens, {len(sizes[split]):,} windows"
        for split, rows in documents.items()
    ]
    notes = [f"windows of at most {max_length:,} tokens, all but the first learned: {'; '.join(parts)}"]
    for split, rows in documents.items():
        if empty := len(splits[split]) - len(rows):
            notes.append(f"{empty:,} of {len(splits[split]):,} documents in {split} are empty, and left out")
    common = common_texts(documents).items()
    return notes + [f"{_count_texts(count)} in both {first} and {second}" for (first, second), count in common if count]


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


def _duplicates(splits: Mapping[str, Sequence[Example]]) -> list[str]:
    """Notes on texts in two splits, texts with different answers, and preferences that occur in both directions."""
    whole = {split: [example for example in some if not example.is_window] for split, some in splits.items()}
    common = common_texts(whole).items()
    notes = [f"{_count_texts(count)} in both {first} and {second}" for (first, second), count in common if count]
    for split, examples in splits.items():
        answers: dict[str, set[object]] = {}
        for example in examples:
            # one prompt may have many preferences, and a window may begin at any token
            if not example.rejected_ids and example.desirable is None and not example.is_window:
                answers.setdefault(example.text, set()).add(example.completion_ids)
        if several := sum(len(distinct) > 1 for distinct in answers.values()):
            notes.append(f"{_count_texts(several)} in {split} with different answers")
        pairs = {(e.text, e.completion_ids, e.rejected_ids) for e in examples if e.rejected_ids}
        if reversed_pairs := sum((text, rejected, chosen) in pairs for text, chosen, rejected in pairs) // 2:
            subject = "pair is" if reversed_pairs == 1 else "pairs are"
            notes.append(f"{reversed_pairs} {subject} in {split} the other way round too")
    return notes


class _HasText(Protocol):
    @property
    def text(self) -> str: ...


def common_texts(splits: Mapping[str, Sequence[_HasText]]) -> dict[tuple[str, str], int]:
    """How many texts are in both of each two splits. Case, Unicode form and amount of white space do not count."""
    hashes = {split: {_text_key(row.text) for row in rows} for split, rows in splits.items()}
    return {(first, second): len(hashes[first] & hashes[second]) for first, second in combinations(splits, 2)}


def _text_key(text: str) -> bytes:
    return hashlib.blake2b(" ".join(normalize(text).split()).encode(), digest_size=16).digest()


def _count_texts(count: int) -> str:
    return "1 text is" if count == 1 else f"{count} texts are"
