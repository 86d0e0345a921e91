"""The interface of a method: a frozen dataclass whose `install` changes a model and marks what is trained.

After `install`, `requires_grad` alone decides what is trained, counted, optimised and saved, so the functions below
serve all methods. Trained parameters are float32 (float64 in a float64 model) and cast in forward; frozen ones keep
the base's dtype.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from graftlm.errors import InputError, unknown_name_error
from graftlm.methods.cost_model import ParameterGroup, Passes, total
from graftlm.models import CausalLM, Linear, ModelConfig
from graftlm.models.config import our_linear
from graftlm.models.layers import LowRankUpdate
from graftlm.models.packed import Weight, dense, packed_weights

PeftFolder = tuple[dict[str, Any], dict[str, Tensor]]
"""The contents of PEFT's two files: adapter_config.json (without the base's name) and adapter_model.safetensors."""
ALL_LINEAR = "all-linear"
"""The value of --targets that means every linear layer of the blocks, as in PEFT."""


@dataclass(frozen=True)
class Method(ABC):
    """A way to adapt a model. Subclasses are frozen dataclasses of plain values."""

    layers: tuple[int, int] | None = field(default=None, kw_only=True)
    """The blocks it adapts, as a half-open range; None: all."""

    name: ClassVar[str]
    default_lr: ClassVar[float]
    flags: ClassVar[Mapping[str, str]] = {}
    """Flag of `graft train` -> the field it sets, for the flags that this method accepts."""
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Small instances for the contract tests: label -> fields. They fit a model of 2 layers and width 32."""
    is_full_finetune: ClassVar[bool] = False
    """Whether a checkpoint is a whole model, because the base's own weights are trained."""
    peft_type: ClassVar[str] = ""
    """PEFT's name of the method; empty if PEFT does not have it."""
    mergeable: ClassVar[bool] = True
    """Whether `eval()` turns the adapted model into a plain model with other weights."""

    def layer_range(self, config: ModelConfig) -> range:
        """The indices of the blocks it adapts."""
        return range(*self.layers) if self.layers else range(config.num_layers)

    def for_model(self, config: ModelConfig, train_layers: str = "") -> "Method":
        """The method with the layers of --train_layers, and with the targets that `all-linear` means in this model."""
        method = replace(self, layers=parse_layer_range(train_layers, config.num_layers)) if train_layers else self
        if getattr(method, "targets", None) != (ALL_LINEAR,):
            return method
        layers = method.layer_range(config)
        every: dict[str, Any] = {"targets": tuple(role for role in config.roles if config.layers_with(role, layers))}
        return replace(method, **every)

    @property
    def positions(self) -> int:
        """How many positions of the context its learned prefix takes."""
        return 0

    @abstractmethod
    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Replace or add modules and freeze the rest; initial weights are drawn from `rng` (on the CPU)."""

    def init_from_base_weights(self, model: CausalLM) -> None:
        """The part of `install` that reads the base's weights; called after loading if they were on the meta device.

        The weights may be sharded; then all ranks call it.
        """
        return None

    @abstractmethod
    def param_breakdown(self, config: ModelConfig) -> list[ParameterGroup]:
        """All parameters it trains, in groups with closed forms."""

    def count(self, config: ModelConfig) -> int:
        """How many parameters it trains."""
        return total(self.param_breakdown(config))

    def passes(self, config: ModelConfig, cached: int = 0) -> Passes:
        """What a training step computes, if the output of the first `cached` blocks is cached."""
        layers = self.layer_range(config)
        return Passes(
            forward=config.num_layers - cached,
            backward=config.num_layers - layers.start,
            weight_grads=len(layers) if self.is_full_finetune else 0,
            head=3 if self.is_full_finetune and self.layers is None else 2,
        )

    def adapted_config(self, config: ModelConfig) -> ModelConfig:
        """The configuration of the adapted model's own modules."""
        return config

    def resolve_init(self, prompts: Sequence[Sequence[int]], encode: Callable[[str], Sequence[int]]) -> "Method":
        """The method with all that it takes from the run's prompts, or from a text of its own, filled in."""
        return self

    def lr_multiplier(self, name: str) -> float:
        """Factor of the learning rate of the trained parameter of this name."""
        return 1.0

    def describe_scale(self, model: CausalLM, lr: float) -> str:
        """One line on how far a step at this learning rate moves the model; empty if there is nothing to report."""
        return ""

    def to_json(self) -> dict[str, Any]:
        """Its name and fields, for run.json."""
        return {"method": self.name, **asdict(self)}

    # PEFT's format, for methods that PEFT has ---------------------------------------------------------------------

    def to_peft(self, model: CausalLM) -> PeftFolder | None:
        """PEFT's files for a model adapted by this method; None: PEFT has no such method."""
        return None

    def from_peft(self, config: ModelConfig, folder: PeftFolder, where: str) -> dict[str, Tensor]:
        """The trained tensors, by our names, of a folder written by `to_peft`; an InputError if another method did."""
        raise NotImplementedError

    @classmethod
    def from_foreign_peft(
        cls, config: ModelConfig, folder: PeftFolder, where: str
    ) -> "tuple[Method, dict[str, Tensor]] | None":
        """The method and tensors of any PEFT folder; None: another method's; InputError for unsupported settings."""
        return None

    @property
    def resumable_from_adapter(self) -> bool:
        """Whether an adapter folder holds all trained parameters, so that a run can continue from it."""
        return True

    @property
    def for_inference(self) -> "Method":
        """The method to install when an adapter folder is loaded for inference only."""
        return self


