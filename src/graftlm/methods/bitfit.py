"""BitFit (Ben-Zaken et al. 2021, arXiv:2106.10199): only the bias terms are trained.

    h = W0 x + b        b trained, W0 frozen; the same for the b of layer norms

The Llama family has no biases (Qwen2 some): `add_biases` gives every linear one that starts at zero, which changes
nothing until it is trained and is exported like any other (attention_bias and mlp_bias in a Hugging Face config).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from graftlm.errors import InputError
from graftlm.methods.base import Method, freeze, master_dtype, target_device
from graftlm.methods.cost_model import ParameterGroup, format_formula, linear_size
from graftlm.models import CausalLM, Linear, ModelConfig
from graftlm.models.checkpoint_mapping import our_module_name
from graftlm.models.config import FAMILIES


@dataclass(frozen=True)
class BitFit(Method):
    """Train the biases of linears and norms, kept in float32 and cast to the arithmetic's dtype in each forward."""

    add_biases: bool = False
    """Give every linear of the adapted blocks' model a zero bias where it has none."""

    name: ClassVar[str] = "bitfit"
    default_lr: ClassVar[float] = 2e-3
    flags: ClassVar[Mapping[str, str]] = {"add_biases": "add_biases"}

    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Mark the biases of the span's blocks, and the last norm's if the span reaches it; InputError without any."""
        freeze(model)
        if self.add_biases:
            _add_biases(model)
        shape = model.config
        trained: list[nn.Module] = [model.blocks[i] for i in self.layer_range(shape)]
        trained += [model.norm] if self.layer_range(shape).stop == shape.num_layers else []
        found = 0
        for module in (m for root in trained for m in root.modules()):
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter):
                # A copy even where the dtype fits: models may share the base's tensors.
                module.bias = nn.Parameter(bias.data.to(master_dtype(bias.dtype), copy=True))
                found += 1
        if not found:
            raise InputError(
                f"--method bitfit: this {shape.family} model has no biases to train: add --add_biases, which gives "
                "every linear one that starts at zero"
            )

    def adapted_config(self, shape: ModelConfig) -> ModelConfig:
        """With add_biases, one with a bias on every linear, whatever the span."""
        return biased(shape) if self.add_biases else shape

    def param_breakdown(self, shape: ModelConfig) -> list[ParameterGroup]:
        """The widths of all that has a bias: linears, and in GPT-2 the norms."""
        shape, layers = self.adapted_config(shape), len(self.layer_range(shape))
        parts = []
        for role in (role for role in shape.roles if shape.has_bias(role)):
            out = linear_size(shape, role)[1]
            parts.append(
                ParameterGroup(f"{role}, biases", layers * out, format_formula("L out", L=layers, out=out), role)
            )
        if FAMILIES[shape.family].norm_biases:
            d, last = shape.hidden_size, self.layer_range(shape).stop == shape.num_layers
            formula = format_formula("d (2 L + 1)" if last else "d 2 L", L=layers, d=d)
            parts.append(ParameterGroup("norms, biases", d * (2 * layers + last), formula, "norms"))
        return parts


def biased(shape: ModelConfig) -> ModelConfig:
    """The shape with a bias on every linear."""
    return replace(shape, qkv_bias=True, out_bias=True, mlp_bias=True)


def _add_biases(model: CausalLM) -> None:
    """Zero biases, of the base's dtype, where a linear has none."""
    model.config = biased(model.config)
    for block in model.blocks:
        for role in model.config.roles:
            linear = block.get_submodule(our_module_name(role))
            assert isinstance(linear, Linear)
            if linear.bias is None:
                zeros = torch.zeros(linear.out_features, dtype=linear.weight.dtype, device=target_device(linear.weight))
                linear.bias = nn.Parameter(zeros, requires_grad=False)
