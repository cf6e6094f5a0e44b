"""What a client with a bare socket can do: slow, huge, broken and pipelined requests."""

from __future__ import annotations

import contextlib
import json
import pathlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.server.process import (
    CHAT,
    COMPLETIONS,
    ServerProcess,
    check_error,
    head,
    long_request,
    post_bytes,
    read_all,
    read_until,
    serving,
    wait_until,
)

ASK = {"prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module")
def hasty(logs: pathlib.Path) -> Iterator[ServerProcess]:
    """A server that waits one second for anything."""
    with serving(logs, "--read-timeout-s", "1", "--write-timeout-s", "1", "--max-body-bytes", "100000") as running:
        yield running


def answer_on(server: ServerProcess, request: bytes) -> tuple[int, bytes]:
    """Status and body of what comes back for these bytes on a connection of their own, until the server closes it."""
    with server.connect() as connection:
        connection.sendall(request)
        received = read_all(connection)
    top, _, body = received.partition(b"\r\n\r\n")
    return int(top.split()[1]), body


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),  # the hello of a TLS client
        b"GET  HTTP/1.1\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon here\r\n\r\n",
        b"GET / HTTP/1.1\r\nname with space: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\x00y\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        b"CONNECT example.com:80 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    ],
)
def test_bytes_that_are_no_request_get_400(server: ServerProcess, request_bytes: bytes) -> None:
    status, body = answer_on(server, request_bytes)
    assert 400 <= status < 500
    check_error(body)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: " + b"a" * 3_000_000,
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 200 + b"\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 300_000,
        b"GET /" + b"a" * 3_000_000,
    ],
    ids=["path", "header", "endless header", "many headers", "endless headers", "endless path"],
)
def test_r16_head_that_is_too_large_gets_431(server: ServerProcess, request_bytes: bytes) -> None:
    with server.connect() as connection:
        sender = threading.Thread(target=send_quietly, args=(connection, request_bytes))
        sender.start()
        received = read_all(connection)
        sender.join()
    assert received.startswith(b"HTTP/1.1 431 ")
    check_error(received.partition(b"\r\n\r\n")[2])


