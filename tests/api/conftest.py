"""A scripted engine with the interface of `AsyncEngine`: every token is one byte, an answer repeats its prompt, and time is the test's.

With `hold` set, streams move only when the test calls `step()`; else one token per turn of the event loop.
"""

from __future__ import annotations

import asyncio
import codecs
import dataclasses
import json
import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import httpx
import pydantic
import pytest

from jaxserve.api.app import create_app
from jaxserve.config import EngineConfig, make_config
from jaxserve.errors import EngineUnavailableError, QueueFullError, UserError
from jaxserve.metrics import Metrics
from jaxserve.request import RequestOutput, SamplingParams, StructuredOutputs, TokenLogprobs, merge_outputs

BOS, EOS, VOCAB = 256, 257, 259
MAX_LEN = 120
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


class ByteTokenizer:
    """Token id = byte; 256 begins a text, 257 ends one."""

    vocab_size = VOCAB
    special_ids = frozenset({BOS, EOS})
    special_tokens: ClassVar[dict[str, str]] = {"bos_token": "<bos>", "eos_token": "<eos>"}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(self._pieces(ids, skip_special_tokens))

    strips_space = False

    def byte_table(self, *, skip_special_tokens: bool, shown: frozenset[int] = frozenset()) -> list[bytes]:
        hidden = self.special_ids - shown if skip_special_tokens else frozenset()
        return [b"" if token in hidden else self.token_bytes(token) for token in range(VOCAB)]

    def token_text(self, token: int) -> str:
        return {BOS: "<bos>", EOS: "<eos>"}.get(token) or bytes([token % 256]).decode(errors="replace")

    def token_name(self, token: int) -> str:
        return self.token_text(token)

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else self.token_text(token).encode()

    def _pieces(self, ids: Sequence[int], skip: bool) -> list[str]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return [decoder.decode(bytes([token])) if token < 256 else "" if skip else self.token_text(token) for token in ids]


class PlainChat:
    """Prints <role>content lines; remembers how it was called; refuses what a test puts into `refuses`."""

    def __init__(self) -> None:
        self.source: str | None = None
        self.calls: list[dict[str, Any]] = []
        self.refuses: set[str] = set()

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str:
        self.calls.append({"messages": messages, **options})
        if self.refuses & {message["role"] for message in messages}:
            raise UserError("messages", "this role is not known to the template")
        text = "".join(f"<{message['role']}>{message['content']}\n" for message in messages)
        if options["continue_final_message"]:
            return text[:-1]
        return text + ("<assistant>" if options["add_generation_prompt"] else "")


class ScriptedStream:
    """Like the engine's own stream: merges when the reader is slow, and an abort does not wake the reader."""

    def __init__(self, request_id: str, engine: ScriptedEngine, prompt: list[int], params: SamplingParams) -> None:
        self.id, self.prompt, self.params = request_id, prompt, params
        self.name: str | None = None
        self._engine = engine
        self._arrived = asyncio.Event()
        self._output: RequestOutput | None = None
        self._ended = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._sampled = 0

    def __aiter__(self) -> ScriptedStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended and self._output is None:
            raise StopAsyncIteration
        await self._arrived.wait()
        self._arrived.clear()
        output, self._output = self._output, None
        assert output is not None
        return output

    def abort(self) -> None:
        if self._engine.live.pop(self.id, None) is not None:
            self._engine.aborted.append(self.id)

    def put(self, output: RequestOutput) -> None:
        self._output = output if self._output is None else merge_outputs([self._output, output])
        self._ended = output.finish_reason is not None
        if self._ended:
            self._engine.live.pop(self.id, None)
        self._arrived.set()

    def end(self, reason: Any, error: str | None = None) -> None:
        """End now, the way a failed step or a drain that ran out of time does."""
        self.put(
            RequestOutput(
                id=self.id, finish_reason=reason, error=error, num_prompt_tokens=len(self.prompt), num_output_tokens=self._sampled
            )
        )

    def step(self) -> None:
        """Sample one token: the next byte of the prompt's text, over and over."""
        reply = [token for token in self.prompt if token < 256] or list(b"!")
        if self._engine.replies:
            reply = list(self._engine.replies[self._engine.submitted.index(self) % len(self._engine.replies)].encode())
        over = self._sampled >= len(reply) and not self.params.ignore_eos and self._sampled >= self.params.min_tokens
        token = EOS if over else reply[self._sampled % len(reply)]
        first = self._sampled == 0
        self._sampled += 1
        text = "" if token == EOS else self._decoder.decode(bytes([token]))
        self._text += text
        reason, stop = self._finish(token)
        if isinstance(stop, str) and not self.params.include_stop_str_in_output:
            text = text[: max(0, len(text) - len(stop))]
        self.put(
            RequestOutput(
                id=self.id,
                text=text,
                token_ids=(token,),
                logprobs=None if self.params.num_logprobs is None else (self._logprobs(token, self.params.num_logprobs),),
                prompt_logprobs=self._prompt_logprobs() if first else None,
                finish_reason=reason,
                stop_reason=stop,
                num_prompt_tokens=len(self.prompt),
                num_cached_tokens=self._engine.cached,
                num_output_tokens=self._sampled,
            )
        )

    def _finish(self, token: int) -> tuple[Any, int | str | None]:
        if token == EOS:
            return "stop", None
        if token in self.params.stop_token_ids:
            return "stop", token
        for stop in self.params.stop:
            if self._text.endswith(stop):
                return "stop", stop
        return ("length", None) if self._sampled == self.params.max_tokens else (None, None)

    def _logprobs(self, token: int, num_top: int) -> TokenLogprobs:
        if self._engine.tops is None:
            return fake_logprob(token, num_top)
        return TokenLogprobs(token_id=token, logprob=-0.5, rank=2, top=tuple(self._engine.tops(self.prompt)[:num_top]))

    def _prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        if self.params.prompt_logprobs is None:
            return None
        return (None, *(fake_logprob(token, self.params.prompt_logprobs) for token in self.prompt[1:]))


