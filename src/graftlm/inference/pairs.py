"""`graft pairs`: sample completions, score them with a reward, and write preference pairs.

    prompt -> n sampled completions -> a reward for each, by a classifier or a command -> prompt, chosen, rejected

- A pair is written as the model generated it: the prompt ends without a space, and the space after it belongs to the
  completion (`text/boundary.py`); so training tokenises the prompt as sampling did. A completion's own tokens may
  still differ (a model can spell a word in two ways); `retokenized` counts those.
- With --chat a prompt is a user's message and a completion the assistant's, and the row has lists of messages. A
  message ends its turn, so completions that did not finish by themselves make no pair there.
- A completion truncated at --max_new_tokens was not followed by end-of-text, and learning one there would teach the
  model to stop in the middle of a sentence. So every row records whether its two completions finished by themselves
  ("finished"), and training appends the token to those only.
- Rewards that are equal, or closer than --min_margin, make no pair, and neither do equal completions.
- The file is written at the end, completely or not at all.

Bradley and Terry (1952) is the model of preferences; Rafailov et al. (2023), "Direct preference optimization", section
6.1, use it with a sentiment classifier as the reward.
"""

import itertools
import json
import math
import shlex
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from graftlm.config import PairsConfig
from graftlm.config.flags import parse_columns
from graftlm.errors import GraftError, InputError, unknown_name_error
from graftlm.exchange.load import load
from graftlm.files.atomic import write_text
from graftlm.inference.evaluate import label_probabilities
from graftlm.inference.generate import Batching, ProgressCallback, generate_ids
from graftlm.inference.sampling import SamplingParams
from graftlm.models import CausalLM
from graftlm.text.boundary import split_prompt
from graftlm.text.chat import Chat
from graftlm.text.collate import subset
from graftlm.text.dataset import load_prompts
from graftlm.text.records import Document
from graftlm.text.rows import LabelWords
from graftlm.text.template import Template
from graftlm.text.tokenizer import BROKEN, Tokenizer

Reward = Callable[[Sequence[tuple[str, str]], ProgressCallback], list[float]]
"""(prompt, completion) pairs -> a reward each, higher is better; calls the progress with the number just scored."""
ProgressBar = Callable[[str, int], AbstractContextManager[ProgressCallback]]
"""A progress bar with a title and a total."""


@dataclass(frozen=True, slots=True)
class SampledCompletion:
    """One sampled continuation of a prompt."""

    text: str
    """As generated, with its leading space."""
    finished: bool
    """Whether the model ended it; else it was truncated at `max_new_tokens` or the end of the context."""
    roundtrips: bool
    """Whether training tokenises the text into exactly the tokens that were sampled."""


# Sampling -------------------------------------------------------------------------------------------------------------


def sample_completions(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    n: int,
    params: SamplingParams,
    batching: Batching | None = None,
    chat: Chat | None = None,
) -> list[list[SampledCompletion]]:
    """`n` completions of each prompt, in order.

    prompts: as `split_prompt` leaves them; with `chat` each is a user's message in that template.

    Completion k of prompt p is row n·p + k of `generate_ids`, so it depends on the seed, p and k only, not on the
    batch. Raises what `generate_ids` raises.
    """
    repeated = [prompt for prompt in prompts for _ in range(n)]
    ids = [own for own in _prompt_ids(prompts, tokenizer, chat) for _ in range(n)]
    stop_token_ids = (chat or tokenizer).stop_tokens
    new = generate_ids(model, ids, replace(params, stop_token_ids=stop_token_ids), batching=batching)
    completions = []
    for text, prompt, tokens in zip(repeated, ids, new, strict=True):
        limit = min(params.limit, model.max_seq_len - len(prompt))
        completions.append(_completion(tokenizer, (text, prompt), tokens, limit, chat))
    return [completions[start : start + n] for start in range(0, len(completions), n)]


