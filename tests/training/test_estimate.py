"""A plan predicts, and changes nothing: the bytes it says are kept are those that are, and a run's bits stay."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from conftest import Graft
from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.exchange import load
from graftlm.exchange.huggingface import load_model, random_weights_model
from graftlm.files.formats import load_safetensors
from graftlm.inference.scoring import score
from graftlm.models import CausalLM
from graftlm.models.config import to_file
from graftlm.text.collate import Example
from graftlm.training import estimate as estimate_module
from graftlm.training import setup
from graftlm.training import train as train_module
from graftlm.training.estimate import Estimate, MemoryProbe, Probe, _shortened, make_plan
from graftlm.training.reporting import PeakTensorBytes, saved_activation_bytes
from graftlm.training.setup import prepare
from graftlm.training.train import train
from tiny import TEMPLATE, byte_tokenizer, config_json, data_folder, model_folder, random_model, shape_of


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    model_folder(folder / "model", layers=6)
    data_folder(folder / "data")
    return folder


def config(assets: Path, out_dir: Path, **changes: Any) -> TrainConfig:
    plain = TrainConfig(
        init_from=str(assets / "model"),
        data=str(assets / "data"),
        out_dir=str(out_dir),
        template=TEMPLATE,
        rank=4,
        alpha=16.0,
        max_iters=6,
        eval_every=3,
        batch_size=8,
        dtype="float32",
        device="cpu",
    )
    return replace(plain, **changes)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"rank": 0, "alpha": None},
    {"loss_on": "all", "shared_prefix": False},
    {"train_layers": "4:", "activation_cache_gb": 0.0},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_memory_of_a_step_is_foreseen(changes: dict[str, Any], assets: Path, tmp_path: Path) -> None:
    prepared = prepare(config(assets, tmp_path / "run", **changes))
    model = prepared.loaded.model.train()
    (batch, *_) = prepared.loader.microbatches(next(prepared.loader.stream(0)))
    first = prepared.method.layer_range(model.config).start
    foreseen = Probe(model, prepared.objective, first, 1).step_mb(batch)
    with PeakTensorBytes(model) as tensors:
        prepared.objective.loss(model, batch)[0].backward()
    assert foreseen == pytest.approx(tensors.peak / 1e6, rel=0.02)
    if not changes.get("train_layers"):  # more than what autograd saves
        model.zero_grad(set_to_none=True)
        with saved_activation_bytes(model) as saved:
            loss, _ = prepared.objective.loss(model, batch)
            assert loss.requires_grad
            assert saved() / 1e6 < foreseen < 3 * saved() / 1e6 + 1


def test_created_tensors_count_while_they_live() -> None:
    model = nn.Linear(1000, 1000, bias=False)
    with PeakTensorBytes(model) as tensors:
        x = torch.ones(2000, 1000)  # 8 MB
        y = torch.relu(model(x))  # two of 8 MB, and with the second the first is not needed any more
        assert tensors.alive == 16e6 and tensors.peak == 24e6
        y.sum().backward()  # a gradient of 8 MB, then one of 4
        assert tensors.alive == pytest.approx(20e6, rel=0.01) and tensors.peak == pytest.approx(28e6, rel=0.01)
        del x, y
        assert tensors.alive == 4e6


# Long rows ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 16,384 positions; short reviews, and a long one in either split."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "model").mkdir()
    shape = shape_of("llama", byte_tokenizer(folder / "model"), context=16384, layers=6)
    model = random_model(replace(shape, hidden_size=128, head_dim=32, intermediate_size=512), dtype=torch.float32)
    (folder / "model/config.json").write_text(json.dumps(config_json(model.config, "llama")))
    tensors = to_file(model.config, dict(model.named_parameters()))
    save_file({n: t.detach().clone() for n, t in tensors.items()}, folder / "model/model.safetensors", {"format": "pt"})
    for name, where in (("train", "train"), ("valid", "validation")):
        data_folder(folder / name)
        with (folder / name / f"{where}.jsonl").open("a") as file:
            file.write(json.dumps({"text": "so long " * 1500, "label": 1}) + "\n")
    return folder


def probes(assets: Path, data: str, out_dir: Path, **changes: Any) -> MemoryProbe:
    run = prepare(config(assets, out_dir, data=str(assets / data), max_length=None, **changes))
    return MemoryProbe(run, Probe(run.loaded.model.train(), run.objective, 0, 1))


@pytest.mark.parametrize("changes", [{"loss_on": "all"}, {"rank": 0, "alpha": None}], ids=str)
def test_the_memory_of_a_long_row_is_foreseen_from_short_pieces(
    changes: dict[str, Any], long_assets: Path, tmp_path: Path
) -> None:
    memory = probes(long_assets, "train", tmp_path / "run", **changes)
    (row,) = memory.largest_microbatch()
    assert 3000 < row.length < 16384
    seen: list[int] = []

    def measure(rows: Sequence[Example]) -> float:
        seen.extend(row.length for row in rows)
        return memory.train_mb(rows)

    (piece,) = memory.largest_microbatch(4096)
    foreseen = memory.megabytes(measure, [piece])
    assert max(seen) <= 2048 < 4000 < piece.length
    (batch,) = replace(memory.run.loader, examples=[piece]).microbatches([0])
    assert foreseen == pytest.approx(memory.probe.step_mb(batch), rel=0.03)


def test_the_longest_row_of_either_split_is_refused_before_the_first_step(
    long_assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"train": ("training", "train.jsonl:49"), "valid": ("validating", "validation.jsonl:13")}
    for data, (what, row) in rows.items():
        values = config(long_assets, tmp_path / data, data=str(long_assets / data), max_length=None)
        monkeypatch.setattr(estimate_module, "free_mb", lambda device: 60.0)
        expected = rf"{row}: not enough memory: {what} a row of 12,\d\d\d tokens "
        with pytest.raises(InputError, match=expected) as error:
            train(values)
        fits = int(str(error.value).partition("--max_length ")[2].split()[0])
        assert "\n" not in str(error.value) and not (tmp_path / data).exists()
        done = train(replace(values, max_length=fits, max_iters=1))
        assert done["steps"] == 1


@pytest.mark.parametrize("limit", [0, 8192, 40])
def test_passes_without_gradient_keep_to_a_number_of_tokens(
    limit: int, long_assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = config(long_assets, tmp_path / "run", microbatch_tokens=limit, max_length=600)
    run = prepare(replace(values, data=str(long_assets / "valid")))
    most, sizes = min(4096, 8 * limit or 4096), []
    whole = CausalLM.hidden_states

    def counted(self: CausalLM, ids: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        sizes.append(tuple(ids.shape))
        return whole(self, ids, *args, **options)

    monkeypatch.setattr(CausalLM, "hidden_states", counted)
    run.objective.evaluate(run.loaded.model, run.data, {})
    assert sizes and all(rows == 1 or rows * tokens <= most for rows, tokens in sizes)
    assert max(rows for rows, _ in sizes) > 1


def test_all_scores_of_attention_are_never_held_for_a_long_row(long_assets: Path, tmp_path: Path) -> None:
    memory = probes(long_assets, "valid", tmp_path / "run")
    examples = sorted(memory.run.data.validation, key=lambda e: -e.length)[:2]
    assert examples[0].prompt_ids[:8] == examples[1].prompt_ids[:8]  # what they share would be computed apart
    with PeakTensorBytes(memory.run.loaded.model) as tensors:
        long = score(memory.run.loaded.model, [_shortened(examples[0], 4000), examples[1]]).completion
    assert tensors.peak < 8 * 4000 * 4000  # twice the causal mask; four heads' scores in float32 are four times it
    alone = score(memory.run.loaded.model, [_shortened(examples[0], 4000)], shared=0).completion
    torch.testing.assert_close(long[:1], alone, rtol=1e-5, atol=1e-4)


def test_free_memory_obeys_a_limit_of_the_process() -> None:
    code = (
        "import resource, torch; from graftlm.files.memory import free_mb\n"
        "before = free_mb(torch.device('cpu'))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (20 * 10**9, -1))\n"
        "print(0 < free_mb(torch.device('cpu')) <= min(before, 20e3))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_it_leaves_no_trace(changes: dict[str, Any], assets: Path, tmp_path: Path) -> None:
    prepared = prepare(config(assets, tmp_path / "run", **changes))
    model = prepared.loaded.model.eval()
    torch.manual_seed(4)
    before, weights = torch.get_rng_state(), {n: p.clone() for n, p in model.named_parameters()}
    plan = make_plan(prepared, 1.0, repeats=1)
    assert torch.equal(torch.get_rng_state(), before) and not model.training and len(model.blocks) == 6
    assert all(p.grad is None and torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert plan.steps == 6 and plan.examples == 48 and plan.model_tflop > 0
    assert plan.train_seconds > 0 and plan.minutes * 60 >= plan.train_seconds + 1 - 0.1
    assert plan.peak_rss_mb > 50


@pytest.mark.parametrize("changes", [{"batch_size": 5}, {"batch_size": 20, "max_iters": 4, "grad_accum": 2}])
def test_it_counts_the_examples_of_smaller_batches(changes: dict[str, Any], assets: Path, tmp_path: Path) -> None:
    results = train(config(assets, tmp_path / "run", **{"max_iters": 12, **changes}))
    plan = json.loads((tmp_path / "run" / "run.json").read_text())["plan"]
    steps = results["steps"] * changes.get("grad_accum", 1)
    assert plan["examples"] == results["examples"] < steps * changes["batch_size"]


def test_a_run_has_the_same_bits_without(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = train(config(assets, tmp_path / "with"))
    run = json.loads((tmp_path / "with" / "run.json").read_text())
    for key, name in (("examples_per_s", "examples_per_s"), ("peak_rss_mb", "peak_rss_mb")):
        assert results["plan"][key]["predicted"] == pytest.approx(run["plan"][name], abs=0.001)
        assert results["plan"][key]["ratio"] == pytest.approx(
            results["plan"][key]["measured"] / run["plan"][name], rel=0.01, abs=0.001
        )
    nothing = Estimate(6, 48, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    monkeypatch.setattr(train_module, "make_plan", lambda *a, **k: nothing)
    train(config(assets, tmp_path / "without"))
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (tmp_path / "with/last" / name).read_bytes() == (tmp_path / "without/last" / name).read_bytes()


def forget_weights(folder: Path) -> None:
    """Make all weights NaN, behind a header that stays as it is."""
    content = (folder / "model.safetensors").read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    (folder / "model.safetensors").write_bytes(content[:data] + b"\xff" * (len(content) - data))


STARTS: list[dict[str, Any]] = [
    *VARIANTS,
    {"method": "dora"},
    {"method": "prefix", "rank": None, "alpha": None, "prefix_length": 2},
    {"init_from": "run"},
]


@pytest.mark.parametrize("changes", STARTS, ids=str)
def test_the_flag_reads_no_weights_and_counts_the_same(
    changes: dict[str, Any], assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(tmp_path / "model", layers=6)
    values = replace(config(assets, tmp_path / "run"), init_from=str(folder))
    if "init_from" in changes:
        train(replace(values, max_iters=1, out_dir=str(tmp_path / "first")))
        changes = {"init_from": str(tmp_path / "first")}
    values = replace(values, **changes)

    def counted(plan: bool) -> tuple[Any, ...]:
        run = prepare(replace(values, plan=plan))
        model = run.loaded.model.train()
        tensors = [(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()]
        probe = Probe(model, run.objective, run.method.layer_range(model.config).start, 1)
        largest, foreseen = MemoryProbe(run, probe).checked_mb(), make_plan(run, 0.0, repeats=1)
        assert all(p.isfinite().all() for p in model.parameters())
        return tensors, foreseen.steps, foreseen.examples, foreseen.model_tflop, largest

    read = counted(plan=False)
    forget_weights(folder)
    for module in (setup, load):
        monkeypatch.setattr(module, "base_hash", lambda _: pytest.fail("weights are hashed"))
    assert counted(plan=True) == read


def test_a_head_that_is_not_the_embedding_is_seen_by_its_first_rows(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    stored = load_safetensors(folder / "model.safetensors")
    embedding = stored["model.embed_tokens.weight"]
    for head, tied in ((embedding.clone(), True), (embedding + 1, False)):
        save_file({**stored, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
        made = random_weights_model(folder, torch.device("cpu"), torch.bfloat16)
        assert made.config.tie_embeddings == tied
        read = load_model(folder, torch.device("cpu"), torch.bfloat16)
        assert [(n, p.shape, p.dtype) for n, p in made.named_parameters()] == [
            (n, p.shape, p.dtype) for n, p in read.named_parameters()
        ]


@pytest.mark.parametrize(("change", "what"), [("missing", "is missing"), ("shape", "gives shape")])
def test_the_header_is_checked_without_the_weights(change: str, what: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    stored = load_safetensors(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    taken = stored.pop(name)
    save_file(stored if change == "missing" else {**stored, name: taken[1:].contiguous()}, folder / "model.safetensors")
    with pytest.raises(InputError, match=what):
        random_weights_model(folder, torch.device("cpu"), torch.float32)


def test_the_flag_says_what_a_run_would_take_and_writes_nothing(assets: Path, tmp_path: Path, graft: Graft) -> None:
    words = ["train", "--plan", "--init_from", str(assets / "model"), "--data", str(assets / "data")]
    words += ["--template", TEMPLATE, "--out_dir", str(tmp_path / "run"), "--device", "cpu"]
    words += ["--rank", "4", "--max_iters", "5"]
    done = graft(*words, "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["steps"] == 5 and plan["examples_per_s"] > 0 and not (tmp_path / "run").exists()
    assert plan["trainable_fraction"] == plan["trainable"] / plan["total"] > 0
    shown = graft(*words)
    assert shown.returncode == 0 and "model FLOPs" in shown.stdout and "peak memory" in shown.stdout
