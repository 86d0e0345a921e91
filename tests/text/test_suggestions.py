"""What the error about unknown columns suggests: flags that read the file, or that it has several labels."""

from typing import Any

import pytest

from graftlm.text.suggestions import suggestion

WORDS = ("fox", "owl", "elk", "emu", "ape", "bee")


def rows(**columns: Any) -> list[dict[str, Any]]:
    """Twelve rows; of a tuple each row has the next value, and %s is a word of its own."""
    every = []
    for n in range(12):
        values = {key: value[n % len(value)] if isinstance(value, tuple) else value for key, value in columns.items()}
        word = f"{WORDS[n % 6]} {n}"
        every.append({key: v.replace("%s", word) if isinstance(v, str) else v for key, v in values.items()})
    return every


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"v1": ("ham", "spam"), "v2": "see the %s", "v3": ""}, "map them, as in --columns text=v2,label=v1"),
        (
            {
                "id": "%s",
                "title": "The %s",
                "body": "a long tale of the %s and more",
                "star": (1, 2, 3),
                "ok": ("y", "n"),
            },
            "map them, as in --columns text=body,label=star or label=ok",
        ),
        (
            {"q1": "is it the %s", "q2": "was it the %s", "same": (0, 1)},
            "map them, as in --template 'q1: {q1} q2: {q2} same:' --columns label=same",
        ),
        (
            {"comment": "see the %s", "toxic": (0, 1), "rude": ("0", "1", "1"), "threat": 0},
            "toxic, rude, threat are 0 or 1 for each text, and a text has one label here: choose one, as in --columns "
            "text=comment,label=toxic, or write them all as a completion",
        ),
        ({"text": "see the %s", "note": "so the %s is"}, ""),
        ({"tokens": ["a", "b"], "tags": (1, 2)}, ""),
        ({"text": "%s", "label": None}, ""),
    ],
)
def test_what_is_suggested(columns: dict[str, Any], expected: str) -> None:
    assert suggestion(rows(**columns), may_map=True) == expected
    assert suggestion(rows(**columns), may_map=False) == (expected if "0 or 1" in expected else "")
