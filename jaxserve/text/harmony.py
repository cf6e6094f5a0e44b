"""Answers in channels, as gpt-oss writes them: each message has a header that says whether it is reasoning, a tool call or the answer.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>

The prompt ends with <|start|>assistant, so that the first header has lost its beginning.
"""

from __future__ import annotations

import re
from typing import Literal

from jaxserve.text.answer import Markers, Part, Parts

_BEGIN = ("<|channel|>", "<|start|>")
_MESSAGE = "<|message|>"
_RECIPIENT = re.compile(r"\bto=([\w.\-]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_MAX_HEADER_CHARS = 512


class HarmonySplitter:
    """Takes an answer in channels apart.

    Args:
      has_tools: calls of functions are calls; else they are content, as nobody offered a tool.
    """

    def __init__(self, *, has_tools: bool) -> None:
        self._parts = Parts()
        self._has_tools = has_tools
        self._headers = Markers((*_BEGIN, "to="))
        self._ends = Markers(("<|end|>", "<|return|>", "<|call|>", *_BEGIN))
        self._state: Literal["between", "header", "message"] = "between"
        self._kind: Literal["content", "reasoning", "call"] = "content"
        self._is_empty = True
        self._pending = ""

    def push(self, text: str) -> list[Part]:
        """Take the next text; returns what is certain."""
        text = self._pending + text
        self._pending = ""
        while text:
            match self._state:
                case "between":
                    rest = self._read_between(text)
                case "header":
                    rest = self._read_header(text)
                case "message":
                    rest = self._read_message(text)
            if rest is None:
                self._pending = text
                break
            text = rest
        return self._parts.take()

    def finish(self, *, cut: bool) -> list[Part]:
        """The text has ended; returns what was held back."""
        if self._state == "message":
            self._emit(self._pending)
            self._end_message(cut=cut)
        elif self._state == "between":
            self._parts.content(self._pending.strip())
        self._pending = ""
        return self._parts.take()

    def _read_between(self, text: str) -> str | None:
        bare = text.lstrip()
        found = self._headers.at_start(bare) if bare else ""
        if found == "":
            return None
        if found is None:
            self._begin_message("final", None)
            return text
        self._state = "header"
        return bare

    def _read_header(self, text: str) -> str | None:
        end = text.find(_MESSAGE, 0, _MAX_HEADER_CHARS)
        if end < 0:
            if len(text) < _MAX_HEADER_CHARS:
                return None
            self._begin_message("final", None)
            return text
        header = text[:end]
        channel, recipient = _CHANNEL.findall(header), _RECIPIENT.search(header)
        self._begin_message(channel[-1] if channel else "final", recipient[1] if recipient else None)
        return text[end + len(_MESSAGE) :]

    def _begin_message(self, channel: str, recipient: str | None) -> None:
        self._state = "message"
        self._is_empty = True
        if recipient is not None and recipient.startswith("functions."):
            self._kind = "call" if self._has_tools else "content"
            if self._has_tools:
                self._parts.begin(recipient.removeprefix("functions."))
        else:
            # Calls of built-in tools are what the model does for itself.
            self._kind = "reasoning" if channel == "analysis" or recipient is not None else "content"

    def _read_message(self, text: str) -> str | None:
        found = self._ends.find(text)
        if found is None:
            certain = len(text) - self._ends.held(text)
            self._emit(text[:certain])
            return text[certain:] if certain else None
        self._emit(text[: found.start()])
        self._end_message(cut=False)
        return text[found.start() :] if found.group() in _BEGIN else text[found.end() :]

    def _emit(self, text: str) -> None:
        self._is_empty = self._is_empty and not text.strip()
        match self._kind:
            case "content":
                self._parts.content(text)
            case "reasoning":
                self._parts.reasoning(text)
            case "call":
                self._parts.arguments(text)

    def _end_message(self, *, cut: bool) -> None:
        if self._kind == "call" and self._is_empty and not cut:
            self._parts.arguments("{}")
        self._state = "between"
