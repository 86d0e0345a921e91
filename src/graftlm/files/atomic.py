"""Files, folders and links that are there whole or not at all, and what a disk that refuses says to the user.

What is unusual here: everything is written beside its target under a name `.{target}.tmp-…`, flushed to the disk and
renamed, so that a reader sees the old file, the new one, or none. A killed process leaves only a temp, which tells the
machine and the process that made it, and goes when the same is written again (`cleanup_tmp`).
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from graftlm.errors import DISK_FULL, DISK_IO_ERRNOS, GraftError, InputError

NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
TMP_RE = re.compile(r"\.([^/]+)\.tmp-\d+-[0-9a-f]{12}(?=/|$)")  # what `tmp_path_for` makes of a name
MAKER = re.compile(r"\.(?:tmp|old)-(?P<process>\d{1,9})-(?P<machine>[0-9a-f]{4})[0-9a-f]{8}$")


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turn a full disk, or a place that may not be written, into one `InputError` line that names `path`.

    A disk that fails is no input of the user's: a `GraftError`.
    """
    try:
        yield
    except OSError as error:
        place = TMP_RE.sub(r"\1", str(path))  # the temp that it stands in is gone when the line is read
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


def tmp_path_for(target: Path) -> Path:
    """A name beside `target` for what is still being made; `cleanup_tmp` knows it."""
    return _beside(target, "tmp")


def _beside(target: Path, kind: str) -> Path:
    return target.parent / f".{target.name}.{kind}-{os.getpid()}-{_machine()}{secrets.token_hex(4)}"


@cache
def _machine() -> str:
    """Four letters for this machine: a process's number means something on its own machine only."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:4]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the place of `path` when the block ends, and vanishes when it raises."""
    path = Path(path)
    temp = tmp_path_for(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        cleanup_tmp(path, dead=True)
        try:
            with open(temp, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp, path)
            _fsync(path.parent)
        finally:
            temp.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8, atomically; line ends stay as they are."""
    with atomic_write(Path(path)) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path | str, obj: Any) -> None:
    """Write `obj` as indented JSON (NaN is refused: it would not be JSON), atomically."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_directory(target: Path | str) -> Iterator[Path]:
    """Yield a temp folder beside `target`; flush and rename it there on success, remove it on any exception.

    Parents that had to be made for it go with it.
    An existing `target` is moved aside first and removed after; killed in between, `cleanup_tmp` puts it back.
    """
    target = Path(target)
    temp, aside = tmp_path_for(target), _beside(target, "old")
    with disk_errors(target):
        made = [parent for parent in target.parents if not parent.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        cleanup_tmp(target, dead=True)
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
                with contextlib.suppress(OSError):  # another process may have put something there
                    for parent in made:
                        parent.rmdir()


def check_new_folder(target: Path | str, flag: str) -> None:
    """An InputError, which names the flag, unless `target` can become a folder: it is an empty one, or is not there.

    A link is refused, wherever it leads: the folder would take its place, or land where nobody looks.
    """
    target = Path(target)
    if target.is_symlink():
        raise InputError(f"--{flag} {target}: is a link; name the folder itself")
    if target.exists() and not target.is_dir():
        raise InputError(f"--{flag} {target}: is a file; name a folder")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"--{flag} {target}: holds other files; name a folder that is empty or does not exist")


def cleanup_tmp(target: Path | str, dead: bool = False) -> None:
    """Clean up what a killed process left while writing `target`.

    dead: only what was made on this machine by a process that is no more. Without, whatever there is: call it so only
    when no other process can write it.
    """
    target = Path(target)
    if not target.parent.is_dir():
        return
    name = glob_escape(target.name)
    for old in sorted(target.parent.glob(f".{name}.old-*")):
        if dead and _at_work(old):
            continue
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, target)
    for temp in target.parent.glob(f".{name}.tmp-*"):
        if dead and _at_work(temp):
            continue
        if temp.is_dir() and not temp.is_symlink():
            shutil.rmtree(temp, ignore_errors=True)
        else:
            temp.unlink(missing_ok=True)


def _at_work(temp: Path) -> bool:
    """Whether the process that made it may still be there: on another machine nobody knows."""
    match = MAKER.search(temp.name)
    if match is None or match["machine"] != _machine():
        return True
    try:
        os.kill(int(match["process"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's; no number of a process
        return True
    return True


def glob_escape(name: str) -> str:
    """`name` with the characters that mean something to glob taken literally."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def atomic_symlink(link: Path | str, target_name: str) -> None:
    """Make `link` a relative symbolic link to its sibling `target_name`, swapped in one step."""
    link = Path(link)
    temp = tmp_path_for(link)
    with disk_errors(link):
        try:
            os.symlink(target_name, temp)
            os.replace(temp, link)
            _fsync(link.parent)
        finally:
            temp.unlink(missing_ok=True)
