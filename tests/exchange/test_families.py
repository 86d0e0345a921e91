"""Adapters and merged models of every family, both ways, against PEFT and transformers.

LoRA on all linears for every model type of `family_cases.py`; other methods for one case of each layout of a folder.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from rich.console import Console
from torch import Tensor, nn

from family_cases import CASES, VOCAB, base_folder, config_of
from graftlm.config import ExportConfig, TrainConfig
from graftlm.errors import InputError
from graftlm.exchange.export import export
from graftlm.exchange.huggingface import (
    apply_adapter,
    from_foreign_peft,
    load_model,
    read_adapter,
    save_adapter,
    save_model,
)
from graftlm.files.formats import load_safetensors, read_json
from graftlm.methods import DoRA, LoRA, Method, PrefixTuning
from graftlm.methods.base import mergeable_linears, trainable, trainable_state_dict
from graftlm.methods.ia3 import IA3
from graftlm.models import CausalLM, ModelConfig, clone_with_shared_weights
from graftlm.models.config import FAMILIES, read_model_config, rotary_permutation, stored_linears, with_biases
from graftlm.training.train import train
from tiny import data_folder

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
CPU = torch.device("cpu")
BaseOf = Callable[[str], "Base"]
IDS = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Base:
    """A case's model: its folder, and the models read from it, of which each use takes its own."""

    folder: Path
    ours: CausalLM
    theirs: nn.Module
    logits: Tensor

    def fresh(self) -> CausalLM:
        return clone_with_shared_weights(self.ours)

    def in_transformers(self) -> nn.Module:
        return copy.deepcopy(self.theirs)


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> BaseOf:
    """Reads a case's model when it is first asked for."""
    folder = tmp_path_factory.mktemp("families")

    def read(name: str) -> Base:
        base = base_folder(folder / name, name)
        theirs = in_transformers(base)
        return Base(base, load_model(base, CPU, torch.float32), theirs, logits_of(theirs))

    return cache(read)


def shape_of(name: str) -> ModelConfig:
    return read_model_config(config_of(name).to_dict(), name)


def layout_of(name: str) -> tuple[Any, ...]:
    """What adapter folders of a case depend on: fused linears, and heads in another order in some or all layers."""
    config = shape_of(name)
    held = {tuple(rows) for i in range(config.num_layers) for rows in stored_linears(config, i).values()}
    permuted = {rotary_permutation(config, i) is not None for i in range(config.num_layers)}
    return tuple(sorted(roles for roles in held if len(roles) > 1)), tuple(permuted)


def adaptable(config: ModelConfig) -> tuple[str, ...]:
    """The roles that PEFT can adapt: not MLPs beside experts, whose modules' names it takes for those of experts."""
    experts = any(config.layer(i).experts for i in range(config.num_layers))
    return tuple(role for role in config.roles if not experts or role in "qkvo")


