"""IA3 (Liu et al. 2022, arXiv:2205.05638): learned vectors stretch keys, values and the MLP's inner activations.

    h = l o (W0 x + b)        for k and v, and whatever else is targeted        l [out], starts as ones
    h = W0 (l o x) + b        for down, whose input the inner activations are   l [in]

A vector is a weight's rows or columns times numbers, so in evaluation it is part of the weight, and of the bias.

What is unusual here: PEFT has one vector for all of q, k and v where a file fuses them (GPT-2, GPT-NeoX). Ours are cut
out of it; a part that is not targeted stands in it as ones, so nothing is lost either way. (If PEFT goes on training
such a folder, it trains that part too.) PEFT can stretch the input of any linear, we that of down only.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.methods.base import (
    Method,
    PeftFolder,
    freeze,
    master_dtype,
    replace_linears,
    target_device,
    trainable_state_dict,
)
from graftlm.methods.cost_model import ParameterGroup, format_formula, linear_size
from graftlm.methods.mergeable import MergeableLinear
from graftlm.methods.peft_format import (
    PEFT_VERSION,
    WITHOUT_EFFECT,
    StrictTensorReader,
    check_fields,
    fused_slices,
    hf_module_name,
    layer_prefix,
    matches,
    named_targets,
    targeted,
    uniform_layer_range,
)
from graftlm.models import CausalLM, Linear, ModelConfig
from graftlm.models.checkpoint_mapping import our_module_name
from graftlm.models.config import FAMILIES, Rows


class IA3Linear(MergeableLinear):
    """A frozen linear whose output, or input, is multiplied by a learned vector."""

    def __init__(self, linear: Linear, inward: bool) -> None:
        with torch.device("meta"):  # no memory, no random numbers: every tensor is given below
            super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.weight, self.bias, self.inward = linear.weight, linear.bias, inward
        width, weight = linear.in_features if inward else linear.out_features, linear.weight
        self.stretch = nn.Parameter(torch.ones(width, dtype=master_dtype(weight.dtype), device=target_device(weight)))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if self.merged:
            return super().forward(x)
        by = self.stretch.to(x.dtype)
        return super().forward(x * by) if self.inward else super().forward(x) * by

    def merged_tensors(self) -> dict[str, Tensor]:
        """The weight's columns or rows stretched, and with its rows the bias."""
        if self.inward:
            return {"weight": self.weight.data * self.stretch}
        stretched = {"weight": self.weight.data * self.stretch[:, None]}
        return stretched if self.bias is None else {**stretched, "bias": self.bias.data * self.stretch}


