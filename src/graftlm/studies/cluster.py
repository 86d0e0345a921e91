"""Work spread over a Ray cluster: the commands of a comparison, and the examples of an evaluation.

What is unusual here:
- Ray only finds room for the work and tells of lost workers. A command of a comparison runs below a Ray worker as it
  runs here, in a folder that all nodes share; one that was lost is given again and goes on from its last checkpoint.
- An evaluation is cut only where `evaluate` begins a new batch, and every piece runs the same first tokens apart. So
  the numbers are those of one process, to the bit where processor and number of threads are the same.
- What is assumed is looked at before it is used: the shared folder by a token that every node must find there, the
  nodes' graftlm by its version, an evaluation's weights by their hash.

Ray is imported when it is asked for, with its usage statistics off. A cluster started here listens on loopback only.
"""

import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.config import RayFlags
from graftlm.errors import GraftError, InputError, posix_module
from graftlm.exchange.huggingface import base_hash
from graftlm.exchange.load import Loaded, load
from graftlm.files.formats import sha256_file, write_text
from graftlm.inference.evaluate import Here, LabelIds, Tokens, scored_together
from graftlm.inference.generate import Progress, decoded_together, shared_length
from graftlm.studies.commands import LOST, Child, CommandFailed, WorkerLost, run_graft, threads
from graftlm.text.data import Example

PIECES = 4
"""Pieces of an evaluation for each place that works: more balance better, and each reads the shared tokens again."""

PATIENCE = 10.0
"""Seconds that an address may take to answer, and a lost worker's process to end."""

STORE = 100_000_000
"""Bytes of the object store of a cluster started here; only figures pass through it."""


@dataclass(frozen=True)
class Refusal:
    """A GraftError that was met elsewhere: its text and its exit status."""

    line: str
    status: int

    def error(self) -> GraftError:
        """The same error, here."""
        return InputError(self.line) if self.status == InputError.exit_status else GraftError(self.line)


# The cluster ----------------------------------------------------------------------------------------------------------


@contextmanager
def connected(flags: RayFlags, debug: bool = False) -> Iterator["Cluster"]:
    """The cluster that --ray names, left again at the end; with `debug` its logs are shown.

    A process that is connected to a cluster stays with that one. Raises InputError where there is no cluster, no ray
    package, or no node with the room that a task declares.
    """
    ray = _ray(flags.ray)
    if ray.is_initialized():
        yield Cluster(ray, flags)
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**_settings(flags.ray), log_to_driver=debug, logging_level="INFO" if debug else "ERROR")
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        what = " ".join(str(error).split())
        raise InputError(f"--ray {flags.ray}: no cluster to connect to: {what}") from None
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
        yield Cluster(ray, flags)
    finally:
        ray.shutdown()


