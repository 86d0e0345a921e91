"""How well a model names labels: by the labels' scores, in the text it generates, and both side by side.

What is unusual here:
- A label's score is the sum of its tokens' log-probabilities behind the prompt, for labels of any number of tokens.
  What the prompts begin with is run once for the whole call; the tokens that tails have in common once for each
  prompt; and the head runs only where a tail's token is predicted.
- Generated text that names no label is garbage (-1): it counts as wrong and is reported as a rate of its own.
- Rows are sorted by length for speed and come back in the data's order.

Letters: N examples, L labels, B rows of a batch, T tokens at hand, V tokens of the vocabulary.
"""

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from graftlm.errors import GraftError, InputError
from graftlm.exchange.device import exact
from graftlm.files.formats import write_text
from graftlm.inference.generate import Progress, evaluating, generate_ids, read_shared, right_pad
from graftlm.inference.statistics import GARBAGE, Reading, calibrated
from graftlm.models import CausalLM, Segment
from graftlm.text.data import Example, Row, encode_rows, label_ids
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer

Read = Literal["both", "score", "generate"]
Tokens = tuple[int, ...]
LabelIds = Sequence[Sequence[int]]

MOST_POSITIONS = 1024
"""Logits of so many positions are made at once; at V = 50,000 they take 200 MB."""

WINDOW = 10
"""A label is looked for in as many first characters as the longest label has, and this many more."""


# Scores ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """Sums of log-probabilities in natural units, in the order of the examples, on the CPU."""

    labels: Tensor
    """[N, L] float64: of each label's tokens."""
    completion: Tensor
    """[N] float64: of the example's own completion, with its end-of-text; of a conversation of all answers."""
    completion_tokens: Tensor
    """[N] int64: how many tokens that sum has; 0 where there is no completion."""


@dataclass(frozen=True)
class _Plan:
    """What to feed behind one prompt and what to read.

    `tails` are what is scored: the labels and last the completion. To score a tail, all of it but its last token is
    fed. `paths` are the distinct runs of tokens to feed, without those that another one begins with; there is always
    one, maybe empty. `owner[i]` is the path that feeds tail i.
    """

    prompt: Tokens
    tails: tuple[Tokens, ...]
    paths: tuple[Tokens, ...]
    owner: tuple[int, ...]
    scored: tuple[Sequence[int], ...]
    """Of each tail the places of the tokens to score."""

    @classmethod
    def make(cls, prompt: Tokens, tails: tuple[Tokens, ...], learned: Sequence[int] | None = None) -> "_Plan":
        """`learned`: the places of the last tail that are scored; None: all, as of the others."""
        runs = [tail[:-1] for tail in tails]
        paths: list[Tokens] = []
        for run in sorted(runs, key=len, reverse=True):
            if not any(path[: len(run)] == run for path in paths):
                paths.append(run)
        owner = tuple(next(i for i, path in enumerate(paths) if path[: len(run)] == run) for run in runs)
        scored = [range(len(tail)) for tail in tails[:-1]]
        return cls(prompt, tails, tuple(paths), owner, (*scored, range(len(tails[-1])) if learned is None else learned))

    def reads(self, path: int, start: int) -> Iterator[tuple[int, int, int]]:
        """(position, token, tail) of each token to score in pass `path`; `start` is where the path's tokens begin.

        The first token of every tail is predicted by the prompt's last token, which stands before the first path.
        """
        for tail, tokens in enumerate(self.tails):
            for i in self.scored[tail]:
                if (0 if i == 0 else self.owner[tail]) == path:
                    yield start + i - 1, tokens[i], tail


