"""Tasks for prompting: questions, demonstrations, how a question is asked, and how an answer is read.

    electricity, arithmetic     word problems with worked reasoning, `builtin_tasks/*.jsonl`
    rotten-tomatoes, imdb       questions are the test split's reviews, demonstrations the train split's
    FILE.toml, FILE.jsonl       your own

A task file holds the questions and any of these (the values are the defaults, but for pattern and labels):

    instruction = ""                        # first line of every prompt
    question = "Q: {question}"              # how a question is asked
    answer = "A:"                           # precedes an answer, in plain text
    conclusion = "The answer is {answer}."  # ends a worked answer
    trigger = "the answer is"               # asks for the answer after free reasoning ("Therefore, the answer is")
    answer_pattern = '-?\\d+'                # a regular expression for an answer: its group, if it has one
    labels = ["no", "yes"]                  # instead of a pattern: the possible answers
    [[demonstrations]]                      # question, answer and, for chain of thought, reasoning
    [[questions]]                           # question and answer

`demonstrations` and `questions` may instead name a jsonl file in the same folder. A jsonl file alone holds questions,
and demonstrations in the rows with `"demonstration": true`.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from decimal import Decimal, InvalidOperation
from functools import cached_property
from pathlib import Path
from typing import Any

from graftlm.config.paths import user_path
from graftlm.config.values import read_toml
from graftlm.errors import InputError, did_you_mean, unknown_name_error
from graftlm.files.readers import Record, read_records
from graftlm.text.collate import sort_by_hash
from graftlm.text.dataset import load_dataset, text_hash
from graftlm.text.records import Labelled
from graftlm.text.words import normalize, word_pattern

QUESTION, ANSWER = "{question}", "{answer}"
NUMBER = r"(?<![\d.])-?\d(?:[\d,]*\d)?(?:\.\d+)?"

BUILTIN_DIR = Path(__file__).parent / "builtin_tasks"
WORD_PROBLEMS = ("electricity", "arithmetic")
REVIEWS = {"rotten-tomatoes": "rotten-tomatoes-pypi", "imdb": "imdb-pypi"}


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its answer; `reasoning` leads from one to the other, where it is known."""

    question: str
    answer: str
    reasoning: str = ""
    source: str = ""
    """The file and line it came from, for errors."""

    @property
    def text(self) -> str:
        """The question, by which problems are compared."""
        return self.question


