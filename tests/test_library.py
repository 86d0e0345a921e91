"""The library as a user calls it: keywords are flags, rows are read as a file, a text is one text, a mistake a line."""

import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import date
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import datasets
import numpy as np
import pandas
import pyarrow
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import graftlm
from graftlm.config import EvaluateConfig, ReportConfig, TrainConfig
from graftlm.errors import InputError
from graftlm.files.in_memory import rows_file
from graftlm.inference.sampling import SamplingParams
from graftlm.methods import LoRA
from tiny import TEMPLATE, fresh_home, model_folder

WORDS = (("bad", "dull", "weak"), ("good", "fun", "fine"))
ROWS = [{"text": f"{WORDS[i % 2][i % 3]} {'x' * (i % 7)}{i}", "label": i % 2} for i in range(60)]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of its own, with the kernels that are compiled already."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFT_HOME", fresh_home(folder))
        yield folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "llama")


def settings(model: Path, **changes: Any) -> dict[str, Any]:
    """Of a short run; keys are keywords of `train`."""
    flags = {"init_from": model, "template": TEMPLATE, "rank": 4, "alpha": 16, "lr": 1e-2, "max_iters": 4}
    return {**flags, "batch_size": 8, "dtype": "float32", "device": "cpu", **changes}


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a DataFrame."""
    out_dir = tmp_path_factory.mktemp("runs") / "run"
    result = graftlm.train(**settings(model), data=pandas.DataFrame(ROWS), out_dir=out_dir)
    assert result.steps == result["steps"] == 4 and result.out_dir == str(out_dir)
    return out_dir


# Keywords -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"lr": 1}, 1.0),
        ({"rank": np.int64(3)}, 3),
        ({"alpha": np.float32(0.5)}, 0.5),
        ({"out_dir": Path("a") / "b"}, str(Path("a") / "b")),
        ({"targets": ["q", "v"]}, "q,v"),
        ({"labels": ("bad", "good")}, "bad,good"),
        ({"labels": {1: "bad", 5: "good"}}, "1=bad,5=good"),
        ({"columns": {"text": "review"}}, "text=review"),
    ],
)
def test_a_value_is_taken_as_python_has_it(given: dict[str, Any], read: object) -> None:
    ((name, _),) = given.items()
    value = getattr(TrainConfig(**given), name)
    assert value == read and type(value) is type(read)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"rank": "16"}, "--rank '16': not a whole number"),
        ({"rank": True}, "--rank True: not a whole number"),
        ({"resume": 1}, "--resume 1: not true or false"),
        ({"lora_dropout": None}, "--lora_dropout None: not a number"),
        ({"out_dir": 3}, "--out_dir 3: not a text"),
        ({"dtype": "float8"}, "--dtype 'float8': not one of auto, float32, bfloat16, float16"),
        ({"data": [{}]}, "--data [{}]: not a text: rows are passed to graftlm.train, a config names a file"),
    ],
)
def test_a_value_of_another_type_is_one_line(given: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError) as error:
        TrainConfig(**given)
    assert str(error.value) == line


def test_one_text_where_several_may_be_is_one() -> None:
    for folders in ("runs/a", Path("runs/a"), ["runs/a"]):
        assert ReportConfig(folders=cast("Any", folders)).folders == ("runs/a",)
    assert SamplingParams(stop=cast("Any", "end")).stop == ("end",)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: graftlm.train(ranks=4), "graftlm.train: no keyword 'ranks': did you mean rank. keywords are flags"),
        (lambda: graftlm.train(clip=1), "graftlm.train: no keyword 'clip': it is now grad_clip"),
        (lambda: graftlm.report(cast("Any", EvaluateConfig())), "is no ReportConfig"),
        (lambda: graftlm.report(), r"graftlm.report needs folders=…"),
        (lambda: graftlm.evaluate("a", out_dir="b"), "'a': is the out_dir, which is given twice"),
        (lambda: graftlm.evaluate("a", data=3), "data: 3: pass a path, a list of dicts, or a DataFrame"),
        (lambda: graftlm.evaluate("a", metrics=[lambda p, t: 1]), "'<lambda>' is no name"),
        (lambda: graftlm.evaluate("a", metrics={"accuracy": len}), "'accuracy' is measured already"),
        (lambda: graftlm.export("a"), "--to: name the folder"),
    ],
)
def test_a_wrong_call_is_one_line(call: Callable[[], object], line: str) -> None:
    with pytest.raises(InputError, match=line) as error:
        call()
    assert "\n" not in str(error.value)


def test_help_and_completion_list_the_flags() -> None:
    parameters = inspect.signature(graftlm.train).parameters
    assert [*parameters][:2] == ["config", "callbacks"] and {f.name for f in fields(TrainConfig)} < {*parameters}
    assert parameters["val_limit"].default == 512


# Rows -----------------------------------------------------------------------------------------------------------------


def test_equal_rows_are_one_file_of_any_object(home: Path) -> None:
    frame = pandas.DataFrame(ROWS)
    files = {
        rows_file("data", rows)
        for rows in (
            ROWS,
            tuple(ROWS),
            iter(ROWS),
            frame,
            frame.to_dict("list"),
            pyarrow.Table.from_pylist(ROWS),
            datasets.Dataset.from_list(ROWS),
            SimpleNamespace(to_dicts=lambda: ROWS),  # as polars has it
        )
    }
    (file,) = files
    assert file.parent == home / "rows"
    assert [json.loads(line) for line in file.read_text().splitlines()] == ROWS


def test_values_that_json_does_not_have() -> None:
    frame = pandas.DataFrame(
        {
            "text": ["a", None],
            "n": [1.0, np.nan],
            "day": [date(2026, 1, 2), pandas.NaT],
            "vector": [np.array([1, 2]), pandas.NA],
        }
    )
    lines = rows_file("data", frame).read_text().splitlines()
    assert json.loads(lines[0]) == {"text": "a", "n": 1.0, "day": "2026-01-02", "vector": [1, 2]}
    assert json.loads(lines[1]) == {"text": None, "n": None, "day": None, "vector": None}


def test_texts_conversations_splits_and_class_names() -> None:
    assert rows_file("data", ["one", "two"]).read_text() == '{"text": "one"}\n{"text": "two"}\n'
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert json.loads(rows_file("data", [said]).read_text()) == {"messages": said}
    folder = rows_file("data", {"train": ROWS[:4], "test": pandas.DataFrame(ROWS[4:6])})
    assert sorted(file.name for file in folder.iterdir()) == ["test.jsonl", "train.jsonl"]
    label = datasets.ClassLabel(names=["no", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    assert rows_file("data", datasets.Dataset.from_list(ROWS[:2], features=features)).read_text().count('"yes"') == 1


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([], "data: no rows"),
        ([1], r"data\[0\]: 1 is no row: write a dict"),
        ({"text": "a"}, "data: a dict of 'text'"),
        ({"a": [1], "b": [1, 2]}, "columns of one length"),
        ([{"text": b"x"}], r"data\[0\]: text is b'x', of type bytes"),
        ([{"x": float("inf")}], r"data\[0\]: x is inf"),
        ([__file__], "data: a list of files"),
    ],
)
def test_what_is_no_rows_is_one_line(rows: object, line: str) -> None:
    with pytest.raises(InputError, match=line):
        rows_file("data", rows)


def test_an_error_in_a_row_names_the_row(model: Path, tmp_path: Path) -> None:
    rows = [*ROWS[:7], {"text": "", "label": 1}]
    with pytest.raises(InputError, match=r"^data\[7\]: empty text.*1 of 8 rows is bad"):
        graftlm.train(**settings(model), data=rows, out_dir=tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


def test_the_record_says_what_the_rows_were(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    (rows,) = record["data"]["from_python"].values()
    assert rows["rows"] == 60 and len(rows["sha256"]) == 64
    assert record["data"]["name"].startswith("rows ")


def test_rows_train_as_a_file_of_them(run: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    graftlm.train(**settings(model), data=tmp_path / "rows.jsonl", out_dir=tmp_path / "run", console=QUIET)
    for name in ("adapter_model.safetensors",):
        assert (tmp_path / "run" / "last" / name).read_bytes() == (run / "last" / name).read_bytes()


def test_a_run_is_resumed_with_its_rows_or_without_passing_them_and_not_with_others(
    run: Path, home: Path, model: Path, tmp_path: Path
) -> None:
    out_dir = tmp_path / "run"
    graftlm.train(**settings(model, max_iters=2), data=ROWS, out_dir=out_dir, console=QUIET)
    with pytest.raises(InputError, match="was trained on other data"):
        graftlm.train(resume=True, out_dir=out_dir, data=ROWS[:50], max_iters=3, console=QUIET)
    assert graftlm.train(resume=True, out_dir=out_dir, max_iters=3, console=QUIET).steps == 3
    for file in (home / "rows").glob("*.jsonl"):
        file.unlink()
    with pytest.raises(InputError, match="rows from Python that are no longer in this cache: pass them again"):
        graftlm.train(resume=True, out_dir=out_dir, max_iters=4, console=QUIET)
    assert graftlm.train(resume=True, out_dir=out_dir, data=ROWS, max_iters=4, console=QUIET).steps == 4


# Evaluate, generate and the rest --------------------------------------------------------------------------------------


def test_evaluating_rows_by_name_or_by_a_loaded_model(run: Path) -> None:
    def right(predicted: np.ndarray, true: np.ndarray) -> int:
        return int((predicted == true).sum())

    by_name = graftlm.evaluate(run, data=ROWS[:10], metrics=right, console=QUIET)
    loaded = graftlm.load(str(run))
    by_model = graftlm.evaluate(loaded, data=pandas.DataFrame(ROWS[:10]), metrics={"right": right}, console=QUIET)
    assert by_name.n == 10 and by_name.right == by_name.accuracy * 10
    assert by_name["generate"]["right"] == by_name["generate"]["accuracy"] * 10
    assert by_model.confusion == by_name.confusion
    with pytest.raises(InputError, match="out_dir: the model is loaded already"):
        graftlm.evaluate(loaded, out_dir=run)


def test_a_metric_that_is_no_number_is_one_line(run: Path) -> None:
    with pytest.raises(InputError, match=r"metrics: pair returned \(1, 2\): a metric is a number"):
        graftlm.evaluate(run, data=ROWS[:10], metrics={"pair": lambda p, t: (1, 2)}, console=QUIET)


def test_a_single_text_is_one_text(run: Path) -> None:
    loaded = graftlm.load(str(run))
    assert loaded.template is not None
    alone = graftlm.predict_labels(loaded.model, loaded.tokenizer, "A joy.", loaded.template, mode="score")
    assert alone == graftlm.predict_labels(loaded.model, loaded.tokenizer, ["A joy."], loaded.template, mode="score")
    (text,) = graftlm.generate(loaded, "A joy.", max_new_tokens=4)
    assert [text] == graftlm.generate(loaded.model, loaded.tokenizer, "A joy.", max_new_tokens=4)
    assert [text] == graftlm.generate(run, prompt="A joy.", max_new_tokens=4, console=QUIET).texts
    assert loaded.tokenizer.encode_batch("joy") == [loaded.tokenizer.encode("joy")]
    for texts in (3, [3]):
        with pytest.raises(InputError, match="pass a text, "):
            graftlm.predict_labels(loaded.model, loaded.tokenizer, cast("Any", texts), loaded.template)


@pytest.mark.usefixtures("forked_children")
def test_compare_report_export_and_estimate(run: Path, model: Path, tmp_path: Path) -> None:
    table = {"init_from": model, "template": TEMPLATE, "data": ROWS, "max_iters": 1}
    rows = [{"name": "base", "method": "zero-shot"}]
    compared = graftlm.compare(rows=rows, train=table, out_dir=tmp_path / "compared", limit=4, console=QUIET)
    assert compared.rows[0]["name"] == "base" and compared.failed == 0
    with pytest.raises(InputError, match=r"compare: row 1: unknown key 'ranks'"):
        graftlm.compare(rows=[{"ranks": 4}], out_dir=tmp_path / "other")
    page = graftlm.report(run, out=tmp_path / "page.html")
    assert Path(page.path).is_file() and page.runs == 1
    exported = graftlm.export(run, to=tmp_path / "adapter", console=QUIET)
    assert exported.max_abs_logit_diff < 1e-3 and (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert graftlm.estimate(init_from=model, rank=4, targets=["q"]).trainable > 0


def test_a_result_shows_itself(run: Path) -> None:
    result = graftlm.evaluate(run, data=ROWS[:4], mode="score", console=QUIET)
    with pytest.MonkeyPatch.context() as patch:  # in a notebook rich prints to no file of its own accord
        patch.setattr("rich.console._is_jupyter", lambda: True)
        assert "label scores" in str(result) and "label scores" in result._repr_html_()
    assert json.loads(json.dumps(result)) == dict(result)
    with pytest.raises(AttributeError, match="EvaluateResult has no 'loss'; it has n, accuracy"):
        result.loss  # noqa: B018


# In memory: own networks, own loops, callbacks ------------------------------------------------------------------------


class Network(nn.Module):
    """Someone's own: a tied head, names of their own, and an attention whose projection is read and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(16, 32), "fc2": nn.Linear(32, 16)}) for _ in "ab")
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embedding(x)
        h = self.attention(h, h, h)[0]
        for block in self.blocks:
            h = h + block["fc2"](block["fc1"](h).relu())
        return self.head(h)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapting_a_network_of_ones_own(method: str) -> None:
    torch.manual_seed(0)
    network, x = Network(), torch.randint(10, (3, 5))
    before, weights = network(x), {name: p.clone() for name, p in network.named_parameters()}
    graftlm.adapt(network, method, rank=2, alpha=4, dropout=0.0, targets=["fc1", "head", "blocks.*.fc2"])
    assert torch.allclose(network(x), before, atol=1e-5)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    places = {f"blocks.{i}.fc{n}" for i in (0, 1) for n in (1, 2)} | {"head"}
    assert {name.rpartition(".")[0] for name in trained} == places
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(network(x).flatten(0, 1), x.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    after = network(x)
    network.eval()  # merges; the head's weight is the embedding's too, and stays
    assert torch.allclose(network(x), after, atol=1e-5)
    for name, p in network.state_dict().items():
        assert name not in weights or torch.equal(p, weights[name]), name
    assert torch.equal(network.embedding.weight, weights["embedding.weight"])


def test_an_adapted_network_under_autocast() -> None:
    torch.manual_seed(0)
    network, x = Network(), torch.randint(10, (3, 5))
    graftlm.adapt(network, rank=2, alpha=4, targets="fc1")
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(network(x).flatten(0, 1), x.flatten())
    loss.backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)


