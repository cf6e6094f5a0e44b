"""The frame of every POST route: is the model ready, is the body whole; then the answer, and silence when the client has left."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

from starlette.types import Receive, Scope, Send

from jaxserve.api.answers import ready
from jaxserve.api.errors import ClientGoneError
from jaxserve.api.wire import read_json_body

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncEngine


class JsonEndpoint(abc.ABC):
    """An ASGI app that takes a JSON body; the router has checked path and method."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.server = engine.config.server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ready(self.engine)
        try:
            body = await read_json_body(scope, receive, send, max_bytes=self.server.max_body_bytes, timeout_s=self.server.read_timeout_s)
            if body is not None:
                await self.answer(body, receive, send)
        except ClientGoneError:
            return

    @abc.abstractmethod
    async def answer(self, body: bytes, receive: Receive, send: Send) -> None:
        """Answer one request; whatever is raised before the answer began becomes an error reply."""
