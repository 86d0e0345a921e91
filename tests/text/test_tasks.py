"""Task files are read as documented, answers are found as stated, and every mistake is one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from graftlm.errors import InputError
from graftlm.text.tasks import Problem, Task, load_task, normalize_answer

TOML = """
instruction = "Add."
question = "Sum: {question}"
answer = "="
conclusion = "So it is {answer}."
trigger = "the sum is"
answer_pattern = 'is (\\d+)|^(\\d+)$'

[[demonstrations]]
question = "1 + 1"
reasoning = "One and one."
answer = 2
[[questions]]
question = "2 + 2"
answer = "4"
"""


def task(**changes: Any) -> Task:
    return Task(**{"name": "t", "questions": (Problem("so?", "4"),), **changes})


def refused(path: Path, content: str) -> str:
    path.write_text(content)
    with pytest.raises(InputError) as caught:
        load_task(str(path))
    line = str(caught.value)
    assert "\n" not in line
    return line.replace(str(path.parent), "DIR")


# Answers in any script


def test_labels_are_found_in_scripts_without_spaces_and_in_both_normal_forms() -> None:
    found = task(labels=("正面", "负面", "caf\u00e9"), questions=(Problem("?", "正面"),))
    assert found.first("我认为是负面的") == "负面"
    assert found.first("un cafe\u0301.") == "caf\u00e9" and found.first("cafe\u0301s") is None
    asked = task(conclusion="La r\u00e9ponse est {answer}.")
    assert asked.parse_final_answer("3. La re\u0301ponse est 4, pas 5.") == "4"


# Reading files


def test_a_toml_file_sets_every_word(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text(TOML)
    found, notes = load_task(str(tmp_path / "t.toml"))
    assert (found.instruction, found.question, found.answer, found.trigger) == (
        "Add.",
        "Sum: {question}",
        "=",
        "the sum is",
    )
    assert found.first("1 and 2, so it is 3") == "3" and found.first("1 and 2") is None
    assert found.demonstrations[0].answer == "2" and found.demonstrations[0].reasoning == "One and one."
    assert [problem.question for problem in found.questions] == ["2 + 2"] and notes == []


def test_lists_may_stand_in_files_beside_it(tmp_path: Path) -> None:
    rows = [{"question": f"{n} + 1", "answer": n + 1} for n in range(3)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.toml").write_text('questions = "q.jsonl"\n')
    assert [problem.answer for problem in load_task(str(tmp_path / "t.toml"))[0].questions] == ["1", "2", "3"]


def test_a_jsonl_file_alone_is_a_task(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"question": "a", "answer": "1", "demonstration": True, "reasoning": "So."}]
    rows += [{"question": "b", "answer": "2"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, _ = load_task(str(tmp_path / "t.jsonl"))
    assert [p.question for p in found.questions] == ["b"] and [p.reasoning for p in found.demonstrations] == ["So."]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("question = [", "DIR/t.toml: not a TOML file: "),
        (
            "questoin = 'x'",
            "DIR/t.toml: unknown key 'questoin': did you mean 'question'? known are answer, ans",
        ),
        ("trigger = 3", "DIR/t.toml: trigger = 3: not a text in quotes"),
        ("labels = 'yes'", "DIR/t.toml: labels: not a list of texts in quotes"),
        ("", "DIR/t.toml: no questions: write [[questions]], each with question and answer"),
        ("questions = 'no.jsonl'", "DIR/t.toml: questions = 'no.jsonl': no such file beside it"),
        ("questions = 3", "DIR/t.toml: questions: write [[questions]] tables, or the name of a jsonl file"),
        ("[[questions]]\nquestion = 'x'", "DIR/t.toml: questions 1: no answer: every one needs question and answer"),
        (
            "[[questions]]\nquestion = 'x'\nanswer = 'many'",
            "DIR/t.toml: questions 1: the answer 'many' is not what ",
        ),
        (TOML.replace("{question}", "?"), "DIR/t.toml: question = 'Sum: ?': write {question} in it, once"),
        (TOML.replace("{answer}", "?"), "DIR/t.toml: conclusion = 'So it is ?.': write {answer} in it, once"),
        (TOML.replace("is (\\d+)|^(\\d+)$", "(\\d"), "DIR/t.toml: answer_pattern '(\\\\d': missing ), unterminated"),
        (
            TOML.replace("1 + 1", "2 + 2"),
            "DIR/t.toml: demonstrations 1: this demonstration is also one of the que",
        ),
    ],
)
def test_a_task_file_with_a_fault(content: str, line: str, tmp_path: Path) -> None:
    assert refused(tmp_path / "t.toml", content).startswith(line)


def test_a_task_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"unknown task 'electrcity': did you mean 'electricity'"):
        load_task("electrcity")
    with pytest.raises(InputError, match=r"--task no\.toml: no such file"):
        load_task("no.toml")


# Built in


@pytest.mark.parametrize("name", ["electricity", "arithmetic"])
def test_a_task_seed_orders_the_same_problems_differently(name: str) -> None:
    first, again, other = (load_task(name, seed)[0] for seed in (0, 0, 1))
    assert first == again and first.name == name
    for key in ("questions", "demonstrations"):
        one, two = getattr(first, key), getattr(other, key)
        assert one[:8] != two[:8] and sorted(p.question for p in one) == sorted(p.question for p in two)
    assert load_task(name, 1)[0] == other != load_task(name, 2)[0]


def test_reviews_are_asked_from_the_test_split_and_shown_from_the_train_split() -> None:
    found, notes = load_task("rotten-tomatoes")
    assert len(found.questions) == 1066 and "derived" in notes[0]
    worked = [demo for demo in found.demonstrations if demo.reasoning]
    assert len(worked) == 8 and found.demonstrations[:8] == tuple(worked)
    assert sorted(demo.answer for demo in worked) == ["negative"] * 4 + ["positive"] * 4
    assert not {p.question for p in found.questions} & {p.question for p in found.demonstrations}


# Answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("16", "16"),
        (" $1,600.50 in all", "1600.5"),
        ("x = -3.", "-3"),
        ("16.0 cents", "16"),
        ("20-4", "20"),
        ("none", None),
    ],
)
def test_the_first_number_is_found(text: str, answer: str | None) -> None:
    assert task().first(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 = 4. The answer is 5.", "5"),
        ("The answer is 5. No: the answer is 6, of 7.", "6"),
        ("First 3, then 4", "4"),
        ("The answer is unknown, 9 or 8", "9"),
        ("nothing", None),
    ],
)
def test_the_conclusion_counts_else_the_last_answer(text: str, answer: str | None) -> None:
    assert task().parse_final_answer(text) == answer


def test_labels_are_found_as_whole_words() -> None:
    labelled = task(questions=(Problem("x", "not bad"),), labels=("bad", "not bad"))
    assert labelled.first("It is NOT BAD at all") == "not bad"
    assert labelled.first("badly") is None
    assert labelled.parse_final_answer("bad, but the answer is: not bad.") == "not bad"


@pytest.mark.parametrize(("one", "other"), [("1,600", "1600.0"), ("$5", "5"), (" Yes", "yes"), ("100", "1e2")])
def test_equal_answers_have_one_form(one: str, other: str) -> None:
    assert normalize_answer(one) == normalize_answer(other)
