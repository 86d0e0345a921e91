"""The controlled sentiment experiment of the DPO paper (Rafailov et al. 2023, section 6.1), end to end on real reviews.

    python benchmarks/controlled_sentiment.py [--work runs/controlled] [--until pairs] [--json-out FILE]
    python benchmarks/controlled_sentiment.py --page FILE

    texts        IMDb reviews -> whole sentences: an opening of a few words, and what follows it
    classifier   `graft train` on Rotten Tomatoes: its probability of "positive" is the reward
    sft          `graft train` on the texts: a model that writes reviews, the reference of all that follows
    pairs        `graft prefer`: its answers to other openings, the best against the worst
    dpo          `graft train --objective dpo` from the reference, once for each beta, with checkpoints on the way
    preferred    `graft train` from the reference on the chosen answers alone, with checkpoints
    evaluation   for every checkpoint: answers to held-out openings, their reward, and the KL to the reference

and then the frontier of reward against KL: DPO, SFT on the preferred, the base, and best-of-n of the reference's
answers beside them. All values are in recipes/preferences/controlled.toml. Killed and given again it goes on: a stage
whose NAME.json is in the work folder is not run again, and training goes on from its last checkpoint.

What is unusual here: the KL is no difference of two sampled log-probabilities. At every token of an answer that the
policy sampled, the KL between both models' whole distributions of the next token is computed, and summed over the
answer; its mean estimates the same KL between distributions of answers, with less variance (the sampled difference is
kept beside it). Answers that do not end within max_new_tokens are cut, for policy and reference alike.

A line for each stage goes to stderr, one JSON object to the last line of stdout. With --page docs/preferences.md is
made anew from a result: what stands between its marks is replaced.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _frontier import Array, Point, best_of_n, compare, draws, interval, kl_of_best, picture
from _machine import describe
from handout import fill
from page import machine
from train_vs_peers import ROOT, BenchmarkError, git_state

if TYPE_CHECKING:
    from graftlm.exchange.load import Loaded

TEXTS, JUDGE, START = ("texts",), ("classifier",), ("texts", "sft")
PAIRS = ("texts", "classifier", "sft", "pairs")
"""The recipe's tables that decide what the stages give."""
STAGES = ("texts", "classifier", "sft", "pairs", "dpo", "preferred", "evaluation")
RECIPE = ROOT / "recipes" / "preferences" / "controlled.toml"
SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")
FEWEST = 4
"""Words that must follow an opening."""
POSITIONS = 512
"""Positions whose distributions are compared at once; at 50,000 tokens of a vocabulary they take 100 MB a model."""
GRID = 10
"""Steps of KL at which two lines are compared."""


def graft(*words: str) -> Any:
    """The JSON object of a graft command of this checkout; its notes go to the standard error as they come."""
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "graftlm", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise BenchmarkError(f"graft {' '.join(words)} failed with status {done.returncode}")
    return json.loads(done.stdout)


