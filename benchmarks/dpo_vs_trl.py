"""Training on preferences: `graft train --objective dpo` against TRL's DPOTrainer.

    python benchmarks/dpo_vs_trl.py [--rounds 3] [--steps 16] [--only graft,trl] [--json-out FILE]

    graft       `graft train --objective dpo`
    trl         TRL's DPOTrainer with its defaults, in the dtype that a short trial finds faster here
    trl-kept    the same, with glibc told to keep freed memory

The pairs are real reviews, a positive one chosen and a negative one rejected or the other way round, about 60 tokens a
pair with the prompt counted once. LoRA r=16 on q, k, v of SmolLM2-135M, beta 0.1, batches of 8. TRL computes the
reference in every step, with its adapter off; graft computes it once before the first step. Hence two speeds: that of
the steps, and `pairs_per_s_with_reference`, which charges graft the whole reference within one epoch.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import BenchmarkError, Run
from peers import TRL_DTYPES, load_tokenizer, speed, step_timer

CONTENDERS = ("graft", "trl", "trl-kept")
FIGURES = ("pairs_per_s", "pairs_per_s_with_reference", "peak_rss_mb", "first_loss")
PAIRS = {f"{key} graft/{peer}": (key, "graft", peer) for peer in CONTENDERS[1:] for key in FIGURES[:3]}
GOALS = {
    "at least 5.5 times trl": ("pairs_per_s graft/trl", ">=", 5.5),
    "at most 0.6 of trl's memory": ("peak_rss_mb graft/trl", "<=", 0.6),
    "at least 3 times trl-kept": ("pairs_per_s graft/trl-kept", ">=", 3.0),
    "at most 0.6 of trl-kept's memory": ("peak_rss_mb graft/trl-kept", "<=", 0.6),
}
TRIAL_STEPS = 4
BETA, RANK, ALPHA, LEARNING_RATE = 0.1, 16, 64, 5e-5


def write_pairs(data: str, steps: int, batch_size: int, folder: Path) -> None:
    """Write a folder of pairs, train and validation; each review is used once, as chosen or as rejected."""
    from graftlm.files.assets import data_folder

    rows = harness.read_rows(data_folder(data) / "train.jsonl")
    good, bad = ([row["text"] for row in rows if row["label"] == label] for label in (1, 0))
    wanted = (steps + 2) * batch_size
    if min(len(good), len(bad)) < wanted:
        raise BenchmarkError(f"{data}: fewer than {wanted} reviews of each label: lower --steps")
    pairs = []
    for number, (positive, negative) in enumerate(zip(good[:wanted], bad[:wanted], strict=True)):
        label, chosen, rejected = ("positive", positive, negative) if number % 2 else ("negative", negative, positive)
        prompt = f"Write a {label} review of a movie.\n\nReview:"
        pairs.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    harness.write_rows(folder / "train.jsonl", pairs[: steps * batch_size])
    harness.write_rows(folder / "validation.jsonl", pairs[steps * batch_size :])


def measure(contender: str, job: Mapping[str, Any], folder: Path) -> Run:
    """One run of a contender."""
    if contender != "graft":
        return harness.run_peer(__file__, {**job, "keep_memory": contender == "trl-kept"}, folder)
    flags = {
        "init_from": job["model"],
        "data": job["data"],
        "out_dir": folder / "run",
        "objective": "dpo",
        "chat": "off",  # TRL's trainer writes prompts of text as they are
        "beta": BETA,
        "rank": RANK,
        "alpha": ALPHA,
        "lora_dropout": 0.0,
        "lr": LEARNING_RATE,
        "batch_size": job["batch_size"],
        "max_iters": job["steps"],
        "eval_every": job["steps"],
        "kl_samples": 0,
    }
    return graft_figures(harness.run_graft("train", flags, folder), folder / "run")


def graft_figures(result: Run, out_dir: Path) -> Run:
    """The speed of the steps, and with the time of the reference from run.json."""
    run = json.loads((out_dir / "run.json").read_text(encoding="utf-8"))
    pairs_per_s, reference = result["examples_per_s"], run["reference"]
    return {
        "pairs_per_s": pairs_per_s,
        "pairs_per_s_with_reference": 1 / (1 / pairs_per_s + reference["seconds"] / reference["pairs"]),
        "first_loss": harness.read_rows(out_dir / "metrics.jsonl")[0]["train_loss"],
        "dtype": run["dtype"],
        **{key: result[key] for key in ("peak_rss_mb", "process_seconds", "other_cpu_share")},
    }


def child(job: Mapping[str, Any]) -> Run:
    """DPOTrainer as its documentation shows it with PEFT; only what the comparison fixes is set."""
    if job["keep_memory"]:
        harness.keep_memory_or_fail()
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    timer, ends = step_timer()
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])),
        args=DPOConfig(
            output_dir="trl-run",
            use_cpu=True,
            per_device_train_batch_size=job["batch_size"],
            max_steps=job["steps"],
            bf16=job["dtype"] == "bfloat16",
            beta=BETA,
            learning_rate=LEARNING_RATE,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(harness.read_rows(Path(job["data"]) / "train.jsonl")),
        processing_class=load_tokenizer(job["model"], job["eot"]),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
        callbacks=[timer],
    )
    trainer.train()
    pairs_per_s = speed(ends, 1, job["batch_size"])
    return {
        "pairs_per_s": pairs_per_s,
        "pairs_per_s_with_reference": pairs_per_s,
        "first_loss": next(row["loss"] for row in trainer.state.log_history if "loss" in row),
        "dtype": job["dtype"],
        "peak_rss_mb": harness.peak_rss_mb(),
    }


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Trials, rounds, summary."""
    from graftlm.files.assets import model_folder
    from graftlm.text.tokenizer import Tokenizer

    write_pairs(args.data, args.steps, args.batch_size, work / "data")
    model = model_folder(args.model)
    job: dict[str, Any] = {"model": str(model), "eot": Tokenizer.from_folder(model).eot, "data": str(work / "data")}
    job |= {"steps": args.steps, "batch_size": args.batch_size}

    def trial(dtype: str) -> float:
        short = {**job, "steps": TRIAL_STEPS, "dtype": dtype}
        return float(measure("trl", short, work / f"trial-{dtype}")["pairs_per_s"])

    dtypes = harness.native_dtypes(TRL_DTYPES) if set(args.only) - {"graft"} else ["float32"]
    job["dtype"], tried = harness.fastest(dtypes, trial)
    contenders = {name: partial(measure, name, job) for name in args.only}
    rounds, rejected = harness.run_rounds(contenders, args, work, "pairs_per_s")
    config = {**job, "model": args.model, "data": args.data, "trl_dtype": job["dtype"], "rank": RANK, "alpha": ALPHA}
    summary = harness.summarise(rounds, FIGURES, PAIRS, GOALS)
    return {"config": config, "trials": tried, **summary, "runs": rounds, "rejected": rejected}


FLAGS: dict[str, dict[str, Any]] = {
    "steps": {"type": harness.at_least(3), "default": 16, "help": "optimizer steps of a run, at least 3 (default 16)"},
    "batch_size": {"type": int, "default": 8, "help": "pairs in a step (default 8)"},
    "only": {"type": harness.choices(CONTENDERS), "default": list(CONTENDERS), "help": "contenders, by commas"},
    **harness.SOURCE,
    **harness.ROUNDS,
}

if __name__ == "__main__":
    sys.exit(harness.main(__doc__, run, FLAGS, child=child))