def _ray(address: str) -> Any:
    """The ray package, imported with its usage statistics off."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # asked for by a warning of some versions
    if address.startswith(("local", "127.0.0.1:")):
        # Its name says another thing: set to 0, Ray takes loopback for this machine's address, as it does on macOS.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError("--ray needs the ray package: pip install 'graftlm[ray]'") from None
    return ray


def _settings(address: str) -> dict[str, Any]:
    if address == "local":
        here = {"_node_ip_address": "127.0.0.1", "include_dashboard": False, "object_store_memory": STORE}
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return {"address": address, "num_cpus": cores, **here}
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
        except OSError as error:
            raise InputError(
                f"--ray {address}: no cluster answers there ({error.strerror or error}): start one with "
                "ray start --head, or use --ray local"
            ) from None
    return {"address": address}


class Cluster:
    """A cluster this process is connected to."""

    def __init__(self, ray: Any, flags: RayFlags) -> None:
        self.ray = ray
        self.cpus, self.gpus = flags.ray_cpus, flags.ray_gpus
        self.nodes = [node for node in ray.nodes() if node["Alive"]]
        self.places = sum(map(self._room, self.nodes))
        """Tasks that find room at the same time."""
        if not self.places:
            most = {kind: max(node["Resources"].get(kind, 0) for node in self.nodes) for kind in ("CPU", "GPU")}
            raise InputError(
                f"--ray_cpus {self.cpus} --ray_gpus {self.gpus:g}: no node of the cluster has both; the most that one "
                f"has are {most['CPU']:g} CPUs and {most['GPU']:g} GPUs"
            )

    def _room(self, node: dict[str, Any]) -> int:
        has = node["Resources"]
        room = has.get("CPU", 0) // self.cpus
        return int(min(room, has.get("GPU", 0) // self.gpus) if self.gpus else room)

    def task(self, function: Any, retries: int) -> Any:
        """A function as a Ray task that declares what the flags say."""
        return self.ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=retries)(function)

    def get(self, ref: Any) -> Any:
        """A task's value. Raises WorkerLost, CommandFailed where it was cancelled, and what it refused."""
        errors = self.ray.exceptions
        try:
            value = self.ray.get(ref)
        except errors.TaskCancelledError:
            raise CommandFailed("stopped") from None
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.ObjectLostError) as e:
            raise WorkerLost(str(e).partition("\n")[0]) from None
        except errors.RayError as error:
            last = [line for line in str(error).splitlines() if line.strip()][-1]
            raise GraftError(f"a task failed on the cluster: {last.strip()}") from error
        if isinstance(value, Refusal):
            raise value.error()
        return value

    # A comparison -----------------------------------------------------------------------------------------------------

    @contextmanager
    def commands(self, out_dir: Path, at_once: int) -> Iterator["Elsewhere"]:
        """Where the commands of a comparison in `out_dir` run: at most so many at once; every node is looked at first.

        Raises InputError where a node does not see the folder, or has no graftlm of this version.
        """
        place = Place(str(out_dir.absolute()), os.getcwd(), secrets.token_hex(8), version("graftlm"))
        token = out_dir / TOKEN
        write_text(token, place.token)
        try:
            self._look(place)
            yield Elsewhere(self, place, at_once)
        finally:
            token.unlink(missing_ok=True)

    def _look(self, place: "Place") -> None:
        """Every node's look at the place; an InputError with the first complaint."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        look = self.ray.remote(num_cpus=0, max_retries=LOST)(_complaint)
        refs = []
        for node in self.nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            refs.append(look.options(scheduling_strategy=there).remote(place))
        for node, ref in zip(self.nodes, refs, strict=True):
            try:
                complaint = self.get(ref)
            except WorkerLost:
                continue  # a node that is gone has nothing to complain of
            if complaint:
                raise InputError(f"node {node['NodeManagerAddress']}: {complaint}")

    # An evaluation ----------------------------------------------------------------------------------------------------

    def reader(self, flags: Any, loaded: Loaded) -> "Copies":
        """Copies of a loaded model on the cluster, to be given to `evaluate`; `flags` say what was loaded."""
        local = flags.init_from if flags.init_from == "resume" else _whole(flags.init_from)
        asked = Asked(
            init_from=local,
            out_dir=str(Path(flags.out_dir).absolute()),
            checkpoint=flags.checkpoint,
            device=flags.device,
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            version=version("graftlm"),
        )
        return Copies(self, replace(asked, sha256=_fingerprint(asked, loaded)))


def _whole(name: str) -> str:
    """A model's name; a local path from the root on, since a worker stands in another folder."""
    return str(Path(name).absolute()) if Path(name).exists() else name


# The commands of a comparison -----------------------------------------------------------------------------------------

TOKEN = ".ray-token"


@dataclass(frozen=True)
class Place:
    """What a node must have to run commands."""

    out_dir: str
    """The comparison's folder; a file there, TOKEN, holds `token`."""
    cwd: str
    """The folder that the command was given in, to which the names of its files are relative."""
    token: str
    version: str


