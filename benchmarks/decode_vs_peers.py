"""Greedy decoding: tokens per second of one stream and of several rows, against transformers and llama.cpp.

    python benchmarks/decode_vs_peers.py [--rounds 3] [--new_tokens 64] [--threads 2] [--json-out FILE]

    graft            the .gguf file, with --base_format stored: weights stay as they are in the file
    graft-float32    the same weights in float32, from the model's folder
    transformers     the same, by model.generate
    llama.cpp        the .gguf file, by the server inside the package xllamacpp

All continue the same prompts: the first --prompt_tokens tokens of test reviews. Each contender takes --repeats turns of
one stream and of --rows rows (llama.cpp: as many slots) in a process of its own; the median turn counts. A turn's
seconds include reading the prompts. `tokens_per_cpu_s` counts processor seconds, which other work on the machine
changes less. With --threads 1 it is the speed on an idle machine, and the goals are judged by it.

llama.cpp rounds activations to 8 bits, so its logits differ: the largest difference of the log-probabilities of the
50 likeliest first tokens is in `logprob_difference`.
"""

import argparse
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import harness
from harness import BenchmarkError, Run

CONTENDERS = ("graft", "graft-float32", "transformers", "llama.cpp")
SPEEDS = ("tokens_per_cpu_s_one", "tokens_per_cpu_s_rows", "tokens_per_s_one", "tokens_per_s_rows")
FIGURES = (*SPEEDS, "peak_rss_mb")
PAIRS = {
    f"{figure} {ours}/{peer}": (figure, ours, peer)
    for ours, peer in (("graft", "llama.cpp"), ("graft-float32", "transformers"))
    for figure in SPEEDS
}
GOALS = {
    "one stream of the .gguf file: at least 0.8 times llama.cpp": ("one graft/llama.cpp", ">=", 0.8),
    "one stream: at least 1.5 times transformers": ("one graft-float32/transformers", ">=", 1.5),
    "several rows: at least 2 times transformers": ("rows graft-float32/transformers", ">=", 2.0),
}
CANDIDATES = 50
"""Of the first token, whose log-probabilities are compared."""
Continue = Callable[[Sequence[Sequence[int]]], list[list[int]]]


def child(task: Mapping[str, Any]) -> Run:
    """A contender: its figures, its tokens, and the log-probabilities of its first token."""
    os.environ["OMP_NUM_THREADS"] = str(task["threads"])
    found: tuple[Continue, dict[str, float]] = START[task["contender"]](task)
    generate, first = found
    figures: Run = {"first": first}
    for name, prompts in (("one", task["prompts"][:1]), ("rows", task["prompts"])):
        figures[f"tokens_{name}"] = generate(prompts)  # also warms up
        seconds, cpu = [], []
        for _ in range(task["repeats"]):
            began, used = time.perf_counter(), time.process_time()
            count = sum(map(len, generate(prompts)))
            seconds.append((time.perf_counter() - began) / count)
            cpu.append((time.process_time() - used) / count)
        figures[f"tokens_per_s_{name}"], figures[f"tokens_per_cpu_s_{name}"] = 1 / median(seconds), 1 / median(cpu)
    return figures


def start_graft(task: Mapping[str, Any], name: str) -> tuple[Continue, dict[str, float]]:
    """graft, in float32 arithmetic."""
    import torch

    from graftlm.exchange.load import load
    from graftlm.inference.generate import generate_ids
    from graftlm.inference.sampling import SamplingParams

    torch.set_num_threads(task["threads"])
    kept = "stored" if name == "gguf" else "dense"
    model = load(task[name], dtype="float32", base_format=kept).model
    params = SamplingParams(max_new_tokens=task["new_tokens"])
    with torch.no_grad():
        likely = model(torch.tensor(task["prompts"][:1]))[0, -1].log_softmax(-1).topk(CANDIDATES)
    first = {str(token): value for token, value in zip(likely.indices.tolist(), likely.values.tolist(), strict=True)}
    return lambda prompts: generate_ids(model, prompts, params), first


