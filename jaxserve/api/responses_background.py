"""Responses that are made while nobody waits for them, and the logs in which their events can be followed, again and again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from jaxserve.api.answers import Running
from jaxserve.api.errors import ClientGoneError, GenerationError
from jaxserve.api.responses_printer import ResponsePrinter
from jaxserve.api.sse import EventStream
from jaxserve.errors import EngineUnavailableError, UserError

logger = logging.getLogger(__name__)


class EventLog:
    """The events of one response, in the order of their sequence numbers, from 0."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._frames: list[bytes] = []
        self._has_ended = False
        self._news = asyncio.Event()

    def write(self, frame: bytes) -> None:
        """One more."""
        self._frames.append(frame)
        self.num_bytes += len(frame)
        self._news.set()

    def end(self) -> None:
        """That was the last one."""
        self._has_ended = True
        self._news.set()

    async def follow(self, place: int) -> AsyncIterator[bytes]:
        """All events from a place on, as they come."""
        while True:
            # An event that nobody waits for is replaced, so that every follower can wait for the next one.
            self._news = asyncio.Event() if self._news.is_set() else self._news
            news = self._news
            if place < len(self._frames):
                yield b"".join(self._frames[place:])
                place = len(self._frames)
            elif self._has_ended:
                return
            else:
                await news.wait()


class LogResponse(Response):
    """Carries a log to a client; one that leaves takes nothing with it.

    Args:
      place: number of the first event.
    """

    def __init__(self, log: EventLog, place: int, *, write_timeout_s: float) -> None:
        super().__init__()
        self._log, self._place, self._write_timeout_s = log, place, write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with Running(receive, ()) as running, EventStream(send, running, write_timeout_s=self._write_timeout_s) as events:
                async for frames in self._log.follow(self._place):
                    await events.write(frames)
                await events.end(b"")
        except ClientGoneError:
            return


class BackgroundRun:
    """Makes a response while nobody waits for it.

    Args:
      log: where its events are written, if somebody wants to know.
      settle: called when it has been made, one way or another.
    """

    def __init__(self, printer: ResponsePrinter, log: EventLog | None, settle: Callable[[], None]) -> None:
        self._cancelled = asyncio.Event()
        self._task = asyncio.create_task(self._make(printer, log, settle))

    async def cancel(self) -> None:
        """Make no more of it; returns when the engine has been told."""
        self._cancelled.set()
        await asyncio.wait({self._task})

    async def _make(self, printer: ResponsePrinter, log: EventLog | None, settle: Callable[[], None]) -> None:
        tell = None if log is None else log.write
        try:
            async with Running(self._client, printer.streams) as running:
                await printer.collect(running, tell)
        except ClientGoneError:
            printer.cancel()
        except Exception as error:
            if not isinstance(error, GenerationError | EngineUnavailableError | UserError):
                logger.exception("background response failed")
            printer.abandon(error, tell)
        settle()
        if log is not None:
            log.end()

    async def _client(self) -> Message:
        """What ASGI would tell of a client who stays until the run is cancelled."""
        await self._cancelled.wait()
        return {"type": "http.disconnect"}
