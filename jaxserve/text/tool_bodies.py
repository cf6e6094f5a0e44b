"""Readers of what stands between the markers of tool calls: the frame of all of them, and those of formats that write JSON.

A reader takes text as it comes. Until the name of a call is known to be one, everything can still turn out to be content; from then on the
arguments go out as they are written, and what is not JSON among them goes out too, up to the marker that ends the call.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from jaxserve.text.answer import Markers, Parts
from jaxserve.text.json_value import JsonValue

Schemas = Mapping[str, Mapping[str, Any]]
MAX_HEADER_CHARS = 512
_STRING_PART = re.compile(r'[^"\\]+')
_SPACE = re.compile(r"\s+")
_ARGUMENTS = ("arguments", "parameters")
_USUAL_KEYS = ("name", *_ARGUMENTS, "type", "id")


class Body(abc.ABC):
    """Reads the calls of one section.

    Args:
      parts: where the calls go.
    Attributes:
      state: "failed": what was read and does not belong to a call is in `raw`, and the rest is not a call.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.state: Literal["open", "done", "failed"] = "open"
        self.raw = ""
        self._in_call = False
        self._settled = False

    def feed(self, text: str) -> str:
        """Read on; returns what was not read: text after the end, or too little of it to decide."""
        while text and self.state == "open":
            used = self._read(text)
            if self._in_call or self._settled:
                self.raw, self._settled = "", False
            else:
                self.raw += text[:used]
            if used == 0 and self.state == "open" and not self._moved():
                break
            text = text[used:]
        return text

    def finish(self, rest: str, *, cut: bool) -> None:
        """The text has ended.

        Args:
          rest: what `feed` returned last.
          cut: the model was stopped before it was done; else it meant to end here, and its call may be completed.
        """
        if self.state == "open":
            self.raw += rest
            self.state = "done" if self._in_call else "failed"

    @abc.abstractmethod
    def _read(self, text: str) -> int:
        """Read at least one character of a (non-empty) text, or move on, or wait for more."""

    @abc.abstractmethod
    def _moved(self) -> bool:
        """Whether the last read changed what is read next."""

    def _fail(self) -> int:
        self.state = "failed"
        return 0


class StepBody(Body):
    """A reader that is in one of several steps, each a method that returns how much it has read."""

    def __init__(self, parts: Parts, *spaced: Callable[[str], int]) -> None:
        """Begin with the first of the steps before which white space means nothing."""
        super().__init__(parts)
        self._spaced = frozenset(spaced)
        self._step = spaced[0]
        self._last_step: Callable[[str], int] | None = None

    def _read(self, text: str) -> int:
        self._last_step = self._step
        space = _SPACE.match(text) if self._step in self._spaced else None
        return self._step(text) if space is None else space.end()

    def _moved(self) -> bool:
        return self._step != self._last_step


