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
import zipfile
from pathlib import Path
from typing import Any

import pytest

from conftest import child_environment
from tiny import TEMPLATE, data_folder, model_folder

ROOT = Path(__file__).parents[1]
EPOCH = "1750000000"


def plain(**changes: str) -> dict[str, str]:
    """A child's environment that knows nothing of this checkout."""
    environment = child_environment(OMP_NUM_THREADS="1", **changes)
    del environment["PYTHONPATH"]
    return environment


def tool(name: str, *words: str, **changes: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *words],
        env=child_environment(**changes),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# The lock -------------------------------------------------------------------------------------------------------------


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_holds_the_versions_of_constraints_each_with_its_hashes() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==([^\s#]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = {canonical(name): version for name, version in pins.items()}
    blocks = re.findall(
        r"^([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})*)\n", (text := lock()), re.MULTILINE
    )
    assert len(blocks) == len(re.findall(r"^[\w.-]+==", text, re.MULTILINE)), "a line that is no block"
    locked = {canonical(name): version for name, version, _ in blocks}
    assert all(hashes for _, _, hashes in blocks)
    assert locked.pop("setuptools")  # it builds graftlm, which constraints.txt does not speak of
    assert {name: pins.get(name) for name in locked} == locked, "python tools/lock.py makes it anew"
    core = (ROOT / "constraints.txt").read_text().partition("# What the tests")[0]
    assert {canonical(name) for name in re.findall(r"^([\w.-]+)==", core, re.MULTILINE)} <= locked.keys()


def lock() -> str:
    return (ROOT / "requirements.lock").read_text(encoding="utf-8")


def test_pip_takes_the_lock_and_refuses_another_file(tmp_path: Path) -> None:
    """A wheel of a locked name and version, but of other bytes, is not installed."""
    name, (version,) = "colorama", re.findall(r"^colorama==(\S+)", lock(), re.MULTILINE)
    wheel = tmp_path / f"{name}-{version}-py2.py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        about = f"{name}-{version}.dist-info"
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py2-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    block = re.search(rf"^{name}==(?:.*\\\n)+.*\n", lock(), re.MULTILINE)
    assert block is not None
    (tmp_path / "lock").write_text(block[0])
    words = [sys.executable, "-m", "pip", "download", "--no-index", "--find-links", str(tmp_path), "--require-hashes"]
    words += ["--no-deps", "-r", str(tmp_path / "lock"), "-d", str(tmp_path / "got")]
    done = subprocess.run(words, env={**plain(), "PIP_CONFIG_FILE": os.devnull}, capture_output=True, text=True)
    assert done.returncode != 0 and "DO NOT MATCH THE HASHES" in done.stderr
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in done.stderr


# The wheel ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a first build, and what two of them printed, the second at another time and by another umask."""
    folder, said = tmp_path_factory.mktemp("built"), []
    for name, umask in (("one", 0o022), ("two", 0o077)):
        before = os.umask(umask)
        try:
            said.append(tool("build.py", "--out", str(folder / name), SOURCE_DATE_EPOCH=EPOCH))
        finally:
            os.umask(before)
        time.sleep(2.1 - time.time() % 2)  # what a zip file knows of time is two seconds
    return folder / "one", said


def test_two_builds_have_the_same_bytes(built: tuple[Path, list[str]]) -> None:
    folder, (one, two) = built
    assert one == two and len(one.splitlines()) == 2
    for line in one.splitlines():
        digest, _, name = line.partition("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert {Path(path.name).suffix for path in folder.iterdir()} == {".whl", ".gz"}


def test_the_wheel_holds_all_that_is_in_src_and_nothing_else(built: tuple[Path, list[str]]) -> None:
    (wheel,) = built[0].glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "graftlm").rglob("*") if path.is_file()}
    assert names == {name for name in files if "__pycache__" not in name}
    kinds = {Path(name).suffix for name in names}
    assert {".html", ".css", ".js", ".cpp"} <= kinds and "graftlm/py.typed" in names


@pytest.fixture(scope="module")
def installed(built: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a fresh environment with the wheel alone; the other packages are borrowed."""
    home, (wheel,) = tmp_path_factory.mktemp("fresh") / "env", built[0].glob("*.whl")
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
    words = f"train --init_from {tmp_path}/model --data data --out_dir run --rank 2 --max_iters 2 --batch_size 4"
    found = json.loads(graft(*words.split(), "--template", TEMPLATE, "--device", "cpu", "--json"))
    assert found["steps"] == 2 and (tmp_path / "run" / "best").is_dir()
    graft("report", "run", "--out", "report.html")
    assert "<script" in (tmp_path / "report.html").read_text()


def built_name(installed: Path) -> str:
    (about,) = installed.parent.glob("lib/python*/site-packages/graftlm-*.dist-info")
    return about.name


# What it is made of ---------------------------------------------------------------------------------------------------


def test_the_bill_of_materials_names_what_graftlm_needs_and_no_more(installed: Path, tmp_path: Path) -> None:
    python, out = str(installed / "python"), [tmp_path / "one.json", tmp_path / "two.json"]
    for path in out:
        words = [python, str(ROOT / "tools" / "bill.py"), "--out", str(path), "--page", str(tmp_path / "page.md")]
        subprocess.run(words, env=plain(SOURCE_DATE_EPOCH=EPOCH), capture_output=True, check=True)
    assert out[0].read_bytes() == out[1].read_bytes()
    bill = json.loads(out[0].read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    assert bill["metadata"]["component"]["name"] == "graftlm"
    assert bill["metadata"]["component"]["licenses"] == [{"expression": "MIT"}]
    names = {each["name"] for each in bill["components"]}
    assert {"torch", "numpy", "safetensors", "jinja2"} <= names and not {"pytest", "graftlm", "fastapi"} & names
    refs = {each["bom-ref"] for each in [bill["metadata"]["component"], *bill["components"]]}
    for each in bill["dependencies"]:
        assert {each["ref"], *each["dependsOn"]} <= refs
    assert len(bill["dependencies"]) == len(refs) == len(bill["components"]) + 1
    assert all(f"| {name} |" in (tmp_path / "page.md").read_text() for name in names)
