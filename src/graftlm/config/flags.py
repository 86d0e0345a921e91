"""Flags: each is a documented field of a config dataclass, from which one argparse parser is made.

The docstring below a field is the flag's help text, and the class that defines the field is its group on the help page.
A recipe (--config) goes through the same checks as the command line. Every mistake is one line that names the flag or
the file and offers the closest name.
"""

import argparse
import ast
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from typing import Any, Literal, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from graftlm.config.csv_format import csv_format
from graftlm.config.paths import PATH_FLAGS, expand_home
from graftlm.config.renamed import new_flag
from graftlm.config.values import (
    SECRETS,
    hints_of,
    is_variadic,
    parse_value,
    python_value,
    read_toml,
    read_toml_flags,
    without_none,
)
from graftlm.errors import InputError, did_you_mean

Group = TypeVar("Group")
ChatFlag = Literal["auto", "on", "off"]


# Groups of flags ------------------------------------------------------------------------------------------------------


def require(ok: bool, flag: str, value: object, allowed: str) -> None:
    """Raise an InputError that says what the flag must be, unless `ok`."""
    if not ok:
        raise InputError(f"--{flag} {value}: must be {allowed}")


def bounded(default: Any = None, **bounds: float) -> Any:
    """A field with bounds for values other than None: ge, gt and le, as in pydantic, whose models take them over."""
    return field(default=default, metadata=bounds)


def describe_bounds(bounds: Mapping[str, float]) -> str:
    """The numbers that bounds allow, in words: "0 or more", "above 0 and at most 1"."""
    if "gt" in bounds:
        return f"above {bounds['gt']} and at most {bounds['le']}" if "le" in bounds else f"greater than {bounds['gt']}"
    return f"from {bounds['ge']} to {bounds['le']}" if "le" in bounds else f"{bounds['ge']} or more"


@dataclass_transform(frozen_default=True, kw_only_default=True)
def flag_group(cls: type[Group]) -> type[Group]:
    """Make a group of flags, for configs to inherit from.

    Only configs are instantiated, so a group gets no generated methods: they would slow `graft --help` down.
    """
    return dataclass(frozen=True, kw_only=True, init=False, repr=False, eq=False)(cls)


@flag_group
class Flags:
    """The base of all groups of flags."""

    def __post_init__(self) -> None:
        """Check types and bounds, and expand `~`; subclasses extend this and call it first. Raises InputError."""
        config: Any = type(self)
        hints = hints_of(config)
        for f in fields(self):
            object.__setattr__(self, f.name, python_value(f.name, getattr(self, f.name), hints[f.name]))
            if f.name in PATH_FLAGS:
                self._expand(f.name)
            value, low, above, high = getattr(self, f.name), *map(f.metadata.get, ("ge", "gt", "le"))
            if value is not None and f.metadata:
                ok = math.isfinite(value) and (low is None or value >= low) and (above is None or value > above)
                require(ok and (high is None or value <= high), f.name, value, describe_bounds(f.metadata))

    def _expand(self, flag: str) -> None:
        value = getattr(self, flag)
        single = isinstance(value, str | Path)
        paths = tuple(expand_home(str(path), f"--{flag} ") for path in ([value] if single else value))
        object.__setattr__(self, flag, paths[0] if single else paths)


