"""Tiny models and folders for the tests that train: random weights, a byte-level tokenizer, reviews one can learn."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from graftlm.files.assets import cache_home
from graftlm.models import CausalLM, ModelConfig
from graftlm.models.config import FAMILIES as FAMILY_TABLE
from graftlm.models.config import RopeConfig, to_file


def fresh_home(folder: Path) -> str:
    """A GRAFT_HOME that is empty but for the compiled kernels: compiling them takes longer than most tests."""
    compiled = cache_home() / "compiled"
    compiled.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "compiled").exists():
        (folder / "compiled").symlink_to(compiled)
    return str(folder)


FAMILIES = ("gpt2", "llama", "llama-biased", "neox")


def shape_of(kind: str, vocab: int = 61, context: int = 96, layers: int = 2) -> ModelConfig:
    """GPT-2; Llama with grouped queries and tied head, or with biases on q, k, v and its own head (Qwen2); Pythia."""
    plain, biased = kind in ("gpt2", "neox"), kind == "llama-biased"
    sizes: dict[str, Any] = {
        "family": "llama" if kind == "llama-biased" else kind,
        "num_layers": layers,
        "num_heads": 4,
        "num_kv_heads": 4 if plain else 2,
        "hidden_size": 32,
        "head_dim": 8,
        "intermediate_size": 48,
        "vocab_size": vocab,
        "max_positions": context,
        "norm_eps": 1e-5,
        "tie_embeddings": not biased,
        "qkv_bias": plain or biased,
        "out_bias": plain,
        "mlp_bias": plain,
    }
    neox = (replace(FAMILY_TABLE["neox"].layer, rope=RopeConfig(dim=4)),)
    return ModelConfig(**sizes, layers=neox if kind == "neox" else ())


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


def model_of(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: int) -> CausalLM:
    return random_model(shape_of(kind, **sizes), seed=seed, std=0.2, dtype=dtype)


def config_json(shape: ModelConfig, kind: str) -> dict[str, Any]:
    """The config.json transformers and we read as this shape."""
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if shape.family == "gpt2":
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": shape.num_layers,
            "n_head": shape.num_heads,
            "n_embd": shape.hidden_size,
            "n_inner": shape.intermediate_size,
            "n_positions": shape.max_positions,
            "vocab_size": shape.vocab_size,
            "layer_norm_epsilon": shape.norm_eps,
            **ends,
        }
    rope = shape.layers[0].rope or RopeConfig()
    if shape.family == "neox":
        return {
            "model_type": "gpt_neox",
            "architectures": ["GPTNeoXForCausalLM"],
            "num_hidden_layers": shape.num_layers,
            "num_attention_heads": shape.num_heads,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "max_position_embeddings": shape.max_positions,
            "vocab_size": shape.vocab_size,
            "layer_norm_eps": shape.norm_eps,
            "hidden_act": "gelu",
            "rotary_pct": (rope.dim or shape.head_dim) / shape.head_dim,
            "rotary_emb_base": rope.theta,
            "use_parallel_residual": shape.layers[0].parallel,
            "tie_word_embeddings": shape.tie_embeddings,
            **ends,
        }
    return {
        "model_type": "qwen2" if kind == "llama-biased" else "llama",
        "architectures": ["Qwen2ForCausalLM" if kind == "llama-biased" else "LlamaForCausalLM"],
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_positions,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": rope.theta,
        "tie_word_embeddings": shape.tie_embeddings,
        **ends,
    }


def byte_tokenizer(folder: Path, *control: str) -> int:
    """Write a tokenizer.json whose tokens are bytes, <|endoftext|> first, `control` last; returns its size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet, *control])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|endoftext|>", *control)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return len(vocab)


def merging_tokenizer(folder: Path, *control: str) -> int:
    """The same with one merge, for llama.cpp reads no tokenizer without: `ab` takes the place of a rare byte."""
    size, path = byte_tokenizer(folder, *control), folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["ab"] = content["model"]["vocab"].pop("\u0143")
    path.write_text(json.dumps(content | {"model": content["model"] | {"merges": [["a", "b"]]}}))
    return size


WORD_MARK = "\u2581"
PIECES = ("legacy", "first", "always", "never")
"""How tokenizers of SentencePiece's kind write the space before a text: Llama 2's, Llama 2's with legacy off, T5's,
Gemma's."""


def piece_tokenizer(folder: Path, kind: str, texts: Sequence[str], *control: str, **settings: Any) -> int:
    """Write a tokenizer of SentencePiece's kind: byte pairs of `texts` without pre-tokenisation, and byte fallback."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special, fallback = ["<unk>", "<s>", "</s>", *control], [f"<0x{byte:02X}>" for byte in range(256)]
    learned = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learned.normalizer = normalizers.Replace(" ", WORD_MARK)
    learned.pre_tokenizer = pre_tokenizers.Split(WORD_MARK, "merged_with_next")
    alphabet = sorted({*"".join(texts)} - {" ", "\n"} | {WORD_MARK})
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=[*special, *fallback], initial_alphabet=alphabet, show_progress=False
    )
    learned.train_from_iterator(texts, trainer)
    made = Tokenizer.from_str(
        json.dumps(json.loads(learned.to_str()) | {"added_tokens": [], "pre_tokenizer": None, "normalizer": None})
    )
    made.add_special_tokens(special)
    space, parts = normalizers.Replace(" ", WORD_MARK), [decoders.Replace(WORD_MARK, " "), decoders.ByteFallback()]
    if kind == "legacy":
        made.normalizer = normalizers.Sequence([normalizers.Prepend(WORD_MARK), space])
    elif kind == "never":
        made.normalizer = space
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(WORD_MARK, prepend_scheme=kind, split=False)
    strip = [] if kind == "never" else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence([*parts, decoders.Fuse(), *strip])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, **settings}))
    return made.get_vocab_size()


def model_folder(
    folder: Path,
    kind: str = "llama",
    seed: int = 0,
    layers: int = 2,
    tokenizer: Callable[[Path], int] = byte_tokenizer,
) -> Path:
    """A Hugging Face folder with a tiny random model."""
    folder.mkdir(parents=True)
    vocab = tokenizer(folder)
    model = model_of(kind, seed, torch.float32, vocab=vocab, layers=layers)
    (folder / "config.json").write_text(json.dumps(config_json(model.config, kind)))
    tensors = to_file(model.config, dict(model.named_parameters()))
    save_file({n: t.detach().clone() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def chat_model_folder(folder: Path, template: str, tokenizer: Callable[[Path], int] = byte_tokenizer) -> Path:
    """The same with a chat template."""
    settings = model_folder(folder, tokenizer=tokenizer) / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": template}))
    return folder


def data_folder(folder: Path, train: int = 48, other: int = 12) -> Path:
    """Short reviews whose label can be learned, in three jsonl files."""
    folder.mkdir(parents=True)
    words = (("bad", "dull", "weak"), ("good", "fun", "fine"))
    for split, count, start in (("train", train, 0), ("validation", other, 1000), ("test", other, 2000)):
        rows = []
        for i in range(start, start + count):
            label = i % 2
            rows.append({"text": f"{words[label][i % 3]} {'x' * (i % 7)}{i}", "label": label})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


TEMPLATE = "Review: {text}\nIs it:"
