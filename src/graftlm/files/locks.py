"""File locks: one process at a time writes a run folder or an entry of the cache.

The lock is `filelock`'s (flock). The system releases it when its process ends, even by SIGKILL, so a file left on the
disk is not a stale lock. The file's content names the owner and only serves messages. A child process that inherits
the descriptor holds the lock too.
"""

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from graftlm.errors import InputError, require_posix
from graftlm.files.atomic import disk_errors

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOG = logging.getLogger("graftlm")  # the command prints it to stderr
LOCK_NAME = ".lock"
"""The lock file of a directory that is locked as a whole."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Errors of a file system without locks, such as some network file systems."""
ATTEMPTS = 20
"""To create a lock file in a directory that its last owner is removing."""


@contextlib.contextmanager
def lock_dir(directory: Path, timeout: float = 0.0, keep: bool = False) -> Iterator[tuple[int, ...]]:
    """Hold the lock of --out_dir `directory`, which is created if needed; yields its descriptor, for `pass_fds`.

    Args:
        directory: the folder of a run or a comparison.
        timeout: seconds to wait for the current owner.
        keep: leave the lock file there. By default it is removed, and so are directories created here that are empty.

    Raises InputError, having changed nothing, if another process holds the lock.
    """
    from filelock import Timeout

    if directory.is_file():
        raise InputError(f"--out_dir {directory}: is a file; name a folder")
    created = [path for path in (directory, *directory.parents) if not path.exists()]
    path = directory / LOCK_NAME
    try:
        lock, descriptors = _acquire(path, timeout)
    except Timeout:
        owner = lock_owner(path) or "pid unknown"
        raise InputError(
            f"--out_dir {directory} is locked by another graft process ({owner}); wait, or choose another folder"
        ) from None
    try:
        yield descriptors
    finally:
        if not keep:
            path.unlink(missing_ok=True)  # filelock refuses an unlinked file: no other process can hold this one
            with contextlib.suppress(OSError):  # not empty
                for each in created:
                    each.rmdir()
        lock.release()


@contextlib.contextmanager
def lock_file(path: Path, purpose: str) -> Iterator[None]:
    """Hold the lock `path`, a file of the cache that stays; waits for its owner. `purpose`: "unpacking x"."""
    from filelock import Timeout

    try:
        lock, _ = _acquire(path, 0.0)
    except Timeout:
        LOG.info(f"another process is {purpose}: waiting for it")
        lock, _ = _acquire(path, -1)
    try:
        yield
    finally:
        lock.release()


def lock_owner(path: Path) -> str:
    """The process that holds a lock, such as "pid 123 on host, since …"; "" if none does."""
    require_posix("fcntl")
    from filelock import lock_descriptor

    try:
        with open(path, "rb") as file:
            owner = file.read(300).decode("utf-8", errors="replace").strip()
            return "" if lock_descriptor(file.fileno(), blocking=False) else owner or "pid unknown"
    except OSError:  # no file, or a file system without locks
        return ""


def _acquire(path: Path, timeout: float) -> "tuple[BaseFileLock, tuple[int, ...]]":
    """The held lock and its descriptor, or no descriptor on a file system without locks. Raises filelock.Timeout."""
    require_posix("fcntl")
    from filelock import FileLock

    held: list[int] = []
    lock = FileLock(path, timeout=timeout, on_acquired=held.append)
    with disk_errors(path.parent):
        for attempt in range(ATTEMPTS):
            try:
                lock.acquire()
                break
            except (FileExistsError, FileNotFoundError):
                if attempt == ATTEMPTS - 1:
                    raise
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                LOG.info(f"{path.parent}: the file system has no locks: make sure that no other process writes there")
                break
    if held:
        _write_owner(held[0])
    return lock, tuple(held)


def _write_owner(descriptor: int) -> None:
    """Name this process in the lock file. A full disk is no error here: the lock holds without."""
    owner = f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode(), 0)
