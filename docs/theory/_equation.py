"""Rows with two sides, and a registry of checks by equation number.

    @equation("3.4", "reward", "from the policy")
    def reward(ratio: float = 1.0, partition: float = 1.0) -> list[Row]: ...

The number is the equation's number on the page. Every parameter of a check is a sign of that equation, 1 by
default. The tests set each to -1 in turn and require the check to fail.

All cases are small and exact: answers that can be enumerated, float64, and numbers from Python's own generator, whose
sequence is the same on every machine.
"""

import inspect
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-9
"""Largest difference of two sides, relative to the larger one if that is above 1."""


@dataclass(frozen=True)
class Row:
    """One case: both sides and their expected relation."""

    what: str
    left: float
    right: float
    relation: str = "="
    """Or "<" or ">"."""

    @property
    def holds(self) -> bool:
        """Whether the relation holds."""
        if self.relation == "<":
            return self.left < self.right
        if self.relation == ">":
            return self.left > self.right
        return abs(self.left - self.right) <= TOLERANCE * max(1.0, abs(self.left), abs(self.right))


@dataclass(frozen=True)
class Equation:
    """A numbered equation's check and the names of its two columns."""

    check: Callable[..., list[Row]]
    left: str
    right: str

    @property
    def signs(self) -> list[str]:
        """The names of the signs that can be flipped."""
        return list(inspect.signature(self.check).parameters)

    def table(self) -> str:
        """The rows as Markdown."""
        lines = [f"| | {self.left} | | {self.right} |", "| --- | ---: | :---: | ---: |"]
        for row in self.check():
            lines.append(f"| {row.what} | {shown(row.left)} | {row.relation} | {shown(row.right)} |")
        return "\n".join(lines)


EQUATIONS: dict[str, Equation] = {}
"""Number -> its check."""

Check = Callable[..., list[Row]]


def equation(number: str, left: str, right: str) -> Callable[[Check], Check]:
    """Register a check under its equation's number; `left` and `right` head the table's columns."""

    def register(check: Check) -> Check:
        assert number not in EQUATIONS, f"{number} has a check already"
        EQUATIONS[number] = Equation(check, left, right)
        return check

    return register


def shown(value: float) -> str:
    """A number for a reader: whole ones whole, the rest with six digits, rounding errors as 0."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == round(value):
        return f"{value:,.0f}"
    return "0" if abs(value) < 1e-11 else f"{value:.6g}"


def drawn(rng: random.Random, *shape: int) -> Tensor:
    """Numbers between -1 and 1, float64."""
    count = torch.Size(shape).numel()
    return torch.tensor([rng.uniform(-1, 1) for _ in range(count)], dtype=torch.float64).view(shape)


def worst(left: Tensor, right: Tensor) -> float:
    """The largest difference between two tensors' elements."""
    return (left - right).abs().max().item()


def descend(loss: Callable[[Tensor], Tensor], start: Sequence[float], rate: float, steps: int) -> Tensor:
    """The end point of plain gradient descent."""
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(theta), theta)
        theta = (theta - rate * gradient).detach().requires_grad_()
    return theta.detach()
