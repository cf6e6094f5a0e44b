"""The router between copies of a model: beginnings go where they are cached, work is shared, and nothing is forgotten or kept for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jaxserve.request import Request, SamplingParams
from jaxserve.scheduler.route import Router

PAGE = 4


def request(number: int, prompt: list[int], *, salt: str | None = None) -> Request:
    return Request(id=str(number), prompt_ids=prompt, params=SamplingParams(), arrival_s=0.0, seed=0, cache_salt=salt)


def test_requests_that_begin_alike_go_to_one_copy() -> None:
    router = Router(num_copies=3, page_size=PAGE)
    prefix = list(range(400))
    first = router.choose(request(0, [*prefix, 1]))
    other = router.choose(request(1, [7] * 300))
    assert other != first
    router.forget("0")
    for number in range(2, 5):
        assert router.choose(request(number, [*prefix, number])) == first
        router.forget(str(number))
    assert router.owner("1") == other
    assert router.owner("2") is None


def test_a_busy_copy_loses_requests_that_begin_alike() -> None:
    router = Router(num_copies=2, page_size=PAGE)
    prefix = list(range(8))
    assert {router.choose(request(number, [*prefix, number])) for number in range(4)} == {0, 1}


def test_requests_of_different_salts_are_strangers() -> None:
    router = Router(num_copies=2, page_size=PAGE)
    prompt = list(range(2000))
    copies = [router.choose(request(number, prompt, salt=salt)) for number, salt in enumerate(("a", "b"))]
    assert copies == [0, 1]


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), copies=st.integers(1, 4))
def test_loads_are_even_and_end_at_nothing(lengths: list[int], copies: int) -> None:
    router = Router(num_copies=copies, page_size=PAGE)
    chosen = [router.choose(request(i, [i * 1000 + j for j in range(n)])) for i, n in enumerate(lengths)]
    counts = [chosen.count(copy) for copy in range(copies)]
    assert max(counts) - min(counts) <= 1 + len(lengths) // 8
    for number in range(len(lengths)):
        assert router.owner(str(number)) == chosen[number]
        router.forget(str(number))
    assert router.loads == (0,) * copies
