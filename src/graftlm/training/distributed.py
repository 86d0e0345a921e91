"""One run in several processes: `torchrun --nproc_per_node 2 -m graftlm train …`; what a process knows of the others.

    adapters            data parallel: every process holds the model, takes its rows of every batch, and the gradients
                        of what is trained are added up (Li et al. 2020)
    full fine-tuning    weights, gradients and moments are cut over the processes, and a block's weights are whole only
                        while it computes (FSDP2; Zhao et al. 2023, after ZeRO, Rajbhandari et al. 2020)
    --shard             the same for an adapter's frozen base; the adapter is trained as in the first way

What is unusual here: *the batch belongs to the run, not to the process*. `--batch_size` is that of all processes
together and gradients are added, never averaged, so a run in N processes is the run in one, but for rounding and for
dropout's masks. Gradients of adapters are added by a plain all-reduce of flat buckets and not by torch's
DistributedDataParallel: that averages, wants the same number of passes in every process, and hooks into one `forward`,
while here a process may have no row at all and the model is called through several methods. Adapters' gradients are
small, so little is lost by sending them behind the backward pass. And *processes need not make equally many passes*
without gradient, though cut weights are gathered by all at once: they tell each other who goes on (`uneven_forward`).
Nothing is sent through pickle: text travels as JSON.

In one process nothing here is ever called into torch.distributed, nor is it imported.

Letters: N processes.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graftlm.errors import GraftError, InputError, Interrupted
from graftlm.inference.generate import eval_mode
from graftlm.methods.base import master_dtype
from graftlm.models.base import CausalLM

BUCKET = 6_553_600
"""Elements that are sent together: 25 MiB of float32, what DistributedDataParallel sends."""

_ERRORS: dict[int, type[GraftError]] = {1: GraftError, 2: InputError, 130: Interrupted}


@dataclass
class DistContext:
    """This process among the processes of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Its number among the processes of its machine: which GPU it takes."""
    backend: str = ""
    """gloo or nccl; empty in one process."""
    bytes_communicated: int = field(default=0, repr=False)
    """Bytes that it gave to collectives of its own, those of sharded weights apart."""

    @classmethod
    def start(cls, device: str) -> "DistContext":
        """Join the processes that torchrun started; alone, without torchrun. `device` is --device."""
        world = from_environment(os.environ)
        if world.size == 1:
            return world
        import torch.distributed as dist

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
            dist.init_process_group(world.backend)
        except (RuntimeError, ValueError) as error:  # dist.DistError is a RuntimeError
            raise InputError(f"torchrun: the processes did not find each other: {error}") from error
        return world

    def close(self) -> None:
        """Leave the others, behind the last collective."""
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def device_flag(self) -> str:
        """What --device means for this process where it said auto or cuda."""
        return f"cuda:{self.local_rank}" if self.backend == "nccl" else "cpu"

    def to_json(self) -> dict[str, Any]:
        """What run.json records."""
        return {"world_size": self.size, "backend": self.backend or None}

    # Shares ----------------------------------------------------------------------------------------------------------

    def partition(self, rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Which of a batch's rows are this process's; `lengths` [tokens] belong to the row numbers.

        Sorted by length they go round back and forth (0, 1, 1, 0, 0, …), so that all have about the same work. Kept
        in the batch's order; may be empty.
        """
        if self.size == 1:
            return list(rows)
        order = sorted(range(len(rows)), key=lambda n: (lengths[rows[n]], n))
        there_and_back = [*range(self.size), *reversed(range(self.size))]
        mine = {n for place, n in enumerate(order) if there_and_back[place % len(there_and_back)] == self.rank}
        return [row for n, row in enumerate(rows) if n in mine]

    # Collectives -----------------------------------------------------------------------------------------------------

    def all_gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """Every process's numbers, by rank; float64."""
        if self.size == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        return self._all_gather(own).tolist()

    def all_reduce_numbers(self, numbers: Sequence[float]) -> list[float]:
        """The sums of all processes' numbers, added in the order of the ranks: the same bits in every process."""
        return [sum(column) for column in zip(*self.all_gather(numbers), strict=True)]

    def all_reduce_sum(self, t: Tensor) -> Tensor:
        """The sum of all processes' tensors of this shape."""
        return t if self.size == 1 else self._all_reduce(t.to(self._device).clone()).to(t.device)

    def broadcast_object(self, said: Any) -> Any:
        """What the first process says (anything JSON holds), to all."""
        return said if self.size == 1 else json.loads(self._broadcast_text(json.dumps(said), 0))

    def raise_on_any_rank(self, error: GraftError | None) -> None:
        """Raise in all processes if one has an error: the first one's, so that it is told once and none waits."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        found = [int(status) for (status,) in self.all_gather([0 if error is None else error.exit_status])]
        rank = next((rank for rank, status in enumerate(found) if status), None)
        if rank is None:
            return
        line = self._broadcast_text(str(error) if self.rank == rank else "", rank)
        common = _ERRORS[found[rank]](line if rank == 0 else f"process {rank}: {line}")
        common.told = not self.is_main
        raise common from error

    @contextmanager
    def same_error_on_all_ranks(self) -> Iterator[None]:
        """What all processes do at the same time and without collectives; an error of one is an error of all."""
        found = None
        try:
            yield
        except GraftError as error:
            found = error
        self.raise_on_any_rank(found)

    def on_all_ranks(self, error: GraftError) -> GraftError:
        """An error that every process raises by itself, for the first to print."""
        error.told = not self.is_main
        return error

    def all_reduce_gradients(self, params: Sequence[nn.Parameter]) -> None:
        """Make every parameter's gradient the sum over all processes; none counts as zero."""
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
        import torch.distributed as dist

        self.bytes_communicated += t.numel() * t.element_size()
        with together():
            dist.all_reduce(t)
        return t

    def _all_gather(self, own: Tensor) -> Tensor:
        import torch.distributed as dist

        self.bytes_communicated += own.numel() * own.element_size()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with together():
            dist.all_gather(parts, own)
        return torch.stack(parts)

    def _broadcast_text(self, text: str, rank: int) -> str:
        import torch.distributed as dist

        data = text.encode() if self.rank == rank else b""
        length = int(max(size for (size,) in self.all_gather([len(data)])))
        held = torch.zeros(length, dtype=torch.uint8, device=self._device)
        if self.rank == rank:
            held = torch.tensor(list(data), dtype=torch.uint8, device=self._device)
        with together():
            dist.broadcast(held, rank)
        return bytes(held.tolist()).decode()


