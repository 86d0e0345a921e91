"""Pairs are what they say: sampled as `generate` samples, judged as the judge does, refused for the stated reasons."""

import json
import math
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from graftlm import cli
from graftlm.config import PairsConfig
from graftlm.config.inference import parse_logit_bias
from graftlm.errors import InputError
from graftlm.exchange.load import load
from graftlm.inference.evaluate import label_probabilities
from graftlm.inference.generate import Batching, generate_ids
from graftlm.inference.pairs import (
    SampledCompletion,
    _completion,
    classifier_reward,
    command_reward,
    make_pairs,
    make_preferences,
    resolve_label,
    sample_completions,
)
from graftlm.inference.sampling import SamplingParams
from graftlm.text.chat import Chat
from graftlm.text.collate import encode_rows
from graftlm.text.dataset import load_dataset, load_prompts
from graftlm.text.template import Template, load_template
from graftlm.text.tokenizer import Tokenizer
from inference.tiny import CONTEXT, full_logits, stopping, tiny, words
from tiny import TEMPLATE, byte_tokenizer, chat_model_folder, data_folder, model_folder

TOKENIZER = words(*[f"w{n}" for n in range(1, 48)])
SAMPLED: dict[str, Any] = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "seed": 7}
PROMPTS = ["w3 w1 w4", "w1 w5 w9 w2 w6", "w5"]


# Sampling -------------------------------------------------------------------------------------------------------------


def texts(answers: list[list[SampledCompletion]]) -> list[list[tuple[str, bool]]]:
    return [[(answer.text, answer.finished) for answer in own] for own in answers]


def test_answers_are_generates_own_rows_in_order_whatever_the_batch() -> None:
    model = tiny("llama")
    ids = [TOKENIZER.encode(prompt) for prompt in PROMPTS for _ in range(3)]
    new = generate_ids(model, ids, stopping(9, 0, **SAMPLED))
    expected = [[TOKENIZER.decode(tokens) for tokens in new[start : start + 3]] for start in (0, 3, 6)]
    for batch_size in (1, 4, 32):
        answers = sample_completions(model, TOKENIZER, PROMPTS, 3, stopping(9, 0, **SAMPLED), Batching(batch_size))
        assert [[answer.text for answer in own] for own in answers] == expected
    fewer = sample_completions(model, TOKENIZER, PROMPTS[:2], 3, SamplingParams(max_new_tokens=9, **SAMPLED))
    assert [[answer.text for answer in own] for own in fewer] == expected[:2]


def test_an_answer_ended_by_itself_is_told_from_one_that_was_cut() -> None:
    """With twice the room an answer that ended is the same, and one that was cut goes on, or ends right there."""
    model = tiny("gpt2")
    short, long = (
        [
            a
            for own in sample_completions(
                model, TOKENIZER, PROMPTS, 40, SamplingParams(max_new_tokens=m, temperature=3.0)
            )
            for a in own
        ]
        for m in (8, 16)
    )
    for a, b in zip(short, long, strict=True):
        assert b.text.startswith(a.text)
        assert b == a if a.finished else (len(a.text.split()) == 8 and (len(b.text) > len(a.text) or b.finished))
    assert 5 < sum(a.finished for a in short) < sum(b.finished for b in long) < 120


def test_the_contexts_end_cuts_an_answer_too() -> None:
    prompt = " ".join(["w3"] * (CONTEXT - 2))
    ((answer,),) = sample_completions(
        tiny("gpt2"), TOKENIZER, [prompt], 1, SamplingParams(max_new_tokens=9, temperature=1.0)
    )
    assert len(answer.text.split()) == 2 and not answer.finished


