"""Finds where a JSON value ends, in text that comes in pieces, without taking the value apart."""

from __future__ import annotations

import re

_OUTSIDE = re.compile(r'["{}\[\]]|[^\s\w,:+\-.]')
_INSIDE = re.compile(r'["\\]')
_SCALAR_END = re.compile(r"[\s,\]}]")
_CLOSERS = {"{": "}", "[": "]"}


class JsonValue:
    """Follows one value; the text before it must have been read.

    Attributes:
      is_done: the value has ended.
      is_broken: this is no JSON; nothing more is read.
    """

    def __init__(self) -> None:
        self.is_done = False
        self.is_broken = False
        self._closers: list[str] = []
        self._in_string = False
        self._escaped = False
        self._is_scalar = False
        self._begun = False

    def read(self, text: str) -> int:
        """How many characters at the front of a (non-empty) text belong to the value."""
        place = 0
        while place < len(text) and not (self.is_done or self.is_broken):
            place = self._read_string(text, place) if self._in_string else self._read_outside(text, place)
        return place

    def _read_string(self, text: str, place: int) -> int:
        if self._escaped:
            self._escaped = False
            return place + 1
        match = _INSIDE.search(text, place)
        if match is None:
            return len(text)
        if match.group() == "\\":
            self._escaped = True
        else:
            self._in_string = False
            self.is_done = not self._closers
        return match.end()

    def _read_outside(self, text: str, place: int) -> int:
        if not self._begun:
            self._begun = True
            self._is_scalar = text[place] not in '"{['
        if self._is_scalar:
            end = _SCALAR_END.search(text, place)
            self.is_done = end is not None
            return len(text) if end is None else end.start()
        match = _OUTSIDE.search(text, place)
        if match is None:
            return len(text)
        letter = match.group()
        if letter == '"':
            self._in_string = True
        elif letter in _CLOSERS:
            self._closers.append(_CLOSERS[letter])
        elif self._closers and letter == self._closers[-1]:
            self._closers.pop()
            self.is_done = not self._closers
        else:
            self.is_broken = True
            return match.start()
        return match.end()
