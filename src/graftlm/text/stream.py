"""Tokens -> text, as they arrive one at a time, and the place of each token in the text.

The pieces joined are exactly what decoding all tokens at once gives, up to a stop text. Text that was returned is
final, so some is held back: the bytes of a character that is not complete; the beginning of a possible stop text; and a
run of SentencePiece's byte tokens until another token follows, because one wrong byte makes replacement characters of
them all:

    <0xC3> <0xA9>           "é"
    <0xC3> <0xA9> <0xFF>    three replacement characters
"""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from graftlm.text.tokenizer import BROKEN, Tokenizer


class TextStream:
    """The text of tokens that follow a prompt.

    prompt: the ids before them. stop: texts that end the output, none of them empty. space: left out where the text
    begins with it.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int] = (), stop: Sequence[str] = (), space: str = ""
    ) -> None:
        self._tokenizer, self._prompt, self._stop, self._space = tokenizer, prompt, tuple(stop), space
        self._ids: list[int] = []  # those after the last token where all text was final
        self._final = 0  # characters of their text that are final
        self._in_run = False  # of byte tokens
        self._buffer = ""  # final, and perhaps the beginning of a stop text
        self._dropped = self._length = 0  # characters of `space` that were left out, and of the text that was returned
        self.stopped = False
        """Whether a stop text has been found; it and the text after it are dropped."""

    def add(self, token: int) -> str:
        """The new text with this token; often empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        if self._tokenizer.has_text(token):
            self._in_run = self._tokenizer.is_fallback(token)
        text = self._tokenizer.decode(self._ids, self._prompt)
        final = self._final if self._in_run else len(text) - text.endswith(BROKEN)
        new, self._final = text[self._final : final], final
        if text and final == len(text):
            self._settle(text)
            self._ids, self._prompt, self._final = [], [token], 0
        return self._release(new, text[final:])

    def finish(self) -> str:
        """The remaining text, after the last token."""
        if self.stopped:
            return ""
        text = self._tokenizer.decode(self._ids, self._prompt)
        found = self._release(text[self._final :], "")
        if not self.stopped:
            self._settle(text)
            self._length += len(self._buffer)
            found, self._buffer = found + self._buffer, ""
        return found

    def _settle(self, text: str) -> None:
        """Called with the text of `_ids` when all of it is final."""

    def _release(self, new: str, rest: str) -> str:
        """What can be returned of the final text that is new; `rest` follows it, and may still change."""
        while new and self._space:
            drop = new[0] == self._space[0]
            new, self._space = new[drop:], self._space[1:] if drop else ""
            self._dropped += drop
        self._buffer += new
        seen = self._buffer + rest.rstrip(BROKEN)
        if starts := [start for stop in self._stop if (start := seen.find(stop)) >= 0]:
            self.stopped = True
            found, self._buffer = seen[: min(starts)], ""
            self._settle(self._tokenizer.decode(self._ids, self._prompt))
        else:
            ends = (n for stop in self._stop for n in range(1, len(stop)) if self._buffer.endswith(stop[:n]))
            kept = len(self._buffer) - max(ends, default=0)
            found, self._buffer = self._buffer[:kept], self._buffer[kept:]
        self._length += len(found)
        return found


class PlacedToken(NamedTuple):
    """A token of a text."""

    token: int
    piece: bytes | None
    """The bytes that it adds to the text; None for a special token."""
    offset: int
    """The number of characters before it; of a part of a character those before that."""
    before: Sequence[int] | None = None
    """If it is the first of its text: the ids before it, on which the bytes of any token in its place depend."""


class TokenStream(TextStream):
    """The same with the place of each token: `take` gives the tokens together with their text, once it is returned.

    Tokens that begin in a stop text or after it have no place. start: the number of characters before the text, `space`
    among them, which offsets count too.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        stop: Sequence[str] = (),
        space: str = "",
        start: int = 0,
    ) -> None:
        super().__init__(tokenizer, prompt, stop, space)
        self._start = start
        self._placed: list[PlacedToken] = []
        self._before: Sequence[int] | None = prompt  # until the first token with text
        self._settled = 0  # characters of the tokens that are placed
        self._finished = False

    def finish(self) -> str:
        """The remaining text, after the last token."""
        found, self._finished = super().finish(), True
        return found

    def take(self) -> list[PlacedToken]:
        """The next tokens, all whose text has been returned."""
        everything = self._finished and not self.stopped
        offsets = [each.offset - self._dropped for each in self._placed]
        count = len(offsets) if everything else sum(max(0, offset) < self._length for offset in offsets)
        placed, self._placed = self._placed[:count], self._placed[count:]
        starts = [max(0, self._start + offset) for offset in offsets[:count]]
        return [each._replace(offset=start) for each, start in zip(placed, starts, strict=True)]

    @property
    def end(self) -> int:
        """The offset after the text that was returned."""
        return self._start + self._length

    def _settle(self, text: str) -> None:
        tokens = [(token, self._before, self._piece(token)) for token in self._ids]
        run = b"".join(piece or b"" for token, _, piece in tokens if self._tokenizer.is_fallback(token))
        broken = not _is_utf8(run)
        places = _Places()
        for token, before, piece in tokens:
            place = places.of_bytes(piece or b"", broken and self._tokenizer.is_fallback(token))
            self._placed.append(PlacedToken(token, piece, self._settled + min(place, len(text)), before))
        self._settled += len(text)

    def _piece(self, token: int) -> bytes | None:
        piece = self._tokenizer.token_bytes(token, self._before)
        if self._tokenizer.has_text(token):
            self._before = None
        return piece


class _Places:
    """Counts the characters of bytes, as UTF-8; other bytes become replacement characters."""

    def __init__(self) -> None:
        self._count, self._decoder = 0, codecs.getincrementaldecoder("utf-8")("replace")

    def of_bytes(self, piece: bytes, one_each: bool) -> int:
        """The index of the character that the first of these bytes belongs to. one_each: each byte is a character."""
        place = self._count
        for number, byte in enumerate(piece):
            self._count += 1 if one_each else len(self._decoder.decode(bytes([byte])))
            if number == 0:
                is_complete = one_each or not self._decoder.getstate()[0]
                place = self._count - is_complete
        return place


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
