"""PEFT's folders and ours, both ways, against PEFT itself: what is trained there loads here, and the other way round.

In float64 to 1e-9. transformers computes Llama's norms in float32 whatever the model is in, so the reference gets them
in float64 here; all else in it is as it comes.
"""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from graftlm.errors import InputError
from graftlm.exchange.huggingface import apply_adapter, from_foreign_peft, load_model, read_adapter, save_adapter
from graftlm.files import assets
from graftlm.files.formats import load_safetensors, save_safetensors
from graftlm.methods import DoRA, LoRA, Method, PrefixTuning
from graftlm.methods.base import mergeable_linears, trainable
from graftlm.methods.ia3 import IA3
from graftlm.methods.peft_format import matches
from graftlm.models import CausalLM
from graftlm.models.config import to_file
from tiny import FAMILIES, model_folder

pytestmark = [
    # PEFT reads an attribute that the newest transformers has renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
CPU = torch.device("cpu")
IDS = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """What PEFT creates, it creates in the default dtype; and one thread is faster for models so small."""
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: model_folder(folder / kind, kind) for kind in FAMILIES}


class ExactNorm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def reference(folder: Path) -> nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ExactNorm(module))
    return model


def three_steps(parameters: list[nn.Parameter], logits: Callable[[], Tensor]) -> None:
    """From weights that are surely not zero, three steps of AdamW."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.empty_like(p).normal_(std=0.1, generator=rng))
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(logits()[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimizer.step()


def near(got: Tensor, expected: Tensor, plain: Tensor) -> None:
    assert got.dtype == expected.dtype == torch.float64
    assert (expected - plain).abs().max() > 0.1, "an adapter that does nothing proves nothing"
    assert (got - expected).abs().max() <= 1e-9


# Trained by PEFT ------------------------------------------------------------------------------------------------------


def lora(kind: str, *targets: str, target: str = "all-linear", **more: Any) -> peft.PeftConfig:
    values = {"r": 3, "lora_alpha": 7, "fan_in_fan_out": kind == "gpt2", "task_type": "CAUSAL_LM", **more}
    return peft.LoraConfig(target_modules=list(targets) or target, **values)


def ia3(kind: str, *targets: str, **more: Any) -> peft.PeftConfig:
    """By default what the paper targets."""
    down = {"gpt2": "mlp.c_proj", "neox": "dense_4h_to_h"}.get(kind, "down_proj")
    usual = {"gpt2": ("c_attn", down), "neox": ("query_key_value", down)}.get(kind, ("k_proj", "v_proj", down))
    values: dict[str, Any] = {"target_modules": list(targets or usual), "feedforward_modules": [down]}
    return peft.IA3Config(fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM", **{**values, **more})


def prefix(**more: Any) -> peft.PeftConfig:
    return peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM", **more)


QKV = {
    "gpt2": ("c_attn",),
    "llama": ("q_proj", "k_proj", "v_proj"),
    "llama-biased": ("q_proj", "k_proj", "v_proj"),
    "neox": ("query_key_value",),
}
OTHERS = {
    "gpt2": ("c_attn", "mlp.c_proj"),
    "llama": ("q_proj", "v_proj"),
    "llama-biased": ("q_proj", "v_proj"),
    "neox": ("query_key_value", "dense_4h_to_h"),
}
THEIRS: dict[str, Callable[[str], peft.PeftConfig]] = {
    "q,k,v": lambda kind: lora(kind, *QKV[kind]),
    "some": lambda kind: lora(kind, *OTHERS[kind]),
    "all linears": lambda kind: lora(kind),
    "an expression": lambda kind: lora(kind, target=r".*\.(c_attn|query_key_value|[qv]_proj)"),
    "all but one": lambda kind: lora(kind, exclude_modules=["c_fc", "up_proj", "dense_h_to_4h"]),
    "one layer": lambda kind: lora(kind, *QKV[kind], layers_to_transform=[1]),
    "rslora": lambda kind: lora(kind, *QKV[kind], use_rslora=True),
    "equal patterns": lambda kind: lora(kind, *QKV[kind], rank_pattern={".*": 2}, alpha_pattern={".*": 5}),
    "gaussian start": lambda kind: lora(kind, *QKV[kind], init_lora_weights="gaussian"),
    "dora": lambda kind: lora(kind, *QKV[kind], use_dora=True),
    "dora all linears": lambda kind: lora(kind, use_dora=True, use_rslora=True),
    "ia3": lambda kind: ia3(kind),
    "ia3 by expressions": lambda kind: ia3(
        kind, target_modules=r".*\.0\..*(c_attn|query_key_value|[kq]_proj)", feedforward_modules=r".*\.nothing"
    ),
    "ia3 of outputs": lambda kind: ia3(kind, *QKV[kind], feedforward_modules=[]),
    "prefix": lambda kind: prefix(),
    "prefix with its network": lambda kind: prefix(prefix_projection=True, encoder_hidden_size=9),
}


def trained_there(base: Path, config: peft.PeftConfig, folder: Path) -> tuple[Tensor, Tensor]:
    """Logits with and without the adapter that is left in `folder`."""
    plain_model = reference(base)
    with torch.no_grad():
        plain = plain_model(IDS).logits
    model = peft.get_peft_model(plain_model, config)
    three_steps([p for p in model.parameters() if p.requires_grad], lambda: model(IDS).logits)
    model.eval().save_pretrained(folder)
    with torch.no_grad():
        return model(IDS).logits, plain


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", THEIRS)
def test_what_peft_trained_is_the_same_here(kind: str, name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    expected, plain = trained_there(bases[kind], THEIRS[name](kind), tmp_path / "theirs")
    model = load_model(bases[kind], CPU, torch.float64)
    method, state = from_foreign_peft(tmp_path / "theirs", model.config)
    apply_adapter(model, method, state, "theirs")
    for merged in (False, True):
        for linear in mergeable_linears(model) if merged else ():
            linear.merge()
        with torch.no_grad():
            near(model(IDS), expected, plain)
    # And written again it is the same adapter, of the same size, for PEFT too.
    (tmp_path / "again").mkdir()
    save_adapter(tmp_path / "again", model, method, str(bases[kind]))
    was, now = (load_safetensors(tmp_path / f / "adapter_model.safetensors") for f in ("theirs", "again"))
    assert now.keys() == was.keys() and all(torch.equal(now[key], was[key]) for key in was)
    with torch.no_grad():
        near(read_by_peft(bases[kind], tmp_path / "again"), expected, plain)


# Trained here ---------------------------------------------------------------------------------------------------------

ALL = dict.fromkeys(("gpt2", "neox"), ("q", "k", "v", "o", "up", "down"))
OURS: dict[str, Callable[[str], Method]] = {
    "q,k,v": lambda kind: LoRA(rank=3, alpha=7.0, dropout=0.0),
    "q,v": lambda kind: LoRA(rank=3, alpha=5.0, targets=("q", "v"), dropout=0.0),
    "k": lambda kind: LoRA(rank=3, alpha=7.0, targets=("k",), dropout=0.0),
    "k,v,o": lambda kind: LoRA(rank=3, alpha=3.3, targets=("v", "k", "o"), dropout=0.0),
    "down,up": lambda kind: LoRA(rank=3, alpha=7.0, targets=("down", "up"), dropout=0.0),
    "all linears": lambda kind: LoRA(
        rank=3, alpha=0.7, targets=ALL.get(kind, ("q", "k", "v", "o", "gate", "up", "down")), dropout=0.0
    ),
    "upper layer": lambda kind: LoRA(rank=3, alpha=7.0, dropout=0.0, layers=(1, 2)),
    "lower layer": lambda kind: LoRA(rank=3, alpha=7.0, targets=("q", "v"), dropout=0.0, layers=(0, 1)),
    "rslora": lambda kind: LoRA(rank=3, alpha=7.0, rslora=True, dropout=0.0),
    "rslora with others": lambda kind: LoRA(rank=3, alpha=7.0, rslora=True, targets=("q", "v", "o"), dropout=0.0),
    "dora": lambda kind: DoRA(rank=3, alpha=7.0, dropout=0.0),
    "dora q,v": lambda kind: DoRA(rank=4, alpha=7.0, targets=("q", "v"), dropout=0.0),
    "dora with others": lambda kind: DoRA(rank=3, alpha=7.0, targets=("q", "k", "v", "down"), dropout=0.0),
    "ia3": lambda kind: IA3(),
    "ia3 all linears": lambda kind: IA3(targets=ALL.get(kind, ("q", "k", "v", "o", "gate", "up", "down"))),
    "ia3 q upper": lambda kind: IA3(targets=("q", "down"), layers=(1, 2)),
    "prefix": lambda kind: PrefixTuning(length=4, init="random"),
    "prefix of tokens": lambda kind: PrefixTuning(length=4, tokens=(9, 8, 7, 6)),
    "prefix with its network": lambda kind: PrefixTuning(length=4, init="random", hidden=9),
}


def trained_here(base: Path, method: Method, folder: Path) -> CausalLM:
    model = load_model(base, CPU, torch.float64)
    method.install(model, torch.Generator().manual_seed(2))
    model.train()
    three_steps(list(trainable(model).values()), lambda: model(IDS))
    folder.mkdir()
    assert save_adapter(folder, model, method, str(base)) == "peft"
    return model


def read_by_peft(base: Path, folder: Path) -> Tensor:
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(reference(base), folder).eval()(IDS).logits


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", OURS)
def test_what_is_trained_here_is_the_same_in_peft(kind: str, name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    method = OURS[name](kind)
    model = trained_here(bases[kind], method, tmp_path / "ours")
    with torch.no_grad():
        plain = reference(bases[kind])(IDS).logits
        expected = read_by_peft(bases[kind], tmp_path / "ours")
        near(model(IDS), expected, plain)
        near(model.eval()(IDS), expected, plain)
    # Read as a folder of unknown origin it is the same method, but for what only training needs.
    fresh = load_model(bases[kind], CPU, torch.float64)
    found, state = from_foreign_peft(tmp_path / "ours", fresh.config)
    apply_adapter(fresh, found, state, "ours")
    with torch.no_grad():
        near(fresh(IDS), expected, plain)
    # PEFT's q, k and v in one linear have lengths for k, too, and so have we then.
    if kind not in ("gpt2", "neox") or name != "dora q,v":
        assert found.count(fresh.config) == method.for_inference.count(fresh.config)
    if isinstance(method, LoRA) and isinstance(found, LoRA):
        assert found.alpha == pytest.approx(method.alpha, rel=1e-12) and found.layers == method.layers


def test_round_trips_of_a_fused_dora_do_not_grow(bases: dict[str, Path], tmp_path: Path) -> None:
    """q and v alone cannot be said in PEFT, which has lengths for k too: one trip adds k, and no further one adds."""
    trained_here(bases["gpt2"], DoRA(rank=4, alpha=7.0, targets=("q", "v"), dropout=0.0), tmp_path / "0")
    sizes = []
    for trip in range(3):
        model = load_model(bases["gpt2"], CPU, torch.float64)
        method, state = from_foreign_peft(tmp_path / str(trip), model.config)
        apply_adapter(model, method, state, "")
        folder = tmp_path / str(trip + 1)
        folder.mkdir()
        save_adapter(folder, model, method, "base")
        sizes.append(json.loads((folder / "adapter_config.json").read_text())["r"])
    assert sizes == [12, 12, 12]


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("peft_type", "IA3"),
        ("r", 4),
        ("lora_alpha", 8.0),
        ("target_modules", ["c_proj"]),
        ("layers_to_transform", [0]),
        ("use_rslora", True),
        ("use_dora", True),
    ],
)
def test_a_folder_of_other_settings_than_the_runs_is_refused(
    key: str, other: object, bases: dict[str, Path], tmp_path: Path
) -> None:
    trained_here(bases["gpt2"], LoRA(rank=3, alpha=7.0), tmp_path / "x")
    file = tmp_path / "x" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config[key] != other
    file.write_text(json.dumps(config | {key: other}))
    shape = load_model(bases["gpt2"], CPU, torch.float64).config
    with pytest.raises(InputError, match=rf"{key} is .*, the run says "):
        read_adapter(tmp_path / "x", shape, LoRA(rank=3, alpha=7.0))
    file.write_text(json.dumps(config))
    assert read_adapter(tmp_path / "x", shape, LoRA(rank=3, alpha=7.0))


MIXED = [
    LoRA(rank=3, alpha=7.0, targets=("q", "k", "v", "o"), dropout=0.0),
    LoRA(rank=4, alpha=0.7, targets=("q", "v", "up", "down"), dropout=0.0),
    LoRA(rank=3, alpha=7.0, targets=("k", "down"), dropout=0.0),
]


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
@pytest.mark.parametrize("method", MIXED, ids=lambda method: "".join(method.targets))
def test_lora_alpha_and_the_ranks_of_the_tensors_give_the_strength(
    kind: str, method: LoRA, bases: dict[str, Path], tmp_path: Path
) -> None:
    """As llama.cpp's converter reads a folder: alpha / (rank of the tensor) for each module, and no pattern."""
    model = load_model(bases[kind], CPU, torch.float32)
    method.install(model, torch.Generator().manual_seed(2))
    with torch.no_grad():
        for p in trainable(model).values():
            p.normal_(generator=torch.Generator().manual_seed(3))
    folder = tmp_path / "0"
    folder.mkdir()
    save_adapter(folder, model, method, "base")
    state = {name: p.detach() for name, p in trainable(model).items()}
    again = read_adapter(folder, model.config, method)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)

    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_safetensors(folder / "adapter_model.safetensors")
    assert not config["alpha_pattern"]
    base = load_safetensors(bases[kind] / "model.safetensors")
    merged = copy.deepcopy(model)
    for linear in mergeable_linears(merged):
        linear.merge()
    expected = to_file(model.config, dict(merged.named_parameters()))
    for name in (name for name in tensors if "lora_A" in name):
        update = config["lora_alpha"] / len(tensors[name]) * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        weight = name.removeprefix("base_model.model.").replace("lora_A.", "")
        theirs = base[weight] + (update.T if kind == "gpt2" else update)
        assert (theirs - base[weight]).abs().max() > 0.1 and torch.allclose(expected[weight], theirs, atol=1e-4)

    ranks = []
    for trip in range(3):  # nothing grows or drifts
        found, read = from_foreign_peft(tmp_path / str(trip), model.config)
        fresh = apply_adapter(load_model(bases[kind], CPU, torch.float32), found, read, "")
        (tmp_path / str(trip + 1)).mkdir()
        save_adapter(tmp_path / str(trip + 1), fresh, found, "base")
        written = load_safetensors(tmp_path / str(trip + 1) / "adapter_model.safetensors")
        ranks.append(sorted({len(t) for name, t in written.items() if "lora_A" in name}))
        assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    assert ranks[0] == ranks[1] == ranks[2]


