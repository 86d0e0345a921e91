"""A name on the model hub -> a local snapshot, through huggingface_hub; whatever goes wrong ends as one line.

What is unusual:

- Only configs, tokenizers, safetensors and tables are fetched; never a pickle, never code.
- huggingface_hub waits for ever for a hub that accepts and does not answer, and retries for minutes. `_patience` gives
  every request a time limit and lets no request be repeated after it.
- HF_ENDPOINT, HF_HUB_OFFLINE and the cache folders are read at each call, not only when the package is imported.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from graftlm.errors import InputError
from graftlm.files.atomic import disk_errors

HUB_NAME = re.compile(r"(?P<id>[\w][\w.-]*(/[\w][\w.-]*)?)(@(?P<revision>[\w][\w./-]*))?")
PATTERNS = {
    "model": [
        "*.json",
        "model.safetensors",
        "model-*.safetensors",
        "adapter_model.safetensors",
        "merges.txt",
        "vocab.bpe",
        "chat_template.jinja",
    ],
    "dataset": ["*.parquet", "*.jsonl", "*.csv", "*.json"],
}
WAITS = ("connect", "read", "write", "pool")  # what a request may wait for
SECONDS = 10.0  # how long to wait for an answer; HF_HUB_ETAG_TIMEOUT changes it


class NotOnHub(InputError):
    """The hub answered, and has no repository of that name and kind (or shows none to us)."""


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, else the public one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _offline() -> bool:
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def _cache() -> str | None:
    """Where huggingface_hub keeps snapshots, as the environment says now; None for its own default."""
    if given := os.environ.get("HF_HUB_CACHE"):
        return os.path.expanduser(given)
    if home := os.environ.get("HF_HOME"):
        return os.path.join(os.path.expanduser(home), "hub")
    return None


def hub_folder(name: str, kind: str, instead: str, only: str | None = None) -> Path:
    """The local snapshot of `org/name`, `name` or either with `@revision`; kind is "model" or "dataset".

    `only` is the one file of it that is wanted; None: all that we read. `instead` says in a few words what would work
    without the hub; it ends the error line.
    """
    match = HUB_NAME.fullmatch(name)
    assert match is not None, f"{name!r} is no hub name; the caller checks"
    repo, revision = match["id"], match["revision"]
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the package is first imported
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

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
                allow_patterns=only or PATTERNS[kind],
                ignore_patterns=["*/*"] if kind == "model" else None,  # a model's other forms live in subfolders
            )
    except InputError:
        raise
    except (http_error, OSError, ValueError, RuntimeError) as error:  # hf_xet raises plain RuntimeErrors
        raise _line(error, repo, revision, kind, instead) from error
    return Path(folder)


@contextlib.contextmanager
def _request_timeout(seconds: float) -> Iterator[None]:
    """Within the block no request waits longer than `seconds` for its answer, nor is repeated after that time."""
    from huggingface_hub import get_session

    asked: dict[tuple[int, str, str], float] = {}

    def key(request: Any) -> tuple[int, str, str]:
        return threading.get_ident(), request.method, str(request.url)

    def ask(request: Any) -> None:
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {what: limits.get(what) or seconds for what in WAITS}
        if time.monotonic() - asked.setdefault(key(request), time.monotonic()) > seconds:
            raise TimeoutError(f"no answer within {seconds:g} s")

    def answered(response: Any) -> None:
        asked.pop(key(response.request), None)

    session, logger = get_session(), logging.getLogger("huggingface_hub")
    hooks, level = session.event_hooks, logger.level
    session.event_hooks = {
        "request": [*hooks.get("request", []), ask],
        "response": [*hooks.get("response", []), answered],
    }
    logger.setLevel(logging.ERROR)  # its warnings repeat what our one line says
    try:
        yield
    finally:
        session.event_hooks = hooks
        logger.setLevel(level)


def _line(error: Exception, repo: str, revision: str | None, kind: str, instead: str) -> InputError:
    """The one line for anything that huggingface_hub raised."""
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
        return InputError(f"{name} is gated: accept its terms on {hub} and log in with `hf auth login`, or {instead}")
    if isinstance(error, RepositoryNotFoundError):
        return NotOnHub(f"unknown {name}: {hub} has none of that name (if it is private, log in first): {instead}")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{name} has no revision {revision!r} on {hub}: name a branch, a tag or a commit")
    if isinstance(error, HFValidationError):
        return NotOnHub(f"unknown {name}: no built-in name, no local folder, and no valid hub name: {instead}")
    if isinstance(error, HfHubHTTPError):
        return InputError(f"{hub} answered {error.response.status_code} for {name}: try again later, or {instead}")
    if _offline():
        return InputError(f"{name} is not (all) in the local cache, and HF_HUB_OFFLINE is set: unset it or {instead}")
    cause = error.__cause__ or error
    if isinstance(cause, HfHubHTTPError):
        return InputError(f"{hub} answered {cause.response.status_code} for {name}: try again later, or {instead}")
    reason = " ".join(str(cause).split())[:120]
    reason = f"{type(cause).__name__}: {reason}" if reason else type(cause).__name__
    return InputError(f"{hub} did not answer for {name} ({reason}): check the connection or HF_ENDPOINT, or {instead}")
