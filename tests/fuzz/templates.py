"""Templates as text and as files, with their label words; chat templates of a model's folder; task files."""

import json
from collections.abc import Sequence
from pathlib import Path

from hypothesis import strategies as st

from fuzz.base import ANY, Target, changed_json
from graftlm.text.tasks import load_task
from graftlm.text.template import load_template

TEMPLATES = [
    b"Tweet: {text}\nMood:\0sad,happy",
    b"{text}\0negative,positive,neutral",
    "½ {text} é\r\n\0nein,ja".encode(),
]
TASK = """
instruction = "Solve it."
question = "Q: {question}"
conclusion = "The answer is {answer}."
answer_pattern = '-?\\d+'
[[demonstrations]]
question = "1 + 1?"
answer = "2"
reasoning = "One and one."
[[questions]]
question = "2 + 2?"
answer = 4
[[questions]]
question = "2 + 3?"
answer = "5"
"""
LABELS = 'labels = ["no", "yes"]\n[[questions]]\nquestion = "Is it?"\nanswer = "yes"\n'
ROWS = [
    {"question": "2 + 2?", "answer": "4"},
    {"question": "1 + 1?", "answer": 2, "reasoning": "so", "demonstration": True},
]


def read_template(folder: Path, content: bytes) -> object:
    text, _, labels = content.decode("utf-8", errors="surrogateescape").partition("\0")
    (folder / "template.txt").write_bytes(content.partition(b"\0")[0])
    found = load_template(text, labels) if len(content) % 2 else load_template("template.txt", labels)
    return [found.prompt("a film"), *(found.completion(n) for n in range(len(found.labels)))]


def made_template(valid: Sequence[bytes]) -> "st.SearchStrategy[bytes]":
    part = st.one_of(st.just("{text}"), st.text(max_size=8), st.sampled_from(["{", "}", "{labels}", "\r\n", "\ufeff"]))
    words = st.lists(st.text(max_size=6), max_size=4).map(",".join)
    return st.tuples(st.lists(part, max_size=4).map("".join), words).map(
        lambda p: "\0".join(p).encode("utf-8", "replace")
    )


def reader(name: str):
    def read(folder: Path, content: bytes) -> object:
        (folder / name).write_bytes(content)
        task, _ = load_task(name)
        return [task.parse_final_answer("The answer is 4 and 5"), task.first("yes")]

    return read


def jsonl(rows: Sequence[object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def made_rows(valid: Sequence[bytes]) -> "st.SearchStrategy[bytes]":
    row = st.one_of(changed_json(ROWS[0]), changed_json(ROWS[1]), ANY)
    return st.lists(row, max_size=4).map(lambda rows: jsonl([*rows, ROWS[0]]))


TARGETS = [
    Target("templates", lambda _: TEMPLATES, read_template, made_template),
    Target("tasks (toml)", lambda _: [TASK.encode(), LABELS.encode()], reader("task.toml")),
    Target(
        "tasks (jsonl)",
        lambda _: ["".join(json.dumps(r) + "\n" for r in ROWS).encode()],
        reader("task.jsonl"),
        made_rows,
    ),
]
