"""The one renderer of errors: whatever was raised becomes a status, headers and a body in OpenAI's shape, or in Anthropic's.

Only a `UserError` carries its own text to the client, cut to a few hundred characters; every other exception gets a fixed text.
"""

from __future__ import annotations

import math
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.errors import EngineUnavailableError, QueueFullError, UserError

MAX_MESSAGE_CHARS = 500
MAX_PARAM_CHARS = 120
RETRY_AFTER_S = 5

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
ANTHROPIC_PATHS = "/v1/messages"
_ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
    503: "overloaded_error",
}  # fmt: skip
_HTTP_TEXTS = {
    404: ("there is no such path", "unknown_url"),
    405: ("this path does not take this method", "method_not_allowed"),
}


class GenerationError(RuntimeError):
    """The engine ended a request with an error of its own; the message is meant for the client."""


class ClientGoneError(Exception):
    """The client closed the connection: there is nobody left to answer."""


def error_status(error: Exception) -> tuple[int, dict[str, str]]:
    """The HTTP status and extra headers for an exception."""
    match error:
        case UserError(status=401):
            return 401, {"www-authenticate": "Bearer"}
        case UserError():
            return error.status, {}
        case QueueFullError():
            return 429, {"retry-after": str(max(1, math.ceil(error.retry_after_s)))}
        case EngineUnavailableError():
            return 503, {"retry-after": str(RETRY_AFTER_S)}
        case HTTPException():
            return error.status_code, dict(error.headers or {})
        case _:
            return 500, {}


def error_object(error: Exception) -> dict[str, Any]:
    """The body for an exception: {"error": {"message", "type", "param", "code"}}."""
    status, _ = error_status(error)
    param: str | None = None
    match error:
        case UserError():
            message, param, code = error.message, error.field, error.code
        case QueueFullError():
            message, code = f"the server's queue is full; retry in {max(1, math.ceil(error.retry_after_s))} s", "queue_full"
        case EngineUnavailableError():
            message, code = f"the server takes no requests at the moment: {error}; retry later", "unavailable"
        case HTTPException():
            message, code = _HTTP_TEXTS.get(status, ("the request cannot be served", None))
        case GenerationError():
            message, code = str(error), "generation_failed"
        case _:
            message, code = (
                "the server failed on this request; its log holds the reason under the x-request-id of this answer",
                "internal_error",
            )
    kind = _TYPES.get(status, "invalid_request_error") if status < 500 else "unavailable_error" if status == 503 else "server_error"
    return {
        "error": {"message": _cut(message, MAX_MESSAGE_CHARS), "type": kind, "param": param and _cut(param, MAX_PARAM_CHARS), "code": code}
    }


def error_json(error: Exception, path: str = "") -> bytes:
    """The body for an exception, encoded; in Anthropic's shape if the path is one of theirs."""
    return orjson.dumps(anthropic_error(error) if path.startswith(ANTHROPIC_PATHS) else error_object(error))


def anthropic_error(error: Exception) -> dict[str, Any]:
    """The body for an exception: {"type": "error", "error": {"type", "message"}}."""
    status, _ = error_status(error)
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error_object(error)["error"]["message"]}}


def error_response(request: Request, error: Exception) -> Response:
    """The whole answer for an exception, as Starlette's exception handlers return it."""
    status, headers = error_status(error)
    return Response(error_json(error, request.scope["path"]), status, headers, media_type="application/json")


async def error_response_async(request: Request, error: Exception) -> Response:
    """`error_response` on the event loop: a plain function would be sent to a thread, for nothing."""
    return error_response(request, error)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
