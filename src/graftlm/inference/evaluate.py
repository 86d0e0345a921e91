"""How well a model names labels: by the labels' scores, in the text it generates, and both side by side.

What is unusual here: generated text that names no label is garbage (-1), which counts as wrong and is reported as a
rate of its own. Whoever reads the examples, a model of this process (`Here`) or copies of it elsewhere, is a `Reader`.

Letters: N examples, L labels.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from graftlm.errors import GraftError, InputError
from graftlm.files.atomic import write_text
from graftlm.inference.generate import ProgressCallback, generate_ids
from graftlm.inference.metrics import GARBAGE, Metrics, calibrated
from graftlm.inference.scoring import LabelIds, Tokens, score
from graftlm.models import CausalLM
from graftlm.text.collate import Example, encode_rows, label_ids
from graftlm.text.layouts import Labelled
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer

Read = Literal["both", "score", "generate"]

WINDOW = 10
"""A label is looked for in as many first characters as the longest label has, and this many more."""


# Labels ---------------------------------------------------------------------------------------------------------------


class Predictor(Protocol):
    """What reads the examples for `evaluate`: a model of this process, or copies of it elsewhere."""

    def scores(
        self, examples: Sequence[Example], label_ids: LabelIds, batch_size: int, progress: ProgressCallback | None
    ) -> Tensor:
        """The labels' scores [N, L], as `score` gives them."""

    def continuations(
        self,
        prompts: Sequence[Tokens],
        max_new_tokens: int,
        eot: int,
        batch_size: int,
        progress: ProgressCallback | None,
    ) -> list[list[int]]:
        """The likeliest continuation of each prompt, as `generate_ids` gives it."""


@dataclass(frozen=True)
class LocalPredictor:
    """A reader with a model of this process. `shared`: see `score`."""

    model: CausalLM
    shared: int | None = None

    def scores(
        self, examples: Sequence[Example], label_ids: LabelIds, batch_size: int, progress: ProgressCallback | None
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
        self,
        prompts: Sequence[Tokens],
        max_new_tokens: int,
        eot: int,
        batch_size: int,
        progress: ProgressCallback | None,
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


def parse_label(generated: str, labels: Sequence[str]) -> int:
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
    mode: Literal["score", "generate"] = "generate",
    batch_size: int = 32,
    max_new_tokens: int | None = None,
) -> list[int]:
    """The label number of each text: with the default labels 1 positive, 0 negative; -1 garbage (counts as wrong).

    texts: plain texts, which the template asks about, or examples that are already encoded.
    read: "generate" looks for a label in the text the model continues with; "score" takes the label whose tokens are
        likeliest, and never gives -1.
    """
    examples = _encoded(texts, template, tokenizer, model.max_seq_len)
    if not examples:
        return []
    if mode == "score":
        return _predict_by_loglikelihood(LocalPredictor(model), tokenizer, template, examples, batch_size, None)[0]
    return _predict_by_generation(
        LocalPredictor(model), tokenizer, template, examples, batch_size, max_new_tokens, None
    )[0]


def _encoded(
    texts: Sequence[str] | Sequence[Example], template: Template, tokenizer: Tokenizer, context: int
) -> list[Example]:
    plain = [Labelled(text, 0) for text in texts if isinstance(text, str)]  # no text has a label yet, so any will do
    examples = [text for text in texts if isinstance(text, Example)]
    assert not plain or not examples, "either texts or examples"
    return encode_rows(plain, template, tokenizer, context)[0] if plain else examples


def _predict_by_loglikelihood(
    reader: Predictor,
    tokenizer: Tokenizer,
    template: Template,
    examples: Sequence[Example],
    batch_size: int,
    progress: ProgressCallback | None,
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
    progress: ProgressCallback | None = None,
) -> list[list[float]]:
    """For each text the probability of each label, by label number: a softmax over the labels' scores alone.

    The template asks about the text, which loses its end where it is too long for the model. Raises GraftError where
    the scores are NaN.
    """
    examples = _encoded(texts, template, tokenizer, model.max_seq_len)
    scores = _predict_by_loglikelihood(LocalPredictor(model), tokenizer, template, examples, batch_size, progress)[1]
    return torch.tensor(scores, dtype=torch.float64).softmax(dim=-1).tolist() if scores else []


