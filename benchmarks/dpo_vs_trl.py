"""Training on preferences: `graft train --objective dpo` against TRL's DPOTrainer, on this machine, in turn.

    python benchmarks/dpo_vs_trl.py [--rounds 3] [--steps 16] [--only graft,trl] [--json-out FILE]

    graft       `graft train --objective dpo` of this checkout, as its user runs it
    trl         TRL's DPOTrainer as a user runs it, its defaults otherwise
    trl-kept    the same with glibc told to keep its memory

The pairs are real reviews: "Write a positive review of a movie." with a positive review of Rotten Tomatoes as what is
chosen and a negative one as what is rejected, and the other way round: about 60 tokens a pair with the prompt counted
once. LoRA r=16 on q, k, v of SmolLM2-135M, beta 0.1, batches of 8, all three on the same pairs, each a process of its
own, in turn; TRL in the number format that is faster for it here, which a short trial finds. Ratios are formed within a
round, medians count. A run during which others used more than 3% of the cores is thrown away and repeated.

TRL computes the reference in every step, with its adapter off; graft once before the first step. To be fair both ways
there are two speeds: that of the steps, and `pairs_per_s_with_reference`, in which graft's time for the reference of
all pairs counts too, although it is paid once and not once an epoch. A table goes to stderr, one JSON object to the
last line of stdout.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from _machine import describe, peak_rss_mb, run_measured, worth_trying
from _peers import TRL_PRECISIONS, keep_memory_or_fail
from _rounds import Round, Run, accepted_run, ratios
from train_vs_peers import OFFLINE, ROOT, BenchmarkError, git_state

CONTENDERS = ("graft", "trl", "trl-kept")
CLAIMS = {"trl": 5.5, "trl-kept": 3.0}
MEMORY = 0.6
TRIAL_STEPS = 4
BETA, RANK, ALPHA, RATE = 0.1, 16, 64, 5e-5


def write_pairs(data: str, steps: int, batch_size: int, work: Path) -> None:
    """The folder of pairs, train and validation: each review once, chosen or rejected."""
    from graftlm.files.assets import data_folder

    text = (data_folder(data) / "train.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    good, bad = ([row["text"] for row in rows if row["label"] == label] for label in (1, 0))
    wanted = steps * batch_size + 2 * batch_size
    if min(len(good), len(bad)) < wanted:
        raise BenchmarkError(f"{data}: fewer than {wanted} reviews of each kind: lower --steps")
    pairs = []
    for number, (positive, negative) in enumerate(zip(good[:wanted], bad[:wanted], strict=True)):
        asked, chosen, rejected = ("positive", positive, negative) if number % 2 else ("negative", negative, positive)
        prompt = f"Write a {asked} review of a movie.\n\nReview:"
        pairs.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    (work / "data").mkdir()
    for split, some in (("train", pairs[: steps * batch_size]), ("validation", pairs[steps * batch_size :])):
        lines = "".join(json.dumps(pair) + "\n" for pair in some)
        (work / "data" / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def measure(contender: str, job: Mapping[str, Any], folder: Path) -> Run:
    """One contender in a process of its own; its figures."""
    folder.mkdir()
    if contender == "graft":
        flags = {
            "init_from": job["model"],
            "data": job["data"],
            "out_dir": folder / "run",
            "objective": "dpo",
            "beta": BETA,
            "rank": RANK,
            "alpha": ALPHA,
            "lora_dropout": 0.0,
            "lr": RATE,
            "batch_size": job["batch_size"],
            "max_iters": job["steps"],
            "eval_every": job["steps"],
            "kl_samples": 0,
        }
        words = [f"--{name}={value}" for name, value in flags.items()]
        command = [sys.executable, "-m", "graftlm", "train", *words, "--json"]
    else:
        (folder / "job.json").write_text(json.dumps({**job, "kept": contender == "trl-kept"}), encoding="utf-8")
        command = [sys.executable, str(Path(__file__).resolve()), "--run", str(folder / "job.json")]
    paths = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    seen = run_measured(command, folder, {**os.environ, **OFFLINE, "HF_HOME": str(folder), "PYTHONPATH": paths}, None)
    if seen.status:
        raise BenchmarkError(f"{contender} failed with status {seen.status}:\n{seen.stderr[-2000:]}")
    figures = json.loads(seen.stdout.rstrip("\n").rpartition("\n")[2])
    figures = graft_figures(figures, folder / "run") if contender == "graft" else figures
    return {**figures, "process_seconds": seen.seconds, "other_cpu_share": seen.other_cpu_share}


def graft_figures(result: Mapping[str, Any], out_dir: Path) -> Run:
    """What `graft train --json` says of its steps, and with the reference's time, from run.json's own clock."""
    run = json.loads((out_dir / "run.json").read_text(encoding="utf-8"))
    first = json.loads((out_dir / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[0])
    speed = result["examples_per_s"]
    return {
        "pairs_per_s": speed,
        "pairs_per_s_with_reference": 1 / (1 / speed + run["reference"]["seconds"] / run["reference"]["pairs"]),
        "peak_rss_mb": result["peak_rss_mb"],
        "precision": run["dtype"],
        "first_loss": first["train_loss"],
    }


def run_trl(job: Mapping[str, Any]) -> Run:
    """DPOTrainer as its documentation has a user run it with PEFT; only what the comparison fixes is set."""
    if job["kept"]:
        keep_memory_or_fail()
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    ends: list[float] = []

    class StepEnds(TrainerCallback):
        """Notes when each step ended."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append(time.perf_counter())

    half = job["precision"] == "bf16"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(job["model"]) / "tokenizer.json"))
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(job["eot"])
    lines = (Path(job["data"]) / "train.jsonl").read_text(encoding="utf-8").split("\n")
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16 if half else torch.float32),
        args=DPOConfig(
            output_dir="trl-run",
            use_cpu=True,
            per_device_train_batch_size=job["batch_size"],
            max_steps=job["steps"],
            bf16=half,
            beta=BETA,
            learning_rate=RATE,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list([json.loads(line) for line in lines if line]),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
        callbacks=[StepEnds()],
    )
    trainer.train()
    speed = (len(ends) - 1) * job["batch_size"] / (ends[-1] - ends[0])
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        "pairs_per_s": speed,
        "pairs_per_s_with_reference": speed,
        "peak_rss_mb": peak_rss_mb(),
        "precision": job["precision"],
        "first_loss": losses[0],
    }


