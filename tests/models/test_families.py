"""Every family, with each option that real files use, against the class of transformers that has it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from family_cases import CASES, VOCAB, config_of, reference, stored_tensors
from graftlm import models
from graftlm.errors import InputError
from graftlm.exchange.huggingface import load_model
from graftlm.files.formats import load_safetensors, open_safetensors, save_safetensors
from graftlm.methods.cost_model import parameters
from graftlm.methods.peft_format import targeted
from graftlm.models import CausalLM, KVCache, ModelConfig
from graftlm.models.config import check_names, read_model_config, tensor_mapping, to_file
from graftlm.models.row_layout import PairedRow

T = 20


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@cache
def theirs(name: str, dtype: torch.dtype) -> nn.Module:
    return reference(name, dtype)


def ours_config(name: str) -> ModelConfig:
    return read_model_config(config_of(name).to_dict(), name)


def ours(name: str, model: nn.Module) -> CausalLM:
    config, state = ours_config(name), stored_tensors(model, model.state_dict())
    check_names(config, state, name)
    found = CausalLM(config).to(next(iter(state.values())).dtype)
    mapping = tensor_mapping(config)
    assert mapping.keys() == dict(found.named_parameters()).keys()
    with torch.no_grad():
        for parameter, p in found.named_parameters():
            p.copy_(mapping[parameter].read(state[mapping[parameter].name]))
    return found.eval()


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
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))


def test_logits_and_gradients_equal_transformers(case: str) -> None:
    reference, ids = theirs(case, torch.float64), ids_of()
    model = ours(case, reference)
    reference.zero_grad()
    weights = torch.randn(3, T, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with InDouble():
        expected = reference(ids).logits
        (expected * weights).sum().backward()
    assert expected.std() > 0.1, "weights this small would hide a mistake"
    grads = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    stored = stored_tensors(reference, grads)
    for fused in (True, False):
        model.use_fused_ops(fused)
        model.zero_grad()
        logits = model(ids)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
        (logits * weights).sum().backward()
        for name, mapping in tensor_mapping(model.config).items():
            grad, want = model.get_parameter(name).grad, stored[mapping.name]
            assert grad is not None
            scale = max(want.abs().max().item(), 1e-3)  # biases of k without a rotation have no gradient
            torch.testing.assert_close(grad, mapping.read(want), rtol=1e-9, atol=1e-9 * scale)


def test_float32_logits_equal_transformers_as_it_is(case: str) -> None:
    reference, ids = theirs(case, torch.float32), ids_of()
    with torch.inference_mode():
        expected = reference(ids).logits
        assert (ours(case, reference)(ids) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_bfloat16_logits_lose_no_more_than_in_transformers(case: str) -> None:
    """The median over positions: where a router's choice is close, its rounding decides, here as there."""
    exact, rounded, ids = theirs(case, torch.float32), reference(case, torch.bfloat16), ids_of(16)
    with torch.inference_mode():
        expected = exact(ids).logits
        lost, theirs_lost = (
            (logits.float() - expected).square().mean(-1).sqrt().median()
            for logits in (ours(case, rounded)(ids), rounded(ids).logits)
        )
    assert lost <= 1.2 * theirs_lost


