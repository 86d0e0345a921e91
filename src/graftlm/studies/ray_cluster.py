"""A Ray cluster, and what runs on it: the commands of a comparison, and evaluation by replicas of a model.

Ray schedules tasks and reports lost workers. It is imported on first use, with its usage statistics off. A cluster
started here listens on loopback only. Each command runs in a child process of a Ray worker. All nodes must share the
comparison's folder, which is checked with a token file, and have the same version of graftlm.

An evaluation is split only between batches, and every part computes the same shared prefix. So the results equal those
of one process, bit for bit on the same CPU with the same number of threads. Each worker verifies a hash of the weights.

torch is imported only by the functions that evaluate.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftlm.config import EvaluateConfig
from graftlm.config.inference import RayFlags
from graftlm.errors import GraftError, InputError
from graftlm.files.atomic import lock_dir, write_text
from graftlm.files.formats import sha256_file
from graftlm.studies.subprocess_runner import (
    MAX_RETRIES,
    Child,
    CommandFailed,
    JobRunner,
    WorkerLost,
    num_cores,
    run_graft,
    thread_env,
)

if TYPE_CHECKING:
    from graftlm.exchange.load import ModelBundle
    from graftlm.inference.evaluate import Generation, LabelScoring, Predictor
    from graftlm.inference.generate import ProgressCallback

    Work = LabelScoring | Generation

NODE_TIMEOUT = 10.0
"""Seconds to wait for an address to answer, and for the process of a lost worker to end."""
OBJECT_STORE_BYTES = 100_000_000
"""Of a cluster started here; only small results pass through it."""
TOKEN = ".ray-token"


# The cluster ----------------------------------------------------------------------------------------------------------


@contextmanager
def connected(flags: RayFlags, log_level: str = "ERROR") -> Iterator["Cluster"]:
    """Connect to the cluster of --ray, and disconnect at the end. Workers' logs are shown below level ERROR.

    An existing connection of this process is reused. Raises InputError if there is no cluster, no ray package, or no
    node with the resources of a task.
    """
    ray = _import_ray(flags.ray)
    if ray.is_initialized():
        yield Cluster(ray, flags)
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**_init_args(flags.ray), log_to_driver=log_level != "ERROR", logging_level=log_level)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise InputError(f"--ray {flags.ray}: no cluster to connect to: {' '.join(str(error).split())}") from None
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has installed its own
        yield Cluster(ray, flags)
    finally:
        ray.shutdown()


def _import_ray(address: str) -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # some versions warn where it is not set
    if address.startswith(("local", "127.0.0.1:")):
        # In spite of its name: with 0, Ray takes loopback for this machine's address, as it does on macOS.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError("--ray needs the ray package: pip install 'graftlm[ray]'") from None
    return ray


def _init_args(address: str) -> dict[str, Any]:
    if address == "local":
        loopback = {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
        return {"address": address, "num_cpus": num_cores(), "object_store_memory": OBJECT_STORE_BYTES, **loopback}
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), NODE_TIMEOUT).close()
        except OSError as error:
            raise InputError(
                f"--ray {address}: no cluster answers there ({error.strerror or error}): start one with "
                "ray start --head, or use --ray local"
            ) from None
    return {"address": address}


class Cluster:
    """A cluster that this process is connected to."""

    def __init__(self, ray: Any, flags: RayFlags) -> None:
        self.ray = ray
        self.cpus, self.gpus = flags.cpus_per_task, flags.gpus_per_task
        self.nodes = [node for node in ray.nodes() if node["Alive"]]
        sizes = [(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)) for node in self.nodes]
        self.slots = sum(int(min(c // self.cpus, g // self.gpus if self.gpus else c)) for c, g in sizes)
        """The number of tasks that can run at the same time."""
        self.task_env = {} if self.gpus else {"CUDA_VISIBLE_DEVICES": ""}
        """Environment variables of a task's process, which hide GPUs from tasks without one."""
        if not self.slots:
            raise InputError(
                f"--cpus_per_task {self.cpus} --gpus_per_task {self.gpus:g}: no node of the cluster has both; the "
                f"largest has {max(c for c, _ in sizes):g} CPUs and {max(g for _, g in sizes):g} GPUs"
            )

    def task(self, function: Any, retries: int) -> Any:
        """The function as a Ray task with the resources of --cpus_per_task and --gpus_per_task."""
        return self.ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=retries)(function)

    def get(self, ref: Any) -> Any:
        """A task's result. Raises WorkerLost, CommandFailed if it was cancelled, and the task's own errors."""
        errors = self.ray.exceptions
        try:
            return self.ray.get(ref)
        except errors.TaskCancelledError:
            raise CommandFailed("stopped") from None
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.ObjectLostError) as e:
            raise WorkerLost(str(e).partition("\n")[0]) from None
        except errors.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, GraftError | CommandFailed):
                raise cause from None
            last = [line for line in str(error).splitlines() if line.strip()][-1]
            raise GraftError(f"a task failed on the cluster: {last.strip()}") from error


