"""Flags of the subcommands that run a model: generate, evaluate, prompt and pairs."""

from dataclasses import dataclass
from typing import Literal

from graftlm.config.common import (
    DataFlags,
    DemoSelection,
    Mode,
    RayFlags,
    RunFlags,
    SamplingFlags,
    parse_columns,
    require,
)
from graftlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(RunFlags, SamplingFlags):
    """Continue a prompt; without --prompt, classify the test split by generation."""

    prompt: str | None = None
    """The text to continue; - reads standard input. Default: none; the test split is classified."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Wrap the prompt in the model's chat template. auto: on if the run was trained on chat data."""
    data: str = ""
    """The data set to classify without --prompt. Default: the run's, else rotten-tomatoes-pypi."""
    limit: int = 0
    """Classify only this many examples (a fixed sample, drawn without looking at labels); 0: all."""
    max_new_tokens: int | None = None
    """Maximum number of new tokens. Default: 64 for a prompt; to classify 5, or the longest label's."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation; they are not part of it. May be given several times."""
    num_samples: int = 1
    """Number of continuations of the prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "limit")
        self.require_at_least(1, "num_samples", "max_new_tokens")
        require(all(self.stop), "stop", repr(""), "a text that is not empty")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(RunFlags, DataFlags, RayFlags):
    """Measure the accuracy of a model or a run on labelled text."""

    data: str = ""
    """The data set: as in graft train. Default: the run's, else rotten-tomatoes-pypi."""
    template: str = ""
    """The prompt template: as in graft train. Default: the run's, else sentiment."""
    labels: str = ""
    """The label words, comma-separated, in the order of the label numbers. Default: the run's, else
    negative,positive."""
    split: Literal["train", "validation", "test"] = "test"
    """The split to evaluate on."""
    mode: Mode = "both"
    """How the model answers: score (the most likely label word), generate (the label word in its generated text), or
    both."""
    limit: int = 0
    """Evaluate on only this many examples (a fixed sample, drawn without looking at labels); 0: all."""
    shots: int = 0
    """Number of demonstrations before each text, from the train split; evaluated texts are never used."""
    demo_selection: DemoSelection = "fixed"
    """How demonstrations are chosen: fixed (by a hash of the text), random, balanced (over the labels), or for each
    text the most similar ones by bm25 or by the base model's embedding."""
    seed: int = 0
    """Random seed of random and balanced --demo_selection."""
    calibrate: bool = False
    """Contextual calibration (Zhao et al. 2021): divide out the label bias measured on content-free inputs."""
    predictions: str = ""
    """A jsonl file to write, one row per example."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "limit", "shots", "seed")
        if self.shots and self.split == "train":
            raise InputError("--shots: demonstrations come from the train split; choose another --split")
        if self.calibrate and self.mode == "generate":
            raise InputError("--calibrate: changes label scores, which --mode generate does not use; use both or score")


@dataclass(frozen=True, kw_only=True)
class PromptConfig(RunFlags, SamplingFlags):
    """Answer questions by prompting alone: few-shot, chain of thought, zero-shot chain of thought."""

    init_from: str = "smollm2-135m"
    """A model's name, folder or .gguf file, or "resume" for the run in --out_dir."""
    task: str = "electricity"
    """What to ask: electricity, arithmetic, rotten-tomatoes, imdb, or a .toml or .jsonl file (docs/prompting.md)."""
    style: Literal["all", "zero-shot", "few-shot", "few-shot-cot", "zero-shot-cot"] = "all"
    """How to ask; all: few-shot, few-shot-cot and zero-shot-cot."""
    limit: int = 1
    """Number of questions, counted from the first; 0: all. Up to three are printed with their answers."""
    shots: int = 8
    """Number of demonstrations before each question, in the few-shot styles."""
    demo_selection: DemoSelection = "fixed"
    """How demonstrations are chosen: fixed (the task's first), random, balanced (over the answers), or for each
    question the most similar ones by bm25 or by the model's embedding."""
    seed: int = 0
    """Random seed of random and balanced --demo_selection and of sampled answers."""
    task_seed: int = 0
    """Random seed that electricity and arithmetic generate their questions and demonstrations with."""
    seeds: int = 1
    """Repeat everything with this many seeds, and report each."""
    num_permutations: int = 1
    """Repeat with this many orders of the same demonstrations, and report each."""
    num_samples: int = 1
    """Answers sampled per question, of which the most frequent counts (self-consistency)."""
    max_new_tokens: int | None = None
    """Maximum length of an answer in tokens. Default: 256 with reasoning, else 24."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Wrap the questions in the model's chat template. auto: on if it has one and --init_from is not a run."""
    calibrate: bool = False
    """Contextual calibration (Zhao et al. 2021): divide out the label bias measured on content-free inputs."""
    show_prompts: bool = False
    """Print the exact prompts, and stop."""
    predictions: str = ""
    """A jsonl file to write, one row per answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(0, "limit", "shots", "task_seed")
        self.require_at_least(1, "seeds", "num_permutations", "num_samples", "max_new_tokens")
        if self.shots == 0 and self.style.startswith("few-shot"):
            raise InputError(f"--shots 0: style {self.style} shows demonstrations; use zero-shot or zero-shot-cot")
        if self.num_samples > 1 and self.temperature == 0:
            raise InputError(
                f"--num_samples {self.num_samples}: greedy answers are all equal; set --temperature, as in 0.7"
            )


@dataclass(frozen=True, kw_only=True)
class PairsConfig(RunFlags, SamplingFlags):
    """Make preference pairs: sample completions, score them with a reward, and write prompt, chosen and rejected."""

    prompts: str
    """The prompts: a data name, folder or file with a field prompt, or with texts for --prompt_words."""
    split: Literal["train", "validation", "test"] = "train"
    """The split to read, of data in several files; a single file is read whole."""
    prompt_words: int = 0
    """Use the first this many words of each text as the prompt; 0: the data has prompts."""
    columns: str = ""
    """Which columns of the data to read, as text=sentence (for --prompt_words) or prompt=question."""
    limit: int = 0
    """Use only this many prompts (a fixed sample); 0: all. Duplicates count once."""
    num_samples: int = 2
    """Completions sampled per prompt."""
    max_new_tokens: int = 64
    """Maximum length of a completion in tokens; its row says whether it was finished by then."""
    temperature: float = 1.0
    """Divides the logits before sampling."""
    reward_model: str = ""
    """The run folder of a classifier: the reward is its probability of --target_label for prompt and completion."""
    target_label: str = ""
    """The label to prefer, by word or number. Default: the reward model's last label, positive."""
    reward_command: str = ""
    """Instead of --reward_model, a program (run once, without a shell): it reads one {"prompt", "answer"} per line and
    prints one number per line, higher is better."""
    min_margin: float = 0.0
    """Minimum difference of the rewards of a pair; equal rewards never make one."""
    pairing: Literal["best", "all"] = "best"
    """Which completions of a prompt are paired: the best with the worst, or all with each other."""
    out: str = "pairs.jsonl"
    """The jsonl file to write; it must not exist."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.prompts.strip()), "prompts", repr(self.prompts), "a data set's name, a folder or a file")
        if self.reward_model and self.reward_command:
            raise InputError("--reward_model and --reward_command: name one of the two")
        if not self.reward_model and not self.reward_command:
            raise InputError("--reward_model: name a classifier's run folder, or give --reward_command")
        if self.reward_command and self.target_label:
            raise InputError(
                f"--target_label {self.target_label}: a label of --reward_model; --reward_command has no labels"
            )
        require(self.num_samples >= 2, "num_samples", self.num_samples, "2 or more, as a pair needs two answers")
        require(self.temperature > 0, "temperature", self.temperature, "above 0, or all answers would be equal")
        self.require_at_least(0, "prompt_words", "limit", "min_margin")
        self.require_at_least(1, "max_new_tokens")
        require(self.out.lower().endswith(".jsonl"), "out", repr(self.out), "a file's name that ends in .jsonl")
        parse_columns(self.columns)
