"""The strict front door for JSON: hostile bodies are refused here, before any handler looks at them.

1. UTF-8, no nesting deeper than MAX_DEPTH, not too many arrays, members and values: judged on the raw bytes before the parser runs.
2. Finite numbers only, integers below 2**64 in magnitude, no NaN or Infinity.
3. No lone surrogate in any string or key; the whole is an object. Of duplicate keys the last wins.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn, TypeGuard

from jaxserve.errors import UserError

MAX_DEPTH = 64
MAX_INT_DIGITS = 20
# Millions of empty arrays or members fit into a body and take seconds to build; no honest request comes near this.
MAX_CONTAINERS = 200_000
# 2048 prompts of 256 token ids are within it; more would keep the parser, and everyone else, busy for too long.
MAX_VALUES = 600_000
# The exact decimal form of a double can be long, but nothing sends more than this on purpose.
MAX_NUMBER_CHARS = 400

_LONG_DIGITS = re.compile(rb"[0-9]{%d}" % MAX_INT_DIGITS)
_ALL_BYTES = bytes(range(256))
_MARKS = b'[]{}",:'
_DROPPED = bytes(byte for byte in _ALL_BYTES if byte not in _MARKS)
_ONE_KIND = bytes.maketrans(b"{}", b"[]")


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that `body` holds.

    Raises: UserError, status 400, saying what is wrong with it.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(None, f"the body is not UTF-8: bad byte at offset {error.start}", code="invalid_json") from None
    _check_structure(body)
    try:
        # Fewer digits than this cannot be too large, and the parser's own way is ten times as fast with arrays of token ids.
        parse_int = _integer if _LONG_DIGITS.search(body) else None
        value: object = json.loads(text, parse_int=parse_int, parse_float=_number, parse_constant=_constant)
    except json.JSONDecodeError as error:
        raise UserError(
            None, f"the body is not valid JSON: {error.msg}, line {error.lineno} column {error.colno}", code="invalid_json"
        ) from None
    except RecursionError:
        raise _too_deep() from None
    if not is_object(value):
        raise UserError(None, f"the body must be a JSON object, not {json_type(value)}", code="invalid_json")
    # Raw surrogates are not UTF-8, so a lone one can only come from an escape.
    if "\\u" in text:
        _check_surrogates(value)
    return value


def is_array(value: object) -> TypeGuard[list[Any]]:
    """Whether a parsed value is an array."""
    return isinstance(value, list)


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a parsed value is an object."""
    return isinstance(value, dict)


def json_type(value: object) -> str:
    """What JSON calls this value, with its article, for messages."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case dict():
            return "an object"
        case _:
            raise AssertionError(f"not a JSON value: {type(value)}")


def _check_structure(body: bytes) -> None:
    # What stands inside strings counts too at first: it only makes the quick answer more careful.
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH and body.count(b",") <= MAX_CONTAINERS:
        return
    # Escapes hide quotes; without them, every second piece between quotes is outside strings.
    bare = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _DROPPED)
    marks = b"".join(bare.split(b'"')[::2])
    left = marks.translate(_ONE_KIND, b",:")
    if len(left) > 2 * MAX_CONTAINERS or marks.count(b":") > MAX_CONTAINERS or marks.count(b",") > MAX_VALUES:
        allowed = f"{MAX_CONTAINERS} arrays and objects and {MAX_VALUES} values"
        raise UserError(None, f"the body holds too much; at most {allowed} are allowed", code="invalid_json")
    for _ in range(MAX_DEPTH):
        # Each round takes away at least the innermost level of a balanced document.
        shorter = left.replace(b"[]", b"")
        if not shorter:
            return
        if len(shorter) == len(left):
            raise UserError(None, "the body is not valid JSON: its brackets do not match", code="invalid_json")
        left = shorter
    raise _too_deep()


def _too_deep() -> UserError:
    return UserError(None, f"the body is nested too deep; at most {MAX_DEPTH} levels are allowed", code="json_too_deep")


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) <= MAX_INT_DIGITS:
        value = int(digits)
        if abs(value) < 2**64:
            return value
    raise UserError(None, f"the body holds the integer {digits:.24}, which is too large; at most 2**64 - 1 is allowed", code="invalid_json")


def _number(digits: str) -> float:
    value = float(digits) if len(digits) <= MAX_NUMBER_CHARS else math.inf
    if not math.isfinite(value):
        raise UserError(None, f"the body holds the number {digits:.24}, which is out of range", code="invalid_json")
    return value


def _constant(name: str) -> NoReturn:
    raise UserError(None, f"the body holds {name}; numbers must be finite", code="invalid_json")


def _check_surrogates(root: object) -> None:
    todo: list[object] = [root]
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            _check_text(value)
        elif is_array(value):
            todo.extend(value)
        elif is_object(value):
            todo.extend(value.keys())
            todo.extend(value.values())


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(None, "the body holds a lone surrogate (half of a \\ud800-\\udfff pair) in a string", code="invalid_json") from None
