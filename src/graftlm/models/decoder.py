"""The decoder block: attention (or a short convolution) and MLP with residual connections, as `LayerConfig` says.

    pre    x + attention(norm1(x)), then x + mlp(norm2(x))                (GPT-2, Llama)
    post   x + post_norm1(attention(x)), then x + post_norm2(mlp(x))      (OLMo 2)
    both   norms on either side of each                                   (Gemma 2 and 3)
    parallel   x + attention(norm1(x)) + mlp(norm2(x))                    (GPT-NeoX; with one norm: GPT-J, Cohere 2)

Letters: B rows, T tokens, N = B T, d hidden size.
"""

from torch import Tensor, nn

from graftlm.models.config import LayerConfig, ModelConfig
from graftlm.models.layers import Attention, AttentionInputs, Dropout, make_norm
from graftlm.models.mlp import MLP, MixtureOfExperts
from graftlm.models.short_conv import ShortConv


class DecoderBlock(nn.Module):
    """One decoder layer."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()

        def norm(placement: str) -> nn.Module:
            used = layer.norm_placement in (placement, "both")
            return make_norm(config, layer, config.hidden_size) if used else nn.Identity()

        self.norm1 = norm("pre")
        self.attn = Attention(config, layer) if layer.conv_length is None else ShortConv(config, layer)
        self.post_norm1 = norm("post")
        self.norm2 = None if layer.single_norm else norm("pre")
        self.mlp = MLP(config, layer) if layer.experts is None else MixtureOfExperts(config, layer, layer.experts)
        self.post_norm2 = norm("post")
        self.drop = Dropout()
        self.parallel, self.residual_multiplier = layer.parallel, layer.residual_multiplier

    def forward(self, x: Tensor, index: int, inputs: AttentionInputs) -> Tensor:
        """[B, T, d] or flat [N, d] -> the same; [B, M, d] in the layer where `inputs.positions` are selected.

        `index` is the layer's number in the key/value caches.
        """
        selected, normed = inputs.select(x), self.norm1(x)
        y = selected + self._branch(self.post_norm1(self.attn(normed, index, inputs)))
        own = inputs.select(normed) if self.norm2 is None else self.norm2(selected if self.parallel else y)
        return y + self._branch(self.post_norm2(self.mlp(own)))

    def _branch(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        return x if self.residual_multiplier == 1 else x * self.residual_multiplier
