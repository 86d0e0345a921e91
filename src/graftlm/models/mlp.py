"""The part of a block that sees one token at a time: an MLP, or a mixture of them.

Letters: d hidden size, E experts, k of which compute a token, N tokens.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.models.config import ExpertsConfig, LayerConfig, ModelConfig
from graftlm.models.fused_ops import SwiGLU
from graftlm.models.layers import HasFusedOps, Linear, apply_linears

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
SWIGLU_ALPHA, SWIGLU_LIMIT = 1.702, 7.0


class MLP(HasFusedOps):
    """down(activation(up(x))), or gated: down(activation(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        d, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate = Linear(d, width, bias=bias) if layer.gated else None
        self.up = Linear(d, width, bias=bias)
        self.down = Linear(width, d, bias=bias)
        self.activation = layer.activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        if self.gate is None:
            return self.down(ACTIVATIONS[self.activation](self.up(x)))
        gate, up = apply_linears(x, self.gate, self.up)
        if self.activation == "clamped_swiglu":
            return self.down(clamped_swiglu(gate, up))
        if self.fused and self.activation == "silu":
            return self.down(SwiGLU.apply(gate, up, self.active_kernels))
        return self.down(ACTIVATIONS[self.activation](gate) * up)


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """(up + 1) gate sigmoid(1.702 gate), with gate at most 7 and up between -7 and 7 (gpt-oss)."""
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return (up + 1) * gate * torch.sigmoid(SWIGLU_ALPHA * gate)


class MixtureOfExperts(nn.Module):
    """Sum over the k experts of a token of p_e MLP_e(x), with p = softmax(router(x)) (Shazeer et al. 2017)."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, experts: ExpertsConfig) -> None:
        super().__init__()
        self.router = Linear(config.hidden_size, experts.count, bias=experts.router_bias)
        one = replace(config, intermediate_size=experts.intermediate_size)
        self.experts = nn.ModuleList([MLP(one, layer) for _ in range(experts.count)])
        self.per_token, self.normalized = experts.per_token, experts.normalized

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]. The router's probabilities are float32 or wider."""
        tokens = x.reshape(-1, x.shape[-1])
        scores = self.router(tokens)
        p, chosen = scores.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1).topk(self.per_token)
        if self.normalized:
            p = p / p.sum(dim=-1, keepdim=True)
        p, y = p.to(x.dtype), torch.zeros_like(tokens)
        for expert in self._needed(chosen):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            y = y.index_add(0, token, self.experts[expert](tokens[token]) * p[token, slot, None])
        return y.view_as(x)

    def _needed(self, chosen: Tensor) -> Iterable[int]:
        """The chosen experts; all if they are trained, so that each has a gradient."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.experts.parameters()):
            return range(len(self.experts))
        return chosen.unique().tolist()
