"""Closed forms against the model itself and against the figures that are published."""

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from family_cases import CASES, config_of
from graftlm.errors import InputError
from graftlm.files.assets import model_folder
from graftlm.files.formats import read_json
from graftlm.methods import METHODS, Adapter, BitFit, DoRA, Full, LoRA, Method, PrefixTuning
from graftlm.methods.base import count_parameters, trainable
from graftlm.methods.cost_model import (
    Passes,
    block_parameters,
    ffn_adapters,
    ffn_biases,
    ffn_flops,
    ffn_parts,
    format_formula,
    forward_flops,
    layer_weights,
    linear_size,
    memory_of_each,
    model_flops,
    model_parts,
    parameters,
    sent_by_each,
    total,
    training_flops,
)
from graftlm.methods.ia3 import IA3
from graftlm.models import CausalLM, ModelConfig
from graftlm.models.config import read_model_config
from graftlm.models.presets import SHAPES
from tiny import FAMILIES, model_of, shape_of


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_layers_matrices_are_those_of_the_model(kind: str) -> None:
    model = model_of(kind)
    assert layer_weights(model.config) == sum(p.numel() for p in model.blocks[0].parameters() if p.dim() == 2)
    assert block_parameters(model.config) == sum(p.numel() for p in model.blocks[0].parameters())
    assert parameters(model.config) == sum(p.numel() for p in model.parameters())


def test_smollm2_needs_12_4_gflop_for_a_review() -> None:
    """47 tokens of which 19 are shared by 16: 29.2 tokens, 4 operations for each of 106 million weights."""
    path = model_folder("smollm2-135m") / "config.json"
    shape = read_model_config(read_json(path), str(path))
    batch = 16 * (47 - 19) + 19
    assert 30 * layer_weights(shape) == 106_168_320
    every = model_flops(shape, batch, LoRA().passes(shape))
    assert every / 16 / 1e9 == pytest.approx(12.4, abs=0.05)
    assert model_flops(shape, batch, Full().passes(shape)) == 1.5 * every
    upper = model_flops(shape, batch, LoRA(layers=(20, 30)).passes(shape, cached=20))
    assert upper * 3 == every  # 10 of 30 layers
    assert model_flops(shape, batch, LoRA(layers=(20, 30)).passes(shape)) == 2 * upper  # and 20 forward only
    assert model_flops(shape, batch, Full(layers=(20, 25)).passes(shape)) == 2 * upper + every // 60 * 5