def summarise(rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians, ratios within rounds, and whether the claims hold."""
    names = list(dict.fromkeys(name for each in rounds for name in each))
    keys = ("pairs_per_s", "pairs_per_s_with_reference", "peak_rss_mb", "first_loss")
    medians = {n: {key: median(each[n][key] for each in rounds if n in each) for key in keys} for n in names}
    compared: dict[str, Any] = {}
    claims: dict[str, bool | None] = {}
    for peer, bound in CLAIMS.items():
        for key in keys[:3]:
            if found := ratios(rounds, key, "graft", peer):
                compared[f"{key} graft/{peer}"] = {"rounds": found, "median": median(found)}
        speed, memory = (compared.get(f"{key} graft/{peer}") for key in ("pairs_per_s", "peak_rss_mb"))
        claims[f"at least {bound:g} times {peer}"] = speed["median"] >= bound if speed else None
        claims[f"at most {MEMORY:g} of {peer}'s memory"] = memory["median"] <= MEMORY if memory else None
    return {"medians": medians, "ratios": compared, "claims": claims}


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'':10}{'pairs/s':>10}{'with ref.':>11}{'peak MB':>10}{'first loss':>12}"]
    for name, m in summary["medians"].items():
        both = f"{m['pairs_per_s']:10.2f}{m['pairs_per_s_with_reference']:11.2f}"
        lines.append(f"{name:10}{both}{m['peak_rss_mb']:10.0f}{m['first_loss']:12.4f}")
    for name, ratio in summary["ratios"].items():
        lines.append(f"{name:44}{ratio['median']:7.3f}   ({'  '.join(f'{x:.3f}' for x in ratio['rounds'])})")
    words = {True: "yes", False: "NO", None: "not measured"}
    return "\n".join([*lines, *(f"{claim + '?':44}{words[holds]}" for claim, holds in summary["claims"].items())])


def run_rounds(
    args: argparse.Namespace, job: dict[str, Any], work: Path
) -> tuple[list[dict[str, Run]], list[Run], dict[str, float]]:
    """All rounds: (accepted runs by contender, rejected ones, the speeds of the trials of TRL's number formats)."""
    numbers = count(1)

    def one(name: str, job: Mapping[str, Any]) -> Run:
        run = {"contender": name, **measure(name, job, work / f"run-{next(numbers)}")}
        print(
            f"  {name:10}{run['pairs_per_s']:7.2f} pairs/s{run['peak_rss_mb']:8.0f} MB",
            f" others used {run['other_cpu_share']:.1%} of the cores ({run['process_seconds']:.0f} s)",
            file=sys.stderr,
        )
        return run

    formats = worth_trying(TRL_PRECISIONS)
    trial = {**job, "steps": TRIAL_STEPS}
    tried = (
        {name: one("trl", {**trial, "precision": name})["pairs_per_s"] for name in formats} if len(formats) > 1 else {}
    )
    job["precision"] = max(tried, key=tried.__getitem__) if tried else formats[0]
    rounds: list[dict[str, Run]] = []
    rejected: list[Run] = []
    for _ in range(args.rounds):
        rounds.append({})
        for name in args.only.split(","):
            run, thrown = accepted_run(partial(one, name, job), args.max_other, 3)
            rejected += thrown
            if run is not None:
                rounds[-1][name] = run
    return rounds, rejected, tried


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--steps", type=int, default=16, help="optimiser steps of a run, at least 3 (default 16)")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs in a step (default 8)")
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders and their order, by commas")
    parser.add_argument("--model", default="smollm2-135m", help="base model (default smollm2-135m)")
    parser.add_argument("--data", default="rotten-tomatoes-pypi", help="reviews with labels 0 and 1")
    parser.add_argument("--max-other", type=float, default=0.03, help="share of the cores others may use (0.03)")
    parser.add_argument("--json-out", type=Path, help="write the JSON object to this file too")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)  # the child's mode
    args = parser.parse_args(words)
    if args.steps < 3 or args.rounds < 1:
        parser.error("--steps must be 3 or more, --rounds 1 or more")
    if unknown := [name for name in args.only.split(",") if name not in CONTENDERS]:
        parser.error(f"unknown contender {unknown[0]!r}: known are {', '.join(CONTENDERS)}")
    return args


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark (or, with --run, TRL's part of it); the exit status."""
    args = parse(words)
    sys.path.insert(0, str(ROOT / "src"))
    if args.run:
        print(json.dumps(run_trl(json.loads(args.run.read_text(encoding="utf-8")))))
        return 0
    from graftlm.errors import GraftError
    from graftlm.files.assets import model_folder
    from graftlm.text.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory(prefix="graft-benchmark-") as name:
        work = Path(name)
        try:
            write_pairs(args.data, args.steps, args.batch_size, work)
            model = model_folder(args.model)
            job = {"model": str(model), "eot": Tokenizer.from_folder(model).eot, "data": str(work / "data")}
            job |= {"steps": args.steps, "batch_size": args.batch_size}
            rounds, rejected, tried = run_rounds(args, job, work)
        except (BenchmarkError, GraftError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    summary = summarise(rounds)
    print(table(summary), file=sys.stderr)
    config = {"model": args.model, "data": args.data, "steps": args.steps, "batch_size": args.batch_size}
    config |= {"rank": RANK, "alpha": ALPHA, "beta": BETA, "lr": RATE, "trl_precision": job["precision"]}
    about = {"machine": describe(), "graftlm": git_state(), "config": config, "trials": tried}
    report = {**about, **summary, "runs": rounds, "rejected": rejected}
    if args.json_out:
        args.json_out.parent.mkdir(parents=True, exist_ok=True)
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
