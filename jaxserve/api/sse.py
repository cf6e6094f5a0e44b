"""Server-sent events: the frames, the headers, and the loop that carries outputs of running requests to the client.

1. Nothing is sent before the first text, so that an error known by then is still an HTTP status.
2. Text goes out as it comes, or so many tokens at a time; tokens without text wait for the next text or the end.
3. An error later is an event, and the last one.
4. A reader who takes nothing for `write_timeout_s` loses the stream; until then outputs merge and the engine goes on.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from starlette.types import Send

from jaxserve.api.answers import Running
from jaxserve.api.errors import GenerationError
from jaxserve.api.logprobs import is_heavy
from jaxserve.api.wire import off_loop
from jaxserve.errors import EngineUnavailableError
from jaxserve.request import RequestOutput, merge_outputs

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import OutputStream

logger = logging.getLogger(__name__)

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class Chunks(Protocol):
    """Prints the outputs of an answer as events."""

    @property
    def ends_heavily(self) -> bool:
        """Whether the last events take long to make."""
        ...

    def outputs(self, running: Running, stream: OutputStream) -> AsyncIterator[RequestOutput]:
        """The outputs of one request that shall be printed."""
        ...

    def render(self, index: int, output: RequestOutput) -> bytes:
        """The events for an output of choice `index`."""
        ...

    def last(self) -> bytes:
        """The events after all choices have ended."""
        ...

    def failed(self, error: Exception) -> bytes:
        """The events that end a stream in which something went wrong."""
        ...


def frame(data: bytes) -> bytes:
    """One event."""
    return b"data: " + data + b"\n\n"


def named_frame(event: Mapping[str, Any]) -> bytes:
    """One event that is named after its type, as in the streams of /v1/responses and /v1/messages."""
    return b"event: " + event["type"].encode() + b"\n" + frame(orjson.dumps(event))


class EventStream:
    """One response of events, as an async context.

    Args:
      write_timeout_s: longest wait for the client to take a piece; then the running requests are given up.
    """

    def __init__(self, send: Send, running: Running, *, write_timeout_s: float) -> None:
        self.started = False
        self._send = send
        self._running = running
        self._timeout_s = write_timeout_s
        self._waiting_since: float | None = None

    async def __aenter__(self) -> EventStream:
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._timeout_s, self._check_reader)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._timer.cancel()

    async def write(self, events: bytes) -> None:
        """Send whole events, the headers before the first."""
        self._waiting_since = self._loop.time()
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
        await self._send({"type": "http.response.body", "body": events, "more_body": True})
        self._waiting_since = None

    async def end(self, events: bytes) -> None:
        """Send the last events."""
        await self.write(events)
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _check_reader(self) -> None:
        if self._waiting_since is not None and self._loop.time() - self._waiting_since >= self._timeout_s:
            logger.warning("stream given up: the client took nothing for %.0f s", self._timeout_s)
            self._running.give_up()
            return
        self._timer = self._loop.call_later(self._timeout_s, self._check_reader)


async def stream_answer(send: Send, running: Running, chunks: Chunks, *, write_timeout_s: float, interval: int = 1) -> None:
    """Carry everything that the running requests yield to the client.

    Args:
      interval: least tokens of an event, the first and the last of each request aside.
    Raises: what went wrong, if nothing has been sent yet.
    """
    async with EventStream(send, running, write_timeout_s=write_timeout_s) as events:
        try:
            await _carry_all(events, running, chunks, interval)
        except Exception as error:
            if not events.started:
                raise
            if not isinstance(error, GenerationError | EngineUnavailableError):
                logger.exception("stream failed")
            await events.end(chunks.failed(error))
        else:
            await events.end(await off_loop(chunks.ends_heavily, chunks.last))


async def _carry_all(events: EventStream, running: Running, chunks: Chunks, interval: int) -> None:
    if len(running.streams) == 1:
        await _carry(events, running, chunks, 0, interval)
        return
    try:
        async with asyncio.TaskGroup() as group:
            for index in range(len(running.streams)):
                group.create_task(_carry(events, running, chunks, index, interval))
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _carry(events: EventStream, running: Running, chunks: Chunks, index: int, interval: int) -> None:
    held: list[RequestOutput] = []
    num_due = 1  # tokens that an event needs, beside text
    async for output in chunks.outputs(running, running.streams[index]):
        held.append(output)
        if output.finish_reason is None and not _is_due(held, num_due):
            continue
        output = merge_outputs(held)
        held.clear()
        num_due = interval
        if output.logprobs is None and output.prompt_logprobs is None:
            frames = chunks.render(index, output)
        else:
            frames = await off_loop(is_heavy(output), functools.partial(chunks.render, index, output))
        # Text may be held back until it is certain what it is.
        if frames:
            await events.write(frames)


def _is_due(held: list[RequestOutput], num_tokens: int) -> bool:
    return any(output.text for output in held) and (num_tokens == 1 or sum(len(output.token_ids) for output in held) >= num_tokens)
