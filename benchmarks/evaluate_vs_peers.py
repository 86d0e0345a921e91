"""Classifying reviews: `graft evaluate` against transformers, by label scores and by generation.

    python benchmarks/evaluate_vs_peers.py [--limit 1000] [--rounds 3] [--json-out FILE]

    graft-score      `graft evaluate` by label scores
    graft-generate   `graft evaluate` by generation, up to 5 tokens per review
    hf-score         transformers, batches of 32 sorted by length, the head at each row's last position only
    hf-generate      transformers' generate, batches of 32 sorted by length, padded on the left, 5 tokens, greedy
    harness-server   lm-evaluation-harness' local-completions, which asks `graft serve` for echoed log-probabilities, in
                     batches of 16 and in float32; only with --only

All classify the same test reviews with the same prompts and tokens, zero-shot, with glibc keeping freed memory; each
peer in the dtype that a short trial finds fastest here. Loading is not timed.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import Run
from serve_load import started

PEERS = ("hf-score", "hf-generate")
SERVED = "harness-server"
CONTENDERS = ("graft-score", "graft-generate", *PEERS)
FIGURES = ("examples_per_s", "accuracy", "peak_rss_mb")
PAIRS = {
    "score graft/hf-score": ("examples_per_s", "graft-score", "hf-score"),
    "generate graft/hf": ("examples_per_s", "graft-generate", "hf-generate"),
}
GOALS = {
    "scoring at least 1.8 times transformers": ("score graft/hf-score", ">=", 1.8),
    "generating at least 1.6 times transformers": ("generate graft/hf", ">=", 1.6),
}
DTYPES = ("float32", "bfloat16")
TRIAL_EXAMPLES = 96
NEW_TOKENS = 5
SAME_ACCURACY = 0.01
"""Rounding in another dtype may change the label of a borderline review."""


def child(task: Mapping[str, Any]) -> Run:
    """A peer: accuracy and examples/s over all batches."""
    harness.keep_memory_or_fail()
    import torch
    from transformers import AutoModelForCausalLM

    from graftlm.exchange.load import read_tokenizer
    from graftlm.text.boundary import label_ids
    from graftlm.text.collate import encode_rows, subset
    from graftlm.text.dataset import load_dataset
    from graftlm.text.template import DEFAULT, load_template

    template, tokenizer = load_template(DEFAULT), read_tokenizer(Path(task["model"]))
    rows = subset(load_dataset(task["data"], labels=template.labels).splits["test"], task["limit"])
    examples, _ = encode_rows(rows, template, tokenizer, 512)
    labels = label_ids(template, tokenizer)
    if task["contender"] == SERVED:
        return ask_server(task, [(list(each.prompt_ids), each.label or 0) for each in examples], labels)
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=getattr(torch, task["dtype"])).eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    batches = [order[i : i + task["batch_size"]] for i in range(0, len(order), task["batch_size"])]
    if task["contender"] == "hf-score":
        predict = partial(score, model, labels)
    else:
        predict = partial(generate, model, tokenizer, template)
    correct, began = 0, time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            predicted = predict([list(examples[i].prompt_ids) for i in batch])
            correct += sum(p == examples[i].label for p, i in zip(predicted, batch, strict=True))
    seconds = time.perf_counter() - began
    return {"n": len(rows), "accuracy": correct / len(rows), "examples_per_s": len(rows) / seconds}


def ask_server(task: Mapping[str, Any], examples: Sequence[tuple[list[int], int]], labels: Any) -> Run:
    """The harness's log-likelihoods of each label, from a server."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    url = f"{task['url']}/v1/completions"
    tokens = {"tokenizer_backend": "huggingface", "tokenizer": task["model"]}
    peer = LocalCompletionsAPI(base_url=url, model=task["served"], batch_size=16, **tokens)
    requests = [(("", ""), prompt, list(label)) for prompt, _ in examples for label in labels]
    began = time.perf_counter()
    found = [value for value, _ in peer._loglikelihood_tokens(requests)]
    seconds = time.perf_counter() - began
    rows = [found[n : n + len(labels)] for n in range(0, len(found), len(labels))]
    correct = sum(row.index(max(row)) == label for row, (_, label) in zip(rows, examples, strict=True))
    return {"n": len(rows), "accuracy": correct / len(rows), "examples_per_s": len(rows) / seconds}


