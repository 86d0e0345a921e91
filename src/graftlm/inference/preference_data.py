"""`graft pairs`: sample answers from a model, judge them, and write pairs of a better and a worse one.

    prompt -> n answers, sampled -> a reward each, by a classifier or a command -> prompt, chosen, rejected

What is unusual here:
- A pair reads as it was written by the model: the prompt ends without a space, and the space behind it belongs to the
  answer, as `text.data` has it; so training tokenises the prompt as sampling did. An answer's own tokens may still be
  others (a model can spell a word in two ways); how many are is counted.
- An answer that was cut at --max_new_tokens was not followed by an end-of-text token, and to learn one there would
  teach the model to stop in the middle of a sentence. So every row says of its two answers whether they ended by
  themselves ("finished"), and training puts the token behind those alone.
- Rewards that are equal, or nearer than --min_margin, make no pair, and neither do equal answers.
- Nothing is written before all is judged; the file is there whole or not at all.

Bradley and Terry (1952) is the model behind pairs; the use for language models here is that of Rafailov et al. (2023),
"Direct preference optimization", section 6.1, where a sentiment classifier does the judging.
"""

import itertools
import json
import math
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftlm.config import PairsConfig, parse_columns
from graftlm.errors import GraftError, InputError, unknown_name_error
from graftlm.exchange.load import load
from graftlm.files.atomic import write_text
from graftlm.inference.evaluate import label_probabilities
from graftlm.inference.generate import ProgressCallback, generate_ids
from graftlm.models import CausalLM
from graftlm.text.collate import subset
from graftlm.text.dataset import load_prompts
from graftlm.text.layouts import Document
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer

Judge = Callable[[Sequence[tuple[str, str]], ProgressCallback], list[float]]
"""(prompt, answer) pairs -> a reward each, higher is better; calls the progress with the number just judged."""

BROKEN = "\ufffd"
"""What a decoder writes for a part of a character."""


@dataclass(frozen=True, slots=True)
class SampledAnswer:
    """One sampled continuation of a prompt."""

    text: str
    """As the model wrote it, with the space it begins with."""
    finished: bool
    """Whether the model ended it; it was cut at `max_new_tokens` or the context's end otherwise."""
    roundtrips: bool
    """Whether training tokenises the text into the very tokens that were sampled."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to read in it."""
        return not self.text.strip()


# Sampling -------------------------------------------------------------------------------------------------------------


