"""The load generator against a scripted server, and its arithmetic."""

from __future__ import annotations

import asyncio
import importlib
import json
import pathlib
import statistics
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
bench: Any = importlib.import_module("bench_serving")
client: Any = importlib.import_module("load_client")
report: Any = importlib.import_module("load_report")

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
Reply = Callable[[asyncio.StreamWriter, dict[str, Any]], Awaitable[None]]


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


def text_events(num_tokens: int, *, usage: bool = True) -> list[bytes]:
    events = [event({"choices": [{"index": 0, "text": f"w{index}", "finish_reason": None}]}) for index in range(num_tokens)]
    events.append(event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}))
    if usage:
        events.append(event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": num_tokens}}))
    return [*events, event(b"[DONE]")]


async def reply_whole(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    writer.write(HEAD + b"".join(chunk(part) for part in text_events(body["max_tokens"])) + b"0\r\n\r\n")


async def reply_bytewise(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    for part in HEAD + b"".join(chunk(part) for part in text_events(body["max_tokens"])) + b"0\r\n\r\n":
        writer.write(bytes([part]))
        await writer.drain()


async def reply_busy(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    content = b'{"error": {"message": "queue is full"}}'
    writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: %d\r\n\r\n%s" % (len(content), content))


async def reply_cut(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    writer.write(HEAD + chunk(text_events(3)[0]) + b"0\r\n\r\n")


async def reply_hang_up(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    writer.write(HEAD + chunk(text_events(3)[0]))
    await writer.drain()
    writer.close()


async def reply_error_event(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    writer.write(
        HEAD + chunk(text_events(3)[0]) + chunk(event({"error": {"message": "step failed"}})) + chunk(event(b"[DONE]")) + b"0\r\n\r\n"
    )


async def reply_garbage(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    writer.write(HEAD + chunk(event(b"{not json")) + b"0\r\n\r\n")


async def reply_never(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    await asyncio.Event().wait()


async def reply_until_close(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(text_events(body["max_tokens"], usage=False)))
    await writer.drain()
    writer.close()


class Server:
    """Answers the n-th completion with the n-th reply, over and over; keeps what was asked."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = replies
        self.bodies: list[dict[str, Any]] = []
        self.num_connections = 0
        self.headers: list[str] = []
        self.open: list[tuple[Any, asyncio.StreamWriter]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.open.append((asyncio.current_task(), writer))
        while not writer.is_closing():
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            except (asyncio.IncompleteReadError, ConnectionResetError):
                break
            length = int(head.partition("content-length:")[2].split("\r\n")[0])
            content = await reader.readexactly(length)
            self.headers.append(head)
            if head.startswith("get /v1/models"):
                writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 27\r\n\r\n{"data": [{"id": "a/b c"}]}')
                continue
            self.bodies.append(json.loads(content))
            await self.replies[(len(self.bodies) - 1) % len(self.replies)](writer, self.bodies[-1])
        writer.close()

    async def close(self) -> None:
        """End what still runs, so that nothing outlives its loop."""
        for task, writer in self.open:
            task.cancel()
            writer.close()
        await asyncio.gather(*(task for task, _ in self.open), *(writer.wait_closed() for _, writer in self.open), return_exceptions=True)


def measure(server: Server, *flags: str) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        args = bench.parse_args(["--base-url", f"http://127.0.0.1:{port}/v1", "--input-len", "5", "--output-len", "4", *flags])
        try:
            return await asyncio.wait_for(bench.measure(args), 20)
        finally:
            listener.close()
            await server.close()

    return asyncio.run(run())


def test_all_figures_are_there_when_every_request_is_answered() -> None:
    server = Server(reply_whole)
    figures = measure(server, "--num-requests", "6", "--concurrency", "2", "--warmup", "1", "--ignore-eos", "--api-key", "secret")
    assert (figures["completed"], figures["errors"], figures["unfinished"]) == (6, {}, 0)
    assert (figures["input_tokens"], figures["output_tokens"], figures["tokens_counted_by"]) == (30, 24, "usage")
    assert figures["model"] == "a/b c"
    assert figures["peak_concurrency"] == 2
    assert all(set(figures[f"{name}_ms"]) == {"mean", "p50", "p90", "p99"} for name in report.LATENCIES)
    assert len(server.bodies) == 7
    assert server.num_connections <= 3
    assert all(body["ignore_eos"] and len(body["prompt"]) == 5 and body["temperature"] == 0 for body in server.bodies)
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 7
    assert all("authorization: bearer secret" in head for head in server.headers)
    assert report.format_table(figures).count("\n") == 6


def test_errors_are_counted_by_kind_when_the_server_misbehaves() -> None:
    server = Server(reply_whole, reply_busy, reply_cut, reply_hang_up, reply_error_event, reply_garbage)
    figures = measure(server, "--num-requests", "6", "--concurrency", "1", "--warmup", "0")
    assert figures["errors"] == {"http 429": 1, "cut short": 1, "connection lost": 1, "error event": 1, "protocol": 1}
    assert (figures["completed"], figures["unfinished"]) == (1, 0)
    assert figures["output_tokens"] == 4 + 3


def test_answers_are_read_whole_when_every_byte_comes_alone() -> None:
    figures = measure(Server(reply_bytewise), "--num-requests", "2", "--warmup", "0")
    assert (figures["completed"], figures["output_tokens"]) == (2, 8)


def test_events_are_counted_when_the_server_sends_no_usage() -> None:
    figures = measure(Server(reply_until_close), "--num-requests", "2", "--warmup", "0")
    assert (figures["completed"], figures["output_tokens"], figures["tokens_counted_by"]) == (2, 8, "events")


def test_run_ends_when_the_time_is_over() -> None:
    figures = measure(
        Server(reply_whole, reply_never), "--num-requests", "5", "--concurrency", "1", "--warmup", "0", "--max-seconds", "0.2"
    )
    assert (figures["completed"], figures["unfinished"], figures["errors"]) == (1, 4, {})


def test_request_is_a_timeout_when_it_takes_too_long() -> None:
    figures = measure(Server(reply_never, reply_whole), "--num-requests", "2", "--concurrency", "1", "--warmup", "0", "--timeout-s", "0.1")
    assert figures["errors"] == {"timeout": 1}
    assert figures["completed"] == 1


def test_every_request_is_sent_when_a_rate_is_given() -> None:
    figures = measure(Server(reply_whole), "--num-requests", "20", "--request-rate", "1000", "--warmup", "0")
    assert figures["completed"] == 20
    assert figures["request_rate"] == 1000


def test_chat_sends_messages_when_asked_for() -> None:
    server = Server(reply_whole)
    figures = measure(server, "--num-requests", "1", "--warmup", "0", "--endpoint", "chat", "--extra-body", '{"top_p": 0.5}')
    assert figures["completed"] == 1
    assert server.bodies[0]["top_p"] == 0.5
    assert [message["role"] for message in server.bodies[0]["messages"]] == ["user"]


def test_run_stops_when_every_warm_up_request_fails() -> None:
    with pytest.raises(SystemExit, match="queue is full"):
        measure(Server(reply_busy), "--num-requests", "1")


def test_plot_says_what_to_install_when_matplotlib_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        report.import_pyplot()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n1,7,3\n2,9,2\n", [(7, 3), (9, 2)]),
        ("a.jsonl", '{"prompt": "hello", "output_len": 3}\n\n{"input_length": 6}\n', [("hello", 3), (6, 4)]),
        ("a.json", '[{"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]}]', [("Who?", 4)]),
        ("b.jsonl", '{"turns": ["first", "second"]}', [("first", 4)]),
    ],
)
def test_dataset_gives_prompts_and_lengths_of_every_known_form(
    tmp_path: pathlib.Path, name: str, content: str, expected: list[Any]
) -> None:
    (tmp_path / name).write_text(content)
    queries = bench.make_queries(bench.parse_args(["--dataset", str(tmp_path / name), "--output-len", "4", "--num-requests", "5"]))
    found = [(query.prompt if isinstance(query.prompt, str) else len(query.prompt), query.output_len) for query in queries]
    assert found == (expected * 5)[:5]


def test_dataset_entry_is_named_when_it_holds_nothing(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"colour": 3}\n')
    with pytest.raises(SystemExit, match="entry 2"):
        bench.make_queries(bench.parse_args(["--dataset", str(tmp_path / "a.jsonl")]))


@given(st.integers(0, 2**32), st.floats(0.1, 1000), st.integers(1, 50))
def test_arrivals_are_repeatable_and_ordered_for_any_seed(seed: int, rate: float, count: int) -> None:
    offsets = bench.arrival_offsets(rate, count, seed)
    assert offsets == bench.arrival_offsets(rate, count, seed) == sorted(offsets)
    assert len(offsets) == count
    assert offsets[0] == 0


def test_arrivals_come_at_the_rate_when_there_are_many() -> None:
    assert bench.arrival_offsets(50.0, 20_000, 1)[-1] == pytest.approx(400, rel=0.05)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2), st.integers(1, 99))
def test_percentiles_equal_those_of_statistics_for_any_values(values: list[float], percent: int) -> None:
    expected = statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
    assert report.percentile(sorted(values), percent / 100) == pytest.approx(expected, abs=1e-6)


def test_latencies_are_exact_when_the_times_are_known() -> None:
    fast = client.Answer(10.0, 14.5, [11.0, 12.0, 14.0], num_input=6, num_output=4, finished=True)
    slow = client.Answer(12.0, 16.0, [15.0], num_input=6, num_output=1, finished=True)
    figures = report.summarize([fast, slow], 3)
    assert figures["ttft_ms"]["mean"] == 2000
    assert figures["tpot_ms"]["p50"] == 1000
    assert figures["itl_ms"]["mean"] == 1500
    assert figures["e2e_ms"]["p50"] == 4250
    assert figures["duration_s"] == 6.0
    assert figures["unfinished"] == 1
    assert figures["output_tokens_per_s"] == pytest.approx(5 / 6, abs=0.01)
    assert figures["peak_concurrency"] == 2
