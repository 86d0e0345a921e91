"""Ctrl-C and SIGTERM as an event that a loop checks between steps; a process that ends with its parent."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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


PARENT_PIPE_ENV = "GRAFT_PARENT_PIPE"
"""Set in the environment of a process that must not outlive the one that started it."""


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
