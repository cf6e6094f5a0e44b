"""A budget for reasoning: counted from the marker on, its end forced, whatever the model would rather say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from jaxserve.engine.bounds import ThinkingMarks, bound, goes_in_circles
from jaxserve.request import RepetitionDetection, SamplingParams
from jaxserve.runner.seeding import pack_mask

V = 70
START, END, PAIR = (60,), (61,), (62, 63)


def marks(*, end: tuple[int, ...] = END, always: bool = False) -> ThinkingMarks:
    return ThinkingMarks(starts=(START,), ends=(end,), always=always)


def unpack(mask: np.ndarray) -> set[int]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:V]
    return set(np.flatnonzero(bits).tolist())


def follow(found: ThinkingMarks, budget: int, prompt: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """What comes of a model that wants to say `wanted`."""
    constraint = bound(None, SamplingParams(thinking_token_budget=budget), prompt, found, V)
    assert constraint is not None
    matcher, said = constraint.begin(), []
    for token in wanted:
        allowed = unpack(matcher.fill())
        assert allowed in (set(range(V)), {next(iter(allowed))})
        said.append(token if token in allowed else allowed.pop())
        matcher.consume(said[-1])
        assert not matcher.finished
    return said


@pytest.mark.parametrize(
    ("prompt", "wanted", "said"),
    [
        ([1, 2], [60, 1, 2, 3, 4], [60, 1, 2, 61, 4]),
        ([1, 60], [1, 2, 3, 4], [1, 2, 61, 4]),
        ([1, 60, 7, 8, 9], [1, 2], [61, 2]),
        ([60, 5, 61], [1, 2, 3, 4], [1, 2, 3, 4]),
        ([60], [1, 61, 2, 3, 4], [1, 61, 2, 3, 4]),
        ([1], [60, 1, 61, 60, 2, 3, 4, 5], [60, 1, 61, 60, 2, 3, 61, 5]),
    ],
)
def test_reasoning_ends_when_its_budget_is_spent(prompt: list[int], wanted: list[int], said: list[int]) -> None:
    assert follow(marks(), 2, prompt, wanted) == said


def test_end_of_several_tokens_is_forced_from_where_it_was_begun() -> None:
    assert follow(marks(end=PAIR), 2, [60], [1, 2, 3, 4, 5]) == [1, 2, 62, 63, 5]
    assert follow(marks(end=PAIR), 2, [60], [1, 62, 3, 4]) == [1, 62, 63, 4]


def test_answer_that_always_begins_with_reasoning_counts_from_its_start() -> None:
    assert follow(marks(always=True), 1, [5, 6, 7], [1, 2, 3]) == [1, 61, 3]
    assert follow(marks(always=True), 1, [60, 61], [1, 2, 3]) == [1, 2, 3]


def test_no_budget_left_ends_it_at_once() -> None:
    assert follow(marks(), 0, [60], [1, 2]) == [61, 2]


def test_no_bounds_leave_the_constraint_as_it_is() -> None:
    for params in (SamplingParams(), SamplingParams(thinking_token_budget=-1), SamplingParams(allowed_token_ids=[1])):
        assert bound(None, params, [1], marks(), V) is None


def test_forced_end_outranks_the_allowed_tokens_and_min_tokens_their_stops() -> None:
    params = SamplingParams(thinking_token_budget=0, allowed_token_ids=[3, 4])
    constraint = bound(None, params, [60], marks(), V)
    assert constraint is not None
    matcher = constraint.begin()
    assert unpack(matcher.fill((3,))) == {61}
    matcher.consume(61)
    assert unpack(matcher.fill((3,))) == {4}
    with pytest.raises(ValueError, match="allowed_token_ids"):
        matcher.fill((3, 4))


def test_mask_has_a_bit_for_each_token() -> None:
    assert unpack(pack_mask([0, 31, 32, 69], V)) == {0, 31, 32, 69}


@pytest.mark.parametrize("seed", range(3))
def test_circles_are_found_where_the_last_tokens_repeat(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = 0
    for _ in range(300):
        ids = rng.integers(0, 2, rng.integers(0, 24)).tolist()
        low, high, count = int(rng.integers(1, 4)), int(rng.integers(4, 6)), int(rng.integers(2, 5))
        detection = RepetitionDetection(min_pattern_size=low, max_pattern_size=high, min_count=count)
        expected = any(
            size * count <= len(ids) and ids[len(ids) - size * count :] == ids[len(ids) - size :] * count for size in range(low, high + 1)
        )
        assert goes_in_circles(ids, detection) == expected
        found += expected
    assert 10 < found < 290
