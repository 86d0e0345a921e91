"""Classification accuracy of a model: by the labels' log-probabilities, by the text it generates, or by both.

Generated text that names no label is garbage (-1); it counts as wrong and is also counted alone. The work is done by a
`Predictor`: a model of this process, or copies of it on a cluster (`studies/ray_cluster.py`).

Letters: N examples, L labels.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch

from graftlm.config.inference import Mode
from graftlm.config.keywords import listed
from graftlm.config.values import short
from graftlm.errors import GraftError, InputError
from graftlm.inference.decoder import shared_prefix_length
from graftlm.inference.generate import Batching, ProgressCallback, decode_groups, generate_ids
from graftlm.inference.metrics import GARBAGE, MetricFunctions, Metrics, apply_metrics, calibrated
from graftlm.inference.sampling import SamplingParams
from graftlm.inference.scoring import LabelIds, score_batches, score_labels
from graftlm.models import CausalLM
from graftlm.text.boundary import Tokens, label_ids
from graftlm.text.collate import Example, encode_rows
from graftlm.text.records import Labelled
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer
from graftlm.text.words import normalize, word_pattern

WINDOW = 10
"""A label is searched for in this many more characters than the longest label has."""


# Predictors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelScoring:
    """Score every label for every example: [N][L], as `score_labels`."""

    examples: Sequence[Example]
    label_ids: LabelIds
    batch_size: int

    def select(self, rows: Sequence[int]) -> "LabelScoring":
        """The same work for these examples only."""
        return replace(self, examples=[self.examples[row] for row in rows])

    def shared(self) -> int:
        """The length of the prefix to compute once."""
        return shared_prefix_length([example.prompt_ids for example in self.examples])

    def batches(self) -> list[list[int]]:
        """The examples that are computed together; any run of batches forms the same batches again."""
        return score_batches(self.examples, self.label_ids, self.batch_size, self.shared())

    def run(self, model: CausalLM, shared: int | None, progress: ProgressCallback | None) -> list[list[float]]:
        """The scores. shared: see `prefill_shared_prefix`."""
        batching = Batching(self.batch_size, shared, progress)
        return score_labels(model, self.examples, self.label_ids, batching).tolist()


@dataclass(frozen=True)
class Generation:
    """Continue every prompt: its new tokens, as `generate_ids`."""

    prompts: Sequence[Tokens]
    params: SamplingParams
    batch_size: int

    def select(self, rows: Sequence[int]) -> "Generation":
        """See LabelScoring. Greedy only, as a sample depends on the row's index."""
        assert self.params.temperature == 0
        return replace(self, prompts=[self.prompts[row] for row in rows])

    def shared(self) -> int:
        """See LabelScoring."""
        return shared_prefix_length(self.prompts)

    def batches(self) -> list[list[int]]:
        """See LabelScoring."""
        shared = self.shared()
        return list(decode_groups([len(prompt) - shared for prompt in self.prompts], self.batch_size))

    def run(self, model: CausalLM, shared: int | None, progress: ProgressCallback | None) -> list[list[int]]:
        """See LabelScoring."""
        return generate_ids(model, self.prompts, self.params, batching=Batching(self.batch_size, shared, progress))


class Predictor(Protocol):
    """Runs the model for `evaluate`, in this process or elsewhere."""

    def __call__(self, work: LabelScoring | Generation, progress: ProgressCallback | None = None) -> list[Any]:
        """What `work.run` returns."""


