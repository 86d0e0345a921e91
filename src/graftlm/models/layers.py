"""Layers: linear, embedding, two norms, dropout, rotary position embedding, and causal self-attention over a past.

*Weights follow the activations*: trained weights are stored in float32 and frozen ones in the base's dtype, and each
forward pass casts the weight to the dtype of its input (no copy if they are the same).

*The past is an argument*: a `KVCache` holds keys and values of earlier tokens, shared by all rows or one set per row,
and `Attention` attends to any number of them before the current tokens:

    softmax([Q K_1^T, Q K_2^T, …, Q K^T] scale + mask) [V_1; V_2; …; V]

This serves the key/value cache of generation (per row, extended in place), the prompt prefix that a batch shares (with
gradient), few-shot demonstrations (shared, without gradient), and prefix tuning (learned).

There are no padding masks: rows are padded on the right, where causal attention never looks.

Letters: B rows, T current tokens, S tokens of one cache, d hidden size, H query heads, K key/value heads, G = H / K
query heads per key/value head, D head dimension, of which R rotate; N = P + B T tokens of P shared ones and B rows in a
flat tensor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.models import fused_ops, packed
from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.fused_ops import TORCH, DropoutMask, ReferenceKernels
from graftlm.models.rope import RopeConfig
from graftlm.models.row_layout import PackedRows, RowLayout


@dataclass(frozen=True)
class LowRankUpdate:
    """What adapters add to a linear's output: b_n (a_n x), for the adapter n of each row."""

    a: Tensor
    """[N, r, in], of N adapters."""
    b: Tensor
    """[N, out, r], times the scale."""
    adapters: Callable[[int], Tensor | None]
    """Number of rows -> the adapter of each [B] int64, -1 for none; None: none in any row."""


class Linear(packed.HasWeight, nn.Linear):
    """y = x W^T + b in the dtype of x; W may be stored in another, or packed (`packed.py`)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return packed.linear(x, self.stored_weight, None if self.bias is None else self.bias.to(x.dtype))

    @staticmethod
    def forward_many(linears: "Sequence[Linear]", x: Tensor) -> list[Tensor]:
        """The outputs of several linears for the same x. Methods override it where their linears can share work."""
        return [linear(x) for linear in linears]

    def low_rank_updates(self) -> Sequence[LowRankUpdate] | None:
        """What its output is in addition to x W^T + b, in evaluation; None if it is something else."""
        return () if type(self).forward is Linear.forward else None


def apply_linears(x: Tensor, *linears: Linear) -> list[Tensor]:
    """The outputs of `linears` for the same x, by `forward_many` of the first that is not a plain `Linear`."""
    kind = next((type(linear) for linear in linears if type(linear) is not Linear), Linear)
    return kind.forward_many(linears, x)


class Embedding(packed.HasWeight, nn.Embedding):
    """Token or position embedding; the table may be packed."""

    def embed_in_dtype(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """[...] int64 -> [..., d] in `dtype`."""
        return packed.embedding(ids, self.stored_weight).to(dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016) in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)


class HasFusedOps(nn.Module):
    """A module with fused operations (`fused_ops.py`); `CausalLM.use_fused_ops` and `set_kernels` set all of them."""

    fused = True
    """Whether the fused operations are used, or plain ones with autograd's gradients."""
    kernels: ReferenceKernels = TORCH
    """Their kernels in training."""

    @property
    def active_kernels(self) -> ReferenceKernels:
        """The kernels of this forward pass: torch's in evaluation, so scores do not depend on the training setup."""
        return self.kernels if self.training else TORCH


