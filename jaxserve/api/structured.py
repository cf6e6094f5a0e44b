"""What a client says about the form of an answer: OpenAI's response_format, and vLLM's structured_outputs."""

from __future__ import annotations

from typing import Any

from jaxserve.api.fields import Fields
from jaxserve.api.json_door import is_array, is_object, json_type
from jaxserve.request import CONSTRAINTS, StructuredOutputs

_OPTIONS = ("disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")
_FORMATS = ("text", "json_object", "json_schema", "structural_tag")


def read_structured(fields: Fields) -> StructuredOutputs | None:
    """The constraint of a body, if it has one. Raises: UserError naming the field at fault."""
    wanted = _response_format(fields.object("response_format"))
    given = _structured_outputs(fields)
    if wanted is not None and given is not None:
        raise fields.error("structured_outputs", f"and a response_format of type {wanted[0]!r} cannot both be given")
    return given if wanted is None else wanted[1]


def read_flat_format(wanted: Fields | None, source: str, *, has_name: bool) -> StructuredOutputs | None:
    """The same where a schema stands beside the type: text.format of /v1/responses, output_config.format of /v1/messages."""
    kind = None if wanted is None else wanted.text("type", None, choices=_FORMATS[:3])
    if wanted is None or kind == "text":
        return None
    if kind is None:
        raise wanted.error("type", "is required")
    if kind == "json_object":
        return StructuredOutputs(json_object=True, source=source)
    return StructuredOutputs(json=_schema(wanted, has_name=has_name), source=source)


def _response_format(wanted: Fields | None) -> tuple[str, StructuredOutputs] | None:
    if wanted is None:
        return None
    kind = wanted.text("type", None, choices=_FORMATS)
    match kind:
        case None:
            raise wanted.error("type", "is required")
        case "json_object":
            return kind, StructuredOutputs(json_object=True, source="response_format")
        case "json_schema":
            inner = wanted.object("json_schema")
            if inner is None:
                raise wanted.error("json_schema", "is required")
            return kind, StructuredOutputs(json=_schema(inner, has_name=True), source="response_format")
        case "structural_tag":
            return kind, StructuredOutputs(structural_tag={name: wanted.raw(name) for name in wanted}, source="response_format")
        case _:
            return None


def _schema(inner: Fields, *, has_name: bool) -> dict[str, Any] | bool:
    """The schema of a json_schema format; it is enforced whether it says "strict" or not."""
    if inner.text("name", None) is None and has_name:
        raise inner.error("name", "is required")
    inner.text("description", None)
    inner.flag("strict", None)
    schema = inner.raw("schema")
    if not (is_object(schema) or isinstance(schema, bool)):
        raise inner.error("schema", f"must be a JSON schema, not {json_type(schema)}")
    return schema


def _structured_outputs(fields: Fields) -> StructuredOutputs | None:
    inner = fields.object("structured_outputs")
    if inner is None or not any(inner.given(name) for name in inner):
        return None
    unknown = next((name for name in inner if name not in (*CONSTRAINTS, *_OPTIONS)), None)
    if unknown is not None:
        known = ", ".join((*CONSTRAINTS, *_OPTIONS))
        raise fields.error("structured_outputs", f"has the field {unknown!r:.60}; known are {known}")
    for name, allowed in (("json", (str, dict, bool)), ("structural_tag", (str, dict))):
        if inner.given(name) and not isinstance(inner.raw(name), allowed):
            raise inner.error(name, f"must be an object, not {json_type(inner.raw(name))}")
    choice = inner.raw("choice")
    if choice is not None and not (is_array(choice) and choice and all(isinstance(item, str) for item in choice)):
        raise inner.error("choice", "must be an array of at least one string")
    return StructuredOutputs(
        json=inner.raw("json"),
        regex=inner.text("regex", None),
        choice=choice,
        grammar=inner.text("grammar", None),
        json_object=inner.flag("json_object", None),
        structural_tag=inner.raw("structural_tag"),
        disable_any_whitespace=inner.flag("disable_any_whitespace", False),
        disable_additional_properties=inner.flag("disable_additional_properties", False),
        whitespace_pattern=inner.text("whitespace_pattern", None),
    )
