"""Demonstrations are chosen by the stated rule, stand before the question as stated, and running them once is exact."""

from collections import Counter
from math import exp, log

import numpy as np
import pytest
import torch

from graftlm.errors import InputError
from graftlm.inference.evaluate import evaluate
from graftlm.inference.fewshot import (
    BM25,
    CONTENT_FREE,
    FewShotConfig,
    build_fewshot,
    embedder,
    permute,
    select_demonstrations,
)
from graftlm.inference.generate import Batching, generate_ids
from graftlm.inference.metrics import calibrated
from graftlm.inference.scoring import score_labels
from graftlm.text.boundary import label_ids
from graftlm.text.records import Completion, Labelled
from graftlm.text.template import Template
from inference.tiny import full_logits, stopping, tiny, words

POOL = ["a dull film", "a fine film", "good fun", "weak and dull", "fine fun"]
LABELS = [0, 1, 1, 0, 1]
TEMPLATE = Template("custom", "Review: {text}\nIs it:", ("bad", "good"))
KNOWN = ["Review:", "Is", "it:", "bad", "good", "a", "dull", "film", "fine", "fun", "weak", "and", "so"]


def chosen(how: str, shots: int = 3, seed: int = 0, questions: tuple[str, ...] = ("so",)) -> list[list[int]]:
    return select_demonstrations(POOL, LABELS, questions, FewShotConfig(shots=shots, selection=how, seed=seed))


# Choosing


def test_fixed_takes_the_first() -> None:
    assert chosen("fixed") == [[0, 1, 2]]


def test_random_is_decided_by_the_seed_and_takes_each_at_most_once() -> None:
    assert chosen("random", seed=1) == chosen("random", seed=1)
    assert len({tuple(chosen("random", seed=seed)[0]) for seed in range(20)}) > 5
    assert all(len(set(chosen("random", 5, seed)[0])) == 5 for seed in range(20))


@pytest.mark.parametrize("shots", [2, 3, 4])
def test_balanced_takes_as_many_of_each_label(shots: int) -> None:
    for seed in range(10):
        counts = Counter(LABELS[place] for place in chosen("balanced", shots, seed)[0])
        assert sum(counts.values()) == shots and abs(counts[0] - counts[1]) == shots % 2
    orders = {tuple(LABELS[place] for place in chosen("balanced", 4, seed)[0]) for seed in range(20)}
    assert len(orders) > 2  # one label does not always stand next to the question


def test_too_few_demonstrations_are_refused() -> None:
    with pytest.raises(InputError, match="--shots 6: there are only 5 demonstrations"):
        chosen("fixed", 6)
    with pytest.raises(InputError, match="label 0 has only 2 demonstrations, 3 are needed"):
        select_demonstrations([*POOL, "x", "y"], [*LABELS, 1, 1], ["so"], FewShotConfig(shots=6, selection="balanced"))


def test_another_order_holds_the_same_demonstrations() -> None:
    assert permute([4, 2, 9, 7], 0) == [4, 2, 9, 7]
    orders = [tuple(permute([4, 2, 9, 7], n)) for n in range(1, 12)]
    assert len(set(orders)) > 5 and all(sorted(order) == [2, 4, 7, 9] for order in orders)


def test_bm25_is_the_formula_worked_out_by_hand() -> None:
    """Three texts of 2, 2 and 5 words, mean 3; the query's words stand in 1 (dull), 2 (film) and 0 (nowhere)."""
    index = BM25(["Dull film", "a joy", "film by film and film"])
    dull = log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    film = log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    short, long = 1.2 * (0.25 + 0.75 * 2 / 3), 1.2 * (0.25 + 0.75 * 5 / 3)
    expected = [(dull + film) * 2.2 / (1 + short), 0.0, film * 3 * 2.2 / (3 + long)]
    np.testing.assert_allclose(index.scores("film, dull nowhere!"), expected, rtol=1e-12)


def test_bm25_reads_scripts_without_spaces_letter_by_letter() -> None:
    index = BM25(["音楽が美しい映画", "退屈な脚本", "caf\u00e9 noir"])
    assert [index.scores(query).argmax() for query in ("美しい音楽だ", "脚本が退屈", "Cafe\u0301")] == [0, 1, 2]


