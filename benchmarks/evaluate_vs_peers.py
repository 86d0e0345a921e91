"""Reading labels of reviews: graft against transformers, by score and by generation, on this machine, in turn.

    python benchmarks/evaluate_vs_peers.py [--limit 1000] [--rounds 3] [--json-out FILE]

    graft-score      `graft evaluate --read score`
    graft-generate   `graft evaluate --read generate`, at most 5 tokens a review
    hf-score         transformers, batches of 32 sorted by length, the head at each row's last position only
    hf-generate      transformers' own generate, batches of 32 sorted by length, padded on the left, 5 tokens, greedy

All read the same reviews of the test split behind the same prompt, as the same tokens, with the base model as it is
(zero-shot), and with glibc told to keep its memory. Which number format is fastest differs from processor to
processor: a short trial picks the peers'; graft chooses for itself. Loading is not timed. Scores compare with scores,
and with the faster of both peers; each run is a process of its own, in turn; one during which others used more than 3%
of the cores is thrown away and repeated. A table goes to stderr, one JSON object to the last line of stdout.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from _machine import describe, run_measured, worth_trying
from _rounds import Round, Run, accepted_run, ratios
from train_vs_peers import OFFLINE, ROOT, BenchmarkError, git_state

PEERS = ("hf-score", "hf-generate")
CONTENDERS = ("graft-score", "graft-generate", *PEERS)
FORMATS = ("float32", "bfloat16")
TRIAL_EXAMPLES = 96
NEW_TOKENS = 5
SAME_ACCURACY = 0.01  # rounding in another format may turn a review that stands on the edge


@dataclass(frozen=True)
class Task:
    """What a peer is told."""

    model: str
    limit: int
    batch_size: int
    formats: dict[str, str]
    """Contender -> its number format."""


# -------------------------------------------------------------------------------------------------------- the peers


def run_peer(contender: str, task: Task) -> Run:
    """One peer in this process: accuracy and examples/s over all batches, the model's loading apart."""
    from graftlm.process import keep_memory

    if not keep_memory():
        raise RuntimeError("the C library refused to keep memory: this would be a weaker peer than the one promised")
    import torch
    from transformers import AutoModelForCausalLM

    from graftlm.exchange.load import read_tokenizer
    from graftlm.text.collate import encode_rows, label_ids, load_dataset, subset
    from graftlm.text.template import DEFAULT, load_template

    template, tokenizer = load_template(DEFAULT), read_tokenizer(Path(task.model))
    rows = subset(load_dataset("rotten-tomatoes-pypi", labels=template.labels).splits["test"], task.limit)
    examples, _ = encode_rows(rows, template, tokenizer, 512)
    labels = label_ids(template, tokenizer)
    dtype = getattr(torch, task.formats[contender])
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype).eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    batches = [order[i : i + task.batch_size] for i in range(0, len(order), task.batch_size)]
    by_text = partial(_generated, model, tokenizer, template)
    read = partial(_scored, model, labels) if contender == "hf-score" else by_text
    right, began = 0, time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            predicted = read([list(examples[i].prompt_ids) for i in batch])
            right += sum(p == examples[i].label for p, i in zip(predicted, batch, strict=True))
    seconds = time.perf_counter() - began
    return {"n": len(examples), "accuracy": right / len(examples), "examples_per_s": len(examples) / seconds}


def _scored(model: Any, labels: Sequence[Sequence[int]], prompts: list[list[int]]) -> list[int]:
    """The likeliest label: padding on the right, which causal attention never sees, and the head at the last token."""
    import torch

    if any(len(ids) != 1 for ids in labels):
        raise RuntimeError("this peer scores labels of one token only")
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[torch.arange(len(prompts)), last]
    logits = model.lm_head(hidden).float().log_softmax(-1)
    return logits[:, [token for (token,) in labels]].argmax(-1).tolist()


def _generated(model: Any, tokenizer: Any, template: Any, prompts: list[list[int]]) -> list[int]:
    """The label found in generated text, as graft finds it."""
    import torch

    from graftlm.inference.evaluate import parse_label

    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.eot] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eot,
        pad_token_id=tokenizer.eot,
    )
    new = [[t for t in row if t != tokenizer.eot] for row in out[:, width:].tolist()]
    return [parse_label(tokenizer.decode(row), template.labels) for row in new]


# ---------------------------------------------------------------------------------------------------------- one run


def measure(contender: str, task: Task, folder: Path) -> Run:
    """Run one contender in its own process in the new folder `folder`; its figures, inside and outside ones."""
    folder.mkdir()
    if contender in PEERS:
        (folder / "task.json").write_text(json.dumps(asdict(task)), encoding="utf-8")
        script = str(Path(__file__).resolve())
        command = [sys.executable, script, "--run", contender, "--task", str(folder / "task.json")]
    else:
        words = ["--init_from", task.model, "--data", "rotten-tomatoes-pypi", "--limit", str(task.limit)]
        words += ["--batch_size", str(task.batch_size), "--read", contender.removeprefix("graft-"), "--json"]
        command = [sys.executable, "-m", "graftlm", "evaluate", *words]
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    seen = run_measured(command, folder, {**os.environ, **OFFLINE, "PYTHONPATH": os.pathsep.join(paths)})
    if seen.status != 0:
        tail = "\n".join(seen.stderr.splitlines()[-15:])
        raise BenchmarkError(f"{contender} failed with status {seen.status}; the end of its messages:\n{tail}")
    figures = json.loads(seen.stdout.rstrip("\n").rpartition("\n")[2])
    return {
        **{key: figures[key] for key in ("n", "accuracy", "examples_per_s")},
        "peak_rss_mb": seen.max_rss_mb,
        "process_seconds": seen.seconds,
        "other_cpu_share": seen.other_cpu_share,
    }


