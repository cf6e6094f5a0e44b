"""One line of the route table: what the router, /openapi.json, the docs page and the batch runner know of an endpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jaxserve.api.endpoint import JsonEndpoint
from jaxserve.api.fields import Fields

Handler = JsonEndpoint | Callable[[Request], Awaitable[Response]]
Tag = Literal["generation", "pooling", "tokens", "models", "operations", "administration"]


@dataclasses.dataclass(frozen=True, slots=True)
class Body:
    """A JSON body, told by the one who reads it.

    Args:
      read: reads every field, as for a real request; the documented schema is a record of what it asks for, so the two cannot differ.
      by_hand: schemas of fields that are read by hand, where they are not what schema.BY_HAND has.
      examples: bodies that it accepts, the smallest first; between them they have every object that holds fields of its own.
      foreign: names that mean something on other routes only, and are refused by this one.
    """

    read: Callable[[Fields], object]
    examples: tuple[Mapping[str, Any], ...]
    by_hand: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict[str, Mapping[str, Any]])
    foreign: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """An endpoint.

    Args:
      path: as Starlette writes it, "/v1/models/{name:path}".
      summary: one line for people.
      query: query parameters by name, as JSON schemas.
      streams: with "stream": true the answer comes as server-sent events.
      answers: media type of an answer that is not streamed.
      may_be_bytes: a body can ask for bytes instead.
    """

    path: str
    handler: Handler
    summary: str
    tag: Tag
    methods: tuple[str, ...] = ("GET",)
    body: Body | None = None
    query: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict[str, Mapping[str, Any]])
    streams: bool = False
    answers: str = "application/json"
    may_be_bytes: bool = False


def make_routes(operations: Iterable[Operation]) -> list[Route]:
    """The same for the router: one route for each path, so that its 405 knows every method."""
    by_path: dict[str, dict[str, Route]] = {}
    for operation in operations:
        route = Route(operation.path, operation.handler, methods=list(operation.methods))
        by_path.setdefault(operation.path, {}).update(dict.fromkeys(route.methods or (), route))
    return [Route(path, _ByMethod(routes), methods=list(routes)) for path, routes in by_path.items()]


class _ByMethod:
    """The ASGI app of a path; the router lets only known methods through."""

    def __init__(self, routes: Mapping[str, Route]) -> None:
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._routes[scope["method"]].app(scope, receive, send)
