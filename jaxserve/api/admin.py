"""What --enable-admin-endpoints adds: pause and resume, ending answers early, the prefix cache, profiles; for operators, as in vLLM."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Send

from jaxserve.api.answers import ready
from jaxserve.api.endpoint import JsonEndpoint
from jaxserve.api.fields import Fields
from jaxserve.api.json_door import json_type, parse_object
from jaxserve.api.parameters import check_parameters
from jaxserve.api.wire import send_json
from jaxserve.errors import UserError

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncEngine

PAUSE_MODES = ("abort", "wait", "keep")
MAX_ABORTED = 4096
_FLAG: Mapping[str, Any] = {"type": "boolean"}
QUERY_PAUSE: Mapping[str, Mapping[str, Any]] = {
    "mode": {"type": "string", "enum": list(PAUSE_MODES), "default": "abort"},
    "clear_cache": {**_FLAG, "default": True},
}
QUERY_RESET: Mapping[str, Mapping[str, Any]] = {"reset_running_requests": {**_FLAG, "default": False}}


class AdminPages:
    """The handlers without a body, one method each.

    Args:
      engine: the engine to steer.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    async def pause(self, request: Request) -> Response:
        """Stop the engine: at once ("keep"), when running answers have ended ("wait"), or by ending them now ("abort")."""
        given = _query(request, QUERY_PAUSE)
        mode = cast("Literal['abort', 'wait', 'keep']", _choice(given, "mode", "abort", PAUSE_MODES))
        clear_cache = _flag(given, "clear_cache", True)
        ready(self._engine)
        if not await self._engine.pause(mode, clear_cache=clear_cache and mode != "keep"):
            raise UserError(None, "another order came before the engine had paused", code="superseded", status=409)
        return JSONResponse({"status": "paused"})

    async def resume(self, request: Request) -> Response:
        """Go on."""
        ready(self._engine)
        await self._engine.resume()
        return JSONResponse({"status": "resumed"})

    async def is_paused(self, request: Request) -> Response:
        """Whether the engine is paused, or about to be."""
        return JSONResponse({"is_paused": self._engine.is_paused})

    async def reset_prefix_cache(self, request: Request) -> Response:
        """Forget cached prefixes; without success while requests hold pages, unless they may be set back to their beginning."""
        preempt = _flag(_query(request, QUERY_RESET), "reset_running_requests", False)
        ready(self._engine)
        return JSONResponse({"success": await self._engine.reset_prefix_cache(preempt=preempt)})

    async def start_profile(self, request: Request) -> Response:
        """Begin a trace."""
        ready(self._engine)
        await self._engine.start_profile()
        return JSONResponse({"status": "profiling"})

    async def stop_profile(self, request: Request) -> Response:
        """End it."""
        await self._engine.stop_profile()
        return JSONResponse({"status": "stopped"})


class AbortEndpoint(JsonEndpoint):
    """The ASGI app of /abort_requests."""

    gives = None

    async def answer(self, body: bytes, receive: Receive, send: Send) -> None:
        """End the answers of these ids, all without any; their clients get what there is, with the finish reason "abort"."""
        ids = read_abort(Fields(parse_object(body)))
        # The id of an answer is the request's own behind what kind of answer it is.
        names = None if ids is None else {name for given in ids for name in (given, given.partition("-")[2], given.partition("_")[2])}
        await send_json(send, {"status": "aborted", "aborted": self.engine.cut_short(names)})


def read_abort(fields: Fields) -> list[str] | None:
    """The ids of a body of /abort_requests, None for all. Raises: UserError naming the field at fault."""
    check_parameters(fields, ("request_ids",))
    ids = fields.array("request_ids", [], max_items=MAX_ABORTED)
    for position, item in enumerate(ids):
        if not isinstance(item, str):
            raise fields.error(f"request_ids[{position}]", f"must be a string, not {json_type(item)}")
    return ids or None


def _query(request: Request, known: Collection[str]) -> Mapping[str, str]:
    """The query parameters. Raises: UserError for an unknown one: a misspelt order must not do something else."""
    for name in request.query_params:
        if name not in known:
            raise UserError(name[:60], f"{name!r:.60} is not known; there are {', '.join(known) or 'no parameters'}")
    return request.query_params


def _choice(given: Mapping[str, str], name: str, default: str, choices: Collection[str]) -> str:
    value = given.get(name, default)
    if value not in choices:
        raise UserError(name, f"{name} is {value!r:.60}; it must be one of {', '.join(choices)}")
    return value


def _flag(given: Mapping[str, str], name: str, default: bool) -> bool:
    return _choice(given, name, str(default).lower(), ("true", "false")) == "true"