def test_the_alpha_pattern_of_folders_written_before_is_read(bases: dict[str, Path], tmp_path: Path) -> None:
    method = LoRA(rank=3, alpha=7.0, targets=("q", "k", "v", "o"), dropout=0.0)
    trained_here(bases["gpt2"], method, tmp_path / "x")
    config = json.loads((tmp_path / "x/adapter_config.json").read_text())
    tensors = load_safetensors(tmp_path / "x/adapter_model.safetensors")
    shape = load_model(bases["gpt2"], CPU, torch.float64).config
    expected = read_adapter(tmp_path / "x", shape, method)
    for name in [name for name in tensors if "c_attn" in name]:
        tensors[name] = (tensors[name][:9] if "lora_A" in name else tensors[name][:, :9] / 4).contiguous()
    config |= {"rank_pattern": {"attn.c_attn": 9}, "alpha_pattern": {"attn.c_attn": 21.0}}
    (tmp_path / "x/adapter_config.json").write_text(json.dumps(config))
    save_safetensors(tmp_path / "x/adapter_model.safetensors", tensors)
    for read in (read_adapter(tmp_path / "x", shape, method), from_foreign_peft(tmp_path / "x", shape)[1]):
        assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in expected)


def test_one_pair_for_q_k_and_v_is_written_once_and_read_back(bases: dict[str, Path], tmp_path: Path) -> None:
    """As PEFT trains c_attn: one A for all three, whose rows are no blocks of one part each."""
    trained_there(bases["gpt2"], lora("gpt2", "c_attn"), tmp_path / "theirs")
    model = load_model(bases["gpt2"], CPU, torch.float64)
    method, state = from_foreign_peft(tmp_path / "theirs", model.config)
    apply_adapter(model, method, state, "theirs")
    (tmp_path / "ours").mkdir()
    save_adapter(tmp_path / "ours", model, method, "base")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["r"] == 3
    again = read_adapter(tmp_path / "ours", model.config, method)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


