"""Bad rows of a split, counted by reason: an error (`--bad_rows stop`), or left out with a note (`skip`)."""

import re
from collections import Counter
from typing import Literal

from graftlm.errors import InputError

BadRowsFlag = Literal["stop", "skip"]
REASONS = 5  # that one line names
UNLABELLED = {"no label", "label -1 says that the row has no label"}
"""The reasons of `rows.Row.label` for a row that is not to be learned."""


class BadRows:
    """The bad rows of one split."""

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self._first = ""
        self._reasons: Counter[str] = Counter()

    @property
    def rows(self) -> int:
        """How many there are."""
        return self._reasons.total()

    def add(self, source: str, error: InputError) -> None:
        """Count a row that cannot be read. source: its file and line, with which the error's message begins."""
        self._first = self._first or str(error)
        self._reasons[_reason(str(error).removeprefix(source).lstrip(": "))] += 1

    def finish(self, rows: int, may_be_empty: bool = False, may_be_unlabelled: bool = False) -> str:
        """The note on what is left out of a split with this many rows, "" for nothing.

        Raises InputError unless bad rows are skipped and good ones are left. may_be_empty: none need be.
        may_be_unlabelled: a split of which no row has a label is left out, and is no error.
        """
        if not self.rows:
            return ""
        if may_be_unlabelled and self.rows == rows and self._reasons.keys() <= UNLABELLED:
            return f"left out: none of its {rows} rows has a label"
        several = f": {self._by_reason()}" if len(self._reasons) > 1 else ""
        if self.skip and (self.rows < rows or may_be_empty):
            return f"{self.rows} of {rows} rows left out (--bad_rows skip): {self._by_reason()}"
        if self.rows == rows:
            raise InputError(self._first + (f" (all {rows} rows are bad{several})" if rows > 1 else ""))
        are, them = ("is", "it") if self.rows == 1 else ("are", "them")
        raise InputError(
            f"{self._first} ({self.rows} of {rows} rows {are} bad{several}; --bad_rows skip leaves {them} out)"
        )

    def _by_reason(self) -> str:
        named = self._reasons.most_common(REASONS)
        rest = self.rows - sum(count for _, count in named)
        return ", ".join([f"{count} {reason}" for reason, count in named] + [f"{rest} for other reasons"] * (rest > 0))


def _reason(message: str) -> str:
    """What is wrong, without the message of a conversation, the value, and what to do."""
    message = re.sub(r"^message \d+:? ", "", message)
    message = re.split(r": | \(|; |, not ", message, maxsplit=1)[0]
    return (
        message
        if message.startswith("no field")
        else re.sub(r" ('.*'|\".*\"|-?\d[\d.e-]*|\[.*|True|False)$", "", message)
    )