def fake_logprob(token: int, num_top: int) -> TokenLogprobs:
    """The token itself comes second, so that top entries and the token differ."""
    top = (((token + 1) % 256, -0.25), (token, -0.5), ((token + 2) % 256, float("-inf")))
    return TokenLogprobs(token_id=token, logprob=-0.5, rank=2, top=top[:num_top])


class ScriptedGrammars:
    """Compiles anything but what a test puts into `refuses`, and remembers it."""

    def __init__(self) -> None:
        self.compiled: list[StructuredOutputs] = []
        self.refuses: str | None = None

    async def compile_async(self, spec: StructuredOutputs) -> Any:
        if self.refuses is not None:
            raise UserError(spec.source, self.refuses)
        self.compiled.append(spec)
        return spec


class ScriptedEngine:
    """The interface of `AsyncEngine`, all on the event loop."""

    def __init__(self, **options: Any) -> None:
        self.config: EngineConfig = make_config({"model": "org/byte-model", **options})
        self.metrics = Metrics("byte-model")
        self.state: Any = types.SimpleNamespace(phase="ready", detail="")
        self.healthy = True
        self.chat = PlainChat()
        self.served: Any = types.SimpleNamespace(
            tokenizer=ByteTokenizer(), chat=self.chat, max_len=MAX_LEN, vocab_size=VOCAB, eos_ids=frozenset({EOS}),
            grammars=ScriptedGrammars(), pooling=None, defaults={}, refused={},
        )  # fmt: skip
        self.live: dict[str, ScriptedStream] = {}
        self.submitted: list[ScriptedStream] = []
        self.calls: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.told: list[Any] = []  # by an operator
        self.tops: Callable[[list[int]], Sequence[tuple[int, float]]] | None = None  # what may come next, instead of fake_logprob
        self.replies: list[str] = []  # what the requests are answered with, in turn, instead of their prompts
        self.hold = False
        self.cached = 3
        self.capacity = 10_000
        self.submits = asyncio.Event()

    def submit(
        self, *, prompt_ids: list[int], params: SamplingParams, priority: int = 0, cache_salt: str | None = None, constraint: Any = None
    ) -> ScriptedStream:
        assert constraint == params.structured_outputs, "what was asked for is what was compiled"
        assert params.max_tokens is None or 1 <= params.max_tokens <= self.served.max_len - len(prompt_ids), (
            "the front end checks lengths first"
        )
        if self.state.phase != "ready":
            raise EngineUnavailableError("/secret/path says no")
        if len(self.live) >= self.capacity:
            raise QueueFullError(7.0)
        limit = params.max_tokens or self.served.max_len - len(prompt_ids)
        stream = ScriptedStream(f"r{len(self.submitted)}", self, list(prompt_ids), dataclasses.replace(params, max_tokens=limit))
        self.calls.append({"params": params, "priority": priority, "cache_salt": cache_salt, "prompt_ids": prompt_ids})
        self.submitted.append(stream)
        self.live[stream.id] = stream
        self.submits.set()
        if not self.hold:
            asyncio.get_running_loop().call_soon(self._go_on, stream)
        return stream

    @property
    def num_unfinished(self) -> int:
        return len(self.live)

    @property
    def is_paused(self) -> bool:
        return "paused" in self.told

    def cut_short(self, names: Any) -> int:
        chosen = [stream for stream in self.live.values() if names is None or {stream.id, stream.name} & set(names)]
        for stream in chosen:
            stream.end("abort")
        return len(chosen)

    async def pause(self, mode: str, *, clear_cache: bool) -> bool:
        self.told = ["paused", mode, clear_cache]
        return mode != "wait"

    async def resume(self) -> None:
        self.told = []

    async def reset_prefix_cache(self, *, preempt: bool) -> bool:
        return preempt

    async def start_profile(self) -> None:
        self.told = ["profiling"]

    async def stop_profile(self) -> None:
        if self.told != ["profiling"]:
            raise UserError(None, "no profile is under way", status=409)

    def step(self) -> None:
        """One token for every live stream."""
        for stream in list(self.live.values()):
            stream.step()

    def _go_on(self, stream: ScriptedStream) -> None:
        if stream.id in self.live and not self.hold:
            stream.step()
            asyncio.get_running_loop().call_soon(self._go_on, stream)