def test_b_that_reaches_into_the_next_block_has_no_blocks(bases: dict[str, Path], tmp_path: Path) -> None:
    """Of rank 3 one column each for q, k and v would do; here q's rows use k's column, too."""
    trained_there(bases["gpt2"], lora("gpt2", "c_attn"), tmp_path / "x")
    file, shape = tmp_path / "x" / "adapter_model.safetensors", load_model(bases["gpt2"], CPU, torch.float64).config
    tensors = load_safetensors(file)
    for name, b in tensors.items():
        if "lora_B" in name:
            q, k, v = b.split(shape.hidden_size)
            q[:, 2], k[:, [0, 2]], v[:, [0, 1]] = 0, 0, 0
    save_safetensors(file, tensors)
    method, _ = from_foreign_peft(tmp_path / "x", shape)
    assert isinstance(method, LoRA) and method.rank == 3
    for name, b in tensors.items():
        if "lora_B" in name:
            b[: shape.hidden_size, 1] = 0
    save_safetensors(file, tensors)
    method, _ = from_foreign_peft(tmp_path / "x", shape)
    assert isinstance(method, LoRA) and method.rank == 1


def test_a_folder_that_says_nothing_of_dropout_has_none_of_it(bases: dict[str, Path], tmp_path: Path) -> None:
    trained_here(bases["llama"], LoRA(rank=3, alpha=7.0), tmp_path / "x")
    file = tmp_path / "x" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config.pop("lora_dropout") == 0.05
    file.write_text(json.dumps(config))
    method, _ = from_foreign_peft(tmp_path / "x", load_model(bases["llama"], CPU, torch.float64).config)
    assert isinstance(method, LoRA) and method.dropout == 0.0


