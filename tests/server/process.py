"""A real server in a process of its own: its port, its log, its figures, and what a client with a bare socket can do to it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

from tests.tiny import tiny_model

SHAPES = ["--max-rows", "4", "--max-step-tokens", "32", "--decode-rows", "4", "--prefill-tokens", "32", "--cache-bytes", "8388608"]
MAX_LEN = 4096
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# Generous, for machines that do other things too; nothing waits so long unless something is broken.
PATIENCE_S = 300.0


@functools.cache
def model() -> pathlib.Path:
    """A tiny model whose answers may be long enough to be interrupted."""
    return tiny_model(max_len=MAX_LEN)


def wait_until(holds: Callable[[], Any], what: str, *, timeout_s: float = PATIENCE_S) -> Any:
    """The first true value of `holds()`; fails when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        value = holds()
        if value:
            return value
        time.sleep(0.01)  # the pace of asking, not a wait for a result
    raise AssertionError(f"not within {timeout_s:g} s: {what}")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def long_request(num_tokens: int = 3000, **more: Any) -> dict[str, Any]:
    """A completion request whose answer has exactly so many tokens."""
    return {"prompt": [5, 17, 300], "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, **more}


class ServerProcess:
    """A server that has been started; it may still be loading.

    Args:
      directory: for its log, and the compiled programs that all servers of a test run share.
      options: of the command line, after the ones that keep it small.
      module: what to run; must take the options of jaxserve.serve.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *options: str,
        port: int | None = None,
        module: str = "jaxserve.serve",
        model_path: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = directory / f"server-{self.port}-{time.monotonic_ns()}.log"
        command = [
            sys.executable, "-m", module, "--model", model_path or str(model()), "--served-model-name", "tiny", "--host", "127.0.0.1",
            "--port", str(self.port), "--cache-dir", str(directory / "cache"), *SHAPES, *options,
        ]  # fmt: skip
        with open(self._log, "wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})

    @property
    def log(self) -> str:
        """All that the server has printed."""
        return self._log.read_text(errors="replace")

    def get(self, path: str, **options: Any) -> httpx.Response:
        """The reply to one GET on a connection of its own."""
        return httpx.get(self.url + path, timeout=PATIENCE_S, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        """The reply to one POST on a connection of its own."""
        return httpx.post(self.url + path, json=body, timeout=PATIENCE_S, **options)

    def is_open(self) -> bool:
        """Whether the port takes connections."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5):
            return True
        return False

    def wait_until_ready(self) -> ServerProcess:
        """Return when /health is 200; fails if the process ends before."""

        def ready() -> bool:
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log[-4000:]}"
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
            return False

        wait_until(ready, "ready")
        return self

    def wait_until_ended(self, timeout_s: float = PATIENCE_S) -> int:
        """The exit code."""
        return self.process.wait(timeout=timeout_s)

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics without labels other than model_name and engine, by name."""
        found = re.findall(r'^([a-z_:]+)\{engine="0",model_name="tiny"\} (\S+)$', self.get("/metrics").text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    def load(self) -> tuple[float, float, float]:
        """Requests running, requests waiting, share of the cache in use."""
        values = self.metrics()
        return values["vllm:num_requests_running"], values["vllm:num_requests_waiting"], values["vllm:kv_cache_usage_perc"]

    def is_idle(self) -> bool:
        """Whether nothing runs, waits or holds pages."""
        return self.load() == (0, 0, 0)

    def connect(self, *, timeout_s: float = 30.0) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s)

    def stop(self) -> None:
        """End it, whatever state it is in."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=30)


@contextlib.contextmanager
def serving(directory: pathlib.Path, *options: str, ready: bool = True, **how: Any) -> Iterator[ServerProcess]:
    """A server, ready unless told otherwise, killed at the end; its log is printed when the test fails."""
    server = ServerProcess(directory, *options, **how)
    try:
        yield server.wait_until_ready() if ready else server
    except BaseException:
        print(server.log[-8000:])
        raise
    finally:
        server.stop()


def head(method: str, path: str, *headers: str, length: int | None = None) -> bytes:
    """The head of a request, for bare connections."""
    lines = [f"{method} {path} HTTP/1.1", "host: x", *headers]
    if length is not None:
        lines += ["content-type: application/json", f"content-length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def post_bytes(path: str, body: Any, *headers: str) -> bytes:
    """A whole POST request, for bare connections."""
    data = json.dumps(body).encode()
    return head("POST", path, *headers, length=len(data)) + data


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes; a reset counts as the end."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            received += piece
    return received


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    """Bytes up to the first that contain `mark`."""
    received = b""
    while mark not in received:
        piece = connection.recv(65536)
        assert piece, f"the connection ended before {mark!r}: {received[-300:]!r}"
        received += piece
    return received


def error_of(reply: httpx.Response) -> dict[str, Any]:
    """The error object of a reply, which must be as every error has to be."""
    assert reply.headers["content-type"].startswith("application/json")
    return check_error(reply.content)


def check_error(body: bytes) -> dict[str, Any]:
    """The error object of a body: OpenAI's four keys, small, and nothing of the server's inside."""
    assert len(body) < 64 << 10
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    for secret in ("Traceback", "0x7", ".py", "site-packages", str(pathlib.Path.home())):
        assert secret not in body.decode()
    return error


def events_of(text: str) -> list[dict[str, Any]]:
    """The JSON of every event of a whole stream; checks the frames and the end."""
    assert text.endswith("data: [DONE]\n\n")
    frames = text.split("\n\n")[:-2]
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]
