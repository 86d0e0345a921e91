"""The errors that a user may see. Each message is one line: what is wrong, where, and what to do.

    GraftError            a run failed                              exit status 1
    ├── InputError        a flag, a file or a value is wrong        exit status 2
    ├── Overloaded        the server's queue is full                (only in a server)
    ├── ShuttingDown      the server is stopping                    (only in a server)
    └── Interrupted       stopped by the user, everything saved     exit status 130

`cli/main.py` prints the message and exits; users of the library catch `GraftError`. Programming errors are assertions.
"""

import errno
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType, ModuleType

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DISK_IO_ERRNOS = {errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT}
"""Errors of the disk itself, not of the input."""


class GraftError(Exception):
    """A run failed: NaN loss, another rank that exited, a disk that failed. Exit status 1."""

    exit_status = 1
    told = False
    """Whether another process of the same run prints it."""


class InputError(GraftError):
    """Wrong input: a name, a flag, a file, a value. Exit status 2."""

    exit_status = 2


class Overloaded(GraftError):
    """The server's queue is full; try again later."""


class ShuttingDown(GraftError):
    """The server is stopping and accepts no new requests."""


class Interrupted(GraftError):
    """Stopped by Ctrl-C or SIGTERM, after a checkpoint. The message says how to continue. Exit status 130."""

    exit_status = 130


def require_posix(name: str) -> ModuleType:
    """A module of the standard library that Windows does not have. Raises GraftError if it is missing.

    Called where the module is used, so that graftlm can be imported on Windows.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise GraftError(
            f"this system lacks what graft needs here (Python's module {name!r}): on Windows, run graft within WSL"
        ) from None


def unknown_name_error(what: str, given: str, known: Iterable[str]) -> InputError:
    """An error for an unknown name: the closest known name first, then all of them."""
    names = list(known)
    return InputError(f"unknown {what} {given!r}: {did_you_mean(given, names)}known are {', '.join(names)}")


def did_you_mean(given: str, known: Iterable[str], dashes: str | None = None) -> str:
    """A question with the closest known name, or "". The name is quoted, or follows `dashes` (a flag or a key)."""
    from difflib import get_close_matches  # here, so that `graft --help` does not wait for it

    found = get_close_matches(given, list(known), n=1)
    return f"did you mean {repr(found[0]) if dashes is None else dashes + found[0]}? " if found else ""


@contextmanager
def stop_on_signal(patient: bool = False) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one interrupts at once.

    With `patient` a second one is ignored: torchrun forwards a Ctrl-C that each of its processes has received already,
    and kills them itself when they take too long.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and not patient:
            raise KeyboardInterrupt
        stop.set()

    # Signals that the caller ignores (nohup, a background job) stay ignored.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
