"""The form of a call as templates write it, and calls in answers that come in pieces."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from graftlm.errors import InputError
from graftlm.text.chat import Chat
from graftlm.text.tokenizer import Tokenizer
from graftlm.text.tool_calls import Call, CallFormat, CallStream, ToolSupport
from tiny import byte_tokenizer

TOOLS = "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}CALLS<|end|>{% endfor %}"
ASK = "{% if add_generation_prompt %}<assistant>{% endif %}"
HERMES = (
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ {'name': c.function.name, 'arguments': c.function.arguments} "
    "| tojson }}\n</tool_call>{% endfor %}"
)
LLAMA = (
    "{% for c in m.tool_calls or [] %}"
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}'
)
MISTRAL = (
    "{% if m.tool_calls %}<|calls|>[{% for c in m.tool_calls %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}{% endfor %}]{% endif %}"
)
THINKS = "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
HARMONY = "{% for c in m.tool_calls or [] %}to={{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"


def support(folder: Path, template: str) -> ToolSupport:
    byte_tokenizer(folder, "<|end|>", "<|calls|>")
    (folder / "chat_template.jinja").write_text(template)
    return ToolSupport.of(Chat(Tokenizer.from_folder(folder)))


def template(calls: str) -> str:
    return TOOLS + TURNS.replace("CALLS", calls) + ASK


def test_the_form_of_a_call_is_what_the_template_writes(tmp_path: Path) -> None:
    hermes = CallFormat("name", "arguments", "<tool_call>\n", "\n</tool_call>")
    assert support(tmp_path, template(HERMES)) == ToolSupport(True, True, True, hermes)
    thinking = template(HERMES).replace("{{ m.content }}", THINKS + "{{ m.content }}")
    assert support(tmp_path, thinking).format == hermes
    assert support(tmp_path, template(LLAMA)).format == CallFormat("name", "parameters")
    assert support(tmp_path, template(MISTRAL)).format == CallFormat("name", "arguments", "[", "]")
    assert support(tmp_path, template(HARMONY)) == ToolSupport(True, True, True, None)
    assert support(tmp_path, TURNS.replace("CALLS", "") + ASK) == ToolSupport(False, False, True, None)
    only_users = "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    assert support(tmp_path, template(only_users)) == ToolSupport(False, False, False, None)


def read(format: CallFormat, pieces: list[str], **settings: Any) -> tuple[str, list[Call]]:
    stream = CallStream(format, ("weather", "time"), **settings)
    text = "".join(map(stream.add, pieces))
    rest, calls = stream.finish()
    return text + rest, calls


OSLO: Call = ("weather", {"city": "Oslo"})
HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TWO = HERMES_CALL + '\n<tool_call>{"arguments": {}, "name": "time"}</tool_call>\n'
CASES: list[tuple[str, str, tuple[str, list[Call]]]] = [
    ("hermes", "It is fine.", ("It is fine.", [])),
    ("hermes", "a < b <tool", ("a < b <tool", [])),
    ("hermes", HERMES_CALL, ("", [OSLO])),
    ("hermes", f"I look.\n{TWO}", ("I look.\n", [OSLO, ("time", {})])),
    ("hermes", HERMES_CALL.removesuffix("\n</tool_call>"), ("", [OSLO])),
    ("hermes", HERMES_CALL[:-20], (HERMES_CALL[:-20], [])),
    ("hermes", HERMES_CALL.replace("weather", "wether"), (HERMES_CALL.replace("weather", "wether"), [])),
    ("llama", '{"name": "weather", "parameters": {"city": "Oslo"}}', ("", [OSLO])),
    ("llama", '{"city": "Oslo"}', ('{"city": "Oslo"}', [])),
    ("llama", 'See {"name": "time", "parameters": {}}', ('See {"name": "time", "parameters": {}}', [])),
    ("mistral", '[{"name": "weather", "arguments": {"city": "Oslo"}, "id": "1"}]', ("", [OSLO])),
    ("mistral", '[{"name": "time", "arguments": {}}, {"name": "time", "arguments": {}}]', ("", [("time", {})] * 2)),
]


@pytest.mark.parametrize(("form", "answer", "expected"), CASES)
def test_calls_are_found_however_the_answer_comes(
    form: str, answer: str, expected: tuple[str, list[Call]], tmp_path: Path
) -> None:
    found = support(tmp_path, template({"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL}[form])).format
    assert found is not None
    for size in (1, 2, 7, 1000):
        pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
        assert read(found, pieces) == expected


def test_text_before_a_call_is_not_held_back() -> None:
    stream = CallStream(CallFormat(before="<tool_call>\n", after="\n</tool_call>"), ("weather",))
    assert stream.add("Let me see <") == "Let me see " and stream.add("b") == "<b" and stream.add(HERMES_CALL) == ""
    assert stream.finish() == ("", [OSLO])


def test_a_forced_call_is_the_json_alone() -> None:
    format = CallFormat(before="<tool_call>\n", after="\n</tool_call>")
    text = json.dumps({"name": "weather", "arguments": {"city": "Oslo"}})
    assert read(format, [text[:9], text[9:]], forced=True) == ("", [OSLO])
    assert read(format, [text[:20]], forced=True) == (text[:20], [])


def test_the_schema_of_a_call_keeps_references_and_allows_these_functions_alone() -> None:
    city: dict[str, Any] = {
        "properties": {"city": {"$ref": "#/$defs/c"}},
        "required": ["city"],
        "$defs": {"c": {"type": "string"}},
    }
    schema = CallFormat().schema([{"name": "weather", "parameters": city}, {"name": "time"}])
    value: dict[str, Any]
    for value in ({"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "time", "arguments": {}}):
        jsonschema.validate(value, schema)
    for value in ({"name": "weather", "arguments": {"city": 5}}, {"name": "no", "arguments": {}}, {"name": "time"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(value, schema)
    other: dict[str, Any] = {"name": "b", "parameters": {"$defs": {"c": {"type": "integer"}}}}
    with pytest.raises(InputError, match="two functions define 'c' differently"):
        CallFormat().schema([{"name": "a", "parameters": city}, other])