@dataclass(frozen=True)
class LocalPredictor:
    """A predictor with a model of this process."""

    model: CausalLM

    def __call__(self, work: LabelScoring | Generation, progress: ProgressCallback | None = None) -> list[Any]:
        """See Predictor."""
        return work.run(self.model, None, progress)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How examples are evaluated."""

    mode: Mode = "both"
    """"score", "generate", or "both"."""
    batch_size: int = 32
    params: SamplingParams = field(default_factory=SamplingParams)
    """How text is generated; by default greedy, with max_new_tokens 5, or as many as the longest label has."""
    content_free: Sequence[Sequence[Example]] = ()
    """Calibrate the label scores by the scores of these content-free inputs (`metrics.calibrated`): one group for all
    examples, or one per example. Generated text is not affected."""
    predictor: Predictor | None = None
    """Default: the model itself."""
    progress: ProgressCallback | None = None
    """Called with the number of examples finished, once in each mode."""
    metrics: MetricFunctions = field(default_factory=dict)
    """More metrics, by name: functions of the predicted and the true label numbers."""


# Predictions ----------------------------------------------------------------------------------------------------------


def parse_label(generated: str, labels: Sequence[str]) -> int:
    """The number of the label that a generated text names, -1 for none (garbage).

    Leading white space and letter case are ignored. A label counts if all of it is within the first characters, as many
    as the longest label has plus WINDOW, and if it begins where a word may begin in its script ("unpositive" names
    nothing, "positively" does; a number must also end there: "10" is not 1). The label that begins first wins; of two
    that begin at the same character, the longer one.
    """
    words = [normalize(label.strip()) for label in labels]
    patterns = [word_pattern(word) + (r"(?!\d)" if word[-1].isdigit() else "") for word in words]
    head = normalize(generated.lstrip())[: max(map(len, words)) + WINDOW]
    matches = []
    for number, pattern in enumerate(patterns):
        if match := re.search(pattern, head):
            matches.append((match.start(), match.start() - match.end(), number))  # the longer is the smaller
    return min(matches)[2] if matches else GARBAGE


def predict_labels(
    model: CausalLM,
    tokenizer: Tokenizer,
    texts: str | Sequence[str] | Sequence[Example],
    template: Template,
    *,
    mode: Literal["score", "generate"] = "generate",
    batch_size: int = 32,
    max_new_tokens: int | None = None,
) -> list[int]:  # the signature of the course, hence more than 6 parameters
    """The label number of each text: with the default labels 1 positive, 0 negative; -1 garbage (counts as wrong).

    texts: plain texts, or one, which the template turns into prompts, or examples that are already encoded.
    mode: "generate" searches the generated text for a label; "score" takes the most likely label, never -1.
    """
    examples = _encoded(texts, template, tokenizer, model.max_seq_len)
    if not examples:
        return []
    options = EvaluationOptions(batch_size=batch_size, params=SamplingParams(max_new_tokens=max_new_tokens))
    predict = _predict_by_loglikelihood if mode == "score" else _predict_by_generation
    return predict(LocalPredictor(model), tokenizer, template, examples, options)[0]


def label_probabilities(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: Template,
    texts: str | Sequence[str],
    batching: Batching | None = None,
) -> list[list[float]]:
    """For each text the probability of each label, by label number: a softmax over the labels' scores alone.

    A text too long for the model is truncated inside the template. Raises GraftError if the scores are NaN.
    """
    examples, batching = _encoded(texts, template, tokenizer, model.max_seq_len), batching or Batching()
    options = EvaluationOptions(batch_size=batching.batch_size, progress=batching.progress)
    scores = _predict_by_loglikelihood(LocalPredictor(model), tokenizer, template, examples, options)[1]
    return torch.tensor(scores, dtype=torch.float64).softmax(dim=-1).tolist() if scores else []


def max_label_tokens(template: Template, tokenizer: Tokenizer) -> int:
    """The number of tokens to generate for a label: 5, or as many as the longest label has."""
    return max(5, *(len(ids) for ids in label_ids(template, tokenizer)))


def _encoded(
    texts: str | Sequence[str] | Sequence[Example], template: Template, tokenizer: Tokenizer, context: int
) -> list[Example]:
    given = listed(texts)
    plain = [Labelled(text, 0) for text in given if isinstance(text, str)]  # a label is required and not used
    examples = [text for text in given if isinstance(text, Example)]
    if len(plain) + len(examples) < len(given) or (plain and examples):
        raise InputError(f"texts: {short(texts)}: pass a text, a list of texts, or a list of examples")
    return encode_rows(plain, template, tokenizer, context)[0] if plain else examples


def _predict_by_loglikelihood(
    predict: Predictor,
    tokenizer: Tokenizer,
    template: Template,
    examples: Sequence[Example],
    options: EvaluationOptions,
) -> tuple[list[int], list[list[float]]]:
    """The most likely labels [N] and the scores [N, L], calibrated if `options.content_free` is given."""
    inputs = [*examples, *(example for group in options.content_free for example in group)]
    work = LabelScoring(inputs, label_ids(template, tokenizer), options.batch_size)
    labels = torch.tensor(predict(work, options.progress), dtype=torch.float64).view(len(inputs), len(work.label_ids))
    if bool(labels.isnan().any()):
        raise GraftError("the labels' scores are NaN: the weights are broken, or overflow in this --dtype; try float32")
    scores, free = labels[: len(examples)], labels[len(examples) :]
    if options.content_free:
        groups = free.unflatten(0, (len(options.content_free), -1)).tolist()
        scores = torch.from_numpy(calibrated(scores.tolist(), groups))
    return scores.argmax(dim=1).tolist(), scores.tolist()


def _predict_by_generation(
    predict: Predictor,
    tokenizer: Tokenizer,
    template: Template,
    examples: Sequence[Example],
    options: EvaluationOptions,
) -> tuple[list[int], list[str]]:
    """The labels [N] that the generated texts name, -1 for garbage, and the texts."""
    params = replace(
        options.params,
        max_new_tokens=options.params.max_new_tokens or max_label_tokens(template, tokenizer),
        stop_token_ids=tokenizer.stop_tokens,
    )
    work = Generation([example.full_prompt_ids for example in examples], params, options.batch_size)
    new = predict(work, options.progress)
    texts = [tokenizer.decode(ids, prompt) for ids, prompt in zip(new, work.prompts, strict=True)]
    return [parse_label(text, template.labels) for text in texts], texts


# Evaluation -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """The metrics of one or both modes on the same examples, and a row for each example."""

    metrics: dict[str, Metrics]
    """By mode: "score", "generate"."""
    rows: list[dict[str, Any]]
    """In the data's order: text, label, predicted, scores {label word: its score}, generated, mode (of `predicted`),
    garbage (whether the generated text names no label); `scores` and `generated` only if their mode was run."""

    @property
    def main(self) -> Metrics:
        """The metrics of mode "score" if it was run, else of "generate"."""
        return self.metrics.get("score") or self.metrics["generate"]

    def to_json(self) -> dict[str, Any]:
        """The main metrics; with both modes, also each under its name."""
        both = {name: metrics.to_json() for name, metrics in self.metrics.items()} if len(self.metrics) > 1 else {}
        return {**self.main.to_json(), **both}


def evaluate(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: Template,
    examples: Sequence[Example],
    options: EvaluationOptions | None = None,
    **settings: Any,
) -> Evaluation:
    """Accuracy and other metrics on labelled examples.

    options: see EvaluationOptions. settings: its fields by name, as in mode="score".

    Raises InputError if there is no example or one has no label, GraftError if the scores or logits are NaN.
    """
    options = replace(options or EvaluationOptions(), **settings)
    true, predict = _true_labels(examples), options.predictor or LocalPredictor(model)
    metrics: dict[str, Metrics] = {}
    outputs: dict[str, list[Any]] = {}
    for mode, run in (("score", _predict_by_loglikelihood), ("generate", _predict_by_generation)):
        if options.mode in ("both", mode):
            start = time.perf_counter()
            predicted, outputs[mode] = run(predict, tokenizer, template, examples, options)
            seconds = time.perf_counter() - start
            own = apply_metrics(options.metrics, predicted, true)
            metrics[mode] = replace(Metrics.make(mode, true, predicted, len(template.labels), seconds), own=own)
    evaluation = Evaluation(metrics, [])
    for i, example in enumerate(examples):
        row: dict[str, Any] = {"text": example.text, "label": true[i], "predicted": evaluation.main.predicted[i]}
        if "score" in outputs:
            row["scores"] = dict(zip(template.labels, outputs["score"][i], strict=True))
        if "generate" in outputs:
            row["generated"] = outputs["generate"][i]
        row["mode"] = evaluation.main.mode
        row["garbage"] = "generate" in metrics and metrics["generate"].predicted[i] == GARBAGE
        evaluation.rows.append(row)
    return evaluation


def _true_labels(examples: Sequence[Example]) -> list[int]:
    if not examples:
        raise InputError("no examples to evaluate: the split is empty")
    for example in examples:
        if example.label is None:
            raise InputError(f"{example.source or 'an example'}: no label; accuracy needs a label in every row")
    return [example.label for example in examples if example.label is not None]
