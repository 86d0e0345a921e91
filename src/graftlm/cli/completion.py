"""`graft completion`: a script for bash, zsh or fish that completes subcommands, flags, their values, runs and files.

The script is made from the config dataclasses and is static: the shell never starts Python. Does not import torch.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from string import Template
from textwrap import shorten
from typing import Any, Literal, get_args, get_origin

from graftlm.config.flags import by_owner, docstrings, field_types
from graftlm.config.paths import PATH_FLAGS
from graftlm.config.training import method_titles
from graftlm.config.values import without_none
from graftlm.files.assets import BUILTIN_DATA, BUILTIN_MODELS, HUB_DATA, HUB_MODELS
from graftlm.text.tasks import REVIEWS, WORD_PROBLEMS
from graftlm.text.template import BUILTIN

RUN_FLAGS = frozenset({"out_dir", "folders", "adapters", "runs", "reference", "reward_model", "init_from"})
"""Flags that may name a run."""
MODELS, DATA = (*BUILTIN_MODELS, *HUB_MODELS), (*BUILTIN_DATA, *HUB_DATA)
NAMES = {
    "init_from": MODELS,
    "data": DATA,
    "prompts": DATA,
    "name": (*MODELS, *DATA),
    "template": tuple(BUILTIN),
    "task": (*WORD_PROBLEMS, *REVIEWS),
    "method": tuple(method_titles()),
    "device": ("auto", "cpu", "cuda", "mps"),
    "ray": ("auto", "local"),
}
"""Names that a flag takes in addition to those of its type."""


@dataclass(frozen=True)
class Word:
    """A flag, or the place of words without dashes."""

    name: str
    """With its dashes; empty for the place of words without."""
    doc: str
    takes_value: bool = True
    names: tuple[str, ...] = ()
    """The values that are known beforehand."""
    place: Literal["", "files", "runs"] = ""
    """What else a value may be; runs: a run, or a file where no run begins with the word."""


def script(shell: str, commands: Mapping[str, tuple[type, str, str]]) -> str:
    """The script.

    shell: bash, zsh or fish. commands: config, positional field (or "") and summary by subcommand.
    """
    words = {name: [*_words(config, positional)] for name, (config, positional, _) in commands.items()}
    summaries = {name: summary for name, (_, _, summary) in commands.items()}
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](words, summaries)


def _words(config: type, positional: str) -> Iterator[Word]:
    kinds, docs = field_types(config), docstrings(config)
    for f in (f for _, own in by_owner(config) for f in own):
        doc = shorten(docs[f.name].partition(". ")[0].rstrip("."), 72, placeholder="…")
        if kinds[f.name] is bool:
            yield Word(f"--no_{f.name}" if f.default is True else f"--{f.name}", doc, takes_value=False)
            continue
        inner, _ = without_none(kinds[f.name])
        names = get_args(inner) if get_origin(inner) is Literal else NAMES.get(f.name, ())
        place: Any = "runs" if f.name in RUN_FLAGS else "files" if f.name in PATH_FLAGS else ""
        yield Word(f"--{f.name}", doc, True, names, place)
        if f.name == positional:
            yield Word("", doc, True, names, place)
    yield Word("--help", "Print the help page and exit", takes_value=False)


# bash: `=` in a word begins a new one; no feature of version 4 is needed, as macOS has 3.2 ----------------------------

BASH = Template(r"""# Completion of graft in bash, made by: graft completion bash

