"""The answer to a request of /v1/responses: the response object, and the events that tell of its making, in OpenAI's order."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal

from jaxserve.api.answers import with_defaults
from jaxserve.api.blocks import Block, BlockPrinter, Change, Closed, Event, Grown, Kind, Opened
from jaxserve.api.errors import error_object
from jaxserve.api.logprobs import TokenNames, chat_logprobs
from jaxserve.api.responses_request import ResponsesRequest, seal_reasoning
from jaxserve.api.sse import named_frame
from jaxserve.api.turn import Turn
from jaxserve.request import RequestOutput, TokenLogprobs

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]

_ID_PREFIXES: dict[Kind, str] = {"text": "msg_", "reasoning": "rs_", "call": "fc_"}


class ResponsePrinter(BlockPrinter):
    """Prints one response.

    Attributes:
      id: of the response.
      status: queued until the first output.
    """

    def __init__(self, request: ResponsesRequest, turn: Turn) -> None:
        super().__init__(turn, call_prefix="call_")
        self.id = f"resp_{request.chat.options.request_id}"
        self.status: Status = "queued"
        self._request = request
        params, _ = with_defaults(request.chat.options.params, request.chat.options, turn.served.defaults)
        self._shown = {**request.shown, "temperature": params.temperature, "top_p": params.top_p}
        self._names = TokenNames(turn.served.tokenizer, as_ids=False)
        self._ids: list[str] = []
        self._created = int(time.time())
        self._completed: int | None = None
        self._error: dict[str, Any] | None = None
        self._next = 0

    def response(self) -> dict[str, Any]:
        """The response object as it is."""
        last = self._blocks.last
        reason = "max_output_tokens" if last is not None and last.finish_reason == "length" else None
        ended = self.status in ("completed", "incomplete", "cancelled", "failed")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": self.status,
            "completed_at": self._completed,
            "error": self._error,
            "incomplete_details": {"reason": reason} if self.status == "incomplete" else None,
            "model": self._turn.name,
            "output": [self._item(block) for block in self._blocks.found],
            "service_tier": "default",
            **self._shown,
            "usage": self._usage(last) if ended and last is not None else None,
        }

    def cancel(self) -> None:
        """The client wants no more of it."""
        self.status = "cancelled"

    def begin(self, output: RequestOutput) -> Iterator[Event]:
        """The response has been made, and is being worked on."""
        self.status = "in_progress"
        if self._next == 0:
            yield self._event("response.created", response=self.response())
        yield self._event("response.in_progress", response=self.response())

    def queue(self) -> Iterator[bytes]:
        """The events of a response that waits in the background."""
        for kind in ("response.created", "response.queued"):
            yield named_frame(self._event(kind, response=self.response()))

    def show(self, change: Change) -> Iterator[Event]:
        """The events for a change of a block."""
        match change:
            case Opened(block):
                self._ids.append(_ID_PREFIXES[block.kind] + uuid.uuid4().hex)
                empty = self._item(block)
                yield self._event("response.output_item.added", output_index=block.index, item=empty)
                yield from self._part(block, "added")
            case Grown(block, text, logprobs):
                extra = {"logprobs": _without_bytes(self._logprobs(logprobs))} if block.kind == "text" else {}
                yield self._event(f"response.{self._names_of(block)[0]}.delta", **self._place(block), delta=text, **extra)
            case Closed(block):
                extra = {"name": block.name} if block.kind == "call" else {}
                extra |= {"logprobs": _without_bytes(self._logprobs(block.logprobs))} if block.kind == "text" else {}
                kind, member = self._names_of(block)
                yield self._event(f"response.{kind}.done", **self._place(block), **{member: block.text}, **extra)
                yield from self._part(block, "done")
                yield self._event("response.output_item.done", output_index=block.index, item=self._item(block))

    def end(self) -> Iterator[Event]:
        """The response is complete, or as complete as its limit, or the server's operator, allows."""
        last = self._blocks.last
        assert last is not None, "a stream ended well without any output"
        if not self._blocks.found:
            for change in self._blocks.open_empty():
                yield from self.show(change)
        self.status = "incomplete" if last.finish_reason in ("length", "abort") else "completed"
        self._completed = int(time.time())
        yield self._event(f"response.{self.status}", response=self.response())

    def fail(self, error: Exception) -> Iterator[Event]:
        """The response has failed."""
        self.status = "failed"
        self._error = {"code": "server_error", "message": error_object(error)["error"]["message"]}
        yield self._event("response.failed", response=self.response())

    def _event(self, kind: str, **members: Any) -> Event:
        event = {"type": kind, "sequence_number": self._next, **members}
        self._next += 1
        return event

    def _names_of(self, block: Block) -> tuple[str, str]:
        """What events call the text of a block, and the member that holds it in the end."""
        match block.kind:
            case "text":
                return "output_text", "text"
            case "call":
                return "function_call_arguments", "arguments"
            case "reasoning":
                return "reasoning_summary_text" if self._request.summarizes else "reasoning_text", "text"

    def _place(self, block: Block) -> dict[str, Any]:
        place: dict[str, Any] = {"item_id": self._ids[block.index], "output_index": block.index}
        if block.kind == "call":
            return place
        return place | {"summary_index" if block.kind == "reasoning" and self._request.summarizes else "content_index": 0}

    def _part(self, block: Block, what: Literal["added", "done"]) -> Iterator[Event]:
        if block.kind != "call":
            kind = "reasoning_summary_part" if block.kind == "reasoning" and self._request.summarizes else "content_part"
            yield self._event(f"response.{kind}.{what}", **self._place(block), part=self._content(block))

    def _content(self, block: Block) -> dict[str, Any]:
        if block.kind == "text":
            return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": self._logprobs(block.logprobs)}
        return {"type": "summary_text" if self._request.summarizes else "reasoning_text", "text": block.text}

    def _item(self, block: Block) -> dict[str, Any]:
        """A block as an item of the output; one that has just been opened is empty."""
        status = {"open": "in_progress", "whole": "completed", "cut": "incomplete"}[block.state]
        item: dict[str, Any] = {"id": self._ids[block.index], "status": status}
        content = [] if block.state == "open" and not block.text else [self._content(block)] if block.kind != "call" else []
        match block.kind:
            case "text":
                return item | {"type": "message", "role": "assistant", "content": content}
            case "call":
                return item | {"type": "function_call", "call_id": block.call_id, "name": block.name, "arguments": block.text}
            case "reasoning":
                summarizes = self._request.summarizes
                sealed = {"encrypted_content": seal_reasoning(block.text)} if self._request.encrypts else {}
                return (
                    item
                    | {"type": "reasoning", "summary": content if summarizes else [], "content": [] if summarizes else content}
                    | sealed
                )

    def _logprobs(self, positions: tuple[TokenLogprobs, ...] | list[TokenLogprobs]) -> list[dict[str, Any]]:
        top = self._request.chat.options.params.logprobs
        return [] if top is None else chat_logprobs(positions, top, self._names)["content"]

    def _usage(self, last: RequestOutput) -> dict[str, Any]:
        thoughts = "".join(block.text for block in self._blocks.found if block.kind == "reasoning")
        encode = self._turn.served.tokenizer.encode
        reasoning = min(last.num_output_tokens, len(encode(thoughts, add_special_tokens=False))) if thoughts else 0
        num_prompt = len(self._turn.prompt_ids)
        return {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": max(0, last.num_cached_tokens), "cache_write_tokens": 0},
            "output_tokens": last.num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": reasoning},
            "total_tokens": num_prompt + last.num_output_tokens,
        }


def _without_bytes(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log-probabilities as events have them, which say less than the items."""
    return [
        {
            "token": entry["token"],
            "logprob": entry["logprob"],
            "top_logprobs": [{"token": top["token"], "logprob": top["logprob"]} for top in entry["top_logprobs"]],
        }
        for entry in entries
    ]