# Tensors of a method --------------------------------------------------------------------------------------------------


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of trained parameters next to a base of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def target_device(weight: Weight) -> torch.device:
    """The device of a trained parameter next to `weight`: the same, or torch's default if that has no data yet."""
    return torch.get_default_device() if weight.device.type == "meta" else weight.device


def master_options(weight: Weight) -> dict[str, Any]:
    """dtype and device of a trained parameter next to `weight`, as keyword arguments of torch's constructors."""
    return {"dtype": master_dtype(weight.dtype), "device": target_device(weight)}


def kaiming_parameter(rows: int, columns: int, weight: Weight, rng: torch.Generator | None) -> nn.Parameter:
    """A trained [rows, columns] matrix next to `weight`, uniform within 1 / sqrt(columns), drawn on the CPU."""
    drawn = torch.empty(rows, columns, dtype=master_dtype(weight.dtype))
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=rng)
    return nn.Parameter(drawn.to(target_device(weight)))


def freeze(model: nn.Module) -> None:
    """Mark all parameters as not trained."""
    model.requires_grad_(False)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter for all that are trained, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters; tied embeddings count once."""
    trained, packed = trainable(model).values(), packed_weights(model)
    every = sum(p.numel() for p in model.parameters()) + sum(weight.numel() for weight in packed)
    return sum(p.numel() for p in trained), every


def trainable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of all that is trained: the contents of a checkpoint."""
    return {name: p.detach() for name, p in trainable(model).items()}


