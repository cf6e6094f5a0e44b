"""The engine behind asyncio: one thread loads, compiles and steps; requests and outputs cross as plain data.

      event loop                                engine thread
submit -> inbox ------------------------------> drain inbox, schedule, dispatch, collect
OutputStream <- one call per step <------------ outputs of the step
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxserve.config import EngineConfig
from jaxserve.engine.admit import Admission
from jaxserve.engine.engine import Engine, FatalEngineError
from jaxserve.engine.load import ServedModel, load_engine
from jaxserve.errors import ConfigError, EngineUnavailableError, QueueFullError, UserError
from jaxserve.metrics import Metrics
from jaxserve.request import Constraint, Request, RequestOutput, SamplingParams, merge_outputs

log = logging.getLogger(__name__)

Phase = Literal["loading", "compiling", "ready", "draining", "failed"]
Loader = Callable[[EngineConfig, Metrics, Callable[[str], None]], tuple[Engine, ServedModel]]


@dataclasses.dataclass(frozen=True, slots=True)
class EngineState:
    """What the engine is doing; detail is for people, such as "compiling 7/12"."""

    phase: Phase
    detail: str = ""


class OutputStream:
    """The outputs of one request, as an async iterator that ends after the one with a finish reason.

    Outputs that come faster than they are read are merged; what a slow reader leaves unread is bounded by the answer's length.
    """

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self.id = request_id
        self._abort = abort
        self._unread: list[RequestOutput] = []
        self._arrived = asyncio.Event()
        self._ended = False

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if not self._ended:
            await self._arrived.wait()
            self._arrived.clear()
        if not self._unread:
            raise StopAsyncIteration
        unread, self._unread = self._unread, []
        return merge_outputs(unread)

    def abort(self) -> None:
        """Give the request up; its pages are free within a step. Harmless when it has ended."""
        if not self._ended:
            self._ended = True
            self._unread.clear()
            self._arrived.set()
            self._abort(self.id)

    def put(self, output: RequestOutput) -> None:
        """Hand an output to the reader; called on the event loop."""
        if self._ended:
            return
        self._unread.append(output)
        self._ended = output.finish_reason is not None
        self._arrived.set()


class AsyncEngine:
    """An engine in a thread of its own.

    Args:
      load: makes the engine; called in the thread.
      on_failure: called on the event loop when the engine cannot go on.
    """

    def __init__(self, config: EngineConfig, *, load: Loader = load_engine, on_failure: Callable[[str], None] | None = None) -> None:
        self.config = config
        self.metrics = Metrics(config.served_names[0])
        self._load, self._on_failure = load, on_failure
        self._state = EngineState("loading")
        self._served: ServedModel | None = None
        self._admission: Admission | None = None
        self._streams: dict[str, OutputStream] = {}
        self._inbox: collections.deque[Request | str] = collections.deque()
        self._wake = threading.Event()
        self._stopping = False
        self._busy_since_s: float | None = None
        self._waiting = (0, 0)  # requests, prompt tokens waiting in the scheduler
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def state(self) -> EngineState:
        """What the engine is doing."""
        return self._state

    @property
    def healthy(self) -> bool:
        """Whether requests would be answered: ready or draining, and no step takes longer than stall_timeout_s."""
        busy = self._busy_since_s
        stalled = busy is not None and time.monotonic() - busy > self.config.server.stall_timeout_s
        return self._state.phase in ("ready", "draining") and not stalled

    @property
    def served(self) -> ServedModel:
        """The model behind the engine.

        Raises: EngineUnavailableError until it is loaded.
        """
        if self._served is None:
            raise EngineUnavailableError(f"the model is not ready: {self._state.detail or self._state.phase}")
        return self._served

    @property
    def num_unfinished(self) -> int:
        """Requests whose last output has not been handed out."""
        return len(self._streams)

    def start(self) -> None:
        """Start loading; to be called on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(
        self, *, prompt_ids: Sequence[int], params: SamplingParams, priority: int = 0, cache_salt: str | None = None,
        constraint: Constraint | None = None,
    ) -> OutputStream:  # fmt: skip
        """Queue a request; to be called on the event loop. params.n is the front end's business.

        Args:
          constraint: params.structured_outputs as served.grammars compiles it.
        Raises: UserError, QueueFullError, EngineUnavailableError; then nothing has been queued.
        """
        if self._state.phase != "ready" or self._admission is None:
            raise EngineUnavailableError(f"no new requests: {self._state.detail or self._state.phase}")
        request = self._admission.make_request(prompt_ids, params, priority=priority, cache_salt=cache_salt, constraint=constraint)
        self._check_queue(len(request.prompt_ids))
        stream = OutputStream(request.id, self._abort)
        self._streams[request.id] = stream
        self._inbox.append(request)
        self._wake.set()
        return stream

    def begin_drain(self) -> None:
        """Take no new requests; running ones go on."""
        if self._state.phase != "failed":
            self._state = EngineState("draining", "the server is shutting down")

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request is left; False if the time ran out."""
        deadline = time.monotonic() + timeout_s
        while self._streams and time.monotonic() < deadline and self._state.phase != "failed":
            await asyncio.sleep(0.02)
        return not self._streams

    def abort_all(self) -> None:
        """End every request; its reader gets the finish reason "abort"."""
        for request_id in list(self._streams):
            self._inbox.append(request_id)
            self._deliver([RequestOutput(id=request_id, finish_reason="abort")])
        self._wake.set()

    def stop(self, *, timeout_s: float) -> bool:
        """End the thread after its current step; whether it has ended in time. Loading cannot be interrupted and is not waited for."""
        self._stopping = True
        self._wake.set()
        if self._served is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _check_queue(self, prompt_len: int) -> None:
        limits = self.config.schedule
        waiting, waiting_tokens = self._waiting
        coming = [len(item.prompt_ids) for item in tuple(self._inbox) if not isinstance(item, str)]
        too_long = waiting + len(coming) > 0 and waiting_tokens + sum(coming) + prompt_len > limits.max_queue_tokens
        if waiting + len(coming) >= limits.max_queue or too_long:
            raise QueueFullError(1.0)

    def _abort(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None:
            self._inbox.append(request_id)
            self._wake.set()

    def _run(self) -> None:
        try:
            engine, served = self._load(self.config, self.metrics, self._on_loading)
        except Exception as error:
            log.error("loading failed: %s", error, exc_info=not isinstance(error, ConfigError))
            self._post(self._fail, f"loading failed: {error}", [])
            return
        self._post(self._become_ready, served)
        try:
            self._serve(engine)
        except FatalEngineError as error:
            log.critical("the engine stops: %s", error)
            self._post(self._fail, f"the engine failed: {error}", error.outputs)
        except Exception as error:
            log.critical("the engine stops", exc_info=error)
            self._post(self._fail, "the engine failed", engine.fail_all("the engine failed; it is safe to try again"))

    def _serve(self, engine: Engine) -> None:
        while not self._stopping:
            outputs = self._drain_inbox(engine)
            if engine.has_work:
                self._busy_since_s = time.monotonic()
                outputs += engine.step()
            else:
                self._busy_since_s = None
            self._waiting = engine.waiting
            if outputs:
                self._post(self._deliver, outputs)
            if not engine.has_work and not self._inbox:
                self._busy_since_s = None
                self._wake.wait(timeout=1.0)
                self._wake.clear()

    def _drain_inbox(self, engine: Engine) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        blocked: list[Request | str] = []
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, str):
                engine.abort(item)
                continue
            if item.id not in self._streams:
                continue  # given up before it came in
            try:
                engine.add(item)
            except QueueFullError:
                blocked.append(item)  # submit() let it in on counts that were a step old; it waits here instead
            except UserError as error:
                outputs.append(
                    RequestOutput(id=item.id, finish_reason="error", error=error.message, num_prompt_tokens=len(item.prompt_ids))
                )
        self._inbox.extendleft(reversed(blocked))
        self._waiting = engine.waiting
        return outputs

    def _on_loading(self, detail: str) -> None:
        self._post(self._set_loading, detail)

    def _post(self, call: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None, "start() comes first"
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call, *args)

    def _set_loading(self, detail: str) -> None:
        if self._state.phase in ("loading", "compiling"):
            self._state = EngineState("compiling" if detail.startswith("compiling") else "loading", detail)

    def _become_ready(self, served: ServedModel) -> None:
        self._served = served
        self._admission = Admission(served, seed=self.config.model.seed)
        if self._state.phase in ("loading", "compiling"):
            self._state = EngineState("ready")

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.id)
            if stream is not None:
                if output.finish_reason is not None:
                    del self._streams[output.id]
                stream.put(output)

    def _fail(self, detail: str, outputs: list[RequestOutput]) -> None:
        self._state = EngineState("failed", detail)
        self._deliver(outputs)
        for stream in list(self._streams.values()):
            self._deliver([RequestOutput(id=stream.id, finish_reason="error", error="the engine failed; it is safe to try again")])
        if self._on_failure is not None:
            self._on_failure(detail)
