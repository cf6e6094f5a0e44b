"""Readers of tool calls that are not JSON: parameters between tags, Python calls, and Gemma's notation."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.text.answer import Markers, Parts
from jaxserve.text.tool_bodies import MAX_HEADER_CHARS, Body, Schemas, StepBody
from jaxserve.text.tool_values import GemmaNotation, is_text, literal_value, read_value, schema_of

_TAGGED_NAME = re.compile(r"[\w.\-/: \t]+")
_PYTHON_NAME = re.compile(r"[\w.]+")
_PYTHON_MARK = re.compile(r"""["'()\[\]{}]""")
_GEMMA_HEAD = re.compile(r"\s*call:\s*([\w.\-/:]+)\s*(?=\{)")
_MAX_NULL_CHARS = 8


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaggedShape:
    """A name, then parameters between tags.

    Args:
      head: what stands before the name, unless it was the marker that opened the section.
      name_end: characters that end the name.
      key, key_end, value: tags around a parameter's name and before its value.
      value_end: tags that end a value; those after the first do so although they are tags of what comes next.
      close: tags that end the call.
      trims_lines: a value stands between line breaks.
      unknown_is_text: what a parameter without a type is.
    """

    head: str
    name_end: str
    key: str
    key_end: str
    value: str
    value_end: tuple[str, ...]
    close: tuple[str, ...]
    trims_lines: bool
    unknown_is_text: bool

    def body(self, parts: Parts, marker: str, ends: Markers, schemas: Schemas) -> Body:
        """A reader for one section."""
        return TaggedBody(parts, self, schemas, has_head=marker == self.head or not self.head)


class TaggedBody(StepBody):
    """Reads one call with tagged parameters; text goes out while it is read, other values when they are whole."""

    def __init__(self, parts: Parts, shape: TaggedShape, schemas: Schemas, *, has_head: bool) -> None:
        first = self._read_name if has_head else self._read_head
        super().__init__(parts, first, self._read_name, self._read_member, self._read_value_tag)
        self._shape = shape
        self._schemas = schemas
        self._name = ""
        self._key = ""
        self._num_keys = 0
        self._value = ""  # read, and not sent
        self._schema: Mapping[str, Any] = {}  # of the parameter
        self._is_text = False
        self._sends_text = False
        self._head = Markers([shape.head] if shape.head else [])
        self._member = Markers([shape.key, *shape.close])
        self._value_tag = Markers([shape.value] if shape.value else [])
        self._value_end = Markers(shape.value_end)

    def finish(self, rest: str, *, cut: bool) -> None:
        """A call that lacks its last tags is whole if the model meant to end."""
        if self._in_call and not cut:
            if self._step == self._read_value_tag:
                self.parts.arguments("null")
            if self._step == self._read_value:
                self._value += rest
                self._end_value()
            self.parts.arguments("}")
        super().finish(rest, cut=cut)

    def _read_head(self, text: str) -> int:
        return self._read_tag(self._head, text, self._read_name)

    def _read_tag(self, tag: Markers, text: str, then: Callable[[str], int]) -> int:
        found = tag.at_start(text)
        if found:
            self._step = then
            return len(found)
        return self._give_up() if found is None else 0

    def _give_up(self) -> int:
        """What comes is no part of a call; one that has begun ends here."""
        if self._in_call:
            self.parts.arguments("}")
            self._in_call, self._settled = False, True
        return self._fail()

    def _read_name(self, text: str) -> int:
        match = _TAGGED_NAME.match(text, 0, MAX_HEADER_CHARS - len(self._name))
        end = match.end() if match is not None else 0
        self._name += text[:end]
        if end == len(text):
            return end
        self._name = self._name.strip()
        if text[end] not in self._shape.name_end or not self._name:
            self.state = "failed"
            return end
        self._step = self._read_member
        return end + (text[end] != "<")

    def _read_member(self, text: str) -> int:
        found = self._member.at_start(text)
        if not found:
            return self._give_up() if found is None else 0
        if not self._in_call:
            self._in_call = True
            self.parts.begin(self._name)
            self.parts.arguments("{")
        if found == self._shape.key:
            self._key = ""
            self._step = self._read_key
        else:
            self.parts.arguments("}")
            self._in_call, self._settled = False, True
            self.state = "done"
        return len(found)

    def _read_key(self, text: str) -> int:
        joined = self._key + text
        end = joined.find(self._shape.key_end)
        if end < 0:
            self._key = joined
            return len(text)
        used = end + len(self._shape.key_end) - len(self._key)
        self._key = joined[:end].strip()
        self._begin_value()
        return used

    def _begin_value(self) -> None:
        self.parts.arguments((", " if self._num_keys else "") + json.dumps(self._key, ensure_ascii=False) + ": ")
        self._num_keys += 1
        self._schema = schema_of(self._schemas.get(self._name, {}), self._key)
        self._is_text = is_text(self._schema, unknown=self._shape.unknown_is_text)
        self._value, self._sends_text = "", False
        self._step = self._read_value_tag if self._shape.value else self._read_value

    def _read_value_tag(self, text: str) -> int:
        found = self._value_tag.at_start(text)
        if found is None:
            self.parts.arguments("null")
        return self._read_tag(self._value_tag, text, self._read_value)

    def _read_value(self, text: str) -> int:
        found = self._value_end.find(text)
        used = len(text) - self._value_end.held(text) if found is None else found.start()
        self._value += text[:used]
        if found is None:
            self._send_some()
            return used
        self._end_value()
        self._step = self._read_member
        return found.end() if found.group() == self._shape.value_end[0] else used

    def _send_some(self) -> None:
        """Send text that is certain: it is not going to be null, and its last line break is not the one before the tag."""
        if not self._sends_text:
            if len(self._value.strip()) <= _MAX_NULL_CHARS or not self._is_text:
                return
            self._sends_text = True
            self.parts.arguments('"')
            if self._shape.trims_lines:
                self._value = self._value.removeprefix("\n")
        certain = self._value.removesuffix("\n") if self._shape.trims_lines else self._value
        self.parts.arguments(json.dumps(certain, ensure_ascii=False)[1:-1])
        self._value = self._value[len(certain) :]

    def _end_value(self) -> None:
        value = self._value
        if self._shape.trims_lines:
            value = (value if self._sends_text else value.removeprefix("\n")).removesuffix("\n")
        if self._sends_text:
            self.parts.arguments(json.dumps(value, ensure_ascii=False)[1:])
            return
        read = read_value(value, self._schema, unknown_is_text=self._shape.unknown_is_text)
        self.parts.arguments(json.dumps(read, ensure_ascii=False))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PythonShape:
    """A list of Python calls: [f(x=1), g()]."""

    def body(self, parts: Parts, marker: str, ends: Markers, schemas: Schemas) -> Body:
        """A reader for one section."""
        return PythonBody(parts)