def test_a_character_that_was_cut_in_two_is_dropped_and_other_spellings_are_told(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids, prompt = tokenizer.encode(" café"), ("A", tokenizer.encode_prompt("A"))
    assert _completion(tokenizer, prompt, ids, limit=len(ids)) == SampledCompletion(" café", False, True)
    assert _completion(tokenizer, prompt, ids[:-1], limit=len(ids) - 1) == SampledCompletion(" caf", False, True)
    assert _completion(tokenizer, prompt, ids[:-1], limit=99) == SampledCompletion(
        " caf\ufffd", True, False
    )  # it did end in half of one
    assert _completion(tokenizer, prompt, [*ids[-1:], *ids], limit=99).roundtrips is False


# Judging --------------------------------------------------------------------------------------------------------------


def test_a_classifiers_reward_is_its_probability_of_the_label_behind_prompt_and_answer() -> None:
    model, template = tiny("llama"), Template("custom", "w9 {text} w2", ("w7", "w8 w4", "w11"))
    pairs = [("w3 w1", " w4 w4"), ("w5", " w6"), ("w1 w2 w3 w4", " w5")]
    done: list[int] = []
    for want, label in (("", 2), ("w7", 0), ("1", 1)):
        rewards = classifier_reward(model, TOKENIZER, template, want, batch_size=2)(pairs, done.append)
        for (prompt, answer), reward in zip(pairs, rewards, strict=True):
            ids = TOKENIZER.encode(f"w9 {prompt}{answer} w2")
            logps = [full_logits(model, ids + tail)[len(ids) - 1 :].log_softmax(-1) for tail in ([], [8], [])]
            scores = torch.stack([logps[0][0, 7], logps[1][0, 8] + logps[1][1, 4], logps[2][0, 11]])
            assert reward == pytest.approx(float(scores.softmax(0)[label]), rel=1e-9)
    assert done == [2, 1] * 3
    probabilities = label_probabilities(model, TOKENIZER, template, [prompt + answer for prompt, answer in pairs])
    assert [sum(row) for row in probabilities] == pytest.approx([1.0] * 3)
    assert label_probabilities(model, TOKENIZER, template, []) == []


def test_the_wanted_label_by_word_and_by_number() -> None:
    template = Template("custom", "{text}", ("bad", "2", "good"))
    assert [resolve_label(template, want) for want in ("", "BAD", "good", "2")] == [2, 0, 2, 1]
    for want in ("3", "0"):  # 2 is the word of label 1, so that numbers have two readings, as in data
        with pytest.raises(InputError, match=rf"^unknown --target_label '{want}': known are bad, 2, good$"):
            resolve_label(template, want)
    assert resolve_label(replace(template, labels=("bad", "so-so", "good")), "1") == 1


def program(tmp_path: Path, body: str) -> str:
    file = tmp_path / "my judge.py"
    file.write_text(f"import json, sys\nrows = [json.loads(line) for line in sys.stdin.buffer]\n{body}\n")
    return f"{sys.executable} {shlex.quote(str(file))}"


def test_a_command_reads_rows_and_prints_numbers(tmp_path: Path) -> None:
    pairs = [("a", " b\u0085c"), ("café", "\n"), ("d", ' "quoted"')]
    judge = command_reward(program(tmp_path, "for row in rows: print(len(row['prompt']) + len(row['answer']) / 100)"))
    done: list[int] = []
    assert judge(pairs, done.append) == [1.04, 4.01, 1.09]
    assert done == [3]


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("print(1)", "printed 1 lines for 2 answers: print one number per line"),
        ("print(1, 2)\nprint()\nprint(3)", "printed 3 lines for 2 answers: print one number per line"),
        ("print(1)\nprint('good')", "line 2 is 'good', not a finite number"),
        ("print('inf')\nprint(1)", "line 1 is 'inf', not a finite number"),
        ("print(1)\nprint()", "line 2 is '', not a finite number"),
        ("print(1)\nprint(2)\nsys.exit('no model\\nno luck')", "ended with status 1: no luck"),
        ("sys.exit(3)", "ended with status 3"),
    ],
)
def test_a_command_that_judges_wrongly(body: str, line: str, tmp_path: Path) -> None:
    words = program(tmp_path, body)
    with pytest.raises(InputError) as error:
        command_reward(words)([("a", "b"), ("c", "d")], lambda done: None)
    assert str(error.value) == f"--reward_command {words}: {line}"


def test_a_command_that_leaves_without_reading_is_judged_by_what_it_printed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="printed 0 lines for 5000 answers"):
        command_reward("true")([("a" * 50, "b")] * 5000, lambda done: None)


# Pairs ----------------------------------------------------------------------------------------------------------------


def answers(*given: str) -> list[SampledCompletion]:
    """Answers by their text; one that ends in "…" was cut, one that begins with "~" is spelled otherwise."""
    return [SampledCompletion(text.strip("~…"), not text.endswith("…"), not text.startswith("~")) for text in given]


def pairs_of(given: list[SampledCompletion], rewards: list[float], **more: Any) -> tuple[Any, list[int]]:
    rows, counts = make_pairs(["p"], [given], [rewards], **more)
    assert list(counts) == ["ties", "duplicates", "empty", "truncated", "retokenized"]
    return [(row["chosen"], row["rejected"]) for row in rows], list(counts.values())


