"""What goes wrong, through the real command: one line that says what, where and what to do, and no half-made folder.

Most commands run in this process (torch is loaded once); what needs limits, signals or a connection of its own runs in
a real one. Every refusal is held to the same: exit status 2 (1 for a failed run, 130 when interrupted), nothing on the
standard output, one line on the standard error, and not a file more or less than before.
"""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import UNCOUNTED, Graft, child_environment
from graftlm import cli
from graftlm.files.assets import model_folder as asset_folder
from graftlm.training import trainer as trainer_module
from hub_mirror import serve
from soak.forks import Forks
from tiny import TEMPLATE, data_folder, fresh_home, model_folder

ROW = '{"text": "good fun", "label": 1}\n'
Refuse = Callable[..., str]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny models that differ in their weights, data, the head of a real gguf file, and a finished run."""
    folder = tmp_path_factory.mktemp("assets")
    model_folder(folder / "model")
    model_folder(folder / "other", seed=5)
    data_folder(folder / "data")
    with open(next(asset_folder("smollm2-135m").glob("*.gguf")), "rb") as file:
        (folder / "head.gguf").write_bytes(file.read(100_000))
    return folder


@pytest.fixture(scope="module")
def finished(assets: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graftlm.cli.main.tune_malloc_retain", lambda: False)
        assert cli.run(train(assets, "--out_dir", str(assets / "run"), "--json")) == 0
    return assets / "run"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory and empty caches; one thread, and this process's memory left as it is."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("GRAFT_HOME", fresh_home(tmp_path / "graft"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("graftlm.cli.main.tune_malloc_retain", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "work"
    torch.set_num_threads(threads)


@pytest.fixture
def refuse(place: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Give the command words that it must refuse; returns its one line."""

    def refused(*words: str) -> str:
        before = snapshot(place.parent)
        assert cli.run(words) == 2
        assert snapshot(place.parent) == before
        return one_line(*capsys.readouterr())

    return refused


def train(assets: Path, *more: str) -> list[str]:
    """A run of two steps in out_dir "run"; of a flag given twice the last one counts."""
    flags = {
        "init_from": str(assets / "model"),
        "data": str(assets / "data"),
        "out_dir": "run",
        "template": TEMPLATE,
        "rank": "4",
        "max_iters": "2",
        "batch_size": "4",
        "dtype": "float32",
        "device": "cpu",
    }
    return ["train", *(f"--{name}={value}" for name, value in flags.items()), *more]


def snapshot(folder: Path) -> dict[str, int]:
    """Every file, folder and link below with its time of change; locks, kernels and empty folders are no leftovers."""
    paths = (p for p in folder.rglob("*") if not {"locks", "compiled"} & {*p.parts})
    found = {str(p.relative_to(folder)): p for p in paths}
    return {
        name: 0 if path.is_dir() else path.lstat().st_mtime_ns
        for name, path in found.items()
        if name.startswith("work") or not path.is_dir()
    }


def one_line(out: str, err: str) -> str:
    assert out == ""
    err = re.sub(r"^[^\n]*: read as [^\n]*\n", "", err)  # the note on the data's layout
    assert err.startswith("graft: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err.removeprefix("graft: ").rstrip("\n")


def last_line(out: str, err: str) -> str:
    """The error's line behind the notes of a run that had begun."""
    assert out == "" and "Traceback" not in err
    lines = err.splitlines()
    assert [line.startswith("graft: ") for line in lines] == [False] * (len(lines) - 1) + [True], err
    return lines[-1].removeprefix("graft: ")


def has(line: str, *parts: str) -> None:
    for part in parts:
        assert part in line, line


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["trian"],
            "unknown subcommand 'trian': did you mean 'train'? known are train, generate, chat, evaluate, prompt, ",
        ),
        (["train", "--rnk=4"], "unknown flag --rnk: did you mean --rank? see graft train --help"),
        (["train", "--method=lra"], "unknown --method 'lra': did you mean 'lora'? known are adapter, bitfit, dora, "),
        (["train", "--targets=q,w"], "unknown target 'w': known are q, k, v, o, up, gate, down"),
        (["train", "--targets=,"], "--targets is empty: name at least one of q, k, v, o, up, gate, down"),
        (["train", "--device=gpu"], "unknown --device 'gpu': known are auto, cpu, cuda, cuda:N, mps"),
        (["train", "--device=cuda:99"], "--device cuda:99: this machine has "),
        (["train", "--dtype=fp16"], "--dtype fp16: not one of auto, float32, bfloat16"),
        (["train", "--rank=abc"], "--rank abc: not a whole number"),
        (["train", "--init_from=gpt3"], "unknown model 'gpt3': did you mean 'gpt2'? known are smollm2-135m, gpt2, "),
        (["train", "--init_from="], "unknown model '': known are smollm2-135m, "),
        (["train", "--init_from=./nope"], "./nope: no such file or folder: check the path, or use smollm2-135m"),
        (
            ["train", "--data=rotten-tomatos"],
            "unknown data set 'rotten-tomatos': did you mean 'rotten_tomatoes'? known ",
        ),
        (["train", "--data=nope.csv"], "nope.csv: no such file or folder: check the path, or use rotten-tomatoes-pypi"),
        (
            ["train", "--template=no field"],
            "unknown template 'no field': known are sentiment, question, plain; or give ",
        ),
        (["train", "--template={text} {text}"], "template '{text} {text}' has {text} 2 times: write it once"),
        (["train", "--labels=good"], "--labels 'good': name two label words or more, as in negative,positive"),
        (["train", "--labels=good,"], "--labels 'good,': an empty label word; name them as in negative,positive"),
        (["train", "--out_dir="], "--out_dir '': must be a folder's name"),
        (["train", "--resume"], "run: holds no run (no run.json); train one with graft train --out_dir run"),
        (["evaluate"], "graft-run: holds no run (no run.json); train one with graft train --out_dir graft-run"),
        (["evaluate", "--checkpoint"], "--checkpoint needs a value"),
        (["evaluate", "--checkpoint=lst"], "--checkpoint lst: not one of best, last"),
        (["generate", "--prompt=hello"], "graft-run: holds no run (no run.json); train one with graft train"),
    ],
)
def test_names_and_values_that_mean_nothing(words: list[str], line: str, assets: Path, refuse: Refuse) -> None:
    if words[0] == "train":
        words = train(assets, *words[1:])
    assert refuse(*words).startswith(line)


