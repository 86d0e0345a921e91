"""`graft`: finds the subcommand, runs it, prints its result, and turns every error into one line and an exit status.

Exit status: 0 done, 1 a run failed, 2 wrong input, 130 interrupted. Only this module exits the process, and only it and
`display.py` print. Nothing heavy is imported here, so that `graft --help` answers at once.
"""

import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any

from graftlm import process
from graftlm.cli import display
from graftlm.cli.commands import COMMANDS, Command
from graftlm.cli.parser import ParsedArgs, help_page, parse, wants_debug, wants_help
from graftlm.config import renamed
from graftlm.errors import DISK_FULL, DISK_IO_ERRNOS, GraftError, InputError, unknown_name_error


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
        command = COMMANDS[name]
        print(help_page(name, command.config, command.positional, command.epilog(rest)), end="")
    else:
        _run_command(COMMANDS[name], _parse(name, rest))


def _parse(name: str, words: list[str]) -> ParsedArgs:
    """The checked flags; of several processes started by torchrun only rank 0 prints what is wrong with them."""
    try:
        for old, new in renamed.ENVIRONMENT.items():
            if old in os.environ:
                raise InputError(f"the environment variable {old} is now {new}: rename it, or unset it")
        if name != "train" and process.world_size() > 1:
            raise InputError(f"graft {name}: only graft train runs in several processes: start it without torchrun")
        return parse(name, COMMANDS[name].config, words, COMMANDS[name].positional)
    except InputError as error:
        error.told = not process.is_rank0()
        raise


def _uses_sharding(config: Any) -> bool:
    """Whether the model's weights will be sharded across ranks."""
    if process.world_size() == 1:
        return False
    flags = {"shard": config.shard, "rank": config.rank, "method": config.method}
    if config.resume:
        from graftlm.exchange.load import read_run

        try:
            recorded = read_run(Path(config.out_dir))["config"]
            flags = {key: recorded.get(key) or value for key, value in flags.items()}
        except InputError:  # `train` reports it
            return False
    return bool(flags["shard"]) or flags["rank"] == 0 or flags["method"] == "full"


def _run_command(command: Command, parsed: ParsedArgs) -> None:
    if command.uses_tensors and _uses_sharding(parsed.config):
        process.tune_malloc_release()
    elif command.uses_tensors:
        process.tune_malloc_retain()
    with _redirect_stdout(parsed):
        returned = command.run(parsed, display.stderr_console())
        result = next(returned) if isinstance(returned, Iterator) else returned
    if not process.is_rank0():
        return
    if parsed.common.json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        command.print_result(display.stdout_console(), result)
    if isinstance(returned, Iterator):
        sys.stdout.flush()  # the caller waits for this line
        with _redirect_stdout(parsed):
            for _ in returned:
                raise AssertionError("a subcommand has one result")


@contextmanager
def _redirect_stdout(parsed: ParsedArgs) -> Iterator[None]:
    """While a subcommand works: with --json stdout holds one object only, even if a library prints."""
    with redirect_stdout(sys.stderr) if parsed.common.json else nullcontext(), display.log_to_stderr():
        yield


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: graft SUBCOMMAND [--flag value]...\n\n"
        "Adapt a pretrained language model, measure it, and talk to it.\n\n"
        f"{commands}\n\n"
        "graft SUBCOMMAND --help lists its flags. Every subcommand also takes --config recipe.toml (keys are flags;\n"
        "flags on the command line win), --json (one JSON object on stdout) and --debug (tracebacks).\n"
        "graft --version prints the version."
    )


def _fail(words: Sequence[str], line: str, status: int) -> int:
    if wants_debug(words):
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
