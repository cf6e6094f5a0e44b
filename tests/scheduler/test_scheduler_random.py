"""Random requests, aborts, failures and overlap: every invariant after every call, and every answer as if alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from jaxserve.errors import QueueFullError, UserError
from tests.scheduler.invariants import check_scheduler
from tests.scheduler.simulation import VOCAB, Simulation, make_request, make_scheduler

TOKEN = st.integers(0, VOCAB - 1)
SIZES = st.fixed_dictionaries(
    {
        "num_pages": st.integers(3, 30),
        "page_size": st.sampled_from([1, 2, 3, 4, 7]),
        "max_rows": st.integers(1, 6),
        "max_step_tokens": st.integers(1, 20),
        "max_mixed_tokens": st.integers(0, 20),
        "max_len": st.integers(8, 60),
        "prefix_cache": st.booleans(),
        "max_queue": st.just(9),
        "max_queue_tokens": st.just(150),
    }
)
# Few beginnings and few tokens, so that prompts share pages.
ARGUMENTS = st.fixed_dictionaries(
    {
        "head": st.integers(0, 20),
        "tail": st.lists(st.integers(0, 1), min_size=1, max_size=12),
        "priority": st.integers(-1, 1),
        "max_tokens": st.integers(1, 30),
        "min_tokens": st.integers(0, 3),
        "eos": st.frozensets(TOKEN, max_size=1),
        "stop_token_ids": st.lists(TOKEN, max_size=1),
        "cache_salt": st.sampled_from([None, None, None, "a"]),
        "prompt_logprobs": st.sampled_from([None, None, 1]),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    """Calls in any order that an engine could make them; ours has at most two steps in flight, this one three."""

    @initialize(sizes=SIZES)
    def start(self, sizes: dict[str, Any]) -> None:
        self.simulation = Simulation(make_scheduler(**sizes), page_size=sizes["page_size"], max_len=sizes["max_len"])
        self.num_added = 0

    @rule(arguments=ARGUMENTS)
    def add(self, arguments: dict[str, Any]) -> None:
        self.num_added += 1
        prompt_ids = [5] * arguments.pop("head") + arguments.pop("tail")
        arguments["min_tokens"] = min(arguments["min_tokens"], arguments["max_tokens"])
        request = make_request(str(self.num_added), prompt_ids, **arguments)
        try:
            self.simulation.add(request)
        except (QueueFullError, UserError):
            check_scheduler(self.simulation.scheduler)

    @precondition(lambda self: len(self.simulation.in_flight) <= 2)
    @rule()
    def dispatch(self) -> None:
        self.simulation.dispatch()

    @precondition(lambda self: self.simulation.in_flight)
    @rule()
    def collect(self) -> None:
        self.simulation.collect()

    @rule()
    def step(self) -> None:
        self.simulation.step(overlap=True)

    @precondition(lambda self: len(self.simulation.in_flight) <= 2)
    @rule()
    def dispatch_a_step_that_fails(self) -> None:
        self.simulation.dispatch(fails=True)

    @rule(choice=st.integers(0, 1000))
    def abort(self, choice: int) -> None:
        if requests := self.simulation.requests:
            request = requests[choice % len(requests)]
            reason = request.finish_reason
            self.simulation.scheduler.finish(request, "abort")
            assert request.finish_reason == (reason or "abort")
            check_scheduler(self.simulation.scheduler)

    @rule(preempt=st.booleans())
    def reset_prefix_cache(self, preempt: bool) -> None:
        scheduler = self.simulation.scheduler
        done = scheduler.reset_prefix_cache(preempt=preempt)
        assert done == (scheduler.num_running == 0)
        assert done or not preempt
        check_scheduler(scheduler)

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain()


TestSchedulerMachine: Any = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=120, stateful_step_count=60)


@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_scheduler_gives_each_request_its_own_answer_when_pages_are_scarce(overlap: bool, prefix_cache: bool) -> None:
    rng = random.Random(7)
    scheduler = make_scheduler(num_pages=24, max_rows=7, prefix_cache=prefix_cache, max_len=60)
    simulation = Simulation(scheduler, page_size=4, max_len=60)
    heads = [[rng.randrange(VOCAB) for _ in range(24)] for _ in range(3)]
    for number in range(1200):
        if scheduler.num_waiting < 8 and rng.random() < 0.4:
            head = rng.choice(heads)[: rng.randrange(25)]
            prompt = head + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 8))]
            eos = frozenset([3]) if rng.random() < 0.5 else frozenset[int]()
            simulation.add(make_request(str(number), prompt, priority=rng.randrange(2), max_tokens=rng.randrange(1, 40), eos=eos))
        simulation.step(overlap=overlap)
        if rng.random() < 0.02:
            scheduler.finish(rng.choice(simulation.requests), "abort")
            check_scheduler(scheduler)
    simulation.drain(overlap=overlap)
    finished = [request.finish_reason for request in simulation.requests]
    assert scheduler.num_preemptions > 20
    assert set(finished) == {"stop", "length", "abort"}
    assert (scheduler.prefix_hits > 500) == prefix_cache


@pytest.mark.parametrize("steps_before", range(14))
@pytest.mark.parametrize("collected", [False, True])
def test_abort_frees_everything_and_harms_nobody_at_any_point(steps_before: int, collected: bool) -> None:
    scheduler = make_scheduler(num_pages=16, max_mixed_tokens=5)
    simulation = Simulation(scheduler, page_size=4, max_len=100)
    victim = make_request("victim", [1] * 21, max_tokens=6)
    simulation.add(make_request("before", [1] * 9, max_tokens=12))
    simulation.add(victim)
    simulation.add(make_request("after", [1] * 18, max_tokens=12))
    for _ in range(steps_before):
        simulation.step(overlap=True)
    if collected and simulation.in_flight:
        simulation.collect()
    scheduler.finish(victim, "abort")
    check_scheduler(scheduler)
    assert (victim.status, victim.pages, victim.slot) == ("finished", [], -1)
    simulation.drain()
    assert [request.finish_reason for request in simulation.requests if request is not victim] == ["length", "length"]
