"""Check that prose, names and commit subjects use the field's words; `make check` runs it.

    python tools/words.py             # fail where a word of tools/words.toml occurs more often than it allows
    python tools/words.py --list      # every occurrence, as file:line
    python tools/words.py --update    # write the present counts into tools/words.toml

Each row of words.toml allows a number of occurrences. Whoever removes old words lowers it; it is never raised.
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"""^(['"]?)(?P<word>.+)\1 = \["(?P<use>.*)", (?P<allowed>\d+)\]$""")
NO_VERBS = (
    "a an the this that these those it its what who where when why how which no not some every each in on of with"
)
DEFINED = dict.fromkeys((ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef), "name")
DEFINED |= {ast.arg: "arg", ast.Name: "id", ast.Attribute: "attr"}


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """(first line, text) of what a person reads: pages whole; of Python the comments, docstrings and messages."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield 1, source
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value
    start, lines = 0, list[str]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != start + len(lines):
                yield start, "\n".join(lines)
                start, lines = token.start[0], []
            lines.append(token.string.lstrip("# "))
    yield start, "\n".join(lines)


def names(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of each class, function, parameter, variable, field and attribute that a module defines."""
    nodes: Iterator[Any] = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    for node in nodes:
        if (field := DEFINED.get(type(node))) and isinstance(getattr(node, "ctx", ast.Store()), ast.Store):
            yield node.lineno, getattr(node, field)


def found(root: Path, table: dict[str, Any]) -> dict[str, list[str]]:
    """word -> its occurrences, as file:line."""
    places: dict[str, list[str]] = {word: [] for word in [*table["prose"], *table["names"]]}
    for path in sorted({path for pattern in table["files"] for path in root.glob(pattern) if path.is_file()}):
        shown = path.relative_to(root)
        for line, text in prose(path):
            text = re.sub(r"[ \t]*\n[ \t]*", "\n", text)  # a phrase may be wrapped
            for word in table["prose"]:
                for match in re.finditer(word.replace(" ", r"\s"), text, re.IGNORECASE):
                    places[word].append(f"{shown}:{line + text.count(chr(10), 0, match.start())}")
        for line, name in names(path) if path.suffix == ".py" else ():
            for word in table["names"]:
                if re.fullmatch(word, name):
                    places[word].append(f"{shown}:{line}")
    return places


def fault(subject: str) -> str | None:
    """What is wrong with a commit's subject; None if nothing is."""
    first = subject.partition(" ")[0]
    if len(subject) > 72:
        return f"{len(subject)} characters, more than 72"
    if not first[:1].isupper() or subject.endswith("."):
        return "begin with a capital letter and end without a full stop"
    if first.lower() in NO_VERBS.split() or re.search(r"(?<![eb])ed$|(?<!br)ing$|(?<![su])s$", first):
        return "begin with a verb in the imperative: Add, Fix, Replace"
    return None


def subjects(root: Path, since: str) -> list[str]:
    """The commits' subjects after `since`; none where git or that commit is missing."""
    words = ["git", "-C", str(root), "log", "--no-merges", "--format=%s", f"{since}..HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.splitlines()


def main() -> int:
    """Check; 1 where something is over its number."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--update", action="store_true")
    given = parser.parse_args()
    data = given.root / "tools" / "words.toml"
    text = data.read_text(encoding="utf-8")
    table = tomllib.loads(text)
    places = found(given.root, table)
    bad = [f"commit {each!r}: {why}" for each in subjects(given.root, table["since"]) if (why := fault(each))]
    for word, (use, allowed) in (table["prose"] | table["names"]).items():
        over = len(places[word]) > allowed and not given.update
        if given.list or over:
            print("".join(f"{place}: {word} -> {use}\n" for place in places[word]), end="")
        if over:
            bad.append(f"{word}: {len(places[word])} times, {allowed} allowed")
    if given.update:
        rows = [(line, ROW.match(line)) for line in text.splitlines()]
        lines = [f'{line[: row.end("use")]}", {len(places[row["word"]])}]' if row else line for line, row in rows]
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(*bad, sep="\n", end="\n" if bad else "", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
