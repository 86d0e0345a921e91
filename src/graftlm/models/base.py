"""What all families have in common: the walk through the blocks, the tied head.

    ids [B, T] -> embedding -> blocks -> norm -> hidden [B, T, d] -> (only where asked for) head -> logits

What is unusual here: logits are made only at the positions a caller names, because with a vocabulary of 50,000 the
head costs as much as a dozen layers; and every linear has a role (q, k, v, o, up, gate, down) that `--targets` names.

Letters: B rows, T tokens, d model width, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graftlm.models.attention import AttentionInputs, KVCache, PairedRow, SharedPrefix, attention_mask, causal_mask
from graftlm.models.config import ModelConfig
from graftlm.models.fused_ops import FusedLinearCrossEntropy, FusedLinearLogProbs, ReferenceKernels
from graftlm.models.layers import Dropout, Embedding, HasFusedOps, Linear


class PrefixModule(nn.Module):
    """What a method lets stand before all that a model reads: learned keys and values (`methods/prefix.py`)."""

    size = 0
    """How many positions it takes."""

    def segment(self, dtype: torch.dtype) -> KVCache:
        """The past that it is, shared by all rows, in this dtype."""
        raise NotImplementedError


class CausalLM(HasFusedOps):
    """A decoder-only language model; `gpt2.GPT2`, `llama.Llama` and `neox.NeoX` fill in the parts."""

    def __init__(self, config: ModelConfig, blocks: Sequence[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.drop = Dropout()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.head = None if config.tie_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        self.compute_dtype: torch.dtype | None = None
        self.before: PrefixModule | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic: what the base was loaded in, also where trained weights are float32."""
        return self.compute_dtype or self.embed.weight.dtype

    @property
    def max_seq_len(self) -> int:
        """The most tokens that it reads: its context less what stands before every text."""
        return self.config.max_positions - self._num_prefix_tokens

    def set_dropout(self, p: float) -> None:
        """Dropout on embeddings, attention probabilities and residual branches (a method's own is left alone)."""
        for name, module in self.named_modules():
            if type(module) is Dropout and not name.endswith("lora_drop"):
                module.p = p

    def use_fused_ops(self, fused: bool) -> None:
        """Whether modules use gradients written out by hand, or autograd's own; the same numbers but for rounding."""
        for module in self.modules():
            if isinstance(module, HasFusedOps):
                vars(module)["fused"] = fused

    def set_kernels(self, kernels: ReferenceKernels) -> None:
        """With what modules whose gradients are written out by hand compute while they train."""
        for module in self.modules():
            if isinstance(module, HasFusedOps):
                vars(module)["kernels"] = kernels

    def add_positions(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add learned positions to the embedded tokens, where a family has them."""
        return x

    def rotary_cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine of the positions, where a family rotates."""
        return None

    def hidden_states(
        self, ids: Tensor, past: Sequence[KVCache] = (), keep: KVCache | None = None, at: Tensor | None = None
    ) -> Tensor:
        """[B, T] ids behind `past` -> [B, T, d] after the last norm; the new keys and values go to `keep`.

        With `at` [B, M], positions in each row: [B, M, d], the same as all of them indexed with `at`; in the last layer
        all that follows keys and values is then computed there only.
        """
        t, past = ids.shape[1], (*self._prefix_kv(), *past)
        positions = torch.arange(t, device=ids.device)
        for segment in past:
            start = segment.offset
            positions = positions + (start if isinstance(start, int) else start[:, None])
        context = AttentionInputs(
            past, keep, self.rotary_cos_sin(positions), attention_mask(past, t, ids.device, self.dtype)
        )
        return self.norm(self._run_blocks(self._embed(ids, positions), context, at))

    def forward_shared_prefix(
        self,
        lead: Tensor,
        ids: Tensor,
        at: Tensor | None = None,
        below: tuple[int, Tensor] | None = None,
        fork: PairedRow | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """[1, P] ids that stand before every row of [B, T] ids -> [P, d] and [B, T, d] after the last norm.

        The same as a pass over `lead` kept in a Segment and one over `ids` behind it, but side by side in one flat
        [P + B T, d], so that each layer's products are one, and large: half the calls, no thin matrices.

        With `at` [B, M]: None and [B, M, d], as in `hidden`. With `below` = (L, x): the first L blocks are not run, x
        is what `lower(lead, ids, L)` gives. With `fork` the rows hold two answers each.
        """
        (p, (b, t)) = (lead.shape[1], ids.shape)
        context = self._forward_with_shared_prefix(lead, ids, fork)
        first, x = below if below is not None else (0, self.forward_lower_layers(lead, ids, 0, fork))
        if p == 0:
            x = x.unflatten(0, (b, t))
        x = self.norm(self._run_blocks(x, context, at, first))
        if p == 0 or at is not None:
            return None, x
        own, rest = x.split([p, b * t])
        return own, rest.unflatten(0, (b, t))

    def forward_lower_layers(self, lead: Tensor, ids: Tensor, layers: int, fork: PairedRow | None = None) -> Tensor:
        """[1, P] and [B, T] ids -> what enters block `layers`: [P + B T, d], the lead first, P may be 0."""
        (p, (b, t)), device = (lead.shape[1], ids.shape), ids.device
        positions = _positions(p, b, t, device, fork) + self._num_prefix_tokens
        x = self._embed(torch.cat([lead.flatten(), ids.flatten()]), positions)
        if layers:
            context = self._forward_with_shared_prefix(lead, ids, fork)
            x = self._run_blocks(x if p else x.unflatten(0, (b, t)), context, None, 0, layers)
        return x if x.dim() == 2 else x.flatten(0, 1)

    def _forward_with_shared_prefix(self, lead: Tensor, ids: Tensor, fork: PairedRow | None) -> AttentionInputs:
        """The context of a flat [P + B T, d], or of [B, T, d] where P is 0."""
        (p, (b, t)), device = (lead.shape[1], ids.shape), ids.device
        past, n = self._prefix_kv(), self._num_prefix_tokens
        own = causal_mask(t, device, self.dtype) if fork is None else fork.bias(t, self.dtype)
        bias = F.pad(own, (n + p, 0))
        if p == 0:
            at = torch.arange(t, device=device) if fork is None else fork.positions(t)
            return AttentionInputs(
                past, rotary_cos_sin=self.rotary_cos_sin(at + n), attn_mask=bias, causal=fork is None
            )
        parts = SharedPrefix(p, b, t, F.pad(causal_mask(p, device, self.dtype), (n, 0)))
        return AttentionInputs(
            past,
            rotary_cos_sin=self.rotary_cos_sin(_positions(p, b, t, device, fork) + n),
            attn_mask=bias,
            shared_prefix=parts,
        )

    def _prefix_kv(self) -> tuple[KVCache, ...]:
        return () if self.before is None else (self.before.segment(self.dtype),)

    @property
    def _num_prefix_tokens(self) -> int:
        return 0 if self.before is None else self.before.size

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.drop(self.add_positions(self.embed.embed_in_dtype(ids, self.dtype), positions))

    def _run_blocks(
        self, x: Tensor, context: AttentionInputs, at: Tensor | None, first: int = 0, end: int | None = None
    ) -> Tensor:
        """Through the blocks first … end - 1; in the model's last one, what follows keys and values at `at` only."""
        end = len(self.blocks) if end is None else end
        for layer in range(first, end):
            if at is not None and layer == len(self.blocks) - 1:
                context = context.restrict_to(at)
            x = self.blocks[layer](x, layer, context)
        return x

    def logits(self, h: Tensor) -> Tensor:
        """[..., d] -> [..., V] in float32 (float64 stays float64)."""
        weight = self.embed.weight if self.head is None else self.head.weight
        return F.linear(h, weight.to(h.dtype)).to(torch.promote_types(h.dtype, torch.float32))

    def loss(self, h: Tensor, rows: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """The sum of weights[k] * -log p(targets[k] | h[rows[k]]): h [N, d], the rest [K]; float32 or wider."""
        if self.fused:
            head = self.embed.weight if self.head is None else self.head.weight
            return FusedLinearCrossEntropy.apply(h, head, rows, targets, weights)
        log_p = self.logits(h).log_softmax(-1)
        return -(log_p[rows, targets] * weights.to(log_p.dtype)).sum()

    def log_probs(self, h: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """log p(targets[k] | h[rows[k]]): h [N, d], the rest [K] -> [K], float32 or wider."""
        if self.fused:
            head = self.embed.weight if self.head is None else self.head.weight
            return FusedLinearLogProbs.apply(h, head, rows, targets)
        return self.logits(h).log_softmax(-1)[rows, targets]

    def forward(
        self,
        ids: Tensor,
        past: Sequence[KVCache] = (),
        keep: KVCache | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V], or [N, V] at the flat positions `at` [N] (row * T + token)."""
        if at is None:
            return self.logits(self.hidden_states(ids, past, keep))
        where, pick = flat_to_padded(at, *ids.shape)
        return self.logits(self.hidden_states(ids, past, keep, where).flatten(0, 1)[pick])


def flat_to_padded(at: Tensor, b: int, t: int) -> tuple[Tensor, Tensor]:
    """Flat positions [N] in [B, T] -> (the same row by row [B, M], where each of the N is in that, flat [N]).

    M is the most that one row has; rows with fewer are filled up with their position 0.
    """
    rows = at // t
    counts = torch.bincount(rows, minlength=b)
    order = rows.argsort(stable=True)
    slots = torch.empty_like(at)
    slots[order] = torch.arange(len(at), device=at.device) - (counts.cumsum(0) - counts)[rows[order]]
    m = int(counts.max())
    where = torch.zeros(b, m, dtype=torch.long, device=at.device)
    where[rows, slots] = at % t
    return where, rows * m + slots


def _positions(p: int, b: int, t: int, device: torch.device, fork: PairedRow | None = None) -> Tensor:
    """0 … P-1 and then P … P+T-1 for each of B rows, or as they fork: [P + B T]."""
    own = torch.arange(t, device=device).repeat(b) if fork is None else fork.positions(t).flatten()
    return torch.cat([torch.arange(p, device=device), p + own])
