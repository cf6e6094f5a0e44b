"""Steps that fail, a device that hangs, an engine that cannot go on."""

from __future__ import annotations

import concurrent.futures
import contextlib
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.server.faulty import FAILING, HANGING
from tests.server.process import COMPLETIONS, ServerProcess, error_of, events_of, long_request, serving, wait_until


@pytest.fixture(scope="module")
def hang_file(logs: pathlib.Path) -> pathlib.Path:
    return logs / "hang"


@contextlib.contextmanager
def faulty(logs: pathlib.Path, hang_file: pathlib.Path, *options: str) -> Iterator[ServerProcess]:
    with serving(logs, *options, module="tests.server.faulty", env={"HANG_FILE": str(hang_file)}) as running:
        yield running


@pytest.fixture(scope="module")
def frail(logs: pathlib.Path, hang_file: pathlib.Path) -> Iterator[ServerProcess]:
    with faulty(logs, hang_file, "--stall-timeout-s", "0.5", "--drain-timeout-s", "0.5") as running:
        yield running


def ask(prompt: list[int], **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 3, "temperature": 0, **more}


def test_invariant_7_failed_step_fails_its_requests_and_the_engine_goes_on(frail: ServerProcess) -> None:
    before = frail.post(COMPLETIONS, ask([5, 6])).json()["choices"]
    for more in ({}, {"stream": True}):
        reply = frail.post(COMPLETIONS, ask([FAILING, 6], **more))
        assert reply.status_code == 500
        error = error_of(reply)
        assert (error["type"], error["code"]) == ("server_error", "generation_failed")
        assert "on fire" not in reply.text
        assert frail.post(COMPLETIONS, ask([5, 6])).json()["choices"] == before
        assert frail.get("/health").status_code == 200
    wait_until(frail.is_idle, "the pages of failed requests are free", timeout_s=5)
    assert frail.metrics()["jaxserve:failed_steps_total"] >= 2


def test_invariant_7_stream_that_has_begun_ends_with_an_error_event(frail: ServerProcess) -> None:
    with httpx.stream("POST", frail.url + COMPLETIONS, json=long_request(4000, stream=True), timeout=60) as stream:
        pieces = stream.iter_text()
        text = next(pieces)
        frail.post(COMPLETIONS, ask([FAILING, 6]))
        text += "".join(pieces)
    *_, last = events_of(text)
    assert last["error"]["code"] == "generation_failed"
    wait_until(frail.is_idle, "idle", timeout_s=5)
    assert frail.post(COMPLETIONS, ask([5, 6])).status_code == 200


def test_promise_6_device_that_hangs_turns_health_503_and_back(frail: ServerProcess, hang_file: pathlib.Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        hang_file.touch()
        try:
            asked = pool.submit(frail.post, COMPLETIONS, ask([HANGING, 6]))
            reply = wait_until(lambda: (found := frail.get("/health")).status_code == 503 and found, "unhealthy", timeout_s=30)
            assert reply.json() == {"status": "stalled"}
            refused = frail.post(COMPLETIONS, ask([5, 6]))
            assert (refused.status_code, error_of(refused)["code"]) == (503, "unavailable")
            assert "retry-after" in refused.headers
        finally:
            hang_file.unlink()
        assert asked.result().status_code == 200
    wait_until(lambda: frail.get("/health").status_code == 200, "healthy", timeout_s=30)


def test_r19_second_failure_in_a_row_ends_every_request_and_the_process(logs: pathlib.Path, hang_file: pathlib.Path) -> None:
    with faulty(logs, hang_file) as server, concurrent.futures.ThreadPoolExecutor(16) as pool:
        hang_file.touch()
        first = pool.submit(server.post, COMPLETIONS, ask([HANGING, 6], max_tokens=1))
        wait_until(lambda: server.metrics()["vllm:request_queue_time_seconds_count"] == 1, "the first one hangs")
        # While it hangs, more failing requests come than two steps have rows; then they fail step after step.
        rest = [pool.submit(server.post, COMPLETIONS, ask([FAILING, number])) for number in range(12)]
        wait_until(lambda: server.metrics()["vllm:request_params_n_count"] == 13, "all are queued")
        hang_file.unlink()
        assert first.result().status_code in (200, 500)
        for reply in [request.result() for request in rest]:
            assert reply.status_code == 500
            error_of(reply)
        assert server.wait_until_ended() == 1
        assert "two steps in a row failed" in server.log


def test_invariant_13_sigterm_ends_a_server_whose_device_hangs(logs: pathlib.Path, hang_file: pathlib.Path) -> None:
    with faulty(logs, hang_file, "--drain-timeout-s", "0.2") as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        hang_file.touch()
        try:
            asked = pool.submit(server.post, COMPLETIONS, ask([HANGING, 6]))
            wait_until(lambda: server.metrics()["vllm:request_params_n_count"] == 1, "running")
            server.process.send_signal(signal.SIGTERM)
            assert asked.result().status_code == 503
            assert server.wait_until_ended(30) == 0
        finally:
            hang_file.unlink()
