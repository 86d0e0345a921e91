"""Documents -> windows of tokens, for continued pretraining.

The documents are written one after the other: before each the tokens that the tokenizer puts before a text
(begin-of-text, where it has one), after each end-of-text. This sequence is split into windows of `max_length` tokens;
the last one may be shorter. Every token is in exactly one window. A window may hold the end of a document and the start
of the next, and attends across, as in nanoGPT. A window that begins inside a document gets no begin-of-text.

With --packing documents are isolated: each is split on its own, so that short ones are windows of their own.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from graftlm.errors import InputError
from graftlm.text.boundary import Tokens
from graftlm.text.records import Document, chunks
from graftlm.text.tokenizer import Tokenizer

MIN_WINDOW = 3
"""Tokens: a window of two may have to give one to the last window, and one alone predicts nothing."""


class Window(NamedTuple):
    """Consecutive tokens of the documents, at least two."""

    ids: Tokens
    source: str
    """File and line of the document in which it begins."""


def windows(
    documents: Iterable[Document], tokenizer: Tokenizer, max_length: int, isolated: bool = False
) -> Iterator[Window]:
    """The windows of some documents, a pure function of the arguments; documents of white space alone are left out.

    If a single token would remain for the last window, the one before it is a token shorter. The documents are read
    and tokenized in parts. isolated: no window holds tokens of two documents.

    Raises InputError for documents without tokens, and a max_length that is too short.
    """
    if max_length < MIN_WINDOW:
        raise InputError(f"--max_length {max_length}: windows of documents take at least {MIN_WINDOW} tokens")
    ids: list[int] = []  # of the windows that are not complete
    begins: list[tuple[int, str]] = []  # where documents begin in them, and their sources
    found = False
    for part in chunks(document for document in documents if document.text.strip()):
        for document, tokens in zip(part, tokenizer.encode_prompts([d.text for d in part]), strict=True):
            begins.append((len(ids), document.source))
            ids += (*tokens, tokenizer.eot)
            if isolated:
                found |= len(ids) > 1
                yield from _split(ids, begins, max_length)
                ids, begins = [], []
        bounds = range(0, len(ids) - max_length, max_length)  # the last window may give or take a token
        for start in bounds[:-1]:
            yield _window(ids[start : start + max_length], begins, start)
        if len(bounds) > 1:
            at = bounds[-1]
            del ids[:at]
            first = bisect_right(begins, at, key=lambda begin: begin[0]) - 1
            begins = [(start - at, source) for start, source in begins[first:]]
    if len(ids) < 2 and not found:
        raise InputError("the documents have no text: write some, or name other files")
    yield from _split(ids, begins, max_length)


def _split(ids: Sequence[int], begins: Sequence[tuple[int, str]], max_length: int) -> Iterator[Window]:
    """The windows of these tokens; none of a single one, which nothing predicts."""
    if len(ids) < 2:
        return
    bounds = [*range(0, len(ids), max_length), len(ids)]
    if bounds[-1] - bounds[-2] == 1:
        bounds[-2] -= 1
    for start, stop in pairwise(bounds):
        yield _window(ids[start:stop], begins, start)


def _window(ids: Sequence[int], begins: Sequence[tuple[int, str]], start: int) -> Window:
    return Window(tuple(ids), begins[bisect_right(begins, start, key=lambda begin: begin[0]) - 1][1])