def test_a_folder_without_r_and_lora_alpha_has_pefts_defaults(bases: dict[str, Path], tmp_path: Path) -> None:
    trained_here(bases["llama"], LoRA(rank=8, alpha=8.0), tmp_path / "x")
    file = tmp_path / "x" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert (config.pop("r"), config.pop("lora_alpha")) == (8, 8)
    file.write_text(json.dumps(config))
    method, _ = from_foreign_peft(tmp_path / "x", load_model(bases["llama"], CPU, torch.float64).config)
    theirs = peft.PeftConfig.from_pretrained(str(tmp_path / "x"))
    assert isinstance(method, LoRA) and isinstance(theirs, peft.LoraConfig)
    assert (method.rank, method.alpha) == (theirs.r, theirs.lora_alpha) == (8, 8)


def test_a_pattern_may_repeat_five_times_and_no_more() -> None:
    """Of what is refused because it could take for ever."""
    assert matches("a*b*c*d*e*", "abcde", "x") and not matches("a*b*c*d*e*", "f", "x")
    with pytest.raises(InputError, match="more than 5 times"):
        matches("a*b*c*d*e*f*", "abcdef", "x")


def test_ia3_says_of_itself_what_peft_says(bases: dict[str, Path], tmp_path: Path) -> None:
    """Once over through PEFT: each field that it keeps has the value it was given."""
    trained_here(bases["gpt2"], IA3(), tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(reference(bases["gpt2"]), tmp_path / "ours")
    read.save_pretrained(tmp_path / "again")
    ours, again = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "again"))
    assert ours["init_ia3_weights"] is True
    for key in ours.keys() - {"peft_version"}:
        same = sorted if isinstance(ours[key], list) else lambda value: value
        assert same(again[key]) == same(ours[key]), key