def test_the_best_against_the_worst_and_each_against_each() -> None:
    given = answers(" a", " b", "~ c", " d")
    assert pairs_of(given, [0.5, 0.1, 0.9, 0.5]) == ([(" c", " b")], [0, 0, 0, 0, 1])
    every = [(" c", " a"), (" c", " d"), (" c", " b"), (" a", " b"), (" d", " b")]
    assert pairs_of(given, [0.5, 0.1, 0.9, 0.5], pairing="all") == (every, [1, 0, 0, 0, 3])
    assert pairs_of(given, [0.9, 0.1, 0.9, 0.1]) == ([(" a", " d")], [0, 0, 0, 0, 0])


def test_a_row_says_all_there_is_to_say() -> None:
    made, _ = make_pairs(["p", "q"], [answers(" a", " b…"), answers(" c", " d")], [[2, 5], [1, 0]])
    keys = ("prompt", "chosen", "rejected", "reward_chosen", "reward_rejected", "finished")
    rows = [("p", " b", " a", 5, 2, [False, True]), ("q", " c", " d", 1, 0, [True, True])]
    assert made == [dict(zip(keys, row, strict=True)) for row in rows]


def test_ties_and_margins() -> None:
    given = answers(" a", " b")
    assert pairs_of(given, [0.5, 0.5]) == ([], [1, 0, 0, 0, 0])
    assert pairs_of(given, [0.5, 0.75], min_margin=0.25) == ([(" b", " a")], [0, 0, 0, 0, 0])
    assert pairs_of(given, [0.5, 0.75], min_margin=0.26) == ([], [1, 0, 0, 0, 0])


def test_duplicates_and_empty_answers_are_refused_and_counted() -> None:
    assert pairs_of(answers(" a", " a"), [0.5, 0.5]) == ([], [0, 1, 0, 0, 0])
    assert pairs_of(answers(" a", " a", " b"), [0.5, 0.5, 0.7]) == ([(" b", " a")], [0, 1, 0, 0, 0])
    assert pairs_of(answers(" a", " \n"), [0.5, math.nan]) == ([], [0, 0, 1, 0, 0])
    assert pairs_of(answers(" a…", " b…", " c…"), [0.5, 0.1, 0.9]) == ([(" c", " b")], [0, 0, 0, 2, 0])


# The verb -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a tiny classifier's run, prompts and texts."""
    folder = tmp_path_factory.mktemp("pairs")
    model_folder(folder / "model", seed=3)
    data_folder(folder / "data")
    rows = [{"prompt": f"{word} film "} for word in ("a good", "a bad", "one", "a good", "this", "that", "no")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"init_from": folder / "model", "data": folder / "data", "out_dir": folder / "judge", "template": TEMPLATE}
    more = ["--rank=4", "--max_iters=2", "--batch_size=4", "--dtype=float32", "--device=cpu"]
    assert cli.run(["train", *(f"--{name}={value}" for name, value in flags.items()), *more, "--json"]) == 0
    return folder


@pytest.fixture(autouse=True)
def leave_the_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graftlm.cli.main.tune_malloc_retain", lambda: False)


