"""Hooks, CI, coverage, mutation tests, issue forms and CONTRIBUTING agree with the Makefile and the code."""

import ast
import configparser
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src/graftlm"
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))


def lines_of(target: str) -> list[str]:
    """What a target of the Makefile runs, with BIN put in."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    folder = re.search(r"^BIN := (\S+)$", text, re.MULTILINE)
    assert found and folder, f"the Makefile has no target {target}"
    return [line.strip().replace("$(BIN)", folder[1]) for line in found[1].splitlines()]


def test_the_hooks_are_the_lines_of_make_check_and_fetch_nothing() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = config["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == lines_of("check")
    assert all(hook["language"] == "system" and hook["pass_filenames"] is False for hook in hooks)
    assert len({hook["id"] for hook in hooks}) == len(hooks)


def test_the_workflow_runs_make_targets_on_the_pythons_of_the_classifiers() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert set(workflow[True]) == {"push", "pull_request"}  # yaml reads the key `on` as true
    jobs = workflow["jobs"]
    lines = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert [run[-1] for run in lines.values()] == ["make check", "make test", "make docs"]
    for target in re.findall(r"\bmake ([\w-]+)", str(lines)):
        assert lines_of(target)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = re.findall(r":: (3\.\d+)", "\n".join(project["classifiers"]))
    assert jobs["test"]["strategy"]["matrix"]["python"] == versions
    assert project["requires-python"] == f">={versions[0]}"
    assert {"fetch-depth": 0} in [step.get("with") for step in jobs["check"]["steps"]]  # subjects of commits


def test_coverage_fails_under_its_floor(tmp_path: Path) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / ".coveragerc")
    assert 90 <= config.getfloat("report", "fail_under") < 100
    (tmp_path / "half.py").write_text("import sys\nif len(sys.argv) > 9:\n    print(1)\n    print(2)\n")
    (tmp_path / "rc").write_text(f"[report]\nfail_under = {config['report']['fail_under']}\n")
    for words, status in ((["run", "half.py"], 0), (["report"], 2)):
        line = [sys.executable, "-m", "coverage", words[0], "--rcfile", "rc", *words[1:]]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr


def test_mutmut_mutates_and_runs_files_that_exist() -> None:
    mutmut = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutmut"]
    for pattern in mutmut["only_mutate"] + mutmut["pytest_add_cli_args_test_selection"]:
        assert list(ROOT.glob(pattern)), pattern


@pytest.mark.parametrize("path", [path for path in FORMS if path.name != "config.yml"], ids=lambda path: path.stem)
def test_an_issues_form_is_one(path: Path) -> None:
    form: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(form) == {"name", "description", "body"} and form["name"] and form["description"]
    assert len({part["id"] for part in form["body"]}) == len(form["body"]) <= 4  # whoever reports has little time
    for part in form["body"]:
        assert part["type"] in ("textarea", "input") and part["attributes"]["label"]
        assert isinstance(part["validations"]["required"], bool)


def test_there_are_a_form_for_each_kind_of_issue_and_a_template_for_changes() -> None:
    assert [path.stem for path in FORMS] == ["bug", "config", "feature"]
    assert "make check" in (ROOT / ".github/PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8")


def defined(*paths: Path) -> set[str]:
    """Every function, class and method of these files by its own name."""
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}


def tour(heading: str) -> str:
    """A section of the code tour."""
    text = (ROOT / "docs" / "code_tour.md").read_text(encoding="utf-8")
    return text.partition(heading)[2].partition("\n## ")[0]


def test_the_code_tour_is_twelve_files_of_at_most_3000_lines() -> None:
    rows = re.findall(r"^\| (\d+) \| `([^`]+)` \| (.*) \|$", tour("# Code tour"), re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 13))
    assert sum(len((SRC / file).read_text(encoding="utf-8").splitlines()) for _, file, _ in rows) <= 3000
    for _, file, reading in rows:
        names = [part for name in re.findall(r"`(\w[\w.]*)`", reading) if ".py" not in name for part in name.split(".")]
        assert names and set(names) <= defined(SRC / file), file


def test_the_path_of_one_review_names_what_is_there() -> None:
    walk = tour("## The path of one review")
    rows = [row.split("|")[2] for row in re.findall(r"^\| \w+ \|.*$", walk, re.MULTILINE)]
    assert len(rows) >= 12
    for row in rows:
        quoted = re.findall(r"`([^`]+)`", row)
        files = [name for name in quoted if name.endswith(".py")]
        for name in (name for name in quoted if not name.endswith(".py")):
            first, _, rest = name.partition(".")
            module = [*SRC.glob(f"{first}.py"), *SRC.glob(f"{first}/*.py")] if first else []
            if module:  # flags.parse
                assert rest in defined(*module), f"{row}: {first} has no {rest}"
                continue
            there = defined(*(SRC / file for file in files))
            assert set(filter(None, name.split("."))) <= there, f"{row}: {name} is in none of {files}"
        assert all((SRC / file).is_file() for file in files), row


def test_what_contributing_calls_a_target_is_one() -> None:
    makefile, contributing = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "CONTRIBUTING.md"))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", contributing, re.MULTILINE))
    assert {"check", "test", "docs", "release"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target} is no target"