class RMSNorm(HasFusedOps):
    """Root-mean-square normalisation (Zhang & Sennrich 2019): (offset + w) x / sqrt(mean(x^2) + eps)."""

    def __init__(self, d: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d) - offset)
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]. The statistics are float32 (float64 for float64 inputs)."""
        exact, dtype = torch.promote_types(x.dtype, torch.float32), x.dtype
        if self.offset:  # 1 + w would lose most of a small w's bits in bfloat16
            x, weight = x.to(exact), self.weight.to(exact) + self.offset
        else:
            weight = self.weight.to(dtype)
        if self.fused:
            return fused_ops.RMSNorm.apply(x, weight, self.eps, self.active_kernels).to(dtype)
        wide = x.to(exact)
        n = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (n.to(x.dtype) * weight).to(dtype)


def make_norm(config: ModelConfig, layer: LayerConfig, size: int) -> LayerNorm | RMSNorm:
    """A norm of this width and of the layer's kind."""
    if layer.norm == "layer":
        return LayerNorm(size, eps=config.norm_eps, bias=layer.norm_bias)
    return RMSNorm(size, config.norm_eps, layer.norm_offset)


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014): each element is zero with probability p, the others are scaled by 1/(1-p)."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape; the identity in evaluation and at p = 0."""
        return dropout(x, self.p) if self.training and self.p else x


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout of x with probability p, rounded to a multiple of 2^-16 on a CPU."""
    if x.device.type != "cpu":
        return F.dropout(x, p)
    mask = draw_mask(p)
    return x if mask is None else x * mask.keep_mask(x).to(x.dtype).mul_(mask.scale)


def draw_mask(p: float) -> DropoutMask | None:
    """A mask that drops with probability p, seeded from torch's generator; None: nothing is dropped."""
    threshold = round(p * 65536)
    return DropoutMask(int(torch.randint(-(2**62), 2**62, ())), threshold) if threshold else None


def apply_rotary_emb(
    x: Tensor, cos: Tensor, sin: Tensor, fused: bool = True, kernels: ReferenceKernels = TORCH
) -> Tensor:
    """Rotate the pairs (x_i, x_{i + D/2}) of each head by the angles of their position (Su et al. 2021).

    x [B, T, H, D]; cos, sin [T, D/2] or [B, T, D/2]. Or x [N, H, D] and cos, sin [N, D/2].
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if fused:
        return fused_ops.ApplyRoPE.apply(x, cos, sin, kernels)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


# Attention ------------------------------------------------------------------------------------------------------------

# PyTorch's fused kernel never materialises the [T, T] scores, but on a CPU it is slower for short rows. It is used from
# this many tokens on, for its memory; where the two are equally fast has not been measured.
FUSED_FROM = 512

KeyValue = tuple[Tensor, Tensor]
"""Keys and values, each [1|B, K, S, D]."""
CacheSizes = tuple[tuple[int, int], tuple[int, int]]
"""(heads, width) of the keys and of the values that a layer caches."""
Masks = Mapping[int | None, Tensor | None]
"""Sliding window (None: full attention) -> what is added to the scores: 0 or -inf, [1|B, 1, 1, T, S]; None: nothing."""


class KVCache:
    """Keys and values of earlier tokens, for every layer.

    Shared: `KVCache()` is empty until it is passed as `cache` to a forward pass; its tensors are then [1, K, S, D], or
    [B, K, S, D] if it was filled from several rows of the same length.
    Per row: `CausalLM.empty_cache` is preallocated for `capacity` tokens, of which row b holds `lengths[b]`. A forward
    pass writes after each row's length; the caller then adds to `lengths`, because right-padded rows differ in how many
    of the new tokens are real.
    """

    def __init__(
        self, keys: Sequence[Tensor] = (), values: Sequence[Tensor] = (), lengths: Tensor | None = None
    ) -> None:
        self.keys, self.values, self.lengths = list(keys), list(values), lengths

    @classmethod
    def empty(cls, sizes: Sequence[CacheSizes], rows: int, capacity: int, like: Tensor) -> "KVCache":
        """A cache per row for `capacity` tokens, with these sizes of each layer, of the dtype and device of `like`."""
        parts = zip(*sizes, strict=True)
        keys, values = ([like.new_zeros(rows, heads, capacity, d) for heads, d in part] for part in parts)
        return cls(keys, values, torch.zeros(rows, dtype=torch.long, device=like.device))

    @property
    def size(self) -> int:
        """S: the tokens it holds, or its capacity."""
        return self.keys[0].shape[2] if self.keys else 0

    @property
    def offset(self) -> int | Tensor:
        """How far it moves the position of later tokens: S, or each row's length [B, 1]."""
        return self.size if self.lengths is None else self.lengths[:, None]

    def update(self, index: int, k: Tensor, v: Tensor) -> None:
        """Add the new keys and values of layer `index`, each [B, K, T, D]."""
        if self.lengths is None:
            assert len(self.keys) == index, "a shared cache is filled once, layer by layer"
            self.keys.append(k)
            self.values.append(v)
            return
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        slots = self.lengths[:, None] + torch.arange(k.shape[2], device=k.device)
        self.keys[index][rows, :, slots] = k.transpose(1, 2)
        self.values[index][rows, :, slots] = v.transpose(1, 2)

    def index_select(self, rows: Tensor) -> "KVCache":
        """A cache of these rows only, in this order."""
        assert self.lengths is not None
        return KVCache([k[rows] for k in self.keys], [v[rows] for v in self.values], self.lengths[rows])


