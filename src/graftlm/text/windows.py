"""Documents -> windows of tokens, for continued pretraining.

The documents are written one after the other: before each the tokens that the tokenizer puts before a text
(begin-of-text, where it has one), after each end-of-text. This sequence is split into windows of `max_length` tokens;
the last one may be shorter. Every token is in exactly one window. A window may hold the end of a document and the start
of the next, and attends across, as in nanoGPT. A window that begins inside a document gets no begin-of-text.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from graftlm.errors import InputError
from graftlm.text.boundary import Tokens
from graftlm.text.records import Document
from graftlm.text.tokenizer import Tokenizer

MIN_WINDOW = 3
"""Tokens: a window of two may have to give one to the last window, and one alone predicts nothing."""


class Window(NamedTuple):
    """Consecutive tokens of the documents, at least two."""

    ids: Tokens
    source: str
    """File and line of the document in which it begins."""


def windows(documents: Sequence[Document], tokenizer: Tokenizer, max_length: int) -> list[Window]:
    """The windows of some documents, a pure function of the arguments; documents of white space alone are left out.

    If a single token would remain for the last window, the one before it is a token shorter.

    Raises InputError for documents without tokens, and a max_length that is too short.
    """
    if max_length < MIN_WINDOW:
        raise InputError(f"--max_length {max_length}: windows of documents take at least {MIN_WINDOW} tokens")
    documents = [document for document in documents if document.text.strip()]
    ids: list[int] = []
    begins: list[int] = []
    for tokens in tokenizer.encode_prompts([document.text for document in documents]):
        begins.append(len(ids))
        ids += (*tokens, tokenizer.eot)
    if len(ids) < 2:
        raise InputError("the documents have no text: write some, or name other files")
    bounds = [*range(0, len(ids), max_length), len(ids)]
    if bounds[-1] - bounds[-2] == 1:
        bounds[-2] -= 1
    return [
        Window(tuple(ids[start:stop]), documents[bisect_right(begins, start) - 1].source)
        for start, stop in pairwise(bounds)
    ]