_graft_runs() {
  local file
  for file in "$$1"*/run.json "$$1"*/*/run.json "$$1"*/sweep.json "$$1"*/*/sweep.json; do
    if [[ -f $$file ]]; then printf '%s\n' "$${file%/*}"; fi
  done
}

_graft() {
  local cur=$${COMP_WORDS[COMP_CWORD]} previous=$${COMP_WORDS[COMP_CWORD-1]} command=$${COMP_WORDS[1]}
  local flag='' flags='' switches='' names='' place='' found=''
  if [[ $$COMP_CWORD -eq 1 ]]; then
    COMPREPLY=($$(compgen -W '$subcommands' -- "$$cur"))
    return
  elif [[ $$cur == = ]]; then
    flag=$$previous cur=''
  elif [[ $$previous == = ]]; then
    flag=$${COMP_WORDS[COMP_CWORD-2]}
  elif [[ $$previous == --* ]]; then
    flag=$$previous
  fi
  case $$command in
$flags
  esac
  flag=$${flag#--} flag=$${flag//-/_}
  if [[ $$switches == *" $$flag "* ]]; then flag=''; fi
  if [[ -z $$flag && $$cur == -* ]]; then
    COMPREPLY=($$(compgen -W "$$flags" -- "$$cur"))
    return
  fi
  case "$$command $$flag" in
$values
  esac
  COMPREPLY=($$(compgen -W "$$names" -- "$$cur"))
  if [[ -z $$place ]]; then return; fi
  compopt -o filenames 2> /dev/null
  if [[ $$place == runs ]]; then found=$$(_graft_runs "$$cur"); fi
  if [[ -z $$found ]]; then found=$$(compgen -f -- "$$cur"); fi
  while IFS= read -r name; do
    if [[ -n $$name ]]; then COMPREPLY+=("$$name"); fi
  done <<< "$$found"
}

complete -F _graft graft
""")


def _bash(commands: Mapping[str, list[Word]], summaries: Mapping[str, str]) -> str:
    flags, values = [], []
    for command, words in commands.items():
        switches = " ".join(word.name[2:] for word in words if not word.takes_value)
        named = " ".join(word.name for word in words if word.name)
        flags.append(f"    {command}) switches=' {switches} ' flags='{named}' ;;")
        for word in words:
            if word.names or word.place:
                known = f"names='{' '.join(word.names)}' place={word.place}"
                values.append(f"    '{command} {word.name[2:]}') {known} ;;")
    subcommands = " ".join([*commands, "--help", "--version"])
    return BASH.substitute(subcommands=subcommands, flags="\n".join(flags), values="\n".join(values))


# zsh ------------------------------------------------------------------------------------------------------------------

ZSH = Template(r"""#compdef graft
# Completion of graft in zsh, made by: graft completion zsh

_graft_value() {
  local place=$$1
  local -a runs
  shift
  if (( $$# )); then compadd -- "$$@"; fi
  if [[ $$place == runs ]]; then
    runs=($${(Q)PREFIX}*/(run|sweep).json(N:h) $${(Q)PREFIX}*/*/(run|sweep).json(N:h))
    if (( $$#runs )); then compadd -f -- $$runs; else _files; fi
  elif [[ $$place == files ]]; then
    _files
  fi
}

_graft() {
  local -a subcommands
  if (( CURRENT == 2 )); then
    subcommands=(
$subcommands
    )
    _describe -t commands subcommand subcommands
    return
  fi
  shift words
  (( CURRENT-- ))
  case $$words[1] in
$commands
  esac
}

if [[ $$funcstack[1] == _graft ]]; then _graft "$$@"; else compdef _graft graft; fi
""")


def _zsh(commands: Mapping[str, list[Word]], summaries: Mapping[str, str]) -> str:
    def spec(word: Word) -> str:
        action = f": _graft_value {shlex.join([word.place or '-', *word.names])}" if word.names or word.place else ":"
        if not word.name:
            return shlex.quote(f"*:name{action}")
        doc = word.doc.translate({ord(sign): f"\\{sign}" for sign in "[]:\\"})
        return shlex.quote(f"{word.name}=[{doc}]:value{action}" if word.takes_value else f"{word.name}[{doc}]")

    described = (shlex.quote(f"{name}:{summaries[name]}") for name in commands)
    cases = []
    for name, words in commands.items():
        cases += [f"    {name})", "      _arguments \\", *(f"        {spec(word)} \\" for word in words)]
        cases[-1] = cases[-1].removesuffix(" \\")
        cases.append("      ;;")
    return ZSH.substitute(subcommands="\n".join(f"      {text}" for text in described), commands="\n".join(cases))


# fish -----------------------------------------------------------------------------------------------------------------

FISH = r"""# Completion of graft in fish, made by: graft completion fish

function __graft_runs
    set -l word (commandline -ct | string replace -r '^--[^=]*=' '')
    set -l found $word*/{run,sweep}.json $word*/*/{run,sweep}.json
    if count $found > /dev/null
        string replace -r '/[^/]*$' '' $found
    else
        __fish_complete_path $word
    end
end

function __graft_in
    set -l words (commandline -opc)
    test (count $words) -gt 1; and test $words[2] = $argv[1]
end

complete -c graft -f
complete -c graft -n 'test (count (commandline -opc)) -eq 1' -l help -d 'Print the help page and exit'
complete -c graft -n 'test (count (commandline -opc)) -eq 1' -l version -d 'Print the version and exit'
"""


def _fish(commands: Mapping[str, list[Word]], summaries: Mapping[str, str]) -> str:
    def quote(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    lines = []
    for name, summary in summaries.items():
        first = "-n 'test (count (commandline -opc)) -eq 1'"
        lines.append(f"complete -c graft {first} -a {name} -d {quote(summary)}")
    for name, words in commands.items():
        for word in words:
            parts = [f"complete -c graft -n '__graft_in {name}'"]
            parts += [f"-l {word.name[2:]} -d {quote(word.doc)}"] if word.name else []
            if word.takes_value:
                values = [*word.names, *(["(__graft_runs)"] if word.place == "runs" else [])]
                parts += ["-F"] if word.place == "files" else []
                parts += [("-r" if word.place == "files" else "-x")] if word.name else []
                parts += [f"-a {quote(' '.join(values))}"] if values else []
            lines.append(" ".join(parts))
    return FISH + "\n".join(lines) + "\n"
