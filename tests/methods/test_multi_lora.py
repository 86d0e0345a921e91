"""A stack of adapters: each row of a mixed batch is what its adapter alone makes of it."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from graftlm.errors import InputError
from graftlm.exchange.load import load
from graftlm.inference.decoder import right_pad
from graftlm.methods import BitFit, DoRA, Full, LoRA, Method, PrefixTuning
from graftlm.methods.base import trainable_state_dict
from graftlm.methods.lora import LoRALinear
from graftlm.methods.multi_lora import MultiLoRALinear, stack
from graftlm.models import CausalLM, clone_with_shared_weights
from tiny import FAMILIES, model_of

METHODS: dict[str, LoRA] = {
    "narrow": LoRA(rank=2, alpha=4.0, targets=("q", "v"), dropout=0.3),
    "wide": LoRA(rank=7, alpha=14.0, targets=("k", "o", "up", "down")),
    "root": LoRA(rank=4, alpha=8.0, targets=("q", "k", "v"), rslora=True, layers=(1, 2)),
    "other": LoRA(rank=2, alpha=8.0, targets=("q", "v")),
}
Adapters = dict[str, tuple[Method, Mapping[str, Tensor]]]


def adapted(base: CausalLM, method: Method, seed: int) -> CausalLM:
    """The base with one adapter, whose A and B are random, in the way `load` puts it on."""
    model, rng = clone_with_shared_weights(base), torch.Generator().manual_seed(seed)
    method.install(model, rng)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                p.copy_(torch.randn(p.shape, generator=rng, dtype=torch.float64) * 0.2)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.merge_on_eval = False
    return model.eval()


def alone_and_stacked(base: CausalLM) -> tuple[dict[str | None, CausalLM], Adapters]:
    models = {name: adapted(base, method, seed) for seed, (name, method) in enumerate(METHODS.items())}
    states = {name: trainable_state_dict(model) for name, model in models.items()}
    return {None: base, **models}, {name: (METHODS[name], states[name]) for name in METHODS}


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


ROWS = ["wide", None, "narrow", "other", "root", "narrow", None, "wide", "wide"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [ROWS, ["root"] * 3, ["wide", "root"], ["other", "narrow", None], [None, None]])
@torch.no_grad()
def test_each_row_is_what_its_adapter_alone_makes_of_it(family: str, rows: list[str | None]) -> None:
    base = model_of(family)
    alone, adapters = alone_and_stacked(base)
    together = stack(base, adapters)
    ids = torch.randint(1, 61, (len(rows), 6), generator=torch.Generator().manual_seed(3))
    with together.adapters_for(rows):
        found = together.model(ids)
        last = together.model(
            ids, positions=torch.arange(len(rows)) * 6 + 5
        )  # the last layer's q apart from its k and v
    for row, name in enumerate(rows):
        expected = alone[name](ids[row : row + 1])[0]
        assert close(found[row], expected) and close(last[row], expected[-1])
        assert name is None or not close(found[row], base(ids[row : row + 1])[0], 1e-3)


@torch.no_grad()
def test_a_cache_is_continued_row_by_row_and_one_adapter_may_be_said_for_all() -> None:
    base = model_of("llama")
    alone, adapters = alone_and_stacked(base)
    together = stack(base, adapters)
    prompts = [[5, 9, 2], [7, 1, 8, 2, 8], [1], [4, 4]]
    rows = ["other", None, "wide", "other"]
    ids, lengths = right_pad(prompts, "cpu")
    cache = base.empty_cache(4, 8)
    with together.adapters_for(rows):
        together.model(ids, cache=cache)
        cache.lengths = lengths
        found = together.model(torch.tensor([[3]] * 4), past=[cache], cache=cache)[:, 0]
    for row, name in enumerate(rows):
        assert close(found[row], alone[name](torch.tensor([[*prompts[row], 3]]))[0, -1])
    with together.adapters_for("root"):
        for shape in ((1, 4), (3, 2)):
            ids = torch.arange(1, 1 + shape[0] * shape[1]).view(shape)
            assert close(together.model(ids), alone["root"](ids))


@torch.no_grad()
def test_outside_of_a_call_it_is_the_base_and_shares_its_tensors() -> None:
    base = model_of("llama-biased")
    _, adapters = alone_and_stacked(base)
    together = stack(base, adapters)
    ids = torch.tensor([[1, 2, 3]])
    with together.adapters_for("wide"):
        together.model(ids)
    assert torch.equal(together.model(ids), base(ids))
    for name, p in base.named_parameters():
        assert together.model.get_parameter(name).data_ptr() == p.data_ptr()
    kinds = {name: type(module) is MultiLoRALinear for name, module in together.model.blocks[0].named_modules()}
    assert kinds["attn.q"] and kinds["mlp.down"] and not kinds["mlp.gate"]  # nobody targets gate
    with together.adapters_for(["wide", "root"]), pytest.raises(AssertionError, match="adapters were set for 2"):
        together.model(torch.ones(3, 2, dtype=torch.long))


@torch.no_grad()
def test_an_adapter_of_broken_numbers_is_refused_and_one_that_overflows_spoils_its_own_rows_only() -> None:
    base = model_of("llama")
    _, adapters = alone_and_stacked(base)
    together = stack(base, adapters)
    ids = torch.tensor([[1, 2, 3]] * 3)
    with together.adapters_for(["narrow", "wide", None]):
        expected = together.model(ids)
    for module in together.model.modules():
        if isinstance(module, MultiLoRALinear):
            module.b[1].fill_(1e308)
    with together.adapters_for(["narrow", "wide", None]):
        found = together.model(ids)
    assert not found[1].isfinite().all() and torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
    method, state = adapters["narrow"]
    broken = {name: torch.full_like(tensor, float("nan")) for name, tensor in state.items()}
    with pytest.raises(InputError, match=r"adapter sad: holds NaN or inf"):
        stack(base, {"sad": (method, broken)})


@pytest.mark.parametrize(
    ("method", "way"),
    [(DoRA(), "merge it"), (BitFit(), "merge it"), (Full(), "merge it"), (PrefixTuning(), "serve its run on its own")],
)
def test_other_methods_are_refused(method: Method, way: str) -> None:
    with pytest.raises(InputError, match=f"adapter one: is {method.name}, and only lora is .*: {way}.* as the base"):
        stack(model_of("llama"), {"one": (method, {})})


@torch.no_grad()
def test_real_weights_in_float32() -> None:
    base = load("smollm2-135m", device="cpu", dtype="float32").model
    names = ("narrow", "wide", "root")
    models = {name: adapted(base, METHODS[name], seed) for seed, name in enumerate(names)}
    together = stack(base, {name: (METHODS[name], trainable_state_dict(models[name])) for name in names})
    ids = torch.randint(1, 49152, (4, 5), generator=torch.Generator().manual_seed(3))
    rows = ["wide", "narrow", None, "root"]
    with together.adapters_for(rows):
        found = together.model(ids)
    for row, name in enumerate(rows):
        expected = (base if name is None else models[name])(ids[row : row + 1])[0]
        assert close(found[row], expected, 1e-4)


def test_nothing_is_left_of_a_call_that_failed() -> None:
    base = model_of("llama")
    together = stack(base, alone_and_stacked(base)[1])
    with pytest.raises(IndexError), together.adapters_for("wide"):
        together.model(torch.tensor([[61]]))
    with torch.no_grad():
        assert torch.equal(together.model(torch.tensor([[1]])), base(torch.tensor([[1]])))
