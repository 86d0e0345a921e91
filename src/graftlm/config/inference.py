"""Settings of the verbs that ask a model or a run: generate, evaluate, prompt and prefer."""

from dataclasses import dataclass
from typing import Literal

from graftlm.config.common import Checkpoint, DemoSelection, Device, Dtype, RayFlags, require
from graftlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue a prompt; without --prompt, classify the test split by generation."""

    init_from: str = "resume"
    """"resume" for the run in --out_dir, or a model's name, folder or .gguf file."""
    out_dir: str = "graft-run"
    """The run folder to read when --init_from is resume."""
    checkpoint: Checkpoint = "best"
    """Which checkpoint of the run."""
    prompt: str | None = None
    """The text to continue; - reads standard input. Without it, the test split is classified."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Say the prompt in the model's chat template, and show the answer. auto: of a run that learned conversations."""
    data: str = ""
    """The data to classify when no prompt is given. Default: the run's, else rotten-tomatoes-pypi."""
    limit: int = 0
    """Classify so many examples only (a fixed, label-blind sample); 0 means all."""
    batch_size: int = 32
    """Prompts decoded together."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Number format of the weights and of the arithmetic."""
    max_new_tokens: int | None = None
    """Longest continuation in tokens. Default: 64 for a prompt; to classify 5, or the longest label's."""
    temperature: float = 0.0
    """Divides the logits before sampling; 0 always takes the likeliest token (greedy)."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the sampling."""
    num_samples: int = 1
    """Continuations of the prompt."""

    def __post_init__(self) -> None:
        require(self.temperature >= 0, "temperature", self.temperature, "0 or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        for flag in ("limit", "top_k", "seed"):
            require(getattr(self, flag) >= 0, flag, getattr(self, flag), "0 or more")
        for flag in ("batch_size", "num_samples"):
            require(getattr(self, flag) >= 1, flag, getattr(self, flag), "1 or more")
        require(
            self.max_new_tokens is None or self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more"
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(RayFlags):
    """Measure a model or a run on labelled text."""

    init_from: str = "resume"
    """"resume" for the run in --out_dir, or a model's name for its zero-shot accuracy."""
    out_dir: str = "graft-run"
    """The run folder to read when --init_from is resume."""
    checkpoint: Checkpoint = "best"
    """Which checkpoint of the run."""
    data: str = ""
    """The data to read. Default: the run's, else rotten-tomatoes-pypi."""
    val: str = ""
    """A file with the validation split, beside --data FILE."""
    test: str = ""
    """A file with the test split, beside --data FILE."""
    split: Literal["train", "validation", "test"] = "test"
    """The split to read."""
    shots: int = 0
    """Demonstrations before each text, out of the train split; no text that is asked about is ever one."""
    choose: DemoSelection = "fixed"
    """Which ones: fixed (by a hash of the text), random, balanced (over the labels), or for each text those nearest to
    it, by bm25 or by the base model's embedding."""
    seed: int = 0
    """Seed of the choice of demonstrations, where it is random or balanced."""
    calibrate: bool = False
    """Take out of the label scores what the prompt answers to a text without content (contextual calibration)."""
    limit: int = 0
    """Read so many examples only (a fixed, label-blind sample); 0 means all."""
    batch_size: int = 32
    """Examples computed together."""
    read: Literal["both", "score", "generate"] = "both"
    """How an answer is read: by the labels' scores, in the generated text, or both side by side."""
    predictions: str = ""
    """A jsonl file to write, one row an example."""
    template: str = ""
    """The prompt. Default: the run's, else sentiment."""
    labels: str = ""
    """The label words by label number. Default: the run's, else negative,positive."""
    text_field: str = "text"
    """The field of the data that holds the text."""
    label_field: str = "label"
    """The field of the data that holds the label."""
    max_length: int | None = None
    """Longest example in tokens; longer texts are cut inside the template. Default: the model's context."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Number format of the weights and of the arithmetic."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag in ("limit", "shots", "seed"):
            require(getattr(self, flag) >= 0, flag, getattr(self, flag), "0 or more")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.max_length is None or self.max_length > 0, "max_length", self.max_length, "greater than 0")
        if self.shots and self.split == "train":
            raise InputError("--shots: demonstrations come out of the train split; read another --split")
        if self.calibrate and self.read == "generate":
            raise InputError("--calibrate: changes label scores, and --read generate reads none; use both or score")


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Answer questions by prompting alone: few-shot, chain of thought, zero-shot chain of thought."""

    task: str = "electricity"
    """What to ask: electricity, arithmetic, rotten-tomatoes, imdb, or a .toml or .jsonl file (docs/prompting.md)."""
    style: Literal["all", "zero-shot", "few-shot", "few-shot-cot", "zero-shot-cot"] = "all"
    """How to ask; all: few-shot, few-shot-cot and zero-shot-cot."""
    init_from: str = "smollm2-135m"
    """A model's name, folder or .gguf file, or "resume" for the run in --out_dir."""
    out_dir: str = "graft-run"
    """The run folder to read when --init_from is resume."""
    checkpoint: Checkpoint = "best"
    """Which checkpoint of the run."""
    limit: int = 1
    """Questions to ask, from the first on; 0 means all. Three or fewer are shown with their answers."""
    shots: int = 8
    """Demonstrations before each question, in the few-shot styles."""
    choose: DemoSelection = "fixed"
    """Which ones: fixed (the task's first), random, balanced (over the answers), or for each question those nearest to
    it, by bm25 or by the model's embedding."""
    seed: int = 0
    """Seed of the choice of demonstrations, where it is random or balanced, and of sampled answers."""
    task_seed: int = 0
    """Order of the questions and demonstrations of electricity and arithmetic: 0 is the file's, others are shuffled."""
    seeds: int = 1
    """Do all of it with so many seeds, and report each."""
    orders: int = 1
    """Show the same demonstrations in so many orders, and report each."""
    samples: int = 1
    """Answers sampled for each question, of which the most frequent counts (self-consistency)."""
    temperature: float = 0.0
    """Divides the logits before sampling; 0 always takes the likeliest token (greedy)."""
    max_new_tokens: int | None = None
    """Longest answer in tokens. Default: 256 with reasoning, else 24."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Ask in the model's chat template. auto: where it has one, and for a run, which was trained on plain text, not."""
    calibrate: bool = False
    """Take out of the label scores what the prompt answers to a question without content (contextual calibration)."""
    show: bool = False
    """Print the exact prompts, and stop."""
    predictions: str = ""
    """A jsonl file to write, one row an answer."""
    batch_size: int = 32
    """Questions computed together."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Number format of the weights and of the arithmetic."""

    def __post_init__(self) -> None:
        for flag in ("limit", "shots", "seed", "task_seed", "temperature"):
            require(getattr(self, flag) >= 0, flag, getattr(self, flag), "0 or more")
        for flag in ("seeds", "orders", "samples", "batch_size"):
            require(getattr(self, flag) >= 1, flag, getattr(self, flag), "1 or more")
        require(
            self.max_new_tokens is None or self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "1 or more"
        )
        if self.shots == 0 and self.style.startswith("few-shot"):
            raise InputError(f"--shots 0: style {self.style} shows demonstrations; use zero-shot or zero-shot-cot")
        if self.samples > 1 and self.temperature == 0:
            raise InputError(f"--samples {self.samples}: all would be the same; give a --temperature, as in 0.7")


@dataclass(frozen=True, kw_only=True)
class PreferConfig:
    """Sample answers, judge them by a classifier or a command, and write pairs of a better and a worse one."""

    init_from: str = "resume"
    """The model that answers: "resume" for the run in --out_dir, or a model's name, folder or .gguf file."""
    out_dir: str = "graft-run"
    """The run folder to read when --init_from is resume."""
    checkpoint: Checkpoint = "best"
    """Which checkpoint of the run."""
    prompts: str
    """What to answer: a data name, folder or file with a field prompt, or with texts for --opening."""
    split: Literal["train", "validation", "test"] = "train"
    """The split to read, of data in several files; a single file is read whole."""
    opening: int = 0
    """Make prompts of the first so many words of the texts; 0: the data has prompts."""
    text_field: str = "text"
    """The field of the data that holds the text, for --opening."""
    limit: int = 0
    """Answer so many prompts only (a fixed sample); 0 means all. Equal prompts count once."""
    n: int = 2
    """Answers to each prompt."""
    max_new_tokens: int = 64
    """Longest answer in tokens; one that has not ended by then is cut, as its row will say."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of the sampling."""
    batch_size: int = 32
    """Prompts decoded, and answers judged, together."""
    judge: str = ""
    """The run folder of a classifier: the reward is its probability that prompt and answer have the label --want."""
    want: str = ""
    """The label to prefer, by word or number. Default: the judge's last, positive."""
    judge_command: str = ""
    """Instead of --judge a program (run once, without a shell): reads one {"prompt", "answer"} a line from its
    standard input and prints one number a line, higher is better."""
    margin: float = 0.0
    """Smallest difference of rewards that makes a pair; equal ones never do."""
    pairs: Literal["best", "all"] = "best"
    """Of each prompt's answers pair the best with the worst, or each with each."""
    out: str = "pairs.jsonl"
    """The jsonl file to write; it must not exist."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Number format of the weights and of the arithmetic."""

    def __post_init__(self) -> None:
        require(bool(self.prompts.strip()), "prompts", repr(self.prompts), "a data set's name, a folder or a file")
        if bool(self.judge) == bool(self.judge_command):
            both = "name one of the two" if self.judge else "name a classifier's run folder, or give --judge_command"
            raise InputError(f"--judge{' and --judge_command' if self.judge else ''}: {both}")
        if self.judge_command and self.want:
            raise InputError(
                f"--want {self.want}: a label of the classifier that --judge names; --judge_command has none"
            )
        require(self.n >= 2, "n", self.n, "2 or more, as a pair needs two answers")
        require(self.temperature > 0, "temperature", self.temperature, "above 0, or all answers would be equal")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        for flag in ("opening", "limit", "top_k", "seed", "margin"):
            require(getattr(self, flag) >= 0, flag, getattr(self, flag), "0 or more")
        for flag in ("max_new_tokens", "batch_size"):
            require(getattr(self, flag) >= 1, flag, getattr(self, flag), "1 or more")
        require(self.out.lower().endswith(".jsonl"), "out", repr(self.out), "a file's name that ends in .jsonl")
