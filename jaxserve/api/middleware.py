"""What every request passes on its way in, as plain ASGI layers: a request id, then the key check."""

from __future__ import annotations

import hmac
import uuid
from collections.abc import Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxserve.api.errors import error_response
from jaxserve.api.wire import header, is_safe_id
from jaxserve.errors import UserError

OPEN_PATHS = frozenset({"/health", "/ping"})


class RequestIds:
    """Gives every answer an x-request-id: the client's own when it is harmless, else a fresh one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = header(scope, b"x-request-id")
        request_id = given if given is not None and is_safe_id(given) else uuid.uuid4().hex
        scope["request_id"] = request_id
        pair = (b"x-request-id", request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), pair]
            await send(message)

        await self._app(scope, receive, send_with_id)


class KeyCheck:
    """Lets a request through if it brings one of the keys, or goes to one of the open paths; everything else is refused.

    The path is the one of the scope, which the router uses too: never rebuilt from a Host header.

    Args:
      keys: accepted keys; with none, every request passes.
      open_paths: exact paths that need no key.
    """

    def __init__(self, app: ASGIApp, *, keys: Sequence[str], open_paths: frozenset[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no websockets here"})
            return
        if scope["type"] != "http" or not self._keys or scope["path"] in self._open_paths or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        error = UserError(None, "send a valid API key as 'Authorization: Bearer KEY'", code="invalid_api_key", status=401)
        await error_response(Request(scope), error)(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, token = given[0].partition(b" ")
        # Every key is compared, in constant time each, so that the time tells nothing about which one was close.
        matches = [hmac.compare_digest(token.strip(), key) for key in self._keys]
        return scheme.lower() == b"bearer" and any(matches)