def test_a_part_of_a_fused_ia3_that_the_run_does_not_target_is_an_error(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT, going on from our k and v, trains the vector of q too, which stands in the same tensor."""
    trained_here(bases["gpt2"], IA3(targets=("q", "k", "v", "down")), tmp_path / "more")
    shape = load_model(bases["gpt2"], CPU, torch.float64).config
    with pytest.raises(InputError, match=r"h\.0\.attn\.c_attn\.ia3_l scales outputs that the run does not target"):
        read_adapter(tmp_path / "more", shape, IA3())


def test_the_files_hold_what_the_format_says(bases: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(bases["gpt2"], CPU, torch.float64)
    method = LoRA(rank=3, alpha=7.0)
    method.install(model, torch.Generator())
    save_adapter(tmp_path, model, method, "some/base", "abc")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 9,
        "lora_alpha": 21.0,
        "target_modules": ["attn.c_attn"],
        "fan_in_fan_out": True,
        "bias": "none",
        "lora_dropout": 0.05,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "base_model_name_or_path": "some/base",
        "revision": "abc",
    }
    assert {key: config[key] for key in expected} == expected
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
        key = "base_model.model.transformer.h.1.attn.c_attn.lora_"
        assert f.get_tensor(f"{key}A.weight").shape == (9, 32) and f.get_tensor(f"{key}B.weight").shape == (96, 9)


# Real weights ---------------------------------------------------------------------------------------------------------


REAL = torch.tensor([[1, 506, 2966, 436, 253, 1195, 28, 284, 2642, 314, 4384, 30]])
REAL_THEIRS: dict[str, Callable[[], peft.PeftConfig]] = {
    "all linears": lambda: lora("llama"),
    "ia3": lambda: ia3("llama"),
}
REAL_OURS: dict[str, Method] = {
    "dora, rslora": DoRA(rank=3, alpha=7.0, rslora=True, dropout=0.0),
    "prefix": PrefixTuning(length=5, tokens=tuple(REAL[0, :5].tolist())),
}
"""Each method one way: what differs with real weights is the rounding, not the way."""


def train_really(parameters: list[nn.Parameter], logits: Callable[[], Tensor]) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(logits()[:, :-1].flatten(0, 1), REAL[:, 1:].flatten()).backward()
        optimizer.step()


def real_reference() -> tuple[nn.Module, CausalLM, Tensor, float]:
    """SmolLM2 there and here, its logits, and how far the two lie apart before anything is adapted."""
    torch.set_default_dtype(torch.float32)
    folder = assets.model_folder("smollm2-135m")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_model(folder, CPU, torch.float32)
    with torch.no_grad():
        plain = theirs(REAL).logits
        return theirs, ours, plain, (ours(REAL) - plain).abs().max().item()


def really_near(got: Tensor, expected: Tensor, plain: Tensor, apart: float) -> None:
    """Thirty layers of float32 round the base itself by `apart`; an adapter may add 1e-4."""
    assert apart <= 3e-4 and (expected - plain).abs().max() > 0.1
    assert (got - expected).abs().max() <= 1e-4 + apart


@pytest.mark.parametrize("name", REAL_THEIRS)
def test_real_weights_trained_by_peft(name: str, tmp_path: Path) -> None:
    base, ours, plain, apart = real_reference()
    theirs = peft.get_peft_model(base, REAL_THEIRS[name]())
    train_really([p for p in theirs.parameters() if p.requires_grad], lambda: theirs(REAL).logits)
    theirs.eval().save_pretrained(tmp_path)
    method, state = from_foreign_peft(tmp_path, ours.config)
    apply_adapter(ours, method, state, "theirs")
    with torch.no_grad():
        really_near(ours(REAL), theirs(REAL).logits, plain, apart)


@pytest.mark.parametrize("name", REAL_OURS)
def test_real_weights_trained_by_us(name: str, tmp_path: Path) -> None:
    base, ours, plain, apart = real_reference()
    method = REAL_OURS[name]
    method.install(ours, torch.Generator().manual_seed(1))
    train_really(list(trainable(ours.train()).values()), lambda: ours(REAL))
    save_adapter(tmp_path, ours, method, "smollm2-135m")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        really_near(ours(REAL), theirs(REAL).logits, plain, apart)


# Refused --------------------------------------------------------------------------------------------------------------

LORA_CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("modules_to_save", {"modules_to_save": ["lm_head"]}),
    ("bias", {"bias": "all"}),
    ("bias", {"bias": "lora_only"}),
    ("layer_replication", {"layer_replication": [[0, 2], [1, 2]]}),
    ("target_parameters", {"target_parameters": ["mlp.down_proj.weight"]}),
    ("lora_bias", {"lora_bias": True}),
    ("trainable_token_indices", {"trainable_token_indices": [1, 2]}),
    ("init_lora_weights", {"init_lora_weights": "pissa"}),
    ("init_lora_weights", {"init_lora_weights": "pissa_niter_4"}),
    ("init_lora_weights", {"init_lora_weights": "olora"}),
    ("use_qalora", {"use_qalora": True}),
    ("megatron_config", {"megatron_config": {"a": 1}}),
    ("alora_invocation_tokens", {"alora_invocation_tokens": [3]}),
    ("invented", {"invented": None}),
    ("rank_pattern", {"rank_pattern": {"q_proj": 2}}),
    ("rank_pattern", {"rank_pattern": ["q_proj"]}),
    ("alpha_pattern", {"alpha_pattern": {"q_proj": 2}}),
    ("layers_to_transform", {"layers_to_transform": [0, 7]}),
    ("layers_to_transform", {"layers_to_transform": "all"}),
    ("layers_pattern", {"layers_to_transform": [0], "layers_pattern": "h"}),
    ("target_modules", {"target_modules": ["q_proj", "lm_head"]}),
    ("target_modules", {"target_modules": None}),
    ("target_modules", {"target_modules": "lm_head"}),
    ("layers_to_transform = .* must be a list", {"layers_to_transform": [True]}),
    ("layers_to_transform = .* layers are 0 to 1", {"layers_to_transform": [2]}),
    ("regular expression", {"target_modules": "(q_proj"}),
    ("r =", {"r": 0}),
    ("r =", {"r": 2.5}),
    ("lora_alpha", {"lora_alpha": "7"}),
    ("lora_dropout", {"lora_dropout": 1.5}),
    ("peft_type", {"peft_type": "VERA"}),
    ("lora_magnitude_vector is missing", {"use_dora": True}),
    ("has shape", {"r": 4}),
    ("k_proj.lora_A.weight is missing", {"target_modules": ["q_proj", "k_proj", "v_proj"]}),
    ("v_proj.lora_A.weight belongs to no target", {"target_modules": ["q_proj"]}),
]
PREFIX_CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("invented", {"invented": 1}),
    ("modules_to_save", {"modules_to_save": ["lm_head"]}),
    ("num_virtual_tokens", {"num_virtual_tokens": 0}),
    ("prompt_embeddings", {"num_virtual_tokens": 6}),
    ("num_layers", {"num_layers": 3}),
    ("token_dim", {"token_dim": 32}),
    ("num_transformer_submodules", {"num_transformer_submodules": 2}),
]

IA3_CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("invented", {"invented": 1}),
    ("modules_to_save", {"modules_to_save": ["lm_head"]}),
    ("feedforward_modules", {"feedforward_modules": None}),
    ("feedforward_modules", {"feedforward_modules": [3]}),
    ("feedforward_modules", {"feedforward_modules": []}),
    ("feedforward_modules", {"feedforward_modules": ["down_proj", "v_proj"]}),
    ("regular expression", {"feedforward_modules": "(down"}),
    ("unevenly", {"target_modules": ["k_proj", "layers.0.mlp.down_proj"]}),
    ("target_modules", {"target_modules": ["lm_head"]}),
    ("q_proj.ia3_l is missing", {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"]}),
    ("v_proj.ia3_l belongs to no target", {"target_modules": ["k_proj", "down_proj"]}),
]
CHANGED: dict[str, Method] = {
    "lora": LoRA(rank=3, alpha=7.0, targets=("q", "v")),
    "prefix": PrefixTuning(length=5, init="random"),
    "ia3": IA3(),
}


@pytest.mark.parametrize(
    ("method", "field", "change"),
    [("lora", *rest) for rest in LORA_CHANGES]
    + [("prefix", *rest) for rest in PREFIX_CHANGES]
    + [("ia3", *rest) for rest in IA3_CHANGES],
)
def test_a_field_that_is_not_understood_is_named(
    method: str, field: str, change: dict[str, Any], bases: dict[str, Path], tmp_path: Path
) -> None:
    trained_here(bases["llama"], CHANGED[method], tmp_path / "ours")
    file = tmp_path / "ours" / "adapter_config.json"
    shape = load_model(bases["llama"], CPU, torch.float64).config
    from_foreign_peft(file.parent, shape)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=rf"adapter_config\.json: .*{field}") as caught:
        from_foreign_peft(file.parent, shape)
    assert "\n" not in str(caught.value)


def test_a_model_without_such_an_adapter_layout_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    trained_here(bases["gpt2"], LoRA(rank=3, alpha=7.0), tmp_path / "ours")
    with pytest.raises(InputError, match=r"target_modules names 'attn\.c_attn', which is none of mlp\.down_proj, "):
        from_foreign_peft(tmp_path / "ours", load_model(bases["llama"], CPU, torch.float64).config)
