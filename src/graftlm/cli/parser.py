"""The flags of a subcommand: one argparse parser made from its config dataclass, where each field is a flag.

The docstring below a field is the flag's help text, and the class that defines the field is its group on the help page.
A recipe (--config) goes through the same checks as the command line. Every mistake is one line that names the flag or
the file and offers the did_you_mean name.
"""

import argparse
import ast
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin, get_type_hints

from graftlm.config.parsing import SECRETS, is_variadic, parse_value, read_toml, read_toml_flags, without_none
from graftlm.config.renamed import new_flag
from graftlm.errors import InputError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class CommonFlags:
    """Flags of every subcommand."""

    config: str = ""
    """A recipe: a TOML file whose keys are flags. Flags on the command line win."""
    json: bool = False
    """Print exactly one JSON object on stdout."""
    debug: bool = False
    """When something fails, also show the traceback."""


@dataclass(frozen=True)
class ParsedArgs:
    """A checked command line."""

    config: Any
    """An instance of the subcommand's dataclass."""
    common: CommonFlags
    explicit: frozenset[str] = field(default_factory=frozenset)
    """The fields set on the command line or in the recipe, rather than left at their defaults."""


def wants_help(words: Sequence[str]) -> bool:
    """Whether a help page is asked for, at any position."""
    return "--help" in words or "-h" in words


def wants_debug(words: Sequence[str]) -> bool:
    """Whether tracebacks are asked for; also known when the command line cannot be parsed."""
    return any(word in ("--debug", "--debug=true") for word in words)


def parse(command: str, config: type, words: Sequence[str], positional: str = "") -> ParsedArgs:
    """Parse the words after `graft COMMAND` into `config`; a recipe given by --config fills in what they leave out.

    positional: the field that a word without dashes sets. Raises InputError.
    """
    kinds = _kinds(config)
    typed = vars(_build(command, config, positional).parse_args([*_joined(command, words, kinds, positional)]))
    typed = {name: tuple(value) if is_variadic(kinds[name]) else value for name, value in typed.items()}
    common = CommonFlags(**{f.name: typed.pop(f.name) for f in fields(CommonFlags) if f.name in typed})
    recipe = _read_recipe(common.config, command, config) if common.config else {}
    explicit = {**recipe, **typed}
    for f in fields(config):
        if f.default is MISSING and f.name not in explicit:
            name = _title(f.name) if f.name == positional else f"--{f.name}"
            raise InputError(f"graft {command} needs {name} (see graft {command} --help)")
    try:
        return ParsedArgs(config(**explicit), common, frozenset(explicit))
    except InputError as error:  # its line begins with the flag; name the recipe if the value is from there
        flag = str(error).split()[0].removeprefix("--")
        if flag in recipe and flag not in typed:
            raise InputError(f"{common.config}: {str(error).removeprefix('--')}") from None
        raise


def help_page(command: str, config: type, positional: str = "", epilog: str = "") -> str:
    """What `graft COMMAND --help` prints."""
    return _build(command, config, positional, epilog, _docstrings(config)).format_help()


# The parser -----------------------------------------------------------------------------------------------------------


def _kinds(config: type) -> dict[str, Any]:
    """Type by field, the common flags included."""
    return {**get_type_hints(CommonFlags), **get_type_hints(config)}


def _build(
    command: str, config: type, positional: str = "", epilog: str = "", docs: Mapping[str, str] | None = None
) -> argparse.ArgumentParser:
    """The parser; `docs` is the help text by field. A flag that was not given is absent from the parsed namespace."""
    kinds = _kinds(config)
    place = f" [{_title(positional)}]" if positional else ""
    place += "..." if positional and is_variadic(kinds[positional]) else ""
    parser = argparse.ArgumentParser(
        usage=f"graft {command}{place} [--flag value]...",
        description=inspect.getdoc(config),
        epilog=epilog,
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=28),
    )
    for owner, own in _by_owner(config):
        title = (inspect.getdoc(owner) or "").partition("\n")[0].rstrip(".")
        group = parser.add_argument_group("flags" if owner is config else title)
        for f in own:
            _add_flag(group, f, kinds[f.name], (docs or {}).get(f.name, ""))
    group.add_argument("-h", "--help", action="store_true", help="Print this page and exit.")
    return parser