def score(model: Any, labels: Sequence[Sequence[int]], prompts: list[list[int]]) -> list[int]:
    """The likeliest label of each prompt; padded on the right, which causal attention never sees."""
    import torch

    if any(len(ids) != 1 for ids in labels):
        raise RuntimeError("this peer scores labels of one token only")
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[torch.arange(len(prompts)), last]
    logits = model.lm_head(hidden).float().log_softmax(-1)
    predicted: list[int] = logits[:, [token for (token,) in labels]].argmax(-1).tolist()
    return predicted


def generate(model: Any, tokenizer: Any, template: Any, prompts: list[list[int]]) -> list[int]:
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


def measure(contender: str, task: Mapping[str, Any], folder: Path) -> Run:
    """One run of a contender."""
    if contender == SERVED:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "graftlm", "serve", "--init_from", task["model"], "--dtype", "float32"]
        with started([*command, "--port", "0", "--json"], folder) as server:
            asked = {"contender": contender, "url": f"http://{server.host}:{server.port}", "served": server.models[0]}
            run = harness.run_peer(__file__, {**task, **asked}, folder)
    elif contender in PEERS:
        run = harness.run_peer(__file__, {**task, "contender": contender}, folder)
    else:
        flags = {"init_from": task["model"], "data": task["data"], "limit": task["limit"]}
        flags |= {"batch_size": task["batch_size"], "mode": contender.removeprefix("graft-")}
        run = harness.run_graft("evaluate", flags, folder)
    kept = ("n", "accuracy", "examples_per_s", "process_seconds", "other_cpu_share")
    return {**{key: run[key] for key in kept}, "peak_rss_mb": run["process_peak_mb"]}


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Trials, rounds, summary."""
    from graftlm.files.assets import model_folder

    task = {"model": str(model_folder(args.model)), "data": args.data}
    task |= {"limit": args.limit, "batch_size": args.batch_size}
    contenders, tried = {name: partial(measure, name, task) for name in args.only}, dict[str, float]()
    for name in set(PEERS) & set(args.only):

        def trial(dtype: str, name: str = name) -> float:
            short = {**task, "limit": min(TRIAL_EXAMPLES, args.limit), "dtype": dtype}
            return float(measure(name, short, work / f"trial-{name}-{dtype}")["examples_per_s"])

        dtype, speeds = harness.fastest(harness.native_dtypes(DTYPES), trial)
        contenders[name] = partial(measure, name, {**task, "dtype": dtype})
        tried |= {f"{name} {key}": value for key, value in speeds.items()}
    rounds, rejected = harness.run_rounds(contenders, args, work, "examples_per_s")
    summary = harness.summarise(rounds, FIGURES, PAIRS, GOALS)
    accuracy = {name: figures["accuracy"] for name, figures in summary["medians"].items()}
    pairs = [("graft-score", "hf-score"), ("graft-score", SERVED), ("graft-generate", "hf-generate")]
    both = [pair for pair in pairs if {*pair} <= set(accuracy)]
    same = all(abs(accuracy[ours] - accuracy[peer]) <= SAME_ACCURACY for ours, peer in both)
    summary["claims"]["equal accuracy"] = same if both else None
    config = {**task, "model": args.model}
    return {"config": config, "trials": tried, **summary, "runs": rounds, "rejected": rejected}


FLAGS: dict[str, dict[str, Any]] = {
    "limit": {"type": int, "default": 1000, "help": "reviews (default 1000)"},
    "batch_size": {"type": int, "default": 32, "help": "reviews in a batch (default 32)"},
    "only": {
        "type": harness.choices((*CONTENDERS, SERVED)),
        "default": list(CONTENDERS),
        "help": "contenders, by commas",
    },
    **harness.SOURCE,
    **harness.ROUNDS,
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS, child=child))
