"""Scores equal a plain full forward pass; labels are found in text by the stated rule; figures add up."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from torch import nn

from graftlm.errors import GraftError, InputError
from graftlm.inference import evaluate as module
from graftlm.inference import scoring
from graftlm.inference.evaluate import evaluate, parse_label, predict_labels
from graftlm.inference.sampling import SamplingParams
from graftlm.inference.saved_evaluations import write_predictions
from graftlm.inference.scoring import score, score_labels
from graftlm.models import CausalLM
from graftlm.text.collate import Example, encode_rows
from graftlm.text.records import Labelled
from graftlm.text.template import Template
from inference.tiny import CONTEXT, full_logits, ragged, tiny, words

FAMILIES = pytest.mark.parametrize("family", ["gpt2", "llama"])
EOT = 0


def example(prompt: Sequence[int], completion: Sequence[int] = (), label: int | None = None, text: str = "") -> Example:
    return Example(tuple(prompt), tuple(completion), label, text, text, "a.jsonl:3")


def plain(model: CausalLM, prompt: Sequence[int], tail: Sequence[int]) -> float:
    """The tail's log-probability by one full forward pass over the prompt and all of the tail but its last token."""
    if not tail:
        return 0.0
    logps = full_logits(model, [*prompt, *tail[:-1]]).log_softmax(-1)
    return sum(float(logps[len(prompt) - 1 + i, token]) for i, token in enumerate(tail))


def check(model: CausalLM, examples: list[Example], labels: list[list[int]], batch_size: int = 32) -> None:
    scores = score(model, examples, labels, batch_size=batch_size)
    each = [[plain(model, e.prompt_ids, label) for label in labels] for e in examples]
    expected = torch.tensor(each, dtype=torch.float64)
    own = torch.tensor([plain(model, e.prompt_ids, e.completion_ids) for e in examples], dtype=torch.float64)
    assert scores.labels.shape == (len(examples), len(labels))
    torch.testing.assert_close(scores.labels, expected.reshape(scores.labels.shape), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores.completion, own, rtol=1e-9, atol=1e-9)
    assert scores.completion_tokens.tolist() == [len(e.completion_ids) for e in examples]


LABELS = {
    "one token each": [[7], [9], [11]],
    "several tokens": [[7, 8], [9], [7, 10, 12], [13, 8]],
    "one begins another, with end-of-text": [[7, EOT], [7, 8, EOT], [7, 8, 9, EOT]],
    "no labels": [],
}


@FAMILIES
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("shared", [0, 6])
def test_scores_equal_plain_forwards(family: str, labels: list[list[int]], batch_size: int, shared: int) -> None:
    model = tiny(family)
    prompts = ragged([9, 20, 7, 13, 8, 30], shared)
    tails = [*([*label, EOT] for label in labels), [20, 21, 22, EOT], [EOT], [23, 24]]
    examples = [example(prompt, tails[i % len(tails)]) for i, prompt in enumerate(prompts)]
    check(model, examples, labels, batch_size=batch_size)


def test_the_shared_prefix_changes_rounding_only() -> None:
    model = tiny("llama")
    examples = [example(prompt, [7, EOT]) for prompt in ragged([9, 20, 7, 13], shared=6)]
    with_it, without = (score(model, examples, LABELS["several tokens"], shared=n) for n in (None, 0))
    torch.testing.assert_close(with_it.labels, without.labels, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(with_it.completion, without.completion, rtol=1e-10, atol=1e-10)


def test_bfloat16_is_near() -> None:
    """The sums are made in float32 and above from logits that were computed in bfloat16."""
    model = tiny("llama")
    examples = [example(prompt, [7, 8, EOT]) for prompt in ragged([9, 20, 7], shared=5)]
    expected = score(model, examples, [[7, 8], [9, 8]])
    scores = score(model.bfloat16(), examples, [[7, 8], [9, 8]])
    assert scores.labels.dtype == torch.float64
    torch.testing.assert_close(scores.labels, expected.labels, rtol=0.05, atol=0.2)
    assert not scores.labels.equal(scores.labels.bfloat16().double())


def passes(
    model: CausalLM, examples: list[Example], labels: list[list[int]], scorer: Callable[..., Any] = score
) -> list[tuple[int, ...]]:
    """The shapes of the ids that the forward passes read, the shared prefix's apart."""
    with patch.object(model, "hidden_states", wraps=model.hidden_states) as run:
        scorer(model, examples, labels)
    return [tuple(call.args[0].shape) for call in run.call_args_list if len(call.args) == 4]


def test_no_pass_more_than_the_tails_need() -> None:
    model = tiny("llama")
    examples = [example(prompt, [7, EOT]) for prompt in ragged([9, 8, 7], shared=6)]
    assert passes(model, examples, [[7], [9]]) == [(3, 4)]  # the word before end-of-text rides along
    assert passes(model, examples, [[7], [9]], score_labels) == [(3, 3)]  # and without it the prompts alone
    assert passes(model, examples, [[7, 8], [7, 9], [10]]) == [(3, 4)]  # two labels, one path
    assert passes(model, examples, [[7, 8], [9, 8]]) == [(3, 4), (3, 1)]
    assert passes(model, examples, [[7, 8, 9], [9, 8], [9, 7]]) == [(3, 5), (3, 1)]


def test_logits_only_where_a_tail_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")
    rows: list[int] = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda h: (rows.append(h.shape[0]), logits(h))[1])
    score(model, [example(prompt, [7, 8, EOT]) for prompt in ragged([9, 20])], [[7], [9]])
    assert rows == [2 * 3]


