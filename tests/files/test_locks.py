"""The lock of a folder: its owner is named, a dead process holds none, and the second process changes nothing."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import child_environment
from graftlm.errors import InputError
from graftlm.files.atomic import LOCK_NAME, lock_dir, lock_file, lock_owner

HOLD = """
import sys, time
from pathlib import Path
from graftlm.files.atomic import lock_dir
with lock_dir(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the lock of tmp_path/run until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()
    assert process.stdin is not None
    process.stdin.close()


def test_the_second_process_is_told_the_owner_and_changes_nothing(
    tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(InputError) as error, lock_dir(tmp_path / "run"):
        raise AssertionError("two hold it")
    line = str(error.value)
    assert line.startswith(f"--out_dir {tmp_path / 'run'} is locked by another graft process (pid {holder.pid} on ")
    assert ", since 20" in line and line.endswith("); wait, or choose another folder")
    assert lock_owner(tmp_path / "run" / LOCK_NAME).startswith(f"pid {holder.pid} on ")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_the_lock_of_a_dead_process_is_no_obstacle(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK_NAME).exists() and lock_owner(tmp_path / "run" / LOCK_NAME) == ""
    with lock_dir(tmp_path / "run"):
        assert f"pid {os.getpid()} on " in (tmp_path / "run" / LOCK_NAME).read_text()
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_a_waiting_process_gets_the_lock_when_its_owner_ends(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    assert holder.stdin is not None
    holder.stdin.close()
    began = time.monotonic()
    with lock_dir(tmp_path / "run", timeout=20.0, keep=True):
        assert time.monotonic() - began < 15
    assert (tmp_path / "run" / LOCK_NAME).exists()


def test_a_child_that_inherits_the_descriptor_keeps_the_lock_of_its_killed_parent(tmp_path: Path) -> None:
    code = HOLD.replace('print("held"', 'print(subprocess.Popen(["sleep", "60"], pass_fds=lock).pid')
    code = code.replace("])):", "])) as lock:").replace("import sys", "import subprocess, sys")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    assert lock_owner(tmp_path / "run" / LOCK_NAME)
    os.kill(child, signal.SIGKILL)
    with lock_dir(tmp_path / "run", timeout=10.0):
        pass


def test_empty_directories_that_were_created_for_the_lock_are_removed(tmp_path: Path) -> None:
    with lock_dir(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / LOCK_NAME).exists()
    assert not (tmp_path / "a").exists()
    with lock_dir(tmp_path / "a" / "b"):
        (tmp_path / "a" / "mine").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["mine"]


@pytest.mark.parametrize("removed", ["file", "directory"])
def test_a_lock_that_its_last_owner_removes_meanwhile_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: str
) -> None:
    """The owner unlinks the file, and its directory if that is empty, between any two calls of a second process."""
    run, really_lock, really_open, gone = tmp_path / "run", fcntl.flock, os.open, list[str]()

    def lock_late(descriptor: int, flags: int) -> None:
        if not gone and removed == "file":
            gone.append("file")
            (run / LOCK_NAME).unlink()
        really_lock(descriptor, flags)

    def open_late(path: str, flags: int, mode: int = 0o777) -> int:
        if not gone and removed == "directory" and str(path).endswith(LOCK_NAME):
            gone.append("directory")
            run.rmdir()
        return really_open(path, flags, mode)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lock_late)
        patch.setattr(os, "open", open_late)
        with lock_dir(run, timeout=5.0):
            assert gone == [removed] and lock_owner(run / LOCK_NAME)


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level("INFO", logger="graftlm"), lock_dir(tmp_path / "run") as descriptors:
        assert "the file system has no locks: make sure that no other process writes there" in caplog.text
        assert descriptors == ()


def test_a_place_that_cannot_be_locked_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file; name a folder"), lock_dir(tmp_path / "file"):
        pass
    with pytest.raises(InputError, match="Not a directory"), lock_dir(tmp_path / "file" / "run"):
        pass
    with lock_file(tmp_path / "locks" / "x.lock", "unpacking x"):
        assert lock_owner(tmp_path / "locks" / "x.lock").startswith(f"pid {os.getpid()} on ")
    assert (tmp_path / "locks" / "x.lock").exists()
