"""What the server says about itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Client, ScriptedEngine


def test_models_are_listed_under_every_served_name(make_client: Callable[..., Client]) -> None:
    client = make_client(served_model_name=("org/first", "second"))
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["org/first", "second"]
    card = client.get("/v1/models/org/first").json()
    assert card == listed["data"][0]
    assert (card["object"], card["owned_by"], card["parent"], card["max_model_len"]) == ("model", "jaxserve", None, 120)
    assert card["permission"][0]["object"] == "model_permission"
    assert client.get("/v1/models/first").status_code == 404
    assert client.chat(model="second").json()["model"] == "second"
    assert client.chat(model=None).json()["model"] == "org/first"


@pytest.mark.parametrize(
    ("phase", "detail", "healthy", "status", "shown"),
    [
        ("ready", "", True, 200, "ok"),
        ("ready", "", False, 503, "stalled"),
        ("loading", "", False, 503, "loading"),
        ("compiling", "compiling 7/12", False, 503, "compiling 7/12"),
        ("draining", "bye", True, 503, "draining"),
        ("failed", "/some/path", False, 503, "failed"),
    ],
)
def test_health_tells_the_state(
    client: Client, engine: ScriptedEngine, phase: str, detail: str, healthy: bool, status: int, shown: str
) -> None:
    engine.state.phase, engine.state.detail, engine.healthy = phase, detail, healthy
    for path in ("/health", "/ping"):
        response = client.get(path)
        assert (response.status_code, response.json()) == (status, {"status": shown})
    assert client.request("HEAD", "/health").status_code == status
    assert client.get("/").json()["status"] == shown


def test_models_wait_for_the_model(client: Client, engine: ScriptedEngine) -> None:
    engine.state.phase = "loading"
    assert client.get("/v1/models").status_code == 503
    engine.state.phase = "draining"
    assert client.get("/v1/models").status_code == 200


def test_root_version_and_metrics_answer(client: Client, engine: ScriptedEngine) -> None:
    assert client.request("HEAD", "/").status_code == 200
    assert client.get("/version").json()["version"]
    engine.metrics.running.set(4)
    metrics = client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'vllm:num_requests_running{engine="0",model_name="byte-model"} 4.0' in metrics.text
