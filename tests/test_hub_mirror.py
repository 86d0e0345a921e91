"""The mirror serves what huggingface_hub asks a real hub for: a client process must not see the difference."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import child_environment
from hub_mirror import LARGE, serve

CLIENT = """
import json, sys
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
name, kind, revision = sys.argv[1:]
try:
    print(snapshot_download(name, repo_type=kind, revision=revision or None))
except HfHubHTTPError as error:
    print(type(error).__name__)
"""


def download(url: str, home: Path, name: str, kind: str = "model", revision: str = "") -> str:
    env = child_environment(HF_ENDPOINT=url, HF_HOME=str(home), HF_HUB_OFFLINE="0", HF_HUB_DISABLE_PROGRESS_BARS="1")
    words = [sys.executable, "-c", CLIENT, name, kind, revision]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    (folder / "data").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"n_layer": 2}))
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * (LARGE // 256 + 1))
    (folder / "data" / "train.jsonl").write_text('{"text": "ü"}\n')
    return folder


def test_snapshot_download_gets_every_file_of_a_model_and_of_a_data_set(repo: Path, tmp_path: Path) -> None:
    with serve(models={"gpt2-medium": repo}, datasets={"org/reviews": repo}) as mirror:
        model = Path(download(mirror.url, tmp_path / "home", "gpt2-medium"))
        data = Path(download(mirror.url, tmp_path / "home", "org/reviews", "dataset"))
    for folder in (model, data):
        files = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert files == {p.relative_to(repo): p.read_bytes() for p in repo.rglob("*") if p.is_file()}
    assert any("/resolve/" in line for line in mirror.requests)


def test_a_missing_repository_and_a_missing_revision_are_told_apart(repo: Path, tmp_path: Path) -> None:
    with serve(models={"org/model": repo}) as mirror:
        assert download(mirror.url, tmp_path / "home", "org/other") == "RepositoryNotFoundError"
        assert download(mirror.url, tmp_path / "home", "org/model", revision="v9") == "RevisionNotFoundError"


def test_an_old_name_leads_to_the_new_one(repo: Path, tmp_path: Path) -> None:
    with serve(models={"openai-community/gpt2": repo}, moved={"gpt2": "openai-community/gpt2"}) as mirror:
        assert (Path(download(mirror.url, tmp_path / "home", "gpt2")) / "config.json").exists()
