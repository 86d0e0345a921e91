"""constraints.txt -> requirements.lock: each pinned version with the sha256 of every file it may be installed from.

    python -m venv /tmp/locking && /tmp/locking/bin/python tools/lock.py

    pip install --require-hashes -r requirements.lock     # what it is for: nothing but these very files
    pip install --no-deps --no-build-isolation -e .       # and then graftlm itself

What is unusual here: pip does all of it. It resolves `.[dev,peers,docs]` (a dry run: nothing is installed) and, while
it looks through the files of a version, this script keeps their hashes, those of other platforms too. pip has no public
way to tell them, so one of its internal functions is watched; a pip without it ends this with an error.
Files that only a Python older than 3.11 could use are left out, and what constraints.txt does not pin is an error.
"""

import contextlib
import io
import json
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from pip._internal.cli.main import main as pip
from pip._internal.index.package_finder import LinkEvaluator
from pip._vendor.packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
WANTED = [f"{ROOT}[dev,peers,docs]", "setuptools>=77"]
"""graftlm with all its extras, and what builds it."""
HEAD = """\
# Written by tools/lock.py; not to be edited. Each version of constraints.txt with the sha256 of its files:
#   pip install --require-hashes -r requirements.lock && pip install --no-deps --no-build-isolation -e .
# Resolved on {platform}. There torch is its CPU build; one with CUDA brings packages that are not in here.
"""

Files = dict[tuple[str, str], dict[str, str]]
"""(name, version without its local part) -> file name -> sha256."""


def pinned() -> dict[str, str]:
    """Name -> version, of constraints.txt."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return {canonicalize_name(n): v for n, v in re.findall(r"^([\w.-]+)==([^\s#]+)", text, re.MULTILINE)}


def place(file: str) -> tuple[str, str] | None:
    """A file's name and version; None for what no Python from 3.11 on installs."""
    try:
        if not file.endswith(".whl"):
            name, version = parse_sdist_filename(file)
            return name, version.public
        name, version, _, tags = parse_wheel_filename(file)
    except ValueError:
        return None
    for tag in tags:
        minor = re.fullmatch(r"cp3(\d+)", tag.interpreter)
        if tag.interpreter.startswith("py3") or (minor and (tag.abi == "abi3" or int(minor[1]) >= 11)):
            return name, version.public
    return None


@contextlib.contextmanager
def watched(files: Files) -> Any:
    """Within it, the hashes of all files that pip looks at are kept in `files`."""
    before = LinkEvaluator.evaluate_link

    def evaluate_link(self: Any, link: Any) -> Any:
        digest = link.hash if link.hash_name == "sha256" else None
        if digest and not link.is_yanked and (found := place(link.filename)):
            files[found][link.filename] = digest
        return before(self, link)

    LinkEvaluator.evaluate_link = evaluate_link
    try:
        yield
    finally:
        LinkEvaluator.evaluate_link = before


def resolved(report: Path) -> list[tuple[str, str, str]]:
    """(name, version, sha256) of each package that pip would install, but graftlm."""
    found = []
    for each in json.loads(report.read_text(encoding="utf-8"))["install"]:
        about = each["metadata"]
        if canonicalize_name(about["name"]) != "graftlm":
            digest = each["download_info"]["archive_info"]["hashes"]["sha256"]
            found.append((about["name"], about["version"].partition("+")[0], digest))
    return sorted(found, key=lambda each: canonicalize_name(each[0]))


def main() -> int:
    """Write requirements.lock; 1 with one line where that cannot be."""
    files: Files = defaultdict(dict)
    with tempfile.TemporaryDirectory() as folder, watched(files):
        report = Path(folder) / "report.json"
        words = ["install", "--quiet", "--dry-run", "--ignore-installed", "--report", str(report)]
        if pip([*words, "-c", str(ROOT / "constraints.txt"), *WANTED]):
            sys.stderr.write("lock.py: pip could not resolve constraints.txt; its lines above say why\n")
            return 1
        chosen = resolved(report)
    pins = pinned() | {"setuptools": next(v for n, v, _ in chosen if n == "setuptools")}
    out = io.StringIO()
    out.write(HEAD.format(platform=f"{sys.platform}, Python {sys.version_info.major}.{sys.version_info.minor}"))
    for name, version, digest in chosen:
        if pins.get(canonicalize_name(name)) != version:
            sys.stderr.write(f"lock.py: {name} {version} is not pinned; add it to constraints.txt\n")
            return 1
        every = {digest, *files[canonicalize_name(name), version].values()}
        out.write(f"{name}=={version}" + "".join(f" \\\n    --hash=sha256:{each}" for each in sorted(every)) + "\n")
    (ROOT / "requirements.lock").write_text(out.getvalue(), encoding="utf-8")
    sys.stderr.write(f"requirements.lock: {len(chosen)} packages, {out.getvalue().count('--hash')} hashes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
