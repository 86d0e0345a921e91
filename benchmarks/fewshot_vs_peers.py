"""Few-shot classification: `graft evaluate --shots 8` against lm-evaluation-harness on the same prompts.

    python benchmarks/fewshot_vs_peers.py [--limit 200] [--shots 8] [--rounds 3] [--json-out FILE]

    graft-DTYPE      `graft evaluate --shots 8 --dtype DTYPE` by label scores: the demonstrations are computed once
    harness-DTYPE    lm_eval's HFLM on transformers, in the batch size that a short trial finds fastest

in float32, and in bfloat16 where the processor has instructions for it. Both score the two labels of the same test
reviews; the harness tokenizes the prompts itself, and the run fails if its tokens differ from graft's. Loading and
tokenizing are not timed; glibc keeps freed memory on both sides. The log-likelihoods are compared, too.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import Round, Run

DTYPES = ("float32", "bfloat16")
FIGURES = ("examples_per_s", "accuracy", "peak_rss_mb")
TRIAL_REVIEWS = 16
SAME_SCORES = 1e-3
"""Nats, in float32."""


def child(task: Mapping[str, Any]) -> Run:
    """The harness: reviews/s over all requests, and the log-likelihoods of each review's labels."""
    harness.keep_memory_or_fail()
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from graftlm.exchange.load import load
    from graftlm.inference.fewshot import FewShotConfig, build_fewshot
    from graftlm.text.boundary import label_ids
    from graftlm.text.collate import subset
    from graftlm.text.dataset import load_dataset
    from graftlm.text.template import DEFAULT, load_template

    ours = load(task["model"], device="cpu", dtype="float32")
    template = load_template(DEFAULT)
    splits = load_dataset(task["data"], labels=template.labels).splits
    rows = subset(splits["test"], task["limit"])
    config = FewShotConfig(shots=task["shots"])
    examples = build_fewshot(ours.model, ours.tokenizer, template, rows, splits["train"], config).examples
    labels = label_ids(template, ours.tokenizer)
    del ours

    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=getattr(torch, task["dtype"])).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(task["model"])
    peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=task["batch_size"], device="cpu")
    words = [template.completion(number) for number in range(len(labels))]
    requests = []
    for example in examples:
        prompt = example.instr_tuned_text.removesuffix(template.completion(example.label or 0))
        for word, ids in zip(words, labels, strict=True):
            context, continuation = peer._encode_pair(prompt, word)
            if (context, continuation) != (list(example.prompt_ids), list(ids)):
                raise RuntimeError(f"{example.source}: the harness tokenizes this prompt differently from graft")
            requests.append(((prompt, word), context, continuation))
    began = time.perf_counter()
    found = [logp for logp, _ in peer._loglikelihood_tokens(requests, disable_tqdm=True)]
    seconds = time.perf_counter() - began
    scores = [found[n : n + len(words)] for n in range(0, len(found), len(words))]
    correct = sum(max(each) == each[e.label or 0] for each, e in zip(scores, examples, strict=True))
    return {"n": len(rows), "accuracy": correct / len(rows), "examples_per_s": len(rows) / seconds, "scores": scores}


def measure(contender: str, task: Mapping[str, Any], folder: Path) -> Run:
    """One run of "graft" or "harness"."""
    if contender == "harness":
        run = harness.run_peer(__file__, task, folder)
    else:
        flags = {"init_from": task["model"], "data": task["data"], "limit": task["limit"], "shots": task["shots"]}
        flags |= {"dtype": task["dtype"], "mode": "score", "predictions": folder / "rows.jsonl"}
        run = harness.run_graft("evaluate", flags, folder)
        run["scores"] = [list(row["scores"].values()) for row in harness.read_rows(folder / "rows.jsonl")]
    kept = ("n", "accuracy", "examples_per_s", "scores", "process_seconds", "other_cpu_share")
    return {**{key: run[key] for key in kept}, "peak_rss_mb": run["process_peak_mb"]}


def largest_difference(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """Between two lists of label scores."""
    return max(abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def summarise(rounds: Sequence[Round], dtypes: Sequence[str]) -> dict[str, Any]:
    """Ratios in each dtype, and how far the scores differ."""
    pairs = {f"graft/harness {name}": ("examples_per_s", f"graft-{name}", f"harness-{name}") for name in dtypes}
    goals = {f"at least 15 times the harness in {name}": (f"graft/harness {name}", ">=", 15.0) for name in DTYPES}
    summary = harness.summarise(rounds, FIGURES, pairs, goals)
    summary["scores_apart"] = {
        name: max(
            largest_difference(each[graft]["scores"], each[peer]["scores"])
            for each in rounds
            if {graft, peer} <= set(each)
        )
        for name, (_, graft, peer) in zip(dtypes, pairs.values(), strict=True)
    }
    same = summary["scores_apart"].get("float32", 0.0) <= SAME_SCORES
    summary["claims"]["the same log-likelihoods in float32, to 1e-3"] = same
    return summary


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Trials, rounds, summary."""
    from graftlm.files.assets import model_folder

    task = {"model": str(model_folder(args.model)), "data": args.data, "limit": args.limit, "shots": args.shots}
    contenders, batches, tried = dict[str, Callable[[Path], Run]](), dict[str, int](), dict[str, float]()
    for dtype in args.dtypes or harness.native_dtypes(DTYPES):

        def trial(size: str, dtype: str = dtype) -> float:
            short = {**task, "limit": min(TRIAL_REVIEWS, args.limit), "dtype": dtype, "batch_size": int(size)}
            return float(measure("harness", short, work / f"trial-{dtype}-{size}")["examples_per_s"])

        size, speeds = harness.fastest(args.batch_sizes.split(","), trial)
        tried |= {f"harness {dtype} batch {key}": value for key, value in speeds.items()}
        batches[dtype] = int(size)
        own = {**task, "dtype": dtype, "batch_size": int(size)}
        contenders |= {f"{side}-{dtype}": partial(measure, side, own) for side in ("graft", "harness")}
    rounds, rejected = harness.run_rounds(contenders, args, work, "examples_per_s")
    summary = summarise(rounds, list(batches))
    for each in (*(run for done in rounds for run in done.values()), *rejected):
        del each["scores"]
    config = {**task, "model": args.model, "batch_sizes": batches}
    return {"config": config, "trials": tried, **summary, "runs": rounds, "rejected": rejected}


FLAGS: dict[str, dict[str, Any]] = {
    "limit": {"type": int, "default": 200, "help": "reviews (default 200)"},
    "shots": {"type": int, "default": 8, "help": "demonstrations (default 8)"},
    "dtypes": {"type": harness.choices(DTYPES), "help": "dtypes, by commas (default: those the processor has)"},
    "batch_sizes": {"default": "1,4,8,16", "help": "the harness's batch sizes to try (default 1,4,8,16)"},
    **harness.SOURCE,
    **harness.ROUNDS,
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS, child=child))