def test_a_linear_of_torch_as_lora() -> None:
    linear, x = nn.Linear(6, 4).eval(), torch.randn(3, 6)
    lora = graftlm.LoRALinear.from_linear(linear, rank=2, alpha=4)
    assert torch.allclose(lora(x), linear(x)) and lora.weight is linear.weight and not lora.training


def test_adapting_a_model_of_ours_is_what_training_installs(model: Path) -> None:
    loaded, again = graftlm.load(str(model), dtype="float32"), graftlm.load(str(model), dtype="float32")
    adapted = graftlm.adapt(loaded.model, "lora", rank=2, targets=["q", "v"], seed=3)
    LoRA(rank=2, targets=("q", "v")).install(again.model, torch.Generator().manual_seed(3))
    assert adapted is loaded.model
    for (name, p), (other, q) in zip(adapted.named_parameters(), again.model.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q) and p.requires_grad == q.requires_grad


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: graftlm.adapt(Network(), rank=2), r"name the linears to adapt, as in targets=\['\*'\]: its linears"),
        (lambda: graftlm.adapt(Network(), targets="fcx"), "targets: 'fcx' is no nn.Linear of this module"),
        (lambda: graftlm.adapt(Network(), targets="out_proj"), "targets: 'out_proj' is no nn.Linear of this module"),
        (lambda: graftlm.adapt(Network(), "ia3", targets="*"), "ia3 adapts the models of graftlm"),
        (lambda: graftlm.adapt(Network(), ranks=2), "lora has no setting 'ranks': did you mean rank"),
        (lambda: graftlm.adapt(Network(), rank=99, targets="fc1"), "rank 99 is above the width of blocks.0.fc1"),
        (lambda: graftlm.adapt(Network(), "lorra"), "unknown method 'lorra': did you mean 'lora'"),
        (lambda: graftlm.adapt(cast("Any", 3)), "3 is no module"),
    ],
)
def test_what_cannot_be_adapted_is_one_line(call: Callable[[], object], line: str) -> None:
    with pytest.raises(InputError, match=line):
        call()


