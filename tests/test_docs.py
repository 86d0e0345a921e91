"""The pages: every link leads somewhere, every line of shell is one that graft takes, every line of Python parses.

What `make docs` would find is found here without mkdocs, as far as links and headings go; and what it would not: files
and flags that are named in the text.
"""

import ast
import dataclasses
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from graftlm import cli
from graftlm.config.flags import parse
from graftlm.models.config import FAMILIES
from tiny import data_folder, fresh_home, model_folder

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"])
PATHS = [str(page.relative_to(ROOT)) for page in PAGES]
TASKS = ["README.md", "docs/tutorial.md", "docs/how-to.md", "docs/chat.md"]


def blocks(path: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language; "" is none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block for said, block in fenced if said == language]


def unfenced(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without what stands in code."""
    return re.sub(r"`[^`\n]*`", "`code`", unfenced(page))


def quoted(page: Path) -> list[str]:
    """What stands in code within its lines, or over the end of one."""
    return [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", unfenced(page))]


def anchors(page: Path) -> set[str]:
    """What its headings are called in links, by a code host and by mkdocs alike, which makes one dash of several."""
    titles = re.findall(r"^#+ (.+)$", unfenced(page), re.MULTILINE)
    names = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
    return {name for name in names if re.sub("-+", "-", name) == name and name.isascii()}


@pytest.mark.parametrize("path", PATHS)
def test_every_link_leads_somewhere(path: str) -> None:
    page = ROOT / path
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{path}: {target} is not there"
        assert there.is_relative_to(ROOT), f"{path}: {target} leaves the repository"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{path}: {target} has no such heading; it has {sorted(anchors(there))}"


def commands(path: str) -> Iterator[list[str]]:
    """The words behind `graft` of every such line in a page's shell blocks."""
    for block in blocks(path, "" if path == "README.md" else "shell"):
        for line in block.replace("\\\n", " ").splitlines():
            if path == "README.md" and not line.startswith(("graft ", "torchrun ")):
                continue  # its tree stands in such a block too
            words = shlex.split(line, comments=True)
            words = words[: words.index(">")] if ">" in words else words
            if words[:1] == ["graft"]:
                yield words[1:]
            elif "graftlm" in words:  # torchrun … -m graftlm train …
                yield words[words.index("graftlm") + 1 :]
            else:
                assert words[:1] in ([], ["make"], ["pip"], ["cd"]), f"{path}: {line}"


@pytest.mark.parametrize("path", TASKS)
def test_every_line_of_shell_is_one_that_graft_takes(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    recipe = next(iter(blocks(path, "toml")), "")
    (tmp_path / "sweep.toml").write_text(recipe or "[train]\n")
    (tmp_path / "recipe.toml").write_text("rank = 4\n")
    found = list(commands(path))
    assert found
    for verb, *words in found:
        assert verb in cli.COMMANDS, f"{path}: graft {verb}"
        parse(verb, cli.COMMANDS[verb].config, words, cli.COMMANDS[verb].positional)


@pytest.mark.parametrize("path", sorted({*PATHS} - {*TASKS}))
def test_a_line_of_graft_on_any_other_page_is_one_that_it_takes(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "sweep.toml").write_text("[train]\n")
    for block in (block for language in ("", "shell") for block in blocks(path, language)):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"graft [a-z]", line) or " -m graftlm " in line:
                verb, *words = re.split(r"^graft | -m graftlm ", line)[1].split("#")[0].split(maxsplit=1)
                assert verb in cli.COMMANDS, f"{path}: {line}"
                parse(verb, cli.COMMANDS[verb].config, shlex.split(" ".join(words)), cli.COMMANDS[verb].positional)


@pytest.mark.parametrize("path", PATHS)
def test_verbs_and_flags_in_the_text_are_ones(path: str) -> None:
    everywhere = {"json", "debug", "help", "config"}
    for code in quoted(ROOT / path):
        if match := re.match(r"(?:graft|.* -m graftlm) ([a-z]+)\b(.*)", code):
            verb, rest = match.groups()
            assert verb in cli.COMMANDS, f"{path}: `{code}`"
            known = everywhere | {field.name for field in dataclasses.fields(cli.COMMANDS[verb].config)}
            for flag in re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", rest):
                name = flag.replace("-", "_")
                assert known & {name, name.removeprefix("no_")}, f"{path}: `{code}`: {verb} has no --{flag}"


@pytest.mark.parametrize("path", PATHS)
def test_files_that_the_text_names_are_there(path: str) -> None:
    top = {"tests", "docs", "src", "benchmarks", "recipes", "tools", "examples", "notebooks"}
    rooms = {"files", "text", "models", "methods", "exchange", "inference", "training", "studies", "serving"}
    for name in re.findall(r"[\w.*-]+(?:/[\w.*-]+)+", "\n".join(quoted(ROOT / path))):
        first = name.partition("/")[0]
        if first in top:
            assert list(ROOT.glob(name)), f"{path}: there is no {name}"
        elif first in rooms and name.endswith(".py"):
            assert any((ROOT / where / name).is_file() for where in ("src/graftlm", "tests")), f"{path}: no {name}"


@pytest.mark.parametrize("path", PATHS)
def test_every_block_of_python_parses(path: str) -> None:
    for block in blocks(path, "python"):
        ast.parse(block)


def test_the_chat_pages_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its records and its lines, on a model that is small and has a chat template, for a few steps."""
    base = model_folder(tmp_path / "base")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}<assistant>"
    template = template.replace("<assistant>", "{% if add_generation_prompt %}<assistant>{% endif %}")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    monkeypatch.chdir(tmp_path)
    (records,) = blocks("docs/chat.md", "json")
    Path("chat.jsonl").write_text(records)
    train, generate, *_ = commands("docs/chat.md")
    assert (
        cli.run([*train, "--init_from", "base", "--val_data", "chat.jsonl", "--max_iters", "2", "--device", "cpu"]) == 0
    )
    capsys.readouterr()
    assert cli.run([*generate, "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "Who are you?"


def test_every_page_is_in_the_sites_navigation() -> None:
    named = set(re.findall(r"^\s*- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def test_the_repository_has_one_address() -> None:
    address = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    for file in ("README.md", "docs/index.md", "docs/tutorial.md", "notebooks/run_in_colab.ipynb"):
        found = re.findall(r"https://github\.com/[\w.-]+/graftlm", (ROOT / file).read_text(encoding="utf-8"))
        assert {*found} == {address}, file


def test_the_reference_names_every_public_name() -> None:
    import graftlm

    names = re.findall(r"^::: (\S+)$", (ROOT / "docs/reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    said = {name.rpartition(".")[2] for name in names}
    assert said == set(graftlm.__all__) - {"__version__"}


def test_the_table_of_models_has_a_row_for_each_model_type_in_alphabetical_order() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "models.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == sorted(name for family in FAMILIES.values() for name in family.model_types)


@pytest.mark.usefixtures("forked_children")
@pytest.mark.parametrize("number", range(6))
def test_the_programs_of_the_library_run(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the page has them, with a small model and small data in place of the built-in ones."""
    program = blocks("docs/library.md", "python")[number]
    base = model_folder(tmp_path / "model") / "config.json"
    base.write_text(json.dumps(json.loads(base.read_text()) | {"max_position_embeddings": 256}))
    data = data_folder(tmp_path / "data")
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    for name in ("reviews.csv", "test.csv"):
        (tmp_path / name).write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRAFT_HOME", fresh_home(tmp_path / "home"))
    program = program.replace("smollm2-135m", str(base.parent)).replace("rotten-tomatoes-pypi", str(data))
    if "init_from" not in program:
        program = program.replace("rank=16, max_iters=200", f"rank=16, max_iters=2, init_from={str(base.parent)!r}")
    exec(compile(program, f"docs/library.md, program {number}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


def test_the_library_page_has_six_programs() -> None:
    assert len(blocks("docs/library.md", "python")) == 6
