"""Checks of counting.md: closed forms against a net that is built and counted, and against `graft estimate`.

Letters: L layers, D_l = 2^(L - l) units in layer l, D_0 = 2^L inputs, m the width of an adapter's bottleneck.
"""

from itertools import pairwise
from typing import Any

import torch
from _equation import Row, equation
from torch import nn

from graftlm.config import EstimateConfig
from graftlm.studies.cost_report import estimate

L, M = 10, 4
WIDTHS = [2 ** (L - layer) for layer in range(L + 1)]


def net() -> list[nn.Linear]:
    """The fully connected layers with biases, on the meta device."""
    return [nn.Linear(a, b, device="meta") for a, b in pairwise(WIDTHS)]


def adapters() -> list[nn.Module]:
    """V_up gelu(V_down a + v_down) + v_up after each layer, including the output."""
    with torch.device("meta"):
        return [nn.Sequential(nn.Linear(d, M), nn.GELU(), nn.Linear(M, d)) for d in WIDTHS[1:]]


def count(modules: list[Any]) -> int:
    """The numbers in their parameters."""
    return sum(p.numel() for module in modules for p in module.parameters())


def accounted(**flags: Any) -> dict[str, Any]:
    """The result of `graft estimate --mlp_widths=1024,512,…`."""
    config = EstimateConfig(mlp_widths=",".join(map(str, WIDTHS)), **flags)
    return estimate(config, {"mlp_widths", *flags})


@equation("4.1", "counted", "closed form")
def hidden_units(sign: float = 1.0) -> list[Row]:
    """The sum of D_l over the layers but the last is 2^L - 2."""
    built = [layer.out_features for layer in net()]
    return [
        Row("hidden units", sum(built[:-1]), 2**L - int(2 * sign)),
        Row("with the output", sum(built), 2**L - int(sign)),
        Row("hidden units, `graft estimate`", accounted()["units"]["hidden"], 2**L - int(2 * sign)),
    ]


def parameters(weights: float = 1.0, biases: float = 1.0) -> int:
    """2 (4^L - 1) / 3 weights and 2^L - 1 biases; the signs are those before the ones."""
    return (2 * (4**L - int(weights))) // 3 + 2**L - int(biases)


@equation("4.2", "counted", "closed form")
def all_parameters(weights: float = 1.0, biases: float = 1.0) -> list[Row]:
    """The sum of (D_(l-1) + 1) D_l is 2 (4^L - 1) / 3 + 2^L - 1."""
    closed = parameters(weights, biases)
    return [
        Row("parameters of the net, built", count(net()), closed),
        Row("parameters, `graft estimate`", accounted()["total"], closed),
        Row("weights alone", sum(layer.weight.numel() for layer in net()), 2 * (4**L - int(weights)) // 3),
    ]


@equation("4.3", "counted", "closed form")
def biases_only(sign: float = 1.0) -> list[Row]:
    """BitFit trains 2^L - 1 numbers."""
    built, found = sum(layer.bias.numel() for layer in net()), accounted(method="bitfit")
    closed = 2**L - int(sign)
    return [
        Row("biases of the net, built", built, closed),
        Row("biases, `graft estimate`", found["trainable"], closed),
        Row(
            f"by all parameters: **{found['trainable_fraction']:.2%}**",
            found["trainable_fraction"],
            closed / parameters(),
        ),
    ]


@equation("4.4", "counted", "closed form")
def bottleneck_adapters(down: float = 1.0, up: float = 1.0) -> list[Row]:
    """Adapters of width m after every layer are (2 m + 1)(2^L - 1) + m L numbers; the signs are the biases' own."""
    built, found = count(adapters()), accounted(method="adapter", rank=M)
    closed = (2 * M + int(up)) * (2**L - 1) + int(down) * M * L
    return [
        Row("parameters of the adapters, built", built, closed),
        Row("parameters, `graft estimate`", found["trainable"], closed),
        Row(
            f"by all, adapters included: **{found['trainable_fraction']:.2%}**",
            found["trainable_fraction"],
            closed / (parameters() + closed),
        ),
        Row(
            f"by the net alone: **{found['trainable_vs_base']:.2%}**", found["trainable_vs_base"], closed / parameters()
        ),
    ]
