"""A lock on a folder: who holds it is told, who is dead does not, and nothing is touched by who comes second."""

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
from graftlm.files import locks
from graftlm.files.locks import NAME, alone_in, held_by, one_at_a_time

HOLD = """
import sys, time
from pathlib import Path
from graftlm.files.locks import alone_in
with alone_in(Path(sys.argv[1]), "graft train"):
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


def test_who_comes_second_is_told_who_is_there_and_touches_nothing(
    tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(InputError) as error, alone_in(tmp_path / "run", "graft train"):
        raise AssertionError("two hold it")
    line = str(error.value)
    assert line.startswith(f"--out_dir {tmp_path / 'run'}: another process is at work there (graft train, process ")
    assert f"process {holder.pid} on " in line and ", since 20" in line and line.endswith("or name another folder")
    assert held_by(tmp_path / "run" / NAME).startswith(f"graft train, process {holder.pid}")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_the_lock_of_a_dead_process_is_no_obstacle(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / NAME).exists() and held_by(tmp_path / "run" / NAME) == ""
    with alone_in(tmp_path / "run", "graft train"):
        assert f"process {os.getpid()}" in (tmp_path / "run" / NAME).read_text()
    assert not (tmp_path / "run" / NAME).exists()


def test_one_that_waits_gets_it_when_the_other_ends(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    assert holder.stdin is not None
    holder.stdin.close()
    began = time.monotonic()
    with alone_in(tmp_path / "run", "graft compare", wait=20.0, keep=True):
        assert time.monotonic() - began < 15
    assert (tmp_path / "run" / NAME).exists(), "of a comparison it stays"


def test_folders_that_were_made_for_it_go_with_it_if_they_are_empty(tmp_path: Path) -> None:
    with alone_in(tmp_path / "a" / "b", "graft train"):
        assert (tmp_path / "a" / "b" / NAME).exists()
    assert not (tmp_path / "a").exists()
    with alone_in(tmp_path / "a" / "b", "graft train"):
        (tmp_path / "a" / "mine").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["mine"]


def test_a_file_that_was_taken_away_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever had it removes it when it is done: a second one that had opened it before must not rest on that."""
    really, opened = locks.FileIO, []

    def open_late(path: Path, mode: str) -> "locks.FileIO":
        file = really(path, mode)
        if not opened:
            path.unlink()
        opened.append(file)
        return file

    monkeypatch.setattr(locks, "FileIO", open_late)
    with alone_in(tmp_path / "run", "graft train"):
        assert len(opened) == 2 and held_by(tmp_path / "run" / NAME)


def test_a_folder_that_is_taken_away_between_two_calls_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever had the lock takes its empty folder away, too: behind mkdir's look at it, or before the file is made."""
    run, really_open, really_is_dir, gone = tmp_path / "run", locks.FileIO, Path.is_dir, list[str]()

    def open_late(path: Path, mode: str) -> "locks.FileIO":
        if len(gone) < 2:
            gone.append("before the file")
            run.rmdir()
        return really_open(path, mode)

    def look_late(path: Path) -> bool:
        if path == run and not gone and path.exists():
            gone.append("behind mkdir")
            run.rmdir()
        return really_is_dir(path)

    run.mkdir()
    monkeypatch.setattr(locks, "FileIO", open_late)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_dir", look_late)
        file = locks._taken(run / NAME, time.monotonic())
    assert gone == ["behind mkdir", "before the file"] and file is not None and (run / NAME).exists()
    file.close()


def test_a_place_that_stays_no_folder_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        locks._taken(tmp_path / "file" / NAME, time.monotonic())


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level("INFO", logger="graftlm"), alone_in(tmp_path / "run", "graft train"):
        assert "the file system has no locks: see to it that no other process writes there" in caplog.text


def test_a_place_that_cannot_be_locked_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file; name a folder"), alone_in(tmp_path / "file", "graft train"):
        pass
    with pytest.raises(InputError, match="Not a directory"), alone_in(tmp_path / "file" / "run", "graft train"):
        pass
    with one_at_a_time(tmp_path / "locks" / "x.lock", "unpacking x"):
        assert held_by(tmp_path / "locks" / "x.lock").startswith("unpacking x, process ")
    assert (tmp_path / "locks" / "x.lock").exists()