def sample_answers(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: ProgressCallback | None = None,
) -> list[list[SampledAnswer]]:
    """`n` answers to each prompt, in order. Answer k of prompt p is row n·p + k of `generate_ids`, so it depends on
    the seed, p and k alone, and on no batch; see there for the settings. Raises what `generate_ids` raises.
    """
    ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts for _ in range(n)]
    new = generate_ids(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        eot=tokenizer.eot,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    answers = [
        # Only the end-of-text token stops a row before its room is used up.
        _answer(tokenizer, tokens, ended=len(tokens) < min(max_new_tokens, model.max_seq_len - len(prompt)))
        for prompt, tokens in zip(ids, new, strict=True)
    ]
    return [answers[start : start + n] for start in range(0, len(answers), n)]


def _answer(tokenizer: Tokenizer, tokens: Sequence[int], ended: bool) -> SampledAnswer:
    text = tokenizer.decode(tokens)
    while not ended and tokens and text.endswith(BROKEN):  # cut within a character: what is there of it goes
        tokens = tokens[:-1]
        text = tokenizer.decode(tokens)
    return SampledAnswer(text, ended, tokenizer.encode(text) == list(tokens))


# Judging --------------------------------------------------------------------------------------------------------------


def classifier_reward(
    model: CausalLM, tokenizer: Tokenizer, template: Template, want: str = "", batch_size: int = 32
) -> Judge:
    """Judge by a model that was trained to name labels: the reward is the probability of one of them.

    The text that it reads is prompt and answer, joined; a text too long for it loses its end.
    want: the label, by its word or number; the last one by default. Raises InputError for an unknown one.
    """
    label = resolve_label(template, want)

    def reward(pairs: Sequence[tuple[str, str]], progress: ProgressCallback) -> list[float]:
        texts = [prompt + answer for prompt, answer in pairs]
        rows = label_probabilities(model, tokenizer, template, texts, batch_size=batch_size, progress=progress)
        return [row[label] for row in rows]

    return reward


def resolve_label(template: Template, want: str) -> int:
    """The number of the label that `--target_label` names by word or number; the last one when it is empty."""
    if not want:
        return len(template.labels) - 1
    number = template.label_number(want)
    if number is None and want.isdecimal() and int(want) < len(template.labels):
        number = int(want)
    if number is None:
        raise unknown_name_error("--target_label", want, template.labels)
    return number


def command_reward(line: str) -> Judge:
    """Judge by a program: one JSON object {"prompt", "answer"} a line goes in, one number a line comes out.

    It runs once, without a shell. Raises InputError at once for a program that is not there, and when it judges for an
    exit status other than 0, another number of lines, and a line that is no finite number.
    """
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise InputError(f"--reward_command {line}: {str(error).lower()}; quote it as a shell would want it") from None
    if not words or shutil.which(words[0]) is None:
        raise InputError(f"--reward_command {line}: no such program {(words or [''])[0]!r}; check the name or its path")

    def reward(pairs: Sequence[tuple[str, str]], progress: ProgressCallback) -> list[float]:
        lines = [json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs]
        try:
            done = subprocess.run(words, input="".join(lines).encode(), capture_output=True, check=False)
        except OSError as error:  # a file that may be executed, and is no program
            raise InputError(f"--reward_command {line}: cannot be run: {error.strerror}") from None
        rewards = _numbers(line, done, len(pairs))
        progress(len(pairs))
        return rewards

    return reward


def _numbers(line: str, done: "subprocess.CompletedProcess[bytes]", wanted: int) -> list[float]:
    """The numbers that a judging program has printed, one a line."""
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise InputError(f"--reward_command {line}: ended with status {done.returncode}{': ' * bool(said)}{said[:200]}")
    printed = done.stdout.decode(errors="replace").removesuffix("\n")
    lines = printed.split("\n") if printed else []
    if len(lines) != wanted:
        raise InputError(
            f"--reward_command {line}: printed {len(lines)} lines for {wanted} answers: one number a line is wanted"
        )
    rewards = []
    for number, text in enumerate(lines, start=1):
        try:
            reward = float(text)
        except ValueError:
            reward = math.nan
        if not math.isfinite(reward):
            raise InputError(f"--reward_command {line}: line {number} is {text.strip()[:60]!r}, not a finite number")
        rewards.append(reward)
    return rewards


# Pairs ----------------------------------------------------------------------------------------------------------------


@dataclass
class Pairs:
    """What came of all answers: the rows to write, and how many were refused for which reason."""

    rows: list[dict[str, Any]]
    """prompt, chosen, rejected, reward_chosen, reward_rejected, finished [of chosen, of rejected]."""
    ties: int = 0
    """Pairs of answers with the same reward, or rewards nearer than the margin."""
    duplicates: int = 0
    """Answers equal to an earlier one to the same prompt."""
    empty: int = 0
    """Answers with no text."""
    truncated: int = 0
    """Answers in the rows that did not end by themselves."""
    retokenized: int = 0
    """Answers in the rows that training tokenises otherwise than they were sampled."""


def make_pairs(
    prompts: Sequence[str],
    answers: Sequence[Sequence[SampledAnswer]],
    rewards: Sequence[Sequence[float]],
    *,
    margin: float = 0.0,
    pairs: Literal["best", "all"] = "best",
) -> Pairs:
    """Pairs of a better and a worse answer to the same prompt.

    margin: the smallest difference of rewards that counts; equal rewards never do.
    pairs: "best": the best answer against the worst (of equals the one sampled first); "all": each against each.
    """
    made = Pairs([])
    for prompt, own, values in zip(prompts, answers, rewards, strict=True):
        judged = sorted(_usable(own, values, made), key=lambda pair: -pair[1])
        both = [(judged[0], judged[-1])] if pairs == "best" and len(judged) > 1 else itertools.combinations(judged, 2)
        for (chosen, high), (rejected, low) in both:
            if high == low or high - low < margin:
                made.ties += 1
                continue
            made.truncated += (not chosen.finished) + (not rejected.finished)
            made.retokenized += (not chosen.roundtrips) + (not rejected.roundtrips)
            made.rows.append(
                {
                    "prompt": prompt,
                    "chosen": chosen.text,
                    "rejected": rejected.text,
                    "reward_chosen": high,
                    "reward_rejected": low,
                    "finished": [chosen.finished, rejected.finished],
                }
            )
    return made


def _usable(
    answers: Sequence[SampledAnswer], rewards: Sequence[float], made: Pairs
) -> Iterator[tuple[SampledAnswer, float]]:
    """The answers to one prompt that may stand in a pair, with their rewards; the others are counted in `made`."""
    seen: set[str] = set()
    for answer, reward in zip(answers, rewards, strict=True):
        if answer.empty:
            made.empty += 1
        elif answer.text in seen:
            made.duplicates += 1
        else:
            seen.add(answer.text)
            yield answer, reward


# The verb -------------------------------------------------------------------------------------------------------------


@contextmanager
def _unseen(what: str, total: int) -> Iterator[ProgressCallback]:
    yield lambda done: None


def make_preferences(
    config: PairsConfig,
    say: Callable[[str], object] = lambda line: None,
    progress: Callable[[str, int], AbstractContextManager[ProgressCallback]] = _unseen,
) -> dict[str, Any]:
    """Sample, judge, and write `config.out`; the verb's JSON object.

    say: called with each note. progress: makes a progress line of a name and a total.

    Raises InputError for wrong input, before anything is sampled where that can be known, and GraftError where no pair
    comes of it. Then nothing is written.
    """
    start = time.perf_counter()
    out = Path(config.out)
    if out.exists():
        raise InputError(f"--out {out}: exists already; name a new file")
    rows = _prompts(config, say)
    loaded = load(config.init_from, config.out_dir, config.checkpoint, config.device, config.dtype)
    judge = _judge(config)
    prompts = [row.text for row in rows]
    _check_room(rows, loaded.tokenizer, loaded.model.max_seq_len)
    with progress("sample", len(rows) * config.num_samples) as done:
        answers = sample_answers(
            loaded.model,
            loaded.tokenizer,
            prompts,
            n=config.num_samples,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
            batch_size=config.batch_size,
            progress=done,
        )
    rewards = _judged(judge, prompts, answers, progress)
    made = make_pairs(prompts, answers, rewards, margin=config.min_margin, pairs=config.pairing)
    if not made.rows:
        raise GraftError(
            f"no pairs came of {len(prompts) * config.num_samples} answers to {len(prompts)} prompts ({made.empty} "
            f"empty, {made.duplicates} equal to another, {made.ties} ties): raise --num_samples or --temperature, or "
            "lower --min_margin"
        )
    write_text(out, "".join(json.dumps(row) + "\n" for row in made.rows))
    counted = [value for values in rewards for value in values if not math.isnan(value)]
    return {
        "pairs": len(made.rows),
        "prompts": len(prompts),
        "answers": len(prompts) * config.num_samples,
        "ties": made.ties,
        "duplicates": made.duplicates,
        "empty": made.empty,
        "truncated": made.truncated,
        "retokenized": made.retokenized,
        "mean_reward": sum(counted) / len(counted),
        "seconds": time.perf_counter() - start,
        "out": str(out),
    }


def _prompts(config: PairsConfig, say: Callable[[str], object]) -> list[Document]:
    """The prompts to answer, each once, without space at their ends; at most --limit."""
    rows = load_prompts(config.prompts, config.split, config.prompt_words, parse_columns(config.columns))
    once: dict[str, Document] = {}
    for row in rows:
        once.setdefault(row.text, row)
    if len(once) < len(rows):
        say(f"{len(rows) - len(once)} of {len(rows)} prompts are equal to another and left out")
    return subset(list(once.values()), config.limit)


def _judge(config: PairsConfig) -> Judge:
    if config.reward_command:
        return command_reward(config.reward_command)
    judge = load("resume", config.reward_model, "best", config.device, config.dtype)
    assert judge.template is not None, "a run has a template"
    return classifier_reward(judge.model, judge.tokenizer, judge.template, config.target_label, config.batch_size)


def _check_room(rows: Sequence[Document], tokenizer: Tokenizer, room: int) -> None:
    encoded = tokenizer.encode_batch([row.text for row in rows], bos=True)
    for row, ids in zip(rows, encoded, strict=True):
        if len(ids) >= room:
            raise InputError(
                f"{row.source}: the prompt has {len(ids)} tokens, and the model reads at most {room} with the answer: "
                "shorten it"
            )


def _judged(
    judge: Judge,
    prompts: Sequence[str],
    answers: Sequence[Sequence[SampledAnswer]],
    progress: Callable[[str, int], AbstractContextManager[ProgressCallback]],
) -> list[list[float]]:
    """The reward of each answer; equal ones to a prompt are judged once, and those with no text are not (NaN)."""
    wanted = list(
        dict.fromkeys(
            (prompt, answer.text)
            for prompt, own in zip(prompts, answers, strict=True)
            for answer in own
            if not answer.empty
        )
    )
    with progress("judge", len(wanted)) as done:
        rewards = dict(zip(wanted, judge(wanted, done) if wanted else [], strict=True))
    return [
        [math.nan if answer.empty else rewards[prompt, answer.text] for answer in own]
        for prompt, own in zip(prompts, answers, strict=True)
    ]
