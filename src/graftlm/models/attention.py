"""Causal self-attention over what stands before and what is at hand.

What is unusual here: *the past is an argument*. A `KVCache` holds keys and values of tokens that stand before the
tokens at hand, either shared by all rows or a row's own, and `Attention` reads any number of them:

    softmax([Q K_1^T, Q K_2^T, …, Q K^T] / sqrt(D)) [V_1; V_2; …; V]

One idea serves the key/value cache of generation (a row's own, extended in place), the instruction all prompts of a
batch begin with (shared, with gradient), few-shot demonstrations (shared, without), and prefix tuning (learned).

Left out: masks for padding. Rows are padded on the right, where causal attention never looks.

Letters: B rows, T tokens at hand, S tokens of one segment, H query heads, K key/value heads, G = H / K query heads
that share one, D width of a head, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from graftlm.models.layers import Dropout, HasFusedOps, Linear, apply_linears, apply_rotary_emb

if TYPE_CHECKING:
    from graftlm.models.config import ModelConfig

# The fused kernel never materialises the [T, T] scores, but is slower on a CPU for rows as short as reviews. From this
# many tokens on it is used for the memory's sake; where the two are equally fast has not been measured.
FUSED_FROM = 512

KeyValue = tuple[Tensor, Tensor]
"""Keys and values, each [1|B, K, S, D]."""


class KVCache:
    """Keys and values of tokens that stand before the tokens at hand, for every layer.

    Shared: `KVCache()` is empty until a forward pass is told to `keep` into it; each tensor is then [1, K, S, D], or
    [B, K, S, D] when it was filled from several rows of the same length.
    A row's own: `KVCache.cache(...)` is preallocated with room for `capacity` tokens, and `lengths` [B] says how many
    of them each row holds. A forward pass that keeps into it writes behind each row's length; the caller then adds to
    `lengths` (right-padded rows differ in how many of the new tokens were real).
    """

    def __init__(
        self,
        keys: list[Tensor] | None = None,
        values: list[Tensor] | None = None,
        lengths: Tensor | None = None,
    ) -> None:
        self.keys = keys if keys is not None else []
        self.values = values if values is not None else []
        self.lengths = lengths

    @classmethod
    def cache(
        cls,
        shape: "ModelConfig",
        rows: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "KVCache":
        """An empty cache of `rows` rows with room for `capacity` tokens each."""

        def empty() -> list[Tensor]:
            size = (rows, shape.num_kv_heads, capacity, shape.head_dim)
            return [torch.zeros(size, device=device, dtype=dtype) for _ in range(shape.num_layers)]

        return cls(empty(), empty(), torch.zeros(rows, dtype=torch.long, device=device))

    @property
    def size(self) -> int:
        """S: the tokens it holds, or has room for."""
        return self.keys[0].shape[2] if self.keys else 0

    @property
    def offset(self) -> int | Tensor:
        """How far it moves the position of what follows: S, or each row's length [B]."""
        return self.size if self.lengths is None else self.lengths

    def update(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep layer `layer`'s new keys and values, each [B, K, T, D]."""
        if self.lengths is None:
            assert len(self.keys) == layer, "a shared segment is filled once, layer by layer"
            self.keys.append(k)
            self.values.append(v)
            return
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        at = self.lengths[:, None] + torch.arange(k.shape[2], device=k.device)
        self.keys[layer][rows, :, at] = k.transpose(1, 2)
        self.values[layer][rows, :, at] = v.transpose(1, 2)

    def index_select(self, rows: Tensor) -> "KVCache":
        """A cache that holds only these rows, in this order."""
        assert self.lengths is not None
        return KVCache([k[rows] for k in self.keys], [v[rows] for v in self.values], self.lengths[rows])


@dataclass(frozen=True)
class AttentionInputs:
    """What a forward pass's tokens stand in; computed once and read by every layer."""

    past: Sequence[KVCache] = ()
    use_cache: KVCache | None = None
    rotary_cos_sin: tuple[Tensor, Tensor] | None = None
    """Cosine and sine, each [T, D/2] or [B, T, D/2]; None for learned positions."""
    attn_mask: Tensor | None = None
    """Added to the scores: 0 where a query may look, -inf where not, [1|B, 1, 1, T, ΣS]; None: everywhere."""
    causal: bool = True
    """Whether a token may look at all that stands before it; False where a row forks."""
    shared_prefix: "SharedPrefix | None" = None
    """Set when the tokens are the flat [N, d] of `CausalLM.forward_shared_prefix` instead of [B, T, d]."""
    positions: Tensor | None = None
    """[B, M] positions of each row that are still wanted, in the last layer; None: all of them."""

    def restrict_to(self, at: Tensor) -> "AttentionInputs":
        """The same, of a layer of which only the positions `at` [B, M] of each row are wanted."""
        bias = self.attn_mask
        if bias is not None:
            rows = torch.arange(bias.shape[0], device=at.device)[:, None]
            bias = bias[rows, :, :, at].movedim(1, 3)
        return replace(self, attn_mask=bias, positions=at)

    def select(self, x: Tensor) -> Tensor:
        """x at the positions that are wanted, [B, M, …]; x itself where all are. The lead is never wanted then."""
        if self.positions is None:
            return x
        if self.shared_prefix is not None:
            x = x[self.shared_prefix.p :].unflatten(0, (self.shared_prefix.b, self.shared_prefix.t))
        return x[torch.arange(x.shape[0], device=x.device)[:, None], self.positions]

    def gather_rope(self, table: Tensor) -> Tensor:
        """A table by position, [T, D/2], [B, T, D/2] or with a lead [N, D/2], at the positions that are wanted."""
        if self.positions is None or self.shared_prefix is not None or table.dim() > 2:
            return self.select(table)
        return table[self.positions]


@dataclass(frozen=True)
class SharedPrefix:
    """How a flat [N, d] is made up: P tokens that stand before every row, then B rows of T tokens, N = P + B T."""

    p: int
    b: int
    t: int
    attn_mask: Tensor | None
    """The lead's own causal bias [1, 1, 1, P, P]; `AttentionInputs.bias` is the rows', [1, 1, 1, T, P + T]."""


@dataclass(frozen=True)
class PairedRow:
    """Rows of a prompt and two answers to it: the second stands behind the first, and reads the prompt only.

    So a pair costs its prompt once. Positions of the second go on from the prompt, as those of the first do.
    """

    prompt: Tensor
    """[B] tokens of each row's own prompt."""
    second: Tensor
    """[B] where each row's second answer begins."""

    def to(self, device: torch.device) -> "PairedRow":
        """The same on a device."""
        return PairedRow(self.prompt.to(device), self.second.to(device))

    def positions(self, t: int) -> Tensor:
        """Where each token stands in its own text: [B, T]."""
        at = torch.arange(t, device=self.second.device)
        return at - (at >= self.second[:, None]) * (self.second - self.prompt)[:, None]

    def bias(self, t: int, dtype: torch.dtype) -> Tensor:
        """The bias of rows of t tokens: causal, and no look from the second answer at the first: [B, 1, 1, T, T]."""
        at = torch.arange(t, device=self.second.device)
        first = (at >= self.prompt[:, None]) & (at < self.second[:, None])
        apart = (at >= self.second[:, None])[:, :, None] & first[:, None, :]
        hidden = apart | (at[None, :] > at[:, None])
        bias = torch.zeros(hidden.shape, device=at.device, dtype=dtype)
        return bias.masked_fill_(hidden, float("-inf"))[:, None, None]


def causal_mask(t: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The bias of t tokens that look at themselves and those before: [1, 1, 1, T, T]."""
    return torch.full((1, 1, 1, t, t), float("-inf"), device=device, dtype=dtype).triu_(1)


def attention_mask(past: Sequence[KVCache], t: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """The mask of `AttentionInputs` for t tokens after this past: causal, each row up to its own length."""
    causal = torch.ones(1, t, t, dtype=torch.bool, device=device).triu(1)
    ignored = []
    for segment in past:
        if segment.lengths is None:
            ignored.append(torch.zeros(1, 1, segment.size, dtype=torch.bool, device=device))
        else:
            ignored.append((torch.arange(segment.size, device=device) >= segment.lengths[:, None])[:, None])
    if t == 1 and all(segment.lengths is None for segment in past):
        return None
    rows = max((i.shape[0] for i in ignored), default=1)
    ignore = torch.cat([i.expand(rows, t, -1) for i in [*ignored, causal]], dim=-1)
    return torch.zeros(ignore.shape, device=device, dtype=dtype).masked_fill_(ignore, float("-inf"))[:, None, None]


class Attention(HasFusedOps):
    """Causal self-attention with K key/value heads for H query heads (K = H: plain; K < H: grouped-query)."""

    def __init__(self, shape: "ModelConfig") -> None:
        super().__init__()
        d, hd = shape.hidden_size, shape.head_dim
        self.heads, self.kv_heads, self.head_dim = shape.num_heads, shape.num_kv_heads, hd
        self.q = Linear(d, shape.num_heads * hd, bias=shape.qkv_bias)
        self.k = Linear(d, shape.num_kv_heads * hd, bias=shape.qkv_bias)
        self.v = Linear(d, shape.num_kv_heads * hd, bias=shape.qkv_bias)
        self.o = Linear(shape.num_heads * hd, d, bias=shape.out_bias)
        self.drop = Dropout()

    def forward(self, x: Tensor, layer: int, context: AttentionInputs) -> Tensor:
        """[B, T, d] -> [B, T, d], or [N, d] -> [N, d] with a lead; [B, M, d] where only some positions are wanted."""
        if context.positions is None:
            q, k, v = apply_linears(x, self.q, self.k, self.v)
        else:
            (q,), (k, v) = apply_linears(context.select(x), self.q), apply_linears(x, self.k, self.v)
        q = q.unflatten(-1, (self.heads, self.head_dim))
        k, v = (y.unflatten(-1, (self.kv_heads, self.head_dim)) for y in (k, v))
        if context.rotary_cos_sin is not None:
            cos, sin = context.rotary_cos_sin
            how = (self.fused, self.active_kernels)
            q = apply_rotary_emb(q, context.gather_rope(cos), context.gather_rope(sin), *how)
            k = apply_rotary_emb(k, cos, sin, *how)
        past = [(segment.keys[layer], segment.values[layer]) for segment in context.past]
        if context.shared_prefix is not None:
            return self.o(self._attend_shared_prefix(q, k, v, past, context.shared_prefix, context).flatten(-2))
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if not past and context.causal and context.positions is None and q.shape[1] >= FUSED_FROM:
            p = self.drop.p if self.training else 0.0
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, dropout_p=p, is_causal=True, enable_gqa=self.kv_heads < self.heads
            ).transpose(1, 2)
        else:
            y = scaled_dot_product(q, [*past, (k, v)], context.attn_mask, self.drop)
        if context.use_cache is not None:
            context.use_cache.update(layer, k, v)
        return self.o(y.flatten(-2))

    def _attend_shared_prefix(
        self, q: Tensor, k: Tensor, v: Tensor, past: list[KeyValue], lead: SharedPrefix, context: AttentionInputs
    ) -> Tensor:
        """The lead among itself, each row over the lead and itself; q [N, H, D], k and v [N, K, D] -> [N, H, D].

        Before both stands the past. Where only some positions are wanted, q is [B, M, H, D] and so is the result.
        """

        def split_prefix(x: Tensor) -> tuple[Tensor, Tensor]:
            first, rest = x.split([lead.p, lead.b * lead.t])
            return first[None], rest.unflatten(0, (lead.b, lead.t))

        (k1, k2), (v1, v2) = split_prefix(k), split_prefix(v)
        before, own = (k1.transpose(1, 2), v1.transpose(1, 2)), (k2.transpose(1, 2), v2.transpose(1, 2))
        if context.positions is not None:
            return scaled_dot_product(q, [*past, before, own], context.attn_mask, self.drop)
        q1, q2 = split_prefix(q)
        y1 = scaled_dot_product(q1, [*past, before], lead.attn_mask, self.drop)
        y2 = scaled_dot_product(q2, [*past, before, own], context.attn_mask, self.drop)
        return torch.cat([y1.flatten(0, 1), y2.flatten(0, 1)])


def scaled_dot_product(q: Tensor, parts: list[KeyValue], bias: Tensor | None, drop: Dropout) -> Tensor:
    """Attention of q [B, T, H, D] over parts of keys and values, each [1|B, K, S, D]; returns [B, T, H, D].

    A product of scores for each part, one softmax over all of them, a product of values for each part. With gradient
    the parts are joined first: one large product is then faster than several small
    ones; without, a part shared by all rows is read in place.
    """
    b, t, heads, d = q.shape
    kv = parts[0][0].shape[1]
    q = (q * d**-0.5).view(b, t, kv, heads // kv, d)
    if torch.is_grad_enabled() and len(parts) > 1:
        parts = [(_join([k for k, _ in parts], b), _join([v for _, v in parts], b))]
    scores = torch.cat([_scores(q, k) for k, _ in parts], dim=-1)
    if bias is not None:
        scores = scores + bias
    weights = drop(torch.softmax(scores, dim=-1)).split([k.shape[2] for k, _ in parts], dim=-1)
    y = sum(_weighted(w, v) for w, (_, v) in zip(weights, parts, strict=True))
    assert isinstance(y, Tensor)
    return y.permute(0, 3, 1, 2, 4).reshape(b, t, heads, d)


def _join(parts: list[Tensor], b: int) -> Tensor:
    return torch.cat([p.expand(b, -1, -1, -1) for p in parts], dim=2)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q [B, T, K, G, D] times k [1|B, K, S, D] -> [B, K, G, T, S]."""
    b, t, kv, g, d = q.shape
    if k.shape[0] == 1 and b > 1:
        rows = q.permute(2, 0, 3, 1, 4).reshape(kv, b * g * t, d)
        return torch.bmm(rows, k[0].transpose(1, 2)).view(kv, b, g, t, -1).transpose(0, 1)
    rows = q.permute(0, 2, 3, 1, 4).reshape(b * kv, g * t, d)
    return torch.bmm(rows, k.reshape(b * kv, -1, d).transpose(1, 2)).view(b, kv, g, t, -1)


def _weighted(w: Tensor, v: Tensor) -> Tensor:
    """w [B, K, G, T, S] times v [1|B, K, S, D] -> [B, K, G, T, D]."""
    b, kv, g, t, s = w.shape
    if v.shape[0] == 1 and b > 1:
        rows = w.transpose(0, 1).reshape(kv, b * g * t, s)
        return torch.bmm(rows, v[0]).view(kv, b, g, t, -1).transpose(0, 1)
    return torch.bmm(w.reshape(b * kv, g * t, s), v.reshape(b * kv, s, -1)).view(b, kv, g, t, -1)
