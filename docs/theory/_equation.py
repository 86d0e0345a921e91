"""What the checks of these pages are made of: rows with two sides, and a register of checks by the page's numbers.

    @equation("3.4", "reward", "from the policy")
    def reward(ratio: float = 1.0, partition: float = 1.0) -> list[Row]: ...

The number is the one that the page gives the equation. Every parameter of a check is a sign of that equation: it is 1,
and stands where the page has a plus or a minus. The tests set each to -1 in turn and want the check to fail, so that a
check which cannot fail is found out.

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
"""How far two sides may lie apart, relative to the larger one where that is above 1."""


@dataclass(frozen=True)
class Row:
    """One case: both sides, and how they should stand to each other."""

    what: str
    left: float
    right: float
    relation: str = "="
    """Or "<" or ">"."""

    @property
    def holds(self) -> bool:
        """Whether they do."""
        if self.relation == "<":
            return self.left < self.right
        if self.relation == ">":
            return self.left > self.right
        return abs(self.left - self.right) <= TOLERANCE * max(1.0, abs(self.left), abs(self.right))


@dataclass(frozen=True)
class Equation:
    """A numbered equation's check, and what its two columns are called."""

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
BLOCKS: dict[str, Callable[[], str]] = {}
"""Name -> what else is filled into a page: figures that were measured, read from their dated file."""

Check = Callable[..., list[Row]]
Text = Callable[[], str]


def equation(number: str, left: str, right: str) -> Callable[[Check], Check]:
    """Register a check under its equation's number; `left` and `right` head the table's columns."""

    def register(check: Check) -> Check:
        assert number not in EQUATIONS, f"{number} has a check already"
        EQUATIONS[number] = Equation(check, left, right)
        return check

    return register


def block(name: str) -> Callable[[Text], Text]:
    """Register what belongs between `<!-- name -->` and `<!-- end -->`."""

    def register(text: Text) -> Text:
        assert name not in BLOCKS, f"{name} is there already"
        BLOCKS[name] = text
        return text

    return register


def shown(value: float) -> str:
    """A number for a reader: whole ones whole, the rest with six digits, rounding errors as the 0 they stand for."""
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
    """Where plain gradient descent ends: an optimum found without any formula for it."""
    theta = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(theta), theta)
        theta = (theta - rate * gradient).detach().requires_grad_()
    return theta.detach()