# Commands -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkerEnv:
    """What a node needs to run commands."""

    out_dir: str
    """The comparison's folder, with `token` in its file TOKEN."""
    cwd: str
    """The working directory, to which paths in the flags are relative."""
    token: str
    version: str


@contextmanager
def ray_runner(cluster: Cluster, out_dir: Path, max_parallel: int) -> Iterator["RayRunner"]:
    """A runner for a comparison in `out_dir`; every node is checked first.

    Raises InputError if a node does not see the folder, or has another version of graftlm.
    """
    env = WorkerEnv(str(out_dir.absolute()), os.getcwd(), secrets.token_hex(8), version("graftlm"))
    token = out_dir / TOKEN
    write_text(token, env.token)
    try:
        _check_nodes(cluster, env)
        yield RayRunner(cluster, env, max_parallel)
    finally:
        token.unlink(missing_ok=True)


def _check_nodes(cluster: Cluster, env: WorkerEnv) -> None:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = cluster.ray.remote(num_cpus=0, max_retries=MAX_RETRIES)(_check_node)
    strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in cluster.nodes]
    for ref in [task.options(scheduling_strategy=strategy).remote(env) for strategy in strategies]:
        with suppress(WorkerLost):  # a node that is gone runs no commands
            cluster.get(ref)


class RayRunner(JobRunner):
    """Commands as tasks of a cluster."""

    def __init__(self, cluster: Cluster, env: WorkerEnv, max_parallel: int) -> None:
        super().__init__(max_parallel)
        self._cluster, self._env = cluster, env
        self._task = cluster.task(_run_command, retries=0)  # the caller retries, with --resume

    def run(self, argv: Sequence[str], folder: Path) -> str:
        """See JobRunner."""
        if self._stopped:
            raise CommandFailed("stopped")
        environment = {**thread_env(self._cluster.cpus), **self._cluster.task_env}
        ref = self._task.remote(self._env, folder.name, list(argv), environment)
        with self._tracked(ref):
            return str(self._cluster.get(ref))

    def _cancel(self, job: Any) -> None:
        self._cluster.ray.cancel(job)  # a KeyboardInterrupt in `_run_command`


def _check_node(env: WorkerEnv) -> None:
    """Raises InputError if this node cannot run commands."""
    token, problem, installed = Path(env.out_dir, TOKEN), "", version("graftlm")
    if not token.is_file() or token.read_text(encoding="utf-8") != env.token:
        problem = f"does not see --out_dir {env.out_dir}; name a folder on a file system that all nodes share"
    elif not os.path.isdir(env.cwd):
        problem = f"does not see {env.cwd}; run the command in a folder on a file system that all nodes share"
    elif installed != env.version:
        problem = f"has graftlm {installed} ({sys.executable}); install {env.version}, the version here, on every node"
    if problem:
        raise InputError(f"node {socket.gethostname()}: {problem}")


def _run_command(env: WorkerEnv, trial: str, argv: list[str], environment: Mapping[str, str]) -> str:
    """Run `graft ARGV` for the trial's folder in a child of this Ray worker; returns its stdout."""
    folder = Path(env.out_dir, trial)
    try:
        _check_node(env)
        os.chdir(env.cwd)
        with lock_dir(folder, NODE_TIMEOUT, keep=True) as lock:  # the command of a lost worker ends soon
            return run_graft(argv, folder, environment, lock, _wait)
    except InputError as error:
        raise CommandFailed(str(error)) from None


