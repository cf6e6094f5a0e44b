"""Requests under a constraint: their next token waits for the last one, and for the mask that depends on it; nobody else does."""

from __future__ import annotations

from typing import Any

from jaxserve.request import Matcher, Request
from tests.scheduler.invariants import check_scheduler
from tests.scheduler.simulation import finish_step, make_request, make_scheduler, run_all, run_step, shown


class Anything:
    """A constraint that the scheduler must only notice."""

    def begin(self) -> Matcher:
        raise AssertionError("matchers are the engine's business")


def constrained(name: str, prompt_ids: list[int], **params: Any) -> Request:
    request = make_request(name, prompt_ids, **params)
    request.constraint = Anything()
    return request


def test_constrained_row_is_not_scheduled_ahead_while_others_are() -> None:
    scheduler = make_scheduler()
    scheduler.add(constrained("c", [1] * 3))
    scheduler.add(make_request("p", [2] * 3))
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert shown(second) == [("p", 3, 1, True)]
    finish_step(scheduler, first)
    third = scheduler.schedule()
    assert shown(third) == [("c", 3, 1, True), ("p", 4, 1, True)]
    finish_step(scheduler, second)
    finish_step(scheduler, third)
    run_all(scheduler)


def test_row_waits_for_its_mask_and_for_nothing_else() -> None:
    scheduler = make_scheduler()
    request = constrained("c", [1] * 3)
    scheduler.add(request)
    run_step(scheduler)
    request.awaits_mask = True
    assert scheduler.schedule().rows == ()
    request.awaits_mask = False
    assert run_step(scheduler) == [("c", 3, 1, True)]


def test_prompt_is_computed_but_for_its_last_token_while_the_first_mask_is_not_there() -> None:
    scheduler = make_scheduler()
    request = constrained("c", [1] * 20)
    request.awaits_mask = True
    scheduler.add(request)
    scheduler.add(make_request("p", [2] * 3, max_tokens=1))
    assert run_step(scheduler) == [("c", 0, 16, False)]
    assert run_step(scheduler) == [("c", 16, 3, False), ("p", 0, 3, True)]
    assert scheduler.schedule().rows == ()
    request.awaits_mask = False
    assert run_step(scheduler) == [("c", 19, 1, True)]


def test_prompt_of_one_token_waits_in_its_slot() -> None:
    scheduler = make_scheduler()
    request = constrained("c", [1])
    request.awaits_mask = True
    scheduler.add(request)
    assert scheduler.schedule().rows == ()
    assert scheduler.num_running == 1
    check_scheduler(scheduler)
    request.awaits_mask = False
    assert run_step(scheduler) == [("c", 0, 1, True)]


def test_constrained_answers_get_pages_and_are_preempted_like_others() -> None:
    scheduler = make_scheduler(num_pages=8, page_size=4)
    requests = [constrained(name, [1] * 6, max_tokens=14) for name in "abc"]
    for request in requests:
        scheduler.add(request)
    run_all(scheduler)
    assert scheduler.num_preemptions > 0
    assert all(len(request.output_ids) == 14 for request in requests)
