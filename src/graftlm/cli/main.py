"""`graft`: finds the subcommand, runs it, prints its result, and turns every error into one line and an exit status.

Exit status: 0 done, 1 a run failed, 2 wrong input, 130 interrupted. Only this module exits the process, and only it,
`chat.py` and `display.py` print. Nothing heavy is imported here, so that `graft --help` answers at once.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from graftlm.cli import display
from graftlm.cli.evaluate import check_run_flags, evaluate, generate, ray_log_level
from graftlm.config import (
    ChatConfig,
    CompareConfig,
    CompletionConfig,
    DataConfig,
    DownloadConfig,
    EstimateConfig,
    EvaluateConfig,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    PairsConfig,
    PromptConfig,
    ReportConfig,
    ServeConfig,
    TrainConfig,
    renamed,
)
from graftlm.errors import (
    DISK_FULL,
    DISK_IO_ERRNOS,
    GraftError,
    InputError,
    unknown_name_error,
)

if TYPE_CHECKING:
    from rich.console import Console

    from graftlm.config.flags import ParsedArgs

Result = dict[str, Any]

BEGAN: float | None = None
"""time.perf_counter() when the command began; None if it was not started by `main` in __main__.py."""

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_MMAP_MAX = -4


def run(words: Sequence[str]) -> int:
    """Run the command line after `graft`; returns the exit status. Exceptions that are not GraftErrors pass through."""
    try:
        _dispatch(list(words))
        sys.stdout.flush()  # here, so that a closed pipe is noticed here
        return 0
    except GraftError as error:
        return error.exit_status if error.told else _fail(words, str(error), error.exit_status)
    except KeyboardInterrupt:
        return _fail(words, "interrupted", 130)
    except BrokenPipeError:  # the reader has closed the pipe, as in `graft --help | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, RuntimeError) as error:
        from graftlm.files.memory import is_out_of_memory, out_of_memory_error

        if not is_out_of_memory(error):
            raise
        return _fail(words, str(out_of_memory_error(f"graft {words[0]}")), 1)
    except OSError as error:
        if error.errno in DISK_FULL:
            return _fail(words, f"disk full: {error.filename or 'the output'} could not be written", 2)
        if error.filename is None and error.errno not in DISK_IO_ERRNOS:
            raise
        place, what = error.filename or "a file", (error.strerror or str(error)).lower()
        return _fail(words, f"{place}: {what}", 1 if error.errno in DISK_IO_ERRNOS else 2)


def _dispatch(words: list[str]) -> None:
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("--help", "-h", "help"):
        print(_overview())
    elif name == "--version":
        from graftlm import __version__

        print(f"graft {__version__}")
    elif name.startswith("-"):
        raise InputError(f"{name}: a subcommand comes first: graft {' | '.join(COMMANDS)} (see graft --help)")
    elif name in renamed.COMMANDS:
        raise InputError(f"graft {name} is now graft {renamed.COMMANDS[name]}")
    elif name not in COMMANDS:
        raise unknown_name_error("subcommand", name, COMMANDS)
    elif wants_help(rest):
        from graftlm.config.flags import help_page

        command, everything = COMMANDS[name], rest[-1] == "all"
        print(help_page(name, command.config, command.positional, command.epilog(rest), everything), end="")
    else:
        _run_command(COMMANDS[name], _parse(name, rest))


def _parse(name: str, words: list[str]) -> "ParsedArgs":
    """The checked flags; of several processes started by torchrun only rank 0 prints what is wrong with them."""
    from graftlm.config.flags import parse

    try:
        for old, new in renamed.ENVIRONMENT.items():
            if old in os.environ:
                raise InputError(f"the environment variable {old} is now {new}: rename it, or unset it")
        if name != "train" and world_size() > 1:
            raise InputError(f"graft {name}: only graft train runs in several processes: start it without torchrun")
        return parse(name, COMMANDS[name].config, words, COMMANDS[name].positional)
    except InputError as error:
        error.told = not is_rank0()
        raise


def _uses_sharding(config: Any) -> bool:
    """Whether the model's weights will be sharded across ranks."""
    if world_size() == 1:
        return False
    flags = {"shard": config.shard, "rank": config.rank, "method": config.method}
    if config.resume:
        from graftlm.exchange.runs import read_run

        try:
            recorded = read_run(Path(config.out_dir))["config"]
            flags = {key: recorded.get(key) or value for key, value in flags.items()}
        except InputError:  # `train` reports it
            return False
    return bool(flags["shard"]) or flags["rank"] == 0 or flags["method"] == "full"