def modules_of(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Module inside a layer -> the roles it holds, of those that PEFT can adapt."""
    modules = {name: tuple(rows) for i in range(config.num_layers) for name, rows in stored_linears(config, i).items()}
    return {name: roles for name, roles in modules.items() if set(roles) <= set(adaptable(config))}


PLAIN: tuple[Any, ...] = ((), (False,))
TYPES = list({config_of(case).model_type: case for case in reversed(CASES)}.values())
LAYOUTS = [name for layout, name in {layout_of(name): name for name in reversed(CASES)}.items() if layout != PLAIN]
"""The first case of each layout but the plain one, which test_peft.py has."""


def in_transformers(folder: Path) -> nn.Module:
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(IDS)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits


def randomise(parameters: list[nn.Parameter]) -> None:
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.empty_like(p).normal_(std=0.1, generator=rng))


def near(got: Tensor, expected: Tensor, plain: Tensor) -> None:
    tolerance = 1e-4 * expected.abs().max()
    assert (expected - plain).abs().max() > 100 * tolerance, "an adapter that does nothing proves nothing"
    assert (got - expected).abs().max() <= tolerance


def adapted(base: Base, method: Method) -> CausalLM:
    model = base.fresh()
    method.install(model, torch.Generator().manual_seed(2))
    randomise(list(trainable(model).values()))
    return model


def check_ours_in_peft(base: Base, method: Method, folder: Path) -> None:
    """PEFT loads the folder of a method with the same logits, and it is read back bit for bit, and as a foreign one."""
    model = adapted(base, method)
    folder.mkdir()
    assert save_adapter(folder, model, method, str(base.folder)) == "peft"
    state, again = trainable_state_dict(model), read_adapter(folder, model.config, method)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    expected = logits_of(peft.PeftModel.from_pretrained(base.in_transformers(), folder).eval())
    near(logits_of(model.eval()), expected, base.logits)
    found, state = from_foreign_peft(folder, model.config)
    fresh = apply_adapter(base.fresh(), found, state, "ours")
    near(logits_of(fresh), expected, base.logits)
    if isinstance(method, LoRA) and isinstance(found, LoRA):
        assert (found.alpha, found.rank, found.layers) == (method.alpha, method.rank, method.layers)
        if set(found.targets) != set(method.targets):  # DoRA's magnitudes are those of all parts
            assert method.use_dora and set(found.targets) > set(method.targets)
            return
        tensors = load_safetensors(folder / "adapter_model.safetensors")
        save_adapter(folder, fresh, found, str(base.folder))
        written = load_safetensors(folder / "adapter_model.safetensors")
        assert written.keys() == tensors.keys() and all(torch.equal(written[key], tensors[key]) for key in tensors)


def check_theirs_here(base: Base, config: peft.PeftConfig, folder: Path) -> None:
    theirs = peft.get_peft_model(base.in_transformers(), config).eval()
    randomise([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(folder)
    method, state = from_foreign_peft(folder, base.ours.config)
    near(logits_of(apply_adapter(base.fresh(), method, state, "theirs")), logits_of(theirs), base.logits)


# The first case of each model type -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", dict.fromkeys([*TYPES, *LAYOUTS]))
def test_peft_reads_lora_of_all_linears(case: str, base_of: BaseOf, tmp_path: Path) -> None:
    method = LoRA(rank=3, alpha=7.0, targets=adaptable(shape_of(case)), dropout=0.0)
    check_ours_in_peft(base_of(case), method, tmp_path / "ours")


@pytest.mark.parametrize("case", TYPES)
def test_lora_of_peft_is_the_same_here(case: str, base_of: BaseOf, tmp_path: Path) -> None:
    check_theirs_here(base_of(case), theirs("lora", shape_of(case)), tmp_path)


@pytest.mark.parametrize("case", TYPES)
def test_a_merged_model_is_the_same_in_transformers(case: str, base_of: BaseOf, tmp_path: Path) -> None:
    base = base_of(case)
    model = adapted(base, LoRA(rank=3, alpha=7.0, targets=adaptable(shape_of(case)), dropout=0.0))
    expected = logits_of(model.train())
    for linear in mergeable_linears(model.eval()):
        linear.merge()
    own = trainable_state_dict(model).keys()
    save_model(tmp_path, model, {n: p.detach() for n, p in model.named_parameters() if n not in own}, base.folder)
    near(logits_of(in_transformers(tmp_path)), expected, base.logits)
    ours, theirs = (read_json(folder / "config.json") for folder in (tmp_path, base.folder))
    assert ours == theirs and read_model_config(ours, "ours") == shape_of(case)


@pytest.mark.parametrize("case", CASES)
def test_a_config_json_with_added_biases_is_true_or_refused(case: str) -> None:
    stored, plain = config_of(case).to_dict(), shape_of(case)
    biased = replace(plain, qkv_bias=True, out_bias=True, mlp_bias=True)
    try:
        written = with_biases(stored, biased, case)
    except InputError as error:
        assert biased != plain and str(error).endswith(
            f"no config.json is written for a {plain.family} model with added biases: export the adapter "
            "(--format peft)"
        )
    else:
        assert read_model_config(written, case) == biased


def test_added_biases_that_no_config_json_describes_are_a_note_at_the_start_and_an_adapter(
    base_of: BaseOf, tmp_path: Path
) -> None:
    base, console = base_of("qwen3"), Console(file=StringIO(), width=1000)
    settings: dict[str, Any] = {"method": "bitfit", "add_biases": True, "max_iters": 2, "template": "R: {text}\nA:"}
    settings |= {"device": "cpu", "dtype": "float32", "kernels": "torch", "lr": 0.1, "batch_size": 8}
    data, run = data_folder(tmp_path / "data", train=16, other=4), tmp_path / "run"
    train(TrainConfig(init_from=str(base.folder), data=str(data), out_dir=str(run), **settings), console=console)
    message = "no config.json is written for a qwen3 model with added biases: export the adapter (--format peft)"
    assert isinstance(console.file, StringIO) and message in console.file.getvalue()
    with pytest.raises(InputError, match=re.escape(message)):
        export(ExportConfig(out_dir=str(run), to=str(tmp_path / "merged"), format="merged"))
    assert not (tmp_path / "merged").exists()
    assert export(ExportConfig(out_dir=str(run), to=str(tmp_path / "adapter")))["format"] == "graft"


# One case of each layout ----------------------------------------------------------------------------------------------


def with_cases(*names: str) -> list[tuple[str, str]]:
    """Each of these methods with each layout; prefixes need attention in every layer."""
    every = {case: set(shape_of(case).layers_with("q")) == set(range(shape_of(case).num_layers)) for case in LAYOUTS}
    return [(name, case) for name in names for case in LAYOUTS if name != "prefix" or every[case]]


def some_roles(config: ModelConfig) -> tuple[str, ...]:
    """Two of q, k and v, one of gate and up, and one more: other parts of fused linears than all."""
    return tuple(role for role in ("q", "v", "up", "down") if role in adaptable(config))


METHODS: dict[str, Callable[[ModelConfig], Method]] = {
    "lora of some": lambda config: LoRA(rank=2, alpha=3.3, targets=some_roles(config), layers=(1, 3), dropout=0.0),
    "lora of fused": lambda config: LoRA(rank=3, alpha=7.0, targets=("q", "k", "gate", "up"), dropout=0.0),
    "rslora": lambda config: LoRA(rank=3, alpha=7.0, targets=adaptable(config), rslora=True, dropout=0.0),
    "dora": lambda config: DoRA(rank=3, alpha=7.0, targets=adaptable(config), dropout=0.0),
    "dora of some": lambda config: DoRA(rank=3, alpha=7.0, targets=some_roles(config), dropout=0.0),
    "ia3": lambda config: IA3(targets=adaptable(config)),
    "ia3 of some": lambda config: IA3(targets=some_roles(config), layers=(1, 3)),
    "prefix": lambda config: PrefixTuning(length=4, tokens=(9, 8, 7, 6)),
}


@pytest.mark.parametrize(("name", "case"), with_cases(*METHODS))
def test_peft_reads_other_methods(name: str, case: str, base_of: BaseOf, tmp_path: Path) -> None:
    method, roles = METHODS[name](shape_of(case)), adaptable(shape_of(case))
    if isinstance(method, LoRA | IA3):
        method = replace(method, targets=tuple(role for role in method.targets if role in roles))
    check_ours_in_peft(base_of(case), method, tmp_path / "ours")


def theirs(name: str, config: ModelConfig) -> peft.PeftConfig:
    modules = modules_of(config)
    options: dict[str, Any] = {"target_modules": list(modules), "task_type": "CAUSAL_LM"}
    options["fan_in_fan_out"] = FAMILIES[config.family].transposed
    if name == "lora":
        return peft.LoraConfig(r=3, lora_alpha=7, **options)
    if name == "ia3":
        return peft.IA3Config(feedforward_modules=[m for m, roles in modules.items() if "down" in roles], **options)
    if name == "prefix":
        return peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    return peft.LoraConfig(r=3, use_dora=True, use_rslora=True, **options)


@pytest.mark.parametrize(("name", "case"), with_cases("dora", "ia3", "prefix"))
def test_other_methods_of_peft_are_the_same_here(name: str, case: str, base_of: BaseOf, tmp_path: Path) -> None:
    check_theirs_here(base_of(case), theirs(name, shape_of(case)), tmp_path)
