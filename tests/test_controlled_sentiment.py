"""The controlled sentiment experiment: its arithmetic against brute force, and the whole of it on a tiny model."""

import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from graftlm import cli
from graftlm.config import PreferConfig, TrainConfig
from graftlm.models import CausalLM
from inference.tiny import VOCAB, full_logits, ragged, tiny
from tiny import TEMPLATE, data_folder, model_folder

ROOT = Path(__file__).parent.parent
BENCHMARKS = str(ROOT / "benchmarks")
OF_TRAIN = {field.name for field in dataclasses.fields(TrainConfig)}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, BENCHMARKS)
    yield importlib.import_module("controlled_sentiment")
    sys.path.remove(BENCHMARKS)


@pytest.fixture(scope="module")
def frontier(bench: ModuleType) -> ModuleType:
    return importlib.import_module("_frontier")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("One two three  four five six. Seven\n\teight.", ("One two three", " four five six. Seven eight.")),
        ("One two three four five six seven. Eight nine", ("One two three", " four five six seven.")),
        ("One two three four five six (seven!) Eight.", ("One two three", " four five six (seven!) Eight.")),
        ("One two three four five six seven?<br /><br />Eight.", ("One two three", " four five six seven?")),
        ("One two three four five six. Seven", None),  # too little behind the opening
        ("One two. Three four five six seven eight nine", None),
        ("One two three four five six seven eight nine ten.", None),  # the sentence is too long
    ],
)
def test_a_text_is_whole_sentences_behind_an_opening(
    text: str, found: tuple[str, str] | None, bench: ModuleType
) -> None:
    expected = None if found is None or len(found[1].split()) < bench.FEWEST else found
    assert bench.beginning(text, 3, 9) == expected


def test_no_opening_is_taken_twice(bench: ModuleType) -> None:
    texts, taken = [("a", " 1."), ("b", " 2."), ("a", " 3."), ("c", " 4.")], {"b"}
    found = bench.take(iter(texts), 2, taken, "train")
    assert found == [{"prompt": "a", "completion": " 1."}, {"prompt": "c", "completion": " 4."}]
    assert taken == {"a", "b", "c"}
    with pytest.raises(bench.BenchmarkError, match=r"^train: only 0 of 1 different openings; ask for fewer$"):
        bench.take(iter(texts), 1, taken, "train")


def test_the_texts_of_real_reviews_share_no_opening(bench: ModuleType, tmp_path: Path) -> None:
    values = {**bench.tomllib.loads(bench.RECIPE.read_text(encoding="utf-8"))["texts"], "train": 30, "prompts": 20}
    counts = bench.make_texts(values, tmp_path)
    assert counts == {"held_out": 128, "sft/validation": 96, "sft/train": 30, "prompts": 20}
    rows = [row for name in counts for row in bench.read_rows(tmp_path / f"{name}.jsonl")]
    assert len({row["prompt"] for row in rows}) == sum(counts.values())
    for row in rows:
        assert len(row["prompt"].split()) == values["opening"]
        assert row["completion"][0] == " " and bench.SENTENCE_END.search(row["completion"])
        assert len((row["prompt"] + row["completion"]).split()) <= values["words"]


# The arithmetic -------------------------------------------------------------------------------------------------------


def test_best_of_n_is_the_mean_over_all_subsets(frontier: ModuleType) -> None:
    rewards = np.array([[0.1, 0.9, 0.4, 0.4, 0.7], [5.0, 1.0, 2.0, 3.0, 4.0]])
    for n in range(1, 6):
        expected = [np.mean([max(some) for some in itertools.combinations(row, n)]) for row in rewards]
        assert frontier.best_of_n(rewards, n) == pytest.approx(expected, rel=1e-12)


def test_the_kl_of_best_of_n_is_that_of_many_answers_of_different_worth(frontier: ModuleType) -> None:
    many = 100_000
    for n in (1, 2, 8):
        chance = np.diff((np.arange(many + 1) / many) ** n)
        assert frontier.kl_of_best(n) == pytest.approx(float((chance * np.log(chance * many)).sum()), abs=1e-3)


