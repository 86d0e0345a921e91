"""Distributed training: `torchrun --nproc_per_node 2 -m graftlm train …`.

    adapters            data parallel: every rank holds the model and takes its rows of every batch; the gradients of
                        the trained weights are summed (Li et al. 2020)
    full fine-tuning    weights, gradients and optimizer state are sharded across ranks, and a block's weights are
                        gathered while it computes (FSDP2; Zhao et al. 2023, after ZeRO, Rajbhandari et al. 2020)
    --shard             the same for an adapter's frozen base; the adapter is trained as in data parallel

`--batch_size` is that of all ranks together and gradients are summed, never averaged, so a run on N ranks equals a run
in a single process, except for rounding and dropout masks. Gradients of adapters are summed by an all-reduce of flat
buckets after the backward pass and not by torch's DistributedDataParallel: that averages, needs the same number of
passes on every rank, and hooks into one `forward`, while here a rank may have no row at all and the model is called
through several methods. Adapters' gradients are small, so overlapping them with the backward pass would gain little.

Forward passes without gradient may differ in number between ranks, although sharded weights are gathered by all ranks
at once (`uneven_forward`). Nothing is sent through pickle: text travels as JSON.

Letters: N ranks.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn

from graftlm.errors import GraftError, InputError, Interrupted
from graftlm.inference.generate import eval_mode
from graftlm.methods.base import master_dtype
from graftlm.models.base import CausalLM

BUCKET = 6_553_600
"""Maximum elements of an all-reduce: 25 MiB of float32, as in DistributedDataParallel."""

_ERRORS: dict[int, type[GraftError]] = {1: GraftError, 2: InputError, 130: Interrupted}


@dataclass
class DistContext:
    """This process as one rank of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Its rank on its machine: the number of its GPU."""
    backend: str = ""
    """gloo or nccl; empty in a single process."""
    bytes_communicated: int = field(default=0, repr=False)
    """Bytes that this rank sent in collectives, without those of sharded weights."""

    @classmethod
    def start(cls, device: str) -> "DistContext":
        """Initialise the process group if torchrun started this process. `device` is --device."""
        world = from_environment(os.environ)
        if world.size == 1:
            return world
        cuda = device in ("auto", "cuda") and torch.cuda.is_available()
        if device not in ("auto", "cuda", "cpu"):
            raise world.on_all_ranks(
                InputError(f"--device {device}: in several processes each takes its own; use auto, cuda or cpu")
            )
        if cuda:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
            if here > torch.cuda.device_count():
                raise world.on_all_ranks(
                    InputError(
                        f"torchrun: {here} processes on a machine with {torch.cuda.device_count()} GPU(s); lower "
                        "--nproc_per_node, or use --device cpu"
                    )
                )
            torch.cuda.set_device(world.local_rank)
        world.backend = "nccl" if cuda else "gloo"
        try:
            distributed.init_process_group(world.backend)
        except (RuntimeError, ValueError) as error:  # distributed.DistError is a RuntimeError
            raise InputError(f"torchrun: the processes did not find each other: {error}") from error
        return world

    def close(self) -> None:
        """Destroy the process group, after the last collective."""
        if self.size > 1:
            distributed.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    @property
    def device_flag(self) -> str:
        """--device auto or cuda for this rank."""
        return f"cuda:{self.local_rank}" if self.backend == "nccl" else "cpu"

    def to_json(self) -> dict[str, Any]:
        """What run.json records."""
        return {"world_size": self.size, "backend": self.backend or None}

    # Batches ---------------------------------------------------------------------------------------------------------

    def partition(self, rows: Sequence[int], lengths: Sequence[int] | Mapping[int, int]) -> list[int]:
        """This rank's rows of a batch, in the batch's order; may be empty. `lengths` [tokens] are indexed by row.

        Rows are dealt out by length, back and forth (0, 1, 1, 0, 0, …), so that all ranks have about the same work.
        """
        if self.size == 1:
            return list(rows)
        order = sorted(range(len(rows)), key=lambda n: (lengths[rows[n]], n))
        there_and_back = [*range(self.size), *reversed(range(self.size))]
        mine = {n for place, n in enumerate(order) if there_and_back[place % len(there_and_back)] == self.rank}
        return [row for n, row in enumerate(rows) if n in mine]

    # Collectives -----------------------------------------------------------------------------------------------------

    def all_gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Every rank's numbers, by rank; float64."""
        if self.size == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        return self._all_gather(own).tolist()

    def all_reduce_numbers(self, numbers: Sequence[float]) -> list[float]:
        """The sums of all ranks' numbers, added in the order of ranks: the same bits on every rank."""
        return [sum(column) for column in zip(*self.all_gather(numbers), strict=True)]

    def all_reduce_sum(self, t: Tensor) -> Tensor:
        """The sum of all ranks' tensors of this shape."""
        return t if self.size == 1 else self._all_reduce(t.to(self._device).clone()).to(t.device)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value (anything JSON can hold), on all ranks."""
        return value if self.size == 1 else json.loads(self._broadcast_text(json.dumps(value), 0))

    def raise_on_any_rank(self, error: GraftError | None) -> None:
        """Raise on all ranks if any has an error: that of the lowest rank, which is printed once."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        statuses = [int(status) for (status,) in self.all_gather([0 if error is None else error.exit_status])]
        rank = next((rank for rank, status in enumerate(statuses) if status), None)
        if rank is None:
            return
        line = self._broadcast_text(str(error) if self.rank == rank else "", rank)
        common = _ERRORS[statuses[rank]](line if rank == 0 else f"process {rank}: {line}")
        common.told = not self.is_main
        raise common from error

    @contextmanager
    def same_error_on_all_ranks(self) -> Iterator[None]:
        """Run a local block, without collectives, on every rank; if any rank raises, all ranks raise."""
        caught = None
        try:
            yield
        except GraftError as error:
            caught = error
        self.raise_on_any_rank(caught)

    def on_all_ranks(self, error: GraftError) -> GraftError:
        """An error that every rank raises by itself and only rank 0 prints."""
        error.told = not self.is_main
        return error

    def all_reduce_gradients(self, params: Sequence[nn.Parameter]) -> None:
        """Sum every parameter's gradient over all ranks; a missing gradient counts as zero."""
        if self.size == 1:
            return
        for bucket in buckets(params):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
            for p, part in zip(bucket, self._all_reduce(flat).split([p.numel() for p in bucket]), strict=True):
                p.grad = part.view_as(p)

    @property
    def _device(self) -> torch.device:
        return torch.device(self.device_flag)

    def _all_reduce(self, t: Tensor) -> Tensor:
        self.bytes_communicated += t.numel() * t.element_size()
        with together():
            distributed.all_reduce(t)
        return t

    def _all_gather(self, own: Tensor) -> Tensor:
        self.bytes_communicated += own.numel() * own.element_size()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with together():
            distributed.all_gather(parts, own)
        return torch.stack(parts)

    def _broadcast_text(self, text: str, rank: int) -> str:
        data = text.encode() if self.rank == rank else b""
        length = int(max(size for (size,) in self.all_gather([len(data)])))
        buffer = torch.tensor(list(data.ljust(length)), dtype=torch.uint8, device=self._device)
        with together():
            distributed.broadcast(buffer, rank)
        return bytes(buffer.tolist()).decode()


