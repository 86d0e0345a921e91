"""BitFit (Ben-Zaken et al. 2021, arXiv:2106.10199): only the bias terms are trained.

    h = W0 x + b        b trained, W0 frozen; likewise the b of layer norms

The Llama family has no biases (Qwen2 a few): `add_biases` gives every linear one that starts at zero, which changes
nothing until it is trained and is exported like any other (attention_bias and mlp_bias in a Hugging Face config).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from graftlm.errors import InputError
from graftlm.methods.base import Method, block_modules, freeze, master_dtype, target_device
from graftlm.methods.cost_model import ParameterGroup, counted, expert_parts, linear_group, norms_formula
from graftlm.models import CausalLM, Linear, ModelConfig


@dataclass(frozen=True)
class BitFit(Method):
    """Train the biases of linears and norms, kept in float32 and cast to the base's dtype in each forward."""

    add_biases: bool = False
    """Give every linear of the model a zero bias if it has none, but not the router of a mixture of experts."""

    name: ClassVar[str] = "bitfit"
    default_lr: ClassVar[float] = 2e-3
    flags: ClassVar[Mapping[str, str]] = {"add_biases": "add_biases"}
    examples: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "": {"add_biases": True},
        "lower": {"add_biases": True, "layers": (0, 1)},
    }

    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Train the biases of the layers' blocks, and the final norm's after the last one; InputError without any."""
        freeze(model)
        if self.add_biases:
            model.config = self.adapted_config(model.config)
            for name, linear in model.blocks.named_modules():
                if isinstance(linear, Linear) and linear.bias is None and not name.endswith("router"):
                    weight = linear.stored_weight
                    options = {"dtype": weight.dtype, "device": target_device(weight)}
                    linear.bias = nn.Parameter(torch.zeros(linear.out_features, **options), requires_grad=False)
        modules = (m for root in block_modules(model, self.layer_range(model.config)) for m in root.modules())
        biases = [(m, b) for m in modules if isinstance(b := getattr(m, "bias", None), nn.Parameter)]
        for module, bias in biases:
            # A copy even if the dtype fits: models may share the base's tensors.
            module.bias = nn.Parameter(bias.data.to(master_dtype(bias.dtype), copy=True))
        if not biases:
            added = "add --add_biases, which gives every linear one that starts at zero"
            raise InputError(
                f"--method bitfit: this {model.config.family} model has no biases to train: "
                + ("use --method lora" if "conv_in" in model.config.roles else added)
            )

    def adapted_config(self, config: ModelConfig) -> ModelConfig:
        """With add_biases, one with a bias on every linear, in all layers."""
        if self.add_biases and "conv_in" in config.roles:
            raise InputError("--add_biases: short convolutions take no biases: use --method lora")
        return replace(config, qkv_bias=True, out_bias=True, mlp_bias=True) if self.add_biases else config

    def param_breakdown(self, config: ModelConfig) -> list[ParameterGroup]:
        """The widths of all linears that have a bias, and in GPT-2 of the norms."""
        config, layers = self.adapted_config(config), self.layer_range(config)
        roles = filter(config.has_bias, config.roles)
        parts = [linear_group(config, role, layers, "biases", "L out") for role in roles]
        parts += expert_parts(config, layers, biases_only=True)
        if config.norm_biases:
            norms = counted("norms, biases", norms_formula(config, layers), L=len(layers), d=config.hidden_size)
            parts.append(ParameterGroup(*norms, "norms"))
        return parts
