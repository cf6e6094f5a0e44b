"""Requests in order of priority and arrival, with what the scheduler keeps beside each.

Every unfinished request is in exactly one queue:

    add --> fresh --> prefilling --> decoding --> finished
                        ^    |          |
                        |    v          v
                       preempted <------+          (and from each of them: finished)
"""

from __future__ import annotations

import bisect
import dataclasses
import operator
from collections.abc import Callable, Iterator

from jaxserve.request import Request
from jaxserve.scheduler.prefix import PrefixChain

Rank = tuple[int, float, int]


@dataclasses.dataclass(slots=True, eq=False, kw_only=True)
class Entry:
    """The scheduler's record of an unfinished request.

    Args:
      rank: (priority, arrival in seconds, number of arrival); the lowest goes first, no two are equal.
      max_output: tokens after which the answer ends with "length".
      chain: digests of its pages.
      queue: where it is.
      room: positions below this can be computed without asking for a page and without exceeding max_output.
      num_indexed: leading pages that were matched, indexed, or found to have an equal in the index.
      index_at: number of computed tokens at which the next page is to be indexed.
      chunks_in_flight: rows without a sample that were dispatched and not collected yet.
    """

    request: Request
    rank: Rank
    max_output: int
    chain: PrefixChain
    queue: Queue
    room: int = 0
    num_indexed: int = 0
    index_at: int = 0
    chunks_in_flight: int = 0

    def check(self, page_size: int) -> None:
        """Assert what holds for a request by itself."""
        request = self.request
        num_output, in_flight = len(request.output_ids), request.num_in_flight
        assert request.finish_reason is None, f"{request=} has finished"
        assert num_output < self.max_output, f"{request=} should have finished: {self.max_output=}"
        assert num_output + in_flight <= self.max_output, f"{request=} exceeds {self.max_output=}"
        assert min(in_flight, self.chunks_in_flight) >= 0, f"{in_flight=} {self.chunks_in_flight=}"
        assert len(request.pages) == -(-request.num_computed // page_size), f"{request.num_computed=} {request.pages=}"
        if request.status == "running":
            assert request.num_tokens > request.num_computed, f"{request=} runs but lacks nothing"
            assert self.num_indexed * page_size <= min(request.num_computed, request.num_known), f"{self.num_indexed=} {request=}"
        else:
            assert request.slot == -1, f"{request=} waits but has a slot"
            assert request.num_computed == 0, f"{request=} waits but holds pages"


_rank_of: Callable[[Entry], Rank] = operator.attrgetter("rank")


class Queue:
    """Entries sorted by rank. Iteration tolerates that entries behind the current one are removed."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    @property
    def first(self) -> Entry | None:
        """The entry whose turn it is."""
        return self._entries[0] if self._entries else None

    @property
    def last(self) -> Entry | None:
        """The entry that gives way first."""
        return self._entries[-1] if self._entries else None

    def insert(self, entry: Entry) -> None:
        """Put a new entry in its place."""
        bisect.insort(self._entries, entry, key=_rank_of)
        entry.queue = self

    def remove(self, entry: Entry) -> None:
        """Take an entry out."""
        i = bisect.bisect_left(self._entries, entry.rank, key=_rank_of)
        assert self._entries[i] is entry, f"request {entry.request.id} is not in the queue that it names"
        del self._entries[i]


def move(entry: Entry, queue: Queue) -> None:
    """Move an entry from its queue to another."""
    entry.queue.remove(entry)
    queue.insert(entry)