def test_names_that_the_hub_does_not_know(
    assets: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    with serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        line = refuse(*train(assets, "--init_from=org/nope"))
        has(line, f"unknown model 'org/nope': the hub {hub.url} has none of that name", "use the built-in smollm2-135m")
        line = refuse(*train(assets, "--data=org/nope"))
        has(
            line, f"unknown data set 'org/nope': the hub {hub.url} has none", "use the built-in rotten-tomatoes-pypi or"
        )
        has(refuse("download", "org/nope"), "unknown data set 'org/nope'", "use the built-in")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound


def test_a_hub_that_does_not_answer(
    assets: Path, refuse: Refuse, graft: Graft, listener: socket.socket, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    done = graft(*train(assets, "--init_from=gpt2"), cwd=place, HF_ENDPOINT=url, HF_HUB_OFFLINE="0")
    has(one_line(done.stdout, done.stderr), f"the hub {url} did not answer for model 'gpt2' (ConnectError: ", "refused")
    assert done.returncode == 2 and not list(place.iterdir())
    listener.listen()  # now it accepts, and says nothing
    monkeypatch.setenv("HF_ENDPOINT", url)
    line = refuse(*train(assets, "--data=org/reviews"))
    has(line, "did not answer for data set 'org/reviews'", "check the connection or HF_ENDPOINT, or use the built-in")


def test_ctrl_c_while_a_model_is_loaded(assets: Path, listener: socket.socket, place: Path) -> None:
    listener.listen()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    environment = child_environment(HF_ENDPOINT=url, HF_HUB_OFFLINE="0", HF_HUB_ETAG_TIMEOUT="60")
    command = [sys.executable, "-m", "graftlm", *train(assets, "--init_from=gpt2")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as child:
        connection, _ = listener.accept()  # it waits for the hub's answer now
        with connection:
            child.send_signal(signal.SIGINT)
            assert child.communicate(timeout=60) == ("", "graft: interrupted\n")
    assert child.returncode == 130 and not list(place.iterdir())


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--rank=-1", "--rank -1: must be 0 (full fine-tuning) or more"),
        ("--rank=33", "--rank 33: above the width of blocks.0.attn.q: choose at most 32"),
        ("--train_layers=1", "--train_layers '1': is no slice such as '1:' or '-4:'"),
        ("--train_layers=a:", "--train_layers 'a:': is no slice such as '1:' or '-4:'"),
        ("--train_layers=2:", "--train_layers '2:': holds none of the model's 2 layers, 0 to 1"),
        ("--activation_cache_gb=-1", "--activation_cache_gb -1.0: must be 0 or more"),
        ("--alpha=0", "--alpha 0.0: must be greater than 0"),
        ("--lr=-1", "--lr -1.0: must be greater than 0"),
        ("--lr=nan", "--lr nan: not a finite number"),
        ("--dropout=1", "--dropout 1.0: must be at least 0 and below 1"),
        ("--lora_dropout=-0.1", "--lora_dropout -0.1: must be at least 0 and below 1"),
        ("--batch_size=0", "--batch_size 0: must be 1 or more"),
        ("--grad_accum=-2", "--grad_accum -2: must be 1 or more"),
        ("--max_iters=0", "--max_iters 0: must be greater than 0"),
        ("--epochs=-1", "--epochs -1.0: must be greater than 0"),
        ("--eval_every=0", "--eval_every 0: must be greater than 0"),
        ("--val_limit=-1", "--val_limit -1: must be 0 or more"),
        ("--seed=-1", "--seed -1: must be 0 or more, and below 2**32"),
        ("--seed=99999999999999999999", "--seed 99999999999999999999: must be 0 or more, and below 2**32"),
        ("--max_length=0", "--max_length 0: must be greater than 0"),
        ("--warmup_steps=-1", "--warmup_steps -1: must be 0 or more"),
        ("--weight_decay=-1", "--weight_decay -1.0: must be 0 or more"),
        ("--grad_clip=-1", "--grad_clip -1.0: must be 0 or more"),
        ("--patience=-1", "--patience -1: must be 0 or more"),
        ("--beta=0", "--beta 0.0: must be greater than 0"),
        ("--beta=-0.1", "--beta -0.1: must be greater than 0"),
        ("--label_smoothing=0.5", "--label_smoothing 0.5: must be at least 0 and below 0.5"),
        ("--gamma=-1", "--gamma -1.0: must be 0 or more"),
        ("--kl_samples=-1", "--kl_samples -1: must be 0 or more"),
        ("--loss_type=dpo", "--loss_type dpo: not one of sigmoid, hinge, ipo, sigmoid_norm, simpo, orpo"),
        ("--objective=rlhf", "--objective rlhf: not one of dpo, kto, sft"),
        ("--shard", "--shard: shards the base across processes: launch with torchrun, or leave it out"),
        (
            "--reference=runs/other",
            "--reference runs/other: --objective sft takes no --reference: leave it out, or use dpo or kto",
        ),
    ],
)
def test_sizes_of_a_run_that_cannot_be(flag: str, line: str, assets: Path, refuse: Refuse) -> None:
    assert refuse(*train(assets, flag)) == line


PAIR = {"prompt": "Film 1 was", "chosen": " fine.", "rejected": " bad."}


@pytest.mark.parametrize(
    ("pair", "flags", "line"),
    [
        ({"rejected": " fine. "}, [], "FILE:4: chosen and rejected are the same text: leave the pair out"),
        ({"rejected": ""}, [], "FILE:4: empty rejected: fill it in, or leave the row out"),
        ({"chosen": None}, [], "FILE:4: empty chosen: fill it in, or leave the row out"),
        ({"prompt": " "}, [], "FILE:4: empty prompt: fill it in, or leave the row out"),
        (
            {"chosen": " fine" * 30, "rejected": " bad" * 30},
            [],
            "FILE:4: completion longer than the context: the prompt takes 10 tokens, and 0 fit before its completion: "
            "shorten the row",
        ),
        (
            {},
            ["--max_length=12"],
            "FILE:1: prompt and completion longer than the context: the prompt takes 10 tokens, and 5 fit before its "
            "completion: shorten the row",
        ),
        (
            {},
            ["--objective=sft"],
            "--objective sft: FILE holds records for --objective dpo; sft needs texts with labels, ",
        ),
        ({}, ["--loss_on=all"], "--loss_on all: --objective dpo takes no --loss_on: leave it out, or use sft"),
        ({}, ["--loss_type=ipo", "--label_smoothing=0.1"], "--label_smoothing 0.1: --loss_type ipo takes none"),
        ({}, ["--loss_type=orpo", "--reference=x"], "--reference x: --loss_type orpo needs no reference; leave it out"),
        (
            {},
            ["--reference=work"],
            "work: holds no reference (reference.json and reference.safetensors); name a run of ",
        ),
    ],
)
def test_pairs_and_how_they_are_trained_on(
    pair: dict[str, Any], flags: list[str], line: str, assets: Path, place: Path, refuse: Refuse
) -> None:
    file = place / "pairs.jsonl"
    (place / "work").mkdir()
    rows = [{**PAIR, "prompt": f"Film {i} was"} for i in range(1, 10)]
    rows[3] |= pair
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    validation = place / "validation.jsonl"
    validation.write_text(json.dumps(PAIR | {"prompt": "It was"}) + "\n")
    words = [
        f"--data={file}",
        f"--val_data={validation}",
        f"--init_from={assets / 'model'}",
        "--objective=dpo",
        "--rank=4",
    ]
    said = refuse("train", *words, "--out_dir=run", *flags)
    assert said.startswith(line.replace("FILE", str(file)))


def test_preferences_need_pairs(assets: Path, refuse: Refuse) -> None:
    said = refuse(*train(assets, "--objective=dpo"))
    assert (
        said.startswith("--objective dpo: ")
        and "; dpo needs preference pairs: files with the fields prompt, chosen" in said
    )


@pytest.mark.parametrize(
    ("verb", "flag", "line"),
    [
        ("evaluate", "--limit=-1", "--limit -1: must be 0 or more"),
        ("evaluate", "--batch_size=0", "--batch_size 0: must be 1 or more"),
        ("evaluate", "--max_length=-5", "--max_length -5: must be greater than 0"),
        ("evaluate", "--shots=-1", "--shots -1: must be 0 or more"),
        ("evaluate", "--shots=2 --split=train", "--shots: demonstrations come from the train split; choose another "),
        ("evaluate", "--calibrate --mode=generate", "--calibrate: changes label scores, which --mode generate does "),
        ("generate", "--max_new_tokens=0", "--max_new_tokens 0: must be 1 or more"),
        ("generate", "--num_samples=0", "--num_samples 0: must be 1 or more"),
        ("generate", "--batch_size=-1", "--batch_size -1: must be 1 or more"),
        ("generate", "--temperature=-1", "--temperature -1.0: must be 0 or more"),
        ("generate", "--top_k=-1", "--top_k -1: must be 0 or more"),
        ("generate", "--top_p=0", "--top_p 0.0: must be above 0 and at most 1"),
        ("generate", "--limit=-1", "--limit -1: must be 0 or more"),
        ("generate", "--prompt=", "the prompt is empty: give at least one token to continue"),
        ("generate", f"--prompt={'x' * 97}", "the prompt has 97 tokens, the model reads at most 96: shorten it"),
    ],
)
def test_sizes_of_reading_and_writing_that_cannot_be(
    verb: str, flag: str, line: str, assets: Path, refuse: Refuse
) -> None:
    given = refuse(verb, f"--init_from={assets / 'model'}", *(flag.split() if "--" in flag[2:] else [flag]))
    assert given == line or (line.endswith(" ") and given.startswith(line))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--init_from=gpt3", "unknown model 'gpt3': did you mean 'gpt2'? known are smollm2-135m, gpt2, "),
        ("--init_from=./nope", "./nope: no such file or folder: check the path, or use smollm2-135m"),
        ("--init_from=work", "work: holds no config.json: is it a Hugging Face folder?"),
        ("--method=lra", "unknown --method 'lra': did you mean 'lora'? known are adapter, bitfit, dora, "),
        ("--method=ia3 --targets=k,x", "unknown target 'x': known are q, k, v, o, up, gate, down"),
        (
            "--method=ia3 --method_args=x=1",
            "--method_args x=1: must be name=value, and --method ia3: has no settings but its",
        ),
        ("--method=lora --rank=0", "--rank 0 means full fine-tuning and contradicts --method lora: leave one out"),
        ("--rank=577", "--rank 577: above the width of blocks.0.attn.q: choose at most 576"),
        ("--targets=q,w", "unknown target 'w': known are q, k, v, o, up, gate, down"),
        ("--targets=gate --init_from=gpt2", "unknown target 'gate': known are q, k, v, o, up, down"),
        ("--targets=,", "--targets is empty: name at least one of q, k, v, o, up, gate, down"),
        ("--method=bitfit", "--method bitfit: this llama model has no biases to train: add --add_biases, which "),
        ("--method=bitfit --rank=4", "--method bitfit takes no --rank 4: leave it out, or use adapter or dora or lora"),
        ("--method=prefix --prefix_length=8192", "--prefix_length 8192: the model reads at most 8192 tokens; shorten"),
        ("--method=prefix --train_layers=2:", "--method prefix learns keys and values for every layer: leave out --tr"),
        ("--train_layers=30:", "--train_layers '30:': holds none of the model's 30 layers, 0 to 29"),
        ("--max_length=8193", "--max_length 8193: the model reads at most 8192 tokens of a text"),
        ("--max_length=0", "--max_length 0: must be greater than 0"),
        ("--device_gflops=0", "--device_gflops 0.0: must be greater than 0"),
        ("--dtype=int4", "--dtype int4: not one of float32, bfloat16, float16"),
        ("--mlp_widths=", "--mlp_widths '': must be two or more whole numbers above 0, as in 1024,512,1"),
        ("--mlp_widths=1024", "--mlp_widths '1024': must be two or more whole numbers above 0, as in 1024,512,1"),
        ("--mlp_widths=8,four", "--mlp_widths '8,four': must be two or more whole numbers above 0, as in 1024,512,1"),
        ("--mlp_widths=8,0,1", "--mlp_widths '8,0,1': must be two or more whole numbers above 0, as in 1024,512,1"),
        (
            "--mlp_widths=8,1 --init_from=gpt2",
            "--init_from is for a language model, --mlp_widths for a plain net; leave one out",
        ),
        (
            "--mlp_widths=8,1 --targets=q",
            "--targets is for a language model, --mlp_widths for a plain net; leave one out",
        ),
        ("--mlp_widths=8,1 --method=lora", "--method lora: with --mlp_widths choose full, bitfit or adapter"),
        ("--mlp_widths=8,1 --rank=4", "--method full takes no --rank 4: leave it out, or use adapter or dora or lora"),
    ],
)
def test_accounts_that_cannot_be(words: str, line: str, refuse: Refuse) -> None:
    Path("work").mkdir()
    assert refuse("estimate", *words.split()).startswith(line)


