"""Few-shot classification: graft against lm-evaluation-harness on the same prompts, on this machine, in turn.

    python benchmarks/fewshot_vs_peers.py [--limit 200] [--shots 8] [--rounds 3] [--json-out FILE]

    graft-FORMAT      `graft evaluate --shots 8 --read score --dtype FORMAT`: the demonstrations are run once
    harness-FORMAT    lm_eval's HFLM on the model in transformers, in the batch size that a short trial finds fastest

in float32, and in bfloat16 where the processor has instructions for it. Both score the two labels of the same test
reviews behind the same prompts, which the harness tokenises itself; where its tokens are not graft's the run fails.
Neither loading nor tokenising is timed, glibc keeps its memory on both sides, and each run is a process of its own, in
turn; one during which others used more than 3% of the cores is thrown away and repeated. Every run gives its
log-likelihoods, and in float32 they must be the same. A table goes to stderr, one JSON object to the last line of
stdout.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from _machine import describe, run_measured, worth_trying
from _rounds import Round, Run, accepted_run, ratios
from train_vs_peers import OFFLINE, ROOT, BenchmarkError, git_state

DATA = "rotten-tomatoes-pypi"
FORMATS = ("float32", "bfloat16")
BATCHES = "1,4,8,16"
TRIAL_REVIEWS = 16
SAME_SCORES = 1e-3  # nats, in float32


@dataclass(frozen=True)
class Task:
    """What the harness is told."""

    model: str
    limit: int
    shots: int
    dtype: str
    batch_size: int


# -------------------------------------------------------------------------------------------------------- the peer


def run_peer(task: Task) -> Run:
    """The harness in this process: reviews a second over all requests, and each review's log-likelihoods."""
    from graftlm.process import keep_memory

    if not keep_memory():
        raise RuntimeError("the C library refused to keep memory: this would be a weaker peer than the one promised")
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from graftlm.exchange.load import load
    from graftlm.inference.fewshot import build_fewshot
    from graftlm.text.collate import label_ids, load_dataset, subset
    from graftlm.text.template import DEFAULT, load_template

    ours = load(task.model, device="cpu", dtype="float32")
    template = load_template(DEFAULT)
    splits = load_dataset(DATA, labels=template.labels).splits
    rows = subset(splits["test"], task.limit)
    examples = build_fewshot(ours.model, ours.tokenizer, template, rows, splits["train"], shots=task.shots).examples
    labels = label_ids(template, ours.tokenizer)
    del ours

    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=getattr(torch, task.dtype)).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(task.model)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=task.batch_size, device="cpu")
    words = [template.completion(number) for number in range(len(labels))]
    requests = []
    for example, row in zip(examples, rows, strict=True):
        prompt = example.instr_tuned_text.removesuffix(template.completion(row.label or 0))
        for word, ids in zip(words, labels, strict=True):
            context, continuation = harness._encode_pair(prompt, word)
            if (context, continuation) != (list(example.prompt_ids), list(ids)):
                raise RuntimeError(f"{example.source}: the harness makes other tokens of this prompt than graft")
            requests.append(((prompt, word), context, continuation))
    began = time.perf_counter()
    found = [logp for logp, _ in harness._loglikelihood_tokens(requests, disable_tqdm=True)]
    seconds = time.perf_counter() - began
    scores = [found[n : n + len(words)] for n in range(0, len(found), len(words))]
    right = sum(max(each) == each[row.label or 0] for each, row in zip(scores, rows, strict=True))
    return {"n": len(rows), "accuracy": right / len(rows), "examples_per_s": len(rows) / seconds, "scores": scores}


# ---------------------------------------------------------------------------------------------------------- one run