def loaded(model: CausalLM) -> Any:
    return SimpleNamespace(model=model)


def test_the_kl_of_answers_is_the_kl_of_their_distributions(bench: ModuleType) -> None:
    """Over all answers of at most two tokens, weighed by their probability, both estimates have the same exact mean."""
    policy, reference, prompt = tiny("llama"), tiny("llama", seed=1), ragged([5])[0]
    answers = [[0], *([a, 0] for a in range(1, VOCAB)), *([a, b] for a in range(1, VOCAB) for b in range(1, VOCAB))]
    ours, theirs = (log_probs(model, prompt, answers) for model in (policy, reference))
    chance = np.exp(ours)
    assert chance.sum() == pytest.approx(1, rel=1e-9)
    expected = float((chance * (ours - theirs)).sum())
    assert expected > 0.5
    kl, ratio = bench.kl_of_answers(loaded(policy), loaded(reference), [prompt] * len(answers), answers)
    assert float((chance * kl).sum()) == pytest.approx(expected, rel=1e-4)
    assert float((chance * ratio).sum()) == pytest.approx(expected, rel=1e-4)
    assert ratio == pytest.approx((ours - theirs).tolist(), abs=1e-3)


def log_probs(model: CausalLM, prompt: list[int], answers: list[list[int]]) -> Any:
    """The log-probability of each answer of one or two tokens, by plain forward passes."""
    first = full_logits(model, prompt)[-1].log_softmax(-1)
    second = {a: full_logits(model, [*prompt, a])[-1].log_softmax(-1) for a in {answer[0] for answer in answers}}
    return np.array([float(first[a[0]]) + (float(second[a[0]][a[1]]) if len(a) > 1 else 0.0) for a in answers])


