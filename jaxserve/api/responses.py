"""/v1/responses: make a response, whole, streamed or in the background; read, cancel and delete those that are stored.

1. Read and check the body, with what came before it if it continues a response.
2. Begin the turn as chat does.
3. Carry the answer to the client as OpenAI's events or as one response object, and store it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Send

from jaxserve.api import examples
from jaxserve.api.answers import Running
from jaxserve.api.endpoint import JsonEndpoint
from jaxserve.api.fields import Fields
from jaxserve.api.json_door import parse_object
from jaxserve.api.operation import Body, Operation
from jaxserve.api.responses_background import BackgroundRun, EventLog, LogResponse
from jaxserve.api.responses_printer import ResponsePrinter
from jaxserve.api.responses_request import FOREIGN, read_responses
from jaxserve.api.responses_store import Record, ResponseStore, list_items
from jaxserve.api.sse import stream_answer
from jaxserve.api.turn import begin_turn
from jaxserve.api.wire import INLINE_BYTES, off_loop, send_json
from jaxserve.errors import UserError

if TYPE_CHECKING:
    from jaxserve.engine.async_engine import AsyncEngine

MAX_LISTED = 100
QUERY_RETRIEVE = {"stream": {"type": "boolean", "default": False}, "starting_after": {"type": "integer", "minimum": 0}}
QUERY_ITEMS = {
    "after": {"type": "string"},
    "limit": {"type": "integer", "minimum": 1, "maximum": MAX_LISTED, "default": 20},
    "order": {"enum": ["asc", "desc"], "default": "desc"},
}


def responses_operations(engine: AsyncEngine) -> list[Operation]:
    """The routes, with a store of their own."""
    store = ResponseStore()
    pages = ResponsePages(store, engine.config.server.write_timeout_s)
    path = "/v1/responses/{response_id}"
    return [
        Operation(
            path="/v1/responses", methods=("POST",), handler=ResponsesEndpoint(engine, store), tag="generation", streams=True,
            summary="Make a response",
            body=Body(lambda fields: read_responses(fields, (), store.item), examples.RESPONSES, foreign=FOREIGN),
        ),
        Operation(path=path, handler=pages.retrieve, tag="generation", summary="A stored response", query=QUERY_RETRIEVE),
        Operation(path=path, methods=("DELETE",), handler=pages.delete, tag="generation", summary="Forget a stored response"),
        Operation(
            path=path + "/cancel", methods=("POST",), handler=pages.cancel, tag="generation", summary="Stop a response in the background"
        ),
        Operation(
            path=path + "/input_items", handler=pages.input_items, tag="generation", summary="The input of a stored response",
            query=QUERY_ITEMS,
        ),
    ]  # fmt: skip


class ResponsesEndpoint(JsonEndpoint):
    """The ASGI app that makes responses."""

    def __init__(self, engine: AsyncEngine, store: ResponseStore) -> None:
        super().__init__(engine)
        self._store = store

    async def answer(self, body: bytes, receive: Receive, send: Send) -> None:
        """Make one response."""
        store = self._store
        fields = Fields(await off_loop(len(body) > INLINE_BYTES, lambda: parse_object(body)))
        history, num_bytes = store.before(fields.text("previous_response_id", None))
        request = await off_loop(len(body) + num_bytes > INLINE_BYTES, lambda: read_responses(fields, history, store.item))
        printer = ResponsePrinter(request, await begin_turn(self.engine, request.chat))
        record = Record(printer=printer, items=request.items, history=history, history_bytes=num_bytes)
        if request.store:
            store.add(record)
        if request.background:
            await self._make_later(record, printer, receive, send, stream=request.chat.options.stream)
            return
        try:
            async with Running(receive, printer.streams) as running:
                if request.chat.options.stream:
                    await stream_answer(send, running, printer, write_timeout_s=self.server.write_timeout_s)
                else:
                    await printer.collect(running)
        except BaseException:
            store.remove(printer.id)
            raise
        store.settle(record)
        if not request.chat.options.stream:
            await send_json(send, record.shown())

    async def _make_later(self, record: Record, printer: ResponsePrinter, receive: Receive, send: Send, *, stream: bool) -> None:
        """Answer with the response as it is, or with its events as they come; it is made whether anybody follows them or not."""
        record.log = EventLog() if stream else None
        run = BackgroundRun(printer, record.log, lambda: self._store.settle(record))
        record.cancel = run.cancel
        if record.log is None:
            await send_json(send, printer.response())
            return
        for frame in printer.queue():
            record.log.write(frame)
        await LogResponse(record.log, 0, write_timeout_s=self.server.write_timeout_s)({"type": "http"}, receive, send)


class ResponsePages:
    """Handlers for responses that are stored."""

    def __init__(self, store: ResponseStore, write_timeout_s: float) -> None:
        self._store = store
        self._write_timeout_s = write_timeout_s

    async def retrieve(self, request: Request) -> Response:
        """The response as it is, or the events of its making after the one of a number."""
        record = self._store.get(request.path_params["response_id"])
        if request.query_params.get("stream", "false").lower() in ("false", "0"):
            return JSONResponse(record.shown())
        if record.log is None:
            raise UserError("stream", "stream needs a response that was made with background=true and stream=true")
        after = request.query_params.get("starting_after", "-1")
        if not re.fullmatch(r"-1|[0-9]{1,9}", after):
            raise UserError("starting_after", f"starting_after is {after!r:.40}; it must be the sequence number of an event")
        return LogResponse(record.log, int(after) + 1, write_timeout_s=self._write_timeout_s)

    async def delete(self, request: Request) -> Response:
        """Forget the response; one in the background is cancelled."""
        record = self._store.get(request.path_params["response_id"])
        if record.cancel is not None:
            await record.cancel()
        self._store.remove(request.path_params["response_id"])
        return JSONResponse({"id": request.path_params["response_id"], "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """Stop a response in the background; one that has ended stays as it is."""
        record = self._store.get(request.path_params["response_id"])
        if not record.shown()["background"]:
            raise UserError("response_id", "only a response that was made with background=true can be cancelled")
        if record.cancel is not None:
            await record.cancel()
        return JSONResponse(record.shown())

    async def input_items(self, request: Request) -> Response:
        """The input of a response, in pages."""
        items = list_items(self._store.get(request.path_params["response_id"]))
        query = request.query_params
        order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after")
        if order not in ("asc", "desc"):
            raise UserError("order", f"order is {order!r:.40}; it must be 'asc' or 'desc'")
        if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:9]) <= MAX_LISTED):
            raise UserError("limit", f"limit is {limit!r:.40}; it must be in [1, {MAX_LISTED}]")
        if order == "desc":
            items.reverse()
        if after is not None:
            items = items[next((place + 1 for place, item in enumerate(items) if item["id"] == after), len(items)) :]
        page = items[: int(limit)]
        ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
        return JSONResponse({"object": "list", "data": page, **ends, "has_more": len(page) < len(items)})
