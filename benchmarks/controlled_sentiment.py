"""The controlled sentiment experiment of the DPO paper (Rafailov et al. 2023, section 6.1) on real reviews.

    python benchmarks/controlled_sentiment.py [--work runs/controlled] [--until pairs] [--json-out FILE]

    texts        IMDb reviews -> whole sentences: a prompt of a few words, and its continuation
    classifier   `graft train` on Rotten Tomatoes: its probability of "positive" is the reward
    sft          `graft train` on the texts: the reference of all later stages
    pairs        `graft pairs`: its answers to other prompts, the best against the worst
    dpo          `graft train --objective dpo` from the reference, once for each beta, keeping checkpoints
    preferred    `graft train` from the reference on the chosen answers alone, keeping checkpoints
    evaluation   for every checkpoint: answers to held-out prompts, their reward, and the KL to the reference

The result is the frontier of reward against KL: DPO, SFT on the preferred, the base, and best-of-n of the reference's
answers. All values are in recipes/preferences/controlled.toml. Killed and started again, it continues: a stage whose
NAME.json is in the work folder is not run again, and training resumes from its last checkpoint.

The KL is not the difference of two sampled log-probabilities: for each sampled token the KL between both models'
distributions of the next token is computed, and summed over the answer. Its mean estimates the same KL between
distributions of answers with less variance. Answers are truncated at max_new_tokens, for policy and reference.
"""

import argparse
import json
import re
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from frontier import Point, best_of_n, compare, draws, interval, kl_of_best
from harness import ROOT, BenchmarkError, graft, graft_words, main, note, read_rows, write_rows
from render import DOCS, WORDS, chart, fill, machine, markdown, newest

if TYPE_CHECKING:
    from graftlm.exchange.load import ModelBundle

STAGES = ("texts", "classifier", "sft", "pairs", "dpo", "preferred", "evaluation")
TEXTS, CLASSIFIER, SFT, PAIRS = ("texts",), ("classifier",), ("texts", "sft"), ("texts", "classifier", "sft", "pairs")
"""The recipe's tables on which a stage's result depends."""
RECIPE = ROOT / "recipes" / "preferences" / "controlled.toml"
PAGE = DOCS / "preferences.md"
SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")
MIN_WORDS = 4
"""Words that must follow a prompt."""
ROWS = 10
"""Answers whose distributions are compared in one pass; 480 tokens of a vocabulary of 50,000 take 100 MB per model."""
KL_STEPS = 10
"""Values of the KL at which two lines are compared."""


def run_graft(verb: str, values: Mapping[str, Any]) -> Any:
    """The JSON object of a graft command with these flags."""
    return graft(*graft_words(verb, values)[:-1])


# --------------------------------------------------------------------------------------------------------- the texts


def beginning(text: str, opening: int, words: int) -> tuple[str, str] | None:
    """A review's first words, and their continuation up to the last end of a sentence within `words` words.

    White space becomes single spaces, and the text ends before its first HTML tag. None if no sentence fits.
    """
    parts = text.partition("<br")[0].split()[:words]
    end = max((n for n, word in enumerate(parts, start=1) if SENTENCE_END.search(word)), default=0)
    if end < opening + MIN_WORDS:
        return None
    return " ".join(parts[:opening]), " " + " ".join(parts[opening:end])


def take(texts: Iterator[tuple[str, str]], count: int, taken: set[str], what: str) -> list[dict[str, str]]:
    """The next `count` texts whose prompts are not in `taken`."""
    rows = []
    for prompt, completion in texts:
        if prompt not in taken:
            taken.add(prompt)
            rows.append({"prompt": prompt, "completion": completion})
            if len(rows) == count:
                return rows
    raise BenchmarkError(f"{what}: only {len(rows)} of {count} different prompts; ask for fewer")


