"""`graft estimate`: what a method trains, what that costs and what memory it holds, from formulas alone.

What is unusual here: the method is installed too, on a model whose tensors have no memory (PyTorch's meta device). So
whatever a run would refuse is refused here, in the same words; the numbers are the closed forms', and the tests hold
the two together.

With --batch_size what autograd keeps from the forward to the backward pass is counted too, on tensors that hold nothing
(PyTorch's FakeTensor) and go through the very code that trains. Left out of the operations are norms, and whatever else
is no matrix product; of the memory what lives for a moment only, and the runtime itself.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from graftlm.config import EstimateConfig
from graftlm.errors import InputError
from graftlm.files.assets import BUILTIN_MODELS, model_config
from graftlm.methods import Adapter, Full, LoRA, Method, PrefixTuning, method_from_flags
from graftlm.methods.base import parse_layer_range
from graftlm.methods.cost_model import (
    CostItem,
    ParameterGroup,
    ffn_adapters,
    ffn_biases,
    ffn_flops,
    ffn_parts,
    forward_flops,
    memory,
    memory_of_each,
    model_parts,
    sent_by_each,
    total,
    training_flops,
)
from graftlm.models import ModelConfig, build
from graftlm.models.checkpoint_mapping import read_model_config
from graftlm.models.presets import SHAPES
from graftlm.training.memory import saved_activation_bytes

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
WITH_MLP = {"mlp_widths", "method", "rank", "dtype", "device_gflops"}

Flops = Mapping[str, Mapping[str, CostItem]]


def estimate(config: EstimateConfig, given: Set[str]) -> dict[str, Any]:
    """The accounts that the flags ask for, with all formulas; `given` are the flags typed."""
    if "mlp_widths" in given:
        return _account_ffn(config, given)
    shape = known_shape(config.init_from)
    method = method_from_flags(config, given)
    method = replace(method, layers=parse_layer_range(config.train_layers, shape.num_layers))
    if config.shard and method.is_full_finetune:
        raise InputError(f"--shard: is for frozen weights; what --method {method.name} trains is cut in any case")
    with torch.device("meta"):
        method.install(build(shape), torch.Generator())
    room = shape.max_positions - method.positions
    if config.max_length is not None and config.max_length > room:
        raise InputError(f"--max_length {config.max_length}: the model reads at most {room} tokens of a text")
    parts = method.param_breakdown(shape)
    weights, text = sum(part.weights for part in parts), (config.max_length or room, method.positions)
    flops = {
        "forward": forward_flops(shape, weights, *text),
        "training": training_flops(shape, weights, *text, method.passes(shape)),
    }
    about = {"model": config.init_from, "method": method.to_json(), "tokens": text[0]}
    result = _result(config, about, model_parts(shape), model_parts(method.adapted_config(shape)), parts, flops)
    result |= _several(config, shape, method, result)
    return {**result, "paper": paper(config.init_from, shape, method)}


def _several(config: EstimateConfig, shape: ModelConfig, method: Method, result: dict[str, Any]) -> dict[str, Any]:
    """What a step comes to, and each process of several: what it holds, what it sends, how long that takes."""
    n, tokens = config.world_size, result["tokens"] * (config.batch_size or 0)
    sharding = "none" if n == 1 else "full" if method.is_full_finetune else "frozen" if config.shard else "none"
    found: dict[str, Any] = {}
    sizes = result["trainable"], result["total"], ITEM[config.dtype]
    if n > 1:
        held, sent = memory_of_each(shape, *sizes, n, sharding), sent_by_each(shape, sizes[0], sizes[2], n, sharding)
        found["distributed"] = {
            "world_size": n,
            "sharding": sharding,
            "bytes": _counts(held),
            "comm_bytes_per_step": _counts(sent),
        }
        result["formulas"] |= {"each": _shown(held.values()), "sent": _shown(sent.values())}
    if not config.batch_size:
        return found
    rows = -(-config.batch_size // n)
    kept = kept_bytes(shape, method, rows, result["tokens"], getattr(torch, config.dtype), sharding == "full")
    flops = result["flops_per_token"]["training"]["total"] * tokens
    step = found["step"] = {"tokens": tokens, "flops": flops, "per_device_batch_size": rows, "activation_bytes": kept}
    if config.device_gflops is not None:
        step["compute_seconds"] = flops / n / (config.device_gflops * 1e9)
    if config.bandwidth_gbs is not None:
        step["comm_seconds"] = found["distributed"]["comm_bytes_per_step"]["total"] / (config.bandwidth_gbs * 1e9)
    return found


def kept_bytes(shape: ModelConfig, method: Method, rows: int, tokens: int, dtype: torch.dtype, gathered: bool) -> int:
    """Bytes that autograd keeps of `rows` texts of so many tokens, with a target at each.

    gathered: whether blocks' trained weights come in `dtype` and go again, as cut ones do; else they are float32, and
    what is kept holds their copies in `dtype`.
    """
    if (
        method.layers is None and shape.num_layers > 3
    ):  # blocks behind the first are alike: what the third adds, all add
        two, three = (
            kept_bytes(replace(shape, num_layers=layers), method, rows, tokens, dtype, gathered) for layers in (2, 3)
        )
        return two + (shape.num_layers - 2) * (three - two)
    from torch._subclasses.fake_tensor import FakeTensorMode  # half a second; there is no public name for it

    if isinstance(method, LoRA):
        method = replace(method, dropout=0.0)  # a mask has a random seed, which only a real tensor can hold
    with FakeTensorMode():
        model = build(shape)
        method.install(model, torch.Generator())
        in_blocks = set(model.blocks.parameters()) if gathered else set()
        for p in model.parameters():
            if p in in_blocks or not p.requires_grad:
                p.data = p.data.to(dtype)
        model.compute_dtype = dtype
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        with saved_activation_bytes(model) as kept:
            model.train().forward_shared_prefix(ids[:1, :0], ids)
            # The head's loss makes its gradients on the way forth, and keeps that of what it reads.
            return kept() + rows * tokens * shape.hidden_size * dtype.itemsize


def known_shape(name: str) -> ModelConfig:
    """The shape of a model by name: of those with a short name out of a table, else out of its config.json."""
    if name in SHAPES and (name in BUILTIN_MODELS or not Path(name).exists()):
        return SHAPES[name]
    return read_model_config(*model_config(name))


def _account_ffn(config: EstimateConfig, given: Set[str]) -> dict[str, Any]:
    if spare := sorted(given - WITH_MLP):
        raise InputError(
            f"--{spare[0]}: says something of a language model, --mlp_widths is a net of its own; leave one out"
        )
    widths = layer_widths(config.mlp_widths)
    if "method" not in given:
        config = replace(config, method="full")
    method = method_from_flags(config, given)
    if method.name not in ("full", "bitfit", "adapter"):
        raise InputError(f"--method {method.name}: with --mlp_widths choose full, bitfit or adapter")
    base = ffn_parts(widths)
    parts = {
        "full": base,
        "bitfit": ffn_biases(widths),
        "adapter": ffn_adapters(widths, method.rank if isinstance(method, Adapter) else 0),
    }[method.name]
    flops = ffn_flops(widths, sum(part.weights for part in parts), 3 if method.is_full_finetune else 2)
    chosen: dict[str, Any] = {"method": method.name, **({"rank": method.rank} if isinstance(method, Adapter) else {})}
    units = {"hidden": sum(widths[1:-1]), "hidden_and_output": sum(widths[1:])}
    about = {"model": f"feed-forward net {config.mlp_widths}", "method": chosen, "units": units}
    return _result(config, about, base, base, parts, flops)


def layer_widths(text: str) -> list[int]:
    """The widths that --mlp_widths lists: two or more whole numbers above 0."""
    try:
        widths = [int(width) for width in text.split(",")]
    except ValueError:
        widths = []
    if len(widths) < 2 or min(widths) < 1:
        raise InputError(f"--mlp_widths {text!r}: must be two or more whole numbers above 0, as in 1024,512,1")
    return widths


def _result(
    config: EstimateConfig,
    about: dict[str, Any],
    base: Sequence[ParameterGroup],
    own: Sequence[ParameterGroup],
    trained: Sequence[ParameterGroup],
    flops: Flops,
) -> dict[str, Any]:
    """The JSON object: `base` is the model as it came, `own` the same after installing, `trained` what is trained."""
    whole = [*own, *(part for part in trained if part.added)]
    everything, trainable = total(whole), total(trained)
    by_module: dict[str, dict[str, int]] = {}
    for key, parts in (("total", whole), ("trainable", trained)):
        for part in parts:
            by_module.setdefault(part.module, {"total": 0, "trainable": 0})[key] += part.count
    held = memory(trainable, everything, ITEM[config.dtype])
    per_token = {way: _counts(lines) for way, lines in flops.items()}
    result = {
        **about,
        "total": everything,
        "trainable": trainable,
        "trainable_fraction": trainable / everything,
        "base": total(base),
        "trainable_vs_base": trainable / total(base),
        "by_module": by_module,
        "flops_per_token": per_token,
        "bytes": _counts(held),
        "dtype": config.dtype,
        "formulas": {
            "model": _shown(own),
            "trained": _shown(trained),
            **{way: _shown(lines.values()) for way, lines in flops.items()},
            "bytes": _shown(held.values()),
        },
    }
    if config.device_gflops is not None:
        speed = config.device_gflops * 1e9
        result["device_gflops"] = config.device_gflops
        result["seconds_per_million_tokens"] = {way: n["total"] * 1e6 / speed for way, n in per_token.items()}
    return result


def _counts(lines: Mapping[str, CostItem]) -> dict[str, int]:
    return {**{name: line.count for name, line in lines.items()}, "total": total(list(lines.values()))}


def _shown(lines: Any) -> list[dict[str, Any]]:
    return [{"what": line.description, "count": line.count, "formula": line.formula} for line in lines if line.count]


# Beside the LoRA paper ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaperResult:
    """A count in Table 3 of the LoRA paper (Hu et al. 2021, arXiv:2106.09685)."""

    model: str
    method: Method
    millions: str
    name: str
    remark: str = ""


_PRELAYER = "; it trains what leaves each layer, keys and values are our nearest"
TABLE_3 = (
    PaperResult("gpt2-medium", Full(), "354.92", "FT"),
    PaperResult("gpt2-medium", Adapter(rank=112), "11.09", "Adapter (Houlsby)", "; no rank is given, 112 is nearest"),
    PaperResult("gpt2-medium", PrefixTuning(length=7), "0.35", "PreLayer", _PRELAYER),
    PaperResult("gpt2-medium", LoRA(rank=4, targets=("q", "v")), "0.35", "LoRA"),
    PaperResult("gpt2-large", Full(), "774.03", "FT"),
    PaperResult("gpt2-large", LoRA(rank=4, targets=("q", "v")), "0.77", "LoRA"),
)


def paper(name: str, shape: ModelConfig, method: Method) -> dict[str, Any] | None:
    """What the paper's table says of just this model and method, beside the exact count; None where it says nothing."""
    for row in TABLE_3:
        if row.model == name and row.method.param_breakdown(shape) == method.param_breakdown(shape):
            exact = method.count(shape)
            agrees = f"{exact / 1e6:.2f}" == row.millions
            off = exact / (float(row.millions) * 1e6) - 1
            verdict = "the same when rounded" if agrees else f"exact: {exact:,}, {off:+.2%}"
            note = f"LoRA paper, Table 3, {row.name}: {row.millions}M; {verdict}{row.remark}"
            return {"millions": float(row.millions), "exact": exact, "agrees": agrees, "note": note}
    return None
