"""What GPT-2 and the Llama family have in common: the shape, the walk through the blocks, the tied head.

    ids [B, T] -> embedding -> blocks -> norm -> hidden [B, T, d] -> (only where asked for) head -> logits

What is unusual here: logits are made only at the positions a caller names, because with a vocabulary of 50,000 the
head costs as much as a dozen layers; and every linear has a role (q, k, v, o, up, gate, down) that `--targets` names.

Letters: B rows, T tokens, d model width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.models.attention import Context, Lead, Segment, causal_bias, score_bias
from graftlm.models.layers import Dropout, Embedding, Linear

ROLES = ("q", "k", "v", "o", "up", "gate", "down")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Everything that decides a model's tensors and its arithmetic; read from config.json by `names.read_shape`."""

    family: Literal["gpt2", "llama"]
    layers: int
    heads: int
    kv_heads: int
    d_model: int
    head_dim: int
    d_ff: int
    vocab: int
    context: int
    """The most tokens it was made for."""
    norm_eps: float
    tied: bool = True
    """Whether the head is the embedding."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    """Rope settings beside theta, sorted: empty, or of type linear or llama3."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The linears this family has."""
        return ROLES if self.family == "llama" else tuple(r for r in ROLES if r != "gate")


class CausalLM(nn.Module):
    """A decoder-only language model; `gpt2.GPT2` and `llama.Llama` fill in the parts."""

    def __init__(self, shape: Shape, blocks: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.shape = shape
        self.embed = Embedding(shape.vocab, shape.d_model)
        self.drop = Dropout()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = None if shape.tied else Linear(shape.d_model, shape.vocab, bias=False)
        self.compute_dtype: torch.dtype | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: what the base was loaded in, also where trained weights are float32."""
        return self.compute_dtype or self.embed.weight.dtype

    def set_dropout(self, p: float) -> None:
        """Dropout on embeddings, attention probabilities and residual branches (a method's own is left alone)."""
        for name, module in self.named_modules():
            if type(module) is Dropout and not name.endswith("lora_drop"):
                module.p = p

    def place(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add learned positions to the embedded tokens, where a family has them."""
        return x

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine of the positions, where a family rotates."""
        return None

    def hidden(self, ids: Tensor, past: Sequence[Segment] = (), keep: Segment | None = None) -> Tensor:
        """[B, T] ids behind `past` -> [B, T, d] after the last norm; the new keys and values go to `keep`."""
        t = ids.shape[1]
        positions = torch.arange(t, device=ids.device)
        for segment in past:
            start = segment.start
            positions = positions + (start if isinstance(start, int) else start[:, None])
        context = Context(past, keep, self.rope(positions), score_bias(past, t, ids.device, self.dtype))
        x = self.drop(self.place(self.embed.look_up(ids, self.dtype), positions))
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, context)
        return self.norm(x)

    def hidden_behind(self, lead: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """[1, P] ids that stand before every row of [B, T] ids -> [P, d] and [B, T, d] after the last norm.

        The same as a pass over `lead` kept in a Segment and one over `ids` behind it, but side by side in one flat
        [P + B T, d], so that each layer's products are one, and large: half the calls, no thin matrices.
        """
        (p, (b, t)), device = (lead.shape[1], ids.shape), ids.device
        positions = torch.cat([torch.arange(p, device=device), torch.arange(p, p + t, device=device).repeat(b)])
        bias = F.pad(causal_bias(t, device, self.dtype), (p, 0))
        parts = Lead(p, b, t, causal_bias(p, device, self.dtype))
        context = Context(rope=self.rope(positions), bias=bias, lead=parts)
        x = self.embed.look_up(torch.cat([lead.flatten(), ids.flatten()]), self.dtype)
        x = self.drop(self.place(x, positions))
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, context)
        first, rest = self.norm(x).split([p, b * t])
        return first, rest.unflatten(0, (b, t))

    def logits(self, h: Tensor) -> Tensor:
        """[..., d] -> [..., V] in float32 (float64 stays float64)."""
        weight = self.embed.weight if self.head is None else self.head.weight
        return F.linear(h, weight.to(h.dtype)).to(torch.promote_types(h.dtype, torch.float32))

    def forward(
        self,
        ids: Tensor,
        past: Sequence[Segment] = (),
        keep: Segment | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V], or [N, V] at the flat positions `at` [N] (row * T + token)."""
        h = self.hidden(ids, past, keep)
        return self.logits(h if at is None else h.flatten(0, 1)[at])
