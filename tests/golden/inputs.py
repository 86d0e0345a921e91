"""Models and data for the recording: random weights in Hugging Face folders, slices of real reviews.

Nothing here imports graftlm: both checkouts read the same files.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FAMILIES = ("gpt2", "llama", "neox")
LAYERS, HEADS, KV_HEADS, D_MODEL, HEAD_DIM, D_FF, MAX_SEQ_LEN = 2, 4, 2, 32, 8, 48, 2048
SIZES = {"train": 64, "validation": 16, "test": 100}
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Shapes = dict[str, tuple[int, ...]]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# Models ---------------------------------------------------------------------------------------------------------------


def write_model(folder: Path, family: str, chat_template: str = "") -> Path:
    """A random model of a family with a tokenizer of bytes."""
    folder.mkdir(parents=True)
    vocab = _write_tokenizer(folder, chat_template)
    config, shapes = {"gpt2": _gpt2, "llama": _llama, "neox": _neox}[family](vocab)
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": 0, "eos_token_id": 0}))
    save_file(_random(shapes, FAMILIES.index(family)), folder / "model.safetensors", {"format": "pt"})
    return folder


def _random(shapes: Shapes, seed: int) -> dict[str, torch.Tensor]:
    """Normal with standard deviation 0.2; weights of norms are around 1."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=rng) * 0.2 for name, shape in shapes.items()}
    return {n: t + 1 if t.dim() == 1 and n.endswith("weight") else t for n, t in tensors.items()}


def _write_tokenizer(folder: Path, chat_template: str) -> int:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|endoftext|>"} | ({"chat_template": chat_template} if chat_template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocab)


def _with_biases(prefix: str, shapes: Shapes, outputs: int = 0) -> Shapes:
    """Weights and biases of linears and norms; `outputs`: the dimension of a weight that is its output."""
    found: Shapes = {}
    for name, shape in shapes.items():
        found[f"{prefix}{name}.weight"] = shape
        found[f"{prefix}{name}.bias"] = (shape[outputs if len(shape) == 2 else 0],)
    return found


def _gpt2(vocab: int) -> tuple[dict[str, Any], Shapes]:
    d = D_MODEL
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_embd": d,
        "n_inner": D_FF,
        "n_positions": MAX_SEQ_LEN,
        "vocab_size": vocab,
        "layer_norm_epsilon": 1e-5,
    }
    shapes: Shapes = {"transformer.wte.weight": (vocab, d), "transformer.wpe.weight": (MAX_SEQ_LEN, d)}
    block: Shapes = {"ln_1": (d,), "attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d)}
    block |= {"ln_2": (d,), "mlp.c_fc": (d, D_FF), "mlp.c_proj": (D_FF, d)}
    for i in range(LAYERS):
        shapes |= _with_biases(f"transformer.h.{i}.", block, outputs=1)
    return config, shapes | _with_biases("transformer.", {"ln_f": (d,)})


def _llama(vocab: int) -> tuple[dict[str, Any], Shapes]:
    d, kv = D_MODEL, KV_HEADS * HEAD_DIM
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_size": d,
        "intermediate_size": D_FF,
        "max_position_embeddings": MAX_SEQ_LEN,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, d), "model.norm.weight": (d,)}
    block: Shapes = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    block |= {"self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
    block |= {"self_attn.o_proj": (d, d), "mlp.gate_proj": (D_FF, d), "mlp.up_proj": (D_FF, d)}
    block |= {"mlp.down_proj": (d, D_FF)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    return config, shapes


def _neox(vocab: int) -> tuple[dict[str, Any], Shapes]:
    d = D_MODEL
    config = {
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_size": d,
        "intermediate_size": D_FF,
        "max_position_embeddings": MAX_SEQ_LEN,
        "vocab_size": vocab,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "rotary_pct": 0.5,
        "rotary_emb_base": 10000.0,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    }
    shapes: Shapes = {"gpt_neox.embed_in.weight": (vocab, d), "embed_out.weight": (vocab, d)}
    block: Shapes = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    block |= {"attention.query_key_value": (3 * d, d), "attention.dense": (d, d)}
    block |= {"mlp.dense_h_to_4h": (D_FF, d), "mlp.dense_4h_to_h": (d, D_FF)}
    for i in range(LAYERS):
        shapes |= _with_biases(f"gpt_neox.layers.{i}.", block)
    return config, shapes | _with_biases("gpt_neox.", {"final_layer_norm": (d,)})


def write_peft_adapter(folder: Path, base: Path, rank: int = 3) -> Path:
    """A LoRA adapter for the llama in `base`, in the files that PEFT writes."""
    folder.mkdir()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    shapes: Shapes = {}
    for i in range(LAYERS):
        for name, out in (("q_proj", D_MODEL), ("v_proj", KV_HEADS * HEAD_DIM)):
            prefix = f"base_model.model.model.layers.{i}.self_attn.{name}."
            shapes |= {f"{prefix}lora_A.weight": (rank, D_MODEL), f"{prefix}lora_B.weight": (out, rank)}
    save_file(_random(shapes, 7), folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


# Data -----------------------------------------------------------------------------------------------------------------


def write_data(folder: Path, reviews: Path) -> None:
    """Data sets from slices of the reviews in `reviews` (train.jsonl, validation.jsonl, test.jsonl).

    reviews/      text and label
    preferences/  prompt, chosen, rejected: first words of a review, last words of a positive and a negative one
    chats/        messages: two turns of a user and an assistant
    task.toml     a labelled task for `graft prompt`
    """
    for split, size in SIZES.items():
        lines = (reviews / f"{split}.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        every = [json.loads(line) for line in lines]
        by_label = [[row for row in every if row["label"] == label][: size // 2] for label in (0, 1)]
        rows = [row for both in zip(*by_label, strict=True) for row in both]
        made = {"reviews": rows, "preferences": _preferences(rows[:32]), "chats": _chats(rows[:32])}
        for name, own in made.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_lines(folder / name / f"{split}.jsonl", own)
        if split == "train":
            (folder / "task.toml").write_text(_task(rows))


def _preferences(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    words = [row["text"].split(" ") for row in rows]
    by_label = [[own for own, row in zip(words, rows, strict=True) if row["label"] == label] for label in (0, 1)]
    found = []
    for n, own in enumerate(words):
        good, bad = (" ".join(kind[n % len(kind)][-8:]) for kind in reversed(by_label))
        found.append({"prompt": " ".join(own[:5]), "chosen": f" {good}", "rejected": f" {bad}"})
    return found


def _chats(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    word = ("No.", "Yes.")
    return [
        {
            "messages": [
                {"role": "user", "content": f"Is this good? {one['text'][:60]}"},
                {"role": "assistant", "content": word[one["label"]]},
                {"role": "user", "content": f"And this? {two['text'][:40]}"},
                {"role": "assistant", "content": word[two["label"]]},
            ]
        }
        for one, two in zip(rows[::2], rows[1::2], strict=True)
    ]


def _task(rows: list[dict[str, Any]]) -> str:
    parts = ['instruction = "Say whether the review is good."', 'labels = ["bad", "good"]']
    for n, row in enumerate(rows[:20]):
        table = "demonstrations" if n < 8 else "questions"
        answer = ("bad", "good")[row["label"]]
        parts.append(f"[[{table}]]\nquestion = {json.dumps(row['text'][:80])}\nanswer = {json.dumps(answer)}")
    return "\n".join(parts) + "\n"
