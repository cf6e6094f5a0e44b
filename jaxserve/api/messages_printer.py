"""The answer to a request of /v1/messages: Anthropic's message, and the events that tell of its making."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from jaxserve.api.blocks import Block, BlockPrinter, Change, Closed, Event, Grown, Opened
from jaxserve.api.errors import anthropic_error
from jaxserve.api.json_door import parse_object
from jaxserve.api.protocol import ChatRequest
from jaxserve.api.turn import Turn
from jaxserve.errors import UserError
from jaxserve.request import RequestOutput

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn"]

# Thinking carries a signature that nobody checks; clients drop thinking without one.
_SIGNATURE = "unsigned"


class MessagePrinter(BlockPrinter):
    """Prints one message."""

    def __init__(self, request: ChatRequest, turn: Turn) -> None:
        super().__init__(turn, call_prefix="toolu_")
        self._id = f"msg_{request.options.request_id}"
        self._has_pinged = False

    def message(self) -> dict[str, Any]:
        """The whole message."""
        last = self._blocks.last
        assert last is not None, "a stream ended well without any output"
        return self._message([_content(block) for block in self._blocks.found], last, **self._stop(last))

    def begin(self, output: RequestOutput) -> Iterator[Event]:
        """The message without content."""
        yield {"type": "message_start", "message": self._message([], output, stop_reason=None, stop_sequence=None)}

    def show(self, change: Change) -> Iterator[Event]:
        """The events for a change of a block."""
        match change:
            case Opened(block):
                yield {"type": "content_block_start", "index": block.index, "content_block": _content(block)}
                if not self._has_pinged:
                    self._has_pinged = True
                    yield {"type": "ping"}
            case Grown(block, text):
                yield _delta(block, _TYPES[block.kind][1], text)
            case Closed(block):
                if block.kind == "reasoning":
                    yield _delta(block, "signature", _SIGNATURE)
                yield {"type": "content_block_stop", "index": block.index}

    def end(self) -> Iterator[Event]:
        """Why the message ends, and what it took."""
        last = self._blocks.last
        assert last is not None, "a stream ended well without any output"
        yield {"type": "message_delta", "delta": self._stop(last), "usage": self._usage(last)}
        yield {"type": "message_stop"}

    def fail(self, error: Exception) -> Iterator[Event]:
        """An error in the middle of a stream."""
        yield anthropic_error(error)

    def _message(self, content: list[dict[str, Any]], output: RequestOutput, **stop: str | None) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._turn.name,
            "content": content,
            **stop,
            "usage": self._usage(output),
        }

    def _stop(self, last: RequestOutput) -> dict[str, str | None]:
        reason: StopReason
        sequence: str | None = None
        if last.finish_reason == "length":
            reason = "max_tokens"
        elif last.finish_reason == "abort":
            # The server's operator has ended it; sent back as it is, it would go on.
            reason = "pause_turn"
        elif isinstance(last.stop_reason, str):
            reason, sequence = "stop_sequence", last.stop_reason
        else:
            reason = "tool_use" if any(block.kind == "call" for block in self._blocks.found) else "end_turn"
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _usage(self, output: RequestOutput) -> dict[str, int]:
        """Tokens as Anthropic counts them: those from the cache are not among the input tokens."""
        cached = max(0, output.num_cached_tokens)
        return {
            "input_tokens": len(self._turn.prompt_ids) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": output.num_output_tokens,
        }


# What a block of each kind is called, and the type and member of its deltas.
_TYPES: dict[str, tuple[str, str]] = {"text": ("text", "text"), "reasoning": ("thinking", "thinking"), "call": ("tool_use", "partial_json")}


def _delta(block: Block, member: str, text: str) -> Event:
    kind = "input_json_delta" if member == "partial_json" else f"{member}_delta"
    return {"type": "content_block_delta", "index": block.index, "delta": {"type": kind, member: text}}


def _content(block: Block) -> dict[str, Any]:
    """A block as it is shown whole, or empty when it has just been opened."""
    match block.kind:
        case "text":
            return {"type": "text", "text": block.text}
        case "reasoning":
            return {"type": "thinking", "thinking": block.text, "signature": _SIGNATURE if block.state != "open" else ""}
        case "call":
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _input(block)}


def _input(block: Block) -> dict[str, Any]:
    """The arguments; of a call that was cut off, or whose arguments are no JSON, none."""
    if block.state == "open":
        return {}
    try:
        return parse_object(block.text.encode())
    except UserError:
        return {}
