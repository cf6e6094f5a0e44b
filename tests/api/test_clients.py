"""The official openai client, and a socket of our own, against a real server on a loopback port."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import openai
import pytest
import uvicorn

if TYPE_CHECKING:
    from tests.api.conftest import Client


class Served:
    """An app behind uvicorn in a thread of its own."""

    def __init__(self, client: Client) -> None:
        self.engine = client.engine
        config = uvicorn.Config(client.app, host="127.0.0.1", port=0, log_level="warning", lifespan="off", access_log=False)
        self._server = uvicorn.Server(config)
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._up.wait(10)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self._up.set()
        await self._server.serve([listener])

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)

    def wait_for_idle(self) -> None:
        """Wait until the engine has no live request."""
        idle = threading.Event()

        def look() -> None:
            if self.engine.live:
                self.loop.call_later(0.005, look)
            else:
                idle.set()

        self.loop.call_soon_threadsafe(look)
        assert idle.wait(5), "requests are still running"


@pytest.fixture
def served(client: Client) -> Iterator[Served]:
    server = Served(client)
    yield server
    server.stop()


@pytest.fixture
def sdk(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="x", max_retries=0) as client:
        yield client


def test_openai_chat_reads_answers_and_streams(sdk: openai.OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hé"}]
    whole = sdk.chat.completions.create(
        model="org/byte-model", messages=messages, temperature=0, max_tokens=15, logprobs=True, top_logprobs=2, n=2
    )
    assert whole.choices[1].message.content == "<system>be brie"
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.content is not None
    assert whole.choices[0].logprobs.content[0].bytes == [ord("<")]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 30
    with sdk.chat.completions.create(
        model="org/byte-model", messages=messages, stream=True, stream_options={"include_usage": True}, max_completion_tokens=15
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "<system>be brie"
    assert chunks[-1].usage is not None
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    with sdk.chat.completions.stream(model="org/byte-model", messages=messages, stop="y") as helper:
        assert helper.get_final_completion().choices[0].message.content == "<s"


def test_openai_completions_and_models_work(sdk: openai.OpenAI) -> None:
    done = sdk.completions.create(model="org/byte-model", prompt=[[97, 98], [99]], echo=True, max_tokens=1, logprobs=1)
    assert [choice.text for choice in done.choices] == ["aba", "cc"]
    assert done.choices[0].logprobs is not None
    assert done.choices[0].logprobs.token_logprobs == [None, -0.5, -0.5]
    assert [chunk.choices[0].text for chunk in sdk.completions.create(model="org/byte-model", prompt="ab", stream=True)] == ["a", "b", ""]
    assert [model.id for model in sdk.models.list()] == ["org/byte-model"]
    assert sdk.models.retrieve("org/byte-model").owned_by == "jaxserve"


def test_openai_raises_its_own_exceptions(sdk: openai.OpenAI, served: Served) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="nope", messages=messages)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.chat.completions.create(model="org/byte-model", messages=messages, n=1000)
    assert (bad.value.param, bad.value.type) == ("n", "invalid_request_error")
    served.engine.capacity = 0
    with pytest.raises(openai.RateLimitError):
        sdk.chat.completions.create(model="org/byte-model", messages=messages)
    served.engine.state.phase = "draining"
    with pytest.raises(openai.InternalServerError) as closed:
        sdk.chat.completions.create(model="org/byte-model", messages=messages, stream=True)
    assert closed.value.status_code == 503
    assert closed.value.request_id


@pytest.mark.parametrize("stream", [False, True])
def test_closed_socket_aborts_the_request(served: Served, stream: bool) -> None:
    served.engine.hold = True
    body = json.dumps({"prompt": "abc", "n": 4, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)
        submitted = threading.Event()

        async def wait() -> None:
            await served.engine.submits.wait()
            submitted.set()

        asyncio.run_coroutine_threadsafe(wait(), served.loop)
        assert submitted.wait(5)
    served.wait_for_idle()
    assert len(served.engine.aborted) == 4


def test_upload_beyond_the_limit_gets_its_answer(served: Served) -> None:
    size = 9 << 20
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % size
        connection.sendall(head)
        connection.sendall(b"x" * size)
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"code":"request_too_large"' in answer
