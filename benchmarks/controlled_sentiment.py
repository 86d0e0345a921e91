"""The controlled sentiment experiment of the DPO paper (Rafailov et al. 2023, section 6.1) in variants.

    python benchmarks/controlled_sentiment.py [--work runs/controlled] [--until answers] [--json-out FILE]

    texts        IMDb reviews -> whole sentences: a prompt of a few words, and its continuation
    classifier   `graft train` on Rotten Tomatoes: its probability of "positive" is the reward
    sft          `graft train` on the texts: the reference of all later stages
    answers      `graft pairs`: its answers to other prompts, and all pairs of them
    runs         for each variant and seed: some of these pairs, `graft train --objective dpo` from the reference, and
                 for its checkpoints answers to held-out prompts, their reward, and the KL to the reference

A variant overrides values of recipes/preferences/controlled.toml for pairs, training or reference; stages that two
variants share run once. The result is each variant's frontier of reward against KL (`frontier.py`), next to best-of-n
of the reference's answers. Killed and started again, it continues: a stage whose NAME.json is in the work folder is
not run again, and training resumes from its last checkpoint. --finished runs nothing and reports what is finished.

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
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from frontier import summarise
from harness import ROOT, BenchmarkError, graft, graft_words, main, note, read_rows, write_rows

if TYPE_CHECKING:
    from graftlm.exchange.load import ModelBundle

STAGES = ("texts", "classifier", "sft", "answers", "runs")
RECIPE = ROOT / "recipes" / "preferences" / "controlled.toml"
SENTENCE_END = re.compile(r"[.!?][\"')\]]*$")
MIN_WORDS = 4
"""Words that must follow a prompt."""
ROWS = 10
"""Answers whose distributions are compared in one pass; 480 tokens of a vocabulary of 50,000 take 100 MB per model."""
PREFERENCE_FLAGS = ("beta", "kl_samples")
"""Flags of [train] that training on the chosen answers alone does not have."""


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

    train, test = texts("train"), texts("test")
    found = {
        "tuning": take(test, values["tuning"], taken, "test"),
        "held_out": take(test, values["held_out"], taken, "test"),
        "sft/validation": take(texts("validation"), values["validation"], taken, "validation"),
        "sft/train": take(train, values["train"], taken, "train"),
        "prompts": take(train, values["prompts"], taken, "train"),
    }
    for name, rows in found.items():
        write_rows(folder / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in found.items()}


# ---------------------------------------------------------------------------------------------------- the variants


@dataclass(frozen=True)
class Variant:
    """One line of the frontier: what it changes, with the recipe's values for all else."""

    name: str
    why: str
    """What it is compared for."""
    seeds: int
    """Training seeds 0, 1, …"""
    against: str
    """The variant that it is compared with; empty for the first."""
    sft: dict[str, Any]
    """Flags of the reference's `graft train`."""
    pairs: dict[str, Any]
    """first, prompts: which prompts; pairing: best or all; validation: prompts for validation pairs."""
    train: dict[str, Any]
    """Flags of `graft train`."""
    steps: tuple[int, ...]
    """Steps whose checkpoints are evaluated."""
    after: str
    """The variant whose policy answers the prompts and is trained further (a second round on-policy), or empty."""
    after_step: int

    @property
    def reference(self) -> str:
        """The folder of its reference, named by what differs from the recipe's."""
        return "-".join(["reference", *(f"{key}={value}" for key, value in sorted(self.own_sft.items()))])

    own_sft: dict[str, Any] = field(default_factory=dict)
    """Those of `sft` that the variant changes."""


def variants(recipe: Mapping[str, Any]) -> dict[str, Variant]:
    """The recipe's [[variants]] by name, in order. Raises BenchmarkError for keys and names that are not known."""
    found: dict[str, Variant] = {}
    for own in recipe["variants"]:
        if unknown := set(own) - {*Variant.__dataclass_fields__} | {"own_sft"} & set(own):
            raise BenchmarkError(f"variant {own.get('name')}: unknown {', '.join(sorted(unknown))}")
        for other in filter(None, (own.get("against"), own.get("after"))):
            if other not in found:
                raise BenchmarkError(f"variant {own['name']}: no earlier variant is called {other}")
        tables = {table: {**recipe[table], **own.get(table, {})} for table in ("sft", "pairs", "train")}
        found[own["name"]] = Variant(
            name=own["name"],
            why=own["why"],
            seeds=own.get("seeds", 1),
            against=own.get("against", ""),
            steps=tuple(own["steps"]),
            after=own.get("after", ""),
            after_step=own.get("after_step", 0),
            own_sft=own.get("sft", {}),
            **tables,
        )
    return found


# ------------------------------------------------------------------------------------------------------ the stages


