"""Fields by name: in `--prompt`, `--completion`, `--template`, `--columns` and `--messages`, also nested ones."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from graftlm.config import TrainConfig
from graftlm.errors import InputError
from graftlm.text.dataset import Dataset, load_dataset, load_prompts
from graftlm.text.fields import FieldText, with_one_field
from graftlm.text.records import Completion, Conversation, Labelled, Preference, Unpaired
from graftlm.text.template import Template, load_template, read_columns

ASKED = {"prompt": "{instruction}\n{input}", "completion": "{output}"}
ROW = {"instruction": "Add.", "input": "1, 2", "output": "3"}
SQUAD = {"question": "Who?", "context": "Ann ran.", "answers": {"text": ["Ann", "She"], "answer_start": [0, 0]}}
SAYS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def read(folder: Path, rows: list[dict[str, Any]], bad_rows: Any = "stop", **flags: str) -> Dataset:
    path = folder / "validation.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = load_template(flags.get("template", "sentiment"), "no,yes")
    columns = read_columns(TrainConfig(**flags), template)
    return load_dataset("", str(path), columns=columns, labels=template.labels, bad_rows=bad_rows)


def first(data: Dataset) -> Any:
    return data.splits["validation"][0]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{a}", "<a>"),
        ("{{a}} {{{a}}} {{{{a}}}}", "{a} {<a>} {{a}}"),
        ("{a}} {{a} {b.c.0}}", "<a>} {<a> <b.c.0>}"),
        ('{"a": "{Review Text}", {} {0} { a } {a:b}', '{"a": "<Review Text>", {} {0} { a } {a:b}'),
        ("{größe}{my-name}{x_1}", "<größe><my-name><x_1>"),
        ("no field", "no field"),
    ],
)
def test_names_in_braces_are_fields_and_other_braces_are_text(text: str, shown: str) -> None:
    assert FieldText.parse(text).fill(lambda name: f"<{name}>") == shown


def test_a_prompt_and_a_completion_are_made_of_fields(tmp_path: Path) -> None:
    data = read(
        tmp_path,
        [ROW | {"system": "Be kind.", "id": 4}],
        prompt="{system} {{x}} {instruction}\n",
        completion=" {output}",
    )
    assert first(data) == Completion("Be kind. {x} Add.\n", " 3", first(data).source)
    assert data.notes[-1].endswith(
        "read as completion (prompt, completion); prompt from system, instruction; completion from output; columns not "
        "read: id, input"
    )


def test_numbers_and_booleans_are_written_as_in_json(tmp_path: Path) -> None:
    data = read(tmp_path, [{"q": 4, "a": True, "b": 0.5}], prompt="{q}?", completion="{a} {b}")
    assert first(data).completion == "true 0.5"


def test_nested_fields(tmp_path: Path) -> None:
    data = read(tmp_path, [SQUAD], prompt="{context}\n{question}", completion="{answers.text.0}")
    assert (first(data).prompt, first(data).completion) == ("Ann ran.\nWho?", "Ann")
    assert first(read(tmp_path, [SQUAD], columns="prompt=question,completion=answers.text.1")).completion == "She"
    assert first(read(tmp_path, [{"a.b": "x", "a": {"b": "y"}}], columns="prompt=a.b,completion=a.b")).prompt == "x"
    turns = first(read(tmp_path, [{"data": {"turns": SAYS}}], messages="data.turns"))
    assert isinstance(turns, Conversation) and turns.messages == (("user", "Hi"), ("assistant", "Ho"))
    prompts, _ = load_prompts(str(tmp_path / "validation.jsonl"), columns={"prompt": "data.turns.0.content"})
    assert [row.text for row in prompts] == ["Hi"]


@pytest.mark.parametrize(
    ("row", "flags", "kind"),
    [
        (ROW | {"label": True}, ASKED, Unpaired),
        ({"talk": SAYS, "system": "Be kind."}, {"messages": "talk"}, Conversation),
        ({"q": "a", "good": "b", "bad": "c"}, {"columns": "prompt=q,chosen=good,rejected=bad"}, Preference),
    ],
)
def test_fields_are_read_before_layouts_are_recognised(row: Any, flags: Any, kind: type, tmp_path: Path) -> None:
    assert isinstance(first(read(tmp_path, [row], **flags)), kind)


def test_a_template_of_several_fields_classifies_texts(tmp_path: Path) -> None:
    spec = "Claim: {claim}\nText: {text}\nDoes it hold?"
    template = load_template(spec, "no,yes")
    data = read(tmp_path, [{"claim": "A", "text": "B", "label": 1, "id": 3}], template=spec)
    assert first(data) == Labelled("A\nText: B", 1, first(data).source)
    assert template.prompt(first(data).text) == "Claim: A\nText: B\nDoes it hold?"
    assert (template.head, template.tail) == ("Claim: ", "\nDoes it hold?")
    assert Template.of_run({"template": template.to_json()}) == template


def test_templates_of_old_runs_have_one_field() -> None:
    old = "{name} {{text}} {{a}}} {x: {text}} {text"
    assert FieldText.parse(with_one_field(old, "text")).fill(str.upper) == old.replace("{text}", "TEXT")
    recorded = {"name": "custom", "text": "{name}: {text}", "labels": ["no", "yes"]}
    assert Template.of_run({"template": recorded}).prompt("fine") == "{name}: fine"


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        (
            ROW,
            {**ASKED, "prompt": "{instrction}"},
            "no field 'instrction': did you mean 'instruction'? the fields are "
            "instruction, input, output; --prompt names it",
        ),
        (
            SQUAD,
            {"prompt": "{question}", "completion": "{answers.txt}"},
            "no field 'answers.txt': did you mean "
            "'answers.text'? answers has text, answer_start; --completion names it",
        ),
        (
            SQUAD,
            {"columns": "prompt=question,completion=answers.text.x"},
            "no field 'answers.text.x': answers.text is "
            "a list: number its items, as in answers.text.0; --columns completion names it",
        ),
        (
            SQUAD,
            {"messages": "context.a"},
            "no field 'context.a': context has no fields in it; --columns messages names it",
        ),
        (
            ROW,
            {"messages": "talks"},
            "no column 'talks': the columns are instruction, input, output; name it with --columns messages=COLUMN",
        ),
    ],
)
def test_a_wrong_name_is_one_line(row: Any, flags: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"validation.jsonl: {re.escape(message)}$"):
        read(tmp_path, [row], "skip", **flags)


def test_rows_without_a_field_are_bad_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        ROW,
        ROW | {"input": ""},  # as in Alpaca
        ROW | {"input": None},
        {"instruction": "a", "output": "b"},
        ROW | {"output": ["a"]},
        ROW | {"output": {"a": 1}},
        ROW | {"output": " "},
    ]
    data = read(tmp_path, rows, "skip", **ASKED)
    assert [row.text for row in data.splits["validation"] if isinstance(row, Completion)] == ["Add.\n1, 2", "Add.\n"]
    reasons = "1 empty input, 1 no field 'input', 1 output is a list, 1 output is an object, 1 empty completion"
    assert data.notes[0].endswith(f": 5 of 7 rows left out (--bad_rows skip): {reasons}")
    with pytest.raises(
        InputError, match=r"validation.jsonl:3: empty input: .*; --prompt names it \(5 of 7 rows are bad"
    ):
        read(tmp_path, rows, **ASKED)
    with pytest.raises(
        InputError, match=r"jsonl:2: no answers.text.0: answers.text has 0 items; --completion names it"
    ):
        read(tmp_path, [SQUAD, SQUAD | {"answers": {"text": []}}], prompt="{question}", completion="{answers.text.0}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"prompt": "{a}"}, "--prompt '{a}': needs --completion, as in --completion '{answer}'"),
        ({"completion": "{a}"}, "--completion '{a}': needs --prompt, as in --prompt '{question}'"),
        (
            ASKED | {"messages": "m"},
            "--messages m: messages hold prompts and answers: leave --prompt and --completion out",
        ),
        (ASKED | {"completion": "yes"}, "--completion 'yes': names no field: write one in braces, as in {output}"),
        (
            ASKED | {"columns": "prompt=a"},
            "--columns prompt=a: --prompt names the prompt's fields already: leave one out",
        ),
        (
            {"template": "{a}: {b}", "columns": "text=a"},
            "--columns text=a: --template names the text's fields already: leave one out",
        ),
        (
            {"template": "{a}: {b} {a}"},
            "template '{a}: {b} {a}' has {a} 2 times: write it once, where the text belongs",
        ),
    ],
)
def test_flags_that_contradict_each_other(flags: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        read_columns(TrainConfig(**flags), load_template(flags.get("template", "sentiment")))