def choose(task: Task, work: Path) -> tuple[Task, dict[str, float]]:
    """The task with each peer's fastest number format on this machine, and the examples/s of every trial."""
    tried = {
        (contender, name): measure(
            contender,
            replace(task, limit=TRIAL_EXAMPLES, formats={contender: name}),
            work / f"trial-{contender}-{name}",
        )["examples_per_s"]
        for contender in PEERS
        for name in worth_trying(FORMATS)
    }
    best = {peer: max(worth_trying(FORMATS), key=lambda name: tried[peer, name]) for peer in PEERS}
    return replace(task, formats=best), {f"{peer} {name}": speed for (peer, name), speed in tried.items()}


# ---------------------------------------------------------------------------------------------------- what it says


def summarise(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians, ratios within rounds (score against the faster peer of the round), and whether the claims hold."""
    medians = {
        name: {key: median(each[name][key] for each in rounds) for key in ("examples_per_s", "accuracy", "peak_rss_mb")}
        for name in CONTENDERS
    }
    speed = "examples_per_s"
    best = [{**each, "best": max((each[p] for p in PEERS), key=lambda run: run[speed])} for each in rounds]
    compared = {
        "score graft/best peer": ratios(best, speed, "graft-score", "best"),
        "score graft/hf-score": ratios(best, speed, "graft-score", "hf-score"),
        "generate graft/hf": ratios(best, speed, "graft-generate", "hf-generate"),
    }

    def close(a: str, b: str) -> bool:
        return abs(medians[a]["accuracy"] - medians[b]["accuracy"]) <= SAME_ACCURACY

    return {
        "medians": medians,
        "ratios": {name: {"rounds": found, "median": median(found)} for name, found in compared.items()},
        "claims": {
            "scoring at least 1.8 times the best peer": median(compared["score graft/best peer"]) >= 1.8,
            "generating at least 1.6 times transformers": median(compared["generate graft/hf"]) >= 1.6,
            "equal accuracy": close("graft-score", "hf-score") and close("graft-generate", "hf-generate"),
        },
    }


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'':16}{'examples/s':>12}{'accuracy':>10}{'peak MB':>10}"]
    for name, m in summary["medians"].items():
        lines.append(f"{name:16}{m['examples_per_s']:12.2f}{m['accuracy']:10.3f}{m['peak_rss_mb']:10.0f}")
    for name, ratio in summary["ratios"].items():
        lines.append(f"{name:28}{ratio['median']:7.3f}   ({'  '.join(f'{x:.3f}' for x in ratio['rounds'])})")
    lines += [f"{claim + '?':48}{'yes' if holds else 'NO'}" for claim, holds in summary["claims"].items()]
    return "\n".join(lines)


def run_rounds(args: argparse.Namespace, task: Task, work: Path) -> tuple[list[dict[str, Run]], list[Run]]:
    """All rounds in turn: (accepted runs by contender, rejected runs). A round with a run missing is an error."""
    numbers, rounds, thrown_away = count(1), [], []
    for number in range(1, args.rounds + 1):
        done: dict[str, Run] = {}
        for name in CONTENDERS:

            def once(name: str = name) -> Run:
                return measure(name, task, work / f"run-{next(numbers)}")

            run, rejected = accepted_run(once, args.max_other, args.attempts)
            thrown_away += [{"round": number, "contender": name, **each} for each in rejected]
            if run is None:
                raise BenchmarkError(f"{name}: no quiet run in {args.attempts} attempts; stop other work")
            speed, accuracy = run["examples_per_s"], run["accuracy"]
            print(f"  {name:16}{speed:8.2f} examples/s  accuracy {accuracy:.3f}", file=sys.stderr)
            done[name] = run
        rounds.append(done)
    return rounds, thrown_away


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=1000, help="reviews (default 1000)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender (default 3)")
    parser.add_argument("--batch-size", type=int, default=32, help="reviews in a batch (default 32)")
    parser.add_argument("--json-out", type=Path, help="write the JSON object to this file too")
    parser.add_argument("--max-other", type=float, default=0.03, help="share of the cores others may use (0.03)")
    parser.add_argument("--attempts", type=int, default=3, help="runs until one is quiet enough (default 3)")
    parser.add_argument("--model", default="smollm2-135m", help="base model (default smollm2-135m)")
    parser.add_argument("--run", choices=PEERS, help=argparse.SUPPRESS)  # the child's mode
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark (or, with --run, one peer of it); the exit status."""
    args = parse(words)
    if args.run:
        print(json.dumps(run_peer(args.run, Task(**json.loads(args.task.read_text(encoding="utf-8"))))))
        return 0
    sys.path.insert(0, str(ROOT / "src"))  # this checkout, not an installed graftlm
    from graftlm.files.assets import model_folder

    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as name:
        work = Path(name)
        task = Task(str(model_folder(args.model)), args.limit, args.batch_size, {})
        try:
            task, trials = choose(task, work)
            print(f"formats: {task.formats}", file=sys.stderr)
            rounds, rejected = run_rounds(args, task, work)
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    summary = summarise(rounds)
    print(table(summary), file=sys.stderr)
    config = {**asdict(task), "model": args.model, "max_other": args.max_other}
    about = {"machine": describe(), "graftlm": git_state(), "config": config, "trials": trials}
    report = {**about, **summary, "runs": rounds, "rejected": rejected}
    if args.json_out:
        args.json_out.parent.mkdir(parents=True, exist_ok=True)
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
