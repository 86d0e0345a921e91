"""Settings of the process belong to the command: graftlm as a library makes none."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import child_environment

LIBRARY = """
import ctypes, os
asked = []
class Spy(ctypes.CDLL):
    def __getattr__(self, name):
        asked.append(name)
        return super().__getattr__(name)
ctypes.CDLL = Spy
before = dict(os.environ)
import graftlm, graftlm.cli
graftlm.load, graftlm.train, graftlm.LoRALinear
assert "mallopt" not in asked, asked
changed = {name for name, value in os.environ.items() if before.get(name) != value}
assert "THP_MEM_ALLOC_ENABLE" not in changed and not any(name.startswith("MALLOC") for name in changed), changed
assert graftlm.cli.main.tune_malloc_retain()
assert "mallopt" in asked
assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
"""

FREED = """
import sys
from graftlm.cli.main import tune_malloc_retain
if sys.argv[1] == "keep":
    assert tune_malloc_retain()
import torch
def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6
before = resident_mb()
for _ in range(3):
    x = torch.ones(16_000_000)
    del x
print(resident_mb() - before)
"""


HOLES = """
import sys
from graftlm.cli import main
assert getattr(main, sys.argv[1])()
import torch
def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6
before, kept = resident_mb(), []
for _ in range(10):  # a block's weights, and what stays of its forward pass
    weights = torch.ones(4_000_000)
    kept.append(torch.ones(2_000))
    del weights
    kept.append(torch.ones(20_000))
print(resident_mb() - before)
"""


def child(program: str, *words: str) -> str:
    env = child_environment(OMP_NUM_THREADS="1")
    env.pop("THP_MEM_ALLOC_ENABLE", None)
    done = subprocess.run([sys.executable, "-c", program, *words], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_graftlm_leaves_the_process_alone_and_only_the_command_asks_glibc() -> None:
    child(LIBRARY)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc and glibc's settings are Linux's")
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    # A tensor of 64 MB is made and freed three times. Kept, its pages stay with the process; without the setting they
    # go back to the kernel. Whether the second tensor finds the hole of the first depends on what small thing was put
    # there in between, so only the lower bound is a promise. Nor are page faults: huge pages change their number.
    kept, given_back = float(child(FREED, "keep")), float(child(FREED, "leave"))
    assert kept > 60 and given_back < 30, (kept, given_back)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_what_was_gathered_for_a_block_leaves_nothing_behind() -> None:
    kept, given_back = (float(child(HOLES, how)) for how in ("tune_malloc_retain", "tune_malloc_release"))
    assert given_back < 10 < 15 < kept, (given_back, kept)  # a block's weights are 16 MB


WINDOWS = """
import importlib, pkgutil, sys
from pathlib import Path
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # as where Python has none: importing it is an error
import graftlm
for found in pkgutil.walk_packages(graftlm.__path__, "graftlm."):
    if found.name != "graftlm.__main__":
        importlib.import_module(found.name)
from graftlm.errors import GraftError
from graftlm.files.atomic import lock_dir
from graftlm.training import reporting
reporting.proc_mb = lambda name, field: None
def lock():
    with lock_dir(Path(sys.argv[1])):
        pass
for needs in (lock, reporting.peak_rss_mb):
    try:
        needs()
    except GraftError as error:
        print(error)
"""


def test_without_what_windows_lacks_all_is_imported_and_what_needs_it_says_so(tmp_path: Path) -> None:
    told = child(WINDOWS, str(tmp_path / "run")).splitlines()
    assert told == [
        f"this system lacks what graft needs here (Python's module '{name}'): on Windows, run graft within WSL"
        for name in ("fcntl", "resource")
    ]
    assert not (tmp_path / "run").exists()
