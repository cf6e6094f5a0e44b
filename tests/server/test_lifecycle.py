"""Starting and stopping: ports, broken models, signals at every moment, a kill without warning."""

from __future__ import annotations

import concurrent.futures
import pathlib
import signal
import socket

import httpx
import pytest

from tests.server.process import (
    COMPLETIONS,
    MAX_LEN,
    ServerProcess,
    error_of,
    events_of,
    long_request,
    model,
    post_bytes,
    read_until,
    serving,
    wait_until,
)

SHORT = {"prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0}


def test_health_tells_how_far_loading_is_and_requests_wait_outside(logs: pathlib.Path) -> None:
    with serving(logs, ready=False) as server:
        wait_until(server.is_open, "the port is open")
        reply = server.get("/health")
        assert reply.status_code == 503
        assert reply.json()["status"]
        assert "retry-after" in reply.headers
        for refused in (server.post(COMPLETIONS, SHORT), server.get("/v1/models")):
            assert (refused.status_code, error_of(refused)["code"]) == (503, "unavailable")
            assert "retry-after" in refused.headers
        assert server.get("/metrics").status_code == 200
        server.wait_until_ready()
        assert server.get("/health").json() == {"status": "ok"}
        assert server.post(COMPLETIONS, SHORT).status_code == 200


def test_sigterm_while_loading_ends_the_process_at_once(logs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    # A cache of its own, so that there is something to compile.
    with serving(logs, "--cache-dir", str(tmp_path), ready=False) as server:
        wait_until(server.is_open, "the port is open")
        wait_until(lambda: server.get("/health").json()["status"] != "loading", "the loading has begun")
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_until_ended(60) == 0
        assert not server.is_open()


def test_promise_5_sigterm_lets_streams_finish_and_refuses_new_requests(logs: pathlib.Path) -> None:
    with serving(logs, "--drain-timeout-s", "60") as server, httpx.Client(timeout=60) as client, httpx.Client(timeout=60) as other:
        assert other.post(server.url + COMPLETIONS, json=SHORT).status_code == 200
        with client.stream("POST", server.url + COMPLETIONS, json=long_request(MAX_LEN - 3, stream=True)) as stream:
            pieces = stream.iter_text()
            text = next(pieces)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: server.get("/health").status_code == 503, "draining")
            for refused in (other.post(server.url + COMPLETIONS, json=SHORT), server.post(COMPLETIONS, SHORT)):
                assert (refused.status_code, error_of(refused)["code"]) == (503, "unavailable")
            text += "".join(pieces)
        assert events_of(text)[-1]["choices"][0]["finish_reason"] == "length"
        assert server.wait_until_ended(30) == 0
        assert not server.is_open()
        assert "Traceback" not in server.log


def test_drain_timeout_ends_streams_with_an_error_event(logs: pathlib.Path) -> None:
    with serving(logs, "--drain-timeout-s", "0") as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        whole = pool.submit(server.post, COMPLETIONS, long_request(MAX_LEN - 3))
        with httpx.stream("POST", server.url + COMPLETIONS, json=long_request(MAX_LEN - 3, stream=True), timeout=60) as stream:
            pieces = stream.iter_text()
            text = next(pieces)
            wait_until(lambda: server.metrics()["vllm:request_params_n_count"] == 2, "both run")
            server.process.send_signal(signal.SIGTERM)
            text += "".join(pieces)
        last = events_of(text)[-1]
        assert last["error"]["code"] == "unavailable"
        assert (whole.result().status_code, error_of(whole.result())["code"]) == (503, "unavailable")
        assert server.wait_until_ended(30) == 0
        assert "Traceback" not in server.log


def test_second_signal_stops_at_once(logs: pathlib.Path) -> None:
    with serving(logs, "--drain-timeout-s", "600") as server, server.connect() as connection:
        connection.sendall(post_bytes(COMPLETIONS, long_request(MAX_LEN - 3, n=16, stream=True)))
        read_until(connection, b"data: ")
        server.process.send_signal(signal.SIGINT)
        wait_until(lambda: server.get("/health").status_code == 503, "draining")
        server.process.send_signal(signal.SIGTERM)
        assert server.wait_until_ended(5) == 0


def test_kill_leaves_nothing_that_hinders_the_next_start(logs: pathlib.Path) -> None:
    shared = set(pathlib.Path("/dev/shm").iterdir())
    with serving(logs) as first, first.connect() as connection:
        connection.sendall(post_bytes(COMPLETIONS, long_request(stream=True)))
        read_until(connection, b"data: ")
        first.process.kill()
        assert first.wait_until_ended(10) == -signal.SIGKILL
        # Connections of the dead are still about when the next one binds.
        with serving(logs, port=first.port) as second:
            assert second.post(COMPLETIONS, SHORT).status_code == 200
    assert set(pathlib.Path("/dev/shm").iterdir()) <= shared


def test_port_in_use_is_said_in_one_line(logs: pathlib.Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = ServerProcess(logs, port=taken.getsockname()[1])
        try:
            assert server.wait_until_ended(60) == 1
        finally:
            server.stop()
    (line,) = server.log.splitlines()
    assert line.startswith(f"jaxserve: cannot listen on 127.0.0.1 port {server.port}: ")


def broken_models(tmp_path: pathlib.Path) -> dict[str, pathlib.Path]:
    """Paths that hold no model, each for its own reason."""
    made = {name: tmp_path / name for name in ("nothing", "not-json", "cut-weights", "unknown")}
    for name in ("not-json", "cut-weights", "unknown"):
        made[name].mkdir()
    (made["not-json"] / "config.json").write_text("{")
    (made["unknown"] / "config.json").write_text('{"model_type": "abacus"}')
    for file in model().iterdir():
        (made["cut-weights"] / file.name).write_bytes(file.read_bytes()[: 5000 if file.suffix == ".safetensors" else None])
    return made


@pytest.mark.parametrize("which", ["nothing", "not-json", "cut-weights", "unknown"])
def test_broken_model_is_said_in_one_line_and_ends_the_process(logs: pathlib.Path, tmp_path: pathlib.Path, which: str) -> None:
    path = broken_models(tmp_path)[which]
    server = ServerProcess(logs, model_path=str(path), env={"HF_HUB_OFFLINE": "1"})
    try:
        assert server.wait_until_ended() == 1
    finally:
        server.stop()
    assert "Traceback" not in server.log
    lines = [line for line in server.log.splitlines() if "ERROR" in line or "CRITICAL" in line]
    assert len(lines) == 1
    assert path.name in lines[0] or "abacus" in lines[0]


def test_options_that_make_no_sense_end_the_process_with_their_names(logs: pathlib.Path) -> None:
    server = ServerProcess(logs, "--max-queue", "0", "--page-size", "0")
    try:
        assert server.wait_until_ended(60) == 1
    finally:
        server.stop()
    assert server.log.startswith("jaxserve: ")
    assert "--max-queue" in server.log
    assert "--page-size" in server.log
