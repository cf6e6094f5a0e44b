"""A scheduler with a device of plain dictionaries, which proves that every answer is the one that the request would get alone.

1. The device's cache maps (page, offset) to (token, position); a dispatched row writes the tokens it computes, as keys and values would be.
2. A row that samples reads the whole sequence back through its page table, and the token it samples is a hash of what it read.
3. So a page lost, shared wrongly, reused too early or found under the wrong prefix changes the sequence, which is compared with the truth.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxserve.request import FinishReason, Request, SamplingParams
from jaxserve.scheduler.schedule import Row, Schedule
from jaxserve.scheduler.scheduler import Scheduler
from tests.scheduler.invariants import check_scheduler

VOCAB = 11
POISON = -1


def make_scheduler(**sizes: Any) -> Scheduler:
    """A small scheduler, all of whose sizes differ."""
    defaults: dict[str, Any] = {
        "num_pages": 40, "page_size": 4, "max_rows": 6, "max_step_tokens": 16, "max_mixed_tokens": 9, "max_len": 100, "prefix_cache": True,
        "max_queue": 50, "max_queue_tokens": 2000, "secret": b"secret",
    }  # fmt: skip
    return Scheduler(**defaults | sizes)


def make_request(
    id: str, prompt_ids: list[int], *, priority: int = 0, cache_salt: str | None = None, eos: frozenset[int] = frozenset(), **params: Any
) -> Request:
    """A request whose stop ids are its stop_token_ids and `eos`."""
    params.setdefault("max_tokens", 5)
    sampling = SamplingParams(**params)
    stop_ids = frozenset(sampling.stop_token_ids) | eos
    return Request(id=id, prompt_ids=prompt_ids, params=sampling, priority=priority, cache_salt=cache_salt, stop_ids=stop_ids)


def next_token(sequence: list[int]) -> int:
    """What the model samples after a sequence."""
    return hash(tuple(sequence)) % VOCAB


def shown(schedule: Schedule) -> list[tuple[str, int, int, bool]]:
    """The rows of a step, to compare."""
    return [(row.request.id, row.start, row.count, row.samples) for row in schedule.rows]


def finish_step(scheduler: Scheduler, schedule: Schedule, token: int = 1) -> list[tuple[str, tuple[int, ...]]]:
    """Collect a step in which every sampling row samples `token`; which requests gained what."""
    gained = scheduler.update(schedule, [(token,) if row.samples else () for row in schedule.rows])
    check_scheduler(scheduler)
    return [(row.request.id, ids) for row, ids in gained]


def run_step(scheduler: Scheduler, token: int = 1) -> list[tuple[str, int, int, bool]]:
    """Schedule a step and collect it; its rows."""
    schedule = scheduler.schedule()
    check_scheduler(scheduler)
    finish_step(scheduler, schedule, token)
    return shown(schedule)


def run_all(scheduler: Scheduler, token: Callable[[], int] = lambda: 1) -> None:
    """Run without overlap until nothing is left."""
    while scheduler.has_work:
        run_step(scheduler, token())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """All that a request gives when nobody else is there."""

    output_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | str | None


def answer_alone(request: Request, *, max_len: int, capacity: int) -> Answer:
    """The truth; `capacity` is the number of tokens that the pool holds."""
    params, output = request.params, list[int]()
    while True:
        token = next_token(request.prompt_ids + output)
        output.append(token)
        total = len(request.prompt_ids) + len(output)
        if len(output) >= params.min_tokens and token in request.stop_ids:
            return Answer(output_ids=output, finish_reason="stop", stop_reason=token if token in params.stop_token_ids else None)
        if len(output) == params.max_tokens or total == max_len or total - 1 == capacity:
            return Answer(output_ids=output, finish_reason="length", stop_reason=None)


@dataclasses.dataclass(slots=True, kw_only=True)
class _Step:
    schedule: Schedule
    tokens: list[tuple[int, ...]]
    fails: bool


class Simulation:
    """Runs a scheduler and checks its invariants after every call."""

    def __init__(self, scheduler: Scheduler, *, page_size: int, max_len: int) -> None:
        self.scheduler = scheduler
        self.requests: list[Request] = []
        self.in_flight: list[_Step] = []
        self._page_size, self._max_len = page_size, max_len
        self._cache: dict[tuple[int, int], tuple[int, int]] = {}
        self._last_token: dict[int, int] = {}
        self._truth: dict[str, Answer] = {}
        self._doomed: set[str] = set()

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.scheduler.add(request)
        self.requests.append(request)
        capacity = (self.scheduler.num_pages - 1) * self._page_size
        self._truth[request.id] = answer_alone(request, max_len=self._max_len, capacity=capacity)
        check_scheduler(self.scheduler)

    def dispatch(self, *, fails: bool = False) -> Schedule:
        """Schedule a step and run it on the device; a failing one leaves poison wherever it writes."""
        schedule = self.scheduler.schedule()
        check_scheduler(self.scheduler)
        if schedule.rows:
            assert schedule.num_tokens == sum(row.count for row in schedule.rows)
            assert len({row.request.id for row in schedule.rows}) == len(schedule.rows)
            self._doomed.update(row.request.id for row in schedule.rows if fails)
            self.in_flight.append(_Step(schedule=schedule, tokens=self._run(schedule), fails=fails))
        return schedule

    def collect(self) -> None:
        """Hand the results of the oldest step in flight to the scheduler."""
        step = self.in_flight.pop(0)
        alive = [row.request for row in step.schedule.rows if row.request.status != "finished"]
        before = {request.id: list(request.output_ids) for request in alive}
        if step.fails:
            assert self.scheduler.fail(step.schedule) == alive
            assert all(request.finish_reason == "error" for request in alive)
        else:
            for row, ids in self.scheduler.update(step.schedule, step.tokens):
                assert row.request.output_ids == before[row.request.id] + list(ids)
        check_scheduler(self.scheduler)

    def step(self, *, overlap: bool) -> Schedule:
        """What the engine's step does."""
        pending = len(self.in_flight)
        schedule = self.dispatch()
        while len(self.in_flight) > (1 if overlap and pending + 1 == len(self.in_flight) else 0):
            self.collect()
        return schedule

    def drain(self, *, overlap: bool = True) -> None:
        """Run until nothing is left, and check that all is well."""
        for _ in range(10_000):
            if not self.scheduler.has_work and not self.in_flight:
                return self.check_end()
            self.step(overlap=overlap)
        raise AssertionError("the scheduler makes no progress")

    def check_end(self) -> None:
        """Idle holds nothing, and each answer is the one that the request gets alone."""
        scheduler = self.scheduler
        assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_waiting_tokens, scheduler.usage) == (0, 0, 0, 0)
        assert scheduler.num_free_pages == scheduler.num_pages - 1
        for request in self.requests:
            truth = self._truth[request.id]
            assert (request.status, request.pages, request.slot, request.num_in_flight) == ("finished", [], -1, 0)
            if request.finish_reason in ("abort", "error"):
                assert request.output_ids == truth.output_ids[: len(request.output_ids)]
            else:
                found = Answer(
                    output_ids=request.output_ids, finish_reason=request.finish_reason or "error", stop_reason=request.stop_reason
                )
                assert found == truth

    def _run(self, schedule: Schedule) -> list[tuple[int, ...]]:
        written: set[tuple[int, int]] = set()
        for row in schedule.rows:
            request = row.request
            for position in range(row.start, row.start + row.count):
                place = self._place(row, position)
                assert place[0] > 0, f"{request.id} writes to the null page"
                assert place not in written, f"{place=} has two writers"
                written.add(place)
                token = POISON if request.id in self._doomed else self._token_at(row, position)
                self._cache[place] = (token, position)
        return [self._sample(row) if row.samples else () for row in schedule.rows]

    def _sample(self, row: Row) -> tuple[int, ...]:
        request = row.request
        sequence: list[int] = []
        for position in range(row.start + row.count):
            token, written_position = self._cache[self._place(row, position)]
            sequence.append(token)
            assert written_position == position or request.id in self._doomed
        if request.id not in self._doomed:
            truth = request.prompt_ids + self._truth[request.id].output_ids
            # What a step computes after the end is thrown away, so it may be anything.
            assert sequence[: len(truth)] == truth[: len(sequence)], f"{request.id} reads {sequence}, not {truth}"
        self._last_token[request.slot] = next_token(sequence)
        return (self._last_token[request.slot],)

    def _place(self, row: Row, position: int) -> tuple[int, int]:
        return row.request.pages[position // self._page_size], position % self._page_size

    def _token_at(self, row: Row, position: int) -> int:
        request = row.request
        if position >= request.num_known:
            assert row.count == 1, "a token still on the device is a row of its own"
            assert request.num_in_flight > 1, "no step in flight samples the token that this row computes"
            return self._last_token[request.slot]
        return (request.prompt_ids + request.output_ids)[position]
