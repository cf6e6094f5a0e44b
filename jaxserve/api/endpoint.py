"""The frame of every POST route: is the model ready, is the body whole; then the answer, and silence when the client has left."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Literal

from starlette.types import Receive, Scope, Send

from jaxserve.api.answers import ready
from jaxserve.api.errors import ClientGoneError
from jaxserve.api.wire import read_json_body
from jaxserve.errors import UserError

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncEngine
    from jaxserve.engine.load import ServedModel


class JsonEndpoint(abc.ABC):
    """An ASGI app that takes a JSON body; the router has checked path and method.

    Attributes:
      gives: what a model must give for the route to make sense: "text", "vectors", or None for either.
    """

    gives: Literal["text", "vectors"] | None = "text"

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.server = engine.config.server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_model(scope["path"])
        try:
            body = await read_json_body(scope, receive, send, max_bytes=self.server.max_body_bytes, timeout_s=self.server.read_timeout_s)
            if body is not None:
                await self.answer(body, receive, send)
        except ClientGoneError:
            return

    def suits(self, served: ServedModel) -> bool:
        """Whether the model gives what the route is for."""
        return self.gives in (None, "text" if served.pooling is None else "vectors")

    def _check_model(self, path: str) -> None:
        """Refuse, as vLLM does, what another kind of model is for. Raises: UserError, EngineUnavailableError."""
        served = ready(self.engine)
        if not self.suits(served):
            pooling = served.pooling
            does = "writes text" if pooling is None else f"turns texts into vectors (task {pooling.task!r})"
            message = f"the model {does}; {path[:60]} is for models that give {self.gives}"
            raise UserError("model", message, code="unsupported_endpoint", status=404)

    @abc.abstractmethod
    async def answer(self, body: bytes, receive: Receive, send: Send) -> None:
        """Answer one request; whatever is raised before the answer began becomes an error reply."""