@dataclass(frozen=True)
class IA3(Method):
    """A vector for each targeted linear in every block: of down for its input, of the others for their output."""

    targets: tuple[str, ...] = ("k", "v", "down")

    name: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"
    default_lr: ClassVar[float] = 1e-2
    flags: ClassVar[Mapping[str, str]] = {"targets": "targets"}

    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Wrap the targeted linears; an InputError names an unknown target."""
        made: list[IA3Linear] = []

        def wrap(linear: Linear, name: str) -> IA3Linear:
            made.append(IA3Linear(linear, inward=name.endswith(our_module_name("down"))))
            return made[-1]

        replace_linears(model, self.targets, wrap, self.layer_range(model.config))
        freeze(model)
        for module in made:
            module.stretch.requires_grad_(True)

    def param_breakdown(self, shape: ModelConfig) -> list[ParameterGroup]:
        """The width of each targeted linear's output (of down: of its input), times the adapted layers."""
        parts, layers = [], len(self.layer_range(shape))
        for role in self.targets:
            side = "in" if role == "down" else "out"
            width = linear_size(shape, role)[side == "out"]
            formula = format_formula(f"L {side}", **{"L": layers, side: width})
            parts.append(ParameterGroup(f"{role}, stretched", layers * width, formula, role, added=True))
        return parts

    # PEFT's folder ------------------------------------------------------------------------------------------------

    def to_peft(self, model: CausalLM) -> PeftFolder:
        """PEFT's IA3."""
        shape, state, tensors = model.config, trainable_state_dict(model), {}
        for key, size, parts in self._vectors(shape):
            vector = next(iter(state.values())).new_ones(size)
            for name, rows in parts.items():
                vector.view(-1)[rows] = state[name]
            tensors[key] = vector
        return self._config(shape), tensors

    def from_peft(self, shape: ModelConfig, folder: PeftFolder, where: str) -> dict[str, Tensor]:
        """The inverse."""
        config, expected = folder[0], self._config(shape)
        for key in ("peft_type", "target_modules", "feedforward_modules"):
            if config.get(key) != expected[key]:
                raise InputError(f"{where}: {key} is {config.get(key)!r}, the run says {expected[key]!r}")
        return self._state(shape, folder, where)

    @classmethod
    def from_foreign_peft(
        cls, shape: ModelConfig, folder: PeftFolder, where: str
    ) -> tuple[Method, dict[str, Tensor]] | None:
        """Any IA3 folder of PEFT's whose feedforward_modules are the linears that we call down."""
        config, tensors = folder
        if config.get("peft_type") != cls.peft_type:
            return None
        check_fields(config, _FIELDS, {"modules_to_save"}, where)
        modules = dict(targeted(shape, config, where))
        inward = {name for name in modules if _is_inward(name, config.get("feedforward_modules"), where)}
        if inward != {name for name, (_, theirs) in modules.items() if theirs == hf_module_name(shape, "down")}:
            wanted = hf_module_name(shape, "down")
            raise InputError(
                f"{where}: feedforward_modules = {config.get('feedforward_modules')!r} is not supported: of this "
                f"{shape.family} model the inputs of {wanted}, and of no other module, can be stretched"
            )
        span, theirs = (
            uniform_layer_range(shape, modules, "target_modules", where),
            {theirs for _, theirs in modules.values()},
        )
        targets = [role for role in shape.roles if hf_module_name(shape, role) in theirs]
        if (whole := FAMILIES[shape.family].fused) in theirs:
            vectors = [t.flatten() for key, t in tensors.items() if key.endswith(f".{whole}.ia3_l")]
            vectors = [vector for vector in vectors if len(vector) == shape.qkv_rows]
            moved = [r for r, rows in fused_slices(shape).items() if any(bool((v[rows] != 1).any()) for v in vectors)]
            targets = [role for role in targets if role not in "qkv" or role in (moved or ["k", "v"])]
        method = cls(targets=tuple(targets), layers=span)
        return method, method._state(shape, folder, where)

    def _state(self, shape: ModelConfig, folder: PeftFolder, where: str) -> dict[str, Tensor]:
        """The trained tensors by our names; exactly these must be in the folder."""
        file, state = StrictTensorReader(folder[1], where), {}
        for key, size, parts in self._vectors(shape):
            left = file.take(key, *size).flatten().clone()
            for name, rows in parts.items():
                state[name] = left[rows].clone()
                left[rows] = 1
            if bool((left != 1).any()):
                raise InputError(f"{where}: {key} stretches what the run says is not targeted")
        file.all_taken()
        return state

    def _vectors(self, shape: ModelConfig) -> Iterator[tuple[str, tuple[int, int], dict[str, Rows]]]:
        """PEFT's tensors: name, shape, and which part of it is which of ours."""
        whole = FAMILIES[shape.family].fused
        for i in self.layer_range(shape):
            for theirs in dict.fromkeys(hf_module_name(shape, role) for role in self.targets):
                roles = [role for role in self.targets if hf_module_name(shape, role) == theirs]
                n_in, n_out = linear_size(shape, roles[0])
                size = (1, n_in) if roles == ["down"] else (shape.qkv_rows if theirs == whole else n_out, 1)
                rows = fused_slices(shape) if theirs == whole else dict.fromkeys(roles, slice(None))
                parts = {f"blocks.{i}.{our_module_name(role)}.stretch": rows[role] for role in roles}
                yield f"{layer_prefix(shape, i)}{theirs}.ia3_l", size, parts

    def _config(self, shape: ModelConfig) -> dict[str, Any]:
        """adapter_config.json but for the base's name."""
        return {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "target_modules": self._named(shape, self.targets),
            "feedforward_modules": self._named(shape, [role for role in self.targets if role == "down"]),
            "fan_in_fan_out": FAMILIES[shape.family].transposed,
            "init_ia3_weights": True,
            "inference_mode": True,
            "peft_version": PEFT_VERSION,
        }

    def _named(self, shape: ModelConfig, roles: Sequence[str]) -> list[str]:
        """Modules as a config names them; IA3's has no layers_to_transform, so of a span of layers each by itself."""
        modules = {hf_module_name(shape, role) for role in roles}
        if not self.layers:
            return named_targets(shape, modules)
        prefix = FAMILIES[shape.family].layers
        return [f"{prefix}{i}.{module}" for i in self.layer_range(shape) for module in sorted(modules)]


_FIELDS = WITHOUT_EFFECT | {
    *("peft_type", "target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out", "init_ia3_weights"),
}


def _is_inward(name: str, modules: object, where: str) -> bool:
    """Whether PEFT stretches the input of the module of this name: by its rule, which differs from that of targets."""
    if isinstance(modules, str):
        return matches(modules, name, where)
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise InputError(f"{where}: feedforward_modules is {modules!r}; expected a list of module names")
    return any(name.endswith(module) for module in modules)
