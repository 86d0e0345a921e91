"""Every setting of `LayerConfig` and `ModelConfig`, against the classes of transformers that have it.

The families below are tables of this test, not of the package: each is what a family's file would contain.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graftlm.files.formats import open_safetensors, save_safetensors
from graftlm.methods.cost_model import parameters
from graftlm.models import CausalLM, KVCache, ModelConfig
from graftlm.models.config import (
    FAMILIES,
    LayerConfig,
    ModelFamily,
    RopeConfig,
    Rows,
    check_names,
    tensor_mapping,
    to_file,
)
from graftlm.models.layers import PairedRow
from graftlm.models.llama import FAMILY as LLAMA

WINDOW, T = 5, 20
ROOT = torch.tensor(24**0.5).item()
"""Gemma's factor of embeddings: the square root of the hidden size, rounded to float32."""
SIZES = {"num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "hidden_size": 24, "head_dim": 8, "vocab_size": 61}
SIZES |= {"intermediate_size": 40, "max_positions": 64}
HF_SIZES = {
    **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 24, "head_dim": 8},
    **{"vocab_size": 61, "intermediate_size": 40, "max_position_embeddings": 64, "pad_token_id": None},
    **{"initializer_range": 0.4, "tie_word_embeddings": False, "attn_implementation": "eager"},
}
GEMMA = LayerConfig(norm_placement="both", norm_offset=1.0, activation="gelu_tanh", attention_scale=20**-0.5)
GEMMA_NORMS = {
    **{"norm1": "input_layernorm", "post_norm1": "post_attention_layernorm"},
    **{"norm2": "pre_feedforward_layernorm", "post_norm2": "post_feedforward_layernorm"},
}
QK_NORMS = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}


@dataclass(frozen=True)
class Case:
    """A class of transformers with settings, and the same model in ours."""

    name: str
    hf: dict[str, Any]
    layers: tuple[LayerConfig, ...]
    model: dict[str, Any] = field(default_factory=dict)
    family: dict[str, Any] = field(default_factory=dict)

    def config(self) -> ModelConfig:
        return ModelConfig(
            family="tested", **{**SIZES, "norm_eps": 1e-5, "tie_embeddings": False, **self.model}, layers=self.layers
        )

    def table(self) -> ModelFamily:
        return replace(LLAMA, name="tested", model_types=(), **self.family)


def theta(value: float = 1e4) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": value}


def phi_slices(config: ModelConfig, role: str) -> Rows | None:
    """qkv_proj: q, k, v; gate_up_proj: gate, up."""
    d, kv, width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.intermediate_size
    starts = {"q": (0, d), "k": (d, kv), "v": (d + kv, kv), "gate": (0, width), "up": (width, width)}
    start, size = starts.get(role, (0, 0))
    return slice(start, start + size) if size else None


