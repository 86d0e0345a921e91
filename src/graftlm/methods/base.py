"""The contract of a method: a frozen dataclass whose `install` changes a model and marks what is trained.

After `install`, `requires_grad` alone says what is trained, counted, optimised and saved, so everything below is
written once for all methods. Trained parameters are float32 (float64 in a float64 model) and cast in forward;
frozen ones keep the base's dtype.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftlm.errors import InputError, unknown
from graftlm.models import CausalLM, Linear, Shape
from graftlm.models.names import module_of


@dataclass(frozen=True)
class Method(ABC):
    """A way to adapt a model. Subclasses are frozen dataclasses of plain values."""

    layers: tuple[int, int] | None = field(default=None, kw_only=True)
    """The blocks it adapts: from the first number up to but without the second; None: all."""

    name: ClassVar[str]
    default_lr: ClassVar[float]

    def span(self, shape: Shape) -> range:
        """The numbers of the blocks it adapts."""
        return range(*self.layers) if self.layers else range(shape.layers)

    @abstractmethod
    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Replace or add modules, freeze the rest; initial weights come from `rng` (on the CPU)."""

    @abstractmethod
    def count(self, shape: Shape) -> int:
        """How many parameters it trains, in closed form."""

    def explain(self, model: CausalLM, lr: float) -> str:
        """One line on how far a step of this method at this rate moves the model; empty where there is none to say."""
        return ""

    def to_json(self) -> dict[str, Any]:
        """Its name and fields, for run.json."""
        return {"method": self.name, **asdict(self)}


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype trained parameters are kept in beside a base of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def freeze(model: nn.Module) -> None:
    """Nothing is trained."""
    for p in model.parameters():
        p.requires_grad_(False)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter for all that is trained, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def totals(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters; a tied head counts once."""
    return sum(p.numel() for p in trainable(model).values()), sum(p.numel() for p in model.parameters())


def layer_span(text: str, layers: int) -> tuple[int, int] | None:
    """What --train_layers says of a model of so many layers; None for all. An InputError for what is no slice."""
    if not text.strip():
        return None
    first, colon, end = (part.strip() for part in text.partition(":"))
    try:
        assert colon
        start, stop, _ = slice(int(first) if first else None, int(end) if end else None).indices(layers)
    except (ValueError, AssertionError):
        raise InputError(f"--train_layers {text!r}: is no slice such as '{layers * 2 // 3}:' or '-4:'") from None
    if start >= stop:
        raise InputError(f"--train_layers {text!r}: holds none of the model's {layers} layers, 0 to {layers - 1}")
    return start, stop


def replace_linears(
    model: CausalLM, targets: tuple[str, ...], make: Callable[[Linear, str], Linear], span: range
) -> None:
    """Put `make(linear, its name)` in place of the targeted role in every block of the span.

    An unknown role, or none at all, is an InputError that lists those the model has; so is a linear that was
    replaced before.
    """
    if not targets:
        raise InputError(f"--targets is empty: name at least one of {', '.join(model.shape.roles)}")
    for role in targets:
        if role not in model.shape.roles:
            raise unknown("target", role, model.shape.roles)
    for i in span:
        block = model.blocks[i]
        for role in targets:
            parent_name, child = module_of(role).split(".")
            parent = block.get_submodule(parent_name)
            old = getattr(parent, child)
            if type(old) is not Linear:
                raise InputError(
                    f"blocks.{i}.{parent_name}.{child} is a {type(old).__name__} already; adapt a fresh base"
                )
            setattr(parent, child, make(old, f"blocks.{i}.{parent_name}.{child}"))


def delta_state(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of all that is trained: what a checkpoint holds."""
    return {name: p.detach() for name, p in trainable(model).items()}


def load_delta(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Set all trained parameters from `state`; exactly these names and shapes, or an InputError."""
    params = trainable(model)
    if missing := sorted(set(params) - set(state)):
        raise InputError(f"{where}: {missing[0]} is missing ({len(missing)} of {len(params)} are)")
    if spare := sorted(set(state) - set(params)):
        raise InputError(f"{where}: {spare[0]} belongs to no trained part of this model")
    for name, p in params.items():
        if p.shape != state[name].shape:
            raise InputError(f"{where}: {name} has shape {list(state[name].shape)}, the model wants {list(p.shape)}")
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(state[name])