def _run_command(command: "Command", parsed: "ParsedArgs") -> None:
    if command.uses_tensors and _uses_sharding(parsed.config):
        tune_malloc_release()
    elif command.uses_tensors:
        tune_malloc_retain()
    notes = display.stderr_console()
    if command.uses_tensors and is_rank0() and notes.is_terminal:  # importing torch and reading weights take seconds
        notes.print(f"loading {_model_name(parsed)}…", markup=False)
    with _redirect_stdout(parsed):
        returned = command.run(parsed, notes)
        result = next(returned) if isinstance(returned, Iterator) else returned
    if not is_rank0():
        return
    if parsed.common.json:
        import json

        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        command.print_result(display.stdout_console(), result)
    if isinstance(returned, Iterator):
        sys.stdout.flush()  # the caller waits for this line
        with _redirect_stdout(parsed):
            for _ in returned:
                raise AssertionError("a subcommand has one result")


def _model_name(parsed: "ParsedArgs") -> str:
    """What a subcommand will load, as its flags name it: a base, a run or an adapter."""
    config, given = parsed.config, parsed.explicit
    of_run = getattr(config, "resume", "out_dir" in given and "init_from" not in given)
    if not of_run and (base := getattr(config, "init_from", "")) not in ("", "resume"):
        return str(base)
    names = (getattr(config, field, "") for field in ("adapters", "runs", "folder", "out_dir"))
    found = next(filter(None, names), "the model")
    return ", ".join(found) if isinstance(found, tuple) else str(found)


@contextmanager
def _redirect_stdout(parsed: "ParsedArgs") -> Iterator[None]:
    """While a subcommand works: with --json stdout holds one object only, even if a library prints."""
    with redirect_stdout(sys.stderr) if parsed.common.json else nullcontext(), display.log_to_stderr():
        yield


def _overview() -> str:
    from shutil import get_terminal_size
    from textwrap import fill

    width, indent = max(map(len, COMMANDS)), " " * (max(map(len, COMMANDS)) + 4)
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    commands = "\n".join(fill(line, get_terminal_size().columns, subsequent_indent=indent) for line in lines)
    return (
        "usage: graft SUBCOMMAND [--flag value]...\n\n"
        "Adapt a pretrained language model, measure it, and talk to it.\n\n"
        f"{commands}\n\n"
        "graft SUBCOMMAND --help lists its main flags, --help all every flag. Every\n"
        "subcommand also takes --config recipe.toml (keys are flags; flags on the command\n"
        "line win), --json (one JSON object on stdout) and --debug (tracebacks).\n"
        "graft --version prints the version."
    )


def _fail(words: Sequence[str], line: str, status: int) -> int:
    if wants_debug(words):
        import traceback

        traceback.print_exc()
    print(f"graft: {' '.join(line.split())}", file=sys.stderr)
    return status


