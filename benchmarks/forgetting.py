"""Forgetting: how a run changes the loss per token on general text that it was not trained on.

    python benchmarks/forgetting.py --run FOLDER [--checkpoint last] [--json-out FILE]

    imdb        32 reviews of the test split of imdb-pypi
    licences    the licence of Python and the Apache License 2.0, as packages of constraints.txt contain them

Losses are in nats per predicted token, base and run in float32. The interval of the difference is paired by window: up
to 512 tokens of a review, or 256 of a licence. A run has seen neither text unless its own data contain it.
"""

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, files
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import harness
from harness import BenchmarkError, Run

IMDB, REVIEWS = "imdb-pypi", 32
LICENCES = {
    "typing_extensions": "3b2f81fe21d181c499c59a256c8e1968455d6689d269aa85373bfb6af41da3bf",
    "huggingface_hub": "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
}
"""A package -> sha256 of its file LICENSE: that of Python's standard library, and the Apache License 2.0."""
WINDOWS = {"imdb": 512, "licences": 256}
"""A text -> tokens of its longest window."""
BATCH_SIZE = 8
Losses = dict[str, Any]
"""Of a text: sha256, and of each window nats (summed over its predicted tokens) and tokens (the predicted ones)."""


# --------------------------------------------------------------------------------------------------------- the texts


class Change(NamedTuple):
    """The change of a loss in nats per token, and its 95% interval."""

    mean: float
    ci_low: float
    ci_high: float


def general_texts() -> dict[str, list[str]]:
    """The documents of each text. Raises BenchmarkError if a licence is not the one of constraints.txt."""
    from graftlm.text.collate import subset
    from graftlm.text.dataset import load_dataset
    from graftlm.text.template import DEFAULT, load_template

    reviews = load_dataset(IMDB, labels=load_template(DEFAULT).labels).splits["test"]
    return {
        "imdb": [review.text for review in subset(reviews, REVIEWS)],
        "licences": [licence(package, sha256) for package, sha256 in LICENCES.items()],
    }


def licence(package: str, sha256: str) -> str:
    """The text of an installed package's LICENSE with this hash."""
    try:
        paths = [path.locate() for path in files(package) or () if path.name == "LICENSE"]
    except PackageNotFoundError:
        paths = []
    found = [content for path in paths if hashlib.sha256(content := Path(str(path)).read_bytes()).hexdigest() == sha256]
    if not found:
        raise BenchmarkError(f"{package}: has no LICENSE with sha256 {sha256[:12]}…: install what constraints.txt says")
    return found[0].decode("utf-8")


def text_hash(documents: Sequence[str]) -> str:
    """The sha256 of a text: of its documents, with a zero byte after each."""
    return hashlib.sha256("".join(f"{document}\0" for document in documents).encode("utf-8")).hexdigest()


def windows(tokenizer: Any) -> dict[str, tuple[str, list[Any]]]:
    """Of each text its hash and its windows; no window has tokens of two documents."""
    from graftlm.text.collate import encode_rows
    from graftlm.text.records import Document
    from graftlm.text.template import DEFAULT, load_template

    template, found = load_template(DEFAULT), {}
    for name, documents in general_texts().items():
        records = [Document(text) for text in documents]
        examples, _ = encode_rows(records, template, tokenizer, WINDOWS[name], packing=True)
        found[name] = text_hash(documents), examples
    return found


# ---------------------------------------------------------------------------------------------------------- measured


def losses(model: Any, tokenizer: Any) -> dict[str, Losses]:
    """The losses of a `CausalLM` on each text."""
    from graftlm.inference.scoring import score

    found = {}
    for name, (sha256, examples) in windows(tokenizer).items():
        scores = score(model, examples, batch_size=BATCH_SIZE)
        nats, tokens = (-scores.completion).tolist(), scores.completion_tokens.tolist()
        found[name] = {"sha256": sha256, "nats": nats, "tokens": tokens}
    return found


def child(task: Mapping[str, str]) -> Run:
    """The losses of a run's checkpoint."""
    from graftlm.exchange.load import load

    loaded = load(task["model"], checkpoint=task["checkpoint"], dtype="float32")
    return losses(loaded.model, loaded.tokenizer)


def measure(run: Path, checkpoint: str, folder: Path) -> dict[str, Losses]:
    """The same of a run folder, in a process of its own, which uses `folder`. checkpoint: best, last or base."""
    settings = {"model": str(run), "checkpoint": checkpoint}
    found = harness.run_peer(__file__, settings, folder)
    return {name: found[name] for name in WINDOWS}


def change(base: Losses, trained: Losses) -> Change:
    """The change of the mean loss per token from one model to another, paired by window.

    The mean is a ratio, of the sum of the windows' differences and the sum of their tokens; its interval is the ratio
    estimator's, with Student's t (Cochran 1977, Sampling Techniques, chapter 6). It covers the choice of windows.
    """
    from graftlm.inference.metrics import t_quantile

    if (base["sha256"], base["tokens"]) != (trained["sha256"], trained["tokens"]):
        raise BenchmarkError("the two models were measured on different windows")
    tokens, n = base["tokens"], len(base["tokens"])
    differences = [after - before for before, after in zip(base["nats"], trained["nats"], strict=True)]
    mean = sum(differences) / sum(tokens)
    squares = sum((each - mean * count) ** 2 for each, count in zip(differences, tokens, strict=True))
    half = t_quantile(n) * sqrt(n / (n - 1) * squares) / sum(tokens)
    return Change(mean, mean - half, mean + half)


def compared(base: Mapping[str, Losses], trained: Mapping[str, Losses]) -> dict[str, dict[str, Any]]:
    """Of each text what a result says: its hash and size, nats per token of both models, and the change."""
    found = {}
    for name, before in base.items():
        after, tokens = trained[name], sum(before["tokens"])
        found[name] = {
            "sha256": before["sha256"],
            "windows": len(before["tokens"]),
            "tokens": tokens,
            "base": sum(before["nats"]) / tokens,
            "trained": sum(after["nats"]) / tokens,
            **{key if key != "mean" else "change": x for key, x in change(before, after)._asdict().items()},
        }
    return found


def cell(measured: Mapping[str, Mapping[str, float]]) -> str:
    """The changes in a table's cell: `+0.12 (0.10 to 0.14) / …`, a text after the other."""
    parts = (measured[name] for name in WINDOWS)
    return " / ".join(f"{each['change']:+.3f} ({each['ci_low']:.3f} to {each['ci_high']:.3f})" for each in parts)


HEAD = f"forgetting, nats/token: {' / '.join(WINDOWS)}"


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The run's checkpoint, compared with its base."""
    if args.run is None:
        raise BenchmarkError("name a run folder by --run")
    base, trained = (measure(args.run, name, work / name) for name in ("base", args.checkpoint))
    found = compared(base, trained)
    harness.note(f"{HEAD}: {cell(found)}")
    return {"config": {"checkpoint": args.checkpoint}, "forgetting": found}


FLAGS: dict[str, dict[str, Any]] = {
    "run": {"type": lambda text: Path(text).absolute(), "help": "a run folder"},
    "checkpoint": {"choices": ("best", "last"), "default": "last", "help": "its checkpoint (default last)"},
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS, child=child))
