"""POST /v1/chat/completions, whole or streamed.

1. Read and check the body; render the conversation and tokenize it, off the event loop when it is long.
2. Decide how answers are read: reasoning and tool calls. Submit n requests.
3. Carry their outputs to the client in OpenAI's shape, with vLLM's additions.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from starlette.types import Receive, Send

from jaxserve.api.answers import Running, UsageCount, answer_id, check_chars, ready, served_name, submit, truncate
from jaxserve.api.conversation import count_chars, plain_text
from jaxserve.api.endpoint import JsonEndpoint
from jaxserve.api.logprobs import TokenNames, chat_logprobs, is_heavy, prompt_logprobs
from jaxserve.api.protocol import ChatRequest, Options, Rendering, decode_chat
from jaxserve.api.reading import AnswerReader, Reading, plan_reading
from jaxserve.api.sse import frame, stream_answer
from jaxserve.api.wire import INLINE_BYTES, INLINE_CHARS, off_loop, send_json
from jaxserve.request import RequestOutput, merge_outputs

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import OutputStream
    from jaxserve.engine.load import ServedModel


# More than any marker of reasoning, with the white space behind it.
PROMPT_END_CHARS = 128


class ChatEndpoint(JsonEndpoint):
    """The ASGI app of the route."""

    async def answer(self, body: bytes, receive: Receive, send: Send) -> None:
        """Answer one chat request."""
        request = await off_loop(len(body) > INLINE_BYTES, lambda: decode_chat(body))
        options = request.options
        name = served_name(self.engine.config, options.model)
        served = ready(self.engine)
        ids, prompt_end = await render_prompt(served, request.rendering, options.add_special_tokens)
        prompt_ids = truncate(ids, options, served.max_len)
        reading = plan_reading(self.server, served, request, prompt_end)
        params = options.params if reading is None else reading.params(options.params)
        streams = await submit(self.engine, "messages", [prompt_ids], options, params)
        printer = ChatPrinter(request, name, prompt_ids, served, reading)
        async with Running(receive, streams) as running:
            if options.stream:
                await stream_answer(send, running, printer, write_timeout_s=self.server.write_timeout_s)
                return
            outputs = [await running.collect(stream) for stream in streams]
        heavy = is_heavy(*outputs) or (reading is not None and sum(len(output.text) for output in outputs) > INLINE_CHARS)
        await send_json(send, await off_loop(heavy, lambda: printer.whole(outputs)))


async def render_prompt(served: ServedModel, rendering: Rendering, add_special_tokens: bool) -> tuple[list[int], str]:
    """Token ids of a conversation as the model's chat template prints it, and its last characters.

    Raises: UserError for a conversation that the template refuses, or one far too long.
    """
    chars = count_chars(rendering.messages) + sum(len(str(tool)) for tool in rendering.tools or ())
    check_chars("messages", chars, served.max_len)

    def work() -> tuple[list[int], str]:
        text = served.chat.render(
            rendering.messages,
            tools=rendering.tools,
            add_generation_prompt=rendering.add_generation_prompt,
            continue_final_message=rendering.continue_final_message,
            kwargs=rendering.kwargs,
        )
        # A template may print documents and other variables that were not counted above.
        check_chars("messages", len(text), served.max_len)
        return served.tokenizer.encode(text, add_special_tokens=add_special_tokens), text[-PROMPT_END_CHARS:]

    return await off_loop(chars > INLINE_CHARS or bool(rendering.kwargs), work)


class ChatPrinter:
    """The answers to one chat request in OpenAI's shapes: `whole`, or `render` piece by piece.

    Args:
      reading: how to find reasoning and calls in them; None if all is content.
    """

    def __init__(self, request: ChatRequest, name: str, prompt_ids: list[int], served: ServedModel, reading: Reading | None) -> None:
        options = request.options
        self._options: Options = options
        self._prompt_ids = prompt_ids
        self._usage = UsageCount([len(prompt_ids)], options.params.n)
        self._names = TokenNames(served.tokenizer, as_ids=options.tokens_as_ids)
        last = request.rendering.messages[-1]
        self._echo = plain_text(last["content"]) if options.echo and last["role"] == "assistant" else ""
        self._readers = None if reading is None else [AnswerReader(reading) for _ in range(options.params.n)]
        self._unread: list[list[RequestOutput]] = [[] for _ in range(options.params.n)]  # outputs whose text a reader still holds
        self._begun = [False] * options.params.n
        kind = "chat.completion.chunk" if options.stream else "chat.completion"
        self._head = {"id": answer_id("chatcmpl", options.request_id), "object": kind, "created": int(time.time()), "model": name}
        wants_extras = options.params.logprobs is not None or options.return_token_ids or options.continuous_usage
        self._plain = reading is None and not wants_extras
        # All of a plain chunk but its text is the same through a stream: printed once.
        before = b"data: " + orjson.dumps(self._head)[:-1] + b',"choices":[{"index":'
        self._before = [before + b'%d,"delta":{"content":' % index for index in range(options.params.n)]

    def outputs(self, running: Running, stream: OutputStream) -> AsyncIterator[RequestOutput]:
        """Every output of one request."""
        return running.outputs(stream)

    def render(self, index: int, output: RequestOutput) -> bytes:
        """The events for an output of choice `index`: role, text, finish, as far as they are due."""
        self._usage.see(index, output)
        if self._plain and output.finish_reason is None and self._begun[index]:
            return self._before[index] + orjson.dumps(output.text) + b'},"logprobs":null,"finish_reason":null}]}\n\n'
        events = b"" if self._begun[index] else self._first(index)
        self._begun[index] = True
        deltas = self._deltas(index, output)
        if not deltas and output.finish_reason is None:
            self._unread[index].append(output)
            return events
        extras = self._extras(merge_outputs([*self._unread[index], output]))
        self._unread[index].clear()
        for delta in deltas:
            events += self._chunk(index, delta, **extras)
            extras = {}
        if output.finish_reason is not None:
            stop: dict[str, Any] = {} if output.stop_reason is None else {"stop_reason": output.stop_reason}
            events += self._chunk(index, {}, **extras, finish_reason=self._finish_reason(index, output), **stop)
        return events

    def last(self) -> bytes:
        """The chunk with the usage of all choices, if it was asked for."""
        if not self._options.include_usage:
            return b""
        return frame(orjson.dumps({**self._head, "choices": [], "usage": self._usage.total()}))

    def whole(self, outputs: Sequence[RequestOutput]) -> bytes:
        """The body of an answer that is not streamed."""
        choices: list[dict[str, Any]] = []
        for index, output in enumerate(outputs):
            self._usage.see(index, output)
            message = {"role": "assistant", "content": self._echo + output.text, "refusal": None}
            choice: dict[str, Any] = {
                "index": index,
                "message": message if self._readers is None else self._readers[index].message(output, self._echo),
                "logprobs": None,
                **self._extras(output),
                "finish_reason": self._finish_reason(index, output),
                "stop_reason": output.stop_reason,
            }
            choices.append(choice)
        answer: dict[str, Any] = {**self._head, "choices": choices, "usage": self._usage.total()}
        if self._options.params.prompt_logprobs is not None:
            answer["prompt_logprobs"] = prompt_logprobs(outputs[0].prompt_logprobs or (), self._options.params.prompt_logprobs, self._names)
        if self._options.return_token_ids:
            answer["prompt_token_ids"] = self._prompt_ids
        return orjson.dumps(answer)

    def _deltas(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        if self._readers is not None:
            return self._readers[index].deltas(output)
        return [{"content": output.text}] if output.text else []

    def _finish_reason(self, index: int, output: RequestOutput) -> str | None:
        return output.finish_reason if self._readers is None else self._readers[index].finish_reason(output.finish_reason)

    def _first(self, index: int) -> bytes:
        head = {"prompt_token_ids": self._prompt_ids} if self._options.return_token_ids and not any(self._begun) else {}
        events = self._chunk(index, {"role": "assistant", "content": ""}, top=head)
        return events + (self._chunk(index, {"content": self._echo}) if self._echo else b"")

    def _extras(self, output: RequestOutput) -> dict[str, Any]:
        extras: dict[str, Any] = {}
        if self._options.params.logprobs is not None and output.logprobs:
            extras["logprobs"] = chat_logprobs(output.logprobs, self._options.params.logprobs, self._names)
        if self._options.return_token_ids:
            extras["token_ids"] = output.token_ids
        return extras

    def _chunk(self, index: int, delta: dict[str, Any], *, top: dict[str, Any] | None = None, **choice: Any) -> bytes:
        body = {
            **self._head,
            "choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **choice}],
            **(top or {}),
        }
        if self._options.continuous_usage:
            body["usage"] = self._usage.of(index)
        return frame(orjson.dumps(body))