def score(
    model: CausalLM,
    examples: Sequence[Example],
    label_ids: LabelIds | None = None,
    *,
    batch_size: int = 32,
    shared: int | None = None,
    completions: bool = True,
    progress: Progress | None = None,
) -> Scores:
    """The log-probability of each label, and of each example's own completion, behind its prompt.

    label_ids: the tokens of each label (`text.data.label_ids`); None or empty where the data has no labels.
    shared: run so many first tokens, which all prompts have, once for the whole call; 0: none, None: as many as pay.
        It changes the scores by rounding only.
    completions: False leaves the completions out (their sums and counts are 0), for when only labels matter.

    Raises InputError for an example whose prompt and tail are longer than the context.
    """
    plans = _plans(examples, label_ids or (), completions)
    _check(plans, examples, model.room)
    sums = torch.zeros(len(plans), len(label_ids or ()) + 1, dtype=torch.float64)
    with evaluating(model):
        past, skip = read_shared(model, [plan.prompt for plan in plans], shared)
        for rows in _batches(plans, batch_size):
            batch = _score_batch(model, [plans[row] for row in rows], past, skip)
            sums[rows] = torch.tensor(batch, dtype=torch.float64)
            if progress is not None:
                progress(len(rows))
    counts = torch.tensor([len(plan.scored[-1]) for plan in plans], dtype=torch.int64)
    return Scores(sums[:, :-1], sums[:, -1], counts)


def _plans(examples: Sequence[Example], label_ids: LabelIds, completions: bool) -> list[_Plan]:
    labels = [tuple(ids) for ids in label_ids]
    return [
        _Plan.make(tuple(e.prompt_ids), (*labels, tuple(e.completion_ids)), e.learned)
        if completions
        else _Plan.make(tuple(e.prompt_ids), (*labels, ()))
        for e in examples
    ]


def scored_together(examples: Sequence[Example], label_ids: LabelIds, batch_size: int) -> list[list[int]]:
    """The rows of each batch in which `score` reads the labels. Any run of them, on its own, makes the same batches."""
    return list(_batches(_plans(examples, label_ids, False), batch_size))


def _check(plans: Sequence[_Plan], examples: Sequence[Example], context: int) -> None:
    for plan, example in zip(plans, examples, strict=True):
        assert plan.prompt, f"an empty prompt at {example.where}"
        # The last token of a tail is predicted, never fed.
        fed = len(plan.prompt) + len(plan.paths[0])
        if fed > context:
            raise InputError(
                f"{example.where or 'an example'}: prompt and answer have {fed + 1} tokens, the model reads at most "
                f"{context}: lower --max_length or shorten the text"
            )


def _batches(plans: Sequence[_Plan], batch_size: int) -> Iterator[list[int]]:
    """Rows of similar length together, at most `batch_size` of them, and at most MOST_POSITIONS predicted tokens.

    Padding never reaches beyond the context (where GPT-2 has no position to give), whichever rows meet: behind the
    first pass come only paths that are no longer than the longest label's, and every row has room for that.
    """
    batch: list[int] = []
    positions = 0
    for row in sorted(range(len(plans)), key=lambda row: len(plans[row].prompt) + len(plans[row].paths[0])):
        own = 1 + sum(len(path) for path in plans[row].paths)
        if batch and (len(batch) == batch_size or positions + own > MOST_POSITIONS):
            yield batch
            batch, positions = [], 0
        batch.append(row)
        positions += own
    if batch:
        yield batch


