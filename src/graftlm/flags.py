"""Words on the command line and keys of a recipe -> a verb's frozen dataclass.

What is unusual here: tyro writes the help page (from the string under each field), but reading the words is done here,
since flags and the recipe's keys must meet the same checks, and every mistake must be one line that names the flag or
the file, says what is allowed and offers the nearest name. A field's type is bool, int, float, str or a Literal, maybe
with None, or tuple[str, ...], which takes every text given for it; of the others the last one given counts.

Left out: short flags, abbreviated flags, several values behind one flag.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from graftlm.errors import InputError, nearest
from graftlm.values import checked_value, takes_several, value_of_word

SECRETS = frozenset({"key"})
"""Fields whose values no error shows."""


@dataclass(frozen=True, kw_only=True)
class EveryVerb:
    """The flags that every verb has, besides --help."""

    config: str = ""
    """A recipe: a TOML file whose keys are flags. Flags given beside it win."""
    json: bool = False
    """Print exactly one JSON object on stdout."""
    debug: bool = False
    """When something fails, show the traceback too."""


@dataclass(frozen=True)
class Parsed:
    """What was typed, checked."""

    config: Any
    """An instance of the verb's dataclass."""
    every: EveryVerb
    given: frozenset[str] = field(default_factory=frozenset)
    """The fields that were set by a flag or by the recipe, rather than left at their defaults."""


def wants_help(words: Sequence[str]) -> bool:
    """Whether a help page is asked for, at any place."""
    return "--help" in words or "-h" in words


def wants_debug(words: Sequence[str]) -> bool:
    """Whether tracebacks are asked for: needed when the words cannot be parsed, too."""
    return any(word in ("--debug", "--debug=true") for word in words)


def parse(verb: str, config: type, words: Sequence[str], positional: str = "") -> Parsed:
    """Read the words behind `graft VERB` into `config`, with the recipe of --config below them.

    positional: the field that a word without dashes sets. Raises InputError.
    """
    types = {**get_type_hints(EveryVerb), **get_type_hints(config)}
    typed = _split(verb, types, words, positional)
    values = {name: _from_words(name, texts, types[name]) for name, texts in typed.items()}
    every = EveryVerb(**{f.name: values.pop(f.name) for f in fields(EveryVerb) if f.name in values})
    recipe = _read_recipe(every.config, get_type_hints(config), getattr(config, "TABLES", ())) if every.config else {}
    given = {**recipe, **values}
    for f in fields(config):
        if f.default is MISSING and f.name not in given:
            name = f.name.upper() if f.name == positional else f"--{f.name}"
            raise InputError(f"graft {verb} needs {name} (see graft {verb} --help)")
    try:
        return Parsed(config(**given), every, frozenset(given))
    except InputError as error:  # its line begins with the flag; say when that stands in the recipe
        flag = str(error).split()[0].removeprefix("--")
        if flag in recipe and flag not in values:
            raise InputError(f"{every.config}: {str(error).removeprefix('--')}") from None
        raise


def show_help(verb: str, config: type, more: str = "") -> None:
    """Print the help page of a verb: its summary, `more`, and the string under each field, by tyro."""
    import tyro

    page = make_dataclass(config.__name__, [], bases=(EveryVerb, config), frozen=True, kw_only=True)
    with suppress(SystemExit):
        tyro.cli(
            page,
            prog=f"graft {verb}",
            description="\n\n".join(filter(None, [config.__doc__, more])),
            use_underscores=True,
            args=["--help"],
            config=(tyro.conf.PositionalRequiredArgs,),
        )


# Flags ----------------------------------------------------------------------------------------------------------------


def _split(verb: str, types: Mapping[str, Any], words: Sequence[str], positional: str) -> dict[str, list[str]]:
    """The texts given for each field, in order. A value that begins with two dashes must be joined by `=`."""
    typed: dict[str, list[str]] = {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            if not positional or (positional in typed and not takes_several(types[positional])):
                raise InputError(f"unexpected {word!r}: flags begin with two dashes (see graft {verb} --help)")
            typed.setdefault(positional, []).append(word)
            continue
        flag, joined, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        switch = name.removeprefix("no_")
        if name not in types and types.get(switch) is bool and not joined:
            typed.setdefault(switch, []).append("false")
        elif name not in types:
            raise InputError(f"unknown flag {flag}: {nearest(name, types, '--')}see graft {verb} --help")
        elif joined or types[name] is bool:
            typed.setdefault(name, []).append(value if joined else "true")
        else:
            following = next(rest, None)
            if following is None or following.startswith("--"):
                shown = "..." if name in SECRETS else following
                tip = f" (a value that begins with dashes is written {flag}={shown})" if following else ""
                raise InputError(f"{flag} needs a value{tip}")
            typed.setdefault(name, []).append(following)
    return typed


def _from_words(name: str, texts: Sequence[str], kind: Any) -> Any:
    """The typed value of all texts given for a field."""
    return tuple(texts) if takes_several(kind) else value_of_word(f"--{name} {texts[-1]}", texts[-1], kind)


# Recipes --------------------------------------------------------------------------------------------------------------


def _read_recipe(file: str, types: Mapping[str, Any], tables: Sequence[str]) -> dict[str, Any]:
    """The values of a recipe by field; InputError names the file and the key. `tables` are read by the verb itself."""
    import tomllib

    try:
        table = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--config {file}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"--config {file}: a folder, not a TOML file") from None
    except UnicodeDecodeError:
        raise InputError(f"{file}: not a TOML file (it is not UTF-8 text)") from None
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, brackets without end
        raise InputError(f"{file}: not a TOML file: {error}") from None
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if key in tables:
            continue
        if name not in types:
            raise InputError(f"{file}: unknown key {key!r}: {nearest(name, types, '')}keys are the verb's flags")
        shown = "..." if name in SECRETS else repr(value)
        values[name] = checked_value(f"{file}: {key} = {shown}", value, types[name])
    return values
