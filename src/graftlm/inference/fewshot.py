"""Few-shot demonstrations: which ones precede a question, and few-shot classification (Brown et al. 2020).

    fixed       the first of the pool
    random      a sample, decided by the seed
    balanced    a sample with the same number of each label
    bm25        for each question those that share its rare words (Robertson and Zaragoza 2009)
    embedding   for each question those with the most similar mean hidden states of the base model

The first three select once for all questions, so all prompts share a prefix that is computed once per evaluation
(`decoder.prefill_shared_prefix`). The last two select per question. No demonstration has the text of a question.

Letters: N questions, P texts of the pool, d model width.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from math import log
from random import Random

import numpy as np
import torch

from graftlm.config.inference import DemoSelection
from graftlm.errors import InputError
from graftlm.inference.generate import eval_mode
from graftlm.inference.scoring import mean_hidden_states
from graftlm.models import CausalLM
from graftlm.text.boundary import label_ids
from graftlm.text.collate import Example, encode_rows, sort_by_hash
from graftlm.text.records import Labelled, Record
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer
from graftlm.text.words import WORD, normalize

Embed = Callable[[Sequence[str]], np.ndarray]
"""P texts -> [P, d] rows of length 1."""

CONTENT_FREE = ("N/A", "[MASK]", "")
"""Content-free inputs, whose scores show a prompt's bias (Zhao et al. 2021, section 4)."""

K1, B = 1.2, 0.75
MAX_EMBEDDED_TOKENS = 64
"""A text is represented by this many first tokens."""


@dataclass(frozen=True)
class FewShotConfig:
    """How demonstrations are selected, and how the prompts with them are built."""

    shots: int
    selection: DemoSelection = "fixed"
    seed: int = 0
    """Of the selections random and balanced."""
    permutation: int = 0
    """The order of the demonstrations: 0 as selected, others shuffled."""
    max_length: int | None = None
    """Maximum length of a classification prompt in tokens. Default: the model's context."""
    calibrate: bool = False
    """Also encode content-free inputs, for contextual calibration."""
    batch_size: int = 32


# Selection ------------------------------------------------------------------------------------------------------------


def select_demonstrations(
    pool: Sequence[str],
    labels: Sequence[Hashable],
    questions: Sequence[str],
    config: FewShotConfig,
    embed: Embed | None = None,
) -> list[list[int]]:
    """The demonstrations' indices in the pool, in the order in which they are shown.

    One list for all questions; with bm25 and embedding one list per question, the most similar last, next to it.
    labels: of the pool, for `balanced`: each label has shots // (number of labels), and the remainder goes to the first
    labels of a random order. embed: for `embedding`.

    Raises InputError if the pool is too small. A text that is also a question must not be in the pool.
    """
    assert not set(pool) & set(questions)
    shots, seed = config.shots, config.seed
    if shots > len(pool):
        raise InputError(f"--shots {shots}: there are only {len(pool)} demonstrations to choose from")
    if config.selection == "fixed" or not shots:
        selected = [list(range(shots))]
    elif config.selection == "random":
        selected = [_shuffled(range(len(pool)), seed)[:shots]]
    elif config.selection == "balanced":
        selected = [_balanced(labels, shots, seed)]
    else:
        if config.selection == "bm25":
            index = BM25(pool)
            rows = [index.scores(question) for question in questions]
        else:
            assert embed is not None, "the selection by embedding needs a model"
            rows = list(embed(questions) @ embed(pool).T)
        # A stable sort of the negated scores: ties keep the pool's order on every machine.
        selected = [np.argsort(-row, kind="stable")[:shots][::-1].tolist() for row in rows]
    return [permute(indices, config.permutation) for indices in selected]


def _shuffled(items: Sequence[int], seed: int, what: str = "") -> list[int]:
    """A random order from `random()`, whose numbers are the same in every release of Python; `shuffle` is not."""
    random = Random(f"demonstrations {what} {seed}").random
    return [item for _, item in sorted((random(), item) for item in items)]


def _balanced(labels: Sequence[Hashable], shots: int, seed: int) -> list[int]:
    groups: dict[Hashable, list[int]] = {}
    for index in _shuffled(range(len(labels)), seed):
        groups.setdefault(labels[index], []).append(index)
    per_label, remainder = divmod(shots, len(groups))
    selected = []
    for number, (label, indices) in enumerate(groups.items()):
        count = per_label + (number < remainder)
        if count > len(indices):
            raise InputError(
                f"--shots {shots} --demo_selection balanced: label {label!r} has only {len(indices)} demonstrations, "
                f"{count} are needed"
            )
        selected += indices[:count]
    return _shuffled(selected, seed, "order")  # else the last label would be next to every question


def permute(indices: Sequence[int], permutation: int) -> list[int]:
    """The same demonstrations in another order; permutation 0 is the given one."""
    return [indices[n] for n in _shuffled(range(len(indices)), permutation, "reordered")] if permutation else [*indices]


