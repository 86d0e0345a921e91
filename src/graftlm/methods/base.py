"""The contract of a method: a frozen dataclass whose `install` changes a model and marks what is trained.

After `install`, `requires_grad` alone says what is trained, counted, optimised and saved, so everything below is
written once for all methods. Trained parameters are float32 (float64 in a float64 model) and cast in forward;
frozen ones keep the base's dtype.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftlm.errors import InputError, unknown_name_error
from graftlm.methods.cost_model import ParameterGroup, total
from graftlm.models import CausalLM, Linear, ModelConfig
from graftlm.models.checkpoint_mapping import our_module_name

PeftFolder = tuple[dict[str, Any], dict[str, Tensor]]
"""What PEFT's two files hold: adapter_config.json (without the base's name) and adapter_model.safetensors."""


@dataclass(frozen=True)
class Method(ABC):
    """A way to adapt a model. Subclasses are frozen dataclasses of plain values."""

    layers: tuple[int, int] | None = field(default=None, kw_only=True)
    """The blocks it adapts: from the first number up to but without the second; None: all."""

    name: ClassVar[str]
    default_lr: ClassVar[float]
    flags: ClassVar[Mapping[str, str]] = {}
    """Flag of `graft train` -> the field it sets, for the flags that mean something to this method."""
    is_full_finetune: ClassVar[bool] = False
    """Whether a checkpoint is a whole model, because the base's own weights are what is trained."""
    peft_type: ClassVar[str] = ""
    """What PEFT calls it, where it does."""
    mergeable: ClassVar[bool] = True
    """Whether the adapted model is a plain model with other weights, once `eval()` has merged it."""

    def layer_range(self, shape: ModelConfig) -> range:
        """The numbers of the blocks it adapts."""
        return range(*self.layers) if self.layers else range(shape.num_layers)

    @property
    def positions(self) -> int:
        """How many of the context's positions it takes, before every text."""
        return 0

    @abstractmethod
    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Replace or add modules, freeze the rest; initial weights come from `rng` (on the CPU)."""

    def init_from_base_weights(self, model: CausalLM) -> None:
        """Do what `install` does with a base's weights; called once they are read, where they were not before.

        They may be cut over several processes, which all call it.
        """
        return None

    @abstractmethod
    def param_breakdown(self, shape: ModelConfig) -> list[ParameterGroup]:
        """All that it trains, each part with its closed form."""

    def count(self, shape: ModelConfig) -> int:
        """How many parameters it trains."""
        return total(self.param_breakdown(shape))

    def adapted_config(self, shape: ModelConfig) -> ModelConfig:
        """The shape that it gives the model's own parts."""
        return shape

    def resolve_init(self, prompts: Sequence[Sequence[int]], encode: Callable[[str], Sequence[int]]) -> "Method":
        """The method with whatever it takes from the run's prompts, or from a text of its own, decided."""
        return self

    def lr_multiplier(self, name: str) -> float:
        """What the learning rate of the trained parameter of this name is multiplied by."""
        return 1.0

    def describe_scale(self, model: CausalLM, lr: float) -> str:
        """One line on how far a step of this method at this rate moves the model; empty where there is none to say."""
        return ""

    def to_json(self) -> dict[str, Any]:
        """Its name and fields, for run.json."""
        return {"method": self.name, **asdict(self)}

    # In and out of PEFT, where PEFT has the method ---------------------------------------------------------------

    def to_peft(self, model: CausalLM) -> PeftFolder | None:
        """What a model that this method adapted is in PEFT; None: PEFT has no such method."""
        return None

    def from_peft(self, shape: ModelConfig, folder: PeftFolder, where: str) -> dict[str, Tensor]:
        """The trained tensors, by our names, of a folder that `to_peft` made; an InputError if another method did."""
        raise NotImplementedError

    @classmethod
    def from_foreign_peft(
        cls, shape: ModelConfig, folder: PeftFolder, where: str
    ) -> "tuple[Method, dict[str, Tensor]] | None":
        """The method and tensors of any PEFT folder; None: another method's; InputError for what is not understood."""
        return None

    @property
    def resumable_from_adapter(self) -> bool:
        """Whether what is trained can be read back from an adapter folder, so that a run can go on from it."""
        return True

    @property
    def for_inference(self) -> "Method":
        """What to install before an adapter folder is read for inference only."""
        return self


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype trained parameters are kept in beside a base of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def target_device(weight: Tensor) -> torch.device:
    """Where what is trained beside a weight is to be: with it, or on torch's default device while it is not read."""
    return torch.get_default_device() if weight.device.type == "meta" else weight.device


def freeze(model: nn.Module) -> None:
    """Nothing is trained."""
    for p in model.parameters():
        p.requires_grad_(False)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter for all that is trained, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters; a tied head counts once."""
    return sum(p.numel() for p in trainable(model).values()), sum(p.numel() for p in model.parameters())


def parse_layer_range(text: str, layers: int) -> tuple[int, int] | None:
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
        raise InputError(f"--targets is empty: name at least one of {', '.join(model.config.roles)}")
    for role in targets:
        if role not in model.config.roles:
            raise unknown_name_error("target", role, model.config.roles)
    for i in span:
        block = model.blocks[i]
        for role in targets:
            parent_name, child = our_module_name(role).split(".")
            parent = block.get_submodule(parent_name)
            old = getattr(parent, child)
            if type(old) is not Linear:
                raise InputError(
                    f"blocks.{i}.{parent_name}.{child} is a {type(old).__name__} already; adapt a fresh base"
                )
            setattr(parent, child, make(old, f"blocks.{i}.{parent_name}.{child}"))


def trainable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of all that is trained: what a checkpoint holds."""
    return {name: p.detach() for name, p in trainable(model).items()}


def load_trainable_state_dict(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
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
