"""Disks that fail, places that cannot be written, clocks that jump, folders that move, and two that want the same."""

import errno
import json
import os
import shutil
import time
from itertools import pairwise
from pathlib import Path

import pytest

from soak.faults import Fault
from soak.kills import CASES, FAILURES, Soak, run_result
from tiny import fresh_home

HERE = {error: number for number, (error, _) in enumerate(FAILURES)}


@pytest.mark.parametrize(("error", "lasting"), FAILURES, ids=[errno.errorcode[e] for e, _ in FAILURES])
@pytest.mark.parametrize("name", CASES)
def test_a_disk_that_fails_is_one_line_and_costs_nothing(name: str, error: int, lasting: bool, soak: Soak) -> None:
    """`kills.py --errors` tries every call; here it is one of each kind, at places that differ from kind to kind."""
    at = 1 + HERE[error] * len(soak.reference(name).calls) // 4
    line = soak.fail(name, error, at, ("before", "half")[HERE[error] % 2], lasting)
    assert line == "" or os.strerror(error).lower() in line.lower() or "disk full: " in line, line


def test_a_full_disk_in_the_middle_of_a_write_says_so_and_names_the_file(soak: Soak) -> None:
    at = next(n for n, call in enumerate(soak.reference("export").calls, 1) if call == "write")
    line = soak.fail("export", errno.ENOSPC, at, "half")
    assert line.startswith("graft: disk full: cannot write ") and "free some space or choose another folder" in line


def test_a_disk_that_fails_for_once_is_no_input_of_the_users(soak: Soak) -> None:
    at = next(n for n, call in enumerate(soak.reference("export").calls, 1) if call == "fsync")
    line = soak.fail("export", errno.EIO, at, lasting=False)
    assert ": the disk failed (Input/output error): look at the disk" in line


def test_a_slow_disk_changes_nothing(soak: Soak, tmp_path: Path) -> None:
    case, reference = CASES["export"], soak.reference("export")
    began = time.monotonic()
    assert soak.life(case, tmp_path, Fault(str(tmp_path), seconds=0.01)) == 0
    assert time.monotonic() - began > 0.01 * len(reference.calls)
    assert case.result(tmp_path, soak.assets) == reference.result


def test_a_clock_that_jumps_changes_nothing(soak: Soak, tmp_path: Path) -> None:
    """Back by days at every look: what is timed is timed by a clock that only goes forward."""
    case = CASES["train"]
    jump = "import itertools, time; n, t = itertools.count(), time.time; time.time = lambda: t() - 1e5 * next(n)"
    words = case.words(tmp_path, soak.assets)
    assert (
        soak.forks.run(*words, cwd=tmp_path, log=tmp_path / "log", prelude=jump, GRAFT_HOME=fresh_home(tmp_path)) == 0
    )
    assert case.result(tmp_path, soak.assets) == soak.reference("train").result
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(a["seconds"] < b["seconds"] for a, b in pairwise(rows)) and rows[-1]["seconds"] < 100


def test_a_read_only_folder_is_one_line(soak: Soak) -> None:
    """From the first call on; a folder's permissions would mean nothing to root."""
    line = soak.fail("train", errno.EROFS, 1)
    assert line.startswith("graft: cannot write ") and "/run: Read-only file system" in line
    assert line.endswith("choose a folder that you may write to")


def test_a_relative_run_goes_on_from_anywhere_and_behind_a_move(soak: Soak, tmp_path: Path) -> None:
    """Started with relative names in one folder; its first half done, moved, and resumed from another one."""
    start, later, log = tmp_path / "start", tmp_path / "later", tmp_path / "log"
    shutil.copytree(soak.assets / "gpt2", start / "gpt2")
    shutil.copytree(soak.assets / "data", start / "data")
    later.mkdir()
    whole = CASES["train"].words(tmp_path, Path())  # init_from and data relative
    words = [word.removeprefix(f"{tmp_path}{os.sep}") for word in whole]
    assert soak.life_of(words, start, log, Fault(str(start / "run"), at=120)) == -9
    assert (start / "run" / "last").is_symlink()
    (start / "run").rename(later / "moved")
    resume = ["train", "--resume", "--out_dir", "moved"]
    assert soak.life_of(resume, later, log) == 0, log.read_text()
    assert run_result(later / "moved") == soak.reference("train").result
    assert soak.life_of(["evaluate", "--out_dir", "later/moved", "--limit", "4"], tmp_path, log) == 0, log.read_text()


def test_on_another_machine_its_data_and_model_are_given_anew(soak: Soak, tmp_path: Path) -> None:
    """Where the old paths mean nothing, new ones are taken if they hold the same; anything else is refused."""
    old, new, log = tmp_path / "old", tmp_path / "new", tmp_path / "log"
    shutil.copytree(soak.assets / "gpt2", old / "gpt2")
    shutil.copytree(soak.assets / "data", old / "data")
    words = CASES["train"].words(old, old)
    assert soak.life_of(words, old, log, Fault(str(old / "run"), at=120)) == -9
    old.rename(new)
    resume = ["train", "--resume", "--out_dir", str(new / "run")]
    log.unlink()
    assert soak.life_of(resume, new, log) == 2
    line = log.read_text().splitlines()[-1]
    assert str(old / "gpt2") in line and "no such file or folder" in line, line
    (new / "data" / "train.jsonl").write_bytes(
        (new / "data" / "train.jsonl").read_bytes() + b'{"text":"x","label":0}\n'
    )
    resume += ["--init_from", str(new / "gpt2"), "--data", str(new / "data")]
    assert soak.life_of(resume, new, log) == 2 and "was trained on other data" in log.read_text()
    shutil.copyfile(soak.assets / "data" / "train.jsonl", new / "data" / "train.jsonl")
    assert soak.life_of(resume, new, log) == 0, log.read_text()
    assert run_result(new / "run") == soak.reference("train").result


def test_two_that_want_one_run_folder(soak: Soak, tmp_path: Path) -> None:
    log, home = tmp_path / "log", fresh_home(tmp_path / "home")
    words = [*CASES["train"].words(tmp_path, soak.assets), "--max_iters=100000", "--eval_every=5"]
    first = soak.forks.start(*words, cwd=tmp_path, log=log, GRAFT_HOME=home)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "run" / "last").exists():
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        for more in ([], ["--resume"]):
            second = tmp_path / f"second{len(more)}"
            assert soak.forks.run(*words, *more, cwd=tmp_path, log=second, GRAFT_HOME=home) == 2
            (line,) = second.read_text().splitlines()
            assert f"locked by another graft process (pid {first.pid} on " in line and ", since 20" in line
    finally:
        first.kill()
        first.wait()
    assert soak.forks.run(*words[:-2], "--resume", "--max_iters=6", cwd=tmp_path, log=log, GRAFT_HOME=home) in (0, 2)
    assert "is locked by" not in log.read_text(), "the lock of a dead process is no obstacle"
