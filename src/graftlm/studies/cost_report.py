"""`graft estimate`: trainable parameters, FLOPs, memory and communication of a method, from formulas alone.

The method is installed on a model without memory (PyTorch's meta device), so what a run would reject is rejected
here with the same message. The numbers come from `methods/cost_model.py`; the tests compare both.

With --batch_size the saved activations are counted too, by running the training code on PyTorch's FakeTensor. Not
counted: FLOPs other than matrix products, temporary buffers, and the memory of the runtime itself.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from graftlm.config import EstimateConfig, TrainConfig
from graftlm.config.flags import MethodFlags
from graftlm.errors import InputError
from graftlm.exchange.base_format import packed_sizes
from graftlm.exchange.load import read_config
from graftlm.exchange.runs import find_run
from graftlm.files.assets import BUILTIN_MODELS, model_config
from graftlm.methods import Adapter, Full, LoRA, Method, PrefixTuning, cost_model, method_from_flags
from graftlm.methods.cost_model import CostItem, ParameterGroup, total
from graftlm.methods.ia3 import IA3
from graftlm.models import CausalLM, ModelConfig
from graftlm.models.config import LayerConfig, read_model_config
from graftlm.models.mlp import MLP
from graftlm.models.packed import FORMATS
from graftlm.models.presets import SHAPES
from graftlm.training.reporting import saved_activation_bytes
from graftlm.training.run_manifest import resolve_init

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MLP_FLAGS = {"mlp_widths", "method", "rank", "dtype", "device_gflops"}

CostItems = Mapping[str, CostItem]


def estimate(config: EstimateConfig, explicit: Set[str]) -> dict[str, Any]:
    """The JSON object of `graft estimate`, with all formulas; `explicit` are the flags on the command line."""
    if "mlp_widths" in explicit:
        return _estimate_mlp(config, explicit)
    model, method = _model_and_method(config, explicit)
    if config.shard and method.is_full_finetune:
        raise InputError(f"--shard is for frozen weights; the weights of --method {method.name} are sharded anyway")
    with torch.device("meta"):
        method.install(CausalLM(model), torch.Generator())
    max_length = model.max_positions - method.positions
    if config.max_length is not None and config.max_length > max_length:
        raise InputError(f"--max_length {config.max_length}: the model reads at most {max_length} tokens of a text")
    trained = method.param_breakdown(model)
    text = sum(group.weights for group in trained), config.max_length or max_length, method.positions
    forward = cost_model.forward_flops(model, *text)
    training = cost_model.training_flops(model, *text, method.passes(model))
    header = {"model": config.init_from, "method": method.to_json(), "tokens": text[1]}
    base, adapted = (cost_model.model_parts(each) for each in (model, method.adapted_config(model)))
    result = _result(config, header, base, adapted, trained, {"forward": forward, "training": training})
    if config.base_format != "dense":
        _pack(config, model, method, result)
    sharding = "frozen" if config.shard else "full" if method.is_full_finetune and config.world_size > 1 else "none"
    if config.world_size > 1:
        result["distributed"] = _distributed(config, model, sharding, result)
    if config.batch_size:
        result["step"] = _step(config, model, method, sharding, result)
    return {**result, "paper": lora_paper(config.init_from, model, method)}


def _model_and_method(config: EstimateConfig, explicit: Set[str]) -> tuple[ModelConfig, Method]:
    """What `graft train` with these flags would train: of a run, its base and the method that training continues."""
    if find_run(config.init_from) is None:
        model, method = load_config(config.init_from), method_from_flags(config, explicit)
    else:
        flags = {f.name: getattr(config, f.name) for f in fields(MethodFlags)}
        source = resolve_init(TrainConfig(**flags, plan=True), explicit, resumed=False, weights=False)
        model, method = read_config(source.folder), source.method
        if source.adapter is not None:
            return model, method
    return model, method.for_model(model, config.train_layers)


def _pack(config: EstimateConfig, model: ModelConfig, method: Method, result: dict[str, Any]) -> None:
    """Change the result to that of packed frozen weights."""
    if method.is_full_finetune:
        raise InputError(
            f"--base_format {config.base_format}: --method full trains the base's own weights: leave it out"
        )
    sizes = packed_sizes(model, config.base_format, getattr(torch, config.dtype))
    blocks = {(FORMATS[kind].block_bytes, FORMATS[kind].block_size): count for kind, count in sizes.items()}
    held = cost_model.memory(result["trainable"], result["total"], ITEM_BYTES[config.dtype], blocks)
    result |= {"bytes": _counts(held), "base_format": config.base_format}
    result["formulas"]["bytes"] = _formulas(held.values())


def _distributed(config: EstimateConfig, model: ModelConfig, sharding: str, result: dict[str, Any]) -> dict[str, Any]:
    """Memory and communication of one rank; adds their formulas to the result."""
    n, trainable, item = config.world_size, result["trainable"], ITEM_BYTES[config.dtype]
    held = cost_model.memory_of_each(model, trainable, result["total"], item, n, sharding)
    sent = cost_model.sent_by_each(model, trainable, item, n, sharding)
    result["formulas"] |= {"each": _formulas(held.values()), "sent": _formulas(sent.values())}
    return {"world_size": n, "sharding": sharding, "bytes": _counts(held), "comm_bytes_per_step": _counts(sent)}


def _step(
    config: EstimateConfig, model: ModelConfig, method: Method, sharding: str, result: dict[str, Any]
) -> dict[str, Any]:
    """FLOPs, saved activations and predicted times of one step."""
    rows, tokens = -(-(config.batch_size or 0) // config.world_size), result["tokens"] * (config.batch_size or 0)
    dtype = getattr(torch, config.dtype)
    trained_dtype = dtype if sharding == "full" else torch.float32
    flops = result["flops_per_token"]["training"]["total"] * tokens
    step = {
        "tokens": tokens,
        "flops": flops,
        "per_device_batch_size": rows,
        "activation_bytes": activation_bytes(model, method, (rows, result["tokens"]), dtype, trained_dtype),
    }
    if config.device_gflops is not None:
        step["compute_seconds"] = flops / config.world_size / (config.device_gflops * 1e9)
    if config.bandwidth_gbs is not None:
        step["comm_seconds"] = result["distributed"]["comm_bytes_per_step"]["total"] / (config.bandwidth_gbs * 1e9)
    return step


def activation_bytes(
    config: ModelConfig,
    method: Method,
    shape: tuple[int, int],
    dtype: torch.dtype,
    trained_dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes that autograd saves for the backward pass.

    Args:
        config: the model.
        method: the method to install.
        shape: rows and tokens of a batch, with a target at each token.
        dtype: of the computation and of frozen weights.
        trained_dtype: of trained weights in blocks. Sharded ones are gathered in `dtype` and freed again; of others,
            in float32, copies in `dtype` are saved.
    """
    if method.layers is not None:
        return _saved_bytes(config, method, shape, dtype, trained_dtype)
    every = [config.layer(i) for i in range(config.num_layers)]
    if isinstance(method, LoRA | IA3):  # blocks before the first that is adapted save nothing
        every = every[[bool(set(layer.roles) & set(method.targets)) for layer in every].index(True) :]

    def of(*layers: LayerConfig) -> int:
        few, own = replace(config, num_layers=len(layers), layers=layers), method
        if isinstance(own, LoRA | IA3):
            own = replace(own, targets=tuple(role for role in own.targets if role in few.roles))
        return _saved_bytes(few, own, shape, dtype, trained_dtype)

    # After two blocks and one of each other kind, a block adds what those like it add.
    first = [*every[:2], *(layer for layer in dict.fromkeys(every[2:]) if layer not in every[:2])]
    more, start = Counter(every) - Counter(first), of(*first)
    return start + sum(n * (of(*first, layer) - start) for layer, n in more.items())