@FAMILIES
def test_rows_at_the_contexts_end(family: str) -> None:
    """Full rows beside short ones with long completions, through several passes: no padding beyond the context."""
    model = tiny(family)
    labels = [[7, 8, 9, 10], [11, 12, 13], [14]]
    lengths = [CONTEXT - 3, CONTEXT - 5, 6, CONTEXT - 4]
    completions = [[14, EOT], [7, 8, 9, 10, EOT], list(range(20, 30)), [14, EOT]]
    check(model, [example(*pair) for pair in zip(ragged(lengths), completions, strict=True)], labels)
    # One label's last token lies just beyond the context: it is predicted, never fed.
    prompt = ragged([CONTEXT])[0]
    logps = full_logits(model, prompt)[-1].log_softmax(-1)
    assert score(model, [example(prompt)], [[7], [9]]).labels[0].tolist() == pytest.approx(logps[[7, 9]].tolist())


def test_beyond_the_context_is_an_error() -> None:
    message = "^a.jsonl:3: prompt and answer have 42 tokens, the model reads at most 40: lower --max_length or shorten"
    with pytest.raises(InputError, match=message):
        score(tiny("gpt2"), [example(ragged([39])[0])], [[7], [8, 9, 10]])


def test_few_positions_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    examples = [example(prompt, [7, 8, EOT]) for prompt in ragged([9, 20, 7, 13])]
    expected = score(model, examples, [[7], [9]])
    monkeypatch.setattr(scoring, "MAX_POSITIONS", 6)
    assert passes(model, examples, [[7], [9]]) == [(2, 11), (2, 22)]
    torch.testing.assert_close(
        score(model, examples, [[7], [9]]).completion, expected.completion, rtol=1e-10, atol=1e-10
    )


def test_no_examples() -> None:
    scores = score(tiny("gpt2"), [], [[7], [9]])
    assert scores.labels.shape == (0, 2)
    assert scores.completion.shape == scores.completion_tokens.shape == (0,)


def test_scoring_leaves_the_model_training_and_reports_progress() -> None:
    model = tiny("gpt2")
    examples = [example(prompt, [7, EOT]) for prompt in ragged([9, 20, 7])]
    expected = score(model, examples, [[7], [9]]).labels
    model.set_dropout(0.9)
    model.train()
    done: list[int] = []
    assert score(model, examples, [[7], [9]], batch_size=2, progress=done.append).labels.allclose(expected)
    assert model.training
    assert done == [2, 1]


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generated", "label"),
    [
        (" positive", 1),
        ("\n\n Negative.", 0),
        ("POSITIVE!", 1),
        ("positively so", 1),
        ("**positive**", 1),
        (" not positive, negative", 1),  # the one that begins first
        (" negative or positive", 0),
        ("unpositive", -1),  # only where a word begins
        ("It is clearly negative", -1),  # "negative" would end at 22 of 18 characters
        ("It was positive", 1),
        ("a really positive", 1),
        ("a really, positive", 1),
        ("a really,  positive", -1),  # whole within the first 18
        ("neutral", -1),
        ("", -1),
    ],
)
def test_read_label(generated: str, label: int) -> None:
    assert parse_label(generated, ("negative", "positive")) == label


