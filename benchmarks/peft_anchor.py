"""Every method that PEFT has too: PEFT's implementation and ours side by side, quality, forgetting, seconds and memory.

    python benchmarks/peft_anchor.py --json-out FILE [--methods lora,prefix] [--steps 80] [--seeds 1] [--minutes 60]

    graft    `graft train`, then `graft evaluate` by label scores
    peft     PeftLoop of peers.py, PEFT's implementation in a plain loop with transformers; full: transformers alone

Both train the same base on the same batches of reviews in the same order, with the same learning rates, in float32,
each in a process of its own; both prefixes start from the beginning that all prompts share. Both are tested on the
whole test split with the same prompts and label tokens, and on the texts of forgetting.py. Seconds are those of all
steps, without loading and testing; memory is the process's peak until training ends, graft's with a validation on 8
reviews.

FILE gets each run when it ends. A run that is in FILE is not made again, so the runs may be spread over sittings; on
another machine use another FILE. The page takes each method's pair from the newest result that has both.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

import forgetting
import harness
from harness import BenchmarkError, Run, keep_memory_or_fail, peak_rss_mb
from peers import PREFIX_LENGTH, Encoded, Job, PeftLoop, collate
from render import machine, markdown

if TYPE_CHECKING:
    import torch

RANK, ALPHA, LORA_DROPOUT = 16, 64, 0.05
LORA = {"rank": RANK, "alpha": ALPHA, "lora_dropout": LORA_DROPOUT, "targets": "q,k,v"}
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "rslora": LORA,
    "dora": LORA,
    "ia3": {"targets": "k,v,down"},
    "prefix": {"prefix_length": PREFIX_LENGTH},
    "full": {},
}
"""A method -> its flags of `graft train`."""
NAMES = {
    "base": "untrained base",
    "lora": f"LoRA r={RANK}",
    "rslora": f"rsLoRA r={RANK}",
    "dora": f"DoRA r={RANK}",
    "ia3": "IA3",
    "prefix": "prefix tuning",
    "full": "full fine-tuning",
}
OPTIONAL = ("rslora",)
"""Methods that the command leaves out unless they are named."""
IMPLEMENTATIONS = {"peft": "PEFT", "graft": "graft"}
VALIDATION_EXAMPLES, TEST_BATCH, WINDOW_BATCH = 8, 32, 2
MAX_LENGTH = 512
Labels = Sequence[Sequence[int]]


# ----------------------------------------------------------------------------------------------------- the same input


def prepare(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Write the data as graft reads it (graft/) and as token ids for the peer (peer.json); the answers of the test."""
    from graftlm.exchange.load import read_tokenizer
    from graftlm.files.assets import data_folder, model_folder
    from graftlm.text.boundary import label_ids
    from graftlm.text.collate import encode_rows
    from graftlm.text.dataset import load_dataset
    from graftlm.text.template import DEFAULT, load_template

    source, template, tokenizer = (
        data_folder(args.data),
        load_template(DEFAULT),
        read_tokenizer(model_folder(args.model)),
    )
    limits = {"train": args.steps * args.batch_size, "validation": VALIDATION_EXAMPLES, "test": None}
    for split, limit in limits.items():
        rows = harness.read_rows(source / f"{split}.jsonl")[:limit]  # sorted by hash, so blind to labels
        if split == "train" and len(rows) < args.steps * args.batch_size:
            raise BenchmarkError(f"{source}: {split} has fewer than {limit} examples: lower --steps")
        harness.write_rows(work / "graft" / f"{split}.jsonl", rows)
    splits = load_dataset(str(work / "graft"), labels=template.labels).splits
    encoded = {name: encode_rows(splits[name], template, tokenizer, MAX_LENGTH)[0] for name in ("train", "test")}
    peer = {
        "train": [(each.prompt_ids, each.completion_ids) for each in encoded["train"]],
        "test": [each.prompt_ids for each in encoded["test"]],
        "labels": label_ids(template, tokenizer),
        "texts": {
            name: (sha256, [(each.prompt_ids, each.completion_ids) for each in examples])
            for name, (sha256, examples) in forgetting.windows(tokenizer).items()
        },
    }
    harness.write_json(work / "peer.json", peer)
    return {"eot": tokenizer.eot, "answers": "".join(str(each.label) for each in encoded["test"])}