local, everywhere = replace(GEMMA, window=WINDOW), GEMMA
capped = {"attention_softcap": 2.0}
CASES = [
    Case("Qwen3", {}, (LayerConfig(qk_norm="head"),), family={"norms": {**LLAMA.norms, **QK_NORMS}}),
    Case("Mistral", {"sliding_window": WINDOW}, (LayerConfig(window=WINDOW),)),
    Case(
        "Gemma2",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0}
        | {"final_logit_softcapping": 3.0, "tie_word_embeddings": True},
        (replace(local, **capped), replace(everywhere, **capped)),
        {"logits_softcap": 3.0, "embedding_multiplier": ROOT, "tie_embeddings": True},
        {"norms": GEMMA_NORMS},
    ),
    Case(
        "Gemma3",
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 20, "tie_word_embeddings": True}
        | {"layer_types": ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"]}
        | {"rope_parameters": {"sliding_attention": theta(100.0), "full_attention": theta()}},
        (
            *[replace(local, qk_norm="head", rope=RopeConfig(theta=100.0))] * 2,
            replace(everywhere, qk_norm="head"),
            replace(local, qk_norm="head", rope=RopeConfig(theta=100.0)),
        ),
        {"embedding_multiplier": ROOT, "tie_embeddings": True},
        {"norms": {**GEMMA_NORMS, **QK_NORMS}},
    ),
    Case(
        "Olmo2",
        {},
        (LayerConfig(norm_placement="post", qk_norm="all"),),
        family={"norms": {k: v for k, v in GEMMA_NORMS.items() if "post" in k} | QK_NORMS},
    ),
    Case(
        "Granite",
        {"embedding_multiplier": 6.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 3.0},
        (LayerConfig(attention_scale=0.2, residual_multiplier=0.7),),
        {"embedding_multiplier": 6.0, "logits_multiplier": 1 / 3},
    ),
    Case(
        "SmolLM3",
        {"no_rope_layers": [1, 1, 0, 1], "rope_parameters": theta()},
        (*[LayerConfig()] * 2, LayerConfig(rope=None), LayerConfig()),
    ),
    Case(
        "Phi3",
        {"rope_parameters": {**theta(), "partial_rotary_factor": 0.5}, "sliding_window": WINDOW},
        (LayerConfig(rope=RopeConfig(dim=4), window=WINDOW),),
        family={
            "linears": LLAMA.linears
            | dict.fromkeys("qkv", "self_attn.qkv_proj")
            | dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
            "fused_slices": phi_slices,
        },
    ),
    Case(
        "StableLm",
        {"rope_parameters": {**theta(), "partial_rotary_factor": 0.5}, "use_qkv_bias": True, "hidden_size": 32},
        (LayerConfig(rope=RopeConfig(dim=4), norm="layer"),),
        {"qkv_bias": True, "hidden_size": 32},
    ),
]


@cache
def reference(name: str, dtype: torch.dtype) -> nn.Module:
    """The case's model of transformers, with random weights; large ones, so that every setting shows."""
    case = next(case for case in CASES if case.name == name)
    torch.manual_seed(0)
    eps = {"layer_norm_eps" if name == "StableLm" else "rms_norm_eps": 1e-5}
    kind = "Gemma3Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{kind}Config")(**{**HF_SIZES, **eps, **case.hf})
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            nn.init.normal_(p, std=0.3)
    angles = {name: b for name, b in model.named_buffers() if "inv_freq" in name}
    model.to(dtype)
    for name, b in angles.items():  # as in float32, where transformers computes angles
        module, attribute = name.rsplit(".", 1)
        setattr(model.get_submodule(module), attribute, b)
    return model


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    found: Case = request.param
    monkeypatch.setitem(FAMILIES, "tested", found.table())
    return found


def ours(case: Case, state: Mapping[str, Tensor]) -> CausalLM:
    config = case.config()
    check_names(config, state, case.name)
    model = CausalLM(config).to(next(iter(state.values())).dtype)
    mapping = tensor_mapping(config)
    assert mapping.keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(mapping[name].read(state[mapping[name].name]))
    return model.eval()


