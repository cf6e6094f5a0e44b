"""What must hold of a scheduler between any two calls."""

from __future__ import annotations

import itertools

from jaxserve.scheduler.scheduler import Scheduler


def check_scheduler(scheduler: Scheduler) -> None:
    """Assert every invariant."""
    queues = {"waiting": (scheduler._fresh,), "preempted": (scheduler._preempted,), "running": (scheduler._prefilling, scheduler._decoding)}
    placed = [(entry, queue, status) for status, group in queues.items() for queue in group for entry in queue]
    assert len(placed) == len(scheduler._entries), f"{len(placed)=} {len(scheduler._entries)=}"
    for entry, queue, status in placed:
        assert scheduler._entries.get(entry.request.id) is entry, f"request {entry.request.id} is queued but unknown"
        assert entry.queue is queue, f"request {entry.request.id} is in another queue than it names"
        assert entry.request.status == status, f"request {entry.request.id}: {entry.request.status=} {status=}"
        entry.check(scheduler._page_size)
    for queue in (scheduler._fresh, scheduler._preempted, scheduler._prefilling, scheduler._decoding):
        ranks = [entry.rank for entry in queue]
        assert all(a < b for a, b in itertools.pairwise(ranks)), f"{ranks=} are not sorted"
    for entry in scheduler._decoding:
        assert entry.request.num_tokens - entry.request.num_computed == 1, f"{entry.request=} lacks more than its next token"
    indexed = scheduler._pool.indexed()
    for entry in (*scheduler._prefilling, *scheduler._decoding):
        unfinished = entry.request.pages[entry.num_indexed :]
        assert not indexed.intersection(unfinished), f"{unfinished=} are still written but can be found by others"
    running = [entry.request for entry, _, status in placed if status == "running"]
    slots = sorted([request.slot for request in running] + scheduler._slots)
    assert slots == list(range(scheduler._num_slots)), f"{slots=}"
    waiting_tokens = sum(len(entry.request.prompt_ids) for entry, _, status in placed if status != "running")
    assert waiting_tokens == scheduler.num_waiting_tokens, f"{waiting_tokens=} {scheduler.num_waiting_tokens=}"
    scheduler._pool.check([request.pages for request in running])
    scheduler._index.check(indexed)
