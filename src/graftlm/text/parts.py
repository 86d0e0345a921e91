"""Records -> examples part by part, so that only a part of a data set is in memory."""

from collections.abc import Iterable, Iterator, Sequence

from graftlm.text.collate import Example, encode_rows, two_forms_error, window_examples
from graftlm.text.records import Conversation, Document, Record, chunks, is_chat
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer


def encode_parts(
    rows: Sequence[Record],
    template: Template,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    score_labels: bool = True,
    packing: bool = False,
) -> Iterator[tuple[Sequence[Record], list[Example], int]]:
    """`encode_rows` part by part, so that only a part is in memory: its records, their examples, texts truncated.

    The windows of documents come one by one, each with the records that were read for it.
    """
    if rows and isinstance(rows[0], Document):
        read: list[Record] = []
        for window in window_examples(_documents(rows, read), tokenizer, max_length, packing):
            yield read.copy(), [window], 0
            read.clear()
        yield read, [], 0
        return
    for part in chunks(rows):
        other = is_chat(part[0]) != is_chat(rows[0]) and not template.chat
        if other and not isinstance(rows[0], Conversation):
            raise two_forms_error(next(row for row in (rows[0], part[0]) if not is_chat(row)))
        examples, truncated = encode_rows(part, template, tokenizer, max_length, score_labels=score_labels)
        yield part, examples, truncated


def _documents(rows: Iterable[Record], read: list[Record]) -> Iterator[Document]:
    """The documents, which are appended to `read` too."""
    for row in rows:
        assert isinstance(row, Document), "documents among other records"
        read.append(row)
        yield row
