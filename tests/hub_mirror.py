"""A model hub on loopback, for tests: the few paths that `huggingface_hub.snapshot_download` asks for.

    with serve(models={"gpt2-medium": folder}, datasets={"rotten_tomatoes": folder}) as mirror:
        ...  # HF_ENDPOINT=mirror.url

What the real hub does is done here too where a client depends on it: a branch's name is answered with its commit, a
missing repository and a missing revision with their error codes, large files with their sha256 as etag, a Range with
its part, and an old name with a redirect to the new one. Nothing is written, and no request leaves this machine.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

BRANCH = "main"
LARGE = 1_000_000


@dataclass(frozen=True)
class Repo:
    """One repository: a folder, served as the only commit of its branch main."""

    kind: str
    """"models" or "datasets"."""
    name: str
    folder: Path

    @property
    def files(self) -> dict[str, Path]:
        """Path inside the repository -> file."""
        return {p.relative_to(self.folder).as_posix(): p for p in sorted(self.folder.rglob("*")) if p.is_file()}

    @property
    def commit(self) -> str:
        """40 hex digits that change with the files."""
        return hashlib.sha1("".join(map(etag, self.files.values())).encode()).hexdigest()

    def info(self) -> dict[str, Any]:
        """What /api/models/NAME/revision/REV answers."""
        return {
            "id": self.name,
            "sha": self.commit,
            "private": False,
            "tags": [],
            "downloads": 0,
            "siblings": [{"rfilename": name} for name in self.files],
        }

    def tree(self) -> list[dict[str, Any]]:
        """What /api/models/NAME/tree/REV?recursive=true answers."""
        rows = []
        for name, path in self.files.items():
            size, tag = path.stat().st_size, etag(path)
            row: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": tag[:40]}
            if size >= LARGE:
                row["lfs"] = {"oid": tag, "size": size, "pointerSize": 134}
            rows.append(row)
        return rows


@cache
def etag(path: Path) -> str:
    """The sha256 of a large file, the git-like sha1 of a small one."""
    content = path.read_bytes()
    return (hashlib.sha256 if len(content) >= LARGE else hashlib.sha1)(content).hexdigest()


@dataclass
class Mirror:
    """A running mirror."""

    url: str
    requests: list[str] = field(default_factory=list)
    """Method and path of everything that was asked for."""


@contextmanager
def serve(
    models: Mapping[str, Path] | None = None,
    datasets: Mapping[str, Path] | None = None,
    moved: Mapping[str, str] | None = None,
) -> Iterator[Mirror]:
    """Serve folders under their repository names; `moved` maps old names to new ones."""
    repos = [Repo("models", name, folder) for name, folder in (models or {}).items()]
    repos += [Repo("datasets", name, folder) for name, folder in (datasets or {}).items()]
    mirror = Mirror("")

    known = {(repo.kind, repo.name): repo for repo in repos}
    handler = type("Handler", (_Handler,), {"served": known, "old": dict(moved or {}), "log": mirror.requests})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        mirror.url = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield mirror
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: dict[tuple[str, str], Repo]
    old: dict[str, str]
    log: list[str]

    API = re.compile(r"/api/(models|datasets)/(.+?)(?:/(revision|tree)/([^/]+))?")
    FILE = re.compile(r"/(datasets/)?(.+?)/resolve/([^/]+)/(.+)")

    def do_GET(self) -> None:
        """Answer with a body."""
        self._answer(body=True)

    def do_HEAD(self) -> None:
        """Answer with the headers alone."""
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Write nothing on the standard error."""

    def _answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        self.log.append(f"{self.command} {path}")
        if match := self.API.fullmatch(path):
            kind, name, what, revision = match.groups()
            repo = self._repo(kind, name, revision)
            if repo is not None:
                self._send(200, json.dumps(repo.tree() if what == "tree" else repo.info()).encode(), body)
        elif match := self.FILE.fullmatch(path):
            kind = "datasets" if match[1] else "models"
            repo = self._repo(kind, match[2], match[3])
            if repo is not None:
                self._send_file(repo, unquote(match[4]), body)
        else:
            self._send(404, b"", body)

    def _repo(self, kind: str, name: str, revision: str | None) -> Repo | None:
        """The repository, or None when the request is answered already."""
        if name in self.old:
            self._send(307, b"", False, Location=self.path.replace(name, self.old[name], 1))
            return None
        repo = self.served.get((kind, name))
        if repo is None:
            self._send(404, b"", False, X_Error_Code="RepoNotFound")
        elif revision not in (None, BRANCH, repo.commit):
            self._send(404, b"", False, X_Error_Code="RevisionNotFound")
        else:
            return repo
        return None

    def _send_file(self, repo: Repo, name: str, body: bool) -> None:
        path = repo.files.get(name)
        if path is None:
            self._send(404, b"", False, X_Error_Code="EntryNotFound", X_Repo_Commit=repo.commit)
            return
        content, headers = path.read_bytes(), {"ETag": f'"{etag(path)}"', "X_Repo_Commit": repo.commit}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
            self._send(206, content[start : end + 1], body, **headers)
        else:
            self._send(200, content, body, **headers)

    def _send(self, status: int, content: bytes, body: bool, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)
