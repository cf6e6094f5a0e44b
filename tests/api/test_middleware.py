"""Keys, request ids and CORS, on every route."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from tests.api.conftest import Client

ErrorOf = Callable[[httpx.Response], dict[str, Any]]
ROUTES = [
    ("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/v1/models"),
    ("GET", "/v1/models/x"), ("GET", "/version"), ("GET", "/"), ("GET", "/nothing"), ("DELETE", "/v1/models"), ("OPTIONS", "/v1/models"),
    ("GET", "/health/"), ("GET", "//health"), ("GET", "/health%2f..%2fv1/models"), ("GET", "/Health"),
]  # fmt: skip
WRONG = [
    "",
    "Bearer",
    "Bearer ",
    "Bearer wrong",
    "Bearer sésame2",
    "Basic sésame",
    "sésame",
    "Bearer sésame x",
    "Bearer s",
    "Bearer key-two,sésame",
]


@pytest.fixture
def guarded(make_client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch) -> Client:
    monkeypatch.delenv("JAXSERVE_API_KEY", raising=False)
    return make_client(api_key=("sésame", "key-two"))


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_route_is_closed_without_a_key(guarded: Client, error_of: ErrorOf, method: str, path: str) -> None:
    for headers in ({}, *({"authorization": key.encode()} for key in WRONG)):
        response = guarded.request(method, path, headers=headers)
        assert response.status_code == 401
        error = error_of(response)
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["Bearer sésame", "bearer key-two", "Bearer  key-two"])
def test_every_key_opens(guarded: Client, key: str) -> None:
    headers = {"authorization": key.encode()}
    assert guarded.get("/v1/models", headers=headers).status_code == 200
    assert guarded.request("POST", "/v1/completions", json={"prompt": "a"}, headers=headers).status_code == 200


def test_key_may_come_as_anthropics_clients_send_it(guarded: Client) -> None:
    assert guarded.get("/v1/models", headers={"x-api-key": "sésame".encode()}).status_code == 200
    assert guarded.get("/v1/models", headers={"x-api-key": "other", "authorization": "Bearer key-two"}).status_code == 200
    assert guarded.get("/v1/models", headers={"x-api-key": "Bearer key-two"}).status_code == 401
    assert guarded.get("/v1/models", headers=[("x-api-key", "key-two"), ("x-api-key", "x")]).status_code == 401


def test_host_header_opens_nothing(guarded: Client) -> None:
    assert guarded.get("/v1/models", headers={"host": "x/health?"}).status_code == 401


def test_two_authorization_headers_open_nothing(guarded: Client) -> None:
    assert guarded.get("/v1/models", headers=[("authorization", "Bearer key-two"), ("authorization", "Bearer x")]).status_code == 401


@pytest.mark.parametrize(("metrics_auth", "status"), [(False, 200), (True, 401)])
def test_health_is_open_and_metrics_as_configured(make_client: Callable[..., Client], metrics_auth: bool, status: int) -> None:
    client = make_client(api_key=("k",), metrics_auth=metrics_auth)
    assert client.get("/health").status_code == 200
    assert client.get("/ping").status_code == 200
    assert client.get("/metrics").status_code == status


def test_key_may_come_from_the_environment(make_client: Callable[..., Client], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSERVE_API_KEY", "from-env")
    client = make_client()
    assert client.get("/v1/models").status_code == 401
    assert client.get("/v1/models", headers={"authorization": "Bearer from-env"}).status_code == 200


@pytest.mark.parametrize(("given", "kept"), [("abc-1.2:3_", True), ("a b", False), ("x" * 65, False), ("", False), ("<script>", False)])
def test_request_id_is_kept_when_harmless(client: Client, given: str, kept: bool) -> None:
    shown = client.get("/health", headers={"x-request-id": given}).headers["x-request-id"]
    assert (shown == given) is kept
    assert len(shown) in (len(given), 32)


def test_cors_is_off_by_default(client: Client) -> None:
    response = client.get("/v1/models", headers={"origin": "http://a.example"})
    assert "access-control-allow-origin" not in response.headers
    assert client.request("OPTIONS", "/v1/models", headers={"origin": "http://a.example"}).status_code == 405


def test_cors_lets_configured_origins_in_and_preflights_need_no_key(make_client: Callable[..., Client]) -> None:
    client = make_client(cors_origins=("http://a.example",), api_key=("k",))
    ask = {
        "origin": "http://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    preflight = client.request("OPTIONS", "/v1/chat/completions", headers=ask)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "http://a.example"
    assert preflight.headers["x-request-id"]
    refused = client.get("/v1/models", headers={"origin": "http://a.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "http://a.example")
    assert "access-control-allow-origin" not in client.get("/v1/models", headers={"origin": "http://b.example"}).headers


def test_prefix_of_a_proxy_is_taken_off_and_opens_nothing(make_client: Callable[..., Client]) -> None:
    client = make_client(root_path="/llm", api_key=("k",))
    assert [client.get(path).status_code for path in ("/llm/health", "/health", "/llm/v1/models", "/v1/models")] == [200, 200, 401, 401]
    key = {"authorization": "Bearer k"}
    assert client.get("/llm/v1/models", headers=key).json() == client.get("/v1/models", headers=key).json()
    assert [client.get(path, headers=key).status_code for path in ("/llmx/v1/models", "/llm/llm/v1/models", "/llm")] == [404, 404, 404]