class PeerExited(GraftError):
    """Another process of the run has ended; its own line says why."""


@contextmanager
def together() -> Iterator[None]:
    """A collective whose failure means that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise PeerExited("another process of this run has ended; its own line says why") from error


def from_environment(environ: Mapping[str, str]) -> DistContext:
    """Rank and size as torchrun sets them; one process where it did not. InputError where they make no sense."""
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return DistContext()
    for name in ("RANK", "WORLD_SIZE"):
        if name not in environ:
            raise InputError(f"{name} is not set, but its companion is: start with torchrun, or unset both")
        if not environ[name].isdigit():
            raise InputError(f"{name}={environ[name]}: is no number: start with torchrun, which sets it")
    rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    if rank >= size:
        raise InputError(f"RANK={rank} of WORLD_SIZE={size}: ranks are 0 to {size - 1}: start with torchrun")
    if size > 1:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environ:
                raise InputError(f"{name} is not set: where {size} processes meet; start with torchrun, which sets it")
    local = environ.get("LOCAL_RANK", str(rank))
    if not local.isdigit():
        raise InputError(f"LOCAL_RANK={local}: is no number: start with torchrun, which sets it")
    return DistContext(rank, size, int(local))


def buckets(params: Sequence[nn.Parameter], most: int = BUCKET) -> list[list[nn.Parameter]]:
    """Parameters of one dtype beside each other, at most `most` elements in a bucket, or one parameter."""
    made: list[list[nn.Parameter]] = []
    for p in params:
        last = made[-1] if made else []
        if last and last[0].dtype == p.dtype and sum(q.numel() for q in last) + p.numel() <= most:
            last.append(p)
        else:
            made.append([p])
    return made


# Weights cut over the processes ---------------------------------------------------------------------------------------


def shard(model: CausalLM, world: DistContext, own: Set[nn.Parameter]) -> None:
    """Cut every weight but a process's `own` over the processes: block by block, the rest as one more unit.

    The weights may be on the meta device still. Gradients of cut weights are added, not averaged. Every process must
    then make the same number of passes, or be `uneven_forward`.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh("cuda" if world.backend == "nccl" else "cpu", (world.size,))
    # A block's weights are sent in the dtype that they compute in. Cast behind that instead, each cast copy would be
    # kept for the backward pass, and with them the whole model. What is outside of blocks is whole until then anyway.
    policy = MixedPrecisionPolicy(model.dtype, master_dtype(model.dtype), cast_forward_inputs=False)
    for module in (*model.blocks, model):
        how = MixedPrecisionPolicy(cast_forward_inputs=False) if module is model else policy
        fully_shard(module, mesh=mesh, mp_policy=how, ignored_params=set(own))
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # The head is the root's, and is read behind these calls: a root's weights are whole until its backward pass ends.
    for name in ("hidden", "hidden_behind"):
        register_fsdp_forward_method(model, name)


def warmup_fsdp(model: CausalLM) -> None:
    """Read a token with cut weights, once they are there.

    At its first pass torch finds out which units belong together. What it does not see then (the plan runs the model
    with fewer blocks) would stay whole behind its own passes ever after.
    """
    with unsharded_root(model), eval_mode(model):
        _dummy_forward(model)


def _dummy_forward(model: CausalLM) -> None:
    model.hidden_states(torch.zeros(1, 1, dtype=torch.long, device=model.device))


def model_is_sharded(model: CausalLM) -> bool:
    """Whether its weights are cut over several processes."""
    return hasattr(model, "unshard")


@contextmanager
def uneven_forward(model: CausalLM, world: DistContext) -> Iterator[None]:
    """Within it each process makes as many passes without gradient as it likes.

    Where the weights are cut, a block is gathered by all processes at once. So before each pass they tell each other
    who goes on, and who is done makes idle passes until all are. No other collectives within.
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
    """Within it what is outside of the blocks (embedding, last norm, head) is whole in every process.

    Its gradients are dropped behind it.
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
