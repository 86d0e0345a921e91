"""`graft` commands by the hundred: a server that has imported everything once and forks itself for each.

A command takes a second and a half to import torch, and twenty milliseconds to do something with a tiny model. The
server is one process with one thread; each command is a fork of it, with the caller's files, folder, environment and,
if asked, a fault (`faults.py`) in it. `Forks` starts the server and the commands; `ask_script` makes a program that
takes the place of Python where a command starts others, as `graft compare` does.

    client -> server     one JSON line {words, cwd, environment}, with the three standard files
    server -> client     {"pid": …} at once, {"status": …} at the end (negative: by that signal)
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

TESTS = Path(__file__).parents[1]
FAULT, PRELUDE, SERVER = "SOAK_FAULT", "SOAK_PRELUDE", "SOAK_SERVER"


class Life:
    """One command at work."""

    def __init__(self, connection: socket.socket) -> None:
        self._lines = connection.makefile("r")
        self._connection = connection
        self.pid = int(json.loads(self._lines.readline())["pid"])
        self._status: int | None = None

    def wait(self, seconds: float = 120.0) -> int:
        """Its exit status; negative: the signal that ended it. An AssertionError if it takes longer."""
        if self._status is None:
            self._connection.settimeout(seconds)
            try:
                self._status = int(json.loads(self._lines.readline())["status"])
            except TimeoutError:
                self.kill()
                raise AssertionError(f"process {self.pid} did not end within {seconds:g} s") from None
            self._lines.close()
            self._connection.close()
        return self._status

    def ended(self) -> bool:
        """Whether it has."""
        return self._status is not None or not Path(f"/proc/{self.pid}").exists()

    def kill(self) -> None:
        """SIGKILL; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class Forks:
    """The server, and a way to start commands. A context manager: at its end the server and all it started are gone."""

    def __init__(self, folder: Path) -> None:
        self.address, self.folder = str(folder / "s"), folder
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RAYON_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
        code = "from soak.forks import serve; import sys; serve(sys.argv[1])"
        self._server = subprocess.Popen(
            [sys.executable, "-c", code, self.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        assert self._server.stdout is not None and self._server.stdout.readline() == b"ready\n", (
            "the server is not there"
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()  # it ends with its input, and takes its children along
        self._server.wait(30)
        self._server.stdout.close()

    def start(self, *words: str, cwd: Path, log: Path, fault: str = "", prelude: str = "", **environment: str) -> Life:
        """Begin `graft WORDS`; both of its outputs go to the file `log`."""
        extra = {FAULT: fault, PRELUDE: prelude, **environment}
        with open(os.devnull, "rb") as nothing, open(log, "ab") as out:
            return self.begin(words, cwd, extra, [nothing, out, out])

    def begin(self, words: Sequence[str], cwd: Path, environment: dict[str, str], files: list[IO[bytes]]) -> Life:
        """Begin `graft WORDS` with these three files for its input and outputs."""
        extra = {SERVER: self.address, "PYTHONPATH": str(TESTS.parent / "src"), **environment}
        request = {"words": list(words), "cwd": str(cwd), "environment": {**os.environ, **extra}}
        return Life(ask(self.address, request, [file.fileno() for file in files]))

    def run(self, *words: str, cwd: Path, log: Path, fault: str = "", prelude: str = "", **environment: str) -> int:
        """`graft WORDS`; its exit status."""
        return self.start(*words, cwd=cwd, log=log, fault=fault, prelude=prelude, **environment).wait()

    def output(self, *words: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
        """`graft WORDS`; its exit status and what it wrote to each of its outputs."""
        with open(os.devnull, "rb") as nothing, TemporaryFile() as out, TemporaryFile() as err:
            status = self.begin(words, cwd, environment, [nothing, out, err]).wait(300)
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess(words, status, out.read().decode(), err.read().decode())


def ask(address: str, request: dict[str, Any], files: list[int]) -> socket.socket:
    """The connection over which the answers come."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    socket.send_fds(connection, [b"+"], files)
    connection.sendall(json.dumps(request).encode() + b"\n")
    return connection


ASK = '''#!{python} -ISE
"""In Python's place: `this -m graftlm WORDS`, done by the server that SOAK_SERVER names."""
import json, os, signal, socket, sys
words = sys.argv[sys.argv.index("graftlm") + 1 :]
request = {{"words": words, "cwd": os.getcwd(), "environment": dict(os.environ)}}
connection = socket.socket(socket.AF_UNIX)
connection.connect(os.environ["SOAK_SERVER"])
socket.send_fds(connection, [b"+"], [0, 1, 2])
connection.sendall(json.dumps(request).encode() + b"\\n")
os.close(0), os.close(1)
lines = connection.makefile("r")
pid = json.loads(lines.readline())["pid"]
signal.signal(signal.SIGINT, lambda *_: os.kill(pid, signal.SIGINT))
status = json.loads(lines.readline())["status"]
if status < 0:
    os.kill(os.getpid(), -status)
os._exit(status)
'''


def ask_script(path: Path) -> Path:
    """Write the program."""
    path.write_text(ASK.format(python=sys.executable), encoding="utf-8")
    path.chmod(0o700)
    return path


# The server -----------------------------------------------------------------------------------------------------------


def serve(address: str) -> None:
    """Until the standard input ends."""
    _import_everything()
    listener = socket.socket(socket.AF_UNIX)
    Path(address).unlink(missing_ok=True)  # of a server that was killed, or of a soak that goes on
    listener.bind(address)
    listener.listen(64)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    waiting: dict[int, socket.socket] = {}
    selector = selectors.DefaultSelector()
    for source in (listener, woken, 0):
        selector.register(source, selectors.EVENT_READ)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        ready = {key.fileobj for key, _ in selector.select()}
        if woken in ready:
            os.read(woken, 4096)
            _reap(waiting)
        if listener in ready:
            _begin(listener, [woken, wake], waiting)
        if 0 in ready and not os.read(0, 4096):
            break
    for pid in waiting:
        os.kill(pid, signal.SIGKILL)
    while waiting:
        time.sleep(0.01)
        _reap(waiting)


def _import_everything() -> None:
    """What commands import or measure at their first use; nothing here may start a thread, which no fork would have."""
    import pyarrow.parquet
    import torch
    import torch._dynamo

    import graftlm.__main__
    import graftlm.cli
    import graftlm.exchange.export
    import graftlm.exchange.import_adapter
    import graftlm.files.gguf
    import graftlm.inference.pairs
    import graftlm.serving.server
    import graftlm.studies.compare
    import graftlm.training.train  # noqa: F401
    from graftlm.exchange.load import measure_matmul_flops, pick_dtype

    assert pyarrow.parquet
    os.fsync = lambda fd: None  # what a killed process has written is there without it
    torch.set_num_threads(1)
    measure_matmul_flops(torch.device("cpu"), pick_dtype("auto", torch.device("cpu"))[0])
    measure_matmul_flops(torch.device("cpu"), torch.float32)


def _reap(waiting: dict[int, socket.socket]) -> None:
    for pid in list(waiting):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            with waiting.pop(pid) as connection, contextlib.suppress(OSError):
                connection.sendall(json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


def _begin(listener: socket.socket, ours: list[int], waiting: dict[int, socket.socket]) -> None:
    connection, _ = listener.accept()
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rb") as lines:
        request = json.loads(lines.readline())
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number in ours:
                os.close(number)
            for each in (listener, connection, *waiting.values()):
                each.close()
            status = _child(request, files)
        finally:
            os._exit(status)
    for number in files:
        os.close(number)
    waiting[pid] = connection
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")


def _child(request: dict[str, Any], files: list[int]) -> int:
    """The command, as `__main__.py` runs it; its exit status."""
    from graftlm.__main__ import main
    from soak.faults import from_environment

    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    fault, prelude = os.environ.pop(FAULT, ""), os.environ.pop(PRELUDE, "")
    if prelude:
        exec(compile(prelude, "<prelude>", "exec"), {})
    from_environment(fault)
    sys.argv = ["graft", *request["words"]]
    try:
        status = main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status