def max_label_tokens(template: Template, tokenizer: Tokenizer) -> int:
    """How many tokens to generate where a label is looked for: 5, or as many as the longest label has."""
    return max(5, *(len(ids) for ids in label_ids(template, tokenizer)))


def _predict_by_generation(
    reader: Predictor,
    tokenizer: Tokenizer,
    template: Template,
    examples: Sequence[Example],
    batch_size: int,
    max_new_tokens: int | None,
    progress: ProgressCallback | None,
) -> tuple[list[int], list[str]]:
    longest = max_new_tokens or max_label_tokens(template, tokenizer)
    prompts = [example.prompt_ids for example in examples]
    new = reader.continuations(prompts, longest, tokenizer.eot, batch_size, progress)
    texts = [tokenizer.decode(ids) for ids in new]
    return [parse_label(text, template.labels) for text in texts], texts


# Evaluation -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """One or both readings of the same examples, and a row for each example."""

    readings: dict[str, Metrics]
    """By "score" and "generate", whichever were asked for."""
    rows: list[dict[str, Any]]
    """In the data's order: text, label, predicted, scores {label word: sum of its tokens' log-probabilities, or what
    calibration makes of it}, generated, read (which reading gave `predicted`), garbage (whether the generated text
    names no label). `scores` and `generated` are there where they were read."""

    @property
    def main(self) -> Metrics:
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
    mode: Read = "both",
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    content_free: Sequence[Sequence[Example]] = (),
    reader: Predictor | None = None,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Accuracy and its kin on labelled examples.

    read: "score", "generate" or "both" side by side. max_new_tokens: of the generated answers; 5 by default, or as many
    as the longest label has. content_free: calibrate the label scores by what is answered to these inputs without
    content, one group for all examples or one for each (`statistics.calibrated`); generated text stays as it is.
    reader: who reads in the model's place (`studies.cluster`); the model itself by default.
    progress: called with the number of examples finished, once in each reading.

    Raises InputError when there is no example or one has no label, GraftError when the model's figures are NaN.
    """
    true, reader = _true_labels(examples), reader or LocalPredictor(model)
    readings: dict[str, Metrics] = {}
    scores: list[list[float]] = []
    texts: list[str] = []
    if mode in ("both", "score"):
        start = time.perf_counter()
        predicted, scores = _predict_by_loglikelihood(
            reader, tokenizer, template, examples, batch_size, progress, content_free
        )
        seconds = time.perf_counter() - start
        readings["score"] = Metrics.make("score", true, predicted, len(template.labels), seconds)
    if mode in ("both", "generate"):
        start = time.perf_counter()
        predicted, texts = _predict_by_generation(
            reader, tokenizer, template, examples, batch_size, max_new_tokens, progress
        )
        seconds = time.perf_counter() - start
        readings["generate"] = Metrics.make("generate", true, predicted, len(template.labels), seconds)
    evaluation = Evaluation(readings, [])
    for i, example in enumerate(examples):
        row: dict[str, Any] = {"text": example.text, "label": true[i], "predicted": evaluation.main.predicted[i]}
        if scores:
            row["scores"] = dict(zip(template.labels, scores[i], strict=True))
        if texts:
            row["generated"] = texts[i]
        row["mode"] = evaluation.main.mode
        row["garbage"] = bool(texts) and readings["generate"].predicted[i] == GARBAGE
        evaluation.rows.append(row)
    return evaluation


def _true_labels(examples: Sequence[Example]) -> list[int]:
    if not examples:
        raise InputError("no examples to evaluate: the split is empty")
    for example in examples:
        if example.label is None:
            raise InputError(f"{example.source or 'an example'}: no label; accuracy needs a label in every row")
    return [example.label for example in examples if example.label is not None]


def write_predictions(path: str | Path, evaluation: Evaluation) -> None:
    """Write `evaluation.rows` as jsonl, atomically. In ASCII: a reader that splits lines at U+0085 is right too."""
    write_text(Path(path), "".join(json.dumps(row) + "\n" for row in evaluation.rows))
