"""Prompts of models that see a text as a whole: each in one step, in order, and as many as fit."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.request import Request, SamplingParams
from jaxserve.scheduler.scheduler import Scheduler
from tests.scheduler.invariants import check_scheduler

BUDGET, PAGE_SIZE = 20, 4


def make(*, max_rows: int = 4, num_pages: int = 30) -> Scheduler:
    return Scheduler(
        num_pages=num_pages, page_size=PAGE_SIZE, max_rows=max_rows, max_step_tokens=BUDGET, max_mixed_tokens=5, max_len=BUDGET + 1,
        prefix_cache=False, max_queue=1000, max_queue_tokens=10**6, secret=b"", whole_prompts=True,
    )  # fmt: skip


def request(name: int, length: int) -> Request:
    return Request(id=str(name), prompt_ids=[1] * length, params=SamplingParams(max_tokens=1), stop_ids=frozenset((0,)))


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, BUDGET), min_size=1, max_size=25), max_rows=st.integers(1, 6), num_pages=st.integers(6, 30),
    overlap=st.booleans(),
)  # fmt: skip
def test_every_prompt_is_one_row_of_one_step(lengths: list[int], max_rows: int, num_pages: int, overlap: bool) -> None:
    scheduler = make(max_rows=max_rows, num_pages=num_pages)
    requests = [request(i, length) for i, length in enumerate(lengths)]
    for each in requests:
        scheduler.add(each)
    seen: list[str] = []
    pending = None
    for _ in range(4 * len(lengths) + 4):
        schedule = scheduler.schedule()
        check_scheduler(scheduler)
        assert schedule.num_tokens <= BUDGET
        assert not schedule.preempted
        for row in schedule.rows:
            assert (row.start, row.count, row.samples) == (0, len(row.request.prompt_ids), True)
            seen.append(row.request.id)
        if pending is not None:
            scheduler.update(pending, [(0,)] * len(pending.rows))
        pending = schedule if schedule.rows else None
        if pending is not None and not overlap:
            scheduler.update(pending, [(0,)] * len(pending.rows))
            pending = None
    assert seen == [each.id for each in requests]
    assert {each.finish_reason for each in requests} == {"stop"}
    assert not scheduler.has_work


def test_long_prompt_waits_for_a_step_of_its_own() -> None:
    scheduler = make()
    for i, length in enumerate((12, 12, 3)):
        scheduler.add(request(i, length))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [row.request.id for row in first.rows] == ["0"]  # nobody overtakes the second
    assert [row.request.id for row in second.rows] == ["1", "2"]
