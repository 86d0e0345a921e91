"""Training the upper layers only, with what the frozen lower ones give computed once: against training all of them.

    python benchmarks/train_layers.py [--layers 20:] [--rounds 3] [--json-out FILE]

    upper    `graft train --train_layers 20:` on so many reviews, three epochs, its store empty at the start
    all      the same without --train_layers

Each is a process of its own, in turn. Speed is examples over the wall seconds of the steps behind the first epoch,
which fills the store of `upper`; the first epochs are reported apart.
That the gradients are the same is a test: tests/training/test_activation_cache.py. A table goes to stderr, one JSON
object to the last line of stdout.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from _machine import describe
from _rounds import Round, Run, accepted_run, ratios
from startup import GRAFT, timed
from train_vs_peers import ROOT, BenchmarkError, git_state

EPOCHS = 3
CONTENDERS = ("upper", "all")


def measure(contender: str, args: argparse.Namespace, data: Path, folder: Path) -> Run:
    """One run in the new folder `folder`; examples/s of its first epoch and of the later ones."""
    words = ["--init_from", args.model, "--data", str(data), "--rank", "16", "--alpha", "64"]
    words += ["--epochs", str(EPOCHS), "--val_limit", "8"]
    words += ["--out_dir", str(folder / "run"), "--eval_every", "1000000", "--json"]
    if contender == "upper":
        words += ["--train_layers", args.layers]
    figures, out = timed([*GRAFT, "train", *words], folder, GRAFT_HOME=str(folder / "home"))
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    result = json.loads(out)
    return {
        "contender": contender,
        **speeds(rows, len(rows) // EPOCHS),
        "peak_rss_mb": result["peak_rss_mb"],
        "val_loss": result["last"]["val_loss"],
        "other_cpu_share": figures["other_cpu_share"],
    }


def speeds(rows: Sequence[Mapping[str, Any]], per_epoch: int) -> dict[str, float]:
    """Examples/s of the first epoch and of those behind it, from the rows of metrics.jsonl."""

    def speed(some: Sequence[Mapping[str, Any]], before: int) -> float:
        return (some[-1]["examples"] - before) / sum(each(row) for row in some)

    def each(row: Mapping[str, Any]) -> float:
        return row["tokens_in_step"] / row["tokens_per_s"]

    steps = [
        {**row, "tokens_in_step": row["tokens"] - (rows[i - 1]["tokens"] if i else 0)} for i, row in enumerate(rows)
    ]
    return {
        "first_epoch": speed(steps[:per_epoch], 0),
        "later_epochs": speed(steps[per_epoch:], rows[per_epoch - 1]["examples"]),
    }


def summarise(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians, the ratio within rounds, and whether the claim holds."""
    keys = ("first_epoch", "later_epochs", "peak_rss_mb", "val_loss")
    found = ratios(rounds, "later_epochs", "upper", "all")
    return {
        "medians": {name: {key: median(each[name][key] for each in rounds) for key in keys} for name in CONTENDERS},
        "ratios": {"later epochs upper/all": {"rounds": found, "median": median(found)}},
        "claims": {"at least 2.5 times the full depth behind the first epoch": median(found) >= 2.5},
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'examples/s':12}{'1st epoch':>12}{'later':>12}{'peak MB':>10}{'val loss':>10}"]
    for name, m in summary["medians"].items():
        lines.append(
            f"{name:12}{m['first_epoch']:12.2f}{m['later_epochs']:12.2f}{m['peak_rss_mb']:10.0f}{m['val_loss']:10.4f}"
        )
    for name, ratio in summary["ratios"].items():
        lines.append(f"{name:28}{ratio['median']:7.3f}   ({'  '.join(f'{x:.3f}' for x in ratio['rounds'])})")
    lines += [f"{claim + '?':60}{'yes' if holds else 'NO'}" for claim, holds in summary["claims"].items()]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="20:", help="the layers that are trained (default 20:)")
    parser.add_argument("--reviews", type=int, default=256, help="training reviews (default 256)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--max-other", type=float, default=0.03, help="share of the cores others may use (0.03)")
    parser.add_argument("--json-out", type=Path, help="write the JSON object to this file too")
    args = parser.parse_args(words)
    sys.path.insert(0, str(ROOT / "src"))
    from graftlm.files.assets import data_folder, model_folder

    source, numbers, rounds = data_folder("rotten-tomatoes-pypi"), count(1), []
    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as name:
        work = Path(name)
        (work / "data").mkdir()
        for split, rows in (("train", args.reviews), ("validation", 8), ("test", 8)):
            lines = (source / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")[:rows]
            (work / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
        args.model = str(model_folder("smollm2-135m"))
        try:
            for number in range(1, args.rounds + 1):
                done: dict[str, Run] = {}
                for contender in CONTENDERS:

                    def once(contender: str = contender) -> Run:
                        return measure(contender, args, work / "data", work / f"run-{next(numbers)}")

                    run, _ = accepted_run(once, args.max_other, 3)
                    if run is None:
                        raise BenchmarkError("no quiet run in 3 attempts; stop other work, or raise --max-other")
                    done[contender] = run
                rounds.append(done)
                print(f"round {number} of {args.rounds} done", file=sys.stderr)
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    summary = summarise(rounds)
    print(table(summary), file=sys.stderr)
    config = {"layers": args.layers, "reviews": args.reviews, "epochs": EPOCHS, "rank": 16, "max_other": args.max_other}
    report = {"machine": describe(), "graftlm": git_state(), "config": config, **summary, "runs": rounds}
    if args.json_out:
        args.json_out.parent.mkdir(parents=True, exist_ok=True)
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
