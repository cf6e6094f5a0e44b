"""Several processes that serve as one: the same tokens, a clear end when one of them is killed, and no stranger among them."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.engine.parallel_worker import CHEAP_TO_COMPILE
from tests.engine.test_cluster import slurm_task
from tests.server.process import COMPLETIONS, ServerProcess, free_port, long_request

BODIES: list[dict[str, Any]] = [
    {"prompt": "the quick brown fox", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 1},
    {"prompt": "a capital", "max_tokens": 12, "temperature": 0.9, "seed": 3, "ignore_eos": True, "top_k": 20},
    {"prompt": "x", "max_tokens": 12, "temperature": 0, "frequency_penalty": 1.0, "repetition_penalty": 1.3, "ignore_eos": True},
    {"prompt": "text", "max_tokens": 12, "temperature": 1, "seed": 4, "structured_outputs": {"regex": "[a-z ]*"}},
]
GONE_WITHIN_S = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """How so many processes find each other: by options, or by what Slurm says to each task."""

    count: int
    by_slurm: bool = False
    port: int = dataclasses.field(default_factory=free_port)

    def member(self, logs: pathlib.Path, process: int, *more: str) -> ServerProcess:
        """One of the processes; each has a device of its own."""
        options, env = ["--mesh", f"tensor={self.count}", *more], {"XLA_FLAGS": CHEAP_TO_COMPILE}
        if self.by_slurm:
            env |= slurm_task(self.count, process) | {"JAX_COORDINATOR_PORT": str(self.port)}
        else:
            options += ["--coordinator", f"127.0.0.1:{self.port}", "--num-processes", str(self.count), "--process-id", str(process)]
        return ServerProcess(logs, *options, env=env)


@contextlib.contextmanager
def together(logs: pathlib.Path, group: Group, *of_last: str, ready: bool = True) -> Iterator[list[ServerProcess]]:
    """Processes that serve as one, the leader first; killed at the end; logs are printed when the test fails.

    Args:
      of_last: options that only the last one has.
    """
    processes = [group.member(logs, i, *(of_last if i == group.count - 1 else ())) for i in range(group.count)]
    try:
        if ready:
            processes[0].wait_until_ready()
        yield processes
    except BaseException:
        for process in processes:
            print(process.log[-5000:])
        raise
    finally:
        for process in processes:
            process.stop()


@pytest.fixture(scope="module")
def pair_group() -> Group:
    return Group(count=2, by_slurm=True)


@pytest.fixture(scope="module")
def pair(logs: pathlib.Path, pair_group: Group) -> Iterator[list[ServerProcess]]:
    with together(logs, pair_group) as processes:
        yield processes


def answer(server: ServerProcess, body: dict[str, Any]) -> Any:
    reply = server.post(COMPLETIONS, body).raise_for_status().json()
    return reply["choices"][0]["text"], reply["usage"]["completion_tokens"]


def test_tokens_are_those_of_one_process(server: ServerProcess, pair: list[ServerProcess]) -> None:
    assert [answer(pair[0], body) for body in BODIES] == [answer(server, body) for body in BODIES]


def test_tokens_are_those_of_one_process_when_four_serve(server: ServerProcess, logs: pathlib.Path) -> None:
    with together(logs, Group(count=4)) as processes:
        assert [answer(processes[0], body) for body in BODIES] == [answer(server, body) for body in BODIES]
        processes[0].process.send_signal(signal.SIGTERM)
        assert [process.wait_until_ended() for process in processes] == [0] * 4


def test_process_that_comes_late_is_refused_by_name_and_the_others_go_on(
    server: ServerProcess, pair: list[ServerProcess], pair_group: Group, logs: pathlib.Path
) -> None:
    late = pair_group.member(logs, 1)
    try:
        assert late.wait_until_ended() == 1
    finally:
        late.stop()
    assert "process 1 is refused: it comes too late, all 2 have been here for" in late.log
    assert answer(pair[0], BODIES[0]) == answer(server, BODIES[0])


def test_killed_follower_ends_open_requests_and_the_leader(pair: list[ServerProcess]) -> None:
    leader, follower = pair
    with httpx.stream("POST", leader.url + COMPLETIONS, json=long_request(stream=True), timeout=60) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith("data: ")
        follower.process.kill()
        started_s = time.monotonic()
        rest = "\n".join(lines)
    assert time.monotonic() - started_s < GONE_WITHIN_S
    assert '"error"' in rest
    assert leader.wait_until_ended(GONE_WITHIN_S) == 1
    assert "process 1 is gone" in leader.log


def test_follower_with_other_options_is_refused_by_name_and_so_is_the_start(logs: pathlib.Path) -> None:
    with together(logs, Group(count=2), "--max-rows", "3", ready=False) as (leader, follower):
        assert follower.wait_until_ended() == 1
        assert leader.wait_until_ended() == 1
        for process in (leader, follower):
            assert "process 1 is refused: its --max-rows is 3, the leader's is 4" in process.log