# Data files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "x.jsonl: the file is empty: write one record a line"),
        (" \n\n", "x.jsonl: the file is empty: write one record a line"),
        (
            '{"txt": "a", "label": 1}\n',
            "x.jsonl: no column 'text': did you mean 'txt'? the columns are txt, label; name ",
        ),
        (ROW + '{"label": 1}\n', "x.jsonl:2: no field 'text': every row needs it"),
        (
            ROW + '{"text": "a", \n',
            "x.jsonl:2: broken JSON: Expecting property name enclosed in double quotes at column",
        ),
        (ROW + "[1]\n", 'x.jsonl:2: a record must be a JSON object (such as {"text": …}), not [1]'),
        (
            ROW + '{"text": "a", "label": 7}\n',
            "x.jsonl:2: unknown label 7: allowed are 0 or 'negative', 1 or 'positive'",
        ),
        (ROW + '{"text": "a", "label": "meh"}\n', "x.jsonl:2: unknown label 'meh': allowed are 0 or 'negative', 1 or "),
        (ROW + '{"text": "a"}\n', "x.jsonl:2: no label (field 'label' is missing or empty): every row needs one"),
        (ROW + '{"text": "café", "label": 1}\n', "x.jsonl:2: byte 14 is not UTF-8 (0xe9); save the file as UTF-8"),
        (ROW + '{"text": " ", "label": 1}\n', "x.jsonl:2: empty text: fill it in, or leave the row out"),
        (ROW + '{"text": null, "label": 1}\n', "x.jsonl:2: empty text: fill it in, or leave the row out"),
    ],
)
def test_a_data_file_with_a_fault(content: str, line: str, assets: Path, refuse: Refuse) -> None:
    Path("x.jsonl").write_bytes(content.encode("latin-1" if "é" in content else "utf-8"))
    assert refuse(*train(assets, "--data=x.jsonl")).startswith(line)
    evaluation = ["evaluate", f"--init_from={assets / 'model'}", f"--template={TEMPLATE}", "--data=x.jsonl"]
    assert refuse(*evaluation).startswith(line)


