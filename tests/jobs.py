"""Several commands in one start of torchrun, which takes seconds each time: `torchrun … jobs.py FOLDER`.

FOLDER/jobs.json holds {name: {"words": of a graft command, "plan": whether it makes a plan, "stop": a step in which
SIGTERM comes, or null, "copy": [a run folder, where to copy it before], or null, "full": whether the second process's
disk is full, "watch": whether all but the first row below is wanted, which takes time}}. FOLDER/answers-RANK.json then
holds for each what this process saw:

    status, out, err  of the command
    read, own, whole  bytes that were read of the base; that are held of the model behind it; of the whole model
    peak              bytes of tensors that came to be while the base was read, at most (it looks now and then)
    saved, kept       gathered weights of blocks that autograd saved in forward passes, and the bytes left of them then
"""

import contextlib
import errno
import gc
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm import cli
from graftlm.exchange import huggingface
from graftlm.files import formats
from graftlm.files.atomic import disk_errors
from graftlm.files.formats import is_sharded, to_local
from graftlm.training import reporting, setup, train
from graftlm.training.distributed import DistContext
from graftlm.training.estimate import Estimate
from graftlm.training.trainer import Trainer

LOOK, PASSES = 16, 4
seen: dict[str, Any] = {}
stop_at: list[int | None] = [None]


def alive() -> int:
    """Bytes of all tensors that there are; what several look at counts once."""
    found: dict[int, int] = {}
    for t in gc.get_objects():
        if issubclass(type(t), Tensor) and t.device.type == "cpu":
            t = to_local(t.detach())
            found[t.data_ptr()] = max(found.get(t.data_ptr(), 0), t.nbytes)
    return sum(found.values())


def watched(stored_rows: Callable[..., Any]) -> Callable[..., Iterator[tuple[str, Tensor]]]:
    """`iter_local_shards` that looks at what it hands out, and at what is alive meanwhile."""

    def rows(model: Any, folder: Path, wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        if not seen["watch"]:
            yield from stored_rows(model, folder, wanted)
            return
        gc.collect()  # what the last command left would be let go of meanwhile
        before, first = alive(), "read" not in seen  # it is called for a checkpoint too
        seen["whole"] = sum(p.nbytes for p in model.parameters())
        for n, (name, part) in enumerate(stored_rows(model, folder, wanted)):
            if first:
                seen["read"] = seen.get("read", 0) + part.nbytes
            if n % LOOK == LOOK - 1:
                seen["peak"] = max(seen.get("peak", 0), alive() - before)
            yield name, part
        seen["own"] = sum(to_local(p).nbytes for p in model.parameters())

    return rows


def watching(loss: Callable[..., Any]) -> Callable[..., Any]:
    """A loss that looks at what autograd saves of the weights that are gathered for a block."""

    def looked_at(model: Any, batch: Any) -> Any:
        kept: list[torch.UntypedStorage] = []
        seen["passes"] = seen.get("passes", 0) + 1
        if not seen["watch"] or seen["passes"] > PASSES:
            return loss(model, batch)

        def save(t: Tensor) -> Tensor:
            if t.dim() != 2:
                return t
            gathered = [p for block in model.blocks for p in block.parameters() if p.dim() == 2 and not is_sharded(p)]
            wide = [p for p in gathered if min(p.shape) > 8]  # not A and B of LoRA, which each process has
            if any(view.shape == p.shape and torch.equal(view, p.to(view.dtype)) for p in wide for view in (t, t.mT)):
                kept.append(t.untyped_storage())
            return t

        with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            found = loss(model, batch)
        seen["saved"] = seen.get("saved", 0) + len(kept)
        seen["kept"] = seen.get("kept", 0) + sum(storage.nbytes() for storage in kept)
        return found

    return looked_at


def unplanned(*_: Any, **__: Any) -> Estimate:
    """A plan that no time went into."""
    return Estimate(*[1] * len(fields(Estimate)))


def no_whole_model(*_: Any) -> None:
    raise AssertionError("a process read the whole model")


def patch(world: DistContext) -> None:
    """One process group for all commands; a look at what they hold; signals."""
    places: Any = (DistContext, Trainer, huggingface, setup)
    module: Any = train
    peaks: Any = reporting
    peaks.measure_matmul_flops = lambda device, dtype: 1e9  # in bfloat16 a CPU may take half a minute to measure it
    plan, step, begin, load = train.make_plan, Trainer.train_step, train.make_trainer, setup.load_model

    def stopped(self: Trainer, number: int, batches: list[list[int]]) -> Any:
        if number == stop_at[0] and world.rank == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(self, number, batches)

    def begun(*args: Any) -> Trainer:
        trainer: Any = begin(*args)
        trainer.objective.loss = watching(trainer.objective.loss)
        return trainer

    def written(path: Path, *args: Any) -> None:
        with disk_errors(path):
            if seen["full"] and world.rank == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *args)

    files: Any = formats
    write, files.write_safetensors = formats.write_safetensors, written
    places[0].start, places[0].close = classmethod(lambda cls, device: world), lambda self: None
    places[1].train_step, module.make_trainer = stopped, begun
    places[2].iter_local_shards = watched(huggingface.iter_local_shards)
    os.fsync = lambda fd: None  # no test cuts the power
    module.make_plan = lambda *args, **options: (plan if seen["plan"] else unplanned)(*args, **options)
    places[3].load_model = lambda *args: no_whole_model() if seen["cut"] else load(*args)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    world, close = DistContext.start("cpu"), DistContext.close
    patch(world)
    gc.freeze()  # what is there by now need not be looked through for tensors
    answers = {}
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        seen.clear()
        seen.update(plan=job["plan"], full=job["full"], watch=job["watch"])
        seen["cut"] = "--shard" in job["words"] or "--rank=0" in job["words"]
        stop_at[0] = job["stop"]
        if job["copy"] and world.is_main:
            shutil.copytree(job["copy"][0], job["copy"][1], symlinks=True)
        world.all_gather([0])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.run(job["words"])
        answers[name] = {**seen, "status": status, "out": out.getvalue(), "err": err.getvalue()}
    (folder / f"answers-{world.rank}.json").write_text(json.dumps(answers))
    close(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
