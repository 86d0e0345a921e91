"""IA3 (Liu et al. 2022, arXiv:2205.05638): learned vectors scale keys, values and the MLP's inner activations.

    h = l o (W0 x + b)        for k and v, and any other target        l [out], starts as ones
    h = W0 (l o x) + b        for down, whose input is the inner activations      l [in]

A vector scales a weight's rows or columns, so in evaluation it is part of the weight, and of the bias.

PEFT has one vector for all linears that the checkpoint format fuses (q, k and v in GPT-2 and GPT-NeoX, gate and up in
Phi-3). Ours are slices of it; it is one where a part is not targeted, so no information is lost. (PEFT would train that
part too.) PEFT can scale the input of any linear, we that of down only.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.methods import base
from graftlm.methods import peft_format as peft
from graftlm.methods.base import AdaptedLinear, MergeableLinear, Method, PeftFolder
from graftlm.methods.cost_model import ParameterGroup, linear_group
from graftlm.models import CausalLM, Linear, ModelConfig
from graftlm.models.config import FAMILIES, Rows, our_linear


class IA3Linear(AdaptedLinear, MergeableLinear):
    """A frozen linear whose output is scaled by a learned vector; that of the MLP's down projection: its input."""

    def __init__(self, linear: Linear, name: str) -> None:
        super().__init__(linear)
        self.feedforward = name.endswith(".down")
        width = linear.in_features if self.feedforward else linear.out_features
        # l, by its name in checkpoints
        self.stretch = nn.Parameter(torch.ones(width, **base.master_options(linear.stored_weight)))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if self.merged:
            return super().forward(x)
        scale = self.stretch.to(x.dtype)
        return super().forward(x * scale) if self.feedforward else super().forward(x) * scale

    def merged_tensors(self) -> dict[str, Tensor]:
        """The weight with scaled columns, or with scaled rows and the bias likewise."""
        if self.feedforward:
            return {"weight": self.base_weight * self.stretch}
        bias = {} if self.bias is None else {"bias": self.bias.data * self.stretch}
        return {"weight": self.base_weight * self.stretch[:, None], **bias}