class BM25:
    """Okapi BM25 over P texts, with k1 = 1.2 and b = 0.75: a measure of the rare words shared with a query.

        score = Σ_w idf(w) tf(w) (k1 + 1) / (tf(w) + k1 (1 - b + b length / mean length))
        idf(w) = ln(1 + (P - P_w + 1/2) / (P_w + 1/2)),    P_w texts contain the word w

    Words are runs of letters, digits and underscores in any case, and the letters of scripts without spaces; a word
    that occurs twice in the query counts twice.
    Robertson and Zaragoza (2009), "The probabilistic relevance framework", eq. 3.3 and 3.15; the 1 in
    the logarithm, which keeps frequent words from a negative weight, is Lucene's.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(_words(text)) for text in texts]
        lengths = np.array([sum(count.values()) for count in counts], dtype=float)
        self._norm = K1 * (1 - B + B * lengths / max(lengths.mean(), 1.0))
        self._postings: dict[str, list[tuple[int, int]]] = {}  # word -> (text, number of occurrences)
        for index, count in enumerate(counts):
            for word, times in count.items():
                self._postings.setdefault(word, []).append((index, times))

    def scores(self, query: str) -> np.ndarray:
        """[P]: the score of each text for the query; 0 if they share no word."""
        scores = np.zeros(len(self._norm))
        for word in _words(query):
            postings = self._postings.get(word, [])
            idf = log(1 + (len(scores) - len(postings) + 0.5) / (len(postings) + 0.5))
            for index, times in postings:
                scores[index] += idf * times * (K1 + 1) / (times + self._norm[index])
        return scores


def _words(text: str) -> list[str]:
    return re.findall(WORD, normalize(text))


def embedder(model: CausalLM, tokenizer: Tokenizer, batch_size: int = 32) -> Embed:
    """Texts as the mean of the model's last hidden states over their first tokens, [P, d], each of length 1.

    The mean over all texts is not subtracted, so that a text's row does not depend on the others.
    """

    def embed(texts: Sequence[str]) -> np.ndarray:
        ids = [row[:MAX_EMBEDDED_TOKENS] or [tokenizer.eot] for row in tokenizer.encode_prompts(texts)]
        embedded = np.zeros((len(ids), model.config.hidden_size))
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        with eval_mode(model):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                mean = mean_hidden_states(model, [ids[row] for row in rows])
                embedded[rows] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return embedded

    return embed


# Classification -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FewShotExamples:
    """The inputs of `evaluate`."""

    examples: list[Example]
    """Of the questions, in their order."""
    content_free: list[list[Example]]
    """One group of `CONTENT_FREE` inputs for all questions, or one per question; empty without calibration."""
    truncated: int
    """The number of texts that were truncated to fit."""


def build_fewshot(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: Template,
    rows: Sequence[Record],
    pool: Sequence[Record],
    config: FewShotConfig,
) -> FewShotExamples:
    """Labelled rows as examples whose prompts begin with demonstrations from the pool.

    A demonstration is the template's prompt with its answer, followed by a blank line. Rows of the pool whose text is
    among the questions' are excluded. `fixed` takes them in the order of a hash of their text, which is independent of
    labels and of the file's order.

    Raises InputError if the pool is too small or has no labels, and if the demonstrations leave no space for a text.
    """
    questions = {row.text for row in rows}
    others = list({row.text: row for row in sort_by_hash(pool) if row.text not in questions}.values())
    demos = [row for row in others if isinstance(row, Labelled)]
    if config.shots and len(demos) < len(others):
        raise InputError("--shots: the data are pairs of prompt and completion; demonstrations need text and label")
    embed = embedder(model, tokenizer, config.batch_size)
    texts, labels = [row.text for row in demos], [row.label for row in demos]
    selected = select_demonstrations(texts, labels, [row.text for row in rows], config, embed)
    max_length = config.max_length or model.max_seq_len
    templates = [_with_demonstrations(template, [demos[index] for index in indices]) for indices in selected]
    if config.shots:
        _check(templates, tokenizer, max_length)
    if len(templates) == 1:
        encoded = [encode_rows(rows, templates[0], tokenizer, max_length)]
    else:
        encoded = [encode_rows([row], own, tokenizer, max_length) for row, own in zip(rows, templates, strict=True)]
    free = [Labelled(text, 0, source="a content-free input") for text in CONTENT_FREE]
    return FewShotExamples(
        examples=[example for examples, _ in encoded for example in examples],
        content_free=[encode_rows(free, own, tokenizer, max_length)[0] for own in templates if config.calibrate],
        truncated=sum(truncated for _, truncated in encoded),
    )


def _with_demonstrations(template: Template, demos: Sequence[Labelled]) -> Template:
    """The template with demonstrations before its prompt."""
    texts = [template.prompt(row.text) + template.completion(row.label) for row in demos]
    return replace(template, text_prefix="".join(f"{text}\n\n" for text in texts))


def _check(templates: Sequence[Template], tokenizer: Tokenizer, max_length: int) -> None:
    """An error for demonstrations that leave no token for a text."""
    longest = max(templates, key=lambda template: len(template.text_prefix))
    prefix, prompt = (len(tokenizer.encode_prompt(text)) for text in (longest.text_prefix, longest.prompt("")))
    answer = max(map(len, label_ids(longest, tokenizer))) + 1
    if prompt + answer >= max_length:
        raise InputError(
            f"--shots: the demonstrations take {prefix:,} tokens, template and answer {prompt - prefix + answer}, and "
            f"{max_length:,} fit: use fewer or shorter demonstrations"
        )