def _score_batch(model: CausalLM, plans: Sequence[_Plan], past: Sequence[Segment], skip: int) -> list[list[float]]:
    """The sum for each plan's tails. `past` holds the first `skip` tokens of every prompt.

    The first pass reads the prompt with its first path, so a single path (one label word and the completion that holds
    it) needs no further one. Each further path is read behind the prompts' keys and values, kept in a cache.
    """
    passes = max(len(plan.paths) for plan in plans)
    own = [plan.prompt[skip:] for plan in plans]
    fed = [[*prompt, *plan.paths[0]] for prompt, plan in zip(own, plans, strict=True)]
    sums = [[0.0] * len(plan.tails) for plan in plans]
    cache = None
    if passes > 1:
        cache = Segment.cache(model.shape, len(plans), max(map(len, fed)), model.device, model.dtype)
    for number in range(passes):
        if number == 1:
            assert cache is not None
            # Only the prompt counts from here on: the first path lies beyond these lengths and is not seen.
            cache.lengths = torch.tensor([len(prompt) for prompt in own], device=model.device)
            past = [*past, cache]
        if number:
            fed = [list(plan.paths[number]) if number < len(plan.paths) else [] for plan in plans]
        wanted = [
            (row, *read)
            for row, plan in enumerate(plans)
            for read in plan.reads(number, 0 if number else len(own[row]))
        ]
        if not wanted and number == passes - 1:
            break
        logps = _log_probs(model, fed, [w[:3] for w in wanted], past, cache if number == 0 else None)
        for (row, _, _, tail), logp in zip(wanted, logps, strict=True):
            sums[row][tail] += logp
    return sums


def _log_probs(
    model: CausalLM,
    fed: Sequence[Sequence[int]],
    wanted: Sequence[tuple[int, int, int]],
    past: Sequence[Segment],
    keep: Segment | None,
) -> list[float]:
    """The log-probability of `token` behind position `position` of row `row`, for each (row, position, token)."""
    ids, _ = right_pad(fed, model.device)
    slots: dict[int, int] = {}  # a position is read once, whichever tails want a token there
    where = [slots.setdefault(row * ids.shape[1] + position, len(slots)) for row, position, _ in wanted]
    at = torch.tensor(list(slots), dtype=torch.long, device=model.device)
    logits = model(ids, past=past, keep=keep, at=at)
    index = torch.tensor(where, dtype=torch.long, device=logits.device)
    tokens = torch.tensor([token for _, _, token in wanted], dtype=torch.long, device=logits.device)
    return (exact(logits[index, tokens]) - exact(logits.logsumexp(dim=-1)[index])).tolist()


# Labels ---------------------------------------------------------------------------------------------------------------


class Reader(Protocol):
    """What reads the examples for `evaluate`: a model of this process, or copies of it elsewhere."""

    def scores(
        self,
        examples: Sequence[Example],
        label_ids: LabelIds,
        batch_size: int,
        progress: Progress | None,
    ) -> Tensor:
        """The labels' scores [N, L], as `score` gives them."""

    def continuations(
        self, prompts: Sequence[Tokens], max_new_tokens: int, eot: int, batch_size: int, progress: Progress | None
    ) -> list[list[int]]:
        """The likeliest continuation of each prompt, as `generate_ids` gives it."""


@dataclass(frozen=True)
class Here:
    """A reader with a model of this process. `shared`: see `score`."""

    model: CausalLM
    shared: int | None = None

    def scores(
        self,
        examples: Sequence[Example],
        label_ids: LabelIds,
        batch_size: int,
        progress: Progress | None,
    ) -> Tensor:
        """See Reader."""
        found = score(
            self.model,
            examples,
            label_ids,
            batch_size=batch_size,
            shared=self.shared,
            completions=False,
            progress=progress,
        )
        return found.labels

    def continuations(
        self, prompts: Sequence[Tokens], max_new_tokens: int, eot: int, batch_size: int, progress: Progress | None
    ) -> list[list[int]]:
        """See Reader."""
        return generate_ids(
            self.model,
            prompts,
            max_new_tokens=max_new_tokens,
            eot=eot,
            batch_size=batch_size,
            shared=self.shared,
            progress=progress,
        )