def test_two_lengths_of_a_run(assets: Path, refuse: Refuse) -> None:
    line = "--epochs and --max_iters both say how long the run is; give one of them"
    assert refuse(*train(assets, "--epochs=2")) == line


def test_data_that_is_no_training_data(assets: Path, refuse: Refuse) -> None:
    folder = Path("only")
    folder.mkdir()
    (folder / "test.jsonl").write_text(ROW)
    assert refuse(*train(assets, "--data=only")) == "--data only: has no train split; it has test"
    answers = "".join(f'{{"prompt": "p{n}", "completion": "c", "label": {n % 2}}}\n' for n in range(9))
    (folder / "train.jsonl").write_text(answers.replace(', "label": 0', "").replace(', "label": 1', ""))
    (folder / "dev.jsonl").write_text(answers)
    words = train(assets, "--data=only")
    assert refuse(*words).startswith("--objective sft: only holds records for --objective kto; sft needs texts with")
    (folder / "train.jsonl").write_text(answers)
    assert refuse(*words).startswith("--objective sft: only holds records for --objective kto; sft needs texts with")


def test_too_few_texts_to_hold_out(assets: Path, refuse: Refuse) -> None:
    Path("x.jsonl").write_text(ROW)
    line = "x.jsonl: too few different texts (1) to hold out validation and test: name them with --val_data FILE and "
    assert refuse(*train(assets, "--data=x.jsonl")).startswith(line)
    words = ["evaluate", f"--init_from={assets / 'model'}", f"--template={TEMPLATE}", "--data=x.jsonl", "--split=test"]
    assert refuse(*words).startswith(line)


def test_data_that_is_not_there(assets: Path, refuse: Refuse) -> None:
    Path("hollow").mkdir()
    line = "hollow: holds no data file: use .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow"
    assert refuse(*train(assets, "--data=hollow")).startswith(line)
    Path("hollow", "thesis.docx").write_text("x")
    assert refuse(*train(assets, "--data=hollow")).startswith(line)
    assert refuse(*train(assets, "--data=hollow/thesis.docx")).startswith("hollow/thesis.docx: is not a data file")
    Path("hollow", "reviews.jsonl").write_text(ROW)
    assert refuse(*train(assets, "--data=hollow")).startswith("hollow: too few different texts (1)")  # it is all train
    has(refuse(*train(assets, "--data=hollow/reviews.jsonl", "--val_data=no.csv")), "--val_data no.csv: no such file")
    has(
        refuse(*train(assets, "--columns=text=body")), "no column 'body': the columns are text, label; name it with --c"
    )
    has(
        refuse(*train(assets, "--columns=label=stars")),
        "no column 'stars': the columns are text, label; name it with --c",
    )


