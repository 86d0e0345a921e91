"""Wilson's interval against published and independently computed values; counts against a hand-made table."""

from itertools import product

import pytest

from graftlm.inference.metrics import Metrics, confusion, macro_f1, paired_permutation_test, t_interval, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),  # Newcombe (1998), Table I, method 3 (score)
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_wilson(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_reaches_its_ends_exactly() -> None:
    assert [wilson(0, n)[0] for n in range(1, 50)] == [0.0] * 49
    assert [wilson(n, n)[1] for n in range(1, 50)] == [1.0] * 49


TRUE = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
SAID = [0, 0, 1, -1, 1, 1, 0, 2, -1, -1]


def test_confusion_has_a_column_for_garbage() -> None:
    assert confusion(TRUE, SAID, 3) == [[2, 1, 0, 1], [1, 2, 0, 0], [0, 0, 1, 2]]


def test_macro_f1() -> None:
    # 2TP / (true + said): 4 / (4 + 3), 4 / (3 + 3), 2 / (3 + 1)
    assert macro_f1(confusion(TRUE, SAID, 3)) == pytest.approx((4 / 7 + 2 / 3 + 1 / 2) / 3)
    assert macro_f1(confusion([0, 0], [0, 0], 3)) == 1.0  # two labels that nobody has or names have no F1
    assert macro_f1(confusion([0, 0], [0, 1], 2)) == pytest.approx((2 / 3 + 0) / 2)  # a false alarm has an F1, of 0
    assert macro_f1(confusion([0, 0], [1, 1], 2)) == 0.0
    assert macro_f1(confusion([0, 1], [-1, -1], 2)) == 0.0


def test_a_reading_counts_garbage_as_wrong() -> None:
    reading = Metrics.make("generate", TRUE, SAID, labels=3, seconds=2.0)
    assert reading.to_json() == {
        "n": 10,
        "accuracy": 0.5,
        "ci_low": pytest.approx(0.2366, abs=5e-5),
        "ci_high": pytest.approx(0.7634, abs=5e-5),
        "mode": "generate",
        "garbage_rate": 0.3,
        "macro_f1": pytest.approx((4 / 7 + 2 / 3 + 1 / 2) / 3),
        "confusion": [[2, 1, 0, 1], [1, 2, 0, 0], [0, 0, 1, 2]],
        "examples_per_s": 5.0,
    }


def test_the_paired_test_is_mcnemars_where_answers_are_right_or_wrong() -> None:
    # 9 better, 2 worse, 5 alike: two-sided binomial, 2 * (C(11,0) + C(11,1) + C(11,2)) / 2^11.
    differences = [1] * 9 + [-1] * 2 + [0] * 5
    assert paired_permutation_test(differences) == pytest.approx(2 * (1 + 11 + 55) / 2**11, rel=1e-12)
    assert paired_permutation_test([-d for d in differences]) == paired_permutation_test(differences)
    assert paired_permutation_test([0, 0]) == paired_permutation_test([]) == paired_permutation_test([1, -1]) == 1.0


def test_the_paired_test_counts_every_choice_of_signs() -> None:
    differences = [3, -1, 2, 2, 0, 1]
    sums = [sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in product((1, -1), repeat=6)]
    assert paired_permutation_test(differences) == pytest.approx(sum(abs(s) >= 7 for s in sums) / len(sums), rel=1e-12)


def test_the_interval_over_seeds() -> None:
    low, high = t_interval([0.8, 0.84, 0.82])
    assert (low, high) == pytest.approx((0.82 - 4.303 * 0.02 / 3**0.5, 0.82 + 4.303 * 0.02 / 3**0.5))
    assert t_interval([0.0, 1.0]) == (0.0, 1.0)
    assert t_interval([0.5] * 40) == (0.5, 0.5)
