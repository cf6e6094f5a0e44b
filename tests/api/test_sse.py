"""Streams under stress: errors before and after the first text, readers that leave, lag or stop, requests that end badly."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Client, Connection, ScriptedEngine

Events = Callable[[bytes], list[dict[str, Any]]]
Connect = Callable[..., "Connection"]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PAYLOADS = [
    (CHAT, {"messages": [{"role": "user", "content": "héllo"}], "n": 3}),
    (COMPLETIONS, {"prompt": ["abc", "defg"], "n": 2}),
    (COMPLETIONS, {"prompt": "abcd"}),
]


async def turns(condition: Callable[[], bool]) -> None:
    """Let the event loop go on until the condition holds."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never happened")


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


@pytest.mark.parametrize(("path", "payload"), PAYLOADS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_leaving_client_aborts_all_its_requests_at_once(
    engine: ScriptedEngine, connect: Connect, path: str, payload: dict[str, Any], stream: bool, steps: int
) -> None:
    async def test() -> None:
        engine.hold = True
        connection = connect(path, {**payload, "stream": stream})
        await turns(lambda: bool(engine.live))
        for _ in range(steps):
            engine.step()
            await asyncio.sleep(0)
        submitted = len(engine.submitted)
        connection.leave()
        await turns(lambda: not engine.live)
        await asyncio.wait_for(connection.task, 5)
        assert len(engine.aborted) == submitted
        assert b"DONE" not in connection.body
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(test)


def test_leaving_while_the_body_is_still_coming_is_quiet(client: Client, engine: ScriptedEngine) -> None:
    async def test() -> None:
        messages = [{"type": "http.request", "body": b'{"pro', "more_body": True}, {"type": "http.disconnect"}]

        async def receive() -> dict[str, Any]:
            return messages.pop(0)

        async def send(message: MutableMapping[str, Any]) -> None:
            raise AssertionError("nobody listens")

        headers = [(b"content-type", b"application/json")]
        await client.app({"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers, "query_string": b""}, receive, send)
        assert engine.submitted == []

    run(test)


@pytest.mark.parametrize(("path", "payload"), PAYLOADS)
def test_slow_reader_gets_everything_in_fewer_pieces(
    engine: ScriptedEngine, connect: Connect, events: Events, path: str, payload: dict[str, Any]
) -> None:
    async def test() -> None:
        engine.hold = True
        connection = connect(path, {**payload, "stream": True, "ignore_eos": True, "max_tokens": 40})
        await turns(lambda: bool(engine.live))
        engine.step()
        await connection.first_bytes()
        connection.reads.clear()
        for _ in range(39):
            engine.step()
            await asyncio.sleep(0)
        assert not engine.live, "the engine did not wait for the reader"
        connection.reads.set()
        await asyncio.wait_for(connection.task, 5)
        chunks = events(connection.body)
        choices = len(engine.submitted)
        # Role, first text, what was being written when the reader stopped, the merged rest, the finish.
        assert len(chunks) <= choices * 5
        for index, stream in enumerate(engine.submitted):
            own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            text = "".join(one["delta"].get("content", "") if "delta" in one else one["text"] for one in own)
            reply = bytes(token for token in stream.prompt if token < 256)
            assert text.encode() == (reply * 40)[:40]

    run(test)


def test_reader_that_stops_loses_the_stream(make_client: Callable[..., Client], connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        client = make_client(write_timeout_s=0.05)
        engine = client.engine
        engine.hold = True
        connection = connect(COMPLETIONS, {"prompt": "abc", "stream": True}, client)
        await turns(lambda: bool(engine.live))
        engine.step()
        await connection.first_bytes()
        connection.reads.clear()
        engine.step()
        await asyncio.wait_for(connection.task, 10)
        assert not engine.live
        assert len(engine.aborted) == 1

    run(test)
    assert "took nothing" in caplog.text


@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("abort", 503)])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "payload"), PAYLOADS)
def test_bad_end_before_the_first_text_is_a_status(
    engine: ScriptedEngine, connect: Connect, path: str, payload: dict[str, Any], stream: bool, reason: str, status: int
) -> None:
    async def test() -> None:
        engine.hold = True
        connection = connect(path, {**payload, "stream": stream})
        await turns(lambda: bool(engine.live))
        engine.submitted[-1].end(reason, "the step failed")
        if not stream:
            for live in list(engine.live.values()):
                live.end("length")
        await asyncio.wait_for(connection.task, 5)
        assert connection.sent[0]["status"] == status
        assert not engine.live
        assert b'"error"' in connection.body

    run(test)


@pytest.mark.parametrize("reason", ["error", "abort"])
@pytest.mark.parametrize(("path", "payload"), PAYLOADS)
def test_bad_end_after_the_first_text_is_an_event(
    engine: ScriptedEngine, connect: Connect, events: Events, path: str, payload: dict[str, Any], reason: str
) -> None:
    async def test() -> None:
        engine.hold = True
        connection = connect(path, {**payload, "stream": True})
        await turns(lambda: bool(engine.live))
        engine.step()
        await connection.first_bytes()
        engine.submitted[0].end(reason, "the step failed")
        await asyncio.wait_for(connection.task, 5)
        *_, last = events(connection.body)
        assert set(last) == {"error"}
        assert set(last["error"]) == {"message", "type", "param", "code"}
        assert connection.sent[0]["status"] == 200
        assert connection.sent[-1]["more_body"] is False
        assert not engine.live

    run(test)


def test_nothing_is_sent_before_the_first_text(engine: ScriptedEngine, connect: Connect) -> None:
    async def test() -> None:
        engine.hold = True
        connection = connect(CHAT, {"messages": [{"role": "user", "content": "a"}], "stream": True})
        await turns(lambda: bool(engine.live))
        for _ in range(50):
            await asyncio.sleep(0)
        assert connection.sent == []
        engine.step()
        await connection.first_bytes()
        # Role and first text leave in one piece.
        assert connection.body.count(b"data: ") == 2
        connection.leave()
        await asyncio.wait_for(connection.task, 5)

    run(test)


@pytest.mark.parametrize(("chunks", "status"), [([b'{"prompt":"', b"a" * 900, b"b" * 900], 413), ([b'{"prompt":"'], 408)])
def test_body_that_is_too_large_or_too_slow_is_answered(make_client: Callable[..., Client], chunks: list[bytes], status: int) -> None:
    async def test() -> None:
        client = make_client(max_body_bytes=1024, read_timeout_s=0.05)
        sent: list[MutableMapping[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if chunks:
                return {"type": "http.request", "body": chunks.pop(0), "more_body": True}
            await asyncio.Event().wait()
            raise AssertionError("unreachable")

        async def send(message: MutableMapping[str, Any]) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        await client.app({"type": "http", "method": "POST", "path": COMPLETIONS, "headers": headers, "query_string": b""}, receive, send)
        assert sent[0]["status"] == status
        assert (b"connection", b"close") in sent[0]["headers"]
        assert sent[-1]["more_body"] is False

    run(test)
