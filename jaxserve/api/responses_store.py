"""The responses that the server remembers for as long as it lives, within bounds: the least recently used go first."""

from __future__ import annotations

import dataclasses
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from jaxserve.api.responses_background import EventLog
from jaxserve.api.responses_printer import ResponsePrinter
from jaxserve.api.responses_request import Item
from jaxserve.errors import UserError

MAX_RESPONSES = 4096
MAX_BYTES = 256 << 20


@dataclasses.dataclass(slots=True)
class Record:
    """One response.

    Args:
      printer: while it is being made.
      cancel: ends its making in the background, while there is something to end.
      log: the events of its making, of a stream in the background.
      response: when it has been made.
      items: its input.
      history: input and output of those before it.
      num_bytes: of all of these, also where other records share them.
    """

    printer: ResponsePrinter | None
    items: list[Item]
    history: list[Item]
    history_bytes: int
    cancel: Callable[[], Awaitable[None]] | None = None
    log: EventLog | None = None
    response: dict[str, Any] | None = None
    num_bytes: int = 0

    def shown(self) -> dict[str, Any]:
        """The response object as it is."""
        if self.response is not None:
            return self.response
        assert self.printer is not None, "a response is being made or has been"
        return self.printer.response()


class ResponseStore:
    """Records by the id of their response; used on the event loop only, except for `item`."""

    def __init__(self, *, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self.num_bytes = 0
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._items: dict[str, Item] = {}

    def __len__(self) -> int:
        return len(self._records)

    def get(self, response_id: str) -> Record:
        """A record, which counts as used. Raises: UserError with status 404."""
        record = self._records.get(response_id)
        if record is None:
            raise UserError("response_id", f"response {response_id!r:.80} is not stored", code="response_not_found", status=404)
        self._records.move_to_end(response_id)
        return record

    def before(self, response_id: str | None) -> tuple[list[Item], int]:
        """What a response after this one continues, and its size. Raises: UserError if there is nothing to continue."""
        if response_id is None:
            return [], 0
        name = "previous_response_id"
        try:
            record = self.get(response_id)
        except UserError as error:
            raise UserError(name, error.message, code="previous_response_not_found") from None
        response = record.shown()
        if response["status"] not in ("completed", "incomplete"):
            raise UserError(name, f"response {response_id!r:.80} is {response['status']}; only one that is complete can be continued")
        return [*record.history, *record.items, *response["output"]], record.num_bytes

    def item(self, item_id: str) -> Item | None:
        """An item of an answer."""
        return self._items.get(item_id)

    def add(self, record: Record) -> None:
        """Remember a response that is being made."""
        self._records[record.shown()["id"]] = record

    def settle(self, record: Record) -> None:
        """A response has been made: what it takes is known, and others may have to go for it."""
        response = record.shown()
        record.response, record.printer, record.cancel = response, None, None
        if self._records.get(response["id"]) is not record:
            return
        log_bytes = record.log.num_bytes if record.log is not None else 0
        record.num_bytes = len(orjson.dumps([response, record.items])) + log_bytes + record.history_bytes
        self.num_bytes += record.num_bytes
        self._items.update((item["id"], item) for item in response["output"])
        while len(self._records) > self._max_responses or self.num_bytes > self._max_bytes:
            oldest = next((each for each, one in self._records.items() if one.response is not None), None)
            if oldest is None:
                return
            self.remove(oldest)

    def remove(self, response_id: str) -> None:
        """Forget a response, if it is there."""
        record = self._records.pop(response_id, None)
        if record is not None and record.response is not None:
            self.num_bytes -= record.num_bytes
            for item in record.response["output"]:
                self._items.pop(item["id"], None)


def list_items(record: Record) -> list[Item]:
    """The input of a response, each item with an id."""
    prefixes = {"function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}
    response_id = record.shown()["id"]
    return [
        _listed(item, prefixes.get(item.get("type", "message"), "msg_") + uuid.uuid5(uuid.NAMESPACE_OID, f"{response_id}.{place}").hex)
        for place, item in enumerate(record.items)
    ]


def _listed(item: Item, item_id: str) -> Item:
    """An input item as it is listed: with an id, and messages with parts."""
    shown = {"id": item_id, "status": "completed", **item}
    if shown.get("type", "message") != "message":
        return shown
    kind = "output_text" if shown["role"] == "assistant" else "input_text"
    extra: dict[str, Any] = {"annotations": []} if kind == "output_text" else {}
    content = shown["content"]
    parts = [{"type": kind, "text": content, **extra}] if isinstance(content, str) else content
    return {**shown, "type": "message", "content": parts}
