"""A method is a file: it is found without being listed, and what its fields are it can be told."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch

import graftlm.methods
from graftlm.config import TrainConfig
from graftlm.config.flags import MethodFlags
from graftlm.errors import InputError
from graftlm.methods import METHODS, Adapter, Full, LoRA, Method, describe, method_from_flags, method_from_json
from graftlm.methods.base import parse_layer_range, trainable
from graftlm.methods.cost_model import ParameterGroup
from graftlm.methods.ia3 import IA3
from graftlm.models import CausalLM, ModelConfig
from tiny import model_of, shape_of


@dataclass(frozen=True)
class Invented(Method):
    """Nothing at all."""

    rank: int = 2
    strength: float = 1.0
    way: Literal["plain", "other"] = "plain"
    twice: bool = False
    many: tuple[int, ...] = ()

    name: ClassVar[str] = "invented"
    default_lr: ClassVar[float] = 1e-3
    flags: ClassVar[Mapping[str, str]] = {"rank": "rank"}

    def install(self, model: CausalLM, rng: torch.Generator) -> None:
        """Do nothing."""

    def param_breakdown(self, shape: ModelConfig) -> list[ParameterGroup]:
        """None."""
        return []


@pytest.fixture
def invented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "invented", Invented)


def test_every_method_is_found_in_its_file_and_in_no_list() -> None:
    folder = Path(graftlm.methods.__file__).parent
    said = {path.stem for path in folder.glob("*.py") if "    name: ClassVar[str] = " in path.read_text()}
    assert said == set(METHODS) and list(METHODS) == sorted(METHODS)
    assert "ia3" not in (folder / "__init__.py").read_text().lower()


def test_every_flag_of_a_method_is_a_flag_and_sets_a_field() -> None:
    flags = {f.name for f in fields(MethodFlags)}
    for kind in METHODS.values():
        assert kind.flags.keys() <= flags and set(kind.flags.values()) <= {f.name for f in fields(kind)}


def test_describe_lists_every_flag_and_setting_with_its_default(invented: None) -> None:
    assert describe("invented").splitlines() == [
        "--method invented: Nothing at all.",
        "  --lr 0.001",
        "  --rank 2",
        "  --method_args strength=1.0",
        "  --method_args way=plain",
        "  --method_args twice=False",
    ]
    for name, kind in METHODS.items():
        words = describe(name).split()
        assert {f"--{flag}" for flag in kind.flags} <= set(words) and f"{kind.default_lr:g}" in words
    with pytest.raises(InputError, match="unknown --method 'lroa': did you mean 'lora'"):
        describe("lroa")


def test_settings_reach_the_fields_that_no_flag_sets(invented: None) -> None:
    config = TrainConfig(method="invented", rank=4, method_args="strength=2, way=other,twice=true")
    method = method_from_flags(config, {"method", "rank", "settings"})
    assert method == Invented(rank=4, strength=2.0, way="other", twice=True)
    assert method_from_json(method.to_json()) == method
    assert method_from_flags(TrainConfig(method="invented"), set()) == Invented()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            "strength",
            "--method_args strength: must be name=value, and --method invented: its settings are strength, way, ",
        ),
        ("rank=3", "--method_args rank=3: must be name=value"),  # it has a flag
        ("layers=3", "--method_args layers=3: must be"),
        ("many=3", "--method_args many=3: must be"),
        ("strength=much", "--method_args strength=much: not a number"),
        ("twice=maybe", "--method_args twice=maybe: not true or false"),
        ("way=third", "--method_args way=third: "),
        ("strength=nan", "--method_args strength=nan: not a finite number"),
    ],
)
def test_settings_that_cannot_be(settings: str, line: str, invented: None) -> None:
    with pytest.raises(InputError) as caught:
        method_from_flags(TrainConfig(method="invented", method_args=settings), {"method", "settings"})
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("flags", "given", "method"),
    [
        ({"method": "lora", "rank": 1, "alpha": 2.0}, "method rank alpha", LoRA(rank=1, alpha=2.0)),
        ({"targets": " q,v ,,q"}, "targets", LoRA(targets=("q", "v"))),
        ({"rank": 0}, "rank", Full()),
        ({"rank": 0, "alpha": 8.0}, "rank alpha", Full()),  # a sweep over ranks, alpha held
        ({"method": "full", "rank": 0}, "method rank", Full()),
        ({"method": "full"}, "method", Full()),
    ],
)
def test_flags_and_the_method_they_mean(flags: dict[str, Any], given: str, method: Method) -> None:
    assert method_from_flags(TrainConfig(**flags), set(given.split())) == method


@pytest.mark.parametrize(
    ("flags", "given", "line"),
    [
        ({"method": "lroa"}, "method", "unknown --method 'lroa': did you mean 'lora'?"),
        ({"method": "lora", "rank": 0}, "method rank", "--rank 0 means full fine-tuning and contradicts --method lora"),
        ({"method": "full", "rank": 4}, "method rank", "--method full takes no --rank 4: leave it out, or use "),
    ],
)
def test_flags_that_mean_no_method(flags: dict[str, Any], given: str, line: str) -> None:
    with pytest.raises(InputError) as caught:
        method_from_flags(TrainConfig(**flags), set(given.split()))
    assert str(caught.value).startswith(line)


def test_a_method_that_says_nothing_of_itself_merges_takes_no_room_and_has_one_rate(invented: None) -> None:
    method, shape = Invented(), shape_of("gpt2")
    assert method.mergeable and method.resumable_from_adapter and not method.is_full_finetune and method.positions == 0
    assert method.lr_multiplier("blocks.0.attn.q.lora_B") == 1.0 and method.layer_range(shape) == range(
        shape.num_layers
    )
    assert method.for_inference is method and method.describe_scale(model_of("gpt2"), 1.0) == ""


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_is_trained_is_kept_wide_and_the_arithmetic_is_the_bases_own(name: str, kind: str) -> None:
    model = model_of(kind, dtype=torch.bfloat16)
    small = {"lora": {"rank": 4}, "dora": {"rank": 4}, "bitfit": {"add_biases": kind == "llama"}}
    method = METHODS[name](**small.get(name, {}))
    method.install(model, torch.Generator().manual_seed(0))
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    seen: list[torch.dtype] = []
    model.blocks[0].register_forward_hook(lambda module, given, out: seen.append(out[0].dtype))
    model(torch.tensor([[1, 2, 3]]))
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize(
    ("said", "fits"),
    [
        ({"method": "lora", "rank": 2**31 - 1}, True),
        ({"method": "lora", "rank": 2**31}, False),
        ({"method": "lora", "rank": True}, False),
        ({"method": "lora", "alpha": 3}, True),
        ({"method": "lora", "alpha": 1e300}, False),
        ({"method": "lora", "layers": [0, 2]}, True),
        ({"method": "lora", "layers": [0, 1, 2]}, False),
        ({"method": "lora", "layers": "02"}, False),
        ({"method": "lora", "targets": ["q"]}, True),
        ({"method": "lora", "targets": [1]}, False),
        ({"method": "lora", "targets": "q"}, False),
        ({"method": "invented", "way": "other"}, True),
        ({"method": "invented", "way": "third"}, False),
    ],
)
def test_what_a_file_says_must_be_of_the_field_s_type(said: dict[str, Any], fits: bool, invented: None) -> None:
    if fits:
        again = json.loads(json.dumps(method_from_json(said).to_json()))
        assert {**again, **said} == again
    else:
        with pytest.raises(InputError, match="its method is not understood"):
            method_from_json(said)


@pytest.mark.parametrize(
    ("text", "span"), [("", None), (" ", None), ("1:", (1, 4)), (":2", (0, 2)), ("-1:", (3, 4)), ("2:9", (2, 4))]
)
def test_the_layers_that_a_slice_holds(text: str, span: tuple[int, int] | None) -> None:
    assert parse_layer_range(text, 4) == span


@pytest.mark.parametrize("text", ["2:2", "4:", ":0", "3:1"])
def test_a_slice_that_holds_no_layer(text: str) -> None:
    with pytest.raises(InputError, match="holds none of the model's 4 layers, 0 to 3"):
        parse_layer_range(text, 4)


@pytest.mark.parametrize("text", ["2", "a:", "1:2:3"])
def test_what_is_no_slice(text: str) -> None:
    with pytest.raises(InputError, match="is no slice such as '2:'"):
        parse_layer_range(text, 4)


@pytest.mark.parametrize("method", [Adapter(rank=3), Adapter(rank=3, layers=(1, 2)), LoRA(rank=3), IA3()])
def test_what_every_token_is_multiplied_with_is_what_the_model_holds(method: Method) -> None:
    """Matrices are; biases, and IA3's vectors, are no products."""
    model = model_of("gpt2")
    method.install(model, torch.Generator())
    held = sum(p.numel() for p in trainable(model).values() if p.dim() == 2)
    assert sum(part.weights for part in method.param_breakdown(model.config)) == held
