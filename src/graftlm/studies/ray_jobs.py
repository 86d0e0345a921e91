"""The commands of a comparison on a Ray cluster: each runs below a Ray worker as it would run here.

What is unusual here: all nodes share the comparison's folder, and nothing else. So that is looked at before it is used:
the folder by a token that every node must find there, and the nodes' graftlm by its version. A command that was lost is
given again and goes on from its last checkpoint.
"""

import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from graftlm.errors import InputError
from graftlm.files.atomic import write_text
from graftlm.files.locks import lock_dir
from graftlm.studies.ray_cluster import NODE_TIMEOUT, Cluster
from graftlm.studies.subprocess_runner import MAX_RETRIES, Child, CommandFailed, WorkerLost, run_graft, threads

TOKEN = ".ray-token"


@contextmanager
def commands(cluster: Cluster, out_dir: Path, max_parallel: int) -> Iterator["RayRunner"]:
    """Where the commands of a comparison in `out_dir` run: at most so many at once; every node is looked at first.

    Raises InputError where a node does not see the folder, or has no graftlm of this version.
    """
    place = WorkerEnv(str(out_dir.absolute()), os.getcwd(), secrets.token_hex(8), version("graftlm"))
    token = out_dir / TOKEN
    write_text(token, place.token)
    try:
        _look(cluster, place)
        yield RayRunner(cluster, place, max_parallel)
    finally:
        token.unlink(missing_ok=True)


def _look(cluster: Cluster, place: "WorkerEnv") -> None:
    """Every node's look at the place; an InputError with the first complaint."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = cluster.ray.remote(num_cpus=0, max_retries=MAX_RETRIES)(_node_problem)
    refs = []
    for node in cluster.nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        refs.append(look.options(scheduling_strategy=there).remote(place))
    for node, ref in zip(cluster.nodes, refs, strict=True):
        try:
            complaint = cluster.get(ref)
        except WorkerLost:
            continue  # a node that is gone has nothing to complain of
        if complaint:
            raise InputError(f"node {node['NodeManagerAddress']}: {complaint}")


@dataclass(frozen=True)
class WorkerEnv:
    """What a node must have to run commands."""

    out_dir: str
    """The comparison's folder; a file there, TOKEN, holds `token`."""
    cwd: str
    """The folder that the command was given in, to which the names of its files are relative."""
    token: str
    version: str


class RayRunner:
    """Commands on the cluster (see `commands.JobRunner`)."""

    def __init__(self, cluster: Cluster, place: WorkerEnv, max_parallel: int) -> None:
        self.max_parallel = max_parallel
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


def _node_problem(place: WorkerEnv) -> str:
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


def _unseen(place: WorkerEnv) -> str:
    token = Path(place.out_dir, TOKEN)
    if not token.is_file() or token.read_text(encoding="utf-8") != place.token:
        return f"does not see --out_dir {place.out_dir}; name a folder on a file system that all nodes share"
    if not os.path.isdir(place.cwd):
        return f"does not see {place.cwd}; give the command in a folder on a file system that all nodes share"
    return ""


def _command(place: WorkerEnv, name: str, words: list[str], cpus: int, on_gpu: bool) -> tuple[str, str]:
    """Run `graft WORDS` below this Ray worker, for the cell in the folder `name`: what it printed, why it failed."""
    if line := _unseen(place):
        return "", f"a node {line}"
    os.chdir(place.cwd)
    folder = Path(place.out_dir, name)
    environment = threads(cpus) if on_gpu else {**threads(cpus), "CUDA_VISIBLE_DEVICES": ""}
    try:
        with lock_dir(folder, NODE_TIMEOUT, keep=True) as lock:  # the command of a lost worker ends soon
            return run_graft(words, folder, environment, lock, _wait), ""
    except (CommandFailed, InputError) as failure:
        return "", str(failure)


def _wait(child: "Child[str]") -> int:
    """Wait for a command; Ray's cancelling, a KeyboardInterrupt in this process, lets it finish its step and save."""
    while True:
        try:
            return child.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
        except KeyboardInterrupt:
            child.send_signal(signal.SIGTERM)  # not SIGINT, which Ray's own processes may have blocked
