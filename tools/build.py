"""The wheel and the source archive of a release, the same bytes whoever builds them.

    python tools/build.py --out dist

It needs setuptools as pyproject.toml states it, and no network. The same checkout, setuptools and Python give the same
sha256, which are printed; SOURCE_DATE_EPOCH is the time that the files get (default: the last commit's).

What is unusual here: setuptools makes both, in a copy of the files that go in; then both archives are packed again in
one order, with one time and one owner for all, since what a working copy has of these is its owner's affair.
"""

import argparse
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("src", "pyproject.toml", "README.md", "LICENSE")
EARLIEST = 315532800
"""1980-01-01, before which a zip file has no time."""
BUILD = "from setuptools import build_meta as b; import sys; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def build(out: Path, epoch: int) -> list[Path]:
    """The two files in `out`. Raises CalledProcessError where setuptools fails."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        copy, made = Path(folder) / "copy", Path(folder) / "made"
        copy.mkdir()
        made.mkdir()
        for part in PARTS:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            else:
                shutil.copy(ROOT / part, copy / part)
        environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "PYTHONPATH": ""}
        for hook in ("build_sdist", "build_wheel"):
            words = [sys.executable, "-c", BUILD, hook, str(made)]
            done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.stderr.write(done.stderr)
                raise subprocess.CalledProcessError(done.returncode, hook)
        found = sorted(made.iterdir())
        for path in found:
            again = wheel_again if path.suffix == ".whl" else archive_again
            (out / path.name).write_bytes(again(path, epoch))
    return [out / path.name for path in found]


def wheel_again(path: Path, epoch: int) -> bytes:
    """The members in their order (RECORD comes last), all readable, none executable."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in [info.filename for info in old.infolist() if not info.is_dir()]:
            info = zipfile.ZipInfo(name, time.gmtime(epoch)[:6])
            info.external_attr, info.compress_type, info.create_system = 0o100644 << 16, zipfile.ZIP_DEFLATED, 3
            new.writestr(info, old.read(name))
    return out.getvalue()


def archive_again(path: Path, epoch: int) -> bytes:
    """The same members by name, owned by nobody."""
    out = io.BytesIO()
    with (
        tarfile.open(path) as old,
        gzip.GzipFile("", "wb", fileobj=out, mtime=epoch) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda each: each.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = epoch, 0, 0, "", ""
            member.mode, member.pax_headers = 0o755 if member.isdir() else 0o644, {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    return out.getvalue()


def last_commit() -> int:
    """When the last commit was made; now, where there is no git."""
    words = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else int(time.time())


def main() -> None:
    """Build, and print what was built as `sha256sum` does."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    given = parser.parse_args()
    epoch = max(int(os.environ.get("SOURCE_DATE_EPOCH") or last_commit()), EARLIEST)
    for path in build(given.out, epoch):
        sys.stdout.write(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")


if __name__ == "__main__":
    main()
