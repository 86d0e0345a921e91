"""What every test may rely on: no network but loopback, and a way to run the command as a user does.

The built-in models and data sets come from the cache that `graft download` (`make test`) has filled.
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from soak.forks import Forks, ask_script

SRC = str(Path(__file__).parent.parent / "src")

# A shell that starts the suite in the background has it ignore Ctrl-C, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

Graft = Callable[..., "subprocess.CompletedProcess[str]"]


CHROMIUM = shutil.which("chromium")
"""Debian's browser, for the tests of pages."""


def require(program: str) -> None:
    """Where a program of Debian is missing the test does not run, and in CI it fails."""
    if shutil.which(program) is None:
        missing = f"there is no {program}: apt-get install {program}"
        if os.environ.get("CI") == "true":
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """It, without a window."""
    require("chromium")
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*quiet, "--disable-component-update", "--disable-sync"]
        )
        yield browser
        browser.close()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What did not run for want of a browser is said last, where it cannot be overlooked."""
    if CHROMIUM is None:
        terminalreporter.write_line(
            "The pages were NOT tested: there is no chromium here (apt-get install chromium).", yellow=True
        )


LONG = (
    *("studies/test_cluster", "training/test_distributed", "contracts/", "soak/", "test_notebook", "test_handout"),
    *("fuzz/", "test_errors", "training/", "exchange/", "files/test_gguf"),
)
"""Files that take long, or wait. They come first, so that no process of the suite is left alone with one."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="files, and tests within a file, in a random order")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    if (seed := config.getoption("shuffle")) is not None:
        chance = random.Random(seed)
        files = {item.path: chance.random() for item in items}
        items.sort(key=lambda item: (files[item.path], chance.random()))
        return

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(tests).as_posix()
        return next((n for n, long in enumerate(LONG) if name.startswith(long)), len(LONG))

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def loopback_only() -> Any:
    """A test of ours that reaches for the network fails at once and says where it wanted to go."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test reached for the network: {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are so small that waking a second thread costs more than it computes; workers use all cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def disks_do_not_wait() -> Iterator[None]:
    """No test cuts the power, so none waits for the disk. That fsync is called is what `soak` and `files` test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


UNCOUNTED = {"COVERAGE_PROCESS_CONFIG": ""}
"""For a child that may write no large file: `make coverage` does not look at it, whose own file would be too large."""


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment for a child that imports graftlm from this checkout, offline unless told otherwise."""
    path = os.pathsep.join(filter(None, [SRC, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "100", "HF_HUB_OFFLINE": "1", **changes}


@pytest.fixture(scope="session")
def graft_process() -> Graft:
    """Run `python -m graftlm WORDS`; keyword arguments are environment variables and `cwd`."""

    def run(*words: str, cwd: Path | None = None, **environment: str) -> Any:
        command = [sys.executable, "-m", "graftlm", *words]
        env = child_environment(**environment)
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs graft many times, in forks of a process that has imported torch once."""
    with Forks(tmp_path_factory.mktemp("f")) as server:
        yield server


@pytest.fixture(scope="session")
def graft(forks: Forks) -> Graft:
    """Run `graft WORDS` in a fork; keyword arguments are environment variables and `cwd`."""

    def run(*words: str, cwd: Path | None = None, **environment: str) -> Any:
        return forks.output(*words, cwd=cwd or Path.cwd(), **child_environment(**environment))

    return run


@pytest.fixture
def forked_children(forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The commands that this process starts are forks too; so are those of a command whose prelude is this."""
    program = str(ask_script(tmp_path / "ask"))
    monkeypatch.setenv("SOAK_SERVER", forks.address)
    monkeypatch.setattr(sys, "executable", program)
    return f"import sys; sys.executable = {program!r}"