def job_of(method: str, seed: int, args: argparse.Namespace, eot: int) -> Job:
    """A run, at the learning rate that is graft's default for the method. method: base has no steps."""
    from graftlm.files.assets import model_folder
    from graftlm.methods import METHODS as OURS

    settings = {key: METHODS[method][key] for key in ("targets",) if key in METHODS.get(method, {})}
    return Job(
        model=str(model_folder(args.model)),
        data="",
        eot=eot,
        steps=0 if method == "base" else args.steps,
        batch_size=args.batch_size,
        method="full" if method == "base" else method,
        rank=RANK,
        alpha=ALPHA,
        lora_dropout=LORA_DROPOUT,
        lr=OURS[{"rslora": "lora", "base": "full"}.get(method, method)].default_lr,
        seed=seed,
        **settings,
    )


def learning_rate(step: int, job: Job) -> float:
    """The factor of the learning rate at a step, from 1: linear warm-up, then cosine decay, as `graft train` has it."""
    if step <= job.warmup:
        return step / job.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - job.warmup) / (job.steps - job.warmup + 1)))


# ------------------------------------------------------------------------------------------------------------ PEFT's


def child(settings: Mapping[str, Any]) -> Run:
    """PEFT's run, in its own process."""
    keep_memory_or_fail()
    from graftlm.text.collate import epoch_batches

    job, task = Job(**settings["job"]), json.loads(Path(settings["task"]).read_text(encoding="utf-8"))
    rows = [Encoded(prompt, completion) for prompt, completion in task["train"]]
    order = epoch_batches([row.length for row in rows], job.batch_size, job.seed, 0)
    loop = PeftLoop(job)
    if loop.prefix:
        start_from_prompts(loop, [row.prompt for row in rows])
    losses = list[float]()
    began = time.perf_counter()
    for step, batch in enumerate(order[: job.steps], 1):
        for group in loop.optimizer.param_groups:
            group["lr"] = job.lr * learning_rate(step, job)
        losses.append(loop.step(collate([rows[i] for i in batch])))
    seconds, peak = time.perf_counter() - began, peak_rss_mb()
    return {
        "seconds": seconds,
        "peak_rss_mb": peak,
        "trainable": sum(p.numel() for p in loop.trained.values()),
        "train_losses": losses,
        **tested(loop, task),
    }