def test_a_model_has_no_kl_to_itself_and_ragged_rows_have_their_own(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, reference = loaded(tiny("gpt2")), loaded(tiny("gpt2", seed=1))
    prompts, answers = ragged([5, 9, 3, 6]), [[4, 7, 0], [], [9], [3, 8, 2, 6, 0]]
    kl, ratio = bench.kl_of_answers(policy, policy, prompts, answers)
    assert kl == ratio == [0.0] * 4
    kl, ratio = bench.kl_of_answers(policy, reference, prompts, answers)
    assert kl[1] == ratio[1] == 0.0 and min(kl[0], kl[2], kl[3]) > 0
    monkeypatch.setattr(bench, "POSITIONS", 1)  # each row alone
    for found, alone in zip((kl, ratio), bench.kl_of_answers(policy, reference, prompts, answers), strict=True):
        assert found == pytest.approx(alone, rel=1e-4)


def point(frontier: ModuleType, kl: float, *rewards: float) -> Any:
    return frontier.Point(np.array(rewards), np.full(len(rewards), kl))


def test_two_lines_are_compared_where_both_have_kls(frontier: ModuleType) -> None:
    start = point(frontier, 0, 0.4, 0.6)
    one = [point(frontier, 8, 0.9, 0.9), point(frontier, 2, 0.6, 0.8)]  # in any order
    other = [point(frontier, 4, 0.5, 0.7)]
    found = frontier.compare(one, other, start, steps=4, resamples=200, seed=0)
    assert [row["kl"] for row in found["rows"]] == [1, 2, 3, 4]
    assert [row["one"] for row in found["rows"]] == pytest.approx([0.6, 0.7, 0.7 + 0.2 / 6, 0.7 + 0.4 / 6])
    assert [row["other"] for row in found["rows"]] == pytest.approx([0.525, 0.55, 0.575, 0.6])
    assert [row["difference"] for row in found["rows"][:2]] == pytest.approx([0.075, 0.15])
    # Both prompts differ alike up to a KL of 2, so resampling them changes nothing there; behind it, it does.
    assert (found["rows"][1]["low"], found["rows"][1]["high"]) == pytest.approx((0.15, 0.15))
    assert found["rows"][3]["low"] < found["rows"][3]["difference"] < found["rows"][3]["high"]
    assert found["low"] < found["mean"] < found["high"]
    assert found["mean"] == pytest.approx(np.mean([row["difference"] for row in found["rows"]]))
    assert frontier.compare(other, one, start, steps=4, resamples=9, seed=0)["mean"] == pytest.approx(-found["mean"])


def test_the_picture_has_every_point_at_its_place(frontier: ModuleType) -> None:
    lines = {"DPO, beta 0.1": [(0.0, 0.5), (4.0, 0.7), (16.0, 0.9)], "a<b": [(0.0, 0.5), (1.0, 0.6)]}
    root = ElementTree.fromstring(frontier.picture(lines, {"base": (9.0, 0.5)}))
    first, second = [line.attrib["points"].split() for line in root.iter(f"{SVG}polyline")]
    assert [point.split(",")[0] for point in first] == ["56.0", "356.0", "656.0"]  # square roots 0, 2, 4
    heights = [float(point.split(",")[1]) for point in first]
    assert heights[0] > heights[1] > heights[2] and heights[0] - heights[1] == pytest.approx(heights[1] - heights[2])
    assert second[0] == first[0] and len(list(root.iter(f"{SVG}circle"))) == 5
    assert {"DPO, beta 0.1", "a<b", "base", "0.5", "10"} <= {text.text for text in root.iter(f"{SVG}text")}


# The recipe and the stages --------------------------------------------------------------------------------------------


def test_the_recipe_holds_flags_of_the_verbs_that_its_stages_call(bench: ModuleType) -> None:
    recipe = bench.tomllib.loads(bench.RECIPE.read_text(encoding="utf-8"))
    assert list(recipe) == ["texts", "classifier", "sft", "pairs", "dpo", "preferred", "evaluation"]
    assert all(set(recipe[name]) - {"betas"} <= OF_TRAIN for name in ("classifier", "sft", "dpo", "preferred"))
    assert set(recipe["pairs"]) <= {field.name for field in dataclasses.fields(PreferConfig)}
    assert recipe["texts"]["prompts"] > recipe["texts"]["pairs_validation"]
    assert bench.flags({"lr": 5e-4, "keep_checkpoints": True, "targets": "q,k"}) == [
        "--lr=0.0005",
        "--keep_checkpoints=true",
        "--targets=q,k",
    ]


def test_a_stage_is_run_once_and_a_second_beginning_is_told(bench: ModuleType, tmp_path: Path) -> None:
    experiment = bench.Experiment({"a": {"b": 1, "betas": [1]}, "c": {}}, tmp_path)
    runs: list[int] = []

    def broken() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.stage("dpo 0.1", ("a",), broken)
    for _ in range(2):
        assert experiment.stage("dpo 0.1", ("a",), lambda: runs.append(1) or {"c": 2}) == {"c": 2}
        assert experiment.stage("dpo 1", ("a", "c"), lambda: runs.append(1) or 3) == 3
    assert len(runs) == 2
    assert list(experiment.seconds()) == ["dpo"] and experiment.seconds()["dpo"]["again"] is True
    more = bench.Experiment({"a": {"b": 1, "betas": [1, 2]}, "c": {"d": 1}}, tmp_path)
    assert more.stage("dpo 0.1", ("a",), broken) == {"c": 2}
    with pytest.raises(
        bench.BenchmarkError, match=r": dpo 1 was begun with another \[c\]: name another folder with --w"
    ):
        more.stage("dpo 1", ("a", "c"), broken)


# The whole of it ------------------------------------------------------------------------------------------------------


TINY = """
[texts]
data = "{place}/reviews"
opening = 2
words = 12
train = 16
validation = 4
prompts = 8
pairs_validation = 2
held_out = 5

[classifier]
init_from = "{place}/model"
data = "{place}/data"
template = {template}
rank = 4
max_iters = 4
batch_size = 4

[sft]
init_from = "{place}/model"
rank = 4
max_iters = 4
batch_size = 4

[pairs]
n = 3
max_new_tokens = 16

[dpo]
betas = [0.1, 1.0]
max_iters = 4
batch_size = 4
eval_every = 2
kl_samples = 0

[preferred]
max_iters = 4
batch_size = 4
eval_every = 2

[evaluation]
max_new_tokens = 16
best_of = 4
seed = 1
resamples = 50
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of the experiment at the smallest size, with its model, reviews and labelled data."""
    model_folder(tmp_path / "model")
    data_folder(tmp_path / "data")
    (tmp_path / "reviews").mkdir()
    for split, first in (("train", 0), ("validation", 100), ("test", 200)):
        texts = [f"film{n} was {'good' if n % 2 else 'bad'} and x{n} is so. The end." for n in range(first, first + 40)]
        rows = "".join(json.dumps({"text": text, "label": 0}) + "\n" for text in texts)
        (tmp_path / "reviews" / f"{split}.jsonl").write_text(rows)
    file = tmp_path / "tiny.toml"
    file.write_text(TINY.format(place=tmp_path, template=json.dumps(TEMPLATE)))
    return file


def in_this_process(*words: str) -> Any:
    """What `bench.graft` gives, without a process of its own: torch is loaded once."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.run([*words, "--json"]) == 0
    return json.loads(out.getvalue())


def test_graft_is_this_checkouts_command_and_its_failure_an_error(bench: ModuleType) -> None:
    assert bench.graft("account", "--ffn=8,4,1")["total"] == 41
    with pytest.raises(bench.BenchmarkError, match=r"^graft account --ffn=8 failed with status 2$"):
        bench.graft("account", "--ffn=8")


def test_the_whole_experiment_and_its_page_on_a_tiny_model(
    recipe: Path,
    bench: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "graft", in_this_process)
    monkeypatch.setattr("graftlm.process.keep_memory", lambda: False)
    words = ["--recipe", str(recipe), "--work", str(tmp_path / "work")]
    assert bench.main([*words, "--until", "pairs"]) == 0
    assert {path.stem for path in (tmp_path / "work").glob("*.json")} == {
        "texts",
        "classifier",
        "sft",
        "pairs",
    }
    capsys.readouterr()
    assert bench.main([*words, "--json-out", str(tmp_path / "2026-01-02-controlled.json")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    runs = ("dpo-0.1", "dpo-1", "preferred")
    assert list(result["points"]) == ["reference", "base", *(f"{run} step {step}" for run in runs for step in (2, 4))]
    assert all(point["kl"] > 0 for name, point in result["points"].items() if name != "reference")
    assert result["points"]["reference"]["reward"] == pytest.approx(result["best_of_n"]["1"]["reward"])
    assert list(result["best_of_n"]) == ["1", "2", "4"] and result["best_of_n"]["2"]["kl"] == math.log(2) - 0.5
    assert list(result["seconds"]) == ["texts", "classifier", "sft", "pairs", "dpo", "preferred", "evaluation"]
    assert result["minutes"] < 5 and list(result["claims"].values())[-1] is True
    found, pictures = bench.blocks(result, "2026-01-02")
    page = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")
    filled = bench.fill(page, found)
    assert "best of 4" in filled and "preferred step 4" in filled and bench.fill(filled, found) == filled
    assert len(list(ElementTree.fromstring(pictures["frontier.svg"]).iter(f"{SVG}polyline"))) == 4
    # Given again all is there, and nothing is run.
    began = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*")}
    assert bench.main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*")} == began


def test_the_committed_page_is_what_the_newest_result_gives(bench: ModuleType) -> None:
    results = sorted((ROOT / "benchmarks" / "results").glob("*-controlled*.json"))
    text = (ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")
    if not results:
        assert text.count("Not measured yet.") == text.count("<!-- end -->") == 5
        return
    found, pictures = bench.blocks(json.loads(results[-1].read_text(encoding="utf-8")), results[-1].stem[:10])
    assert bench.fill(text, found) == text
    folder = ROOT / "docs" / "preferences"
    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == pictures
