"""The errors a user may meet. Each is one line: what is wrong, where, and what to do.

    GraftError            a run failed                          exit status 1
    ├── InputError        what was typed or given is wrong      exit status 2
    ├── Busy              a server has too much to do           (never of a command)
    ├── Closed            a server that is going away           (never of a command)
    └── Interrupted       stopped by the user, all saved        exit status 130

`cli/main.py` prints the line and exits; a library caller catches `GraftError` for both. Mistakes only a
programmer can make are assertions instead.
"""

import errno
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DISK_IO_ERRNOS = {errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT}
"""What an OSError's number says of a disk, and of no input."""


class GraftError(Exception):
    """A run failed: NaN loss, a peer that broke, a disk that vanished. One line, exit status 1."""

    exit_status = 1
    told = False
    """Whether another process of the same run prints it."""


class InputError(GraftError):
    """Wrong input: a name, a flag, a file, a value. One line, exit status 2."""

    exit_status = 2


class Overloaded(GraftError):
    """A server has as many requests waiting as it takes; ask again later."""


class ShuttingDown(GraftError):
    """A server takes no new requests: it is going away."""


class Interrupted(GraftError):
    """Stopped by Ctrl-C or SIGTERM, after a checkpoint. One line that says how to go on, exit status 130."""

    exit_status = 130


def require_posix(name: str) -> ModuleType:
    """A module of Python's own library that Windows does not have. Raises GraftError where it is missing.

    Asked for where it is used and not at the top of a file: there graftlm could not even be imported without it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise GraftError(
            f"this system lacks what graft needs here (Python's module {name!r}): on Windows, run graft within WSL"
        ) from None


def unknown_name_error(what: str, given: str, known: Iterable[str]) -> InputError:
    """An error for a name that matches nothing: the nearest name first, then all of them."""
    names = list(known)
    return InputError(f"unknown {what} {given!r}: {did_you_mean(given, names)}known are {', '.join(names)}")


def did_you_mean(given: str, known: Iterable[str], dashes: str | None = None) -> str:
    """A question with the nearest known name, or nothing; quoted, or as a flag or key behind its `dashes`."""
    found = get_close_matches(given, list(known), n=1)
    return f"did you mean {repr(found[0]) if dashes is None else dashes + found[0]}? " if found else ""
