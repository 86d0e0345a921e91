"""The word problems of the built-in tasks: answers and reasoning are checked by arithmetic of the tests' own."""

import re

import pytest

from graftlm.text.tasks import WORD_PROBLEMS, Problem, load_task


def problems(task: str) -> tuple[Problem, ...]:
    loaded, _ = load_task(task)
    return (*loaded.questions, *loaded.demonstrations)


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


def test_the_electricity_task_begins_with_the_handouts_problem() -> None:
    first = problems("electricity")[0]
    assert numbers(first.question) == [5, 150, 100, 45] and first.answer == "16"
    assert 150 * 16 + 100 * (16 + 5) == 4500


@pytest.mark.parametrize("task", WORD_PROBLEMS)
def test_answers_are_right_whole_and_greater_than_zero(task: str) -> None:
    for problem in problems(task):
        assert float(problem.answer) == pytest.approx(solved(problem.question), abs=1e-9), problem
        assert problem.answer.isdecimal() and int(problem.answer) > 0


@pytest.mark.parametrize("task", WORD_PROBLEMS)
def test_the_reasoning_of_every_demonstration_holds_and_ends_with_the_answer(task: str) -> None:
    """Equations of plain numbers by evaluating both sides; those in x at x = the answer."""
    checked, demonstrations = 0, load_task(task)[0].demonstrations
    for problem in demonstrations:
        assert re.search(rf"(= |x = ){problem.answer}( \w+)?\.$", problem.reasoning), problem
        text = re.sub(r"(?<=\d)x", f" * {problem.answer}", problem.reasoning)
        text = re.sub(r"(?<=\d)\(x", f" * ({problem.answer}", text)
        for sides in re.findall(r"[\d()*+/ -]*\d[\d()*+/ -]*(?:= [\d()*+/ -]*\d[\d()*+/ -]*)+", text):
            first, *rest = (eval(side) for side in sides.split("=") if side.strip())
            assert all(side == first for side in rest), (problem, sides)
            checked += bool(rest)
    assert checked >= len(demonstrations) >= 490


@pytest.mark.parametrize("task", WORD_PROBLEMS)
def test_there_are_500_questions_and_no_problem_occurs_twice(task: str) -> None:
    texts = [problem.question for problem in problems(task)]
    assert len(load_task(task)[0].questions) == 500 and len(set(texts)) == len(texts)


def test_arithmetic_takes_its_seven_kinds_in_turn() -> None:
    kinds = ("gives", "boxes of", "share", "spoons", "train", "years older", "at the old price")
    for number, problem in enumerate(load_task("arithmetic")[0].questions[:70]):
        assert kinds[number % 7] in problem.question