class PythonBody(StepBody):
    """Reads a list of Python calls; each goes out when it is whole."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts, self._read_open, self._read_call, self._read_between)
        self._pieces: list[str] = []
        self._closers: list[str] = []
        self._quote = ""
        self._escaped = False

    def _read_open(self, text: str) -> int:
        if text[0] != "[":
            return self._fail()
        self._step = self._read_call
        return 1

    def _read_call(self, text: str) -> int:
        self._pieces.clear()
        self._step = self._read_name
        return 0

    def _read_name(self, text: str) -> int:
        match = _PYTHON_NAME.match(text, 0, MAX_HEADER_CHARS - sum(map(len, self._pieces)))
        end = match.end() if match is not None else 0
        self._pieces.append(text[:end])
        if end < len(text):
            self._step = self._read_arguments
            if text[end] != "(" or self._pieces[0][:1] in "0123456789.":
                self.state = "failed"
        return end

    def _read_arguments(self, text: str) -> int:
        place = 0
        while place < len(text):
            place = self._read_quoted(text, place) if self._quote else self._read_bare(text, place)
            if self.state == "failed":
                break
            if not self._closers and not self._quote:
                self._pieces.append(text[:place])
                self._end_call()
                return place
        self._pieces.append(text[:place])
        return place

    def _read_quoted(self, text: str, place: int) -> int:
        letter = text[place]
        if self._escaped:
            self._escaped = False
        elif letter == "\\":
            self._escaped = True
        elif letter == self._quote:
            self._quote = ""
        return place + 1

    def _read_bare(self, text: str, place: int) -> int:
        match = _PYTHON_MARK.search(text, place)
        if match is None:
            return len(text)
        mark = match.group()
        if mark in "\"'":
            self._quote = mark
        elif mark in "([{":
            self._closers.append({"(": ")", "[": "]", "{": "}"}[mark])
        elif self._closers.pop() != mark:
            self.state = "failed"
        return match.end()

    def _end_call(self) -> None:
        try:
            call = ast.parse("".join(self._pieces), mode="eval").body
            if not isinstance(call, ast.Call) or call.args:
                raise ValueError("not a call with named arguments")
            arguments = {keyword.arg: literal_value(keyword.value) for keyword in call.keywords}
            if None in arguments:
                raise ValueError("arguments without a name")
            name = ast.unparse(call.func)
            text = json.dumps(arguments, ensure_ascii=False)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            self.state = "failed"
            return
        self.parts.begin(name)
        self.parts.arguments(text)
        self._settled = True
        self._step = self._read_between

    def _read_between(self, text: str) -> int:
        if text[0] == ",":
            self._step = self._read_call
        elif text[0] == "]":
            self.state, self._settled = "done", True
        else:
            return self._fail()
        return 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GemmaShape:
    """call:name{key:value}, strings between quote marks."""

    quotes: tuple[str, ...]

    def body(self, parts: Parts, marker: str, ends: Markers, schemas: Schemas) -> Body:
        """A reader for one section."""
        return GemmaBody(parts, self, ends, schemas)


class GemmaBody(Body):
    """Reads one call in Gemma's notation; it goes out when it is whole."""

    def __init__(self, parts: Parts, shape: GemmaShape, ends: Markers, schemas: Schemas) -> None:
        super().__init__(parts)
        self._shape = shape
        self._ends = ends
        self._schemas = schemas
        self._pieces: list[str] = []

    def finish(self, rest: str, *, cut: bool) -> None:
        """The last mark may be missing: models stop there."""
        if not cut:
            self._pieces.append(rest)
            self._end_call()
        super().finish("" if self.state == "done" else rest, cut=cut)

    def _moved(self) -> bool:
        return False

    def _read(self, text: str) -> int:
        found = self._ends.find(text)
        used = len(text) - self._ends.held(text) if found is None else found.start()
        self._pieces.append(text[:used])
        if found is not None:
            self._end_call()
            if self.state == "open":
                self.state = "failed"
        return used

    def _end_call(self) -> None:
        text = "".join(self._pieces)
        head = _GEMMA_HEAD.match(text)
        if head is None:
            return
        try:
            arguments = GemmaNotation(text[head.end() :], self._shape.quotes).arguments(self._schemas.get(head[1], {}))
        except (ValueError, RecursionError):
            return
        self.parts.begin(head[1])
        self.parts.arguments(json.dumps(arguments, ensure_ascii=False))
        self._settled = True
        self.state = "done"
