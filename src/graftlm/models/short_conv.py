"""A short convolution in place of attention, with the interface of `Attention` (LFM2, Amini et al. 2025).

    [b, c, x] = W_in h        y = W_out (c * conv(b * x))

conv is causal over the last L tokens, each channel on its own. What later tokens need is b * x of the L - 1 tokens
before them. A `KVCache` holds b * x of all tokens, as keys [B, 1, S, d] next to values of width 0: so a row may go back
to any length, and rows and caches are joined and selected as those of attention are.

Letters: as in `layers.py`; L tokens that a convolution reads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.layers import AttentionInputs, CacheSizes, Linear
from graftlm.models.row_layout import RowLayout

PastInputs = tuple[Tensor, Tensor | None]
"""Inputs of the convolution [1|B, S, d], and how many of them each row has, [B]; None: all."""


class ShortConv(nn.Module):
    """A gated causal convolution of each channel over the last L tokens."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        assert layer.conv_length is not None
        d, self.length = config.hidden_size, layer.conv_length
        self.conv_in = Linear(d, 3 * d, bias=False)
        self.conv = nn.Conv1d(d, d, self.length, groups=d, bias=False)  # holds the weight [d, 1, L]
        self.conv_out = Linear(d, d, bias=False)

    @property
    def cache_sizes(self) -> CacheSizes:
        """An input, and nothing."""
        return (1, self.conv_in.in_features), (1, 0)

    def forward(self, x: Tensor, index: int, inputs: AttentionInputs) -> Tensor:
        """[B, T, d] or flat [N, d] -> the same; [B, M, d] where `inputs.positions` are selected."""
        b, c, h = self.conv_in(x).chunk(3, dim=-1)
        h, past = b * h, [(segment.keys[index][:, 0], segment.lengths) for segment in inputs.past]
        if inputs.shared_prefix is None:
            y = self._convolve(h, past, inputs.layout)
        else:
            first, own = inputs.shared_prefix.split(h)
            parts = self._convolve(first, past), self._convolve(own, [*past, (first, None)], inputs.layout)
            y = torch.cat([part.flatten(0, 1) for part in parts])
        if inputs.cache is not None:
            inputs.cache.update(index, h[:, None], h[:, None, :, :0])
        return self.conv_out(inputs.select(c * y))

    def _convolve(self, h: Tensor, past: Sequence[PastInputs], layout: RowLayout | None = None) -> Tensor:
        """The sum of each of the last L inputs times its weight, after this past: [B, T, d] -> the same.

        A sum of products rather than torch's convolution: to the bit the same however rows are batched.
        """
        (n, t, _), before = h.shape, self.length - 1
        weights = self.conv.weight[:, 0].to(h.dtype).unbind(-1)
        joined = torch.cat([last_inputs(past, h, before), h], dim=1)
        y = weights[-1] * h
        for back in range(1, self.length):
            if layout is None:
                earlier = joined[:, before - back : before - back + t]
            else:
                rows = torch.arange(n, device=h.device)[:, None]
                earlier = joined[rows, before + layout.earlier(t, back)]
            y = y + weights[before - back] * earlier
        return y


def last_inputs(past: Sequence[PastInputs], like: Tensor, count: int) -> Tensor:
    """The last `count` inputs of each row's past, zeros where it is shorter: [B, count, d] for `like` [B, T, d]."""
    rows, slots = torch.arange(len(like), device=like.device)[:, None], torch.arange(count, device=like.device)
    found = like.new_zeros(len(like), count, like.shape[2])
    for tokens, lengths in past:
        if lengths is None:
            own = tokens[:, -count:].expand(len(like), -1, -1)
            found = torch.cat([found, own], dim=1)[:, -count:]
        else:
            at = lengths[:, None] - count + slots  # in the segment; negative in what was found before
            own, older = tokens[rows, at.clamp(min=0)], found[rows, (at + count).clamp(max=count - 1)]
            found = torch.where((at >= 0)[..., None], own, older)
    return found
