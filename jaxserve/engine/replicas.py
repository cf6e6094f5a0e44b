"""Several engines as one: data parallelism. Each has a copy of the model, a scheduler and a cache of its own, and knows of no other."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.engine.engine import Engine, FatalEngineError
from jaxserve.metrics import Metrics
from jaxserve.request import Request, RequestOutput
from jaxserve.scheduler.route import Router


class Replicas:
    """Engines over copies of one model, with the interface of one of them; not thread-safe.

    Every copy has a step in flight while the host waits for another's; they take their steps in turn.

    Args:
      page_size: tokens of a page of their caches.
    """

    def __init__(self, engines: Sequence[Engine], metrics: Metrics, *, page_size: int) -> None:
        self._engines = tuple(engines)
        self._metrics = metrics
        self._router = Router(num_copies=len(self._engines), page_size=page_size)
        metrics.pages_total.set(sum(engine.num_pages for engine in self._engines))

    @property
    def has_work(self) -> bool:
        """Whether step() would do anything."""
        return any(engine.has_work for engine in self._engines)

    @property
    def num_unfinished(self) -> int:
        """Requests that will still give an output."""
        return sum(engine.num_unfinished for engine in self._engines)

    @property
    def waiting(self) -> tuple[int, int]:
        """Requests and prompt tokens that wait for their first step."""
        counts = [engine.waiting for engine in self._engines]
        return sum(requests for requests, _ in counts), sum(tokens for _, tokens in counts)

    def add(self, request: Request) -> None:
        """Take a request in; see Engine.add."""
        engine = self._engines[self._router.choose(request)]
        try:
            engine.add(request)
        except Exception:
            self._router.forget(request.id)
            raise

    def abort(self, request_id: str) -> None:
        """Forget a request at once, wherever it is; unknown ids are ignored."""
        owner = self._router.owner(request_id)
        if owner is not None:
            self._engines[owner].abort(request_id)
            self._router.forget(request_id)
            self._update_gauges()

    def end(self, request_id: str) -> RequestOutput | None:
        """End a request with what it has, for its reader to get; None if it is not known."""
        owner = self._router.owner(request_id)
        if owner is None:
            return None
        output = self._engines[owner].end(request_id)
        self._router.forget(request_id)
        self._update_gauges()
        return output

    def end_all(self) -> list[RequestOutput]:
        """End every request with what it has."""
        return self._forget_ended([output for engine in self._engines for output in engine.end_all()])

    def settle(self) -> list[RequestOutput]:
        """Collect the steps that are under way, and begin none."""
        return self._forget_ended([output for engine in self._engines for output in engine.settle()])

    def reset_prefix_cache(self, *, preempt: bool) -> bool:
        """Forget all cached prefixes; see Engine.reset_prefix_cache."""
        succeeded = [engine.reset_prefix_cache(preempt=preempt) for engine in self._engines]  # every one of them is asked
        return all(succeeded)

    def step(self) -> list[RequestOutput]:
        """One step of every engine that has work.

        Raises: FatalEngineError, with which every request of every engine has ended.
        """
        outputs: list[RequestOutput] = []
        working = [engine for engine in self._engines if engine.has_work]
        for engine in working:
            try:
                outputs += engine.step(may_wait=len(working) == 1)
            except FatalEngineError as error:
                others = [output for other in self._engines if other is not engine for output in other.fail_all(str(error))]
                raise FatalEngineError(str(error), outputs + error.outputs + others) from error
        return self._forget_ended(outputs)

    def fail_all(self, message: str) -> list[RequestOutput]:
        """End every request with an error; the engines are not to be used afterwards."""
        return [output for engine in self._engines for output in engine.fail_all(message)]

    def _forget_ended(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        for output in outputs:
            if output.finish_reason is not None:
                self._router.forget(output.id)
        self._update_gauges()
        return outputs

    def _update_gauges(self) -> None:
        """What each engine has set for itself, over all of them."""
        gauges = [engine.gauges for engine in self._engines]
        self._metrics.running.set(sum(running for running, _, _ in gauges))
        self._metrics.waiting.set(sum(waiting for _, waiting, _ in gauges))
        self._metrics.cache_usage.set(sum(usage for _, _, usage in gauges) / len(gauges))
