"""GET /v1/capabilities: every parameter of every route with a body, and what becomes of it for the model at hand.

1. supported: the route's own reader reads it; /openapi.json says with which type and bounds.
2. refused: that reader, or the model, answers 400 and says why.
3. ignored: accepted, since clients send it and no answer depends on it.

Found out by asking the readers, so that the page cannot differ from what they do. Other names are unknown and pass unread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from jaxserve.api.answers import ready
from jaxserve.api.endpoint import JsonEndpoint
from jaxserve.api.fields import Fields
from jaxserve.api.operation import Body, Operation
from jaxserve.api.parameters import UNSUPPORTED, UNSUPPORTED_CODE, WITHOUT_EFFECT
from jaxserve.api.schema import record
from jaxserve.errors import UserError

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncEngine

Row = dict[str, Any]
# Nothing that a parameter could mean.
_STRANGE: Mapping[str, Any] = {"strange": 0.5}
_WITHOUT_EFFECT = "accepted; no answer depends on it"


class CapabilityPage:
    """The handler of the route.

    Args:
      operations: the table of routes; read when the page is asked for.
    """

    def __init__(self, engine: AsyncEngine, operations: Sequence[Operation]) -> None:
        self._engine, self._operations = engine, operations

    async def capabilities(self, request: Request) -> Response:
        """The page. Raises: EngineUnavailableError until the model is known."""
        served = ready(self._engine)
        suiting = [each for each in self._operations if not isinstance(each.handler, JsonEndpoint) or each.handler.suits(served)]
        endpoints = describe(suiting, served.refused)
        page = {"object": "capabilities", "model": self._engine.config.served_names[0], "endpoints": endpoints}
        return Response(orjson.dumps(page), media_type="application/json")


def describe(operations: Sequence[Operation], refused: Mapping[str, str]) -> dict[str, dict[str, Row]]:
    """Path -> name -> state, and the reason where it is not supported.

    Args:
      refused: what the model cannot serve, by name, and why.
    """
    bodies = {operation.path: operation.body for operation in operations if operation.body is not None}
    read = {path: frozenset(record(body)) for path, body in bodies.items()}
    names = sorted(set(UNSUPPORTED).union(WITHOUT_EFFECT, *read.values()))
    return {
        path: {name: row for name in names if (row := _row(body, name, name in read[path], refused)) is not None}
        for path, body in bodies.items()
    }


def _row(body: Body, name: str, is_read: bool, refused: Mapping[str, str]) -> Row | None:
    """The state of one parameter; None if the route has never heard of it."""
    if is_read:
        return {"state": "refused", "reason": f"{name} {refused[name]}"} if name in refused else {"state": "supported"}
    try:
        body.read(Fields({**body.examples[0], name: _STRANGE}))
    except UserError as error:
        if error.code == UNSUPPORTED_CODE:
            neutral = UNSUPPORTED.get(name, ())
            return {"state": "refused", "reason": error.message, **({"accepted": list(neutral)} if neutral else {})}
    return {"state": "ignored", "reason": _WITHOUT_EFFECT} if name in WITHOUT_EFFECT else None
