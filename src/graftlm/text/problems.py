"""Arithmetic word problems without end, by a seed: question, worked reasoning and an answer known by construction.

The numbers are drawn first and the question is made from them, so no answer is ever computed from a text. All answers
are whole and greater than 0. One kind is the course handout's:

    the price x of a unit rises by d; a units were used at the old price and b at the new, T cents in all:
    a x + b (x + d) = T        150 x + 100 (x + 5) = 4500, x = 16

What is unusual here: problem n of a stream is a pure function of (stream, seed, n), and only Python's `random()` is
drawn from, which is promised to stay the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

Thing = TypeVar("Thing")


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its answer; `reasoning` leads from one to the other, where it is known."""

    question: str
    answer: str
    reasoning: str = ""
    where: str = ""
    """The file and line it came from, for errors."""

    @property
    def text(self) -> str:
        """The question, by which problems are told apart."""
        return self.question


class Dice:
    """Draws from a seeded stream."""

    def __init__(self, seed: str) -> None:
        self._random = Random(seed).random

    def number(self, low: int, high: int, step: int = 1) -> int:
        """One of low, low + step, …, high."""
        return low + step * int(self._random() * ((high - low) // step + 1))

    def one_of(self, things: Sequence[Thing]) -> Thing:
        """One of these."""
        return things[self.number(0, len(things) - 1)]


Kind = Callable[[Dice], Problem]


# The electricity problem and its kin ----------------------------------------------------------------------------------

# what is paid for, its unit, and who used it
STORIES = (
    ("electricity", "kilowatt-hour", "A household used"),
    ("water", "cubic metre", "A nursery used"),
    ("petrol", "litre", "A courier bought"),
    ("printing", "page", "A student printed"),
    ("calls abroad", "minute", "A traveller phoned for"),
    ("rope", "metre", "A climbing club bought"),
    ("flour", "kilogram", "A bakery bought"),
    ("parking", "quarter-hour", "A plumber parked for"),
    ("heating gas", "cubic foot", "A workshop used"),
    ("honey", "jar", "A hotel ordered"),
)


def rate_problem(story: int, before: int, after: int, change: int, price: int) -> Problem:
    """`before` units at `price` cents and `after` units at `price + change` cents; asked for is `price`."""
    what, unit, who = STORIES[story]
    total = before * price + after * (price + change)
    moves, sign = ("rises", "+") if change > 0 else ("falls", "-")
    step, extra = abs(change), after * abs(change)
    units = unit.replace("foot", "feet") if unit.endswith("foot") else f"{unit}s"
    question = (
        f"The price of {what} {moves} by {step} cents per {unit}. {who} {before} {units} at the old price and {after} "
        f"{units} at the new price, and paid {_dollars(total)} for all of it. What was the old price, in cents per "
        f"{unit}?"
    )
    both, rest = before + after, total - after * change
    reasoning = (
        f"Let x be the old price in cents. {before} {units} at the old price cost {before}x cents. {after} {units} at "
        f"the new price cost {after}(x {sign} {step}) = {after}x {sign} {extra} cents. {_dollars(total)} is {total} "
        f"cents, so {both}x {sign} {extra} = {total}. Then {both}x = {rest}, and x = {price}."
    )
    return Problem(question, str(price), reasoning)


def _dollars(cents: int) -> str:
    return f"${cents // 100}" + (f".{cents % 100:02d}" if cents % 100 else "")


ELECTRICITY = rate_problem(0, before=150, after=100, change=5, price=16)
"""The course handout's problem: 150x + 100(x + 5) = 4500 cents, x = 16."""


def _rate(dice: Dice) -> Problem:
    change = dice.number(2, 9) * dice.one_of((1, 1, -1))
    return rate_problem(
        dice.number(0, len(STORIES) - 1),
        before=dice.number(20, 200, 10),
        after=dice.number(20, 200, 10),
        change=change,
        price=dice.number(10, 60),
    )


# Other kinds ----------------------------------------------------------------------------------------------------------

NAMES = ("Ada", "Ben", "Clara", "Dan", "Ella", "Femi", "Grace", "Hugo", "Iris", "Jan", "Kofi", "Lena", "Mei", "Noor")
THINGS = ("marbles", "stamps", "shells", "stickers", "books", "coins", "photos", "buttons", "pencils", "postcards")


def _change(dice: Dice) -> Problem:
    name, things = dice.one_of(NAMES), dice.one_of(THINGS)
    had, got = dice.number(20, 90), dice.number(5, 60)
    gave = dice.number(3, had)
    answer = had + got - gave
    return Problem(
        f"{name} has {had} {things}, gets {got} more and gives {gave} away. How many {things} does {name} have then?",
        str(answer),
        f"{name} has {had} {things} and gets {got} more: {had} + {got} = {had + got}. {gave} are given away: "
        f"{had + got} - {gave} = {answer}.",
    )


def _boxes(dice: Dice) -> Problem:
    things = dice.one_of(THINGS)
    each, boxes = dice.number(6, 24), dice.number(3, 15)
    used = dice.number(2, each * boxes - 1)
    answer = each * boxes - used
    return Problem(
        f"A school buys {boxes} boxes of {things}. A box holds {each}. By summer {used} of them are used up. How many "
        f"{things} are left?",
        str(answer),
        f"{boxes} boxes of {each} are {boxes} * {each} = {each * boxes} {things}. {used} are used up: "
        f"{each * boxes} - {used} = {answer}.",
    )


def _shares(dice: Dice) -> Problem:
    name, things = dice.one_of(NAMES), dice.one_of(THINGS)
    people, each, own = dice.number(3, 9), dice.number(4, 30), dice.number(2, 40)
    whole = people * each
    return Problem(
        f"{people} friends share {whole} {things} equally. One of them is {name}, who had {own} {things} before. How "
        f"many {things} does {name} have now?",
        str(each + own),
        f"Each friend gets {whole} / {people} = {each} {things}. {name} had {own} before: {own} + {each} = "
        f"{each + own}.",
    )


def _shop(dice: Dice) -> Problem:
    name = dice.one_of(NAMES)
    first, second = dice.number(2, 9), dice.number(2, 9)
    dear, cheap = dice.number(6, 20), dice.number(1, 5)
    a, b = first * dear, second * cheap
    return Problem(
        f"A cup costs {dear} dollars and a spoon {cheap} dollars. {name} buys {first} cups and {second} spoons. How "
        "many dollars is that?",
        str(a + b),
        f"{first} cups cost {first} * {dear} = {a} dollars. {second} spoons cost {second} * {cheap} = {b} dollars. "
        f"Together that is {a} + {b} = {a + b} dollars.",
    )


def _journey(dice: Dice) -> Problem:
    slow, fast = dice.number(40, 80, 5), dice.number(90, 160, 5)
    first, second = dice.number(2, 6), dice.number(2, 6)
    a, b = first * slow, second * fast
    return Problem(
        f"A train runs for {first} hours at {slow} kilometres an hour and then for {second} hours at {fast} kilometres "
        "an hour. How many kilometres does it cover?",
        str(a + b),
        f"The first part is {first} * {slow} = {a} kilometres. The second part is {second} * {fast} = {b} kilometres. "
        f"Together that is {a} + {b} = {a + b} kilometres.",
    )


def _ages(dice: Dice) -> Problem:
    start = dice.number(0, len(NAMES) - 1)
    older, younger = NAMES[start], NAMES[(start + dice.number(1, len(NAMES) - 1)) % len(NAMES)]
    age, more = dice.number(4, 40), dice.number(2, 20)
    total = 2 * age + more
    return Problem(
        f"{older} is {more} years older than {younger}. Together they are {total} years old. How old is {younger}?",
        str(age),
        f"Let x be the age of {younger}. {older} is x + {more}, so 2x + {more} = {total}. Then 2x = {total - more}, "
        f"and x = {age}.",
    )


KINDS: dict[str, tuple[Kind, ...]] = {
    "electricity": (_rate,),
    "arithmetic": (_change, _boxes, _shares, _shop, _journey, _ages, _rate),
}


def problems(task: str, stream: str, seed: int, count: int) -> list[Problem]:
    """`count` different problems; those of `arithmetic` go through its kinds in turn.

    stream: what they are for ("questions", "demonstrations"); the streams of one seed have nothing to do with each
    other, and a question that stands in both must be left out by who uses both.
    """
    kinds, found, tries = KINDS[task], dict[str, Problem](), 0
    while len(found) < count:
        problem = kinds[len(found) % len(kinds)](Dice(f"{task} {stream} {seed} {tries}"))
        found.setdefault(problem.question, problem)
        tries += 1
    return list(found.values())
