"""Atomic writes of files, directories and symbolic links; errors of the disk as one line; file locks.

Everything is written to `.{target}.tmp-…` in the same directory, flushed to the disk and renamed: a reader sees the old
file, the new one, or none. A killed process leaves only this temporary file, whose name has its process id and machine;
the next write of the same target removes it (`cleanup_tmp`).

A lock lets one process at a time write a run folder or an entry of the cache. It is `filelock`'s (flock). The system
releases it when its process ends, even by SIGKILL, so a file left on the disk is not a stale lock. The file's content
names the owner and only serves messages. A child process that inherits the descriptor holds the lock too.
"""

import contextlib
import errno
import glob
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from graftlm.errors import DISK_FULL, DISK_IO_ERRNOS, GraftError, InputError, require_posix

if TYPE_CHECKING:
    from filelock import BaseFileLock

LOG = logging.getLogger("graftlm")  # the command prints it to stderr
NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
TMP_RE = re.compile(r"\.([^/]+)\.tmp-\d+-[0-9a-f]{12}(?=/|$)")  # a path of `_beside`
OWNER_RE = re.compile(r"\.(?:tmp|old)-(?P<process>\d{1,9})-(?P<machine>[0-9a-f]{4})[0-9a-f]{8}$")
LOCK_NAME = ".lock"
"""The lock file of a directory that is locked as a whole."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Errors of a file system without locks, such as some network file systems."""
ATTEMPTS = 20
"""To create a lock file in a directory that its last owner is removing."""


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn an OSError into one line that names `path`: InputError if the disk is full or the path is not writable.

    Raises GraftError if the disk itself fails.
    """
    try:
        yield
    except OSError as error:
        place = TMP_RE.sub(r"\1", str(path))  # the temporary directory around it no longer exists
        if error.errno in DISK_FULL:
            raise InputError(
                f"disk full: cannot write {place} ({error.strerror}): free some space or choose another folder"
            ) from error
        if error.errno in NOT_ALLOWED:
            raise InputError(
                f"cannot write {place}: {error.strerror}: choose a folder that you may write to"
            ) from error
        if error.errno in DISK_IO_ERRNOS:
            raise GraftError(f"cannot write {place}: the disk failed ({error.strerror}): look at the disk") from error
        raise


def _beside(target: Path, kind: str = "tmp") -> Path:
    """A new path in the same directory, for what will be renamed to `target`. `cleanup_tmp` removes it."""
    return target.parent / f".{target.name}.{kind}-{os.getpid()}-{_machine()}{secrets.token_hex(4)}"


@cache
def _machine() -> str:
    """Four hex digits for this machine: a process id is only valid on its own machine."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:4]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` when the block ends, and is removed when it raises."""
    temp = _beside(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        cleanup_tmp(path, only_dead_processes=True)
        try:
            with open(temp, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp, path)
            _fsync(path.parent)
        finally:
            temp.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically, with its line ends unchanged."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically. NaN raises ValueError: JSON has none."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces `target` when the block ends, and is removed when it raises.

    An existing `target` is renamed first and removed afterwards; after a kill in between, `cleanup_tmp` restores it.
    On an exception, parent directories that were created here are removed too.
    """
    temp, aside = _beside(target), _beside(target, "old")
    with disk_errors(target):
        created = [parent for parent in target.parents if not parent.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        cleanup_tmp(target, only_dead_processes=True)
        temp.mkdir()
        try:
            yield temp
            for path in sorted(temp.rglob("*"), reverse=True):
                if not path.is_symlink():
                    _fsync(path)
            _fsync(temp)
            if target.exists():
                os.rename(target, aside)
            os.rename(temp, target)
            _fsync(target.parent)
        finally:
            if aside.exists() and not target.exists():
                os.rename(aside, target)
            shutil.rmtree(temp, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)
            if not target.exists():
                with contextlib.suppress(OSError):  # another process may have written there
                    for parent in created:
                        parent.rmdir()


def check_new_folder(target: Path, flag: str) -> None:
    """Raises InputError, which names the flag, unless `target` is an empty folder or does not exist.

    A symbolic link is an error too: the folder would replace it, or be written where it points.
    """
    if target.is_symlink():
        raise InputError(f"--{flag} {target}: is a link; name the folder itself")
    if target.exists() and not target.is_dir():
        raise InputError(f"--{flag} {target}: is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"--{flag} {target}: holds other files; name a folder that is empty or does not exist")


def check_new_file(target: Path, flag: str) -> None:
    """Raises InputError, which names the flag, if `target` exists."""
    if target.is_symlink() or target.exists():
        raise InputError(f"--{flag} {target}: exists; name a file that does not")


def cleanup_tmp(target: Path, only_dead_processes: bool = False) -> None:
    """Remove what a killed process left of writing `target`, or restore the `target` that it was replacing.

    By default the caller holds a lock: no other process writes `target`. only_dead_processes: keep the files of another
    machine and of running processes.
    """
    if not target.parent.is_dir():
        return
    for path in sorted(target.parent.glob(f".{glob.escape(target.name)}.*-*")):  # .old-* before .tmp-*
        kind = path.name.removeprefix(f".{target.name}.")
        if not kind.startswith(("old-", "tmp-")) or (only_dead_processes and _may_be_running(path)):
            continue
        if kind.startswith("old-") and not target.exists():
            os.rename(path, target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _may_be_running(path: Path) -> bool:
    """Whether the process that wrote a temporary path may be running; unknown, so true, on another machine."""
    match = OWNER_RE.search(path.name)
    if match is None or match["machine"] != _machine():
        return True
    try:
        os.kill(int(match["process"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's process; not a process id
        pass
    return True


def atomic_symlink(link: Path, target_name: str) -> None:
    """Make `link` a relative symbolic link to `target_name` in the same directory, in one step."""
    temp = _beside(link)
    with disk_errors(link):
        try:
            os.symlink(target_name, temp)
            os.replace(temp, link)
            _fsync(link.parent)
        finally:
            temp.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------ locks


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
        owner = f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        with contextlib.suppress(OSError):  # the lock holds without its owner's name, on a full disk
            os.ftruncate(held[0], 0)
            os.pwrite(held[0], owner.encode(), 0)
    return lock, tuple(held)
