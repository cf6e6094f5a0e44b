"""Many at once: the same answers as alone, bounded queues, clients who leave, and nothing left behind."""

from __future__ import annotations

import asyncio
import collections
import pathlib
import resource
import socket
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.process import (
    CHAT,
    COMPLETIONS,
    MAX_LEN,
    ServerProcess,
    error_of,
    events_of,
    long_request,
    post_bytes,
    read_until,
    wait_until,
)

KEY = {"authorization": "Bearer other-key"}


def short(number: int, **more: Any) -> dict[str, Any]:
    prompt = [5 + (number * 7 + i) % 300 for i in range(3 + number % 60)]
    return {"prompt": prompt, "max_tokens": 4 + number % 23, "temperature": 0, "ignore_eos": True, **more}


def tainted(number: int) -> dict[str, Any]:
    """A neighbour that uses every kind of state that a row on the device can have."""
    return short(
        number, temperature=1.5, top_k=5, top_p=0.7, min_p=0.1, presence_penalty=2, frequency_penalty=-2, repetition_penalty=3, seed=number,
        logit_bias={str(9 + number): 100, "7": -100}, logprobs=5, min_tokens=3, stop_token_ids=[number + 8],
    )  # fmt: skip


async def ask_all(server: ServerProcess, requests: list[dict[str, Any]]) -> list[str]:
    """The texts of completions, all asked for at the same time."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        replies = await asyncio.gather(*(client.post(server.url + COMPLETIONS, json=request) for request in requests))
    assert [reply.status_code for reply in replies] == [200] * len(replies)
    return [
        "".join(choice["text"] for event in events_of(reply.text) for choice in event["choices"])
        if request.get("stream") else reply.json()["choices"][0]["text"]
        for request, reply in zip(requests, replies, strict=True)
    ]  # fmt: skip


def test_promise_2_r4_greedy_answers_under_load_equal_those_alone(server: ServerProcess) -> None:
    clean = [short(number, stream=number % 2 == 0) for number in range(32)]
    alone = [asyncio.run(ask_all(server, [request]))[0] for request in clean]
    before = server.metrics()["jaxserve:compiles_total"]
    mixed = [request for number, one in enumerate(clean) for request in (one, tainted(number))]
    for _ in range(2):
        assert asyncio.run(ask_all(server, mixed))[::2] == alone
    assert server.metrics()["jaxserve:compiles_total"] == before  # invariant 12
    wait_until(server.is_idle, "idle", timeout_s=5)


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard != resource.RLIM_INFINITY and hard < 8192 else 8192, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_2000_at_once_all_end_well(server: ServerProcess) -> None:
    request = post_bytes(COMPLETIONS, {"prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0}, "connection: close")

    async def ask() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request)
        reply = await reader.read()
        writer.close()
        return reply

    async def ask_often() -> list[bytes]:
        return await asyncio.wait_for(asyncio.gather(*(ask() for _ in range(2000))), 120)

    replies = asyncio.run(ask_often())
    statuses = collections.Counter(int(reply.split()[1]) for reply in replies)
    assert set(statuses) <= {200, 429}
    assert statuses[200] > 0
    assert len({reply.split(b'"text":')[1].split(b"usage")[0] for reply in replies if b" 200 " in reply[:15]}) == 1
    assert all(b"retry-after:" in reply for reply in replies if b" 429 " in reply[:15])
    wait_until(server.is_idle, "idle", timeout_s=5)
    assert server.get("/health").status_code == 200


def load_of(server: ServerProcess) -> tuple[float, float]:
    lines = server.get("/metrics", headers=KEY).text.splitlines()
    values = {line.split("{")[0]: float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_")}
    return values["vllm:num_requests_running"], values["vllm:num_requests_waiting"]


def test_full_queue_answers_429_with_retry_after(guarded: ServerProcess) -> None:
    connections = [guarded.connect() for _ in range(6)]
    try:
        for number, connection in enumerate(connections):
            connection.sendall(post_bytes(COMPLETIONS, long_request(MAX_LEN - 3), f"authorization: {KEY['authorization']}"))
            wait_until(lambda number=number: sum(load_of(guarded)) == number + 1, "taken in")
        assert load_of(guarded) == (4, 2)
        for more in ({}, {"stream": True}, {"n": 16}):
            refused = guarded.post(COMPLETIONS, short(1, **more), headers=KEY)
            assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
        assert guarded.get("/health").status_code == 200
    finally:
        for connection in connections:
            connection.close()
    wait_until(lambda: load_of(guarded) == (0, 0), "idle", timeout_s=5)
    assert guarded.post(COMPLETIONS, short(1, n=2), headers=KEY).status_code == 200


def leave(connection: socket.socket, how: str) -> None:
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("stream", [True, False])
def test_promise_3_r20_clients_who_leave_free_what_they_held(server: ServerProcess, stream: bool, how: str) -> None:
    # One long prompt in chunks, four running, the rest waiting.
    bodies = [
        long_request(2000, stream=stream),
        long_request(500, prompt=[9] * 3000, stream=stream),
        *[long_request(2000, n=2, stream=stream)] * 4,
    ]
    connections = [server.connect() for _ in bodies]
    for connection, body in zip(connections, bodies, strict=True):
        connection.sendall(post_bytes(COMPLETIONS, body))
    wait_until(lambda: server.load()[0] == 4 and server.load()[1] > 0, "some run and some wait")
    for connection in connections:
        leave(connection, how)
    wait_until(server.is_idle, "idle", timeout_s=3)


def test_slow_readers_do_not_hold_the_engine(server: ServerProcess) -> None:
    connections = [server.connect() for _ in range(8)]
    for connection in connections:
        connection.sendall(post_bytes(COMPLETIONS, long_request(300, stream=True)))
    assert server.post(COMPLETIONS, short(1)).status_code == 200
    wait_until(server.is_idle, "all computed, none read")
    for connection in connections:
        assert b'"finish_reason":"length"' in read_until(connection, b"[DONE]")
        connection.close()


def usage_of(server: ServerProcess) -> tuple[int, int, int]:
    """File descriptors, threads and kilobytes of the server's process."""
    process = pathlib.Path("/proc") / str(server.process.pid)
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return len(list((process / "fd").iterdir())), int(status["Threads"]), int(status["VmRSS"].split()[0])


