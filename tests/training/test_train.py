"""The loop on a tiny model: what it learns, writes and refuses; accumulation; schedules; stopping."""

import json
import math
import re
import shutil
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import save_file

from graftlm.config import TrainConfig
from graftlm.errors import GraftError, InputError, Interrupted
from graftlm.exchange.load import load
from graftlm.files.formats import load_safetensors
from graftlm.inference.scoring import score
from graftlm.text.boundary import label_ids
from graftlm.text.collate import Example, encode_rows
from graftlm.text.dataset import load_dataset
from graftlm.training import trainer as trainer_module
from graftlm.training.batches import BatchLoader
from graftlm.training.distributed import DistContext
from graftlm.training.objectives import validate
from graftlm.training.objectives.sft import SFT
from graftlm.training.setup import prepare
from graftlm.training.train import train
from graftlm.training.trainer import learning_rate
from tiny import TEMPLATE, data_folder, model_folder


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    model_folder(folder / "model")
    model_folder(folder / "gpt2", "gpt2")
    model_folder(folder / "other", seed=5)
    data_folder(folder / "data")
    data_folder(folder / "less", train=40)
    return folder


def config(assets: Path, out_dir: Path, **changes: Any) -> TrainConfig:
    plain = TrainConfig(
        init_from=str(assets / "model"),
        data=str(assets / "data"),
        out_dir=str(out_dir),
        template=TEMPLATE,
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


def rows(out_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def timeless(out_dir: Path) -> list[dict[str, Any]]:
    """The rows without what a clock or the memory says."""
    apart = {"examples_per_s", "tokens_per_s", "seconds", "peak_rss_mb"}
    return [{k: v for k, v in row.items() if k not in apart} for row in rows(out_dir)]


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_a_validation_reports_each_example_once(assets: Path, tmp_path: Path, loss_on: Any) -> None:
    run, counts = prepare(config(assets, tmp_path / "run", loss_on=loss_on)), list[int]()
    validate(run.loaded.model, run.objective, replace(run.data, progress=counts.append), run.dist)
    assert sum(counts) == len(run.data.validation)


def test_a_run_folder(assets: Path, tmp_path: Path) -> None:
    results = train(config(assets, tmp_path / "run", max_iters=60, eval_every=20))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {**run["results"], "objective": "sft", "chat": False, "documents": False, "eval_split": "test"} == results
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 61))
    keys = "step examples tokens train_loss val_loss val_accuracy lr grad_norm examples_per_s tokens_per_s peak_rss_mb"
    assert set(rows(tmp_path / "run")[0]) == {*keys.split(), "seconds"}
    assert rows(tmp_path / "run")[0]["train_loss"] > 1.5 * rows(tmp_path / "run")[-1]["train_loss"]
    assert 0 <= results["best"]["val_accuracy"] <= 1
    assert results["examples"] == 480 and results["steps"] == 60 and results["last"]["step"] == 60
    assert results["trainable_fraction"] == results["trainable"] / results["total"]
    assert results["examples_per_s"] > 0 and results["seconds_to_first_step"] > 0 and results["peak_rss_mb"] > 0
    assert results["mfu"] == pytest.approx(
        results["model_gflops_per_s"] / results["peak_gflops"], abs=0.1 / results["peak_gflops"]
    )
    losses = {row["step"]: row["val_loss"] for row in rows(tmp_path / "run") if row["val_loss"] is not None}
    assert set(losses) == {20, 40, 60} and results["best"]["val_loss"] == min(losses.values())
    best = (tmp_path / "run" / "best").resolve().name
    assert best == f"step-{results['best']['step']}" and (tmp_path / "run" / "last").resolve().name == "step-60"
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {best, "step-60"}
    assert {"python", "torch", "graftlm"} <= set(run["versions"]) and len(run["base"]["sha256"]) == 64
    assert run["config"]["warmup_steps"] == 4 and run["template"]["labels"] == ["negative", "positive"]