def test_a_loop_of_ones_own_takes_the_steps_of_train(model: Path, run: Path) -> None:
    prepared = graftlm.prepare(**settings(model, lora_dropout=0), data=ROWS, out_dir=run, console=QUIET)
    trained = [p for p in prepared.model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0), []
    for batch in islice(prepared.batches(), 4):
        loss, _ = prepared.objective.loss(prepared.model, batch)
        loss = loss / batch.weight
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert losses[0] == pytest.approx(first["train_loss"], rel=1e-5) and losses[-1] < losses[0]
    measured = graftlm.evaluate(prepared.loaded, data=ROWS[:6], template=TEMPLATE, mode="score", console=QUIET)
    assert measured.n == 6


class Recorder:
    """A callback that writes down what is called."""

    def __init__(self, stop_at: int = 0) -> None:
        self.calls: list[Any] = []
        self.stop_at = stop_at

    def on_start(self, run: Any) -> None:
        self.calls.append(("start", run.config.rank))

    def on_step(self, row: dict[str, Any]) -> None:
        self.calls.append(("step", row["step"]))
        if row["step"] == self.stop_at:
            raise graftlm.StopTraining

    def on_evaluate(self, row: dict[str, Any]) -> None:
        self.calls.append(("evaluate", row["step"], row["always_negative"]))

    def on_checkpoint(self, folder: Path) -> None:
        self.calls.append(("checkpoint", folder.resolve().name))

    def on_end(self) -> None:
        self.calls.append("end")