class Client:
    """Sends requests to an app in this process; each call runs an event loop of its own."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine = engine
        self.app = create_app(engine)  # type: ignore[arg-type]

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._request(method, path, True, options)

    def request_quietly(self, method: str, path: str, **options: Any) -> httpx.Response:
        """As a client sees it when the app raises."""
        return self._request(method, path, False, options)

    def _request(self, method: str, path: str, raise_errors: bool, options: dict[str, Any]) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=raise_errors)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, payload: Any, **options: Any) -> httpx.Response:
        return self.request("POST", path, json=payload, **options)

    def chat(self, text: str = "hi", **options: Any) -> httpx.Response:
        return self.post(CHAT, {"messages": [{"role": "user", "content": text}], **options})

    def complete(self, prompt: Any = "abc", **options: Any) -> httpx.Response:
        return self.post(COMPLETIONS, {"prompt": prompt, **options})


class Connection:
    """One raw ASGI request, in the test's own hands: it decides when the client reads, and when it leaves."""

    def __init__(self, app: Any, path: str, payload: Any) -> None:
        self._gone = asyncio.Event()
        self._body: bytes | None = json.dumps(payload).encode()
        self.reads = asyncio.Event()
        self.reads.set()
        self.sent: list[dict[str, Any]] = []
        self.arrived = asyncio.Event()
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    def leave(self) -> None:
        """Close the connection."""
        self._gone.set()

    async def first_bytes(self) -> None:
        """Wait until something has been sent."""
        await self.arrived.wait()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        await self.reads.wait()
        self.sent.append(message)
        if message["type"] == "http.response.body":
            self.arrived.set()


def events(response_body: bytes) -> list[dict[str, Any]]:
    """The JSON events of a stream; asserts its framing."""
    frames = response_body.decode().split("\n\n")
    assert frames.pop() == "", "the last frame must be whole"
    assert frames.pop() == "data: [DONE]"
    assert all(one.startswith("data: ") and "\n" not in one for one in frames)
    return [json.loads(one.removeprefix("data: ")) for one in frames]


def check_extras(model: Any, allowed: frozenset[str] = frozenset(), path: str = "") -> None:
    """Nothing in a client's model, or in the models within, that its type does not know."""
    if isinstance(model, pydantic.BaseModel):
        assert not set(model.model_extra or {}) - allowed, f"{path}: {model.model_extra}"
        for name in type(model).model_fields:
            check_extras(getattr(model, name), allowed, f"{path}.{name}")
    elif isinstance(model, list):
        for item in model:
            check_extras(item, allowed, f"{path}[]")


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object of a refusal; asserts its shape."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert len(response.content) <= 64_000
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert 0 < len(body["error"]["message"]) <= 500
    return body["error"]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def client(engine: ScriptedEngine) -> Client:
    return Client(engine)


@pytest.fixture
def make_client() -> Callable[..., Client]:
    return lambda **options: Client(ScriptedEngine(**options))


@pytest.fixture
def talkative(make_client: Callable[..., Client]) -> Callable[..., Client]:
    """Makes a client with room for long answers, of a model that calls tools and says these texts one after the other."""

    def make(*replies: str, reasoning: str) -> Client:
        client = make_client(tool_call_parser="hermes", reasoning_parser=reasoning)
        client.engine.replies = list(replies)
        client.engine.served.max_len = 4000
        return client

    return make


@pytest.fixture
def connect(client: Client) -> Callable[..., Connection]:
    return lambda path, payload, to=client: Connection(to.app, path, payload)


@pytest.fixture(name="events")
def _events() -> Callable[[bytes], list[dict[str, Any]]]:
    return events


@pytest.fixture(name="error_of")
def _error_of() -> Callable[[httpx.Response], dict[str, Any]]:
    return error_of
