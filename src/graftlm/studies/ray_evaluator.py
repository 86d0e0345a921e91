"""The examples of an evaluation, read by copies of a model on a Ray cluster.

What is unusual here: an evaluation is cut only where `evaluate` begins a new batch, and every piece runs the same first
tokens apart. So the numbers are those of one process, to the bit where processor and number of threads are the same.
Each worker's graftlm is looked at by its version, and its model by a hash of the weights, before it reads anything.
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

from graftlm.errors import GraftError, InputError
from graftlm.exchange.huggingface import base_hash
from graftlm.exchange.load import Loaded, load
from graftlm.files.formats import sha256_file
from graftlm.inference.evaluate import Generation, LabelScoring
from graftlm.inference.generate import ProgressCallback
from graftlm.studies.ray_cluster import Cluster, RemoteError
from graftlm.studies.subprocess_runner import MAX_RETRIES, WorkerLost

PIECES = 4
"""Pieces of an evaluation for each place that works: more balance better, and each reads the shared tokens again."""


def copies(cluster: Cluster, flags: Any, loaded: Loaded) -> "RayPredictor":
    """Copies of a loaded model on the cluster, to be given to `evaluate`; `flags` say what was loaded."""
    local = flags.init_from if flags.init_from == "resume" else _whole(flags.init_from)
    asked = ModelSpec(
        init_from=local,
        out_dir=str(Path(flags.out_dir).absolute()),
        checkpoint=flags.checkpoint,
        device=flags.device,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        version=version("graftlm"),
    )
    return RayPredictor(cluster, replace(asked, sha256=_fingerprint(asked, loaded)))


def _whole(name: str) -> str:
    """A model's name; a local path from the root on, since a worker stands in another folder."""
    return str(Path(name).absolute()) if Path(name).exists() else name


@dataclass(frozen=True)
class ModelSpec:
    """A model as each worker loads it, and what it must then be."""

    init_from: str
    out_dir: str
    checkpoint: str
    device: str
    dtype: str
    version: str
    sha256: str = ""
    """Of the weights (`_fingerprint`)."""


class RayPredictor:
    """A predictor for `evaluate` with copies of a model on the cluster."""

    def __init__(self, cluster: Cluster, asked: ModelSpec) -> None:
        self._cluster, self._asked = cluster, asked
        self._task = cluster.task(_run, retries=MAX_RETRIES)

    def __call__(self, work: LabelScoring | Generation, progress: ProgressCallback | None = None) -> list[Any]:
        """See Predictor. The work is split between batches only, so the results are those of one process."""
        ray, batches, shared = self._cluster.ray, work.batches(), work.shared()
        results: list[Any] = [None] * sum(map(len, batches))
        pieces = {}
        for rows in reversed(chunk_batches(batches, PIECES * self._cluster.places)):  # the longest texts first
            pieces[self._task.remote(self._asked, self._cluster.gpus > 0, work.select(rows), shared)] = rows
        waiting = list(pieces)
        while waiting:
            (ref,), waiting = ray.wait(waiting)
            rows = pieces.pop(ref)
            try:
                values = self._cluster.get(ref)
            except WorkerLost as lost:
                raise GraftError(
                    f"{MAX_RETRIES + 1} workers were lost over the same examples: out of memory? {lost}"
                ) from None
            for row, value in zip(rows, values, strict=True):
                results[row] = value
            if progress is not None:
                progress(len(rows))
        return results


def chunk_batches(batches: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Batches in order, joined to at most so many pieces of nearly as many batches each."""
    count = min(most, len(batches))
    borders = [len(batches) * n // count for n in range(count + 1)] if count else []
    return [[row for batch in batches[a:b] for row in batch] for a, b in pairwise(borders)]


def _run(asked: ModelSpec, on_gpu: bool, work: LabelScoring | Generation, shared: int) -> list[Any] | RemoteError:
    """One piece of the work, on a worker; its values, or the error."""
    if not on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # none was declared; torch has not looked yet
    try:
        model = _loaded(asked).model
    except GraftError as error:
        return RemoteError(f"on the node {socket.gethostname()}: {error}", error.exit_status)
    try:
        return list(work.run(model, shared, None))
    except GraftError as error:
        return RemoteError(str(error), error.exit_status)


@lru_cache(maxsize=1)
def _loaded(asked: ModelSpec) -> Loaded:
    """The model, loaded once by each worker. Raises InputError where it is another than the one asked for."""
    if (own := version("graftlm")) != asked.version:
        raise InputError(f"graftlm is {own} there, {asked.version} here: install the same on every node")
    loaded = load(asked.init_from, asked.out_dir, asked.checkpoint, asked.device, asked.dtype)
    if _fingerprint(asked, loaded) != asked.sha256:
        raise InputError(f"{asked.init_from if loaded.run is None else asked.out_dir}: holds other weights there")
    return loaded


def _fingerprint(asked: ModelSpec, loaded: Loaded) -> str:
    """A hash of the base's weights, and of all files of the run's checkpoint."""
    found = [base_hash(loaded.folder)]
    if loaded.run is not None:
        at = Path(asked.out_dir, asked.checkpoint)
        found += [f"{path.relative_to(at)} {sha256_file(path)}" for path in sorted(at.rglob("*")) if path.is_file()]
    return hashlib.sha256(json.dumps(found).encode("utf-8")).hexdigest()