def test_the_shapes_with_a_short_name_are_those_of_their_files() -> None:
    from transformers import GPT2Config

    path = model_folder("smollm2-135m") / "config.json"
    assert SHAPES["smollm2-135m"] == read_model_config(read_json(path), str(path))
    assert SHAPES["gpt2"] == read_model_config(GPT2Config().to_dict(), "transformers' defaults")
    published = {
        "gpt2": 124_439_808,
        "gpt2-medium": 354_823_168,
        "gpt2-large": 774_030_080,
        "gpt2-xl": 1_557_611_200,
        "distilgpt2": 81_912_576,
        "smollm2-135m": 134_515_008,
        "meta-llama/Llama-2-7b-hf": 6_738_415_616,
        "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    }
    assert {name: parameters(shape) for name, shape in SHAPES.items()} == published


# Any shape, any method ------------------------------------------------------------------------------------------------


def random_shape(family: str, rng: random.Random) -> ModelConfig:
    """GPT-2; Llama; Llama with every bias (attention_bias, mlp_bias); Qwen2 with those of q, k and v."""
    gpt2, kv, group, head = family == "gpt2", rng.randint(1, 3), rng.randint(1, 3), 2 * rng.randint(1, 5)
    every = gpt2 or family == "llama-biased"
    heads = kv if gpt2 else kv * group
    return ModelConfig(
        family="gpt2" if gpt2 else "llama",
        num_layers=rng.randint(1, 4),
        num_heads=heads,
        num_kv_heads=kv,
        hidden_size=heads * head if gpt2 else rng.randint(8, 40),
        head_dim=head,
        intermediate_size=rng.randint(8, 60),
        vocab_size=rng.randint(5, 90),
        max_positions=rng.randint(8, 64),
        norm_eps=1e-5,
        tie_embeddings=rng.random() < 0.5,
        qkv_bias=every or family == "qwen",
        out_bias=every,
        mlp_bias=every,
    )


def random_span(shape: ModelConfig, rng: random.Random) -> tuple[int, int] | None:
    first = rng.randrange(shape.num_layers)
    return None if rng.random() < 0.4 else (first, rng.randint(first + 1, shape.num_layers))


def some_targets(shape: ModelConfig, rng: random.Random) -> tuple[str, ...]:
    return tuple(rng.sample(shape.roles, rng.randint(1, len(shape.roles))))


def a_rank(shape: ModelConfig, rng: random.Random) -> int:
    return rng.randint(1, min(linear_size(shape, role)[0] for role in shape.roles))


MAKERS: dict[str, Callable[[ModelConfig, random.Random], Method]] = {
    "lora": lambda s, r: LoRA(rank=a_rank(s, r), targets=some_targets(s, r), layers=random_span(s, r)),
    "dora": lambda s, r: DoRA(rank=a_rank(s, r), targets=some_targets(s, r), layers=random_span(s, r)),
    "bitfit": lambda s, r: BitFit(add_biases=not s.qkv_bias or r.random() < 0.5, layers=random_span(s, r)),
    "adapter": lambda s, r: Adapter(
        rank=r.randint(1, 9), placement=r.choice(("houlsby", "pfeiffer")), layers=random_span(s, r)
    ),
    "prefix": lambda s, r: PrefixTuning(
        length=r.randint(1, s.max_positions - 1), hidden=r.choice((0, r.randint(1, 9)))
    ),
    "ia3": lambda s, r: IA3(targets=some_targets(s, r), layers=random_span(s, r)),
    "full": lambda s, r: Full(layers=random_span(s, r)),
}


def module_of_parameter(name: str) -> str:
    """blocks.0.attn.q.lora_A -> q; blocks.0.norm1.weight -> norms; before.past -> prefix."""
    first, *rest = name.split(".")
    if first == "blocks":
        return "norms" if rest[1].startswith("norm") else rest[2]
    return {"embed": "embedding", "norm": "norms", "before": "prefix"}.get(first, first)


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-biased", "qwen"])
@pytest.mark.parametrize("name", MAKERS)
def test_closed_forms_count_what_is_installed(name: str, family: str) -> None:
    """Of 25 random shapes and settings each: all parameters and the trained ones, in each module, and the formulas."""
    rng = random.Random(f"{name} {family}")
    for _ in range(25):
        shape = random_shape(family, rng)
        method = MAKERS[name](shape, rng)
        with torch.device("meta"):
            model = CausalLM(shape)
            assert Counter({p.module: p.count for p in model_parts(shape)}) == counted(dict(model.named_parameters()))
            method.install(model, torch.Generator())
        parts = method.param_breakdown(shape)
        whole = [*model_parts(method.adapted_config(shape)), *(part for part in parts if part.added)]
        assert (method.count(shape), total(whole)) == count_parameters(model), (shape, method)
        for some, found in ((parts, trainable(model)), (whole, dict(model.named_parameters()))):
            sums: Counter[str] = Counter()
            for part in some:
                sums[part.module] += part.count
                assert value(part.formula) == part.count, part
            assert sums == counted(found), (shape, method)
        matrices = {n: p for n, p in trainable(model).items() if n.endswith(("lora_A", "lora_B", "_up", "_down"))}
        assert sum(part.weights for part in parts) == sum(p.numel() for p in matrices.values())


def counted(named: dict[str, torch.nn.Parameter]) -> Counter[str]:
    sums: Counter[str] = Counter()
    for name, p in named.items():
        sums[module_of_parameter(name)] += p.numel()
    return sums


def value(formula: str) -> int:
    """What the numbers of a formula come to."""
    numbers = formula.partition(" = ")[2].replace(",", "").replace("×", "*")
    assert re.fullmatch(r"[\d ()+*-]+", numbers), formula
    return int(eval(numbers))


def test_a_formula_is_spelled_in_letters_and_in_numbers() -> None:
    letters = {"L": 24, "r": 4, "in": 1024, "out": 1024}
    assert format_formula("L r (in + out)", **letters) == "L r (in + out) = 24 × 4 × (1,024 + 1,024)"
    assert format_formula("2 d (2 L + 1)", L=3, d=8) == "2 d (2 L + 1) = 2 × 8 × (2 × 3 + 1)"


def test_training_flops_are_model_flops_plus_head_and_attention() -> None:
    shape = SHAPES["gpt2-medium"]
    for first in (0, 20):
        passes = Passes(forward=24, backward=24 - first)
        lines = training_flops(shape, 0, 100, 0, passes)
        assert lines["layers"].count == model_flops(shape, 1, passes)
        assert lines["head"].count == 4 * 50257 * 1024
    every = training_flops(shape, 0, 100, 0, Full().passes(shape))
    assert every["layers"].count == model_flops(shape, 1, Passes(24, 24, 24)) == 3 * model_flops(shape, 1, Passes(24))
    assert every["head"].count == 6 * 50257 * 1024
    # Scores and values: each two operations for 16 x 64 numbers and 50.5 keys on average; twice that backward.
    assert every["attention"].count == 3 * 24 * 2 * 2 * 1024 * 50.5
    # A prefix of 7 is met by all; no gradient goes below block 20; a method's weights: forward, x's and their own.
    some = training_flops(shape, 11, 100, 7, Passes(forward=24, backward=4))
    assert some["attention"].count == (24 + 2 * 4) * 2 * 2 * 1024 * (50.5 + 7) and some["method"].count == 66


def test_what_reading_a_text_costs() -> None:
    lines = forward_flops(SHAPES["gpt2-medium"], 11, 100, 7)
    assert {name: line.count for name, line in lines.items()} == {
        "layers": 2 * 24 * 12 * 1024**2,
        "method": 22,
        "attention": 24 * 2 * 2 * 1024 * (50.5 + 7),
        "head": 2 * 50257 * 1024,
    }


BLOCK, OUTSIDE = 3 * 32 * 48 + 2 * 32 * 32 + 2 * 32 * 16 + 2 * 32, 61 * 32 + 32
"""Parameters of the tiny Llama: gate, up, down; q and o; k and v; two norms. Embedding and last norm."""


@pytest.mark.parametrize(
    ("sharding", "world_size", "bytes_"),
    [
        ("none", 4, (2 * (2 * BLOCK + OUTSIDE - 100), 400, 400, 800)),
        ("frozen", 4, ((2 * BLOCK + OUTSIDE - 100) // 2, 400, 400, 800, 2 * 2 * BLOCK + 2 * OUTSIDE)),
        ("full", 3, (11582, 134, 134, 267, 2 * 2 * BLOCK + 4 * OUTSIDE)),
    ],
)
def test_memory_of_each_rank(sharding: str, world_size: int, bytes_: tuple[int, ...]) -> None:
    shape = shape_of("llama")
    everything = 2 * BLOCK + OUTSIDE
    assert parameters(shape) == everything == 17472
    lines = memory_of_each(shape, 100, everything, 2, world_size, sharding)
    assert tuple(line.count for line in lines.values()) == bytes_
    assert [*lines][:4] == ["frozen", "trained", "gradients", "optimizer_state"]


@pytest.mark.parametrize(
    ("sharding", "bytes_"),
    [
        ("none", {"gradients": 600}),
        ("frozen", {"weights": (2 * 2 * 2 * BLOCK + 2 * OUTSIDE) * 3 // 4, "gradients": 600}),
        ("full", {"weights": (2 * 2 * 2 * BLOCK + 4 * OUTSIDE) * 3 // 4, "gradients": 300}),
    ],
)
def test_bytes_sent_by_each_rank(sharding: str, bytes_: dict[str, int]) -> None:
    lines = sent_by_each(shape_of("llama"), 100, 2, 4, sharding)
    assert {name: line.count for name, line in lines.items()} == bytes_


def test_a_feed_forward_net() -> None:
    found = [(part.description, part.count) for part in ffn_parts([3, 5, 2])]
    assert found == [("layer 1, weights and biases", 20), ("layer 2, weights and biases", 12)]
    assert [(part.description, part.count) for part in ffn_biases([3, 5, 2])] == [
        ("layer 1, biases", 5),
        ("layer 2, biases", 2),
    ]
    assert [(part.count, part.weights, part.added) for part in ffn_adapters([3, 5, 2], 4)] == [
        (49, 40, True),
        (22, 16, True),
    ]
    # 25 weights, 15 of them behind the input, which needs no gradient; a method of 11 more.
    for passes, training in ((2, 2 * (2 * 25 - 15)), (3, 2 * (3 * 25 - 15))):
        work = ffn_flops([3, 5, 2], 11, passes)
        assert [line.count for line in work["forward"].values()] == [50, 22]
        assert [line.count for line in work["training"].values()] == [training, 66]


def test_a_method_that_cannot_be_installed_is_refused_without_memory_too() -> None:
    shape = replace(SHAPES["smollm2-135m"], num_layers=2)
    for method in (LoRA(rank=577), LoRA(targets=("w",)), BitFit(), PrefixTuning(length=8192)):
        with torch.device("meta"), pytest.raises(InputError):
            method.install(CausalLM(shape), torch.Generator())


def test_attention_counts_the_keys_that_windows_let_a_query_see() -> None:
    """Of 9 tokens with a window of 4 the queries see 1 + 2 + 3 + 6 times 4 keys; without, 45."""
    full = replace(shape_of("llama"), num_heads=4, head_dim=8, num_layers=3)
    local = replace(full.layers[0], window=4)
    for layers, seen in (((local,), 3 * 30), ((local, full.layers[0], local), 30 + 45 + 30), ((full.layers[0],), 135)):
        flops = forward_flops(replace(full, layers=layers), 0, 9, 0)["attention"].count
        assert flops == pytest.approx(4 * 4 * 8 * seen / 9, rel=0.1)  # the mean number of keys is rounded down
    wide = replace(full, layers=(replace(local, window=9),))
    assert forward_flops(wide, 0, 9, 2) == forward_flops(full, 0, 9, 2)


FIRST_CASES = {read_model_config(config_of(case).to_dict(), case).family: case for case in reversed(CASES)}
LACK = {"gpt_oss": {"adapter"}, "qwen3_moe": {"adapter"}, "lfm2": {"adapter", "bitfit", "prefix"}}
"""Methods that a family's layers do not take."""


@pytest.mark.parametrize("family", FIRST_CASES)
def test_the_counts_of_each_family_are_the_closed_forms(family: str) -> None:
    config = read_model_config(config_of(FIRST_CASES[family]).to_dict(), family)
    for name, cls in METHODS.items():
        method = cls(**cls.examples[""])
        if isinstance(method, LoRA | IA3):
            method = replace(method, targets=config.roles)
        with torch.device("meta"):
            model = CausalLM(config)
            assert parameters(config) == count_parameters(model)[1]
            if name in LACK.get(family, ()):
                with pytest.raises(InputError, match="use --method lora"):
                    method.install(model, torch.Generator())
                continue
            method.install(model, torch.Generator())
        trained, every = count_parameters(model)
        assert trained == method.count(config) == method.count(model.config), name
        added = sum(group.count for group in method.param_breakdown(config) if group.added)
        assert every == parameters(method.adapted_config(config)) + added, name