@dataclass(frozen=True)
class Experiment:
    """A recipe and its work folder."""

    recipe: dict[str, Any]
    work: Path

    @cached_property
    def variants(self) -> dict[str, Variant]:
        """The recipe's variants by name."""
        return variants(self.recipe)

    def tables(self, *names: str) -> dict[str, Any]:
        """Tables of the recipe, by name."""
        return {name: self.recipe[name] for name in names}

    def stage(self, name: str, values: Mapping[str, Any], run: Callable[[], Any]) -> Any:
        """A stage's result: run now, or read if it was run before with the same `values`, on which it depends."""
        from graftlm.files.atomic import write_json

        file, begun = self.work / f"{name}.json", self.work / f"{name}.begun"
        values = json.loads(json.dumps(values))
        if begun.is_file() and (was := json.loads(begun.read_text(encoding="utf-8"))) != values:
            other = ", ".join(f"[{each}]" for each in values if was.get(each) != values[each])
            raise BenchmarkError(f"{self.work}: {name} was begun with another {other}: choose another --work")
        if file.is_file():
            return self.result(name)
        write_json(begun, values)
        began = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - began
        write_json(file, {"seconds": round(seconds, 1), "result": result})
        note(f"{name}: {seconds:.0f} s")
        return result

    def result(self, name: str) -> Any:
        """A finished stage's result."""
        return json.loads((self.work / f"{name}.json").read_text(encoding="utf-8"))["result"]

    def finished(self, name: str) -> bool:
        """Whether a stage has a result."""
        return (self.work / f"{name}.json").is_file()

    def train(self, name: str, values: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """The results of a training run in the folder `name`: started, resumed, or read."""
        out_dir = self.work / name
        record = out_dir / "run.json"
        if record.is_file():
            results = json.loads(record.read_text(encoding="utf-8"))["results"]
            return results or run_graft("train", {"resume": True, "out_dir": out_dir})
        return run_graft("train", {**values, **more, "out_dir": out_dir})

    def run(self, until: str) -> None:
        """All stages up to `until`: each variant's first seed before any second one."""
        self.work.mkdir(parents=True, exist_ok=True)
        last = STAGES.index(until)
        self.stage("texts", self.tables("texts"), lambda: make_texts(self.recipe["texts"], self.work))
        if last >= STAGES.index("classifier"):
            judge = self.tables("classifier")
            self.stage("classifier", judge, lambda: self.train("classifier", judge["classifier"]))
        for variant in self.variants.values():
            if last >= STAGES.index("sft"):
                self.make_reference(variant)
            if last >= STAGES.index("answers"):
                self.answer_from_reference(variant)
        if until == STAGES[-1]:
            for seed in range(max(variant.seeds for variant in self.variants.values())):
                for variant in self.variants.values():
                    if seed < variant.seeds:
                        self.run_variant(variant, seed)

    def make_reference(self, variant: Variant) -> None:
        """SFT on the texts."""
        values = {**self.tables("texts"), "sft": variant.sft}
        run = partial(self.train, variant.reference, variant.sft, data=self.work / "sft")
        self.stage(variant.reference.replace("reference", "sft", 1), values, run)

    def measuring(self, variant: Variant) -> dict[str, Any]:
        """The values on which any measurement with a variant's reference depends."""
        return {**self.tables("texts", "classifier", "evaluation"), "sft": variant.sft}

    def answer_from_reference(self, variant: Variant) -> None:
        """All pairs of the reference's answers, and its answers to the held-out prompts."""
        name = variant.reference.replace("reference", "answers", 1)
        same = [v.pairs for v in self.variants.values() if v.reference == variant.reference and not v.after]
        limit = max(pairs["first"] + pairs["prompts"] for pairs in same)
        values = {**self.tables("texts", "classifier"), "sft": variant.sft}
        values |= {"answers": {**self.recipe["answers"], "limit": limit}}
        self.stage(name, values, partial(self.answer, variant.reference, name, self.work / "prompts.jsonl", limit))
        name = variant.reference.replace("reference", "evaluation", 1)
        self.stage(name, self.measuring(variant), partial(self.sample_reference, variant.reference))

    def answer(self, model: str, name: str, prompts: Path, limit: int = 0) -> dict[str, Any]:
        """`graft pairs` with all pairs of a model's answers to the first `limit` prompts, into NAME.jsonl."""
        file = self.work / f"{name}.jsonl"
        file.unlink(missing_ok=True)  # of a killed stage
        places = {"init_from": self.work / model, "prompts": prompts, "out": file, "pairing": "all", "limit": limit}
        return run_graft("pairs", {**self.recipe["answers"], **places, "reward_model": self.work / "classifier"})

    # ------------------------------------------------------------------------------------------------ one variant

    def run_variant(self, variant: Variant, seed: int) -> None:
        """Pairs, training, and the evaluation of its checkpoints."""
        run = f"{variant.name} seed {seed}"
        values = {**self.tables("texts", "classifier", "answers"), **self.own_values(variant)}
        start, answers = variant.reference, variant.reference.replace("reference", "answers", 1)
        if variant.after:
            start, answers = f"{variant.after} seed {seed}/checkpoints/step-{variant.after_step}", f"answers {run}"
            self.stage(answers, values, partial(self.answer_again, variant, start, answers))
        data = f"pairs {run if variant.after else variant.name}"
        self.stage(data, values, partial(self.choose_pairs, variant, answers, data))
        self.stage(f"run {run}", values, partial(self.train_variant, variant, seed, self.work / start, data))
        measuring = {**values, **self.measuring(variant)}
        for step in variant.steps:
            measure = partial(self.measure_checkpoint, run, step, variant.reference)
            self.stage(f"evaluation {run} step {step}", measuring, measure)

    def own_values(self, variant: Variant) -> dict[str, Any]:
        """The values on which a variant's runs depend, those of the variant before it included."""
        own: dict[str, Any] = {"sft": variant.sft, "pairs": variant.pairs, "train": variant.train}
        if variant.after:
            own["after"] = {**self.own_values(self.variants[variant.after]), "step": variant.after_step}
        return own

    def prompts_of(self, variant: Variant) -> list[str]:
        """The prompts whose answers a variant takes for pairs."""
        first = variant.pairs["first"]
        rows = read_rows(self.work / "prompts.jsonl")[first : first + variant.pairs["prompts"]]
        if len(rows) < variant.pairs["prompts"]:
            raise BenchmarkError(f"variant {variant.name}: there are only {len(rows)} prompts; raise [texts] prompts")
        return [row["prompt"] for row in rows]

    def answer_again(self, variant: Variant, model: str, name: str) -> dict[str, Any]:
        """All pairs of answers of a policy to this variant's prompts."""
        prompts = self.work / f"{name} prompts.jsonl"
        write_rows(prompts, ({"prompt": prompt} for prompt in self.prompts_of(variant)))
        return self.answer(model, name, prompts)

    def choose_pairs(self, variant: Variant, answers: str, folder: str) -> dict[str, Any]:
        """The variant's pairs as a data set, and their chosen answers as another: FOLDER and FOLDER chosen."""
        prompts = self.prompts_of(variant)
        by_prompt: dict[str, list[dict[str, Any]]] = {prompt: [] for prompt in prompts}
        for row in read_rows(self.work / f"{answers}.jsonl"):
            if row["prompt"] in by_prompt:
                by_prompt[row["prompt"]].append(row)
        if variant.pairs["pairing"] == "best":
            by_prompt = {prompt: widest(rows) for prompt, rows in by_prompt.items()}
        held, train = variant.pairs["validation"], []
        for split, some in (("validation", prompts[:held]), ("train", prompts[held:])):
            train = [row for prompt in some for row in by_prompt[prompt]]
            write_rows(self.work / folder / f"{split}.jsonl", train)
            write_rows(self.work / f"{folder} chosen" / f"{split}.jsonl", chosen(train))
        means = {key: float(np.mean([row[key] for row in train])) for key in ("reward_chosen", "reward_rejected")}
        return {"pairs": len(train), "prompts": len(prompts) - held, **means}

    def train_variant(self, variant: Variant, seed: int, start: Path, data: str) -> dict[str, Any]:
        """DPO on the pairs, or SFT on the chosen answers alone.

        The reference's log-probabilities are computed by the first seed, unless each seed has pairs of its own.
        """
        values, more = dict(variant.train), {"init_from": start, "seed": seed, "keep_checkpoints": True}
        if values["objective"] == "sft":
            values = {key: value for key, value in values.items() if key not in PREFERENCE_FLAGS}
            data += " chosen"
        elif seed and not variant.after:
            more["reference"] = self.work / f"{variant.name} seed 0"
        return self.train(f"{variant.name} seed {seed}", values, data=self.work / data, **more)

    # -------------------------------------------------------------------------------------------------- evaluation

    @cached_property
    def prompts(self) -> list[str]:
        """The held-out prompts."""
        values = self.recipe["evaluation"]
        return [row["prompt"] for row in read_rows(self.work / f"{values['prompts']}.jsonl")][: values["limit"]]

    @cached_property
    def references(self) -> dict[str, "ModelBundle"]:
        """The references that were loaded, by folder."""
        return {}

    def load_reference(self, name: str) -> "ModelBundle":
        """The model that a variant's checkpoints are compared with."""
        from graftlm.exchange.load import load

        if name not in self.references:
            self.references[name] = load("resume", self.work / name)
        return self.references[name]

    @cached_property
    def reward(self) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
        """Prompts and answers -> the classifier's probability of its last label, positive."""
        from graftlm.exchange.load import load
        from graftlm.inference.pairs import classifier_reward

        judge = load("resume", self.work / "classifier")
        assert judge.template is not None
        judged = classifier_reward(judge.model, judge.tokenizer, judge.template)
        return lambda prompts, answers: judged(list(zip(prompts, answers, strict=True)), lambda done: None)

    def sample_reference(self, name: str) -> dict[str, Any]:
        """Rewards of the reference's answers, [P][N]."""
        n = self.recipe["evaluation"]["best_of"]
        prompts = [prompt for prompt in self.prompts for _ in range(n)]
        answers, ended, _ = self.sample(self.load_reference(name), prompts)
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

    def measure_checkpoint(self, run: str, step: int, reference: str) -> dict[str, Any]:
        """Reward and KL of one answer to each held-out prompt, [P] each."""
        from graftlm.exchange.load import load

        policy = load("resume", self.work / run, f"checkpoints/step-{step}")
        answers, ended, tokens = self.sample(policy, self.prompts)
        prompts = policy.tokenizer.encode_prompts(self.prompts)
        sampled = [[*ids, policy.tokenizer.eot] if done else ids for ids, done in zip(tokens, ended, strict=True)]
        return {
            "reward": self.reward(self.prompts, answers),
            "kl": kl_of_answers(policy, self.load_reference(reference), prompts, sampled),
            "ended": float(np.mean(ended)),
            "tokens": float(np.mean([len(ids) for ids in tokens])),
            "texts": [prompt + answer for prompt, answer in zip(self.prompts, answers, strict=True)][:4],
        }


def widest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all pairs of a prompt's answers the best with the worst, as `graft pairs --pairing best` takes it."""
    return [max(rows, key=lambda row: row["reward_chosen"] - row["reward_rejected"])] if rows else []


def chosen(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for training on the chosen answers alone, each once."""
    found = {
        (row["prompt"], row["chosen"]): {
            "prompt": row["prompt"],
            "completion": row["chosen"],
            "finished": row["finished"][0],
        }
        for row in pairs
    }
    return list(found.values())


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


# ------------------------------------------------------------------------------------------------------------ report


KEPT = (
    *("held_out", "tuning", "prompts", "sft/train", "last", "pairs", "answers", "mean_reward"),
    *("ties", "duplicates", "empty", "truncated", "reward_chosen", "reward_rejected"),
)
"""Keys of a stage's result that the report has."""


def collect(experiment: Experiment) -> dict[str, Any]:
    """The finished stages' results: `found`, `references`, and `lines`: variant -> seed -> step -> measurement."""
    names = sorted(file.stem for file in experiment.work.glob("*.json"))
    kinds = ("texts", "classifier", "answers", "pairs")
    found = {name: experiment.result(name) for name in names if name.startswith(kinds)}
    found = {name: {key: value[key] for key in KEPT if key in value} for name, value in found.items()}
    references, lines = {}, {}
    for variant in experiment.variants.values():
        name = variant.reference.replace("reference", "evaluation", 1)
        if not experiment.finished(name):
            continue
        references[variant.reference] = experiment.result(name)
        own = {}
        for seed in range(variant.seeds):
            stages = {step: f"evaluation {variant.name} seed {seed} step {step}" for step in variant.steps}
            done = {step: experiment.result(stage) for step, stage in stages.items() if experiment.finished(stage)}
            if done:
                own[str(seed)] = done
        if own:
            lines[variant.name] = own
    return {"found": found, "references": references, "lines": lines}


def run(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All stages up to --until; then the summary of what is finished."""
    recipe = tomllib.loads(args.recipe.read_text(encoding="utf-8"))
    experiment = Experiment(recipe, args.work.resolve())
    if not args.finished:
        experiment.run(args.until)
    if args.until != STAGES[-1]:
        return {"recipe": recipe}
    return {"recipe": recipe, **summarise(experiment.variants, recipe["evaluation"], collect(experiment))}


FLAGS: dict[str, dict[str, Any]] = {
    "recipe": {"type": Path, "default": RECIPE, "help": "the values (default recipes/preferences/controlled.toml)"},
    "work": {"type": Path, "default": ROOT / "runs" / "controlled", "help": "the folder of all runs"},
    "until": {"choices": STAGES, "default": STAGES[-1], "help": "the last stage to run (default: all)"},
    "finished": {"action": "store_true", "help": "run nothing, and report the runs that are finished"},
}

if __name__ == "__main__":
    sys.exit(main(__doc__, run, FLAGS))