@dataclass(frozen=True)
class Task:
    """Questions, demonstrations, and the words around them. Raises InputError for what cannot be asked or read."""

    name: str
    questions: tuple[Problem, ...]
    demonstrations: tuple[Problem, ...] = ()
    """None of them has the text of a question."""
    instruction: str = ""
    question: str = "Q: {question}"
    answer: str = "A:"
    conclusion: str = "The answer is {answer}."
    trigger: str = "the answer is"
    answer_pattern: str = ""
    """Default: a number, or one of the labels."""
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, field in (("question", QUESTION), ("conclusion", ANSWER)):
            if getattr(self, key).count(field) != 1:
                raise InputError(f"{self.name}: {key} = {getattr(self, key)!r}: write {field} in it, once")
        if not self.questions:
            raise InputError(f"{self.name}: no questions: write [[questions]], each with question and answer")
        try:
            compiled = self.pattern
        except re.error as error:
            raise InputError(f"{self.name}: answer_pattern {self.answer_pattern!r}: {error}") from None
        for problem in (*self.questions, *self.demonstrations):
            if self.first(problem.answer) != normalize_answer(problem.answer):
                raise InputError(
                    f"{problem.source or self.name}: the answer {problem.answer!r} is not what its pattern finds in it "
                    f"({compiled.pattern}): mend the answer, answer_pattern or labels"
                )

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What an answer looks like, whatever its case."""
        labels = sorted((normalize(label.strip()) for label in self.labels), key=len, reverse=True)
        words = "|".join(word_pattern(label, whole=True) for label in labels)
        return re.compile(unicodedata.normalize("NFC", self.answer_pattern) or words or NUMBER, re.IGNORECASE)

    def first(self, text: str) -> str | None:
        """The first answer in a text, in its normal form; None where there is none."""
        return next(self._all(text), None)

    def parse_final_answer(self, text: str) -> str | None:
        """The answer behind the last conclusion ("The answer is"); without one the last answer there is."""
        text, before = unicodedata.normalize("NFC", text), self.conclusion.partition(ANSWER)[0].strip()
        before = re.escape(unicodedata.normalize("NFC", before))
        ends = [match.end() for match in re.finditer(before, text, re.IGNORECASE)] if before else []
        behind = self.first(text[ends[-1] :]) if ends else None
        if behind is not None:
            return behind
        every = list(self._all(text))
        return every[-1] if every else None

    def _all(self, text: str) -> Iterator[str]:
        text = unicodedata.normalize("NFC", text) if self.answer_pattern else normalize(text)
        for match in self.pattern.finditer(text):
            yield normalize_answer(next(filter(None, match.groups()), match[0]))


def normalize_answer(answer: str) -> str:
    """An answer as answers are compared: numbers by value ("1,600.0" is 1600), others without case and outer space."""
    text = normalize(answer.strip())
    try:
        number = Decimal(text.replace(",", "").removeprefix("$"))
        return f"{number.normalize():f}" if number.is_finite() else text
    except InvalidOperation:
        return text


def load_task(name: str, seed: int = 0) -> tuple[Task, list[str]]:
    """A task by name or file, and the notes of its data set.

    seed: 0 keeps the file order of electricity and arithmetic, where electricity begins with the course handout's
    problem; any other number shuffles their questions and demonstrations.

    Raises InputError for an unknown name, an unreadable file and whatever `Task` refuses.
    """
    if name in WORD_PROBLEMS:
        task = _from_jsonl(BUILTIN_DIR / f"{name}.jsonl")
        return replace(
            task,
            name=name,
            questions=_shuffled(task.questions, seed),
            demonstrations=_shuffled(task.demonstrations, seed),
            trigger="the answer (arabic numerals) is",
        ), []
    if name in REVIEWS:
        return _reviews(name)
    path = user_path(name, "--task ")
    if (read := TASK_READERS.get(path.suffix.lower())) is not None:
        if not path.is_file():
            raise InputError(f"--task {name}: no such file")
        return read(path), []
    raise InputError(
        f"{unknown_name_error('task', name, (*WORD_PROBLEMS, *REVIEWS))}; or give a {' or '.join(TASK_READERS)} file"
    )


def _shuffled(problems: tuple[Problem, ...], seed: int) -> tuple[Problem, ...]:
    return tuple(sorted(problems, key=lambda p: text_hash(f"{seed}\n{p.question}"))) if seed else problems


def _reviews(name: str) -> tuple[Task, list[str]]:
    """Questions: the test split, in an order blind to its labels. Demonstrations: worked reviews, the train split."""
    labels = ("negative", "positive")
    dataset = load_dataset(REVIEWS[name], labels=labels)

    def problems(split: str) -> list[Problem]:
        rows = sort_by_hash(dataset.splits[split])
        return [Problem(row.text, labels[row.label], source=row.source) for row in rows if isinstance(row, Labelled)]

    worked = [_problem(*record) for record in read_records(BUILTIN_DIR / "reviews.jsonl")]
    questions = problems("test")
    asked = {problem.question for problem in questions}
    task = Task(
        name,
        tuple(questions),
        tuple(problem for problem in (*worked, *problems("train")) if problem.question not in asked),
        instruction="Decide whether the sentiment of a movie review is negative or positive.",
        question="Review: {question}",
        answer="Sentiment:",
        trigger="the sentiment (negative or positive) is",
        conclusion="The sentiment is {answer}.",
        labels=labels,
    )
    return task, dataset.notes


# Files ----------------------------------------------------------------------------------------------------------------


def _from_jsonl(path: Path) -> Task:
    rows = list(read_records(path))
    demonstrations = [row for row in rows if row[1].get("demonstration") is True]
    questions = [row for row in rows if row[1].get("demonstration") is not True]
    return _task(str(path), questions, demonstrations, {})


def _from_toml(path: Path) -> Task:
    table = read_toml(path)
    texts = {f.name for f in fields(Task)} - {"name", "questions", "demonstrations", "labels"}
    known = [*texts, "questions", "demonstrations", "labels"]
    for key, value in table.items():
        if key not in known:
            raise InputError(
                f"{path}: unknown key {key!r}: {did_you_mean(key, known)}known are {', '.join(sorted(known))}"
            )
        if key in texts and not isinstance(value, str):
            raise InputError(f"{path}: {key} = {value!r}: not a text in quotes")
    labels = table.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) and label.strip() for label in labels):
        raise InputError(f"{path}: labels: not a list of texts in quotes")
    settings = {key: table[key] for key in texts & set(table)} | {"labels": tuple(labels)}
    questions, demonstrations = (_records(path, key, table.get(key, [])) for key in ("questions", "demonstrations"))
    return _task(str(path), questions, demonstrations, settings)


def _records(path: Path, key: str, value: object) -> list[Record]:
    """The [[questions]] of the table, or the records of the file that `value` names."""
    if isinstance(value, str):
        file = path.parent / user_path(value)
        if not file.is_file():
            raise InputError(f"{path}: {key} = {value!r}: no such file beside it")
        return list(read_records(file))
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InputError(f"{path}: {key}: write [[{key}]] tables, or the name of a jsonl file")
    return [(f"{path}: {key} {number}", item) for number, item in enumerate(value, 1)]


def _task(name: str, questions: list[Record], demonstrations: list[Record], settings: Mapping[str, Any]) -> Task:
    task = Task(
        name,
        tuple(_problem(source, record) for source, record in questions),
        tuple(_problem(source, record) for source, record in demonstrations),
        **settings,
    )
    asked = {problem.question for problem in task.questions}
    for problem in task.demonstrations:
        if problem.question in asked:
            raise InputError(f"{problem.source}: this demonstration is also one of the questions: leave one out")
    return task


def _problem(source: str, record: Mapping[str, Any]) -> Problem:
    def text(key: str) -> str:
        value = record.get(key, "")
        value = str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{source}: no {key}: every one needs question and answer, as texts")
        return value.strip()

    reasoning = text("reasoning") if str(record.get("reasoning", "")).strip() else ""
    return Problem(text("question"), text("answer"), reasoning, source)


TASK_READERS: dict[str, Callable[[Path], Task]] = {".toml": _from_toml, ".jsonl": _from_jsonl}
"""Suffix -> reader."""
