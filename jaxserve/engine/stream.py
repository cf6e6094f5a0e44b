"""The outputs of a request on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from jaxserve.request import RequestOutput, merge_outputs


class OutputStream:
    """The outputs of one request, as an async iterator that ends after the one with a finish reason.

    Outputs that come faster than they are read are merged; what a slow reader leaves unread is bounded by the answer's length.

    Attributes:
      name: what operators may call it by, beside its id; set by whoever knows one.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.id = request_id
        self.name: str | None = None
        self._abort = abort
        self._unread: list[RequestOutput] = []
        self._arrived = asyncio.Event()
        self._ended = False

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if not self._ended:
            await self._arrived.wait()
            self._arrived.clear()
        if not self._unread:
            raise StopAsyncIteration
        unread, self._unread = self._unread, []
        return merge_outputs(unread)

    def abort(self) -> None:
        """Give the request up; its pages are free within a step. Harmless when it has ended."""
        if not self._ended:
            self._ended = True
            self._unread.clear()
            self._arrived.set()
            self._abort(self.id)

    def put(self, output: RequestOutput) -> None:
        """Hand an output to the reader; called on the event loop."""
        if self._ended:
            return
        self._unread.append(output)
        self._ended = output.finish_reason is not None
        self._arrived.set()


def start_all(starting: Iterable[OutputStream]) -> list[OutputStream]:
    """The streams of requests that start as they are iterated over; if one cannot, those before it are aborted."""
    streams: list[OutputStream] = []
    try:
        for stream in starting:
            streams.append(stream)
    except BaseException:
        for stream in streams:
            stream.abort()
        raise
    return streams