def test_all_linear_targets_are_recorded_by_name(assets: Path, tmp_path: Path) -> None:
    """A run on all linear layers equals one that names them, and is resumed and continued by their names."""
    for name, targets in (("all", "all-linear"), ("named", "q,k,v,o,up,gate,down")):
        train(config(assets, tmp_path / name, targets=targets))
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("all", "named")]
    assert records[0]["method"] == records[1]["method"] and "gate" in records[0]["method"]["targets"]
    assert records[0]["config"]["targets"] == records[1]["config"]["targets"]
    assert timeless(tmp_path / "all") == timeless(tmp_path / "named")


def test_every_checkpoint_is_kept_where_that_is_asked_for(assets: Path, tmp_path: Path) -> None:
    """Each loads under its name; of the optimiser's moments only the last ones stay; a resumed run adds its own."""
    out = tmp_path / "run"
    train(config(assets, out, max_iters=9, eval_every=3, keep_checkpoints=True))
    (out / "checkpoints" / ".step-10.tmp-1-ab").mkdir()  # what a killed process left
    train(TrainConfig(out_dir=str(out), resume=True, max_iters=12))
    steps = ["step-12", "step-3", "step-6", "step-9"]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == steps
    assert [p.parent.name for p in out.rglob("optimizer.safetensors") if "checkpoints" in p.parts] == ["step-12"]
    found = [load("resume", out, f"checkpoints/{step}", dtype="float32").model for step in steps]
    logits = [model(torch.tensor([[5, 6, 7]])) for model in found]
    assert all(not torch.equal(logits[0], other) for other in logits[1:])


