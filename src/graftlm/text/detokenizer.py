"""The text of tokens that come one by one, and the texts that end it.

What is unusual here: what was given out is never taken back. A character whose bytes have not all come, and the
beginning of what may become a stop text, are held until more is known.
"""

from collections.abc import Callable, Sequence

BROKEN = "\ufffd"  # what decoders make of bytes that are no whole character
LONGEST_BROKEN = 3  # bytes, and so at most as many of these, that a character may still lack its last one of


class TextStream:
    """Tokens -> text, piece by piece; together the pieces are what `decode` makes of all tokens, up to a stop text.

    decode: `Tokenizer.decode`. stop: texts that end the answer, none of them empty.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, tuple(stop)
        # Only the last tokens are decoded again. What came before them is known to be whole; the first of them are
        # known too, because some decoders drop a space in front of the first token.
        self._ids: list[int] = []
        self._known = 0
        self._given = 0
        self._held = ""
        self.stopped = False
        """Whether a stop text has come. What comes behind it is not looked at."""

    def add(self, token: int) -> str:
        """The text that is new with this token; often empty."""
        self._ids.append(token)
        text = self._decode(self._ids)
        broken = min(LONGEST_BROKEN, len(text) - len(text.rstrip(BROKEN)))
        new = text[self._given : len(text) - broken]
        self._given += len(new)
        if new and not broken:
            self._ids = self._ids[self._known :]
            self._known, self._given = len(self._ids), len(self._decode(self._ids))
        return self._release(new)

    def finish(self) -> str:
        """The rest: no token comes any more, so what was held is text."""
        rest = self._release(self._decode(self._ids)[self._given :]) + self._held
        self._held = ""
        return rest

    def _release(self, new: str) -> str:
        text = self._held + new
        if self.stopped:
            return ""
        if found := [at for stop in self._stop if (at := text.find(stop)) >= 0]:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        begun = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]