def test_label_words_with_equal_tokens(assets: Path, refuse: Refuse) -> None:
    shutil.copytree(assets / "model", "composing")
    file = Path("composing", "tokenizer.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": {"type": "NFKC"}}))
    labels = "x\u00b2,x2"
    for words in (train(assets), ["evaluate", f"--data={assets / 'data'}", f"--template={TEMPLATE}"]):
        line = refuse(*words, "--init_from=composing", f"--labels={labels}")
        assert line == "label words 'x\u00b2' and 'x2' have equal tokens for this model: choose other --labels"


def test_a_completion_longer_than_the_context(assets: Path, refuse: Refuse) -> None:
    line = refuse(*train(assets, f"--labels=good,{'x' * 99}"))
    has(
        line, "completion longer than the context: ' xxx", "take 101 tokens, and 96 fit", "use a shorter label word, or"
    )
    line = refuse(*train(assets, "--max_length=9"))
    has(line, "completion longer than the context: ' positive' and end-of-text take 10 tokens, and 9 fit")
    line = refuse(*train(assets, f"--template={'Tell me. ' * 11}{{text}}"))
    has(
        line, "no room for the text: template 'custom' takes 98 tokens", "use a shorter template, or raise --max_length"
    )
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b" * 99}) + "\n")
    line = refuse(*train(assets, "--data=pairs.jsonl", "--val_data=pairs.jsonl"))
    has(line, "pairs.jsonl:1: completion longer than the context", "shorten the row")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--prompts=nope.jsonl"], "nope.jsonl: no such file or folder: check the path, or use rotten-tomatoes-pypi"),
        (["--prompts=empty.jsonl"], "empty.jsonl: the file is empty: write one record a line"),
        (["--prompts=hollow.jsonl"], "hollow.jsonl:1: empty prompt: fill it in, or leave the row out"),
        (
            ["--prompts=texts.jsonl"],
            "texts.jsonl:1: no field 'prompt' (the fields are text, label): make prompts of the texts' first words ",
        ),
        (["--prompts=others.jsonl"], "others.jsonl:1: no field 'prompt' (the fields are question)"),
        (
            ["--prompts=others.jsonl", "--prompt_words=3"],
            "others.jsonl:1: no field 'text': every row needs it",
        ),
        (["--prompts=long.jsonl"], "long.jsonl:1: the prompt has 96 tokens, and the model reads at most 96 with the "),
        (["--prompts=only", "--split=test"], "--split test: only has no such split; it has train"),
        (["--out=taken.jsonl"], "--out taken.jsonl: exists already; name a new file"),
        (["--init_from=gpt3"], "unknown model 'gpt3': did you mean 'gpt2'? known are smollm2-135m, "),
        (
            ["--init_from=resume"],
            "graft-run: holds no run (no run.json); train one with graft train --out_dir graft-run",
        ),
        (["--reward_model=nope"], "nope: holds no run (no run.json); train one with graft train --out_dir nope"),
        (["--target_label=meh"], "unknown --target_label 'meh': known are negative, positive"),
        (["--target_label=2"], "unknown --target_label '2': known are negative, positive"),
        (
            ["--reward_model=", "--reward_command=no-such-judge -x"],
            "--reward_command no-such-judge -x: no such program 'no-such-judge'; check the name or its path",
        ),
        (
            ["--reward_model=", "--reward_command=cat '"],
            "--reward_command cat ': no closing quotation; quote it as for a shell",
        ),
        (["--reward_model=", "--reward_command=false"], "--reward_command false: ended with status 1"),
        (
            ["--reward_model=", "--reward_command=ls no-such-file"],
            "--reward_command ls no-such-file: ended with status 2: ls: cannot access 'no-such-file': No such file ",
        ),
        (
            ["--reward_model=", "--reward_command=true"],
            "--reward_command true: printed 0 lines for 4 answers: print one number per line",
        ),
        (["--reward_model=", "--reward_command=cat"], '--reward_command cat: line 1 is \'{"prompt": "a", "answer": '),
        (
            ["--reward_model=", "--reward_command=sed s/.*/nan/"],
            "--reward_command sed s/.*/nan/: line 1 is 'nan', not a finite ",
        ),
    ],
)
def test_pairs_that_cannot_be_made(words: list[str], line: str, assets: Path, finished: Path, refuse: Refuse) -> None:
    contents = {
        "prompts": '{"prompt": "a"}\n{"prompt": "b "}\n',
        "empty": "",
        "hollow": '{"prompt": " "}\n',
        "texts": ROW,
        "others": '{"question": "a"}\n',
        "long": json.dumps({"prompt": "x" * 96}) + "\n",
        "taken": "",
    }
    for name, content in contents.items():
        Path(f"{name}.jsonl").write_text(content)
    Path("only").mkdir()
    shutil.copyfile("prompts.jsonl", "only/train.jsonl")
    given = [
        "--prompts=prompts.jsonl",
        f"--init_from={assets / 'model'}",
        f"--reward_model={finished}",
        "--max_new_tokens=3",
    ]
    assert refuse("pairs", *given, "--dtype=float32", *words).startswith(line)


def test_no_pairs_leave_no_file(assets: Path, finished: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "a"}\n')
    given = ["--prompts=prompts.jsonl", f"--init_from={assets / 'model'}", "--max_new_tokens=3", "--dtype=float32"]
    assert cli.run(["pairs", *given, f"--reward_model={finished}", "--min_margin=1"]) == 1
    line = last_line(*capsys.readouterr())
    assert line == (
        "2 answers to 1 prompts gave no pairs (0 empty, 0 equal to another, 1 ties): raise --num_samples or "
        "--temperature, or lower --min_margin"
    )
    assert [path.name for path in place.iterdir()] == ["prompts.jsonl"]


# Model files ----------------------------------------------------------------------------------------------------------


def damaged(assets: Path, file: str, content: bytes) -> str:
    """A copy of the model in which one file is another."""
    shutil.rmtree("broken", ignore_errors=True)
    shutil.copytree(assets / "model", "broken")
    Path("broken", file).write_bytes(content)
    return "--init_from=broken"


