"""Rows that hold several texts: what follows what, and which tokens do not attend to each other.

    packed   record, record, …: each attends to itself alone, and its positions start at 0
    paired   prompt, answer, other answer: each answer attends to the prompt and itself

What precedes every row (a shared prompt prefix, a learned prefix) precedes every one of its texts.

Letters: B rows, T tokens of a row.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class RowLayout(Protocol):
    """The order of a row's tokens in their texts."""

    def to(self, device: torch.device) -> "RowLayout":
        """The same on a device."""

    def positions(self, t: int) -> Tensor:
        """Position of each token in its own text: [B, T]."""

    def earlier(self, t: int, back: int) -> Tensor:
        """Index of the token that precedes each by `back` in its own text, negative before the row: [B, T]."""

    def hidden(self, t: int) -> Tensor:
        """True where a token (dimension 1) must not attend to another (dimension 2): bool [B, T, T]."""


@dataclass(frozen=True)
class PackedRows:
    """Rows of several records, one after the other; padding continues the last one."""

    starts: Tensor
    """[B, T] index of the first token of each token's record."""

    def to(self, device: torch.device) -> "PackedRows":
        """See RowLayout."""
        return PackedRows(self.starts.to(device))

    def positions(self, t: int) -> Tensor:
        """See RowLayout."""
        return torch.arange(t, device=self.starts.device) - self.starts

    def earlier(self, t: int, back: int) -> Tensor:
        """See RowLayout."""
        at = torch.arange(t, device=self.starts.device)
        return at - back - (at - back < self.starts) * self.starts

    def hidden(self, t: int) -> Tensor:
        """See RowLayout."""
        at = torch.arange(t, device=self.starts.device)
        return (self.starts[:, :, None] != self.starts[:, None]) | (at[None, :] > at[:, None])


@dataclass(frozen=True)
class PairedRow:
    """Rows of a prompt and two answers to it, so that a pair computes its prompt once.

    The second answer follows the first, but attends to the prompt and itself only, and its positions start after the
    prompt as those of the first do.
    """

    prompt: Tensor
    """[B] tokens of each row's own prompt."""
    second: Tensor
    """[B] index of the second answer's first token."""

    def to(self, device: torch.device) -> "PairedRow":
        """See RowLayout."""
        return PairedRow(self.prompt.to(device), self.second.to(device))

    def positions(self, t: int) -> Tensor:
        """See RowLayout."""
        at = torch.arange(t, device=self.second.device)
        return at - (at >= self.second[:, None]) * (self.second - self.prompt)[:, None]

    def earlier(self, t: int, back: int) -> Tensor:
        """See RowLayout."""
        at = torch.arange(t, device=self.second.device)
        skips = (at >= self.second[:, None]) & (at - back < self.second[:, None])
        return at - back - skips * (self.second - self.prompt)[:, None]

    def hidden(self, t: int) -> Tensor:
        """See RowLayout."""
        at = torch.arange(t, device=self.second.device)
        first = (at >= self.prompt[:, None]) & (at < self.second[:, None])
        across = (at >= self.second[:, None])[:, :, None] & first[:, None, :]
        return across | (at[None, :] > at[:, None])
