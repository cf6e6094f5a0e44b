"""What every request passes on its way in, as plain ASGI layers: a request id, a proxy's prefix, then the key check."""

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


class RootPath:
    """Takes the prefix that a proxy has left on paths off them; paths without it are served as well."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path", "").startswith(self._prefix + "/"):
            scope["path"] = scope["path"][len(self._prefix) :]
        await self._app(scope, receive, send)


class KeyCheck:
    """Lets a request through if it brings one of the keys, or goes to one of the open paths; everything else is refused.

    The path is the one of the scope, which the router uses too: never rebuilt from a Host header.

    Args:
      keys: accepted keys; with none, every request passes.
      open_paths: exact paths that need no key.
      admin_keys: keys that admin_paths need, if there are any; they open all other paths too.
    """

    def __init__(
        self, app: ASGIApp, *, keys: Sequence[str], open_paths: frozenset[str], admin_keys: Sequence[str], admin_paths: frozenset[str]
    ) -> None:
        self._app = app
        self._admin_keys = [key.encode() for key in admin_keys]
        self._keys = [key.encode() for key in keys]
        if self._keys:
            self._keys += self._admin_keys
        self._open_paths = open_paths
        self._admin_paths = admin_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "no websockets here"})
            return
        keys = (self._admin_keys or self._keys) if scope["path"] in self._admin_paths else self._keys
        if scope["type"] != "http" or not keys or scope["path"] in self._open_paths or _has_key(scope, keys):
            await self._app(scope, receive, send)
            return
        message = "send a valid API key as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
        error = UserError(None, message, code="invalid_api_key", status=401)
        await error_response(Request(scope), error)(scope, receive, send)


def _has_key(scope: Scope, keys: Sequence[bytes]) -> bool:
    given: dict[bytes, list[bytes]] = {b"authorization": [], b"x-api-key": []}
    for name, value in scope["headers"]:
        if name in given:
            given[name].append(value)
    if any(len(values) > 1 for values in given.values()):
        return False
    tokens = [value.strip() for value in given[b"x-api-key"]]
    for value in given[b"authorization"]:
        scheme, _, token = value.partition(b" ")
        tokens += [token.strip()] if scheme.lower() == b"bearer" else []
    # Every key is compared, in constant time each, so that the time tells nothing about which one was close.
    matches = [hmac.compare_digest(token, key) for token in tokens for key in keys]
    return any(matches)
