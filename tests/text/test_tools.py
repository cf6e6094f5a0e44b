"""Tool formats: the choice by name or template, values without quotes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jaxserve.text.split import shown_special_ids
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tool_values import GemmaNotation, is_text, read_value, schema_types
from jaxserve.text.tools import REQUIRED_FORMAT, TOOL_FORMATS, choose_tool_format
from tests.text.samples import FORMS
from tests.text.test_split import split


def test_every_format_of_the_table_has_samples() -> None:
    assert sorted(form.name for form in TOOL_FORMATS) == sorted(FORMS)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ('<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>', "hermes"),
        ("<tool_call>\n<function=example>\n<parameter=a>", "qwen3_coder"), ("<tool_call>{name}<arg_key>", "glm45"),
        ('{"name": function name, "parameters": dictionary of argument name and its value}', "llama3_json"),
        ("[TOOL_CALLS]", "mistral"), ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "deepseek_v3"), ("<|tool_call_begin|>", "kimi_k2"),
        ("<|channel|>commentary to=functions.<|message|>", "openai"), ("<start_function_call>call:", "functiongemma"),
        ("<|tool_call>call:", "gemma4"), ("<|action_start|><|plugin|>", "internlm"), ("<|tool|>{{ tools }}<|/tool|>", "phi4_mini_json"),
        ("write <|tool_call|> followed by a JSON list", "granite"), ("[func_name1(params_name1=params_value1)]", "pythonic"),
        ("<|python_start|>", "llama4_pythonic"), ("calls in a single JSON array", "xlam"), ("{{ messages }}", None), (None, None),
    ],
)  # fmt: skip
def test_format_is_chosen_by_the_template(template: str | None, name: str | None) -> None:
    found = choose_tool_format("auto", template)
    assert (found.name if found else None) == name


def test_format_is_chosen_by_name() -> None:
    assert choose_tool_format("none", "[TOOL_CALLS]") is None
    found = choose_tool_format("qwen3_xml", None)
    assert found is not None
    assert found.name == "qwen3_xml"


def test_special_tokens_in_markers_are_shown(bpe: Tokenizer) -> None:
    assert shown_special_ids(bpe, ()) == frozenset()
    assert shown_special_ids(bpe, ("<tool_call>", "a<|eos|><|im_start|>b")) == frozenset({1, 2})


def test_required_calls_are_read_as_they_stream() -> None:
    text = '[{"name": "get_weather", "parameters": {"city": "a"}}, {"name": "now", "parameters": {}}]'
    for pieces in ([text], list(text)):
        assert split(pieces, REQUIRED_FORMAT) == ("", "", [("get_weather", '{"city": "a"}', None), ("now", "{}", None)])


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("5", {"type": "integer"}, 5), ("5", {"type": "string"}, "5"), ("5", {}, "5"), ("true", {"type": "boolean"}, True),
        ("True", {"type": "boolean"}, True), ("{'a': [1, None]}", {"type": "object"}, {"a": [1, None]}),
        ('{"a": 1}', {"$ref": "#/$defs/A"}, {"a": 1}), ("5", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 5),
        ("x", {"type": "integer"}, "x"), ("null", {"type": "string"}, "null"),
        ("None", {"type": ["string", "null"]}, None), ("1e999", {"type": "number"}, "1e999"),
        ("NaN", {"type": "number"}, "NaN"), ("f(x)", {"type": "object"}, "f(x)"), ("[" * 5000, {"type": "array"}, "[" * 5000),
        (" a ", {"enum": ["a", " a "]}, " a "), ("-3", {"type": ["integer", "null"]}, -3), ("(1, 2)", {"type": "array"}, [1, 2]),
        ("-" * 9000 + "1", {"type": "number"}, "-" * 9000 + "1"),
    ],
)  # fmt: skip
def test_value_without_quotes_is_read_as_its_schema_says(text: str, schema: dict[str, Any], value: Any) -> None:
    read = read_value(text, schema, unknown_is_text=True)
    assert (read, type(read)) == (value, type(value))
    json.dumps(read, allow_nan=False)


def test_schema_types_are_found_below_alternatives() -> None:
    assert schema_types({"oneOf": [{"type": "string"}, {"anyOf": [{"type": ["null", "integer"]}]}]}) == {"string", "null", "integer"}
    assert is_text({"anyOf": [{"type": "string"}, {"type": "null"}]}, unknown=False)
    assert schema_types({"anyOf": 5, "type": {"a": 1}, "enum": "x"}) == frozenset()


@pytest.mark.parametrize(
    "text", ["", "{", "{a}", "{a:", "{a:1", "{a:1 b:2;", "x{}", "{a:<q>x}", "{a:[1}", "{a:1}x", "{" + "a:{" * 100, "{a:" + "[" * 100]
)
def test_broken_notation_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        GemmaNotation(text, ("<q>",)).arguments({})


def test_notation_is_read() -> None:
    text = "{ a:<q>{x},<q> , <q>b c<q>:[1,<q>2<q>,{}], d: true ,e:no thing,f:-1.5}"
    assert GemmaNotation(text, ("<q>",)).arguments({}) == {"a": "{x},", "b c": [1, "2", {}], "d": True, "e": "no thing", "f": -1.5}
