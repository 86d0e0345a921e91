"""What is installed and what is shipped: the lock and its hashes, the wheel, the bill of materials.

The wheel is built twice and installed into a fresh environment, which borrows the packages of this one: no network.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
import tomllib
import zipfile
from importlib.metadata import files
from pathlib import Path
from typing import Any

import pytest

from conftest import child_environment
from tiny import TEMPLATE, data_folder, model_folder

ROOT = Path(__file__).parents[1]
LOCK, CONSTRAINTS = ((ROOT / name).read_text(encoding="utf-8") for name in ("requirements.lock", "constraints.txt"))


def plain(**changes: str) -> dict[str, str]:
    """A child's environment that knows nothing of this checkout."""
    environment = child_environment(OMP_NUM_THREADS="1", **changes)
    del environment["PYTHONPATH"]
    return environment


def tool(*words: str) -> None:
    """Run a Python module of this environment, as the Makefile does by its script."""
    done = subprocess.run([sys.executable, "-m", *words], env=plain(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# The lock -------------------------------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(text: str) -> dict[str, str]:
    return {canonical(name): version for name, version in re.findall(r"^([\w.-]+)==([^\s#]+)", text, re.MULTILINE)}


CORE = pinned(CONSTRAINTS.partition("# What the tests")[0])
"""What graftlm needs without its extras."""


def test_the_lock_holds_the_versions_of_constraints_each_with_its_hashes() -> None:
    hashed = re.findall(r"^([\w.-]+)==\S+(?: \\\n    --hash=sha256:[0-9a-f]{64})+\n", LOCK, re.MULTILINE)
    locked, pins = pinned(LOCK), pinned(CONSTRAINTS)
    assert [canonical(name) for name in hashed] == list(locked), "a package without hashes"
    pins["torch"] += "+cpu"  # the build with CUDA would bring packages that are not pinned
    assert locked == pins, "`make lock` writes it anew"
    assert CORE.keys() <= locked.keys()


def test_pip_takes_the_lock_and_refuses_another_file(tmp_path: Path) -> None:
    """A wheel of a locked name and version, but of other bytes, is not installed."""
    name, (version,) = "colorama", re.findall(r"^colorama==(\S+)", LOCK, re.MULTILINE)
    wheel = tmp_path / f"{name}-{version}-py2.py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        about = f"{name}-{version}.dist-info"
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py2-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    block = re.search(rf"^{name}==(?:.*\\\n)+.*\n", LOCK, re.MULTILINE)
    assert block is not None
    (tmp_path / "lock").write_text(block[0])
    words = [sys.executable, "-m", "pip", "download", "--no-index", "--find-links", str(tmp_path), "--require-hashes"]
    words += ["--no-deps", "-r", str(tmp_path / "lock"), "-d", str(tmp_path / "got")]
    done = subprocess.run(words, env={**plain(), "PIP_CONFIG_FILE": os.devnull}, capture_output=True, text=True)
    assert done.returncode != 0 and "DO NOT MATCH THE HASHES" in done.stderr
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in done.stderr


# The wheel ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two builds, the second at another time and under another umask."""
    folder = tmp_path_factory.mktemp("built")
    for name, umask in (("one", 0o022), ("two", 0o077)):
        before = os.umask(umask)
        try:
            tool("hatchling", "build", "-d", str(folder / name))
        finally:
            os.umask(before)
        time.sleep(2.1 - time.time() % 2)  # a zip file stores times in steps of two seconds
    return folder


def test_two_builds_have_the_same_bytes(built: Path) -> None:
    one, two = ({path.name: path.read_bytes() for path in (built / name).iterdir()} for name in ("one", "two"))
    assert one == two and {Path(name).suffix for name in one} == {".whl", ".gz"}


def test_the_wheel_holds_all_that_is_in_src_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("one/*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "graftlm").rglob("*") if path.is_file()}
    assert names == {name for name in files if "__pycache__" not in name}
    kinds = {Path(name).suffix for name in names}
    assert {".html", ".css", ".js", ".cpp"} <= kinds and "graftlm/py.typed" in names


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a fresh environment with the wheel alone; the other packages are borrowed."""
    home, (wheel,) = tmp_path_factory.mktemp("fresh") / "env", built.glob("one/*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(wheel)], env=plain(PIP_DISABLE_PIP_VERSION_CHECK="1"), check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


def test_the_wheel_works_from_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    def graft(*words: str) -> Any:
        done = subprocess.run(
            [str(installed / "graft"), *words], cwd=tmp_path, env=plain(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import graftlm, importlib.metadata as m; print(graftlm.__file__); print(m.version('graftlm'))"
    words = [str(installed / "python"), "-c", where]
    said = subprocess.run(words, cwd=tmp_path, env=plain(), capture_output=True, text=True, check=True)
    file, version = said.stdout.split()
    assert Path(file).is_relative_to(installed.parent)
    assert version in built_name(installed) and "train" in graft("--help")
    model_folder(tmp_path / "model", layers=1)
    data_folder(tmp_path / "data", train=16, other=4)
    flags = f"train --init_from {tmp_path}/model --data data --out_dir run --rank 2 --max_iters 2 --batch_size 4"
    found = json.loads(graft(*flags.split(), "--template", TEMPLATE, "--device", "cpu", "--json"))
    assert found["steps"] == 2 and (tmp_path / "run" / "best").is_dir()
    graft("report", "run", "--out", "report.html")
    assert "<script" in (tmp_path / "report.html").read_text()


def built_name(installed: Path) -> str:
    (about,) = installed.parent.glob("lib/python*/site-packages/graftlm-*.dist-info")
    return about.name


# What it is made of ---------------------------------------------------------------------------------------------------


def test_the_bill_of_materials_names_what_graftlm_needs_and_no_more(tmp_path: Path) -> None:
    """By the command of `make release`, of an environment that has the metadata of the core packages alone."""
    home, out = tmp_path / "env", [tmp_path / "one.json", tmp_path / "two.json"]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    for name in CORE:
        folder = Path(str(next(file for file in files(name) or () if file.name == "METADATA").locate())).parent
        (packages / folder.name).symlink_to(folder)
    for path in out:
        words = ["environment", str(home / "bin/python"), "--pyproject", "pyproject.toml", "--output-reproducible"]
        tool("cyclonedx_py", *words, "-o", str(path))
    assert out[0].read_bytes() == out[1].read_bytes()
    bill = json.loads(out[0].read_text())
    root = bill["metadata"]["component"]
    assert (bill["bomFormat"], root["name"]) == ("CycloneDX", "graftlm") and root["licenses"][0]["license"][
        "id"
    ] == "MIT"
    assert {canonical(each["name"]): each["version"].partition("+")[0] for each in bill["components"]} == CORE
    needs = {each["ref"]: each.get("dependsOn", []) for each in bill["dependencies"]}
    assert {each["bom-ref"] for each in [root, *bill["components"]]} == needs.keys()
    direct = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert pinned("\n".join(needs[root["bom-ref"]])).keys() == {
        canonical(re.split("[<>=]", line)[0]) for line in direct
    }
