"""Runs commands against one checkout and keeps their results under flat keys: train/lora/llama/sft/train_loss."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from golden.spelling import Spelling, flat, renamed

WEIGHTS = ("adapter_model*.safetensors", "graft_adapter*.safetensors", "model*.safetensors")
CPU = {"device": "cpu", "dtype": "float32"}
Options = Mapping[str, Any]
Post = Callable[[str, Any], Any]


class JobFailed(Exception):
    """A command failed; the text is its last line."""


class Session:
    """One recording of one checkout, in an empty work folder."""

    def __init__(self, checkout: Path, work: Path, only: str = "*") -> None:
        self.work, self.only = work, only
        self.values: dict[str, Any] = {}
        self._environment = {
            "PYTHONPATH": str(checkout.resolve() / "src"),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "COLUMNS": "200",
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment = {**os.environ, **self._environment}
        worker = [sys.executable, str(Path(__file__).with_name("worker.py"))]
        self._worker = subprocess.Popen(
            worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._home = {"GRAFT_HOME": str(work / "home")}
        self.spelling = Spelling(
            lambda subcommand: self._ask([subcommand, "--help", "all"] if subcommand else ["--help"])["out"]
        )

    def close(self) -> None:
        """End the worker."""
        self._worker.communicate()

    # Commands ---------------------------------------------------------------------------------------------------------

    def run(
        self,
        subcommand: str,
        options: Options,
        *positional: str,
        world_size: int = 1,
        stop_at: tuple[Path, int] | None = None,
        own_home: bool = True,
    ) -> Any:
        """The JSON object of a command in `world_size` processes; None if it was stopped by `stop_at`."""
        words = self.spelling.words(subcommand, options, positional)
        environment = [self._home if own_home else {}] * world_size
        if world_size > 1:
            environment = _ranks(self._home, world_size)
        answer = self._ask(words, environment, stop_at)
        expected = [130] if stop_at else [0] * world_size
        if answer["status"] != expected:
            line = (answer["err"].strip() or answer["out"].strip() or "no output").splitlines()[-1]
            raise JobFailed(f"status {answer['status']} of graft {' '.join(words)}: {line}")
        return None if stop_at else json.loads(answer["out"])

    @contextmanager
    def server(self, options: Options, *positional: str) -> Iterator[tuple[list[str], Post]]:
        """`graft serve` in a process of its own; yields its models and a function that posts JSON."""
        command = [sys.executable, "-m", "graftlm", *self.spelling.words("serve", options, positional)]
        environment = {**os.environ, **self._environment, **self._home}
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, text=True, env=environment, **pipes)

        def post(path: str, body: Any) -> Any:
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), headers)
            try:
                with opener.open(request, timeout=60) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                raise JobFailed(f"{path}: {error.code} {error.read().decode(errors='replace')}") from None

        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise JobFailed(f"{command[2:]} ended before it served")
            started = json.loads(line)
            url = started["url"].rstrip("/")
            yield started["models"], post
        finally:
            process.terminate()
            process.communicate(timeout=60)

    def _ask(self, words: Sequence[str], environment: Any = ({},), stop_at: Any = None) -> dict[str, Any]:
        stop = [str(stop_at[0]), stop_at[1]] if stop_at else None
        job = {"words": words, "environment": list(environment), "folder": str(self.work), "stop_at": stop}
        assert self._worker.stdin and self._worker.stdout
        self._worker.stdin.write(json.dumps(job) + "\n")
        self._worker.stdin.flush()
        answer: dict[str, Any] = json.loads(self._worker.stdout.readline())
        return answer

    # Values -----------------------------------------------------------------------------------------------------------

    @contextmanager
    def job(self, key: str) -> Iterator[None]:
        """Commands whose values belong to `key`; if one fails, that is what is recorded."""
        print(key, file=sys.stderr)
        try:
            yield
        except JobFailed as error:
            print(f"  FAILED {error}", file=sys.stderr)
            self.values[f"{key}/failed"] = str(error).replace(str(self.work), "WORK")

    def wants(self, key: str) -> bool:
        """Whether --only asks for this job."""
        return fnmatch(key, self.only)

    def keep(self, key: str, data: Any) -> None:
        """Keep JSON data, with the newest keys."""
        self.values |= flat(key, renamed(data))

    def keep_run(self, key: str, out_dir: Path) -> None:
        """Keep the losses of a run, and the bytes of what it trained."""
        rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
        assert rows and all("train_loss" in row for row in rows), f"{out_dir}: no losses"
        self.keep(key, rows)
        self.keep_tensors(f"{key}/last", out_dir / "last")

    def keep_tensors(self, key: str, folder: Path) -> None:
        """Keep hashes of a folder's weights, and two figures that show the size of a difference."""
        self.values |= {f"{key}/{name}": value for name, value in fingerprint(read_weights(folder)).items()}


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's or a model's folder; training state is left out."""
    files = sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)})
    if not files:
        raise JobFailed(f"{folder}: no weights")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """sha256 of the tensors regardless of names, sha256 of the names, L2 norm and sum in float64."""
    parts = []
    for tensor in tensors.values():
        flat_bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        parts.append(f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(flat_bytes).hexdigest()}")
    wide = [tensors[name].double() for name in sorted(tensors)]
    return {
        "sha256": hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest(),
        "names_sha256": hashlib.sha256("\n".join(sorted(tensors)).encode()).hexdigest(),
        "norm": float(sum(t.square().sum() for t in wide)) ** 0.5,
        "sum": float(sum(t.sum() for t in wide)),
    }


def _ranks(home: Mapping[str, str], world_size: int) -> list[dict[str, str]]:
    """The variables that torchrun sets for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    every = {**home, "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    every |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return [{**every, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