def test_callbacks_and_metrics_and_a_callback_that_stops(model: Path, tmp_path: Path) -> None:
    def always_negative(predicted: np.ndarray, true: np.ndarray) -> float:
        assert predicted.shape == true.shape and {*true.tolist()} <= {0, 1}
        return float((true == 0).mean())

    recorder, losses = Recorder(stop_at=3), list[float]()
    result = graftlm.train(
        **settings(model, max_iters=8, eval_every=2),
        data=ROWS,
        out_dir=tmp_path / "run",
        callbacks=[recorder, lambda row: losses.append(row["train_loss"])],
        metrics=always_negative,
        console=QUIET,
    )
    value = result.best["always_negative"]
    assert recorder.calls == [
        ("start", 4),
        ("step", 1),
        ("step", 2),
        ("evaluate", 2, value),
        ("checkpoint", "step-2"),
        ("step", 3),
        ("evaluate", 3, value),
        ("checkpoint", "step-3"),
        "end",
    ]
    assert result.steps == 3 and len(losses) == 3 and 0 < value < 1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["always_negative"] for row in rows] == [None, value, value]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["python"] == {"callbacks": ["Recorder", "<lambda>"], "metrics": ["always_negative"]}
    resumed = graftlm.train(resume=True, out_dir=tmp_path / "run", console=QUIET)
    assert resumed.steps == 8  # without the callback, which is not recorded, it goes to its end


