"""Evaluation on a Ray cluster: replicas of a model, each with a part of the examples.

The examples are split only between batches, and every part computes the same shared prefix. So the results equal those
of one process, bit for bit on the same CPU with the same number of threads. Each worker verifies the version of
graftlm and a hash of the weights before it starts.
"""

import hashlib
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from graftlm.config import EvaluateConfig
from graftlm.errors import GraftError, InputError
from graftlm.exchange.huggingface import base_hash
from graftlm.exchange.load import ModelBundle, load
from graftlm.files.formats import sha256_file
from graftlm.inference.evaluate import Generation, LabelScoring
from graftlm.inference.generate import ProgressCallback
from graftlm.studies.ray_cluster import Cluster
from graftlm.studies.subprocess_runner import MAX_RETRIES, WorkerLost

CHUNKS_PER_SLOT = 4
"""More chunks balance the load better, but each computes the shared prefix again."""


@dataclass(frozen=True)
class ModelSpec:
    """A model that each worker loads, and what the worker verifies."""

    args: tuple[str, str, str, str, str]
    """Of `load`: init_from, out_dir, checkpoint, device, dtype."""
    version: str
    environment: tuple[tuple[str, str], ...]
    """Environment variables to set before torch looks for devices."""
    sha256: str = ""
    """Of the weights (`_fingerprint`)."""


def ray_predictor(cluster: Cluster, config: EvaluateConfig, loaded: ModelBundle) -> "RayPredictor":
    """A predictor for `evaluate` with replicas of `loaded`, which `config` names."""
    is_path = config.init_from != "resume" and Path(config.init_from).exists()
    init_from = str(Path(config.init_from).absolute()) if is_path else config.init_from
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    args = (init_from, str(Path(config.out_dir).absolute()), config.checkpoint, config.device, dtype)
    spec = ModelSpec(args, version("graftlm"), tuple(cluster.task_env.items()))
    return RayPredictor(cluster, replace(spec, sha256=_fingerprint(spec, loaded)))


class RayPredictor:
    """An `evaluate.Predictor` whose work is done by replicas on a cluster."""

    def __init__(self, cluster: Cluster, spec: ModelSpec) -> None:
        self._cluster, self._spec = cluster, spec
        self._task = cluster.task(_run_chunk, retries=MAX_RETRIES)

    def __call__(self, work: LabelScoring | Generation, progress: ProgressCallback | None = None) -> list[Any]:
        """See Predictor. The work is split only between batches, so the results are those of one process."""
        batches, shared = work.batches(), work.shared()
        results: list[Any] = [None] * sum(map(len, batches))
        chunks = {
            self._task.remote(self._spec, work.select(rows), shared): rows
            for rows in reversed(chunk_batches(batches, CHUNKS_PER_SLOT * self._cluster.slots))  # longest first
        }
        pending = list(chunks)
        while pending:
            (ref,), pending = self._cluster.ray.wait(pending)
            try:
                values = self._cluster.get(ref)
            except WorkerLost as lost:
                raise GraftError(
                    f"{MAX_RETRIES + 1} workers were lost on the same examples: out of memory? {lost}"
                ) from None
            for row, value in zip(chunks[ref], values, strict=True):
                results[row] = value
            if progress is not None:
                progress(len(chunks[ref]))
        return results


def chunk_batches(batches: Sequence[Sequence[int]], max_chunks: int) -> list[list[int]]:
    """Consecutive batches concatenated into at most `max_chunks` chunks, with nearly the same number of batches."""
    count = min(max_chunks, len(batches))
    bounds = [len(batches) * n // count for n in range(count + 1)] if count else []
    return [[row for batch in batches[a:b] for row in batch] for a, b in pairwise(bounds)]


def _run_chunk(spec: ModelSpec, work: LabelScoring | Generation, shared: int) -> list[Any]:
    """The results of one chunk, on a worker."""
    os.environ.update(spec.environment)
    try:
        model = _load(spec).model
    except GraftError as error:
        raise type(error)(f"on node {socket.gethostname()}: {error}") from None
    return list(work.run(model, shared, None))


@lru_cache(maxsize=1)
def _load(spec: ModelSpec) -> ModelBundle:
    """The model, loaded once per worker. Raises InputError if the version or the weights differ."""
    if (installed := version("graftlm")) != spec.version:
        raise InputError(f"graftlm is {installed} there and {spec.version} here: install the same on every node")
    loaded = load(*spec.args)
    if _fingerprint(spec, loaded) != spec.sha256:
        raise InputError(f"{spec.args[0 if loaded.run is None else 1]}: has other weights there")
    return loaded


def _fingerprint(spec: ModelSpec, loaded: ModelBundle) -> str:
    """A hash of the base's weights and of all files of the run's checkpoint."""
    hashes = [base_hash(loaded.folder)]
    if loaded.run is not None:
        folder = Path(*spec.args[1:3])
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        hashes += [f"{path.relative_to(folder)} {sha256_file(path)}" for path in files]
    return hashlib.sha256(json.dumps(hashes).encode("utf-8")).hexdigest()