def _prompt_ids(prompts: Sequence[str], tokenizer: Tokenizer, chat: Chat | None) -> list[list[int]]:
    return [chat.encode([("user", text)]) for text in prompts] if chat else tokenizer.encode_prompts(prompts)


def _completion(
    tokenizer: Tokenizer,
    prompt: tuple[str, Sequence[int]],
    tokens: Sequence[int],
    limit: int,
    chat: Chat | None = None,
) -> SampledCompletion:
    finished = len(tokens) < limit  # only a token that ends texts ends a row earlier
    text = tokenizer.decode(tokens, prompt[1])
    while not finished and tokens and text.endswith(BROKEN):  # truncated within a character: drop its bytes
        tokens = tokens[:-1]
        text = tokenizer.decode(tokens, prompt[1])
    if chat and text:  # what the template writes after the answer is not sampled
        trained = chat.answered([("user", prompt[0])], [("assistant", text)])[1][: len(prompt[1]) + len(tokens)]
    else:
        trained = tokenizer.encode_prompt(prompt[0] + text)
    return SampledCompletion(text, finished, trained == [*prompt[1], *tokens])


# Rewards --------------------------------------------------------------------------------------------------------------


def classifier_reward(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: Template,
    target_label: str = "",
    batch_size: int = 32,
    joint: str = "",
) -> Reward:
    """A classifier's probability of a label for prompt and completion, joined; a text too long for it is truncated.

    target_label: by its word or number; the last one by default. joint: what is between the two. Raises InputError
    for an unknown label.
    """
    label = resolve_label(template, target_label)

    def reward(pairs: Sequence[tuple[str, str]], progress: ProgressCallback) -> list[float]:
        texts = [f"{prompt}{joint}{completion}" for prompt, completion in pairs]
        rows = label_probabilities(model, tokenizer, template, texts, Batching(batch_size, progress=progress))
        return [row[label] for row in rows]

    return reward


def resolve_label(template: Template, target_label: str) -> int:
    """The number of the label that `--target_label` names by word or number; the last one if it is empty."""
    if not target_label:
        return len(template.labels) - 1
    number = LabelWords(template.labels).number(target_label)
    if number is None:
        raise unknown_name_error("--target_label", target_label, template.labels)
    return number


def command_reward(line: str) -> Reward:
    """A program that reads one JSON object {"prompt", "answer"} per line and prints one number per line.

    It runs once, without a shell. Raises InputError at once for a missing program, and when it is run for an exit
    status other than 0, a wrong number of lines, and a line that is not a finite number.
    """
    try:
        argv = shlex.split(line)
    except ValueError as error:
        raise InputError(f"--reward_command {line}: {str(error).lower()}; quote it as for a shell") from None
    if not argv or shutil.which(argv[0]) is None:
        raise InputError(f"--reward_command {line}: no such program {(argv or [''])[0]!r}; check the name or its path")

    def reward(pairs: Sequence[tuple[str, str]], progress: ProgressCallback) -> list[float]:
        lines = [json.dumps({"prompt": prompt, "answer": completion}) + "\n" for prompt, completion in pairs]
        try:
            process = subprocess.run(argv, input="".join(lines).encode(), capture_output=True, check=False)
        except OSError as error:  # an executable file that is not a program
            raise InputError(f"--reward_command {line}: cannot be run: {error.strerror}") from None
        if process.returncode != 0:
            message = process.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            ended = f"ended with status {process.returncode}{': ' * bool(message)}{message[:200]}"
            raise InputError(f"--reward_command {line}: {ended}")
        rewards = _parse_numbers(line, process.stdout.decode(errors="replace"), len(pairs))
        progress(len(pairs))
        return rewards

    return reward


