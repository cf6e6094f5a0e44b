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
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from jaxserve.config import EngineConfig
from jaxserve.engine.admit import Admission
from jaxserve.engine.engine import Engine, FatalEngineError
from jaxserve.engine.load import ServedModel, load_engine
from jaxserve.engine.orders import Foreman, Order, PauseMode
from jaxserve.engine.profile import Profiler
from jaxserve.engine.replicas import Replicas
from jaxserve.engine.stream import OutputStream
from jaxserve.errors import ConfigError, EngineUnavailableError, QueueFullError, UserError
from jaxserve.metrics import Metrics
from jaxserve.request import Constraint, Request, RequestOutput, SamplingParams

log = logging.getLogger(__name__)

Phase = Literal["loading", "compiling", "ready", "draining", "failed"]
Loader = Callable[[EngineConfig, Metrics, Callable[[str], None]], tuple[Engine | Replicas, ServedModel]]


@dataclasses.dataclass(frozen=True, slots=True)
class EngineState:
    """What the engine is doing; detail is for people, such as "compiling 7/12"."""

    phase: Phase
    detail: str = ""


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
        self._loaded = asyncio.Event()
        self._admission: Admission | None = None
        self._streams: dict[str, OutputStream] = {}
        self._inbox: collections.deque[Request | str | Order] = collections.deque()
        self._orders: dict[int, asyncio.Future[bool]] = {}
        self._num_orders = 0
        self._foreman = Foreman(lambda number, done: self._post(self._answer, number, done))
        self._profiler = Profiler(config.profile_path)
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
    def is_paused(self) -> bool:
        """Whether requests wait for resume()."""
        return self._foreman.is_paused

    @property
    def num_unfinished(self) -> int:
        """Requests whose last output has not been handed out."""
        return len(self._streams)

    def start(self) -> None:
        """Start loading; to be called on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def wait_ready(self) -> ServedModel:
        """The model, once requests would be answered. Raises: EngineUnavailableError saying why that will never be."""
        await self._loaded.wait()
        if self._state.phase != "ready":
            raise EngineUnavailableError(self._state.detail or self._state.phase)
        return self.served

    def submit(
        self, *, prompt_ids: Sequence[int], params: SamplingParams, priority: int = 0, cache_salt: str | None = None,
        constraint: Constraint | None = None,
    ) -> OutputStream:  # fmt: skip
        """Queue a request; to be called on the event loop. params.n is the front end's business.

        Args:
          constraint: params.structured_outputs as served.grammars compiles it.
        Raises: UserError, QueueFullError, EngineUnavailableError; then nothing has been queued.
        """
        make = self._ready_admission().make_request
        return self._queue(make(prompt_ids, params, priority=priority, cache_salt=cache_salt, constraint=constraint))

    def submit_pooling(
        self, prompt_ids: Sequence[int], *, second_at: int | None = None, priority: int = 0, cache_salt: str | None = None
    ) -> OutputStream:
        """Queue a request for the vector of a text; see Admission.make_pool_request, and submit for what it raises."""
        make = self._ready_admission().make_pool_request
        return self._queue(make(prompt_ids, second_at=second_at, priority=priority, cache_salt=cache_salt))

    def _ready_admission(self) -> Admission:
        if self._state.phase != "ready" or self._admission is None:
            raise EngineUnavailableError(f"no new requests: {self._state.detail or self._state.phase}")
        return self._admission

    def _queue(self, request: Request) -> OutputStream:
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
            self._deliver([RequestOutput(id=request_id, finish_reason="abort", error="it is shutting down")])
        self._wake.set()

    def cut_short(self, names: Collection[str] | None) -> int:
        """End requests with what they have, all or those of these ids or names; their number. Readers get the reason "abort"."""
        chosen = [
            stream.id for stream in self._streams.values() if names is None or stream.id in names or (stream.name and stream.name in names)
        ]
        self._inbox.append(Order(kind="end", request_ids=tuple(chosen)))
        self._wake.set()
        return len(chosen)

    async def pause(self, mode: PauseMode, *, clear_cache: bool) -> bool:
        """Stop stepping; returns when the device is idle. Requests may come meanwhile, and wait. False if another order came first."""
        return await self._tell(Order(kind="pause", mode=mode, clear_cache=clear_cache))

    async def resume(self) -> None:
        """Go on; harmless when not paused."""
        await self._tell(Order(kind="resume"))

    async def reset_prefix_cache(self, *, preempt: bool) -> bool:
        """Forget all cached prefixes; False while requests run, unless they may be preempted, after which they begin again."""
        return await self._tell(Order(kind="reset_prefix_cache", preempt=preempt))

    async def start_profile(self) -> None:
        """Begin a trace. Raises: UserError if one is under way."""
        await asyncio.to_thread(self._profiler.start)

    async def stop_profile(self) -> None:
        """End the trace and write it. Raises: UserError if none is under way."""
        await asyncio.to_thread(self._profiler.stop)

    def stop(self, *, timeout_s: float) -> bool:
        """End the thread after its current step; whether it has ended in time. Loading cannot be interrupted and is not waited for."""
        self._stopping = True
        self._wake.set()
        if self._served is not None:
            self._thread.join(timeout_s)
            if self._served.group is not None:
                self._served.group.close()
        return not self._thread.is_alive()

    def _check_queue(self, prompt_len: int) -> None:
        limits = self.config.schedule
        waiting, waiting_tokens = self._waiting
        coming = [len(item.prompt_ids) for item in tuple(self._inbox) if isinstance(item, Request)]
        too_long = waiting + len(coming) > 0 and waiting_tokens + sum(coming) + prompt_len > limits.max_queue_tokens
        if waiting + len(coming) >= limits.max_queue or too_long:
            raise QueueFullError(1.0)

    def _abort(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None:
            self._inbox.append(request_id)
            self._wake.set()

    async def _tell(self, order: Order) -> bool:
        if self._state.phase == "failed":
            raise EngineUnavailableError("the engine failed")
        self._num_orders += 1
        done = self._orders[self._num_orders] = asyncio.get_running_loop().create_future()
        self._inbox.append(dataclasses.replace(order, number=self._num_orders))
        self._wake.set()
        return await done

    def _answer(self, number: int, result: bool) -> None:
        done = self._orders.pop(number, None)
        if done is not None and not done.done():
            done.set_result(result)

    def _run(self) -> None:
        try:
            engine, served = self._load(self.config, self.metrics, self._on_loading)
        except Exception as error:
            log.error("loading failed: %s", error, exc_info=not isinstance(error, ConfigError))
            self._post(self._fail, f"loading failed: {error}", [])
            return
        if served.group is not None:
            served.group.on_loss(lambda reason: self._post(self._fail, f"the engine failed: {reason}", []))
        self._post(self._become_ready, served)
        try:
            self._serve(engine)
        except FatalEngineError as error:
            log.critical("the engine stops: %s", error)
            self._post(self._fail, f"the engine failed: {error}", error.outputs)
        except Exception as error:
            log.critical("the engine stops", exc_info=error)
            self._post(self._fail, "the engine failed", engine.fail_all("the engine failed; it is safe to try again"))

    def _serve(self, engine: Engine | Replicas) -> None:
        while not self._stopping:
            outputs = self._drain_inbox(engine)
            if engine.has_work and not self._foreman.is_frozen:
                self._busy_since_s = time.monotonic()
                outputs += engine.step()
            else:
                self._busy_since_s = None
            self._waiting = engine.waiting
            if outputs:
                self._post(self._deliver, outputs)
            if engine.has_work and not self._foreman.is_frozen:
                continue
            self._foreman.settle(engine)
            if self._foreman.is_paused or not self._inbox:
                self._busy_since_s = None
                self._wake.wait(timeout=1.0)
                self._wake.clear()

    def _drain_inbox(self, engine: Engine | Replicas) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        blocked: list[Request] = []
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, str):
                engine.abort(item)
                continue
            if isinstance(item, Order):
                outputs += self._foreman.carry_out(engine, item, blocked)
                continue
            if item.id not in self._streams:
                continue  # given up before it came in
            if self._foreman.is_paused:
                blocked.append(item)
                continue
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
        self._loaded.set()

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.id)
            if stream is not None:
                if output.finish_reason is not None:
                    del self._streams[output.id]
                stream.put(output)

    def _fail(self, detail: str, outputs: list[RequestOutput]) -> None:
        self._state = EngineState("failed", detail)
        self._loaded.set()
        self._deliver(outputs)
        for stream in list(self._streams.values()):
            self._deliver([RequestOutput(id=stream.id, finish_reason="error", error="the engine failed; it is safe to try again")])
        for number in list(self._orders):
            self._answer(number, False)
        if self._on_failure is not None:
            self._on_failure(detail)