def flags(values: Mapping[str, Any]) -> list[str]:
    """Values by flag -> the words of a command line."""
    return [f"--{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items()]


def write_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A jsonl file, atomically."""
    from graftlm.files.atomic import write_text

    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


# --------------------------------------------------------------------------------------------------------- the texts


def beginning(text: str, opening: int, words: int) -> tuple[str, str] | None:
    """A review's first words, and what follows them up to the last end of a sentence within `words` words.

    White space becomes single spaces, and the text ends before its first HTML tag. None where nothing fits.
    """
    parts = text.partition("<br")[0].split()[:words]
    end = max((n for n, word in enumerate(parts, start=1) if SENTENCE_END.search(word)), default=0)
    if end < opening + FEWEST:
        return None
    return " ".join(parts[:opening]), " " + " ".join(parts[opening:end])


def take(texts: Iterator[tuple[str, str]], count: int, taken: set[str], what: str) -> list[dict[str, str]]:
    """The next `count` texts whose openings are not taken yet."""
    rows = []
    for prompt, completion in texts:
        if prompt not in taken:
            taken.add(prompt)
            rows.append({"prompt": prompt, "completion": completion})
            if len(rows) == count:
                return rows
    raise BenchmarkError(f"{what}: only {len(rows)} of {count} different openings; ask for fewer")


def make_texts(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write the texts' files; no opening is in two of them."""
    from graftlm.text.dataset import load_dataset, text_hash

    splits = load_dataset(values["data"]).splits
    taken: set[str] = set()

    def texts(split: str) -> Iterator[tuple[str, str]]:
        rows = sorted(splits[split], key=lambda row: text_hash("controlled\n" + row.text))
        return (found for row in rows if (found := beginning(row.text, values["opening"], values["words"])))

    train = texts("train")
    found = {
        "held_out": take(texts("test"), values["held_out"], taken, "test"),
        "sft/validation": take(texts("validation"), values["validation"], taken, "validation"),
        "sft/train": take(train, values["train"], taken, "train"),
        "prompts": take(train, values["prompts"], taken, "train"),
    }
    for name, rows in found.items():
        write_rows(folder / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in found.items()}


# ------------------------------------------------------------------------------------------------------ the stages


@dataclass(frozen=True)
class Experiment:
    """A recipe and the folder in which it is worked off."""

    recipe: dict[str, Any]
    work: Path

    def stage(self, name: str, tables: Sequence[str], run: Callable[[], Any]) -> Any:
        """What a stage gives: run now, or read if it was run before with the same values in the recipe's `tables`."""
        from graftlm.files.atomic import write_json

        file, begun = self.work / f"{name}.json", self.work / f"{name}.begun"
        # To another list of betas belong the same runs of those that are in both.
        values = {each: {k: v for k, v in self.recipe[each].items() if k != "betas"} for each in tables}
        again = begun.is_file()
        if again and (was := json.loads(begun.read_text(encoding="utf-8"))) != values:
            other = ", ".join(f"[{each}]" for each in tables if was.get(each) != values[each])
            raise BenchmarkError(f"{self.work}: {name} was begun with another {other}: name another folder with --work")
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))["result"]
        write_json(begun, values)
        began = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - began
        write_json(file, {"seconds": round(seconds, 1), "again": again, "result": result})
        print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        return result

    def seconds(self) -> dict[str, dict[str, Any]]:
        """Seconds of each stage that is done, and whether any part of it had to be begun again."""
        found: dict[str, dict[str, Any]] = {}
        for file in sorted(self.work.glob("*.json"), key=lambda file: file.stat().st_mtime_ns):
            about = json.loads(file.read_text(encoding="utf-8"))
            stage = found.setdefault(file.stem.partition(" ")[0], {"seconds": 0.0, "again": False})
            stage["seconds"] = round(stage["seconds"] + about["seconds"], 1)
            stage["again"] |= about["again"]
        return found

    def train(self, name: str, values: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """The results of a training run in the folder `name`; begun, gone on with, or read."""
        out_dir = self.work / name
        record = out_dir / "run.json"
        if record.is_file():
            results = json.loads(record.read_text(encoding="utf-8"))["results"]
            return results or graft("train", "--resume", f"--out_dir={out_dir}")
        return graft("train", *flags({**values, **more, "out_dir": out_dir}))

    def run(self, until: str) -> None:
        """All stages up to `until`."""
        self.work.mkdir(parents=True, exist_ok=True)
        own = self.recipe
        stages: dict[str, Callable[[], object]] = {
            "texts": lambda: self.stage("texts", TEXTS, lambda: make_texts(own["texts"], self.work)),
            "classifier": lambda: self.stage("classifier", JUDGE, lambda: self.train("classifier", own["classifier"])),
            "sft": lambda: self.stage(
                "sft", START, lambda: self.train("reference", own["sft"], data=self.work / "sft")
            ),
            "pairs": lambda: self.stage("pairs", PAIRS, self.make_pairs),
            "dpo": self.train_dpo,
            "preferred": lambda: self.stage("preferred", (*PAIRS, "preferred"), self.train_preferred),
            "evaluation": self.evaluate,
        }
        for name, run in stages.items():
            run()
            if name == until:
                return

    def make_pairs(self) -> dict[str, Any]:
        """`graft prefer`, and its pairs as two data sets: pairs/ for DPO, chosen/ for SFT on the preferred."""
        file = self.work / "pairs.jsonl"
        file.unlink(missing_ok=True)  # of a stage that was killed before it had ended
        places = {"out_dir": self.work / "reference", "prompts": self.work / "prompts.jsonl", "out": file}
        found = graft("prefer", *flags({**self.recipe["pairs"], **places, "judge": self.work / "classifier"}))
        rows, held = read_rows(file), self.recipe["texts"]["pairs_validation"]
        prompts = list(dict.fromkeys(row["prompt"] for row in rows))
        if len(prompts) <= held:
            raise BenchmarkError(f"pairs of {len(prompts)} prompts only, and {held} are to validate: ask for more")
        for split, some in (("validation", set(prompts[:held])), ("train", set(prompts[held:]))):
            own = [row for row in rows if row["prompt"] in some]
            write_rows(self.work / "pairs" / f"{split}.jsonl", own)
            chosen = {
                (row["prompt"], row["chosen"]): {
                    "prompt": row["prompt"],
                    "completion": row["chosen"],
                    "ended": row["ended"][0],
                }
                for row in own
            }
            write_rows(self.work / "chosen" / f"{split}.jsonl", list(chosen.values()))
        means = {key: float(np.mean([row[key] for row in rows])) for key in ("reward_chosen", "reward_rejected")}
        return {**found, **means, "example": rows[0]}

    def train_dpo(self) -> None:
        """One run for each beta; the reference's log-probabilities are computed once, by the first."""
        values = dict(self.recipe["dpo"])
        betas = values.pop("betas")
        first = self.work / f"dpo-{betas[0]:g}"
        for beta in betas:
            more = {"objective": "dpo", "beta": beta, "init_from": self.work / "reference", "data": self.work / "pairs"}
            more |= {"keep_checkpoints": True} | ({"reference": first} if beta != betas[0] else {})
            name = f"dpo-{beta:g}"
            self.stage(f"dpo {beta:g}", (*PAIRS, "dpo"), partial(self.train, name, values, **more))

    def train_preferred(self) -> dict[str, Any]:
        """SFT on the chosen answers alone, from the reference."""
        more = {"init_from": self.work / "reference", "data": self.work / "chosen", "keep_checkpoints": True}
        return self.train("preferred", self.recipe["preferred"], **more)

    # -------------------------------------------------------------------------------------------------- evaluation

    @cached_property
    def prompts(self) -> list[str]:
        """The held-out openings."""
        return [row["prompt"] for row in read_rows(self.work / "held_out.jsonl")]

    @cached_property
    def reference(self) -> "Loaded":
        """The model that all others are held against."""
        from graftlm.exchange.load import load

        return load("resume", self.work / "reference")

    @cached_property
    def reward(self) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
        """Prompts and answers -> the classifier's probability of its last label, positive."""
        from graftlm.exchange.load import load
        from graftlm.inference.preference_data import classifier_reward

        judge = load("resume", self.work / "classifier")
        assert judge.template is not None
        judged = classifier_reward(judge.model, judge.tokenizer, judge.template)
        return lambda prompts, answers: judged(list(zip(prompts, answers, strict=True)), lambda done: None)

    def checkpoints(self) -> dict[str, tuple[str, str]]:
        """Point -> (run folder, checkpoint) for every checkpoint of the DPO runs and of SFT on the preferred."""
        found = {}
        for run in [*(f"dpo-{beta:g}" for beta in self.recipe["dpo"]["betas"]), "preferred"]:
            folders = (self.work / run / "checkpoints").glob("step-*")
            for step in sorted(int(folder.name.removeprefix("step-")) for folder in folders):
                found[f"{run} step {step}"] = (run, f"checkpoints/step-{step}")
        return found

    def evaluate(self) -> None:
        """The reference's many answers, the base, and every checkpoint."""
        from graftlm.exchange.load import load

        measuring = (*JUDGE, *START, "evaluation")
        self.stage("evaluation best-of-n", measuring, self.sample_reference)
        self.stage("evaluation base", measuring, lambda: self.measure(load(self.recipe["sft"]["init_from"])))
        for name, (run, checkpoint) in self.checkpoints().items():
            tables = (*PAIRS, run.partition("-")[0], "evaluation")
            self.stage(f"evaluation {name}", tables, partial(self.measure_run, run, checkpoint))

    def measure_run(self, run: str, checkpoint: str) -> dict[str, Any]:
        """What `measure` says of a run's checkpoint."""
        from graftlm.exchange.load import load

        return self.measure(load("resume", self.work / run, checkpoint))

    def sample_reference(self) -> dict[str, Any]:
        """Rewards of the reference's answers, [P][N]."""
        n = self.recipe["evaluation"]["best_of"]
        prompts = [prompt for prompt in self.prompts for _ in range(n)]
        answers, ended, _ = self.sample(self.reference, prompts)
        rewards = self.reward(prompts, answers)
        return {
            "reward": [rewards[start : start + n] for start in range(0, len(rewards), n)],
            "ended": float(np.mean(ended)),
            "texts": [prompt + answer for prompt, answer in zip(prompts[::n], answers[::n], strict=True)][:4],
        }

    def sample(self, loaded: "Loaded", prompts: Sequence[str]) -> tuple[list[str], list[bool], list[list[int]]]:
        """An answer to each prompt at temperature 1: texts, whether they ended by themselves, tokens."""
        from graftlm.inference.generate import generate_ids

        values = self.recipe["evaluation"]
        tokens = generate_ids(
            loaded.model,
            loaded.tokenizer.encode_batch(prompts, bos=True),
            max_new_tokens=values["max_new_tokens"],
            eot=loaded.tokenizer.eot,
            temperature=1.0,
            seed=values["seed"],
        )
        texts = [loaded.tokenizer.decode(ids) for ids in tokens]
        return texts, [len(ids) < values["max_new_tokens"] for ids in tokens], tokens

    def measure(self, policy: "Loaded") -> dict[str, Any]:
        """Reward and KL of one answer to each held-out opening, [P] each, and what else there is to know."""
        answers, ended, tokens = self.sample(policy, self.prompts)
        prompts = policy.tokenizer.encode_batch(self.prompts, bos=True)
        sampled = [[*ids, policy.tokenizer.eot] if done else ids for ids, done in zip(tokens, ended, strict=True)]
        kl, ratio = kl_of_answers(policy, self.reference, prompts, sampled)
        return {
            "reward": self.reward(self.prompts, answers),
            "kl": kl,
            "log_ratio": ratio,
            "ended": float(np.mean(ended)),
            "tokens": float(np.mean([len(ids) for ids in tokens])),
            "texts": [prompt + answer for prompt, answer in zip(self.prompts, answers, strict=True)][:4],
        }


def kl_of_answers(
    policy: "Loaded", reference: "Loaded", prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> tuple[list[float], list[float]]:
    """For each answer, in nats: the sum over its tokens of KL(policy || reference) where the token was sampled, and the
    plain difference of the two log-probabilities of what was sampled. Both have the KL of answers as their mean.
    """
    import torch

    from graftlm.inference.generate import eval_mode, right_pad

    kl, ratio = [0.0] * len(prompts), [0.0] * len(prompts)
    with eval_mode(policy.model), eval_mode(reference.model):
        for rows in _together([len(answer) for answer in answers], POSITIONS):
            ids, _ = right_pad([[*prompts[row], *answers[row][:-1]] for row in rows], policy.model.device)
            place = [
                (slot, row, len(prompts[row]) - 1 + i, token)
                for slot, row in enumerate(rows)
                for i, token in enumerate(answers[row])
            ]
            at = torch.tensor([slot * ids.shape[1] + position for slot, _, position, _ in place], device=ids.device)
            tokens = torch.tensor([token for *_, token in place], device=ids.device)[:, None]
            ours, theirs = (model(ids, at=at).float().log_softmax(dim=-1) for model in (policy.model, reference.model))
            each = torch.stack([(ours.exp() * (ours - theirs)).sum(-1), (ours - theirs).gather(-1, tokens)[:, 0]])
            for (_, row, _, _), step, sampled in zip(place, *each.double().tolist(), strict=True):
                kl[row] += step
                ratio[row] += sampled
    return kl, ratio


def _together(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Rows of similar length, together at most `most` tokens; a row without any is left out."""
    group: list[int] = []
    for row in sorted((row for row in range(len(lengths)) if lengths[row]), key=lambda row: lengths[row]):
        if group and sum(lengths[other] for other in group) + lengths[row] > most:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


# --------------------------------------------------------------------------------------------------- what it says


def summarise(recipe: Mapping[str, Any], results: Mapping[str, Any], seconds: Mapping[str, Any]) -> dict[str, Any]:
    """The frontier: every point with its intervals, best-of-n, DPO against SFT on the preferred, and the claims.

    results: what the stages gave, by name; of "evaluation NAME" there is one for each point.
    """
    values = recipe["evaluation"]
    many = np.array(results["evaluation best-of-n"]["reward"])
    start = Point(many.mean(axis=1), np.zeros(len(many)))
    chosen = draws(len(many), values["resamples"], values["seed"])
    measured = {
        name.removeprefix("evaluation "): Point(np.array(found["reward"]), np.array(found["kl"]))
        for name, found in results.items()
        if name.startswith("evaluation ") and "kl" in found
    }
    points = {"reference": _row(start, chosen)}
    for name, point in measured.items():
        found = results[f"evaluation {name}"]
        extra = {"sampled_kl": float(np.mean(found["log_ratio"])), "ended": found["ended"], "tokens": found["tokens"]}
        points[name] = {**_row(point, chosen), **extra}
    best = {}
    for n in [2**i for i in range(many.shape[1].bit_length()) if 2**i <= many.shape[1]]:
        best[str(n)] = {**_row(Point(best_of_n(many, n), np.zeros(len(many))), chosen), "kl": kl_of_best(n)}
    dpo = {name: point for name, point in measured.items() if name.startswith("dpo-")}
    preferred = [point for name, point in measured.items() if name.startswith("preferred")]
    against = compare(
        list(dpo.values()), preferred, start, steps=GRID, resamples=values["resamples"], seed=values["seed"]
    )
    top = max(dpo, key=lambda name: points[name]["reward"])
    total = sum(stage["seconds"] for stage in seconds.values())
    claims: dict[str, bool | None] = {
        "DPO reaches a mean reward of 0.9": points[top]["reward"] >= 0.9,
        "DPO lies above SFT on the preferred at every KL that both have": all(
            row["difference"] > 0 for row in against["rows"]
        ),
        "and the interval of the mean difference lies above 0": against["low"] > 0,
        "all within 60 minutes": None if any(stage["again"] for stage in seconds.values()) else total <= 3600,
    }
    return {
        "seconds": {name: stage["seconds"] for name, stage in seconds.items()},
        "minutes": round(total / 60, 1),
        "found": {key: results[key] for key in ("texts", "classifier", "sft", "pairs")},
        "points": points,
        "best_of_n": best,
        "comparison": against,
        "top": top,
        "texts": {
            name: results[f"evaluation {place}"]["texts"]
            for name, place in (("reference", "best-of-n"), ("preferred", _last(measured)), (top, top))
        },
        "claims": claims,
    }


def _last(measured: Mapping[str, Point]) -> str:
    return [name for name in measured if name.startswith("preferred")][-1]


def _row(point: Point, chosen: Any) -> dict[str, float]:
    """A point's means and their intervals."""
    kl, reward = point.at()
    low, high = interval(_resampled(point.reward, chosen))
    kl_low, kl_high = interval(_resampled(point.kl, chosen))
    return {"kl": kl, "kl_low": kl_low, "kl_high": kl_high, "reward": reward, "low": low, "high": high}


def _resampled(values: Array, chosen: Any) -> Array:
    means: Array = values[chosen].mean(axis=1)
    return means


def collect(experiment: Experiment) -> dict[str, Any]:
    """What the stages gave, by name."""
    names = ["texts", "classifier", "sft", "pairs", "evaluation best-of-n", "evaluation base"]
    names += [f"evaluation {name}" for name in experiment.checkpoints()]
    files = {name: experiment.work / f"{name}.json" for name in names}
    return {name: json.loads(file.read_text(encoding="utf-8"))["result"] for name, file in files.items()}


# -------------------------------------------------------------------------------------------------------- the page


def blocks(result: Mapping[str, Any], date: str) -> tuple[dict[str, str], dict[str, str]]:
    """What belongs between the page's marks, and the pictures: file name -> SVG."""
    points, found = result["points"], result["found"]
    runs: dict[str, list[tuple[float, float]]] = {}
    origin = (0.0, points["reference"]["reward"])
    for name, point in points.items():
        run = name.partition(" step ")[0]
        if run != name:
            runs.setdefault(run.replace("dpo-", "DPO, beta ").replace("preferred", "SFT on the preferred"), [origin])
            runs[[*runs][-1]].append((point["kl"], point["reward"]))
    runs["best-of-n of the reference"] = [(best["kl"], best["reward"]) for best in result["best_of_n"].values()]
    marks = {"base": (points["base"]["kl"], points["base"]["reward"]), "reference": origin}
    minutes = " · ".join(f"{name} {seconds / 60:.1f}" for name, seconds in result["seconds"].items())
    pairs, judge = found["pairs"], found["classifier"]["last"]
    words = {True: "holds", False: "does **not** hold", None: "was not measured"}
    against = result["comparison"]
    return {
        "machine": f"{date}, seed {result['recipe']['evaluation']['seed']} of the samples, 0 of all training. "
        f"{machine(result)}\n\n{result['minutes']:.0f} minutes in all: {minutes}.",
        "pairs": f"{pairs['pairs']:,} pairs of {pairs['answers']:,} answers to {pairs['prompts']:,} openings "
        f"({pairs['ties']} ties, {pairs['duplicates']} duplicates, {pairs['empty']} empty; {pairs['cut']} answers in "
        f"pairs were cut). Mean reward of all answers {pairs['mean_reward']:.3f}, of the chosen "
        f"{pairs['reward_chosen']:.3f}, of the rejected {pairs['reward_rejected']:.3f}. The classifier is right on "
        f"{judge['val_accuracy']:.1%} of the Rotten Tomatoes validation sample.",
        "frontier": "\n".join(
            [
                "| model | KL, nats | 95% | mean reward | 95% | ended |",
                "| --- | ---: | ---: | ---: | ---: | ---: |",
                *(_line(name, point) for name, point in points.items()),
                *(_line(f"best of {n}", best) for n, best in result["best_of_n"].items()),
                "",
                "![mean reward against the KL to the reference](preferences/frontier.svg)",
            ]
        ),
        "comparison": "\n".join(
            [
                "| KL, nats | DPO | SFT on the preferred | difference | 95% |",
                "| ---: | ---: | ---: | ---: | ---: |",
                *(
                    f"| {row['kl']:.2f} | {row['one']:.3f} | {row['other']:.3f} | {row['difference']:+.3f} | "
                    f"{row['low']:+.3f} to {row['high']:+.3f} |"
                    for row in against["rows"]
                ),
                f"| mean | | | {against['mean']:+.3f} | {against['low']:+.3f} to {against['high']:+.3f} |",
                "",
                *(f"- *{claim}*: {words[holds]}" for claim, holds in result["claims"].items()),
            ]
        ),
        "samples": "\n".join(
            f"- {name}: " + " / ".join(f"“{' '.join(text.split())}”" for text in texts[:3])
            for name, texts in result["texts"].items()
        ),
    }, {"frontier.svg": picture(runs, marks)}


def _line(name: str, point: Mapping[str, float]) -> str:
    spread = f"{point['kl_low']:.2f} to {point['kl_high']:.2f}" if point["kl_high"] else ""
    ended = f"{point['ended']:.0%}" if "ended" in point else ""
    reward = f"{point['reward']:.3f} | {point['low']:.3f} to {point['high']:.3f}"
    return f"| {name} | {point['kl']:.2f} | {spread} | {reward} | {ended} |"


def write_page(file: Path) -> None:
    """docs/preferences.md and its picture from a result's file."""
    found, pictures = blocks(json.loads(file.read_text(encoding="utf-8")), file.stem[:10])
    page = ROOT / "docs" / "preferences.md"
    page.write_text(fill(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    for name, svg in pictures.items():
        (folder / name).write_text(svg, encoding="utf-8")


def table(summary: Mapping[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'':26}{'KL':>8}{'reward':>9}{'95%':>17}"]
    best = {f"best of {n}": row for n, row in summary["best_of_n"].items()}
    for name, point in {**summary["points"], **best}.items():
        lines.append(f"{name:26}{point['kl']:8.2f}{point['reward']:9.3f}{point['low']:9.3f}{point['high']:8.3f}")
    against = summary["comparison"]
    lines.append(
        f"DPO above SFT on the preferred by {against['mean']:.3f} ({against['low']:.3f} {against['high']:.3f})"
    )
    lines.append(f"{summary['minutes']} minutes")
    words = {True: "yes", False: "NO", None: "not measured"}
    return "\n".join([*lines, *(f"{claim + '?':66}{words[holds]}" for claim, holds in summary["claims"].items())])


def main(words: Sequence[str] | None = None) -> int:
    """Run the experiment, or make the page; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="the values (recipes/preferences/controlled.toml)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "controlled", help="the folder of all runs")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to run (default: all)")
    parser.add_argument("--json-out", type=Path, help="write the JSON object to this file too")
    parser.add_argument("--page", type=Path, help="only make docs/preferences.md from this result")
    args = parser.parse_args(words)
    sys.path.insert(0, str(ROOT / "src"))  # this checkout, not an installed graftlm
    from graftlm.errors import GraftError

    try:
        if args.page:
            write_page(args.page)
            return 0
        recipe = tomllib.loads(args.recipe.read_text(encoding="utf-8"))
        experiment = Experiment(recipe, args.work.resolve())
        experiment.run(args.until)
        if args.until != STAGES[-1]:
            return 0
        summary = summarise(recipe, collect(experiment), experiment.seconds())
    except (BenchmarkError, GraftError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(summary), file=sys.stderr)
    report = {"machine": describe(), "graftlm": git_state(), "recipe": recipe, **summary}
    if args.json_out:
        args.json_out.parent.mkdir(parents=True, exist_ok=True)
        args.json_out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