def work_through(server: ServerProcess, rounds: int) -> None:
    """Good, bad and abandoned requests, 25 a round."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for number in range(rounds):
            for i in range(4):
                assert client.post(COMPLETIONS, json=short(number + i, max_tokens=3)).status_code == 200
                assert client.post(CHAT, json={"messages": [{"role": "user", "content": f"{i}" * i}], "max_tokens": 2}).status_code == 200
                assert client.post(COMPLETIONS, json=short(number, stream=True, max_tokens=3)).status_code == 200
                assert client.post(COMPLETIONS, json={"prompt": {}}).status_code == 400
                assert client.get(f"/nothing/{number}").status_code == 404
            assert asyncio.run(ask_all(server, [short(i, max_tokens=2) for i in range(2)]))
            for stream in (True, False, True):
                with server.connect() as connection:
                    connection.sendall(post_bytes(COMPLETIONS, long_request(stream=stream)))
    wait_until(server.is_idle, "idle")


def test_promise_3_nothing_grows_over_a_thousand_requests(server: ServerProcess) -> None:
    work_through(server, 10)
    compiles = server.metrics()["jaxserve:compiles_total"]
    files, threads, kilobytes = usage_of(server)
    work_through(server, 40)
    wait_until(lambda: usage_of(server)[0] <= files, "no file descriptor is left over", timeout_s=10)
    assert usage_of(server)[1] <= threads + 1
    assert usage_of(server)[2] < kilobytes + 20_000
    assert server.metrics()["jaxserve:compiles_total"] == compiles
    assert "Traceback" not in server.log
