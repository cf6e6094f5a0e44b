"""What one step computes: the rows that the scheduler chose, as the runner reads them."""

from __future__ import annotations

import dataclasses

from jaxserve.request import Request


@dataclasses.dataclass(frozen=True, slots=True, init=False)
class Row:
    """One request's part of a step: compute its tokens [start, start + count).

    Args:
      samples: whether the logits of the last of these tokens are sampled.
    """

    request: Request
    start: int
    count: int
    samples: bool

    def __init__(self, request: Request, start: int, count: int, samples: bool) -> None:
        _set_request(self, request)
        _set_start(self, start)
        _set_count(self, count)
        _set_samples(self, samples)


# A step makes up to max_rows rows: 0.3 us each this way, 0.9 us by the __init__ that dataclasses generates for a frozen class.
_set_request, _set_start, _set_count, _set_samples = (vars(Row)[field.name].__set__ for field in dataclasses.fields(Row))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One step.

    Args:
      rows: at most one per request; those of a single token that continue an answer come first.
      preempted: requests that lost their pages and slot while this step was put together.
      num_tokens: sum of the rows' counts.
    """

    rows: tuple[Row, ...]
    preempted: tuple[Request, ...]
    num_tokens: int


class Plan:
    """A schedule in the making."""

    __slots__ = ("num_tokens", "preempted", "rows")

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.preempted: list[Request] = []
        self.num_tokens = 0

    def take_back(self, request: Request) -> Row | None:
        """Remove a request's row, if it has one."""
        for i in range(len(self.rows) - 1, -1, -1):
            row = self.rows[i]
            if row.request is request:
                self.num_tokens -= row.count
                return self.rows.pop(i)
        return None
