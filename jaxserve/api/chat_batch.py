"""POST /v1/chat/completions/batch: many conversations in one request of vLLM's, a choice for each; neither streamed nor with tools.

1. Read the conversations, and once for all of them what a chat request says besides.
2. Start an answer to each, all or none.
3. Show the answers as the choices of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from starlette.types import Receive, Send

from jaxserve.api import examples
from jaxserve.api.answers import Running, UsageCount, answer_head
from jaxserve.api.chat import ChatPrinter
from jaxserve.api.conversation import read_messages
from jaxserve.api.endpoint import JsonEndpoint
from jaxserve.api.fields import Fields
from jaxserve.api.json_door import is_array, json_type, parse_object
from jaxserve.api.logprobs import is_heavy
from jaxserve.api.operation import Body, Operation
from jaxserve.api.parameters import UNSUPPORTED_CODE
from jaxserve.api.protocol import ChatRequest, read_chat
from jaxserve.api.turn import Turn, begin_turn
from jaxserve.api.wire import INLINE_BYTES, INLINE_CHARS, off_loop, send_json
from jaxserve.request import RequestOutput

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncEngine

MAX_CONVERSATIONS = 256
# What chat requests take and these do not: name -> the value with which it asks for nothing.
_NEUTRAL: Mapping[str, Any] = {
    "stream": False, "stream_options": {}, "stream_interval": 1, "n": 1, "use_beam_search": False, "tools": [], "tool_choice": "none",
    "parallel_tool_calls": True, "functions": [], "function_call": "none", "prompt_logprobs": None, "return_prompt_text": False,
}  # fmt: skip
_BY_HAND = {
    "messages": {
        "type": "array", "minItems": 1, "maxItems": MAX_CONVERSATIONS,
        "items": {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["role"]}},
    },
}  # fmt: skip


def batch_operation(engine: AsyncEngine) -> Operation:
    """The line of the route table."""
    body = Body(read_batch, examples.CHAT_BATCH, by_hand=_BY_HAND, foreign=frozenset(_NEUTRAL))
    return Operation(
        path="/v1/chat/completions/batch", methods=("POST",), handler=ChatBatchEndpoint(engine), tag="generation",
        summary="Answer many conversations", body=body,
    )  # fmt: skip


class ChatBatchEndpoint(JsonEndpoint):
    """The ASGI app of the route."""

    async def answer(self, body: bytes, receive: Receive, send: Send) -> None:
        """Answer all conversations of one request."""
        requests = await off_loop(len(body) > INLINE_BYTES, lambda: read_batch(Fields(parse_object(body))))
        turns = await self._begin(requests)
        async with Running(receive, [stream for turn in turns for stream in turn.streams]) as running:
            outputs = [await running.collect(stream) for stream in running.streams]
        heavy = is_heavy(*outputs) or sum(len(output.text) for output in outputs) > INLINE_CHARS
        await send_json(send, await off_loop(heavy, lambda: _whole(requests, turns, outputs)))

    async def _begin(self, requests: Sequence[ChatRequest]) -> list[Turn]:
        """Start an answer to each; if one cannot be, none is. Raises: UserError, QueueFullError, EngineUnavailableError."""
        turns: list[Turn] = []
        try:
            for request in requests:
                turns.append(await begin_turn(self.engine, request))
        except BaseException:
            for turn in turns:
                for stream in turn.streams:
                    stream.abort()
            raise
        return turns


def read_batch(fields: Fields) -> list[ChatRequest]:
    """The body as one chat request for each conversation; they share all but their messages.

    Raises: UserError naming the field at fault.
    """
    for name, neutral in _NEUTRAL.items():
        if fields.given(name) and fields.raw(name) != neutral:
            raise fields.error(name, "is not for many conversations at once; use /v1/chat/completions", code=UNSUPPORTED_CODE)
    conversations = fields.raw("messages")
    if conversations is None:
        raise fields.error("messages", "is required")
    if not is_array(conversations) or not 0 < len(conversations) <= MAX_CONVERSATIONS:
        raise fields.error("messages", f"must be an array of 1 to {MAX_CONVERSATIONS} conversations")
    named: dict[str, Any] = {}
    for position, conversation in enumerate(conversations):
        name = f"messages[{position}]"
        if not is_array(conversation):
            raise fields.error(name, f"must be an array of messages, not {json_type(conversation)}")
        named[name] = conversation
    requests: list[ChatRequest] = []
    for name in named:
        request = read_chat(fields, read_messages(Fields(named), name))
        options = requests[0].options if requests else request.options  # one request_id for all
        requests.append(dataclasses.replace(request, options=options, rendering=dataclasses.replace(request.rendering, field=name)))
    return requests


def _whole(requests: Sequence[ChatRequest], turns: Sequence[Turn], outputs: Sequence[RequestOutput]) -> bytes:
    """The body of the answer."""
    options = requests[0].options
    choices: list[dict[str, Any]] = []
    usage = UsageCount([len(turn.prompt_ids) for turn in turns], 1)
    details: list[dict[str, int]] = []
    for index, (request, turn, output) in enumerate(zip(requests, turns, outputs, strict=True)):
        usage.see(index, output)
        printer = ChatPrinter(request, turn)
        choices.append({**printer.choice(0, output), "index": index})
        details.append(printer.total().get("completion_tokens_details", {}))
    head = answer_head("chatcmpl", options.request_id, "chat.completion", turns[0].name)
    total = usage.total()
    if details[0]:
        total["completion_tokens_details"] = {name: sum(each[name] for each in details) for name in details[0]}
    return orjson.dumps({**head, "choices": choices, "usage": total})