class Elsewhere:
    """Commands on the cluster (see `commands.Commands`)."""

    def __init__(self, cluster: Cluster, place: Place, at_once: int) -> None:
        self.at_once = at_once
        self._cluster, self._place = cluster, place
        self._task = cluster.task(_command, retries=0)  # which words go on with a lost run is known here only
        self._running: set[Any] = set()
        self._stopped = False
        self._changing = threading.Lock()

    def run(self, words: Sequence[str], folder: Path) -> str:
        """See Commands."""
        with self._changing:
            if self._stopped:
                raise CommandFailed("stopped")
            ref = self._task.remote(self._place, folder.name, list(words), self._cluster.cpus, self._cluster.gpus > 0)
            self._running.add(ref)
        try:
            out, reason = self._cluster.get(ref)
        finally:
            with self._changing:
                self._running.discard(ref)
        if reason:
            raise CommandFailed(reason)
        return str(out)

    def stop(self) -> None:
        """See Commands."""
        with self._changing:
            self._stopped = True
            for ref in self._running:
                self._cluster.ray.cancel(ref)  # a KeyboardInterrupt in `_command`


def _complaint(place: Place) -> str:
    """What is wrong with this node, where a command is to run; nothing if it is fit."""
    if line := _unseen(place):
        return line
    command = [sys.executable, "-m", "graftlm", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place.cwd, check=False)
    found = done.stdout.strip().removeprefix("graft ")
    if found != place.version:
        there = f"has graftlm {found}" if found else "has no graftlm"
        return f"{there} for {sys.executable}; install {place.version}, the version here, on every node"
    return ""


def _unseen(place: Place) -> str:
    token = Path(place.out_dir, TOKEN)
    if not token.is_file() or token.read_text(encoding="utf-8") != place.token:
        return f"does not see --out_dir {place.out_dir}; name a folder on a file system that all nodes share"
    if not os.path.isdir(place.cwd):
        return f"does not see {place.cwd}; give the command in a folder on a file system that all nodes share"
    return ""


def _command(place: Place, name: str, words: list[str], cpus: int, on_gpu: bool) -> tuple[str, str]:
    """Run `graft WORDS` below this Ray worker, for the cell in the folder `name`: what it printed, why it failed."""
    if line := _unseen(place):
        return "", f"a node {line}"
    os.chdir(place.cwd)
    folder = Path(place.out_dir, name)
    environment = threads(cpus) if on_gpu else {**threads(cpus), "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / ".lock", "a") as lock:
        if not _held(lock.fileno()):
            return "", f"{folder}: a process of another worker still writes there"
        try:
            return run_graft(words, folder, environment, lock.fileno(), _wait), ""
        except CommandFailed as failure:
            return "", str(failure)


def _held(lock: int) -> bool:
    """Whether a lock could be had; a lost worker's command, which still has it, ends soon."""
    fcntl, until = posix_module("fcntl"), time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.1)


def _wait(child: "Child[str]") -> int:
    """Wait for a command; Ray's cancelling, a KeyboardInterrupt in this process, lets it finish its step and save."""
    while True:
        try:
            return child.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
        except KeyboardInterrupt:
            child.send_signal(signal.SIGTERM)  # not SIGINT, which Ray's own processes may have blocked


# The examples of an evaluation ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A model as each worker loads it, and what it must then be."""

    init_from: str
    out_dir: str
    checkpoint: str
    device: str
    dtype: str
    version: str
    sha256: str = ""
    """Of the weights (`_fingerprint`)."""