def internal_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line for an exception that is a defect of graftlm, instead of a traceback (see `__main__.py`)."""
    if issubclass(kind, KeyboardInterrupt):  # outside of `run`, at the very start or end
        print("graft: interrupted", file=sys.stderr)
        return
    what = " ".join(f"{kind.__name__}: {error}".split())
    print(f"graft: internal error: {what} (run again with --debug for the traceback)", file=sys.stderr)


def wants_help(words: Sequence[str]) -> bool:
    """Whether a help page is asked for, at any position."""
    return "--help" in words or "-h" in words


def wants_debug(words: Sequence[str]) -> bool:
    """Whether tracebacks are asked for; also known when the command line cannot be parsed."""
    return any(word in ("--debug", "--debug=true") for word in words)


# Ranks and the allocator ----------------------------------------------------------------------------------------------


def world_size() -> int:
    """torchrun's world size; 1 without torchrun."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() else 1


def is_rank0() -> bool:
    """Whether this is the rank that prints results."""
    return os.environ.get("RANK", "0") == "0"


def tune_malloc_retain() -> bool:
    """Make glibc keep freed memory for reuse; True if it accepted.

    By default glibc maps every large block anew and unmaps it when it is freed, so each large tensor costs page faults
    in every step: half the time of a training step that computes logits for a whole batch. Without mapped blocks
    (M_MMAP_MAX 0) and without trimming (M_TRIM_THRESHOLD -1, the maximum) touched memory is reused.
    THP_MEM_ALLOC_ENABLE lets PyTorch ask for huge pages. All of this must precede the first large allocation. mallopt
    returns 1 for a setting that it accepts.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return _agrees((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))


def tune_malloc_release() -> bool:
    """Make glibc return freed blocks of at least 1 MiB to the kernel at once; True if it accepted.

    For sharded weights: the weights of each block are gathered and freed again. If glibc retained them, activations
    would fragment that memory, and the next block's weights would not fit: in the end the fragments are as large as
    the model. glibc's default threshold grows with the blocks that are freed and has the same effect.
    """
    return _agrees((M_MMAP_THRESHOLD, 1 << 20))


def _agrees(*settings: tuple[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):  # musl has neither the trouble nor the knobs
        return False
    return all(libc.mallopt(knob, value) == 1 for knob, value in settings)


# Subcommands ----------------------------------------------------------------------------------------------------------


def _train(parsed: "ParsedArgs", notes: "Console") -> Result:
    from graftlm.training.train import train

    return train(parsed.config, given=parsed.explicit, console=notes, started=BEGAN)


def _chat(parsed: "ParsedArgs", notes: "Console") -> Result:
    from graftlm.cli.chat import chat

    return chat(parsed.config, notes)


def _prompt(parsed: "ParsedArgs", notes: "Console") -> Result:
    from graftlm.inference.prompting import prompt

    config = check_run_flags(parsed, notes)
    return prompt(config, partial(notes.print, markup=False), partial(display.progress, notes))


def _pairs(parsed: "ParsedArgs", notes: "Console") -> Result:
    from graftlm.inference.pairs import make_preferences

    config = check_run_flags(parsed, notes)
    return make_preferences(config, partial(notes.print, markup=False), partial(display.progress, notes))


def _compare(parsed: "ParsedArgs", notes: "Console") -> Result:
    from graftlm.studies.compare import compare

    return compare(parsed.config, parsed.common.config, notes, ray_log_level(parsed))


def _report(parsed: "ParsedArgs", notes: "Console") -> Result:
    import webbrowser

    from graftlm.studies.report import report

    result = report(parsed.config)
    page = Path(result["path"]).resolve().as_uri()
    if parsed.config.open and not webbrowser.open(page):
        notes.print(f"--open: found no browser; open {page} yourself", markup=False)
    return result


def _estimate(parsed: "ParsedArgs", notes: "Console") -> Result:
    from graftlm.studies.cost_report import estimate

    return estimate(parsed.config, parsed.explicit)


def _data(parsed: "ParsedArgs", notes: "Console") -> Result:
    from graftlm.training.data_report import describe_data

    result = describe_data(parsed.config, parsed.explicit)
    for note in result["notes"]:
        notes.print(note, markup=False)
    return result


def _export(parsed: "ParsedArgs", notes: "Console") -> Result:
    from graftlm.exchange.export import export

    return export(parsed.config, partial(notes.print, markup=False))


def _import(parsed: "ParsedArgs", notes: "Console") -> Result:
    from graftlm.exchange.import_adapter import import_adapter

    return import_adapter(parsed.config, partial(notes.print, markup=False))


def _serve(parsed: "ParsedArgs", notes: "Console") -> Iterator[Result]:
    from graftlm.serving.server import serve

    return serve(parsed.config, partial(notes.print, markup=False))


def _download(parsed: "ParsedArgs", notes: "Console") -> Result:
    from graftlm.files.assets import download

    return {"name": parsed.config.name, "path": str(download(parsed.config.name))}


def _completion(parsed: "ParsedArgs", notes: "Console") -> Result:
    from graftlm.cli.completion import script

    commands = {name: (command.config, command.positional, command.summary) for name, command in COMMANDS.items()}
    return {"shell": parsed.config.shell, "script": script(parsed.config.shell, commands)}


def _methods_help(words: Sequence[str]) -> str:
    """The methods for the help page: with --method its flags and defaults, else a line for each, without torch."""
    from textwrap import fill

    from graftlm.config.flags import parse
    from graftlm.config.training import method_titles

    with suppress(InputError):
        parsed = parse("train", TrainConfig, [word for word in words if word not in ("-h", "--help", "all")])
        if "method" in parsed.explicit:
            from graftlm.methods import describe

            return describe(parsed.config.method)
    lines = ["methods (graft train --method NAME --help shows one with its defaults):"]
    for name, title in method_titles().items():
        lines.append(fill(f"{name:<8} {title}", 78, initial_indent="  ", subsequent_indent=" " * 11))
    return "\n".join(lines)


@dataclass(frozen=True)
class Command:
    """A subcommand: its flags, what runs it, and how its result is printed."""

    config: type
    run: Callable[["ParsedArgs", "Console"], Result | Iterator[Result]]
    print_result: Callable[["Console", Result], None]
    positional: str = ""
    """The field that a word without dashes sets; several words where the field holds several."""
    uses_tensors: bool = True
    """Whether it works with large tensors, so that the allocator should be tuned for them."""
    epilog: Callable[[Sequence[str]], str] = lambda words: ""
    """The end of its help page, by the words of the command line."""

    @property
    def summary(self) -> str:
        """The first line of the config's docstring."""
        return (self.config.__doc__ or "").partition("\n")[0]


