"""The parts that an answer falls into, in the order in which they become certain, and the search for markers in growing text."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote for itself."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; `id` is the model's own, where its format has one."""

    index: int
    name: str
    id: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments; all of them together are JSON, unless the model wrote something else or was cut off."""

    index: int
    text: str


Part = Content | Reasoning | CallStart | CallArguments


class Parts:
    """Collects parts; neighbours of one kind become one."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._found: list[Part] = []
        self._kind: type[Part] | None = None
        self._texts: list[str] = []

    def content(self, text: str) -> None:
        """More content."""
        self._add(Content, text)

    def reasoning(self, text: str) -> None:
        """More reasoning."""
        self._add(Reasoning, text)

    def begin(self, name: str, call_id: str | None = None) -> None:
        """A call begins; arguments that follow are its own."""
        self._close()
        self._found.append(CallStart(self.num_calls, name, call_id))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """More arguments of the last call."""
        self._add(CallArguments, text)

    def take(self) -> list[Part]:
        """What has been collected since the last time."""
        self._close()
        found, self._found = self._found, []
        return found

    def _add(self, kind: type[Part], text: str) -> None:
        if not text:
            return
        if kind is not self._kind:
            self._close()
            self._kind = kind
        self._texts.append(text)

    def _close(self) -> None:
        if self._kind is None:
            return
        text = "".join(self._texts)
        if self._kind is CallArguments:
            self._found.append(CallArguments(self.num_calls - 1, text))
        else:
            self._found.append(Reasoning(text) if self._kind is Reasoning else Content(text))
        self._texts.clear()
        self._kind = None


class Markers:
    """A set of strings to look for; none of them is the beginning of another."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(dict.fromkeys(texts))
        for text in self._texts:
            assert not any(other != text and other.startswith(text) for other in self._texts), f"{text!r} begins another marker"
        self._pattern = re.compile("|".join(map(re.escape, self._texts)) or r"(?!)")
        self._max_held = max((len(text) - 1 for text in self._texts), default=0)
        self._firsts = frozenset(text[0] for text in self._texts)

    def find(self, text: str) -> re.Match[str] | None:
        """The first marker in a text."""
        return self._pattern.search(text)

    def at_start(self, text: str) -> str | None:
        """The marker that the text begins with; "" if it may yet become one; None if not."""
        match = self._pattern.match(text)
        if match is not None:
            return match.group()
        return "" if any(marker.startswith(text) for marker in self._texts) else None

    def held(self, text: str) -> int:
        """How many characters at the end may be the beginning of a marker."""
        tail = text[-self._max_held :] if self._max_held else ""
        for start, letter in enumerate(tail):
            if letter in self._firsts and any(marker.startswith(tail[start:]) for marker in self._texts):
                return len(tail) - start
        return 0
