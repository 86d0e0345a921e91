"""SECURITY.md and docs/reliability.md: that the tests they name exist, and what is stated and tested nowhere else."""

import hashlib
import re
import zipfile
from pathlib import Path

import pytest

from graftlm.errors import InputError
from graftlm.files.formats import read_weights, write_json
from graftlm.files.wheels import wheel_member
from soak.kills import CASES, Soak

ROOT = Path(__file__).parents[2]
LONG = "x" * 300 + ".safetensors"
SECRET = "planted-5ecret-0123456789abcdef"


@pytest.mark.parametrize("page", ["SECURITY.md", "docs/reliability.md"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / page).read_text(encoding="utf-8"))
    assert len(named) >= 8
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), f"{page}: {file} has no {test}"


def test_a_secret_of_the_environment_is_written_nowhere(soak: Soak, tmp_path: Path) -> None:
    """In run.json, metrics, logs, checkpoints, the exported folder, the report and the line of an error."""
    secrets = dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GRAFT_KEY"), SECRET)
    log, run = tmp_path / "log.txt", tmp_path / "run"
    for words, status in (
        (CASES["train"].words(tmp_path, soak.assets), 0),
        (f"export --out_dir {run} --to {tmp_path}/model --merged".split(), 0),
        (f"report {run} --out {tmp_path}/report.html".split(), 0),
        (["evaluate", "--out_dir", str(tmp_path / "none"), "--debug"], 2),
    ):
        assert soak.forks.run(*words, cwd=tmp_path, log=log, GRAFT_HOME=str(tmp_path / "home"), **secrets) == status
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"log.txt", "run.json", "metrics.jsonl", "report.html", "export.json"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_a_member_of_a_wheel_lands_in_the_scratch_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        archive.writestr("../../outside", b"mine")
    digest = hashlib.sha256(b"mine").hexdigest()
    found = wheel_member(tmp_path / "x.whl", "../../outside", digest, tmp_path / "scratch")
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