class Shape(Protocol):
    """How calls are written between markers."""

    def body(self, parts: Parts, marker: str, ends: Markers, schemas: Schemas) -> Body:
        """A reader for one section.

        Args:
          marker: what opened it.
          ends: markers that close it.
          schemas: parameters of each tool.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JsonShape:
    """Calls as JSON.

    Args:
      objects: {"name": ..., "arguments": {...}}, with "parameters" meaning the same; or an array of them.
      more: objects may follow one another, between them nothing, a comma or a semicolon.
      header: arguments alone, behind a header that matches this, with groups "name" and perhaps "id".
      name: arguments alone, of this tool.
      known: of tools that there are, all else is no call.
    """

    objects: bool = True
    more: bool = False
    header: re.Pattern[str] | None = None
    name: str | None = None
    known: bool = False

    def body(self, parts: Parts, marker: str, ends: Markers, schemas: Schemas) -> Body:
        """A reader for one section."""
        return JsonBody(parts, self, ends, schemas, is_marked=bool(marker) and not self.known)


class JsonBody(StepBody):
    """Reads calls written as JSON."""

    def __init__(self, parts: Parts, shape: JsonShape, ends: Markers, schemas: Schemas, *, is_marked: bool) -> None:
        super().__init__(
            parts, self._read_begin, self._read_key, self._read_colon, self._read_member, self._read_comma, self._read_between,
            self._read_more,
        )  # fmt: skip
        self._shape = shape
        self._ends = ends
        self._schemas = schemas
        self._is_marked = is_marked
        self._in_array = False
        self._pieces: list[str] = []  # of a header, a string or a value that is kept
        self._escaped = False
        self._use_string: Callable[[str], None] = self._take_key
        self._value = JsonValue()
        self._key = ""
        self._name: str | None = None
        self._arguments: str | None = None

    def finish(self, rest: str, *, cut: bool) -> None:
        """Objects one after another end where the text does; arguments that are cut off stay so."""
        if self._step == self._read_more:
            self.state = "done"
        if self._value.is_broken and self._in_call:
            self.parts.arguments(rest)
        super().finish(rest, cut=cut)

    def _read_begin(self, text: str) -> int:
        if text[0] == "{" and self._shape.name is not None:
            return self._begin(self._shape.name)
        if text[0] == "[" and self._shape.objects and not self._in_array:
            self._in_array = True
            return 1
        if text[0] == "{" and self._shape.objects:
            self._name = self._arguments = None
            self._step = self._read_key
            return 1
        if self._shape.header is None or self._in_array:
            return self._fail()
        self._pieces.clear()
        self._step = self._read_header
        return 0

    def _read_header(self, text: str) -> int:
        assert self._shape.header is not None
        end = text.find("{")
        room = MAX_HEADER_CHARS - sum(map(len, self._pieces))
        used = len(text) if end < 0 else end
        self._pieces.append(text[:used])
        if used > room:
            self.state = "failed"
            return room
        if end < 0:
            return used
        match = self._shape.header.fullmatch("".join(self._pieces))
        if match is None:
            self.state = "failed"
        else:
            self._begin(match["name"], match.groupdict().get("id"))
        return end

    def _begin(self, name: str, call_id: str | None = None) -> int:
        self._in_call = True
        self.parts.begin(name, call_id)
        self._value = JsonValue()
        self._step = self._read_streamed
        return 0

    def _read_key(self, text: str) -> int:
        if text[0] == "}":
            return self._close_object()
        return self._begin_string(text, self._take_key)

    def _begin_string(self, text: str, use: Callable[[str], None]) -> int:
        if text[0] != '"':
            return self._break()
        self._pieces.clear()
        self._escaped, self._use_string = False, use
        self._step = self._read_string
        return 1

    def _read_string(self, text: str) -> int:
        if self._escaped or text[0] == "\\":
            self._pieces.append(text[0])
            self._escaped = not self._escaped
            return 1
        if text[0] != '"':
            match = _STRING_PART.match(text)
            assert match is not None, f"{text[0]!r} is no plain character"
            self._pieces.append(match.group())
            return match.end()
        try:
            value: str = json.loads('"' + "".join(self._pieces) + '"', strict=False)
        except json.JSONDecodeError:
            return self._break()
        self._use_string(value)
        return 0 if self.state == "failed" else 1

    def _take_key(self, key: str) -> None:
        self._key = key
        self._step = self._read_colon
        # An answer that is JSON of another kind need not be held back to its end.
        if not self._is_marked and not self._in_call and key not in _USUAL_KEYS:
            self.state = "failed"

    def _read_colon(self, text: str) -> int:
        if text[0] != ":":
            return self._break()
        self._step = self._read_member
        return 1

    def _read_member(self, text: str) -> int:
        """The beginning of a member's value."""
        if self._key == "name" and self._name is None:
            return self._begin_string(text, self._take_name)
        self._value = JsonValue()
        if self._key not in _ARGUMENTS or self._arguments is not None or self._in_call:
            self._step = self._read_skipped
        elif text[0] == '"':
            return self._begin_string(text, self._take_arguments)
        elif text[0] == "{" and self._name is not None:
            return self._begin(self._name)
        else:
            self._pieces.clear()
            self._step = self._read_kept
        return 0

    def _take_name(self, name: str) -> None:
        self._name = name
        self._step = self._read_comma
        if not name or len(name) > MAX_HEADER_CHARS or (self._shape.known and name not in self._schemas):
            self.state = "failed"

    def _take_arguments(self, arguments: str) -> None:
        # Some models write the arguments as a string that holds JSON.
        self._arguments = arguments
        self._step = self._read_comma

    def _read_streamed(self, text: str) -> int:
        used = self._value.read(text)
        self.parts.arguments(text[:used])
        if self._value.is_broken:
            self._step = self._read_broken
        elif self._value.is_done and self._name is not None:
            self._step = self._read_comma  # of the object that holds name and arguments
        elif self._value.is_done:
            self._end_call(done=True)
        return used

    def _read_skipped(self, text: str) -> int:
        used = self._value.read(text)
        if self._value.is_done:
            self._step = self._read_comma
        elif self._value.is_broken:
            self._break()
        return used

    def _read_kept(self, text: str) -> int:
        used = self._value.read(text)
        self._pieces.append(text[:used])
        if self._value.is_done:
            kept = "".join(self._pieces)
            self._arguments = "{}" if kept.strip() == "null" else kept
            self._step = self._read_comma
        elif self._value.is_broken:
            self._break()
        return used

    def _read_comma(self, text: str) -> int:
        if text[0] == ",":
            self._step = self._read_key
            return 1
        return self._close_object() if text[0] == "}" else self._break()

    def _close_object(self) -> int:
        if not self._in_call:
            # Without arguments, only a known name says that this is a call.
            if self._name is None or (self._arguments is None and self._name not in self._schemas):
                return self._fail()
            self.parts.begin(self._name)
            self.parts.arguments(self._arguments or "{}")
        self._end_call(done=not (self._in_array or self._shape.more))
        return 1

    def _end_call(self, *, done: bool) -> None:
        self._in_call, self._settled = False, True
        self._step = self._read_between if self._in_array else self._read_more
        if done:
            self.state = "done"

    def _break(self) -> int:
        """This is no JSON: content if no call has begun, else a call all the same."""
        if not self._in_call:
            return self._fail()
        self._step = self._read_broken
        return 0

    def _read_broken(self, text: str) -> int:
        found = self._ends.find(text)
        used = len(text) - self._ends.held(text) if found is None else found.start()
        if self._value.is_broken:
            self.parts.arguments(text[:used])
        if found is not None:
            self._end_call(done=True)
        return used

    def _read_between(self, text: str) -> int:
        if text[0] == ",":
            self._step = self._read_begin
            return 1
        if text[0] == "]":
            self.state = "done"
            self._settled = True
            return 1
        return self._fail()

    def _read_more(self, text: str) -> int:
        if text[0] in ",;":
            return 1
        if text[0] == "{":
            self._step = self._read_begin
        else:
            self._settled = True
            self.state = "done"
        return 0