def _parse_numbers(command: str, printed: str, expected: int) -> list[float]:
    """The numbers that a reward command has printed, one per line."""
    printed = printed.removesuffix("\n")
    lines = printed.split("\n") if printed else []
    if len(lines) != expected:
        raise InputError(
            f"--reward_command {command}: printed {len(lines)} lines for {expected} answers: print one number per line"
        )
    rewards = []
    for number, text in enumerate(lines, start=1):
        try:
            reward = float(text)
        except ValueError:
            reward = math.nan
        if not math.isfinite(reward):
            raise InputError(f"--reward_command {command}: line {number} is {text.strip()[:60]!r}, not a finite number")
        rewards.append(reward)
    return rewards


# Pairs ----------------------------------------------------------------------------------------------------------------


COUNTS = ("ties", "duplicates", "empty", "truncated", "retokenized")
"""What is counted: pairs with equal rewards, or closer than the margin; completions equal to an earlier one of the same
prompt; those without text; and of the completions in the rows those that did not finish by themselves, and those that
training tokenises differently than they were sampled."""


def make_pairs(
    prompts: Sequence[str],
    completions: Sequence[Sequence[SampledCompletion]],
    rewards: Sequence[Sequence[float]],
    *,
    min_margin: float = 0.0,
    pairing: Literal["best", "all"] = "best",
    in_chat: bool = False,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Pairs of a better and a worse completion of the same prompt, as rows of the file, and the COUNTS.

    min_margin: the minimum difference of rewards; equal rewards never make a pair.
    pairing: "best": the best completion with the worst (of ties the one sampled first); "all": all with each other.
    in_chat: whether rows have lists of messages.
    """
    rows: list[dict[str, Any]] = []
    counts = Counter(dict.fromkeys(COUNTS, 0))
    for prompt, own, values in zip(prompts, completions, rewards, strict=True):
        usable: dict[str, tuple[SampledCompletion, float]] = {}
        for completion, reward in zip(own, values, strict=True):
            if not completion.text.strip():
                counts["empty"] += 1
            elif usable.setdefault(completion.text, (completion, reward))[0] is not completion:
                counts["duplicates"] += 1
        ranked = sorted(usable.values(), key=lambda scored: -scored[1])
        best = pairing == "best" and len(ranked) > 1
        for (chosen, high), (rejected, low) in [(ranked[0], ranked[-1])] if best else itertools.combinations(ranked, 2):
            if high == low or high - low < min_margin:
                counts["ties"] += 1
                continue
            counts["truncated"] += (not chosen.finished) + (not rejected.finished)
            counts["retokenized"] += (not chosen.roundtrips) + (not rejected.roundtrips)
            said = {
                "prompt": ("user", prompt),
                "chosen": ("assistant", chosen.text),
                "rejected": ("assistant", rejected.text),
            }
            row: dict[str, Any] = {
                key: [{"role": role, "content": text}] if in_chat else text for key, (role, text) in said.items()
            }
            row |= {"reward_chosen": high, "reward_rejected": low, "finished": [chosen.finished, rejected.finished]}
            rows.append(row)
    return rows, counts


# The subcommand -------------------------------------------------------------------------------------------------------


@contextmanager
def _no_progress(title: str, total: int) -> Iterator[ProgressCallback]:
    yield lambda done: None


def make_preferences(
    config: PairsConfig, note: Callable[[str], object] = lambda line: None, progress: ProgressBar = _no_progress
) -> dict[str, Any]:
    """Sample, score, and write `config.out`; returns the JSON object of `graft pairs`.

    note: called with each note to the user.

    Raises InputError for wrong input, before sampling where possible, and GraftError if there are no pairs. Then
    nothing is written.
    """
    start = time.perf_counter()
    out = Path(config.out)
    if out.exists():
        raise InputError(f"--out {out}: exists already; name a new file")
    documents = _prompts(config, note)
    loaded = load(config.init_from, config.out_dir, config.checkpoint, config.device, config.dtype, config.base_format)
    chat = None if config.chat == "auto" and config.prompt_words else loaded.chat(config.chat)
    if chat:
        note(f"prompts are messages in the model's chat template (--chat {config.chat}); --chat off continues them")
    reward = _reward(config, chat)
    texts = [document.text for document in documents]
    prompts = texts if chat else [split_prompt(text, loaded.tokenizer)[0] for text in texts]
    total = len(prompts) * config.num_samples
    _check_length(documents, _prompt_ids(texts, loaded.tokenizer, chat), loaded.model.max_seq_len)
    params = SamplingParams.from_flags(config)
    with progress("sample", total) as done:
        batching = Batching(config.batch_size, progress=done)
        completions = sample_completions(
            loaded.model, loaded.tokenizer, prompts, config.num_samples, params, batching, chat
        )
    if chat:
        completions = [[one for one in own if one.finished] for own in completions]
    unfinished = total - sum(map(len, completions))
    rewards = _score(reward, prompts, completions, progress)
    rows, counts = make_pairs(
        prompts,
        completions,
        rewards,
        min_margin=config.min_margin,
        pairing=config.pairing,
        in_chat=chat is not None,
    )
    if not rows:
        not_finished = f"{unfinished} not finished, " if chat else ""
        raise GraftError(
            f"{total} answers to {len(prompts)} prompts gave no pairs ({not_finished}{counts['empty']} empty, "
            f"{counts['duplicates']} equal to another, {counts['ties']} ties): raise --num_samples or --temperature"
            f"{', or --max_new_tokens' if unfinished else ''}, or lower --min_margin"
        )
    write_text(out, "".join(json.dumps(row) + "\n" for row in rows))
    scored = [value for values in rewards for value in values if not math.isnan(value)]
    return {
        "pairs": len(rows),
        "prompts": len(prompts),
        "answers": total,
        **counts,
        "unfinished": unfinished,
        "chat": chat is not None,
        "mean_reward": sum(scored) / len(scored),
        "seconds": time.perf_counter() - start,
        "out": str(out),
    }


def _prompts(config: PairsConfig, note: Callable[[str], object]) -> list[Document]:
    """The distinct prompts, without regard to spaces at their ends; at most --limit."""
    rows, notes = load_prompts(
        config.prompts, config.split, config.prompt_words, parse_columns(config.columns), config.bad_rows
    )
    for line in notes:
        note(line)
    unique: dict[str, Document] = {}
    for row in rows:
        unique.setdefault(row.text.rstrip(" "), row)
    if len(unique) < len(rows):
        note(f"{len(rows) - len(unique)} of {len(rows)} prompts are equal to another and left out")
    return subset(list(unique.values()), config.limit)


def _reward(config: PairsConfig, chat: Chat | None) -> Reward:
    if config.reward_command:
        return command_reward(config.reward_command)
    run = load("resume", config.reward_model, "best", config.device, config.dtype)
    assert run.template is not None, "a run has a template"
    label, joint = config.target_label, "\n" if chat else ""
    return classifier_reward(run.model, run.tokenizer, run.template, label, config.batch_size, joint)


def _check_length(rows: Sequence[Document], encoded: Sequence[Sequence[int]], max_seq_len: int) -> None:
    for row, ids in zip(rows, encoded, strict=True):
        if len(ids) >= max_seq_len:
            raise InputError(
                f"{row.source}: the prompt has {len(ids)} tokens, and the model reads at most {max_seq_len} with the "
                "answer: shorten it"
            )


def _score(
    reward: Reward, prompts: Sequence[str], completions: Sequence[Sequence[SampledCompletion]], progress: ProgressBar
) -> list[list[float]]:
    """The reward of each completion; duplicates are scored once, and those without text not at all (NaN)."""
    keyed = [[(prompt, one.text) for one in own] for prompt, own in zip(prompts, completions, strict=True)]
    unique = list(dict.fromkeys(key for keys in keyed for key in keys if key[1].strip()))
    with progress("score", len(unique)) as done:
        rewards = dict(zip(unique, reward(unique, done) if unique else [], strict=True))
    return [[rewards.get(key, math.nan) for key in keys] for keys in keyed]