def test_full_fine_tuning_leaves_a_folder_that_transformers_loads(assets: Path, tmp_path: Path) -> None:
    for kind in ("model", "gpt2"):
        out = tmp_path / kind
        results = train(config(assets, out, init_from=str(assets / kind), rank=0, lr=3e-3))
        assert results["trainable"] == results["total"]
        reference = transformers.AutoModelForCausalLM.from_pretrained(out / "best", dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(out / "best")
        ids = tokenizer("Review: good fun", return_tensors="pt").input_ids
        loaded = load("resume", out, "best", dtype="float32")
        assert loaded.tokenizer.encode("Review: good fun") == ids[0].tolist()
        with torch.no_grad():
            assert (loaded.model(ids) - reference(ids).logits).abs().max() <= 1e-4
            base = load(str(assets / kind), dtype="float32").model
            assert (loaded.model(ids) - base(ids)).abs().max() > 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_config_json_says_whether_the_trained_head_is_the_embedding(tied: bool, assets: Path, tmp_path: Path) -> None:
    """Readers other than transformers tie what config.json says is tied, whatever the file holds."""
    base = shutil.copytree(assets / "model", tmp_path / "base")
    tensors = load_safetensors(base / "model.safetensors")
    if not tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0)
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"]
    train(config(assets, tmp_path / "run", init_from=str(base), rank=0, max_iters=1, eval_every=1))
    written = tmp_path / "run" / "best"
    assert json.loads((written / "config.json").read_text())["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_safetensors(written / "model.safetensors")) is not tied


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_accumulated_batches_are_one_large_batch(loss_on: Any, assets: Path, tmp_path: Path) -> None:
    """Different token counts in the two parts: dividing by each part's own count would differ, also what is logged."""
    from graftlm.training.setup import prepare
    from graftlm.training.train import make_trainer

    trained = {}
    for name, accumulate in (("one", False), ("two", True)):
        prepared = prepare(config(assets, tmp_path / name, loss_on=loss_on, lora_dropout=0.0))
        trainer = make_trainer(prepared, Console(quiet=True), 0.0)
        trainer.model.train()
        batch = list(range(16))
        loss = trainer.train_step(1, [batch[:5], batch[5:]] if accumulate else [batch]).loss
        trainer.metrics.close()
        trained[name] = (loss, {n: p.detach().clone() for n, p in trainer.model.named_parameters()})
    assert abs(trained["one"][0] - trained["two"][0]) < 1e-5
    for n, p in trained["one"][1].items():
        torch.testing.assert_close(p, trained["two"][1][n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_sharing_the_prefix_can_be_switched_off(loss_on: Any, assets: Path, tmp_path: Path) -> None:
    losses = []
    for share in (True, False):
        out = tmp_path / str(share)
        changes = {"shared_prefix": share, "lora_dropout": 0.0, "loss_on": loss_on, "max_iters": 6, "eval_every": 3}
        train(config(assets, out, **changes))
        losses.append([row["train_loss"] for row in rows(out)] + [rows(out)[-1]["val_loss"]])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-4)


def test_the_seed_decides_everything(assets: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(config(assets, tmp_path / name, seed=seed, dropout=0.1))
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b") != timeless(tmp_path / "c")


def test_warm_up_never_starts_at_zero_and_the_cosine_ends_above_it() -> None:
    plan = TrainConfig(lr=1.0, warmup_steps=4, max_iters=10)
    rates = [learning_rate(step, plan) for step in range(1, 11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == [0.5 * (1 + math.cos(math.pi * n / 7)) for n in range(1, 7)]
    assert all(a > b > 0 for a, b in pairwise(rates[3:]))
    assert learning_rate(1, replace(plan, warmup_steps=0)) > 0.9


def test_the_stream_continues_where_it_is_entered() -> None:
    plan, lengths = TrainConfig(batch_size=3, seed=4), [5, 9, 2, 7, 7, 3, 8]
    examples = [Example((1,) * (n - 1), (0,), None, "", "", "") for n in lengths]
    loader = BatchLoader(examples, SFT().collate, plan, DistContext())
    whole = loader.stream(0)
    first = [next(whole) for _ in range(8)]
    entered = loader.stream(4)
    assert [next(entered) for _ in range(4)] == first[4:]
    assert sorted(i for batch in first[:3] for i in batch) == list(range(7))


def test_patience_stops_a_run_that_no_longer_gets_better(assets: Path, tmp_path: Path) -> None:
    results = train(config(assets, tmp_path / "run", lr=1e-9, max_iters=40, eval_every=2, patience=2, dtype="bfloat16"))
    assert results["steps"] < 40 and results["last"]["step"] - results["best"]["step"] == 4
    again = train(config(assets, tmp_path / "run", resume=True), given=set())
    assert again["steps"] == results["steps"]


def test_a_loss_that_is_not_a_number_names_the_step_and_the_last_good_checkpoint(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(1, 100))

    real = trainer_module.Trainer.accumulate

    def broken(self: Any, batch: Any, scale: float) -> Any:
        losses, sums = real(self, batch, scale)
        return [loss * (math.nan if next(calls) == 7 else 1.0) for loss in losses], sums

    monkeypatch.setattr(trainer_module.Trainer, "accumulate", broken)
    with pytest.raises(GraftError) as caught:
        train(config(assets, tmp_path / "run", eval_every=2))
    good = (tmp_path / "run" / "last").resolve()
    assert caught.value.exit_status == 1 and good.name == "step-6"
    assert str(caught.value).startswith(
        f"step 7: the loss is nan; the last good checkpoint is {good}; try a lower --lr"
    )
    for tensor in load_safetensors(good / "adapter_model.safetensors").values():
        assert torch.isfinite(tensor).all()


def test_weights_that_went_to_infinity_are_not_saved(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match=r"the validation loss is nan; no checkpoint was saved before"):
        train(config(assets, tmp_path / "run", lr=1e38, eval_every=1, grad_clip=0.0))
    assert not (tmp_path / "run" / "checkpoints").exists()


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "alpha": 16.0, "lora_plus_ratio": 4.0},
    "dora": {"rank": 4, "alpha": 16.0, "rslora": True},
    "bitfit": {"add_biases": True},
    "adapter": {"rank": 4, "adapter_placement": "pfeiffer"},
    "prefix": {"prefix_length": 3, "lr": 0.05},
    "prefix network": {"prefix_length": 3, "prefix_hidden": 5, "prefix_init": "a film", "lr": 0.05},
    "ia3": {"lr": 1e-2},
    "full": {"lr": 1e-3},
}


def of_method(name: str) -> dict[str, Any]:
    """The changes to `config` that make it a run of this method."""
    return {"method": name.partition(" ")[0], "rank": None, "alpha": None, **METHODS[name]}


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_saves_its_step_and_goes_on_to_the_same_end(
    method: str, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = of_method(method)
    train(config(assets, tmp_path / "whole", **changes))
    real = trainer_module.Trainer.train_step

    def interrupted(self: Any, step: int, batches: Any) -> Any:
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return real(self, step, batches)

    monkeypatch.setattr(trainer_module.Trainer, "train_step", interrupted)
    with pytest.raises(Interrupted, match=r"step 6 is saved in .*: resume with graft train --resume") as caught:
        train(config(assets, tmp_path / "parts", **changes))
    assert caught.value.exit_status == 130
    assert (tmp_path / "parts" / "last").resolve().name == "step-6"
    monkeypatch.undo()
    train(config(assets, tmp_path / "parts", resume=True, **changes))
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")
    for at in ("best", "last"):
        for file in (tmp_path / "whole" / at).glob("*.safetensors"):
            assert (tmp_path / "parts" / at / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_run_resumed_in_the_middle_of_an_epoch_reads_the_rest_of_it(
    stop: int, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 examples are seven batches, the smallest of 6, so that a step's three batches span epochs."""
    changes: dict[str, Any] = {"batch_size": 7, "grad_accum": 3, "max_iters": 6, "eval_every": 3, "dropout": 0.1}
    read: dict[str, list[list[int]]] = {"whole": [], "parts": []}
    real, name = trainer_module.Trainer.train_step, "whole"

    def stopping(self: Any, step: int, batches: list[list[int]]) -> Any:
        read[name] += batches
        if name == "parts" and step == stop and len(read["parts"]) == 3 * stop:
            signal.raise_signal(signal.SIGINT)
        return real(self, step, batches)

    monkeypatch.setattr(trainer_module.Trainer, "train_step", stopping)
    train(config(assets, tmp_path / "whole", **changes))
    name = "parts"
    with pytest.raises(Interrupted):
        train(config(assets, tmp_path / "parts", **changes))
    assert len(read["parts"]) % 7
    train(config(assets, tmp_path / "parts", resume=True, **changes))
    assert read["parts"] == read["whole"]
    assert all(sorted(i for batch in read["parts"][n : n + 7] for i in batch) == list(range(48)) for n in (0, 7))
    assert timeless(tmp_path / "parts") == timeless(tmp_path / "whole")
    for file in (tmp_path / "whole" / "last").glob("*.safetensors"):
        assert (tmp_path / "parts" / "last" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_each_method_can_be_loaded_and_measures_what_it_measured(
    method: str, assets: Path, tmp_path: Path
) -> None:
    results = train(config(assets, tmp_path / "run", **of_method(method)))
    judged = [row["val_loss"] for row in rows(tmp_path / "run") if row["val_loss"] is not None]
    assert judged[-1] == results["last"]["val_loss"] < judged[0], "it learns"
    loaded = load("resume", tmp_path / "run", "last", dtype="float32")
    assert loaded.template is not None
    data = load_dataset(str(assets / "data"))
    examples, _ = encode_rows(data.splits["validation"], loaded.template, loaded.tokenizer, loaded.model.max_seq_len)
    scores = score(loaded.model, examples, label_ids(loaded.template, loaded.tokenizer), batch_size=32)
    loss = -scores.completion.sum().item() / int(scores.completion_tokens.sum())
    assert loss == pytest.approx(results["last"]["val_loss"], rel=1e-4)
    if method != "full":
        base = load(str(assets / "model"), dtype="float32")
        together = load("resume", tmp_path / "run", "last", base=base)
        again = score(together.model, examples, label_ids(loaded.template, loaded.tokenizer), batch_size=32)
        torch.testing.assert_close(again.labels, scores.labels, rtol=0, atol=1e-4)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"method": "bitfit", "rank": None, "alpha": None}, "has no biases to train: add --add_biases"),
    ({"method": "adapter", "rank": 4}, "--method adapter takes no --alpha 16.0: leave it out, or use dora or lora"),
    ({"method": "lora", "prefix_length": 4}, "--method lora takes no --prefix_length 4: leave it out, or use prefix"),
    ({"method": "full"}, "--method full takes no --"),
    ({"method": "prefix", "rank": None, "alpha": None, "prefix_length": 999}, "--prefix_length 999: the model reads"),
    ({"method": "prefix", "rank": None, "alpha": None, "train_layers": "1:"}, "leave out --train_layers"),
    ({"method": "lorra"}, "unknown --method 'lorra'"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_flags_that_contradict_the_method_are_errors(
    changes: dict[str, Any], message: str, assets: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        train(config(assets, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_signal_that_the_caller_ignores_stays_ignored(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `nohup` and a script's background jobs have it."""
    real = trainer_module.Trainer.train_step

    def interrupted(self: Any, step: int, batches: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return real(self, step, batches)

    monkeypatch.setattr(trainer_module.Trainer, "train_step", interrupted)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert train(config(assets, tmp_path / "run"))["steps"] == 12
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_resumed_run_may_be_longer_and_says_so(assets: Path, tmp_path: Path) -> None:
    train(config(assets, tmp_path / "run"))
    results = train(config(assets, tmp_path / "run", resume=True, max_iters=20), given={"resume", "max_iters"})
    assert results["steps"] == 20 and [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 21))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["resume_history"] == [{"max_iters": [12, 20]}]


CHANGED = [
    ({"rank": 8}, "--resume with --rank 8: the run has 4"),
    ({"init_from": "other"}, "was trained on "),
    ({"data": "less"}, "was trained on other data"),
    ({"lr": 1.0}, "--resume with --lr 1.0: the run has 0.01"),
]


@pytest.mark.parametrize(("change", "message"), CHANGED)
def test_resuming_with_a_changed_flag_is_an_error(
    change: dict[str, Any], message: str, assets: Path, tmp_path: Path
) -> None:
    train(config(assets, tmp_path / "run", max_iters=2, eval_every=1))
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    change = {k: str(assets / v) if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(InputError) as caught:
        train(config(assets, tmp_path / "run", resume=True, max_iters=2, eval_every=1, **change))
    assert message in str(caught.value)
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*")) == before


def test_resuming_on_changed_files_is_an_error(assets: Path, tmp_path: Path) -> None:
    import shutil

    base, data = tmp_path / "base", tmp_path / "data"
    shutil.copytree(assets / "model", base)
    shutil.copytree(assets / "data", data)
    plan = config(assets, tmp_path / "run", max_iters=2, eval_every=1, init_from=str(base), data=str(data))
    train(plan)
    resume = replace(plan, resume=True)
    shutil.copyfile(assets / "other" / "model.safetensors", base / "model.safetensors")
    with pytest.raises(InputError, match=r"was trained on .* with weights [0-9a-f]{12}, but .* holds [0-9a-f]{12}"):
        train(resume)
    with pytest.raises(InputError, match="use the base it was trained on"):
        load("resume", tmp_path / "run")
    shutil.copyfile(assets / "model" / "model.safetensors", base / "model.safetensors")
    shutil.copyfile(assets / "less" / "train.jsonl", data / "train.jsonl")
    with pytest.raises(InputError, match="was trained on other data"):
        train(resume)


def test_a_folder_that_holds_something_is_left_alone(assets: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"):
        train(config(assets, tmp_path))
    with pytest.raises(InputError, match="holds no run"):
        train(config(assets, tmp_path, resume=True))
    train(config(assets, tmp_path / "run", max_iters=1))
    with pytest.raises(InputError, match="holds a run already; add --resume"):
        train(config(assets, tmp_path / "run"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "thesis.txt"]


def test_prompt_and_completion_data_has_a_loss_and_no_accuracy(assets: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"say {i}: ", "completion": "x" * (1 + i % 3)}) + "\n" for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    results = train(config(assets, tmp_path / "run", data=str(tmp_path / "pairs.jsonl")))
    note = "--template not used: only texts with labels are put into a template"
    assert note in json.loads((tmp_path / "run" / "run.json").read_text())["notes"]
    assert results["last"]["val_accuracy"] is None and results["last"]["val_loss"] > 0
