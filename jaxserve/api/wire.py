"""Bytes in and out over plain ASGI: bounded reading of request bodies, one-piece JSON replies."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import orjson
from starlette.types import Receive, Scope, Send

from jaxserve.api.errors import ClientGoneError, error_json
from jaxserve.errors import UserError

T = TypeVar("T")

# Work on more bytes or characters than this goes to a worker thread, so that the event loop stays quick.
INLINE_CHARS = 4096
INLINE_BYTES = 1 << 16
# After a refusal the rest of an upload is read and dropped, up to here, so that the client gets to read the answer.
_LINGER_BYTES = 64 << 20
_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


def is_safe_id(text: str) -> bool:
    """Whether a client's own id may be shown in headers and answers."""
    return _SAFE_ID.fullmatch(text) is not None


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of this (lower-case) name, or None."""
    for key, value in scope["headers"]:
        if key == name:
            return value.decode("latin-1")
    return None


async def off_loop(heavy: bool, function: Callable[[], T]) -> T:
    """The function's result; computed in a worker thread when it is heavy."""
    if not heavy:
        return function()
    return await asyncio.get_running_loop().run_in_executor(None, function)


async def read_json_body(scope: Scope, receive: Receive, send: Send, *, max_bytes: int, timeout_s: float) -> bytes | None:
    """The whole body of a JSON request; None if it was too large or too slow, which has then been answered with 413 or 408.

    Raises: UserError with status 415 for another type of body; ClientGoneError.
    """
    _check_type(scope)
    try:
        length = int(header(scope, b"content-length") or 0)
    except ValueError:
        raise UserError(None, "the content-length header is not a number") from None
    if length > max_bytes:
        return await _refuse(scope, receive, send, _too_large(max_bytes), timeout_s)
    try:
        async with asyncio.timeout(timeout_s):
            body = await _read(receive, max_bytes)
    except TimeoutError:
        slow = UserError(None, f"the body did not arrive within {timeout_s:g} s", code="request_timeout", status=408)
        return await _refuse(scope, receive, send, slow, 0.0)
    return body if body is not None else await _refuse(scope, receive, send, _too_large(max_bytes), timeout_s)


async def send_json(send: Send, payload: Any, *, status: int = 200) -> None:
    """Answer with one JSON document; `payload` may be encoded already."""
    body = payload if isinstance(payload, bytes) else orjson.dumps(payload)
    await _send_whole(send, body, [(b"content-type", b"application/json")], status)


async def send_bytes(send: Send, body: bytes, headers: Mapping[bytes, bytes]) -> None:
    """Answer with bytes that are no text, and further headers."""
    await _send_whole(send, body, [(b"content-type", b"application/octet-stream"), *headers.items()], 200)


async def _send_whole(send: Send, body: bytes, headers: list[tuple[bytes, bytes]], status: int) -> None:
    headers = [*headers, (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _check_type(scope: Scope) -> None:
    media_type, _, options = (header(scope, b"content-type") or "").lower().partition(";")
    if media_type.strip() != "application/json":
        shown = f"content-type {media_type.strip()!r:.60}" if media_type else "no content-type"
        raise UserError(None, f"the request has {shown}; send application/json", code="unsupported_media_type", status=415)
    charset = options.partition("charset=")[2].strip(' "')
    if charset not in ("", "utf-8", "utf8"):
        raise UserError(None, f"charset {charset!r:.40} is not supported; send utf-8", code="unsupported_media_type", status=415)
    encoding = (header(scope, b"content-encoding") or "identity").lower()
    if encoding != "identity":
        raise UserError(None, f"content-encoding {encoding!r:.40} is not supported", code="unsupported_media_type", status=415)


def _too_large(max_bytes: int) -> UserError:
    return UserError(None, f"the body is too large; at most {max_bytes} bytes are allowed", code="request_too_large", status=413)


async def _read(receive: Receive, max_bytes: int) -> bytes | None:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        body += message.get("body", b"")
        if len(body) > max_bytes:
            return None
        if not message.get("more_body", False):
            return bytes(body)


async def _refuse(scope: Scope, receive: Receive, send: Send, error: UserError, linger_s: float) -> None:
    # Closing while the client still writes would reset the connection, and the answer could be lost with it.
    body = error_json(error, scope["path"])
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    try:
        async with asyncio.timeout(linger_s):
            await _read_away(receive)
    except TimeoutError:
        # The client had its time; the connection closes now.
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _read_away(receive: Receive) -> None:
    dropped = 0
    while dropped < _LINGER_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        dropped += len(message.get("body", b""))
