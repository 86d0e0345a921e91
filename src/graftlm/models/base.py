"""The language model: embedding, decoder blocks, last norm, head.

    ids [B, T] -> embedding -> blocks -> norm -> hidden states [B, T, d] -> (only where needed) head -> logits [B, T, V]

Logits are computed only at the positions a caller names: with a vocabulary of 50,000 the head costs as much as a dozen
layers. Every linear of a block has a role (q, k, v, o, up, gate, down, …), which `--targets` names.

Letters: B rows, T tokens, P tokens of a shared prefix, d hidden size, V vocabulary size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.models import layers
from graftlm.models.config import ModelConfig
from graftlm.models.decoder import DecoderBlock
from graftlm.models.fused_ops import FusedLinearCrossEntropy, FusedLinearLogProbs, ReferenceKernels
from graftlm.models.layers import AttentionInputs, Dropout, Embedding, HasFusedOps, KVCache, Linear
from graftlm.models.packed import HasWeight, Weight, linear
from graftlm.models.rope import RopeConfig, rope_cos_sin
from graftlm.models.row_layout import RowLayout
from graftlm.models.short_conv import ShortConv


class PrefixModule(nn.Module):
    """Learned keys and values prepended to every sequence (`methods/prefix.py`)."""

    size = 0
    """How many positions it takes."""

    def segment(self, dtype: torch.dtype) -> KVCache:
        """Its keys and values, shared by all rows, in this dtype."""
        raise NotImplementedError


class CausalLM(HasFusedOps):
    """A decoder-only language model, as its configuration says."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d, settings = config.hidden_size, [config.layer(i) for i in range(config.num_layers)]
        self.embed = Embedding(config.vocab_size, d)
        self.drop = Dropout()
        self.blocks = nn.ModuleList([DecoderBlock(config, layer) for layer in settings])
        self.norm = layers.make_norm(config, settings[-1], d)
        self.head = None if config.tie_embeddings else Linear(d, config.vocab_size, bias=config.head_bias)
        self.positions = Embedding(config.position_rows, d) if config.learned_positions else None
        self.compute_dtype: torch.dtype | None = None
        self._windows = tuple(dict.fromkeys(layer.window for layer in settings))
        self.rope_configs = tuple(dict.fromkeys(layer.rope for layer in settings if layer.rope is not None))

    @property
    def prefix(self) -> PrefixModule | None:
        """Learned keys and values before every sequence. In checkpoints and adapters its tensors are `before.*`."""
        prefix = self._modules.get("before")
        assert prefix is None or isinstance(prefix, PrefixModule)
        return prefix

    def set_prefix(self, prefix: PrefixModule | None) -> None:
        """Prepend this prefix to every sequence."""
        self.add_module("before", prefix)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.stored_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations: the one the base was loaded in, also where trained weights are float32."""
        return self.compute_dtype or self.embed.stored_weight.dtype

    @property
    def max_seq_len(self) -> int:
        """The longest sequence it reads: its context length less the learned prefix."""
        return self.config.max_positions - self._num_prefix_tokens

    def set_dropout(self, p: float) -> None:
        """Dropout on embeddings, attention probabilities and residual branches, not on a method's own modules."""
        for name, module in self.named_modules():
            if type(module) is Dropout and not name.endswith("lora_drop"):
                module.p = p

    def use_fused_ops(self, fused: bool) -> None:
        """Use fused operations, or plain ones with autograd's gradients; the results are equal up to rounding."""
        for module in self.modules():
            if isinstance(module, HasFusedOps):
                vars(module)["fused"] = fused

    def set_kernels(self, kernels: ReferenceKernels) -> None:
        """The kernels of fused operations in training."""
        for module in self.modules():
            if isinstance(module, HasFusedOps):
                vars(module)["kernels"] = kernels

    def empty_cache(self, rows: int, capacity: int) -> KVCache:
        """A key/value cache of `rows` rows, for `capacity` tokens each."""
        like = torch.empty(0, device=self.device, dtype=self.dtype)
        mixers = (m for m in self.blocks.modules() if isinstance(m, layers.Attention | ShortConv))
        return KVCache.empty([mixer.cache_sizes for mixer in mixers], rows, capacity, like)

    def hidden_states(
        self, ids: Tensor, past: Sequence[KVCache] = (), cache: KVCache | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """[B, T] ids after `past` -> [B, T, d] after the last norm; new keys and values are added to `cache`.

        With `positions` [B, M] of each row: [B, M, d], equal to indexing the result with them; in the last layer,
        everything after keys and values is then computed there only.
        """
        past = (*self.learned_prefix, *past)
        at = torch.arange(ids.shape[1], device=ids.device)
        for segment in past:
            at = at + segment.offset
        masks = layers.attention_masks(self._windows, past, at, self.dtype)
        inputs = AttentionInputs(past, cache, self.rotary_cos_sin(at), masks)
        return self.norm(self._run_blocks(self.embed_tokens(ids, at), inputs, positions))

    def forward_shared_prefix(
        self,
        prefix: Tensor,
        ids: Tensor,
        positions: Tensor | None = None,
        cached_hidden: tuple[int, Tensor] | None = None,
        layout: RowLayout | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """[1, P] ids that precede every row of [B, T] ids -> [P, d] and [B, T, d] after the last norm.

        Equal to `hidden_states` of the prefix with a `KVCache`, then of the rows after it, but in one flat
        [P + B T, d]: each layer's matrix products are one large product instead of two.

        With `positions` [B, M]: None and [B, M, d], as in `hidden_states`. With `cached_hidden` = (L, x): the first L
        layers are skipped and x is the result of `forward_lower_layers(prefix, ids, L)`. With `layout`, rows hold
        several texts, each of which the prefix precedes.
        """
        (p, (b, t)) = (prefix.shape[1], ids.shape)
        inputs = self._shared_prefix_inputs(prefix, ids, layout)
        first, x = cached_hidden or (0, self.forward_lower_layers(prefix, ids, 0, layout))
        if p == 0:
            x = x.unflatten(0, (b, t))
        x = self.norm(self._run_blocks(x, inputs, positions, first))
        if p == 0 or positions is not None:
            return None, x
        own, rows = x.split([p, b * t])
        return own, rows.unflatten(0, (b, t))

    def forward_lower_layers(self, prefix: Tensor, ids: Tensor, end: int, layout: RowLayout | None = None) -> Tensor:
        """[1, P] and [B, T] ids -> the input of block `end`: [P + B T, d], the prefix first; P may be 0."""
        p, (b, t) = prefix.shape[1], ids.shape
        positions = _positions(p, b, t, ids.device, layout) + self._num_prefix_tokens
        x = self.embed_tokens(torch.cat([prefix.flatten(), ids.flatten()]), positions)
        if end:
            inputs = self._shared_prefix_inputs(prefix, ids, layout)
            x = self._run_blocks(x if p else x.unflatten(0, (b, t)), inputs, None, 0, end)
        return x if x.dim() == 2 else x.flatten(0, 1)

    def _shared_prefix_inputs(self, prefix: Tensor, ids: Tensor, layout: RowLayout | None) -> AttentionInputs:
        """The inputs of a flat [P + B T, d], or of [B, T, d] if P is 0."""
        (p, (b, t)), device = (prefix.shape[1], ids.shape), ids.device
        n = self._num_prefix_tokens
        at = torch.arange(t, device=device) if layout is None else layout.positions(t)
        hidden = layers.causal_hidden(t, device) if layout is None else layout.hidden(t)
        positions, shared = at + n, None
        if p:
            first = torch.arange(p, device=device) + n
            shared = layers.SharedPrefix(p, b, t, self._masks(layers.causal_hidden(p, device), n, first))
            positions = _positions(p, b, t, device, layout) + n
        return AttentionInputs(
            self.learned_prefix,
            rotary_cos_sin=self.rotary_cos_sin(positions),
            masks=self._masks(hidden, n + p, at + n + p),
            layout=layout,
            shared_prefix=shared,
        )

    def _masks(self, hidden: Tensor, before: int, positions: Tensor) -> layers.Masks:
        """Masks of tokens at these positions, over `before` tokens that all see and themselves ([1|B, T, T] bool)."""
        own = positions.view(-1, positions.shape[-1])
        keys = torch.cat([torch.arange(before, device=own.device).expand(len(own), -1), own], dim=-1)
        return layers.additive_masks(self._windows, F.pad(hidden, (before, 0)), (own, keys), self.dtype)

    def rotary_cos_sin(self, positions: Tensor) -> dict[RopeConfig, tuple[Tensor, Tensor]]:
        """Cosine and sine of positions, of each kind of rotation that layers use."""
        return {rope: rope_cos_sin(positions, self.config.head_dim, rope, self.dtype) for rope in self.rope_configs}

    @property
    def learned_prefix(self) -> tuple[KVCache, ...]:
        """The keys and values of the learned prefix, if there is one."""
        return () if self.prefix is None else (self.prefix.segment(self.dtype),)

    @property
    def _num_prefix_tokens(self) -> int:
        return 0 if self.prefix is None else self.prefix.size

    def embed_tokens(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The first block's input: [...] ids at these positions -> [..., d]."""
        x = self.embed.embed_in_dtype(ids, self.dtype)
        if self.config.embedding_multiplier != 1:
            x = x * torch.tensor(self.config.embedding_multiplier, dtype=x.dtype, device=x.device)
        if self.positions is not None:
            x = x + self.positions.embed_in_dtype(positions + self.config.position_offset, x.dtype)
        return self.drop(x)

    def _run_blocks(
        self, x: Tensor, inputs: AttentionInputs, positions: Tensor | None, first: int = 0, end: int | None = None
    ) -> Tensor:
        """Blocks first … end - 1; in the model's last one, what follows keys and values at `positions` only."""
        end = len(self.blocks) if end is None else end
        for index in range(first, end):
            if positions is not None and index == len(self.blocks) - 1:
                inputs = inputs.restrict_to(positions)
            x = self.blocks[index](x, index, inputs)
        return x

    @property
    def _head_weight(self) -> Weight:
        return (self.embed if self.head is None else self.head).stored_weight

    @property
    def _plain_head(self) -> bool:
        """Whether logits are a product with the head's matrix and no more, as the fused losses compute them."""
        return self.config.logits_softcap is None and not self.config.head_bias

    def logits(self, h: Tensor) -> Tensor:
        """[..., d] -> [..., V] in float32 (float64 stays float64)."""
        h, cap = self._scaled(h), self.config.logits_softcap
        bias = None if self.head is None or self.head.bias is None else self.head.bias.to(h.dtype)
        logits = linear(h, self._head_weight, bias).to(torch.promote_types(h.dtype, torch.float32))
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _scaled(self, h: Tensor) -> Tensor:
        return h if self.config.logits_multiplier == 1 else h * self.config.logits_multiplier

    def loss(self, h: Tensor, rows: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """The sum of weights[k] * -log p(targets[k] | h[rows[k]]): h [N, d], the rest [K]; float32 or wider."""
        if self.fused and self._plain_head:
            return FusedLinearCrossEntropy.apply(self._scaled(h), self._head_weight, rows, targets, weights)
        log_p = self.logits(h).log_softmax(-1)
        return -(log_p[rows, targets] * weights.to(log_p.dtype)).sum()

    def log_probs(self, h: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """log p(targets[k] | h[rows[k]]): h [N, d], the rest [K] -> [K], float32 or wider."""
        if self.fused and self._plain_head:
            return FusedLinearLogProbs.apply(self._scaled(h), self._head_weight, rows, targets)
        return self.logits(h).log_softmax(-1)[rows, targets]

    def forward(
        self, ids: Tensor, past: Sequence[KVCache] = (), cache: KVCache | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Logits [B, T, V], or [N, V] at flat positions [N] (row * T + token)."""
        if positions is None:
            return self.logits(self.hidden_states(ids, past, cache))
        padded, index = flat_to_padded(positions, *ids.shape)
        return self.logits(self.hidden_states(ids, past, cache, padded).flatten(0, 1)[index])


def clone_with_shared_weights(base: CausalLM) -> CausalLM:
    """New modules around the same tensors as `base`, frozen, in evaluation mode."""
    with torch.device("meta"):
        model = CausalLM(base.config)
    for name, p in base.named_parameters():
        module, attribute = name.rsplit(".", 1)
        setattr(model.get_submodule(module), attribute, nn.Parameter(p.data, requires_grad=False))
    for name, module in base.named_modules():
        if isinstance(module, HasWeight) and module.packed is not None:
            new = model.get_submodule(name)
            assert isinstance(new, HasWeight)
            new.set_weight(module.packed)
    return model.eval()


def flat_to_padded(flat: Tensor, b: int, t: int) -> tuple[Tensor, Tensor]:
    """Flat positions [N] in [B, T] -> (positions by row [B, M], index [N] of each in the flattened [B M]).

    M is the most that one row has; rows with fewer are padded with position 0.
    """
    rows = flat // t
    counts = torch.bincount(rows, minlength=b)
    order = rows.argsort(stable=True)
    slots = torch.empty_like(flat)
    slots[order] = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[rows[order]]
    m = int(counts.max())
    padded = torch.zeros(b, m, dtype=torch.long, device=flat.device)
    padded[rows, slots] = flat % t
    return padded, rows * m + slots


def _positions(p: int, b: int, t: int, device: torch.device, layout: RowLayout | None = None) -> Tensor:
    """0 … P-1, then P … P+T-1 for each of B rows (or as the layout has them): [P + B T]."""
    own = torch.arange(t, device=device).repeat(b) if layout is None else layout.positions(t).flatten()
    return torch.cat([torch.arange(p, device=device), p + own])
