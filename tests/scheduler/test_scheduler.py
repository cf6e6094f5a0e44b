"""Tests of what the scheduler promises, one behaviour each; test_scheduler_random.py covers their mixtures."""

from __future__ import annotations

from typing import Any

import pytest

from jaxserve.errors import QueueFullError, UserError
from tests.scheduler.invariants import check_scheduler
from tests.scheduler.simulation import Simulation, finish_step, make_request, make_scheduler, run_all, run_step, shown


def test_prompt_is_cut_into_chunks_that_fit_a_step() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1] * 37, max_tokens=2))
    assert run_step(scheduler) == [("a", 0, 16, False)]
    assert run_step(scheduler) == [("a", 16, 16, False)]
    assert run_step(scheduler) == [("a", 32, 5, True)]
    assert run_step(scheduler) == [("a", 37, 1, True)]
    assert not scheduler.has_work


def test_several_prompts_share_a_step_in_order_of_arrival() -> None:
    scheduler = make_scheduler()
    for name, length in (("a", 5), ("b", 7), ("c", 9)):
        scheduler.add(make_request(name, [1] * length))
    assert run_step(scheduler) == [("a", 0, 5, True), ("b", 0, 7, True), ("c", 0, 4, False)]


def test_prompts_get_only_the_mixed_budget_while_an_answer_is_written() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1] * 3, max_tokens=3))
    run_step(scheduler)
    scheduler.add(make_request("b", [2] * 30))
    assert run_step(scheduler) == [("a", 3, 1, True), ("b", 0, 8, False)]
    assert run_step(scheduler) == [("a", 4, 1, True), ("b", 8, 8, False)]
    assert run_step(scheduler) == [("b", 16, 14, True)]


def test_prompts_go_first_in_steps_of_their_own_when_nothing_may_mix() -> None:
    scheduler = make_scheduler(max_mixed_tokens=0, max_rows=2)
    for name, length in (("a", 12), ("b", 20), ("c", 3)):
        scheduler.add(make_request(name, [1] * length, max_tokens=2))
    assert run_step(scheduler) == [("a", 0, 12, True), ("b", 0, 4, False)]
    assert run_step(scheduler) == [("b", 4, 16, True)]
    assert run_step(scheduler) == [("a", 12, 1, True), ("b", 20, 1, True)]
    assert run_step(scheduler) == [("c", 0, 3, True)]


def test_every_running_answer_goes_on_when_there_are_more_than_the_mixed_budget() -> None:
    scheduler = make_scheduler(max_mixed_tokens=2)
    for name in "abcde":
        scheduler.add(make_request(name, [1] * 3))
    run_step(scheduler)
    assert run_step(scheduler) == [(name, 3, 1, True) for name in "abcde"]


@pytest.mark.parametrize(("max_rows", "max_step_tokens"), [(3, 16), (16, 3)])
def test_no_more_requests_run_than_rows_or_tokens_of_a_step(max_rows: int, max_step_tokens: int) -> None:
    scheduler = make_scheduler(max_rows=max_rows, max_step_tokens=max_step_tokens, max_mixed_tokens=16)
    for name in "abcde":
        scheduler.add(make_request(name, [1], max_tokens=3))
    assert len(run_step(scheduler)) == scheduler.num_running == 3
    assert scheduler.num_waiting == 2
    run_all(scheduler)


def test_step_without_work_is_empty() -> None:
    schedule = make_scheduler().schedule()
    assert (schedule.rows, schedule.preempted, schedule.num_tokens) == ((), (), 0)


