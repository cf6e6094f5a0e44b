"""Splits the text of an answer, as it comes, into reasoning, content and tool calls.

text -> ReasoningReader -> CallReader -> parts

1. Text that may be the beginning of a marker is held back until it is one or is not.
2. What opens like a call and is none is content, markers and all.
3. White space beside calls belongs to nobody.
Text that comes in one piece gives the same parts as text that comes letter by letter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from jaxserve.text.answer import Markers, Part, Parts
from jaxserve.text.harmony import HarmonySplitter
from jaxserve.text.reasoning import ReasoningFormat, ReasoningReader
from jaxserve.text.tokenizer import Tokenizer
from jaxserve.text.tool_bodies import Body, JsonShape, Schemas
from jaxserve.text.tools import ToolFormat

_BETWEEN_CALLS = " \t\r\n,;"
_LOOSE = JsonShape(known=True, more=True)


class Splitter(Protocol):
    """Takes the text of one answer apart."""

    def push(self, text: str) -> list[Part]:
        """Take the next text; returns what is certain."""
        ...

    def finish(self, *, cut: bool) -> list[Part]:
        """The text has ended; returns what was held back.

        Args:
          cut: the model was stopped before it was done, so that a call may lack its end.
        """
        ...


def make_splitter(reasoning: ReasoningFormat | None, tools: ToolFormat | None, schemas: Schemas, *, inside: bool | None) -> Splitter:
    """A splitter for one answer.

    Args:
      tools: how calls are written; None when there are none to be found.
      schemas: parameters of each tool.
      inside: whether the prompt ends within reasoning; None if it does not tell.
    """
    in_channels = (reasoning is not None and not reasoning.starts) or (tools is not None and tools.shape is None)
    if in_channels and (tools is None or tools.shape is None):
        return HarmonySplitter(has_tools=tools is not None)
    return TextSplitter(reasoning if reasoning is not None and reasoning.starts else None, tools, schemas, inside=inside)


def shown_special_ids(tokenizer: Tokenizer, markers: Sequence[str]) -> frozenset[int]:
    """Special tokens that stand in markers: an answer must be decoded with them, or nobody would find it."""
    joined = "\0".join(markers)
    if not joined:
        return frozenset()
    texts = ((token, tokenizer.token_text(token)) for token in tokenizer.special_ids)
    return frozenset(token for token, text in texts if text and text in joined)


class TextSplitter:
    """Reasoning first, then content with calls in it."""

    def __init__(self, reasoning: ReasoningFormat | None, tools: ToolFormat | None, schemas: Schemas, *, inside: bool | None) -> None:
        self._parts = Parts()
        starts = tools.starts if tools is not None else ()
        self._reasoning = None if reasoning is None else ReasoningReader(reasoning, self._parts, inside=inside, call_starts=starts)
        self._calls = None if tools is None else CallReader(tools, self._parts, schemas)

    def push(self, text: str) -> list[Part]:
        """Take the next text; returns what is certain."""
        if self._reasoning is not None:
            text = self._reasoning.push(text)
        self._pass_on(text)
        return self._parts.take()

    def finish(self, *, cut: bool) -> list[Part]:
        """The text has ended; returns what was held back."""
        if self._reasoning is not None:
            self._pass_on(self._reasoning.finish())
        if self._calls is not None:
            self._calls.finish(cut=cut)
        return self._parts.take()

    def _pass_on(self, text: str) -> None:
        if self._calls is not None:
            self._calls.push(text)
        else:
            self._parts.content(text)


class CallReader:
    """Finds calls in content.

    beginning --first--> in a section --its end--> behind it --end marker or other text--> content --start marker--> in a section
    """

    def __init__(self, form: ToolFormat, parts: Parts, schemas: Schemas) -> None:
        assert form.shape is not None, f"{form.name} is not a format of marked text"
        self._shape = form.shape
        self._first = form.first
        self._parts = parts
        self._schemas = schemas
        self._proper_ends = self._ends = Markers(form.ends)
        self._loose_ends = {start: Markers((end,)) for start, end in form.loose}
        self._silent = frozenset(form.silent)
        self._markers = Markers((*form.starts, *form.silent, *self._loose_ends))
        self._state: Literal["beginning", "content", "section", "behind"] = "beginning"
        self._body: Body | None = None
        self._opened_by = ""
        self._calls_before = 0
        self._space = ""  # white space that ends the content so far
        self._pending = ""

    def push(self, text: str) -> None:
        """Take the next text."""
        text = self._pending + text
        self._pending = ""
        while text:
            match self._state:
                case "beginning":
                    rest = self._read_beginning(text)
                case "content":
                    rest = self._read_content(text)
                case "section":
                    rest = self._read_section(text)
                case "behind":
                    rest = self._read_behind(text)
            if rest is None:
                self._pending = text
                return
            text = rest

    def finish(self, *, cut: bool) -> None:
        """The text has ended."""
        text, self._pending = self._pending, ""
        if self._state == "section":
            assert self._body is not None
            self._body.finish(text, cut=cut)
            self._leave_section()
        else:
            self._content(text)
        if self._parts.num_calls == 0:
            self._parts.content(self._space)
        self._space = ""

    def _read_beginning(self, text: str) -> str | None:
        """White space before the first call is not shown, wherever that is."""
        bare = text.lstrip()
        self._content(text[: len(text) - len(bare)])
        if not bare:
            return ""
        self._state = "content"
        if bare[0] in self._first:
            self._open_section("")
        return bare

    def _read_content(self, text: str) -> str | None:
        found = self._markers.find(text)
        if found is None:
            certain = len(text) - self._markers.held(text)
            self._content(text[:certain])
            return text[certain:] if certain else None
        self._content(text[: found.start()])
        if found.group() not in self._silent:
            self._open_section(found.group())
        return text[found.end() :]

    def _open_section(self, marker: str) -> None:
        self._opened_by = marker
        self._calls_before = self._parts.num_calls
        self._ends = self._loose_ends.get(marker, self._proper_ends)
        shape = _LOOSE if marker in self._loose_ends else self._shape
        self._body = shape.body(self._parts, marker, self._ends, self._schemas)
        self._state = "section"

    def _read_section(self, text: str) -> str | None:
        assert self._body is not None
        rest = self._body.feed(text)
        if self._parts.num_calls > self._calls_before:
            self._space = ""
        if self._body.state == "open":
            # What the reader has left needs more text to be understood.
            self._pending = rest
            return ""
        self._leave_section()
        return rest

    def _leave_section(self) -> None:
        assert self._body is not None
        has_calls = self._parts.num_calls > self._calls_before
        if has_calls:
            self._space = ""
        if self._body.state == "failed":
            raw = self._body.raw
            self._content(raw.strip(_BETWEEN_CALLS) if has_calls else self._opened_by + raw)
        self._body = None
        self._state = "behind" if has_calls else "content"

    def _read_behind(self, text: str) -> str | None:
        bare = text.lstrip()
        found = self._ends.at_start(bare) if bare else ""
        if found == "":
            return None
        if found is not None:
            return bare[len(found) :]
        self._state = "content"
        return text

    def _content(self, text: str) -> None:
        shown = (self._space + text).rstrip()
        self._parts.content(shown)
        self._space = (self._space + text)[len(shown) :]
