"""The engine loop, one step in flight.

1. schedule: which tokens of which requests come next.
2. dispatch: send them to the device, which is still busy with the step before, and with them what constrained requests may sample.
3. collect the step before: its tokens, its text, who is finished.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from jaxserve.engine.bounds import goes_in_circles
from jaxserve.engine.masks import Masks, certain_logprobs
from jaxserve.metrics import Metrics
from jaxserve.request import Request, RequestOutput, TokenLogprobs
from jaxserve.runner.runner import Pending, Runner, StepResult
from jaxserve.runner.sampling import INVALID_TOKEN
from jaxserve.scheduler.schedule import Schedule
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.text.detokenize import Detokenizer
from jaxserve.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

STEP_ERROR = "the step that computed this request failed on the server; it is safe to try again"
NOT_FINITE = "the model's output for this request is not a finite number"
REPETITION = "repetition_detected"
NO_TOKEN_LEFT = "no token is left that the request allows"


class FatalEngineError(RuntimeError):
    """The engine cannot go on: two steps in a row failed, or the device has lost the cache; `outputs` end every request."""

    def __init__(self, message: str, outputs: list[RequestOutput]) -> None:
        super().__init__(message)
        self.outputs = outputs


@dataclasses.dataclass(slots=True, eq=False)
class _Live:
    """What the engine keeps of a request beside the scheduler's record."""

    request: Request
    detokenizer: Detokenizer
    prompt_logprobs: list[TokenLogprobs | None] | None
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    told_prompt_logprobs: bool = False