def measure(contender: str, task: Task, folder: Path) -> Run:
    """Run "graft" or "harness" in its own process in the new folder `folder`; its figures and scores."""
    folder.mkdir()
    if contender == "harness":
        (folder / "task.json").write_text(json.dumps(asdict(task)), encoding="utf-8")
        command = [sys.executable, str(Path(__file__).resolve()), "--task", str(folder / "task.json")]
    else:
        words = ["--init_from", task.model, "--data", DATA, "--limit", str(task.limit), "--shots", str(task.shots)]
        words += ["--dtype", task.dtype, "--read", "score", "--predictions", str(folder / "rows.jsonl"), "--json"]
        command = [sys.executable, "-m", "graftlm", "evaluate", *words]
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    seen = run_measured(command, folder, {**os.environ, **OFFLINE, "PYTHONPATH": os.pathsep.join(paths)})
    if seen.status != 0:
        tail = "\n".join(seen.stderr.splitlines()[-15:])
        raise BenchmarkError(f"{contender} failed with status {seen.status}; the end of its messages:\n{tail}")
    figures = json.loads(seen.stdout.rstrip("\n").rpartition("\n")[2])
    if contender == "graft":
        rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").split("\n") if line]
        figures["scores"] = [list(row["scores"].values()) for row in rows]
    return {
        **{key: figures[key] for key in ("n", "accuracy", "examples_per_s", "scores")},
        "peak_rss_mb": seen.max_rss_mb,
        "process_seconds": seen.seconds,
        "other_cpu_share": seen.other_cpu_share,
    }


def choose(
    task: Task, formats: Sequence[str], sizes: Sequence[int], work: Path
) -> tuple[dict[str, int], dict[str, float]]:
    """The harness's fastest batch size for each format on this machine, and the reviews a second of every trial."""
    if len(sizes) == 1:
        return dict.fromkeys(formats, sizes[0]), {}
    tried = {
        (name, size): measure(
            "harness",
            replace(task, limit=min(TRIAL_REVIEWS, task.limit), dtype=name, batch_size=size),
            work / f"trial-{name}-{size}",
        )["examples_per_s"]
        for name in formats
        for size in sizes
        if size <= min(TRIAL_REVIEWS, task.limit)
    }
    best = {name: max((s for n, s in tried if n == name), key=lambda size: tried[name, size]) for name in formats}
    return best, {f"harness {name} batch {size}": speed for (name, size), speed in tried.items()}


# ---------------------------------------------------------------------------------------------------- what it says