def start_transformers(task: Mapping[str, Any]) -> tuple[Continue, dict[str, float]]:
    """transformers in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(task["threads"])
    model = AutoModelForCausalLM.from_pretrained(task["folder"], dtype=torch.float32).eval()
    count = task["new_tokens"]

    def generate(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        new: list[list[int]] = out[:, ids.shape[1] :].tolist()
        return new

    return generate, {}


def start_llama_cpp(task: Mapping[str, Any]) -> tuple[Continue, dict[str, float]]:
    """llama.cpp with a slot for each row."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_gpu_layers, params.verbosity = task["gguf"], 0, 0
    params.n_parallel = len(task["prompts"])
    params.n_ctx = params.n_parallel * 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = task["threads"]
    server = xllamacpp.Server(params)

    def ask(prompts: Any, **more: Any) -> Any:
        body = {"prompt": prompts, "n_predict": task["new_tokens"], "top_k": 1, "samplers": ["top_k"], **more}
        body |= {"cache_prompt": False, "ignore_eos": True, "return_tokens": True}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/completion", json.dumps(body).encode(), headers)
        return json.loads(urllib.request.urlopen(request).read())

    def generate(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        found = ask([list(prompt) for prompt in prompts])
        return [each["tokens"] for each in (found if isinstance(found, list) else [found])]

    likely = ask(list(task["prompts"][0]), n_predict=1, n_probs=CANDIDATES)["completion_probabilities"][0]
    return generate, {str(each["id"]): each["logprob"] for each in likely["top_logprobs"]}


START: dict[str, Callable[[Mapping[str, Any]], tuple[Continue, dict[str, float]]]] = {
    "graft": partial(start_graft, name="gguf"),
    "graft-float32": partial(start_graft, name="folder"),
    "transformers": start_transformers,
    "llama.cpp": start_llama_cpp,
}


def measure(contender: str, task: Mapping[str, Any], folder: Path) -> Run:
    """One run of a contender."""
    run = harness.run_peer(__file__, {**task, "contender": contender}, folder)
    return {**run, "peak_rss_mb": run["process_peak_mb"]}


def prompts(args: argparse.Namespace, folder: Path) -> list[list[int]]:
    """The first tokens of test reviews that have as many."""
    from graftlm.exchange.load import read_tokenizer
    from graftlm.text.dataset import load_dataset
    from graftlm.text.template import DEFAULT, load_template

    tokenizer, labels = read_tokenizer(folder), load_template(DEFAULT).labels
    each = (tokenizer.encode(row.text) for row in load_dataset(args.data, labels=labels).splits["test"])
    found = [list(ids[: args.prompt_tokens]) for ids in each if len(ids) >= args.prompt_tokens][: args.rows]
    if len(found) < args.rows:
        raise BenchmarkError(f"only {len(found)} test reviews have {args.prompt_tokens} tokens: lower --prompt_tokens")
    return found


def summarise(rounds: Sequence[harness.Round], threads: int) -> dict[str, Any]:
    """Medians, ratios, and whether the goals hold."""
    speed = "tokens_per_cpu_s_" if threads == 1 else "tokens_per_s_"
    goals = {text: (speed + pair, sign, bound) for text, (pair, sign, bound) in GOALS.items()}
    return harness.summarise(rounds, FIGURES, PAIRS, goals)


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Rounds and summary; what the contenders' tokens and first log-probabilities have in common."""
    from graftlm.files.assets import model_folder

    folder = model_folder(args.model)
    gguf = next(folder.glob("*.gguf"), folder)
    names = [name for name in args.only if gguf != folder or name in ("graft-float32", "transformers")]
    task = {name: getattr(args, name) for name in ("new_tokens", "threads", "repeats")}
    full = {**task, "folder": str(folder), "gguf": str(gguf), "prompts": prompts(args, folder)}
    rounds, rejected = harness.run_rounds({n: partial(measure, n, full) for n in names}, args, work, FIGURES[0])
    found = {name: each[name] for each in rounds for name in each}
    summary = summarise(rounds, args.threads)

    def same(ours: str, peer: str, key: str) -> float | None:
        if not {ours, peer} <= found.keys():
            return None
        pairs = list(zip(found[ours][key], found[peer][key], strict=True))
        return sum(a == b for a, b in pairs) / len(pairs)

    equal = same("graft-float32", "transformers", "tokens_rows")
    summary["claims"]["the tokens of transformers in float32"] = None if equal is None else equal == 1
    shared = {
        "same tokens as float32": same("graft", "graft-float32", "tokens_rows"),
        "same tokens as llama.cpp": same("graft", "llama.cpp", "tokens_rows"),
    }
    first = [found[name]["first"] for name in ("graft", "llama.cpp") if name in found]
    apart = max(abs(first[0][t] - first[1][t]) for t in first[0].keys() & first[1].keys()) if len(first) == 2 else None
    compared = ("first", "tokens_one", "tokens_rows")
    runs = [{n: {k: v for k, v in each.items() if k not in compared} for n, each in one.items()} for one in rounds]
    config = {**task, "rows": args.rows, "prompt_tokens": args.prompt_tokens, "model": args.model}
    return {"config": config, "logprob_difference": apart, **shared, **summary, "runs": runs, "rejected": rejected}


FLAGS: dict[str, dict[str, Any]] = {
    "rows": {"type": harness.at_least(2), "default": 8, "help": "rows that are decoded together (default 8)"},
    "new_tokens": {"type": harness.at_least(2), "default": 64, "help": "new tokens of each row (default 64)"},
    "prompt_tokens": {"type": harness.at_least(1), "default": 24, "help": "tokens of each prompt (default 24)"},
    "repeats": {"type": harness.at_least(1), "default": 5, "help": "turns in a run (default 5)"},
    "threads": {"type": harness.at_least(1), "default": 2, "help": "threads of each contender (default 2)"},
    "only": {"type": harness.choices(CONTENDERS), "default": list(CONTENDERS), "help": "contenders, by commas"},
    **harness.SOURCE,
    **harness.ROUNDS,
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS, child=child))
