"""`adapt`: install a method on a model in memory, one of ours or any `nn.Module`.

adapt(model, "lora", rank=8)                              a CausalLM: every method
adapt(network, "lora", targets=["encoder.*.fc"])          another module: LoRA and DoRA on its nn.Linear
"""

from collections import Counter
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any, TypeVar, get_type_hints

import torch
from torch import nn

from graftlm.config.values import python_value, short
from graftlm.errors import InputError, did_you_mean, unknown_name_error
from graftlm.methods import METHODS, base
from graftlm.methods.base import Method
from graftlm.methods.lora import LoRA
from graftlm.models import CausalLM

Module = TypeVar("Module", bound=nn.Module)
MAX_NAMED = 8  # linears that an error names


def adapt(model: Module, method: str | Method = "lora", *, seed: int = 0, **settings: Any) -> Module:
    """Install a method on a model, in place: from then on `requires_grad` says what is trained. Returns the model.

    Args:
        model: a CausalLM, as `load(…).model`, or any other module, whose `nn.Linear` LoRA and DoRA adapt.
        method: its name, or an object of `methods`.
        seed: of the initial weights.
        settings: fields of the method by name, as in rank=8, alpha=16, dropout=0.1, targets=["q", "v"], or
            targets=["all-linear"]. Of another module than ours, targets are names of linears, whole or from a dot on,
            or patterns with * and ?: "fc1" is every linear of this name, "*" is every linear.

    Raises InputError for an unknown method or setting, and for a target that the model does not have.
    """
    chosen = _method(method, settings)
    if isinstance(model, CausalLM):
        chosen.for_model(model.config).install(model, torch.Generator().manual_seed(seed))
    elif isinstance(model, nn.Module):
        if not isinstance(chosen, LoRA):
            raise InputError(f"adapt: {chosen.name} adapts the models of graftlm: lora and dora adapt any module")
        named = isinstance(method, Method) or "targets" in settings
        _adapt_linears(model, chosen, torch.Generator().manual_seed(seed), named)
    else:
        raise InputError(f"adapt: {short(model)} is no module: pass load(…).model, or your own nn.Module")
    return model


def _method(method: str | Method, settings: dict[str, Any]) -> Method:
    """The method of a name and its settings."""
    if isinstance(method, Method):
        if settings:
            raise InputError(f"adapt: {next(iter(settings))}: is a setting of the method that is passed: leave it out")
        return method
    if method not in METHODS:
        raise unknown_name_error("method", str(method), METHODS)
    cls = METHODS[method]
    known, hints = [f.name for f in fields(cls)], get_type_hints(cls)
    for name in settings:
        if name not in known:
            hint = f"{did_you_mean(name, known, '')}it has {', '.join(known)}"
            raise InputError(f"adapt: {method} has no setting {name!r}: {hint}")
    plain = {name: value for name, value in settings.items() if name == "layers"}
    return cls(**plain, **{n: python_value(n, value, hints[n]) for n, value in settings.items() if n not in plain})


def _adapt_linears(model: nn.Module, method: LoRA, rng: torch.Generator, named: bool) -> None:
    """Freeze a module and replace the targeted linears in it. named: whether the targets are those of the caller."""
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and name}
    have = f"its linears are {', '.join([*linears][:MAX_NAMED]) or 'none'}" + ", …" * (len(linears) > MAX_NAMED)
    if not named:
        raise InputError(f"adapt: name the linears to adapt, as in targets=['*']: {have}")
    found = {target: [name for name in linears if _matches(name, target)] for target in method.targets}
    for target, names in found.items():
        if not names:
            raise InputError(f"adapt: targets: {target!r} is no nn.Linear of this module: {have}")
    base.freeze(model)
    for name in dict.fromkeys(name for names in found.values() for name in names):
        linear = linears[name]
        if method.rank > linear.in_features:
            raise InputError(f"adapt: rank {method.rank} is above the width of {name}: at most {linear.in_features}")
        model.set_submodule(name, method.linear.from_linear(linear, method, rng).train(linear.training))
    shared = _shared_parameters(model)
    for linear in base.mergeable_linears(model):
        if id(linear.weight) in shared:  # merging would change the other module too
            linear.merge_on_eval = False


def _matches(name: str, target: str) -> bool:
    """Whether a linear's name is the target's, or ends with it after a dot, or fits its pattern."""
    return name == target or name.endswith(f".{target}") or fnmatchcase(name, target)


def _shared_parameters(model: nn.Module) -> set[int]:
    """The parameters that are in a module under several names, such as tied embeddings."""
    count = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {p for p, names in count.items() if names > 1}
