"""One client connection: uvicorn's HTTP/1.1 protocol with bounds on what a client may send, and on how long it may take.

1. A request head larger than MAX_HEAD_BYTES or with more than MAX_HEADERS headers is refused with 431, what is not HTTP with 400.
2. A head that is not whole within `read_timeout_s` is refused with 408. Bodies have their deadline where they are read; a connection whose
   answer is out while the rest of the request still is not in ends after the same time.
3. A client that takes no byte of an answer for `write_timeout_s` is cut off.
4. Offers to upgrade to another protocol, as Java's client makes with every first request, are ignored.
"""

from __future__ import annotations

import asyncio
import re

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jaxserve.api.errors import error_json
from jaxserve.errors import UserError

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 128
# How long a refused client may go on sending: closing at once would reset the connection, and the answer could be lost with it.
_LINGER_S = 2.0

# The parser would skip the body of a request that offers an upgrade; under another name of the same length the offer means nothing to it.
_UPGRADE = re.compile(rb"\nupgrade(?=[ \t]*:)", re.IGNORECASE)
_PHRASES = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class Connection(HttpToolsProtocol):
    """A connection that keeps its own deadlines; see `with_timeouts`."""

    read_timeout_s = 30.0
    write_timeout_s = 120.0

    @classmethod
    def with_timeouts(cls, read_timeout_s: float, write_timeout_s: float) -> type[Connection]:
        """The class with deadlines other than the default ones, in seconds."""
        return type(cls.__name__, (cls,), {"read_timeout_s": read_timeout_s, "write_timeout_s": write_timeout_s})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the event loop."""
        super().connection_made(transport)
        now = self.loop.time()
        self._in_head = self._in_body = False
        self._head_bytes = 0
        self._too_large = False
        self._refused_at: float | None = None
        self._reading_since: float | None = now  # since when a request is awaited, or is not whole
        self._unsent, self._moved_at = 0, now  # bytes of answers that the client has not taken, and when that last changed
        self._period_s = min(self.read_timeout_s, self.write_timeout_s, _LINGER_S) / 4
        self._watch = self.loop.call_later(self._period_s, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        if self._refused_at is not None:
            return
        if self._reading_since is None:
            self._reading_since = self.loop.time()
        was_in_head, known = self._in_head, self._head_bytes
        super().data_received(data if self._in_body else _without_upgrade(data))
        # The parser keeps an unfinished header to itself, however long it grows.
        if was_in_head and self._in_head and self._refused_at is None:
            self._head_bytes = max(self._head_bytes, known + len(data))
            if self._head_bytes > MAX_HEAD_BYTES:
                self._too_large = True
                self.send_400_response("")

    def on_message_begin(self) -> None:
        """Called by the parser."""
        super().on_message_begin()
        if self._reading_since is None:
            self._reading_since = self.loop.time()
        self._in_head = True
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Called by the parser."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        self._count(len(name) + len(value))
        if len(self.headers) >= MAX_HEADERS:
            self._count(MAX_HEAD_BYTES + 1)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._in_head, self._in_body = False, True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Called by the parser."""
        super().on_message_complete()
        self._in_body = False
        self._reading_since = None

    def send_400_response(self, msg: str) -> None:
        """Called when the client's bytes are no request, with uvicorn's own words for it."""
        if self._too_large:
            message = f"the request's head is too large; at most {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers are allowed"
            self._refuse(UserError(None, message, code="request_headers_too_large", status=431))
        else:
            self._refuse(UserError(None, "this is not a valid HTTP/1.1 request", code="invalid_http"))

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]

    def _count(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            self._too_large = True
            # The parser stops at any exception of a callback and reports the request as invalid.
            raise ValueError("the head is too large")

    def _refuse(self, error: UserError) -> None:
        self._refused_at = self.loop.time()
        if self._answering:
            if not self._in_body or self.pipeline or self.cycle.response_started:
                # Another answer is on its way over this connection; nothing else may be written into it.
                self.transport.close()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = error_json(error)
        head = (
            b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            % (error.status, _PHRASES[error.status], len(body))
        )  # fmt: skip
        self.transport.write(head + body)
        self.transport.write_eof()

    def _look(self) -> None:
        """Judge every deadline; runs a few times within the shortest."""
        now = self.loop.time()
        unsent = self.transport.get_write_buffer_size()
        if not unsent or unsent != self._unsent:
            self._unsent, self._moved_at = unsent, now
        if now - self._moved_at > self.write_timeout_s:
            self.logger.warning("connection cut off: the client took nothing for %.0f s", self.write_timeout_s)
            self.transport.abort()
        elif self._refused_at is not None:
            if now - self._refused_at > _LINGER_S:
                self.transport.abort()
        elif self._reading_since is not None and not self._answering and now - self._reading_since > self.read_timeout_s:
            self._expire()
        self._watch = self.loop.call_later(self._period_s, self._look)

    def _expire(self) -> None:
        if self._in_head:
            message = f"the request's head did not arrive within {self.read_timeout_s:g} s"
            self._refuse(UserError(None, message, code="request_timeout", status=408))
        else:
            self.transport.close()


def _without_upgrade(data: bytes) -> bytes:
    end = data.find(b"\r\n\r\n")
    head = data if end < 0 else data[:end]
    return _UPGRADE.sub(b"\nx-offer", head) + data[len(head) :]
