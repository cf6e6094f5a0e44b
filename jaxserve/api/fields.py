"""Typed reading of a parsed JSON object: every mistake is a `UserError` naming the path of the field."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from jaxserve.api.json_door import is_array, is_object, json_type
from jaxserve.errors import UserError

D = TypeVar("D")

# Floats that hold a whole number are taken as one up to here; beyond, a double no longer holds every integer.
_EXACT_FLOAT = 2**53


class Fields:
    """The members of one JSON object; null counts as absent.

    Args:
      values: the object as parsed.
      path: where it stands in the body, such as "messages[2]"; empty for the body itself.
    """

    __slots__ = ("_path", "_values")

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def path(self, name: str) -> str:
        """The path of a member, for messages."""
        return f"{self._path}.{name}" if self._path else name

    def given(self, name: str) -> bool:
        """Whether the member is there and not null."""
        return self._values.get(name) is not None

    def raw(self, name: str) -> Any:
        """The member as parsed, None when absent."""
        return self._values.get(name)

    def error(self, name: str, message: str, *, code: str | None = None) -> UserError:
        """A UserError about a member."""
        return UserError(self.path(name), f"{self.path(name)} {message}", code=code)

    def text(self, name: str, default: D, *, max_chars: int = 2**31, choices: Collection[str] | None = None) -> str | D:
        """A string member of bounded length, or `default`."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._mistyped(name, "a string", value)
        if len(value) > max_chars:
            raise self.error(name, f"has {len(value)} characters; at most {max_chars} are allowed")
        if choices is not None and value not in choices:
            raise self.error(name, f"is {value!r:.60}; it must be one of {', '.join(map(repr, choices))}")
        return value

    def flag(self, name: str, default: D) -> bool | D:
        """A boolean member, or `default`."""
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._mistyped(name, "a boolean", value)
        return value

    def integer(self, name: str, default: D, *, low: int = -(2**63), high: int = 2**63 - 1) -> int | D:
        """An integer member in [low, high], or `default`; 5.0 counts as 5."""
        value = self._values.get(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT_FLOAT:
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._mistyped(name, "an integer", value)
        if not low <= value <= high:
            raise self.error(name, f"is {value}; it must be in [{low}, {high}]")
        return value

    def number(self, name: str, default: D, *, low: float = -1e300, high: float = 1e300) -> float | D:
        """A finite number member in [low, high], or `default`."""
        value = self._values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._mistyped(name, "a number", value)
        if not low <= value <= high:
            raise self.error(name, f"is {value!s:.40}; it must be in [{low}, {high}]")
        return float(value)

    def array(self, name: str, default: D, *, max_items: int) -> list[Any] | D:
        """An array member of at most `max_items` items of any type, or `default`."""
        value = self._values.get(name)
        if value is None:
            return default
        if not is_array(value):
            raise self._mistyped(name, "an array", value)
        if len(value) > max_items:
            raise self.error(name, f"has {len(value)} items; at most {max_items} are allowed")
        return value

    def integers(self, name: str, *, max_items: int) -> list[int]:
        """An array of integers, empty when absent."""
        items = self.array(name, [], max_items=max_items)
        for position, item in enumerate(items):
            if type(item) is not int:
                raise self._mistyped(f"{name}[{position}]", "an integer", item)
        return items

    def strings(self, name: str, *, max_items: int) -> list[str]:
        """An array of strings, empty when absent."""
        items = self.array(name, [], max_items=max_items)
        for position, item in enumerate(items):
            if not isinstance(item, str):
                raise self._mistyped(f"{name}[{position}]", "a string", item)
        return items

    def objects(self, name: str, *, max_items: int) -> list[Fields]:
        """An array of objects, empty when absent."""
        items = self.array(name, [], max_items=max_items)
        return [self._object(f"{name}[{position}]", item) for position, item in enumerate(items)]

    def object(self, name: str) -> Fields | None:
        """An object member, or None."""
        value = self._values.get(name)
        return None if value is None else self._object(name, value)

    def mapping(self, name: str, *, max_items: int) -> dict[str, Any]:
        """An object member as a plain dict, empty when absent."""
        inner = self.object(name)
        if inner is None:
            return {}
        if len(inner._values) > max_items:
            raise self.error(name, f"has {len(inner._values)} members; at most {max_items} are allowed")
        return dict(inner._values)

    def _object(self, name: str, value: Any) -> Fields:
        if not is_object(value):
            raise self._mistyped(name, "an object", value)
        return Fields(value, self.path(name))

    def _mistyped(self, name: str, wanted: str, value: Any) -> UserError:
        return self.error(name, f"must be {wanted}, not {json_type(value)}")
