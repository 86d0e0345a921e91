"""`graft completion`: the scripts in the shells themselves, asked for what a Tab would offer."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from conftest import child_environment, require
from graftlm import cli
from graftlm.files.assets import BUILTIN_DATA, HUB_DATA
from graftlm.methods import METHODS

Offers = Callable[[str], list[str]]
"""What is offered behind a command line."""
BASH = """
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(( $# - 1 ))
compopt() { :; }
_graft graft "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
FISH = "source $argv[1]; complete -C $argv[2] | string replace -r '\\t.*' ''"
# Each group of words that the completion adds is printed, in a zsh that has a terminal of its own.
ZSH = r"""
zmodload zsh/zpty
zpty child zsh -f -i
zpty -w child "PROMPT=; autoload -Uz compinit; compinit -u -D; source ${(q)1}"
zpty -w child 'compadd() {
  if [[ ${@[1,(i)(-|--)]} == *-(O|A|D)\ * ]]; then builtin compadd "$@"; return; fi
  local -a hits; builtin compadd -A hits "$@"; print -lr -- "<"$^hits">"; builtin compadd "$@"
}
finish() { print -r -- "<""done>" }
zle -C capture complete-word _main_complete; bindkey "^I" capture
comppostfuncs=(finish)'
zpty -w child 'print ready""now'
while zpty -r child line; do [[ $line == *readynow* ]] && break; done
zpty -w -n child "$2"$'\t'
while zpty -r child line; do print -r -- ${line%$'\r\n'}; [[ $line == *"<done>"* ]] && break; done
zpty -d child
"""


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.run(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.fixture(params=["bash", "zsh", "fish"])
def offers(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Offers]:
    """In a folder with two runs, a comparison, a file and a folder."""
    shell = request.param
    require(shell)
    for name in ("work/runs/one/run.json", "work/runs/two/run.json", "work/runs/ranks/sweep.json", "work/a.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "work/texts").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    file = tmp_path / f"script.{shell}"
    file.write_text(script(shell, capsys))

    def offered(line: str) -> list[str]:
        words = shlex.split(line) + [""] * line.endswith(" ")
        typed = [part for word in words for part in re.split("(=)", word) if part or not word]
        command = {
            "bash": ["bash", "--norc", "-c", BASH, "bash", file, *typed],
            "zsh": ["zsh", "-f", "-c", ZSH, "zsh", file, line],
            "fish": ["fish", "--no-config", "-c", FISH, file, line],
        }[shell]
        environment = {**os.environ, "HOME": str(tmp_path), "TERM": "dumb"}
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, env=environment)
        lines = re.findall("<([^>]*)>", done.stdout) if shell == "zsh" else done.stdout.split("\n")
        found = {text.removeprefix(line.split()[-1].partition("=")[0] + "=").rstrip("/") for text in lines}
        return sorted(found - {"", "done"})

    yield offered


def test_subcommands(offers: Offers) -> None:
    assert set(offers("graft ")) - {"--help", "--version"} == set(cli.COMMANDS)
    assert offers("graft ex") == ["export"]


def test_flags(offers: Offers) -> None:
    assert offers("graft train --meth") == ["--method", "--method_args"]
    assert offers("graft train --no_f") == ["--no_fused"]
    assert offers("graft generate --resu") == []
    assert {f"--{field.name}" for field in fields(cli.COMMANDS["serve"].config)} < set(offers("graft serve --"))


def test_values(offers: Offers) -> None:
    assert offers("graft train --method ") == sorted(METHODS)
    assert offers("graft train --method=b") == ["bitfit"]
    assert offers("graft train --resume --base_format q8") == ["q8_0"]
    assert offers("graft export --format gg") == ["gguf", "gguf-lora"]
    assert offers("graft train --init_from gpt2-x") == ["gpt2-xl"]
    assert offers("graft completion ") == ["bash", "fish", "zsh"]
    assert offers("graft train --rank ") == []


def test_runs_and_files(offers: Offers) -> None:
    assert offers("graft evaluate ") == offers("graft evaluate ru") == ["runs/one", "runs/ranks", "runs/two"]
    assert offers("graft evaluate --mode score --out_dir=runs/o") == ["runs/one"]
    assert offers("graft report runs/one runs/t") == ["runs/two"]
    assert offers("graft evaluate te") == ["texts"]  # no run begins with it
    assert offers("graft train --data ") == sorted({*BUILTIN_DATA, *HUB_DATA, "a.csv", "runs", "texts"})
    assert offers("graft train --data=a") == ["a.csv"]
    assert offers("graft compare --config a") == ["a.csv"]


def test_the_scripts_are_made_without_torch() -> None:
    program = (
        "import sys, graftlm.cli\n"
        "assert graftlm.cli.run(['completion', 'bash']) == 0\n"
        "print({'torch', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=child_environment(), capture_output=True, text=True)
    assert done.stdout.startswith("# Completion of graft in bash") and done.stdout.endswith("\nset()\n"), done.stderr
