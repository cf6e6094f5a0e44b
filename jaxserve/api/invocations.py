"""POST /invocations, by which SageMaker asks: a conversation is answered as /v1/chat/completions does, a prompt as /v1/completions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.types import Receive, Send

from jaxserve.api.chat import ChatEndpoint
from jaxserve.api.completions import CompletionEndpoint
from jaxserve.api.endpoint import JsonEndpoint
from jaxserve.api.fields import Fields
from jaxserve.api.json_door import parse_object
from jaxserve.api.wire import INLINE_BYTES, off_loop

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncEngine


class InvocationsEndpoint(JsonEndpoint):
    """The ASGI app of the route."""

    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__(engine)
        self._chat, self._completions = ChatEndpoint(engine), CompletionEndpoint(engine)

    async def answer(self, body: bytes, receive: Receive, send: Send) -> None:
        """Answer one request of either kind."""
        fields = await off_loop(len(body) > INLINE_BYTES, lambda: Fields(parse_object(body)))
        endpoint = self._chat if fields.given("messages") else self._completions
        await endpoint.answer(body, receive, send)