COMMANDS = {
    "train": Command(TrainConfig, _train, display.train, epilog=_methods_help),
    "generate": Command(GenerateConfig, generate, display.generate, positional="out_dir"),
    "chat": Command(ChatConfig, _chat, display.chat, positional="runs"),
    "evaluate": Command(EvaluateConfig, evaluate, display.evaluate, positional="out_dir"),
    "prompt": Command(PromptConfig, _prompt, display.prompt),
    "pairs": Command(PairsConfig, _pairs, display.pairs, positional="prompts"),
    "compare": Command(CompareConfig, _compare, display.compare, uses_tensors=False),
    "report": Command(ReportConfig, _report, display.path, positional="folders", uses_tensors=False),
    "serve": Command(ServeConfig, _serve, display.serve, positional="adapters"),
    "estimate": Command(EstimateConfig, _estimate, display.estimate, uses_tensors=False, epilog=_methods_help),
    "data": Command(DataConfig, _data, display.data, positional="data", uses_tensors=False),
    "export": Command(ExportConfig, _export, display.export, positional="out_dir"),
    "import": Command(ImportConfig, _import, display.export, positional="folder"),
    "download": Command(DownloadConfig, _download, display.path, positional="name", uses_tensors=False),
    "completion": Command(CompletionConfig, _completion, display.script, positional="shell", uses_tensors=False),
}