def test_export_is_the_inverse_of_reading_and_rows_are_read_alone(case: str, tmp_path: Path) -> None:
    reference = theirs(case, torch.float32)
    model, state = ours(case, reference), stored_tensors(reference, reference.state_dict())
    exported = to_file(model.config, dict(model.named_parameters()))
    assert exported.keys() == state.keys() - ({"lm_head.weight"} if model.config.tie_embeddings else set())
    assert all(tensor.equal(state[name]) for name, tensor in exported.items())
    save_safetensors(tmp_path / "model.safetensors", exported)
    stored = open_safetensors(tmp_path / "model.safetensors")
    for name, mapping in tensor_mapping(model.config).items():
        whole = model.get_parameter(name)
        for rows in (range(1), range(len(whole) // 3, len(whole))):
            assert mapping.part(stored, mapping.name, rows).equal(whole[rows.start : rows.stop])


def test_parameters_are_counted_in_closed_form(case: str) -> None:
    config = ours_config(case)
    assert parameters(config) == sum(p.numel() for p in CausalLM(config).parameters())


def test_layers_pattern_of_peft_names_the_list_of_layers(case: str) -> None:
    model = theirs(case, torch.float32)
    layers = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    pattern = {"layers_to_transform": [1], "layers_pattern": layers.rpartition(".")[2]}
    found = targeted(ours_config(case), {"target_modules": "all-linear", **pattern}, case)
    assert found and all(name.startswith(f"{layers}.1.") and i == 1 for name, (i, _) in found.items())


def test_caches_shared_prefixes_and_pairs_equal_one_pass(case: str) -> None:
    """Where windows begin and end must not depend on which way the tokens come."""
    model, ids = ours(case, theirs(case, torch.float64)), ids_of()
    ids[:, :7] = ids[:1, :7]
    whole, at = model.hidden_states(ids), torch.tensor([[12, 0], [3, 3], [0, 11]])
    rows = torch.arange(3)[:, None]
    lead, behind = model.forward_shared_prefix(ids[:1, :7], ids[:, 7:])
    assert lead is not None
    some = model.forward_shared_prefix(ids[:1, :7], ids[:, 7:], at)[1]
    alone = model.forward_shared_prefix(ids[:1, :0], ids)[1]
    lower = model.forward_lower_layers(ids[:1, :7], ids[:, 7:], 2)
    upper = model.forward_shared_prefix(ids[:1, :7], ids[:, 7:], cached_hidden=(2, lower))[1]
    equal = [(lead, whole[0, :7]), (behind, whole[:, 7:]), (some, whole[:, 7:][rows, at]), (alone, whole)]
    equal.append((upper, whole[:, 7:]))
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
        pair = model.forward_shared_prefix(ids[:1, :7], ids[:1, 7:], layout=paired)[1]
        second = model.hidden_states(torch.cat([ids[:1, :11], ids[:1, 16:]], dim=1))[:, 11:]
        equal.extend([(pair[:, :9], whole[:1, 7:16]), (pair[:, 9:], second)])
    for got, want in equal:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


def test_losses_equal_those_of_the_logits(case: str) -> None:
    model = ours(case, theirs(case, torch.float64))
    h, rows, targets = model.hidden_states(ids_of(1))[0].detach(), torch.arange(T), torch.arange(T) % VOCAB
    log_p = model.logits(h).log_softmax(-1)[rows, targets]
    for fused in (True, False):
        model.use_fused_ops(fused)
        torch.testing.assert_close(model.log_probs(h, rows, targets), log_p, rtol=0, atol=1e-9)
        loss = model.loss(h, rows, targets, torch.ones(T, dtype=torch.float64))
        torch.testing.assert_close(loss, -log_p.sum(), rtol=0, atol=1e-9)


def test_greedy_generation_with_the_cache_equals_recomputation(case: str) -> None:
    model, ids = ours(case, theirs(case, torch.float64)), ids_of(2, 3)
    with torch.no_grad():
        cache, new, found = model.empty_cache(2, T), ids, []
        while ids.shape[1] < T:
            found.append(model(new, past=(cache,), cache=cache)[:, -1])
            assert cache.lengths is not None
            cache.lengths += new.shape[1]
            new = found[-1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, new], dim=1)
        torch.testing.assert_close(torch.stack(found, 1), model(ids)[:, 2:-1], rtol=0, atol=1e-9)


def test_a_family_is_one_file_and_one_line() -> None:
    source = Path(models.__file__).parents[1]
    lines = [
        (str(path.relative_to(source)), line.strip())
        for path in source.rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if "helium" in line.lower()
    ]
    assert [line for line in lines if line[0] != "models/helium.py"] == [("models/__init__.py", '"helium",')]
    shown = (source.parents[1] / "docs" / "extending.md").read_text("utf-8")
    assert (source / "models" / "helium.py").read_text("utf-8").partition("\n\n\n")[2].strip() in shown


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("cohere", {"use_qk_norm": True}, "use_qk_norm = True is not understood"),
    ("cohere2", {"sliding_window": None}, "sliding_window = None is no size"),
    ("cohere2", {"head_dim": 6}, "head_dim = 6 is not understood; understood: 8"),
    ("gpt_bigcode", {"multi_query": False}, "multi_query = False is not understood"),
    ("gpt_neo", {"attention_layers": ["global", "local"]}, "attention_layers = ['global', 'local'] is not understood"),
    ("gpt_neo", {"attention_layers": None, "attention_types": [["global", 4.5]]}, "attention_types = [['global', 4."),
    ("gpt_neo", {"num_heads": 5}, "hidden_size 24 is not divided by 5 heads"),
    ("gptj", {"rotary_dim": None}, "rotary_dim = None is not understood; a head has 8 dimensions"),
    ("gptj", {"rotary_dim": 10}, "rotary_dim = 10 is not understood"),
    ("gptj", {"tie_word_embeddings": True}, "tie_word_embeddings = True is not understood"),
    ("lfm2", {"conv_bias": True}, "conv_bias = True is not understood"),
    ("lfm2", {"conv_L_cache": 1}, "conv_L_cache = 1 is not understood"),
    ("lfm2", {"block_multiple_of": 0}, "block_multiple_of = 0 is no size"),
    ("lfm2", {"layer_types": ["conv", "sliding_attention"] * 2}, "layer_types = ['conv', 'sliding_attention', "),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False is not understood"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False is not understood"),
    ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim = 16 is not understood; understood: 24, None"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm = True is not understood"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm = True is not understood"),
    ("phi", {"tie_word_embeddings": True}, "tie_word_embeddings = True is not understood"),
    ("phi3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn' is not understood"),
    ("phi3 longrope", {"original_max_position_embeddings": 16}, "original_max_position_embeddings = 32 is not under"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm = True is not understood"),
    ("stablelm", {"head_dim": 6}, "4 heads of 6 dimensions do not make hidden_size 32"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_a_setting_that_is_not_supported_is_an_error(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_model_config({**config_of(name).to_dict(), **change}, "m/config.json")
    assert str(caught.value).startswith("m/config.json: ") and message in str(caught.value)


def test_bfloat16_shards_of_gemma_lose_no_more_than_in_transformers(tmp_path: Path) -> None:
    """1 + w of its norms, and the root of its width, are rounded where transformers rounds them."""
    written, ids = reference("gemma3", torch.float32), ids_of()
    assert isinstance(written, PreTrainedModel)
    for name, p in written.named_parameters():
        if "norm" in name:
            nn.init.normal_(p, std=0.003)  # 1 + w would be 1 in bfloat16
    written.bfloat16().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_safetensors(shard, {**load_safetensors(shard), **angles})
    exact, theirs = (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval() for dtype in (torch.float32, torch.bfloat16)
    )
    ours = load_model(tmp_path, torch.device("cpu"), torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    with torch.inference_mode():
        x = theirs.model.embed_tokens(ids)
        assert ours.embed_tokens(ids, torch.arange(T)).equal(x)
        assert (
            ours.get_submodule("blocks.0.norm1")(x) == theirs.model.layers[0].input_layernorm(x)
        ).float().mean() > 0.99
        found = [logits.float() - exact(ids).logits for logits in (ours(ids), theirs(ids).logits)]
    lost, theirs_lost = (error.square().mean().sqrt() for error in found)
    assert lost <= 1.2 * theirs_lost
