"""Templates: where the prompt ends and the completion begins, what a user may give, and the words of each error."""

import re
from pathlib import Path

import pytest

from graftlm.errors import InputError
from graftlm.text.template import BUILTIN, Template, get_sentiment_prompt, load_template


def refused(message: str):
    return pytest.raises(InputError, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize(
    ("text", "prompt", "completion"),
    [
        ("Review: {text}\nSentiment:", "Review: fine\nSentiment:", " good"),
        ("Review: {text}\nSentiment: ", "Review: fine\nSentiment:", " good"),  # its space moves to the completion
        ("Review: {text}   ", "Review: fine", " good"),  # several become one
        ("Review: {text}\nAnswer:\n", "Review: fine\nAnswer:\n", "good"),  # no space after a line break
        ("Review: {text}\n ", "Review: fine\n", " good"),
        ("{text}", "fine", " good"),
        ('{"review": "{text}", {0} {label}}: ', '{"review": "fine", {0} {label}}:', " good"),  # other braces stay
        ("{{text}} {{a b}} {text}} {{{x", "{text} {a b} fine} {{{x", " good"),
    ],
)
def test_boundary_between_prompt_and_completion(text: str, prompt: str, completion: str):
    template = load_template(text, "bad,good")
    assert (template.prompt("fine"), template.completion(1)) == (prompt, completion)
    assert template.head + "fine" + template.tail == prompt


def test_prompt_never_ends_in_a_space_and_keeps_the_text_otherwise():
    assert load_template("{text}").prompt(" a  b \x85 {text} c  ") == " a  b \x85 {text} c"
    assert load_template("<{text}>").prompt(" a ") == "< a >"


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_builtin_templates_name_the_label_words(name: str):
    template = load_template(name, "bad, good ,great")
    assert template.name == name
    assert template.labels == ("bad", "good", "great")
    assert "{labels}" not in template.text
    assert ("bad or good or great" in template.text) == (name != "plain")
    assert not template.text.endswith((" ", "\n"))


def test_sentiment_is_the_default_and_asks_before_the_text():
    template = load_template("sentiment")
    assert template.labels == ("negative", "positive")
    assert template.head.endswith("\n\nReview: ")  # all of the instruction can be shared
    assert template.tail == "\nSentiment:"


def test_template_file(tmp_path: Path):
    file = tmp_path / "mine.txt"
    file.write_bytes(b"\xef\xbb\xbfCaf\xc3\xa9: {text}\r\nAnswer:\r\n")
    template = load_template(str(file), "a,b")
    assert template == Template(str(file), "Café: {text}\nAnswer:", ("a", "b"))
    file.write_bytes(b"{text}\n\n")  # only the line break that ends the last line is dropped
    assert load_template(str(file)).completion(0) == "negative"


def test_label_number_ignores_case_and_spaces():
    template = load_template("plain", "Bad,GOOD")
    assert [template.label_number(word) for word in ("bad", " good\n", "Goo", "")] == [0, 1, None, None]


@pytest.mark.parametrize("label", [1, "positive", " Positive "])
def test_get_sentiment_prompt_with_a_label_is_the_whole_text(label: int | str):
    assert get_sentiment_prompt("great fun", label) == get_sentiment_prompt("great fun") + " positive"


def test_get_sentiment_prompt_without_label_is_the_prompt():
    assert get_sentiment_prompt("great fun") == load_template("sentiment").prompt("great fun")
    assert get_sentiment_prompt("x", 0).endswith("Review: x\nSentiment: negative")


@pytest.mark.parametrize("label", [2, -1, "", "neutral", True, 1.0])
def test_get_sentiment_prompt_refuses_other_labels(label):
    with refused(f"unknown label {label!r}: use 0 or 'negative', 1 or 'positive'"):
        get_sentiment_prompt("x", label)


def test_template_without_text_or_with_several(tmp_path: Path):
    with refused("template '{text} {text}' has {text} 2 times: write it once, where the text belongs"):
        load_template("{text} {text}")
    file = tmp_path / "t"
    file.write_text("Review: {{text}}, {label} {0}")
    with refused(f"template {str(file)!r} has no {{text}}: write it once, where the text belongs"):
        load_template(str(file))


@pytest.mark.parametrize("spec", ["sentimnt", "sentimnt\0", "sentimnt" + "/x" * 3000])
def test_unknown_template(spec: str):
    with pytest.raises(
        InputError, match=r"^unknown template 'sentimnt.*; or give a file, or a string with \{text\} in it$"
    ):
        load_template(spec)


def test_unknown_template_suggests_the_nearest():
    with refused(
        "unknown template 'sentimnt': did you mean 'sentiment'? known are sentiment, question, plain; "
        "or give a file, or a string with {text} in it"
    ):
        load_template("sentimnt")


def test_template_file_that_is_not_utf8(tmp_path: Path):
    file = tmp_path / "t"
    file.write_bytes(b"caf\xe9 {text}")
    with refused(f"template {file}:1: byte 4 is not UTF-8 (0xe9); save the file as UTF-8"):
        load_template(str(file))


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ("positive", "name two label words or more, as in negative,positive"),
        ("", "name two label words or more, as in negative,positive"),
        ("bad,,good", "an empty label word; name them as in negative,positive"),
        ("bad,good,bad", "'bad' and 'bad' are the same word; label words must differ"),
        ("Bad,bad", "'Bad' and 'bad' are the same word; label words must differ"),
    ],
)
@pytest.mark.parametrize("spec", ["sentiment", "{text}:"])
def test_label_words_that_cannot_be_told_apart(spec: str, labels: str, problem: str):
    with refused(f"--labels {labels!r}: {problem}"):
        load_template(spec, labels)


@pytest.mark.parametrize(
    ("text", "labels", "prompt", "completion"),
    [
        ("影评:{text}\n情感:", "负面,正面", "影评:x\n情感:", "正面"),
        ("{text}", "負面,正面", "x", "正面"),
        ("{text} 答案\uff1a", "A,B", "x 答案\uff1a", "B"),
        ("รีวิว: {text} คือ", "แย่,ดี", "รีวิว: x คือ", "ดี"),
        ("리뷰: {text} 감정:", "부정,긍정", "리뷰: x 감정:", " 긍정"),
        ("{text} Mood:", "👎,👍", "x Mood:", " 👍"),
        ("{text} ({label}", "no,yes", "x (", "yes"),
        ("{text}  {label}", "no,yes", "x", "  yes"),
        ("{text}:{label}", "负面,正面", "x:", "正面"),
        ("{text} {label} is", "no,yes", "x {label} is", " yes"),
    ],
)
def test_the_template_decides_what_precedes_a_label(text: str, labels: str, prompt: str, completion: str) -> None:
    template = load_template(text, labels)
    assert (template.prompt("x"), template.completion(1)) == (prompt, completion)
    assert template.prompt("x") == template.head + "x" + template.tail
