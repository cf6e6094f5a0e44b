"""Tests of the plain data of a step."""

from __future__ import annotations

import dataclasses

import pytest

from jaxserve.scheduler.schedule import Plan, Row
from tests.scheduler.simulation import make_request


def test_row_holds_its_fields_and_cannot_be_changed() -> None:
    request = make_request("a", [1, 2, 3])
    row = Row(request, start=1, count=2, samples=True)
    assert (row.request, row.start, row.count, row.samples) == (request, 1, 2, True)
    assert row == Row(request, 1, 2, True) != Row(request, 1, 2, False)
    assert dataclasses.replace(row, start=0) == Row(request, 0, 2, True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.start = 2  # pyright: ignore[reportAttributeAccessIssue]


def test_plan_takes_back_one_row_and_its_tokens() -> None:
    requests = [make_request(name, [1, 2, 3]) for name in "abc"]
    plan = Plan()
    plan.rows = [Row(request, 0, count, True) for count, request in enumerate(requests, 1)]
    plan.num_tokens = 6
    assert plan.take_back(requests[1]) == Row(requests[1], 0, 2, True)
    assert plan.take_back(requests[1]) is None
    assert ([row.request for row in plan.rows], plan.num_tokens) == ([requests[0], requests[2]], 4)
