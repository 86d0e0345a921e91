"""One process at a time on a folder: a lock that ends with the process, however it ends.

What is unusual here: the lock is the system's (flock), held on a file that stays open, so a file that a killed process
left behind is no obstacle and is never asked how old it is. What stands in the file is only for the line that another
process is shown: which process holds it, and since when. A child that inherits the descriptor holds the lock too.
"""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from graftlm.errors import InputError, posix_module
from graftlm.files.atomic import disk_errors
from graftlm.files.wheels import note

NAME = ".lock"
"""The lock's file in a folder that is locked as a whole."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What a file system answers that has no locks, as some of a network are."""


@contextlib.contextmanager
def alone_in(folder: Path, what: str, wait: float = 0.0, keep: bool = False) -> Iterator[int]:
    """Hold the lock of `folder`, which is made if need be; yields its file's descriptor.

    Args:
        folder: the run or comparison that `what` ("graft train") writes.
        wait: seconds that another process may take to end.
        keep: leave the lock's file there afterwards; else it goes, and so do folders made here that are still empty.

    Raises InputError, having touched nothing, when another process holds it.
    """
    if folder.is_file():  # one look: whoever had the lock may take the folder away between two
        raise InputError(f"--out_dir {folder}: is a file; name a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path = folder / NAME
    with disk_errors(folder):
        file = _taken(path, time.monotonic() + wait)
    if file is None:
        raise InputError(
            f"--out_dir {folder}: another process is at work there ({held_by(path) or 'it does not say which'}); wait "
            "for it to end, or name another folder"
        )
    with file:
        _sign(file, what)
        try:
            yield file.fileno()
        finally:
            if not keep:
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # what holds something stays
                    for each in made:
                        each.rmdir()


@contextlib.contextmanager
def one_at_a_time(path: Path, what: str) -> Iterator[None]:
    """Hold the lock `path`, a file of the cache that stays, waiting for whoever has it; `what` it does, in words."""
    with disk_errors(path):
        file = _taken(path, time.monotonic())
    if file is None:
        note(f"another process is {what}: waiting for it")
        with disk_errors(path):
            file = _taken(path, None)
    assert file is not None, "without an end there is no giving up"
    with file:
        _sign(file, what)
        yield


def held_by(path: Path) -> str:
    """Which process holds a lock, as it has signed itself; empty where none does."""
    fcntl = posix_module("fcntl")
    try:
        with open(path, "rb") as file:
            signed = file.read(300).decode("utf-8", errors="replace").strip()
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return signed or "it has not said which yet"
    except OSError:  # no file, or a file system without locks
        return ""
    return ""


def _taken(path: Path, until: float | None) -> FileIO | None:
    """The lock's file, locked; None if another process has it until then (None: for ever)."""
    fcntl = posix_module("fcntl")
    while True:
        file = _opened(path)  # the caller's to close: it is the lock
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if until is not None else 0))
            if _is(file, path):
                return file
            file.close()  # whoever had it took its file away: the next one counts
        except BlockingIOError:
            file.close()
            if until is None or time.monotonic() >= until:
                return None
            time.sleep(0.1)
        except OSError as error:
            if error.errno in NO_LOCKS:
                note(f"{path.parent}: the file system has no locks: see to it that no other process writes there")
                return file
            file.close()
            raise


def _opened(path: Path) -> FileIO:
    """A lock's file, and the folder it is in: whoever had it may take either away between any two calls."""
    for left in reversed(range(100)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return FileIO(path, "a")
        except (FileExistsError, FileNotFoundError):  # mkdir looks again whether it is a folder; or it went behind that
            if not left:
                raise
    raise AssertionError("the last try returns or raises")


def _is(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _sign(file: FileIO, what: str) -> None:
    """Say who has it; a disk too full for a line is no reason to stop: the lock holds without."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError):
        file.truncate(0)
        file.write(f"{what}, process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