def make_texts(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write the texts' files; no prompt is in two of them."""
    from graftlm.text.dataset import load_dataset, text_hash

    splits = load_dataset(values["data"]).splits
    taken: set[str] = set()

    def texts(split: str) -> Iterator[tuple[str, str]]:
        rows = sorted(splits[split], key=lambda row: text_hash("controlled\n" + row.text))
        return (found for row in rows if (found := beginning(row.text, values["prompt_words"], values["words"])))

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
    """A recipe and its work folder."""

    recipe: dict[str, Any]
    work: Path

    def stage(self, name: str, tables: Sequence[str], run: Callable[[], Any]) -> Any:
        """A stage's result: run now, or read if it was run before with the same values in the recipe's `tables`."""
        from graftlm.files.atomic import write_json

        file, begun = self.work / f"{name}.json", self.work / f"{name}.begun"
        # A longer list of betas keeps the runs of those that are done.
        values = {each: {k: v for k, v in self.recipe[each].items() if k != "betas"} for each in tables}
        again = begun.is_file()
        if again and (was := json.loads(begun.read_text(encoding="utf-8"))) != values:
            other = ", ".join(f"[{each}]" for each in tables if was.get(each) != values[each])
            raise BenchmarkError(f"{self.work}: {name} was begun with another {other}: choose another --work")
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))["result"]
        write_json(begun, values)
        began = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - began
        write_json(file, {"seconds": round(seconds, 1), "again": again, "result": result})
        note(f"{name}: {seconds:.0f} s")
        return result

    def seconds(self) -> dict[str, dict[str, Any]]:
        """Seconds of each finished stage, and whether any part of it was interrupted."""
        found: dict[str, dict[str, Any]] = {}
        for file in sorted(self.work.glob("*.json"), key=lambda file: file.stat().st_mtime_ns):
            about = json.loads(file.read_text(encoding="utf-8"))
            stage = found.setdefault(file.stem.partition(" ")[0], {"seconds": 0.0, "again": False})
            stage["seconds"] = round(stage["seconds"] + about["seconds"], 1)
            stage["again"] |= about["again"]
        return found

    def train(self, name: str, values: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """The results of a training run in the folder `name`: started, resumed, or read."""
        out_dir = self.work / name
        record = out_dir / "run.json"
        if record.is_file():
            results = json.loads(record.read_text(encoding="utf-8"))["results"]
            return results or run_graft("train", {"resume": True, "out_dir": out_dir})
        return run_graft("train", {**values, **more, "out_dir": out_dir})

    def run(self, until: str) -> None:
        """All stages up to `until`."""
        self.work.mkdir(parents=True, exist_ok=True)
        own = self.recipe
        stages: dict[str, Callable[[], object]] = {
            "texts": lambda: self.stage("texts", TEXTS, lambda: make_texts(own["texts"], self.work)),
            "classifier": lambda: self.stage(
                "classifier", CLASSIFIER, lambda: self.train("classifier", own["classifier"])
            ),
            "sft": lambda: self.stage("sft", SFT, lambda: self.train("reference", own["sft"], data=self.work / "sft")),
            "pairs": lambda: self.stage("pairs", PAIRS, self.make_pairs),
            "dpo": self.train_dpo,
            "preferred": lambda: self.stage("preferred", (*PAIRS, "preferred"), self.train_preferred),
            "evaluation": self.evaluate,
        }
        for name in STAGES[: STAGES.index(until) + 1]:
            stages[name]()

    def make_pairs(self) -> dict[str, Any]:
        """`graft pairs`, and its pairs as two data sets: pairs/ for DPO, chosen/ for SFT on the preferred."""
        file = self.work / "pairs.jsonl"
        file.unlink(missing_ok=True)  # of a killed stage
        places = {"out_dir": self.work / "reference", "prompts": self.work / "prompts.jsonl", "out": file}
        found = run_graft("pairs", {**self.recipe["pairs"], **places, "reward_model": self.work / "classifier"})
        rows, held = read_rows(file), self.recipe["texts"]["pairs_validation"]
        prompts = list(dict.fromkeys(row["prompt"] for row in rows))
        if len(prompts) <= held:
            raise BenchmarkError(
                f"pairs of only {len(prompts)} prompts, of which {held} are for validation: ask for more"
            )
        for split, some in (("validation", set(prompts[:held])), ("train", set(prompts[held:]))):
            own = [row for row in rows if row["prompt"] in some]
            write_rows(self.work / "pairs" / f"{split}.jsonl", own)
            chosen = {
                (row["prompt"], row["chosen"]): {
                    "prompt": row["prompt"],
                    "completion": row["chosen"],
                    "finished": row["finished"][0],
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
        """The held-out prompts."""
        return [row["prompt"] for row in read_rows(self.work / "held_out.jsonl")]

    @cached_property
    def reference(self) -> "ModelBundle":
        """The model that all others are compared with."""
        from graftlm.exchange.load import load

        return load("resume", self.work / "reference")

    @cached_property
    def reward(self) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
        """Prompts and answers -> the classifier's probability of its last label, positive."""
        from graftlm.exchange.load import load
        from graftlm.inference.pairs import classifier_reward

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

        measuring = (*CLASSIFIER, *SFT, "evaluation")
        self.stage("evaluation best-of-n", measuring, self.sample_reference)
        self.stage("evaluation base", measuring, lambda: self.measure(load(self.recipe["sft"]["init_from"])))
        for name, (run, checkpoint) in self.checkpoints().items():
            tables = (*PAIRS, run.partition("-")[0], "evaluation")
            self.stage(f"evaluation {name}", tables, partial(self.measure_run, run, checkpoint))

    def measure_run(self, run: str, checkpoint: str) -> dict[str, Any]:
        """`measure` of a run's checkpoint."""
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

    def sample(self, loaded: "ModelBundle", prompts: Sequence[str]) -> tuple[list[str], list[bool], list[list[int]]]:
        """An answer to each prompt at temperature 1: texts, whether they are finished, tokens."""
        from graftlm.inference.generate import generate_ids
        from graftlm.inference.sampling import SamplingParams

        values, eot = self.recipe["evaluation"], loaded.tokenizer.eot
        params = SamplingParams(
            max_new_tokens=values["max_new_tokens"],
            temperature=1.0,
            seed=values["seed"],
            stop_token_ids=frozenset({eot}),
        )
        tokens = generate_ids(loaded.model, loaded.tokenizer.encode_prompts(prompts), params)
        texts = [loaded.tokenizer.decode(ids) for ids in tokens]
        return texts, [len(ids) < values["max_new_tokens"] for ids in tokens], tokens

    def measure(self, policy: "ModelBundle") -> dict[str, Any]:
        """Reward and KL of one answer to each held-out prompt, [P] each."""
        answers, ended, tokens = self.sample(policy, self.prompts)
        prompts = policy.tokenizer.encode_prompts(self.prompts)
        sampled = [[*ids, policy.tokenizer.eot] if done else ids for ids, done in zip(tokens, ended, strict=True)]
        return {
            "reward": self.reward(self.prompts, answers),
            "kl": kl_of_answers(policy, self.reference, prompts, sampled),
            "ended": float(np.mean(ended)),
            "tokens": float(np.mean([len(ids) for ids in tokens])),
            "texts": [prompt + answer for prompt, answer in zip(self.prompts, answers, strict=True)][:4],
        }


def kl_of_answers(
    policy: "ModelBundle", reference: "ModelBundle", prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> list[float]:
    """For each answer the sum over its positions of KL(policy || reference), in nats."""
    import torch

    from graftlm.inference.decoder import right_pad
    from graftlm.inference.generate import eval_mode

    kl = [0.0] * len(prompts)
    by_length = sorted((row for row, answer in enumerate(answers) if answer), key=lambda row: len(answers[row]))
    with eval_mode(policy.model), eval_mode(reference.model):
        for rows in (by_length[start : start + ROWS] for start in range(0, len(by_length), ROWS)):
            ids, _ = right_pad([[*prompts[row], *answers[row][:-1]] for row in rows], policy.model.device)
            places = [
                (row, slot * ids.shape[1] + len(prompts[row]) - 1 + i)
                for slot, row in enumerate(rows)
                for i in range(len(answers[row]))
            ]
            at = torch.tensor([position for _, position in places], device=ids.device)
            ours, theirs = (
                model(ids, positions=at).float().log_softmax(dim=-1) for model in (policy.model, reference.model)
            )
            steps = (ours.exp() * (ours - theirs)).sum(-1).double().tolist()
            for (row, _), step in zip(places, steps, strict=True):
                kl[row] += step
    return kl


# ----------------------------------------------------------------------------------------------------------- summary


def summarise(recipe: Mapping[str, Any], results: Mapping[str, Any], seconds: Mapping[str, Any]) -> dict[str, Any]:
    """The frontier: every point with its intervals, best-of-n, DPO against SFT on the preferred, and the claims.

    results: of each stage by name; "evaluation NAME" for each point.
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
        points[name] = {**_row(point, chosen), "ended": found["ended"], "tokens": found["tokens"]}
    best = {}
    for n in [2**i for i in range(many.shape[1].bit_length()) if 2**i <= many.shape[1]]:
        best[str(n)] = {**_row(Point(best_of_n(many, n), np.zeros(len(many))), chosen), "kl": kl_of_best(n)}
    dpo = {name: point for name, point in measured.items() if name.startswith("dpo-")}
    preferred = [point for name, point in measured.items() if name.startswith("preferred")]
    against = compare(
        list(dpo.values()), preferred, start, steps=KL_STEPS, resamples=values["resamples"], seed=values["seed"]
    )
    top = max(dpo, key=lambda name: points[name]["reward"])
    total = sum(stage["seconds"] for stage in seconds.values())
    claims: dict[str, bool | None] = {
        "DPO reaches a mean reward of 0.9": points[top]["reward"] >= 0.9,
        "DPO lies above SFT on the preferred at every KL that both have": all(
            row["delta_vs_baseline"] > 0 for row in against["rows"]
        ),
        "and the interval of the mean difference lies above 0": against["ci_low"] > 0,
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
    low, high = interval(point.reward[chosen].mean(axis=1))
    kl_low, kl_high = interval(point.kl[chosen].mean(axis=1))
    return {"kl": kl, "kl_low": kl_low, "kl_high": kl_high, "reward": reward, "ci_low": low, "ci_high": high}


def collect(experiment: Experiment) -> dict[str, Any]:
    """The results of all stages, by name."""
    names = ["texts", "classifier", "sft", "pairs", "evaluation best-of-n", "evaluation base"]
    names += [f"evaluation {name}" for name in experiment.checkpoints()]
    files = {name: experiment.work / f"{name}.json" for name in names}
    return {name: json.loads(file.read_text(encoding="utf-8"))["result"] for name, file in files.items()}


# ---------------------------------------------------------------------------------------------------------- the page


def spread(low: float, high: float, form: str) -> str:
    """An interval; empty where nothing varies."""
    return f"{low:{form}} to {high:{form}}" if high else ""


def blocks(result: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """What belongs between the page's marks, and the picture as SVG."""
    points, found, against = result["points"], result["found"], result["comparison"]
    best = {f"best of {n}": row for n, row in result["best_of_n"].items()}
    origin = (0.0, points["reference"]["reward"])
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, point in points.items():
        run, _, step = name.partition(" step ")
        if step:
            label = run.replace("dpo-", "DPO, beta ").replace("preferred", "SFT on the preferred")
            lines.setdefault(label, [origin]).append((point["kl"], point["reward"]))
    lines["best-of-n of the reference"] = [(row["kl"], row["reward"]) for row in best.values()]
    lines["base"] = [(points["base"]["kl"], points["base"]["reward"])]
    minutes = " · ".join(f"{name} {seconds / 60:.1f}" for name, seconds in result["seconds"].items())
    pairs, judge = found["pairs"], found["classifier"]["last"]
    rows = [
        [
            name,
            f"{row['kl']:.2f}",
            spread(row["kl_low"], row["kl_high"], ".2f"),
            f"{row['reward']:.3f}",
            spread(row["ci_low"], row["ci_high"], ".3f"),
            f"{row['ended']:.0%}" if "ended" in row else "",
        ]
        for name, row in {**points, **best}.items()
    ]
    differences = [
        [
            *(f"{row['kl']:.2f}", f"{row['one']:.3f}", f"{row['other']:.3f}", f"{row['delta_vs_baseline']:+.3f}"),
            spread(row["ci_low"], row["ci_high"], "+.3f"),
        ]
        for row in against["rows"]
    ]
    differences.append(
        ["mean", "", "", f"{against['mean']:+.3f}", spread(against["ci_low"], against["ci_high"], "+.3f")]
    )
    title = "mean reward against the KL to the reference"
    picture = chart(lines, title, "KL to the reference, nats", (0, 0.1, 0.5, 1, 2, 5, 10, 20, 50, 100), root=True)
    claims = "\n".join(f"- *{claim}*: {WORDS[holds]}" for claim, holds in result["claims"].items())
    head = ("KL, nats", "DPO", "SFT on the preferred", "difference", "95%")
    return {
        "machine": f"{result['date']}, seed {result['recipe']['evaluation']['seed']} of the samples, 0 of training. "
        f"{machine(result)}\n\n{result['minutes']:.0f} minutes in all: {minutes}.",
        "pairs": f"{pairs['pairs']:,} pairs of {pairs['answers']:,} answers to {pairs['prompts']:,} openings "
        f"({pairs['ties']} ties, {pairs['duplicates']} duplicates, {pairs['empty']} empty; {pairs['truncated']} "
        f"answers in pairs were truncated). Mean reward of all answers {pairs['mean_reward']:.3f}, of the chosen "
        f"{pairs['reward_chosen']:.3f}, of the rejected {pairs['reward_rejected']:.3f}. The classifier is right on "
        f"{judge['val_accuracy']:.1%} of the Rotten Tomatoes validation sample.",
        "frontier": f"{markdown(('model', 'KL, nats', '95%', 'mean reward', '95%', 'ended'), rows)}\n\n"
        f"![{title}](preferences/frontier.svg)",
        "comparison": f"{markdown(head, differences, left=0)}\n\n{claims}",
        "samples": "\n".join(
            f"- {name}: " + " / ".join(f"“{' '.join(text.split())}”" for text in texts[:3])
            for name, texts in result["texts"].items()
        ),
    }, picture


def pages() -> dict[Path, str]:
    """The page and the picture that the newest result gives."""
    found, picture = blocks(newest("controlled"))
    text = fill(PAGE.read_text(encoding="utf-8"), found)
    return {PAGE: text, PAGE.with_suffix("") / "frontier.svg": picture}


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All stages up to --until; after the last one the summary."""
    recipe = tomllib.loads(args.recipe.read_text(encoding="utf-8"))
    experiment = Experiment(recipe, args.work.resolve())
    experiment.run(args.until)
    if args.until != STAGES[-1]:
        return {"seconds": experiment.seconds()}
    return {"recipe": recipe, **summarise(recipe, collect(experiment), experiment.seconds())}


FLAGS: dict[str, dict[str, Any]] = {
    "recipe": {"type": Path, "default": RECIPE, "help": "the values (default recipes/preferences/controlled.toml)"},
    "work": {"type": Path, "default": ROOT / "runs" / "controlled", "help": "the folder of all runs"},
    "until": {"choices": STAGES, "default": STAGES[-1], "help": "the last stage to run (default: all)"},
}

if __name__ == "__main__":
    sys.exit(main(__doc__, run, FLAGS))
