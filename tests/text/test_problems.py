"""The generator's answers are right, checked by an arithmetic of its own from the numbers in the question."""

import re
from collections import Counter

import pytest

from graftlm.text.problems import ELECTRICITY, KINDS, STORIES, problems

MANY = 400


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]


def solved(question: str) -> float:
    """The answer from the question's numbers, by the question's words."""
    n = numbers(question)
    if "at the old price" in question:
        change, before, after, dollars = n
        change *= 1 if "rises" in question else -1
        return (100 * dollars - after * change) / (before + after)
    if "gives" in question:
        return n[0] + n[1] - n[2]
    if "boxes of" in question:
        return n[0] * n[1] - n[2]
    if "share" in question:
        return n[1] / n[0] + n[2]
    if "spoons" in question:
        return n[0] * n[2] + n[1] * n[3]
    if "train" in question:
        return n[0] * n[1] + n[2] * n[3]
    assert "years older" in question
    return (n[1] - n[0]) / 2


def test_the_electricity_problem_is_the_handouts() -> None:
    assert numbers(ELECTRICITY.question) == [5, 150, 100, 45] and ELECTRICITY.answer == "16"
    assert 150 * 16 + 100 * (16 + 5) == 4500
    assert "250x + 500 = 4500" in ELECTRICITY.reasoning


@pytest.mark.parametrize("task", KINDS)
def test_answers_are_right_whole_and_greater_than_nothing(task: str) -> None:
    for problem in problems(task, "questions", 3, MANY):
        assert float(problem.answer) == pytest.approx(solved(problem.question), abs=1e-9), problem
        assert problem.answer.isdecimal() and int(problem.answer) > 0
        assert re.search(rf"(= |x = ){problem.answer}( \w+)?\.$", problem.reasoning), problem


@pytest.mark.parametrize("task", KINDS)
def test_every_equation_in_the_reasoning_holds(task: str) -> None:
    """The equations of plain numbers by evaluating both sides; those in x at x = the answer."""
    checked = 0
    for problem in problems(task, "questions", 5, MANY):
        text = re.sub(r"(?<=\d)x", f" * {problem.answer}", problem.reasoning)
        text = re.sub(r"(?<=\d)\(x", f" * ({problem.answer}", text)
        for sides in re.findall(r"[\d()*+/ -]*\d[\d()*+/ -]*(?:= [\d()*+/ -]*\d[\d()*+/ -]*)+", text):
            first, *rest = (eval(side) for side in sides.split("=") if side.strip())
            assert all(side == first for side in rest), (problem, sides)
            checked += bool(rest)
    assert checked >= MANY


def test_problems_differ_and_are_decided_by_stream_seed_and_number() -> None:
    first = problems("electricity", "questions", 0, MANY)
    assert len({problem.question for problem in first}) == MANY
    assert problems("electricity", "questions", 0, 10) == first[:10]
    assert not {p.question for p in first} & {p.question for p in problems("electricity", "questions", 1, 50)}
    assert problems("electricity", "demonstrations", 0, 10) != first[:10]
    assert {story for story in STORIES if any(story[0] in p.question for p in first)} == set(STORIES)


def test_arithmetic_goes_through_all_its_kinds_the_electricity_problems_among_them() -> None:
    kinds = Counter(" ".join(re.findall("[a-z]{6,}", p.question)[-2:]) for p in problems("arithmetic", "q", 0, 70))
    assert len(kinds) >= len(KINDS["arithmetic"])
    assert sum("at the old price" in p.question for p in problems("arithmetic", "q", 0, 70)) == 10
