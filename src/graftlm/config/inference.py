"""Flags of the subcommands that run a model: generate, evaluate, prompt and pairs."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from graftlm.config.flags import DataFlags, Flags, bounded, flag_group, parse_columns, require
from graftlm.config.paths import has_suffix
from graftlm.config.training import BaseFormat, Checkpoint, Device, Dtype
from graftlm.errors import InputError

Style = Literal["zero-shot", "few-shot", "few-shot-cot", "zero-shot-cot"]
DemoSelection = Literal["fixed", "random", "balanced", "bm25", "embedding"]
Mode = Literal["both", "score", "generate"]


@flag_group
class RunFlags(Flags):
    """Model."""

    init_from: str = "resume"
    """A run folder (or a checkpoint in it), a base model's name, folder or .gguf file, or "resume" for --out_dir."""
    out_dir: str = "graft-run"
    """The run folder to read, if --init_from does not name what to read."""
    checkpoint: Literal["best", "last", "base"] = "best"
    """Which checkpoint of the run; base: its base model, before training, with the run's template."""
    batch_size: int = bounded(32, ge=1)
    """Examples per batch."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Data type of weights and arithmetic."""
    base_format: BaseFormat = "auto"
    """How the base's weights are kept in memory: as in graft train. auto: a run's as it was trained, a base's as it is
    stored on a CPU in float32."""


