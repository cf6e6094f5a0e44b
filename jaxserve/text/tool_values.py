"""Argument values that are not written as JSON: by the tool's schema, as Python literals, or in Gemma's notation."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

_MAX_DEPTH = 64
_MAX_OPTIONS = 64
_BARE_END = re.compile(r"[,}\]]")
_NAMED_LITERALS = {"true": True, "false": False, "null": None, "none": None}


def schema_of(parameters: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The schema of one parameter, empty when there is none."""
    properties: Any = parameters.get("properties")
    found: Any = cast("Mapping[str, Any]", properties).get(name) if isinstance(properties, Mapping) else None
    return cast("Mapping[str, Any]", found) if isinstance(found, Mapping) else {}


def schema_types(schema: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types that a schema allows, as far as it says so on its surface; empty if it does not."""
    types: set[str] = set()
    given: Any = schema.get("type")
    listed = cast("list[Any]", given) if isinstance(given, list) else [given]
    types.update(one for one in listed if isinstance(one, str))
    for word in ("anyOf", "oneOf"):
        options: Any = schema.get(word)
        for option in cast("list[Any]", options)[:_MAX_OPTIONS] if isinstance(options, list) else []:
            types |= schema_types(cast("Mapping[str, Any]", option)) if isinstance(option, Mapping) else set()
    values: Any = schema.get("enum")
    if not types and isinstance(values, list) and values and all(isinstance(value, str) for value in cast("list[Any]", values)):
        types.add("string")
    return frozenset(types)


def is_text(schema: Mapping[str, Any], *, unknown: bool) -> bool:
    """Whether a value of this schema is text as it stands; `unknown` is the answer when the schema does not tell."""
    types = schema_types(schema) - {"null"}
    return types == frozenset(("string",)) if types else unknown and "$ref" not in schema


def read_value(text: str, schema: Mapping[str, Any], *, unknown_is_text: bool) -> Any:
    """A value written without quotes: of the type that the schema wants if it can be read so, else text."""
    types = schema_types(schema)
    plain = text.strip()
    if plain.lower() in ("null", "none") and "null" in types:
        return None
    if is_text(schema, unknown=unknown_is_text):
        return text
    try:
        return _loads(plain)
    except (ValueError, RecursionError):
        pass
    try:
        value = literal_value(ast.parse(plain, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return text
    return value


def literal_value(node: ast.expr) -> Any:
    """The JSON value of a Python literal; true, false and null count as literals.

    Raises: ValueError for anything else.
    """
    match node:
        case ast.Constant(value=str() | int() | float() | None):
            if isinstance(node.value, float) and not math.isfinite(node.value):
                raise ValueError("not a finite number")
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
            return -cast("Any", node.operand).value
        case ast.UnaryOp(op=ast.UAdd(), operand=ast.Constant(value=int() | float())):
            return cast("Any", node.operand).value
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            return [literal_value(item) for item in items]
        case ast.Dict(keys=keys, values=values) if all(isinstance(key, ast.Constant) for key in keys):
            return {_key(key): literal_value(value) for key, value in zip(keys, values, strict=True)}
        case ast.Name(id=name) if name.lower() in _NAMED_LITERALS:
            return _NAMED_LITERALS[name.lower()]
        case _:
            raise ValueError("not a literal")


def _key(node: ast.expr | None) -> str:
    value: Any = node.value if isinstance(node, ast.Constant) else None
    if not isinstance(value, str | int | float):
        raise ValueError("not a key")
    return value if isinstance(value, str) else json.dumps(value)


def _loads(text: str) -> Any:
    return json.loads(text, parse_float=_finite, parse_constant=_finite)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a JSON number")
    return value


class GemmaNotation:
    """Reads {key:value,...} as Gemma writes it: keys bare, strings between quote marks that are tokens, the rest bare.

    Args:
      quotes: the marks that stand on both sides of a string.
    """

    def __init__(self, text: str, quotes: Sequence[str]) -> None:
        self._text = text
        self._place = 0
        self._quotes = quotes

    def arguments(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The object that the whole text is, its values as the tool's parameters want them.

        Raises: ValueError if it is something else.
        """
        found = self._object(0)
        if self._text[self._place :].strip():
            raise ValueError("text after the arguments")
        for name, value in found.items():
            schema = schema_of(parameters, name)
            if isinstance(value, str) and not is_text(schema, unknown=True):
                found[name] = read_value(value, schema, unknown_is_text=True)
        return found

    def _object(self, depth: int) -> dict[str, Any]:
        self._expect("{")
        found: dict[str, Any] = {}
        while not self._take("}"):
            name = self._quoted()
            if name is None:
                end = self._text.find(":", self._place)
                if end < 0:
                    raise ValueError("no value")
                name, self._place = self._text[self._place : end].strip(), end
            self._expect(":")
            found[name] = self._value(depth + 1)
            if not self._take(",") and not self._looks_at("}"):
                raise ValueError("neither , nor }")
        return found

    def _value(self, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deep")
        text = self._quoted()
        if text is not None:
            return text
        if self._looks_at("{"):
            return self._object(depth)
        if not self._take("["):
            return self._bare()
        items: list[Any] = []
        while not self._take("]"):
            items.append(self._value(depth + 1))
            if not self._take(",") and not self._looks_at("]"):
                raise ValueError("neither , nor ]")
        return items

    def _quoted(self) -> str | None:
        for quote in self._quotes:
            if self._take(quote):
                end = self._text.find(quote, self._place)
                if end < 0:
                    raise ValueError("a string without an end")
                text, self._place = self._text[self._place : end], end + len(quote)
                return text
        return None

    def _bare(self) -> Any:
        match = _BARE_END.search(self._text, self._place)
        if match is None:
            raise ValueError("a value without an end")
        text, self._place = self._text[self._place : match.start()].strip(), match.start()
        if text.lower() in _NAMED_LITERALS:
            return _NAMED_LITERALS[text.lower()]
        try:
            return _loads(text)
        except ValueError:
            return text

    def _looks_at(self, mark: str) -> bool:
        while self._place < len(self._text) and self._text[self._place].isspace():
            self._place += 1
        return self._text.startswith(mark, self._place)

    def _take(self, mark: str) -> bool:
        if not self._looks_at(mark):
            return False
        self._place += len(mark)
        return True

    def _expect(self, mark: str) -> None:
        if not self._take(mark):
            raise ValueError(f"no {mark}")
