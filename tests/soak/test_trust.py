"""SECURITY.md and docs/reliability.md: that the tests they name exist, and what is stated and tested nowhere else."""

import json
import re
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from graftlm.errors import InputError
from graftlm.files.atomic import check_new_folder, write_json
from graftlm.files.fetch import PinnedWheel, wheel_file, wheel_member
from graftlm.files.formats import load_safetensors, read_weights
from graftlm.files.gguf import gguf_to_folder
from soak.kills import CASES, Soak
from tiny import fresh_home

ROOT = Path(__file__).parents[2]
LONG = "x" * 300 + ".safetensors"
SECRET = "planted-5ecret-0123456789abcdef"


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/reliability.md"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / page).read_text(encoding="utf-8"))
    assert len(named) >= 8
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{page}: {file} has no {test}"


def test_every_report_of_other_tools_users_names_its_tests() -> None:
    section = (
        (ROOT / "docs/reliability.md").read_text(encoding="utf-8").split("\n## What users of other tools report\n")[1]
    )
    rows = [row.strip("| ").split(" | ") for row in section.partition("\n## ")[0].splitlines() if row.startswith("| ")][
        1:
    ]
    assert len(rows) > 25
    for what, references, here, tests in rows:
        assert re.search(r"[\w/-]+#\d+", references) and here, what
        assert re.fullmatch(r"(`tests/[\w/]+\.py::test_\w+`(, |$))+", tests), what


def test_a_secret_of_the_environment_is_written_nowhere(soak: Soak, tmp_path: Path) -> None:
    """In run.json, metrics, logs, checkpoints, the exported folder, the report and the line of an error."""
    secrets = dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GRAFT_KEY"), SECRET)
    log, run = tmp_path / "log.txt", tmp_path / "run"
    for words, status in (
        (CASES["train"].words(tmp_path, soak.assets), 0),
        (f"export --out_dir {run} --to {tmp_path}/model --format merged".split(), 0),
        (f"report {run} --out {tmp_path}/report.html".split(), 0),
        (["evaluate", "--out_dir", str(tmp_path / "none"), "--debug"], 2),
    ):
        assert (
            soak.forks.run(*words, cwd=tmp_path, log=log, GRAFT_HOME=fresh_home(tmp_path / "home"), **secrets) == status
        )
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"log.txt", "run.json", "metrics.jsonl", "report.html", "export.json"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_member_of_a_wheel_lands_in_the_scratch_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("../../outside", b"mine")
    found = wheel_member(tmp_path / "x.whl", "../../outside", tmp_path / "scratch")
    assert found == tmp_path / "scratch" / "outside"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["scratch", "x.whl"]


@pytest.mark.parametrize(
    "shard",
    ["../outside.safetensors", "/etc/outside.safetensors", "a/b.safetensors", "x.bin", LONG],
)
def test_an_index_names_no_file_outside_its_folder(shard: str, tmp_path: Path) -> None:
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": shard}})
    with pytest.raises(InputError, match="is not a safetensors file of this folder"):
        read_weights(tmp_path)


def test_an_archive_of_another_hash_is_never_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bomb (here 64 MB of nothing in 64 KB) must have the hash that graftlm knows, and hashes are taken first."""
    wheel = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("big", "w") as member:
        for _ in range(64):
            member.write(bytes(2**20))
    monkeypatch.setenv("GRAFT_WHEEL_DIR", str(tmp_path))
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(InputError, match=r"cannot use x-1-py3-none-any\.whl for 'x': its sha256 is"):
        wheel_file("x", PinnedWheel("x", "1", "py3", "0" * 64, 1), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


def test_a_link_in_an_archive_is_a_file_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    link = zipfile.ZipInfo("a/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    found = wheel_member(tmp_path / "x.whl", "a/link", tmp_path / "scratch")
    assert not found.is_symlink() and found.read_bytes() == b"/etc/passwd"


def test_a_folder_to_write_is_no_link(tmp_path: Path) -> None:
    """Neither one that leads nowhere yet, nor one to an empty folder, whose place `graft export` would take."""
    (tmp_path / "empty").mkdir()
    for name, leads in (("out", "elsewhere"), ("in", "empty"), ("up", "..")):
        (tmp_path / name).symlink_to(leads)
        with pytest.raises(InputError, match=rf"^--to .*/{name}: is a link; name the folder itself$"):
            check_new_folder(tmp_path / name, "to")
    check_new_folder(tmp_path / "empty", "to")


def huge_safetensors(path: Path) -> Callable[[], object]:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    return lambda: load_safetensors(path)


def huge_header(path: Path) -> Callable[[], object]:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}" + bytes(64))
    return lambda: load_safetensors(path)


def huge_gguf(path: Path) -> Callable[[], object]:
    """A header that counts a thousand billion tensors and as many settings."""
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**40, 2**40) + bytes(64))
    return lambda: gguf_to_folder(path, path.parent / "out")


def huge_text(path: Path) -> Callable[[], object]:
    """A setting whose name has 2^60 bytes."""
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 1, 1, 2**60) + bytes(64))
    return lambda: gguf_to_folder(path, path.parent / "out")


@pytest.mark.parametrize("made", [huge_safetensors, huge_header, huge_gguf, huge_text], ids=lambda made: made.__name__)
def test_a_small_file_cannot_ask_for_all_memory(made: Callable[[Path], Callable[[], object]], tmp_path: Path) -> None:
    reading = made(tmp_path / "x")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught:
        reading()
    assert "\n" not in str(caught.value) and str(tmp_path / "x") in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