class Engine:
    """Continuous batching over one runner; not thread-safe.

    Args:
      eos_ids: end-of-sequence tokens.
      overlap: dispatch a step before collecting the one before it.
      clock: monotonic seconds.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        metrics: Metrics,
        *,
        eos_ids: frozenset[int],
        overlap: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner, self._scheduler, self._tokenizer, self._metrics = runner, scheduler, tokenizer, metrics
        self._overlap, self._clock = overlap, clock
        self._eos_ids = eos_ids
        self._end_id = min(tokenizer.eos_ids & eos_ids or eos_ids, default=None)  # what the tokenizer calls the end, where models have many
        self._masks = Masks(eos_ids)
        self._live: dict[str, _Live] = {}
        self._pending: Pending | None = None
        self._failures = 0
        self._device_idle_since_s: float | None = None
        self._counted = (0, 0, 0)
        metrics.pages_total.set(scheduler.num_pages)

    @property
    def has_work(self) -> bool:
        """Whether step() would do anything."""
        return self._pending is not None or self._scheduler.has_work

    @property
    def num_unfinished(self) -> int:
        """Requests that will still give an output."""
        return len(self._live)

    @property
    def waiting(self) -> tuple[int, int]:
        """Requests and prompt tokens that wait for their first step."""
        return self._scheduler.num_waiting, self._scheduler.num_waiting_tokens

    @property
    def num_pages(self) -> int:
        """Pages of the cache."""
        return self._scheduler.num_pages

    @property
    def gauges(self) -> tuple[int, int, float]:
        """Requests running and waiting, and the share of the cache in use."""
        return self._scheduler.num_running, self._scheduler.num_waiting, self._scheduler.usage

    def add(self, request: Request) -> None:
        """Take a request in; its outputs come from step().

        Raises: QueueFullError, UserError.
        """
        self._scheduler.add(request)
        params = request.params
        self._live[request.id] = _Live(
            request, Detokenizer(self._tokenizer, request.prompt_ids, params), None if params.prompt_logprobs is None else [None]
        )
        self._masks.add(request)
        self._metrics.request_prompt.observe(len(request.prompt_ids))
        self._metrics.request_max_tokens.observe(params.max_tokens or 0)

    def abort(self, request_id: str) -> None:
        """Forget a request at once, wherever it is; unknown ids are ignored."""
        live = self._live.pop(request_id, None)
        if live is not None:
            self._scheduler.finish(live.request, "abort")
            self._masks.drop(request_id)
            self._metrics.finished("abort")
            self._update_gauges()

    def end(self, request_id: str) -> RequestOutput | None:
        """End a request with what it has, for its reader to get; None if it is not known."""
        live = self._live.get(request_id)
        if live is None:
            return None
        self._scheduler.finish(live.request, "abort")
        text = live.detokenizer.push((), final=True).text
        self._forget(live, self._clock())
        self._update_gauges()
        return RequestOutput(
            id=request_id, text=text, finish_reason="abort", num_prompt_tokens=len(live.request.prompt_ids),
            num_cached_tokens=max(live.request.num_cached, 0), num_output_tokens=len(live.request.output_ids),
        )  # fmt: skip

    def end_all(self) -> list[RequestOutput]:
        """End every request with what it has."""
        return [output for request_id in list(self._live) if (output := self.end(request_id)) is not None]

    def settle(self) -> list[RequestOutput]:
        """Collect the step that is under way, and begin none."""
        pending, self._pending = self._pending, None
        outputs = [] if pending is None else self._collect(pending)
        self._update_gauges()
        return outputs

    def reset_prefix_cache(self, *, preempt: bool) -> bool:
        """Forget all cached prefixes; False while requests run, unless they may be preempted, after which they begin again."""
        return self._scheduler.reset_prefix_cache(preempt=preempt)

    def step(self, *, may_wait: bool = True) -> list[RequestOutput]:
        """Dispatch the next step, if there is any, and collect the one before.

        Args:
          may_wait: with nothing to dispatch, wait a little for masks; not if other engines share the thread.
        Raises: FatalEngineError, with which every request has ended.
        """
        before = self._pending
        self._pending = None
        outputs = self._settle_masks(idle=False)
        schedule = self._scheduler.schedule()
        if schedule.rows:
            try:
                self._pending = self._dispatch(schedule)
            except Exception as error:
                outputs += self._fail(schedule, error)
        elif before is None and may_wait:
            outputs += self._settle_masks(idle=True)
        if before is not None:
            outputs += self._collect(before)
        if not self._overlap and self._pending is not None:
            outputs += self._collect(self._pending)
            self._pending = None
        self._update_gauges()
        return outputs

    def fail_all(self, message: str) -> list[RequestOutput]:
        """End every request with an error; the engine is not to be used afterwards."""
        outputs = [self._error(live, message) for live in list(self._live.values())]
        self._pending = None
        return outputs

    def _settle_masks(self, *, idle: bool) -> list[RequestOutput]:
        """Let constrained requests go on; end those whose constraint has become too complex."""
        outputs: list[RequestOutput] = []
        for request, problem in self._masks.settle(idle=idle):
            spec = request.params.structured_outputs
            fault = "allowed_token_ids" if spec is None else spec.source
            outputs.append(self._error(self._live[request.id], problem, fault=fault))
        return outputs

    def _dispatch(self, schedule: Schedule) -> Pending:
        now = self._clock()
        for row in schedule.rows:
            live = self._live[row.request.id]
            if live.scheduled_s is None:
                live.scheduled_s = now
                self._metrics.queue_s.observe(now - row.request.arrival_s)
        if self._device_idle_since_s is not None:
            self._metrics.host_gap_s.observe(now - self._device_idle_since_s)
            self._device_idle_since_s = None
        slots, masks = self._masks.of(schedule.rows)
        if slots:
            self._runner.set_masks(slots, masks)
        pending = self._runner.dispatch(schedule)
        self._metrics.step_tokens.observe(schedule.num_tokens)
        self._metrics.step_tokens_real.inc(schedule.num_tokens)
        self._metrics.step_tokens_padded.inc(pending.shape.tokens - schedule.num_tokens)
        return pending

    def _collect(self, pending: Pending) -> list[RequestOutput]:
        try:
            result = self._runner.collect(pending)
        except Exception as error:
            return self._fail(pending.schedule, error)
        self._failures = 0
        now = self._clock()
        self._metrics.step_seconds(pending.shape.name, now - pending.started_s)
        if self._pending is None and self._scheduler.has_work:
            self._device_idle_since_s = now
        outputs = self._take_back_invalid(pending, result)
        self._keep_prompt_logprobs(pending, result)
        logprobs = {row.request.id: value for row, value in zip(pending.schedule.rows, result.logprobs, strict=True) if value is not None}
        vectors = {} if result.pooled is None else {
            row.request.id: vector for row, vector in zip(pending.schedule.rows, result.pooled, strict=False)
        }  # fmt: skip
        advanced = self._scheduler.update(pending.schedule, result.tokens)
        intervals: dict[float, int] = {}
        for row, ids in advanced:
            live = self._live[row.request.id]
            self._time_tokens(live, now, intervals)
            vector = vectors.get(row.request.id)
            advance = self._advance(live, ids, logprobs.get(row.request.id), now) if vector is None else self._pooled(live, vector, now)
            outputs.append(advance)
        self._masks.advance(row.request for row, _ in advanced)
        if result.pooled is None:
            self._metrics.generation_tokens.inc(sum(len(output.token_ids) for output in outputs))
        for interval, count in intervals.items():
            self._metrics.inter_token_s.observe(interval, count)
        return outputs

    def _take_back_invalid(self, pending: Pending, result: StepResult) -> list[RequestOutput]:
        """End the requests whose logits were not finite, and count the prompt tokens of the step."""
        outputs: list[RequestOutput] = []
        prompt_tokens = 0
        for i, row in enumerate(pending.schedule.rows):
            prompt_len = len(row.request.prompt_ids)
            if row.start < prompt_len:
                prompt_tokens += min(row.start + row.count, prompt_len) - row.start
            ids = result.tokens[i]
            if ids and ids[0] < 0:
                result.tokens[i] = ()
                live = self._live.get(row.request.id)
                if live is not None:
                    outputs.append(self._error(live, NOT_FINITE) if ids[0] == INVALID_TOKEN else self._no_token_left(live))
        if prompt_tokens:
            self._metrics.prompt_tokens.inc(prompt_tokens)
        return outputs

    def _advance(self, live: _Live, ids: tuple[int, ...], logprobs: TokenLogprobs | None, now: float) -> RequestOutput:
        request = live.request
        stopped_by_token = request.finish_reason == "stop"
        entries = () if logprobs is None else (logprobs,)
        if request.constraint is not None and not stopped_by_token and self._masks.consume(request, ids):
            stopped_by_token = ids[-1] in self._eos_ids
            if stopped_by_token or self._end_id is None:
                self._scheduler.finish(request, "stop")
            elif self._scheduler.complete(request, self._end_id):
                # Nothing else could follow: a step to sample it would tell nothing.
                ids, stopped_by_token = (*ids, self._end_id), True
                entries = (*entries, certain_logprobs(self._end_id, request.params)) if entries else ()
        circles = request.params.repetition_detection
        if circles is not None and len(request.output_ids) >= request.params.min_tokens and goes_in_circles(request.output_ids, circles):
            self._scheduler.finish(request, "repetition", REPETITION)
        shown = ids[:-1] if stopped_by_token and not request.params.include_stop_str_in_output else ids
        piece = live.detokenizer.push(shown, final=request.finish_reason is not None)
        if piece.stop is not None and not stopped_by_token:
            self._scheduler.finish(request, "stop", piece.stop)
        prompt_logprobs = None
        if live.prompt_logprobs is not None and not live.told_prompt_logprobs:
            prompt_logprobs, live.told_prompt_logprobs = tuple(live.prompt_logprobs), True
        if request.finish_reason is not None:
            self._forget(live, now)
        return RequestOutput(
            id=request.id, text=piece.text, token_ids=ids,
            logprobs=entries or None, prompt_logprobs=prompt_logprobs,
            finish_reason=request.finish_reason, stop_reason=request.stop_reason, num_prompt_tokens=len(request.prompt_ids),
            num_cached_tokens=max(request.num_cached, 0), num_output_tokens=len(request.output_ids),
        )  # fmt: skip

    def _pooled(self, live: _Live, vector: NDArray[np.float32], now: float) -> RequestOutput:
        """The only output of a request for a vector; the token that stands for it in the accounts is not shown."""
        request = live.request
        self._forget(live, now)
        return RequestOutput(
            id=request.id, finish_reason=request.finish_reason, num_prompt_tokens=len(request.prompt_ids),
            num_cached_tokens=max(request.num_cached, 0), pooled=vector.copy(),
        )  # fmt: skip

    def _keep_prompt_logprobs(self, pending: Pending, result: StepResult) -> None:
        if pending.shape.kind != "score":
            return
        for row, found in zip(pending.schedule.rows, result.prompt_logprobs, strict=True):
            live = self._live.get(row.request.id)
            if found and live is not None and live.prompt_logprobs is not None:
                del live.prompt_logprobs[row.start + 1 :]  # a preempted prompt is scored again
                live.prompt_logprobs.extend(found)

    def _time_tokens(self, live: _Live, now: float, intervals: dict[float, int]) -> None:
        """Record the time to a first token; count the interval before a later one, which most rows of a step share."""
        if live.last_token_s is not None:
            interval = now - live.last_token_s
            intervals[interval] = intervals.get(interval, 0) + 1
        else:
            live.first_token_s = now
            self._metrics.ttft_s.observe(now - live.request.arrival_s)
            self._metrics.prefill_s.observe(now - (live.scheduled_s or now))
            self._metrics.prompt_tokens_cached.inc(max(live.request.num_cached, 0))
        live.last_token_s = now

    def _forget(self, live: _Live, now: float) -> None:
        request = live.request
        del self._live[request.id]
        self._masks.drop(request.id)
        count = len(request.output_ids)
        self._metrics.finished(request.finish_reason or "abort")
        self._metrics.e2e_s.observe(now - request.arrival_s)
        self._metrics.request_generation.observe(count)
        if live.scheduled_s is not None and live.first_token_s is not None:
            self._metrics.inference_s.observe(now - live.scheduled_s)
            self._metrics.decode_s.observe(now - live.first_token_s)
            if count > 1:
                self._metrics.tpot_s.observe((now - live.first_token_s) / (count - 1))

    def _error(self, live: _Live, message: str, *, fault: str | None = None) -> RequestOutput:
        self._live.pop(live.request.id, None)
        self._masks.drop(live.request.id)
        self._scheduler.finish(live.request, "error")
        self._metrics.finished("error")
        return RequestOutput(
            id=live.request.id, finish_reason="error", error=message, fault=fault, num_prompt_tokens=len(live.request.prompt_ids),
            num_cached_tokens=max(live.request.num_cached, 0), num_output_tokens=len(live.request.output_ids),
        )  # fmt: skip

    def _no_token_left(self, live: _Live) -> RequestOutput:
        params = live.request.params
        fault = "bad_words" if params.bad_words else "allowed_token_ids" if params.allowed_token_ids is not None else None
        return self._error(live, NO_TOKEN_LEFT, fault=fault)

    def _fail(self, schedule: Schedule, error: Exception) -> list[RequestOutput]:
        """End the requests of a step that raised; the others go on."""
        log.exception("a step failed: rows=%d tokens=%d", len(schedule.rows), schedule.num_tokens, exc_info=error)
        self._metrics.failed_steps.inc()
        self._failures += 1
        outputs = []
        for request in self._scheduler.fail(schedule):
            live = self._live.get(request.id)
            if live is not None:
                outputs.append(self._error(live, STEP_ERROR))
        if self._failures > 1 or not self._runner.usable:
            reason = "two steps in a row failed" if self._failures > 1 else "the device lost the cache"
            raise FatalEngineError(reason, outputs + self.fail_all(STEP_ERROR)) from error
        return outputs

    def _update_gauges(self) -> None:
        scheduler, metrics = self._scheduler, self._metrics
        for gauge, value in zip((metrics.running, metrics.waiting, metrics.cache_usage), self.gauges, strict=True):
            gauge.set(value)
        counts = (scheduler.num_preemptions, scheduler.prefix_queries, scheduler.prefix_hits)
        if counts != self._counted:
            for counter, now, before in zip(
                (metrics.preemptions, metrics.prefix_queries, metrics.prefix_hits), counts, self._counted, strict=True
            ):
                counter.inc(now - before)
            self._counted = counts
