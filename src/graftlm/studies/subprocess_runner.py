"""Runs the commands of a comparison: `graft` as a child process that writes to a folder, here or on another machine.

A command writes only to its folder and holds that folder's lock until it ends. So a command whose worker was lost can
be run again, and two of them never write to one folder.
"""

import os
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from graftlm.files.atomic import disk_errors

LOG = "log.txt"
MAX_RETRIES = 3  # of work whose worker was lost
Child = subprocess.Popen
PARENT_PIPE_ENV = "GRAFT_PARENT_PIPE"
"""Set in the environment of a process that must not outlive the one that started it."""


class CommandFailed(Exception):
    """A command failed; the text says why."""


class WorkerLost(Exception):
    """The machine or process that ran a command is gone. Run again, the command resumes from its last checkpoint."""


class JobRunner(ABC):
    """Runs commands, up to `max_parallel` at a time, each from a thread of its own."""

    def __init__(self, max_parallel: int) -> None:
        self.max_parallel = max_parallel
        self._jobs: set[Any] = set()
        self._stopped = False
        self._lock = threading.Lock()

    @abstractmethod
    def run(self, argv: Sequence[str], folder: Path) -> str:
        """Run `graft ARGV`; returns its stdout. Its stderr goes to log.txt in `folder`.

        Raises CommandFailed with the last line of stderr, or WorkerLost.
        """

    @abstractmethod
    def _cancel(self, job: Any) -> None:
        """Make a running job save a checkpoint and end."""

    def stop(self) -> None:
        """Make every running command save a checkpoint and end, and start no other."""
        with self._lock:
            self._stopped = True
            for job in self._jobs:
                self._cancel(job)

    @contextmanager
    def _tracked(self, job: Any) -> Iterator[None]:
        """A context in which `stop` cancels the job."""
        with self._lock:
            self._jobs.add(job)
            if self._stopped:
                self._cancel(job)
        try:
            yield
        finally:
            with self._lock:
                self._jobs.discard(job)


class LocalRunner(JobRunner):
    """Processes on this machine; parallel ones share its cores equally."""

    def __init__(self, max_parallel: int, lock: tuple[int, ...]) -> None:
        super().__init__(max_parallel)
        self._lock_fds = lock
        self._environment = thread_env(max(1, num_cores() // max_parallel)) if max_parallel > 1 else {}

    def run(self, argv: Sequence[str], folder: Path) -> str:
        """See JobRunner."""
        if self._stopped:
            raise CommandFailed("stopped")
        return run_graft(argv, folder, self._environment, self._lock_fds, self._wait)

    def _wait(self, child: "Child[str]") -> int:
        with self._tracked(child):
            return child.wait()

    def _cancel(self, job: "Child[str]") -> None:
        job.send_signal(signal.SIGINT)


def num_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_env(count: int) -> dict[str, str]:
    """Environment variables of a process that computes with `count` threads."""
    return {"OMP_NUM_THREADS": str(count), "RAYON_NUM_THREADS": str(count)}


def run_graft(
    argv: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    lock: tuple[int, ...],
    wait: Callable[["Child[str]"], int],
) -> str:
    """Run `graft ARGV` and return its stdout. Raises CommandFailed with the last line of its stderr.

    Args:
        argv: the arguments after `graft`.
        folder: the folder whose log.txt receives the command line and stderr.
        environment: variables in addition to this process's.
        lock: file descriptors of locks that the command inherits and holds until it ends.
        wait: waits for the child process and returns its exit status.
    """
    with disk_errors(folder), open(folder / LOG, "a+", encoding="utf-8") as log, TemporaryFile("w+") as out:
        log.write(f"$ graft {' '.join(argv)}\n")
        log.flush()
        child = subprocess.Popen(  # in a session of its own, so that Ctrl-C reaches it only through `stop`
            [sys.executable, "-m", "graftlm", *argv],
            stdin=subprocess.PIPE,  # ends with this process, and the child with it (PARENT_PIPE_ENV)
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
    """The last line of a failed command's stderr, or its exit status."""
    if status < 0:
        return f"killed by signal {-status} ({signal.Signals(-status).name}): out of memory?"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("graft: ") if lines and not lines[-1].startswith("$ ") else f"exit status {status}"


def exit_with_parent() -> None:
    """If PARENT_PIPE_ENV is set, kill this process when its standard input ends.

    The parent holds the other end of that pipe, which the system closes even after a SIGKILL.
    """

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ.pop(PARENT_PIPE_ENV, ""):
        threading.Thread(target=wait, daemon=True).start()