def start_from_prompts(loop: PeftLoop, prompts: Sequence[list[int]]) -> None:
    """Set PEFT's prefix to the keys and values of the beginning that all prompts share, repeated if it is short."""
    import torch

    from graftlm.text.collate import common_prefix_length

    ids = prompts[0][: common_prefix_length(prompts)] or prompts[0]
    ids = (ids * (PREFIX_LENGTH // len(ids) + 1))[:PREFIX_LENGTH]
    loop.model.eval()
    with torch.no_grad():
        cache = loop.causal_lm.model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    loop.model.train()
    pairs = [values[0] for layer in cache.layers for values in (layer.keys, layer.values)]  # 2 L of [K, n, D]
    encoder = loop.model.prompt_encoder[loop.model.active_adapter]
    encoder.load_prompt_embeddings(torch.stack(pairs).permute(2, 0, 1, 3).reshape(PREFIX_LENGTH, -1))


def tested(loop: PeftLoop, task: Mapping[str, Any]) -> Run:
    """The predicted labels and the losses on the general texts."""
    import torch

    loop.model.eval()
    with torch.inference_mode():
        scores = label_scores(loop, task["test"], task["labels"])
        predicted = "".join(str(row.index(max(row))) for row in scores)
        losses = {}
        for name, (sha256, examples) in task["texts"].items():
            rows = [Encoded(*example) for example in examples]
            nats = [-sum(each.tolist()) for each in in_batches(loop, rows, WINDOW_BATCH)]
            losses[name] = {"sha256": sha256, "nats": nats, "tokens": [len(row.completion) for row in rows]}
    return {"predicted": predicted, "losses": losses}


def label_scores(loop: PeftLoop, prompts: Sequence[list[int]], labels: Labels) -> list[list[float]]:
    """The log-probability of each label after each prompt; labels with the same tokens but the last share a pass."""
    scores = [[0.0] * len(labels) for _ in prompts]
    for fed in {tuple(label[:-1]) for label in labels}:
        same = [number for number, label in enumerate(labels) if tuple(label[:-1]) == fed]
        rows = [Encoded(prompt, [*fed, labels[same[0]][-1]]) for prompt in prompts]
        for row, found in zip(scores, in_batches(loop, rows, TEST_BATCH, [labels[n][-1] for n in same]), strict=True):
            shared = float(found[:-1, 0].sum())
            for place, number in enumerate(same):
                row[number] = shared + float(found[-1, place])
    return scores


def in_batches(
    loop: PeftLoop, rows: Sequence[Encoded], batch_size: int, last: Sequence[int] | None = None
) -> Iterator["torch.Tensor"]:
    """The log-probabilities of each row's completion tokens [C], float64, in the order of the rows.

    last: instead [C, tokens], where the last position has these tokens' and the others their own token's throughout.
    """
    found: dict[int, torch.Tensor] = {}
    order = sorted(range(len(rows)), key=lambda i: rows[i].length)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        made = collate([rows[i] for i in batch])
        model = loop.causal_lm.model
        hidden = model(input_ids=made.ids, past_key_values=loop.past(len(batch)), use_cache=False).last_hidden_state
        logps = loop.causal_lm.lm_head(hidden.flatten(0, 1)[made.at]).float().log_softmax(-1)
        own = logps.gather(1, made.targets[:, None]).double()
        sizes = [len(rows[i].completion) for i in batch]
        if last is not None:
            own = own.repeat(1, len(last))
            ends = [sum(sizes[: n + 1]) - 1 for n in range(len(sizes))]
            own[ends] = logps[ends][:, list(last)].double()
        parts = own.split(sizes)
        found |= {i: part if last is not None else part[:, 0] for i, part in zip(batch, parts, strict=True)}
    return (found[i] for i in range(len(rows)))


# ------------------------------------------------------------------------------------------------------------- ours


def measure_graft(method: str, job: Job, work: Path, folder: Path) -> Run:
    """A run of ours: train, evaluate, and the losses on the general texts."""
    common = {"data": work / "graft", "dtype": "float32"}
    asked = {**common, "mode": "score", "split": "test", "predictions": folder / "predictions.jsonl"}
    found: Run = {"seconds": 0.0, "train_losses": []}
    if method == "base":
        done = harness.run_graft("evaluate", {**asked, "init_from": job.model}, folder)
        found |= {"peak_rss_mb": done["process_peak_mb"], "trainable": 0}
        losses = forgetting.measure(Path(job.model), "best", folder / "texts")
    else:
        flags = {
            **common,
            "init_from": job.model,
            "out_dir": folder / "run",
            "method": "lora" if method == "rslora" else method,
            **METHODS[method],
            **({"rslora": True} if method == "rslora" else {}),
            "lr": job.lr,
            "warmup_steps": job.warmup,
            "batch_size": job.batch_size,
            "max_iters": job.steps,
            "eval_every": job.steps,
            "seed": job.seed,
        }
        done = harness.run_graft("train", flags, folder / "train")
        found |= {"peak_rss_mb": done["peak_rss_mb"], "trainable": done["trainable"]}
        rows = harness.read_rows(folder / "run" / "metrics.jsonl")
        tokens = [row["tokens"] - before["tokens"] for before, row in pairwise([{"tokens": 0}, *rows])]
        found["seconds"] = sum(count / row["tokens_per_s"] for count, row in zip(tokens, rows, strict=True))
        found["train_losses"] = [row["train_loss"] for row in rows]
        harness.run_graft("evaluate", {**asked, "out_dir": folder / "run", "checkpoint": "last"}, folder)
        losses = forgetting.measure(folder / "run", "last", folder / "texts")
    predicted = "".join(str(row["predicted"]) for row in harness.read_rows(folder / "predictions.jsonl"))
    return {**found, "predicted": predicted, "losses": losses}


KEPT = ("predicted", "seconds", "peak_rss_mb", "trainable")


def measure(implementation: str, method: str, job: Job, work: Path, folder: Path) -> Run:
    """A run of an implementation, with its losses on the texts, of the first step, and of the last tenth of steps."""
    folder.mkdir(parents=True)
    if implementation == "graft":
        run = measure_graft(method, job, work, folder)
    else:
        run = harness.run_peer(__file__, {"job": asdict(job), "task": str(work / "peer.json")}, folder)
    if method == "base":
        run["trainable"] = 0
        return {**{key: run[key] for key in KEPT}, "losses": run["losses"]}
    steps = run["train_losses"]
    trained = {"first_loss": steps[0], "last_loss": mean(steps[-max(1, len(steps) // 10) :])}
    return {**{key: run[key] for key in KEPT}, **trained, "losses": run["losses"]}


# ------------------------------------------------------------------------------------------------------- the command


def key_of(run: Mapping[str, Any]) -> tuple[str, str, int]:
    """What tells the runs of a result apart."""
    return run["method"], run["implementation"], run["seed"]


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The runs of FILE, and those that it does not have yet."""
    input_ = prepare(args, work)
    config = {"model": args.model, "data": args.data, "steps": args.steps, "batch_size": args.batch_size}
    config |= {"answers": input_["answers"]}
    here, runs = harness.describe(), list[Run]()
    if args.json_out and args.json_out.is_file():
        before = json.loads(args.json_out.read_text(encoding="utf-8"))
        same_machine = before["machine"]["family_model_stepping"] == here["family_model_stepping"]
        if before["config"] != config or not same_machine:
            raise BenchmarkError(
                f"{args.json_out}: has runs of other settings or of another machine; name another file"
            )
        runs = before["runs"]
    wanted = [("base", name, 0) for name in IMPLEMENTATIONS]
    wanted += [
        (method, name, seed) for seed in range(args.seeds) for method in args.methods for name in IMPLEMENTATIONS
    ]
    began = time.perf_counter()
    for number, key in enumerate(key for key in wanted if key not in [key_of(each) for each in runs]):
        if time.perf_counter() - began > 60 * args.minutes:
            harness.note(f"{args.minutes:g} minutes are over; the same command makes the other runs")
            break
        method, implementation, seed = key
        harness.note(f"{method}, {implementation}, seed {seed}")
        job = job_of(method, seed, args, input_["eot"])
        found = measure(implementation, method, job, work, work / f"run-{number}")
        about = {"method": method, "implementation": implementation, "seed": seed, "other_work": args.other_work}
        about |= {"date": here["date"], "graftlm": harness.git_commit(), "lr": job.lr}
        if method != "base":
            (base,) = (each for each in runs if key_of(each) == ("base", implementation, 0))
            found["forgetting"] = forgetting.compared(base["losses"], found.pop("losses"))
        runs.append({**about, **found})
        if args.json_out:
            report = {"machine": here, "graftlm": harness.git_commit(), "config": config, "runs": runs}
            harness.write_json(args.json_out, report)
    harness.note(table_of(config, runs))
    return {"config": config, "runs": runs}


# ---------------------------------------------------------------------------------------------------------- the page


def correct(run: Mapping[str, Any], answers: str) -> list[bool]:
    """Of each test review whether the predicted label is correct."""
    return [predicted == answer for predicted, answer in zip(run["predicted"], answers, strict=True)]


def accuracy(runs: Sequence[Run], answers: str) -> str:
    """The mean over seeds with its interval: Wilson's of one seed, t over several."""
    from graftlm.inference.metrics import t_interval, wilson

    right = [sum(correct(each, answers)) for each in runs]
    n = len(answers)
    low, high = wilson(right[0], n) if len(runs) == 1 else t_interval([each / n for each in right])
    return f"{mean(right) / n:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def difference(ours: Sequence[Run], theirs: Sequence[Run], answers: str) -> str:
    """Graft's minus PEFT's accuracy in points: mean, 95% interval and p-value, paired by review."""
    from graftlm.inference.metrics import paired_permutation_test, t_quantile

    a, b = (
        [sum(each) for each in zip(*(correct(run, answers) for run in runs), strict=True)] for runs in (theirs, ours)
    )
    wins = [len(theirs) * y - len(ours) * x for x, y in zip(a, b, strict=True)]
    points = [100 * each / (len(theirs) * len(ours)) for each in wins]
    half = t_quantile(len(points)) * stdev(points) / math.sqrt(len(points))
    low, high = mean(points) - half, mean(points) + half
    return f"{mean(points):+.1f} ({low:.1f} to {high:.1f}), p = {paired_permutation_test(wins):.2g}"


def table_of(config: Mapping[str, Any], runs: Sequence[Run]) -> str:
    """A row per method and implementation; forgetting is measured from the same implementation's base."""
    head = ("method", "implementation", "trained", "accuracy (95% interval)", "graft - PEFT, points")
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["method"], run["implementation"]), []).append(run)
    keys = [(method, name) for method in NAMES for name in IMPLEMENTATIONS if (method, name) in groups]
    cells = []
    for method, name in keys:
        own, theirs = groups[method, name], groups.get((method, "peft"), [])
        is_peft = name == "graft" or method not in ("base", "full")
        quality = [
            NAMES[method],
            IMPLEMENTATIONS[name] if is_peft else "transformers",
            "" if method == "base" else f"{own[0]['trainable']:,}",
            accuracy(own, config["answers"]),
            difference(own, theirs, config["answers"]) if name == "graft" and theirs else "",
        ]
        cells.append([*quality, *costs(own)])
    return markdown([*head, forgetting.HEAD, "seconds", "peak MB"], cells, left=2)


def costs(runs: Sequence[Run]) -> list[str]:
    """The cells of forgetting, seconds and memory; none of the base, and no seconds next to other work."""
    if runs[0]["method"] == "base":
        return ["", "", ""]
    quiet = [run["seconds"] for run in runs if not run["other_work"]]
    return [
        "; ".join(forgetting.cell(run["forgetting"]) for run in runs),
        f"{median(quiet):,.0f}" if quiet else "",
        f"{median(run['peak_rss_mb'] for run in runs):,.0f}",
    ]


def block(results: Sequence[Mapping[str, Any]]) -> str:
    """What belongs on the page: the table, what is equal, and where it was measured. results: oldest first.

    A method's pair is that of the newest result that has both, among the results with the newest one's settings.
    """
    chosen = dict[str, Mapping[str, Any]]()
    for result in (each for each in reversed(results) if each["config"] == results[-1]["config"]):
        for method in NAMES:
            both = {run["implementation"] for run in result["runs"] if run["method"] == method}
            if both == set(IMPLEMENTATIONS):
                chosen.setdefault(method, result)
    runs = [run for method, result in chosen.items() for run in result["runs"] if run["method"] == method]
    missing = [name for method, name in NAMES.items() if method not in chosen and method not in OPTIONAL]
    parts = [f"Missing: {', '.join(missing)}."] if missing else []
    parts += [table_of(results[-1]["config"], runs), *equal(runs)] if runs else []
    return "\n\n".join([*parts, "\n".join(origins(chosen))]).rstrip()


def origins(chosen: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where and when the methods' pairs were measured: a line for each result."""
    found = []
    for file, result in sorted({str(result["file"]): result for result in chosen.values()}.items()):
        config, own = result["config"], [method for method, each in chosen.items() if each["file"] == file]
        runs = [run for run in result["runs"] if run["method"] in own]
        seeds = len({run["seed"] for run in runs})
        how = f"{config['steps']} steps of {config['batch_size']} reviews, {seeds} seed{'s' * (seeds > 1)}"
        how += ", next to other work (no seconds)" * any(run["other_work"] for run in runs)
        link = f"[{result['date']}](../benchmarks/results/{file})"
        where = machine({**result, "graftlm": ", ".join(sorted({run["graftlm"] for run in runs}))})
        found.append(f"- {link}, {', '.join(NAMES[method] for method in own)}: {how}. {where}")
    return found


def equal(runs: Sequence[Run]) -> list[str]:
    """What both implementations have in common: the base's labels and losses, and the loss of the first step."""
    first = {key_of(run): run for run in runs if run["seed"] == 0}
    both = {
        method: [first[method, name, 0] for name in IMPLEMENTATIONS]
        for method in NAMES
        if all((method, name, 0) in first for name in IMPLEMENTATIONS)
    }
    found = []
    if "base" in both:
        one, other = both.pop("base")
        same = sum(a == b for a, b in zip(one["predicted"], other["predicted"], strict=True))
        largest = max(abs(each["change"]) for each in forgetting.compared(one["losses"], other["losses"]).values())
        found.append(
            f"On the base both predict the same label for {same:,} of {len(one['predicted']):,} reviews, and their "
            f"losses per token on the two texts differ by at most {largest:.1e} nats."
        )
    if both:
        largest = max(abs(one["first_loss"] - other["first_loss"]) for one, other in both.values())
        found.append(f"The losses of a method's first step differ by at most {largest:.1e} nats.")
    return [" ".join(found)] if found else []


FLAGS: dict[str, dict[str, Any]] = {
    "methods": {
        "type": harness.choices(tuple(METHODS)),
        "default": [method for method in METHODS if method not in OPTIONAL],
        "help": "methods, by commas (default: all but rslora)",
    },
    "steps": {"type": harness.at_least(1), "default": 80, "help": "optimizer steps of a run (default 80)"},
    "batch_size": {"type": harness.at_least(1), "default": 16, "help": "reviews in a step (default 16)"},
    "seeds": {"type": harness.at_least(1), "default": 1, "help": "seeds of each run (default 1)"},
    "minutes": {"type": float, "default": math.inf, "help": "start no run after this time (default: no limit)"},
    "other-work": {"action": "store_true", "help": "other processes used the machine: show no seconds"},
    **harness.SOURCE,
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS, child=child))