@dataclass(frozen=True, kw_only=True)
class SamplingFlags(Flags):
    """Sampling."""

    temperature: float = bounded(0.0, ge=0)
    """Divides the logits before sampling; 0 is greedy decoding. Then top_k, top_p and min_p filter, in this order."""
    top_k: int = bounded(0, ge=0)
    """Sample from the k most likely tokens only; 0: from all."""
    top_p: float = bounded(1.0, gt=0, le=1)
    """Sample from the most likely tokens whose probabilities add up to this (nucleus sampling)."""
    min_p: float = bounded(0.0, ge=0, le=1)
    """Sample from tokens at least this many times as probable as the most likely one (min-p sampling); 0: from all."""
    repetition_penalty: float = bounded(1.0, gt=0)
    """Divides the positive logits of tokens that occur in the prompt or the answer so far, and multiplies their
    negative ones; above 1 it discourages repetition (Keskar et al. 2019)."""
    frequency_penalty: float = bounded(0.0, ge=-2, le=2)
    """Subtracted from a token's logit for each time that the answer so far has it."""
    presence_penalty: float = bounded(0.0, ge=-2, le=2)
    """Subtracted once from the logit of each token that the answer so far has."""
    logit_bias: str = ""
    """Added to the logits of tokens, by their ids, as in 198=-100,50=2.5; -100 excludes a token, 100 all others."""
    seed: int = bounded(0, ge=0)
    """Random seed of the sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_logit_bias(self.logit_bias)


def parse_logit_bias(text: str) -> dict[int, float]:
    """Bias by token id, from "ID=BIAS,ID=BIAS"."""
    pairs = [part.partition("=") for part in text.split(",") if text]
    try:
        biases = {int(token): float(bias) for token, _, bias in pairs}
    except ValueError:
        biases = {-1: 0.0}
    ok = len(biases) == len(pairs) and all(token >= 0 and abs(bias) <= 100 for token, bias in biases.items())
    require(ok, "logit_bias", text, "ID=BIAS,…, each token id once and biases from -100 to 100, as in 198=-100,50=2.5")
    return biases


@dataclass(frozen=True, kw_only=True)
class RayFlags(Flags):
    """Ray cluster."""

    ray: str = ""
    """Run on a Ray cluster: auto (the one this machine belongs to), HOST:PORT, or local, which starts one on this
    machine only (needs the extra: pip install 'graftlm[ray]')."""
    cpus_per_task: int = bounded(1, ge=1)
    """CPU cores, and threads, of a task; only with --ray."""
    gpus_per_task: float = 0.0
    """GPUs of a task: 0, a fraction such as 0.5, or a whole number; only with --ray."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.ray in ("", "auto", "local") or re.fullmatch(r"(\w[\w.-]*|\[[0-9a-f:]+\]):\d{1,5}", self.ray)
        require(bool(known), "ray", repr(self.ray), "auto, local, or HOST:PORT as in 127.0.0.1:6379")
        gpus = self.gpus_per_task
        require(0 <= gpus <= 1 or (gpus > 1 and gpus == int(gpus)), "gpus_per_task", gpus, "0 to 1 or whole")
        for flag in ("cpus_per_task", "gpus_per_task"):
            if not self.ray and getattr(self, flag) != getattr(RayFlags, flag):
                raise InputError(f"--{flag} only applies together with --ray; add it, or leave --{flag} out")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(RunFlags, SamplingFlags):
    """Continue a prompt; without --prompt, classify the test split by generation."""

    MAIN: ClassVar = (
        *("out_dir", "init_from", "prompt", "chat", "max_new_tokens", "temperature", "top_k"),
        *("top_p", "min_p", "repetition_penalty", "stop", "seed", "num_samples"),
    )

    prompt: str | None = None
    """The text to continue; - reads standard input. Default: none; the test split is classified."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Make the prompt a user's message in the model's chat template. auto: on if the model was tuned on it: a base that
    is tuned for chat, or a run on conversations."""
    data: str = ""
    """The data set to classify without --prompt. Default: the run's, else rotten-tomatoes-pypi."""
    limit: int = bounded(0, ge=0)
    """Classify only this many examples (a fixed sample, drawn without looking at labels); 0: all."""
    max_new_tokens: int | None = bounded(ge=1)
    """Maximum number of new tokens. Default: 64 for a prompt; to classify 5, or the longest label's."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation; they are not part of it. May be given several times."""
    num_samples: int = bounded(1, ge=1)
    """Number of continuations of the prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(all(self.stop), "stop", repr(""), "a text that is not empty")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(SamplingFlags):
    """Talk to a model, or to several runs, in the terminal."""

    runs: tuple[str, ...] = ()
    """Run folders; /adapter NAME changes between them and their base. Default: graft-run, unless --init_from says
    what to load."""
    init_from: str = ""
    """Instead of runs, a base model's name, folder or .gguf file, or a run folder."""
    checkpoint: Checkpoint = "best"
    """Which checkpoint of the runs."""
    system: str = ""
    """The system message, which /system changes."""
    max_new_tokens: int = bounded(512, ge=1)
    """Maximum number of new tokens of an answer."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer; they are not part of it. May be given several times."""
    device: Device = "auto"
    """Where to compute: auto, cpu, cuda, cuda:N or mps."""
    dtype: Dtype = "auto"
    """Data type of weights and arithmetic."""
    base_format: BaseFormat = "auto"
    """How the base's weights are kept in memory: as in graft train. auto: a run's as it was trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(all(self.stop), "stop", repr(""), "a text that is not empty")
        if self.runs and self.init_from:
            raise InputError(f"--init_from {self.init_from}: name runs or a model, not both: leave one of them out")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(RunFlags, DataFlags, RayFlags):
    """Measure the accuracy of a model or a run on labelled text, or its loss on documents."""

    MAIN: ClassVar = (
        *("out_dir", "init_from", "data", "columns", "template", "labels", "split"),
        *("mode", "limit", "shots", "demo_selection", "calibrate", "predictions"),
    )

    data: str = ""
    """The data set: as in graft train, but one file is read whole unless --split is given. Default: the run's, else
    rotten-tomatoes-pypi."""
    val_data: str = ""
    """A file to evaluate on, with --split validation; with --data, its validation split."""
    test_data: str = ""
    """A file to evaluate on; with --data, its test split."""
    template: str = ""
    """The prompt template: as in graft train. Default: the run's, else sentiment."""
    labels: str = ""
    """The label words, comma-separated, in the order of the label numbers. Default: the run's, else auto, as in graft
    train."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Make the prompt a user's message, and the label the assistant's answer, in the model's chat template. auto: as
    the run was trained by graft train --chat; off for any other model."""
    split: Literal["train", "validation", "test"] | None = None
    """The split to evaluate on. Default: test, or all of a single --data FILE."""
    mode: Mode = "both"
    """How the model answers: score (the most likely label word), generate (the label word in its generated text), or
    both."""
    limit: int = bounded(0, ge=0)
    """Evaluate on only this many examples or documents (a fixed sample, drawn without looking at labels); 0: all."""
    shots: int = bounded(0, ge=0)
    """Number of demonstrations before each text, from the train split; evaluated texts are never used."""
    demo_selection: DemoSelection = "fixed"
    """How demonstrations are chosen: fixed (by a hash of the text), random, balanced (over the labels), or for each
    text the most similar ones by bm25 or by the base model's embedding."""
    seed: int = bounded(0, ge=0)
    """Random seed of random and balanced --demo_selection."""
    calibrate: bool = False
    """Contextual calibration (Zhao et al. 2021): divide out the label bias measured on content-free inputs."""
    predictions: str = ""
    """A jsonl file for the predictions, one row per example. Default: the results of a run are kept in its folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shots and self.split == "train":
            raise InputError("--shots: demonstrations come from the train split; choose another --split")
        if self.demo_selection != "fixed" and not self.shots:
            raise InputError(f"--demo_selection {self.demo_selection}: chooses demonstrations; add --shots, as in 4")
        for flag, split in (("val_data", "validation"), ("test_data", "test")):
            file = getattr(self, flag)
            if file and not self.data and split != (self.split or "test"):
                raise InputError(f"--{flag} {file}: is read with --split {split} or together with --data; add one")
        if self.calibrate and self.mode == "generate":
            raise InputError("--calibrate: changes label scores, which --mode generate does not use; use both or score")


@dataclass(frozen=True, kw_only=True)
class PromptConfig(RunFlags, SamplingFlags):
    """Answer questions by prompting alone: few-shot, chain of thought, zero-shot chain of thought."""

    MAIN: ClassVar = (
        *("init_from", "out_dir", "task", "style", "shots", "limit"),
        *("num_permutations", "num_samples", "max_new_tokens", "temperature", "seed", "show_prompts"),
    )

    init_from: str = "smollm2-135m"
    """As in graft generate; with --out_dir alone, that run."""
    task: str = "electricity"
    """What to ask: electricity, arithmetic, rotten-tomatoes, imdb, or a .toml or .jsonl file (docs/prompting.md)."""
    style: Literal["all", "zero-shot", "few-shot", "few-shot-cot", "zero-shot-cot"] = "all"
    """How to ask; all: few-shot, few-shot-cot and zero-shot-cot."""
    limit: int = bounded(1, ge=0)
    """Number of questions, counted from the first; 0: all. Up to three are printed with their answers."""
    shots: int = bounded(8, ge=0)
    """Number of demonstrations before each question, in the few-shot styles."""
    demo_selection: DemoSelection = "fixed"
    """How demonstrations are chosen: fixed (the task's first), random, balanced (over the answers), or for each
    question the most similar ones by bm25 or by the model's embedding."""
    seed: int = bounded(0, ge=0)
    """Random seed of random and balanced --demo_selection and of sampled answers."""
    task_seed: int = bounded(0, ge=0)
    """Random seed that electricity and arithmetic generate their questions and demonstrations with."""
    seeds: int = bounded(1, ge=1)
    """Repeat everything with this many seeds, and report each."""
    num_permutations: int = bounded(1, ge=1)
    """Repeat with this many orders of the same demonstrations, and report each."""
    num_samples: int = bounded(1, ge=1)
    """Answers sampled per question, of which the most frequent counts (self-consistency)."""
    max_new_tokens: int | None = bounded(ge=1)
    """Maximum length of an answer in tokens. Default: 256 with reasoning, else 24."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Wrap the questions in the model's chat template. auto: as in graft generate."""
    calibrate: bool = False
    """Contextual calibration (Zhao et al. 2021): divide out the label bias measured on content-free inputs."""
    show_prompts: bool = False
    """Print the exact prompts, and stop."""
    predictions: str = ""
    """A jsonl file to write, one row per answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shots == 0 and self.style.startswith("few-shot"):
            raise InputError(f"--shots 0: style {self.style} shows demonstrations; use zero-shot or zero-shot-cot")
        if self.num_samples > 1 and self.temperature == 0:
            raise InputError(
                f"--num_samples {self.num_samples}: greedy answers are all equal; set --temperature, as in 0.7"
            )


@dataclass(frozen=True, kw_only=True)
class PairsConfig(RunFlags, SamplingFlags):
    """Make preference pairs: sample completions, score them with a reward, and write prompt, chosen and rejected."""

    MAIN: ClassVar = (
        *("prompts", "out_dir", "init_from", "prompt_words", "chat", "num_samples", "max_new_tokens", "temperature"),
        *("reward_model", "target_label", "reward_command", "pairing", "min_margin", "out"),
    )

    prompts: str
    """The prompts: a data name, folder or file with a field prompt, or with texts for --prompt_words."""
    split: Literal["train", "validation", "test"] = "train"
    """The split to read, of data in several files; a single file is read whole."""
    prompt_words: int = bounded(0, ge=0)
    """Use the first this many words of each text as the prompt; 0: the data has prompts."""
    columns: str = ""
    """Which columns of the data to read, as text=sentence (for --prompt_words) or prompt=question."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What to do with rows that cannot be read: stop with an error that counts them by reason, or skip them."""
    chat: Literal["auto", "on", "off"] = "auto"
    """Make the prompts a user's messages and the completions the assistant's, in the model's chat template. auto: as in
    graft generate; off with --prompt_words, which makes beginnings of texts."""
    limit: int = bounded(0, ge=0)
    """Use only this many prompts (a fixed sample); 0: all. Duplicates count once."""
    num_samples: int = 2
    """Completions sampled per prompt."""
    max_new_tokens: int = bounded(64, ge=1)
    """Maximum length of a completion in tokens; its row says whether it was finished by then."""
    temperature: float = bounded(1.0, ge=0)
    """Divides the logits before sampling."""
    reward_model: str = ""
    """The run folder of a classifier: the reward is its probability of --target_label for prompt and completion."""
    target_label: str = ""
    """The label to prefer, by word or number. Default: the reward model's last label, positive."""
    reward_command: str = ""
    """Instead of --reward_model, a program (run once, without a shell): it reads one {"prompt", "answer"} per line and
    prints one number per line, higher is better."""
    min_margin: float = bounded(0.0, ge=0)
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
        require(has_suffix(self.out, ".jsonl"), "out", repr(self.out), "a file's name that ends in .jsonl")
        parse_columns(self.columns)
