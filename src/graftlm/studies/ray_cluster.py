"""A Ray cluster to spread work over; `cluster_commands.py` runs a comparison there, `cluster_copies.py` an evaluation.

What is unusual here: Ray only finds room for the work and tells of lost workers. It is imported when it is asked for,
with its usage statistics off. A cluster started here listens on loopback only.
"""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from graftlm.config import RayFlags
from graftlm.errors import GraftError, InputError
from graftlm.studies.subprocess_runner import CommandFailed, WorkerLost

NODE_TIMEOUT = 10.0
"""Seconds that an address may take to answer, and a lost worker's process to end."""

STORE = 100_000_000
"""Bytes of the object store of a cluster started here; only figures pass through it."""


@dataclass(frozen=True)
class RemoteError:
    """A GraftError that was met elsewhere: its text and its exit status."""

    line: str
    status: int

    def error(self) -> GraftError:
        """The same error, here."""
        return InputError(self.line) if self.status == InputError.exit_status else GraftError(self.line)


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
            socket.create_connection((host.strip("[]"), int(port)), NODE_TIMEOUT).close()
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
        self.cpus, self.gpus = flags.cpus_per_task, flags.gpus_per_task
        self.nodes = [node for node in ray.nodes() if node["Alive"]]
        self.places = sum(map(self._room, self.nodes))
        """Tasks that find room at the same time."""
        if not self.places:
            most = {kind: max(node["Resources"].get(kind, 0) for node in self.nodes) for kind in ("CPU", "GPU")}
            raise InputError(
                f"--cpus_per_task {self.cpus} --gpus_per_task {self.gpus:g}: no node of the cluster has both; "
                f"the most that one has are {most['CPU']:g} CPUs and {most['GPU']:g} GPUs"
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
        if isinstance(value, RemoteError):
            raise value.error()
        return value
