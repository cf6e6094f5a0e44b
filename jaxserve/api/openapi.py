"""GET /openapi.json and GET /docs, made from the table of routes when first asked for, and kept.

The page needs no script and nothing from elsewhere.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.api.errors import ANTHROPIC_PATHS
from jaxserve.api.operation import Operation
from jaxserve.api.schema import body_schema
from jaxserve.version import VERSION

_ABOUT = "OpenAI's API, with vLLM's additions. Parameters that are not known are ignored; those that cannot be served are refused by name."
_ERROR = {
    "type": "object",
    "required": ["error"],
    "additionalProperties": False,
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "additionalProperties": False,
            "properties": {
                "message": {"type": "string", "minLength": 1, "maxLength": 500},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "additionalProperties": False,
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "additionalProperties": False,
            "properties": {"type": {"type": "string"}, "message": {"type": "string", "minLength": 1, "maxLength": 500}},
        },
    },
}
_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
_COMMON = {400: "What was sent cannot be served", 401: "No valid key", 503: "Loading, draining or without progress; Retry-After says when"}
_WITH_BODY = {
    404: "There is no such model",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "The queue is full; Retry-After says when to come again",
    500: "The server failed on this request",
}
_NOT_FOUND = {404: "There is no such thing"}
_BY_TAG = {"administration": {409: "Not in this state"}}
_SHAPE = {"path": re.compile(r"\{(\w+):path\}"), "name": re.compile(r"\W+")}
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c1c1e;background:#fff}
h2{margin-top:2.2rem;text-transform:capitalize;border-bottom:1px solid #ddd}summary{cursor:pointer;padding:.35rem 0}
code,pre{font:13px/1.45 ui-monospace,monospace}pre{background:#f5f5f7;padding:.7rem;overflow:auto;border-radius:6px}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.2rem .7rem .2rem 0;border-bottom:1px solid #eee}
b{display:inline-block;min-width:4.6rem;color:#0a6b5e}
@media(prefers-color-scheme:dark){body{background:#16161a;color:#e6e6ea}pre{background:#232329}h2,td,th{border-color:#333}b{color:#5cc8b4}}"""


