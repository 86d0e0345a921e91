"""The pages: every link leads somewhere, every line of shell is one that graft takes, every line of Python parses."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from graftlm import cli
from graftlm.flags import parse
from tiny import model_folder

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"])
PATHS = [str(page.relative_to(ROOT)) for page in PAGES]
TASKS = ["README.md", "docs/tutorial.md", "docs/how-to.md", "docs/chat.md"]


def blocks(path: str, language: str) -> list[str]:
    """The fenced blocks of a page in a language; "" is none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / path).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block for said, block in fenced if said == language]


def prose(page: Path) -> str:
    """A page without what stands in code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "`code`", text)


def anchors(page: Path) -> set[str]:
    """What its headings are called in links."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = [re.sub(r"[^\w\- ]", "", title.lower()) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {title.strip().replace(" ", "-") for title in titles}


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
        assert verb in cli.VERBS, f"{path}: graft {verb}"
        parse(verb, cli.VERBS[verb].config, words, cli.VERBS[verb].positional)


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
    train, generate = commands("docs/chat.md")
    assert cli.run([*train, "--init_from", "base", "--val", "chat.jsonl", "--max_iters", "2", "--device", "cpu"]) == 0
    capsys.readouterr()
    assert cli.run([*generate, "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "Who are you?"


def test_every_page_is_in_the_sites_navigation() -> None:
    named = set(re.findall(r"^\s*- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}


def test_the_reference_names_every_public_name() -> None:
    import graftlm

    names = re.findall(r"^::: (\S+)$", (ROOT / "docs/reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    said = {name.rpartition(".")[2] for name in names}
    assert said == set(graftlm.__all__) - {"__version__"}
