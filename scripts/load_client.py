"""A lean HTTP/1.1 client that times streamed completions: raw protocol callbacks, one clock read per segment.

1. A `Connection` parses heads, chunks and lengths as bytes arrive and hands on the body.
2. An `EventReader` cuts the body into server-sent events and notes in an `Answer` what came when.
3. A `Client` keeps connections alive between requests.

General HTTP libraries cost more per event than a fast server spends on it; on a small machine they would be what is measured.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
import urllib.parse
from collections.abc import Callable
from typing import Any, Literal

MAX_DETAIL_BYTES = 300


class ProtocolError(ValueError):
    """The server's bytes are not HTTP/1.1 as this client reads it."""


@dataclasses.dataclass(slots=True)
class Answer:
    """What came back for one query, and when (time.perf_counter seconds).

    Args:
      start_s: when it was sent, or was due to be sent if a rate decides.
      end_s: when it was complete or had failed; 0 while neither.
      event_s: arrival of each event that carried text; an event may carry several tokens.
      num_input, num_output: tokens by the server's usage; -1 when it sent none.
      error: kind of failure, None for a whole answer; detail is what the server said.
    """

    start_s: float
    end_s: float = 0.0
    event_s: list[float] = dataclasses.field(default_factory=list)
    num_input: int = -1
    num_output: int = -1
    error: str | None = None
    detail: str = ""
    finished: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens received: counted by the server, else one per event."""
        return self.num_output if self.num_output >= 0 else len(self.event_s)


class EventReader:
    """Turns the bytes of one streamed answer into the fields of an `Answer`."""

    __slots__ = ("_answer", "_rest")

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._rest = b""

    def feed(self, content: bytes) -> None:
        """Take the next bytes of the body, cut anywhere; all their events count as arriving together."""
        now = time.perf_counter()
        lines = (self._rest + content).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._read_event(line[5:].strip(), now)
            else:
                self._keep(line)

    def close(self) -> None:
        """Take a last line that no newline ended (the body of an error)."""
        self._keep(self._rest)

    def _keep(self, line: bytes) -> None:
        if len(self._answer.detail) < MAX_DETAIL_BYTES and line.strip() and not line.startswith((b":", b"event:", b"id:", b"retry:")):
            self._answer.detail += line.strip().decode(errors="replace")[:MAX_DETAIL_BYTES]

    def _read_event(self, payload: bytes, now: float) -> None:
        answer = self._answer
        if payload == b"[DONE]":
            answer.finished = True
            return
        event: Any = json.loads(payload)
        if not isinstance(event, dict):
            raise ProtocolError(f"an event is {payload[:40]!r}, not an object")
        if event.get("error"):
            answer.error, answer.detail = "error event", payload.decode(errors="replace")[:MAX_DETAIL_BYTES]
            return
        if usage := event.get("usage"):
            answer.num_input, answer.num_output = usage.get("prompt_tokens", -1), usage.get("completion_tokens", -1)
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or choice
            if (
                delta.get("text")
                or delta.get("content")
                or delta.get("reasoning_content")
                or delta.get("reasoning")
                or delta.get("tool_calls")
            ):
                answer.event_s.append(now)
            if choice.get("finish_reason"):
                answer.finished = True


class Connection(asyncio.Protocol):
    """One keep-alive HTTP/1.1 connection that carries one exchange at a time."""

    def __init__(self) -> None:
        self.status = 0
        self.reusable = True
        self.heard = False
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._framing: Literal["head", "chunked", "length", "close"] = "head"
        self._left = 0
        self._on_body: Callable[[bytes], None] = lambda content: None
        self._done: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), f"{transport=}"
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._framing == "close" and exc is None:
            self._finish()
        elif self._done is not None and not self._done.done():
            self._done.set_exception(exc or ConnectionResetError("the server closed the connection"))

    def exchange(self, request: bytes, on_body: Callable[[bytes], None]) -> asyncio.Future[int]:
        """Send a whole request; the future gives the status once the whole body has gone through on_body."""
        assert self._transport is not None
        assert self.reusable
        self._done = asyncio.get_running_loop().create_future()
        self._on_body, self._framing, self.heard = on_body, "head", False
        self._transport.write(request)
        return self._done

    def abort(self) -> None:
        """Close at once, so that the server sees a disconnect."""
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self.heard = True
        self._buffer += data
        try:
            if self._framing != "head" or self._read_head():
                self._read_body()
        except ValueError as error:
            self.abort()
            if self._done is not None and not self._done.done():
                self._done.set_exception(ProtocolError(str(error)))

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.status = int(first.split(" ", 2)[1])
        if headers.get("connection", "").lower() == "close":
            self.reusable = False
        if headers.get("transfer-encoding", "").lower() == "chunked":
            self._framing = "chunked"
        elif "content-length" in headers:
            self._framing, self._left = "length", int(headers["content-length"])
        else:
            self._framing, self.reusable = "close", False
        return True

    def _read_body(self) -> None:
        if self._framing == "chunked":
            self._read_chunks()
            return
        content = bytes(self._buffer)
        self._buffer.clear()
        if content:
            self._on_body(content)
        self._left -= len(content)
        if self._framing == "length" and self._left <= 0:
            self._finish()

    def _read_chunks(self) -> None:
        buffer, position = self._buffer, 0
        while (end := buffer.find(b"\r\n", position)) >= 0:
            size = int(buffer[position:end].partition(b";")[0], 16)
            if size == 0:
                if (stop := buffer.find(b"\r\n\r\n", end)) < 0:
                    break
                del buffer[: stop + 4]
                self._finish()
                return
            if len(buffer) < end + size + 4:
                break
            self._on_body(bytes(buffer[end + 2 : end + 2 + size]))
            position = end + size + 4
        del buffer[:position]

    def _finish(self) -> None:
        self._framing = "head"
        if self._done is not None and not self._done.done():
            self._done.set_result(self.status)


class Client:
    """Keeps connections to one server and sends JSON over them."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        url = urllib.parse.urlsplit(base_url if "://" in base_url else f"http://{base_url}")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise SystemExit(f"--base-url {base_url} must look like http://host:port")
        self._tls = url.scheme == "https"
        self._host, self._port = url.hostname, url.port or (443 if self._tls else 80)
        self._path = url.path.rstrip("/").removesuffix("/v1")
        secret = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = f"Host: {url.netloc}\r\nContent-Type: application/json\r\nAccept: */*\r\n{secret}"
        self._idle: list[Connection] = []

    async def send(self, method: str, path: str, body: bytes, on_body: Callable[[bytes], None]) -> int:
        """The status of one exchange, its body fed to on_body.

        Raises: OSError if the server is out of reach or hangs up; ProtocolError on malformed HTTP.
        """
        request = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n".encode() + body
        while True:
            connection, is_old = await self._connect()
            try:
                status = await connection.exchange(request, on_body)
            except OSError:
                if is_old and not connection.heard:
                    continue  # the server closed an idle connection just as it was taken up again
                raise
            except BaseException:
                connection.abort()
                raise
            if connection.reusable:
                self._idle.append(connection)
            return status

    async def _connect(self) -> tuple[Connection, bool]:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection, True
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=True if self._tls else None)
        return connection, False

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.abort()