class DocumentPages:
    """The two handlers.

    Args:
      operations: the table of routes; read when a page is first asked for.
    """

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._operations = operations

    async def openapi(self, request: Request) -> Response:
        """The description as OpenAPI 3.1."""
        return Response(orjson.dumps(self._document), media_type="application/json")

    async def docs(self, request: Request) -> Response:
        """The same as a page."""
        return Response(
            self._page, media_type="text/html", headers={"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
        )

    @functools.cached_property
    def _document(self) -> dict[str, Any]:
        return describe(self._operations)

    @functools.cached_property
    def _page(self) -> str:
        return render_page(self._document)


def describe(operations: Sequence[Operation]) -> dict[str, Any]:
    """The OpenAPI document of a table of routes."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = _SHAPE["path"].sub(r"{\1}", operation.path)
        paths.setdefault(path, {}).update({method.lower(): _describe_one(operation, path, method) for method in operation.methods})
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxserve", "version": VERSION, "description": _ABOUT},
        "security": [{"key": []}, {}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "Needed where the server has keys"}},
            "schemas": {"Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR},
        },
    }


def _describe_one(operation: Operation, path: str, method: str) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in re.findall(r"\{(\w+)\}", path)
    ] + [{"name": name, "in": "query", "required": False, "schema": dict(schema)} for name, schema in operation.query.items()]
    answer: dict[str, Any] = {operation.answers: {"schema": {"type": "object" if operation.answers == "application/json" else "string"}}}
    if operation.streams:
        answer["text/event-stream"] = {"schema": _EVENT}
    if operation.may_be_bytes:
        answer["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
    problems = _COMMON | (_NOT_FOUND if "{" in path else {}) | (_WITH_BODY if operation.body else {}) | _BY_TAG.get(operation.tag, {})
    described: dict[str, Any] = {
        "operationId": _SHAPE["name"].sub("_", f"{method.lower()}{path}").strip("_"),
        "summary": operation.summary,
        "tags": [operation.tag],
        "parameters": parameters,
        "responses": {"200": {"description": "Done", "content": answer}}
        | {str(status): _problem(text, operation) for status, text in sorted(problems.items())},
    }
    if operation.body is not None:
        examples = {f"{number}": {"value": example} for number, example in enumerate(operation.body.examples, 1)}
        content = {"application/json": {"schema": body_schema(operation.body), "examples": examples}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _problem(text: str, operation: Operation) -> dict[str, Any]:
    name = "AnthropicError" if operation.path.startswith(ANTHROPIC_PATHS) else "Error"
    schema: dict[str, Any] = {"$ref": f"#/components/schemas/{name}"}
    if operation.path in ("/health", "/ping"):
        schema = {"anyOf": [schema, {"type": "object", "required": ["status"], "properties": {"status": {"type": "string"}}}]}
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def render_page(document: Mapping[str, Any]) -> str:
    """An OpenAPI document as a page of HTML."""
    sections: dict[str, str] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            sections[operation["tags"][0]] = sections.get(operation["tags"][0], "") + _render_operation(path, method, operation)
    info = document["info"]
    body = "".join(f"<h2>{html.escape(tag)}</h2>{text}" for tag, text in sections.items())
    title = f"{html.escape(info['title'])} {html.escape(info['version'])}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1><p>{html.escape(info['description'])}</p>{body}</html>"
    )


def _render_operation(path: str, method: str, operation: Mapping[str, Any]) -> str:
    parts = [f"<details><summary><b>{method.upper()}</b><code>{html.escape(path)}</code> {html.escape(operation['summary'])}</summary>"]
    rows = [(parameter["name"], parameter["schema"], parameter["required"]) for parameter in operation["parameters"]]
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schema = content.get("schema", {})
    rows += [(name, inner, name in schema.get("required", ())) for name, inner in schema.get("properties", {}).items()]
    if rows:
        lines = "".join(
            f"<tr><td><code>{html.escape(name)}</code>{' required' if needed else ''}<td>{html.escape(_words(inner))}"
            for name, inner, needed in rows
        )
        parts.append(f"<table><tr><th>name<th>value{lines}</table>")
    for example in content.get("examples", {}).values():
        parts.append(f"<pre>{html.escape(orjson.dumps(example['value'], option=orjson.OPT_INDENT_2).decode())}</pre>")
    answers = "".join(
        f"<tr><td>{status}<td>{html.escape(', '.join(answer['content']))}<td>{html.escape(answer['description'])}"
        for status, answer in operation["responses"].items()
    )
    return "".join([*parts, f"<table><tr><th>status<th>type<th>meaning{answers}</table></details>"])


def _words(schema: Mapping[str, Any]) -> str:
    """A schema in a few words, such as "integer, 0 to 20, default 0"."""
    if "anyOf" in schema:
        return " or ".join(_words(inner) for inner in schema["anyOf"])
    kinds = schema.get("type", "any")
    words = [kinds if isinstance(kinds, str) else kinds[0]]
    if "enum" in schema:
        words = ["one of " + ", ".join(str(value) for value in schema["enum"] if value is not None)]
    if schema.get("items"):
        words.append("of " + _words(schema["items"]))
    if schema.get("properties"):
        words.append("with " + ", ".join(schema["properties"]))
    if "minimum" in schema:
        words.append(f"{schema['minimum']} to {schema.get('maximum', 'any')}")
    for key, text in (("maxItems", "at most {} items"), ("maxLength", "at most {} characters"), ("default", "default {}")):
        if key in schema:
            words.append(text.format(orjson.dumps(schema[key]).decode()))
    return ", ".join(words)
