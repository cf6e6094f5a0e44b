"""Tests of what the scheduler promises, of pages and of the prefix cache."""

from __future__ import annotations

import pytest

from jaxserve.request import Request
from tests.scheduler.invariants import check_scheduler
from tests.scheduler.simulation import finish_step, make_request, make_scheduler, run_all, run_step, shown


def test_pages_run_out_and_the_youngest_of_the_worst_priority_gives_way() -> None:
    scheduler = make_scheduler(num_pages=13, prefix_cache=False)
    requests = {
        name: make_request(name, [ord(name)] * 12, priority=priority, max_tokens=9) for name, priority in (("a", 1), ("b", 0), ("c", 1))
    }
    for request in requests.values():
        scheduler.add(request)
    preempted: list[Request] = []
    while not preempted:
        schedule = scheduler.schedule()
        check_scheduler(scheduler)
        preempted += schedule.preempted
        assert not {row.request.id for row in schedule.rows} & {request.id for request in schedule.preempted}
        finish_step(scheduler, schedule)
    assert preempted == [requests["c"]]
    assert (requests["c"].status, requests["c"].num_preemptions, scheduler.num_preemptions) == ("preempted", 1, 1)
    run_all(scheduler)
    assert [len(request.output_ids) for request in requests.values()] == [9, 9, 9]


def test_prompt_chunk_takes_the_pages_of_a_worse_answer_that_this_step_already_continued() -> None:
    scheduler = make_scheduler(num_pages=9, prefix_cache=False, max_mixed_tokens=5)
    worse, better = make_request("worse", [1] * 4, priority=1, max_tokens=20), make_request("better", [2] * 24, max_tokens=3)
    scheduler.add(worse)
    run_step(scheduler)
    scheduler.add(better)
    for start in range(0, 20, 4):
        assert run_step(scheduler) == [("worse", 4 + start // 4, 1, True), ("better", start, 4, False)]
    assert scheduler.num_free_pages == 0
    schedule = scheduler.schedule()
    check_scheduler(scheduler)
    assert (shown(schedule), schedule.preempted, schedule.num_tokens) == ([("better", 20, 4, True)], (worse,), 4)
    assert worse.num_in_flight == 0
    finish_step(scheduler, schedule)
    run_all(scheduler)
    assert [len(worse.output_ids), len(better.output_ids)] == [20, 3]


def test_preempted_prompt_returns_only_when_its_chunk_in_flight_is_collected() -> None:
    scheduler = make_scheduler(num_pages=10, prefix_cache=False, max_mixed_tokens=3)
    answer, prompt = make_request("answer", [1] * 4, max_tokens=30), make_request("prompt", [2] * 28)
    scheduler.add(answer)
    before = scheduler.schedule()
    scheduler.add(prompt)
    schedule = scheduler.schedule()
    while not schedule.preempted:
        finish_step(scheduler, before)
        before, schedule = schedule, scheduler.schedule()
    assert schedule.preempted == (prompt,)
    assert before.rows[-1].request is prompt
    scheduler.finish(answer, "abort")
    assert scheduler.schedule().rows == (), "a chunk of the prompt is in flight"
    finish_step(scheduler, before)
    assert run_step(scheduler) == [("prompt", 0, 16, False)]


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    scheduler = make_scheduler(num_pages=7, prefix_cache=False, max_rows=2)
    for name, priority in (("a", 0), ("b", 2)):
        scheduler.add(make_request(name, [1] * 8, priority=priority, max_tokens=12))
    run_step(scheduler)
    scheduler.add(make_request("c", [1], priority=1))
    schedule = scheduler.schedule()
    while not schedule.preempted:
        finish_step(scheduler, schedule)
        schedule = scheduler.schedule()
    assert [row.request.id for row in schedule.rows] == ["a"]
    finish_step(scheduler, schedule)
    assert [row[0] for row in run_step(scheduler)] == ["a", "c"]


def test_preempted_request_keeps_the_token_in_flight_and_returns_only_when_it_is_collected() -> None:
    scheduler = make_scheduler(num_pages=7, prefix_cache=False, max_len=20)
    a, b = make_request("a", [1] * 8, max_tokens=12), make_request("b", [2] * 8, max_tokens=12)
    scheduler.add(a)
    scheduler.add(b)
    before, schedule = None, scheduler.schedule()
    while not schedule.preempted:
        if before is not None:
            finish_step(scheduler, before)
        before, schedule = schedule, scheduler.schedule()
    assert schedule.preempted == (b,)
    assert (b.num_in_flight, b.pages, b.slot, b.num_computed) == (1, [], -1, 0)
    known = b.num_known
    scheduler.finish(a, "abort")
    assert scheduler.schedule().rows == (), "b has a token in flight"
    assert before is not None
    assert finish_step(scheduler, before, 6) == [("b", (6,))]
    assert (b.num_in_flight, b.num_known) == (0, known + 1)
    finish_step(scheduler, schedule)
    assert run_step(scheduler) == [("b", 0, b.num_known - 1, True)]


def test_preempted_request_is_readmitted_before_a_fresh_one_of_its_priority() -> None:
    scheduler = make_scheduler(num_pages=7, prefix_cache=False)
    for name in "ab":
        scheduler.add(make_request(name, [1] * 8, max_tokens=12))
    while not scheduler.num_preemptions:
        run_step(scheduler)
    fresh = make_request("c", [3])
    fresh.arrival_s = -1.0
    scheduler.add(fresh)
    rows: list[str] = []
    while scheduler.has_work:
        rows += [row[0] for row in run_step(scheduler)]
    assert "c" not in rows[: rows.index("b")]


def test_request_is_not_admitted_when_running_answers_would_soon_need_its_pages() -> None:
    scheduler = make_scheduler(num_pages=21, prefix_cache=False)
    for name in "ab":
        scheduler.add(make_request(name, [1] * 7, max_tokens=3))
    run_step(scheduler)
    assert scheduler.num_free_pages == 16
    scheduler.add(make_request("tight", [2] * 60))
    assert [row[0] for row in run_step(scheduler)] == ["a", "b"]
    assert scheduler.num_free_pages == 16, "15 would be enough for the prompt, but not for the two answers beside it"
    run_step(scheduler)
    assert run_step(scheduler)[0][0] == "tight"


def test_cached_prefix_is_not_computed_again_but_the_last_token_is() -> None:
    scheduler = make_scheduler()
    first, again, longer = (make_request(name, list(range(n)), max_tokens=1) for name, n in (("first", 8), ("again", 8), ("longer", 11)))
    scheduler.add(first)
    run_all(scheduler)
    assert (first.num_cached, scheduler.num_free_pages) == (0, 39)
    scheduler.add(again)
    scheduler.add(longer)
    assert run_step(scheduler) == [("again", 4, 4, True), ("longer", 8, 3, True)]
    assert (again.num_cached, longer.num_cached) == (4, 8)
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (27, 12)


def test_cached_tokens_are_counted_at_the_first_admission_only() -> None:
    scheduler = make_scheduler(num_pages=7)
    requests = [make_request(name, [ord(name)] * 8, max_tokens=12) for name in "ab"]
    for request in requests:
        scheduler.add(request)
    run_all(scheduler)
    assert requests[1].num_preemptions > 0
    assert ([request.num_cached for request in requests], scheduler.prefix_queries, scheduler.prefix_hits) == ([0, 0], 16, 0)


def test_pages_of_an_answer_are_found_by_the_next_turn_of_a_conversation() -> None:
    scheduler = make_scheduler()
    first = make_request("first", [3, 4, 5], max_tokens=7)
    scheduler.add(first)
    run_all(scheduler)
    second = make_request("second", [*first.prompt_ids, *first.output_ids, 9, 9])
    scheduler.add(second)
    assert run_step(scheduler) == [("second", 8, 4, True)]


def test_running_request_shares_its_collected_pages_but_not_those_in_flight() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1] * 9))
    schedule = scheduler.schedule()
    in_flight = make_request("b", [1] * 9)
    scheduler.add(in_flight)
    second = scheduler.schedule()
    assert in_flight.num_cached == 0
    finish_step(scheduler, schedule)
    finish_step(scheduler, second)
    collected = make_request("c", [1] * 9)
    scheduler.add(collected)
    scheduler.schedule()
    check_scheduler(scheduler)
    assert collected.num_cached == 8