def read_label(generated: str, labels: Sequence[str]) -> int:
    """The number of the label that a generated text names, -1 for none (garbage).

    Leading white space is dropped and letter case ignored. A label counts when it stands whole within as many first
    characters as the longest label has and ten more, and begins where a word begins ("unpositive" names nothing,
    "positively" does; a number must also end there: "10" is not 1). The one that begins first wins, and of two that
    begin at the same place the longer.
    """
    words = [label.strip().casefold() for label in labels]
    patterns = [
        (r"(?<!\w)" if word[0].isalnum() else "") + re.escape(word) + (r"(?!\d)" if word[-1].isdigit() else "")
        for word in words
    ]
    head = generated.lstrip().casefold()[: max(map(len, words)) + WINDOW]
    found = []
    for number, pattern in enumerate(patterns):
        match = re.search(pattern, head)
        if match:
            found.append((match.start(), match.start() - match.end(), number))  # the longer is the smaller
    return min(found)[2] if found else GARBAGE


def predict_labels(
    model: CausalLM,
    tokenizer: Tokenizer,
    texts: Sequence[str] | Sequence[Example],
    template: Template,
    *,
    read: Literal["score", "generate"] = "generate",
    batch_size: int = 32,
    max_new_tokens: int | None = None,
) -> list[int]:
    """The label number of each text: with the default labels 1 positive, 0 negative; -1 garbage (counts as wrong).

    texts: plain texts, which the template asks about, or examples that are already encoded.
    read: "generate" looks for a label in the text the model continues with; "score" takes the label whose tokens are
        likeliest, and never gives -1.
    """
    examples = _encoded(texts, template, tokenizer, model.room)
    if not examples:
        return []
    if read == "score":
        return _by_score(Here(model), tokenizer, template, examples, batch_size, None)[0]
    return _by_text(Here(model), tokenizer, template, examples, batch_size, max_new_tokens, None)[0]


def _encoded(
    texts: Sequence[str] | Sequence[Example], template: Template, tokenizer: Tokenizer, context: int
) -> list[Example]:
    plain = [Row(text, 0) for text in texts if isinstance(text, str)]  # no text has a label yet, so any will do
    examples = [text for text in texts if isinstance(text, Example)]
    assert not plain or not examples, "either texts or examples"
    return encode_rows(plain, template, tokenizer, context)[0] if plain else examples


def _by_score(
    reader: Reader,
    tokenizer: Tokenizer,
    template: Template,
    examples: Sequence[Example],
    batch_size: int,
    progress: Progress | None,
    content_free: Sequence[Sequence[Example]] = (),
) -> tuple[list[int], list[list[float]]]:
    """The likeliest labels [N], and the scores [N, L] they were read from: calibrated, where `content_free` says so."""
    ids = label_ids(template, tokenizer)
    asked = [*examples, *(example for group in content_free for example in group)]
    labels = reader.scores(asked, ids, batch_size, progress)
    if bool(labels.isnan().any()):
        raise GraftError("the labels' scores are NaN: the weights are broken, or overflow in this --dtype; try float32")
    scores, free = labels[: len(examples)], labels[len(examples) :]
    if content_free:
        groups = free.unflatten(0, (len(content_free), -1)).tolist()
        scores = torch.from_numpy(calibrated(scores.tolist(), groups))
    return scores.argmax(dim=1).tolist(), scores.tolist()


