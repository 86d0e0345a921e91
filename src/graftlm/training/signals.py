"""Ctrl-C and SIGTERM as something a loop can look at between two steps; and a process that ends with its parent."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_signal(patient: bool = False) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one interrupts at once.

    Not where it is `patient`: torchrun passes a Ctrl-C on that each of its processes has had already, and ends them
    itself when they take too long.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and not patient:
            raise KeyboardInterrupt
        stop.set()

    # What the caller has told us to ignore (nohup, a script's background job) stays ignored.
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


PARENT_PIPE_ENV = "GRAFT_PARENT_PIPE"
"""Set in the environment of a process that must not outlive the one that started it."""


def exit_with_parent() -> None:
    """If LEASH is set, end this process, at once and as it stands, when its standard input ends.

    What started it holds the other end of that pipe, and the system lets go of it even behind a SIGKILL.
    """

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ.pop(PARENT_PIPE_ENV, ""):
        threading.Thread(target=wait, daemon=True).start()
