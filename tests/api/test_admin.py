"""What operators may do with --enable-admin-endpoints, and with which key."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from jaxserve.config import make_config
from jaxserve.errors import ConfigError
from tests.api.conftest import CHAT, Connection, events

if TYPE_CHECKING:
    from tests.api.conftest import Client

ErrorOf = Callable[[httpx.Response], dict[str, Any]]


@pytest.fixture
def admin(make_client: Callable[..., Client]) -> Client:
    return make_client(enable_admin_endpoints=True)


def test_pause_and_resume_reach_the_engine(admin: Client) -> None:
    assert admin.get("/is_paused").json() == {"is_paused": False}
    assert admin.request("POST", "/pause").json() == {"status": "paused"}
    assert admin.engine.told == ["paused", "abort", True]
    assert admin.get("/is_paused").json() == {"is_paused": True}
    assert admin.request("POST", "/resume").json() == {"status": "resumed"}
    assert admin.request("POST", "/pause?mode=keep&clear_cache=true").status_code == 200
    assert admin.engine.told == ["paused", "keep", False]


def test_pause_that_is_overtaken_is_a_conflict(admin: Client, error_of: ErrorOf) -> None:
    assert error_of(reply := admin.request("POST", "/pause?mode=wait&clear_cache=false"))["code"] == "superseded"
    assert reply.status_code == 409


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/pause?mode=stop", "mode"),
        ("/pause?clear_cache=1", "clear_cache"),
        ("/pause?what=x", "what"),
        ("/reset_prefix_cache?reset_external=true", "reset_external"),
    ],
)
def test_bad_query_is_refused_by_name(admin: Client, error_of: ErrorOf, path: str, param: str) -> None:
    reply = admin.request("POST", path)
    assert (reply.status_code, error_of(reply)["param"]) == (400, param)
    assert admin.engine.told == []


def test_prefix_cache_is_reset(admin: Client) -> None:
    assert admin.request("POST", "/reset_prefix_cache").json() == {"success": False}
    assert admin.request("POST", "/reset_prefix_cache?reset_running_requests=true").json() == {"success": True}


def test_profile_is_started_once_and_stopped_once(admin: Client, error_of: ErrorOf) -> None:
    assert error_of(admin.request("POST", "/stop_profile"))["type"] == "invalid_request_error"
    assert admin.request("POST", "/start_profile").json() == {"status": "profiling"}
    assert admin.request("POST", "/stop_profile").json() == {"status": "stopped"}


def test_no_ids_abort_nothing_when_nothing_runs(admin: Client) -> None:
    for body in ({}, {"request_ids": []}, {"request_ids": ["chatcmpl-x"]}):
        assert admin.post("/abort_requests", body).json() == {"status": "aborted", "aborted": 0}


def test_bad_ids_are_refused(admin: Client, error_of: ErrorOf) -> None:
    for ids in ("x", [1], {}, ["x"] * 5000):
        assert admin.post("/abort_requests", {"request_ids": ids}).status_code == 400


def test_orders_wait_for_the_model(admin: Client) -> None:
    admin.engine.state.phase = "loading"
    for path in ("/pause", "/resume", "/reset_prefix_cache", "/start_profile"):
        assert admin.request("POST", path).status_code == 503


def test_admin_key_alone_opens_admin_paths(make_client: Callable[..., Client]) -> None:
    client = make_client(enable_admin_endpoints=True, api_key=("user",), admin_api_key=("root",))

    def status(path: str, key: str | None) -> int:
        return client.get(path, headers={} if key is None else {"authorization": f"Bearer {key}"}).status_code

    assert [status("/is_paused", key) for key in (None, "user", "root")] == [401, 401, 200]
    assert [status("/v1/models", key) for key in (None, "user", "root")] == [401, 200, 200]
    assert [status("/pause", key) for key in ("user", "root")] == [401, 405]


def test_admin_key_needs_no_other_keys(make_client: Callable[..., Client]) -> None:
    client = make_client(enable_admin_endpoints=True, admin_api_key=("root",))
    assert client.get("/is_paused").status_code == 401
    assert client.get("/v1/models").status_code == 200


def test_admin_endpoints_beside_keys_need_a_key_of_their_own() -> None:
    with pytest.raises(ConfigError, match="--admin-api-key"):
        make_config({"enable_admin_endpoints": True, "api_key": ("user",)})


def test_server_info_tells_no_key(make_client: Callable[..., Client]) -> None:
    client = make_client(api_key=("very-secret",), admin_api_key=("most-secret",), max_len=77)
    reply = client.get("/server_info", headers={"authorization": "Bearer very-secret"})
    assert reply.json()["config"]["model"]["max_len"] == 77
    assert reply.json()["versions"]["jax"]
    assert "secret" not in reply.text


def test_tokenizer_info_has_what_renders_a_prompt(make_client: Callable[..., Client]) -> None:
    info = make_client(enable_tokenizer_info_endpoint=True).get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["chat_template"]) == ("<bos>", "<eos>", None)
    assert info["model_max_length"] == 120


def test_load_counts_unfinished_requests(client: Client) -> None:
    assert client.get("/load").json() == {"server_load": 0}
    client.engine.live["x"] = None  # type: ignore[assignment]
    assert client.get("/load").json() == {"server_load": 1}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("named", ["chatcmpl-mine", "mine", None])
def test_aborted_answer_is_what_there_was(admin: Client, stream: bool, named: str | None) -> None:
    async def test() -> None:
        admin.engine.hold = True
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream}
        kept = Connection(admin.app, CHAT, {**body, "request_id": "other"}) if named else None
        ended = Connection(admin.app, CHAT, {**body, "request_id": "mine"})
        while len(admin.engine.live) < 1 + (kept is not None):
            await asyncio.sleep(0)
        admin.engine.step()
        order = Connection(admin.app, "/abort_requests", {"request_ids": [named]} if named else {})
        await asyncio.wait_for(order.task, 5)
        assert json.loads(order.body) == {"status": "aborted", "aborted": 1}
        await asyncio.wait_for(ended.task, 5)
        assert ended.sent[0]["status"] == 200
        choices = [chunk["choices"][0] for chunk in events(ended.body)] if stream else json.loads(ended.body)["choices"]
        assert choices[-1]["finish_reason"] == "abort"
        assert "".join(choice["delta"].get("content", "") if stream else choice["message"]["content"] for choice in choices) == "<"
        assert len(admin.engine.live) == (kept is not None)
        if kept is not None:
            kept.leave()
            await asyncio.wait_for(kept.task, 5)

    asyncio.run(test())
