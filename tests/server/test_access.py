"""Who gets in: keys, paths, Host headers, CORS, and the pages that are open to everyone."""

from __future__ import annotations

import httpx
import pytest

from tests.server.process import CHAT, COMPLETIONS, ServerProcess, error_of, head

ASK = {"prompt": [5, 6], "max_tokens": 2}
ROUTES = [
    ("POST", CHAT),
    ("POST", COMPLETIONS),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/"),
    ("GET", "/nothing"),
    ("DELETE", "/v1/models"),
    ("GET", "/health/"),
    ("GET", "//health"),
    ("GET", "/health%2f"),
]
WRONG = {
    "none": b"",
    "scheme alone": b"Bearer",
    "wrong": b"Bearer wrong",
    "longer": "Bearer sésame2".encode(),
    "shorter": "Bearer sésam".encode(),
    "latin-1": "Bearer sésame".encode("latin-1"),
    "no text": b"Bearer " + b"\xff" * 100,
    "long": b"Bearer " + b"x" * 50_000,
    "no scheme": b"other-key",
    "other scheme": b"Basic other-key",
    "two": b"Bearer other-key,x",
}


def with_key(key: bytes) -> dict[str, bytes]:
    return {"authorization": b"Bearer " + key}


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_r13_r14_every_route_but_health_needs_a_key(guarded: ServerProcess, method: str, path: str) -> None:
    with httpx.Client(timeout=60) as client:
        for wrong in WRONG.values():
            reply = client.request(method, guarded.url + path, headers={b"authorization": wrong} if wrong else {})
            assert reply.status_code == 401
            assert error_of(reply)["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", ["sésame", "other-key"])
def test_every_key_opens(guarded: ServerProcess, key: str) -> None:
    assert guarded.get("/v1/models", headers=with_key(key.encode())).status_code == 200
    assert guarded.post(COMPLETIONS, ASK, headers=with_key(key.encode())).status_code == 200


@pytest.mark.parametrize("host", ["x/health?", "x/health#", "127.0.0.1/health", "x:80/health/.."])
def test_r13_host_header_opens_nothing(guarded: ServerProcess, host: str) -> None:
    assert guarded.get("/v1/models", headers={"host": host}).status_code == 401


@pytest.mark.parametrize(
    "target",
    [
        "/v1/../health",
        "http://x/health/../v1/models",
        "http://x/v1/models",
        "/v1/models?/health",
        "/v1/models#/health",
        "/health;/../v1/models",
    ],
)
def test_r13_odd_request_targets_open_nothing(guarded: ServerProcess, target: str) -> None:
    with guarded.connect() as connection:
        connection.sendall(head("GET", target, "connection: close"))
        assert int(connection.recv(65536).split()[1]) in (400, 401)


def test_health_needs_no_key(guarded: ServerProcess) -> None:
    assert guarded.get("/health").json() == {"status": "ok"}
    assert guarded.get("/ping").status_code == 200


def test_key_is_nowhere_to_be_seen(guarded: ServerProcess) -> None:
    assert "other-key" not in guarded.log
    assert "sésame" not in guarded.log
    assert "other-key" not in guarded.get("/metrics", headers=with_key(b"other-key")).text


def test_cors_lets_its_origin_in_and_preflights_need_no_key(guarded: ServerProcess) -> None:
    ask = {
        "origin": "http://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    preflight = httpx.options(guarded.url + CHAT, headers=ask, timeout=60)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "http://a.example"
    refused = guarded.get("/v1/models", headers={"origin": "http://a.example"})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "http://a.example")
    stranger = guarded.get("/v1/models", headers={"origin": "http://b.example", **with_key(b"other-key")})
    assert "access-control-allow-origin" not in stranger.headers


def test_cors_is_off_by_default(server: ServerProcess) -> None:
    assert "access-control-allow-origin" not in server.get("/v1/models", headers={"origin": "http://a.example"}).headers
    preflight = httpx.options(
        server.url + CHAT, headers={"origin": "http://a.example", "access-control-request-method": "POST"}, timeout=60
    )
    assert preflight.status_code == 405


@pytest.mark.parametrize("path", ["/", "/health", "/version", "/v1/models", "/metrics"])
def test_pages_answer_get_and_head_alike(server: ServerProcess, path: str) -> None:
    got, headed = server.get(path), httpx.head(server.url + path, timeout=60)
    assert (got.status_code, headed.status_code, headed.content) == (200, 200, b"")
    assert headed.headers["content-type"] == got.headers["content-type"]


def test_models_say_what_clients_look_for(server: ServerProcess) -> None:
    (card,) = server.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 4096)
    assert card["owned_by"]
    assert server.get("/v1/models/tiny").json() == card
    missing = server.get("/v1/models/org/other")
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")


def test_request_id_comes_back_when_harmless(server: ServerProcess) -> None:
    for path in ("/health", "/nothing", "/v1/models"):
        assert server.get(path, headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
        assert server.get(path, headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"
