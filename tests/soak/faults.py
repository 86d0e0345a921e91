"""Faults at the calls by which a process changes a disk: a kill before, in the middle of or after the Nth of them, or
an error of the disk instead of it.

What is unusual here: no tool of the system is needed and the product knows nothing of it. A launcher (`forks.py`)
installs a `Faults` in a process that it has just forked; from then on every call of this module's list that concerns
the watched folder is counted: of the `os` module, and each write(2) of a Python file, for which `open` gives a file
whose raw layer is ours. What goes into a memory-mapped file makes no call, so the store of frozen layers, the one place
that has such a file, is met at the function that fills it, and "half" leaves half of what it filled.
"""

import builtins
import errno
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

PHASES = ("before", "half", "after")
CREATING = os.O_CREAT | os.O_TRUNC
# A disk that is full still lets go of files; one that is read-only, or broken, does not.
FREE_WHEN_FULL = {"unlink", "rmdir"}
FULL = {errno.ENOSPC, errno.EDQUOT}
ONE_PATH = ("mkdir", "unlink", "remove", "rmdir", "truncate", "utime", "chmod")
TWO_PATHS = ("rename", "replace", "link")
BY_DESCRIPTOR = ("fsync", "fdatasync", "ftruncate", "posix_fallocate", "write", "sendfile")


@dataclass(frozen=True)
class Fault:
    """What shall happen, as a launcher is told in JSON."""

    under: str
    """The folder whose changes are counted."""
    at: int = 0
    """The number of the call, from 1; 0: none, they are only counted."""
    phase: str = "before"
    """When a kill comes: before the call, in the middle (of a write: half of it is done), or after it."""
    error: int = 0
    """An errno: the call fails with it, instead of a kill; of a write in the phase "half" the first half is done."""
    lasting: bool = False
    """Whether every later call fails too (a disk that stays full), or only this one."""
    seconds: float = 0.0
    """How long every call takes more than it would: a slow disk."""
    counted: str = ""
    """A file that is given the name of every call, a line each."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


class Faults:
    """Counts the calls and brings the fault."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.count = fault, 0
        self.under = os.path.abspath(fault.under)
        self.log = os.open(fault.counted, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if fault.counted else -1

    def install(self) -> None:
        """From here on, in this process."""
        for name in ONE_PATH + TWO_PATHS:
            self._wrap(name, lambda path, *rest, dir_fd=None, src_dir_fd=None, **_: (path, dir_fd or src_dir_fd))
        self._wrap("symlink", lambda target, path, *rest, dir_fd=None, **_: (path, dir_fd))
        for name in BY_DESCRIPTOR:
            self._wrap(name, lambda descriptor, *rest, **_: (f"/proc/self/fd/{descriptor}", None))
        really = os.open
        self._wrap("open", lambda path, flags, *rest, dir_fd=None, **_: (path if flags & CREATING else None, dir_fd))
        self.really_open = really
        builtins.open = io.open = self._open
        self._meet_the_store()

    def _wrap(self, name: str, where: Callable[..., tuple[Any, int | None]]) -> None:
        really = getattr(os, name, None)
        if really is None:
            return

        def wrapped(*words: Any, **named: Any) -> Any:
            path, folder = where(*words, **named)
            return self.at(name, _place(path, folder), lambda: really(*words, **named))

        setattr(os, name, wrapped)

    def at(self, kind: str, place: str, do: Callable[[], Any], half: Any = None) -> Any:
        """A call that is counted if it concerns the folder."""
        fault = self.fault
        if not (place == self.under or place.startswith(self.under + os.sep)):
            return do()
        self.count += 1
        if self.log >= 0:
            _raw_write(self.log, f"{kind} {place}\n".encode())
        if fault.seconds:
            time.sleep(fault.seconds)
        if not fault.at or self.count < fault.at or (self.count > fault.at and not (fault.error and fault.lasting)):
            return do()
        if fault.error:
            if fault.error in FULL and kind in FREE_WHEN_FULL:
                return do()
            if half is not None and fault.phase == "half" and self.count == fault.at:
                return half()  # a short write: what is left is tried again, and then fails
            # As from the system: a call that is given a path names it, one on an open file does not.
            raise OSError(fault.error, os.strerror(fault.error), *([] if kind in BY_DESCRIPTOR else [place]))
        if fault.phase == "half" and half is not None:
            half()
        elif fault.phase != "before":
            do()
        _die()

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, *how: Any, **named: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wxa+") or named.get("opener"):
            return _really_open(file, mode, buffering, *how, **named)
        place = _place(file, None)
        raw = self.at("open", place, lambda: _Raw(self, place, file, mode.replace("b", "").replace("t", "")))
        if "b" in mode and buffering == 0:
            return raw
        binary = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return binary
        encoding, errors, newline = (*how, None, None, None)[:3]
        text: Any = io.TextIOWrapper(
            binary,
            encoding or named.get("encoding") or "utf-8",
            errors or named.get("errors"),
            newline if newline is not None else named.get("newline"),
            line_buffering=buffering == 1,
        )
        text.mode = mode
        return text

    def _meet_the_store(self) -> None:
        frozen = sys.modules.get("graftlm.training.activation_cache")
        if frozen is None:
            return
        really = frozen.ActivationCache._compute

        def compute(store: Any, group: int) -> None:
            def half() -> None:
                really(store, group)
                members = store.groups[group]
                first = store.start[members[len(members) // 2]]
                store.hidden[first : store.start[members[-1]] + store.sizes[members[-1]]] = 0

            self.at("store", self.under, lambda: really(store, group), half=half)

        frozen.ActivationCache._compute = compute


class _Raw(io.FileIO):
    """The raw layer of a file that is written: its writes are calls of the system."""

    def __init__(self, faults: Faults, place: str, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self._faults, self._place = faults, place

    def write(self, data: Any) -> int:
        whole = memoryview(data).cast("B")
        write = super().write
        half = (lambda: write(whole[: len(whole) // 2])) if len(whole) > 1 else None
        return self._faults.at("write", self._place, lambda: write(whole), half=half)


def _place(path: Any, folder: int | None) -> str:
    """Where a call acts: an absolute path, links followed up to the last part; empty where it is of no interest."""
    if path is None or isinstance(path, int):
        return "" if path is None else _place(f"/proc/self/fd/{path}", None)
    text = os.fsdecode(path)
    if text.startswith("/proc/self/fd/"):
        try:
            return os.readlink(text)
        except OSError:
            return ""
    if folder is not None and not os.path.isabs(text):
        text = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text)
    return os.path.abspath(text)


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process outlived its SIGKILL")


_really_open, _raw_write = builtins.open, os.write


def from_environment(value: str | None) -> None:
    """Install what the launcher was asked for."""
    if value:
        Faults(Fault(**json.loads(value))).install()


def calls(file: Path) -> list[str]:
    """The names of the calls that a counting process wrote down, in order."""
    return [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines()]
