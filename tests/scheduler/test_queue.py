"""Tests of the order of requests."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.scheduler.prefix import PrefixIndex
from jaxserve.scheduler.queue import Entry, Queue, Rank, move
from tests.scheduler.simulation import make_request

INDEX = PrefixIndex(4, b"secret")


def make_entry(queue: Queue, rank: Rank) -> Entry:
    request = make_request(str(rank), [1])
    entry = Entry(request=request, rank=rank, max_output=3, chain=INDEX.chain(request), queue=queue)
    queue.insert(entry)
    return entry


@given(st.lists(st.tuples(st.integers(-1, 1), st.sampled_from([0.5, 1.5])), max_size=12), st.randoms(use_true_random=False))
def test_queue_is_in_order_of_priority_then_arrival_after_any_removals(keys: list[tuple[int, float]], rng: random.Random) -> None:
    queue = Queue()
    entries = [make_entry(queue, (priority, arrival_s, number)) for number, (priority, arrival_s) in enumerate(keys)]
    rng.shuffle(entries)
    while entries:
        ranks = [entry.rank for entry in queue]
        assert ranks == sorted(entry.rank for entry in entries)
        assert len(queue) == len(entries)
        assert queue.first is not None
        assert queue.last is not None
        assert (queue.first.rank, queue.last.rank) == (ranks[0], ranks[-1])
        queue.remove(entries.pop())
    assert queue.first is None
    assert queue.last is None


def test_move_leaves_an_entry_in_one_queue() -> None:
    one, two = Queue(), Queue()
    entry = make_entry(one, (0, 0.0, 1))
    move(entry, two)
    assert (list(one), list(two), entry.queue) == ([], [entry], two)


def test_removing_an_entry_from_a_queue_that_lacks_it_is_refused() -> None:
    one, two = Queue(), Queue()
    make_entry(one, (0, 0.0, 1))
    entry = make_entry(two, (0, 0.0, 1))
    with pytest.raises(AssertionError, match="not in the queue"):
        one.remove(entry)