@flag_group
class MethodFlags(Flags):
    """Model and method."""

    init_from: str = "smollm2-135m"
    """The base model: a built-in name, a hub id (with @revision), a local folder or a .gguf file; or a run folder, to
    continue from what that run trained."""
    method: str = "lora"
    """The fine-tuning method; graft train --help lists them."""
    rank: int | None = None
    """Rank r of LoRA and DoRA, or the bottleneck width of adapters; 0 means full fine-tuning. Default: the method's
    (LoRA: 128)."""
    alpha: float | None = bounded(gt=0)
    """LoRA's alpha; the update is scaled by alpha / rank. Default: the method's (LoRA: 512)."""
    targets: str | None = None
    """The linear layers to adapt, comma-separated: q, k, v, o, up, gate, down; of LFM2 also conv_in, conv_out; or
    all-linear. Default: the method's (LoRA: q,k,v)."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(rank) instead (rsLoRA)."""
    lora_plus_ratio: float = bounded(1.0, gt=0)
    """Learning rate of LoRA's B divided by that of A (LoRA+; its paper recommends 16)."""
    lora_dropout: float = 0.05
    """Dropout on the input of LoRA's A, a probability."""
    adapter_placement: Literal["houlsby", "pfeiffer"] = "houlsby"
    """Where bottleneck adapters are inserted: after attention and MLP (houlsby), or after the MLP only (pfeiffer)."""
    add_biases: bool = False
    """For bitfit: add a zero-initialised bias to every linear layer of models without biases."""
    prefix_length: int = bounded(20, ge=1)
    """Length of the learned prefix, in positions."""
    prefix_hidden: int = 0
    """Hidden width of the MLP that reparametrises the prefix during training; 0: train keys and values directly."""
    prefix_init: str = ""
    """Text whose tokens initialise the prefix, or random. Default: the common beginning of the run's prompts."""
    train_layers: str = ""
    """Layers to adapt, as a Python slice: 20: means from layer 20 (the 21st) on, -4: the last four. Default: all."""
    method_args: str = ""
    """Extra method settings as name=value,name=value, for fields without a flag of their own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rank is None or self.rank >= 0, "rank", self.rank, "0 (full fine-tuning) or more")
        require(self.prefix_hidden >= 0, "prefix_hidden", self.prefix_hidden, "0 (no network) or more")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "at least 0 and below 1")


@flag_group
class DataFlags(Flags):
    """Data."""

    data: str = "rotten-tomatoes-pypi"
    """The data set: a built-in name, a hub name, a folder with train/validation/test files, or one file."""
    val_data: str = ""
    """A file with the validation split, given together with --data FILE."""
    test_data: str = ""
    """A file with the test split, given together with --data FILE."""
    columns: str = ""
    """Which columns of the data to read, as text=sentence,label=stars. Default: the record layout is recognised by
    its columns: text, label; prompt, completion; prompt, chosen, rejected; messages or conversations; instruction,
    input, output; and others (docs/how-to.md). Of a .csv also how it is written, where that is not found:
    encoding=cp1252; delimiter=comma, semicolon, tab or pipe; header=yes, or no for columns column1, column2, …"""
    template: str = "sentiment"
    """The prompt template of texts with labels: a built-in name (sentiment, question, plain), a file, or a string with
    {text} or other fields of the data in it, as in 'Premise: {premise} Claim: {claim} True?'."""
    prompt: str = ""
    """A prompt made of the data's fields, together with --completion, as in $'{instruction}\\n{input}'; nested fields
    are named with dots, as in {answers.text.0}."""
    completion: str = ""
    """The completion made of the data's fields, as in '{output}'; with --prompt."""
    messages: str = ""
    """The column that holds messages, or a field nested in one (data.turns)."""
    chat: ChatFlag = "auto"
    """Make prompts a user's messages and answers the assistant's, in the model's chat template. auto: on for prompts
    with completions, preferences and unpaired answers of text, if the base model is tuned for chat; texts with labels
    are put into the chat template only by on. Conversations always are."""
    labels: str = "negative,positive"
    """The label words, comma-separated, in the order of the label numbers, or the word of each value of the data, as in
    1=bad,2=bad,5=good or false=no,true=yes. Default: auto, which is negative,positive if the data's labels are these
    words or 0 and 1, else the names in a parquet file's schema, else the train split's labels themselves."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What to do with rows that cannot be read: stop with an error that counts them by reason, or skip them."""
    max_length: int | None = bounded(gt=0)
    """Maximum length of an example in tokens; longer texts are truncated inside the template, and documents are split.
    Default: the model's context length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_columns(self.columns)
        if bool(self.prompt) != bool(self.completion):
            flag, other = ("prompt", "completion") if self.prompt else ("completion", "prompt")
            example = "{answer}" if self.prompt else "{question}"
            raise InputError(f"--{flag} {getattr(self, flag)!r}: needs --{other}, as in --{other} '{example}'")
        if self.prompt and self.messages:
            raise InputError(
                f"--messages {self.messages}: messages hold prompts and answers: leave --prompt and --completion out"
            )


def parse_columns(text: str) -> dict[str, str]:
    """Column by field, from "field=column,field=column"; a layout reads the fields (`text/layouts.py`)."""
    columns: dict[str, str] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, column = map(str.strip, part.partition("="))
        if not name or not column or name in columns:
            raise InputError(
                f"--columns {part}: must be FIELD=COLUMN, each field once, as in text=sentence,label=stars"
            )
        columns[name] = column
    csv_format(columns)  # raises InputError for an unknown value
    return columns


# The command line -----------------------------------------------------------------------------------------------------


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


def parse(command: str, config: type, words: Sequence[str], positional: str = "") -> ParsedArgs:
    """Parse the words after `graft COMMAND` into `config`; a recipe given by --config fills in what they leave out.

    positional: the field that a word without dashes sets. Raises InputError.
    """
    kinds = field_types(config)
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


def help_page(command: str, config: type, positional: str = "", epilog: str = "", everything: bool = True) -> str:
    """What `graft COMMAND --help all` prints; without `everything` only the flags that the config lists in MAIN."""
    docs = docstrings(config)
    main = () if everything else getattr(config, "MAIN", ())
    if main:
        more = len(fields(config)) - len(main)
        epilog = f"{more} more flags: graft {command} --help all" + (f"\n\n{epilog}" if epilog else "")
        docs = {name: docs[name] for name in (*main, *(f.name for f in fields(CommonFlags)))}
    return _build(command, config, positional, epilog, docs).format_help()


# The parser -----------------------------------------------------------------------------------------------------------


def field_types(config: type) -> dict[str, Any]:
    """Type by field, the common flags included."""
    return {**get_type_hints(CommonFlags), **get_type_hints(config)}


def _build(
    command: str, config: type, positional: str = "", epilog: str = "", docs: Mapping[str, str] | None = None
) -> argparse.ArgumentParser:
    """The parser, of the fields in `docs`, their help texts, if given; a flag that was not typed is no attribute."""
    kinds = field_types(config)
    place = f" [{_title(positional)}]" if positional else ""
    place += "..." if positional and is_variadic(kinds[positional]) else ""
    width = get_terminal_size().columns
    parser = argparse.ArgumentParser(
        usage=f"graft {command}{place} [--flag value]...",
        description="\n".join(fill(line, width) for line in (inspect.getdoc(config) or "").split("\n")),
        epilog=epilog,
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=28),
    )
    for owner, every in by_owner(config):
        own = [f for f in every if docs is None or f.name in docs]
        if not own:
            continue
        title = (inspect.getdoc(owner) or "").partition("\n")[0].rstrip(".")
        group = parser.add_argument_group("flags" if owner is config else title)
        for f in own:
            _add_flag(group, f, kinds[f.name], (docs or {}).get(f.name, ""))
    group.add_argument("-h", "--help", action="store_true", help="Print this page and exit.")
    return parser


def _title(positional: str) -> str:
    """What the usage line calls a word without dashes."""
    runs = {"out_dir": "RUN", "folders": "RUN", "adapters": "RUN", "runs": "RUN"}
    return {**runs, "data": "SOURCE"}.get(positional, positional.upper())


def by_owner(config: type) -> Iterator[tuple[type, list["Field[Any]"]]]:
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
    rest, seen, flagged = iter(words), "", ""
    for word in rest:
        if not word.startswith("--"):
            if not positional or (seen and not is_variadic(kinds[positional])):
                raise InputError(f"unexpected {word!r}: flags begin with two dashes (see graft {command} --help)")
            seen = word
            yield f"--{positional}={word}"
            continue
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if name == "out_dir" and name not in kinds and _title(positional) == "RUN":
            name = positional
        if name not in kinds and not equals and kinds.get(name.removeprefix("no_")) is bool:
            yield f"--{name}"
        elif name not in kinds:
            if new := new_flag(name.removeprefix("no_"), kinds):
                raise InputError(f"{flag} is now {new}")
            raise InputError(f"unknown flag {flag}: {did_you_mean(name, kinds, '--')}see graft {command} --help")
        elif kinds[name] is bool:
            yield f"--{name}" if not equals or parse_value(f"--{name} {value}", value, bool) else f"--no_{name}"
        else:
            value = value if equals else _following(flag, name, next(rest, None))
            flagged = value if name == positional else flagged
            yield f"--{name}={value}"
    if seen and flagged and not is_variadic(kinds[positional]) and Path(seen) != Path(flagged):
        raise InputError(f"{seen} and --{positional} {flagged}: name the same thing twice: leave one of them out")


def _following(flag: str, name: str, word: str | None) -> str:
    """The next word as a flag's value."""
    if word is None or word.startswith("--"):
        shown = "..." if name in SECRETS else word
        tip = f" (a value that begins with dashes is written {flag}={shown})" if word else ""
        raise InputError(f"{flag} needs a value{tip}")
    return word


def docstrings(config: type) -> dict[str, str]:
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
    tables: dict[str, str] = getattr(config, "TABLES", {})
    flags = {key: value for key, value in table.items() if key not in tables}
    for key, value in flags.items() if tables else ():
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
            raise InputError(f"{file}: unknown table {key!r}: the tables are {', '.join(tables.values())}")
    return read_toml_flags(file, flags, get_type_hints(config), command)
