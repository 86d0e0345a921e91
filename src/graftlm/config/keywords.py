"""Keyword arguments of the library's functions: each is a flag of the subcommand, by the same name."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields, replace
from typing import Any, TypeVar, get_type_hints

from graftlm.config.flags import Flags, by_owner
from graftlm.config.renamed import new_flag
from graftlm.config.values import short
from graftlm.errors import InputError, did_you_mean

Config = TypeVar("Config", bound=Flags)


def listed(texts: Any) -> list[Any]:
    """Some texts as a list: a single one is an item, not its letters. Raises InputError for what is no texts."""
    if not isinstance(texts, Iterable):
        raise InputError(f"{short(texts)}: pass a text, or a list of texts")
    return [texts] if isinstance(texts, str) else list(texts)


def config_from(
    kind: type[Config], given: Config | None, keywords: Mapping[str, Any], command: str
) -> tuple[Config, frozenset[str]]:
    """The config of a call, and the flags that it sets rather than leaves at their defaults.

    given: a config, whose fields the keywords replace. command: the function's name.

    Raises InputError for a keyword that is no flag, and for a value that its flag does not take.
    """
    known = {f.name: f for f in fields(kind)}
    for name in keywords:
        if name not in known:
            new = new_flag(name, known).removeprefix("--")
            hint = (
                f"it is now {new}" if new else f"{did_you_mean(name, known, '')}keywords are flags of graft {command}"
            )
            raise InputError(f"graftlm.{command}: no keyword {name!r}: {hint}")
    if given is None:
        if missing := [f.name for f in known.values() if f.default is MISSING and f.name not in keywords]:
            raise InputError(f"graftlm.{command} needs {missing[0]}=…")
        return kind(**keywords), frozenset(keywords)
    if not isinstance(given, kind):
        raise InputError(f"graftlm.{command}: {short(given)} is no {kind.__name__}: name flags, as in {command}(…=…)")
    changed = {name for name, f in known.items() if getattr(given, name) != f.default}
    return replace(given, **keywords), frozenset({*changed, *keywords})


def signature_of(function: Callable[..., Any], kind: type[Flags]) -> inspect.Signature:
    """The signature of a function whose last parameter is `**flags`, with the flags in its place."""
    own = list(inspect.signature(function).parameters.values())
    hints = get_type_hints(kind)
    flags = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for _, group in by_owner(kind)
        for f in group
        if f.name in hints and f.name not in {parameter.name for parameter in own}
    ]
    return inspect.Signature([*own[:-1], *flags])