def _title(positional: str) -> str:
    """What the usage line calls a word without dashes."""
    return "RUN" if positional == "out_dir" else positional.upper()


def _by_owner(config: type) -> Iterator[tuple[type, list["Field[Any]"]]]:
    """The fields by the class that first defines them, the config's own first and the common flags last."""
    classes = [*config.__mro__[:-1], CommonFlags]
    named = {name: cls for cls in classes for name in cls.__annotations__}
    every = (*fields(config), *fields(CommonFlags))
    for cls in classes:
        if own := [f for f in every if named[f.name] is cls]:
            yield cls, own


def _add_flag(group: Any, f: "Field[Any]", kind: Any, doc: str) -> None:
    inner, _ = without_none(kind)
    shown = "" if f.default in (MISSING, None, "", ()) or "Default:" in doc else f" (default: {f.default})"
    if inner is bool:
        shown = f" (default: on; --no_{f.name} turns it off)" if f.default else ""
        group.add_argument(f"--{f.name}", action="store_true", help=doc.replace("%", "%%") + shown)
        group.add_argument(f"--no_{f.name}", dest=f.name, action="store_false", help=argparse.SUPPRESS)
        return
    choices = "{" + ",".join(get_args(inner)) + "}" if get_origin(inner) is Literal else "TEXT"
    group.add_argument(
        f"--{f.name}",
        type=str if is_variadic(kind) else lambda text: parse_value(f"--{f.name} {text}", text, kind),
        action="append" if is_variadic(kind) else "store",
        metavar={int: "N", float: "X"}.get(inner, choices),
        help=doc.replace("%", "%%") + shown,
    )


def _joined(command: str, words: Sequence[str], kinds: Mapping[str, Any], positional: str) -> Iterator[str]:
    """Each flag as one word: `--lora-dropout 0.5` -> `--lora_dropout=0.5`, `--no-resume` -> `--no_resume`.

    In this form argparse lets a value begin with a dash (one that begins with two dashes must be typed with `=`). Words
    without dashes become values of the positional field.
    """
    rest, seen = iter(words), False
    for word in rest:
        if not word.startswith("--"):
            if not positional or (seen and not is_variadic(kinds[positional])):
                raise InputError(f"unexpected {word!r}: flags begin with two dashes (see graft {command} --help)")
            seen = True
            yield f"--{positional}={word}"
            continue
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if name not in kinds and not equals and kinds.get(name.removeprefix("no_")) is bool:
            yield f"--{name}"
        elif name not in kinds:
            if new := new_flag(name.removeprefix("no_"), kinds):
                raise InputError(f"{flag} is now {new}")
            raise InputError(f"unknown flag {flag}: {did_you_mean(name, kinds, '--')}see graft {command} --help")
        elif kinds[name] is bool:
            yield f"--{name}" if not equals or parse_value(f"--{name} {value}", value, bool) else f"--no_{name}"
        else:
            yield f"--{name}={value if equals else _following(flag, name, next(rest, None))}"


def _following(flag: str, name: str, word: str | None) -> str:
    """The next word as a flag's value."""
    if word is None or word.startswith("--"):
        shown = "..." if name in SECRETS else word
        tip = f" (a value that begins with dashes is written {flag}={shown})" if word else ""
        raise InputError(f"{flag} needs a value{tip}")
    return word


def _docstrings(config: type) -> dict[str, str]:
    """The docstring below each field, of the config and its bases."""
    docs: dict[str, str] = {}
    for cls in (*reversed(config.__mro__[:-1]), CommonFlags):
        (tree,) = ast.parse(inspect.getsource(cls)).body
        assert isinstance(tree, ast.ClassDef)
        for statement, following in pairwise(tree.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                docs[ast.unparse(statement.target)] = " ".join(ast.literal_eval(following.value).split())
    return docs


# Recipes --------------------------------------------------------------------------------------------------------------


def _read_recipe(file: str, command: str, config: type) -> dict[str, Any]:
    """The values of a recipe by field; InputError names the file and the key.

    Tables that the config lists in TABLES are read by the subcommand itself.
    """
    table = read_toml(file, "--config ")
    flags = {key: value for key, value in table.items() if key not in getattr(config, "TABLES", ())}
    return read_toml_flags(file, flags, get_type_hints(config), command)
