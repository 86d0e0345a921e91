"""The check of words: an old word fails it, in prose and in names; commit subjects are imperative and short."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tools" / "words.py"


def check(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(SCRIPT), "--root", str(root), *words]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project without an old word, and with no occurrence allowed."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "src").mkdir()
    shutil.copy(ROOT / "tools" / "words.toml", tmp_path / "tools")
    (tmp_path / "src" / "module.py").write_text('"""A module."""\n\nlimit = 1  # a limit\n')
    assert check(tmp_path, "--update").returncode == 0
    return tmp_path


@pytest.mark.parametrize(
    ("file", "text", "place"),
    [
        ("src/module.py", '"""The rows behind the prompt."""\n', "src/module.py:1"),
        ("src/module.py", "x = 1\n# it goes\n# on here\n", "src/module.py:2"),
        ("src/module.py", 'def f() -> str:\n    return f"{1} goes on"\n', "src/module.py:2"),
        ("src/module.py", "class World:\n    pass\n", "src/module.py:1"),
        ("src/module.py", "def f(alone_in: int) -> None: ...\n", "src/module.py:1"),
        ("src/module.py", "MOST_ROWS = 3\n", "src/module.py:1"),
        ("README.md", "Text.\n\nIt is set\nbeside the model.\n", "README.md:4"),
    ],
)
def test_a_planted_old_word_fails(tree: Path, file: str, text: str, place: str) -> None:
    assert check(tree).returncode == 0
    (tree / file).write_text(text)
    done = check(tree)
    assert done.returncode == 1 and done.stdout.startswith(f"{place}: ") and "1 times, 0 allowed" in done.stderr
    assert check(tree, "--update").returncode == 0 and check(tree).returncode == 0


def test_names_used_but_not_defined_and_other_words_pass(tree: Path) -> None:
    (tree / "src" / "module.py").write_text('"""The worlds follow."""\n\nimport peft\n\npeft.World()\n')
    assert check(tree).returncode == 0


def test_contributing_names_words_that_the_check_knows() -> None:
    table = tomllib.loads((ROOT / "tools" / "words.toml").read_text(encoding="utf-8"))
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Words")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \|", section, re.MULTILINE)[1:]
    words = [word.strip("` ") for row in rows for word in row.split(", ")]
    assert len(words) >= 20
    for word in words:
        known = any(re.search(each, word, re.IGNORECASE) for each in table["prose"])
        assert known or any(re.fullmatch(each, word) for each in table["names"]), word


@pytest.mark.parametrize(
    ("subject", "good"),
    [
        ("Replace the hand-written lock by filelock", True),
        ("Pass the dtype to the engine", True),
        ("Embed positions in one place", True),
        ("Replaced the lock", False),
        ("Fixes the lock", False),
        ("Fixing the lock", False),
        ("What random order found", False),
        ("fix the lock", False),
        ("Fix the lock.", False),
        ("Fix " + "x" * 69, False),
        ("Fix " + "x" * 68, True),
    ],
)
def test_a_commits_subject(subject: str, good: bool) -> None:
    spec = importlib.util.spec_from_file_location("words", SCRIPT)
    assert spec and spec.loader
    spec.loader.exec_module(words := importlib.util.module_from_spec(spec))
    assert (words.fault(subject) is None) == good


def test_subjects_are_read_from_git(tree: Path) -> None:
    def git(*words: str) -> str:
        line = ["git", "-C", str(tree), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(line, capture_output=True, text=True, check=True).stdout

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "the first is not looked at")
    data = tree / "tools" / "words.toml"
    data.write_text(re.sub('since = ".*"', f'since = "{git("rev-parse", "HEAD").strip()}"', data.read_text()))
    git("commit", "-q", "--allow-empty", "-m", "Add a file")
    assert check(tree).returncode == 0
    git("commit", "-q", "--allow-empty", "-m", "What was added")
    done = check(tree)
    assert done.returncode == 1 and "What was added" in done.stderr and "imperative" in done.stderr