@pytest.mark.parametrize(("salts", "cached"), [(("x", "x"), 8), (("x", "y"), 0), ((None, "x"), 0), (("x", None), 0), ((None, None), 8)])
def test_prefix_is_shared_only_within_one_salt(salts: tuple[str | None, str | None], cached: int) -> None:
    scheduler = make_scheduler()
    requests = [make_request(str(i), [1] * 9, cache_salt=salt) for i, salt in enumerate(salts)]
    for request in requests:
        scheduler.add(request)
        run_all(scheduler)
    assert requests[1].num_cached == cached


def test_request_for_prompt_logprobs_computes_its_whole_prompt_but_fills_the_cache() -> None:
    scheduler = make_scheduler()
    requests = [make_request(name, [1] * 9, prompt_logprobs=wanted) for name, wanted in (("a", 1), ("b", 1), ("c", None))]
    for request in requests:
        scheduler.add(request)
        run_all(scheduler)
    assert [request.num_cached for request in requests] == [0, 0, 8]
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (9, 8)


def test_nothing_is_shared_when_the_prefix_cache_is_off() -> None:
    scheduler = make_scheduler(prefix_cache=False)
    requests = [make_request(name, [1] * 9) for name in "ab"]
    for request in requests:
        scheduler.add(request)
        run_all(scheduler)
    assert [request.num_cached for request in requests] == [0, 0]
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (0, 0)


def test_usage_is_the_share_of_pages_held() -> None:
    scheduler = make_scheduler(num_pages=11)
    request = make_request("a", [1] * 10)
    scheduler.add(request)
    run_step(scheduler)
    assert (scheduler.usage, scheduler.num_free_pages, scheduler.num_pages) == (pytest.approx(0.3), 7, 11)


def test_rows_that_cannot_grow_any_more_keep_no_pages_from_others() -> None:
    scheduler = make_scheduler(
        num_pages=21, page_size=8, max_rows=10, max_len=16, max_step_tokens=99, max_mixed_tokens=99, prefix_cache=False
    )
    for i in range(9):
        scheduler.add(make_request(str(i), [1] * 8, max_tokens=8))
    run_step(scheduler)
    run_step(scheduler)  # now each has its two pages
    scheduler.add(make_request("last", [1] * 8, max_tokens=8))
    assert len(run_step(scheduler)) == 10
