"""Configurations of the models that have a short name, so that their costs can be computed without their files.

The tests compare them with the models' own config.json.
"""

from graftlm.models.config import LayerConfig, ModelConfig, RopeConfig


def _gpt2(layers: int, heads: int, d: int) -> ModelConfig:
    return ModelConfig(
        family="gpt2",
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        hidden_size=d,
        head_dim=d // heads,
        intermediate_size=4 * d,
        vocab_size=50257,
        max_positions=1024,
        norm_eps=1e-5,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
    )


def _llama_2(layers: int, heads: int, kv_heads: int, d: int, intermediate: int) -> ModelConfig:
    return ModelConfig(
        family="llama",
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        hidden_size=d,
        head_dim=d // heads,
        intermediate_size=intermediate,
        vocab_size=32000,
        max_positions=4096,
        norm_eps=1e-5,
        tie_embeddings=False,
    )


SHAPES = {
    "smollm2-135m": ModelConfig(
        family="llama",
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        hidden_size=576,
        head_dim=64,
        intermediate_size=1536,
        vocab_size=49152,
        max_positions=8192,
        norm_eps=1e-5,
        layers=(LayerConfig(rope=RopeConfig(theta=100000.0)),),
    ),
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    "distilgpt2": _gpt2(6, 12, 768),
    "meta-llama/Llama-2-7b-hf": _llama_2(32, 32, 32, 4096, 11008),
    "meta-llama/Llama-2-70b-hf": _llama_2(80, 64, 8, 8192, 28672),
}