def test_corrupted_and_truncated_safetensors(assets: Path, refuse: Refuse) -> None:
    whole = (assets / "model" / "model.safetensors").read_bytes()
    start = "broken/model.safetensors: corrupted or truncated safetensors file ("
    for content in (b"", whole[:100], whole[:-1], b"\xff" * 8 + whole[8:], whole[:8] + b"junk" + whole[12:]):
        broken = damaged(assets, "model.safetensors", content)
        for words in (train(assets, broken), ["generate", broken, "--prompt=a"]):
            line = refuse(*words)
            assert line.startswith(start) and line.endswith("): fetch it again")


def test_a_broken_run_folder(assets: Path, finished: Path, refuse: Refuse) -> None:
    shutil.copytree(finished, "run", symlinks=True)
    for name in ("best", "last"):
        file = Path("run", name, "adapter_model.safetensors")
        file.write_bytes(file.read_bytes()[:-7])
        words = ["evaluate", "--out_dir=run", f"--checkpoint={name}"]
        assert refuse(*words).startswith(f"{file}: corrupted or truncated safetensors file (")
    Path("run", "run.json").write_text("{}")
    line = "run/run.json: is no record of a run; restore it, or train again in another folder"
    assert refuse("evaluate", "--out_dir=run") == refuse("train", "--out_dir=run", "--resume") == line
    Path("run", "run.json").write_text("{")
    assert refuse("evaluate", "--out_dir=run").startswith("run/run.json, line 1: broken JSON: ")


@pytest.mark.parametrize("command", ["train", "download", "evaluate"])
def test_corrupted_and_truncated_gguf(command: str, assets: Path, refuse: Refuse, tmp_path: Path) -> None:
    head = (assets / "head.gguf").read_bytes()
    for content in (b"", head[:3], head, b"JUNK" + head[4:], head[:200] + bytes(2000) + head[2200:]):
        Path("x.gguf").write_bytes(content)
        flags = ["--init_from=x.gguf", "--base_format=stored", f"--data={assets / 'data'}"]
        words = {"train": train(assets, *flags), "evaluate": ["evaluate", *flags], "download": ["download", "x.gguf"]}
        line = refuse(*words[command])
        assert line.startswith("x.gguf: ") and line.endswith(": fetch it again"), line
    assert not list((tmp_path / "graft").glob("gguf/*"))


@pytest.mark.parametrize(
    ("file", "change", "line"),
    [
        ("config.json", "{", "broken/config.json, line 1: broken JSON: "),
        ("config.json", "[]", "broken/config.json: not a JSON object: fetch it again"),
        (
            "config.json",
            {"model_type": "bert"},
            "broken/config.json: model_type 'bert' is not supported; docs/models.md lists all that are",
        ),
        (
            "config.json",
            {"hidden_size": 0},
            "broken/config.json: hidden_size = 0 is no size; it must be a whole number",
        ),
        ("config.json", {"hidden_size": "8"}, "broken/config.json: hidden_size = '8' is no size; it must be a whole "),
        (
            "config.json",
            {"num_attention_heads": -4},
            "broken/config.json: num_attention_heads = -4 is no size; it must",
        ),
        ("config.json", {"max_position_embeddings": None}, "broken/config.json: max_position_embeddings = None is no "),
        ("config.json", {"num_hidden_layers": 3}, "broken: the tensor model.layers.2."),
        (
            "config.json",
            {"vocab_size": 300},
            "broken: model.embed_tokens.weight gives shape [257, 32], the config wants",
        ),
        ("tokenizer.json", "{}", "broken/tokenizer.json: not a tokenizer that the tokenizers package reads ("),
    ],
)
def test_other_files_of_a_model(file: str, change: Any, line: str, assets: Path, refuse: Refuse) -> None:
    if isinstance(change, dict):
        change = json.dumps({**json.loads((assets / "model" / file).read_text()), **change})
    broken = damaged(assets, file, change.encode())
    assert refuse(*train(assets, broken)).startswith(line)
    assert refuse("generate", broken, "--prompt=a").startswith(line)


