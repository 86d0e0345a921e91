"""Which worked examples stand before a question, and few-shot classification with them (Brown et al. 2020).

    fixed       the first of the pool
    random      a sample, decided by the seed
    balanced    the same, as many of each label as of any other
    bm25        for each question its own: those that share its rare words (Robertson and Zaragoza 2009)
    embedding   for each question its own: those that the base model represents most alike

What is unusual here: the first three choose once for all questions, so that all prompts begin with the same tokens,
which are then run once for the whole evaluation (`generate.prefill_shared_prefix`). The last two choose per question;
what
those prompts share is what stands before the first demonstration. And no demonstration has the text of a question.

Letters: N questions, P texts of the pool, d model width.
"""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from math import log
from random import Random
from typing import get_args

import numpy as np
import torch

from graftlm.config import DemoSelection
from graftlm.errors import InputError
from graftlm.exchange.device import to_float64
from graftlm.inference.generate import eval_mode, right_pad
from graftlm.models import CausalLM
from graftlm.text.collate import Example, encode_rows, sort_by_hash
from graftlm.text.layouts import Labelled, Record
from graftlm.text.template import Template
from graftlm.text.tokenizer import Tokenizer

Embed = Callable[[Sequence[str]], np.ndarray]
"""P texts -> [P, d] rows of length 1."""

CONTENT_FREE = ("N/A", "[MASK]", "")
"""Inputs that say nothing, from whose answers a prompt's bias is read (Zhao et al. 2021, section 4)."""

K1, B = 1.2, 0.75
MAX_EMBEDDED_TEXTS = 64
"""A text is represented by its first so many tokens."""


# Choosing -------------------------------------------------------------------------------------------------------------


def select_demonstrations(
    pool: Sequence[str],
    labels: Sequence[Hashable],
    questions: Sequence[str],
    *,
    shots: int,
    how: DemoSelection,
    seed: int = 0,
    embed: Embed | None = None,
) -> list[list[int]]:
    """Places in the pool of the demonstrations, in the order in which they are shown.

    One list, for all questions; with `how` bm25 or embedding a list for each question, the nearest last, next to it.
    labels: the pool's, for `balanced`: each label has shots // (number of labels), the first ones of a random order
    one more where that leaves a rest.

    Raises InputError where the pool is too small. A text that is also a question must not be in the pool.
    """
    assert how in get_args(DemoSelection) and not set(pool) & set(questions)
    if shots > len(pool):
        raise InputError(f"--shots {shots}: there are only {len(pool)} demonstrations to choose from")
    if how == "fixed" or not shots:
        return [list(range(shots))]
    if how == "random":
        return [_shuffled(range(len(pool)), seed)[:shots]]
    if how == "balanced":
        return [_balanced(labels, shots, seed)]
    if how == "bm25":
        index = BM25(pool)
        rows = [index.scores(question) for question in questions]
    else:
        assert embed is not None, "the choice by embedding needs a model"
        rows = list(embed(questions) @ embed(pool).T)
    # A stable sort of the negated scores: of equally near ones the earlier comes first, whatever the machine.
    return [np.argsort(-row, kind="stable")[:shots][::-1].tolist() for row in rows]


def _shuffled(items: Sequence[int], seed: int, what: str = "") -> list[int]:
    """A random order, by numbers alone: Python promises that `random()` stays as it is, but not that `shuffle` does."""
    random = Random(f"demonstrations {what} {seed}").random
    return [item for _, item in sorted((random(), item) for item in items)]


def _balanced(labels: Sequence[Hashable], shots: int, seed: int) -> list[int]:
    groups: dict[Hashable, list[int]] = {}
    for place in _shuffled(range(len(labels)), seed):
        groups.setdefault(labels[place], []).append(place)
    each, rest = divmod(shots, len(groups))
    chosen = []
    for number, (label, places) in enumerate(groups.items()):
        wanted = each + (number < rest)
        if wanted > len(places):
            raise InputError(
                f"--shots {shots} --demo_selection balanced: label {label!r} has only {len(places)} demonstrations, "
                f"{wanted} are needed"
            )
        chosen += places[:wanted]
    return _shuffled(chosen, seed, "order")  # else the last label would stand next to every question


def permute(places: Sequence[int], order: int) -> list[int]:
    """The same demonstrations in another order; order 0 is the one they have."""
    return [places[n] for n in _shuffled(range(len(places)), order, "reordered")] if order else list(places)