def config(place: Path, out: Path, **more: Any) -> PairsConfig:
    given = {
        "init_from": str(place / "model"),
        "prompts": str(place / "prompts.jsonl"),
        "reward_model": str(place / "judge"),
        "dtype": "float32",
        "max_new_tokens": 20,
        "out": str(out),
    }
    return PairsConfig(**{**given, **more})


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_holds_what_the_model_wrote_and_the_judge_thought(place: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    result = make_preferences(config(place, tmp_path / "a" / "pairs.jsonl", num_samples=3, seed=5), notes.append)
    rows = read(tmp_path / "a" / "pairs.jsonl")
    assert notes == ["1 of 7 prompts are equal to another and left out"]
    assert (result["prompts"], result["answers"], result["pairs"]) == (6, 18, len(rows)) and len(rows) == 6
    base = load(str(place / "model"), dtype="float32")
    prompts = ["a good film", "a bad film", "one film", "this film", "that film", "no film"]
    sampled = sample_completions(
        base.model, base.tokenizer, prompts, 3, SamplingParams(max_new_tokens=20, temperature=1.0, seed=5)
    )
    judge = load("resume", str(place / "judge"), dtype="float32")
    assert judge.template is not None
    rewards = [
        [row[1] for row in label_probabilities(judge.model, judge.tokenizer, judge.template, [p + a.text for a in own])]
        for p, own in zip(prompts, sampled, strict=True)
    ]
    for row, prompt, own, values in zip(rows, prompts, sampled, rewards, strict=True):
        best, worst = values.index(max(values)), values.index(min(values))
        assert row["prompt"] == prompt
        assert (row["chosen"], row["rejected"]) == (own[best].text, own[worst].text)
        assert (row["reward_chosen"], row["reward_rejected"]) == pytest.approx((values[best], values[worst]), abs=1e-6)
        assert row["finished"] == [own[best].finished, own[worst].finished]
    assert result["mean_reward"] == pytest.approx(sum(map(sum, rewards)) / 18, abs=1e-6)
    assert result["truncated"] == sum(row["finished"].count(False) for row in rows) > 0


def test_the_same_file_whatever_the_batch_and_another_for_another_seed(place: Path, tmp_path: Path) -> None:
    for name, more in {"a": {}, "b": {"batch_size": 2}, "c": {"seed": 1}}.items():
        make_preferences(config(place, tmp_path / f"{name}.jsonl", **more))
    a, b, c = (read(tmp_path / f"{name}.jsonl") for name in "abc")
    strings = ("prompt", "chosen", "rejected", "finished")
    assert [[row[key] for key in strings] for row in a] == [[row[key] for key in strings] for row in b]
    assert [row["chosen"] for row in a] != [row["chosen"] for row in c]


def test_through_the_command_with_a_program_as_judge(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = program(tmp_path, "for row in rows: print(len(row['answer']))")
    given = [
        f"--init_from={place / 'model'}",
        f"--prompts={place / 'data'}",
        "--prompt_words=1",
        "--limit=3",
        "--num_samples=4",
    ]
    more = ["--max_new_tokens=60", "--temperature=2", "--dtype=float32", f"--reward_command={judge}"]
    out = tmp_path / "pairs.jsonl"
    capsys.readouterr()
    assert cli.run(["pairs", *given, *more, f"--out={out}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    keys = ["pairs", "prompts", "answers", "ties", "duplicates", "empty", "truncated", "retokenized", "mean_reward"]
    assert list(result) == [*keys[:-1], "unfinished", "chat", "mean_reward", "seconds", "out"]
    rows = read(out)
    assert result["pairs"] == len(rows) > 0 and result["out"] == str(out) and result["answers"] == 12
    for row in rows:
        assert row["prompt"] in ("bad", "dull", "weak", "good", "fun", "fine")
        assert row["reward_chosen"] == len(row["chosen"]) > len(row["rejected"]) == row["reward_rejected"]
    assert cli.run(["pairs", *given, *more, f"--out={tmp_path / 'again.jsonl'}"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"pairs        {len(rows)} from 12 completions of 3 prompts\nnot paired   ")
    assert f"{result['ties']} ties, {result['duplicates']} duplicates, {result['empty']} empty\n" in shown
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()


LETTERS = "0=3," + ",".join(f"{token}=-100" for token in range(95, 257))
"""A --logit_bias for `byte_tokenizer`: printable ASCII only, and end-of-text early."""
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_in_chat_a_pair_is_messages_that_training_tokenises_as_they_were_sampled(place: Path, tmp_path: Path) -> None:
    chat_model_folder(tmp_path / "tuned", CHAT)
    more = {"init_from": str(tmp_path / "tuned"), "num_samples": 8, "logit_bias": LETTERS, "seed": 2}
    notes: list[str] = []
    out = tmp_path / "pairs.jsonl"
    result = make_preferences(config(place, out, **more), notes.append)
    assert any("--chat auto); --chat off" in note for note in notes)
    base, rows = load(str(tmp_path / "tuned"), dtype="float32"), read(out)
    chat = Chat(base.tokenizer)
    prompts = ["a good film ", "a bad film ", "one film ", "this film ", "that film ", "no film "]
    params = SamplingParams(max_new_tokens=20, temperature=1.0, logit_bias=parse_logit_bias(LETTERS), seed=2)
    sampled = sample_completions(base.model, base.tokenizer, prompts, 8, params, chat=chat)
    new = generate_ids(
        base.model,
        [chat.encode([("user", prompt)]) for prompt in prompts for _ in range(8)],
        replace(params, stop_token_ids=chat.stop_tokens),
    )
    assert [one.text for own in sampled for one in own] == [base.tokenizer.decode(tokens) for tokens in new]
    finished = [[one.text for one in own if one.finished] for own in sampled]
    assert result["chat"] and result["unfinished"] == 48 - sum(map(len, finished)) > 0 == result["truncated"]
    assert len(rows) == result["pairs"] > 2
    for row in rows:
        (asked,), answers = row["prompt"], [*row["chosen"], *row["rejected"]]
        assert asked["role"] == "user" and {answer["role"] for answer in answers} == {"assistant"}
        assert {answer["content"] for answer in answers} <= set(finished[prompts.index(asked["content"])])
    judge = load("resume", str(place / "judge"), dtype="float32")
    assert judge.template is not None
    texts = [f"{row['prompt'][0]['content']}\n{row['chosen'][0]['content']}" for row in rows]
    probabilities = label_probabilities(judge.model, judge.tokenizer, judge.template, texts)
    assert [row["reward_chosen"] for row in rows] == pytest.approx([p[1] for p in probabilities], abs=1e-6)
    records = load_dataset("", "", str(out)).splits["test"]
    examples, _ = encode_rows(records, load_template("sentiment"), base.tokenizer, CONTEXT)
    by_prompt = dict(zip(prompts, zip(*[iter(new)] * 8, strict=True), strict=True))
    for row, example in zip(rows, examples, strict=True):
        own = [[*tokens, chat.turn_end] for tokens in by_prompt[row["prompt"][0]["content"]]]
        assert list(example.completion_ids) in own and list(example.rejected_ids) in own
    assert result["retokenized"] == 0


def test_in_chat_an_answer_ends_at_the_end_of_a_turn(tmp_path: Path) -> None:
    """Which need not be the end of a text."""
    end = 34

    class Turns(Chat):
        @property
        def stop_tokens(self) -> frozenset[int]:
            return super().stop_tokens | {end}

    chat_model_folder(tmp_path / "tuned", CHAT)
    base = load(str(tmp_path / "tuned"), dtype="float32")
    params = SamplingParams(max_new_tokens=20, temperature=1.0, logit_bias={end: 3.0, 0: -100.0}, seed=2)
    (own,) = sample_completions(base.model, base.tokenizer, ["a film "], 8, params, chat=Turns(base.tokenizer))
    assert any(one.finished for one in own)
    assert not any(base.tokenizer.decode([end]) in one.text for one in own)


def test_auto_is_off_for_the_beginnings_of_texts_and_a_template_is_needed(place: Path, tmp_path: Path) -> None:
    chat_model_folder(tmp_path / "tuned", CHAT)
    more = {"init_from": str(tmp_path / "tuned"), "logit_bias": "0=3"}
    texts = {**more, "prompts": str(place / "data"), "prompt_words": 1, "limit": 4}
    for name, flags in {"words": texts, "off": {**more, "chat": "off"}}.items():
        assert not make_preferences(config(place, tmp_path / f"{name}.jsonl", **flags))["chat"]
        assert all(isinstance(row["prompt"], str) for row in read(tmp_path / f"{name}.jsonl"))
    assert make_preferences(config(place, tmp_path / "on.jsonl", **texts, chat="on", num_samples=6))["chat"]
    with pytest.raises(InputError, match=r"--chat on: .* has no chat template; use --chat off"):
        make_preferences(config(place, tmp_path / "none.jsonl", chat="on"))


# Prompts --------------------------------------------------------------------------------------------------------------


def test_prompts_are_taken_as_they_are_or_from_the_texts_first_words(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(
        '{"prompt": " Tell me: ", "text": "  One two\\tthree  four ", "n": 1}\n{"prompt": "b", "text": "c"}\n'
    )
    rows, notes = load_prompts(str(file))
    assert [row.text for row in rows] == [" Tell me: ", "b"]
    assert [row.source for row in rows] == [f"{file}:1", f"{file}:2"]
    assert notes == [f"{file}: columns not read: n, text"]
    assert load_prompts(str(file), opening=2)[1] == [f"{file}: columns not read: n, prompt"]
    for opening, first in ((1, "One"), (3, "One two\tthree"), (9, "One two\tthree  four")):
        assert [row.text for row in load_prompts(str(file), opening=opening)[0]] == [first, "c"]
    assert [row.text for row in load_prompts(str(file), opening=2, columns={"text": "prompt"})[0]] == ["Tell me:", "b"]


def test_prompts_of_a_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"prompt": split}) + "\n")
    (tmp_path / "more.jsonl").write_text("")
    rows, notes = load_prompts(str(tmp_path), "test")
    assert [row.text for row in rows] == ["test"] and notes == [f"{tmp_path}: not read: more.jsonl"]
    with pytest.raises(InputError, match=r"^--split validation: .* has no such split; it has train, test"):
        load_prompts(str(tmp_path), "validation")
