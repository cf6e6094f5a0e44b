"""/v1/messages and /v1/messages/count_tokens: Anthropic's API over the same path as chat.

1. Read and check the body in Anthropic's names.
2. Begin the turn as chat does, or only count the tokens of its prompt.
3. Carry the answer to the client as Anthropic's events or as one message; errors have Anthropic's shape on these paths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.types import Receive, Send

from jaxserve.api import examples
from jaxserve.api.answers import Running, ready, served_name
from jaxserve.api.endpoint import JsonEndpoint
from jaxserve.api.fields import Fields
from jaxserve.api.json_door import parse_object
from jaxserve.api.messages_printer import MessagePrinter
from jaxserve.api.messages_request import FOREIGN, FOREIGN_TO_COUNT, read_count, read_messages_request
from jaxserve.api.operation import Body, Operation
from jaxserve.api.sse import stream_answer
from jaxserve.api.turn import begin_turn, render_prompt
from jaxserve.api.wire import INLINE_BYTES, off_loop, send_json

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncEngine

_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": {"type": "object", "required": ["type", "text"]}}
BY_HAND = {"system": {"anyOf": [_TEXT, _TEXTS, {"type": "null"}]}, "tool_choice": {"type": ["object", "null"]}}


def messages_operations(engine: AsyncEngine) -> list[Operation]:
    """The routes."""
    return [
        Operation(
            path="/v1/messages", methods=("POST",), handler=MessagesEndpoint(engine), tag="generation", streams=True,
            summary="Answer a conversation, in Anthropic's shape",
            body=Body(read_messages_request, examples.MESSAGES, foreign=FOREIGN, by_hand=BY_HAND),
        ),
        Operation(
            path="/v1/messages/count_tokens", methods=("POST",), handler=CountEndpoint(engine), tag="tokens",
            summary="How many tokens a conversation in Anthropic's shape has",
            body=Body(read_count, examples.COUNT, foreign=FOREIGN_TO_COUNT, by_hand=BY_HAND),
        ),
    ]  # fmt: skip


class MessagesEndpoint(JsonEndpoint):
    """The ASGI app that answers."""

    async def answer(self, body: bytes, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = await off_loop(len(body) > INLINE_BYTES, lambda: read_messages_request(Fields(parse_object(body))))
        printer = MessagePrinter(request, await begin_turn(self.engine, request))
        async with Running(receive, printer.streams) as running:
            if request.options.stream:
                await stream_answer(send, running, printer, write_timeout_s=self.server.write_timeout_s)
                return
            await printer.collect(running)
        await send_json(send, printer.message())


class CountEndpoint(JsonEndpoint):
    """The ASGI app that counts."""

    gives = None

    async def answer(self, body: bytes, receive: Receive, send: Send) -> None:
        """Answer with the number of tokens of the prompt."""
        model, rendering = await off_loop(len(body) > INLINE_BYTES, lambda: read_count(Fields(parse_object(body))))
        served_name(self.engine.config, model)
        ids, _ = await render_prompt(ready(self.engine), rendering, add_special_tokens=False)
        await send_json(send, {"input_tokens": len(ids)})