class BM25:
    """Okapi BM25 over P texts, with k1 = 1.2 and b = 0.75: which of them share a query's rare words.

        score = Σ_w idf(w) tf(w) (k1 + 1) / (tf(w) + k1 (1 - b + b length / mean length))
        idf(w) = ln(1 + (P - P_w + 1/2) / (P_w + 1/2)),    P_w texts hold the word w

    Words are runs of letters, digits and underscores, whatever their case; a word that stands twice in the query
    counts twice. Robertson and Zaragoza (2009), "The probabilistic relevance framework", eq. 3.3 and 3.15; the 1 in
    the logarithm, which keeps frequent words from counting less than nothing, is Lucene's.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(_words(text)) for text in texts]
        lengths = np.array([sum(count.values()) for count in counts], dtype=float)
        self._norm = K1 * (1 - B + B * lengths / max(lengths.mean(), 1.0))
        self._holders: dict[str, list[tuple[int, int]]] = {}  # a word -> the texts that hold it, and how often
        for place, count in enumerate(counts):
            for word, times in count.items():
                self._holders.setdefault(word, []).append((place, times))

    def scores(self, query: str) -> np.ndarray:
        """[P]: how near each text is to the query; 0 where they share no word."""
        scores = np.zeros(len(self._norm))
        for word in _words(query):
            holders = self._holders.get(word, [])
            idf = log(1 + (len(scores) - len(holders) + 0.5) / (len(holders) + 0.5))
            for place, times in holders:
                scores[place] += idf * times * (K1 + 1) / (times + self._norm[place])
        return scores


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def embedder(model: CausalLM, tokenizer: Tokenizer, batch_size: int = 32) -> Embed:
    """Texts as the mean of the model's last hidden states over their first 64 tokens, [P, d], each of length 1.

    The mean over all texts of a call is not taken away, so that a text's row does not depend on the others.
    """

    def embed(texts: Sequence[str]) -> np.ndarray:
        ids = [row[:MAX_EMBEDDED_TEXTS] or [tokenizer.eot] for row in tokenizer.encode_batch(texts, bos=True)]
        found = np.zeros((len(ids), model.config.hidden_size))
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        with eval_mode(model):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                padded, lengths = right_pad([ids[row] for row in rows], model.device)
                hidden = to_float64(model.hidden_states(padded))
                lengths = lengths.to(hidden.device)
                real = torch.arange(padded.shape[1], device=hidden.device) < lengths[:, None]
                mean = (hidden * real[..., None]).sum(1) / lengths[:, None]
                found[rows] = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return found

    return embed


# Classification -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FewShotExamples:
    """What `evaluate` reads."""

    examples: list[Example]
    """Of the questions, in their order."""
    content_free: list[list[Example]]
    """One group of `CONTENT_FREE` inputs for all questions, or a group for each; empty without calibration."""
    truncated: int
    """How many texts lost their end to fit."""


def build_fewshot(
    model: CausalLM,
    tokenizer: Tokenizer,
    template: Template,
    rows: Sequence[Record],
    pool: Sequence[Record],
    *,
    shots: int,
    how: DemoSelection = "fixed",
    seed: int = 0,
    order: int = 0,
    max_length: int | None = None,
    calibrate: bool = False,
    batch_size: int = 32,
) -> FewShotExamples:
    """Labelled rows as examples whose prompts begin with demonstrations out of the pool.

    A demonstration is the template's whole prompt with its answer; a blank line stands behind each. Rows of the pool
    whose text is among the questions' are left out. `fixed` takes them in the order of a hash of their text, which is
    blind to labels and to the file's order.

    Raises InputError where the pool is too small or holds no labels, and where the demonstrations leave no room.
    """
    asked = {row.text for row in rows}
    others = list({row.text: row for row in sort_by_hash(pool) if row.text not in asked}.values())
    demos = [row for row in others if isinstance(row, Labelled)]
    if shots and len(demos) < len(others):
        raise InputError("--shots: the data are pairs of prompt and completion; demonstrations need text and label")
    embed = embedder(model, tokenizer, batch_size) if how == "embedding" else None
    texts, labels = [row.text for row in demos], [row.label for row in demos]
    chosen = select_demonstrations(
        texts, labels, [row.text for row in rows], shots=shots, how=how, seed=seed, embed=embed
    )
    room = max_length or model.max_seq_len
    templates = [_before(template, [demos[place] for place in permute(places, order)]) for places in chosen]
    if shots:
        _check(templates, tokenizer, room)
    if len(templates) == 1:
        encoded = [encode_rows(rows, templates[0], tokenizer, room)]
    else:
        encoded = [encode_rows([row], own, tokenizer, room) for row, own in zip(rows, templates, strict=True)]
    free = [Labelled(text, 0, source="a content-free input") for text in CONTENT_FREE]
    return FewShotExamples(
        examples=[example for examples, _ in encoded for example in examples],
        content_free=[encode_rows(free, own, tokenizer, room)[0] for own in templates] if calibrate else [],
        truncated=sum(cut for _, cut in encoded),
    )


def _before(template: Template, demos: Sequence[Labelled]) -> Template:
    """The template with demonstrations before it."""
    shown = [template.prompt(row.text) + template.completion(row.label) for row in demos]
    return replace(template, text_prefix="".join(f"{text}\n\n" for text in shown))


def _check(templates: Sequence[Template], tokenizer: Tokenizer, room: int) -> None:
    """An error for demonstrations that leave not one token for a text."""
    longest = max(templates, key=lambda template: len(template.text_prefix))
    taken, whole = (len(tokenizer.encode(text, bos=True)) for text in (longest.text_prefix, longest.prompt("")))
    answer = max(len(tokenizer.encode(longest.completion(n))) for n in range(len(longest.labels))) + 1
    if whole + answer >= room:
        raise InputError(
            f"--shots: the demonstrations take {taken:,} tokens, template and answer {whole - taken + answer}, and "
            f"{room:,} fit: use fewer or shorter demonstrations"
        )
