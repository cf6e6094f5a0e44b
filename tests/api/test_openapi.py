"""/openapi.json and /docs: as OpenAPI 3.1 wants it, and as the readers of bodies really read."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jsonschema
import jsonschema_rs
import pytest
from schemathesis import openapi

from jaxserve.api.app import operations
from jaxserve.api.fields import Fields
from jaxserve.api.schema import BY_HAND, body_schema
from jaxserve.errors import UserError

if TYPE_CHECKING:
    from tests.api.conftest import Client

ALL = {"enable_admin_endpoints": True, "enable_tokenizer_info_endpoint": True}
DOCS = pathlib.Path(__file__).parents[2] / "docs" / "endpoints.md"


@pytest.fixture
def whole(make_client: Callable[..., Client]) -> Client:
    return make_client(**ALL)


@pytest.fixture
def document(whole: Client) -> dict[str, Any]:
    return whole.get("/openapi.json").json()


def schemas(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and schema of every body."""
    for path, methods in document["paths"].items():
        for operation in methods.values():
            if "requestBody" in operation:
                yield path, operation["requestBody"]["content"]["application/json"]["schema"]


def test_document_is_openapi_and_complete(whole: Client, document: dict[str, Any]) -> None:
    openapi.from_dict(document)  # refuses what is not OpenAPI
    assert document["openapi"].startswith("3.1")
    ids = [operation["operationId"] for methods in document["paths"].values() for operation in methods.values()]
    assert len(set(ids)) == len(ids)
    listed = {operation.path.replace(":path", "") for operation in operations(whole.engine)}  # type: ignore[arg-type]
    assert set(document["paths"]) == listed
    for _, schema in schemas(document):
        jsonschema_rs.meta.validate(schema)


def test_every_example_is_read_and_fits_its_schema(whole: Client) -> None:
    for operation in operations(whole.engine):  # type: ignore[arg-type]
        if operation.body is not None:
            schema = body_schema(operation.body)
            for example in operation.body.examples:
                operation.body.read(Fields(example))
                jsonschema.validate(example, schema)
            for name in schema.get("required", ()):
                smallest = {key: value for key, value in operation.body.examples[0].items() if key != name}
                with pytest.raises(UserError) as caught:
                    operation.body.read(Fields(smallest))
                assert caught.value.field == name


def test_schemas_have_the_types_and_bounds_of_the_readers(document: dict[str, Any]) -> None:
    chat = dict(schemas(document))["/v1/chat/completions"]
    assert chat["required"] == ["messages"]
    properties = chat["properties"]
    assert properties["top_logprobs"] == {"type": ["integer", "null"], "minimum": 0, "maximum": 20, "default": 0}
    assert properties["temperature"]["maximum"] == 2
    assert properties["messages"]["maxItems"] == 2048
    assert "user" in properties["messages"]["items"]["properties"]["role"]["enum"]
    assert properties["stream_options"]["properties"]["include_usage"]["type"] == ["boolean", "null"]
    assert properties["stop"] == BY_HAND["stop"]
    assert properties["user"]["type"] == ["string", "null"]


def test_what_is_described_by_hand_is_read_by_hand(document: dict[str, Any]) -> None:
    text = json.dumps([schema for _, schema in schemas(document)])
    for name, schema in BY_HAND.items():
        assert f'"{name}": {json.dumps(schema)}' in text, f"nobody reads {name!r} by hand"


def test_paths_behind_flags_are_not_there_without_them(client: Client, whole: Client) -> None:
    without, with_flags = (set(of.get("/openapi.json").json()["paths"]) for of in (client, whole))
    hidden = {
        "/tokenizer_info",
        "/pause",
        "/resume",
        "/is_paused",
        "/abort_requests",
        "/reset_prefix_cache",
        "/start_profile",
        "/stop_profile",
    }
    assert with_flags - without == hidden
    for path in hidden:
        assert client.get(path).status_code == client.request("POST", path).status_code == 404


def test_page_shows_every_path_and_loads_nothing(whole: Client, document: dict[str, Any]) -> None:
    reply = whole.get("/docs")
    assert reply.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert all(f"<code>{path}</code>" in reply.text for path in document["paths"])
    assert all(mark not in reply.text for mark in ("http://", "https://", "<script", "src="))


def test_every_endpoint_stands_in_the_documentation(document: dict[str, Any]) -> None:
    text = DOCS.read_text()
    missing = [path for path in document["paths"] if f"`{path}`" not in text]
    assert not missing, f"docs/endpoints.md does not name {missing}"