def send_quietly(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # the server has heard enough
        connection.sendall(data)


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT", "PATCH", "TRACE", "PROPFIND"])
def test_method_that_a_path_does_not_take_gets_405(server: ServerProcess, method: str) -> None:
    status, body = answer_on(server, head(method, CHAT, "connection: close"))
    assert status == 405
    assert check_error(body)["code"] == "method_not_allowed"


def test_pipelined_requests_are_answered_in_order_and_garbage_behind_them_ends_the_connection(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(head("GET", "/version") + post_bytes(COMPLETIONS, ASK) + head("GET", "/nothing") + b"\x00\x01garbage\r\n\r\n")
        received = read_all(connection)
    statuses = [int(piece[:3]) for piece in received.split(b"HTTP/1.1 ")[1:]]
    # The garbage is noticed at once; answers before it that had not begun are not owed any more.
    assert statuses == [200, 200, 404, 400][: len(statuses)]
    assert server.get("/health").status_code == 200


def test_garbage_behind_a_stream_ends_only_this_connection(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(post_bytes(COMPLETIONS, long_request(stream=True)))
        read_until(connection, b"data: ")
        connection.sendall(b"\x00garbage\r\n\r\n")
        rest = read_all(connection)
    assert b"HTTP/1.1 400" not in rest
    wait_until(server.is_idle, "the abandoned request is gone", timeout_s=5)


def test_connection_is_good_for_more_after_an_error(server: ServerProcess) -> None:
    requests = [
        (post_bytes(CHAT, {"messages": 5}), 400), (head("GET", "/nothing"), 404), (head("PUT", CHAT, length=0), 405),
        (head("POST", COMPLETIONS, "content-type: text/plain", "content-length: 2") + b"{}", 415),
        (post_bytes(COMPLETIONS, {**ASK, "model": "other"}), 404), (post_bytes(COMPLETIONS, ASK), 200),
    ]  # fmt: skip
    with server.connect() as connection:
        for data, status in requests:
            connection.sendall(data)
            top, _, body = read_until(connection, b"\r\n\r\n").partition(b"\r\n\r\n")
            length = int(top.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            while len(body) < length:
                body += connection.recv(length - len(body))
            assert int(top.split()[1]) == status
            json.loads(body)


def test_upgrade_to_http2_or_websockets_is_not_taken_and_the_request_is_answered(server: ServerProcess) -> None:
    h2c = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__")
    with server.connect() as connection:
        connection.sendall(post_bytes(COMPLETIONS, ASK, *h2c))
        assert read_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    socket_head = head("GET", CHAT, "connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13", "sec-websocket-key: AAAA")
    with server.connect() as connection:
        connection.sendall(socket_head)
        assert read_until(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 405 ")


def test_head_that_never_ends_is_refused_after_read_timeout(hasty: ServerProcess) -> None:
    with hasty.connect() as connection:
        began = time.monotonic()
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
        received = read_all(connection)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert check_error(received.partition(b"\r\n\r\n")[2])["code"] == "request_timeout"
    assert 0.9 < time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("later", "silent"), [(False, b""), (False, b"\r\n"), (True, b"\r\n")], ids=["nothing", "blank line", "blank line later"]
)
def test_connection_that_brings_no_request_is_closed_after_read_timeout(hasty: ServerProcess, later: bool, silent: bytes) -> None:
    with hasty.connect() as connection:
        if later:
            connection.sendall(head("GET", "/version"))
            read_until(connection, b"}")
        connection.sendall(silent)
        assert read_all(connection) == b""


def test_body_that_never_ends_is_refused_after_read_timeout(hasty: ServerProcess) -> None:
    for framing in ("content-length: 1000", "transfer-encoding: chunked"):
        status, body = answer_on(hasty, head("POST", COMPLETIONS, "content-type: application/json", framing) + b"5\r\n{")
        assert status == 408
        assert check_error(body)["code"] == "request_timeout"


def test_body_that_nobody_reads_does_not_hold_the_connection(hasty: ServerProcess) -> None:
    with hasty.connect() as connection:
        connection.sendall(head("POST", "/nothing", length=1000) + b"{")
        assert read_all(connection).startswith(b"HTTP/1.1 404 ")


def test_r16_body_beyond_the_limit_gets_413_before_it_is_read(hasty: ServerProcess) -> None:
    status, body = answer_on(hasty, head("POST", COMPLETIONS, length=100_001))
    assert (status, check_error(body)["code"]) == (413, "request_too_large")
    chunk = b"fa00\r\n" + b" " * 0xFA00 + b"\r\n"
    with hasty.connect() as connection:
        connection.sendall(head("POST", COMPLETIONS, "content-type: application/json", "transfer-encoding: chunked") + chunk * 2)
        assert read_all(connection).startswith(b"HTTP/1.1 413 ")


def test_reader_who_takes_nothing_is_cut_off_and_holds_nothing(hasty: ServerProcess) -> None:
    request = long_request(1000, n=16, stream=True, logprobs=20)
    with hasty.connect() as connection:
        connection.sendall(post_bytes(COMPLETIONS, request))
        wait_until(lambda: hasty.load()[0] > 0, "running")
        wait_until(hasty.is_idle, "given up")
        # The socket is gone too, not just the request: what is left in its buffers ends without the end of the stream.
        wait_until(lambda: num_connections(hasty) == 0, "disconnected", timeout_s=20)
        assert b"[DONE]" not in read_all(connection)


def num_connections(server: ServerProcess) -> int:
    """Sockets of the server that a client holds the other end of."""
    port = f":{server.port:04X}"
    lines = pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return sum(local.endswith(port) and state == "01" for _, local, _, state, *_ in fields)
