"""LoRALinear as a part of its own: the equation, merging, state dicts."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from family_cases import config_of
from graftlm.errors import InputError
from graftlm.exchange.adapt import adapt
from graftlm.methods.ia3 import IA3
from graftlm.methods.lora import LoRA, LoRALinear, mark_only_lora_as_trainable
from graftlm.models import Linear
from graftlm.models.config import read_model_config
from graftlm.models.layers import apply_linears
from tiny import model_of, random_model


def layer(rank: int = 3, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> LoRALinear:
    torch.manual_seed(0)
    new = LoRALinear(7, 5, bias=True, rank=rank, alpha=6.0, lora_dropout=dropout).to(dtype)
    if rank:
        torch.nn.init.normal_(new.lora_B)
    return new


def inputs(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(4, 7, dtype=dtype, generator=torch.Generator().manual_seed(1))


def test_the_equation() -> None:
    lora, x = layer(), inputs()
    expected = x @ lora.weight.T + lora.bias + (6.0 / 3) * (x @ lora.lora_A.T @ lora.lora_B.T)
    torch.testing.assert_close(lora(x), expected, rtol=0, atol=1e-12)
    mark_only_lora_as_trainable(lora)  # gradients by hand
    for shape in ((7,), (2, 2, 7), (0, 7)):
        some = x.flatten()[: math.prod(shape)].view(shape)
        plain = F.linear(some, lora.weight + 2.0 * lora.lora_B @ lora.lora_A, lora.bias)
        torch.testing.assert_close(lora(some), plain, rtol=0, atol=1e-12)


def test_the_start_is_the_plain_linear() -> None:
    lora, x = LoRALinear(7, 5, rank=3, alpha=6.0), inputs(torch.float32)
    assert torch.equal(lora(x), F.linear(x, lora.weight, lora.bias))
    bound = 1 / math.sqrt(7)
    assert lora.lora_A.abs().max() <= bound and lora.lora_A.std() > bound / 4 and not lora.lora_B.any()
    before = lora.lora_A.clone()
    torch.nn.init.ones_(lora.lora_B)
    lora.reset_parameters()
    assert not lora.lora_B.any() and not torch.equal(lora.lora_A, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_evaluation_merges_and_training_restores_the_weight_to_the_bit(dtype: torch.dtype) -> None:
    lora, x = layer(), inputs(dtype)
    lora.weight.data, lora.bias.data = lora.weight.data.to(dtype), lora.bias.data.to(dtype)
    weight, unmerged = lora.weight.clone(), lora(x)
    for _ in range(3):  # repeating either changes nothing
        assert lora.eval() is lora and lora.eval().merged
        assert not torch.equal(lora.weight, weight)
        merged = lora.weight.clone()
        assert lora.train(False).weight.equal(merged)
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
        torch.testing.assert_close(lora(x), unmerged, rtol=0, atol=tolerance)
        assert lora.train() is lora and lora.train().weight.equal(weight) and not lora.merged
    assert lora.weight.dtype == dtype and torch.equal(lora(x), unmerged)


def test_merging_computes_in_float32_or_wider() -> None:
    lora = layer(dtype=torch.float32)
    lora.weight.data = lora.weight.data.bfloat16()
    exact = lora.weight.float() + 2.0 * lora.lora_B @ lora.lora_A
    assert torch.equal(lora.eval().weight, exact.bfloat16())


def test_a_parents_eval_reaches_it() -> None:
    parent = torch.nn.Sequential(torch.nn.Sequential(layer()))
    parent.eval()
    assert parent[0][0].merged
    parent.train()
    assert not parent[0][0].merged


def test_rank_zero_is_a_plain_linear() -> None:
    lora, x = layer(rank=0), inputs()
    assert [name for name, _ in lora.named_parameters()] == ["weight", "bias"]
    assert torch.equal(lora(x), F.linear(x, lora.weight, lora.bias)) and not lora.eval().merged and lora.scale == 0
    assert LoRALinear(7, 5).rank == 0  # as loralib's


def test_a_merged_layers_state_dict_holds_the_pristine_weight() -> None:
    lora, x = layer(), inputs()
    weight, expected = lora.weight.clone(), lora(x)
    state = copy.deepcopy(lora.eval().state_dict())
    assert torch.equal(state["weight"], weight)
    for mode in (True, False):  # adapted once, whether the receiver is merged or not
        other = LoRALinear(7, 5, rank=3, alpha=6.0).double().train(mode)
        other.load_state_dict(state)
        assert other.merged != mode
        torch.testing.assert_close(other(x), expected, rtol=0, atol=1e-12)
        assert torch.equal(other.train().weight, weight)


def test_dropout_acts_on_the_input_of_a_and_only_in_training() -> None:
    lora, x = layer(dropout=0.5), inputs()
    torch.manual_seed(5)
    mask = lora.lora_drop(torch.ones_like(x))
    torch.manual_seed(5)
    expected = F.linear(x, lora.weight, lora.bias) + 2.0 * ((x * mask) @ lora.lora_A.T @ lora.lora_B.T)
    torch.testing.assert_close(lora(x), expected, rtol=0, atol=1e-12)
    lora.eval()
    assert torch.equal(lora(x), lora(x))


def frozen(**fields: float) -> list[Linear]:
    """q, k and v as they stand in a model: the weights frozen, k without an update."""
    rng, linears = torch.Generator().manual_seed(0), [Linear(7, out, bias=out == 5).double() for out in (5, 3, 4)]
    loras = [
        LoRALinear.from_linear(m, LoRA(rank=2, alpha=6.0, dropout=fields.get("dropout", 0.0)), rng)
        for m in linears[::2]
    ]
    for lora in loras:
        torch.nn.init.normal_(lora.lora_B, generator=rng)
        lora.weight.requires_grad_(False)
        if lora.bias is not None:
            lora.bias.requires_grad_(False)
    return [loras[0], linears[1].requires_grad_(False), loras[1]]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("needs_x", [False, True])
def test_several_of_one_input_share_their_work_and_keep_their_gradients(dropout: float, needs_x: bool) -> None:
    linears = frozen(dropout=dropout)
    x = inputs().requires_grad_(needs_x)
    wanted = [p for m in linears for p in m.parameters() if p.requires_grad] + ([x] if needs_x else [])
    assert len(wanted) == 4 + needs_x
    results = []
    for fused in (True, False):
        for m in linears[::2]:
            m.fused = fused  # type: ignore[assignment]
        torch.manual_seed(3)
        ys = apply_linears(x, *linears)
        loss = sum((y * y.detach().roll(1, 0)).sum() for y in ys)
        results.append([*ys, *torch.autograd.grad(loss, wanted)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_one_dropout_mask_serves_all_linears_of_one_input() -> None:
    linears, x = frozen(dropout=0.5), inputs()
    torch.manual_seed(3)
    y, _, z = apply_linears(x, *linears)
    torch.manual_seed(3)
    mask = linears[0].lora_drop(torch.ones_like(x))
    for out, lora in ((y, linears[0]), (z, linears[2])):
        update = 3.0 * (x * mask) @ lora.lora_A.T @ lora.lora_B.T
        torch.testing.assert_close(out, F.linear(x, lora.weight, lora.bias) + update, rtol=0, atol=1e-12)


def test_around_takes_the_weight_over_without_a_copy() -> None:
    linear = Linear(7, 5)
    rng = torch.Generator().manual_seed(0)
    lora = LoRALinear.from_linear(linear, LoRA(rank=3, alpha=6.0, dropout=0.0), rng)
    assert lora.weight is linear.weight and lora.bias is linear.bias and lora.lora_A.device.type == "cpu"
    again = LoRALinear.from_linear(linear, LoRA(rank=3, alpha=6.0, dropout=0.0), torch.Generator().manual_seed(0))
    assert torch.equal(lora.lora_A, again.lora_A)


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_that_cannot_be_is_an_error(rank: int) -> None:
    with pytest.raises(InputError, match=f"rank {rank}: must be between 0 and the layer's width, 7"):
        LoRALinear(7, 5, rank=rank)


def test_mark_only_lora_as_trainable() -> None:
    model = model_of("gpt2")
    LoRA(rank=2, targets=("q", "v")).install(model, torch.Generator())
    for p in model.parameters():
        p.requires_grad_(True)
    mark_only_lora_as_trainable(model)
    marked = {name for name, p in model.named_parameters() if p.requires_grad}
    assert marked == {f"blocks.{i}.attn.{r}.lora_{s}" for i in range(2) for r in "qv" for s in "AB"}


INSTALL_ERRORS = [
    (("q", "vv"), 2, "unknown target 'vv': did you mean 'v'? known are q, k, v, o, up, down"),
    (("gate",), 2, "unknown target 'gate'"),
    ((), 2, "--targets is empty: name at least one of q, k, v, o, up, down"),
    (("q",), 33, "--rank 33: above the width of blocks.0.attn.q: choose at most 32"),
]


@pytest.mark.parametrize(("targets", "rank", "message"), INSTALL_ERRORS)
def test_install_names_what_is_wrong(targets: tuple[str, ...], rank: int, message: str) -> None:
    with pytest.raises(InputError) as caught:
        LoRA(rank=rank, targets=targets).install(model_of("gpt2"), torch.Generator())
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox"])
def test_all_linear_is_every_linear_of_the_adapted_blocks(kind: str) -> None:
    config = model_of(kind).config
    for name, method in {"lora": LoRA, "ia3": IA3}.items():
        assert method(targets=("all-linear",)).for_model(config) == method(targets=config.roles), name
    upper = LoRA(rank=2, targets=("all-linear",)).for_model(config, "1:")
    assert upper.layers == (1, config.num_layers)
    adapted = [model_of(kind), model_of(kind)]
    adapt(adapted[0], "lora", rank=2, targets=["all-linear"])
    LoRA(rank=2, targets=("all-linear",)).for_model(config).install(adapted[1], torch.Generator().manual_seed(0))
    linears = {name for name, module in model_of(kind).blocks.named_modules() if type(module) is Linear}
    for model in adapted:
        assert {name for name, module in model.blocks.named_modules() if isinstance(module, LoRALinear)} == linears


def test_all_linear_leaves_out_what_the_adapted_blocks_do_not_have() -> None:
    config = read_model_config(config_of("lfm2").to_dict(), "config.json")
    assert "q" in config.roles and "q" not in config.layer(1).roles
    method = LoRA(rank=2, targets=("all-linear",)).for_model(config, ":1")
    assert isinstance(method, LoRA)
    assert method.targets == tuple(role for role in config.roles if role in config.layer(0).roles)
    method.install(random_model(config), torch.Generator())


def test_adapting_twice_is_an_error() -> None:
    model = model_of("llama")
    LoRA(rank=2).install(model, torch.Generator())
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.q is a LoRALinear already"):
        LoRA(rank=2).install(model, torch.Generator())


def test_the_handouts_numbers() -> None:
    """LoRA r on q, k, v of GPT-2 medium (facts of the handout and of the paper's closed form)."""
    from graftlm.methods.cost_model import parameters
    from graftlm.models.config import read_model_config

    medium = {"model_type": "gpt2", "n_layer": 24, "n_head": 16, "n_embd": 1024, "n_positions": 1024}
    shape = read_model_config({**medium, "vocab_size": 50257}, "config.json")
    assert LoRA(rank=128).count(shape) == 18_874_368
    assert LoRA(rank=16).count(shape) == 2_359_296
    assert LoRA(rank=196).count(shape) == 28_901_376
    assert LoRA(rank=4, targets=("q", "v")).count(shape) == 393_216
    share = 18_874_368 / (parameters(shape) + 18_874_368)
    assert f"{share:.2%}" == "5.05%" and f"{18_874_368 / parameters(shape):.2%}" == "5.32%"


def test_explain_gives_the_size_of_a_first_step() -> None:
    """The line's estimate against a real first step of Adam on random gradients."""
    torch.manual_seed(0)
    linear = Linear(256, 192)
    lora = LoRALinear.from_linear(linear, LoRA(rank=64, alpha=128.0, dropout=0.0), torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([lora.lora_B], lr=1e-3, weight_decay=0.0)
    lora(torch.randn(512, 256)).mul(torch.randn(512, 192)).sum().backward()
    optimizer.step()
    step = ((128.0 / 64) * lora.lora_B @ lora.lora_A).square().mean().sqrt().item()
    predicted = 128.0 * 1e-3 / math.sqrt(3 * 256 * 64)
    assert abs(step / predicted - 1) < 0.25


@pytest.mark.parametrize(
    ("rslora", "scale", "step"),
    [
        (False, "alpha/r = 2", "0.16%"),
        (True, "alpha/sqrt(r) = 4", "0.33%"),
    ],
)
def test_explain_says_it_in_numbers(rslora: bool, scale: str, step: str) -> None:
    """2 * 1e-3 * 2 * sqrt(4 / (3 * 32)) = 8.16e-4 of weights that are 0.5; twice that at 4 for 2."""
    model, method = model_of("llama"), LoRA(rank=4, alpha=8.0, rslora=rslora, plus_ratio=2.0, dropout=0.0)
    method.install(model, torch.Generator())
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.constant_(module.weight, 0.5)
    said = method.describe_scale(model, 1e-3)
    assert f"{scale}: a first step" in said and f"by about {step} of its size" in said


def test_several_of_different_dropout_are_each_what_they_are_alone() -> None:
    linears, x = frozen(), inputs()
    linears[2].lora_drop.p = 0.5
    torch.manual_seed(3)
    ys = apply_linears(x, *linears)
    torch.manual_seed(3)
    for y, linear in zip(ys, linears, strict=True):
        assert torch.equal(y, linear(x))


def test_the_handouts_settings_are_the_defaults() -> None:
    assert LoRA() == LoRA(rank=128, alpha=512.0, targets=("q", "k", "v"), dropout=0.05, rslora=False, plus_ratio=1.0)


def test_a_starts_uniform_up_to_one_over_the_root_of_its_width() -> None:
    a = LoRALinear(64, 64, rank=64).lora_A
    assert 0.99 / 8 < a.abs().max() <= 1 / 8 and abs(a.std().item() - 1 / (8 * math.sqrt(3))) < 2e-3


def test_it_adopts_lora_folders_only() -> None:
    model, method = model_of("llama"), LoRA(rank=2, alpha=4.0)
    method.install(model, torch.Generator())
    config, tensors = method.to_peft(model)
    found = LoRA.from_foreign_peft(model.config, (config, tensors), "x")
    assert found is not None and isinstance(found[0], LoRA) and found[0].rank == 2
    for other in ({"peft_type": "IA3"}, {"use_dora": True}):
        assert LoRA.from_foreign_peft(model.config, ({**config, **other}, tensors), "x") is None