@dataclass(frozen=True)
class SharedPrefix:
    """Layout of a flat [N, d]: P tokens that precede every row, then B rows of T tokens, N = P + B T."""

    p: int
    b: int
    t: int
    masks: Masks
    """For the prefix's own tokens; `AttentionInputs.masks` are the rows', over prefix and row."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, …] -> [1, P, …] and [B, T, …]."""
        first, rows = x.split([self.p, self.b * self.t])
        return first[None], rows.unflatten(0, (self.b, self.t))


@dataclass(frozen=True)
class AttentionInputs:
    """What the layers of one forward pass share; computed once."""

    past: Sequence[KVCache] = ()
    cache: KVCache | None = None
    """Where new keys and values are added."""
    rotary_cos_sin: Mapping[RopeConfig, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Cosine and sine of the current positions, each [T, D/2], [B, T, D/2] or flat [N, D/2]."""
    masks: Masks = field(default_factory=dict)
    layout: RowLayout | None = None
    """Set if rows hold several texts, where not every token attends to all before it."""
    shared_prefix: SharedPrefix | None = None
    """Set if the tokens are the flat [N, d] of `CausalLM.forward_shared_prefix` instead of [B, T, d]."""
    positions: Tensor | None = None
    """[B, M] positions of each row whose outputs are needed, in the last layer; None: all of them."""

    def restrict_to(self, positions: Tensor) -> "AttentionInputs":
        """The same for a layer of which only the outputs at `positions` [B, M] of each row are needed."""

        def queries(mask: Tensor | None) -> Tensor | None:
            if mask is None:
                return None
            rows = torch.arange(mask.shape[0], device=positions.device)[:, None]
            return mask[rows, :, :, positions].movedim(1, 3)

        masks = {window: queries(mask) for window, mask in self.masks.items()}
        return replace(self, masks=masks, positions=positions)

    def select(self, x: Tensor) -> Tensor:
        """x at the needed positions, [B, M, …], without the shared prefix; x itself if all are needed."""
        if self.positions is None:
            return x
        if self.shared_prefix is not None:
            x = x[self.shared_prefix.p :].unflatten(0, (self.shared_prefix.b, self.shared_prefix.t))
        return x[torch.arange(x.shape[0], device=x.device)[:, None], self.positions]

    def gather_rope(self, table: Tensor) -> Tensor:
        """A table by position, [T, D/2], [B, T, D/2] or flat [N, D/2], at the needed positions."""
        if self.positions is None or self.shared_prefix is not None or table.dim() > 2:
            return self.select(table)
        return table[self.positions]


def causal_hidden(t: int, device: torch.device) -> Tensor:
    """True for later tokens: bool [1, T, T]."""
    return torch.ones(1, t, t, dtype=torch.bool, device=device).triu(1)


def additive_masks(
    windows: Sequence[int | None], hidden: Tensor, positions: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Masks:
    """A mask for each window.

    Args:
        windows: sliding windows of the layers.
        hidden: what is hidden in all of them, bool [1|B, T, S].
        positions: of the queries [1|B, T] and of the keys [1|B, S].
        dtype: of the masks.
    """
    masks, (queries, keys) = dict[int | None, Tensor | None](), positions
    for window in windows:
        out = hidden if window is None else hidden | (queries[:, :, None] - keys[:, None] >= window)
        zeros = torch.zeros(out.shape, device=out.device, dtype=dtype)
        masks[window] = zeros.masked_fill_(out, float("-inf"))[:, None, None]
    return masks


def attention_masks(
    windows: Sequence[int | None], past: Sequence[KVCache], positions: Tensor, dtype: torch.dtype
) -> Masks:
    """Masks of tokens at `positions` ([T] or [B, T]) after this past: causal, each row up to its own length."""
    t, device = positions.shape[-1], positions.device
    if t == 1 and set(windows) <= {None} and all(segment.lengths is None for segment in past):
        return {None: None}
    own, start = positions.view(-1, t), torch.zeros(1, 1, dtype=torch.long, device=device)
    keys, hidden = [own], [causal_hidden(t, device)]
    for n, segment in enumerate(past):
        slots = torch.arange(segment.size, device=device)[None]
        keys.insert(n, start + slots)
        hidden.insert(n, (slots >= segment.offset)[:, None])
        start = start + segment.offset
    rows = max(part.shape[0] for part in (*keys, *hidden))
    joined = torch.cat([part.expand(rows, t, -1) for part in hidden], dim=-1)
    return additive_masks(windows, joined, (own, torch.cat([part.expand(rows, -1) for part in keys], dim=-1)), dtype)


class Attention(HasFusedOps):
    """Causal self-attention with K key/value heads for H query heads (K = H: multi-head; K < H: grouped-query)."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        d, hd, self.layer = config.hidden_size, config.head_dim, layer
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, hd
        self.q = Linear(d, config.num_heads * hd, bias=config.qkv_bias)
        self.k = Linear(d, config.num_kv_heads * hd, bias=config.qkv_bias)
        self.v = Linear(d, config.num_kv_heads * hd, bias=config.qkv_bias)
        self.o = Linear(config.num_heads * hd, d, bias=config.out_bias)
        sizes = map(config.norm_sizes(layer).get, ("attn.q_norm", "attn.k_norm"))
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if layer.attention_sinks else None
        self.q_norm, self.k_norm = (make_norm(config, layer, size) if size else None for size in sizes)
        self.drop = Dropout()

    @property
    def cache_sizes(self) -> CacheSizes:
        """A key and a value for each key/value head."""
        return (self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim)

    def forward(self, x: Tensor, index: int, inputs: AttentionInputs) -> Tensor:
        """[B, T, d] or flat [N, d] -> the same; [B, M, d] where `inputs.positions` are selected."""
        if inputs.positions is None:
            q, k, v = apply_linears(x, self.q, self.k, self.v)
        else:
            (q,), (k, v) = apply_linears(inputs.select(x), self.q), apply_linears(x, self.k, self.v)
        q, k = self._heads(q, self.heads, self.q_norm), self._heads(k, self.kv_heads, self.k_norm)
        v = v.unflatten(-1, (self.kv_heads, self.head_dim))
        if self.layer.rope is not None:
            cos, sin = inputs.rotary_cos_sin[self.layer.rope]
            options = (self.fused, self.active_kernels)
            q = apply_rotary_emb(q, inputs.gather_rope(cos), inputs.gather_rope(sin), *options)
            k = apply_rotary_emb(k, cos, sin, *options)
        past = [(segment.keys[index], segment.values[index]) for segment in inputs.past]
        if inputs.shared_prefix is not None:
            return self.o(self._attend_shared_prefix(q, (k, v), past, inputs).flatten(-2))
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        mask, packed = inputs.masks[self.layer.window], isinstance(inputs.layout, PackedRows)
        plain = self.layer.attention_softcap is None and self.sinks is None and not past and inputs.positions is None
        known = packed or (self.layer.window is None and inputs.layout is None)
        if plain and known and q.shape[1] >= FUSED_FROM:
            y = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                k,
                v,
                attn_mask=mask.squeeze(2) if packed and mask is not None else None,
                dropout_p=self.drop.p if self.training else 0.0,
                is_causal=not packed,
                scale=self.layer.attention_scale,
                enable_gqa=self.kv_heads < self.heads,
            ).transpose(1, 2)
        else:
            y = scaled_dot_product(q, [*past, (k, v)], mask, *self._settings)
        if inputs.cache is not None:
            inputs.cache.update(index, k, v)
        return self.o(y.flatten(-2))

    @property
    def _settings(self) -> tuple[LayerConfig, Dropout, Tensor | None]:
        return self.layer, self.drop, self.sinks

    def _heads(self, x: Tensor, heads: int, norm: torch.nn.Module | None) -> Tensor:
        """[..., heads D] -> [..., heads, D], normalised where the layer does so."""
        if norm is not None and self.layer.qk_norm == "all":
            x = norm(x)
        x = x.unflatten(-1, (heads, self.head_dim))
        return norm(x) if norm is not None and self.layer.qk_norm == "head" else x

    def _attend_shared_prefix(self, q: Tensor, new: KeyValue, past: list[KeyValue], inputs: AttentionInputs) -> Tensor:
        """The prefix over itself, each row over prefix and itself: q [N, H, D], k and v [N, K, D] -> [N, H, D].

        The past precedes both. Where only some positions are needed, q is [B, M, H, D] and so is the result.
        """
        prefix, window = inputs.shared_prefix, self.layer.window
        assert prefix is not None
        (k1, k2), (v1, v2) = (prefix.split(x) for x in new)
        first, own = (k1.transpose(1, 2), v1.transpose(1, 2)), (k2.transpose(1, 2), v2.transpose(1, 2))
        if inputs.positions is not None:
            return scaled_dot_product(q, [*past, first, own], inputs.masks[window], *self._settings)
        q1, q2 = prefix.split(q)
        y1 = scaled_dot_product(q1, [*past, first], prefix.masks[window], *self._settings)
        y2 = scaled_dot_product(q2, [*past, first, own], inputs.masks[window], *self._settings)
        return torch.cat([y1.flatten(0, 1), y2.flatten(0, 1)])


def scaled_dot_product(
    q: Tensor,
    parts: list[KeyValue],
    mask: Tensor | None,
    layer: LayerConfig,
    drop: Dropout,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of q [B, T, H, D] over parts of keys and values, each [1|B, K, S, D]; returns [B, T, H, D].

    One product of scores per part, one softmax over all, one product of values per part. With gradient the parts
    are concatenated first, since one large product is then faster than several small ones; without, a part that all
    rows share is read in place. `sinks` [H] are scores of each head that take a share of the softmax and no value.
    """
    b, t, heads, d = q.shape
    kv, scale, cap = parts[0][0].shape[1], layer.attention_scale, layer.attention_softcap
    q = (q * (d**-0.5 if scale is None else scale)).view(b, t, kv, heads // kv, d)
    if torch.is_grad_enabled() and len(parts) > 1:
        parts = [(_join([k for k, _ in parts], b), _join([v for _, v in parts], b))]
    scores = torch.cat([_scores(q, k) for k, _ in parts], dim=-1)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, kv, heads // kv, 1, 1).expand(*scores.shape[:-1], 1)
        p = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    else:
        p = torch.softmax(scores, dim=-1)
    weights = drop(p).split([k.shape[2] for k, _ in parts], dim=-1)
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