@dataclass(frozen=True)
class IA3(Method):
    """A vector for each targeted linear in every block: of down for its input, of the others for their output."""

    targets: tuple[str, ...] = ("k", "v", "down")

    name: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"
    default_lr: ClassVar[float] = 1e-2
    flags: ClassVar[Mapping[str, str]] = {"targets": "targets"}
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {},
        "all": {"targets": ("q", "k", "v", "o", "up", "down")},
        "upper": {"layers": (1, 2)},
    }

    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Replace the targeted linears; an InputError names an unknown target."""
        base.freeze(model)
        base.replace_linears(model, self.targets, IA3Linear, self.layer_range(model.config))

    def param_breakdown(self, config: ModelConfig) -> list[ParameterGroup]:
        """The width of each targeted linear's output (of down: of its input), times the adapted layers."""
        layers, formulas = self.layer_range(config), dict.fromkeys(self.targets, "L out") | {"down": "L in"}
        parts = [linear_group(config, role, layers, "scaled", formulas[role]) for role in self.targets]
        return [replace(part, added=True) for part in parts]

    # PEFT's format ------------------------------------------------------------------------------------------------

    def to_peft(self, model: CausalLM) -> PeftFolder:
        """PEFT's IA3."""
        config, state, tensors = model.config, base.trainable_state_dict(model), {}
        for key, size, rows in self._vectors(config):
            vector = next(iter(state.values())).new_ones(size)
            for name, part in rows.items():
                vector.view(-1)[part] = state[name]
            tensors[key] = vector
        return self._config(config), tensors

    def from_peft(self, config: ModelConfig, folder: PeftFolder, where: str) -> dict[str, Tensor]:
        """The inverse."""
        peft.check_same(folder[0], self._config(config), ("peft_type", "target_modules", "feedforward_modules"), where)
        return self._state(config, folder, where)

    @classmethod
    def from_foreign_peft(
        cls, config: ModelConfig, folder: PeftFolder, where: str
    ) -> tuple[Method, dict[str, Tensor]] | None:
        """Any IA3 folder of PEFT whose feedforward_modules are the model's down projections."""
        peft_config, tensors = folder
        if peft_config.get("peft_type") != cls.peft_type:
            return None
        peft.check_fields(peft_config, _FIELDS, {"modules_to_save"}, where)
        names = peft.targeted(config, peft_config, where)
        down, feedforward = peft.hf_module_name(config, "down"), peft_config.get("feedforward_modules")
        if any(_is_feedforward(name, feedforward, where) != (module == down) for name, (_, module) in names.items()):
            raise InputError(
                f"{where}: feedforward_modules = {feedforward!r} is not supported: of this {config.family} model the "
                f"inputs of {down}, and of no other module, can be scaled"
            )
        layers, targets = peft.uniform_layer_range(config, names, "target_modules", where), set[str]()
        for module, roles in _scaled_roles(config, names, tensors).items():
            held = peft.hf_modules(config, config.roles)[module].targets
            targets |= roles or {role for role in held if role in cls.targets} or set(held)
        method = cls(targets=tuple(role for role in config.roles if role in targets), layers=layers)
        return method, method._state(config, folder, where)

    def _state(self, config: ModelConfig, folder: PeftFolder, where: str) -> dict[str, Tensor]:
        """The trained tensors by our names; an InputError unless the folder has exactly these."""
        file, state = peft.StrictTensorReader(folder[1], where), {}
        for key, size, rows in self._vectors(config):
            remaining = file.take(key, *size).flatten().clone()
            for name, part in rows.items():
                state[name] = remaining[part].clone()
                remaining[part] = 1
            if bool((remaining != 1).any()):
                raise InputError(f"{where}: {key} scales outputs that the run does not target")
        file.all_taken()
        return state

    def _vectors(self, config: ModelConfig) -> Iterator[tuple[str, tuple[int, int], dict[str, Rows]]]:
        """PEFT's tensors: name, shape, and which part of it is which of ours."""
        for i in self.layer_range(config):
            for module in peft.hf_modules(config, self.targets, i).values():
                size = (1, module.in_features) if module.targets == ("down",) else (module.out_features, 1)
                rows = {f"{our_linear(i, role)}.stretch": module.rows[role] for role in module.targets}
                yield f"{peft.layer_prefix(config, i)}{module.name}.ia3_l", size, rows

    def _config(self, config: ModelConfig) -> dict[str, Any]:
        """adapter_config.json without the base's name."""
        return {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "target_modules": self._named(config, self.targets),
            "feedforward_modules": self._named(config, [role for role in self.targets if role == "down"]),
            "fan_in_fan_out": FAMILIES[config.family].transposed,
            "init_ia3_weights": True,
            "inference_mode": True,
            "peft_version": peft.PEFT_VERSION,
        }

    def _named(self, config: ModelConfig, roles: Sequence[str]) -> list[str]:
        """A config's names of modules; PEFT's IA3 has no layers_to_transform, so with a range of layers each one's."""
        if not self.layers:
            return peft.named_targets(config, peft.hf_modules(config, roles))
        prefix, layers = FAMILIES[config.family].layers, self.layer_range(config)
        return [f"{prefix}{i}.{module}" for i in layers for module in sorted(peft.hf_modules(config, roles, i))]


_FIELDS = peft.WITHOUT_EFFECT | {
    *("peft_type", "target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out", "init_ia3_weights"),
}


def _scaled_roles(
    config: ModelConfig, names: Mapping[str, tuple[int, str]], tensors: Mapping[str, Tensor]
) -> dict[str, set[str]]:
    """Module -> the roles that its vectors scale: of a fused one those whose part is not all ones in some layer."""
    scaled: dict[str, set[str]] = {}
    for name, (i, of_layer) in names.items():
        module, vector = (
            peft.hf_modules(config, config.roles, i)[of_layer],
            tensors.get(f"base_model.model.{name}.ia3_l"),
        )
        roles = scaled.setdefault(of_layer, set())
        if not module.fused:
            roles.update(module.targets)
        elif vector is not None and vector.numel() == module.out_features:
            roles.update(role for role, rows in module.rows.items() if bool((vector.flatten()[rows] != 1).any()))
    return scaled


def _is_feedforward(name: str, modules: object, where: str) -> bool:
    """Whether PEFT scales the input of the module of this name; its rule differs from that of target_modules."""
    if isinstance(modules, str):
        return peft.matches(modules, name, where)
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise InputError(f"{where}: feedforward_modules is {modules!r}; expected a list of module names")
    return any(name.endswith(module) for module in modules)