def test_a_tokenizer_of_another_model(assets: Path, refuse: Refuse) -> None:
    tokenizer = json.loads((assets / "model" / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: index + 500 * (index > 0) for token, index in vocab.items()}
    broken = damaged(assets, "tokenizer.json", json.dumps(tokenizer).encode())
    line = "broken: its tokenizer has a token 756, its model embeds 257: the files are of two models; fetch them again"
    assert refuse(*train(assets, broken)) == refuse("generate", broken, "--prompt=a") == line


def test_a_model_folder_without_weights_that_we_read(assets: Path, refuse: Refuse) -> None:
    damaged(assets, "pytorch_model.bin", b"a pickle")
    Path("broken", "model.safetensors").unlink()
    line = (
        "broken: holds only pytorch_model.bin: only safetensors and gguf are read (a pickle can run code): convert it"
    )
    assert refuse(*train(assets, "--init_from=broken")).startswith(line)
    Path("broken", "pytorch_model.bin").unlink()
    assert refuse(*train(assets, "--init_from=broken")).startswith("broken: holds no model.safetensors")
    Path("broken", "config.json").unlink()
    assert refuse(*train(assets, "--init_from=broken")).startswith("broken: holds no config.json: is it a Hugging Face")


# Run folders ----------------------------------------------------------------------------------------------------------


def test_an_out_dir_that_holds_another_run_or_other_files(assets: Path, finished: Path, refuse: Refuse) -> None:
    shutil.copytree(finished, "run", symlinks=True)
    line = refuse(*train(assets))
    assert line == "--out_dir run: holds a run already; add --resume to continue it, or name another"
    Path("thesis").mkdir()
    Path("thesis", "thesis.txt").write_text("years of work")
    line = refuse(*train(assets, "--out_dir=thesis"))
    assert line == "--out_dir thesis: holds other files; name a folder that is empty or does not exist"
    assert (
        refuse(*train(assets, "--out_dir=thesis/thesis.txt")) == "--out_dir thesis/thesis.txt: is a file; name a folder"
    )


def test_resuming_with_a_changed_base_rank_or_data(assets: Path, finished: Path, refuse: Refuse) -> None:
    shutil.copytree(finished, "run", symlinks=True)
    resume, model, data = ["train", "--out_dir=run", "--resume"], assets / "model", assets / "data"
    line = refuse(*resume, "--rank=8")
    assert line == "--resume with --rank 8: the run has 4; leave it out, or start a new run"
    line = refuse(*resume, f"--init_from={assets / 'other'}")
    has(line, f"run: was trained on {model} with weights ", f"but {assets / 'other'} holds ", "use the base it was")
    line = refuse(*resume, f"--data={assets / 'nope'}")
    has(line, f"{assets / 'nope'}: no such file or folder")
    with changed(model / "model.safetensors", (assets / "other" / "model.safetensors").read_bytes()):
        for words in (resume, ["evaluate", "--out_dir=run"]):
            has(refuse(*words), "run: was trained on ", "with weights ", "use the base it was trained on")
    with changed(data / "train.jsonl", (data / "train.jsonl").read_bytes() + ROW.encode()):
        has(refuse(*resume), "run: was trained on other data (fingerprint ", "restore the data, or start a new run")


def folders(assets: Path, finished: Path) -> dict[str, str]:
    """What an adapter's folder may be mistaken for; made in the working directory."""
    shutil.copytree(finished, "run", symlinks=True)
    shutil.copytree(finished / "best", "adapter")
    shutil.copytree(finished / "best", "pickled")
    Path("pickled", "adapter_model.safetensors").rename("pickled/adapter_model.bin")
    Path("thesis").mkdir()
    Path("thesis", "thesis.txt").write_text("years of work")
    return {"model": str(assets / "model")}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["export", "--to=out", "--out_dir=nope"], "nope: holds no run (no run.json); train one with graft train --o"),
        (["export", "--to=thesis"], "--to thesis: holds other files; name a folder that is empty or does not exist"),
        (["export", "--to=thesis/thesis.txt"], "--to thesis/thesis.txt: is a file; name a folder"),
        (["export", "--to=run"], "--to run: holds other files; name a folder that is empty or does not exist"),
        (["export", "--to=a/b", "--checkpoint=lst"], "--checkpoint lst: not one of best, last"),
        (
            ["export", "--to=a/b", "--dtype=float16"],
            "--dtype float16: an adapter is kept in float32; use --format merg",
        ),
        (["import", "nope"], "nope: no such folder; name the folder of an adapter"),
        (["import", "thesis"], "thesis: holds no adapter (neither adapter_config.json nor graft_adapter.json)"),
        (["import", "{model}"], "{model}: is a model, not an adapter; use it as it is with --init_from {model}"),
        (["import", "run"], "run: is a run folder already; use it with --out_dir run"),
        (
            ["import", "pickled"],
            "pickled: holds only adapter_model.bin: a pickle can run code, so only safetensors are",
        ),
        (["import", "adapter", "--out_dir=run"], "--out_dir run: holds other files; name a folder that is empty or do"),
        (
            ["import", "adapter", "--init_from=gpt3"],
            "unknown model 'gpt3': did you mean 'gpt2'? known are smollm2-135m",
        ),
        (["import", "adapter", "--template=no field"], "unknown template 'no field': known are sentiment, question, "),
        (["import", "adapter", "--labels=good"], "--labels 'good': name two label words or more, as in negative,posit"),
    ],
)
def test_exports_and_imports_that_cannot_be(
    words: list[str], line: str, assets: Path, finished: Path, refuse: Refuse
) -> None:
    names = folders(assets, finished)
    out_dir = {"export": "run", "import": "new"}[words[0]]
    line = line.format(**names)
    assert refuse(words[0], f"--out_dir={out_dir}", *(word.format(**names) for word in words[1:])).startswith(line)


def test_an_export_or_import_of_broken_files(assets: Path, finished: Path, refuse: Refuse) -> None:
    folders(assets, finished)
    for folder, words in {
        "run/best": ["export", "--out_dir=run", "--to=a/b"],
        "adapter": ["import", "adapter"],
    }.items():
        file = Path(folder, "adapter_model.safetensors")
        file.write_bytes(file.read_bytes()[:-7])
        assert refuse(*words).startswith(f"{file}: corrupted or truncated safetensors file (")
        Path(folder, "adapter_config.json").write_text("[]")
        assert refuse(*words).endswith("not a JSON object; use the folder as it was written")
    with changed(assets / "model" / "model.safetensors", (assets / "other" / "model.safetensors").read_bytes()):
        has(refuse("export", "--out_dir=run", "--to=a/b"), "run: was trained on ", "use the base it was trained on")
    Path("run/best").unlink()
    has(refuse("export", "--out_dir=run", "--to=a/b"), "run/best: no such checkpoint; the run has not saved one yet")


@pytest.mark.parametrize("method", ["adapter", "prefix"])
def test_what_cannot_be_merged(
    method: str, assets: Path, refuse: Refuse, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in train(assets, f"--method={method}", "--json") if not word.startswith("--rank")]
    assert cli.run(words) == 0
    capsys.readouterr()
    line = refuse("export", "--out_dir=run", "--to=out", "--format=merged")
    assert line == (
        f"--format merged: what {method} adds is no change of the base's weights, so it cannot be merged into them; "
        "use --format peft for the adapter's folder, which graft import puts onto its base"
    )


@pytest.mark.parametrize(
    "words", [["export", "--to=out", "--format=merged"], ["export", "--to=out"], ["import", "adapter"]]
)
def test_a_disk_too_full_for_an_export_or_import_leaves_nothing(
    words: list[str], limited: Graft, assets: Path, finished: Path, place: Path
) -> None:
    folders(assets, finished)
    before = snapshot(place)
    given = ["--out_dir=run"] if words[0] == "export" else ["--out_dir=out", f"--init_from={assets / 'model'}"]
    done = limited(3000, *words, *given)
    assert done.returncode == 2
    has(last_line(done.stdout, done.stderr), "disk full: cannot write ")
    assert snapshot(place) == before


