"""The commands of a comparison: `graft` as a process that reports to a folder, here or on another machine.

What is unusual here: a command writes nothing but its folder, and holds a lock that outlives whoever asked for it. So
who lost sight of a command may give it again, and never do two of them write one folder.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Protocol

from graftlm.files.atomic import disk_errors
from graftlm.training.signals import PARENT_PIPE_ENV

LOG = "log.txt"
MAX_RETRIES = 3  # how often work is given again whose worker was lost
Child = subprocess.Popen


class CommandFailed(Exception):
    """A command failed; the text says why."""


class WorkerLost(Exception):
    """The machine or the process that ran a command is gone; given again, the command goes on from its last step."""


class JobRunner(Protocol):
    """Where the commands of a comparison run."""

    max_parallel: int
    """How many commands it is worth asking for at the same time."""

    def run(self, words: Sequence[str], folder: Path) -> str:
        """What `graft WORDS` prints; CommandFailed with its last line if it fails. The folder's log.txt has the rest.

        Raises WorkerLost too.
        """

    def stop(self) -> None:
        """Let every command finish its step and save, and begin no other."""


class LocalRunner:
    """Processes of this machine; its cores are divided between as many as run at once."""

    def __init__(self, max_parallel: int, lock: tuple[int, ...]) -> None:
        self.max_parallel = max_parallel
        self._lock = lock
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._environment = threads(max(1, cores // max_parallel)) if max_parallel > 1 else {}
        self._children: set[Child[str]] = set()
        self._stopped = False
        self._changing = threading.Lock()

    def run(self, words: Sequence[str], folder: Path) -> str:
        """See Commands."""
        if self._stopped:
            raise CommandFailed("stopped")
        return run_graft(words, folder, self._environment, self._lock, self._wait)

    def _wait(self, child: "Child[str]") -> int:
        with self._changing:
            self._children.add(child)
            if self._stopped:
                child.send_signal(signal.SIGINT)
        status = child.wait()
        with self._changing:
            self._children.discard(child)
        return status

    def stop(self) -> None:
        """See Commands."""
        with self._changing:
            self._stopped = True
            for child in self._children:
                child.send_signal(signal.SIGINT)


def threads(count: int) -> dict[str, str]:
    """The environment of a process that computes with so many threads."""
    return {"OMP_NUM_THREADS": str(count), "RAYON_NUM_THREADS": str(count)}


def run_graft(
    words: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    lock: tuple[int, ...],
    wait: Callable[["Child[str]"], int],
) -> str:
    """What `graft WORDS` prints; CommandFailed with its last line if it fails.

    Args:
        words: those behind `graft`.
        folder: its log.txt gets the command and all notes.
        environment: what differs from this process's.
        lock: file descriptors that the command keeps open to its end.
        wait: waits for the command's end, and tells its exit status.
    """
    with disk_errors(folder), open(folder / LOG, "a+", encoding="utf-8") as log, TemporaryFile("w+") as out:
        log.write(f"$ graft {' '.join(words)}\n")
        log.flush()
        child = subprocess.Popen(  # in a session of its own: Ctrl-C reaches it through `stop`, once
            [sys.executable, "-m", "graftlm", *words],
            stdin=subprocess.PIPE,  # the leash: it ends with this process
            stdout=out,
            stderr=log,
            text=True,
            env={**os.environ, **environment, PARENT_PIPE_ENV: "1"},
            start_new_session=True,
            pass_fds=lock,
        )
        with child:
            status = wait(child)
        if status:
            raise CommandFailed(_reason(folder / LOG, status))
        out.seek(0)
        return out.read()


def _reason(log: Path, status: int) -> str:
    """The last line of what a failed command said."""
    if status < 0:
        return f"killed by signal {-status} ({signal.Signals(-status).name}): out of memory?"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("graft: ") if lines and not lines[-1].startswith("$ ") else f"exit status {status}"