def _saved_bytes(
    config: ModelConfig, method: Method, shape: tuple[int, int], dtype: torch.dtype, trained_dtype: torch.dtype
) -> int:
    """`activation_bytes`, of all blocks."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes half a second; has no public name

    if isinstance(method, LoRA):
        method = replace(method, dropout=0.0)  # a dropout mask needs a random seed, which a fake tensor does not have
    with FakeTensorMode():
        model = CausalLM(config)
        replace_experts(model)
        method.install(model, torch.Generator())
        in_blocks = set(model.blocks.parameters())
        for p in model.parameters():
            if not p.requires_grad:
                p.data = p.data.to(dtype)
            elif p in in_blocks:
                p.data = p.data.to(trained_dtype)
        model.compute_dtype = dtype
        ids = torch.zeros(*shape, dtype=torch.long)
        with saved_activation_bytes(model) as saved:
            model.train().forward_shared_prefix(ids[:1, :0], ids)
            # The fused loss computes its gradients in the forward pass, and saves the one of its input.
            return saved() + ids.numel() * config.hidden_size * dtype.itemsize


def replace_experts(model: CausalLM) -> None:
    """Replace the experts of a token by one MLP of all their width. Which those are depends on the weights."""
    config = model.config
    for i, block in enumerate(model.blocks):
        if (experts := config.layer(i).experts) is not None:
            width = experts.per_token * experts.intermediate_size
            block.mlp = MLP(replace(config, intermediate_size=width), config.layer(i))


def load_config(name: str) -> ModelConfig:
    """The configuration of a model by name: a preset, or the model's config.json."""
    if name in SHAPES and (name in BUILTIN_MODELS or not Path(name).exists()):
        return SHAPES[name]
    return read_model_config(*model_config(name))