class Copies:
    """A model's copies on the cluster read for `evaluate` (see `evaluate.Reader`)."""

    def __init__(self, cluster: Cluster, asked: Asked) -> None:
        self._cluster, self._asked = cluster, asked
        self._task = cluster.task(_read, retries=LOST)

    def scores(
        self,
        examples: Sequence[Example],
        label_ids: LabelIds,
        batch_size: int,
        progress: Progress | None,
    ) -> Tensor:
        """See Reader."""
        shared = shared_length([example.prompt_ids for example in examples])
        batches = scored_together(examples, label_ids, batch_size)
        found = self._spread("scores", shared, batches, examples, (label_ids, batch_size), progress)
        return torch.tensor(found, dtype=torch.float64)

    def continuations(
        self, prompts: Sequence[Tokens], max_new_tokens: int, eot: int, batch_size: int, progress: Progress | None
    ) -> list[list[int]]:
        """See Reader."""
        shared = shared_length(prompts)
        groups = list(decoded_together([len(prompt) - shared for prompt in prompts], batch_size))
        return self._spread("continuations", shared, groups, prompts, (max_new_tokens, eot, batch_size), progress)

    def _spread(
        self,
        method: str,
        shared: int,
        batches: Sequence[Sequence[int]],
        items: Sequence[Any],
        settings: tuple[Any, ...],
        progress: Progress | None,
    ) -> list[Any]:
        """What a method of a reader gives for each item, the batches of which may be read apart."""
        ray, found = self._cluster.ray, [None] * len(items)
        pieces = {}
        for rows in reversed(pieces_of(batches, PIECES * self._cluster.places)):  # the longest texts first
            own = [items[row] for row in rows]
            on_gpu = self._cluster.gpus > 0
            pieces[self._task.remote(self._asked, on_gpu, method, shared, own, settings)] = rows
        waiting = list(pieces)
        while waiting:
            (ref,), waiting = ray.wait(waiting)
            rows = pieces.pop(ref)
            try:
                values = self._cluster.get(ref)
            except WorkerLost as lost:
                raise GraftError(
                    f"{LOST + 1} workers were lost over the same examples: out of memory? {lost}"
                ) from None
            for row, value in zip(rows, values, strict=True):
                found[row] = value
            if progress is not None:
                progress(len(rows))
        return found


def pieces_of(batches: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Batches in order, joined to at most so many pieces of nearly as many batches each."""
    count = min(most, len(batches))
    borders = [len(batches) * n // count for n in range(count + 1)] if count else []
    return [[row for batch in batches[a:b] for row in batch] for a, b in pairwise(borders)]


def _read(
    asked: Asked, on_gpu: bool, method: str, shared: int, items: list[Any], settings: tuple[Any, ...]
) -> list[Any] | Refusal:
    """One piece, on a worker; its values, or why there are none."""
    if not on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # none was declared; torch has not looked yet
    try:
        reader = Here(_loaded(asked).model, shared)
    except GraftError as error:
        return Refusal(f"on the node {socket.gethostname()}: {error}", error.exit_status)
    try:
        values = getattr(reader, method)(items, *settings, None)
    except GraftError as error:
        return Refusal(str(error), error.exit_status)
    return list(values.tolist() if isinstance(values, Tensor) else values)


@lru_cache(maxsize=1)
def _loaded(asked: Asked) -> Loaded:
    """The model, loaded once by each worker. Raises InputError where it is another than the one asked for."""
    if (own := version("graftlm")) != asked.version:
        raise InputError(f"graftlm is {own} there, {asked.version} here: install the same on every node")
    loaded = load(asked.init_from, asked.out_dir, asked.checkpoint, asked.device, asked.dtype)
    if _fingerprint(asked, loaded) != asked.sha256:
        raise InputError(f"{asked.init_from if loaded.run is None else asked.out_dir}: holds other weights there")
    return loaded


def _fingerprint(asked: Asked, loaded: Loaded) -> str:
    """A hash of the base's weights, and of all files of the run's checkpoint."""
    found = [base_hash(loaded.folder)]
    if loaded.run is not None:
        at = Path(asked.out_dir, asked.checkpoint)
        found += [f"{path.relative_to(at)} {sha256_file(path)}" for path in sorted(at.rglob("*")) if path.is_file()]
    return hashlib.sha256(json.dumps(found).encode("utf-8")).hexdigest()