def _wait(child: "Child[str]") -> int:
    """Wait for a command. Cancelled by Ray (KeyboardInterrupt), it saves a checkpoint and ends."""
    while True:
        try:
            return child.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
        except KeyboardInterrupt:
            child.send_signal(signal.SIGTERM)  # not SIGINT, which Ray's own processes may block


# Evaluation -----------------------------------------------------------------------------------------------------------

CHUNKS_PER_SLOT = 4
"""More chunks balance the load better, but each computes the shared prefix again."""


@dataclass(frozen=True)
class ModelSpec:
    """A model that each worker loads, and what the worker verifies."""

    name: str
    """A base, or a run folder."""
    args: tuple[str, str, str, str]
    """Of `load`: checkpoint, device, dtype, base_format."""
    version: str
    environment: tuple[tuple[str, str], ...]
    """Environment variables to set before torch looks for devices."""
    sha256: str = ""
    """Of the weights (`_fingerprint`)."""


def ray_predictor(cluster: Cluster, config: EvaluateConfig, loaded: "ModelBundle") -> "Predictor":
    """A predictor for `evaluate` with replicas of `loaded`, which `config` names."""
    name = loaded.name if loaded.source is None else str(loaded.source.folder)
    checkpoint = "best" if loaded.source is None else loaded.source.checkpoint
    name = str(Path(name).absolute()) if Path(name).exists() else name
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    args, environment = (checkpoint, config.device, dtype, loaded.base_format), tuple(cluster.task_env.items())
    spec = ModelSpec(name, args, version("graftlm"), environment)
    spec = replace(spec, sha256=_fingerprint(spec, loaded))
    task = cluster.task(_run_chunk, retries=MAX_RETRIES)

    def predict(work: "Work", progress: "ProgressCallback | None" = None) -> list[Any]:
        batches, shared = work.batches(), work.shared()
        results: list[Any] = [None] * sum(map(len, batches))
        chunks = chunk_batches(batches, CHUNKS_PER_SLOT * cluster.slots)[::-1]  # longest first
        refs = [task.remote(spec, work.select(rows), shared) for rows in chunks]
        for rows, ref in zip(chunks, refs, strict=True):
            try:
                values = cluster.get(ref)
            except WorkerLost as lost:
                again = f"{MAX_RETRIES + 1} workers were lost on the same examples: out of memory?"
                raise GraftError(f"{again} {lost}") from None
            for row, value in zip(rows, values, strict=True):
                results[row] = value
            if progress is not None:
                progress(len(rows))
        return results

    return predict


def chunk_batches(batches: Sequence[Sequence[int]], max_chunks: int) -> list[list[int]]:
    """Consecutive batches concatenated into at most `max_chunks` chunks, with nearly the same number of batches."""
    count = min(max_chunks, len(batches))
    bounds = [len(batches) * n // count for n in range(count + 1)] if count else []
    return [[row for batch in batches[a:b] for row in batch] for a, b in pairwise(bounds)]


def _run_chunk(spec: ModelSpec, work: "Work", shared: int) -> list[Any]:
    """The results of one chunk, on a worker."""
    os.environ.update(spec.environment)
    try:
        model = _load(spec).model
    except GraftError as error:
        raise type(error)(f"on node {socket.gethostname()}: {error}") from None
    return list(work.run(model, shared, None))


@lru_cache(maxsize=1)
def _load(spec: ModelSpec) -> "ModelBundle":
    """The model, loaded once per worker. Raises InputError if the version or the weights differ."""
    from graftlm.exchange.load import load

    if (installed := version("graftlm")) != spec.version:
        raise InputError(f"graftlm is {installed} there and {spec.version} here: install the same on every node")
    loaded = load(spec.name, None, *spec.args)
    if _fingerprint(spec, loaded) != spec.sha256:
        raise InputError(f"{spec.name}: has other weights there")
    return loaded


def _fingerprint(spec: ModelSpec, loaded: "ModelBundle") -> str:
    """A hash of the base's weights and of all files of the run's checkpoint."""
    from graftlm.exchange.huggingface import base_hash

    hashes = [base_hash(loaded.folder)]
    if loaded.source is not None and (folder := loaded.source.path) is not None:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        hashes += [f"{path.relative_to(folder)} {sha256_file(path)}" for path in files]
    return hashlib.sha256(json.dumps(hashes).encode("utf-8")).hexdigest()