def test_read_label_takes_the_longer_of_two_at_one_place() -> None:
    assert parse_label(" good enough", ("good", "good enough", "enough")) == 1
    assert parse_label(" good", ("good", "good enough", "enough")) == 0
    assert parse_label(" Enough good", ("good", "good enough", "enough")) == 2


def test_read_label_of_signs_numbers_and_other_alphabets() -> None:
    assert parse_label("a++", ("+", "-")) == 0
    assert parse_label("10", ("0", "1")) == -1
    assert parse_label("10", ("1", "10")) == 1
    assert parse_label("1.", ("0", "1")) == 1
    assert parse_label("Größe STRASSE", ("straße", "größe")) == 1


@pytest.mark.parametrize(
    ("generated", "labels", "label"),
    [
        ("这部电影是正面的", ("负面", "正面"), 1),
        ("この評価は否定的です", ("肯定的", "否定的"), 1),
        ("มันเป็นบวก", ("ลบ", "บวก"), 1),
        ("评分是4分", ("3", "4"), 1),
        ("答案是Positive。", ("negative", "positive"), 1),
        ("答案是unpositive。", ("negative", "positive"), -1),
        ("이것은 긍정적", ("부정", "긍정"), 1),
        ("비긍정", ("부정", "긍정"), -1),  # Korean has spaces
        ("किदरपुर", ("दर", "पुर"), -1),  # a vowel sign does not end a word
        ("cafe\u0301", ("th\u00e9", "caf\u00e9"), 1),
        ("CAF\u00c9", ("the\u0301", "cafe\u0301"), 1),
    ],
)
def test_read_label_in_any_script(generated: str, labels: tuple[str, ...], label: int) -> None:
    assert parse_label(generated, labels) == label


# Evaluation -----------------------------------------------------------------------------------------------------------

TEMPLATE = Template("custom", "it {text} so", ("bad", "good"))
One = Literal["score", "generate"]
# Several tokens read "good" or "bad", so that a random model names each of them now and then, and often neither.
TOKENIZER = words("it", "so", "bad", "good", *["bad", "good", "hm", "hm", "hm", "hm", "hm"] * 6)


def reviews(n: int = 30) -> list[Example]:
    rows = ragged([5 + 7 * i % 11 for i in range(n)])
    return [example([1, *row, 2], [3 + i % 2, EOT], i % 2, f"text {i} \x85") for i, row in enumerate(rows)]


def test_both_readings_side_by_side() -> None:
    model, examples = tiny("llama"), reviews()
    done: list[int] = []
    evaluation = evaluate(model, TOKENIZER, TEMPLATE, examples, batch_size=16, progress=done.append)
    scores = score(model, examples, [[3], [4]]).labels
    by_score = scores.argmax(1).tolist()
    by_text = predict_labels(model, TOKENIZER, examples, TEMPLATE)
    assert set(by_text) == {-1, 0, 1}
    assert set(by_score) == {0, 1}
    assert evaluation.metrics["score"].predicted == by_score
    assert evaluation.metrics["generate"].predicted == by_text
    assert done == [16, 14, 30]  # scored a batch at a time, generated several batches together

    figures = evaluation.to_json()
    keys = {"n", "accuracy", "ci_low", "ci_high", "mode", "garbage_rate", "macro_f1", "confusion", "examples_per_s"}
    assert set(figures) == keys | {"score", "generate"}
    assert set(figures["score"]) == set(figures["generate"]) == keys
    assert {key: figures[key] for key in keys} == figures["score"]
    assert figures["mode"] == "score"
    assert figures["garbage_rate"] == 0
    assert figures["generate"]["garbage_rate"] == by_text.count(-1) / 30
    assert figures["accuracy"] == sum(p == i % 2 for i, p in enumerate(by_score)) / 30
    assert figures["generate"]["accuracy"] == sum(p == i % 2 for i, p in enumerate(by_text)) / 30
    assert json.loads(json.dumps(figures)) == figures