def _estimate_mlp(config: EstimateConfig, explicit: Set[str]) -> dict[str, Any]:
    if unexpected := sorted(explicit - MLP_FLAGS):
        raise InputError(f"--{unexpected[0]} is for a language model, --mlp_widths for a plain net; leave one out")
    widths = parse_widths(config.mlp_widths)
    if "method" not in explicit:
        config = replace(config, method="full")
    method = method_from_flags(config, explicit)
    if method.name not in ("full", "bitfit", "adapter"):
        raise InputError(f"--method {method.name}: with --mlp_widths choose full, bitfit or adapter")
    base = cost_model.ffn_parts(widths)
    settings: dict[str, Any] = {"method": method.name}
    trained = cost_model.ffn_biases(widths) if method.name == "bitfit" else base
    if isinstance(method, Adapter):
        trained, settings = cost_model.ffn_adapters(widths, method.rank), {**settings, "rank": method.rank}
    flops = cost_model.ffn_flops(widths, sum(group.weights for group in trained), 3 if method.is_full_finetune else 2)
    units = {"hidden": sum(widths[1:-1]), "hidden_and_output": sum(widths[1:])}
    header = {"model": f"feed-forward net {config.mlp_widths}", "method": settings, "units": units}
    return _result(config, header, base, base, trained, flops)


def parse_widths(text: str) -> list[int]:
    """The layer widths of --mlp_widths. Raises InputError."""
    if not re.fullmatch(r"0*[1-9]\d*(,0*[1-9]\d*)+", text.replace(" ", ""), re.ASCII):
        raise InputError(f"--mlp_widths {text!r}: must be two or more whole numbers above 0, as in 1024,512,1")
    return [int(width) for width in text.split(",")]


def _result(
    config: EstimateConfig,
    header: dict[str, Any],
    base: Sequence[ParameterGroup],
    adapted: Sequence[ParameterGroup],
    trained: Sequence[ParameterGroup],
    flops: Mapping[str, CostItems],
) -> dict[str, Any]:
    """The JSON object: `base` are the parameters before the method is installed, `adapted` after it."""
    everything = [*adapted, *(group for group in trained if group.added)]
    trainable, held = total(trained), cost_model.memory(total(trained), total(everything), ITEM_BYTES[config.dtype])
    by_module: dict[str, dict[str, int]] = {}
    for key, groups in (("total", everything), ("trainable", trained)):
        for group in groups:
            by_module.setdefault(group.module, {"total": 0, "trainable": 0})[key] += group.count
    per_token = {direction: _counts(items) for direction, items in flops.items()}
    result = {
        **header,
        "total": total(everything),
        "trainable": trainable,
        "trainable_fraction": trainable / total(everything),
        "base": total(base),
        "trainable_vs_base": trainable / total(base),
        "by_module": by_module,
        "flops_per_token": per_token,
        "bytes": _counts(held),
        "dtype": config.dtype,
        "formulas": {
            "model": _formulas(adapted),
            "trained": _formulas(trained),
            **{direction: _formulas(items.values()) for direction, items in flops.items()},
            "bytes": _formulas(held.values()),
        },
    }
    if config.device_gflops is not None:
        seconds = {way: counts["total"] * 1e6 / (config.device_gflops * 1e9) for way, counts in per_token.items()}
        result |= {"device_gflops": config.device_gflops, "seconds_per_million_tokens": seconds}
    return result


def _counts(items: CostItems) -> dict[str, int]:
    return {**{name: item.count for name, item in items.items()}, "total": total(list(items.values()))}


def _formulas(items: Iterable[CostItem]) -> list[dict[str, Any]]:
    return [{"what": item.description, "count": item.count, "formula": item.formula} for item in items if item.count]


# Comparison with the LoRA paper ---------------------------------------------------------------------------------------


TABLE_3: tuple[tuple[str, Method, str, str], ...] = (  # model, method, parameters in millions, the paper's name of it
    ("gpt2-medium", Full(), "354.92", "FT"),
    ("gpt2-medium", Adapter(rank=112), "11.09", "Adapter (Houlsby)"),  # the rank is not given, 112 is the closest
    (
        "gpt2-medium",
        PrefixTuning(length=7),
        "0.35",
        "PreLayer",
    ),  # that trains each layer's output, ours keys and values
    ("gpt2-medium", LoRA(rank=4, targets=("q", "v")), "0.35", "LoRA"),
    ("gpt2-large", Full(), "774.03", "FT"),
    ("gpt2-large", LoRA(rank=4, targets=("q", "v")), "0.77", "LoRA"),
)
"""Counts in Table 3 of the LoRA paper (Hu et al. 2021, arXiv:2106.09685)."""


def lora_paper(model: str, config: ModelConfig, method: Method) -> dict[str, Any] | None:
    """The LoRA paper's count for the same model and method next to the exact one; None if the paper has none."""
    for name, published, millions, title in TABLE_3:
        if name == model and published.param_breakdown(config) == method.param_breakdown(config):
            exact = method.count(config)
            agrees = f"{exact / 1e6:.2f}" == millions
            difference = exact / (float(millions) * 1e6) - 1
            verdict = "the same when rounded" if agrees else f"exact: {exact:,}, {difference:+.2%}"
            note = f"LoRA paper, Table 3, {title}: {millions}M; {verdict}"
            return {"millions": float(millions), "exact": exact, "agrees": agrees, "note": note}
    return None