def test_lower_priority_number_is_admitted_first_and_ties_go_by_arrival() -> None:
    scheduler = make_scheduler(max_rows=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", 0), ("e", -1)):
        scheduler.add(make_request(name, [1], priority=priority, max_tokens=1))
    assert [run_step(scheduler)[0][0] for _ in range(5)] == ["e", "b", "d", "a", "c"]


def test_request_in_the_queue_cannot_be_overtaken_by_a_smaller_one() -> None:
    scheduler = make_scheduler(num_pages=11)
    scheduler.add(make_request("a", [1] * 16, max_tokens=9))
    run_step(scheduler)
    scheduler.add(make_request("large", [2] * 32))
    scheduler.add(make_request("small", [3]))
    for _ in range(8):
        assert [row[0] for row in run_step(scheduler)] == ["a"]
    assert run_step(scheduler)[0][0] == "large"


def test_second_step_is_scheduled_before_the_first_is_collected() -> None:
    scheduler = make_scheduler()
    request = make_request("a", [1] * 3, max_tokens=3)
    scheduler.add(request)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert shown(second) == [("a", 3, 1, True)]
    assert (request.num_in_flight, request.num_known, request.num_tokens) == (2, 3, 5)
    assert finish_step(scheduler, first, 7) == [("a", (7,))]
    third = scheduler.schedule()
    assert shown(third) == [("a", 4, 1, True)]
    assert finish_step(scheduler, second, 8) == [("a", (8,))]
    assert scheduler.schedule().rows == (), "the third token is in flight and is the last"
    assert finish_step(scheduler, third, 9) == [("a", (9,))]
    assert (request.output_ids, request.finish_reason) == ([7, 8, 9], "length")


def test_row_is_ignored_when_its_request_finished_in_the_step_before() -> None:
    scheduler = make_scheduler()
    request = make_request("a", [1] * 3, eos=frozenset([7]))
    scheduler.add(request)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert finish_step(scheduler, first, 7) == [("a", (7,))]
    assert scheduler.usage == 0
    assert finish_step(scheduler, second, 8) == []
    assert (request.output_ids, request.num_in_flight) == ([7], 0)


@pytest.mark.parametrize(
    ("params", "tokens", "reason", "stop_reason"),
    [
        ({"eos": frozenset([7])}, [5, 7], "stop", None),
        ({"stop_token_ids": [7]}, [5, 7], "stop", 7),
        ({"eos": frozenset([7]), "stop_token_ids": [6]}, [5, 6], "stop", 6),
        ({"eos": frozenset([7]), "max_tokens": 2}, [5, 7], "stop", None),
        ({"max_tokens": 2}, [7, 7], "length", None),
        ({"max_tokens": 9}, [5, 5, 5], "length", None),  # max_len 10
        ({"eos": frozenset([7]), "min_tokens": 3, "max_tokens": 3}, [7, 7, 7], "stop", None),
        ({"eos": frozenset([7]), "min_tokens": 2}, [7, 7], "stop", None),
        ({"eos": frozenset([7]), "min_tokens": 9, "max_tokens": 9}, [7, 7, 7], "length", None),  # max_len 10
    ],
)
def test_answer_ends_for_the_right_reason(params: dict[str, Any], tokens: list[int], reason: str, stop_reason: int | None) -> None:
    scheduler = make_scheduler(max_len=10)
    request = make_request("a", [1] * 7, **params)
    scheduler.add(request)
    left = iter(tokens)
    run_all(scheduler, lambda: next(left))
    assert (request.output_ids, request.finish_reason, request.stop_reason) == (tokens, reason, stop_reason)


def test_tokens_after_a_stop_in_the_same_step_are_dropped() -> None:
    scheduler = make_scheduler()
    request = make_request("a", [1], eos=frozenset([7]))
    scheduler.add(request)
    ((_, ids),) = scheduler.update(scheduler.schedule(), [[5, 7, 6]])
    assert (ids, request.output_ids) == ((5, 7), [5, 7])


def test_prompt_that_exceeds_the_context_is_refused() -> None:
    scheduler = make_scheduler(max_len=20)
    with pytest.raises(UserError, match=r"20 tokens.* at most 19") as caught:
        scheduler.add(make_request("a", [1] * 20))
    assert (caught.value.field, caught.value.code) == ("prompt", "context_length_exceeded")
    assert not scheduler.has_work


def test_prompt_that_can_never_fit_the_pool_is_refused_and_the_largest_that_fits_is_served() -> None:
    scheduler = make_scheduler(num_pages=4)
    with pytest.raises(UserError, match=r"13 tokens.* holds 12"):
        scheduler.add(make_request("a", [1] * 13))
    request = make_request("b", [1] * 12, max_tokens=5)
    scheduler.add(request)
    run_all(scheduler)
    assert (len(request.output_ids), request.finish_reason) == (1, "length")


def test_answer_that_fills_the_whole_pool_ends_with_length() -> None:
    scheduler = make_scheduler(num_pages=4)
    request = make_request("a", [1] * 5, max_tokens=50)
    scheduler.add(request)
    run_all(scheduler)
    assert (request.num_known, request.finish_reason, request.num_preemptions) == (13, "length", 0)


def test_queue_refuses_more_requests_than_allowed() -> None:
    scheduler = make_scheduler(max_queue=2)
    for name in "ab":
        scheduler.add(make_request(name, [1]))
    with pytest.raises(QueueFullError) as caught:
        scheduler.add(make_request("c", [1]))
    assert caught.value.retry_after_s > 0
    assert (scheduler.num_waiting, scheduler.num_waiting_tokens) == (2, 2)
    run_step(scheduler)
    scheduler.add(make_request("d", [1]))


def test_queue_refuses_more_prompt_tokens_than_allowed_unless_it_is_empty() -> None:
    scheduler = make_scheduler(max_queue_tokens=10)
    scheduler.add(make_request("a", [1] * 12))
    with pytest.raises(QueueFullError):
        scheduler.add(make_request("b", [1]))
    run_step(scheduler)
    scheduler.add(make_request("c", [1] * 10))
    assert scheduler.num_waiting_tokens == 10


def test_failed_step_ends_its_requests_and_no_others() -> None:
    scheduler = make_scheduler(max_rows=2)
    requests = [make_request(name, [1] * 3) for name in "abc"]
    for request in requests:
        scheduler.add(request)
    schedule = scheduler.schedule()
    scheduler.finish(requests[1], "abort")
    assert scheduler.fail(schedule) == [requests[0]]
    check_scheduler(scheduler)
    assert [request.finish_reason for request in requests] == ["error", "abort", None]
    assert scheduler.fail(schedule) == []
    run_all(scheduler)
    assert requests[2].finish_reason == "length"


def test_finish_happens_once_when_called_twice() -> None:
    scheduler = make_scheduler()
    request = make_request("a", [1] * 3)
    scheduler.add(request)
    run_step(scheduler)
    scheduler.finish(request, "stop", "END")
    scheduler.finish(request, "abort")
    check_scheduler(scheduler)
    assert (request.finish_reason, request.stop_reason, scheduler.num_free_pages) == ("stop", "END", 39)


def test_stop_string_outranks_length_when_the_last_token_completes_it() -> None:
    scheduler = make_scheduler()
    request = make_request("a", [1] * 3, max_tokens=1)
    scheduler.add(request)
    run_step(scheduler)
    assert request.finish_reason == "length"
    scheduler.finish(request, "stop", "END")
    assert (request.finish_reason, request.stop_reason) == ("stop", "END")


def test_slot_stays_the_same_while_running_and_is_reused_afterwards() -> None:
    scheduler = make_scheduler(max_rows=2)
    a, b, c = (make_request(name, [1] * 3, max_tokens=count) for name, count in (("a", 9), ("b", 2), ("c", 2)))
    for request in (a, b, c):
        scheduler.add(request)
    run_step(scheduler)
    slots = (a.slot, b.slot)
    assert sorted(slots) == [0, 1]
    run_step(scheduler)
    run_step(scheduler)
    assert (a.slot, b.slot, c.slot) == (slots[0], -1, slots[1])


def test_long_prompts_do_not_delay_running_answers() -> None:
    simulation = Simulation(make_scheduler(num_pages=100), page_size=4, max_len=100)
    simulation.add(make_request("answer", [1] * 3, max_tokens=40))
    simulation.step(overlap=True)
    for number in range(4):
        simulation.add(make_request(str(number), [2 + number] * 60))
    for _ in range(38):
        schedule = simulation.step(overlap=True)
        assert schedule.rows[0].request.id == "answer"
        assert schedule.num_tokens <= 9
    simulation.drain()