def test_a_callback_changes_no_weight(run: Path, model: Path, tmp_path: Path) -> None:
    """Also where it draws random numbers, and uses the model."""

    class Sampler:
        def on_start(self, run: Any) -> None:
            self.loaded = run.loaded

        def on_step(self, row: dict[str, Any]) -> None:
            torch.rand(3)
            graftlm.generate(self.loaded, "A film", max_new_tokens=2)

    graftlm.train(**settings(model), data=ROWS, out_dir=tmp_path / "run", callbacks=Sampler(), console=QUIET)
    name = Path("last") / "adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes()


class Misnamed:
    def on_epoch_end(self) -> None: ...


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ({"callbacks": Misnamed()}, "Misnamed has on_epoch_end, which is never called"),
        ({"callbacks": 3}, "callbacks: 3: pass a function"),
        ({"callbacks": Recorder}, "callbacks: <class .*: pass a function"),
        ({"metrics": 3}, "metrics: 3"),
        ({"metrics": {"f": 3}}, "metrics: 3: is no function"),
        ({"metrics": len, "data": ["A text without a label.", "Another."]}, "metrics: are functions of labels"),
    ],
)
def test_what_is_no_callback_or_metric_is_one_line(
    extra: dict[str, Any], line: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=line):
        graftlm.train(**{**settings(model), "data": ROWS, **extra}, out_dir=tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


def test_an_error_in_a_callback_is_the_callers(model: Path, tmp_path: Path) -> None:
    def broken(row: dict[str, Any]) -> None:
        raise KeyError("loss")

    with pytest.raises(KeyError, match="loss"):
        graftlm.train(**settings(model), data=ROWS, out_dir=tmp_path / "run", callbacks=broken, console=QUIET)