def load_trainable_state_dict(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Set all trained parameters from `state`; an InputError unless names and shapes are exactly the model's."""
    params = trainable(model)
    if missing := sorted(set(params) - set(state)):
        raise InputError(f"{where}: {missing[0]} is missing ({len(missing)} of {len(params)} are)")
    if unexpected := sorted(set(state) - set(params)):
        raise InputError(f"{where}: {unexpected[0]} belongs to no trained part of this model")
    for name, p in params.items():
        if p.shape != state[name].shape:
            raise InputError(f"{where}: {name} has shape {list(state[name].shape)}, the model wants {list(p.shape)}")
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(state[name])


# Layers and targets ---------------------------------------------------------------------------------------------------


def parse_layer_range(text: str, layers: int) -> tuple[int, int] | None:
    """The value of --train_layers for a model of `layers` blocks; None for all. An InputError unless it is a slice."""
    if not text.strip():
        return None
    try:
        first, end = (int(part) if part.strip() else None for part in text.split(":"))
    except ValueError:
        raise InputError(f"--train_layers {text!r}: is no slice such as '{layers * 2 // 3}:' or '-4:'") from None
    start, stop, _ = slice(first, end).indices(layers)
    if start >= stop:
        raise InputError(f"--train_layers {text!r}: holds none of the model's {layers} layers, 0 to {layers - 1}")
    return start, stop


def block_modules(model: CausalLM, layers: range) -> list[nn.Module]:
    """The blocks of these layers, and the final norm if they include the last one."""
    return [*(model.blocks[i] for i in layers), *([model.norm] if layers.stop == model.config.num_layers else [])]


def replace_linears(
    model: CausalLM, targets: Sequence[str], make: Callable[[Linear, str], Linear], layers: range
) -> None:
    """Replace the targeted linears of these blocks by `make(linear, its name)`.

    An InputError for no target, for one that these layers lack, and for a linear that was replaced before.
    """
    if not targets:
        raise InputError(f"--targets is empty: name at least one of {', '.join(model.config.roles)}")
    for role in targets:
        if role not in model.config.roles:
            raise unknown_name_error("target", role, model.config.roles)
        if not model.config.layers_with(role, layers):
            raise InputError(f"--targets {role}: layers {layers.start} to {layers[-1]} have none; leave it out")
    for i in layers:
        for role in (role for role in targets if role in model.config.layer(i).roles):
            name = our_linear(i, role)
            old = model.get_submodule(name)
            if type(old) is not Linear:
                raise InputError(f"{name} is a {type(old).__name__} already; adapt a fresh base")
            model.set_submodule(name, make(old, name))


class AdaptedLinear(Linear):
    """A linear around the weight and bias of another, without a copy."""

    def __init__(self, linear: Linear) -> None:
        with torch.device("meta"):  # no memory, no random numbers: every tensor is set below
            super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.set_weight(linear.stored_weight)
        self.bias = linear.bias


# Merging --------------------------------------------------------------------------------------------------------------


class MergeableLinear(Linear):
    """A linear whose update is added to its output in training and merged into its weight in evaluation.

    A subclass returns the updated tensors in `merged_tensors`. `eval()` merges; `train()` restores the base's tensors
    bit for bit, because they are kept rather than computed back.
    """

    merge_on_eval = True
    """Whether evaluation merges. Models that share one base's tensors do not, since each merged weight would be a copy;
    neither do models whose base is sharded across ranks. A packed weight is never merged into."""
    _base_tensors: dict[str, Tensor] | None = None

    def merged_tensors(self) -> dict[str, Tensor]:
        """Name -> updated tensor, in float32 or wider, for those of the base's tensors that change; may be empty."""
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether the weight contains the update."""
        return self._base_tensors is not None

    @property
    def base_weight(self) -> Tensor:
        """The base's own weight, merged or not. A packed one's values are in a buffer that the next call overwrites."""
        if self.packed is not None:
            return dense(self.packed, self.packed.dtype)
        return self.weight.data if self._base_tensors is None else self._base_tensors["weight"]

    def low_rank_updates(self) -> Sequence[LowRankUpdate] | None:
        """None are left when it is merged."""
        return () if self.merged else super().low_rank_updates()

    def train(self, mode: bool = True) -> Self:
        """Unmerge for training, merge for evaluation; a repeated call has no effect."""
        super().train(mode)
        if mode:
            self.unmerge()
        elif self.merge_on_eval:
            self.merge()
        return self

    @torch.no_grad()
    def merge(self) -> None:
        """Merge the update, computed in float32 (or wider), unless it is merged already or the weight is packed."""
        if self.merged or self.packed is not None or not (merged := self.merged_tensors()):
            return
        self._base_tensors = {name: getattr(self, name).data for name in merged}
        for name, tensor in merged.items():
            getattr(self, name).data = tensor.to(self._base_tensors[name].dtype)

    def unmerge(self) -> None:
        """Restore the base's tensors."""
        for name, tensor in (self._base_tensors or {}).items():
            getattr(self, name).data = tensor
        self._base_tensors = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # A merged weight saved next to its update would be adapted twice after loading.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in (self._base_tensors or {}).items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        merged = self.merged
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)
        if merged:
            self.merge()


def mergeable_linears(model: nn.Module) -> Iterator[MergeableLinear]:
    """The linears of a model that have an update to merge."""
    return (module for module in model.modules() if isinstance(module, MergeableLinear))
