"""Masks of constrained requests: computed in threads, waited for a little, and given up where they take too long."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from jaxserve.engine import masks
from jaxserve.engine.masks import TOO_SLOW, Masks
from jaxserve.request import Request, SamplingParams, StructuredOutputs
from jaxserve.scheduler.schedule import Row

EOS = frozenset({0, 3})


class Steps:
    """A matcher of tokens 10, 11, 12 in turn that waits for a signal where a test wants it to."""

    def __init__(self, *, fails: Exception | None = None, waits: bool = False) -> None:
        self.taken: list[int] = []
        self.forbidden: list[Sequence[int]] = []
        self.go = threading.Event()
        self._fails = fails
        if not waits:
            self.go.set()

    @property
    def finished(self) -> bool:
        return len(self.taken) == 3

    def consume(self, token: int) -> None:
        self.taken.append(token)

    def fill(self, forbidden: Sequence[int] = ()) -> np.ndarray:
        assert self.go.wait(60)
        self.forbidden.append(forbidden)
        if self._fails is not None:
            raise self._fails
        return np.full(2, 10 + len(self.taken), np.int32)

    def begin(self) -> Steps:
        return self


def request_of(name: str, matcher: Steps | None, **params: object) -> Request:
    sampling = SamplingParams(**{"max_tokens": 9, **params})  # type: ignore[arg-type]
    return Request(id=name, prompt_ids=[1], params=sampling, constraint=matcher, slot=len(name), stop_ids=EOS | {7})


def settle(board: Masks) -> list[tuple[Request, str]]:
    failed = []
    while board.busy:
        failed += board.settle(idle=True)
    return failed


def test_mask_of_each_token_follows_the_one_before() -> None:
    board, request = Masks(EOS), request_of("a", Steps())
    board.add(request)
    board.add(request_of("free", None))
    for token in (10, 11, 12):
        assert request.awaits_mask
        assert settle(board) == []
        assert not request.awaits_mask
        slots, found = board.of([Row(request, 0, 1, True), Row(request_of("free", None), 0, 1, True)])
        assert (slots, found[0].tolist()) == ([1], [token, token])
        assert board.consume(request, [token]) == (token == 12)
        board.advance([request])
    settle(board)
    board.drop("a")
    assert board.of([]) == ([], [])


def test_rows_that_do_not_sample_need_no_mask() -> None:
    board, request = Masks(EOS), request_of("a", Steps(waits=True))
    board.add(request)
    assert board.of([Row(request, 0, 1, False)]) == ([], [])
    board.drop("a")
    request.constraint.go.set()  # type: ignore[union-attr]


def test_slow_mask_delays_its_own_request_alone() -> None:
    board = Masks(EOS, threads=2)
    slow, quick = request_of("s", Steps(waits=True)), request_of("qq", Steps())
    board.add(slow)
    board.add(quick)
    while quick.awaits_mask:
        assert board.settle(idle=False) == []
    assert slow.awaits_mask
    slow.constraint.go.set()  # type: ignore[union-attr]
    assert settle(board) == []
    assert not slow.awaits_mask


def test_request_that_ends_while_its_mask_is_computed_is_forgotten() -> None:
    board, request = Masks(EOS), request_of("a", Steps(waits=True))
    board.add(request)
    board.drop("a")
    assert not board.busy
    assert board.settle(idle=True) == []
    request.constraint.go.set()  # type: ignore[union-attr]


@pytest.mark.parametrize(("error", "says"), [(ValueError("too deep"), "too deep"), (RuntimeError("a bug"), TOO_SLOW)])
def test_failure_is_told_once_and_is_its_requests_alone(error: Exception, says: str) -> None:
    board = Masks(EOS, threads=1)
    bad, good = request_of("b", Steps(fails=error)), request_of("gg", Steps())
    board.add(bad)
    board.add(good)
    assert settle(board) == [(bad, says)]
    board.drop("b")
    assert not good.awaits_mask
    assert board.of([Row(good, 0, 1, True)])[0] == [2]


def test_mask_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "TIMEOUT_S", 0.0)
    board, request = Masks(EOS), request_of("a", Steps(waits=True))
    board.add(request)
    assert board.settle(idle=False) == [(request, TOO_SLOW)]
    request.constraint.go.set()  # type: ignore[union-attr]


def test_answer_whose_masks_take_too_long_in_all_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "SLOW_S", -1.0)
    monkeypatch.setattr(masks, "MAX_SLOW_S", 2.5)
    board, request = Masks(EOS), request_of("a", Steps())
    board.add(request)
    for _ in range(2):
        assert settle(board) == []
        board.advance([request])
    assert settle(board) == [(request, TOO_SLOW)]


@pytest.mark.parametrize(
    ("params", "forbidden"),
    [
        ({}, set()), ({"ignore_eos": True, "structured_outputs": StructuredOutputs(regex="a")}, EOS), ({"ignore_eos": True}, set()),
        ({"min_tokens": 1}, EOS | {7}), ({"stop_token_ids": [7]}, set()),
    ],
)  # fmt: skip
def test_tokens_that_would_end_too_early_are_left_out(params: dict[str, object], forbidden: set[int]) -> None:
    matcher = Steps()
    board = Masks(EOS)
    board.add(request_of("a", matcher, **params))
    settle(board)
    assert [set(ids) for ids in matcher.forbidden] == [forbidden]
