"""How response_format and structured_outputs become one constraint, and what of them is refused."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from jaxserve.request import StructuredOutputs
from tests.api.conftest import Client, error_of

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def compiled(client: Client, **body: Any) -> list[StructuredOutputs]:
    for ask in (client.chat, client.complete):
        response: httpx.Response = ask(**body)
        assert response.status_code == 200, response.text
    found = client.engine.served.grammars.compiled
    assert found[0::2] == found[1::2], "chat and completions read them alike"
    return found[0::2]


@pytest.mark.parametrize(
    ("body", "spec"),
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True, "source": "response_format"}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
            {"json": SCHEMA, "source": "response_format"},
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
         {"json": SCHEMA, "source": "response_format"}),
        (
            {"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}},
            {"structural_tag": {"type": "structural_tag", "format": {"type": "any_text"}}, "source": "response_format"},
        ),
        ({"structured_outputs": {"json": SCHEMA}}, {"json": SCHEMA}),
        ({"structured_outputs": {"json": '{"type":"string"}', "disable_any_whitespace": True}},
         {"json": '{"type":"string"}', "disable_any_whitespace": True}),
        ({"structured_outputs": {"regex": "a+", "json": None}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, {"grammar": 'root ::= "a"'}),
        ({"structured_outputs": {"json_object": True}, "response_format": {"type": "text"}}, {"json_object": True}),
        ({"structured_outputs": {"structural_tag": "{}"}}, {"structural_tag": "{}"}),
        ({"structured_outputs": {"json": {}, "whitespace_pattern": " "}}, {"json": {}, "whitespace_pattern": " "}),
    ],
)  # fmt: skip
def test_constraint_is_read_and_compiled(client: Client, body: dict[str, Any], spec: dict[str, Any]) -> None:
    assert compiled(client, **body) == [StructuredOutputs(**spec)]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": None}},
    ],
)
def test_nothing_is_compiled_when_nothing_is_asked_for(client: Client, body: dict[str, Any]) -> None:
    assert compiled(client, **body) == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": []}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": "{}"}}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": "yes"}}},
            "response_format.json_schema.strict",
        ),
        ({"structured_outputs": []}, "structured_outputs"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": "ab"}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json_object": "yes"}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"structural_tag": [1]}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "backend": "outlines"}}, "structured_outputs"),
        ({"structured_outputs": {"disable_any_whitespace": True}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"guided_json": SCHEMA}, "guided_json"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"regex": "a"}, "regex"),
    ],
)
def test_mistake_is_refused_by_name(client: Client, body: dict[str, Any], param: str) -> None:
    for ask in (client.chat, client.complete):
        response = ask(**body)
        assert response.status_code == 400
        assert error_of(response)["param"] == param
    assert not client.engine.submitted


def test_old_names_say_what_to_use_instead(client: Client) -> None:
    assert 'structured_outputs={"json"' in error_of(client.chat(guided_json={}))["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_constraint_that_does_not_compile_is_a_400_before_anything_runs(client: Client, stream: bool) -> None:
    client.engine.served.grammars.refuses = "response_format: Invalid type: foo"
    response = client.chat(response_format={"type": "json_object"}, stream=stream)
    assert response.status_code == 400
    assert error_of(response) == {
        "message": "response_format: Invalid type: foo", "type": "invalid_request_error", "param": "response_format", "code": None,
    }  # fmt: skip
    assert not client.engine.submitted