class changed:
    """Within the block a file holds something else."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path, self.content = path, content

    def __enter__(self) -> None:
        self.before = self.path.read_bytes()
        self.path.write_bytes(self.content)

    def __exit__(self, *_: object) -> None:
        self.path.write_bytes(self.before)


# Failures under way ---------------------------------------------------------------------------------------------------


@pytest.fixture
def limited(forks: Forks) -> Graft:
    """The command in a process that may write no file of more than `size` bytes: a disk that is full after them."""

    def run(size: int, *words: str) -> Any:
        limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size},) * 2)"
        return forks.output(*words, cwd=Path.cwd(), SOAK_PRELUDE=limit, **child_environment(**UNCOUNTED))

    return run


@pytest.mark.parametrize(
    ("size", "file", "existed"),
    [
        (1000, "run.json", False),
        (16_000, "checkpoints/step-1/adapter_model.safetensors", False),
        (16_000, "checkpoints/step-1/adapter_model.safetensors", True),
    ],
)
def test_a_disk_too_full_for_a_first_checkpoint_leaves_no_run_folder(
    size: int, file: str, existed: bool, limited: Graft, assets: Path, place: Path
) -> None:
    if existed:
        Path("run").mkdir()  # the user's own empty folder stays, empty
    done = limited(size, *train(assets, "--rank=16"))
    line = last_line(done.stdout, done.stderr)
    assert done.returncode == 2
    has(line, f"disk full: cannot write run/{file} (File too large): free some space or choose another folder")
    assert [str(p) for p in Path().rglob("*")] == ["run"] * existed
    has(done.stderr, "nothing was saved: run was cleared\n")


def test_a_disk_that_fills_up_later_leaves_a_run_that_can_be_resumed(limited: Graft, assets: Path, place: Path) -> None:
    done = limited(16_000, *train(assets, "--max_iters=120", "--eval_every=10"))
    has(last_line(done.stdout, done.stderr), "disk full: cannot write run/metrics.jsonl (File too large): free some ")
    assert done.returncode == 2
    step = int(Path("run/last").resolve().name.removeprefix("step-"))
    assert 0 < step < 120 and not list(Path().rglob("*.tmp-*"))
    assert cli.run(["train", "--out_dir=run", "--resume", "--json"]) == 0
    rows = [json.loads(row)["step"] for row in Path("run/metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 121))


def test_predictions_that_cannot_be_written(assets: Path, refuse: Refuse) -> None:
    words = ["evaluate", f"--init_from={assets / 'model'}", f"--data={assets / 'data'}", f"--template={TEMPLATE}"]
    Path("taken").mkdir()
    line = refuse(*words, "--limit=2", "--predictions=taken")
    assert line == "cannot write taken: Is a directory: choose a folder that you may write to"


def test_demonstrations_that_do_not_fit_or_are_not_there(assets: Path, refuse: Refuse) -> None:
    words = ["evaluate", f"--init_from={assets / 'model'}", f"--data={assets / 'data'}", f"--template={TEMPLATE}"]
    words.append("--labels=bad,good")
    has(refuse(*words, "--shots=8"), "--shots: the demonstrations take ", " and 96 fit: use fewer or shorter demonstr")
    has(refuse(*words, "--shots=49"), "--shots 49: there are only 48 demonstrations to choose from")
    Path("pairs").mkdir()
    for split in ("train", "validation", "test"):
        Path("pairs", f"{split}.jsonl").write_text(json.dumps({"prompt": f"so {split}", "completion": " fine"}))
    line = refuse("evaluate", f"--init_from={assets / 'model'}", "--data=pairs", "--shots=1")
    assert line == "--shots: the data are pairs of prompt and completion; demonstrations need text and label"


def break_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loss of the `step`-th batch of a run be NaN; what a plan tries before does not count."""
    numbers = count(1)

    real = trainer_module.Trainer.accumulate

    def broken(self: Any, batch: Any, scale: float) -> Any:
        losses, sums = real(self, batch, scale)
        return [loss * (math.nan if next(numbers) == step else 1.0) for loss in losses], sums

    monkeypatch.setattr(trainer_module.Trainer, "accumulate", broken)


def test_a_loss_that_is_nan_names_the_step_and_the_last_good_checkpoint(
    assets: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_at(7, monkeypatch)
    words = train(assets, "--max_iters=12", "--eval_every=2")
    assert cli.run(words) == 1
    good = place / "run" / "checkpoints" / "step-6"
    line = last_line(*capsys.readouterr())
    assert line == (
        f"step 7: the loss is nan; the last good checkpoint is {good}; try a lower --lr or --alpha, or --dtype float32"
    )
    assert Path("run/last").resolve() == good and not list(Path().rglob("*.tmp-*"))
    monkeypatch.undo()
    os.chdir(place)
    assert cli.run(["evaluate", "--out_dir=run", "--checkpoint=last", "--limit=2", "--json"]) == 0


def test_a_loss_that_is_nan_before_the_first_checkpoint_leaves_no_run_folder(
    assets: Path, graft: Graft, place: Path
) -> None:
    done = graft(*train(assets, "--lr=1e38", "--grad_clip=0"), cwd=place, OMP_NUM_THREADS="1")
    assert done.returncode == 1
    line = last_line(done.stdout, done.stderr)
    assert line.startswith("step 1: the validation loss is nan; no checkpoint was saved before; try a lower --lr")
    assert not list(place.iterdir())


def test_a_resumed_run_that_fails_before_its_first_checkpoint_is_kept(
    assets: Path, place: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed before it had saved anything, a run has a record to go on with: only a first start clears its folder."""
    Path("run").mkdir()
    shutil.copyfile(finished / "run.json", "run/run.json")
    break_at(1, monkeypatch)
    assert cli.run(["train", "--out_dir=run", "--resume"]) == 1
    has(last_line(*capsys.readouterr()), "step 1: the loss is nan; no checkpoint was saved before")
    assert Path("run/run.json").is_file()


# What answers need ----------------------------------------------------------------------------------------------------


def test_classifying_by_generation_leaves_room_for_the_longest_label(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ " negative" has nine tokens here: five could never name it."""
    limits = []

    def spy(model: Any, prompts: Any, params: Any, **_: Any) -> list[list[int]]:
        limits.append(params.limit)
        return [[] for _ in prompts]

    monkeypatch.setattr("graftlm.inference.evaluate.generate_ids", spy)
    for more in ([], ["--max_new_tokens=3"]):
        assert cli.run(["generate", f"--out_dir={finished}", "--limit=2", *more]) == 0
    assert limits == [9, 3]