def test_rows_come_in_the_datas_order(tmp_path: Path) -> None:
    model, examples = tiny("llama"), reviews()
    evaluation = evaluate(model, TOKENIZER, TEMPLATE, examples)
    write_predictions(tmp_path / "p.jsonl", evaluation.rows)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert rows == evaluation.rows
    scores = score(model, examples, [[3], [4]]).labels.tolist()
    for i, row in enumerate(rows):
        assert list(row) == ["text", "label", "predicted", "scores", "generated", "mode", "garbage"]
        assert (row["text"], row["label"], row["mode"]) == (f"text {i} \x85", i % 2, "score")
        assert row["scores"] == pytest.approx({"bad": scores[i][0], "good": scores[i][1]})
        assert row["predicted"] == (scores[i][1] > scores[i][0])
        assert row["garbage"] == (parse_label(row["generated"], TEMPLATE.labels) == -1)


@pytest.mark.parametrize("read", ["score", "generate"])
def test_one_reading(read: One) -> None:
    evaluation = evaluate(tiny("llama"), TOKENIZER, TEMPLATE, reviews(), mode=read)
    assert evaluation.to_json()["mode"] == read
    assert "score" not in evaluation.to_json()
    assert "generate" not in evaluation.to_json()
    own, other = ("scores", "generated") if read == "score" else ("generated", "scores")
    assert all(own in row and other not in row for row in evaluation.rows)
    assert any(row["garbage"] for row in evaluation.rows) == (read == "generate")
    assert [row["predicted"] for row in evaluation.rows] == evaluation.main.predicted


@pytest.mark.parametrize("read", ["score", "generate"])
def test_plain_texts_are_put_into_the_template(read: One) -> None:
    model = tiny("llama")
    texts = ["hm bad", "good good hm so", "it"]
    encoded = [example(TOKENIZER.encode(TEMPLATE.prompt(text))) for text in texts]
    expected = predict_labels(model, TOKENIZER, encoded, TEMPLATE, mode=read)
    assert predict_labels(model, TOKENIZER, texts, TEMPLATE, mode=read) == expected
    assert predict_labels(model, TOKENIZER, [], TEMPLATE) == []


def test_a_long_text_is_cut_to_leave_room_for_any_label(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    template = Template("custom", "it {text} so", ("bad", "good hm it"))
    fits = " ".join(["hm"] * (CONTEXT - 2 - 4))  # "it", "so", and the longest label with its end-of-text
    assert predict_labels(model, TOKENIZER, [fits + " bad" * 50], template, mode="score") in ([0], [1])
    read: list[Example] = []
    monkeypatch.setattr(module, "_predict_by_loglikelihood", lambda *args: (read.extend(args[3]), []))
    predict_labels(model, TOKENIZER, [fits + " bad" * 50], template, mode="score")
    assert list(read[0].prompt_ids) == TOKENIZER.encode(template.prompt(fits))


def test_a_cut_text_with_a_short_label_has_room_for_the_long_one() -> None:
    model, template = tiny("gpt2"), Template("custom", "it {text} so", ("bad", "good hm it so it"))
    examples, cut = encode_rows([Labelled("hm " * 99, label) for label in (0, 1)], template, TOKENIZER, CONTEXT)
    assert cut == 2 and len({e.prompt_ids for e in examples}) == 1
    first, second = evaluate(model, TOKENIZER, template, examples, mode="score").rows
    assert first["scores"] == pytest.approx(second["scores"])


def test_long_labels_get_enough_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fake(model: Any, prompts: Any, params: SamplingParams, **more: Any) -> list[list[int]]:
        asked.append(params.limit)
        return [[]]

    monkeypatch.setattr(module, "generate_ids", fake)
    long = Template("custom", "{text}", ("it so it so it so it", "good"))
    predict_labels(tiny("llama"), TOKENIZER, reviews(1), long)
    predict_labels(tiny("llama"), TOKENIZER, reviews(1), TEMPLATE)
    predict_labels(tiny("llama"), TOKENIZER, reviews(1), TEMPLATE, max_new_tokens=2)
    assert asked == [7, 5, 2]


def test_what_cannot_be_evaluated() -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match=r"^no examples to evaluate: the split is empty$"):
        evaluate(model, TOKENIZER, TEMPLATE, [])
    with pytest.raises(InputError, match=r"^a.jsonl:3: no label; accuracy needs a label in every row$"):
        evaluate(model, TOKENIZER, TEMPLATE, [example([1, 2])])
    nn.init.constant_(next(model.norm.parameters()), float("nan"))
    with pytest.raises(GraftError, match=r"^the labels' scores are NaN"):
        evaluate(model, TOKENIZER, TEMPLATE, reviews(2))
