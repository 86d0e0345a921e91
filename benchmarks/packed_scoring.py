"""Reviews with a packed base next to the same base in float32: scored, and learned from.

    python benchmarks/packed_scoring.py [--study scoring|demo] [--limit 1000] [--rounds 1] [--json-out FILE]

SmolLM2-135M's Q4_1 file: its blocks as they are (`stored`), and dequantised (`dense`). The label words of the first
reviews of the test and validation splits are scored (`graft evaluate --mode score`), each base in a process of its
own. Speed is reviews per second of processor time in one thread, since other work on the machine then hardly counts.

demo: the run of `make demo` (recipes/demo.toml) on the base as it is in the file, rounded to Q8_0, and in float32; and
what each scores on the test split.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import Run

CONTENDERS = ("dense", "stored")
FIGURES = ("reviews_per_cpu_s", "accuracy", "peak_rss_mb")
PAIRS = {f"{key} stored/dense": (key, "stored", "dense") for key in ("reviews_per_cpu_s", "peak_rss_mb")}
GOALS = {"at least as fast as float32": ("reviews_per_cpu_s stored/dense", ">=", 1.0)}
TRAINED = ("dense", "stored", "q8_0")
TRAIN_FIGURES = ("accuracy", "ci_low", "ci_high", "val_loss", "peak_rss_mb", "seconds_to_first_step")
START_S = 5


def child(settings: dict[str, Any]) -> Run:
    """A contender's run, in its own process."""
    from graftlm.cli.main import tune_malloc_retain

    tune_malloc_retain()
    import torch

    from graftlm.exchange.load import load
    from graftlm.inference.evaluate import evaluate
    from graftlm.text.collate import encode_rows
    from graftlm.text.dataset import load_dataset
    from graftlm.text.template import DEFAULT, load_template

    torch.set_num_threads(1)
    loaded = load(settings["model"], device="cpu", dtype="float32", base_format=settings["contender"])
    template, splits = load_template(DEFAULT), load_dataset(settings["data"]).splits
    rows = [*splits["test"], *splits["validation"]][: settings["limit"]]
    examples, _ = encode_rows(rows, template, loaded.tokenizer, loaded.model.max_seq_len)
    start = time.process_time()
    found = evaluate(loaded.model, loaded.tokenizer, template, examples, mode="score")
    seconds = time.process_time() - start
    return {
        "labels": [row["predicted"] for row in found.rows],
        "accuracy": found.metrics["score"].accuracy,
        "reviews_per_cpu_s": len(examples) / seconds,
        "peak_rss_mb": harness.peak_rss_mb(),
    }


def train(flags: dict[str, Any], folder: Path) -> Run:
    """The demo's run in this format, and its score on the test split."""
    config = {"config": harness.ROOT / "recipes" / "demo.toml", "out_dir": folder / "run"}
    learned = harness.run_graft("train", {**config, **flags}, folder)
    scored = harness.run_graft("evaluate", {"out_dir": folder / "run", "mode": "score"}, folder)
    found = {key: learned[key] for key in ("seconds_to_first_step", "peak_rss_mb", "other_cpu_share")}
    return {**found, "val_loss": learned["last"]["val_loss"], **{key: scored[key] for key in TRAIN_FIGURES[:3]}}


def demo(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The demo's runs."""
    flags = {"init_from": args.model, "data": args.data, **({"max_iters": args.steps} if args.steps else {})}
    contenders = {name: partial(train, {**flags, "base_format": name}) for name in TRAINED}
    rounds, rejected = harness.run_rounds(contenders, args, work, "accuracy")
    summary = harness.summarise(rounds, TRAIN_FIGURES, {}, {})
    packed = [(each["dense"], each[name]) for each in rounds for name in TRAINED[1:]]
    summary["claims"] = {
        "within float32's interval": all(a["ci_low"] <= b["accuracy"] <= a["ci_high"] for a, b in packed),
        f"first step within {START_S} s": all(b["seconds_to_first_step"] <= START_S for _, b in packed),
    }
    return {"config": {"recipe": "recipes/demo.toml", **flags}, **summary, "runs": rounds, "rejected": rejected}


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Rounds and summary."""
    if args.study == "demo":
        return demo(args, work)
    settings = {"model": args.model, "data": args.data, "limit": args.limit}

    def measure(name: str, folder: Path) -> Run:
        return harness.run_peer(__file__, {"contender": name, **settings}, folder)

    contenders = {name: partial(measure, name) for name in CONTENDERS}
    rounds, rejected = harness.run_rounds(contenders, args, work, "reviews_per_cpu_s")
    summary = harness.summarise(rounds, FIGURES, PAIRS, GOALS)
    labels = [run.pop("labels") for each in rounds for run in each.values()]
    summary["claims"]["equal labels"] = all(each == labels[0] for each in labels)
    return {"config": {**settings, "threads": 1}, **summary, "runs": rounds, "rejected": rejected}


FLAGS: dict[str, dict[str, Any]] = {
    "study": {"choices": ("scoring", "demo"), "default": "scoring", "help": "what is measured (default scoring)"},
    "steps": {"type": int, "help": "of demo: optimizer steps of a run (default: the recipe's)"},
    "limit": {"type": harness.at_least(2), "default": 1000, "help": "reviews (default 1000)"},
    **harness.SOURCE,
    **harness.ROUNDS,
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS, child=child))
