"""Who may serve together: each process once, in time, with the same version, model and options; others are refused by name."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import pathlib
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.api.app import create_app
from jaxserve.config import EngineConfig, make_config
from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.engine import Engine
from jaxserve.engine.load import ServedModel, fingerprint, load_engine
from jaxserve.engine.multihost import Door, Follower, Leader, knock
from jaxserve.engine.replicas import Replicas
from jaxserve.errors import ConfigError
from jaxserve.metrics import Metrics
from jaxserve.models.families import find_family
from jaxserve.request import RequestOutput, SamplingParams
from jaxserve.weights.checkpoint import read_config
from tests.tiny import tiny_model

LEADER = {"version": "1.2", "--num-processes": 3, "--max-rows": 4, "--decode-rows": (1, 4), "--mesh": {"tensor": 3}}
PATIENCE_S = 30.0
SHAPES = {"max_rows": 4, "max_step_tokens": 32, "decode_rows": (4,), "prefill_tokens": (32,), "cache_bytes": 1 << 20, "page_size": 16}


def knock_at(door: Door, process: int, identity: dict[str, Any] = LEADER) -> Follower:
    follower, jax_port = knock("localhost", door.port, process, identity, timeout_s=PATIENCE_S)
    assert jax_port == 77
    return follower


@contextlib.contextmanager
def gathering(count: int, timeout_s: float = PATIENCE_S) -> Iterator[tuple[Door, concurrent.futures.Future[Leader]]]:
    """A door where the leader waits for all others."""
    door = Door(0, count, LEADER)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        leader = pool.submit(door.gather, timeout_s, 77)
        yield door, leader
        if leader.exception() is None:
            leader.result().close()


@contextlib.contextmanager
def group(count: int) -> Iterator[tuple[Door, Leader, Sequence[Follower]]]:
    """A leader and its followers."""
    with gathering(count) as (door, leader), concurrent.futures.ThreadPoolExecutor(count) as pool:
        followers = list(pool.map(lambda process: knock_at(door, process), range(1, count)))
        yield door, leader.result(), followers
        for follower in followers:
            follower.close()


def test_followers_receive_what_the_leader_tells_until_it_lets_go() -> None:
    with group(3) as (_, leader, followers):
        arrays = (np.arange(6, dtype=np.int32).reshape(2, 3), np.array(True))
        leader.tell(1, "decode_4", arrays)
        leader.close()
        for follower in followers:
            message = follower.receive()
            assert message is not None
            copy, program, received = message
            assert (copy, program) == (1, "decode_4")
            for sent, array in zip(arrays, received, strict=True):
                np.testing.assert_array_equal(sent, array)
                assert sent.dtype == array.dtype
            assert follower.receive() is None


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"version": "1.3"}, "version is '1.3', the leader's is '1.2'"),
        ({"--max-rows": 8}, "--max-rows is 8, the leader's is 4"),
        ({"--mesh": {"tensor": 2}, "--decode-rows": None}, "--decode-rows is None, the leader's is [1, 4]; --mesh is {'tensor': 2}"),
        ({"--num-processes": 4}, "--num-processes is 4, the leader's is 3"),
    ],
)
def test_process_with_other_options_is_refused_by_name_and_so_is_the_start(changed: dict[str, Any], named: str) -> None:
    with gathering(3) as (door, leader), concurrent.futures.ThreadPoolExecutor(1) as pool:
        alike = pool.submit(knock_at, door, 1)
        with pytest.raises(ConfigError) as refused:
            knock_at(door, 2, LEADER | changed)
        for error in (refused.value, leader.exception(), alike.exception()):
            assert isinstance(error, ConfigError)
            assert "process 2 is refused: its " in str(error)
            assert named in str(error)


def test_process_that_comes_late_is_refused_and_the_group_goes_on() -> None:
    with group(2) as (door, leader, (follower,)):
        for process in (1, 2):
            with pytest.raises(ConfigError, match=f"process {process} is refused: it comes too late, all 2 have been here for"):
                knock_at(door, process)
        leader.tell(0, "decode_4", ())
        assert follower.receive() == (0, "decode_4", [])


def test_number_that_is_taken_or_that_there_is_not_is_refused() -> None:
    with gathering(3) as (door, leader), concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(knock_at, door, 1)
        with pytest.raises(ConfigError, match="process 3 is refused: beside the leader there are processes 1 to 2"):
            knock_at(door, 3)
        assert isinstance(leader.exception(), ConfigError)
        assert isinstance(first.exception(), ConfigError)
    with gathering(4) as (door, leader), concurrent.futures.ThreadPoolExecutor(2) as pool:
        both = [pool.submit(knock_at, door, 1) for _ in range(2)]
        with pytest.raises(ConfigError, match="process 7"):
            knock_at(door, 7)
        assert "process 1 is refused: another process has this --process-id" in str(leader.exception())
        assert all(isinstance(process.exception(), ConfigError) for process in both)


def test_processes_that_do_not_come_are_named() -> None:
    with gathering(4, timeout_s=0.2) as (door, leader):
        with pytest.raises(ConfigError):
            knock_at(door, 2)
        assert "process 1, 3 of 4 did not come" in str(leader.exception())


def test_strangers_at_the_door_change_nothing() -> None:
    with gathering(2) as (door, leader):
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"", struct.pack("<QQ", 2, 1 << 60) + b"{}", struct.pack("<QQ", 2, 0) + b"[]"):
            with socket.create_connection(("localhost", door.port)) as stranger:
                stranger.sendall(said)
        knock_at(door, 1).close()
        assert isinstance(leader.result(), Leader)


def test_another_model_is_refused_by_name() -> None:
    with group(2) as (_, leader, (follower,)), concurrent.futures.ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(follower.agree, {"model": "b"})
        with pytest.raises(ConfigError, match="process 1 is refused: its model is 'b', the leader's is 'a'"):
            leader.agree({"model": "a"})
        assert "model is 'b'" in str(theirs.exception())


def test_lost_follower_is_named_to_whoever_waits() -> None:
    with group(3) as (_, leader, followers), concurrent.futures.ThreadPoolExecutor(2) as pool:
        agreed = [pool.submit(follower.agree, {"model": "a"}) for follower in followers]
        leader.agree({"model": "a"})
        assert [future.result() for future in agreed] == [None, None]
        reason: concurrent.futures.Future[str] = concurrent.futures.Future()
        leader.on_loss(reason.set_result)
        followers[1].close()
        assert reason.result(PATIENCE_S) == "process 2 is gone: it ended its connection"
        with pytest.raises(ConnectionError, match="process 2 is gone"):
            leader.tell(0, "decode_4", ())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other options")
def test_host_that_no_longer_answers_is_lost_within_ten_seconds() -> None:
    with group(3) as (_, leader, followers):
        for link in (*leader._links.values(), *(follower._link for follower in followers)):
            idle_s, pause_s, probes, unsent_ms = (
                link.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
            )
            assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert idle_s + pause_s * probes < 10
            assert 0 < unsent_ms < 10_000
            assert link.gettimeout() is None, "the other process may take as long as it needs"


def test_lost_leader_ends_its_followers() -> None:
    with group(2) as (_, leader, (follower,)):
        for link in leader._links.values():
            link.close()
        with pytest.raises(ConnectionError, match="gone"):
            follower.receive()


async def serve_until_lost(engine: AsyncEngine, lose: Callable[[], None]) -> tuple[list[RequestOutput], list[int]]:
    """What a request gets whose follower is lost under way, and what /health says before and after."""
    engine.start()
    await engine.wait_ready()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(engine)), base_url="http://leader") as client:
        health = [(await client.get("/health")).status_code]
        outputs = []
        async for output in engine.submit(prompt_ids=[5, 17, 300], params=SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True)):
            if not outputs:
                lose()
            outputs.append(output)
        health.append((await client.get("/health")).status_code)
    engine.stop(timeout_s=PATIENCE_S)
    return outputs, health


def test_lost_follower_ends_open_requests_with_an_error_and_health_says_so() -> None:
    failures: list[str] = []
    with group(2) as (_, leader, (follower,)), concurrent.futures.ThreadPoolExecutor(1) as pool:
        agreed = pool.submit(follower.agree, {"model": "a"})
        leader.agree({"model": "a"})
        agreed.result()

        def load(config: EngineConfig, metrics: Metrics, on_state: Callable[[str], None]) -> tuple[Engine | Replicas, ServedModel]:
            engine, served = load_engine(config, metrics, on_state)
            return engine, dataclasses.replace(served, group=leader)

        config = make_config({"model": str(tiny_model(max_len=4096)), **SHAPES})
        engine = AsyncEngine(config, load=load, on_failure=failures.append)
        outputs, health = asyncio.run(serve_until_lost(engine, follower.close))
    assert (outputs[-1].finish_reason, outputs[-1].error) == ("error", "the engine failed; it is safe to try again")
    assert health == [200, 503]
    assert failures == ["the engine failed: process 1 is gone: it ended its connection"]


def test_models_that_differ_only_in_their_weights_are_told_apart(tmp_path: pathlib.Path) -> None:
    model = tiny_model()
    config = read_config(model)
    spec = find_family(config).spec(config)
    tensors = load_file(model / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint(spec, tmp_path) == fingerprint(spec, model)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name] * np.float32(1.01)}, tmp_path / "model.safetensors")
    assert fingerprint(spec, tmp_path) != fingerprint(spec, model)


def test_engine_is_refused_to_a_process_that_another_leads() -> None:
    config = make_config({"model": str(tiny_model()), "coordinator": "localhost:1", "num_processes": 2, "process_id": 1})
    with pytest.raises(ConfigError, match="only process 0 of those that serve together has an engine"):
        load_engine(config, Metrics("tiny"), lambda _: None)