class InDouble(TorchFunctionMode):
    """Leaves float64 as it is where transformers casts to float32 (norms, softmax), for a comparison to 1e-9."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float or (func is Tensor.to and torch.float32 in args):
                return args[0]
            kwargs = {key: value for key, value in kwargs.items() if value is not torch.float32}
        return func(*args, **kwargs)


def ids_of(rows: int = 3, tokens: int = T) -> Tensor:
    return torch.randint(0, 61, (rows, tokens), generator=torch.Generator().manual_seed(1))


def test_logits_and_gradients_equal_transformers(case: Case) -> None:
    theirs, ids = reference(case.name, torch.float64), ids_of()
    model, stored = ours(case, theirs.state_dict()), dict(theirs.named_parameters())
    weights = torch.randn(3, T, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with InDouble():
        expected = theirs(ids).logits
        (expected * weights).sum().backward()
    assert expected.std() > 0.1, "weights this small would hide a mistake"
    for fused in (True, False):
        model.use_fused_ops(fused)
        model.zero_grad()
        logits = model(ids)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
        (logits * weights).sum().backward()
        for name, mapping in tensor_mapping(model.config).items():
            grad, want = model.get_parameter(name).grad, stored[mapping.name].grad
            assert grad is not None and want is not None
            torch.testing.assert_close(grad, mapping.read(want), rtol=1e-9, atol=1e-9 * want.abs().max().item())


def test_float32_logits_equal_transformers_as_it_is(case: Case) -> None:
    theirs, ids = reference(case.name, torch.float32), ids_of()
    with torch.inference_mode():
        expected = theirs(ids).logits
        assert (ours(case, theirs.state_dict())(ids) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_export_is_the_inverse_of_reading_and_rows_are_read_alone(case: Case, tmp_path: Path) -> None:
    state = reference(case.name, torch.float32).state_dict()
    model = ours(case, state)
    exported = to_file(model.config, dict(model.named_parameters()))
    assert exported.keys() == state.keys() - ({"lm_head.weight"} if model.config.tie_embeddings else set())
    assert all(tensor.equal(state[name]) for name, tensor in exported.items())
    save_safetensors(tmp_path / "model.safetensors", exported)
    stored = open_safetensors(tmp_path / "model.safetensors")
    for name, mapping in tensor_mapping(model.config).items():
        whole = model.get_parameter(name)
        for rows in (range(1), range(len(whole) // 3, len(whole))):
            assert mapping.part(stored, mapping.name, rows).equal(whole[rows.start : rows.stop])


def test_parameters_are_counted_in_closed_form(case: Case) -> None:
    assert parameters(case.config()) == sum(p.numel() for p in CausalLM(case.config()).parameters())


def test_caches_shared_prefixes_and_pairs_equal_one_pass(case: Case) -> None:
    """Where windows begin and end must not depend on which way the tokens come."""
    model, ids = ours(case, reference(case.name, torch.float64).state_dict()), ids_of()
    ids[:, :7] = ids[:1, :7]
    whole, at = model.hidden_states(ids), torch.tensor([[12, 0], [3, 3], [0, 11]])
    rows = torch.arange(3)[:, None]
    lead, behind = model.forward_shared_prefix(ids[:1, :7], ids[:, 7:])
    assert lead is not None
    some = model.forward_shared_prefix(ids[:1, :7], ids[:, 7:], at)[1]
    alone = model.forward_shared_prefix(ids[:1, :0], ids)[1]
    equal = [(lead, whole[0, :7]), (behind, whole[:, 7:]), (some, whole[:, 7:][rows, at]), (alone, whole)]
    with torch.no_grad():
        shared, cache, lengths = KVCache(), model.empty_cache(3, 12), (6, 8, 2)
        model.hidden_states(ids[:1, :7], cache=shared)
        equal.append((model.hidden_states(ids[:1, 7:8], past=(shared,)), whole[:1, 7:8]))
        equal.append((model.hidden_states(ids[:, 7:], past=(shared,), positions=at), whole[:, 7:][rows, at]))
        model.hidden_states(ids[:, 7:15], past=(shared,), cache=cache)
        assert cache.lengths is not None
        cache.lengths += torch.tensor(lengths)
        new = torch.stack([ids[row, 7 + n : 9 + n] for row, n in enumerate(lengths)])
        found = model.hidden_states(new, past=(shared, cache), cache=cache)
        equal.extend((found[row], whole[row, 7 + n : 9 + n]) for row, n in enumerate(lengths))
        # a prompt of 11 tokens, 7 of them shared, with answers of 5 and 4
        paired = PairedRow(torch.tensor([4]), torch.tensor([9]))
        pair = model.forward_shared_prefix(ids[:1, :7], ids[:1, 7:], paired=paired)[1]
        second = model.hidden_states(torch.cat([ids[:1, :11], ids[:1, 16:]], dim=1))[:, 11:]
        equal.extend([(pair[:, :9], whole[:1, 7:16]), (pair[:, 9:], second)])
    for got, want in equal:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_losses_equal_those_of_the_logits(case: Case) -> None:
    model = ours(case, reference(case.name, torch.float64).state_dict())
    h, rows, targets = model.hidden_states(ids_of(1))[0].detach(), torch.arange(T), torch.arange(T) % 61
    log_p = model.logits(h).log_softmax(-1)[rows, targets]
    for fused in (True, False):
        model.use_fused_ops(fused)
        torch.testing.assert_close(model.log_probs(h, rows, targets), log_p, rtol=0, atol=1e-9)
        loss = model.loss(h, rows, targets, torch.ones(T, dtype=torch.float64))
        torch.testing.assert_close(loss, -log_p.sum(), rtol=0, atol=1e-9)
