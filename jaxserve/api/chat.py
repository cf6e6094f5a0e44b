"""POST /v1/chat/completions, whole or streamed.

1. Read and check the body; render the conversation and tokenize it, off the event loop when it is long.
2. Decide how answers are read: reasoning and tool calls. Submit n requests.
3. Carry their outputs to the client in OpenAI's shape, with vLLM's additions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import orjson
from starlette.types import Receive, Send

from jaxserve.api.answers import Running, UsageCount, answer_head, with_usage
from jaxserve.api.chunks import ChunkPrinter
from jaxserve.api.conversation import plain_text
from jaxserve.api.endpoint import JsonEndpoint
from jaxserve.api.logprobs import TokenNames, chat_logprobs, is_heavy, prompt_logprobs
from jaxserve.api.protocol import ChatRequest, decode_chat
from jaxserve.api.reading import AnswerReader
from jaxserve.api.sse import frame, stream_answer
from jaxserve.api.turn import Turn, begin_turn
from jaxserve.api.wire import INLINE_BYTES, INLINE_CHARS, off_loop, send_json
from jaxserve.request import RequestOutput, merge_outputs
from jaxserve.text.answer import CallArguments, CallStart, Content, Part, Reasoning


class ChatEndpoint(JsonEndpoint):
    """The ASGI app of the route."""

    async def answer(self, body: bytes, receive: Receive, send: Send) -> None:
        """Answer one chat request."""
        request = await off_loop(len(body) > INLINE_BYTES, lambda: decode_chat(body))
        request = dataclasses.replace(request, options=with_usage(request.options, self.engine.config))
        turn = await begin_turn(self.engine, request)
        printer = ChatPrinter(request, turn)
        async with Running(receive, turn.streams) as running:
            if request.options.stream:
                interval = request.options.stream_interval
                await stream_answer(send, running, printer, write_timeout_s=self.server.write_timeout_s, interval=interval)
                return
            outputs = [await running.collect(stream) for stream in turn.streams]
        heavy = is_heavy(*outputs) or (turn.reading is not None and sum(len(output.text) for output in outputs) > INLINE_CHARS)
        await send_json(send, await off_loop(heavy, lambda: printer.whole(outputs)))


class ChatPrinter(ChunkPrinter):
    """The answers to one chat request in OpenAI's shapes: `whole`, or `render` piece by piece."""

    def __init__(self, request: ChatRequest, turn: Turn) -> None:
        options, reading = request.options, turn.reading
        kind = "chat.completion.chunk" if options.stream else "chat.completion"
        head = answer_head("chatcmpl", options.request_id, kind, turn.name)
        super().__init__(options, UsageCount([len(turn.prompt_ids)], options.params.n), head)
        # Of the first chunk, or of the answer that is not streamed.
        self._prompt: dict[str, Any] = {"prompt_token_ids": turn.prompt_ids} if options.return_token_ids else {}
        if request.return_prompt_text:
            self._prompt["prompt_text"] = turn.prompt_text
        self._names = TokenNames(turn.served.tokenizer, as_ids=options.tokens_as_ids)
        # Reasoning is counted by tokenizing it again, as in /v1/responses.
        self._tokenizer = turn.served.tokenizer if reading is not None and reading.reasoning is not None else None
        last = request.rendering.messages[-1]
        self._echo = plain_text(last["content"]) if options.echo and last["role"] == "assistant" else ""
        self._legacy = request.rendering.choice.legacy
        self._readers = [AnswerReader(reading, call_prefix="chatcmpl-tool-") for _ in range(options.params.n)]
        self._unread: list[list[RequestOutput]] = [[] for _ in range(options.params.n)]  # outputs whose text a reader still holds
        self._begun = [False] * options.params.n
        wants_extras = options.params.num_logprobs is not None or options.return_token_ids or options.continuous_usage
        self._plain = reading is None and not wants_extras
        # All of a plain chunk but its text is the same through a stream: printed once.
        before = b"data: " + orjson.dumps(self._head)[:-1] + b',"choices":[{"index":'
        self._before = [before + b'%d,"delta":{"content":' % index for index in range(options.params.n)]

    def render(self, index: int, output: RequestOutput) -> bytes:
        """The events for an output of choice `index`: role, text, finish, as far as they are due."""
        self._usage.see(index, output)
        if self._plain and output.finish_reason is None and self._begun[index]:
            return self._before[index] + orjson.dumps(output.text) + b'},"logprobs":null,"finish_reason":null}]}\n\n'
        events = b"" if self._begun[index] else self._first(index)
        self._begun[index] = True
        deltas = [_delta(part, self._legacy) for part in self._readers[index].parts(output)]
        if not deltas and output.finish_reason is None:
            self._unread[index].append(output)
            return events
        extras = self._extras(merge_outputs([*self._unread[index], output]))
        self._unread[index].clear()
        for delta in deltas:
            events += self._chunk(index, delta, **extras)
            extras = {}
        if output.finish_reason is not None:
            reason = self._readers[index].finish_reason(output.finish_reason)
            events += self._chunk(index, {}, **extras, finish_reason=reason, stop_reason=output.stop_reason)
        return events

    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """One choice of an answer that is not streamed."""
        self._usage.see(index, output)
        return {
            "index": index,
            "message": _message(self._readers[index].parts(output), self._echo, self._legacy),
            "logprobs": None,
            **self._extras(output),
            "finish_reason": self._readers[index].finish_reason(output.finish_reason),
            "stop_reason": output.stop_reason,
        }

    def whole(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The body of an answer that is not streamed."""
        choices = [self.choice(index, output) for index, output in enumerate(outputs)]
        answer: dict[str, Any] = {**self._head, "choices": choices, "usage": self.total()}
        if self._options.params.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(outputs[0].prompt_logprobs or (), self._options.params.prompt_logprobs, self._names)
        return orjson.dumps(answer | self._prompt)

    @property
    def ends_heavily(self) -> bool:
        """Whether there is much reasoning to be counted."""
        return self._options.include_usage and sum(len(text) for reader in self._readers for text in reader.thoughts) > INLINE_CHARS

    def total(self) -> dict[str, Any]:
        """Usage of all choices, with that of their reasoning where the model's can be told from the rest."""
        usage = self._usage.total()
        if self._tokenizer is not None:
            counts = [len(self._tokenizer.encode("".join(reader.thoughts), add_special_tokens=False)) for reader in self._readers]
            usage["completion_tokens_details"] = {"reasoning_tokens": min(sum(counts), usage["completion_tokens"])}
        return usage

    def _first(self, index: int) -> bytes:
        """What comes before any token, with the usage that was until then."""
        usage: dict[str, Any] = {"usage": self._usage.before(index)} if self._options.continuous_usage else {}
        events = self._chunk(index, {"role": "assistant", "content": ""}, top=usage if any(self._begun) else self._prompt | usage)
        return events + (self._chunk(index, {"content": self._echo}, top=usage) if self._echo else b"")

    def _extras(self, output: RequestOutput) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        num_logprobs = self._options.params.num_logprobs
        if num_logprobs is not None and output.logprobs:
            extras["logprobs"] = chat_logprobs(output.logprobs, num_logprobs, self._names)
        if self._options.return_token_ids:
            extras["token_ids"] = output.token_ids
        return extras

    def _chunk(self, index: int, delta: dict[str, Any], *, top: dict[str, Any] | None = None, **choice: Any) -> bytes:
        body = {**self._head, "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **choice}]}
        if self._options.continuous_usage:
            body["usage"] = self._usage.of(index)
        return frame(orjson.dumps(body | (top or {})))


def _delta(part: Part, legacy: bool) -> dict[str, Any]:
    match part:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning": text, "reasoning_content": text}
        case CallStart(_, name) if legacy:
            return {"function_call": {"name": name, "arguments": ""}}
        case CallArguments(_, text) if legacy:
            return {"function_call": {"arguments": text}}
        case CallStart(index, name, call_id):
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _message(parts: list[Part], echo: str, legacy: bool) -> dict[str, Any]:
    """The whole message; content is null where there is none."""
    content = echo + "".join(part.text for part in parts if isinstance(part, Content))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    calls: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, CallStart):
            calls.append({"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}})
        elif isinstance(part, CallArguments):
            calls[-1]["function"]["arguments"] += part.text
    is_empty = not content and bool(calls or reasoning)
    message: dict[str, Any] = {"role": "assistant", "content": None if is_empty else content, "refusal": None}
    if reasoning:
        message |= {"reasoning": reasoning, "reasoning_content": reasoning}
    if calls:
        message |= {"function_call": calls[0]["function"]} if legacy else {"tool_calls": calls}
    return message