def test_the_nearest_stand_last_and_each_question_has_its_own() -> None:
    assert [row[-1] for row in chosen("bm25", 2, questions=("so weak", "so good"))] == [3, 2]
    assert chosen("bm25", 3, questions=("dull dull weak",))[0][-2:] == [0, 3]


def test_embeddings_are_means_of_hidden_states_and_find_the_nearest() -> None:
    model, tokenizer = tiny("llama"), words(*KNOWN)
    embed = embedder(model, tokenizer, batch_size=2)
    found = embed(POOL)
    with torch.no_grad():
        for row, text in zip(found, POOL, strict=True):
            mean = model.hidden_states(torch.tensor([tokenizer.encode(text)]))[0].mean(0)
            np.testing.assert_allclose(row, (mean / mean.norm()).numpy(), atol=1e-12)
    order = select_demonstrations(POOL, LABELS, ["fun film"], FewShotConfig(shots=5, selection="embedding"), embed)[0]
    near = found @ embed(["fun film"])[0]
    assert list(near[order]) == sorted(near)


# Classification


def rows(*texts: str, label: int = 1) -> list[Labelled]:
    return [Labelled(text, label, source=f"a.jsonl:{n}") for n, text in enumerate(texts, 1)]


POOL_ROWS = [Labelled(text, label, source="train") for text, label in zip(POOL, LABELS, strict=True)]
ASKED = rows("so good", "so weak film", "a", "fine and good film")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("how", ["fixed", "random", "balanced", "bm25", "embedding"])
def test_scores_with_demonstrations_equal_whole_prompts_one_by_one(family: str, how: str) -> None:
    model, tokenizer = tiny(family), words(*KNOWN)
    asked = build_fewshot(model, tokenizer, TEMPLATE, ASKED, POOL_ROWS, FewShotConfig(shots=3, selection=how))
    labels = label_ids(TEMPLATE, tokenizer)
    scores = score_labels(model, asked.examples, labels, Batching(3))
    for example, row in zip(asked.examples, scores, strict=True):
        logps = full_logits(model, example.prompt_ids)[-1].log_softmax(-1)
        torch.testing.assert_close(row, logps[[ids[0] for ids in labels]], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_with_demonstrations_is_token_by_token_that_of_whole_prompts(family: str) -> None:
    model, tokenizer = tiny(family), words(*KNOWN)
    asked = build_fewshot(model, tokenizer, TEMPLATE, ASKED, POOL_ROWS, FewShotConfig(shots=2))
    prompts = [example.prompt_ids for example in asked.examples]
    for prompt, new in zip(
        prompts,
        generate_ids(model, prompts, stopping(8, -1)),
        strict=True,
    ):
        ids = list(prompt)
        for token in new:
            assert token == int(full_logits(model, ids)[-1].argmax())
            ids.append(token)
        assert len(new) == 8


def test_shared_demonstrations_are_run_once_for_the_whole_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny("llama"), words(*KNOWN)
    asked = build_fewshot(model, tokenizer, TEMPLATE, ASKED, POOL_ROWS, FewShotConfig(shots=3, calibrate=True))
    shared = len(tokenizer.encode(asked.examples[0].instr_tuned_text.rpartition("Review:")[0])) + 1
    fed: list[int] = []
    hidden = type(model).hidden_states

    def counted(self, ids, *args, **kwargs):
        fed.append(ids.shape[1])
        return hidden(self, ids, *args, **kwargs)

    monkeypatch.setattr(type(model), "hidden_states", counted)
    evaluate(model, tokenizer, TEMPLATE, asked.examples, mode="score", batch_size=1, content_free=asked.content_free)
    assert fed[0] == shared and len(fed) == 1 + len(ASKED) + len(CONTENT_FREE)
    assert max(fed[1:]) < shared


def test_a_prompt_is_demonstrations_with_their_answers_then_the_question() -> None:
    asked = build_fewshot(
        tiny("llama"), words(*KNOWN), TEMPLATE, rows("so fine"), POOL_ROWS[:1], FewShotConfig(shots=1)
    )
    assert asked.examples[0].instr_tuned_text == "Review: a dull film\nIs it: bad\n\nReview: so fine\nIs it: good"


def test_a_text_that_is_asked_about_is_never_a_demonstration() -> None:
    same = rows("good fun", "a dull film")
    for how in ("fixed", "random", "bm25"):
        asked = build_fewshot(
            tiny("llama"), words(*KNOWN), TEMPLATE, same, POOL_ROWS, FewShotConfig(shots=3, selection=how)
        )
        for example in asked.examples:
            before = example.instr_tuned_text.rpartition("Review:")[0]
            assert not any(f"Review: {row.text}\n" in before for row in same)
    with pytest.raises(InputError, match="only 3 demonstrations"):
        build_fewshot(tiny("llama"), words(*KNOWN), TEMPLATE, same, POOL_ROWS, FewShotConfig(shots=4))


@pytest.mark.parametrize("how", ["fixed", "bm25"])
def test_demonstrations_longer_than_the_context_are_refused(how: str) -> None:
    long = [Labelled(" ".join(["dull"] * 20) + f" {n}", 0, source="train") for n in range(3)]
    with pytest.raises(InputError, match=r"--shots: the demonstrations take \d+ tokens, template and answer 5, and 40"):
        build_fewshot(tiny("llama"), words(*KNOWN), TEMPLATE, ASKED, long, FewShotConfig(shots=3, selection=how))


def test_pairs_of_prompt_and_completion_are_no_demonstrations() -> None:
    pairs = [Completion("so", " fine", "train")]
    with pytest.raises(InputError, match="demonstrations need text and label"):
        build_fewshot(tiny("llama"), words(*KNOWN), TEMPLATE, ASKED, pairs, FewShotConfig(shots=1))


# Calibration


def test_contextual_calibration_is_the_papers_formula_by_hand() -> None:
    """p = (0.6, 0.4) and content-free (0.9, 0.1), (0.7, 0.3): p_cf = (0.8, 0.2), W p = (0.75, 2.0): the second wins."""
    scores = [[log(0.6) - 3, log(0.4) - 3]]  # sums to less than 1 over the labels, as label scores do
    free = [[[log(0.9) - 1, log(0.1) - 1], [log(0.7) - 2, log(0.3) - 2]]]
    np.testing.assert_allclose(np.exp(calibrated(scores, free)), [[0.75, 2.0]], rtol=1e-12)


@pytest.mark.parametrize("how", ["random", "bm25"])
def test_evaluate_calibrates_by_what_each_prompt_answers_to_nothing(how: str) -> None:
    model, tokenizer = tiny("llama"), words(*KNOWN)
    asked = build_fewshot(
        model, tokenizer, TEMPLATE, ASKED, POOL_ROWS, FewShotConfig(shots=2, selection=how, calibrate=True)
    )
    assert len(asked.content_free) == (1 if how == "random" else len(ASKED))
    found = evaluate(
        model, tokenizer, TEMPLATE, asked.examples, mode="score", batch_size=2, content_free=asked.content_free
    )
    words_ids = [ids[0] for ids in label_ids(TEMPLATE, tokenizer)]

    def share(prompt: tuple[int, ...]) -> list[float]:
        bad, good = (exp(float(x)) for x in full_logits(model, prompt)[-1].log_softmax(-1)[words_ids])
        return [bad / (bad + good), good / (bad + good)]

    for number, (example, row) in enumerate(zip(asked.examples, found.rows, strict=True)):
        group = asked.content_free[0 if how == "random" else number]
        assert len(group) == len(CONTENT_FREE)
        free = [share(nothing.prompt_ids) for nothing in group]
        bias = [sum(column) / 3 for column in zip(*free, strict=True)]
        expected = [p / b for p, b in zip(share(example.prompt_ids), bias, strict=True)]
        assert list(row["scores"].values()) == pytest.approx([log(x) for x in expected], abs=1e-9)
        assert row["predicted"] == expected.index(max(expected))