def apart(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """The largest difference between two lists of label scores."""
    return max(abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def summarise(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians, ratios within rounds, how far the scores lie apart, and whether the claims hold (null: not measured)."""
    names = list(rounds[0])
    formats = [name.removeprefix("graft-") for name in names if name.startswith("graft-")]
    speed = "examples_per_s"
    medians = {
        name: {key: median(each[name][key] for each in rounds) for key in (speed, "accuracy", "peak_rss_mb")}
        for name in names
    }
    compared = {f"graft/harness {name}": ratios(rounds, speed, f"graft-{name}", f"harness-{name}") for name in formats}

    def fastest(each: Round, side: str) -> Run:
        return max((each[name] for name in names if name.startswith(side)), key=lambda run: run[speed])

    best = [{side: fastest(each, side) for side in ("graft", "harness")} for each in rounds]
    compared["graft/harness, each in its fastest format"] = ratios(best, speed, "graft", "harness")
    found: dict[str, Any] = {name: {"rounds": xs, "median": median(xs)} for name, xs in compared.items()}
    scores = {
        name: max(apart(each[f"graft-{name}"]["scores"], each[f"harness-{name}"]["scores"]) for each in rounds)
        for name in formats
    }
    own = found.get("graft/harness bfloat16")
    return {
        "medians": medians,
        "ratios": found,
        "scores_apart": scores,
        "claims": {
            "at least 15 times the harness in bfloat16": own["median"] >= 15 if own else None,
            "at least 15 times the harness, each in its fastest format": (
                found["graft/harness, each in its fastest format"]["median"] >= 15
            ),
            "the same log-likelihoods in float32, to 1e-3": scores["float32"] <= SAME_SCORES,
        },
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'':18}{'examples/s':>12}{'accuracy':>10}{'peak MB':>10}"]
    for name, m in summary["medians"].items():
        lines.append(f"{name:18}{m['examples_per_s']:12.2f}{m['accuracy']:10.3f}{m['peak_rss_mb']:10.0f}")
    for name, ratio in summary["ratios"].items():
        lines.append(f"{name:44}{ratio['median']:7.2f}   ({'  '.join(f'{x:.2f}' for x in ratio['rounds'])})")
    lines += [f"largest difference of a score, {name:13}{x:10.1e}" for name, x in summary["scores_apart"].items()]
    words = {True: "yes", False: "NO", None: "not measured"}
    lines += [f"{claim + '?':60}{words[holds]}" for claim, holds in summary["claims"].items()]
    return "\n".join(lines)


def run_rounds(
    args: argparse.Namespace, task: Task, batches: Mapping[str, int], work: Path
) -> tuple[list[dict[str, Run]], list[Run]]:
    """All rounds in turn: (accepted runs by contender, rejected runs). A round with a run missing is an error."""
    numbers, rounds, thrown_away = count(1), [], []
    for number in range(1, args.rounds + 1):
        done: dict[str, Run] = {}
        for dtype, size in batches.items():
            for side in ("graft", "harness"):
                own = replace(task, dtype=dtype, batch_size=size)

                def once(side: str = side, own: Task = own) -> Run:
                    return measure(side, own, work / f"run-{next(numbers)}")

                run, rejected = accepted_run(once, args.max_other, args.attempts)
                thrown_away += [{"round": number, "contender": f"{side}-{dtype}", **each} for each in rejected]
                if run is None:
                    raise BenchmarkError(f"{side}-{dtype}: no quiet run in {args.attempts} attempts; stop other work")
                print(f"  {side}-{dtype:10}{run['examples_per_s']:8.2f} examples/s", file=sys.stderr)
                done[f"{side}-{dtype}"] = run
        rounds.append(done)
    return rounds, thrown_away


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=200, help="reviews (default 200)")
    parser.add_argument("--shots", type=int, default=8, help="demonstrations before each (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender (default 3)")
    parser.add_argument("--formats", default="", help="number formats, with commas (default: what is worth trying)")
    parser.add_argument("--batch-sizes", default=BATCHES, help=f"the harness's, to try (default {BATCHES})")
    parser.add_argument("--json-out", type=Path, help="write the JSON object to this file too")
    parser.add_argument("--max-other", type=float, default=0.03, help="share of the cores others may use (0.03)")
    parser.add_argument("--attempts", type=int, default=3, help="runs until one is quiet enough (default 3)")
    parser.add_argument("--model", default="smollm2-135m", help="base model (default smollm2-135m)")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)  # the child's mode
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark (or, with --task, the harness for it); the exit status."""
    args = parse(words)
    if args.task:
        print(json.dumps(run_peer(Task(**json.loads(args.task.read_text(encoding="utf-8"))))))
        return 0
    sys.path.insert(0, str(ROOT / "src"))  # this checkout, not an installed graftlm
    from graftlm.files.assets import model_folder

    formats = args.formats.split(",") if args.formats else worth_trying(FORMATS)
    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as name:
        work = Path(name)
        task = Task(str(model_folder(args.model)), args.limit, args.shots, "float32", 1)
        try:
            batches, trials = choose(task, formats, [int(size) for size in args.batch_sizes.split(",")], work)
            print(f"the harness's batch sizes: {batches}", file=sys.stderr)
            rounds, rejected = run_rounds(args, task, batches, work)
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    summary = summarise(rounds)
    print(table(summary), file=sys.stderr)
    config = {"model": args.model, "limit": args.limit, "shots": args.shots, "batch_sizes": batches}
    about = {"machine": describe(), "graftlm": git_state(), "config": {**config, "max_other": args.max_other}}
    kept = [{name: {k: v for k, v in run.items() if k != "scores"} for name, run in each.items()} for each in rounds]
    thrown = [{k: v for k, v in run.items() if k != "scores"} for run in rejected]
    report = {**about, "trials": trials, **summary, "runs": kept, "rejected": thrown}
    if args.json_out:
        args.json_out.parent.mkdir(parents=True, exist_ok=True)
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
