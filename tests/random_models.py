"""Models with random weights."""

import torch

from graftlm.models import CausalLM, ModelConfig


def random_model(config: ModelConfig, seed: int = 0, std: float = 0.02, dtype: torch.dtype = torch.float32) -> CausalLM:
    """Matrices normal(0, std), norms near one, biases small."""
    rng = torch.Generator().manual_seed(seed)
    model = CausalLM(config).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            is_gain = "norm" in name and name.endswith("weight")
            p.copy_(1 + 0.1 * draw if is_gain else std * draw)
    return model.eval()
