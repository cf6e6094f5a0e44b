"""JSON schemas of request bodies, recorded from the code that reads them.

1. `body_schema` lets the endpoint's own reader read its examples through `Recorder`, a `Fields` that notes what it is asked for.
2. A field belongs to the schema because it was read, with the type and bounds it was read with: documentation cannot drift from the code.
3. Fields that are read by hand, as they take several types, are described in BY_HAND.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from jaxserve.api.fields import Fields
from jaxserve.api.operation import Body
from jaxserve.api.parameters import WITHOUT_EFFECT
from jaxserve.errors import UserError

D = TypeVar("D")
Schema = dict[str, Any]

_RAW = "raw"  # marks, while recording, what was read by hand
_STRING: Schema = {"type": "string"}
_TOKEN_IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}
BY_HAND: Mapping[str, Schema] = {
    "content": {"anyOf": [_STRING, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]},
    "function_call": {"anyOf": [{"enum": ["none", "auto"]}, {"type": "object"}, {"type": "null"}]},
    "input": {"anyOf": [_STRING, {"type": "array", "items": {"type": "object"}}]},
    "prompt": {"anyOf": [_STRING, {"type": "array", "items": _STRING}, _TOKEN_IDS, {"type": "array", "items": _TOKEN_IDS}]},
    "stop": {"anyOf": [_STRING, {"type": "array", "items": _STRING}, {"type": "null"}]},
    "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required"]}, {"type": "object"}, {"type": "null"}]},
}
_JSON_TYPES: Mapping[type, str] = {str: "string", dict: "object", bool: "boolean"}


def body_schema(body: Body) -> Schema:
    """The JSON schema of a body.

    Raises: UserError if the reader refuses one of its examples.
    """
    properties = record(body)
    _describe(properties, {**BY_HAND, **body.by_hand})
    for name, kind in WITHOUT_EFFECT.items():
        properties.setdefault(name, {"type": [_JSON_TYPES[kind], "null"], "description": "accepted; no answer depends on it"})
    required = [name for name in body.examples[0] if _is_required(body, name)]
    for name in required:
        properties[name] = _without_null(properties[name])
    schema: Schema = {"type": "object", "properties": dict(sorted(properties.items(), key=lambda item: item[0] not in required))}
    return {**schema, "required": required} if required else schema


def record(body: Body) -> dict[str, Schema]:
    """What the reader of a body asks for, by name.

    Raises: UserError if the reader refuses one of its examples.
    """
    properties: dict[str, Schema] = {}
    for example in body.examples:
        body.read(Recorder(example, "", properties))
    return {name: schema for name, schema in properties.items() if name not in body.foreign}


def _is_required(body: Body, name: str) -> bool:
    """Whether no example is read without this field."""
    for example in body.examples:
        try:
            body.read(Fields({key: value for key, value in example.items() if key != name}))
        except UserError as error:
            if error.field == name:
                continue
        return False
    return True


def _describe(properties: dict[str, Schema], by_hand: Mapping[str, Mapping[str, Any]]) -> None:
    """Fill in what was read by hand, here and in all objects inside."""
    for name, schema in properties.items():
        if schema.pop(_RAW, False) and name in by_hand:
            properties[name] = dict(by_hand[name])
            continue
        for inner in (schema, schema.get("items", {})):
            _describe(inner.get("properties", {}), by_hand)


def _without_null(schema: Schema) -> Schema:
    if isinstance(schema.get("type"), list):
        return {**schema, "type": schema["type"][0]}
    return schema


class Recorder(Fields):
    """Reads like `Fields`, and notes every member that is asked for.

    Args:
      properties: JSON schemas by name of member; written to.
    """

    __slots__ = ("_properties",)

    def __init__(self, values: Mapping[str, Any], path: str, properties: dict[str, Schema]) -> None:
        super().__init__(values, path)
        self._properties = properties

    def raw(self, name: str) -> Any:
        """The member as parsed; of any type."""
        self._properties.setdefault(name, {})[_RAW] = True
        return super().raw(name)

    def text(self, name: str, default: D, *, max_chars: int = 2**31, choices: Collection[str] | None = None) -> str | D:
        """A string member."""
        bounds: Schema = {"maxLength": max_chars} if max_chars < 2**31 else {}
        if choices is not None:
            bounds["enum"] = [*choices, None]
        self._note(name, "string", default, bounds)
        return super().text(name, default, max_chars=max_chars, choices=choices)

    def flag(self, name: str, default: D) -> bool | D:
        """A boolean member."""
        self._note(name, "boolean", default, {})
        return super().flag(name, default)

    def integer(self, name: str, default: D, *, low: int = -(2**63), high: int = 2**63 - 1) -> int | D:
        """An integer member."""
        bounds: Schema = {} if high == 2**63 - 1 else {"minimum": low, "maximum": high}
        self._note(name, "integer", default, bounds)
        return super().integer(name, default, low=low, high=high)

    def number(self, name: str, default: D, *, low: float = -1e300, high: float = 1e300) -> float | D:
        """A number member."""
        bounds: Schema = {} if high == 1e300 else {"minimum": low, "maximum": high}
        self._note(name, "number", default, bounds)
        return super().number(name, default, low=low, high=high)

    def array(self, name: str, default: D, *, max_items: int) -> list[Any] | D:
        """An array member."""
        self._note(name, "array", None, {"maxItems": max_items})
        return super().array(name, default, max_items=max_items)

    def integers(self, name: str, *, max_items: int) -> list[int]:
        """An array of integers."""
        self._note(name, "array", None, {"maxItems": max_items, "items": {"type": "integer"}})
        return super().integers(name, max_items=max_items)

    def objects(self, name: str, *, max_items: int) -> list[Fields]:
        """An array of objects."""
        self._note(name, "array", None, {"maxItems": max_items})
        self._properties[name].setdefault("items", {"type": "object", "properties": {}})
        return super().objects(name, max_items=max_items)

    def object(self, name: str) -> Fields | None:
        """An object member."""
        self._note(name, "object", None, {})
        if "maxProperties" not in self._properties[name]:
            self._properties[name].setdefault("properties", {})
        return super().object(name)

    def mapping(self, name: str, *, max_items: int) -> dict[str, Any]:
        """An object member with any names."""
        self._note(name, "object", None, {"maxProperties": max_items})
        self._properties[name].pop("properties", None)
        return super().mapping(name, max_items=max_items)

    def _object(self, name: str, value: Any) -> Fields:
        inner = super()._object(name, value)
        schema = self._properties.get(name.partition("[")[0], {})
        return Recorder(inner._values, inner._path, schema.get("items", schema).get("properties", {}))

    def _note(self, name: str, kind: str, default: object, bounds: Schema) -> None:
        schema = self._properties.setdefault(name, {})
        schema.setdefault("type", [kind, "null"])
        for key, value in bounds.items():
            schema.setdefault(key, value)
        if isinstance(default, bool | int | float | str):
            schema.setdefault("default", default)
