"""The command `graft`: words -> a verb of `verbs.py`. Alone in exiting the process; only `render.py` prints beside it.

What is unusual here: the verbs are dispatched by hand, and nothing heavy is imported, so that `graft --help` answers at
once.

Exit status: 0 done, 1 a run failed, 2 wrong input, 130 interrupted. A mistake is one line on the standard error.
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

from graftlm import process, render
from graftlm.config import MethodFlags
from graftlm.errors import DISK_FULL, FAILING, GraftError, InputError, unknown
from graftlm.flags import Parsed, parse, show_help, wants_debug, wants_help
from graftlm.verbs import VERBS, Verb


def run(words: Sequence[str]) -> int:
    """Do what the words behind `graft` say; the exit status. Whatever is no GraftError passes through."""
    try:
        status = _dispatch(list(words))
        sys.stdout.flush()  # here, so that a closed pipe is met here
        return status
    except GraftError as error:
        return error.exit_status if error.told else _fail(words, str(error), error.exit_status)
    except KeyboardInterrupt:
        return _fail(words, "interrupted", 130)
    except BrokenPipeError:  # the reader has left, as in `graft --help | head -1`: no one to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno in DISK_FULL:
            return _fail(words, f"disk full: {error.filename or 'the output'} could not be written", 2)
        if error.filename is None and error.errno not in FAILING:
            raise
        place, what = error.filename or "a file", (error.strerror or str(error)).lower()
        return _fail(words, f"{place}: {what}", 1 if error.errno in FAILING else 2)


def _dispatch(words: list[str]) -> int:
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("--help", "-h", "help"):
        print(_help())
        return 0
    if name == "--version":
        from graftlm import __version__

        print(f"graft {__version__}")
        return 0
    if name.startswith("-"):
        raise InputError(f"{name}: a verb comes first: graft {' | '.join(VERBS)} (see graft --help)")
    if name not in VERBS:
        raise unknown("verb", name, VERBS)
    verb = VERBS[name]
    if wants_help(rest):
        from graftlm.catalogue import overview

        show_help(name, verb.config, overview() if issubclass(verb.config, MethodFlags) else "")
        return 0
    if name != "train" and process.processes() > 1:
        raise _once(InputError(f"graft {name}: only graft train runs in several processes: start it without torchrun"))
    try:
        parsed = parse(name, verb.config, rest, verb.positional)
    except InputError as error:
        raise _once(error) from None
    _run_verb(verb, parsed)
    return 0


def _once(error: GraftError) -> GraftError:
    """An error that every process of a run meets, for one to print."""
    error.told = not process.speaks()
    return error


def _cuts_weights(config: Any) -> bool:
    """Whether this is one of several processes over which a model's weights are cut."""
    if process.processes() == 1:
        return False
    said = {"shard": config.shard, "rank": config.rank, "method": config.method}
    if config.resume:
        from graftlm.exchange.load import read_run

        try:
            recorded = read_run(Path(config.out_dir))["config"]
            said = {key: recorded.get(key) or value for key, value in said.items()}
        except InputError:  # `train` tells it
            return False
    return bool(said["shard"]) or said["rank"] == 0 or said["method"] == "full"


def _run_verb(verb: Verb, parsed: Parsed) -> None:
    if verb.computes and _cuts_weights(parsed.config):
        process.give_back_large()
    elif verb.computes:
        process.keep_memory()
    with _libraries(parsed):
        found = verb.run(parsed, render.notes())
        result = next(found) if isinstance(found, Iterator) else found
    if not process.speaks():
        return
    if parsed.every.json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        verb.show(render.screen(), result)
    if isinstance(found, Iterator):
        sys.stdout.flush()  # whoever started it waits for this
        with _libraries(parsed):
            for _ in found:
                raise AssertionError("a verb has one result")


@contextmanager
def _libraries(parsed: Parsed) -> Iterator[None]:
    """While a verb works. With --json the standard output is one object, whatever a library down the line may print."""
    with redirect_stdout(sys.stderr) if parsed.every.json else nullcontext(), render.library_notes():
        yield


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        "usage: graft VERB [--flag value]...\n\n"
        "Adapt a pretrained language model, measure it, and talk to it.\n\n"
        f"{verbs}\n\n"
        "graft VERB --help lists a verb's flags. Every verb also takes --config recipe.toml (keys are flags; flags\n"
        "given beside it win), --json (one JSON object on the standard output) and --debug (tracebacks).\n"
        "graft --version prints the version."
    )


def _fail(words: Sequence[str], line: str, status: int) -> int:
    if wants_debug(words):
        traceback.print_exc()
    print(f"graft: {' '.join(line.split())}", file=sys.stderr)
    return status


def internal_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The process's last word on an exception nobody expected, instead of a traceback (see `__main__.py`)."""
    if issubclass(kind, KeyboardInterrupt):  # so early or so late that `run` was not there to see it
        print("graft: interrupted", file=sys.stderr)
        return
    what = " ".join(f"{kind.__name__}: {error}".split())
    print(f"graft: internal error: {what} (run again with --debug for the traceback)", file=sys.stderr)
