"""Conversations that arrive as a list of what happened, put together into the messages of a chat template.

One message of the assistant holds what it thought, what it said and then the calls that it made; /v1/responses and /v1/messages tell of
these one by one.
"""

from __future__ import annotations

from typing import Any

Content = str | list[dict[str, str]]


class Thread:
    """The messages so far; they are plain dicts, as `read_messages` makes them."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}

    def say(self, role: str, content: Content) -> None:
        """Somebody says something."""
        content = _plain(content)
        if role == "assistant":
            _extend(self._answer(), content)
        elif role in ("system", "developer") and self.messages and all(each["role"] == role for each in self.messages):
            # Many templates know of one message of instructions only, the first.
            _extend(self.messages[0], content)
        else:
            self.messages.append({"role": role, "content": content})

    def think(self, text: str) -> None:
        """The assistant thinks; some clients send back items that hold none of it."""
        if not text:
            return
        message = self._answer()
        message["reasoning_content"] = message.get("reasoning_content", "") + text

    def call(self, call_id: str, function: dict[str, Any]) -> None:
        """The assistant calls a tool; calls side by side belong to one message."""
        last = self.messages[-1] if self.messages else None
        message = last if last is not None and last["role"] == "assistant" else self._answer()
        message.setdefault("tool_calls", []).append({"type": "function", "id": call_id, "function": function})
        self._names[call_id] = function["name"]

    def result(self, call_id: str, content: Content) -> None:
        """A tool answers; some templates want to know which one."""
        named = {"name": self._names[call_id]} if call_id in self._names else {}
        self.messages.append({"role": "tool", "content": _plain(content), "tool_call_id": call_id, **named})

    def _answer(self) -> dict[str, Any]:
        """The message of the assistant that goes on, or a new one: what comes behind calls is one."""
        if not self.messages or self.messages[-1]["role"] != "assistant" or "tool_calls" in self.messages[-1]:
            self.messages.append({"role": "assistant", "content": ""})
        return self.messages[-1]


def _extend(message: dict[str, Any], content: Content) -> None:
    before = message["content"]
    message["content"] = content if not before else [*_parts(before), *_parts(content)]


def _plain(content: Content) -> Content:
    """One part is as good as a string, which every template takes."""
    return content[0]["text"] if isinstance(content, list) and len(content) == 1 else content


def _parts(content: Content) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content