def label_probabilities(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: Template,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> list[list[float]]:
    """For each text the probability of each label, by label number: a softmax over the labels' scores alone.

    The template asks about the text, which loses its end where it is too long for the model. Raises GraftError where
    the scores are NaN.
    """
    examples = _encoded(texts, template, tokenizer, model.room)
    scores = _by_score(Here(model), tokenizer, template, examples, batch_size, progress)[1]
    return torch.tensor(scores, dtype=torch.float64).softmax(dim=-1).tolist() if scores else []


def answer_length(template: Template, tokenizer: Tokenizer) -> int:
    """How many tokens to generate where a label is looked for: 5, or as many as the longest label has."""
    return max(5, *(len(ids) for ids in label_ids(template, tokenizer)))


def _by_text(
    reader: Reader,
    tokenizer: Tokenizer,
    template: Template,
    examples: Sequence[Example],
    batch_size: int,
    max_new_tokens: int | None,
    progress: Progress | None,
) -> tuple[list[int], list[str]]:
    longest = max_new_tokens or answer_length(template, tokenizer)
    prompts = [example.prompt_ids for example in examples]
    new = reader.continuations(prompts, longest, tokenizer.eot, batch_size, progress)
    texts = [tokenizer.decode(ids) for ids in new]
    return [read_label(text, template.labels) for text in texts], texts


# Evaluation -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """One or both readings of the same examples, and a row for each example."""

    readings: dict[str, Reading]
    """By "score" and "generate", whichever were asked for."""
    rows: list[dict[str, Any]]
    """In the data's order: text, label, predicted, scores {label word: sum of its tokens' log-probabilities, or what
    calibration makes of it}, generated, read (which reading gave `predicted`), garbage (whether the generated text
    names no label). `scores` and `generated` are there where they were read."""

    @property
    def main(self) -> Reading:
        """The reading whose figures stand for the whole: by score, where that was asked for."""
        return self.readings.get("score") or self.readings["generate"]

    def to_json(self) -> dict[str, Any]:
        """The main reading's figures; with both, also each under its name."""
        both = {name: reading.to_json() for name, reading in self.readings.items()} if len(self.readings) > 1 else {}
        return {**self.main.to_json(), **both}


def evaluate(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: Template,
    examples: Sequence[Example],
    *,
    read: Read = "both",
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    content_free: Sequence[Sequence[Example]] = (),
    reader: Reader | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Accuracy and its kin on labelled examples.

    read: "score", "generate" or "both" side by side. max_new_tokens: of the generated answers; 5 by default, or as many
    as the longest label has. content_free: calibrate the label scores by what is answered to these inputs without
    content, one group for all examples or one for each (`statistics.calibrated`); generated text stays as it is.
    reader: who reads in the model's place (`studies.cluster`); the model itself by default.
    progress: called with the number of examples finished, once in each reading.

    Raises InputError when there is no example or one has no label, GraftError when the model's figures are NaN.
    """
    true, reader = _true_labels(examples), reader or Here(model)
    readings: dict[str, Reading] = {}
    scores: list[list[float]] = []
    texts: list[str] = []
    if read in ("both", "score"):
        start = time.perf_counter()
        predicted, scores = _by_score(reader, tokenizer, template, examples, batch_size, progress, content_free)
        seconds = time.perf_counter() - start
        readings["score"] = Reading.make("score", true, predicted, len(template.labels), seconds)
    if read in ("both", "generate"):
        start = time.perf_counter()
        predicted, texts = _by_text(reader, tokenizer, template, examples, batch_size, max_new_tokens, progress)
        seconds = time.perf_counter() - start
        readings["generate"] = Reading.make("generate", true, predicted, len(template.labels), seconds)
    evaluation = Evaluation(readings, [])
    for i, example in enumerate(examples):
        row: dict[str, Any] = {"text": example.text, "label": true[i], "predicted": evaluation.main.predicted[i]}
        if scores:
            row["scores"] = dict(zip(template.labels, scores[i], strict=True))
        if texts:
            row["generated"] = texts[i]
        row["read"] = evaluation.main.read
        row["garbage"] = bool(texts) and readings["generate"].predicted[i] == GARBAGE
        evaluation.rows.append(row)
    return evaluation


def _true_labels(examples: Sequence[Example]) -> list[int]:
    if not examples:
        raise InputError("no examples to evaluate: the split is empty")
    for example in examples:
        if example.label is None:
            raise InputError(f"{example.where or 'an example'}: no label; accuracy needs a label in every row")
    return [example.label for example in examples if example.label is not None]


def write_predictions(path: str | Path, evaluation: Evaluation) -> None:
    """Write `evaluation.rows` as jsonl, atomically. In ASCII: a reader that splits lines at U+0085 is right too."""
    write_text(Path(path), "".join(json.dumps(row) + "\n" for row in evaluation.rows))