class PeerExited(GraftError):
    """Another rank has ended; its own error line says why."""


@contextmanager
def together() -> Iterator[None]:
    """A collective: its failure means that another rank is gone."""
    try:
        yield
    except RuntimeError as error:
        raise PeerExited("another process of this run has ended; its own line says why") from error


def from_environment(environ: Mapping[str, str]) -> DistContext:
    """Rank and world size as torchrun sets them; a single process without torchrun. InputError if they are wrong."""
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return DistContext()
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name not in environ:
            raise InputError(f"{name} is not set, but {other} is; launch with torchrun, or unset both")
    environ = {"LOCAL_RANK": environ["RANK"], **environ}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if not environ[name].isdigit():
            raise InputError(f"{name}={environ[name]}: not a number: launch with torchrun, which sets it")
    rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    if rank >= size:
        raise InputError(f"RANK={rank} of WORLD_SIZE={size}: ranks are 0 to {size - 1}: launch with torchrun")
    if size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environ:
                raise InputError(f"{name} is not set, but WORLD_SIZE is {size}: launch with torchrun, which sets it")
    return DistContext(rank, size, int(environ["LOCAL_RANK"]))


def buckets(params: Sequence[nn.Parameter], most: int = BUCKET) -> list[list[nn.Parameter]]:
    """Consecutive parameters of one dtype, at most `most` elements in a bucket, or a single parameter."""
    result: list[list[nn.Parameter]] = []
    for p in params:
        last = result[-1] if result else []
        if last and last[0].dtype == p.dtype and sum(q.numel() for q in last) + p.numel() <= most:
            last.append(p)
        else:
            result.append([p])
    return result


# Sharded weights ------------------------------------------------------------------------------------------------------


def shard(model: CausalLM, world: DistContext, own: Set[nn.Parameter]) -> None:
    """Shard all weights but each rank's `own` (FSDP2): every block is a unit, the rest is one more.

    The weights may still be on the meta device. Gradients of sharded weights are summed, not averaged. From then on all
    ranks must make the same number of passes, except within `uneven_forward`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh("cuda" if world.backend == "nccl" else "cpu", (world.size,))
    # A block's weights are gathered in the dtype that they compute in. If they were cast after gathering, autograd
    # would save each cast copy, and with them the whole model. The root stays gathered until the backward pass anyway.
    policy = MixedPrecisionPolicy(model.dtype, master_dtype(model.dtype), cast_forward_inputs=False)
    for module in (*model.blocks, model):
        own_policy = MixedPrecisionPolicy(cast_forward_inputs=False) if module is model else policy
        fully_shard(module, mesh=mesh, mp_policy=own_policy, ignored_params=set(own))
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # The head belongs to the root and is used after these calls; the root stays gathered until its backward pass ends.
    for name in ("hidden_states", "forward_shared_prefix"):
        register_fsdp_forward_method(model, name)


def warmup_fsdp(model: CausalLM) -> None:
    """Run one token through the sharded model.

    In the first pass FSDP determines the order of its units. Units that it does not see then (the estimate runs
    truncated models) would stay gathered after their own passes.
    """
    with unsharded_root(model), eval_mode(model):
        _dummy_forward(model)


def _dummy_forward(model: CausalLM) -> None:
    model.hidden_states(torch.zeros(1, 1, dtype=torch.long, device=model.device))


def model_is_sharded(model: CausalLM) -> bool:
    """Whether its weights are sharded across ranks."""
    return hasattr(model, "unshard")


@contextmanager
def uneven_forward(model: CausalLM, world: DistContext) -> Iterator[None]:
    """Within it each rank may make any number of forward passes without gradient.

    A sharded block is gathered by all ranks at once. So before each pass the ranks exchange which of them continue, and
    a rank that has finished makes dummy passes until all have. No other collectives within.
    """
    if not model_is_sharded(model):
        yield
        return

    def sync_hook(*_: Any) -> None:
        world.all_gather([1])

    with unsharded_root(model):  # else a pass might begin with another collective
        hook = model.blocks[0].register_forward_pre_hook(sync_hook, prepend=True)
        try:
            yield
        finally:
            hook.remove()
        with eval_mode(model):
            while any(more for (more,) in world.all_gather([0])):
                _dummy_forward(model)


@contextmanager
def unsharded_root(model: CausalLM) -> Iterator[None]:
    """Within it the root's weights (embedding, last norm, head) are gathered on every rank.

    Its gradients are dropped afterwards.
    """
    root: Any = model
    if model_is_sharded(model):
        root.unshard()
    try:
        yield
    finally:
        if model_is_sharded(model):
            model.zero_grad(set_to_none=True)
            root.reshard()
